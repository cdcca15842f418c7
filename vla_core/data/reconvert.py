"""A LeRobotDataset, ours or anybody's, to a dataset of another version, or to one of ours with a contract."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vla_core.config import from_dict, to_dict
from vla_core.contract import RobotContract
from vla_core.data.convert import REPORT, ConvertError, features
from vla_core.data.dataset import Dataset
from vla_core.data.folder import ACTION, FORMAT, IMAGES, STATE, load, open_folder
from vla_core.data.lerobot.episode import EpisodeRows
from vla_core.data.lerobot.layout import INFO, V30
from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.data.lerobot.rewrite import rewrite
from vla_core.data.lerobot.statistics import column_statistics, image_statistics, sample_indices
from vla_core.data.lerobot.writer import LeRobotWriter
from vla_core.data.side import encode_png, side_table
from vla_core.observation.builder import Observation, ObservationSpec


def is_dataset(path: Path) -> bool:
    """Whether a folder is a LeRobotDataset, ours or anybody's."""
    return (path / INFO).is_file()


def reconvert(
    path: Path,
    out: Path,
    *,
    version: str = V30,
    contract: RobotContract | None = None,
    spec: ObservationSpec | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Write the dataset at ``path`` again as ``out``; returns in one line what was done.

    A dataset of ours keeps everything, bit for bit; it already has a contract, and was built for one observation. One
    of others keeps everything too, and is one of theirs still, unless ``contract`` and ``spec`` are given: then its
    columns are bound to them by name and it becomes one of ours. What they do not name is left out.

    Args:
        progress: called with the number of episodes that are done, and of all.
    """
    if out.exists():
        raise ConvertError(f"{out} exists already; remove it or choose another folder")
    source = open_folder(path)
    total = len(source.episodes)
    if source.description is None and contract is not None:
        if spec is None:
            raise ConvertError(f"{path}: a contract says what the columns are, but not what a policy sees of them; "
                               "name a recipe too")  # fmt: skip
        _adopt(source, load(path, contract, spec, cache="none"), out, version, progress)
        return f"{total} episodes of {path} are bound to the contract {contract.name}"
    if source.description is not None:
        _check_same(source, contract, spec)

    def step(done: int) -> None:
        if done == total and (path / REPORT).is_file():  # before the folder is renamed: then it must be whole
            target = out.with_name(f".{out.name}.partial") / "dataset" / REPORT
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path / REPORT, target)
        progress(done, total)

    rewrite(source, out, version=version, progress=step)
    kept = "; it has no contract, so name one with --contract to train on it" if source.description is None else ""
    return f"{total} episodes of {path} ({source.info.version}) are now {version}{kept}"


def _check_same(source: LeRobotFolder, contract: RobotContract | None, spec: ObservationSpec | None) -> None:
    assert source.description is not None
    if contract is not None:
        own = from_dict(RobotContract, source.description["contract"], "contract")
        contract.check_same(own, "the contract given", str(source.path))
    if spec is not None and to_dict(spec) != source.description["observation"]:
        raise ConvertError(f"{source.path}: was built for another observation than the recipe's; convert its bags for "
                           "this one, or leave the recipe out")  # fmt: skip


def _adopt(
    source: LeRobotFolder, dataset: Dataset, out: Path, version: str, progress: Callable[[int, int], None]
) -> None:
    """Write a bound dataset as one of ours; its stamps are multiples of the step, its samples as old as its frames."""
    contract, spec = dataset.contract, dataset.spec
    description = {"format": FORMAT, "contract": to_dict(contract), "observation": to_dict(spec), "left_out": []}
    with LeRobotWriter(
        out, version=version, fps=contract.rate_hz, features=features(contract, spec, False, dataset.plan_rows),
        robot_type=source.info.robot_type, description=description,
    ) as writer:  # fmt: skip
        for entry in dataset.episodes:
            start = int(dataset.starts[entry.index])
            writer.add(_rows(dataset, np.arange(start, start + entry.length), entry.index))
            progress(entry.index + 1, len(dataset.episodes))


def _rows(dataset: Dataset, frames: np.ndarray, episode: int) -> EpisodeRows:
    contract, spec = dataset.contract, dataset.spec
    columns = {ACTION: dataset.action[frames].reshape(len(frames), -1)}
    if spec.state:
        columns[STATE] = np.ascontiguousarray(dataset.state[frames], dtype=np.float32)
    statistics = {key: column_statistics(column) for key, column in columns.items()}
    images: dict[str, list[bytes]] = {}
    sample = frames[sample_indices(len(frames))]
    for name, pictures in dataset.images.items():
        encoded: list[bytes] = []
        for frame in frames:
            same = frame > frames[0] and pictures.rows[frame] == pictures.rows[frame - 1]
            encoded.append(encoded[-1] if same else encode_png(pictures[int(frame)]))
        images[f"{IMAGES}{name}"] = encoded
        statistics[f"{IMAGES}{name}"] = image_statistics([pictures[int(frame)] for frame in sample])
    ages = {name: 0 for _, name, _ in spec.uses()}
    blank = Observation(0, {}, np.zeros(0, dtype=np.float32), "", ages)
    rows = side_table([blank] * len(frames), contract, spec)
    stamps = side_table([], contract, spec).schema.get_field_index("stamp_ns")
    return EpisodeRows(
        columns=columns, tasks=[dataset.instruction(int(frame)) for frame in frames], statistics=statistics,
        images=images, frames=rows.set_column(stamps, rows.schema.field("stamp_ns"), [dataset.stamps_ns[frames]]),
        entry={"bag": "", "seed": -1, "task": "", "outcome": "unknown", "dropped_ticks": 0, "source": dataset.name,
               "source_episode": episode},
    )  # fmt: skip
