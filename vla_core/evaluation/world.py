"""How good a world model is: pictures and rewards that it expects against those that came, on held-out episodes.

Shapes: E episodes, T ticks, H steps ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vla_core.data.sequences import Sequences
from vla_core.model.world_model import State, WorldBatch, WorldModel

APART = 8  # ticks between two observations up to which surprise is measured
CONTEXT = 5


@dataclass(frozen=True)
class OpenLoop:
    """Predictions of what follows after ``context`` ticks that were seen, from actions alone, over W windows.

    ``picture``, ``picture_copy``   (H,) mean squared error of pixels in [0, 1]: imagined, and the last seen one kept
    ``state``, ``state_copy``       (H,) mean squared error of the normalized state, likewise
    ``real``, ``imagined``          of one window, camera -> (H, 3, H, W)
    """

    context: int
    windows: int
    picture: np.ndarray | None
    picture_copy: np.ndarray | None
    state: np.ndarray | None
    state_copy: np.ndarray | None
    real: dict[str, np.ndarray]
    imagined: dict[str, np.ndarray]


@dataclass(frozen=True)
class Returns:
    """Sums of rewards of E episodes.

    ``observed``  of the rewards that the model reads from what it sees
    ``imagined``  of those that it expects after ``context`` ticks from the actions alone
    """

    true: np.ndarray
    observed: np.ndarray
    imagined: np.ndarray

    @property
    def observed_correlation(self) -> float:
        """Spearman's rank correlation with the true returns."""
        return rank_correlation(self.true, self.observed)

    @property
    def imagined_correlation(self) -> float:
        """The same of what was imagined."""
        return rank_correlation(self.true, self.imagined)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: Pearson's correlation of the ranks, ties getting their mean rank; NaN where one never varies."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (a, b)]
    centred = [r - r.mean() for r in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float("nan") if scale == 0 else float((centred[0] * centred[1]).sum() / scale)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean: np.ndarray = ends - (counts - 1) / 2
    return mean[inverse]


@torch.inference_mode()
def open_loop(model: WorldModel, sequences: Sequences, *, context: int = CONTEXT, ahead: int = 45,
              windows: int = 32) -> OpenLoop:  # fmt: skip
    """See ``context`` ticks, imagine ``ahead`` more, on windows spread evenly over the episodes that are long enough.

    Latents are the most likely ones.
    """
    first = _windows(sequences, context + ahead, windows)
    batch = sequences.windows(first, context + ahead)
    states = _imagined(model, batch, context)
    decoded = model.decode(states)
    pictures = {name: batch.inputs.images[name] for name in model.config.cameras}
    picture = picture_copy = state = state_copy = None
    if pictures:
        picture = _mean([_error(decoded.images[n], p[:, context:], (2, 3, 4)) for n, p in pictures.items()])
        picture_copy = _mean([_error(p[:, context - 1, None], p[:, context:], (2, 3, 4)) for p in pictures.values()])
    if model.config.state_dim:
        numbers = batch.inputs.state
        state = _mean([_error(decoded.state, numbers[:, context:], (2,))])
        state_copy = _mean([_error(numbers[:, context - 1, None], numbers[:, context:], (2,))])
    shown = len(first) // 2
    return OpenLoop(
        context, len(first), picture, picture_copy, state, state_copy,
        {name: p[shown, context:].numpy() for name, p in pictures.items()},
        {name: p[shown].numpy() for name, p in decoded.images.items()},
    )  # fmt: skip


@torch.inference_mode()
def returns(model: WorldModel, sequences: Sequences, *, context: int = CONTEXT) -> Returns:
    """True and predicted returns of every episode that is longer than ``context``."""
    true, observed, imagined = [], [], []
    for batch in _episodes(sequences):
        if batch.first.shape[1] <= context:
            continue
        states = model.observe(batch.inputs, batch.previous, batch.first, sample=False).states
        begin = states.map(lambda x: x[:, context - 1])
        ahead = model.imagine(begin, batch.previous[:, context:], sample=False)
        seen = model.predict_rewards(states)[0]
        true.append(float(batch.rewards.sum()))
        observed.append(float(seen.sum()))
        imagined.append(float(seen[:context].sum() + model.predict_rewards(ahead).sum()))
    return Returns(np.array(true), np.array(observed), np.array(imagined))


@torch.inference_mode()
def surprise_limits(model: WorldModel, sequences: Sequences, quantile: float, window: int) -> tuple[float, ...]:
    """For observations 1 to ``APART`` ticks apart: the quantile of the mean divergence (nats) over ``window`` of them.

    Where no episode is long enough for a whole window of the longest ones, there is no limit for those.
    """
    found: list[list[float]] = [[] for _ in range(APART)]
    for batch in _episodes(sequences):
        embeddings = model.embed(batch.inputs)
        for apart in range(1, APART + 1):
            nats = _divergences(model, embeddings, batch.previous, apart)
            if len(nats) >= window:
                sums = np.cumsum([0.0, *nats])
                found[apart - 1] += ((sums[window:] - sums[:-window]) / window).tolist()
    limits = []
    for values in found:
        if not values:
            break
        limits.append(float(np.quantile(values, quantile)))
    return tuple(limits)


def _divergences(model: WorldModel, embeddings: Tensor, previous: Tensor, apart: int) -> list[float]:
    """Of an episode (1, T, ...) that is looked at every ``apart`` ticks."""
    rssm = model.rssm
    first = torch.ones(1, dtype=torch.bool)
    state = rssm.update(model.initial(1), previous[:, 0], embeddings[:, 0], first, sample=False).states
    nats = []
    for tick in range(apart, embeddings.shape[1], apart):
        for k in range(tick - apart + 1, tick):
            state = rssm.step(state, previous[:, k], sample=False)
        seen = rssm.update(state, previous[:, tick], embeddings[:, tick], sample=False)
        nats.append(float(rssm.latent.kl(seen.states.parameters, seen.prior)))
        state = seen.states
    return nats


def _imagined(model: WorldModel, batch: WorldBatch, context: int) -> State:
    inputs = batch.inputs.map(lambda x: x[:, :context])
    seen = model.observe(inputs, batch.previous[:, :context], batch.first[:, :context], sample=False).states
    return model.imagine(seen.map(lambda x: x[:, -1]), batch.previous[:, context:], sample=False)


def _episodes(sequences: Sequences) -> Iterator[WorldBatch]:
    """Each episode, to its end or to its first hole, as one sequence."""
    starts = sequences.data.starts
    for begin, end in pairwise(starts.tolist()):
        yield sequences.windows(np.array([begin]), sequences.whole(begin, end - begin))


def _windows(sequences: Sequences, ticks: int, most: int) -> np.ndarray:
    """First frames of windows of ``ticks`` frames that are all there; raises where there is none."""
    starts = sequences.starts_of(ticks)
    chosen: np.ndarray = np.unique(starts[np.linspace(0, len(starts) - 1, most).round().astype(np.int64)])
    return chosen


def _error(found: Tensor, real: Tensor, dims: tuple[int, ...]) -> np.ndarray:
    """(H,), the mean over windows and ``dims``."""
    return (found - real).square().mean(dim=(0, *dims)).numpy()


def _mean(parts: list[np.ndarray]) -> np.ndarray:
    mean: np.ndarray = np.mean(parts, axis=0)
    return mean
