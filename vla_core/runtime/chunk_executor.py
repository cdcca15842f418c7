"""Executes chunks by time: which action applies now, when a new chunk is due, and what it is to continue.

A chunk's row k belongs to the instant ``observation_stamp + k * step``, whenever the chunk arrives: rows that passed
while the model was thinking are skipped, not shifted.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_core.runtime.chunk import ActionChunk, Continuation, continuation
from vla_core.runtime.execution import Execution
from vla_core.runtime.execution_metrics import ExecutionMetrics

__all__ = ["ActionChunk", "ChunkExecutor", "Continuation"]

LATE_NS = 10_000_000_000
MAX_CHUNKS = 128  # kept at once, whatever the rate of inference


@dataclass
class _Held:
    """A chunk, from when on it may be executed, and the first tick at which it was."""

    chunk: ActionChunk
    from_ns: int
    taken_ns: int | None = None


class ChunkExecutor:
    """Commands from chunks by the strategy of ``execution``.

    Of each chunk the first ``execution.steps`` rows (or ``execution.period_s``) are meant to run; the rest is there to
    be mixed with the next one, and for the case that the next one is late. Safe to push to from one thread and to read
    from another.
    """

    def __init__(self, execution: Execution, metrics: ExecutionMetrics | None = None) -> None:
        self.execution = execution
        self.metrics = metrics
        self._held: list[_Held] = []  # by observation stamp, oldest first
        self._delays: deque[int] = deque(maxlen=execution.delay_window)
        self._not_before_ns = 0
        self._lock = threading.Lock()

    def push(self, chunk: ActionChunk, at_ns: int | None = None) -> None:
        """Take over a chunk, unless it is late: of an earlier episode, or older than the newest that is there.

        ``at_ns`` is when it arrives: ticks before it are commanded without it. None is for lockstep, where time stands
        still while the model thinks: it is in force from its observation on.
        """
        with self._lock:
            newest_ns = self._not_before_ns
            if self._held:
                newest_ns = max(newest_ns, self._held[-1].chunk.observation_stamp_ns)
            # A model thinks for seconds at most; what is older still comes from a clock that was set back.
            if 0 < newest_ns - chunk.observation_stamp_ns <= LATE_NS:
                return
            if chunk.observation_stamp_ns < newest_ns:
                self._not_before_ns = 0
                self._held.clear()
            stamp_ns = chunk.observation_stamp_ns
            # What ends before this chunk's first row has no tick left to command once this one is in force.
            from_ns = stamp_ns if at_ns is None else max(at_ns, stamp_ns)
            kept = [h for h in self._held
                    if h.chunk.valid_until_ns > stamp_ns and h.chunk.observation_stamp_ns < stamp_ns]  # fmt: skip
            self._held = [*kept[-MAX_CHUNKS + 1 :], _Held(chunk, from_ns)]

    def clear(self) -> None:
        """Forget all chunks, so that nothing of them is executed any more."""
        with self._lock:
            self._held.clear()
            self._pause()

    def start_episode(self, stamp_ns: int) -> None:
        """Forget the chunks of another episode; one from this episode's first observation may be there already."""
        with self._lock:
            self._not_before_ns = stamp_ns
            self._held = [h for h in self._held if 0 <= h.chunk.observation_stamp_ns - stamp_ns < h.chunk.step_ns]
            self._pause()

    def due(self, at_ns: int) -> bool:
        """Whether a new chunk should be computed from the observation at ``at_ns``; never while one is on its way."""
        with self._lock:
            if not self._held:
                return True
            newest = self._held[-1]
            chunk, period_ns = newest.chunk, self.execution.period_ns
            on_its_way = chunk.observation_stamp_ns <= at_ns < newest.from_ns
            if period_ns is None:
                return not on_its_way and not 0 <= chunk.row(at_ns) < self.execution.steps
            runs = chunk.covers(at_ns) and at_ns - chunk.observation_stamp_ns < period_ns
            return not on_its_way and not runs

    @property
    def expected_delay_steps(self) -> int:
        """The longest delay of the last chunks, in control steps; an episode's first chunk is not among them."""
        return max(self._delays, default=self.execution.initial_delay_steps)

    def continuation(self, stamp_ns: int) -> Continuation | None:
        """What a chunk observed at ``stamp_ns`` is to continue; None unless the strategy is rtc and there is a plan."""
        if self.execution.strategy != "rtc":
            return None
        with self._lock:
            if not self._held:
                return None
            execution = self.execution
            return continuation(
                self._held[-1].chunk, stamp_ns, self.expected_delay_steps, execution.max_guidance, execution.spread,
                execution.guided_steps, execution.soft_mask,
            )  # fmt: skip

    def action(self, at_ns: int) -> tuple[np.ndarray, ActionChunk] | None:
        """The action (A,) for the tick ``at_ns`` and the newest chunk behind it; None when none covers that instant.

        For the control loop alone: the first tick that gets an action of a chunk is its takeover, which is measured.
        """
        with self._lock:
            held = [h for h in self._held if h.from_ns <= at_ns]
            if not held or not held[-1].chunk.covers(at_ns):
                return None
            newest = held[-1]
            if newest.taken_ns is None:
                newest.taken_ns = at_ns
                values = self._combine(held, at_ns)
                self._note_takeover(newest.chunk, at_ns, values, held[:-1])
            else:
                values = self._combine(held, at_ns)
            if self.metrics is not None:
                self.metrics.command(values, at_ns - newest.chunk.observation_stamp_ns)
            return values, newest.chunk

    def _note_takeover(self, chunk: ActionChunk, at_ns: int, values: np.ndarray, older: Sequence[_Held]) -> None:
        delay_steps = chunk.row(at_ns)
        if older:
            self._delays.append(delay_steps)
        if self.metrics is not None:
            covering = [h for h in older if h.chunk.covers(at_ns)]
            without = self._combine(covering, at_ns) if covering else None
            self.metrics.take_over(at_ns - chunk.observation_stamp_ns, delay_steps, values, without)

    def _combine(self, held: Sequence[_Held], at_ns: int) -> np.ndarray:
        """The strategy's action for a tick that the last of ``held`` covers."""
        if self.execution.strategy == "ensemble":
            return _ensemble([h.chunk for h in held], at_ns, self.execution.ensemble_decay)
        if self.execution.strategy == "blend":
            return _blend(held, at_ns, self.execution.blend_steps)
        chunk = held[-1].chunk
        values: np.ndarray = chunk.actions[chunk.row(at_ns)]
        return values

    def _pause(self) -> None:
        if self.metrics is not None:
            self.metrics.pause()


def _ensemble(chunks: Sequence[ActionChunk], at_ns: int, decay: float) -> np.ndarray:
    """Mean (A,) over all chunks that cover ``at_ns``, weighted with exp(-decay i), i = 0 the oldest of them."""
    rows = np.stack([chunk.actions[chunk.row(at_ns)] for chunk in chunks if chunk.covers(at_ns)])
    weights = np.exp(-decay * np.arange(len(rows)))
    mean: np.ndarray = weights @ rows / weights.sum()
    return mean


def _blend(held: Sequence[_Held], at_ns: int, steps: int) -> np.ndarray:
    """Fade from each plan to the chunk after it; a fade that a third chunk interrupts goes on underneath.

    At the takeover tick the new chunk has the share 1 / (steps + 1), and all of it ``steps`` ticks later.
    """
    values: np.ndarray | None = None
    for one in held:
        # A chunk that a newer one replaced before it was commanded takes no part; the last one takes over now.
        taken_ns = at_ns if one is held[-1] and one.taken_ns is None else one.taken_ns
        if taken_ns is None or not one.chunk.covers(at_ns):
            continue
        row: np.ndarray = one.chunk.actions[one.chunk.row(at_ns)]
        passed = (at_ns - taken_ns) // one.chunk.step_ns
        share = min(1.0, (passed + 1) / (steps + 1))
        values = row if values is None or share == 1.0 else values + share * (row - values)
    assert values is not None, "the newest chunk covers this tick and was taken over"
    return values
