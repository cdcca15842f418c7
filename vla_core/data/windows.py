"""Chunk windows: every frame with the actions from it on, or with the plan of its tick."""

from __future__ import annotations

import numpy as np

from vla_core.data.dataset import Dataset, DatasetError


class ChunkWindows:
    """Every frame of a dataset with the chunk of H actions from it on; steps past the episode's end are masked.

    Where ticks were dropped, the next row is not the next step: a chunk is masked from the hole on. Of a dataset of
    plans a frame's chunk is the beginning of its own plan, all of it known. From the first frame on whose action is not
    to be imitated (``Dataset.shown``) a chunk is masked too.
    """

    def __init__(self, dataset: Dataset, horizon: int) -> None:
        self.dataset = dataset
        self.horizon = horizon
        if dataset.plan_rows is not None and horizon > dataset.plan_rows:
            raise DatasetError(f"{dataset.name}: its plans have {dataset.plan_rows} rows, the model's horizon is "
                               f"{horizon}; set model.horizon to at most {dataset.plan_rows}")  # fmt: skip
        lengths = np.diff(dataset.starts)
        self._ends = np.repeat(dataset.starts[1:], lengths)

    def __len__(self) -> int:
        return self.dataset.frames

    def chunks(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Actions (B, H, A) in physical units and their mask (B, H); masked steps repeat the episode's last action."""
        if self.dataset.plan_rows is not None:
            return self.dataset.action[rows, : self.horizon], np.ones((len(rows), self.horizon), dtype=bool)
        ahead = np.arange(self.horizon)
        ends = self._ends[rows][:, None]
        reach = rows[:, None] + ahead  # (B, H)
        inside = np.minimum(reach, ends - 1)
        stamps = self.dataset.stamps_ns
        due = stamps[rows][:, None] + ahead * self.dataset.contract.step_ns
        mask = (reach < ends) & (stamps[inside] == due)
        if self.dataset.shown is not None:
            mask &= np.logical_and.accumulate(self.dataset.shown[inside], axis=1)
        return self.dataset.action[inside], mask
