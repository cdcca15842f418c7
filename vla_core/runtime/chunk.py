"""A chunk of actions placed in time, and how one chunk continues another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Continuation:
    """The plan that a new chunk is to continue, on the new chunk's rows; with it a guided chunk can be replayed.

    ``actions``       (H, A) float64 in the contract's units
    ``weights``       (H,) float64 in [0, 1]; 0 where there was no plan, and ``actions`` have no say
    ``frozen``        rows at the front that will have been executed when the new chunk arrives
    ``max_guidance``  bound on the guidance weight
    ``spread``        standard deviation of normalized actions that the guidance reckons with
    """

    actions: np.ndarray
    weights: np.ndarray
    frozen: int
    max_guidance: float
    spread: float = 1.0


@dataclass(frozen=True)
class ActionChunk:
    """Actions (H, A) float64 in the contract's units, placed in time (integer nanoseconds).

    ``continues`` is what its sampling was guided by, None without guidance.
    """

    observation_stamp_ns: int
    step_ns: int
    actions: np.ndarray
    continues: Continuation | None = None

    @property
    def valid_until_ns(self) -> int:
        """End of the last row."""
        return self.observation_stamp_ns + len(self.actions) * self.step_ns

    def row(self, at_ns: int) -> int:
        """Index of the row that applies at ``at_ns``; negative before the chunk, at least H after it."""
        return (at_ns - self.observation_stamp_ns) // self.step_ns

    def covers(self, at_ns: int) -> bool:
        """Whether a row applies at ``at_ns``."""
        return 0 <= self.row(at_ns) < len(self.actions)


def soft_mask(rows: int, overlap: int, frozen: int, shape: str = "exponential") -> np.ndarray:
    """RTC's weights (rows,): 1 where frozen, then falling to 0 at the end of the overlap.

    Black, Galliker and Levine 2025, eq. 5, with d = ``frozen`` and H - s = ``overlap``: the rows that the old chunk
    covers. ``linear`` is their c_i itself, ``ones`` does not fall.
    """
    i = np.arange(rows)
    c = (overlap - i) / (overlap - frozen + 1)
    falling = {"exponential": c * np.expm1(c) / np.expm1(1.0), "linear": c, "ones": np.ones(rows)}[shape]
    return np.where(i >= overlap, 0.0, np.where(i < frozen, 1.0, falling))


def continuation(
    old: ActionChunk,
    stamp_ns: int,
    frozen: int,
    max_guidance: float,
    spread: float = 1.0,
    guided_steps: int | None = None,
    shape: str = "exponential",
) -> Continuation | None:
    """Place ``old`` on the rows of a chunk observed at ``stamp_ns``, by time; None when it covers none of them.

    Row i of the new chunk gets the old row that would be commanded at its start. ``frozen`` is held to the overlap:
    what lies beyond the old chunk's end was never planned. ``guided_steps`` is how many rows after the frozen ones have
    a weight at all, None is all that there are; ``shape`` is how the weights fall (:func:`soft_mask`).
    """
    count = len(old.actions)
    first = old.row(stamp_ns)
    if old.observation_stamp_ns >= stamp_ns or first >= count:
        return None
    overlap = count - first
    frozen = min(frozen, overlap)
    rows = np.minimum(first + np.arange(count), count - 1)
    reach = overlap if guided_steps is None else min(overlap, frozen + guided_steps)
    return Continuation(old.actions[rows], soft_mask(count, reach, frozen, shape), frozen, max_guidance, spread)
