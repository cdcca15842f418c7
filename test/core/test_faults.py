"""Sensor faults: every kind against its definition over the whole episode, and the words of what cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.config import ConfigError
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.observation import messages
from vla_core.observation.messages import Message, deserialize, header_stamp_ns
from vla_core.sim.faults import Fault, Faults

START_NS = 7 * NANOSECONDS
TICK_NS = NANOSECONDS // 5
JOINTS = "sensor_msgs/msg/JointState"
Arrivals = list[list[Message]]  # what was handed over at each tick


def reading(topic: str, stamp_ns: int, number: float) -> Message:
    data = messages.joint_state(stamp_ns, ("a", "b"), "position", np.array([number, -number]))
    return Message(topic, JOINTS, stamp_ns, data)


def number_in(message: Message) -> float:
    return float(deserialize(JOINTS, message.data).position[0])


@st.composite
def episodes(draw: st.DrawFn) -> Arrivals:
    """What the sensors ``x`` and ``y`` send in each control period that ends at a tick, each in order of its stamps."""
    ticks: Arrivals = []
    for tick in range(draw(st.integers(1, 12))):
        sent = []
        for topic in ("x", "y"):
            ages = draw(st.lists(st.integers(0, TICK_NS - 1), max_size=4, unique=True))
            for age in sorted(ages, reverse=True):
                stamp_ns = START_NS + tick * TICK_NS - age
                sent.append(reading(topic, stamp_ns, float(stamp_ns % 1_000_003)))
        ticks.append(sent)
    return ticks


def run(fault: Fault, ticks: Arrivals) -> Arrivals:
    sensors = Faults(faults=(fault,)).begin(START_NS)
    return [sensors.apply(sent, START_NS + k * TICK_NS) for k, sent in enumerate(ticks)]


def of(topic: str, ticks: Arrivals) -> Arrivals:
    return [[message for message in arrived if message.topic == topic] for arrived in ticks]


def flat(ticks: Arrivals) -> list[Message]:
    return [message for arrived in ticks for message in arrived]


SPANS = st.one_of(
    st.just((0.0, None)),
    st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.none()),
    st.tuples(st.sampled_from([0.0, 0.2, 0.5]), st.sampled_from([0.7, 1.0, 1.4])),
)


def inside(message: Message, span: tuple[float, float | None]) -> bool:
    since_s = (message.stamp_ns - START_NS) / NANOSECONDS
    return span[0] <= since_s and (span[1] is None or since_s < span[1])


@settings(max_examples=60, deadline=None)
@given(episodes(), SPANS, st.sampled_from(["dropped", "frozen", "stuck", "delayed"]))
def test_another_sensor_is_never_touched(ticks: Arrivals, span: tuple[float, float | None], kind: str) -> None:
    fault = Fault(topic="x", kind=kind, delay_s=0.3, start_s=span[0], end_s=span[1])  # type: ignore[arg-type]
    assert of("y", run(fault, ticks)) == of("y", ticks)
    assert Faults().begin(START_NS).apply(ticks[0], START_NS) == ticks[0]


@settings(max_examples=60, deadline=None)
@given(episodes(), SPANS)
def test_dropped_is_all_but_the_span(ticks: Arrivals, span: tuple[float, float | None]) -> None:
    fault = Fault(topic="x", kind="dropped", start_s=span[0], end_s=span[1])
    assert of("x", run(fault, ticks)) == [[m for m in sent if not inside(m, span)] for sent in of("x", ticks)]


@settings(max_examples=60, deadline=None)
@given(episodes(), SPANS, st.sampled_from(["frozen", "stuck"]))
def test_a_frozen_driver_tells_what_it_saw_last(ticks: Arrivals, span: tuple[float, float | None], kind: str) -> None:
    fault = Fault(topic="x", kind=kind, start_s=span[0], end_s=span[1])  # type: ignore[arg-type]
    arrived = of("x", run(fault, ticks))
    assert [len(one) for one in arrived] == [len(one) for one in of("x", ticks)], "at the rate of its sensor"
    sent = flat(of("x", ticks))
    before = [message for message in sent if (message.stamp_ns - START_NS) / NANOSECONDS < span[0]]
    for true, told in zip(sent, flat(arrived), strict=True):
        if not inside(true, span):
            assert told == true
            continue
        source = (before or sent)[-1 if before else 0]
        assert number_in(told) == number_in(source)
        stamp_ns = true.stamp_ns if kind == "frozen" else source.stamp_ns
        assert told.stamp_ns == header_stamp_ns(JOINTS, told.data) == stamp_ns


@settings(max_examples=100, deadline=None)
@given(episodes(), SPANS, st.sampled_from([0.0, 0.1, 0.2, 0.35, 5.0]))
def test_what_is_late_comes_in_order_at_the_first_tick_it_can(
    ticks: Arrivals, span: tuple[float, float | None], delay_s: float
) -> None:
    arrived = of("x", run(Fault(topic="x", kind="delayed", delay_s=delay_s, start_s=span[0], end_s=span[1]), ticks))
    expected: Arrivals = [[] for _ in ticks]
    earliest = 0
    for tick, sent in enumerate(of("x", ticks)):
        for message in sent:
            earliest = max(earliest, tick)
            if inside(message, span):
                late_ns = message.stamp_ns - START_NS + round(delay_s * NANOSECONDS)
                earliest = max(earliest, -(-late_ns // TICK_NS))
            if earliest < len(ticks):
                expected[earliest].append(message)
    assert arrived == expected


def test_faults_of_one_sensor_add_up() -> None:
    contract = RobotContract.load("driving")
    faults = Faults.parse(["imu=delayed:0.2", "imu/data=dropped@0.2-0.6", ""], contract)
    sensors = faults.begin(START_NS)
    arrived = []
    for tick in range(6):
        stamp_ns = START_NS + tick * TICK_NS
        arrived.append([m.stamp_ns - START_NS for m in sensors.apply([reading("imu/data", stamp_ns, 1.0)], stamp_ns)])
    assert arrived == [[], [0], [], [], [3 * TICK_NS], [4 * TICK_NS]]


def test_a_frozen_picture_is_the_old_one_under_the_new_stamp() -> None:
    sensors = Faults.parse(["front=frozen"], RobotContract.load("driving")).begin(0)
    pictures = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20)]
    sent = [
        Message("camera/front/image_raw", "sensor_msgs/msg/Image", stamp_ns, messages.image(stamp_ns, pixels, "eye"))
        for stamp_ns, pixels in zip((5, 3_000_000_007), pictures, strict=True)
    ]
    first, second = (sensors.apply([message], message.stamp_ns)[0] for message in sent)
    assert first == sent[0]
    assert second.data == messages.image(3_000_000_007, pictures[0], "eye")


def test_names_topics_and_patterns() -> None:
    contract = RobotContract.load("driving")

    def topics(text: str) -> list[str]:
        return [fault.topic for fault in Faults.parse([text], contract).faults]

    assert topics("lidar=dropped") == topics("lidar/points=dropped") == ["lidar/points"]
    assert topics("radar_*=dropped") == [
        f"radar/{side}/points" for side in ("front", "front_left", "front_right", "back")
    ]
    assert topics("motion=stuck") == topics("odom=stuck") == ["odom"]
    assert "instruction" not in topics("*=dropped")
    (fault,) = Faults.parse(["radar_front=delayed:0.25@3-6.5"], contract).faults
    assert (fault.delay_s, fault.start_s, fault.end_s) == (0.25, 3.0, 6.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lidar", r"fault 'lidar': expected STREAM=KIND, such as"),
        ("lidar=broken", r"unknown kind 'broken'; choices: delayed, dropped, frozen, stuck"),
        ("lider=dropped", r"'driving' has no sensor 'lider'; choices: .*lidar.*, or their topics"),
        ("instruction=dropped", r"no sensor 'instruction'"),
        ("imu=delayed", r"delayed needs its seconds"),
        ("imu=frozen:2", r"delayed needs its seconds"),
        ("imu=delayed:soon", r"expected seconds from 0 on, found 'soon'"),
        ("imu=delayed:-1", r"expected seconds from 0 on, found '-1'"),
        ("imu=delayed:inf", r"expected seconds from 0 on, found 'inf'"),
        ("imu=dropped@nan", r"expected seconds from 0 on, found 'nan'"),
        ("imu=dropped@6-3", r"ends at 3 s, which is not after its start, 6 s"),
        ("imu=dropped@", r"expected seconds from 0 on, found ''"),
    ],
)
def test_faults_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Faults.parse([text], RobotContract.load("driving"))
