"""The recorder: one rosbag2 bag an episode, serialized bytes as they came, with the contract and the instruction.

Episodes are marked by ``vla_ros/msg/Episode`` on ``episode``, or by the services ``~/start``, ``~/stop`` and
``~/discard``. Whatever carries a stamp belongs to the episode that the stamp lies in, however late it arrives; a
latched value is written at the start of every bag. In lockstep an instruction that changes on the way is written with
the stamp of the tick that lists it: the clock stands still while it is said. A bag gets its ``metadata.yaml`` when it
is closed: a folder without one was cut short.

Callbacks only queue bytes; a thread writes them. ``max_memory_mb`` bounds what waits: half of it in this node, half in
the middleware's queues, whose depths follow from it. What was lost all the same, here or on the way, is counted by
topic, on ``/diagnostics`` and in the bag (``dropped_messages`` of ``custom_data``); so is what has no stamp, or one of
another clock, long before the episode. Below ``min_free_mb`` of free disk the episode ends as aborted, its bag whole,
and no other begins.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import TimeoutError
from pathlib import Path
from typing import Any

from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.node import Node
from rclpy.serialization import deserialize_message, serialize_message
from rclpy.subscription import MessageInfo, Subscription
from rclpy.time import Time
from std_msgs.msg import String
from std_srvs.srv import Trigger

from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.data.bag import CONTRACT_KEY
from vla_core.data.episodes import EPISODE_STATES, EPISODE_TOPIC, EPISODE_TYPE
from vla_core.data.recording import (
    Arrival,
    ByteBudget,
    EarlyArrivals,
    LossCounter,
    Recording,
    RecordingThread,
    UntickedWords,
)
from vla_core.errors import VlaError
from vla_core.observation.messages import header_stamp_ns, known_type
from vla_ros import diagnostics, process
from vla_ros.bridge import EPISODE_QOS, lost_before, message_class
from vla_ros.feeds import Feed, chosen_feeds, is_static
from vla_ros.lockstep import Ticks
from vla_ros.msg import Episode, Tick
from vla_ros.parameters import declare, value
from vla_ros.queues import MEGABYTE, SMALL_DEPTH, queue_depths

EARLY_NS = 5 * NANOSECONDS  # how late the mark of an episode may come after its first message
CLOSE_WAIT_S = 5.0  # how long a service waits for the disk before it answers
OTHER_CLOCK_NS = 10 * NANOSECONDS  # stamps further than this from the node's clock are of another clock
CHECK_PERIOD_S = 1.0


class RecorderNode(Node):
    """See the module; parameters are declared in ``__init__``."""

    def __init__(self, **options: Any) -> None:
        super().__init__("recorder", **options)
        declare(self, "contract", "", "the robot's contract: a name in config/robots, or a file")
        declare(self, "output", "", "folder for the bags, one folder an episode; must not hold bags yet")
        declare(self, "streams", [""], "observations of the contract to record; [''] records all")
        declare(self, "also", [""], "other topics to record as topic=type, such as /tf_static=tf2_msgs/msg/TFMessage, "
                                    "several separated by spaces")  # fmt: skip
        declare(self, "min_free_mb", 500, "free disk, MB, below which nothing is recorded", low=0, high=10**9)
        declare(self, "max_memory_mb", 512, "what may wait to be written, MB: here and in the middleware", low=1,
                high=10**6)  # fmt: skip
        self._recording: Recording | None = None
        self._start_ns = 0
        self._end_ns: int | None = None
        self._next_index = 0
        self._latched: dict[tuple[str, bytes], bytes] = {}  # newest by topic, of transforms by publisher too
        self._words = UntickedWords()
        self._in_hand: tuple[str, bytes, MessageInfo] | None = None
        self._refused = ""  # why the last episode was not recorded
        self._clock_gap_ns = 0  # between the newest message's stamp and the node's clock
        self._dropped: Counter[str] = Counter()
        self._losses = LossCounter()
        self._bytes = self._messages = 0
        self._reported = (0, 0, 0)  # bytes, drops and time, steady ns, of the last diagnostics
        path = value(self, "contract")
        if not path:
            raise VlaError("parameter contract is empty; name the robot's contract: one in config/robots, or a file")
        self.contract = RobotContract.load(path)
        self._output = Path(value(self, "output") or "bags")
        if self._output.exists() and any(self._output.iterdir()):
            raise VlaError(f"{self._output} is not empty; recordings never overwrite, choose another output")
        feeds = chosen_feeds(self.contract, value(self, "streams"), value(self, "also"))
        for feed in feeds:
            known_type(feed.type)  # also loads the definitions, which would hold up the first messages for a second
        share = value(self, "max_memory_mb") * MEGABYTE // 2
        depths = queue_depths([feed.type for feed in feeds], share)
        self._output.mkdir(parents=True, exist_ok=True)
        budget = ByteBudget(share)
        # Received outside an episode, or stamped after its end: may be the start of the next one, whose mark is on
        # its way. Topics overtake one another.
        self._early = EarlyArrivals(budget, EARLY_NS)
        self._thread = RecordingThread(budget)
        self.bags = self._thread.whole
        self._topics = {feed.topic: (feed.type, feed.latched) for feed in feeds}
        self._topics[EPISODE_TOPIC] = (EPISODE_TYPE, True)
        self._feeds: dict[str, Subscription] = {}
        self._latched_feeds: dict[str, Subscription] = {}
        for feed, depth in zip(feeds, depths, strict=True):
            self._subscribe(feed, depth)
        for name, callback in (("start", self._on_start), ("stop", self._on_stop), ("discard", self._on_discard)):
            self.create_service(Trigger, f"~/{name}", callback)
        # After the feeds: of what waits at the same time, an instruction goes before the tick that lists it.
        self._ticks = Ticks(self, self._on_tick, SMALL_DEPTH)
        self._diagnostics = diagnostics.publisher(self)
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # a stopped simulated clock must not stop the checks
        self.create_timer(CHECK_PERIOD_S, self._check, clock=steady)
        # Last: its presence on the graph tells others that the recorder is ready.
        self._marks = self.create_subscription(Episode, EPISODE_TOPIC, self._on_mark, EPISODE_QOS, raw=True)

    def stop(self) -> None:
        """Close the open bag: an episode that was interrupted is aborted, and its bag says so."""
        if self._recording is not None and not self._recording.closed.done():
            self._drain()
            self._close("aborted")
        self._thread.finish()
        try:
            self._thread.check()
        except (VlaError, OSError) as error:  # a full disk: what was flushed stays, and the bag does not look whole
            self.get_logger().error(str(error))

    def _on_start(self, request: Any, response: Any) -> Any:
        """Service: begin an episode now, for robots on which nobody publishes marks."""
        if self._recording is not None:
            return _answer(response, False, f"{self._recording.path} is being recorded; call stop or discard first")
        refusal = self._refusal(self._clock_gap_ns)
        if refusal:
            return _answer(response, False, refusal)
        self._on_mark(self._mark(Episode.START))
        return _answer(response, True, str(self._output / f"episode_{self._next_index - 1:06d}"))

    def _on_stop(self, request: Any, response: Any) -> Any:
        """Service: end the episode and keep it as a success."""
        if self._recording is None:
            return _answer(response, False, "nothing is being recorded; call start first")
        recording = self._recording
        self._on_mark(self._mark(Episode.SUCCEEDED))
        return _when_closed(response, recording, str(recording.path))

    def _on_discard(self, request: Any, response: Any) -> Any:
        """Service: end the episode and delete its bag."""
        if self._recording is None:
            return _answer(response, False, "nothing is being recorded; call start first")
        recording, self._recording = self._recording, None
        recording.discard()
        answer = _when_closed(response, recording, f"{recording.path} was deleted")
        if not recording.path.exists():
            self._next_index -= 1
        return answer

    def _mark(self, state: int) -> bytes:
        """A mark of this node's own, with the instruction that was heard last."""
        mark = Episode(state=state, index=self._next_index, seed=-1)
        mark.header.stamp = self.get_clock().now().to_msg()
        for (topic, _), latest in self._latched.items():
            if self._topics[topic][0] == "std_msgs/msg/String":
                mark.instruction = deserialize_message(latest, String).data
        return bytes(serialize_message(mark))

    def _subscribe(self, feed: Feed, depth: int) -> None:
        def store(data: bytes, info: MessageInfo) -> None:
            # Marks that were sent before this message are there by now, but in a queue of their own.
            self._in_hand = (feed.topic, data, info)
            for mark, _ in _waiting(self._marks):
                self._on_mark(mark)
            self._store_in_hand()

        subscription = self.create_subscription(
            message_class(feed.type), feed.topic, store, feed.qos(depth), raw=True
        )  # fmt: skip
        (self._latched_feeds if feed.latched else self._feeds)[feed.topic] = subscription

    def _store(self, topic: str, data: bytes, info: MessageInfo) -> bool:
        """Queue a message for the bag of its episode; False when it is from after the open one's end."""
        type_name, latched = self._topics[topic]
        receive_ns = self._now_ns()
        lost = lost_before(self._losses, topic, info)
        self._dropped[topic] += lost
        if latched:
            self._store_latched(Arrival(topic, receive_ns, receive_ns, data, lost), info)
            return True
        stamp = header_stamp_ns(type_name, data)
        if stamp is not None:
            self._clock_gap_ns = abs(stamp - receive_ns)
        arrival = Arrival(topic, receive_ns if stamp is None else stamp, receive_ns, data, lost)
        ended = self._end_ns is not None and arrival.stamp_ns > self._end_ns
        if self._recording is None or ended:
            self._early.add(arrival, time.monotonic_ns())
        elif arrival.stamp_ns >= self._start_ns:
            self._write(arrival)
        elif arrival.stamp_ns < self._start_ns - EARLY_NS:  # no straggler: no stamp at all, or one of another clock
            self._recording.dropped[topic] += 1
            self._dropped[topic] += 1
        return not ended

    def _store_latched(self, arrival: Arrival, info: MessageInfo) -> None:
        topic = arrival.topic
        static = is_static(topic)
        key = topic, bytes((info["publisher_gid"] or {}).get("data", b"")) if static else b""
        self._latched.pop(key, None)  # the newest goes last
        self._latched[key] = arrival.data
        if self._recording is None:
            return
        if not static and self._ticks.used:
            self._words.hear(arrival)
        else:
            self._write(arrival, always=True)

    def _on_tick(self) -> None:
        """Lockstep: write what was said for this tick with its stamp, however long before it was heard."""
        tick_ns = self._ticks.stamp_ns
        if self._recording is None or tick_ns is None or (self._end_ns is not None and tick_ns > self._end_ns):
            return
        for arrival in self._words.tick(tick_ns, self._ticks.topics()):
            self._write(arrival, always=True)

    def _write(self, arrival: Arrival, always: bool = False) -> None:
        assert self._recording is not None
        self._thread.check()
        self._recording.dropped[arrival.topic] += arrival.lost
        receive_ns = max(arrival.receive_ns, arrival.stamp_ns, self._start_ns)
        if self._recording.write(arrival.topic, receive_ns, arrival.data, always=always):
            self._bytes += len(arrival.data)
            self._messages += 1
        else:
            self._dropped[arrival.topic] += 1

    def _store_in_hand(self) -> None:
        """Store the message whose callback runs: it is older than what waits in its queue."""
        if self._in_hand is not None:
            (topic, data, info), self._in_hand = self._in_hand, None
            self._store(topic, data, info)

    def _on_mark(self, data: bytes) -> None:
        mark = deserialize_message(data, Episode)
        stamp_ns = Time.from_msg(mark.header.stamp).nanoseconds
        if mark.state == Episode.START:
            if self._recording is not None:
                self.get_logger().warning("a new episode began before the last one ended; the last one is aborted")
                self._close("aborted")
            refusal = self._refusal(abs(stamp_ns - self._now_ns()))
            self._refused = f"episode {mark.index} was not recorded: {refusal}" if refusal else ""
            if refusal:
                self.get_logger().error(self._refused)
                return
            self._open(mark, stamp_ns, data)
        elif self._recording is not None:
            self._end_ns = stamp_ns
            self._drain()
            self._write(Arrival(EPISODE_TOPIC, stamp_ns, self._now_ns(), data), always=True)
            self._close(EPISODE_STATES.get(mark.state, "unknown"))

    def _refusal(self, clock_gap_ns: int) -> str:
        """Why no episode can be recorded now, and what to do about it; empty when one can."""
        free, least = self._free_bytes(), value(self, "min_free_mb") * MEGABYTE
        if free < least:
            return (f"{free / MEGABYTE:.0f} MB are free at {self._output}, min_free_mb is {least // MEGABYTE}; "
                    "free some or choose another output")  # fmt: skip
        simulated = not value(self, "use_sim_time") and self.count_publishers("/clock")
        if simulated and clock_gap_ns > OTHER_CLOCK_NS:
            return (f"stamps are {clock_gap_ns / NANOSECONDS:.0f} s from this node's clock and /clock is published; "
                    "start the recorder with use_sim_time:=true")  # fmt: skip
        return ""

    def _free_bytes(self) -> int:
        """Free disk, less what is queued for it."""
        return shutil.disk_usage(self._output).free - self._thread.budget.used

    def _open(self, mark: Any, stamp_ns: int, data: bytes) -> None:
        for topic, feed in self._latched_feeds.items():
            for latest, info in _waiting(feed):
                self._store(topic, latest, info)
        metadata = {
            CONTRACT_KEY: self.contract.to_yaml(), "instruction": mark.instruction, "task": mark.task,
            "seed": str(mark.seed),
        }  # fmt: skip
        path = self._output / f"episode_{self._next_index:06d}"
        self._recording = self._thread.open(path, metadata, self._topics)
        self._next_index += 1
        self._start_ns, self._end_ns = stamp_ns, None
        self._words = UntickedWords()
        self._write(Arrival(EPISODE_TOPIC, stamp_ns, stamp_ns, data), always=True)
        for (topic, _), latest in self._latched.items():
            self._write(Arrival(topic, stamp_ns, stamp_ns, latest), always=True)
        arrivals, missing = self._early.take(stamp_ns)
        self._recording.dropped += missing
        self._dropped += missing
        for arrival in arrivals:
            self._write(arrival)

    def _drain(self) -> None:
        """Take what lies in the middleware's queues, of each topic up to the first message after the episode's end."""
        heard = self._words.waiting()
        self._store_in_hand()
        for topic, feed in self._feeds.items():
            for data, info in _waiting(feed):
                if not self._store(topic, data, info):
                    break
        if self._ticks.used:
            self._drain_words(heard)

    def _drain_words(self, heard: list[Arrival]) -> None:
        """Take the words that wait in the queues, as far as a tick of this episode lists them, and those ``heard``."""
        for topic, feed in self._latched_feeds.items():
            for data, info in _waiting(feed):
                self._store(topic, data, info)
        for tick, _ in _waiting(self._ticks.subscription):
            self._ticks.take(deserialize_message(tick, Tick))
        for arrival in self._words.waiting():
            if arrival in heard:  # others are the first words of the next episode
                self._write(arrival, always=True)
        self._words = UntickedWords()

    def _close(self, outcome: str) -> None:
        assert self._recording is not None
        recording, self._recording = self._recording, None
        dropped = f", {recording.dropped.total()} lost" if recording.dropped.total() else ""
        self.get_logger().info(f"{recording.path}: {recording.messages} messages, {outcome}{dropped}")
        recording.close({"outcome": outcome})

    def _check(self) -> None:
        """Once a second: the disk, the thread's health, and the diagnostics."""
        self._thread.check()
        refusal = self._refusal(self._clock_gap_ns)
        if self._recording is not None and refusal:
            self.get_logger().error(f"{self._recording.path} ends as aborted: {refusal}")
            self._drain()
            self._close("aborted")
        self._publish_diagnostics(refusal)

    def _publish_diagnostics(self, refusal: str) -> None:
        now_ns, dropped = time.monotonic_ns(), self._dropped.total()
        bytes_before, dropped_before, before_ns = self._reported
        self._reported = (self._bytes, dropped, now_ns)
        rate = (self._bytes - bytes_before) * NANOSECONDS / max(1, now_ns - before_ns)
        path = str(self._recording.path) if self._recording is not None else ""
        level, message = diagnostics.OK, f"recording {path}" if path else "waiting for an episode"
        if dropped > dropped_before:
            topics = ", ".join(f"{topic}: {count}" for topic, count in sorted((+self._dropped).items()))
            level, message = diagnostics.WARN, f"messages were lost: {topics}"
        if self._refused:
            level, message = diagnostics.WARN, self._refused
        if refusal:
            level, message = diagnostics.ERROR, f"nothing can be recorded: {refusal}"
        values = {
            "recording": bool(path), "bag": path, "bags": len(self.bags), "messages": self._messages,
            "bytes": self._bytes, "bytes_per_s": round(rate), "dropped": dropped,
            "waiting_bytes": self._thread.budget.used, "free_disk_bytes": self._free_bytes(),
            **{f"dropped {topic}": count for topic, count in sorted((+self._dropped).items())},
        }  # fmt: skip
        status = diagnostics.status(self, "recorder", values, message, level, self.contract.name)
        diagnostics.publish(self, self._diagnostics, [status])

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def _answer(response: Any, success: bool, message: str) -> Any:
    response.success, response.message = success, message
    return response


def _when_closed(response: Any, recording: Recording, message: str) -> Any:
    """Answer when the bag is with the operating system, or say that a slow disk is still at it."""
    try:
        recording.closed.result(CLOSE_WAIT_S)
    except TimeoutError:
        return _answer(response, True, f"{message}, once the disk has caught up")
    except (VlaError, OSError) as error:
        return _answer(response, False, str(error))
    return _answer(response, True, message)


def _waiting(subscription: Subscription) -> Iterator[tuple[bytes, MessageInfo]]:
    """Take the serialized messages that wait in a subscription's queue, oldest first."""
    while True:
        with subscription.handle:
            taken = subscription.handle.take_message(subscription.msg_type, True)
        if taken is None:
            return
        yield taken


def main() -> int:
    """Entry point of ``recorder_node``."""
    return process.main(RecorderNode)


if __name__ == "__main__":
    sys.exit(main())
