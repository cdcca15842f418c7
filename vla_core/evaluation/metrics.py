"""Figures with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson 1927); (0, 1) without trials."""
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    if trials == 0:
        return 0.0, 1.0
    rate, z2 = successes / trials, Z95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # The ends are exact at 0 and 1; rounding must not put them beside the rate.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def percentile(values: Sequence[float], q: float) -> float | None:
    """Percentile ``q`` in [0, 100]; None without values."""
    return float(np.percentile(np.asarray(values), q)) if len(values) else None


def percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """``<name>_p50`` and ``<name>_p99``; None without values."""
    found = np.percentile(np.asarray(values), (50, 99)).tolist() if len(values) else (None, None)
    return dict(zip((f"{name}_p50", f"{name}_p99"), found, strict=True))


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of a mean by the normal approximation; None with fewer than two values."""
    if len(values) < 2:
        return None
    mean, half = float(np.mean(values)), Z95 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom (Fisher and Yates 1963, table III).
_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


def student_interval(rates: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean of a few rates in [0, 1] (Student's t); None with fewer than two."""
    if len(rates) < 2:
        return None
    freedom = len(rates) - 1
    quantile = _T95[freedom - 1] if freedom <= len(_T95) else Z95 + 2.4 / freedom
    mean, half = float(np.mean(rates)), quantile * float(np.std(rates, ddof=1)) / math.sqrt(len(rates))
    return max(0.0, mean - half), min(1.0, mean + half)


def bootstrap_interval(
    sums: Sequence[float], counts: Sequence[float] | None = None, resamples: int = 2000
) -> tuple[float, float] | None:
    """95 % interval of the ratio sum(sums) / sum(counts), by resampling whole units (Efron 1979, percentile method).

    A unit is what is independent of the others, such as a route, whose ticks are not: ``sums`` and ``counts`` have an
    entry for each. Without counts it is the interval of a mean. The same figures give the same interval. None with
    fewer than two units that count.
    """
    top = np.asarray(sums, dtype=np.float64)
    below = np.ones(len(top)) if counts is None else np.asarray(counts, dtype=np.float64)
    top, below = top[below > 0], below[below > 0]
    if len(top) < 2:
        return None
    drawn = np.random.default_rng(0).integers(len(top), size=(resamples, len(top)))
    low, high = np.percentile(top[drawn].sum(1) / below[drawn].sum(1), (2.5, 97.5))
    return float(low), float(high)


def roughness(commands: np.ndarray) -> float:
    """Largest Euclidean norm of the second difference over time of ``commands`` (T, A); 0 with fewer than three."""
    return float(np.linalg.norm(np.diff(commands, n=2, axis=0), axis=-1).max(initial=0.0))


class Trial(Protocol):
    """An episode or passage: its outcome, the jump at each new chunk and the roughness of its commands."""

    @property
    def success(self) -> bool: ...

    @property
    def boundary_jumps(self) -> tuple[float, ...]: ...

    @property
    def roughness(self) -> float: ...


def summarize(trials: Sequence[Trial]) -> dict[str, Any]:
    """Success with its 95 % interval (Wilson), mean boundary jump and mean roughness of at least one trial.

    The boundary jump is the mean over the trials' own means, since the chunks of one trial depend on one another.
    """
    successes = sum(trial.success for trial in trials)
    jumps = [float(np.mean(trial.boundary_jumps)) for trial in trials if trial.boundary_jumps]
    rough = [trial.roughness for trial in trials]
    return {
        "trials": len(trials), "successes": successes, "success_rate": successes / len(trials),
        "success_ci95": wilson_interval(successes, len(trials)),
        "boundary_jump": float(np.mean(jumps)) if jumps else None, "boundary_jump_ci95": mean_interval(jumps),
        "roughness": float(np.mean(rough)), "roughness_ci95": mean_interval(rough),
    }  # fmt: skip
