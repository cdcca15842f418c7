"""The training set: episodes of one contract and one observation spec, as arrays over all their frames.

Legend: N frames, E episodes, S entries of the state, A entries of the action, H rows of a plan, B rows of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from vla_core.contract import RobotContract
from vla_core.data.frame_cache import Cache, Pictures
from vla_core.errors import VlaError
from vla_core.observation.builder import Observation, ObservationSpec
from vla_core.observation.normalizer import Statistics, compute_statistics

STATISTICS_FRAMES = 1000


class DatasetError(VlaError):
    """A dataset that cannot be written or read."""


class Observations(Protocol):
    """Whole observations by frame, for specs with more than single images, a state and an instruction."""

    def __getitem__(self, frame: int) -> Observation: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class EpisodeEntry:
    """What is known of an episode beside its frames; ``instruction`` is that of its first frame."""

    index: int
    length: int
    bag: str = ""
    instruction: str = ""
    seed: int = -1
    task: str = ""
    outcome: str = "unknown"
    dropped_ticks: int = 0


@dataclass(frozen=True)
class EpisodeData:
    """Arrays of one episode of N ticks: images (N, h, w, 3) uint8, state (N, S) and action (N, A) float32.

    ``action`` is (N, H, A) where the contract's actions are plans.

    ``executed`` (N, A) and ``reward`` (N,) float32 are what was executed instead of ``action``, and what it earned;
    ``intervened`` (N,) bool, where somebody had taken over.
    ``observations`` has the whole observation of each tick where the spec has extras or streams are missing; images,
    state and instruction are taken from the arrays all the same.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray
    stamps_ns: np.ndarray
    instruction: str
    seed: int
    bag: str
    task: str = ""
    outcome: str = "unknown"
    observations: tuple[Observation, ...] = ()
    executed: np.ndarray | None = None
    reward: np.ndarray | None = None
    intervened: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.action)


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """Episodes of one contract and one observation spec.

    ``state`` (N, S) and ``action`` (N, A) float32 in physical units, or (N, H, A) where a tick is answered by a whole
    plan (``RobotContract.plans``); ``stamps_ns`` (N,) int64, one control step apart within an episode but where ticks
    were dropped; ``task_index`` (N,) is the row of each frame's instruction in ``tasks``; ``images`` camera ->
    :class:`Pictures` (N, h, w, 3) uint8.

    ``present`` stream -> (N,) bool for streams that are missing at some frames (black picture, NaN in the state).
    ``observations`` gives whole observations where the spec has extras. ``window_rows`` (M,) are the frames at which a
    training window may start, all of them unless a filter took some out.

    ``executed`` (N, A) and ``reward`` (N,) float32 are what was executed, where that may be something else than the
    label ``action``, and what it earned; None where nobody recorded them. ``intervened`` (N,) bool tells the frames
    whose action is of whoever had taken over from a policy; None where no policy drove. ``shown`` (N,) bool are the
    frames whose actions a policy is to imitate, all of them unless a filter took some out. ``truths`` name -> (N,) str
    is what was true of the world, in a word; "" where nobody said.
    """

    name: str
    contract: RobotContract
    spec: ObservationSpec
    episodes: tuple[EpisodeEntry, ...]
    state: np.ndarray
    action: np.ndarray
    stamps_ns: np.ndarray
    tasks: tuple[str, ...]
    task_index: np.ndarray
    images: Mapping[str, Pictures] = field(default_factory=dict)
    present: Mapping[str, np.ndarray] = field(default_factory=dict)
    observations: Observations | None = None
    window_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    executed: np.ndarray | None = None
    reward: np.ndarray | None = None
    intervened: np.ndarray | None = None
    shown: np.ndarray | None = None
    truths: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """N, the ticks of all episodes."""
        return len(self.action)

    @property
    def plan_rows(self) -> int | None:
        """H, the rows of each frame's plan; None where a frame has one action."""
        return self.action.shape[1] if self.contract.plans else None

    @cached_property
    def starts(self) -> np.ndarray:
        """(E + 1,) int64: the first frame of each episode, and N."""
        return np.cumsum([0, *(entry.length for entry in self.episodes)], dtype=np.int64)

    @cached_property
    def episode_of(self) -> np.ndarray:
        """(N,) int64: the place of each frame's episode in ``episodes``."""
        return np.repeat(np.arange(len(self.episodes)), np.diff(self.starts))

    def instruction(self, row: int) -> str:
        """The instruction at a frame."""
        return self.tasks[self.task_index[row]]

    def statistics(self) -> Statistics:
        """As :func:`statistics_of` this dataset alone."""
        return statistics_of([self])

    def select(self, episodes: Sequence[int]) -> Dataset:
        """Only the episodes at these places, in this order; no picture is copied."""
        if not len(episodes):
            raise DatasetError(f"{self.name}: no episode is left")
        starts = self.starts
        rows = np.concatenate([np.arange(starts[e], starts[e + 1]) for e in episodes])
        used, task_index = np.unique(self.task_index[rows], return_inverse=True)
        allowed = np.zeros(self.frames, dtype=bool)
        allowed[self.window_rows] = True
        return dataclasses.replace(
            self,
            episodes=tuple(self.episodes[e] for e in episodes),
            state=self.state[rows], action=self.action[rows], stamps_ns=self.stamps_ns[rows],
            tasks=tuple(self.tasks[i] for i in used), task_index=task_index,
            images={name: pictures.take(rows) for name, pictures in self.images.items()},
            present={name: there[rows] for name, there in self.present.items()},
            observations=None if self.observations is None else _Selected(self.observations, rows),
            window_rows=np.flatnonzero(allowed[rows]),
            executed=None if self.executed is None else self.executed[rows],
            reward=None if self.reward is None else self.reward[rows],
            intervened=None if self.intervened is None else self.intervened[rows],
            shown=None if self.shown is None else self.shown[rows],
            truths={name: words[rows] for name, words in self.truths.items()},
        )  # fmt: skip

    @classmethod
    def from_episodes(
        cls, contract: RobotContract, spec: ObservationSpec, episodes: Sequence[EpisodeData], name: str = "memory"
    ) -> Dataset:
        """A dataset in memory."""
        if not episodes:
            raise DatasetError(f"{name}: no episodes")
        shapes = {e.action.shape[1:] for e in episodes}
        if len(shapes) > 1 or any(len(shape) != 1 + contract.plans for shape in shapes):
            expected = "one (rows, entries) of all plans" if contract.plans else "(entries,)"
            raise DatasetError(f"{name}: actions of shapes {sorted(shapes)}, expected {expected}")
        tasks = tuple(dict.fromkeys(e.instruction for e in episodes))
        lengths = [len(e) for e in episodes]
        frames = np.arange(sum(lengths))
        seen = tuple(o for e in episodes for o in e.observations)
        if spec.extras and len(seen) != len(frames):
            raise DatasetError(f"{name}: {', '.join(spec.extras)} need whole observations, found {len(seen)} of "
                               f"{len(frames)} frames")  # fmt: skip
        streams = dict.fromkeys(name for _, name, _ in spec.uses()) if seen else ()
        present = {name: np.array([o.present.get(name, True) for o in seen]) for name in streams}
        return cls(
            name=name, contract=contract, spec=spec,
            episodes=tuple(
                EpisodeEntry(index=i, length=len(e), bag=e.bag, instruction=e.instruction, seed=e.seed, task=e.task,
                             outcome=e.outcome)
                for i, e in enumerate(episodes)
            ),
            state=np.concatenate([e.state for e in episodes]),
            action=np.concatenate([e.action for e in episodes]),
            stamps_ns=np.concatenate([e.stamps_ns for e in episodes]),
            tasks=tasks,
            task_index=np.repeat([tasks.index(e.instruction) for e in episodes], lengths),
            images={n: Pictures(np.concatenate([e.images[n] for e in episodes]), frames) for n in spec.images},
            present={name: there for name, there in present.items() if not there.all()},
            observations=seen if spec.extras else None,
            window_rows=frames,
            executed=_of_all([e.executed for e in episodes], name, "executed"),
            reward=_of_all([e.reward for e in episodes], name, "reward"),
            intervened=_as_bool(_of_all([e.intervened for e in episodes], name, "intervened")),
        )  # fmt: skip


def statistics_of(datasets: Sequence[Dataset]) -> Statistics:
    """Statistics of ``state`` and ``action`` over all frames of datasets of one layout; of clouds, sequences and maps,
    over up to 1,000 frames spread evenly, under their stream's name.

    Plans have statistics of each of their rows. What is missing does not count.
    """
    first = datasets[0]
    found = {"state": _state_statistics(datasets),
             "action": compute_statistics(np.concatenate([data.action for data in datasets]))}  # fmt: skip
    if first.observations is None:
        return found
    ends = np.cumsum([data.frames for data in datasets])
    rows = np.unique(np.linspace(0, ends[-1] - 1, STATISTICS_FRAMES).round().astype(np.int64))
    seen = [_observation(datasets, ends, int(row)) for row in rows]
    for name in (*first.spec.clouds, *first.spec.sequences, *first.spec.maps):
        values = [_values(observation, name) for observation in seen]
        there = [value for value in values if value is not None and len(value)]
        if there:  # a stream that is never there has no statistics, and no use for them
            found[name] = compute_statistics(np.concatenate(there))
    return found


def _observation(datasets: Sequence[Dataset], ends: np.ndarray, row: int) -> Observation:
    """The observation of a row of all datasets' frames."""
    place = int(np.searchsorted(ends, row, side="right"))
    observations = datasets[place].observations
    assert observations is not None, "datasets of one layout"
    return observations[row - int(ends[place]) + datasets[place].frames]


def _state_statistics(datasets: Sequence[Dataset]) -> dict[str, list[float]]:
    """Of each stream's entries where the stream is there."""
    first, parts, place = datasets[0], [], 0
    for name in first.spec.state:
        entries = slice(place, place := place + len(first.contract.stream(name).names))
        there = [data.present.get(name, np.ones(data.frames, dtype=bool)) for data in datasets]
        rows = np.concatenate([data.state[mask] for data, mask in zip(datasets, there, strict=True)])
        if not len(rows):
            names, frames = ", ".join(data.name for data in datasets), sum(data.frames for data in datasets)
            raise DatasetError(f"{names}: {name} is missing at all {frames} frames")
        parts.append(compute_statistics(rows[:, entries]))
    if not parts:
        return compute_statistics(np.concatenate([data.state for data in datasets]))
    joined = {key: [value for part in parts for value in part[key]] for key in parts[0] if key != "count"}
    return {**joined, "count": [min(part["count"][0] for part in parts)]}


def _of_all(parts: Sequence[np.ndarray | None], name: str, what: str) -> np.ndarray | None:
    """One array of what all episodes have, or none of them."""
    there = [part for part in parts if part is not None]
    if there and len(there) < len(parts):
        raise DatasetError(
            f"{name}: {len(there)} of {len(parts)} episodes have {what}; give it for all of them, or none"
        )
    return np.concatenate(there).astype(np.float32) if there else None


def _as_bool(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else values > 0.5


def _values(observation: Observation, name: str) -> np.ndarray | None:
    """What a model sees of a cloud, a sequence or a map, as rows (n, C); None where it is missing."""
    if name in observation.maps:
        cells = observation.maps[name]
        return cells[np.isfinite(cells)].reshape(-1, 1)
    if name in observation.sequences:
        window = observation.sequences[name]
        rows = window.values[window.mask]
    elif name in observation.clouds:
        rows = observation.clouds[name]
    else:
        return None
    finite: np.ndarray = rows[np.isfinite(rows).all(axis=1)]
    return finite


@dataclass(frozen=True)
class _Selected:
    """Observations of some frames of another dataset."""

    source: Observations
    rows: np.ndarray

    def __getitem__(self, frame: int) -> Observation:
        return self.source[int(self.rows[frame])]

    def __len__(self) -> int:
        return len(self.rows)


def load(
    path: Path | str,
    contract: RobotContract | None = None,
    spec: ObservationSpec | None = None,
    cache: Cache = "disk",
    name: str | None = None,
) -> Dataset:
    """Open a dataset on disk: :func:`vla_core.data.folder.load`."""
    from vla_core.data import folder  # which makes a Dataset, and so imports this module

    return folder.load(path, contract, spec, cache, name)
