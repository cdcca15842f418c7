"""Chunk windows: every frame with the actions from it on."""

from __future__ import annotations

import numpy as np

from vla_core.data.dataset import Dataset


class ChunkWindows:
    """Every frame of a dataset with the chunk of H actions from it on; steps past the episode's end are masked.

    Where ticks were dropped, the next row is not the next step: a chunk is masked from the hole on.
    """

    def __init__(self, dataset: Dataset, horizon: int) -> None:
        self.dataset = dataset
        self.horizon = horizon
        lengths = np.diff(dataset.starts)
        self._ends = np.repeat(dataset.starts[1:], lengths)

    def __len__(self) -> int:
        return self.dataset.frames

    def chunks(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Actions (B, H, A) in physical units and their mask (B, H); masked steps repeat the episode's last action."""
        ahead = np.arange(self.horizon)
        ends = self._ends[rows][:, None]
        reach = rows[:, None] + ahead  # (B, H)
        inside = np.minimum(reach, ends - 1)
        stamps = self.dataset.stamps_ns
        due = stamps[rows][:, None] + ahead * self.dataset.contract.step_ns
        return self.dataset.action[inside], (reach < ends) & (stamps[inside] == due)
