"""Other road users against closed forms, and that they keep out of each other's way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from test.core.driving.streets import (
    BACK,
    CAR,
    FAR,
    FORTH,
    PERSON,
    WIDTH,
    ego,
    ego_box,
    light,
    scenario,
    straight,
    street,
)
from vla_core.sim.driving.geometry import Boxes, overlaps
from vla_core.sim.driving.layout import EgoState, Lane, RoadUser, Scenario, Spawn
from vla_core.sim.driving.traffic import Traffic

DT = 0.1
PAINT = (0.5, 0.5, 0.5)


def car(s: float = 0.0, speed: float = 8.0, path: tuple[int, ...] = (FORTH,), **options: float) -> Spawn:
    return Spawn(kind="car", size=CAR, colour=PAINT, path=path, s=s, speed_mps=speed, **options)  # type: ignore[arg-type]


def pedestrian(start: tuple[float, float], end: tuple[float, float], trigger: float) -> Spawn:
    return Spawn(kind="pedestrian", size=PERSON, colour=PAINT, speed_mps=1.4, walk=(start, end), trigger_m=trigger)


def watch(
    told: Scenario, seconds: float, where: Callable[[float], EgoState] = lambda time_s: FAR, dt: float = DT
) -> list[tuple[RoadUser, ...]]:
    traffic = Traffic(told)
    return [traffic.step(step * dt, dt, where(step * dt)) for step in range(round(seconds / dt))]


def xs(seen: Sequence[tuple[RoadUser, ...]], number: int = 0) -> np.ndarray:
    return np.array([next(user.pose.x for user in users if user.id == number) for users in seen])


def test_alone_it_keeps_its_speed_and_its_lane() -> None:
    seen = watch(scenario(spawns=[car(s=20.0)]), 10.0)
    np.testing.assert_allclose(xs(seen), 20 + 8 * DT * np.arange(1, 101), rtol=1e-6)
    assert all(user.pose.y == -WIDTH / 2 and user.pose.heading == 0.0 for (user,) in seen)
    oncoming = watch(scenario(spawns=[car(s=20.0, path=(BACK,), offset_m=0.5)]), 1.0)[-1][0]
    assert oncoming.pose.x == pytest.approx(200 - 28)
    assert oncoming.pose.y == pytest.approx(WIDTH / 2 - 0.5)  # its left is the road's right
    assert abs(oncoming.pose.heading) == pytest.approx(math.pi)


def test_no_faster_than_the_lane() -> None:
    (user,) = watch(scenario(street(speed=5.0), [car(speed=20.0)]), 4.0)[-1]
    assert user.speed_mps == pytest.approx(5.0)


def test_it_leaves_the_world_at_the_end_of_its_path() -> None:
    seen = watch(scenario(spawns=[car(s=190.0), car(s=0.0, speed=0.0)]), 2.0)
    assert [len(users) for users in seen].count(2) == 12  # 10 m at 8 m/s
    assert [user.id for user in seen[-1]] == [1]


def test_a_parked_car_stands() -> None:
    (user,) = watch(scenario(spawns=[car(s=30.0, speed=0.0, offset_m=-1.0)]), 5.0)[-1]
    assert (user.pose.x, user.pose.y, user.speed_mps) == (30.0, -WIDTH / 2 - 1.0, 0.0)


def test_a_bus_stands_where_it_stops() -> None:
    seen = watch(scenario(spawns=[car(s=10.0, stop_at_s=60.0)]), 40.0)
    assert xs(seen)[-1] == pytest.approx(60.0, abs=0.3)
    assert seen[-1][0].speed_mps < 0.02
    already = watch(scenario(spawns=[car(s=60.0, stop_at_s=60.0)]), 5.0)
    assert (xs(already) == 60.0).all()


def test_a_platoon_settles_at_the_models_distance() -> None:
    """At equal speeds the distance that is kept is s0 + v T."""
    seen = watch(scenario(street(length=700.0), [car(s=20.0, speed=8.0), car(s=60.0, speed=5.0)]), 100.0)
    gap = xs(seen, 1)[-1] - xs(seen, 0)[-1] - CAR[0]
    assert gap == pytest.approx(2.0 + 5 * 1.2, rel=0.01)


def test_it_stops_behind_the_ego_vehicle_and_follows_it() -> None:
    def where(time_s: float) -> EgoState:
        return ego(60.0 + 3.0 * max(time_s - 20.0, 0.0), speed=3.0 if time_s > 20 else 0.0)

    seen = watch(scenario(spawns=[car(s=10.0)]), 30.0, where)
    gap = 60.0 - 0.9 - xs(seen)[190] - CAR[0] / 2
    assert 1.5 < gap < 2.5
    assert seen[-1][0].speed_mps == pytest.approx(3.0, abs=0.5)


@pytest.mark.parametrize("beside", [(40.0, WIDTH / 2), (40.0, -WIDTH / 2 - 2.4)])
def test_what_is_beside_its_corridor_does_not_matter(beside: tuple[float, float]) -> None:
    (user,) = watch(scenario(spawns=[car()]), 8.0, lambda t: ego(*beside))[-1]
    assert user.pose.x == pytest.approx(64.0)


def test_it_waits_at_the_red_light_until_it_is_green() -> None:
    red_first = light(60.0, green=10.0, yellow=2.0, red=20.0, offset=12.0)  # red until 20 s
    seen = watch(scenario(street(lights=[red_first]), [car(s=10.0)]), 30.0)
    fronts = xs(seen) + CAR[0] / 2
    assert fronts[:199].max() < 60.0 and fronts[198] > 58.5
    assert fronts[-1] > 70.0


def test_it_does_not_stop_for_yellow_where_it_cannot() -> None:
    late = light(20.0, green=10.0, yellow=3.0, red=20.0, offset=9.9)  # yellow from 0.1 s on
    seen = watch(scenario(street(lights=[late]), [car(s=15.0)]), 3.0)
    assert xs(seen)[-1] == pytest.approx(15.0 + 24.0)


def test_a_pedestrian_walks_when_the_ego_vehicle_comes() -> None:
    told = scenario(spawns=[pedestrian((60.0, -5.0), (60.0, 5.0), trigger=15.0)])

    def where(time_s: float) -> EgoState:
        return ego(min(10 + 5 * time_s, 50.0), speed=5.0 if time_s < 8 else 0.0)

    seen = watch(told, 20.0, where)
    moved = np.array([users[0].pose.y for users in seen]) + 5.0
    # The front (3.7 m ahead) is 15 m before the line of the walk after 6.26 s.
    assert moved[62] == 0.0 and moved[63] > 0.0
    assert moved[-1] == pytest.approx(10.0) and seen[-1][0].speed_mps == 0.0
    assert seen[80][0].speed_mps == 1.4 and seen[80][0].pose.heading == pytest.approx(math.pi / 2)


def test_a_pedestrian_stops_short_of_a_vehicle() -> None:
    told = scenario(spawns=[pedestrian((60.0, -5.0), (60.0, 5.0), trigger=30.0)])
    seen = watch(told, 20.0, lambda t: ego(58.0))  # across the way: its right side is at -2.7
    y = seen[-1][0].pose.y
    assert -5.0 < y < -2.7 - PERSON[1] / 2 - 0.5


def test_a_car_waits_for_a_pedestrian() -> None:
    told = scenario(spawns=[car(s=20.0), pedestrian((60.0, -4.0), (60.0, 4.0), trigger=1e6)])
    seen = watch(told, 20.0)
    gaps = [60.0 - 0.25 - users[0].pose.x - CAR[0] / 2 for users in seen if abs(users[1].pose.y + WIDTH / 2) < 1.2]
    assert min(gaps) > 0.5
    assert xs(seen)[-1] > 70.0


def test_a_left_turn_lets_those_who_come_straight_pass() -> None:
    """A crossing at x = 100 to 115: one lane turns from FORTH to the north, one comes straight from the east."""
    turned = np.linspace(0, math.pi / 2, 40)
    left = np.column_stack([100 + 9 * np.sin(turned), -1.75 + 9 * (1 - np.cos(turned)), turned])
    lanes = [
        Lane(id=0, centre=straight((0, -1.75), (100, -1.75)), width_m=3.5, speed_mps=7.0, successors=(2,)),
        Lane(id=1, centre=straight((200, 1.75), (115, 1.75)), width_m=3.5, speed_mps=7.0, successors=(3,)),
        Lane(id=2, centre=left, width_m=3.5, speed_mps=4.5, successors=(4,), turn="left", junction=0),
        Lane(id=3, centre=straight((115, 1.75), (100, 1.75)), width_m=3.5, speed_mps=7.0, successors=(5,),
             turn="straight", junction=0),
        Lane(id=4, centre=straight((109, 7.25), (109, 80)), width_m=3.5, speed_mps=7.0),
        Lane(id=5, centre=straight((100, 1.75), (0, 1.75)), width_m=3.5, speed_mps=7.0),
    ]  # fmt: skip
    town = street(more=lanes)
    turning, coming = car(s=50.0, path=(0, 2, 4)), car(s=25.0, path=(1, 3, 5))
    seen = watch(scenario(town, [turning, coming]), 25.0)
    passed = next(k for k, users in enumerate(seen) for user in users if user.id == 1 and user.pose.x < 100.0)
    assert _turned(seen) > passed - 10
    assert _apart(seen)
    alone = watch(scenario(town, [turning]), 25.0)
    assert _turned(alone) < _turned(seen) - 15

    def where(time_s: float) -> EgoState:
        return ego(175.0 - 7 * time_s, 1.75, heading=math.pi, speed=7.0)

    with_ego = watch(scenario(town, [turning]), 25.0, where)  # it lets that pass likewise
    assert _turned(with_ego) > _turned(alone) + 15
    assert _apart(with_ego, where)


def _turned(seen: Sequence[tuple[RoadUser, ...]]) -> int:
    """When the first of them is in the junction."""
    return next(k for k, users in enumerate(seen) if users[0].pose.y > -1.0)


def _apart(seen: Sequence[tuple[RoadUser, ...]], where: Callable[[float], EgoState] = lambda time_s: FAR) -> bool:
    for k, users in enumerate(seen):
        pose, size = ego_box(where((k + 1) * DT))
        boxes = Boxes.of([pose, *(u.pose for u in users)], [size, *(u.size for u in users)])
        for i in range(len(users)):
            one = Boxes(boxes.centres[i : i + 1], boxes.headings[i : i + 1], boxes.halves[i : i + 1])
            rest = Boxes(boxes.centres[i + 1 :], boxes.headings[i + 1 :], boxes.halves[i + 1 :])
            if overlaps(one, rest).any():
                return False
    return True


@settings(max_examples=40, deadline=None)
@given(
    speeds=st.lists(st.floats(2.0, 9.0), min_size=2, max_size=5),
    stops=st.floats(40.0, 150.0),
    cruise=st.floats(2.0, 8.0),
)
def test_nobody_drives_into_another_or_into_the_ego_vehicle(speeds: list[float], stops: float, cruise: float) -> None:
    """However fast they are: the ego vehicle brakes at 4 m/s2 somewhere before them, and stands."""
    start = 14.0 * len(speeds) + 5

    def where(time_s: float) -> EgoState:
        braking = (stops - start) / cruise if stops > start else 0.0
        after = min(max(time_s - braking, 0.0), cruise / 4)
        x = start + cruise * min(time_s, braking) + cruise * after - 2 * after**2
        return ego(x, speed=cruise - 4 * after)

    spawns = [car(s=3.0 + 14.0 * k, speed=speed) for k, speed in enumerate(speeds)]
    seen = watch(scenario(spawns=spawns), 30.0, where)
    assert _apart(seen, where)


def test_it_repeats_and_the_step_hardly_matters() -> None:
    told = scenario(spawns=[car(s=10.0), car(s=50.0, speed=3.0), car(s=30.0, path=(BACK,))])
    where = lambda t: ego(90.0 + 2 * t, speed=2.0)  # noqa: E731
    first, second = watch(told, 10.0, where), watch(told, 10.0, where)
    assert first == second
    coarse = watch(told, 10.0, where, dt=0.2)
    for one, two in zip(coarse[-1], first[-1], strict=True):
        assert abs(one.pose.x - two.pose.x) < 0.5


def test_deciding_and_moving_are_a_step() -> None:
    told = scenario(spawns=[car(s=10.0), car(s=40.0, speed=2.0)])
    whole, parts = Traffic(told), Traffic(told)
    for step in range(50):
        whole.step(step * DT, DT, FAR)
        parts.decide(step * DT, FAR)
        for _ in range(4):
            parts.move(DT / 4)
        for one, two in zip(whole.users, parts.users, strict=True):
            assert one.pose.x == pytest.approx(two.pose.x, abs=0.05)
