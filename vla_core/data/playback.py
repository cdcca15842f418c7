"""Playing a bag: when each message is due, and reading ahead of that within a bound."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path

from vla_core.data.bag import RecordedTopic, Serialized, read_serialized
from vla_core.data.recording import OVERHEAD_BYTES

CATCH_UP = 2  # how many times its rate a player that is behind may play


class Playhead:
    """Bag time against a steady clock, both integer nanoseconds.

    Every due time follows from where playing began or was last resumed, so that no delay adds up.

    Args:
        bag_ns: bag time at ``now_ns``.
        rate: bag seconds per second.
        now_ns: the steady clock.
        paused: stand still until :meth:`resume`.
    """

    def __init__(self, bag_ns: int, rate: float, now_ns: int, paused: bool = False) -> None:
        self.paused = paused
        self._rate = Fraction(str(rate))
        self._from_bag_ns = bag_ns
        self._from_ns = now_ns

    def bag_ns(self, now_ns: int) -> int:
        """Bag time at ``now_ns``."""
        passed_ns = 0 if self.paused else now_ns - self._from_ns
        return self._from_bag_ns + int(passed_ns * self._rate)

    def due_ns(self, bag_ns: int) -> int | None:
        """The first time of the steady clock at which bag time has reached ``bag_ns``; None while paused."""
        if self.paused:
            return None
        ahead = Fraction(bag_ns - self._from_bag_ns) / self._rate
        return self._from_ns - int(-ahead // 1)  # rounded up

    def next_ns(self, bag_ns: int, last_bag_ns: int, last_ns: int) -> int | None:
        """When to publish what is at ``bag_ns``, after the message at ``last_bag_ns`` left at ``last_ns``.

        That is when it is due, and None while paused. Behind schedule, catching up goes at :data:`CATCH_UP` times the
        rate: a burst would overrun the queues of those who listen.
        """
        due_ns = self.due_ns(bag_ns)
        if due_ns is None:
            return None
        return max(due_ns, last_ns + int(max(0, bag_ns - last_bag_ns) / (CATCH_UP * self._rate)))

    def restart(self, bag_ns: int, now_ns: int) -> None:
        """Go to ``bag_ns``; a pause stays one."""
        self._from_bag_ns, self._from_ns = bag_ns, now_ns

    def pause(self, now_ns: int) -> None:
        """Stand still at the bag time of ``now_ns``."""
        self._from_bag_ns = self.bag_ns(now_ns)
        self.paused = True

    def resume(self, now_ns: int) -> None:
        """Go on at ``now_ns`` from where bag time stands."""
        self._from_bag_ns = self.bag_ns(now_ns)
        self._from_ns = now_ns
        self.paused = False


class ReadAhead:
    """Messages of a bag, read by a thread as far ahead as ``limit`` bytes allow (one message at least)."""

    def __init__(self, path: Path, topics: set[str], start_ns: int, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Serialized] = deque()
        self._bytes = 0
        self._error: Exception | None = None
        self._finished = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._read, args=(path, topics, start_ns), name="bag reader", daemon=True
        )  # fmt: skip
        self._thread.start()

    def peek(self) -> Serialized | None:
        """The next message; None when the disk has not brought it yet, or there is none. Raises what reading raised."""
        with self._changed:
            if self._waiting:
                return self._waiting[0]
            if self._error is not None:
                raise self._error
            return None

    @property
    def finished(self) -> bool:
        """Whether every message has been taken."""
        with self._changed:
            return self._finished and not self._waiting

    def pop(self) -> None:
        """Take what :meth:`peek` shows."""
        with self._changed:
            self._bytes -= len(self._waiting.popleft().data) + OVERHEAD_BYTES
            self._changed.notify()

    def close(self) -> None:
        """Stop reading and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _read(self, path: Path, topics: set[str], start_ns: int) -> None:
        try:
            with closing(read_serialized(path, topics, start_ns)) as messages:
                for message in messages:
                    if not self._put(message):
                        return
        except Exception as error:  # raised where the messages are taken
            self._error = error
        else:
            with self._changed:
                self._finished = True

    def _put(self, message: Serialized) -> bool:
        """Wait for room; False when closed."""
        size = len(message.data) + OVERHEAD_BYTES
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._waiting or self._bytes + size <= self._limit)
            self._waiting.append(message)
            self._bytes += size
            return not self._closed


def latched_before(path: Path, topics: list[RecordedTopic], start_ns: int) -> Iterator[Serialized]:
    """What a late joiner at ``start_ns`` would have got of the latched topics, oldest first."""
    latched = {topic.name: topic for topic in topics if topic.latched}
    newest = {name: deque[Serialized](maxlen=topic.depth) for name, topic in latched.items()}
    for message in read_serialized(path, set(latched), stop_ns=start_ns):
        newest[message.topic].append(message)
    yield from sorted((m for kept in newest.values() for m in kept), key=lambda m: m.receive_ns)
