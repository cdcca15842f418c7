"""The recorder on a vehicle: instructions that change in lockstep, transforms of several publishers, other topics."""

from __future__ import annotations

from pathlib import Path

import pytest
from rclpy.time import Time
from tf2_msgs.msg import TFMessage
from vla_ros.msg import Episode, Tick

from vla_core.contract import NANOSECONDS
from vla_core.data import bag as bags
from vla_core.errors import VlaError
from vla_core.observation import messages, writing
from vla_core.observation.messages import deserialize
from vla_ros.bridge import EPISODE_QOS, message_class, stream_qos
from vla_ros.lockstep import TICK_QOS
from vla_ros.recorder_node import RecorderNode

from .conftest import Ros, parameters
from .toy_vehicle import CONTRACT, DRIVE, ODOMETRY, saved

START = 5 * NANOSECONDS
TICK = NANOSECONDS // 5
STATIC = "/tf_static=tf2_msgs/msg/TFMessage"


class Simulator:
    """Sends odometry, words and ticks as a simulator in lockstep does."""

    def __init__(self, ros: Ros, output: Path) -> None:
        self.ros, self.node = ros, ros.node("simulator")
        odometry, words = CONTRACT.observations["odom"], CONTRACT.observations["instruction"]
        self.odometry = self.node.create_publisher(message_class(odometry.type), odometry.topic, stream_qos(odometry))
        self.words = self.node.create_publisher(message_class(words.type), words.topic, stream_qos(words))
        self.ticks = self.node.create_publisher(Tick, "tick", TICK_QOS)
        self.episodes = self.node.create_publisher(Episode, "episode", EPISODE_QOS)
        overrides = parameters(contract=saved(output), output=str(output / "bags"), also=[STATIC])
        self.recorder: RecorderNode = ros.add(RecorderNode(context=ros.context, parameter_overrides=overrides))
        mine = (self.odometry, self.words, self.ticks, self.episodes)
        ros.spin_until(lambda: all(p.get_subscription_count() for p in mine), "the recorder")

    def say(self, text: str) -> None:
        self.words.publish(messages.text(text))
        self.words.wait_for_all_acked()

    def tick(self, stamp_ns: int, said: bool = False) -> None:
        data = writing.odometry(stamp_ns, (0, 0, 0, 0, 0, 0, 1), (1.0, 0, 0), (0, 0, 0))
        self.odometry.publish(data)
        tick = Tick(topics=["odom"] + ["instruction"] * said)
        tick.header.stamp = Time(nanoseconds=stamp_ns).to_msg()
        tick.newest = [tick.header.stamp] * len(tick.topics)
        self.ticks.publish(tick)
        self.ticks.wait_for_all_acked()

    def mark(self, state: int, stamp_ns: int) -> None:
        mark = Episode(state=state, seed=1, task="toy", instruction="first")
        mark.header.stamp = Time(nanoseconds=stamp_ns).to_msg()
        self.episodes.publish(mark)
        self.episodes.wait_for_all_acked()

    def spin(self) -> None:
        for _ in range(30):
            self.ros.executor.spin_once(timeout_sec=0.0)


@pytest.mark.parametrize("late", [True, False])
def test_new_words_are_in_the_bag_at_the_tick_that_lists_them(ros: Ros, tmp_path: Path, late: bool) -> None:
    """Whether the recorder keeps up, or hears all of it only when the episode is over."""
    simulator = Simulator(ros, tmp_path)
    simulator.say("first")
    simulator.mark(Episode.START, START)
    simulator.tick(START, said=True)
    simulator.spin()
    simulator.tick(START + TICK)
    simulator.say("second")
    if not late:
        simulator.spin()
    for k in (2, 3, 4):
        simulator.tick(START + k * TICK, said=k == 2)
        if not late:
            simulator.spin()
    simulator.mark(Episode.SUCCEEDED, START + 4 * TICK)
    simulator.say("of the next episode")
    ros.spin_until(lambda: len(simulator.recorder.bags) == 1, "a bag")
    heard = [(m.receive_ns, deserialize(m.type, m.data).data)
             for m in bags.read(simulator.recorder.bags[0], {"instruction"})]  # fmt: skip
    assert heard == [(START, "first"), (START + 2 * TICK, "second")]


def test_words_that_no_tick_lists_are_kept_all_the_same(ros: Ros, tmp_path: Path) -> None:
    simulator = Simulator(ros, tmp_path)
    simulator.mark(Episode.START, START)
    simulator.tick(START)
    simulator.spin()
    simulator.say("by somebody else")
    for k in range(1, 9):
        simulator.tick(START + k * TICK)
        simulator.spin()
    assert not simulator.recorder._words.waiting(), "written after some ticks"
    simulator.say("the last word")
    simulator.spin()
    simulator.mark(Episode.SUCCEEDED, START + 8 * TICK)
    ros.spin_until(lambda: len(simulator.recorder.bags) == 1, "a bag")
    heard = [deserialize(m.type, m.data).data for m in bags.read(simulator.recorder.bags[0], {"instruction"})]
    assert heard == ["by somebody else", "the last word"]


def test_every_publisher_of_static_transforms_is_in_every_bag(ros: Ros, tmp_path: Path) -> None:
    simulator = Simulator(ros, tmp_path)
    mount = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    drive = simulator.node.create_publisher(message_class(DRIVE.type), DRIVE.topic, 10)
    for child in ("camera", "lidar"):
        publisher = simulator.node.create_publisher(TFMessage, "/tf_static", EPISODE_QOS)
        for frames in ({child: mount}, {child: mount, f"{child}_optical": mount}):  # all of a node's, each time
            publisher.publish(writing.transforms(0, "base_link", frames))
    ros.spin_until(lambda: len([t for t, _ in simulator.recorder._latched if t == "/tf_static"]) == 2, "transforms")
    simulator.spin()
    ros.spin_until(lambda: drive.get_subscription_count() == 1, "the drive command's subscription")
    for k in range(2):
        simulator.mark(Episode.START, START + k * NANOSECONDS)
        simulator.tick(START + k * NANOSECONDS)
        simulator.mark(Episode.SUCCEEDED, START + k * NANOSECONDS)
    ros.spin_until(lambda: len(simulator.recorder.bags) == 2, "two bags")
    for path in simulator.recorder.bags:
        children = [transform.child_frame_id for m in bags.read(path, {"/tf_static"})
                    for transform in deserialize(m.type, m.data).transforms]  # fmt: skip
        assert sorted(children) == ["camera", "camera_optical", "lidar", "lidar_optical"]
        assert bags.info(path).counts["odom"] == 1


def test_other_topics_need_a_type(ros: Ros, tmp_path: Path) -> None:
    contract = saved(tmp_path)
    for also in ("/tf_static", f"=odom {STATIC}", f"truth={ODOMETRY.replace('/msg/', '/')}"):
        overrides = parameters(contract=contract, output=str(tmp_path / "bags"), also=[also])
        with pytest.raises(VlaError, match=r"parameter also: found .*, expected topic=type such as"):
            RecorderNode(context=ros.context, parameter_overrides=overrides)
