"""Sequences of consecutive ticks, with the actions that were executed and what they earned: for world models."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from vla_core.data.batches import Batches
from vla_core.data.dataset import Dataset, DatasetError
from vla_core.model.inputs import ModelInputs
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.model.world_model import WorldBatch
from vla_core.observation.normalizer import Normalizer, Statistics, compute_statistics

RewardSource = Literal["simulator", "outcome", "classifier"]
NO_OUTCOME = "unknown"


def executed(data: Dataset) -> np.ndarray:
    """Actions (N, A) in physical units as they were executed: the label where nothing else is known."""
    if data.contract.plans:
        raise DatasetError(f"{data.name}: its actions are whole trajectories; a world model is of actions that are "
                           "executed a tick each")  # fmt: skip
    return data.action if data.executed is None else data.executed


def sequence_statistics(data: Dataset) -> Statistics:
    """As :meth:`Dataset.statistics`, with the actions that were executed: labels may be quite other ones."""
    return {**data.statistics(), "action": compute_statistics(executed(data))}


def arrival_rewards(data: Dataset, source: RewardSource) -> np.ndarray:
    """What arriving at each frame is worth, (N,) float32.

    ``simulator``  what the action of the frame before earned, 0 at an episode's first frame
    ``outcome``    1 at the last frame of an episode that succeeded, else 0

    The classifier's are those of :mod:`vla_core.training.success`.
    """
    if source == "outcome":
        unknown = [e.index for e in data.episodes if e.outcome == NO_OUTCOME]
        if unknown:
            raise DatasetError(f"{data.name}: episode {unknown[0]} does not say how it ended; rewards from outcomes "
                               "need marks on the topic `episode`, as recorder and `vla collect` write")  # fmt: skip
        return ends(data, ("succeeded",)).astype(np.float32)
    if source != "simulator":
        raise DatasetError(f"rewards {source!r} are made by a classifier; choices here: simulator, outcome")
    if data.reward is None:
        raise DatasetError(f"{data.name}: has no column next.reward; record with `vla collect --rewards`, or a topic "
                           "`reward` of std_msgs/msg/Float64, or take rewards: outcome")  # fmt: skip
    found = np.zeros(data.frames, dtype=np.float32)
    found[1:] = data.reward[:-1]
    found[data.starts[:-1]] = 0
    return found


def ends(data: Dataset, outcomes: tuple[str, ...]) -> np.ndarray:
    """(N,) bool: the last frames of episodes that ended in one of ``outcomes``."""
    found = np.zeros(data.frames, dtype=bool)
    for place, entry in enumerate(data.episodes):
        found[data.starts[place + 1] - 1] = entry.outcome in outcomes
    return found


class Sequences:
    """Windows of ``ticks`` consecutive frames of a dataset, drawn by their number.

    A window ends with its episode, or where ticks were dropped; what is behind is masked. Windows start where
    ``ticks`` frames follow, and at the beginning of shorter stretches.

    Args:
        rewards: (N,) float32, what arriving at each frame is worth.
        terminal: (N,) bool, frames at which an episode is over for good.
    """

    def __init__(self, data: Dataset, ticks: int, normalizer: Normalizer, rewards: np.ndarray,
                 terminal: np.ndarray) -> None:  # fmt: skip
        if ticks < 2:
            raise DatasetError(f"sequences of {ticks} ticks; at least 2 are needed to see what an action does")
        if rewards.shape != (data.frames,) or terminal.shape != (data.frames,):
            raise DatasetError(
                f"{data.name}: rewards {rewards.shape} and ends {terminal.shape} of {data.frames} frames"
            )
        self.data, self.ticks, self.normalizer = data, ticks, normalizer
        self.rewards, self.terminal = rewards, terminal
        self._batches = Batches(data, 1, normalizer, WordTokenizer())
        actions = normalizer.normalize("action", executed(data))
        self._previous = np.roll(actions, 1, axis=0)
        self._ends, self.starts = self._stretches()

    @property
    def lengths(self) -> tuple[int, ...]:
        """As :class:`vla_core.data.sampler.Sampler` takes it: the number of windows."""
        return (len(self.starts),)

    def draw(self, numbers: np.ndarray) -> WorldBatch:
        """The windows of these numbers (B,), from 0 to ``lengths[0]`` - 1."""
        return self.windows(self.starts[numbers])

    def windows(self, first: np.ndarray, ticks: int | None = None) -> WorldBatch:
        """The windows that begin at these frames (B,); every first tick begins anew."""
        ticks = self.ticks if ticks is None else ticks
        reach = first[:, None] + np.arange(ticks)  # (B, T)
        mask = reach < self._ends[first][:, None]
        rows = np.minimum(reach, self._ends[first][:, None] - 1)
        begins = np.zeros(rows.shape, dtype=bool)
        begins[:, 0] = True
        flat = self._batches.inputs(rows.reshape(-1))
        inputs: ModelInputs = flat.map(lambda tensor: tensor.unflatten(0, rows.shape))
        previous = np.where(begins[..., None], np.float32(0), self._previous[rows])
        return WorldBatch(
            inputs=inputs,
            previous=torch.from_numpy(previous),
            rewards=torch.from_numpy(self.rewards[rows]),
            continues=torch.from_numpy((~self.terminal[rows]).astype(np.float32)),
            first=torch.from_numpy(begins),
            mask=torch.from_numpy(mask),
        )

    def whole(self, first: int, most: int) -> int:
        """Frames from ``first`` on, at most ``most``, that follow each other without a hole."""
        return min(int(self._ends[first]) - first, most)

    def starts_of(self, ticks: int) -> np.ndarray:
        """First frames of windows of which all ``ticks`` frames are there; raises where there is none."""
        found = np.flatnonzero(self._ends - np.arange(self.data.frames) >= ticks)
        if not len(found):
            longest = int((self._ends - np.arange(self.data.frames)).max())
            raise DatasetError(f"{self.data.name}: its longest episode without a hole has {longest} ticks, {ticks} are "
                               "needed")  # fmt: skip
        return found

    def _stretches(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the stretch without a hole ends that each frame is in (N,), and the first frames of windows (M,)."""
        data = self.data
        frames = np.arange(data.frames)
        new = np.zeros(data.frames, dtype=bool)
        new[data.starts[:-1]] = True
        new[1:] |= np.diff(data.stamps_ns) != data.contract.step_ns
        begins = np.flatnonzero(new)
        ends_at = np.append(begins[1:], data.frames)
        number = np.cumsum(new) - 1
        stretch = ends_at[number]
        whole = stretch - frames >= self.ticks
        starts = np.flatnonzero(whole | new & (stretch - frames >= 2))
        if not len(starts):
            raise DatasetError(f"{data.name}: no two frames follow each other")
        return stretch, starts
