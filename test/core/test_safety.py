"""The safety stage: limits whatever comes, the declared reaction to every fault, and what is counted."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.commands import decode, encode
from vla_core.config import ConfigError
from vla_core.contract import Action, Axis, Limits, Reactions, RobotContract, Safety, Stream, Workspace
from vla_core.observation import messages
from vla_core.observation.messages import MessageError, header_stamp_ns, serialize
from vla_core.runtime.motion import ROUNDING
from vla_core.runtime.safety import SafetyStage
from vla_core.runtime.watch import Watch

from .helpers import JOINTS, START

PERIOD = 10_000_000
PERIOD_S = 0.01
ARM = Action(
    topic="arm/command", type=JOINTS, field="position", names=("shoulder", "elbow"), units=("rad", "rad"),
    low=(-1.0, -2.0), high=(1.0, 2.0), safe=("hold", "hold"),
    limits=Limits(velocity=(1.0, 2.0), acceleration=(10.0, 20.0), jerk=(400.0, 800.0)),
)  # fmt: skip
BASE = Action(
    topic="cmd_vel", type="geometry_msgs/msg/TwistStamped", kind="velocity", names=("linear.x", "angular.z"),
    units=("m/s", "rad/s"), low=(-0.5, -1.5), high=(1.0, 1.5), safe=("zero", "zero"),
    limits=Limits(acceleration=(2.0, 4.0), jerk=(40.0, 80.0)),
)  # fmt: skip
PLAIN = dataclasses.replace(BASE, limits=Limits())  # without limits a stop is there at once
GRIP = Action(
    topic="grip", type="std_msgs/msg/Float64MultiArray", kind="effort", names=("grip",), units=("N",), low=(0.0,),
    high=(20.0,), safe=("hold",), limits=Limits(rate=(100.0,)),
)  # fmt: skip
JOINT_STATE = Stream(
    topic="arm/state", type=JOINTS, rate_hz=100.0, max_age_s=0.05, field="position", names=("shoulder", "elbow"),
    units=("rad", "rad"),
)  # fmt: skip
PLACE = Stream(
    topic="place", type=JOINTS, rate_hz=100.0, max_age_s=0.05, field="position", names=("x", "y"), units=("m", "m")
)


def contract(
    *actions: Action, observations: dict[str, Stream] | None = None, reactions: dict[str, Any] | None = None,
    **safety: Any,
) -> RobotContract:  # fmt: skip
    return RobotContract(
        name="toy", rate_hz=100.0, observations=observations or {},
        actions={action.topic: action for action in actions or (BASE,)},
        safety=Safety(heartbeat_s=0.1, reactions=Reactions(**(reactions or {})), **safety),
    )  # fmt: skip


class Graph:
    """A stage with its clocks: what is sent to it, and what it sends."""

    def __init__(self, contract: RobotContract, simulated: bool = False) -> None:
        self.contract = contract
        self.stage = SafetyStage(contract, simulated)
        self.now, self.steady = START, 5_000_000_000
        self.out: dict[str, list[tuple[int | None, list[float]]]] = {topic: [] for topic in contract.actions}
        self.positions = {name: [0.0] * len(s.names) for name, s in contract.observations.items()}
        self.silent: set[str] = set()
        self.stamps: dict[str, Callable[[], int]] = {}

    def advance(self, periods: float = 1.0) -> None:
        self.now += round(periods * PERIOD)
        self.steady += round(periods * PERIOD)

    def sense(self, name: str, stamp_ns: int | None = None) -> None:
        stream = self.contract.observations[name]
        stamp = self.now if stamp_ns is None else stamp_ns
        data = messages.joint_state(stamp, stream.names, "position", np.array(self.positions[name]))
        self.stage.sensor(name, data, self.now, self.steady)

    def sense_all(self) -> None:
        for name in self.contract.observations:
            if name in self.stage.sensors and name not in self.silent:
                self.sense(name, self.stamps[name]() if name in self.stamps else None)

    def ask(self, *values: float, topic: str | None = None, stamp_ns: int | None = None) -> list[float] | None:
        """One candidate; the command that answers it."""
        action = self.contract.actions[topic] if topic else next(iter(self.contract.actions.values()))
        stamp = self.now if stamp_ns is None else stamp_ns
        data = raw(action, stamp, values)
        return self.keep(self.stage.candidate(action.topic, data, self.now, self.steady)).get(action.topic)

    def tick(self) -> dict[str, list[float]]:
        return self.keep(self.stage.tick(self.now, self.steady))

    def keep(self, frame: dict[str, bytes]) -> dict[str, list[float]]:
        found = {}
        for topic, data in frame.items():
            action = self.contract.actions[topic]
            found[topic] = decode(action, data)[0].tolist()
            self.out[topic].append((header_stamp_ns(action.type, data), found[topic]))
        return found

    def run(self, periods: int, *values: float) -> list[list[float]]:
        """``periods`` of candidates ``values`` with all sensors alive; the commands."""
        commands = []
        for _ in range(periods):
            self.advance()
            self.sense_all()
            ticked = self.tick()  # a fault that is found now is answered now
            answer = self.ask(*values)
            commands.append(answer or next(iter(ticked.values()), []))
        return commands

    def commands(self, topic: str) -> np.ndarray:
        return np.array([values for _, values in self.out[topic]])


def raw(action: Action, stamp_ns: int, values: Any) -> bytes:
    """A candidate of whoever: also what :func:`encode` refuses."""
    finite = np.nan_to_num(np.array(values, dtype=float), nan=0.123456789, posinf=0.123456789, neginf=0.123456789)
    data = encode(action, stamp_ns, finite[None, :], PERIOD)
    message = messages.deserialize(action.type, data)
    if action.type == JOINTS:
        setattr(message, action.field, np.array(values, dtype=float))
    elif action.type.endswith("MultiArray"):
        message.data = np.array(values, dtype=float)
    else:
        message.twist.linear.x, message.twist.angular.z = map(float, values)
    return serialize(action.type, message)


def assert_within(action: Action, rows: np.ndarray, start: np.ndarray) -> None:
    """Bounds, and velocity, acceleration and jerk by finite differences from rest at ``start``."""
    slack = 1e-9
    low, high = np.array(action.low), np.array(action.high)
    assert (rows >= low - slack).all() and (rows <= high + slack).all()
    series = np.vstack([start, start, start, rows])
    if action.kind == "velocity":
        series = np.cumsum(series, 0) * PERIOD_S
    if action.kind == "effort":
        assert (np.abs(np.diff(series, axis=0)) <= np.array(action.limits.rate) * PERIOD_S + slack).all()
        return
    for order, key in enumerate(("velocity", "acceleration", "jerk"), 1):
        limits = getattr(action.limits, key)
        if limits:
            differences = np.diff(series, order, axis=0)
            # A candidate that is as near as ROUNDING passes bit for bit, so each row may be so far off.
            passed = 2**order * ROUNDING * (1 + np.abs(series).max())
            assert (np.abs(differences) <= np.array(limits) * PERIOD_S**order + passed).all(), key


ANY = st.sampled_from([0.0, 1.0, -1.0, 2.0, 50.0, -50.0, 1e300]) | st.floats(allow_nan=True, allow_infinity=True)
frames = st.lists(st.tuples(ANY, ANY, st.integers(1, 8)), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([ARM, BASE, GRIP]), frames, st.sampled_from(["stop", "hold", "latch"]))
def test_whatever_is_asked_the_limits_hold(action: Action, asked: list[tuple[float, float, int]], bad: str) -> None:
    graph = Graph(contract(action, reactions={"not_finite": bad}))
    size = len(action.names)
    graph.advance()
    graph.ask(*[0.0] * size)
    for first, second, repeat in asked:
        for _ in range(repeat):
            graph.advance()
            graph.tick()
            graph.ask(*(first, second)[:size])
    assert_within(action, graph.commands(action.topic), np.zeros(size))
    counts = graph.stage.counts
    assert counts["candidates"] == counts["commands"] + counts["early"] + counts["unanswered"]
    assert counts["commands"] == len(graph.out[action.topic]) >= counts["passed"]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([ARM, BASE]), frames)
def test_a_stop_ends_at_the_safe_action_in_time(action: Action, asked: list[tuple[float, float, int]]) -> None:
    graph = Graph(contract(action))
    for first, second, repeat in [(0.0, 0.0, 1), *asked]:
        for _ in range(repeat):
            graph.advance()
            graph.ask(first, second)
    graph.stage.trip("test")
    bound = graph.stage.stop_periods()
    for _ in range(bound):
        graph.advance()
        assert graph.tick(), "a latched stage goes on commanding"
    assert graph.stage.rests
    last = graph.commands(action.topic)[-1]
    graph.advance()
    assert graph.tick()[action.topic] == pytest.approx(list(last), abs=1e-12)
    if action is BASE:
        assert list(last) == pytest.approx([0.0, 0.0], abs=1e-12)
    assert_within(action, graph.commands(action.topic), np.zeros(2))


def test_what_keeps_the_limits_passes_bit_for_bit() -> None:
    graph = Graph(contract(ARM))
    for k in range(200):
        graph.advance()
        data = raw(ARM, graph.now, (0.5 - 0.5 * math.cos(0.02 * k), 0.2 * math.sin(0.01 * k) ** 3))
        assert graph.stage.candidate("arm/command", data, graph.now, graph.steady) == {"arm/command": data}
    assert graph.stage.state == "passing"
    assert graph.stage.counts["passed"] == graph.stage.counts["commands"] == 200


@pytest.mark.parametrize(
    ("values", "cause", "words"),
    [((0.2, 0.0), "velocity", "shoulder 20, limit 1"), ((0.005, 0.0), "acceleration", "shoulder 50, limit 10"),
     ((0.0008, 0.0), "jerk", "shoulder 800, limit 400"), ((0.0, 5.0), "bounds", "elbow 5 rad, bounds -2 to 2")],
)  # fmt: skip
def test_what_was_changed_is_named(values: tuple[float, float], cause: str, words: str) -> None:
    graph = Graph(contract(ARM))
    graph.run(2, 0.0, 0.0)
    graph.run(1, *values)
    assert graph.stage.state == "intervening"
    assert graph.stage.counts[cause] == 1 and graph.stage.reasons[cause] == words


def test_the_first_position_starts_where_the_robot_is() -> None:
    graph = Graph(contract(ARM, observations={"joints": JOINT_STATE}))
    graph.advance()
    assert graph.ask(0.5, 0.0) is None, "where the robot is is not known yet"
    graph.positions["joints"] = [0.3, -0.2]
    commands = np.array(graph.run(150, 0.5, 0.0))
    assert_within(ARM, commands, np.array([0.3, -0.2]))
    assert abs(commands[0] - [0.3, -0.2]).max() < 0.01
    assert commands[-1].tolist() == [0.5, 0.0] and commands[:, 0].max() <= 0.5 + 1e-9


def test_a_robot_outside_its_bounds_comes_back_without_a_jump() -> None:
    graph = Graph(contract(ARM, observations={"joints": JOINT_STATE}))
    graph.positions["joints"] = [1.2, 0.0]
    commands = np.array(graph.run(100, 1.1, 0.0))
    assert commands[0][0] == pytest.approx(1.2, abs=0.01)
    assert (np.diff(commands[:, 0]) <= 1e-9).all() and commands[-1][0] == pytest.approx(1.0, abs=1e-9)


# Time.


def test_a_late_command_may_move_for_two_periods_and_no_more() -> None:
    action = dataclasses.replace(ARM, limits=Limits(velocity=(1.0, 2.0)))
    graph = Graph(contract(action, command_age_s=10.0))
    graph.run(1, 0.0, 0.0)
    steps = []
    for late in (1, 2, 5, 1):
        graph.advance(late)
        graph.stage._outputs["arm/command"].heartbeat.restart(0)
        before = graph.commands("arm/command")[-1][0]
        answer = graph.ask(1.0, 0.0)
        assert answer is not None
        steps.append(answer[0] - before)
    assert steps == pytest.approx([0.01, 0.02, 0.02, 0.01])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 3.0), min_size=5, max_size=60))
def test_however_commands_arrive_the_mean_speed_is_kept(gaps: list[float]) -> None:
    action = dataclasses.replace(ARM, low=(-100.0, -100.0), high=(100.0, 100.0), limits=Limits(velocity=(1.0, 1.0)))
    graph = Graph(contract(action))
    graph.run(1, 0.0, 0.0)
    times, places = [graph.now], [0.0]
    for gap in gaps:
        graph.advance(gap)
        graph.ask(100.0, 0.0)
        times.append(graph.now)
        places.append(graph.commands("arm/command")[-1][0])
    for (t0, x0), (t1, x1) in itertools.combinations(zip(times, places, strict=True), 2):
        assert x1 - x0 <= (t1 - t0) / 1e9 + 2 * PERIOD_S + 1e-9


def test_candidates_that_come_twice_are_sent_once() -> None:
    graph = Graph(contract(BASE))
    graph.run(3, 0.01, 0.0)
    assert graph.ask(0.01, 0.0) is None
    assert graph.stage.counts["early"] == 1


def test_a_stamp_of_the_future_does_not_use_up_the_periods_until_then() -> None:
    graph = Graph(contract(PLAIN))
    graph.run(3, 0.1, 0.0)
    graph.advance()
    assert graph.ask(0.1, 0.0, stamp_ns=graph.now + 30 * PERIOD) == [0.1, 0.0]
    assert graph.run(3, 0.2, 0.0) == [[0.2, 0.0]] * 3


def test_a_measurement_that_is_no_number_is_none() -> None:
    graph = Graph(contract(ARM, observations={"joints": JOINT_STATE}))
    graph.advance()
    graph.positions["joints"] = [math.nan, 0.0]
    with pytest.raises(MessageError, match="arm/state: shoulder is nan: not finite"):
        graph.sense("joints")
    assert graph.ask(0.0, 0.0) is None and "nothing received" in graph.stage.faults()["joints"]


# Faults. Each ends in the declared safe action in the call that detects it, and is over when its cause is.

SENSORS = {"joints": JOINT_STATE, "place": PLACE}


def moving(reactions: dict[str, Any] | None = None, action: Action = PLAIN, **safety: Any) -> Graph:
    graph = Graph(contract(action, observations=SENSORS, reactions=reactions, **safety))
    assert graph.run(5, 0.4, 0.2)[-1] == [0.4, 0.2] and graph.stage.state == "passing"
    return graph


def lost(graph: Graph, sensor: str) -> None:
    graph.silent.add(sensor)


def frozen(graph: Graph, sensor: str) -> None:
    stamp = graph.now
    graph.stamps[sensor] = lambda: stamp


def behind(graph: Graph, sensor: str) -> None:
    graph.stamps[sensor] = lambda: graph.now - 2 * 10**9


def ahead(graph: Graph, sensor: str) -> None:
    graph.stamps[sensor] = lambda: graph.now + 2 * 10**9


SENSOR_FAULTS = [
    (lost, "lost, ", 6), (frozen, "frozen: the same stamp repeated", 6),
    (behind, "time-shifted: stamped 2 s behind the clock", 1),
    (ahead, "time-shifted: stamped 2 s ahead of the clock", 2),
]  # fmt: skip


@pytest.mark.parametrize(("break_it", "words", "periods"), SENSOR_FAULTS)
@pytest.mark.parametrize("sensor", ["joints", "place"])
def test_a_sensor_that_fails_stops_the_robot(break_it: Any, words: str, periods: int, sensor: str) -> None:
    graph = moving()
    break_it(graph, sensor)
    command, passed = [0.4, 0.2], 0
    while graph.stage.state == "passing" and passed <= periods:
        assert command == [0.4, 0.2]
        (command,) = graph.run(1, 0.4, 0.2)
        passed += 1
    assert passed <= periods and command == [0.0, 0.0]
    topic = graph.contract.observations[sensor].topic
    assert f"{sensor} ({topic}) {words}" in graph.stage.faults()[sensor]
    assert graph.stage.counts["sensor"] == 1 == graph.stage.counts["stops"]
    graph.silent.clear()
    graph.stamps.clear()
    graph.run(60, 0.4, 0.2)  # stamps that ran ahead have to be caught up with, or jump back
    assert graph.stage.state == "passing"


def test_a_sensor_that_was_never_there_lets_nothing_move() -> None:
    graph = Graph(contract(PLAIN, observations=SENSORS))
    graph.silent.add("place")
    assert graph.run(3, 0.4, 0.0) == [[0.0, 0.0]] * 3
    assert "place (place) nothing received" in graph.stage.faults()["place"]


def test_only_the_named_sensors_are_watched() -> None:
    graph = moving(sensors=("place",))
    graph.silent.add("joints")
    assert graph.run(30, 0.4, 0.2)[-1] == [0.4, 0.2]


def test_a_policy_that_fell_silent_is_replaced_by_the_safe_action() -> None:
    graph = moving()
    periods = 0
    while not graph.out["cmd_vel"][5:] and periods < 15:
        graph.advance()
        graph.sense_all()
        graph.tick()
        periods += 1
    assert periods == 11 and graph.commands("cmd_vel")[-1].tolist() == [0.0, 0.0]
    assert "candidates of cmd_vel lost, 0.11 s old, limit 0.1 s" in graph.stage.faults()["cmd_vel"]
    assert graph.run(2, 0.4, 0.2)[-1] == [0.4, 0.2] and graph.stage.state == "passing"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("reaction", "answer"), [("stop", [0.0, 0.0]), ("latch", [0.0, 0.0]), ("hold", [0.4, 0.2])])
def test_a_number_that_is_not_finite_never_leaves(bad: float, reaction: str, answer: list[float]) -> None:
    graph = moving({"not_finite": reaction})
    assert graph.run(1, 0.4, bad) == [answer]
    assert graph.stage.counts["not_finite"] == 1
    assert graph.stage.reasons["not_finite"] == "angular.z of cmd_vel not finite"
    assert graph.run(1, 0.4, 0.2) == [answer if reaction == "latch" else [0.4, 0.2]]


def test_what_does_not_decode_stops() -> None:
    graph = moving()
    graph.advance()
    graph.sense_all()
    frame = graph.keep(graph.stage.candidate("cmd_vel", b"\0\1\0\0rubbish", graph.now, graph.steady))
    assert frame == {"cmd_vel": [0.0, 0.0]} and "cmd_vel" in graph.stage.reasons["undecodable"]


@pytest.mark.parametrize(("shift_s", "words"), [(-0.3, "0.3 s ago, limit 0.25 s"), (0.7, "0.7 s ahead, limit 0.5 s")])
def test_a_candidate_of_another_time_stops(shift_s: float, words: str) -> None:
    graph = moving()
    graph.advance()
    graph.sense_all()
    assert graph.ask(0.4, 0.2, stamp_ns=graph.now + round(shift_s * 1e9)) == [0.0, 0.0]
    assert words in graph.stage.reasons["command_age"]
    assert graph.out["cmd_vel"][-1][0] == graph.now, "a command of now"
    assert graph.run(1, 0.4, 0.2) == [[0.4, 0.2]]


@pytest.mark.parametrize(("jump_s", "words"), [(-100.0, "jumped back by 100 s"), (3.0, "jumped ahead by 3 s")])
def test_a_clock_that_jumps_stops_until_all_is_on_the_new_clock(jump_s: float, words: str) -> None:
    graph = moving()
    graph.now += round(jump_s * 1e9)
    graph.advance()
    assert graph.tick() == {"cmd_vel": [0.0, 0.0]}
    assert words in graph.stage.reasons["clock"]
    assert "nothing received" in graph.stage.faults()["joints"]
    graph.advance()
    assert graph.ask(0.4, 0.2) == [0.0, 0.0]
    assert graph.run(2, 0.4, 0.2)[-1] == [0.4, 0.2]


def test_a_stop_slows_down_and_comes_back_within_the_limits() -> None:
    graph = Graph(contract(BASE, observations=SENSORS))
    graph.run(60, 0.9, -1.2)
    graph.silent.add("joints")
    graph.run(80, 0.9, -1.2)
    assert graph.commands("cmd_vel")[-1].tolist() == [0.0, 0.0]
    graph.silent.clear()
    graph.run(80, 0.9, -1.2)
    rows = graph.commands("cmd_vel")
    assert rows[-1].tolist() == [0.9, -1.2] and graph.stage.state == "passing"
    assert_within(BASE, rows, np.zeros(2))
    assert len(rows) == 220, "every candidate was answered"


# Latches.


@pytest.mark.parametrize("cause", ["sensor", "heartbeat", "clock", "command_age", "not_finite", "limits"])
def test_a_latch_stays_until_it_is_reset(cause: str) -> None:
    action = dataclasses.replace(PLAIN, limits=Limits(rate=(100.0, 100.0)))
    graph = moving({cause: "latch"}, action)
    if cause == "sensor":
        graph.silent.add("place")
        graph.run(8, 0.4, 0.2)
        assert "the cause persists: sensor: place" in graph.stage.reset(graph.now, graph.steady)
        graph.silent.clear()
    elif cause == "heartbeat":
        graph.advance(12)
        graph.sense_all()
        graph.tick()
        assert "the cause persists" in graph.stage.reset(graph.now, graph.steady)
    elif cause == "clock":
        graph.now -= 10**12
    elif cause == "command_age":
        graph.advance()
        graph.ask(0.4, 0.2, stamp_ns=graph.now - 10**9)
    else:
        graph.run(1, math.nan if cause == "not_finite" else 9.0, 0.2)
        assert "the cause persists" in graph.stage.reset(graph.now, graph.steady)
    assert graph.run(30, 0.4, 0.2)[-1] == [0.0, 0.0]
    assert graph.stage.state == "latched" and graph.stage.counts["latches"] == 1
    assert graph.stage.reset(graph.now, graph.steady) == ""
    assert graph.run(8, 0.4, 0.2)[-1] == [0.4, 0.2]
    assert graph.stage.reset(graph.now, graph.steady) == "nothing is latched"


@pytest.mark.parametrize("reaction", ["stop", "latch"])
def test_a_policy_that_says_why_it_cannot_act_is_as_one_that_is_silent(reaction: str) -> None:
    """Though its commands still come: they are not to be followed."""
    graph = moving({"heartbeat": reaction})
    graph.stage.policy_fault = "policy_server_lost: nobody answers"
    assert graph.run(2, 0.4, 0.2)[-1] == [0.0, 0.0]
    assert graph.stage.faults()["policy"] == "policy: policy_server_lost: nobody answers"
    assert graph.stage.state == ("latched" if reaction == "latch" else "stopping")
    graph.stage.policy_fault = ""
    assert graph.run(8, 0.4, 0.2)[-1] == ([0.0, 0.0] if reaction == "latch" else [0.4, 0.2])
    assert graph.stage.reset(graph.now, graph.steady) == ("" if reaction == "latch" else "nothing is latched")
    assert graph.run(8, 0.4, 0.2)[-1] == [0.4, 0.2]


def test_one_can_latch_by_hand() -> None:
    graph = moving()
    graph.stage.trip("somebody pressed it")
    assert graph.run(1, 0.4, 0.2) == [[0.0, 0.0]] and graph.stage.latched == "somebody pressed it"


@pytest.mark.parametrize(("reaction", "answer"), [("hold", [0.4, 0.2]), ("stop", [0.0, 0.0]), ("latch", [0.0, 0.0])])
def test_limits_can_be_declared_to_hold_or_stop(reaction: str, answer: list[float]) -> None:
    graph = moving({"limits": reaction})
    assert graph.run(1, 3.0, 0.2) == [answer]
    assert graph.stage.counts["bounds"] == 1
    assert graph.run(2, 0.4, 0.2)[-1] == ([0.0, 0.0] if reaction == "latch" else [0.4, 0.2])


# Workspace.

FLYER = Action(
    topic="hand", type=JOINTS, field="velocity", kind="velocity", names=("vx", "vy"), units=("m/s", "m/s"),
    low=(-1.0, -1.0), high=(1.0, 1.0), safe=("zero", "zero"),
    limits=Limits(acceleration=(2.0, 2.0), jerk=(40.0, 40.0)),
)  # fmt: skip
BOX = Workspace(
    stream="place",
    axes=(Axis(action="vx", position="x", low=-0.5, high=0.5), Axis(action="vy", position="y", low=0.0, high=1.0)),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.integers(1, 60)), min_size=1, max_size=8))
def test_velocities_keep_the_robot_in_its_workspace(asked: list[tuple[float, float, int]]) -> None:
    graph = Graph(contract(FLYER, observations={"place": PLACE}, workspace=BOX))
    place = np.array([0.0, 0.5])
    for vx, vy, repeat in asked:
        for _ in range(repeat):
            graph.positions["place"] = place.tolist()
            (command,) = graph.run(1, vx, vy)
            place = place + np.array(command) * PERIOD_S
            assert -0.5 - 1e-9 <= place[0] <= 0.5 + 1e-9 and 0.0 - 1e-9 <= place[1] <= 1.0 + 1e-9


def test_positions_keep_the_workspace_too() -> None:
    box = Workspace(stream="joints", axes=(Axis(action="shoulder", position="shoulder", low=-0.2, high=0.2),))
    graph = Graph(contract(ARM, observations={"joints": JOINT_STATE}, workspace=box))
    assert graph.run(120, 0.9, 0.0)[-1] == pytest.approx([0.2, 0.0])
    assert graph.stage.reasons["workspace"] == "shoulder 0.9 rad leads out of the workspace"


def test_a_workspace_that_latches() -> None:
    graph = Graph(contract(FLYER, observations={"place": PLACE}, workspace=BOX, reactions={"workspace": "latch"}))
    graph.positions["place"] = [0.49, 0.5]
    graph.run(20, 1.0, 0.0)
    assert graph.stage.state == "latched" and "vx" in graph.stage.latched


# Several actions, trajectories, simulated time.


def test_a_fault_of_one_action_stops_them_all() -> None:
    graph = Graph(contract(PLAIN, GRIP))
    for _ in range(30):
        graph.advance()
        graph.ask(0.3, 0.0, topic="cmd_vel")
        graph.ask(5.0, topic="grip")
    graph.advance()
    graph.ask(0.3, math.nan, topic="cmd_vel")
    assert graph.ask(9.0, topic="grip") == [5.0], "the grip holds"
    assert graph.commands("cmd_vel")[-1].tolist() == [0.0, 0.0]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.floats(-3, 3), min_size=8, max_size=8), min_size=1, max_size=5))
def test_rows_of_trajectories_keep_the_limits(plans: list[list[float]]) -> None:
    action = dataclasses.replace(
        ARM, topic="jtc", type="trajectory_msgs/msg/JointTrajectory", publish="chunk", names=("shoulder",),
        units=("rad",), low=(-1.0,), high=(1.0,), safe=("hold",),
        limits=Limits(velocity=(1.0,), acceleration=(10.0,), jerk=(400.0,)),
    )  # fmt: skip
    graph = Graph(contract(action))
    executed = []
    for plan in [[0.0] * 8, *plans]:
        graph.advance(4)
        data = encode(action, graph.now, np.array(plan)[:, None], PERIOD)
        frame = graph.stage.candidate("jtc", data, graph.now, graph.steady)
        executed.append(decode(action, frame["jtc"])[:4, 0])  # the robot gets as far as the next plan
    (stop,) = graph.stage.halt(graph.now + 4 * PERIOD, graph.steady + 4 * PERIOD).values()
    executed.append(decode(action, stop)[:, 0])
    rows = np.concatenate(executed)[:, None]
    assert_within(action, rows, np.zeros(1))
    assert graph.stage.rests and rows[-1] == pytest.approx(rows[-2], abs=0.01)


def test_a_vehicle_stops_along_its_trajectory() -> None:
    action = Action(
        topic="plan", type="vla_ros/msg/Trajectory", publish="chunk", step_s=0.1, frame_id="base_link",
        names=("x", "y", "yaw", "speed"), units=("m", "m", "rad", "m/s"), low=(-5.0, -40.0, -3.2, 0.0),
        high=(80.0, 40.0, 3.2, 20.0), safe=("zero", "zero", "zero", "zero"),
        limits=Limits(acceleration=(4.0, 4.0, 9.0, 9.0)),
    )  # fmt: skip
    graph = Graph(contract(action))
    rows = np.array([[0.5 * k, 0.0, 0.0, 5.0] for k in range(10)])
    data = encode(action, graph.now, rows, 100_000_000)
    assert graph.stage.candidate("plan", data, graph.now, graph.steady) == {"plan": data}
    graph.advance(15)  # 0.15 s: in the second step, and silent for too long
    (data,) = graph.stage.tick(graph.now, graph.steady).values()
    assert header_stamp_ns(action.type, data) == START, "a stop keeps the frame of the trajectory that it ends"
    stop = decode(action, data)
    assert stop[:2] == pytest.approx(rows[:2]), "what was driven stays"
    steps = np.diff(stop[:, 0])
    assert (np.diff(steps) <= 1e-9).all() and (np.diff(steps) >= -4.0 * 0.1**2 - 1e-9).all() and (steps >= -1e-9).all()
    assert stop[-1][3] == pytest.approx(0.0, abs=1e-9) and (stop[:, 1] == 0.0).all()
    graph.advance()
    assert graph.stage.tick(graph.now, graph.steady) == {}, "one trajectory leads all the way"


def test_in_lockstep_every_candidate_is_answered_with_its_stamp_however_long_it_took() -> None:
    graph = Graph(contract(PLAIN, observations=SENSORS), simulated=True)
    for episode in range(3):
        for _ in range(20):
            graph.now += PERIOD
            graph.tick()
            if episode != 1:
                graph.sense_all()
            graph.steady += 3 * 10**9  # a slow model
            graph.tick()
            if episode == 1:
                graph.sense_all()  # what the sensors saw comes late
            assert graph.ask(0.4, 0.2) == [0.4, 0.2]
            assert graph.out["cmd_vel"][-1][0] == graph.now
        graph.now += 10**9  # the pause between two episodes
    assert graph.stage.counts["passed"] == 60


def test_in_simulated_time_silence_is_noticed_too() -> None:
    graph = Graph(contract(PLAIN, observations=SENSORS), simulated=True)
    graph.run(5, 0.4, 0.2)
    for _ in range(20):
        graph.now += PERIOD
        graph.tick()
    assert graph.commands("cmd_vel")[-1].tolist() == [0.0, 0.0] and "cmd_vel" in graph.stage.faults()


def test_a_simulation_that_starts_again_is_followed() -> None:
    graph = Graph(contract(PLAIN, observations=SENSORS), simulated=True)
    graph.run(5, 0.4, 0.2)
    graph.now = 10**9
    assert graph.run(1, 0.4, 0.2) == [[0.0, 0.0]]
    assert graph.run(3, 0.4, 0.2)[-1] == [0.4, 0.2]


# The end.


def test_at_the_end_it_slows_down_and_says_so() -> None:
    graph = Graph(contract(BASE))
    graph.run(60, 0.9, 0.0)
    for _ in range(graph.stage.stop_periods()):
        graph.advance()
        graph.keep(graph.stage.halt(graph.now, graph.steady))
    assert graph.stage.rests and graph.commands("cmd_vel")[-1].tolist() == [0.0, 0.0]
    assert_within(BASE, graph.commands("cmd_vel"), np.zeros(2))


def test_an_end_that_cannot_wait_sends_the_safe_action_at_once() -> None:
    graph = Graph(contract(BASE))
    graph.run(60, 0.9, 0.0)
    assert graph.keep(graph.stage.end(graph.now)) == {"cmd_vel": [0.0, 0.0]}


def test_nothing_is_commanded_before_the_first_candidate() -> None:
    graph = Graph(contract(BASE, observations=SENSORS))
    graph.advance(100)
    assert graph.tick() == {} == graph.stage.halt(graph.now, graph.steady) and graph.stage.state == "waiting"


# The parts, and what the contract refuses.


def test_a_watch_takes_messages_that_overtook_each_other() -> None:
    watch = Watch(50, 100)
    assert watch.arrive(1000, 1000) and not watch.arrive(990, 1001) and not watch.arrive(1000, 1002)
    watch.elapse(40)
    assert not watch.fault
    watch.elapse(20)
    assert "lost" in watch.fault


@pytest.mark.parametrize(
    ("change", "words"),
    [({"sensors": ("task",)}, "no max_age_s"), ({"sensors": ("none",)}, "no observation 'none'"),
     ({"workspace": Workspace(stream="place", axes=(BOX.axes[0], BOX.axes[0]))}, "one axis per action")],
)  # fmt: skip
def test_a_contract_that_cannot_be_kept_is_refused(change: dict[str, Any], words: str) -> None:
    task = Stream(topic="task", type="std_msgs/msg/String", latched=True)
    with pytest.raises(ConfigError, match=words):
        contract(FLYER, observations={"place": PLACE, "task": task}, **change)


def test_a_zero_that_is_out_of_bounds_is_no_safe_action() -> None:
    with pytest.raises(ConfigError, match="zero, which is not between"):
        dataclasses.replace(BASE, low=(0.1, -1.5))
