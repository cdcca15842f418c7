"""From bags to ticks, against a reconstruction in the plainest way: loops over lists."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.commands import encode
from vla_core.data.bag import CONTRACT_KEY, BagWriter
from vla_core.data.episodes import Commands, StampOrder, episode_starts, replay_ticks
from vla_core.observation.builder import ObservationBuilder, ObservationSpec, Unobserved
from vla_core.observation.memory_buffer import MemoryBuffer
from vla_core.observation.messages import Message

from .helpers import (
    CONTRACT,
    JOINTS,
    MS,
    SPEC,
    START,
    STEP,
    arm,
    camera,
    command,
    mark,
    pixels,
    stream_messages,
    task,
    with_action,
    write_bag,
)
from .replayed import read_episode
from .test_multi_sensor import assert_equal


class Recording:
    """Streams with jitter, gaps and latency, kept as plain numbers beside their messages."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)

        def stamps(period: int, jitter: int, lost: float, first: int) -> list[int]:
            ideal = START + first + np.arange(0, 1200 * MS, period)
            jittered = ideal + rng.integers(-jitter, jitter + 1, len(ideal))
            return sorted({int(t) for t in jittered[rng.random(len(ideal)) >= lost]})

        self.arm = stamps(10 * MS, 2 * MS, 0.1, int(rng.integers(0, 30 * MS)))
        self.camera = stamps(40 * MS, 9 * MS, 0.3, int(rng.integers(0, 90 * MS)))
        self.commands = stamps(10 * MS, 3 * MS, 0.1, int(rng.integers(0, 40 * MS)))
        del self.arm[60:72]  # a silence of the arm, longer than its greatest age
        self.task = START + int(rng.integers(0, 150 * MS))
        self.messages = [
            task(self.task, "lift it"),
            *(arm(t, k / 100, -k) for k, t in enumerate(self.arm)),
            *(camera(t, k) for k, t in enumerate(self.camera)),
            *(command(t, k / 1000, k / 500) for k, t in enumerate(self.commands)),
        ]
        latency = {"arm/state": 1 * MS, "cam/raw": 25 * MS, "arm/command": 2 * MS, "task": 0}
        self.received = sorted((m.stamp_ns + int(rng.integers(0, 1 + latency[m.topic])), i, m)
                               for i, m in enumerate(self.messages))  # fmt: skip

    def write(self, path: Path) -> Path:
        with BagWriter(path, {CONTRACT_KEY: CONTRACT.to_yaml()}) as writer:
            for topic, type_name in {m.topic: m.type for m in self.messages}.items():
                writer.add_topic(topic, type_name)
            for receive_ns, _, message in self.received:
                writer.write(message.topic, receive_ns, message.data)
        return path

    def expected_ticks(self) -> list[int]:
        """From the first stamp at which both sensors are fresh (a period less half a step) and the text is there."""
        stamps = sorted([*self.arm, *self.camera, self.task])
        for now in stamps:
            arms = [t for t in self.arm if t <= now]
            cameras = [t for t in self.camera if t <= now]
            if arms and cameras and self.task <= now and now - arms[-1] < 5 * MS and now - cameras[-1] < 35 * MS:
                return list(range(now, stamps[-1] + STEP, STEP))
        raise AssertionError

    def expected_rows(self) -> list[tuple[int, int, int, int]]:
        """(tick, arm message, camera message, command) of the ticks that have all three."""
        rows = []
        for tick in self.expected_ticks():
            a = max((k for k, t in enumerate(self.arm) if t <= tick), default=None)
            c = max((k for k, t in enumerate(self.camera) if t <= tick), default=None)
            u = min((k for k, t in enumerate(self.commands) if tick <= t < tick + STEP), default=None)
            assert a is not None and c is not None
            if tick - self.arm[a] <= 50 * MS and tick - self.camera[c] <= 100 * MS and u is not None:
                rows.append((tick, a, c, u))
        return rows


@pytest.mark.parametrize("seed", range(12))
def test_ticks_and_episode_against_brute_force(tmp_path: Path, seed: int) -> None:
    recording = Recording(seed)
    builder = ObservationBuilder(CONTRACT, SPEC)
    found = list(replay_ticks([m for _, _, m in recording.received], builder, builder.make_buffer()))
    assert found == recording.expected_ticks()

    episode = read_episode(recording.write(tmp_path / "bag"), CONTRACT, SPEC)
    rows = recording.expected_rows()
    assert 30 < len(rows) < len(found), "the recording must have both good and dropped ticks"
    assert [o.stamp_ns for o in episode.observations] == [tick for tick, *_ in rows]
    assert episode.dropped_ticks == len(found) - len(rows)
    for seen, action, (_, a, c, u) in zip(episode.observations, episode.actions, rows, strict=True):
        np.testing.assert_array_equal(seen.state, np.array([a / 100, -a], np.float32))
        np.testing.assert_array_equal(seen.images["camera"], pixels(c))
        np.testing.assert_array_equal(action, np.array([u / 1000, u / 500], np.float32))
        assert seen.instruction == "lift it"


def test_at_a_tick_the_buffer_holds_no_future() -> None:
    recording = Recording(99)
    builder = ObservationBuilder(CONTRACT, SPEC)
    buffer = builder.make_buffer()
    for tick in replay_ticks(recording.messages, builder, buffer):
        newest = buffer.newest_ns("arm")
        assert newest is not None and newest == max(t for t in recording.arm if t <= tick)


def test_ticks_start_even_if_the_sensors_phases_never_meet() -> None:
    """Three arms at the control rate, a third of a period apart: one of them is always half a period old."""
    third = STEP // 3
    streams = {f"arm{i}": dataclasses.replace(CONTRACT.observations["arm"], topic=f"arm{i}") for i in range(3)}
    contract = dataclasses.replace(CONTRACT, observations=streams)
    builder = ObservationBuilder(contract, ObservationSpec(state=tuple(streams)))
    recorded = [
        dataclasses.replace(arm(START + k * STEP + i * third, k), topic=f"arm{i}") for k in range(10) for i in range(3)
    ]
    ticks = list(replay_ticks(recorded, builder, builder.make_buffer()))
    whole = START + 2 * third
    assert ticks[0] == whole + 2 * STEP, "two periods after all of them were there first"
    assert ticks == list(range(ticks[0], recorded[-1].stamp_ns + STEP, STEP))


def test_a_mark_within_a_recording_forgets_what_was_before() -> None:
    """As the robot does: the tick in which an episode starts sees nothing of the one before it."""
    spec = ObservationSpec(state=("arm",), history=3)
    builder = ObservationBuilder(CONTRACT, spec)
    buffer = builder.make_buffer()
    border = START + 5 * STEP
    recorded = [*(arm(START + k * STEP, k) for k in range(10)), mark(START, 0), mark(border, 0), mark(border, 1)]
    seen = {tick: builder.build(buffer, tick) for tick in replay_ticks(recorded, builder, buffer)}
    assert list(seen) == [START + k * STEP for k in range(10)]
    there = [[past.present["arm"] for past in observation.history] for observation in seen.values()]
    start = [[False, False], [False, True]]
    assert there == [*start, *[[True, True]] * 3, *start, *[[True, True]] * 3]


def test_a_recording_with_two_episodes_does_not_tick_in_between() -> None:
    builder = ObservationBuilder(CONTRACT, ObservationSpec(state=("arm",)))
    first, second = START, START + 50 * STEP
    recorded = [arm(t + k * STEP, k) for t in (first, second) for k in range(3)]
    recorded += [mark(first, 0), mark(second - 5 * STEP, 0)]  # five steps pass before the new episode's first message
    ticks = list(replay_ticks(recorded, builder, builder.make_buffer()))
    assert ticks == [first + k * STEP for k in range(45)] + [second + k * STEP for k in range(3)]


def test_two_observations_of_one_topic_are_both_fed(tmp_path: Path) -> None:
    """Position and velocity of one joint_states topic are two vectors of the contract."""
    speed = dataclasses.replace(CONTRACT.observations["arm"], field="velocity", units=("rad/s", "rad/s"))
    contract = dataclasses.replace(CONTRACT, observations={**CONTRACT.observations, "speed": speed})
    both = []
    for message in stream_messages(8):
        if message.topic == "arm/state":
            message = arm_with_velocity(message.stamp_ns)
        both.append(message)
    path = write_bag(tmp_path / "bag", both, contract)
    episode = read_episode(path, contract, ObservationSpec(state=("arm", "speed")))
    assert episode.observations[0].state.tolist() == [1, 2, 3, 4]


def arm_with_velocity(stamp_ns: int) -> Message:
    from vla_core.observation.messages import header, serialize, typestore

    message = typestore().types[JOINTS](
        header=header(stamp_ns), name=["shoulder", "elbow"], position=np.array([1.0, 2.0]),
        velocity=np.array([3.0, 4.0]), effort=np.zeros(0),
    )  # fmt: skip
    return Message("arm/state", JOINTS, stamp_ns, serialize(JOINTS, message))


def test_a_command_answers_the_tick_of_its_own_period() -> None:
    recorded = [command(START + d, v) for d, v in ((-1, 0.1), (0, 0.2), (STEP - 1, 0.3), (2 * STEP, 0.4))]
    commands = Commands(list(reversed(recorded)), CONTRACT)

    def at(tick_ns: int) -> float | None:
        found = commands.at(tick_ns)
        return None if found is None else float(found[0])

    assert len(commands) == 4
    assert [at(START), at(START + 1), at(START + STEP), at(START + 2 * STEP)] == [0.2, 0.3, None, 0.4]
    assert at(START + 3 * STEP) is None and at(START - STEP) == 0.1


def test_marks_say_what_the_episode_was(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", stream_messages(6, outcome=2, seed=41))
    before, found = read_episode(path, CONTRACT, SPEC).infos
    assert before.outcome == "unknown"
    assert (found.seed, found.task, found.instruction, found.outcome) == (41, "lift", "lift it", "failed")
    unmarked = [m for m in stream_messages(6) if m.topic != "episode"]
    (only,) = read_episode(write_bag(tmp_path / "b2", unmarked), CONTRACT, SPEC).infos
    assert only.outcome == "unknown"


# --- streaming ------------------------------------------------------------------------------------------------------


def reference(messages: list[Message], builder: ObservationBuilder, buffer: MemoryBuffer) -> Iterator[int]:
    """The same ticks from lists that are sorted as a whole, with all that is to come known in advance."""
    feed = sorted((m for m in messages if m.topic in builder.by_topic), key=lambda m: m.stamp_ns)
    starts = episode_starts(messages)
    patience_ns = 2 * max((stream.period_ns or 0 for stream in builder.streams.values()), default=0)
    tick_ns = whole_ns = None
    fed = 0

    def feed_until(until_ns: int) -> None:
        nonlocal fed
        while fed < len(feed) and feed[fed].stamp_ns <= until_ns:
            for name in builder.by_topic[feed[fed].topic]:
                buffer.add(name, feed[fed].stamp_ns, feed[fed].data)
            fed += 1

    for place, message in enumerate(feed):
        while starts and starts[0] <= message.stamp_ns:
            buffer.start_episode(starts.pop(0))
            tick_ns = whole_ns = None
        feed_until(message.stamp_ns)
        border_ns = starts[0] if starts else 2**63
        next_ns = feed[place + 1].stamp_ns if place + 1 < len(feed) else message.stamp_ns + STEP
        if tick_ns is None:
            absent = builder.absent(buffer, message.stamp_ns)
            whole_ns = None if absent else whole_ns or message.stamp_ns
            waited = whole_ns is not None and message.stamp_ns - whole_ns >= patience_ns
            if waited or not builder.due(buffer, message.stamp_ns):
                tick_ns, whole_ns = message.stamp_ns, None
        while tick_ns is not None and tick_ns < min(next_ns, border_ns):
            feed_until(min(tick_ns + builder.lookahead_ns, border_ns - 1))
            yield tick_ns
            tick_ns += STEP
            if tick_ns - message.stamp_ns > 2_000 * MS:
                tick_ns = None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.integers(0, 3))
def test_a_stream_gives_what_whole_lists_give(seed: int, offline: bool, marks: int) -> None:
    """Ticks, observations and commands, message by message, against everything sorted in memory."""
    rng = np.random.default_rng(seed)
    recording = Recording(seed)
    streams = dict(CONTRACT.observations)
    if offline:
        streams["arm"] = dataclasses.replace(streams["arm"], sampling="interpolate", tolerance_s=0.04)
        streams["camera"] = dataclasses.replace(streams["camera"], sampling="nearest", tolerance_s=0.05)
    contract = dataclasses.replace(CONTRACT, offline=offline, observations=streams)
    spec = dataclasses.replace(SPEC, history=int(rng.integers(1, 4)))
    received = [dataclasses.replace(m, receive_ns=receive_ns) for receive_ns, _, m in recording.received]
    received = [m for m in received if not 300 * MS < m.stamp_ns - START < 300 * MS + int(rng.integers(0, 90)) * MS]
    if rng.random() < 0.3:  # everything is silent for long
        received = [m if m.stamp_ns < START + 700 * MS else moved(m, 2500 * MS) for m in received]
    for stamp in rng.integers(0, 1200 * MS, marks).tolist():
        state = int(rng.integers(0, 2))
        received.append(dataclasses.replace(mark(START + stamp, state), receive_ns=START + stamp + 30 * MS))
    received.sort(key=lambda m: m.receive_ns or 0)

    builder = ObservationBuilder(contract, spec)
    buffer, commands = builder.make_buffer(), Commands(received, contract)
    expected = []
    for tick in reference(received, builder, buffer):
        expected.append((tick, seen_at(builder, buffer, tick), commands.at(tick), commands.at(tick + 3 * STEP)))
    assert len(expected) > 20

    builder = ObservationBuilder(contract, spec)
    buffer, commands = builder.make_buffer(), Commands((), contract, ahead_ns=4 * STEP)
    order = StampOrder(iter(received), builder.by_topic, window_ns=60 * MS)
    ticks = replay_ticks(iter(order), builder, buffer, commands)
    for tick in ticks:
        due, seen, now, later = expected.pop(0)
        assert tick == due
        assert_equal(seen_at(builder, buffer, tick), seen)
        np.testing.assert_array_equal(commands.at(tick), now)
        np.testing.assert_array_equal(commands.at(tick + 3 * STEP), later)
    assert not expected and not order.late and not order.future


def moved(message: Message, by_ns: int) -> Message:
    data = bytearray(message.data)
    if message.topic != "task":
        seconds, nanoseconds = divmod(message.stamp_ns + by_ns, 1_000_000_000)
        data[4:12] = struct.pack("<iI", seconds, nanoseconds)
    assert message.receive_ns is not None
    return Message(message.topic, message.type, message.stamp_ns + by_ns, bytes(data), message.receive_ns + by_ns)


def seen_at(builder: ObservationBuilder, buffer: MemoryBuffer, tick: int) -> object:
    try:
        return builder.build(buffer, tick)
    except Unobserved as refusal:
        return str(refusal)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 900)), max_size=60), st.integers(0, 500))
def test_what_is_overtaken_within_the_window_is_put_in_order(arrivals: list[tuple[int, int]], window: int) -> None:
    """Against the definition: late is what comes more than the window after something with a newer stamp."""
    received = sorted(((START + stamp * MS, START + (stamp + delay) * MS) for stamp, delay in arrivals),
                      key=lambda pair: pair[1])  # fmt: skip
    messages = [dataclasses.replace(arm(stamp, 0), receive_ns=receive) for stamp, receive in received]
    order = StampOrder(messages, window_ns=window * MS)
    found = list(order)
    assert sorted(m.stamp_ns for m in found) == sorted(stamp for stamp, _ in received), "nothing is lost"
    # When a message comes, all have left up to the newest stamp among those that were a window old by then.
    late = 0
    for i, (stamp, _) in enumerate(received):
        left = [s for s, r in received[:i] if received[i - 1][1] - r > window * MS]
        late += bool(left) and max(left) > stamp
    assert order.late["arm/state"] == late
    if not late:
        assert [m.stamp_ns for m in found] == sorted(stamp for stamp, _ in received)


def test_what_waits_to_be_sorted_is_bounded() -> None:
    """By the window, and by bytes where that is less: counted by how far reading runs ahead of giving."""
    messages = [dataclasses.replace(camera(START + k * STEP, k % 3), receive_ns=START + k * STEP) for k in range(400)]
    size = len(messages[0].data)
    for options, most in (({"window_ns": 50 * STEP}, 52), ({"max_bytes": 20 * size}, 22)):
        read = 0

        def counted() -> Iterator[Message]:
            nonlocal read
            for message in messages:
                read += 1
                yield message

        ahead = [read - given for given, _ in enumerate(StampOrder(counted(), **options))]
        assert max(ahead) <= most


def test_stamps_that_a_robot_would_not_believe_are_left_out_and_counted() -> None:
    late_clock = [dataclasses.replace(arm(START + d, 0), receive_ns=START) for d in (0, 250 * MS, 251 * MS, 10**17)]
    plans = [dataclasses.replace(command(START + d, 0), receive_ns=START) for d in (500 * MS, 2001 * MS)]
    order = StampOrder([*late_clock, *plans], {"arm/state"})
    assert [m.stamp_ns - START for m in order] == [0, 250 * MS, 500 * MS]
    assert order.future == {"arm/state": 2, "arm/command": 1}


def test_a_message_that_is_late_still_reaches_the_buffer() -> None:
    builder = ObservationBuilder(CONTRACT, ObservationSpec(state=("arm",)))
    buffer = builder.make_buffer()
    recorded = [dataclasses.replace(arm(START + k * STEP, k), receive_ns=START + k * STEP) for k in range(20) if k != 5]
    recorded.insert(9, dataclasses.replace(arm(START + 5 * STEP, 5), receive_ns=START + 9 * STEP))
    order = StampOrder(recorded, builder.by_topic, window_ns=0)
    seen = {tick: builder.build(buffer, tick).state[0] for tick in replay_ticks(iter(order), builder, buffer)}
    assert order.late == {"arm/state": 1}
    assert [seen[START + k * STEP] for k in range(20)] == [0, 1, 2, 3, 4, 4, *range(6, 20)]
    assert buffer.window("arm", START + 4 * STEP, START + 6 * STEP)[0][0] == START + 5 * STEP


def test_chunks_are_looked_up_row_by_row_while_the_bag_streams() -> None:
    """Commands that are chunks: the newest one not after the tick, row by row, and none beyond its end."""
    contract = with_action(type="trajectory_msgs/msg/JointTrajectory", publish="chunk")
    action = contract.actions["arm"]

    def chunk(stamp_ns: int, value: float) -> Message:
        rows = value + np.arange(4)[:, None] / 10 * np.ones(2)
        return Message(action.topic, action.type, stamp_ns, encode(action, stamp_ns, rows, STEP))

    builder = ObservationBuilder(contract, ObservationSpec(state=("arm",)))
    recorded = [arm(START + k * STEP, k) for k in range(12)]
    recorded += [chunk(START + 2 * STEP, 0.0), chunk(START + 4 * STEP, 0.5), chunk(START + 9 * STEP + 1, -0.5)]
    commands = Commands((), contract)
    found = {}
    for tick in replay_ticks(recorded, builder, builder.make_buffer(), commands):
        value = commands.at(tick)
        found[(tick - START) // STEP] = None if value is None else round(float(value[0]), 3)
    expected = {k: None for k in range(12)} | {2: 0.0, 3: 0.1} | {4 + k: 0.5 + k / 10 for k in range(4)}
    assert found == expected | {10: -0.5, 11: -0.4}
