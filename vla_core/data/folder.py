"""A LeRobotDataset on disk as a training set: ours, whose contract is in it, or anybody's with a contract given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_core.config import from_dict
from vla_core.contract import RobotContract
from vla_core.data.dataset import Dataset, DatasetError, EpisodeEntry
from vla_core.data.frame_cache import Cache, Pictures, cached, open_pictures
from vla_core.data.happened import EXECUTED, INTERVENED, REWARD, TRUTH_COLUMN
from vla_core.data.lerobot.layout import VISUAL, Info
from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.data.plans import plan_names
from vla_core.data.side import Seen, SideRows, with_gaps
from vla_core.errors import choices
from vla_core.observation.builder import Observation, ObservationSpec

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "vla_ros_dataset_v2"
IMAGES = "observation.images."
STATE, ACTION = "observation.state", "action"


def load(
    path: Path | str,
    contract: RobotContract | None = None,
    spec: ObservationSpec | None = None,
    cache: Cache = "disk",
    name: str | None = None,
) -> Dataset:
    """Open a dataset; of its pictures only those are decoded that are not in the cache yet.

    Args:
        contract: of a dataset that has none of its own (it was not made by ``vla convert``), whose columns are bound
            to the contract's streams and actions by name; where there is one, ours must be the same.
        spec: what a policy is to see. None takes what a dataset of ours was made for; fewer of its streams may be
            asked for. For others' datasets it is needed, and pictures of another size are resized.
        cache: where decoded pictures are kept (:func:`vla_core.data.frame_cache.open_pictures`).
        name: what the dataset is called in messages, weights and statistics; None takes the folder's name.

    Raises:
        DatasetError: for what cannot be bound, with the choices.
    """
    folder = open_folder(path)
    name = name or folder.path.resolve().name
    if folder.description is None:
        if contract is None or spec is None:
            raise DatasetError(f"{path}: has no contract of its own (it was not made by vla convert), so it needs one, "
                               "and the observation that the policy is to see")  # fmt: skip
        entries = [{"length": e.length, "task": "", "instruction": " / ".join(e.tasks)} for e in folder.episodes]
    else:
        own, made_for, entries = _described(folder.path, folder.description)
        if contract is not None:
            contract.check_same(own, "the contract given", str(path))
        contract = own
        spec = made_for if spec is None else _part_of(made_for, spec, folder.path)
    _check_rate(folder, contract)
    data = _read(folder, name, contract, spec, entries, cache)
    _release()
    return data


def open_folder(path: Path | str) -> LeRobotFolder:
    """The folder itself; says what to do about one that the first version of this package made."""
    if (Path(path) / "dataset.json").is_file() and not (Path(path) / "meta").is_dir():
        raise DatasetError(f"{path}: is of the format vla_ros_dataset_v1, expected {FORMAT}; convert the bags again")
    return LeRobotFolder(path)


def _described(path: Path, plain: dict[str, Any]) -> tuple[RobotContract, ObservationSpec, list[dict[str, Any]]]:
    if plain.get("format") != FORMAT:
        raise DatasetError(f"{path}: format {plain.get('format')!r}, expected {FORMAT!r}; convert the bags again")
    try:
        contract = from_dict(RobotContract, plain["contract"], "contract")
        return contract, from_dict(ObservationSpec, plain["observation"], "observation"), plain["episodes"]
    except KeyError as error:
        raise DatasetError(f"{path}/vla_ros/dataset.json: has no {error}; convert the bags again") from None


def _read(
    folder: LeRobotFolder, name: str, contract: RobotContract, spec: ObservationSpec, entries: list[dict[str, Any]],
    cache: Cache,
) -> Dataset:  # fmt: skip
    task_index = folder.column("task_index").astype(np.int64)
    used, task_index = np.unique(task_index, return_inverse=True)
    tasks = tuple(folder.tasks[i] for i in used)
    action = _actions(folder, contract)
    state = np.zeros((len(action), 0), dtype=np.float32)
    if spec.state:
        state = folder.column(STATE)[:, _bind(folder.info, STATE, _wanted_state(contract, spec), str(folder.path))]
    starts = np.cumsum([0, *(e.length for e in folder.episodes)])
    images = {}
    for camera, size in spec.images.items():
        images[camera] = open_pictures(folder, _camera(folder, camera), size, cache)
    stamps = folder.column("frame_index").astype(np.int64) * contract.step_ns
    present: dict[str, np.ndarray] = {}
    side = folder.frames(["stamp_ns", *(f"age_ns.{n}" for n in _streams(spec))]) if folder.description else None
    if side is not None:
        stamps = side.column("stamp_ns").to_numpy()
        there = {n: side.column(f"age_ns.{n}").is_valid().to_numpy() for n in _streams(spec)}
        present = {n: seen for n, seen in there.items() if not seen.all()}
        # LeRobot's column has numbers where a stream was missing.
        state = with_gaps(state, {n: ~seen for n, seen in there.items()}, contract, spec)
    elif spec.extras:
        raise DatasetError(f"{folder.path}: has no {', '.join(spec.extras)}; only what vla convert makes of bags has "
                           "more than images, a state and an instruction")  # fmt: skip
    return Dataset(
        name=name, contract=contract, spec=spec,
        episodes=tuple(_entry(i, plain, tasks[task_index[starts[i]]]) for i, plain in enumerate(entries)),
        state=state, action=np.ascontiguousarray(action, dtype=np.float32),
        stamps_ns=stamps, tasks=tasks, task_index=task_index, images=images, present=present,
        observations=_replayed(folder, contract, spec, cache, images, state, tasks, task_index),
        window_rows=np.arange(len(action)), executed=_optional(folder, EXECUTED, len(contract.action_names)),
        reward=_optional(folder, REWARD, None), intervened=_intervened(folder), truths=_truths(folder),
    )  # fmt: skip


def _actions(folder: LeRobotFolder, contract: RobotContract) -> np.ndarray:
    """Actions (N, A), or plans (N, H, A) from a column of H * A entries, whose names say so or are not there."""
    if not contract.plans:
        return folder.column(ACTION)[:, _bind(folder.info, ACTION, _wanted_actions(contract), str(folder.path))]
    if ACTION not in folder.info.features:
        raise DatasetError(f"{folder.path}: no column {ACTION}; choices: {choices(folder.info.columns)}")
    feature, width = folder.info.features[ACTION], len(contract.action_names)
    rows, rest = divmod(int(np.prod(feature.shape)), width)
    expected = plan_names(contract, max(rows, 1))
    if rest or (feature.names is not None and feature.names != expected):
        found = f"shape {feature.shape}" if feature.names is None else f"entries {choices(feature.names)}"
        raise DatasetError(f"{folder.path}: {ACTION} has {found}, the contract {contract.name!r} has plans; expected "
                           f"them row by row: {', '.join(expected[: width + 1])}, ...")  # fmt: skip
    return folder.column(ACTION).reshape(-1, rows, width)


def _optional(folder: LeRobotFolder, name: str, width: int | None) -> np.ndarray | None:
    """A column (N, width), or (N,), of what happened (:mod:`vla_core.data.happened`); None where there is none."""
    if name not in folder.info.features:
        return None
    found = np.asarray(folder.column(name), dtype=np.float32)
    return found.reshape(len(found)) if width is None else found.reshape(len(found), width)


def _intervened(folder: LeRobotFolder) -> np.ndarray | None:
    found = _optional(folder, INTERVENED, None)
    return None if found is None else found > 0.5


def _truths(folder: LeRobotFolder) -> dict[str, np.ndarray]:
    """What was true at each frame (N,), in words."""
    names = [name for name, feature in folder.info.features.items()
             if name.startswith(TRUTH_COLUMN) and feature.dtype == "string"]  # fmt: skip
    return {name.removeprefix(TRUTH_COLUMN): folder.column(name).reshape(-1).astype(str) for name in names}


def _entry(index: int, plain: dict[str, Any], instruction: str) -> EpisodeEntry:
    return EpisodeEntry(
        index=index, length=int(plain["length"]), bag=str(plain.get("bag", "")), instruction=instruction,
        seed=int(plain.get("seed", -1)), task=str(plain.get("task", "")), outcome=str(plain.get("outcome", "unknown")),
        dropped_ticks=int(plain.get("dropped_ticks", 0)),
    )  # fmt: skip


def _check_rate(folder: LeRobotFolder, contract: RobotContract) -> None:
    fps, rate = folder.info.fps, contract.rate_hz
    if abs(fps - rate) <= 1e-3 * rate:
        return
    raise DatasetError(f"{folder.path}: {fps:g} frames a second, the contract {contract.name!r} has rate_hz {rate:g}: "
                       f"actions of one rate are not those of another, so frames cannot just be left out; set rate_hz "
                       f"to {fps:g} and execute at that rate, or record at {rate:g}")  # fmt: skip


def _part_of(whole: ObservationSpec, wanted: ObservationSpec, path: Path) -> ObservationSpec:
    """``wanted``, if it can be had bit for bit of a dataset that was made for ``whole``."""
    if wanted == whole:
        return wanted
    lacking = [f"images.{n} {s.width}x{s.height}" for n, s in wanted.images.items() if whole.images.get(n) != s]
    lacking += [f"state.{n}" for n in wanted.state if n not in whole.state]
    if wanted.instruction and wanted.instruction != whole.instruction:
        lacking.append(f"instruction {wanted.instruction}")
    lacking += [f"clouds.{n}" for n, cloud in wanted.clouds.items() if whole.clouds.get(n) != cloud]
    lacking += [f"sequences.{n}" for n in wanted.sequences if n not in whole.sequences]
    lacking += [f"maps.{n}" for n in wanted.maps if n not in whole.maps]
    lacking += [f"calibrations.{n}" for n, c in wanted.calibrations.items() if whole.calibrations.get(n) != c]
    if wanted.history > 1:  # the past ticks of a dataset are whole ones
        lacking.append(f"history {wanted.history} of these streams alone")
    if lacking:
        raise DatasetError(f"{path}: was built for another observation; it has no {', '.join(lacking)}; convert the "
                           f"bags again (it was built for {whole})")  # fmt: skip
    return wanted


def _camera(folder: LeRobotFolder, camera: str) -> str:
    """The feature of a camera: its full name, or what follows ``observation.images.``"""
    for key in (camera, IMAGES + camera):
        if key in folder.info.features and folder.info.features[key].dtype in VISUAL:
            return key
    raise DatasetError(f"{folder.path}: no camera {IMAGES}{camera}; choices: {choices(folder.info.cameras)}")


def _bind(info: Info, key: str, wanted: Sequence[tuple[str, str]], path: str) -> np.ndarray:
    """The column's entry of each (stream, entry) that is wanted, by ``stream.entry`` or by ``entry`` alone.

    A column whose entries have no names is bound by its order, if it is as wide as what is wanted.
    """
    if key not in info.features:
        raise DatasetError(f"{path}: no column {key}; choices: {choices(info.columns)}")
    feature = info.features[key]
    if feature.names is None:
        if feature.shape != (len(wanted),):
            raise DatasetError(f"{path}: {key} has shape {feature.shape} and no names, the contract has {len(wanted)}: "
                               f"{', '.join(entry for _, entry in wanted)}")  # fmt: skip
        return np.arange(len(wanted))
    places = []
    for stream, entry in wanted:
        found = [i for i, name in enumerate(feature.names) if name == f"{stream}.{entry}"]
        found = found or [i for i, name in enumerate(feature.names) if name == entry]
        if len(found) != 1:
            what = "no entry" if not found else "several entries"
            raise DatasetError(
                f"{path}: {key} has {what} {stream}.{entry} or {entry}; choices: {choices(feature.names)}"
            )
        places += found
    return np.array(places)


def _wanted_state(contract: RobotContract, spec: ObservationSpec) -> list[tuple[str, str]]:
    return [(name, entry) for name in spec.state for entry in contract.stream(name).names]


def _wanted_actions(contract: RobotContract) -> list[tuple[str, str]]:
    return [(name, entry) for name, action in contract.actions.items() for entry in action.names]


def _streams(spec: ObservationSpec) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, name, _ in spec.uses()))


@dataclass(frozen=True)
class _Replayed:
    """Whole observations, put together of the side rows and the standard columns."""

    side: SideRows
    images: dict[str, Pictures]
    state: np.ndarray
    tasks: tuple[str, ...]
    task_index: np.ndarray

    def __getitem__(self, frame: int) -> Observation:
        return self.side.observation(frame, self._seen)

    def __len__(self) -> int:
        return len(self.side)

    def _seen(self, row: int) -> Seen:
        pictures = {name: camera[row] for name, camera in self.images.items()}
        return Seen(pictures, self.state[row], self.tasks[self.task_index[row]])


def _replayed(
    folder: LeRobotFolder, contract: RobotContract, spec: ObservationSpec, cache: Cache, images: dict[str, Pictures],
    state: np.ndarray, tasks: tuple[str, ...], task_index: np.ndarray,
) -> _Replayed | None:  # fmt: skip
    if not spec.extras:
        return None
    if cache == "disk":
        place = cached(folder.path, "side", lambda partial: _unpack(folder, partial))
        tables = _mapped(place / "frames.arrow"), _mapped(place / "past.arrow")
    else:
        tables = folder.frames(), folder.past()
    assert tables[0] is not None
    return _Replayed(SideRows(tables[0], tables[1], contract, spec), images, state, tasks, task_index)


def _unpack(folder: LeRobotFolder, place: Path) -> None:
    """Side rows as Arrow files, which can be mapped: clouds of a large dataset are more than a memory holds."""
    count = len(folder.episodes)
    _write(place / "frames.arrow", (folder.frames(episode=episode) for episode in range(count)))
    assert folder.description is not None, "others' datasets have no side rows"
    ends = np.cumsum([0, *(int(entry.get("past", 0)) for entry in folder.description["episodes"])]).tolist()
    _write(place / "past.arrow", (folder.past(rows=(ends[i], ends[i + 1])) for i in range(count)))


def _write(file: Path, tables: Iterator[pa.Table | None]) -> None:
    import pyarrow as pa

    writer = None
    for table in tables:
        if table is not None:
            writer = writer or pa.ipc.new_file(str(file), table.schema)
            writer.write_table(table)
    if writer is not None:
        writer.close()


def _release() -> None:
    """Give back what Arrow keeps for its next read: a run reads once, and then trains for hours."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def _mapped(file: Path) -> pa.Table | None:
    """An Arrow file as a table whose columns stay on the disk until they are read."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(file))).read_all() if file.is_file() else None
