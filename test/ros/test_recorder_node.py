"""The recorder: what belongs to an episode is in its bag, byte for byte, and a killed one leaves what was flushed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rclpy.time import Time
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger
from vla_ros.msg import Episode

from vla_core.commands import encode
from vla_core.contract import RobotContract
from vla_core.data import bag as bags
from vla_core.data.bag import BagError
from vla_core.errors import VlaError
from vla_core.inspect import describe
from vla_core.observation import messages
from vla_ros.bridge import COMMAND_QOS, EPISODE_QOS, message_class, stream_qos
from vla_ros.recorder_node import RecorderNode

from .conftest import Ros, parameters

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
    ros.spin_until(lambda: "instruction" in recorder._latched, "the instruction")
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
