"""The temporal memory: per stream, the newest serialized messages in order of their stamps.

Callbacks only store bytes; what is sampled is decoded later. The bound per stream, whatever comes in at whatever rate:
``max_messages`` messages whose data is ``max_bytes`` together, or the newest message alone where it is larger; around
each message there are at most :data:`OVERHEAD_BYTES` of bookkeeping.

A stream whose stamps jump back further than messages overtake one another (a bag that loops, a simulator that was
started again) starts anew instead of holding a future that never comes. A stamp far ahead of its time of receipt (a
sensor on a shifted clock) is refused and counted: it would push everything else out of the memory.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

DEFAULT_SPAN_NS = 2_000_000_000
DEFAULT_MAX_BYTES = 64 * 1024 * 1024
DEFAULT_MAX_MESSAGES = 16_384
OVERHEAD_BYTES = 128  # a message object's head (33 bytes), its stamp (32) and their places in two deques (2 x 8), amply
SET_BACK_NS = 250_000_000  # stamps that go back by more than this, or by the span, are those of another clock
FUTURE_NS = 250_000_000  # stamps further ahead of their receipt are those of another clock

Stamped = tuple[int, bytes]


@dataclass(frozen=True, kw_only=True)
class StreamStatistics:
    """What happened to one stream since the buffer was made.

    ``received`` counts all messages, and the others those among them that are not in the memory in their time:
    ``duplicates`` bear a stamp that was there already (``repeated`` of them in a row until now: a frozen sensor),
    ``late`` are from before the episode or too old to be kept, ``future`` are stamped too far ahead, ``evicted`` were
    dropped for the bound before their span was over. ``resets`` counts jumps back of the stamps.
    ``newest_ns`` is the newest stamp that is held, ``received_ns`` the time of the last receipt, kept or not,
    ``rate_hz`` the rate of the stamps that are held, ``size_bytes`` and ``messages`` what is held.
    """

    received: int
    duplicates: int
    repeated: int
    late: int
    future: int
    evicted: int
    resets: int
    newest_ns: int | None
    received_ns: int | None
    rate_hz: float | None
    size_bytes: int
    messages: int


@dataclass
class _Ring:
    stamps: deque[int] = field(default_factory=deque)
    messages: deque[bytes] = field(default_factory=deque)
    size: int = 0
    first_ns: int | None = None  # oldest stamp since the last start, dropped or not
    received: int = 0
    duplicates: int = 0
    repeated: int = 0
    late: int = 0
    future: int = 0
    evicted: int = 0
    resets: int = 0
    received_ns: int | None = None

    def clear(self) -> None:
        self.stamps.clear()
        self.messages.clear()
        self.size = 0
        self.first_ns = None

    def insert(self, stamp_ns: int, data: bytes) -> bool:
        """Put a message in its place; False when its stamp is there already."""
        if not self.stamps or stamp_ns > self.stamps[-1]:
            self.stamps.append(stamp_ns)
            self.messages.append(data)
        else:
            place = bisect.bisect_left(self.stamps, stamp_ns)
            if self.stamps[place] == stamp_ns:
                return False
            self.stamps.insert(place, stamp_ns)
            self.messages.insert(place, data)
        self.size += len(data)
        if self.first_ns is None or stamp_ns < self.first_ns:
            self.first_ns = stamp_ns
        return True

    def drop_first(self) -> None:
        self.stamps.popleft()
        self.size -= len(self.messages.popleft())

    def drop_before(self, stamp_ns: int) -> None:
        while self.stamps and self.stamps[0] < stamp_ns:
            self.drop_first()


class MemoryBuffer:
    """Messages of the streams ``names``, safe to fill from one thread and to sample from another.

    Args:
        names: streams to keep; others are refused with ``KeyError``.
        latched: streams whose newest message holds for ever and survives :meth:`start_episode`.
        span_ns: how far back each stream reaches from its newest message; of streams with spans of their own by name.
        max_bytes: bound of each stream's data; the newest message is kept even when it alone is larger.
        max_messages: bound of each stream's number of messages.
    """

    def __init__(
        self,
        names: Iterable[str],
        latched: Iterable[str] = (),
        span_ns: int | Mapping[str, int] = DEFAULT_SPAN_NS,
        max_bytes: int = DEFAULT_MAX_BYTES,
        max_messages: int = DEFAULT_MAX_MESSAGES,
    ) -> None:
        self._rings = {name: _Ring() for name in names}
        self._latched = frozenset(latched)
        spans = span_ns if isinstance(span_ns, Mapping) else dict.fromkeys(self._rings, span_ns)
        self._span_ns = {name: spans[name] for name in self._rings}
        self._set_back_ns = {name: min(span, SET_BACK_NS) for name, span in self._span_ns.items()}
        self._max_bytes = max_bytes
        self._max_messages = max_messages
        self._not_before_ns = 0
        self._lock = threading.Lock()

    @property
    def bound_bytes(self) -> int:
        """Most memory that all streams take together, as long as no single message is larger than ``max_bytes``."""
        return len(self._rings) * (self._max_bytes + self._max_messages * OVERHEAD_BYTES)

    def add(self, name: str, stamp_ns: int, data: bytes, receive_ns: int | None = None) -> bool:
        """Store a message; False when it was not kept (a duplicate, from before the episode or from the future).

        ``receive_ns`` is the time of receipt on the stamps' clock, against which the future is told; without it, or
        with 0 (simulated time that has not begun), all stamps are believed.
        """
        with self._lock:
            ring = self._rings[name]
            ring.received += 1
            ring.received_ns = receive_ns
            if receive_ns and stamp_ns > receive_ns + FUTURE_NS:
                ring.future += 1
                return False
            if name in self._latched:
                ring.clear()
            elif self._not_before_ns - self._span_ns[name] <= stamp_ns < self._not_before_ns:
                ring.late += 1  # from the end of the last episode; older still is a clock that was set back
                return False
            elif ring.stamps and stamp_ns < ring.stamps[-1] - self._set_back_ns[name]:
                ring.resets += 1
                ring.clear()
            if not ring.insert(stamp_ns, data):
                ring.duplicates += 1
                ring.repeated += 1
                return False
            ring.repeated = 0
            self._trim(ring, self._span_ns[name])
            kept = ring.stamps[0] <= stamp_ns
            ring.late += not kept
            return kept

    def sample(self, name: str, at_ns: int) -> Stamped | None:
        """Newest ``(stamp_ns, message)`` not after ``at_ns``; for a latched stream, its newest."""
        with self._lock:
            ring = self._rings[name]
            place = len(ring.stamps) if name in self._latched else bisect.bisect_right(ring.stamps, at_ns)
            return (ring.stamps[place - 1], ring.messages[place - 1]) if place else None

    def around(self, name: str, at_ns: int, until_ns: int) -> tuple[Stamped | None, Stamped | None]:
        """The newest message not after ``at_ns``, and the oldest one after it that is not after ``until_ns``."""
        with self._lock:
            ring = self._rings[name]
            place = bisect.bisect_right(ring.stamps, at_ns)
            before = (ring.stamps[place - 1], ring.messages[place - 1]) if place else None
            if place < len(ring.stamps) and ring.stamps[place] <= until_ns:
                return before, (ring.stamps[place], ring.messages[place])
            return before, None

    def window(self, name: str, after_ns: int, until_ns: int) -> list[Stamped]:
        """All messages in ``(after_ns, until_ns]``, oldest first."""
        with self._lock:
            ring = self._rings[name]
            start, end = bisect.bisect_right(ring.stamps, after_ns), bisect.bisect_right(ring.stamps, until_ns)
            return list(zip(islice(ring.stamps, start, end), islice(ring.messages, start, end), strict=True))

    def newest_ns(self, name: str) -> int | None:
        """Stamp of the newest message of a stream."""
        with self._lock:
            ring = self._rings[name]
            return ring.stamps[-1] if ring.stamps else None

    def first_ns(self, name: str) -> int | None:
        """Oldest stamp of a stream since the episode or the clock started, whether it is still held or not."""
        with self._lock:
            return self._rings[name].first_ns

    def statistics(self, name: str) -> StreamStatistics:
        """Counts, rate and times of a stream, for diagnostics and for the safety stage."""
        with self._lock:
            ring = self._rings[name]
            span_ns = ring.stamps[-1] - ring.stamps[0] if ring.stamps else 0
            return StreamStatistics(
                received=ring.received, duplicates=ring.duplicates, repeated=ring.repeated, late=ring.late,
                future=ring.future, evicted=ring.evicted, resets=ring.resets,
                newest_ns=ring.stamps[-1] if ring.stamps else None, received_ns=ring.received_ns,
                rate_hz=1e9 * (len(ring.stamps) - 1) / span_ns if span_ns else None,
                size_bytes=ring.size, messages=len(ring.stamps),
            )  # fmt: skip

    def start_episode(self, stamp_ns: int) -> None:
        """Forget, and from now on refuse, everything stamped before ``stamp_ns`` except latched streams."""
        with self._lock:
            self._not_before_ns = stamp_ns
            for name, ring in self._rings.items():
                if name in self._latched:
                    continue
                if ring.stamps and ring.stamps[-1] > stamp_ns + self._set_back_ns[name]:
                    ring.clear()  # no message overtakes its episode's mark by so much: the clock was set back
                ring.drop_before(stamp_ns)
                ring.first_ns = ring.stamps[0] if ring.stamps else None

    def clear(self) -> None:
        """Forget everything but latched streams, and any episode: the clock jumped."""
        with self._lock:
            self._not_before_ns = 0
            for name, ring in self._rings.items():
                if name not in self._latched:
                    ring.clear()

    def size_bytes(self) -> int:
        """Bytes of all messages held."""
        with self._lock:
            return sum(ring.size for ring in self._rings.values())

    def _trim(self, ring: _Ring, span_ns: int) -> None:
        ring.drop_before(ring.stamps[-1] - span_ns)
        while len(ring.stamps) > 1 and (ring.size > self._max_bytes or len(ring.stamps) > self._max_messages):
            ring.drop_first()
            ring.evicted += 1
