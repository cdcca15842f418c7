"""Normalization and its inverse from one object, whose statistics travel with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices

Mode = Literal["mean_std", "min_max", "none"]
Statistics = dict[str, dict[str, list[float]]]

COORDINATES = ("x", "y", "z")
REQUIRED = {"mean_std": ("mean", "std"), "min_max": ("min", "max"), "none": ()}


class StatisticsError(VlaError):
    """Statistics that a policy needs and does not have."""


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """How each feature is normalized: ``mean_std`` to zero mean and unit deviation, ``min_max`` to [-1, 1].

    ``floor`` is the smallest scale, in the feature's own units: an entry that hardly moved in the data is not blown
    up, so that a robot that strays from it does not drive the model far outside what it has seen.

    ``streams`` declares the center and the scale of columns of clouds, sequences and maps (whose column is ``value``):
    what the model sees is (column - center) / scale. Columns that are not declared have the mean and the deviation
    of the data's statistics under the stream's name. The columns x, y and z of any stream are in m for the model too,
    since it measures distances in them.
    """

    state: Mode = "mean_std"
    action: Mode = "min_max"
    floor: float = 0.01
    streams: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for stream, declared in self.streams.items():
            for column, (center, scale) in declared.items():
                if not (np.isfinite(center) and 0 < scale < float("inf")):
                    raise ConfigError(f"streams.{stream}.{column}: expected a center and a positive scale, found "
                                      f"{center} and {scale}")  # fmt: skip
                if column in COORDINATES:
                    raise ConfigError(f"streams.{stream}.{column}: a coordinate stays in m; take it out")


def compute_statistics(values: np.ndarray) -> dict[str, list[float]]:
    """Statistics of ``values`` (N, D) per entry: min, max, mean, std, count, q01, q99 (the names LeRobot uses)."""
    values = values.astype(np.float64)
    if len(values) == 0 or not np.isfinite(values).all():
        raise StatisticsError(f"statistics need finite data, found {len(values)} rows of which "
                              f"{int((~np.isfinite(values)).any(-1).sum())} are not finite")  # fmt: skip
    return {
        "min": values.min(0).tolist(), "max": values.max(0).tolist(),
        "mean": values.mean(0).tolist(), "std": values.std(0).tolist(), "count": [float(len(values))],
        "q01": np.quantile(values, 0.01, axis=0).tolist(), "q99": np.quantile(values, 0.99, axis=0).tolist(),
    }  # fmt: skip


class Normalizer:
    """``normalize`` and ``unnormalize`` of ``state``, ``action`` and streams; arrays end in the feature's axis.

    ``columns`` are those of the clouds, sequences and maps that are seen, by stream (``model.vla.sizes.columns``).
    """

    def __init__(
        self, modes: Normalization, statistics: Statistics, columns: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        self.modes = modes
        self.statistics = statistics
        self.columns = dict(columns or {})
        self._affine = {name: self._fit(name, getattr(modes, name)) for name in ("state", "action")}
        self._affine.update({name: self._fit_stream(name, found) for name, found in self.columns.items()})

    def normalize(self, name: str, values: np.ndarray) -> np.ndarray:
        """Physical units to model units, float32."""
        shift, scale = self._affine[name]
        return ((values.astype(np.float64) - shift) / scale).astype(np.float32)

    def unnormalize(self, name: str, values: np.ndarray) -> np.ndarray:
        """Model units to physical units, float64."""
        shift, scale = self._affine[name]
        return values.astype(np.float64) * scale + shift

    def _fit_stream(self, name: str, columns: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        declared = self.modes.streams.get(name, {})
        unknown = [column for column in declared if column not in columns]
        if unknown:
            raise ConfigError(f"normalization.streams.{name}: no column {unknown[0]!r}; choices: {choices(columns)}")
        fixed = {**{column: (0.0, 1.0) for column in COORDINATES}, **declared}
        open_ = [column for column in columns if column not in fixed]
        if open_ and name not in self.statistics:
            raise StatisticsError(f"no statistics for {name!r}; the checkpoint has: {choices(self.statistics)}; or "
                                  f"declare the scale of {choices(open_)} in normalization.streams.{name}")  # fmt: skip
        if not open_:
            return np.array([fixed[c][0] for c in columns]), np.array([fixed[c][1] for c in columns])
        mean, std = self._fit(name, "mean_std")
        if len(mean) != len(columns):
            raise StatisticsError(f"statistics of {name!r} have {len(mean)} entries, not {len(columns)}")
        pairs = [fixed.get(c, (mean[i], std[i])) for i, c in enumerate(columns)]
        return np.array([center for center, _ in pairs]), np.array([scale for _, scale in pairs])

    def _fit(self, name: str, mode: Mode) -> tuple[np.ndarray, np.ndarray]:
        if mode == "none":
            return np.zeros(1), np.ones(1)
        if name not in self.statistics:
            raise StatisticsError(f"no statistics for {name!r}; the checkpoint has: {choices(self.statistics)}")
        found = self.statistics[name]
        absent = [key for key in REQUIRED[mode] if key not in found]
        if absent:
            raise StatisticsError(
                f"statistics of {name!r} lack {', '.join(absent)} for {mode}; they have: {choices(found)}"
            )
        for key in REQUIRED[mode]:
            if not np.isfinite(found[key]).all():
                raise StatisticsError(f"statistics of {name!r} are not finite: {key} {found[key]}")
        if mode == "mean_std":
            shift, scale = np.asarray(found["mean"]), np.asarray(found["std"])
        else:
            low, high = np.asarray(found["min"]), np.asarray(found["max"])
            shift, scale = (high + low) / 2, (high - low) / 2
        return shift, np.maximum(scale, self.modes.floor)
