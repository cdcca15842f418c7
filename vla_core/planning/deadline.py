"""Time for a plan: asked before each iteration, for how many candidates it should do, so that the last ends in time."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

LEAST = 16  # candidates that an iteration is worth while for
SMALLEST_SHARE = 0.25
KEPT = 20  # times that are remembered for each number of candidates


class IterationTimes:
    """How long iterations took, by their number of candidates: the longest of the last ones is what is expected."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}

    def add(self, candidates: int, seconds: float) -> None:
        """One more."""
        self._times.setdefault(candidates, deque(maxlen=KEPT)).append(seconds)

    def forget(self) -> None:
        """What was seen is of another time."""
        self._times.clear()

    def expected_s(self, candidates: int) -> float:
        """Of so many candidates; 0 before anything was tried.

        Of a number that was never tried, by the share of the nearest one that was, but no less than a quarter of it:
        what few candidates take is what it takes to begin at all.
        """
        if not self._times:
            return 0.0
        nearest = min(self._times, key=lambda tried: abs(math.log(tried / candidates)))
        return max(self._times[nearest]) * max(SMALLEST_SHARE, candidates / nearest)


class Deadline:
    """``budget_s`` seconds from now; None is without end. ``now`` is the clock, in seconds; ``seen`` is kept between
    plans, so that the first iteration of each is expected right."""

    def __init__(self, budget_s: float | None, now: Callable[[], float] = time.perf_counter,
                 seen: IterationTimes | None = None) -> None:  # fmt: skip
        self._now, self._begin = now, now()
        self._end = math.inf if budget_s is None else self._begin + budget_s
        self._seen = IterationTimes() if seen is None else seen

    def candidates(self, wanted: int) -> int:
        """How many of ``wanted`` candidates can be tried in the time that is left: halved until they fit; 0: none."""
        left_s = self._end - self._now()
        count = wanted
        while self._seen.expected_s(count) > left_s:
            if count <= LEAST:
                return 0
            count = max(LEAST, count // 2)
        return count if left_s >= 0 else 0

    def timed(self, candidates: int, begin_s: float) -> None:
        """An iteration of so many candidates has ended that began at ``begin_s`` of :meth:`time`."""
        self._seen.add(candidates, self._now() - begin_s)

    def nothing_was_done(self) -> None:
        """Not even one iteration was begun: what was expected may be of another time, and is found out anew."""
        self._seen.forget()

    def time(self) -> float:
        """The clock."""
        return self._now()

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        return self._now() - self._begin

    @property
    def overrun_s(self) -> float:
        """How far past the deadline it is; 0 before it."""
        return max(0.0, self._now() - self._end)
