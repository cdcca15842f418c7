"""Statistics of an episode and of a dataset, as LeRobot keeps them.

Each feature has min, max, mean, std (of the population), count and five quantiles. A column's are per entry. A
camera's are per channel, (3, 1, 1) in [0, 1], over a sample of its pictures, each thinned out when it is large:
LeRobot's choice of pictures and pixels (``compute_stats.py`` of lerobot 0.4.4), so that both give the same numbers.

Of one episode, everything is exact. LeRobot 0.4.4 takes quantiles from a histogram of 5000 bins, those of a matrix over
its rows too, and its std of a camera is wrong: it squares bytes in bytes. Over episodes min, max,
mean, std and count are exact too; a quantile is LeRobot's mean over the episodes weighted by their counts, which is
NOT the quantile of all frames: bimodal data can be far off. Normalization in this project does not use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla_core.data.lerobot.episode import Stats
from vla_core.data.lerobot.layout import LeRobotError

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
STATISTICS = ("min", "max", "mean", "std", "count", *QUANTILES)

FEWEST, MOST, POWER = 100, 10_000, 0.75  # pictures of an episode of n frames: n ** POWER within these bounds
LARGE, THINNED = 300, 150  # a picture of this many pixels on its longer side is thinned to about so many


def column_statistics(column: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics over the frames of one episode.

    Args:
        column: (N, *shape), numbers or bool; (N,) counts as (N, 1).

    Returns:
        min and max (shape,) in the column's dtype, mean, std and quantiles (shape,) float64, count (1,) int64.
    """
    if len(column) == 0:
        raise LeRobotError("statistics of no frames")
    column = column[:, None] if column.ndim == 1 else column
    exact = column.astype(np.float64)
    quantiles = np.quantile(exact, list(QUANTILES.values()), axis=0)
    return {
        "min": column.min(axis=0), "max": column.max(axis=0), "mean": exact.mean(axis=0), "std": exact.std(axis=0),
        "count": np.array([len(column)]), **dict(zip(QUANTILES, quantiles, strict=True)),
    }  # fmt: skip


def sample_indices(length: int) -> np.ndarray:
    """The frames of an episode of ``length`` frames that a camera's statistics are taken from."""
    samples = max(min(FEWEST, length), min(int(length**POWER), MOST))
    return np.round(np.linspace(0, length - 1, samples)).astype(np.int64)


def image_statistics(images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Statistics of the pictures (H, W, 3) uint8 at :func:`sample_indices`.

    Returns:
        (3, 1, 1) float64 in [0, 1] each; ``count`` (1,) is the number of pictures.
    """
    if len(images) == 0:
        raise LeRobotError("statistics of no pictures")
    counts = np.zeros((3, 256), dtype=np.int64)  # everything follows from how often each value occurs
    seen: tuple[np.ndarray, np.ndarray] | None = None
    for image in images:
        if seen is None or seen[0] is not image:  # pictures repeat where the camera is slower than the control
            thin = _thinned(image)
            seen = image, np.stack([np.bincount(thin[..., channel].ravel(), minlength=256) for channel in range(3)])
        counts += seen[1]
    values = np.arange(256) / 255.0
    total = counts.sum(axis=1)
    mean = counts @ values / total
    std = np.sqrt((counts * (values[None] - mean[:, None]) ** 2).sum(axis=1) / total)
    present = counts > 0
    found = {
        "min": values[present.argmax(axis=1)], "max": values[255 - present[:, ::-1].argmax(axis=1)],
        "mean": mean, "std": std, **{name: _quantile(counts, q) / 255.0 for name, q in QUANTILES.items()},
    }  # fmt: skip
    shaped = {name: value.reshape(3, 1, 1) for name, value in found.items()}
    return shaped | {"count": np.array([len(images)])}


def _thinned(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    if max(width, height) < LARGE:
        return image
    step = max(width, height) // THINNED
    return image[::step, ::step]


def _quantile(counts: np.ndarray, q: float) -> np.ndarray:
    """The quantile of each row's values 0 … 255 that occur ``counts`` times, interpolated as numpy does; (3,)."""
    cumulated = counts.cumsum(axis=1)
    position = q * (cumulated[:, -1] - 1)
    low, high = np.floor(position), np.ceil(position)
    below = (cumulated <= low[:, None]).sum(axis=1)
    above = (cumulated <= high[:, None]).sum(axis=1)
    return below + (position - low) * (above - below)


class Aggregate:
    """Statistics of a dataset, from those of its episodes; holds one set of numbers, whatever their number."""

    def __init__(self) -> None:
        self._stats: Stats = {}

    def add(self, statistics: Stats) -> None:
        """Take in an episode, or several that were aggregated before."""
        for name, found in statistics.items():
            self._stats[name] = _merged(self._stats[name], found) if name in self._stats else dict(found)

    def result(self) -> Stats:
        """Statistics of all episodes so far."""
        return {name: dict(found) for name, found in self._stats.items()}


def _merged(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of the union of two sets of frames (the parallel variance of Chan et al.)."""
    count = one["count"] + other["count"]
    share, other_share = one["count"] / count, other["count"] / count  # (1,), which broadcasts over every shape
    mean = share * one["mean"] + other_share * other["mean"]
    variance = (
        share * (one["std"] ** 2 + (one["mean"] - mean) ** 2)
        + other_share * (other["std"] ** 2 + (other["mean"] - mean) ** 2)
    )  # fmt: skip
    merged = {
        "min": np.minimum(one["min"], other["min"]), "max": np.maximum(one["max"], other["max"]),
        "mean": mean, "std": np.sqrt(variance), "count": count,
    }  # fmt: skip
    quantiles = [name for name in one if name in QUANTILES and name in other]
    return merged | {name: share * one[name] + other_share * other[name] for name in quantiles}
