"""Infractions and scores of drives whose outcome is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest

from test.core.driving.streets import CAR, PERSON, WIDTH, ego, light, scenario, straight, street
from vla_core.sim.driving.layout import EgoState, Lane, Pose, RoadUser, Scenario, Solid
from vla_core.sim.driving.rules import Rules, Score

DT = 0.1


def drive(
    told: Scenario,
    where: Callable[[float], EgoState],
    seconds: float,
    users: Callable[[float], Sequence[RoadUser]] = lambda time_s: (),
    touched: Callable[[float], Iterable[tuple[str, int]]] = lambda time_s: (),
    dt: float = DT,
) -> Rules:
    """The rules after a drive that is known as a function of time."""
    rules = Rules(told)
    for step in range(round(seconds / dt) + 1):
        time_s = step * dt
        rules.update(time_s, where(time_s), users(time_s), touched(time_s))
    return rules


def along(speed: float, start: float = 10.0, y: float = -WIDTH / 2) -> Callable[[float], EgoState]:
    return lambda time_s: ego(start + speed * time_s, y, speed=speed)


def user(x: float, y: float = -WIDTH / 2, kind: str = "car", number: int = 0, heading: float = 0.0) -> RoadUser:
    size = PERSON if kind == "pedestrian" else CAR
    return RoadUser(id=number, kind=kind, pose=Pose(x=x, y=y, heading=heading), size=size, speed_mps=0.0)  # type: ignore[arg-type]


def test_a_clean_drive_to_the_goal() -> None:
    rules = drive(scenario(), along(5.0), 30.0)
    score = rules.score()
    assert rules.over and score.success
    assert score.driving_score == score.route_completion == score.penalty == 1.0
    # 100 m at 5 m/s; arrived is who is less than a metre short.
    assert score.seconds == pytest.approx(19.9, abs=0.11)
    assert score.km == pytest.approx(0.0995, abs=0.0006)
    assert score.speed_mean == pytest.approx(5.0)
    assert score.comfort == 1.0 and score.jerk_max == pytest.approx(0.0, abs=1e-9)
    assert score.collisions_per_km == 0.0


def test_nothing_counts_after_the_end() -> None:
    rules = drive(scenario(), along(5.0), 20.5)
    before = rules.score()
    rules.update(99.0, ego(80.0), [user(80.0)], [("car", 0)])
    assert rules.score() == before


def test_half_of_the_route() -> None:
    score = drive(scenario(), along(5.0), 10.0).score()
    assert not score.success
    assert score.route_completion == pytest.approx(0.5, abs=0.001)
    assert score.driving_score == pytest.approx(0.5, abs=0.001)


def test_backwards_takes_nothing_away_and_adds_nothing() -> None:
    score = drive(scenario(), lambda t: ego(10 + 40 * math.sin(math.pi * t / 10)), 10.0).score()
    assert score.route_completion == pytest.approx(0.4, abs=0.001)
    assert score.km == pytest.approx(0.08, abs=0.001)


@pytest.mark.parametrize(("kind", "factor"), [("car", 0.6), ("bus", 0.6), ("pedestrian", 0.5), ("cyclist", 0.5)])
def test_one_collision_with_a_user(kind: str, factor: float) -> None:
    """Driving through somebody at 5 m/s is one collision, however long it takes."""
    rules = drive(scenario(), along(5.0), 30.0, users=lambda t: [user(60.0, kind=kind)])
    score = rules.score()
    assert score.route_completion == 1.0 and not score.success
    assert score.collisions == 1
    assert score.driving_score == pytest.approx(factor)
    assert score.collisions_per_km == pytest.approx(1 / score.km)


def test_overlap_begins_where_the_boxes_meet() -> None:
    """The front bumper is 3.7 m ahead of the rear axle; the car is 4.5 m long."""
    just = 60.0 - 2.25 - 3.7
    assert drive(scenario(), lambda t: ego(just - 0.01), 1.0, users=lambda t: [user(60.0)]).score().collisions == 0
    assert drive(scenario(), lambda t: ego(just + 0.01), 1.0, users=lambda t: [user(60.0)]).score().collisions == 1
    # Beside: half of 1.9 and half of 1.8.
    for y, count in ((1.86, 0), (1.84, 1)):
        score = drive(scenario(), lambda t: ego(60.0), 1.0, users=lambda t, y=y: [user(60.0, -WIDTH / 2 + y)]).score()
        assert score.collisions == count


def test_an_object_counts_again_once_it_was_apart() -> None:
    def contacts(time_s: float) -> list[tuple[str, int]]:
        return [("car", 0)] if time_s < 2.0 or 2.5 < time_s < 3.0 or time_s > 4.2 else []

    score = drive(scenario(), along(2.0), 6.0, touched=contacts).score()
    assert score.collisions_vehicle == 2  # not the one that was touched again after half a second


def test_two_objects_are_two_collisions() -> None:
    score = drive(scenario(), along(2.0), 2.0, touched=lambda t: [("car", 0), ("pedestrian", 1), ("pole", 1)]).score()
    assert (score.collisions_vehicle, score.collisions_pedestrian, score.collisions_static) == (1, 1, 1)
    assert score.penalty == pytest.approx(0.6 * 0.5 * 0.65)


@pytest.mark.parametrize(("kind", "z", "height", "count"), [
    ("barrier", 0.5, 1.0, 1), ("kerb", 0.075, 0.15, 0), ("crown", 4.0, 2.0, 0),
])  # fmt: skip
def test_solids_are_hit_at_the_height_of_the_vehicle(kind: str, z: float, height: float, count: int) -> None:
    solid = Solid(kind=kind, position=(60.0, -1.0, z), heading=0.4, size=(2.0, 0.5, height), colour=(1, 0, 0))  # type: ignore[arg-type]
    score = drive(scenario(street(solids=[solid])), along(5.0), 30.0).score()
    assert score.collisions_static == count
    assert score.driving_score == pytest.approx(0.65 if count else 1.0)


def test_contacts_and_overlap_are_one_collision() -> None:
    solid = Solid(kind="barrier", position=(60.0, -1.0, 0.5), heading=0.0, size=(2.0, 0.5, 1.0), colour=(1, 0, 0))
    rules = drive(
        scenario(street(solids=[solid])), along(5.0), 30.0,
        touched=lambda t: [("barrier", 0)] if 8.9 < t < 10 else [],
    )  # fmt: skip
    assert rules.score().collisions_static == 1


@pytest.mark.parametrize(("offset", "runs"), [
    (0.0, 0),  # green until 10 s
    (-10.0 + 16.26, 1),  # at the line after (60 - 13.7) / 5 = 9.26 s: 15.52 s into the cycle, red
    (2.5, 0),  # 11.76 s: yellow
    (2.75, 1),  # 12.01 s: red just now
    (2.73, 0),  # 11.99 s: yellow still
])  # fmt: skip
def test_the_red_light_when_the_front_crosses_the_line(offset: float, runs: int) -> None:
    score = drive(scenario(street(lights=[light(60.0, offset=offset)])), along(5.0), 30.0, dt=0.2).score()
    assert score.red_lights == runs
    assert score.driving_score == pytest.approx(0.7 if runs else 1.0)
    assert score.success == (runs == 0)


def test_a_light_is_for_its_lane_and_direction() -> None:
    red = light(60.0, green=0.1, yellow=0.1, red=1000.0)
    town = street(lights=[red])
    other_way = drive(scenario(town), lambda t: ego(90 - 5 * t, -WIDTH / 2, heading=math.pi, speed=5.0), 10.0)
    assert other_way.score().red_lights == 0
    beside = drive(scenario(town), along(5.0, y=WIDTH / 2), 15.0)
    assert beside.score().red_lights == 0
    before = drive(scenario(town), lambda t: ego(min(10 + 5 * t, 56.2)), 15.0)  # the front stands 0.1 m short
    assert before.score().red_lights == 0


def test_metres_off_the_road_are_not_completed() -> None:
    """The road's right edge is at -3.5; with the axle's middle at -3 both right wheels are off it."""

    def way(time_s: float) -> EgoState:
        x = 10 + 5 * time_s
        return ego(x, -3.0 if 40 <= x < 60 else -WIDTH / 2, speed=5.0)

    score = drive(scenario(), way, 30.0).score()
    assert score.off_road_m == pytest.approx(20.0, abs=1.5)
    assert score.route_completion == pytest.approx(1 - score.off_road_m / (1000 * score.km))
    assert score.driving_score == pytest.approx(0.8, abs=0.02)
    assert not score.success and score.collisions == 0


def test_one_wheel_or_the_other_lane_are_no_infraction() -> None:
    # Turned to the right by 0.3 rad with one wheel over the edge.
    tilted = drive(scenario(), lambda t: ego(20 + 0.1 * t, -2.05, heading=-0.3), 10.0).score()
    assert tilted.off_road_m == 0.0
    overtaking = drive(scenario(), along(5.0, y=WIDTH / 2), 30.0).score()
    assert overtaking.success and overtaking.driving_score == 1.0


def test_deviation_ends_it() -> None:
    rules = drive(scenario(), lambda t: ego(10 + 4 * t, -WIDTH / 2 + 1.0 * t, speed=4.1), 20.0)
    score = rules.score()
    assert rules.over and score.deviated and not score.success
    assert score.seconds == pytest.approx(8.0, abs=0.11)
    assert score.route_completion <= 0.33


def test_standing_is_blocked_after_20_s_unless_there_is_a_reason() -> None:
    def standing(time_s: float) -> EgoState:
        return ego(min(10 + 5 * time_s, 50.0), speed=5.0 if time_s < 8 else 0.0)

    def run(town_users: Sequence[RoadUser] = (), told: Scenario | None = None) -> Score:
        return drive(told or scenario(limit_s=50.0), standing, 60.0, users=lambda t: town_users).score()

    blocked = run()
    assert blocked.blocked and blocked.seconds == pytest.approx(28.0, abs=0.31)
    waiting = run([user(60.0)])
    assert not waiting.blocked and waiting.timeout and waiting.seconds == pytest.approx(50.0, abs=0.11)
    assert run([user(60.0, y=9.0)]).blocked  # beside the road
    assert run([user(45.0)]).blocked  # behind
    red = scenario(street(lights=[light(56.0, green=0.1, yellow=0.1, red=1000.0)]), limit_s=50.0)
    assert run(told=red).timeout


def test_a_route_that_ends_at_a_stand() -> None:
    told = scenario(end=60.0, stop_at_end=True)
    passing = drive(told, along(5.0), 9.9)
    assert not passing.over
    stopped = drive(told, lambda t: ego(min(10 + 5 * t, 58.5), speed=5.0 if t < 9.7 else 0.0), 20.0)
    assert stopped.over and stopped.score().success
    short = drive(told, lambda t: ego(min(10 + 5 * t, 55.0), speed=5.0 if t < 9.0 else 0.0), 20.0)
    assert not short.over


def test_a_route_that_comes_back_is_driven_in_order() -> None:
    """There and back 3.5 m beside: the goal is beside the start, and not reached there."""
    there, back = straight((10, -1.75), (60, -1.75), 0.5), straight((60, 1.75), (10, 1.75), 0.5)
    told = scenario()
    path = np.concatenate([there, back])
    path = np.column_stack([path, np.full(len(path), 8.0)])
    route = told.route.__class__(path=path, lanes=(0, 1), instructions=told.route.instructions)
    told = Scenario(seed=0, kind="straight", town=told.town, route=route)
    rules = Rules(told)
    rules.update(0.0, ego(10.0, 1.75), ())
    assert not rules.over and rules.score().route_completion < 0.01
    for step in range(len(path)):
        x, y, heading = path[step, :3]
        rules.update(0.1 * (step + 1), ego(x, y, heading, 5.0), ())
    assert rules.over and rules.score().success


def test_comfort_of_a_known_motion() -> None:
    """Braking at 6 m/s2 from 6 m/s for 1 s of 4 s: uncomfortable for that time and at its two jerks."""

    def way(time_s: float) -> EgoState:
        braked = min(max(time_s - 2.0, 0.0), 1.0)
        travelled = 6 * min(time_s, 2.0) + 6 * braked - 3 * braked**2
        return ego(10 + travelled, speed=6 - 6 * braked, yaw_rate=0.5)

    score = drive(scenario(), way, 4.0).score()
    assert score.braking_max == pytest.approx(6.0)
    assert score.acceleration_max == pytest.approx(0.0, abs=1e-9)
    assert score.lateral_max == pytest.approx(3.0)
    assert score.jerk_max == pytest.approx(math.hypot(60.0, 3.0), rel=0.01)
    assert score.comfort == pytest.approx(29 / 40)  # ten intervals too hard, and the jerk of its end


def test_all_figures_are_finite_before_anything_happened() -> None:
    rules = Rules(scenario())
    rules.update(0.0, ego(10.0), ())
    assert all(math.isfinite(float(value)) for value in vars(rules.score()).values())
    assert isinstance(scenario().town.lanes[0], Lane)
