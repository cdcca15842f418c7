"""The recorder: what belongs to an episode is in its bag, byte for byte, and a killed one leaves what was flushed."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from hypothesis import given
from hypothesis import strategies as st
from rclpy.time import Time
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger
from vla_ros.msg import Episode

from vla_core.commands import encode
from vla_core.contract import RobotContract
from vla_core.data import bag as bags
from vla_core.data.bag import BagError, BagWriter
from vla_core.errors import VlaError
from vla_core.inspect import describe
from vla_core.observation import messages
from vla_ros.bridge import COMMAND_QOS, EPISODE_QOS, message_class, stream_qos
from vla_ros.queues import LARGE_BYTES, LEAST_DEPTH, MEGABYTE, SMALL_BYTES, SMALL_DEPTH, queue_depths
from vla_ros.recorder_node import RecorderNode

from .conftest import DEADLINE_S, Ros, parameters

STEP_NS = 12_500_000


def make_recorder(ros: Ros, output: Path, **values: Any) -> RecorderNode:
    overrides = parameters(contract="metaworld_sawyer", output=str(output), **values)
    node: RecorderNode = ros.add(RecorderNode(context=ros.context, parameter_overrides=overrides))
    return node


class Source:
    """Publishes hand states and commands, and marks episodes."""

    def __init__(self, ros: Ros, contract: RobotContract) -> None:
        self.node, self.contract, self.ros = ros.node("source"), contract, ros
        hand, instruction = contract.observations["hand"], contract.observations["instruction"]
        self.hand = self.node.create_publisher(message_class(hand.type), hand.topic, stream_qos(hand, 500))
        self.text = self.node.create_publisher(
            message_class(instruction.type), instruction.topic, stream_qos(instruction)
        )
        self.commands = self.node.create_publisher(JointState, contract.actions["hand"].topic, COMMAND_QOS)
        self.episodes = self.node.create_publisher(Episode, "episode", EPISODE_QOS)
        self.text.publish(messages.text("do it"))
        ros.spin_until(
            lambda: all(p.get_subscription_count() for p in (self.hand, self.text, self.commands, self.episodes)),
            "the recorder",
        )

    def mark(self, state: int, stamp_ns: int, index: int) -> None:
        mark = Episode(state=state, index=index, seed=7, task="task", instruction="do it")
        mark.header.stamp = Time(nanoseconds=stamp_ns).to_msg()
        self.episodes.publish(mark)

    def send(self, stamp_ns: int) -> tuple[bytes, bytes]:
        values = np.full(4, stamp_ns / 1e10)
        hand = messages.joint_state(stamp_ns, self.contract.observations["hand"].names, "position", values)
        action = self.contract.actions["hand"]
        command = encode(action, stamp_ns, np.clip(values, -0.8, 0.8)[None, :], self.contract.step_ns)
        self.hand.publish(hand)
        self.commands.publish(command)
        return hand, command


def test_each_episode_is_a_bag_with_its_own_messages(ros: Ros, contract: RobotContract, tmp_path: Path) -> None:
    recorder = make_recorder(ros, tmp_path / "bags", streams=["hand", "instruction"])
    source = Source(ros, contract)
    sent: list[dict[int, tuple[bytes, bytes]]] = []
    for index, start_ns in enumerate((10**9, 5 * 10**9)):
        source.send(start_ns - STEP_NS)  # before the episode: not in it
        source.mark(Episode.START, start_ns, index)
        stamps = [start_ns + k * STEP_NS for k in range(40)]
        sent.append({stamp: source.send(stamp) for stamp in stamps})
        for publisher in (source.hand, source.commands):
            publisher.wait_for_all_acked()
        # The end is published while the recorder has processed nothing of it: it must drain its queues.
        source.mark(Episode.SUCCEEDED, stamps[-1], index)
    ros.spin_until(lambda: len(recorder.bags) == 2, "two bags")

    for index, path in enumerate(recorder.bags):
        info = bags.info(path)
        assert info.whole and path.name == f"episode_{index:06d}"
        assert info.contract == contract
        assert info.metadata["instruction"] == "do it" and info.metadata["outcome"] == "succeeded"
        found = {(m.topic, m.stamp_ns): m.data for m in bags.read(path) if m.topic in ("hand/state", "hand/command")}
        expected = {("hand/state", stamp): hand for stamp, (hand, _) in sent[index].items()}
        expected |= {("hand/command", stamp): command for stamp, (_, command) in sent[index].items()}
        # The middleware pads to four bytes at the end; what is read from the bytes is the same.
        assert found.keys() == expected.keys()
        assert all(data[: len(expected[key])] == expected[key] for key, data in found.items())
        text = [m for m in bags.read(path) if m.topic == "instruction"]
        assert [messages.deserialize(m.type, m.data).data for m in text] == ["do it"], "latched: in every bag"


def test_a_stop_in_the_middle_closes_the_bag_as_aborted(ros: Ros, contract: RobotContract, tmp_path: Path) -> None:
    recorder = make_recorder(ros, tmp_path / "bags")
    source = Source(ros, contract)
    source.mark(Episode.START, 10**9, 0)
    source.send(10**9)
    ros.spin_until(lambda: recorder._recording is not None and recorder._recording.messages > 2, "an open bag")
    recorder.stop()
    assert bags.info(tmp_path / "bags" / "episode_000000").metadata["outcome"] == "aborted"


def call(ros: Ros, node: Any, name: str) -> Any:
    client = node.create_client(Trigger, f"/recorder/{name}")
    ros.spin_until(client.service_is_ready, f"the service {name}")
    future = client.call_async(Trigger.Request())
    ros.spin_until(future.done, f"an answer of {name}")
    return future.result()


def test_services_start_stop_and_discard(ros: Ros, contract: RobotContract, tmp_path: Path) -> None:
    recorder = make_recorder(ros, tmp_path / "bags", streams=["hand", "instruction"])
    source = Source(ros, contract)
    ros.spin_until(lambda: any(topic == "instruction" for topic, _ in recorder._latched), "the instruction")
    assert not call(ros, source.node, "stop").success, "there is nothing to stop"
    for keep in (False, True):
        assert call(ros, source.node, "start").success
        assert not call(ros, source.node, "start").success, "one episode at a time"
        sent = [time.time_ns() for _ in range(5)]
        for stamp in sent:
            source.send(stamp)
        for publisher in (source.hand, source.commands):
            publisher.wait_for_all_acked()
        answer = call(ros, source.node, "stop" if keep else "discard")
        assert answer.success
        assert (tmp_path / "bags" / "episode_000000").is_dir() == keep
    info = bags.info(tmp_path / "bags" / "episode_000000")
    assert info.counts["hand/state"] == 5 and info.metadata["outcome"] == "succeeded"
    assert info.metadata["instruction"] == "do it"


def test_a_disk_that_refuses_is_named_and_the_bag_does_not_look_whole(
    ros: Ros, contract: RobotContract, tmp_path: Path
) -> None:
    recorder = make_recorder(ros, tmp_path / "bags", streams=["hand", "instruction"])
    source = Source(ros, contract)
    source.mark(Episode.START, 10**9, 0)
    ros.spin_until(lambda: recorder._recording is not None, "an open bag")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "bags" / "episode_000000" / "episode_000000.mcap").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, limit[1]))  # as good as a full disk, for this process
    try:
        with pytest.raises(BagError, match=r"episode_000000: cannot be written: .*stays readable"):
            for k in range(10**6):
                source.send(10**9 + k * STEP_NS)
                ros.executor.spin_once(timeout_sec=0.02)
        recorder.stop()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not bags.info(tmp_path / "bags" / "episode_000000").whole


def test_an_output_with_content_is_refused(ros: Ros, tmp_path: Path) -> None:
    (tmp_path / "episode_000000").mkdir()
    with pytest.raises(VlaError, match="not empty"):
        make_recorder(ros, tmp_path)


def test_an_unknown_stream_is_refused_with_the_choices(ros: Ros, tmp_path: Path) -> None:
    with pytest.raises(VlaError, match=r"no observation 'lidar'; choices: hand, image"):
        make_recorder(ros, tmp_path / "bags", streams=["lidar"])


def test_a_killed_recorder_leaves_what_was_flushed(ros: Ros, contract: RobotContract, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "vla_ros.recorder_node", "--ros-args", "-p", "contract:=metaworld_sawyer",
         "-p", f"output:={tmp_path / 'bags'}"], env=os.environ.copy(),
    )  # fmt: skip
    try:
        source = Source(ros, contract)
        bag = tmp_path / "bags" / "episode_000000"
        start_ns = time.time_ns()
        source.mark(Episode.START, start_ns, 0)

        def flushed() -> bool:
            source.send(time.time_ns())
            return bag.is_dir() and sum(bags.info(bag).counts.values()) > 100

        ros.spin_until(flushed, "flushed messages")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    info = bags.info(bag)
    assert not info.whole and info.counts["hand/state"] > 40
    assert "NOT WHOLE" in describe(bag) and "readable up to the last flushed chunk" in describe(bag)
    with pytest.raises(BagError, match="never closed"):
        list(bags.read(bag))


class Diagnostics:
    """What the recorder says of itself on ``/diagnostics``."""

    def __init__(self, ros: Ros) -> None:
        self.ros, self.heard = ros, []
        node = ros.node("doctor")
        node.create_subscription(DiagnosticArray, "/diagnostics", lambda m: self.heard.append(m.status[0]), 10)

    def until(self, text: str, level: bytes) -> dict[str, str]:
        """Values of the next status whose message holds ``text``."""
        self.heard.clear()
        self.ros.spin_until(lambda: any(text in status.message for status in self.heard), f"{text!r}")
        status = next(status for status in self.heard if text in status.message)
        assert status.level == level and status.name == "/recorder: recorder"
        return {value.key: value.value for value in status.values}


class Disk:
    """Stands between the recorder and the disk: holds it up, or fills it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.free = 10**12
        write = BagWriter.write

        def slow_write(writer: BagWriter, *arguments: Any) -> None:
            assert self.go_on.wait(DEADLINE_S)
            write(writer, *arguments)

        monkeypatch.setattr(BagWriter, "write", slow_write)
        monkeypatch.setattr("vla_ros.recorder_node.shutil.disk_usage", lambda path: SimpleNamespace(free=self.free))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_full_disk_ends_the_episode_and_refuses_the_next(
    ros: Ros, contract: RobotContract, tmp_path: Path, disk: Disk
) -> None:
    recorder = make_recorder(ros, tmp_path / "bags", streams=["hand", "instruction"], min_free_mb=100)
    source, diagnostics = Source(ros, contract), Diagnostics(ros)
    values = diagnostics.until("waiting for an episode", DiagnosticStatus.OK)
    assert values["recording"] == "False" and values["free_disk_bytes"] == str(disk.free)
    source.mark(Episode.START, time.time_ns(), 0)
    ros.spin_until(lambda: recorder._recording is not None, "an open bag")
    source.send(time.time_ns())
    values = diagnostics.until("recording", DiagnosticStatus.OK)
    assert values["bag"] == str(tmp_path / "bags" / "episode_000000")

    disk.free = 99_000_000
    ros.spin_until(lambda: len(recorder.bags) == 1, "the end of the episode")
    info = bags.info(recorder.bags[0])
    assert info.whole and info.metadata["outcome"] == "aborted" and info.counts["hand/state"] == 1
    diagnostics.until("99 MB are free", DiagnosticStatus.ERROR)
    answer = call(ros, source.node, "start")
    assert not answer.success and "min_free_mb is 100; free some or choose another output" in answer.message
    source.mark(Episode.START, time.time_ns(), 7)
    ros.spin_until(lambda: "episode 7 was not recorded" in recorder._refused, "a refusal of the mark")

    disk.free = 10**12
    diagnostics.until("episode 7 was not recorded: 99 MB are free", DiagnosticStatus.WARN)
    assert call(ros, source.node, "start").success, "there is room again"
    assert call(ros, source.node, "stop").success
    assert [path.name for path in recorder.bags] == ["episode_000000", "episode_000001"]


def test_a_slow_disk_costs_counted_messages_and_no_stop_command(
    ros: Ros, contract: RobotContract, tmp_path: Path, disk: Disk
) -> None:
    recorder = make_recorder(ros, tmp_path / "bags", streams=["hand", "instruction"])
    recorder._thread.budget.limit = 20_000
    source, diagnostics = Source(ros, contract), Diagnostics(ros)
    start_ns = time.time_ns()
    source.mark(Episode.START, start_ns, 0)
    ros.spin_until(lambda: recorder._recording is not None, "an open bag")
    disk.go_on.clear()
    for k in range(200):
        source.send(start_ns + k)
        ros.executor.spin_once(timeout_sec=0.0)
    values = diagnostics.until("messages were lost: hand/command: ", DiagnosticStatus.WARN)
    assert int(values["waiting_bytes"]) < 22_000, "the limit, and the marks"
    source.mark(Episode.SUCCEEDED, start_ns + 200, 0)
    ros.spin_until(lambda: recorder._recording is None, "the end, while the disk stands still")
    disk.go_on.set()
    ros.spin_until(lambda: len(recorder.bags) == 1, "the bag")
    info = bags.info(recorder.bags[0])
    dropped = json.loads(info.metadata["dropped_messages"])
    assert info.whole and info.metadata["outcome"] == "succeeded" and info.counts["episode"] == 2
    for topic in ("hand/state", "hand/command"):
        assert 0 < info.counts[topic] < 200 and info.counts[topic] + dropped[topic] == 200


def test_what_the_middleware_loses_is_counted(ros: Ros, contract: RobotContract, tmp_path: Path) -> None:
    recorder = make_recorder(ros, tmp_path / "bags", streams=["hand", "instruction"])
    source = Source(ros, contract)
    start_ns = time.time_ns()
    source.mark(Episode.START, start_ns, 0)
    source.send(start_ns)
    ros.spin_until(lambda: recorder._recording is not None and recorder._recording.messages >= 4, "the first messages")
    sent = 1400  # more than the queue of a subscription holds, while nobody takes them
    for k in range(1, sent):
        source.send(start_ns + k)
    source.mark(Episode.SUCCEEDED, start_ns + sent, 0)
    ros.spin_until(lambda: len(recorder.bags) == 1, "the bag")
    info = bags.info(recorder.bags[0])
    dropped = json.loads(info.metadata["dropped_messages"])
    for topic in ("hand/state", "hand/command"):
        assert info.counts[topic] <= 1001 and info.counts[topic] + dropped[topic] == sent


def test_stamps_of_a_simulated_clock_need_use_sim_time(ros: Ros, contract: RobotContract, tmp_path: Path) -> None:
    recorder = make_recorder(ros, tmp_path / "bags", streams=["hand", "instruction"])
    source, diagnostics = Source(ros, contract), Diagnostics(ros)
    source.node.create_publisher(Clock, "/clock", 10)
    ros.spin_until(lambda: recorder.count_publishers("/clock") == 1, "the clock")
    source.mark(Episode.START, 10**9, 0)
    diagnostics.until("start the recorder with use_sim_time:=true", DiagnosticStatus.WARN)
    source.send(10**9)
    diagnostics.until("nothing can be recorded: stamps are", DiagnosticStatus.ERROR)
    source.send(time.time_ns())
    source.mark(Episode.START, time.time_ns(), 0)  # the clock is somebody else's
    ros.spin_until(lambda: recorder._recording is not None, "an open bag")
    recorder.stop()


@given(
    st.lists(st.sampled_from([*LARGE_BYTES, "sensor_msgs/msg/Imu", "std_msgs/msg/String"]), max_size=12),
    st.integers(0, 2000),
)
def test_full_queues_stay_within_their_share(types: list[str], megabytes: int) -> None:
    budget = megabytes * MEGABYTE
    try:
        depths = queue_depths(types, budget)
    except VlaError as error:
        needed = int(str(error).partition("need queues of ")[2].split()[0])
        assert needed >= megabytes
        assert queue_depths(types, (needed + 1) * MEGABYTE)
        return
    assert sum(depth * LARGE_BYTES.get(name, SMALL_BYTES) for depth, name in zip(depths, types, strict=True)) <= budget
    least = [LEAST_DEPTH if name in LARGE_BYTES else SMALL_DEPTH for name in types]
    assert all(depth >= low for depth, low in zip(depths, least, strict=True))


def test_too_little_memory_is_named_with_what_is_needed(ros: Ros, tmp_path: Path) -> None:
    with pytest.raises(VlaError, match=r"need queues of \d+ MB, and there are 10; raise max_memory_mb"):
        make_recorder(ros, tmp_path / "bags", max_memory_mb=20)


def test_what_has_no_stamp_is_counted_as_lost(ros: Ros, contract: RobotContract, tmp_path: Path) -> None:
    """A driver that leaves the stamp at 0: none of it can lie in an episode, and that must not pass unnoticed."""
    recorder = make_recorder(ros, tmp_path / "bags", streams=["hand", "instruction"])
    source = Source(ros, contract)
    start_ns = 10**12
    source.mark(Episode.START, start_ns, 0)
    source.send(start_ns)
    source.send(start_ns - STEP_NS)  # a straggler of before is no loss
    hand = contract.observations["hand"]
    for _ in range(5):
        source.hand.publish(messages.joint_state(0, hand.names, "position", np.zeros(4)))
    ros.spin_until(lambda: recorder._dropped[hand.topic] == 5, "five losses")
    source.mark(Episode.SUCCEEDED, start_ns, 0)
    ros.spin_until(lambda: recorder.bags, "the bag")
    info = bags.info(recorder.bags[0])
    assert info.counts[hand.topic] == 1 and json.loads(info.metadata["dropped_messages"]) == {hand.topic: 5}
