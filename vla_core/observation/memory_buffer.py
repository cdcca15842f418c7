"""The temporal memory: per stream, the newest serialized messages in order of their stamps.

Callbacks only store bytes; what is sampled is decoded later. Memory is bounded by a time span and by bytes, whatever
the input rate. A stream whose stamps jump back further than messages overtake one another (a bag that loops, a
simulator that was started again) starts anew instead of holding a future that never comes.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

DEFAULT_SPAN_NS = 2_000_000_000
DEFAULT_MAX_BYTES = 64 * 1024 * 1024
SET_BACK_NS = 250_000_000  # stamps that go back by more than this, or by the span, are those of another clock


@dataclass
class _Ring:
    stamps: list[int] = field(default_factory=list)
    messages: list[bytes] = field(default_factory=list)
    bytes: int = 0

    def clear(self) -> None:
        self.stamps.clear()
        self.messages.clear()
        self.bytes = 0

    def drop_first(self, count: int) -> None:
        self.bytes -= sum(map(len, self.messages[:count]))
        del self.stamps[:count], self.messages[:count]


class MemoryBuffer:
    """Messages of the streams ``names``, safe to fill from one thread and to sample from another.

    Args:
        names: streams to keep; others are refused with ``KeyError``.
        latched: streams whose newest message holds for ever and survives :meth:`start_episode`.
        span_ns: how far back each stream reaches from its newest message.
        max_bytes: bound per stream; the newest message is kept even when it alone is larger.
    """

    def __init__(
        self,
        names: Iterable[str],
        latched: Iterable[str] = (),
        span_ns: int = DEFAULT_SPAN_NS,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        self._rings = {name: _Ring() for name in names}
        self._latched = frozenset(latched)
        self._span_ns = span_ns
        self._set_back_ns = min(span_ns, SET_BACK_NS)
        self._max_bytes = max_bytes
        self._not_before_ns = 0
        self._lock = threading.Lock()

    def add(self, name: str, stamp_ns: int, data: bytes) -> bool:
        """Store a message; False when it was not kept (a duplicate, or from before the episode)."""
        with self._lock:
            ring = self._rings[name]
            if name in self._latched:
                ring.clear()
            elif self._not_before_ns - self._span_ns <= stamp_ns < self._not_before_ns:
                return False  # from the end of the last episode; older still is a clock that was set back
            elif ring.stamps and stamp_ns < ring.stamps[-1] - self._set_back_ns:
                ring.clear()
            place = bisect.bisect_left(ring.stamps, stamp_ns)
            if place < len(ring.stamps) and ring.stamps[place] == stamp_ns:
                return False
            ring.stamps.insert(place, stamp_ns)
            ring.messages.insert(place, data)
            ring.bytes += len(data)
            self._trim(ring)
            return ring.stamps[0] <= stamp_ns

    def sample(self, name: str, at_ns: int) -> tuple[int, bytes] | None:
        """Newest ``(stamp_ns, message)`` not after ``at_ns``; for a latched stream, its newest."""
        with self._lock:
            ring = self._rings[name]
            place = len(ring.stamps) if name in self._latched else bisect.bisect_right(ring.stamps, at_ns)
            return (ring.stamps[place - 1], ring.messages[place - 1]) if place else None

    def newest_ns(self, name: str) -> int | None:
        """Stamp of the newest message of a stream."""
        with self._lock:
            ring = self._rings[name]
            return ring.stamps[-1] if ring.stamps else None

    def start_episode(self, stamp_ns: int) -> None:
        """Forget, and from now on refuse, everything stamped before ``stamp_ns`` except latched streams."""
        with self._lock:
            self._not_before_ns = stamp_ns
            for name, ring in self._rings.items():
                if name in self._latched:
                    continue
                if ring.stamps and ring.stamps[-1] > stamp_ns + self._set_back_ns:
                    ring.clear()  # no message overtakes its episode's mark by so much: the clock was set back
                ring.drop_first(bisect.bisect_left(ring.stamps, stamp_ns))

    def size_bytes(self) -> int:
        """Bytes of all messages held."""
        with self._lock:
            return sum(ring.bytes for ring in self._rings.values())

    def _trim(self, ring: _Ring) -> None:
        expired = bisect.bisect_left(ring.stamps, ring.stamps[-1] - self._span_ns)
        excess = ring.bytes - sum(map(len, ring.messages[:expired]))
        while excess > self._max_bytes and expired < len(ring.stamps) - 1:
            excess -= len(ring.messages[expired])
            expired += 1
        ring.drop_first(expired)
