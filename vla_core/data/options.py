"""Which episodes of a dataset a run trains on, which it holds out, and how their pictures are kept."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vla_core.config import ConfigError
from vla_core.data.dataset import Dataset, DatasetError, EpisodeEntry
from vla_core.data.frame_cache import Cache
from vla_core.errors import choices


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which episodes are kept, and at which frames a training window may start; what is not given does not filter.

    Episodes: those of ``tasks``, of ``outcomes``, of these indices (``episodes``); whose first instruction and whose
    bag's name hold the regular expressions ``instruction`` and ``bag``; of ``min_length`` to ``max_length`` frames.

    Frames: no window starts inside a stretch of ``motionless_ticks`` frames or more that is at rest, since a policy
    that is shown much rest learns to rest; the stretch stays in the windows that reach into it. At rest is a frame
    whose actions are all below ``motionless``, a share of each one's half range: velocities and efforts by value,
    positions, and entries named in ``by_change`` (a gripper among velocities), by the change since the frame before.
    At rest is a plan that stays, in all its rows, where it begins.

    ``interventions``: ``only`` imitates what those did who took over from a policy, and nothing of what the policy did
    (HG-DAgger, Kelly et al. 2019); episodes in which no policy drove are kept as they are.
    """

    tasks: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()
    episodes: tuple[int, ...] = ()
    instruction: str | None = None
    bag: str | None = None
    min_length: int = 1
    max_length: int | None = None
    motionless: float | None = None
    motionless_ticks: int = 1
    by_change: tuple[str, ...] = ()
    interventions: Literal["all", "only"] = "all"

    def __post_init__(self) -> None:
        for name in ("instruction", "bag"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is no regular expression: {error}") from None
        if self.max_length is not None and self.max_length < self.min_length:
            raise ConfigError(f"max_length: {self.max_length} is below min_length {self.min_length}")
        if self.motionless is not None and not 0 < self.motionless < 1:
            raise ConfigError(f"motionless: expected a share of the half range, 0 to 1, found {self.motionless}")
        if self.motionless_ticks < 1:
            raise ConfigError(f"motionless_ticks: expected at least 1, found {self.motionless_ticks}")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Held-out episodes: a ``fraction`` of them, drawn by ``seed``; or those of these indices (``episodes``).

    ``by_task`` draws the fraction from the episodes of each task, or of each instruction where no task is known.
    """

    fraction: float = 0.0
    episodes: tuple[int, ...] = ()
    by_task: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ConfigError(f"fraction: expected 0 to below 1, found {self.fraction}")
        if self.fraction and self.episodes:
            raise ConfigError("fraction: and a list of episodes are given; take one of them")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How a run uses its datasets.

    ``weights`` are the datasets' shares of the samples by name; without any each window counts alike. ``cache`` keeps
    decoded pictures on the ``disk``, in ``memory``, or decodes them at each use (``none``). ``prefetch`` batches are
    made ahead. A window that starts where somebody had taken over from a policy comes ``intervention_weight`` times in
    an epoch.
    """

    weights: dict[str, float] = field(default_factory=dict)
    filter: Filter = field(default_factory=Filter)
    validation: Validation = field(default_factory=Validation)
    cache: Cache = "disk"
    prefetch: int = 2
    intervention_weight: int = 1

    def __post_init__(self) -> None:
        if self.intervention_weight < 1:
            raise ConfigError(f"intervention_weight: expected at least 1, found {self.intervention_weight}")
        for name, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise ConfigError(f"weights.{name}: expected a positive number, found {weight}")
        if self.prefetch < 0:
            raise ConfigError(f"prefetch: expected at least 0, found {self.prefetch}")


def keep(dataset: Dataset, wanted: Filter) -> tuple[Dataset, list[str]]:
    """What ``wanted`` keeps of a dataset, and a line for each condition that left something out."""
    conditions: dict[str, tuple[bool, Callable[[EpisodeEntry], bool]]] = {
        "tasks": (bool(wanted.tasks), lambda e: e.task in wanted.tasks),
        "outcomes": (bool(wanted.outcomes), lambda e: e.outcome in wanted.outcomes),
        "episodes": (bool(wanted.episodes), lambda e: e.index in wanted.episodes),
        "instruction": (wanted.instruction is not None,
                        lambda e: re.search(wanted.instruction or "", e.instruction) is not None),
        "bag": (wanted.bag is not None, lambda e: re.search(wanted.bag or "", e.bag) is not None),
        "min_length": (True, lambda e: e.length >= wanted.min_length),
        "max_length": (wanted.max_length is not None, lambda e: e.length <= (wanted.max_length or 0)),
    }  # fmt: skip
    notes = _unknown(dataset, wanted)
    places = list(range(len(dataset.episodes)))
    for name, (asked, fits) in conditions.items():
        left = [place for place in places if not asked or fits(dataset.episodes[place])]
        if len(left) < len(places):
            value = getattr(wanted, name)
            text = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            notes.append(f"{dataset.name}: {name} ({text}) leaves out {len(places) - len(left)} of {len(places)} "
                         "episodes")  # fmt: skip
        places = left
    if not places:
        raise DatasetError(f"{dataset.name}: the filter leaves nothing: {'; '.join(notes)}")
    kept = dataset.select(places) if len(places) < len(dataset.episodes) else dataset
    if wanted.interventions == "only" and kept.intervened is not None:
        rows = kept.window_rows[kept.intervened[kept.window_rows]]
        if not len(rows):
            raise DatasetError(f"{dataset.name}: the filter leaves nothing: nobody intervened in its "
                               f"{len(kept.episodes)} episodes")  # fmt: skip
        notes.append(f"{dataset.name}: interventions (only) starts no window at {len(kept.window_rows) - len(rows)} of "
                     f"{len(kept.window_rows)} frames")  # fmt: skip
        kept = dataclasses.replace(kept, window_rows=rows, shown=kept.intervened)
    if wanted.motionless is None:
        return kept, notes
    still = _stretches(at_rest(kept, wanted.motionless, wanted.by_change), kept.starts, wanted.motionless_ticks)
    rows = kept.window_rows[~still[kept.window_rows]]
    if not len(rows):
        raise DatasetError(f"{dataset.name}: the filter leaves nothing: every frame is at rest by motionless "
                           f"{wanted.motionless:g}")  # fmt: skip
    if len(rows) < len(kept.window_rows):
        notes.append(f"{dataset.name}: motionless ({wanted.motionless:g}) starts no window at "
                     f"{len(kept.window_rows) - len(rows)} of {len(kept.window_rows)} frames")  # fmt: skip
    return dataclasses.replace(kept, window_rows=rows), notes


def weighted(dataset: Dataset, weight: int) -> Dataset:
    """The dataset with each window that starts at an intervention ``weight`` times."""
    if weight == 1 or dataset.intervened is None:
        return dataset
    times = np.where(dataset.intervened[dataset.window_rows], weight, 1)
    return dataclasses.replace(dataset, window_rows=np.repeat(dataset.window_rows, times))


def split(dataset: Dataset, held_out: Validation) -> tuple[Dataset, Dataset | None]:
    """Training and held-out episodes; None where nothing is to be held out."""
    if not held_out.fraction and not held_out.episodes:
        return dataset, None
    places = _listed(dataset, held_out) if held_out.episodes else _drawn(dataset, held_out)
    rest = [place for place in range(len(dataset.episodes)) if place not in places]
    if not places or not rest:
        raise DatasetError(f"{dataset.name}: of {len(dataset.episodes)} episodes, {len(places)} would be held out and "
                           f"{len(rest)} remain; both need at least one")  # fmt: skip
    return dataset.select(rest), dataset.select(sorted(places))


def at_rest(dataset: Dataset, threshold: float, by_change: tuple[str, ...] = ()) -> np.ndarray:
    """(N,) bool: frames whose actions are all below ``threshold``, as :class:`Filter` says; no episode's first by
    change alone, before which nothing is known."""
    contract = dataset.contract
    half_range = (contract.action_high - contract.action_low) / 2
    if dataset.plan_rows is not None:
        if by_change:
            raise DatasetError(f"by_change: {dataset.name} has plans in the robot's own frame, of which no entry is "
                               "compared with the frame before; leave it out")  # fmt: skip
        resting: np.ndarray = (np.abs(dataset.action) < threshold * half_range).all(axis=(1, 2))
        return resting
    unknown = [name for name in by_change if name not in contract.action_names]
    if unknown:
        raise DatasetError(f"by_change: no action {unknown[0]!r}; choices: {choices(contract.action_names)}")
    kinds = [action.kind for action in contract.actions.values() for _ in action.names]
    named = zip(kinds, contract.action_names, strict=True)
    change = np.array([kind == "position" or name in by_change for kind, name in named])
    moved = np.abs(dataset.action)
    steps = np.abs(np.diff(dataset.action, axis=0, prepend=np.inf))
    steps[dataset.starts[:-1]] = np.inf
    still: np.ndarray = (np.where(change, steps, moved) < threshold * half_range).all(axis=1)
    return still


def _stretches(still: np.ndarray, starts: np.ndarray, least: int) -> np.ndarray:
    """``still`` without stretches of fewer than ``least`` frames; a stretch ends with its episode."""
    begins = still.copy()
    begins[1:] &= ~still[:-1]
    begins[starts[:-1]] = still[starts[:-1]]
    numbers = np.where(still, np.cumsum(begins), 0)
    lengths = np.bincount(numbers)
    long: np.ndarray = still & (lengths[numbers] >= least)
    return long


def _unknown(dataset: Dataset, wanted: Filter) -> list[str]:
    """A line for each task, outcome or episode that the dataset has not; an error where it has none of those asked for.

    Of several datasets one may lack a task that another one has, but it may be a slip of the pen.
    """
    notes = []
    for name, found in (
        ("tasks", {e.task for e in dataset.episodes}),
        ("outcomes", {e.outcome for e in dataset.episodes}),
        ("episodes", {e.index for e in dataset.episodes}),
    ):
        absent = [value for value in getattr(wanted, name) if value not in found]
        if not absent:
            continue
        there = f"{min(found)} to {max(found)}" if name == "episodes" else choices(found)
        line = f"{dataset.name}: no {name.removesuffix('s')} {absent[0]!r}; choices: {there}"
        if len(absent) == len(getattr(wanted, name)):
            raise DatasetError(line)
        notes.append(line)
    return notes


def _listed(dataset: Dataset, held_out: Validation) -> set[int]:
    by_index = {entry.index: place for place, entry in enumerate(dataset.episodes)}
    absent = [index for index in held_out.episodes if index not in by_index]
    if absent:
        raise DatasetError(f"{dataset.name}: validation.episodes: no episode {absent[0]} (of those that the filter "
                           f"keeps); choices: {choices(map(str, by_index))}")  # fmt: skip
    return {by_index[index] for index in held_out.episodes}


def _drawn(dataset: Dataset, held_out: Validation) -> set[int]:
    """A fraction of each task's episodes, rounded, of all together at least one."""
    groups: dict[str, list[int]] = {}
    for place, entry in enumerate(dataset.episodes):
        groups.setdefault((entry.task or entry.instruction) if held_out.by_task else "", []).append(place)
    rng = np.random.default_rng(held_out.seed)
    drawn: set[int] = set()
    for _, places in sorted(groups.items()):
        drawn.update(int(p) for p in rng.permutation(places)[: round(held_out.fraction * len(places))])
    if not drawn:
        drawn.add(int(rng.integers(len(dataset.episodes))))
    return drawn
