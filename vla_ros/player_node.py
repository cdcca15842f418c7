"""The player: a bag's messages again, byte for byte, on their topics, in the order in which they were received.

Any rosbag2 bag (MCAP or SQLite) whose message types are installed. Topics keep their recorded names, which are remapped
as any node's, and the QoS that their publishers offered, less deadlines and lifespans: those are of the recorded
clock. Latched (transient-local) topics give late joiners their value, also when ``start_offset_s`` skips over it.

Stamps stay as recorded. With ``clock: true`` the bag's time of receipt is published on ``/clock``, for nodes with
``use_sim_time``; it stands still in a pause, never runs ahead of a message that is still to be published, and goes back
when ``loop`` starts over (memory buffers of this package then empty themselves). Without subscribers messages are lost:
``wait_for`` names nodes to wait for. The process ends with status 0 after the last message, or ``~/stop``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rclpy.clock import Clock as RosClock
from rclpy.clock_type import ClockType
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from rosbags.interfaces import QosReliability
from rosgraph_msgs.msg import Clock
from std_srvs.srv import Trigger

from vla_core.contract import NANOSECONDS
from vla_core.data import bag as bags
from vla_core.data.bag import BagError, RecordedTopic, Serialized
from vla_core.data.episodes import EPISODE_TOPIC
from vla_core.data.playback import Playhead, ReadAhead, latched_before
from vla_core.errors import VlaError, choices
from vla_ros import diagnostics, process
from vla_ros.bridge import message_class
from vla_ros.parameters import declare, value
from vla_ros.queues import MEGABYTE, queue_depths

CLOCK_TOPIC = "/clock"
SLICE_S = 0.1  # the longest wait between two looks at the stop signal
SETTLE_S = 0.5  # between the subscribers' discovery and the first message
UNREAD_S = 0.005  # between two looks at a disk that has not brought the next message
TURN_NS = 20_000_000  # how long publishing may keep services waiting when there is always something due
LAG_NS = 100_000_000  # behind its schedule by more than this, the player cannot keep up
ACK_TIMEOUT = Duration(seconds=10)


class PlayerNode(Node):
    """See the module; parameters are declared in ``__init__``."""

    def __init__(self, **options: Any) -> None:
        super().__init__("player", **options)
        declare(self, "bag", "", "folder of the bag to play")
        declare(self, "rate", 1.0, "bag seconds per second", low=0.01, high=100.0)
        declare(self, "loop", False, "start over at the end")
        declare(self, "clock", False, "publish the bag's time on /clock")
        declare(self, "clock_hz", 100.0, "rate of /clock", low=1.0, high=1000.0)
        declare(self, "start_paused", False, "wait for ~/resume")
        declare(self, "start_offset_s", 0.0, "seconds of the bag to skip", low=0.0, high=1e9)
        declare(self, "topics", [""], "topics to play, as the bag names them; [''] plays all")
        declare(self, "wait_for", [""], "names of nodes that must listen before the first message")
        declare(self, "wait_timeout_s", 60.0, "how long to wait for them", low=0.0, high=1e6)
        declare(self, "max_memory_mb", 512, "what may wait, MB: half read ahead, half in the middleware", low=1,
                high=10**6)  # fmt: skip
        if not value(self, "bag"):
            raise VlaError("parameter bag is empty; name the folder of a bag")
        self._path = Path(value(self, "bag"))
        info = bags.info(self._path)
        if not info.whole:
            raise BagError(f"{self._path}: {info.note}")
        self._end_ns = info.end_ns
        self._first_ns = info.start_ns + round(value(self, "start_offset_s") * NANOSECONDS)
        if self._first_ns >= self._end_ns:
            length_s = (info.end_ns - info.start_ns) / NANOSECONDS
            raise VlaError(f"start_offset_s is {value(self, 'start_offset_s')}, the bag has {length_s:.2f} s")
        self._played = self._chosen_topics()
        self._share = value(self, "max_memory_mb") * MEGABYTE // 2
        self._publishers_by_topic = self._make_publishers()
        self._clock_publisher = self.create_publisher(Clock, CLOCK_TOPIC, 10) if value(self, "clock") else None
        self._clock_period_ns = round(NANOSECONDS / value(self, "clock_hz"))
        self._next_clock_ns = 0
        self._bag_ns = self._first_ns  # what /clock says
        self._head = Playhead(self._first_ns, value(self, "rate"), time.monotonic_ns(), value(self, "start_paused"))
        self._stopped = False
        self._messages = self._passes = 0
        self._lag_ns = 0  # the largest since the last diagnostics
        for name, callback in (("pause", self._on_pause), ("resume", self._on_resume), ("stop", self._on_stop),
                               ("toggle_paused", self._on_toggle), ("is_paused", self._on_is_paused)):  # fmt: skip
            self.create_service(Trigger, f"~/{name}", callback)
        self._diagnostics = diagnostics.publisher(self)
        self.create_timer(1.0, self._publish_diagnostics, clock=RosClock(clock_type=ClockType.STEADY_TIME))

    def stop(self) -> None:
        """Nothing is left behind: a pass closes what it opened."""

    def run(self, executor: Any, stop: process.Stop) -> int:
        """Play until the end, for ever with ``loop``; 0 also when told to stop."""
        self._wait_for_listeners(executor, stop)
        while self._play(executor, stop):
            self._passes += 1
            if not value(self, "loop"):
                # Only what was acknowledged has arrived.
                for publisher in self._publishers_by_topic.values():
                    publisher.wait_for_all_acked(ACK_TIMEOUT)
                self.get_logger().info(f"{self._path}: {self._messages} messages played")
                break
        return 0

    def _play(self, executor: Any, stop: process.Stop) -> bool:
        """One pass over the bag; False when it was stopped in its middle."""
        self._bag_ns = self._first_ns
        self._publish_clock()
        for latched in latched_before(self._path, list(self._played.values()), self._first_ns):
            self._publish(latched)
        ahead = ReadAhead(self._path, set(self._played), self._first_ns, self._share)
        spun_ns = time.monotonic_ns()
        begun = False
        last_bag_ns, last_ns = self._first_ns, 0
        try:
            while not stop() and not self._stopped:
                message = ahead.peek()
                if not begun:  # opening a long bag takes its time, which is not the schedule's
                    self._head.restart(self._first_ns, time.monotonic_ns())
                    begun = message is not None
                now_ns = time.monotonic_ns()
                self._tick(now_ns, self._bag_ns if message is None else message.receive_ns)
                if message is None and ahead.finished:
                    self._publish_clock()
                    return True
                due_ns = None if message is None else self._head.next_ns(message.receive_ns, last_bag_ns, last_ns)
                if message is not None and due_ns is not None and due_ns <= now_ns:
                    self._lag_ns = max(self._lag_ns, now_ns - (self._head.due_ns(message.receive_ns) or now_ns))
                    self._publish(message)
                    last_bag_ns, last_ns = message.receive_ns, now_ns
                    ahead.pop()
                    if now_ns - spun_ns < TURN_NS:
                        continue
                executor.spin_once(timeout_sec=self._patience_s(now_ns, due_ns, message is None))
                spun_ns = time.monotonic_ns()
            return False
        finally:
            ahead.close()

    def _patience_s(self, now_ns: int, due_ns: int | None, unread: bool) -> float:
        """How long to wait for a service call: until the next message, or tick of the clock."""
        if unread:
            return UNREAD_S
        until_ns = [now_ns + round(SLICE_S * NANOSECONDS)]
        until_ns += [due_ns] if due_ns is not None else []
        until_ns += [self._next_clock_ns] if self._clock_publisher is not None else []
        return max(0.0, (min(until_ns) - now_ns) / NANOSECONDS)

    def _publish(self, message: Serialized) -> None:
        self._publishers_by_topic[message.topic].publish(message.data)
        self._bag_ns = max(self._bag_ns, message.receive_ns)
        self._messages += 1

    def _tick(self, now_ns: int, limit_ns: int) -> None:
        """Publish /clock when it is time; it never passes ``limit_ns``, where the next message lies."""
        self._bag_ns = max(self._bag_ns, min(self._head.bag_ns(now_ns), limit_ns))
        if now_ns >= self._next_clock_ns:
            self._next_clock_ns = max(self._next_clock_ns + self._clock_period_ns, now_ns)
            self._publish_clock()

    def _publish_clock(self) -> None:
        if self._clock_publisher is not None:
            self._clock_publisher.publish(Clock(clock=Time(nanoseconds=self._bag_ns).to_msg()))

    def _chosen_topics(self) -> dict[str, RecordedTopic]:
        found = bags.recorded_topics(self._path)
        chosen = [name for name in value(self, "topics") if name] or list(found)
        for name in chosen:
            if name not in found:
                raise VlaError(f"{self._path}: no topic {name!r}; choices: {choices(found)}")
        if value(self, "clock") and CLOCK_TOPIC in chosen:
            self.get_logger().info("the bag's own /clock is left out: this node publishes its time")
            chosen.remove(CLOCK_TOPIC)
        return {name: found[name] for name in chosen}

    def _make_publishers(self) -> dict[str, Publisher]:
        topics = list(self._played.values())
        depths = queue_depths([topic.type for topic in topics], self._share)
        return {
            topic.name: self.create_publisher(message_class(topic.type), topic.name, offered_qos(topic, depth))
            for topic, depth in zip(topics, depths, strict=True)
        }

    def _wait_for_listeners(self, executor: Any, stop: process.Stop) -> None:
        """Until every node of ``wait_for`` listens: to the episodes where the bag has them, which it does last."""
        wanted = {name for name in value(self, "wait_for") if name}
        deadline = time.monotonic() + value(self, "wait_timeout_s")
        episodes = [name for name in self._played if name.rpartition("/")[2] == EPISODE_TOPIC]
        while wanted and not stop() and not self._stopped:
            listening: set[str] = set()
            matched = True
            for name, publisher in self._publishers_by_topic.items():
                listeners = self.get_subscriptions_info_by_topic(publisher.topic_name)
                if not episodes or name in episodes:
                    listening |= {info.node_name for info in listeners}
                matched = matched and publisher.get_subscription_count() >= len(listeners)
            if wanted <= listening and matched:
                # Whether they know these publishers in turn, nobody tells; best-effort messages would be lost.
                self._spin_for(SETTLE_S, executor)
                return
            if time.monotonic() > deadline:
                absent = choices(wanted - listening or wanted)
                raise VlaError(f"waited {value(self, 'wait_timeout_s'):.0f} s in vain for {absent} to listen")
            executor.spin_once(timeout_sec=0.05)

    def _spin_for(self, seconds: float, executor: Any) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            executor.spin_once(timeout_sec=left)

    def _on_pause(self, request: Any, response: Any) -> Any:
        """Service: stand still."""
        self._head.pause(time.monotonic_ns())
        return self._on_is_paused(request, response, success=True)

    def _on_resume(self, request: Any, response: Any) -> Any:
        """Service: go on."""
        self._head.resume(time.monotonic_ns())
        return self._on_is_paused(request, response, success=True)

    def _on_toggle(self, request: Any, response: Any) -> Any:
        """Service: pause or go on, whichever it does not do now."""
        change: Callable[[Any, Any], Any] = self._on_resume if self._head.paused else self._on_pause
        return change(request, response)

    def _on_is_paused(self, request: Any, response: Any, success: bool | None = None) -> Any:
        """Service: ``success`` says whether it is paused, ``message`` where."""
        at_s = (self._bag_ns - self._first_ns) / NANOSECONDS
        response.success = self._head.paused if success is None else success
        response.message = f"{'paused' if self._head.paused else 'playing'} at {at_s:.3f} s"
        return response

    def _on_stop(self, request: Any, response: Any) -> Any:
        """Service: end, as at the end of the bag."""
        self._stopped = True
        response.success, response.message = True, f"{self._messages} messages played"
        return response

    def _publish_diagnostics(self) -> None:
        lag_ns, self._lag_ns = self._lag_ns, 0
        level, message = diagnostics.OK, "paused" if self._head.paused else "playing"
        if lag_ns > LAG_NS:
            message = f"cannot keep up: {lag_ns / NANOSECONDS:.2f} s behind; choose fewer topics or a lower rate"
            level = diagnostics.WARN
            self.get_logger().warning(message, throttle_duration_sec=10.0)
        values = {
            "bag": self._path, "paused": self._head.paused, "position_s": (self._bag_ns - self._first_ns) / NANOSECONDS,
            "length_s": (self._end_ns - self._first_ns) / NANOSECONDS, "rate": value(self, "rate"),
            "passes": self._passes, "messages": self._messages, "lag_ms": lag_ns / 1e6,
        }  # fmt: skip
        status = diagnostics.status(self, "player", values, message, level)
        diagnostics.publish(self, self._diagnostics, [status])


def offered_qos(topic: RecordedTopic, depth: int) -> QoSProfile:
    """The QoS to offer for a recorded topic: what satisfies every subscriber that its publishers satisfied.

    Of several profiles the strongest wins. What a profile leaves open is reliable and volatile. A latched topic keeps
    its depth, which is what late joiners get; others take ``depth``, which no subscriber sees.
    """
    best_effort = topic.offered and all(qos.reliability == QosReliability.BEST_EFFORT for qos in topic.offered)
    return QoSProfile(
        depth=topic.depth if topic.latched else depth,
        reliability=ReliabilityPolicy.BEST_EFFORT if best_effort else ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if topic.latched else DurabilityPolicy.VOLATILE,
    )


def _run(node: Any, executor: Any, stop: process.Stop) -> int:
    return int(node.run(executor, stop))


def main() -> int:
    """Entry point of ``player_node``."""
    return process.main(PlayerNode, _run)


if __name__ == "__main__":
    sys.exit(main())
