"""Bags: readable by others, safe against a kill, and refused with a reason when they are not whole."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mcap.reader import make_reader
from rosbags.rosbag2 import Reader

from vla_core.contract import RobotContract
from vla_core.data import bag as bags
from vla_core.data.bag import CONTRACT_KEY, BagError, BagWriter
from vla_core.data.convert import convert
from vla_core.errors import VlaError
from vla_core.inspect import describe
from vla_core.observation import messages
from vla_core.observation.messages import Message

from .helpers import CONTRACT, IMAGE, JOINTS, MS, SPEC, START, STEP, STRING, arm, camera, stream_messages, write_bag


def in_order_of_receipt(recorded: list[Message]) -> list[tuple[str, int, bytes]]:
    return [(m.topic, m.stamp_ns, m.data) for m in sorted(recorded, key=lambda m: m.stamp_ns)]


def test_other_readers_get_the_same_bytes(tmp_path: Path) -> None:
    recorded = stream_messages(30)
    path = write_bag(tmp_path / "bag", recorded)
    expected = sorted(in_order_of_receipt(recorded))

    with Reader(path) as reader:
        found = [(c.topic, t, bytes(data)) for c, t, data in reader.messages()]
        types = {c.topic: c.msgtype for c in reader.connections}
    assert sorted(found) == expected
    assert [t for _, t, _ in found] == sorted(t for _, t, _ in found)
    assert types == {m.topic: m.type for m in recorded}

    (file,) = path.glob("*.mcap")
    with file.open("rb") as stream:
        reader = make_reader(stream, validate_crcs=True)
        records = [(c.topic, m.log_time, m.data) for _, c, m in reader.iter_messages()]
        summary = reader.get_summary()
    assert sorted(records) == expected
    assert summary is not None and summary.statistics is not None
    assert summary.statistics.message_count == len(recorded)
    schemas = {schema.name: schema for schema in summary.schemas.values()}
    assert b"float64[] velocity" in schemas[JOINTS].data and schemas[JOINTS].encoding == "ros2msg"
    assert all(channel.message_encoding == "cdr" for channel in summary.channels.values())


def test_metadata_is_what_rosbag2_needs(tmp_path: Path) -> None:
    recorded = stream_messages(10)
    path = write_bag(tmp_path / "bag", recorded)
    information = yaml.safe_load((path / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert information["version"] == 9
    assert information["storage_identifier"] == "mcap"
    assert [(path / name).is_file() for name in information["relative_file_paths"]] == [True]
    assert information["message_count"] == len(recorded)
    assert information["starting_time"]["nanoseconds_since_epoch"] == START
    assert information["duration"]["nanoseconds"] == 10 * STEP
    topics = {t["topic_metadata"]["name"]: t for t in information["topics_with_message_count"]}
    assert topics["arm/state"]["message_count"] == 10
    meta = topics["arm/state"]["topic_metadata"]
    assert (meta["type"], meta["serialization_format"]) == (JOINTS, "cdr")
    for topic, durability in (("arm/state", "volatile"), ("task", "transient_local")):
        (profile,) = topics[topic]["topic_metadata"]["offered_qos_profiles"]
        assert (profile["reliability"], profile["durability"]) == ("reliable", durability)
    assert RobotContract.from_yaml(information["custom_data"][CONTRACT_KEY]) == CONTRACT


def test_our_reader_gives_bytes_and_header_stamps_back(tmp_path: Path) -> None:
    late = 3 * MS
    with BagWriter(tmp_path / "bag") as writer:
        writer.add_topic("arm/state", JOINTS)
        writer.add_topic("task", STRING)
        writer.write("arm/state", START + late, arm(START, 0.5).data)
        writer.write("task", START + 2 * late, messages.text("go"))
    found = list(bags.read(tmp_path / "bag"))
    assert [(m.topic, m.type, m.stamp_ns) for m in found] == [
        ("arm/state", JOINTS, START), ("task", STRING, START + 2 * late)
    ]  # fmt: skip
    assert found[0].data == arm(START, 0.5).data
    assert [m.topic for m in bags.read(tmp_path / "bag", {"task", "absent"})] == ["task"]


def test_summary_of_a_whole_bag(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", stream_messages(12))
    summary = bags.info(path)
    assert summary.whole and summary.contract == CONTRACT
    assert summary.counts == {"episode": 2, "task": 1, "cam/raw": 3, "arm/state": 12, "arm/command": 12}
    assert summary.bytes == sum(f.stat().st_size for f in path.glob("*.mcap"))
    assert summary.start_ns == START and summary.end_ns >= START + 12 * STEP
    text = describe(path)
    assert "NOT WHOLE" not in text and "contract: toy, 100 Hz" in text


def test_a_recording_never_overwrites(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", stream_messages(3))
    with pytest.raises(BagError, match="exists already"):
        BagWriter(path)
    assert bags.info(path).whole


KILLED = """
import os, sys, signal
from vla_core.data.bag import BagWriter
from vla_core.observation.messages import joint_state, image
import numpy as np
writer = BagWriter(sys.argv[1], {"vla_contract": "x"})
writer.add_topic("arm/state", "sensor_msgs/msg/JointState")
start, count = int(sys.argv[2]), int(sys.argv[3])
for k in range(count):
    stamp = start + k * 10_000_000
    writer.write("arm/state", stamp, joint_state(stamp, ("shoulder", "elbow"), "position", np.array([k, 0.0])))
writer.flush()
for k in range(count, count + 5):  # within the flush interval: these are lost
    stamp = start + (count - 1) * 10_000_000 + k
    writer.write("arm/state", stamp, joint_state(stamp, ("shoulder", "elbow"), "position", np.array([k, 0.0])))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_recorder_leaves_what_was_flushed(tmp_path: Path) -> None:
    path, count = tmp_path / "bag", 120
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", KILLED, str(path), str(START), str(count)], cwd=root, timeout=60,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (path / "metadata.yaml").exists()
    summary = bags.info(path)
    assert not summary.whole
    assert summary.topics == {"arm/state": JOINTS} and summary.counts == {"arm/state": count}
    assert (summary.start_ns, summary.end_ns) == (START, START + (count - 1) * STEP)
    assert f"{count} messages" in summary.note and "1.19 s" in summary.note
    assert "NOT WHOLE" in describe(path)
    for refused in (lambda: list(bags.read(path)), lambda: convert([path], tmp_path / "set", SPEC, CONTRACT)):
        with pytest.raises(BagError, match="never closed"):
            refused()
    assert os.listdir(tmp_path) == ["bag"]


def test_an_exception_while_recording_leaves_a_bag_that_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), BagWriter(tmp_path / "bag") as writer:
        writer.add_topic("arm/state", JOINTS)
        writer.write("arm/state", START, arm(START, 1).data)
        raise RuntimeError
    summary = bags.info(tmp_path / "bag")
    assert not summary.whole and summary.counts == {"arm/state": 1}


def test_the_salvaged_span_is_right_when_simulated_time_starts_at_zero(tmp_path: Path) -> None:
    writer = BagWriter(tmp_path / "bag")
    writer.add_topic("arm/state", JOINTS)
    for stamp in (0, STEP, 2 * STEP):
        writer.write("arm/state", stamp, arm(stamp, 1).data)
    writer.abort()
    summary = bags.info(tmp_path / "bag")
    assert (summary.start_ns, summary.end_ns) == (0, 2 * STEP)


def truncate(path: Path, part: float) -> None:
    (file,) = path.glob("*.mcap")
    os.truncate(file, int(file.stat().st_size * part))


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.98, 0.9999])
def test_a_truncated_bag_is_refused_by_everything_that_reads(tmp_path: Path, part: float) -> None:
    path = write_bag(tmp_path / "bag", stream_messages(40))
    truncate(path, part)
    for refused in (
        lambda: list(bags.read(path)),
        lambda: convert([path], tmp_path / "set", SPEC),
    ):
        with pytest.raises(BagError, match=r"truncated|damaged") as caught:
            refused()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["bag"]


def test_inspect_keeps_the_promise_that_other_errors_make(tmp_path: Path) -> None:
    """Their errors say that `vla inspect` tells what is readable of a truncated bag."""
    path = write_bag(tmp_path / "bag", stream_messages(400))
    truncate(path, 0.6)
    with pytest.raises(BagError, match="vla inspect"):
        list(bags.read(path))
    text = describe(path)
    assert "NOT WHOLE" in text and "arm/state" in text


@pytest.mark.parametrize("place", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_flipped_bytes_are_an_error_or_change_nothing_in_silence(tmp_path: Path, place: float) -> None:
    """A damaged file may be refused; it must not end in anything but an error of this package."""
    path = write_bag(tmp_path / "bag", stream_messages(40))
    (file,) = path.glob("*.mcap")
    content = bytearray(file.read_bytes())
    at = int(len(content) * place)
    content[at : at + 200] = bytes(b ^ 0xFF for b in content[at : at + 200])
    file.write_bytes(content)
    for use in (lambda: list(bags.read(path)), lambda: bags.info(path), lambda: describe(path)):
        try:
            use()
        except VlaError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    (path / "metadata.yaml").unlink()
    assert not bags.info(path).whole


@pytest.mark.parametrize("text", ["", "a: [", "rosbag2_bagfile_information: 3", "other: {}"])
def test_damaged_metadata_is_named(tmp_path: Path, text: str) -> None:
    path = write_bag(tmp_path / "bag", stream_messages(3))
    (path / "metadata.yaml").write_text(text)
    with pytest.raises(BagError) as caught:
        list(bags.read(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    try:
        assert not bags.info(path).whole, "what is readable may be told, as long as it is not called whole"
    except BagError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_no_bag_and_an_empty_bag(tmp_path: Path) -> None:
    with BagWriter(tmp_path / "empty") as writer:
        writer.add_topic("arm/state", JOINTS)
    for use in (lambda p: bags.info(p), lambda p: list(bags.read(p))):
        with pytest.raises(BagError, match="empty: no messages"):
            use(tmp_path / "empty")
        with pytest.raises(BagError, match="no bag"):
            use(tmp_path / "absent")


def test_missing_empty_and_wrong_topics_are_named(tmp_path: Path) -> None:
    recorded = stream_messages(5)
    lacking = write_bag(tmp_path / "lacking", [m for m in recorded if m.topic != "cam/raw"])
    with pytest.raises(BagError, match=r"'cam/raw'.*has: arm/command, arm/state, episode, task") as caught:
        convert([lacking], tmp_path / "set", SPEC)
    assert str(lacking) in str(caught.value)

    wrong = [m for m in recorded if m.topic != "cam/raw"] + [Message("cam/raw", STRING, START, messages.text("x"))]
    with pytest.raises(BagError, match=f"'cam/raw' holds {STRING}, the contract says {IMAGE}"):
        convert([write_bag(tmp_path / "wrong", wrong)], tmp_path / "set", SPEC)

    with BagWriter(tmp_path / "silent", {CONTRACT_KEY: CONTRACT.to_yaml()}) as writer:
        for topic, type_name in {m.topic: m.type for m in recorded}.items():
            writer.add_topic(topic, type_name)
        for message in recorded:
            if message.topic != "cam/raw":
                writer.write(message.topic, message.stamp_ns, message.data)
    with pytest.raises(BagError, match="'cam/raw' has no messages"):
        convert([tmp_path / "silent"], tmp_path / "set", SPEC)

    bare = write_bag(tmp_path / "bare", recorded, contract=None)
    with pytest.raises(BagError, match=r"no contract inside.*\(none\).*--contract"):
        convert([bare], tmp_path / "set", SPEC)
    assert convert([bare], tmp_path / "set", SPEC, CONTRACT).report.episodes == 1


def test_a_message_that_does_not_decode_names_its_bag(tmp_path: Path) -> None:
    """One bad message among the bags of a day: which bag?"""
    bad = camera(START + 2 * STEP, 0)
    bad = Message(bad.topic, bad.type, bad.stamp_ns, bad.data[:40])
    good = write_bag(tmp_path / "good", stream_messages(6))
    path = write_bag(tmp_path / "spoiled", [*stream_messages(6), bad])
    with pytest.raises(VlaError, match="cam/raw") as caught:
        convert([good, path], tmp_path / "set", SPEC)
    assert "spoiled" in str(caught.value) and not (tmp_path / "set").exists()


def test_find_bags(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_bag(tmp_path / "day" / name, stream_messages(2))
    (tmp_path / "day" / "notes").mkdir()
    (tmp_path / "none").mkdir()
    assert [p.name for p in bags.find_bags([tmp_path / "day"])] == ["a", "b"]
    assert [p.name for p in bags.find_bags([tmp_path / "day" / "b", tmp_path / "day"])] == ["b", "a", "b"]
    assert [p.name for p in bags.find_bags([tmp_path])] == ["a", "b"]
    (tmp_path / "day").rename(tmp_path / ".day.partial")
    with pytest.raises(BagError, match="no bag here"):
        bags.find_bags([tmp_path])
    for missing in ("none", "nowhere"):
        with pytest.raises(BagError, match=missing):
            bags.find_bags([tmp_path / missing])


def test_a_full_disk_is_named_and_leaves_no_bag_that_looks_whole(tmp_path: Path) -> None:
    class Full(io.BufferedWriter):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = BagWriter(tmp_path / "bag")
    writer.add_topic("arm/state", JOINTS)
    first, *rest = stream_messages(3)
    writer.write("arm/state", first.stamp_ns, first.data)
    storage = writer._writer.storage
    assert storage is not None
    storage.bio = Full(open(tmp_path / "rest", "wb", buffering=0))  # type: ignore[attr-defined]  # noqa: SIM115
    with pytest.raises(BagError, match="bag: cannot be written: No space left on device") as caught:
        for message in rest:
            writer.write("arm/state", message.stamp_ns + 10**10, message.data)
        writer.close()
    assert "\n" not in str(caught.value)
    writer.abort()
    assert not bags.info(tmp_path / "bag").whole


def test_a_bag_that_lost_its_storage_is_not_passed_over(tmp_path: Path) -> None:
    write_bag(tmp_path / "all" / "one", stream_messages(3))
    lost = write_bag(tmp_path / "all" / "two", stream_messages(3))
    (next(lost.glob("*.mcap"))).unlink()
    assert bags.find_bags([tmp_path / "all"]) == [tmp_path / "all" / "one", lost]
    with pytest.raises(BagError, match="two: no bag: neither"):
        bags.info(lost)


def test_the_contract_of_a_bag_that_is_not_whole_names_the_cause(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", stream_messages(3))
    (path / "metadata.yaml").unlink()
    with pytest.raises(BagError, match="never closed"):
        _ = bags.info(path).contract
