"""What chunk execution is judged by: delays, jumps at the seams between chunks, ages of observations."""

from __future__ import annotations

from collections import deque

import numpy as np

from vla_core.evaluation.metrics import percentiles

KEPT = 10_000  # of each figure; a robot runs for weeks

FIGURES = ("delay_ms", "delay_steps", "boundary_jump", "command_jump", "observation_age_ms")


class ExecutionMetrics:
    """The last ``KEPT`` values of each figure; written by one thread at a time, readable from others.

    Per chunk, at its takeover tick, the first tick that is commanded with it:

    ``delay_ms``, ``delay_steps``  from the chunk's observation to the takeover tick, in ms and in whole control steps
                                   (the row of the chunk that is commanded first); an episode's first chunk counts
                                   here, but not among the delays that RTC expects
    ``boundary_jump``              ||(a_with - a_without) / (high - low)||_2: the command at the takeover tick against
                                   what the older chunks alone would have commanded then, by the same strategy; no
                                   value where they had nothing to command. Under receding and rtc these are the new
                                   row and the old one
    ``command_jump``               ||(a(takeover) - a(tick before)) / (high - low)||_2: what the robot was sent, motion
                                   that was wanted included

    Per command: ``observation_age_ms``, from the newest observation behind it to its tick.

    Commands are held to the limits ``low`` and ``high`` (A,) of the contract first, as the robot gets them.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        self._low, self._high = low, high
        self._values: dict[str, deque[float]] = {name: deque(maxlen=KEPT) for name in FIGURES}
        self._last: np.ndarray | None = None

    def take_over(self, delay_ns: int, delay_steps: int, command: np.ndarray, without: np.ndarray | None) -> None:
        """Note a chunk's first tick, before :meth:`command` notes the command of that tick."""
        self._values["delay_ms"].append(delay_ns / 1e6)
        self._values["delay_steps"].append(delay_steps)
        if without is not None:
            self._values["boundary_jump"].append(self._distance(command, without))
        if self._last is not None:
            self._values["command_jump"].append(self._distance(command, self._last))

    def command(self, values: np.ndarray, age_ns: int) -> None:
        """Note a command (A,) and the age of its newest observation."""
        self._last = values
        self._values["observation_age_ms"].append(age_ns / 1e6)

    def pause(self) -> None:
        """The next command follows none: an episode begins, or execution was stopped."""
        self._last = None

    def clear(self) -> None:
        """Forget all figures."""
        self._last = None
        for values in self._values.values():
            values.clear()

    def values(self, name: str) -> list[float]:
        """A copy of one of ``FIGURES``, oldest first."""
        return list(self._values[name].copy())  # copied in one step: the control thread appends

    def summary(self, newest: int = KEPT) -> dict[str, float | None]:
        """``<figure>_p50`` and ``<figure>_p99`` of the ``newest`` values of each; None without values."""
        out: dict[str, float | None] = {}
        for name in FIGURES:
            out |= percentiles(name, self.values(name)[-newest:])
        return out

    def _distance(self, a: np.ndarray, b: np.ndarray) -> float:
        difference = np.clip(a, self._low, self._high) - np.clip(b, self._low, self._high)
        return float(np.linalg.norm(difference / (self._high - self._low)))
