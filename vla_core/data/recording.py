"""Bags written by a thread of their own, so that a slow disk never holds up whoever receives the messages.

What waits to be written is bounded in bytes; what does not fit is dropped, counted by topic and named in the bag.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

from vla_core.data.bag import BagWriter
from vla_core.errors import VlaError

DROPPED_KEY = "dropped_messages"
# What Python takes for a waiting message beside its bytes (measured: 180 to 250), so that a flood of small ones is
# bounded too.
OVERHEAD_BYTES = 256


class ByteBudget:
    """Bytes that several queues share; any thread may take and give back."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def take(self, size: int, *, always: bool = False) -> bool:
        """Take ``size`` bytes and the overhead of a message; False, and nothing is taken, when they do not fit.

        ``always`` takes them even so, for the few small messages that a bag is useless without.
        """
        with self._lock:
            if not always and self.used + size + OVERHEAD_BYTES > self.limit:
                return False
            self.used += size + OVERHEAD_BYTES
            return True

    def give_back(self, size: int) -> None:
        """Give back what :meth:`take` took for ``size``."""
        with self._lock:
            self.used -= size + OVERHEAD_BYTES


class Recording:
    """One open bag; made by :meth:`RecordingThread.open`. All methods return at once.

    ``closed`` is done when the bag's last byte is with the operating system, and carries the error that broke it.
    """

    def __init__(self, thread: RecordingThread, writer: BagWriter) -> None:
        self.path = writer.path
        self.messages = 0
        self.bytes = 0
        self.dropped: Counter[str] = Counter()
        self.closed: Future[None] = Future()
        self._thread = thread
        self._writer = writer

    def write(self, topic: str, receive_ns: int, data: bytes, *, always: bool = False) -> bool:
        """Queue a message; False when it was dropped and counted, since the queue is full. See `ByteBudget.take`."""
        if not self._thread.budget.take(len(data), always=always):
            self.dropped[topic] += 1
            return False
        self.messages += 1
        self.bytes += len(data)
        self._thread.put(self, lambda: self._writer.write(topic, receive_ns, data), len(data))
        return True

    def close(self, metadata: dict[str, str]) -> None:
        """Make the bag whole, after what is queued. ``metadata`` joins what it was opened with."""
        metadata = {**metadata, DROPPED_KEY: json.dumps(dict(sorted((+self.dropped).items())))}

        def close() -> None:
            for key, value in metadata.items():
                self._writer.set_metadata(key, value)
            self._writer.close()
            self._thread.whole.append(self.path)
            self.closed.set_result(None)

        self._thread.put(self, close)

    def discard(self) -> None:
        """Delete the bag, after what is queued."""

        def discard() -> None:
            self._writer.abort()
            shutil.rmtree(self.path)
            self.closed.set_result(None)

        self._thread.put(self, discard)

    def fail(self, error: Exception) -> None:
        """Called by the thread: leave the bag as a killed recorder would."""
        self._writer.abort()
        self.closed.set_exception(error)


class RecordingThread:
    """Writes the recordings that it opened, in the order in which they were told.

    Args:
        budget: bounds what waits; the caller may use the same budget for queues of its own.

    ``whole`` names the bags that were closed, in that order.
    """

    def __init__(self, budget: ByteBudget) -> None:
        self.budget = budget
        self.whole: list[Path] = []
        self._error: VlaError | OSError | None = None
        self._jobs: SimpleQueue[tuple[Recording, Callable[[], None], int | None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="bag writer", daemon=True)
        self._thread.start()

    def open(self, path: Path, metadata: dict[str, str], topics: dict[str, tuple[str, bool]]) -> Recording:
        """Create a bag with ``topics`` (name to type and whether it is latched); raises :class:`BagError`."""
        writer = BagWriter(path, metadata)
        for topic, (type_name, latched) in topics.items():
            writer.add_topic(topic, type_name, latched)
        return Recording(self, writer)

    def put(self, recording: Recording, job: Callable[[], None], size: int | None = None) -> None:
        """Queue a job of ``recording``; ``size`` is what it took from the budget."""
        self._jobs.put((recording, job, size))

    def check(self) -> None:
        """Raise, once, what writing raised since the last call."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Wait until everything is written, and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (entry := self._jobs.get()) is not None:
            recording, job, size = entry
            if not recording.closed.done():  # what comes after an error must not make the bag look whole
                try:
                    job()
                except (VlaError, OSError) as error:
                    self._error = error
                    recording.fail(error)
            if size is not None:
                self.budget.give_back(size)


@dataclass(frozen=True)
class Arrival:
    """A message as it came; ``lost`` says how many of its topic were lost just before it, on the way."""

    topic: str
    stamp_ns: int
    receive_ns: int
    data: bytes
    lost: int = 0


class EarlyArrivals:
    """The newest messages outside an episode: they may belong to the next one, whose mark is still on its way.

    They are kept for ``horizon_ns``, and while the budget allows. What the budget pushes out within the horizon is
    remembered without its bytes, so that :meth:`take` can tell what an episode lost.
    """

    def __init__(self, budget: ByteBudget, horizon_ns: int) -> None:
        self._budget = budget
        self._horizon_ns = horizon_ns
        self._kept: deque[tuple[int, Arrival]] = deque()
        self._pushed_out: deque[tuple[int, Arrival]] = deque()  # older than all of _kept

    def add(self, arrival: Arrival, now_ns: int) -> None:
        """Keep ``arrival``, which came at ``now_ns`` of a clock that never goes back."""
        for queue in (self._pushed_out, self._kept):
            while queue and queue[0][0] < now_ns - self._horizon_ns:
                self._budget.give_back(len(queue.popleft()[1].data))
        while not self._budget.take(len(arrival.data)):
            if not self._kept:
                self._push_out(now_ns, arrival)
                return
            came_ns, oldest = self._kept.popleft()
            self._budget.give_back(len(oldest.data))
            self._push_out(came_ns, oldest)
        self._kept.append((now_ns, arrival))

    def take(self, start_ns: int) -> tuple[list[Arrival], Counter[str]]:
        """Messages that are stamped at or after ``start_ns``, oldest first, and how many of each topic are missing."""
        missing = Counter(gone.topic for _, gone in self._pushed_out if gone.stamp_ns >= start_ns)
        arrivals = [arrival for _, arrival in self._kept if arrival.stamp_ns >= start_ns]
        for queue in (self._pushed_out, self._kept):
            while queue:
                self._budget.give_back(len(queue.popleft()[1].data))
        return arrivals, missing

    def _push_out(self, came_ns: int, arrival: Arrival) -> None:
        self._budget.take(0, always=True)
        self._pushed_out.append((came_ns, replace(arrival, data=b"")))


class LossCounter:
    """Counts what was lost on the way, by the gaps in the numbers that each publisher gives its messages."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, bytes], int] = {}

    def lost_before(self, topic: str, publisher: bytes, number: int | None) -> int:
        """How many messages of ``publisher`` are missing before the one numbered ``number``.

        0 for its first, and where the middleware gives no numbers (None).
        """
        if number is None:
            return 0
        last = self._last.get((topic, publisher))
        self._last[topic, publisher] = number
        return 0 if last is None else max(0, number - last - 1)


class UntickedWords:
    """Latched values that changed on the way, in lockstep: each belongs to the tick that lists its topic.

    Simulated time stands still while something is said, so the time of its receipt may be that of the tick before.
    """

    LISTED = 5  # ticks; what none of so many lists came from elsewhere

    def __init__(self) -> None:
        self._waiting: list[tuple[Arrival, int]] = []  # and the ticks since it came

    def hear(self, arrival: Arrival) -> None:
        """Something was said."""
        self._waiting.append((arrival, 0))

    def waiting(self) -> list[Arrival]:
        """What no tick has listed yet, oldest first."""
        return [arrival for arrival, _ in self._waiting]

    def tick(self, stamp_ns: int, topics: Iterable[str]) -> list[Arrival]:
        """What is to be written at the tick ``stamp_ns``: of each of its ``topics`` the oldest, with its stamp."""
        listed, due, waiting = set(topics), [], []
        for arrival, ticks in self._waiting:
            if arrival.topic in listed:
                listed.remove(arrival.topic)  # what was said after it is for another tick
                due.append(replace(arrival, stamp_ns=stamp_ns, receive_ns=stamp_ns))
            elif ticks >= self.LISTED:
                due.append(arrival)
            else:
                waiting.append((arrival, ticks + 1))
        self._waiting = waiting
        return due
