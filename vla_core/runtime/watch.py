"""How long something has been silent, and whether the stamps that it brings can be believed."""

from __future__ import annotations

from vla_core.contract import NANOSECONDS

SHIFTED_MESSAGES = 2  # in a row; one may have met a clock that was just being read


class Watch:
    """Age of the newest message of a topic against ``limit_ns``, stamps against the clock by ``jump_ns``.

    The age counts elapsed time from the age at receipt, so that a clock that jumps does not rejuvenate anything.
    """

    def __init__(self, limit_ns: int, jump_ns: int) -> None:
        self.limit_ns, self.jump_ns = limit_ns, jump_ns
        self.age_ns: int | None = None  # None: nothing was received
        self.stamp_ns: int | None = None
        self._repeated = 0
        self._shifted = 0
        self._shift_ns = 0

    def arrive(self, stamp_ns: int, now_ns: int) -> bool:
        """Note a message; False when its stamp is no news."""
        back_ns = 0 if self.stamp_ns is None else self.stamp_ns - stamp_ns
        if self.stamp_ns is not None and 0 <= back_ns <= self.jump_ns:
            self._repeated += back_ns == 0
            return False
        self._repeated = 0
        self._shift_ns = stamp_ns - now_ns
        self._shifted = self._shifted + 1 if abs(self._shift_ns) > self.jump_ns else 0
        self.stamp_ns, self.age_ns = stamp_ns, max(0, now_ns - stamp_ns)
        return True

    def elapse(self, elapsed_ns: int) -> None:
        """Let time pass."""
        if self.age_ns is not None:
            self.age_ns += elapsed_ns

    def restart(self, age_ns: int | None) -> None:
        """Forget the stamps, of a clock that is gone."""
        self.age_ns, self.stamp_ns, self._repeated, self._shifted = age_ns, None, 0, 0

    @property
    def fault(self) -> str:
        """What is wrong; empty when nothing is."""
        if self.age_ns is None:
            return "nothing received"
        if self._shifted >= SHIFTED_MESSAGES or (self._shifted and self.age_ns > self.limit_ns):
            side = "ahead of" if self._shift_ns > 0 else "behind"
            return f"time-shifted: stamped {abs(self._shift_ns) / NANOSECONDS:.3g} s {side} the clock"
        if self.age_ns > self.limit_ns:
            kind = "frozen: the same stamp repeated" if self._repeated > 1 else "lost"
            return f"{kind}, {self.age_ns / NANOSECONDS:.3g} s old, limit {self.limit_ns / NANOSECONDS:.3g} s"
        return ""
