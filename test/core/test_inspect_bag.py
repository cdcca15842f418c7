"""What is wrong with a bag is named, with its time; of a bag in order nothing is said."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.contract import RobotContract
from vla_core.data import bag as bags
from vla_core.data.bag import CONTRACT_KEY, BagError, BagWriter
from vla_core.inspect import describe
from vla_core.inspect.bag import inspect_bag
from vla_core.inspect.timing import measure
from vla_core.inspect.tracks import Track, collect
from vla_core.observation import messages
from vla_core.observation.messages import Message

from .helpers import (
    CONTRACT,
    IMAGE,
    JOINTS,
    MS,
    START,
    STEP,
    arm,
    camera,
    command,
    mark,
    pixels,
    stream_messages,
    task,
    with_stream,
    write_bag,
)

TICKS = 300  # three seconds


def receive(path: Path, received: list[tuple[int, Message]], contract: RobotContract | None = CONTRACT) -> Path:
    """Write messages with times of receipt of their own."""
    with BagWriter(path, {} if contract is None else {CONTRACT_KEY: contract.to_yaml()}) as writer:
        for topic, kind in {m.topic: m.type for _, m in received}.items():
            writer.add_topic(topic, kind)
        for receive_ns, message in received:
            writer.write(message.topic, receive_ns, message.data)
    return path


def tick(message: Message) -> int:
    return (message.stamp_ns - START) // STEP


Change = Callable[[list[Message]], list[Message]]


def between(topic: str, first: int, last: int, other: Callable[[Message], Message | None]) -> Change:
    """Replace (or with None remove) the messages of a topic from one tick until before another."""

    def change(recorded: list[Message]) -> list[Message]:
        changed = [other(m) if m.topic == topic and first <= tick(m) < last else m for m in recorded]
        return [m for m in changed if m is not None]

    return change


def black(message: Message) -> Message:
    return Message("cam/raw", IMAGE, message.stamp_ns, messages.image(message.stamp_ns, np.zeros((6, 8, 3), np.uint8)))


FAULTS: dict[str, tuple[Change, str]] = {
    "a gap": (
        between("cam/raw", 100, 152, lambda m: None),
        "cam/raw: 1 gap, the longest 0.56 s; from 0.96 s on",
    ),
    "two gaps": (
        lambda recorded: between("arm/state", 30, 40, lambda m: None)(
            between("arm/state", 200, 220, lambda m: None)(recorded)
        ),
        "arm/state: 2 gaps, the longest 0.21 s; from 0.29 s, 1.99 s on",
    ),
    "a stuck arm": (
        between("arm/state", 100, 250, lambda m: arm(m.stamp_ns, 0.5, 0.0)),
        "arm/state: the same values for 1.49 s from 1.00 s on: stuck, or nothing moved",
    ),
    "a frozen camera": (
        between("cam/raw", 80, 200, lambda m: camera(m.stamp_ns, 5)),
        "cam/raw: the same picture for 1.16 s from 0.80 s on",
    ),
    "a black camera": (
        between("cam/raw", 40, 100, black),
        "cam/raw: 5 of 25 pictures that were looked at are black, the first at 0.48 s",
    ),
    "a late begin": (
        between("cam/raw", 0, 120, lambda m: None),
        "cam/raw: begins 1.20 s after the bag",
    ),
    "an early end": (
        between("arm/state", 150, 300, lambda m: None),
        "arm/state: ends 1.51 s before the bag",
    ),
    "half the rate": (
        lambda recorded: [m for m in recorded if m.topic != "arm/state" or tick(m) % 2 == 0],
        "arm/state: 50.0 Hz, where the contract expects 100",
    ),
    "a topic that is not there": (
        between("arm/state", 0, 300, lambda m: None),
        "arm: no topic arm/state of the contract toy",
    ),
    "another type": (
        between("task", 0, 300, lambda m: Message("task", JOINTS, m.stamp_ns, arm(m.stamp_ns, 0).data)),
        "task: task holds sensor_msgs/msg/JointState, the contract toy says std_msgs/msg/String",
    ),
    "a number that is none": (
        between("arm/state", 7, 9, lambda m: arm(m.stamp_ns, float("nan"))),
        "arm/state: 2 messages cannot be used, the first because: arm/state: shoulder is nan: not finite",
    ),
    "bytes of something else": (
        between("arm/command", 7, 8, lambda m: Message(m.topic, m.type, m.stamp_ns, m.data[:20])),
        "arm/command: 1 messages cannot be used, the first because: arm/command: 20 bytes do not decode",
    ),
    "a joint that is not there": (
        between("arm/state", 7, 8, lambda m: Message(m.topic, m.type, m.stamp_ns, messages.joint_state(
            m.stamp_ns, ("shoulder",), "position", np.zeros(1)))),
        "arm/state: 1 messages cannot be used, the first because: arm/state: ",
    ),
}  # fmt: skip


def test_a_bag_in_order_has_no_warnings(tmp_path: Path) -> None:
    report = inspect_bag(write_bag(tmp_path / "bag", stream_messages(TICKS)), pictures=False)
    assert report.warnings == []
    assert "  warnings:\n    none" in describe(tmp_path / "bag")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(tmp_path: Path, fault: str) -> None:
    change, expected = FAULTS[fault]
    path = write_bag(tmp_path / "bag", change(stream_messages(TICKS)))
    report = inspect_bag(path, pictures=False)
    assert [line for line in report.warnings if line.startswith(expected)], report.warnings
    own = expected.split(":")[0]
    assert all(line.startswith((own, "task" if fault == "another type" else own)) for line in report.warnings)
    assert expected in describe(path)


def test_order_and_repetition_of_stamps(tmp_path: Path) -> None:
    recorded = [(START + k * STEP, arm(START + k * STEP, k / 100)) for k in range(50)]
    recorded[10] = (recorded[10][0], arm(START + 9 * STEP, 5.0))  # the stamp of the one before
    recorded[20] = (recorded[20][0], arm(START + 17 * STEP, 6.0))  # older than the one before, and 17 is there twice
    report = inspect_bag(receive(tmp_path / "bag", recorded, None), pictures=False)
    assert report.warnings == [
        "arm/state: 1 of 50 messages have the stamp of the one before",
        "arm/state: 1 of 50 messages are stamped before the one that came before them",
    ]


@pytest.mark.parametrize(
    ("delay_ms", "expected"),
    [
        (49, None),
        (80, "arrives 80 ms after its stamp (95th percentile), later than its max_age_s of 0.05"),
        (-30, "50 of 50 messages are stamped up to 30 ms after their receipt"),
        (3_600_000, "stamps are 3600 s before the time of receipt: another clock"),
        (-3_600_000, "stamps are 3600 s after the time of receipt: another clock"),
    ],
)
def test_latency(tmp_path: Path, delay_ms: int, expected: str | None) -> None:
    streams = {"arm": CONTRACT.observations["arm"]}
    contract = RobotContract(name="arm", rate_hz=100.0, observations=streams, actions=CONTRACT.actions)
    stamps = [START + k * STEP for k in range(50)]
    recorded = [(stamp + delay_ms * MS, arm(stamp, k / 100)) for k, stamp in enumerate(stamps)]
    recorded += [(stamp + delay_ms * MS, command(stamp, k / 100)) for k, stamp in enumerate(stamps)]
    report = inspect_bag(receive(tmp_path / "bag", sorted(recorded, key=lambda r: r[0]), contract), pictures=False)
    found = [line for line in report.warnings if line.startswith("arm/state: ")]
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


def test_without_a_contract_the_usual_interval_decides(tmp_path: Path) -> None:
    recorded = [m for m in stream_messages(TICKS) if not (m.topic == "arm/state" and 100 <= tick(m) < 150)]
    path = write_bag(tmp_path / "bag", recorded, None)
    (line,) = inspect_bag(path, pictures=False).warnings
    assert line.startswith("arm/state: 1 gap, the longest 0.51 s; from 0.99 s on")
    report = inspect_bag(path, CONTRACT, pictures=False)
    assert "contract: toy, 100 Hz" in report.lines, "one that is named is taken"
    patient = with_stream("arm", max_age_s=1.0)
    assert inspect_bag(path, patient, pictures=False).warnings == [], "its age allows the gap"


@settings(max_examples=40)
@given(st.lists(st.integers(1, 500), min_size=10, max_size=60), st.lists(st.integers(0, 30), min_size=61, max_size=61))
def test_the_figures_are_those_of_the_stamps(steps_ms: list[int], delays_ms: list[int]) -> None:
    """Against sums by hand; every interval beyond the age is a gap, and no other."""
    stamps = np.concatenate([[START], START + np.cumsum(np.array(steps_ms) * MS)])
    track = Track("arm/state", JOINTS, len(stamps), stamped=True)
    for stamp, delay in zip(stamps.tolist(), delays_ms, strict=False):
        track.add(Message("arm/state", JOINTS, stamp, b"", stamp + delay * MS))
    bag = bags.BagInfo(Path(), True, {}, {}, START, int(stamps[-1]), 0)
    stream = CONTRACT.observations["arm"]
    found = measure(track, bag, {"arm": stream})
    assert found.rate_hz == pytest.approx(1000 * len(steps_ms) / sum(steps_ms))
    assert found.longest_ms == max(steps_ms)
    middle = sorted(steps_ms)
    median = (middle[len(middle) // 2] + middle[(len(middle) - 1) // 2]) / 2
    assert found.jitter_ms == pytest.approx(np.percentile([abs(s - median) for s in steps_ms], 95))
    ends = np.cumsum(steps_ms) / 1000
    expected = [(end - step / 1000, end) for end, step in zip(ends, steps_ms, strict=True) if step > 50]
    np.testing.assert_allclose(np.array(found.gaps).reshape(-1, 2), np.array(expected).reshape(-1, 2), atol=1e-9)
    np.testing.assert_array_equal(found.latencies_ms, delays_ms[: len(stamps)])


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_the_longest_repetition_is_that_of_a_search(values: list[int]) -> None:
    track = Track("arm/state", JOINTS, len(values), stamped=True)
    for k, value in enumerate(values):
        track.add(arm(START + k * STEP, float(value)))
    best = max(
        (end - begin, -begin) for begin in range(len(values)) for end in range(begin + 1, len(values) + 1)
        if len(set(values[begin:end])) == 1
    )  # fmt: skip
    count, first, last = track.repeated
    assert count == best[0]
    assert (first, last) == (START - best[1] * STEP, START + (-best[1] + count - 1) * STEP)


def test_large_pictures_that_differ_at_the_end_are_not_the_same(tmp_path: Path) -> None:
    """Beyond the bytes that are compared first."""
    track = Track("cam/raw", IMAGE, 3, stamped=True)
    image = np.zeros((64, 64, 3), np.uint8)
    other = image.copy()
    other[-1, -1, -1] = 1
    for k, shown in enumerate((image, image, other)):
        stamp = START + k * STEP
        track.add(Message("cam/raw", IMAGE, stamp, messages.image(stamp, shown)))
    assert track.repeated[0] == 2


def test_memory_does_not_grow_with_the_pictures(tmp_path: Path) -> None:
    """60 MB of pictures; what is kept are some thumbnails and 20 bytes a message."""
    path = tmp_path / "bag"
    noise = np.random.default_rng(0).integers(0, 255, (250, 400, 3), dtype=np.uint8)
    with BagWriter(path) as writer:
        writer.add_topic("cam/raw", IMAGE)
        for k in range(200):
            stamp = START + k * 40 * MS
            writer.write("cam/raw", stamp, messages.image(stamp, np.roll(noise, k, axis=0)))
    summary = bags.info(path)
    tracemalloc.start()
    tracks = collect(summary, bags.read(path), None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert summary.bytes > 55e6 and peak < 20e6
    assert len(tracks["cam/raw"].shots) <= 32 and sum(s.pixels is not None for s in tracks["cam/raw"].shots) == 8


def test_a_damaged_bag_tells_what_is_readable(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", stream_messages(TICKS))
    (file,) = path.glob("*.mcap")
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300] = bytes(300)
    file.write_bytes(content)
    report = inspect_bag(path, pictures=True)
    assert any("damaged" in line for line in report.warnings), report.warnings
    writer = BagWriter(tmp_path / "killed")
    writer.add_topic("arm/state", JOINTS)
    writer.write("arm/state", START, arm(START, 0).data)
    writer.abort()
    report = inspect_bag(tmp_path / "killed")
    assert "never closed" in report.warnings[0] and "arm/state" in "\n".join(report.lines)


def test_what_the_recorder_dropped_and_what_became_of_the_episodes(tmp_path: Path) -> None:
    lost = {CONTRACT_KEY: CONTRACT.to_yaml(), "dropped_messages": '{"cam/raw": 12}'}
    recorded = [*stream_messages(TICKS), mark(START + 150 * STEP, 0), mark(START + 140 * STEP, 2)]
    with BagWriter(tmp_path / "bag", lost) as writer:
        for topic, kind in {m.topic: m.type for m in recorded}.items():
            writer.add_topic(topic, kind)
        for message in sorted(recorded, key=lambda m: m.stamp_ns):
            writer.write(message.topic, message.stamp_ns, message.data)
    report = inspect_bag(tmp_path / "bag", pictures=False)
    assert report.warnings == ["messages that the recorder dropped: cam/raw 12"]
    assert "episode: 2 started, 1 failed, 1 succeeded" in report.lines


def test_an_empty_bag_is_an_error(tmp_path: Path) -> None:
    with BagWriter(tmp_path / "bag") as writer:
        writer.add_topic("arm/state", JOINTS)
    with pytest.raises(BagError, match="empty"):
        describe(tmp_path / "bag")


def test_messages_of_any_type_are_looked_at(tmp_path: Path) -> None:
    """Without a contract the numbers of small messages are read by their type."""
    twist = messages.typestore().types["geometry_msgs/msg/Twist"]
    vector = messages.typestore().types["geometry_msgs/msg/Vector3"]

    def drive(k: int) -> Message:
        content = twist(linear=vector(x=k / 10, y=0.0, z=0.0), angular=vector(x=0.0, y=0.0, z=-k / 10))
        stamp = START + k * STEP
        return Message("cmd_vel", "geometry_msgs/msg/Twist", stamp,
                       messages.serialize("geometry_msgs/msg/Twist", content))  # fmt: skip

    path = write_bag(tmp_path / "bag", [*map(drive, range(20)), mark(START, 0), task(START, "go")], None)
    summary = bags.info(path)
    tracks = collect(summary, bags.read(path), None)
    kept = tracks["cmd_vel"].numbers["cmd_vel"]
    assert kept.names == ("linear.x", "linear.y", "linear.z", "angular.x", "angular.y", "angular.z")
    np.testing.assert_allclose(np.stack(kept.rows)[:, 0], np.arange(20) / 10)
    assert not tracks["episode"].numbers and not tracks["task"].numbers
    section = next(s for s in inspect_bag(path).sections if s.title == "Numbers")
    assert section.table is not None
    assert ("cmd_vel", "linear.x", "0", "0.95", "1.9", "0.5766", "") in section.table.rows
    assert ("cmd_vel", "linear.y", "0", "0", "0", "0", "never moves") in section.table.rows


def test_the_contact_sheet_shows_the_pictures_in_their_order(tmp_path: Path) -> None:
    summary = bags.info(write_bag(tmp_path / "bag", stream_messages(33)))  # nine pictures, of which eight are shown
    shots = collect(summary, bags.read(tmp_path / "bag"), CONTRACT)["cam/raw"].shots
    assert [shot.stamp_ns for shot in shots] == [START + 4 * k * STEP for k in range(9)]
    shown = [k for k, shot in enumerate(shots) if shot.pixels is not None]
    assert len(shown) == 8 and shown[0] == 0 and shown[-1] == 8
    for k in shown:
        np.testing.assert_array_equal(shots[k].pixels, pixels(4 * k))
        assert shots[k].mean == pytest.approx(pixels(4 * k).mean())
