"""The recorder: one rosbag2 bag an episode, serialized bytes as they came, with the contract and the instruction.

Episodes are marked by ``vla_ros/msg/Episode`` on ``episode``, or by the services ``~/start``, ``~/stop`` and
``~/discard``. Whatever carries a stamp belongs to the episode that the
stamp lies in, however late it arrives; a latched value is written at the start of every bag. A bag gets its
``metadata.yaml`` when it is closed: a folder without one was cut short.
"""

from __future__ import annotations

import shutil
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message, serialize_message
from rclpy.subscription import Subscription
from rclpy.time import Time
from std_msgs.msg import String
from std_srvs.srv import Trigger

from vla_core.contract import RobotContract
from vla_core.data.bag import CONTRACT_KEY, BagWriter
from vla_core.data.episodes import EPISODE_STATES, EPISODE_TOPIC, EPISODE_TYPE
from vla_core.errors import VlaError
from vla_core.observation.messages import header_stamp_ns
from vla_ros import process
from vla_ros.bridge import CHUNK_TOPIC, EPISODE_QOS, message_class, stream_qos
from vla_ros.msg import ActionChunk, Episode
from vla_ros.parameters import declare, value

QUEUE_DEPTH = 1000
RECORDED_QOS = QoSProfile(depth=QUEUE_DEPTH, reliability=ReliabilityPolicy.RELIABLE)
CHUNK_TYPE = "vla_ros/msg/ActionChunk"


class RecorderNode(Node):
    """See the module; parameters are declared in ``__init__``."""

    def __init__(self, **options: Any) -> None:
        super().__init__("recorder", **options)
        declare(self, "contract", "", "the robot's contract: a name in config/robots, or a file")
        declare(self, "output", "", "folder for the bags, one folder an episode; must not hold bags yet")
        declare(self, "streams", [""], "observations of the contract to record; [''] records all")
        self.bags: list[Path] = []
        self._writer: BagWriter | None = None
        self._start_ns = 0
        self._latched: dict[str, bytes] = {}
        # Received outside an episode, or stamped after its end: may be the start of the next one, whose mark is on
        # its way. Topics overtake one another.
        self._early: deque[tuple[str, int, int, bytes]] = deque(maxlen=QUEUE_DEPTH)
        self._end_ns: int | None = None
        self._in_hand: tuple[str, bytes] | None = None
        path = value(self, "contract")
        if not path:
            raise VlaError("parameter contract is empty; name the robot's contract: one in config/robots, or a file")
        self.contract = RobotContract.load(path)
        self._output = Path(value(self, "output") or "bags")
        if self._output.exists() and any(self._output.iterdir()):
            raise VlaError(f"{self._output} is not empty; recordings never overwrite, choose another output")
        self._output.mkdir(parents=True, exist_ok=True)
        self._topics: dict[str, tuple[str, bool]] = {}
        self._feeds: dict[str, Subscription] = {}
        self._latched_feeds: dict[str, Subscription] = {}
        self._subscribe()

    def stop(self) -> None:
        """Close the open bag: an episode that was interrupted is aborted, and its bag says so."""
        if self._writer is None:
            return
        try:
            self._drain()
            self._close("aborted")
        except VlaError as error:  # a full disk: what was flushed stays, and the bag does not look whole
            self.get_logger().error(str(error))
            self._writer.abort()
            self._writer = None

    def _on_start(self, request: Any, response: Any) -> Any:
        """Service: begin an episode now, for robots on which nobody publishes marks."""
        if self._writer is not None:
            return _answer(response, False, f"{self._writer.path} is being recorded; call stop or discard first")
        self._on_mark(self._mark(Episode.START))
        return _answer(response, True, str(self._output / f"episode_{len(self.bags):06d}"))

    def _on_stop(self, request: Any, response: Any) -> Any:
        """Service: end the episode and keep it as a success."""
        if self._writer is None:
            return _answer(response, False, "nothing is being recorded; call start first")
        path = self._writer.path
        self._on_mark(self._mark(Episode.SUCCEEDED))
        return _answer(response, True, str(path))

    def _on_discard(self, request: Any, response: Any) -> Any:
        """Service: end the episode and delete its bag."""
        if self._writer is None:
            return _answer(response, False, "nothing is being recorded; call start first")
        path = self._writer.path
        self._writer.abort()
        self._writer = None
        shutil.rmtree(path)
        return _answer(response, True, f"{path} was deleted")

    def _mark(self, state: int) -> bytes:
        """A mark of this node's own, with the instruction that was heard last."""
        mark = Episode(state=state, index=len(self.bags), seed=-1)
        mark.header.stamp = self.get_clock().now().to_msg()
        for topic, latest in self._latched.items():
            if self._topics[topic][0] == "std_msgs/msg/String":
                mark.instruction = deserialize_message(latest, String).data
        return bytes(serialize_message(mark))

    def _subscribe(self) -> None:
        chosen = [name for name in value(self, "streams") if name]
        for name in chosen or self.contract.observations:
            stream = self.contract.stream(name)
            if stream.topic in self._topics:  # two streams of one topic
                continue
            qos = stream_qos(stream, QUEUE_DEPTH)
            self._add_feed(stream.topic, stream.type, message_class(stream.type), qos, stream.latched)
        action = self.contract.action
        self._add_feed(action.topic, action.type, message_class(action.type), RECORDED_QOS, False)
        self._add_feed(CHUNK_TOPIC, CHUNK_TYPE, ActionChunk, RECORDED_QOS, False)
        self._topics[EPISODE_TOPIC] = (EPISODE_TYPE, True)
        for name, callback in (("start", self._on_start), ("stop", self._on_stop), ("discard", self._on_discard)):
            self.create_service(Trigger, f"~/{name}", callback)
        # Last: its presence on the graph tells others that the recorder is ready.
        self._marks = self.create_subscription(Episode, EPISODE_TOPIC, self._on_mark, EPISODE_QOS, raw=True)

    def _add_feed(self, topic: str, type_name: str, cls: Any, qos: Any, latched: bool) -> None:
        self._topics[topic] = (type_name, latched)

        def store(data: bytes) -> None:
            # Marks that were sent before this message are there by now, but in a queue of their own.
            self._in_hand = (topic, data)
            for mark in _waiting(self._marks):
                self._on_mark(mark)
            self._store_in_hand()

        feed = self.create_subscription(cls, topic, store, qos, raw=True)
        (self._latched_feeds if latched else self._feeds)[topic] = feed

    def _store(self, topic: str, data: bytes) -> bool:
        """Write a message to the bag of its episode; False when it is from after the open one's end."""
        type_name, latched = self._topics[topic]
        receive_ns = self._now_ns()
        if latched:
            self._latched[topic] = data
            if self._writer is not None:
                self._writer.write(topic, max(receive_ns, self._start_ns), data)
            return True
        stamp = header_stamp_ns(type_name, data)
        stamp_ns = receive_ns if stamp is None else stamp
        ended = self._end_ns is not None and stamp_ns > self._end_ns
        if self._writer is None or ended:
            self._early.append((topic, stamp_ns, receive_ns, data))
        elif stamp_ns >= self._start_ns:
            self._writer.write(topic, max(receive_ns, stamp_ns), data)
        return not ended

    def _store_in_hand(self) -> None:
        """Store the message whose callback runs: it is older than what waits in its queue."""
        if self._in_hand is not None:
            (topic, data), self._in_hand = self._in_hand, None
            self._store(topic, data)

    def _on_mark(self, data: bytes) -> None:
        mark = deserialize_message(data, Episode)
        stamp_ns = Time.from_msg(mark.header.stamp).nanoseconds
        if mark.state == Episode.START:
            if self._writer is not None:
                self.get_logger().warning("a new episode began before the last one ended; the last one is aborted")
                self._close("aborted")
            self._open(mark, stamp_ns, data)
        elif self._writer is not None:
            self._end_ns = stamp_ns
            self._drain()
            self._writer.write(EPISODE_TOPIC, max(stamp_ns, self._now_ns()), data)
            self._close(EPISODE_STATES.get(mark.state, "unknown"))

    def _open(self, mark: Any, stamp_ns: int, data: bytes) -> None:
        for topic, feed in self._latched_feeds.items():
            for latest in _waiting(feed):
                self._store(topic, latest)
        metadata = {
            CONTRACT_KEY: self.contract.to_yaml(), "instruction": mark.instruction, "task": mark.task,
            "seed": str(mark.seed),
        }  # fmt: skip
        self._writer = BagWriter(self._output / f"episode_{len(self.bags):06d}", metadata)
        self._start_ns, self._end_ns = stamp_ns, None
        for topic, (type_name, latched) in self._topics.items():
            self._writer.add_topic(topic, type_name, latched)
        self._writer.write(EPISODE_TOPIC, stamp_ns, data)
        for topic, latest in self._latched.items():
            self._writer.write(topic, stamp_ns, latest)
        while self._early:
            topic, message_ns, receive_ns, early = self._early.popleft()
            if message_ns >= stamp_ns:
                self._writer.write(topic, max(receive_ns, message_ns), early)

    def _drain(self) -> None:
        """Take what lies in the middleware's queues, of each topic up to the first message after the episode's end."""
        self._store_in_hand()
        for topic, feed in self._feeds.items():
            for data in _waiting(feed):
                if not self._store(topic, data):
                    break

    def _close(self, outcome: str) -> None:
        assert self._writer is not None
        self._writer.set_metadata("outcome", outcome)
        self._writer.close()
        self.bags.append(self._writer.path)
        self.get_logger().info(f"{self._writer.path}: {self._writer.messages} messages, {outcome}")
        self._writer = None

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def _answer(response: Any, success: bool, message: str) -> Any:
    response.success, response.message = success, message
    return response


def _waiting(subscription: Subscription) -> Iterator[bytes]:
    """Take the serialized messages that wait in a subscription's queue, oldest first."""
    while True:
        with subscription.handle:
            taken = subscription.handle.take_message(subscription.msg_type, True)
        if taken is None:
            return
        yield taken[0]


def main() -> int:
    """Entry point of ``recorder_node``."""
    return process.main(RecorderNode)


if __name__ == "__main__":
    sys.exit(main())
