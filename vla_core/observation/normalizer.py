"""Normalization and its inverse from one object, whose statistics travel with the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vla_core.config import ConfigError
from vla_core.contract import RobotContract
from vla_core.errors import VlaError, choices
from vla_core.observation.spec import ObservationSpec

Mode = Literal["mean_std", "min_max", "quantile", "none"]
Statistics = dict[str, dict[str, Any]]  # feature to key to numbers (D,), or (H, A) of actions that are plans

COORDINATES = ("x", "y", "z")
FEATURES = ("state", "action")
REQUIRED = {"mean_std": ("mean", "std"), "min_max": ("min", "max"), "quantile": ("q01", "q99"), "none": ()}
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
WIDE_REACH = 3.0  # deviations: a head that answers no further than this from the mean would cut demonstrations off
FAR = 20.0  # normalized: what lies further out drives a model where it has never been


class StatisticsError(VlaError):
    """Statistics that a policy needs and does not have."""


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """How each feature, and each of its entries, is normalized.

    ``mean_std``  (x - mean) / std
    ``min_max``   the smallest value to -1, the largest to 1
    ``quantile``  the 1 % quantile to -1, the 99 % quantile to 1, as OpenVLA and openpi do: outliers do not set the
                  scale
    ``none``      as it is

    ``entries`` names what differs from its feature, as ``{action.gripper: none, state.arm.elbow: min_max}``: a gripper
    of two values has no quantiles. A state entry is ``state.<stream>.<name>``; the stream may be left out where the
    name alone is clear.

    ``floor`` is the smallest scale, in the feature's own units: an entry that hardly moved in the data is not blown
    up, so that a robot that strays from it does not drive the model far outside what it has seen.

    ``clip`` bounds what the model sees of a feature, as ``{action: 1.0}`` does for OpenVLA's actions; entries with mode
    ``none`` are not clipped, and neither is the way back.

    ``streams`` declares the center and the scale of columns of clouds, sequences and maps (whose column is ``value``):
    what the model sees is (column - center) / scale. Columns that are not declared have the mean and the deviation
    of the data's statistics under the stream's name. The columns x, y and z of any stream are in m for the model too,
    since it measures distances in them.
    """

    state: Mode = "mean_std"
    action: Mode = "min_max"
    entries: dict[str, Mode] = field(default_factory=dict)
    floor: float = 0.01
    clip: dict[str, float] = field(default_factory=dict)
    streams: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.floor < float("inf"):
            raise ConfigError(f"floor: expected a positive number, found {self.floor}")
        for key in self.entries:
            if key.partition(".")[0] not in FEATURES or not key.partition(".")[2]:
                raise ConfigError(f"entries.{key}: expected action.<name> or state.<name>")
        for feature, limit in self.clip.items():
            if feature not in FEATURES:
                raise ConfigError(f"clip.{feature}: no such feature; choices: {choices(FEATURES)}")
            if not 0 < limit < float("inf"):
                raise ConfigError(f"clip.{feature}: expected a positive number, found {limit}")
        for stream, declared in self.streams.items():
            for column, (center, scale) in declared.items():
                if not (np.isfinite(center) and 0 < scale < float("inf")):
                    raise ConfigError(f"streams.{stream}.{column}: expected a center and a positive scale, found "
                                      f"{center} and {scale}")  # fmt: skip
                if column in COORDINATES:
                    raise ConfigError(f"streams.{stream}.{column}: a coordinate stays in m; take it out")

    def modes_of(self, feature: str, names: Sequence[str]) -> tuple[Mode, ...]:
        """The mode of each entry of ``feature``; raises :class:`ConfigError` for an entry that is not there."""
        own: dict[int, Mode] = {}
        for key, mode in self.entries.items():
            of, _, wanted = key.partition(".")
            if of == feature:
                own[_place(key, wanted, names)] = mode
        default: Mode = getattr(self, feature)
        return tuple(own.get(i, default) for i in range(len(names)))


def entry_names(spec: ObservationSpec, contract: RobotContract) -> dict[str, tuple[str, ...]]:
    """Names of the entries of ``state``, as ``stream.name``, and of ``action``."""
    return {
        "state": tuple(f"{stream}.{name}" for stream in spec.state for name in contract.stream(stream).names),
        "action": contract.action_names,
    }


def compute_statistics(values: np.ndarray) -> dict[str, Any]:
    """Statistics of ``values`` per entry under the names that LeRobot uses: min, max, mean, std, count, q01 to q99.

    Lists (D,) of values (N, D), and (H, A) of plans (N, H, A), whose far rows have other ranges than the near ones;
    ``std`` is that of the population.
    """
    if values.ndim == 3:
        flat = compute_statistics(values.reshape(len(values), -1))
        shape = values.shape[1:]
        return {k: v if k == "count" else np.reshape(v, shape).tolist() for k, v in flat.items()}
    if len(values) == 0 or not np.isfinite(values).all():
        raise StatisticsError(f"statistics need finite data, found {len(values)} rows of which "
                              f"{int((~np.isfinite(values)).any(-1).sum())} are not finite")  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in ("min", "max", "mean", "std", *QUANTILES)}
    for column in values.T:  # one at a time: all of them in double precision are larger than the data
        entries = column.astype(np.float64)
        quantiles = np.quantile(entries, list(QUANTILES.values()))
        for name, value in zip(found, (entries.min(), entries.max(), entries.mean(), entries.std(), *quantiles),
                               strict=True):  # fmt: skip
            found[name].append(float(value))
    return {**found, "count": [float(len(values))]}


class Normalizer:
    """``normalize`` and ``unnormalize`` of ``state``, ``action`` and streams; arrays end in the feature's axis.

    Where the statistics of actions are those of plans (H, A), each row of a chunk (..., h, A) is normalized by its own;
    h may be less than H.

    ``columns`` are those of the clouds, sequences and maps that are seen, by stream (``model.vla.sizes.columns``);
    ``names`` those of the entries of state and action (:func:`entry_names`), without which no entry can be named.
    """

    def __init__(
        self,
        modes: Normalization,
        statistics: Statistics,
        columns: Mapping[str, tuple[str, ...]] | None = None,
        names: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.modes = modes
        self.statistics = statistics
        self.columns = dict(columns or {})
        self.names = dict(names or {})
        nameless = [key for key in modes.entries if key.partition(".")[0] not in self.names]
        if nameless:
            raise ConfigError(f"normalization.entries.{nameless[0]}: the names of the feature's entries are not known")
        self._affine = {name: self._fit(name) for name in FEATURES}
        self._affine.update({name: self._fit_stream(name, found) for name, found in self.columns.items()})
        self._limits = {name: self._limit(name, value) for name, value in modes.clip.items()}

    def with_statistics(self, statistics: Statistics) -> Normalizer:
        """The same normalization by other statistics, such as those of another dataset of a mixture."""
        return Normalizer(self.modes, statistics, self.columns, self.names)

    def normalize(self, name: str, values: np.ndarray) -> np.ndarray:
        """Physical units to model units, float32."""
        shift, scale = self._scaling(name, values)
        normalized = (values.astype(np.float64) - shift) / scale
        if name in self._limits:
            normalized = np.clip(normalized, -self._limits[name], self._limits[name])
        return normalized.astype(np.float32)

    def unnormalize(self, name: str, values: np.ndarray) -> np.ndarray:
        """Model units to physical units, float64."""
        shift, scale = self._scaling(name, values)
        return values.astype(np.float64) * scale + shift

    def affine(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """What is subtracted of ``name`` and divided by, each (1,), (D,) or of plans (H, A) float64."""
        return self._affine[name]

    def limit(self, name: str) -> np.ndarray | None:
        """What normalized values of ``name`` are clipped to, (1,) or (D,); None where they are not."""
        return self._limits.get(name)

    @property
    def plan_rows(self) -> int | None:
        """H where actions are normalized as plans, row by row; None where every row of a chunk is alike."""
        shift, _ = self._affine["action"]
        return len(shift) if shift.ndim == 2 else None

    def _scaling(self, name: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shift and scale of the rows that ``values`` has."""
        shift, scale = self._affine[name]
        if shift.ndim == 1:
            return shift, scale
        if values.ndim < 2 or values.shape[-2] > len(shift):
            raise StatisticsError(f"{name}: values of shape {values.shape}, but the statistics are those of plans of "
                                  f"{len(shift)} rows; expected (..., at most so many, {shift.shape[1]})")  # fmt: skip
        return shift[: values.shape[-2]], scale[: values.shape[-2]]

    def warnings(self) -> list[str]:
        """What of state and action the normalization cannot do well, one line each; none where all is in order."""
        return [line for feature in FEATURES for line in self._doubts(feature)]

    def _doubts(self, feature: str) -> list[str]:
        found = self.statistics.get(feature, {})
        modes = self._modes(feature)
        shift, scale = self._affine[feature]
        if shift.ndim == 2:  # of a plan: entry by entry of each row
            modes = modes * len(shift) if len(modes) > 1 else modes
            found = {key: value if key == "count" else np.ravel(value) for key, value in found.items()}
            shift, scale = shift.ravel(), scale.ravel()
        lines = []
        for mode, keys in REQUIRED.items():
            if not keys or mode not in modes or any(key not in found for key in ("min", "max", *keys)):
                continue
            _, raw = _center_and_scale(found, mode)
            low, high = np.asarray(found["min"]), np.asarray(found["max"])
            width = len(raw)
            chosen = np.array([each == mode for each in (modes if len(modes) > 1 else modes * width)])
            still = chosen & (high == low)
            small = chosen & ~still & (raw < self.modes.floor)
            reach = np.maximum(np.abs(low - shift), np.abs(high - shift)) / scale
            collapsed = small & (raw == 0)  # quantiles alone: where the others are 0, nothing moves
            far = chosen & ~still & ~collapsed & (reach > FAR)
            label = self._label(feature, width)
            if self._affine[feature][0].ndim == 2:
                still[: len(self._affine[feature][0][0])] = False  # a plan begins where the robot is
            if still.any():
                lines.append(f"{feature}: {label(still)} never moves in the data, so nothing can be learned of it")
            if collapsed.any():
                lines.append(f"{feature}: q01 and q99 of {label(collapsed)} are equal though it moves; choose min_max "
                             "or none for it in normalization.entries")  # fmt: skip
            small &= ~collapsed
            if small.any():
                sizes = ", ".join(f"{value:.2g}" for value in raw[small][:4])
                what = {"mean_std": "std", "min_max": "half range", "quantile": "half of q99 - q01"}[mode]
                lines.append(f"{feature}: {what} of {label(small)} ({sizes}) is below normalization.floor "
                             f"{self.modes.floor:g}, which is its scale instead; lower the floor if such motions "
                             "matter")  # fmt: skip
            if far.any():
                lines.append(f"{feature}: outliers of {label(far)} are normalized to up to {reach[far].max():.3g}; "
                             "look at them with `vla inspect`, or set normalization.clip")  # fmt: skip
        return lines

    def _label(self, feature: str, width: int) -> Any:
        names = self.names.get(feature) or tuple(f"entry {i}" for i in range(width))
        if len(names) < width:
            names = tuple(f"{name} of row {row}" for row in range(width // len(names)) for name in names)

        def label(chosen: np.ndarray) -> str:
            listed = [name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen]
            return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")

        return label

    def _modes(self, feature: str) -> tuple[Mode, ...]:
        """The mode of each entry; a single one where it is that of all, whose names nobody needs to know."""
        names = self.names.get(feature, ())
        modes = self.modes.modes_of(feature, names)
        return modes if len(set(modes)) > 1 else (modes[0] if modes else getattr(self.modes, feature),)

    def _fit(self, feature: str) -> tuple[np.ndarray, np.ndarray]:
        modes = self._modes(feature)
        if set(modes) == {"none"}:
            return np.zeros(1), np.ones(1)
        fits = {mode: self._fit_mode(feature, mode) for mode in set(modes) - {"none"}}
        if len(modes) == 1:
            return fits[modes[0]]
        for shift, _ in fits.values():
            if shift.shape[-1] != len(modes):
                raise StatisticsError(f"statistics of {feature!r} have {shift.shape[-1]} entries, not {len(modes)}: "
                                      f"{', '.join(self.names[feature])}")  # fmt: skip
        shape = next(iter(fits.values()))[0].shape
        shifts, scales = np.zeros(shape), np.ones(shape)
        for i, mode in enumerate(modes):
            if mode != "none":
                shifts[..., i], scales[..., i] = (part[..., i] for part in fits[mode])
        return shifts, scales

    def _limit(self, feature: str, value: float) -> np.ndarray:
        return np.array([np.inf if mode == "none" else value for mode in self._modes(feature)])

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
        mean, std = self._fit_mode(name, "mean_std")
        if len(mean) != len(columns):
            raise StatisticsError(f"statistics of {name!r} have {len(mean)} entries, not {len(columns)}")
        pairs = [fixed.get(c, (mean[i], std[i])) for i, c in enumerate(columns)]
        return np.array([center for center, _ in pairs]), np.array([scale for _, scale in pairs])

    def _fit_mode(self, name: str, mode: Mode) -> tuple[np.ndarray, np.ndarray]:
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
        shift, scale = _center_and_scale(found, mode)
        return shift, np.maximum(scale, self.modes.floor)


def check_modes(normalization: Normalization, head: Any) -> None:
    """Raise :class:`ConfigError` where actions are normalized beyond what a head with config ``head`` can answer.

    Bins lie in [-1, 1], and a diffusion head cuts its estimates at ``clip_sample``: with ``mean_std`` every action
    further from the mean than that would be lost, without a word.
    """
    spread = [key for key, mode in {"action": normalization.action, **normalization.entries}.items()
              if mode == "mean_std" and key.partition(".")[0] == "action"]  # fmt: skip
    if not spread:
        return
    bins, reach = getattr(head, "bins", None), getattr(head, "clip_sample", None)
    key = spread[0] if spread[0] == "action" else f"entries.{spread[0]}"
    if bins is not None:
        raise ConfigError(f"normalization.{key}: found mean_std, but the bins of the head {head.type!r} cover -1 to 1 "
                          "alone; choices: quantile, min_max")  # fmt: skip
    if reach is not None and reach < WIDE_REACH:
        raise ConfigError(f"normalization.{key}: found mean_std, but the head {head.type!r} cuts its answers at "
                          f"{reach:g} deviations; set model.head.clip_sample to {WIDE_REACH:g} or more, or choose "
                          "quantile or min_max")  # fmt: skip


def _center_and_scale(found: Mapping[str, list[float]], mode: Mode) -> tuple[np.ndarray, np.ndarray]:
    """What is subtracted and divided by, each (D,) or (H, A) float64, before the floor."""
    first, second = (np.asarray(found[key], dtype=np.float64) for key in REQUIRED[mode])
    return (first, second) if mode == "mean_std" else (first / 2 + second / 2, second / 2 - first / 2)


def _place(key: str, wanted: str, names: Sequence[str]) -> int:
    """Index of the entry ``wanted``, by its whole name or by an end of it that only one entry has."""
    places = [i for i, name in enumerate(names) if name == wanted]
    places = places or [i for i, name in enumerate(names) if name.endswith(f".{wanted}")]
    if len(places) != 1:
        found = ", ".join(names[i] for i in places)
        fault = f"may be {found}; write the whole name" if places else f"no such entry; choices: {choices(names)}"
        raise ConfigError(f"normalization.entries.{key}: {fault}")
    return places[0]
