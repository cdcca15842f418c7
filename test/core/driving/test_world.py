"""The driving world as a robot: messages, instructions, outcomes, and that it repeats."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from vla_core.commands import encode
from vla_core.contract import NANOSECONDS, Limits, RobotContract
from vla_core.observation.messages import Message, deserialize, header_stamp_ns
from vla_core.runtime.follower import TrajectoryFollower
from vla_core.sim.base import HasExpert, Journey, SimulationError, View, details_of, instruction_now, is_over
from vla_core.sim.driving.expert import Expert
from vla_core.sim.driving.layout import Scenario
from vla_core.sim.driving.routes import FRONT_M, other_instruction
from vla_core.sim.driving.world import PLAN_COLOUR, Driving
from vla_core.sim.worlds import make_world, task_of

CONTRACT = RobotContract.load("driving")
TICK = CONTRACT.step_ns
START = 5 * NANOSECONDS
SEED = 10_000


def with_streams(*names: str) -> RobotContract:
    observations = {name: CONTRACT.observations[name] for name in (*names, "odom", "instruction")}
    return dataclasses.replace(CONTRACT, observations=observations, any_of=())


BLIND = with_streams()


@pytest.fixture(scope="module")
def blind() -> Iterator[dict[str, Driving]]:
    """Worlds without cameras and LiDAR, by kind."""
    worlds: dict[str, Driving] = {}
    yield worlds
    for world in worlds.values():
        world.close()


def of(worlds: dict[str, Driving], kind: str) -> Driving:
    return worlds.setdefault(kind, Driving(kind, BLIND, View()))


def follow(
    world: Driving,
    seed: int,
    plan: Callable[[], np.ndarray] | None = None,
    each: Callable[[], None] = lambda: None,
    until_s: float = 120.0,
) -> None:
    """Drive an episode through the follower, as a robot would: the expert's plans or others."""
    follower = TrajectoryFollower(world.contract)
    (action,) = world.contract.actions.values()
    assert world.contract.following is not None
    topic = world.contract.stream(world.contract.following.odometry).topic
    world.reset(seed)
    stamp = START
    while not is_over(world) and world.time_s < until_s:
        for message in world.observe_state(stamp):
            if message.topic == topic:
                assert follower.add_odometry(message.data) == ""
        rows = world.expert_rows() if plan is None else plan()
        assert follower.add_trajectory(encode(action, stamp, rows, world.contract.chunk_step_ns)) == ""
        world.step(follower.command(stamp))
        assert follower.fault == ""
        each()
        stamp += TICK


def observed(world: Driving, seed: int, ticks: int) -> list[Message]:
    world.reset(seed)
    found = []
    for tick in range(ticks):
        found += world.observe_state(START + tick * TICK)
        found += world.observe_camera(START + tick * TICK)
        world.step(np.array([0.05 * math.sin(tick), 4.0]))
    return found


def test_it_is_found_by_name() -> None:
    task = task_of("driving:mixed")
    assert task.world == "driving:mixed" and task.max_steps == 600
    world = make_world("driving:mixed", BLIND)
    assert isinstance(world, HasExpert) and isinstance(world, Journey)
    assert instruction_now(world) == "" and not is_over(world) and world.score is None
    before = details_of(world)
    world.reset(SEED)
    assert details_of(world).keys() == before.keys() and all(math.isfinite(value) for value in before.values())
    world.close()
    with pytest.raises(SimulationError, match=r"unknown kind of driving 'fly'.*turn_left"):
        task_of("driving:fly")
    with pytest.raises(SimulationError, match="reset it first"):
        make_world("driving:straight", BLIND).observe_state(START)


def test_every_tick_has_all_sensors_at_their_rates_from_the_first_on() -> None:
    world = Driving("straight", CONTRACT, View(size=32))
    world.reset(SEED)
    by_topic = {stream.topic: stream for stream in CONTRACT.observations.values() if not stream.latched}
    try:
        for tick in range(3):
            now = START + tick * TICK
            found = world.observe_state(now) + world.observe_camera(now)
            counts = Counter(message.topic for message in found)
            assert counts == {
                topic: round((stream.rate_hz or 0) / CONTRACT.rate_hz) for topic, stream in by_topic.items()
            }
            for topic, stream in by_topic.items():
                stamps = [message.stamp_ns for message in found if message.topic == topic]
                assert stamps[-1] == now and stamps[0] > now - TICK
                assert set(np.diff(stamps)) <= {stream.period_ns}
            for message in found:
                assert header_stamp_ns(message.type, message.data) == message.stamp_ns
            world.step(np.array([0.0, 3.0]))
        assert {message.topic for message in world.ground_truth(START)} == {
            "ground_truth/odom", "ground_truth/objects", "ground_truth/light"
        }  # fmt: skip
        assert [message.topic for message in world.statics(START)] == ["/tf_static"]
    finally:
        world.close()


def test_the_colour_of_the_next_light_is_told() -> None:
    """By the town's own clock, within 40 m before its stop line; a drive of the expert's speeds, straight on."""
    world, told, silent = Driving("green_light", BLIND, View()), set(), 0
    try:
        world.reset(1)
        lane = world.scenario.town.lanes[world.scenario.route.lanes[0]]
        assert lane.light is not None
        light = world.scenario.town.lights[lane.light]
        x, y, heading = light.stop
        for _ in range(150):
            ego = world.ego.pose
            ahead = (x - ego.x) * math.cos(heading) + (y - ego.y) * math.sin(heading) - FRONT_M
            aside = abs(-(x - ego.x) * math.sin(heading) + (y - ego.y) * math.cos(heading))
            (said,) = [m for m in world.ground_truth(START) if m.topic == "ground_truth/light"]
            word = str(deserialize(said.type, said.data).data)
            if aside < 1.0 and 0.5 < ahead < 38.0:
                assert word == light.colour(world.time_s)
                told.add(word)
            elif math.hypot(x - ego.x, y - ego.y) > 41.0 + FRONT_M:  # and so by the road
                assert word == "none"
                silent += 1
            row = world.expert_rows()[1]
            steering = math.atan(2.8 * 2 * row[1] / max(row[0] ** 2 + row[1] ** 2, 1.0))
            world.step(np.array([steering, row[3]]))
    finally:
        world.close()
    assert "green" in told and silent > 3


def test_shorter_control_periods_are_the_same_drive_in_smaller_steps() -> None:
    """At 20 Hz the first observation has all sensors, too; the vehicle goes the same way."""
    contract = with_streams("lidar", "radar_back", "imu")
    fine, coarse = Driving("straight", dataclasses.replace(contract, rate_hz=20.0), View()), Driving(
        "straight", contract, View()
    )  # fmt: skip
    fine.reset(SEED)
    coarse.reset(SEED)
    topics = {stream.topic for stream in contract.observations.values() if not stream.latched}
    assert {message.topic for message in fine.observe_state(START)} == topics
    for _ in range(10):
        coarse.step(np.array([0.1, 5.0]))
        for _ in range(4):
            fine.step(np.array([0.1, 5.0]))
    assert fine.time_s == pytest.approx(coarse.time_s)
    a, b = fine.ego.pose, coarse.ego.pose
    assert math.hypot(a.x - b.x, a.y - b.y) < 0.05 and abs(a.heading - b.heading) < 0.01
    fine.close()
    coarse.close()


def test_the_same_seed_is_the_same_episode_whatever_was_run_before() -> None:
    contract = with_streams("front", "lidar", "radar_front", "imu")
    world, another = Driving("mixed", contract, View(size=32)), Driving("mixed", contract, View(size=32))
    try:
        first = observed(world, SEED, 4)
        observed(world, SEED + 1, 2)
        assert observed(world, SEED, 4) == first
        assert observed(another, SEED, 4) == first
        assert observed(another, SEED + 9, 4) != first
    finally:
        world.close()
        another.close()


def test_a_sensor_that_is_not_asked_for_is_not_simulated_and_changes_no_other() -> None:
    few, more = with_streams("radar_front"), with_streams("radar_front", "imu", "lidar")
    one, two = Driving("straight", few, View()), Driving("straight", more, View())
    topics = {few.stream("odom").topic, few.stream("radar_front").topic}
    found = observed(one, SEED, 3)
    assert {message.topic for message in found} == topics
    assert [message for message in observed(two, SEED, 3) if message.topic in topics] == found
    one.close()
    two.close()


@pytest.mark.parametrize("kind", ["turn_left", "roundabout", "overtake", "stop_behind", "pedestrian"])
def test_the_expert_succeeds_through_the_follower(kind: str, blind: dict[str, Driving]) -> None:
    world, said = of(blind, kind), list[str]()

    def each() -> None:
        if not said or said[-1] != world.instruction:
            said.append(world.instruction)

    follow(world, SEED, each=each)
    assert world.success and world.over and world.score == 1.0
    assert said == [instruction.text for instruction in world.scenario.route.instructions]
    details = details_of(world)
    assert all(math.isfinite(value) for value in details.values())
    assert details["success"] == details["route_completion"] == details["driving_score"] == 1.0
    assert details["km"] == pytest.approx(world.scenario.route.length_m / 1000, rel=0.08)
    assert details["seconds"] == pytest.approx(world.time_s, abs=0.11)
    assert 0 < details["jerk_p95"] < 15 and details["comfort"] > 0.8


def blindfolded(world: Driving, seed: int) -> Callable[[], np.ndarray]:
    """The plans of an expert to whom every light is green, and who sees nobody."""
    world.reset(seed)
    told = world.scenario
    lights = tuple(dataclasses.replace(light, green_s=1e9, offset_s=0.0) for light in told.town.lights)
    expert = Expert(dataclasses.replace(told, town=dataclasses.replace(told.town, lights=lights)))
    return lambda: expert.plan(world.ego, (), world.time_s)


def test_who_ignores_the_light_runs_it(blind: dict[str, Driving]) -> None:
    world = of(blind, "red_light")
    follow(world, SEED, blindfolded(world, SEED), until_s=20.0)
    assert details_of(world)["red_lights"] >= 1.0
    assert world.score is not None and world.score <= 0.7


def test_who_ignores_the_car_ahead_hits_it(blind: dict[str, Driving]) -> None:
    world = of(blind, "follow")
    follow(world, SEED, blindfolded(world, SEED), until_s=25.0)
    details = details_of(world)
    assert details["collisions_vehicle"] >= 1.0
    assert details["penalty"] == pytest.approx(0.6 ** details["collisions_vehicle"])
    assert not world.success


def test_who_drives_off_is_stopped(blind: dict[str, Driving]) -> None:
    world = of(blind, "straight")
    world.reset(SEED)
    while not is_over(world):
        world.step(np.array([0.1, 6.0]))
    details = details_of(world)
    assert details["deviated"] == 1.0 and details["success"] == 0.0 and details["off_road_m"] > 1.0
    assert world.time_s < 30 and details["off_road_share"] == details["off_road_m"] / (1000 * details["km"])


def test_who_stands_is_blocked(blind: dict[str, Driving]) -> None:
    world = of(blind, "turn_right")
    world.reset(SEED)
    while not is_over(world):
        world.step(world.rest())
    details = details_of(world)
    assert details["blocked"] == 1.0 and world.time_s == pytest.approx(20.0, abs=0.41)
    assert details["km"] < 1e-4 and details["driving_score"] < 0.02


def test_commands_beyond_the_bounds_are_those_of_the_bounds(blind: dict[str, Driving]) -> None:
    world = of(blind, "straight")
    ends = []
    for command in ([9.0, 99.0], [0.6, 15.0]):
        world.reset(SEED)
        for _ in range(5):
            world.step(np.array(command))
        ends.append(world.ego)
    assert ends[0] == ends[1]


def test_swapped_words_and_black_pictures() -> None:
    world = Driving("turn_left", with_streams("front", "front_info"), View(size=32, black=True, swapped=True))
    world.reset(SEED)
    plain: Scenario = world.scenario
    assert world.instruction == other_instruction(plain)
    assert world.instruction not in {instruction.text for instruction in plain.route.instructions}
    picture = next(message for message in world.observe_camera(START) if message.topic.endswith("image_raw"))
    assert picture.data.rstrip(b"\0")[-32:].count(b"\0") < 32  # what is not black is the header alone
    assert picture.data.endswith(bytes(32 * 32 * 3))
    world.step(np.array([0.0, 8.0]))
    assert world.instruction == other_instruction(plain)
    world.close()


def test_people_see_the_route_and_the_plan(blind: dict[str, Driving]) -> None:
    world = of(blind, "straight")
    world.reset(SEED)
    plain = world.render_for_people()
    assert plain.shape == (480, 480, 3) and plain.dtype == np.uint8
    world.watch_plan(world.expert_rows())
    with_plan = world.render_for_people()
    drawn = (with_plan == PLAN_COLOUR).all(axis=2)
    assert drawn.any() and not (plain == PLAN_COLOUR).all(axis=2).any()
    assert ((plain != with_plan).any(axis=2).sum()) < 0.05 * 480 * 480
    world.watch_plan(None)
    assert (world.render_for_people() == plain).all()


@pytest.mark.parametrize(("change", "message"), [
    ({"following": None}, "no following; the simulated vehicle obeys steering"),
    ({"rate_hz": 7.0}, "control period of 0.142857143 s; the simulated vehicle's is a multiple of 0.01 s"),
    ({"rate_hz": 1.0}, "control period of 1.0 s"),
])  # fmt: skip
def test_contracts_that_it_cannot_keep(change: dict[str, object], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        Driving("straight", dataclasses.replace(BLIND, **change), View())  # type: ignore[arg-type]


def test_actions_and_streams_that_it_does_not_have() -> None:
    (name, action), *_ = BLIND.actions.items()
    with pytest.raises(SimulationError, match=r"waypoints 0.25 s apart; the 7 .* are 0.5 s apart"):
        Driving(
            "straight", dataclasses.replace(BLIND, actions={name: dataclasses.replace(action, step_s=0.25)}), View()
        )
    longer = dataclasses.replace(
        action, names=("x", "y", "z", "speed"), units=("m", "m", "m", "m/s"), low=(-1.0,) * 4, high=(60.0,) * 4
    )
    with pytest.raises(SimulationError, match="no z; choices: speed, x, y, yaw"):
        Driving("straight", dataclasses.replace(BLIND, actions={name: longer}), View())
    sonar = dataclasses.replace(CONTRACT.stream("lidar"), topic="sonar")
    with pytest.raises(SimulationError, match="no 'sonar' of type sensor_msgs/msg/PointCloud2"):
        Driving("straight", dataclasses.replace(BLIND, observations={**BLIND.observations, "sonar": sonar}), View())


def test_another_order_of_columns_is_the_contracts() -> None:
    (name, action), *_ = BLIND.actions.items()
    order = (3, 0, 1)
    turned = dataclasses.replace(
        action,
        limits=Limits(),
        **{key: tuple(getattr(action, key)[i] for i in order) for key in ("names", "units", "low", "high", "safe")},
    )
    usual = Driving("straight", BLIND, View())
    other = Driving("straight", dataclasses.replace(BLIND, actions={name: turned}), View())
    usual.reset(SEED)
    other.reset(SEED)
    np.testing.assert_array_equal(other.expert_rows(), usual.expert_rows()[:, order])
    usual.close()
    other.close()
