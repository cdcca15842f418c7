"""Executes chunks by time: which action applies now, and when a new chunk is due.

A chunk's row k belongs to the instant ``observation_stamp + k * step``, whenever the chunk arrives: rows that passed
while the model was thinking are skipped, not shifted.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

LATE_NS = 10_000_000_000


@dataclass(frozen=True)
class ActionChunk:
    """Actions (H, A) float64 in the contract's units, placed in time (integer nanoseconds)."""

    observation_stamp_ns: int
    step_ns: int
    actions: np.ndarray

    @property
    def valid_until_ns(self) -> int:
        """End of the last row."""
        return self.observation_stamp_ns + len(self.actions) * self.step_ns

    def row(self, at_ns: int) -> int:
        """Index of the row that applies at ``at_ns``; negative before the chunk, at least H after it."""
        return (at_ns - self.observation_stamp_ns) // self.step_ns


class ChunkExecutor:
    """Receding horizon: of each chunk the first ``execute_steps`` rows are meant to run.

    The rest is kept for the case that the next chunk is late. Safe to push to from one thread and to read from another.
    """

    def __init__(self, execute_steps: int) -> None:
        self.execute_steps = execute_steps
        self._chunk: ActionChunk | None = None
        self._not_before_ns = 0
        self._lock = threading.Lock()

    def push(self, chunk: ActionChunk) -> None:
        """Take over a chunk, unless it is late: of an earlier episode, or older than the one that is there."""
        with self._lock:
            newest_ns = self._not_before_ns
            if self._chunk is not None:
                newest_ns = max(newest_ns, self._chunk.observation_stamp_ns)
            # A model thinks for seconds at most; what is older still comes from a clock that was set back.
            if 0 < newest_ns - chunk.observation_stamp_ns <= LATE_NS:
                return
            if chunk.observation_stamp_ns < newest_ns:
                self._not_before_ns = 0
            self._chunk = chunk

    def clear(self) -> None:
        """Forget the chunk, so that nothing of it is executed any more."""
        with self._lock:
            self._chunk = None

    def start_episode(self, stamp_ns: int) -> None:
        """Forget a chunk of another episode; one from this episode's first observation may be there already."""
        with self._lock:
            self._not_before_ns = stamp_ns
            if self._chunk and not stamp_ns <= self._chunk.observation_stamp_ns < stamp_ns + self._chunk.step_ns:
                self._chunk = None

    def due(self, at_ns: int) -> bool:
        """Whether a new chunk should be computed from the observation at ``at_ns``."""
        with self._lock:
            return self._chunk is None or not 0 <= self._chunk.row(at_ns) < self.execute_steps

    def action(self, at_ns: int) -> tuple[np.ndarray, ActionChunk] | None:
        """The action (A,) for ``at_ns`` and the chunk it is from; None when no chunk covers that instant."""
        with self._lock:
            chunk = self._chunk
        if chunk is None:
            return None
        row = chunk.row(at_ns)
        return (chunk.actions[row], chunk) if 0 <= row < len(chunk.actions) else None
