"""The times of one topic of a bag: rate, intervals, latency, and gaps by what the contract allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vla_core.contract import NANOSECONDS, Action, Stream
from vla_core.data.bag import BagInfo
from vla_core.inspect.tracks import Track

MS = 1e6
LEAST = 10  # messages from which on a rate means something
PERIODS = 2.5  # without a message are a gap, where no age is given
UNDECLARED_GAP, UNDECLARED_GAP_NS = 10, NANOSECONDS // 5  # medians, and at least so long, where no rate is declared
OTHER_CLOCK_NS = 10 * NANOSECONDS
SILENT = ("sensor_msgs/msg/CameraInfo", "std_msgs/msg/String", "tf2_msgs/msg/TFMessage", "vla_ros/msg/Episode")


@dataclass(frozen=True)
class Timing:
    """Times of one topic in ms, and where it was silent in seconds, which are counted from ``zero_ns``.

    ``rate_hz`` is that between the first and the last message, ``period_ms`` the contract's.
    """

    zero_ns: int
    rate_hz: float
    intervals_ms: np.ndarray
    latencies_ms: np.ndarray
    seconds: np.ndarray
    gaps: tuple[tuple[float, float], ...]
    duplicates: int
    backwards: int
    period_ms: float | None

    @property
    def longest_ms(self) -> float:
        """The longest time between two messages."""
        return float(self.intervals_ms.max()) if len(self.intervals_ms) else 0.0

    @property
    def jitter_ms(self) -> float:
        """95th percentile of how far an interval is from the middle one."""
        if not len(self.intervals_ms):
            return 0.0
        return float(np.percentile(np.abs(self.intervals_ms - np.median(self.intervals_ms)), 95))


def measure(track: Track, bag: BagInfo, declared: Mapping[str, Stream | Action]) -> Timing:
    """The timing of a topic; ``declared`` are the contract's streams and actions on it."""
    stamps = np.frombuffer(track.stamps_ns, np.int64)
    received = np.frombuffer(track.received_ns, np.int64)
    begin = _zero(bag, track)
    steps = np.diff(stamps)
    ordered = np.sort(stamps)
    intervals = np.diff(ordered)
    intervals = intervals[intervals > 0]
    span = int(ordered[-1] - ordered[0]) if len(ordered) > 1 else 0
    streams = [one for one in declared.values() if isinstance(one, Stream)]
    period = next((one.period_ns for one in streams if one.period_ns), None)
    longest = max([one.max_age_ns or 0 for one in streams], default=0)
    if period is not None:
        limit = max(longest, round(PERIODS * period))
    elif streams or len(intervals) < LEAST or track.type in SILENT:
        limit = None  # latched, or too little to tell
    else:
        limit = max(round(UNDECLARED_GAP * float(np.median(intervals))), UNDECLARED_GAP_NS)
    unique = np.unique(ordered)
    wide = np.flatnonzero(np.diff(unique) > limit) if limit is not None else np.zeros(0, int)
    gaps = tuple(((int(unique[i]) - begin) / NANOSECONDS, (int(unique[i + 1]) - begin) / NANOSECONDS) for i in wide)
    return Timing(
        zero_ns=begin,
        rate_hz=(len(stamps) - 1) * NANOSECONDS / span if span else 0.0, intervals_ms=intervals / MS,
        latencies_ms=(received - stamps) / MS if track.stamped else np.zeros(0), seconds=(stamps - begin) / NANOSECONDS,
        gaps=gaps, duplicates=int((steps == 0).sum()), backwards=int((steps < 0).sum()),
        period_ms=None if period is None else period / MS,
    )  # fmt: skip


def _zero(bag: BagInfo, track: Track) -> int:
    """Where the time of a topic begins: the bag's start, or its own where its stamps are of another clock."""
    if len(track.stamps_ns) and abs(track.received_ns[0] - track.stamps_ns[0]) > OTHER_CLOCK_NS:
        return int(track.stamps_ns[0]) - (int(track.received_ns[0]) - bag.start_ns)
    return bag.start_ns
