"""What is in a LeRobotDataset, this project's or another's, and what of it would spoil a training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vla_core.config import from_dict
from vla_core.contract import RobotContract
from vla_core.data.folder import open_folder
from vla_core.data.lerobot import video
from vla_core.data.lerobot.layout import AUTOMATIC
from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.data.side import decode_png
from vla_core.errors import VlaError
from vla_core.inspect import checks
from vla_core.inspect.report import Report, listed, number, size

STATE, ACTION = "observation.state", "action"
LOOKED_AT = 12  # episodes whose pictures are decoded
STILL_S, STILL_FRAMES = 1.0, 10
SAME = 0.05  # mean difference of two pictures of a video that show the same
BLACK = 3.0
ALIKE = 40  # frames of an episode of which none is looked at twice for blackness


@dataclass(frozen=True)
class Columns:
    """The numbers of a dataset: values (N, D) and names by feature; ``starts`` (E + 1,)."""

    values: dict[str, np.ndarray]
    names: dict[str, tuple[str, ...]]
    starts: np.ndarray
    contract: RobotContract | None

    @property
    def lengths(self) -> np.ndarray:
        """Frames (E,) of each episode."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class Frames:
    """Pictures of one camera in one episode: (frame, pixels) of those to show, and what is wrong with the others."""

    camera: str
    episode: int
    shown: tuple[tuple[int, np.ndarray], ...]
    frozen: tuple[int, int]
    black: int
    looked_at: int


def inspect_dataset(path: Path, pictures: bool = True) -> Report:
    """Read all numbers of a dataset and the pictures of some episodes, and report."""
    folder = open_folder(path)
    columns = _columns(folder)
    info, lengths = folder.info, columns.lengths
    contract = columns.contract
    of = f", contract {contract.name}" if contract else f", robot {info.robot_type}" if info.robot_type else ""
    bytes_ = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and ".cache" not in file.parts)
    seconds = len(columns.values[ACTION]) / info.fps if ACTION in columns.values else int(lengths.sum()) / info.fps
    report = Report(
        "dataset", str(path), f"{_count(len(lengths), 'episode')}, {lengths.sum()} frames ({lengths.min()} to "
        f"{lengths.max()} each), LeRobotDataset {info.version}{of} at {info.fps:g} Hz",
    )  # fmt: skip
    report.figures = {"duration": f"{seconds:.1f} s", "episodes": str(len(lengths)), "frames": str(lengths.sum()),
                      "size": size(bytes_)}  # fmt: skip
    report.tiles = [(str(len(lengths)), "episodes"), (f"{lengths.sum():,}", "frames"), (f"{info.fps:g} Hz", "rate"),
                    (f"{seconds / 60:.1f} min", "duration"), (size(bytes_), "on disk"),
                    (str(len(folder.tasks)), "tasks")]  # fmt: skip
    looked = list(_pictures(folder, columns))
    report.warnings = [*_doubts(folder, columns), *_picture_doubts(folder, looked)]
    _describe(report, folder, columns)
    if pictures:
        from vla_core.inspect.dataset_page import sections

        report.sections = sections(folder, columns, looked)
    return report


def _columns(folder: LeRobotFolder) -> Columns:
    """Vectors of numbers; what was missing at a tick is NaN, not the 0 that stands there."""
    if not folder.episodes:
        raise VlaError(f"{folder.path}: a dataset without an episode")
    values, names = {}, {}
    for name in folder.info.columns:
        feature = folder.info.features[name]
        if name in AUTOMATIC or feature.dtype == "string":
            continue
        column = folder.column(name)
        values[name] = column.reshape(len(column), -1).astype(np.float64 if column.dtype == bool else column.dtype)
        width = values[name].shape[1]
        fits = feature.names is not None and len(feature.names) == width
        names[name] = feature.names if fits and feature.names else tuple(map(str, range(width)))
    contract = None
    if folder.description is not None and "contract" in folder.description:
        contract = from_dict(RobotContract, folder.description["contract"], f"{folder.path}: contract")
        if STATE in values:
            values[STATE] = _unmasked(folder, contract, values[STATE])
    starts = np.array([0, *np.cumsum([entry.length for entry in folder.episodes])])
    return Columns(values, names, starts, contract)


def _unmasked(folder: LeRobotFolder, contract: RobotContract, state: np.ndarray) -> np.ndarray:
    assert folder.description is not None
    frames = folder.frames()
    state, place = state.copy(), 0
    for stream in folder.description["observation"].get("state") or ():
        width = len(contract.stream(stream).names)
        if frames is not None and f"age_ns.{stream}" in frames.column_names:
            state[frames.column(f"age_ns.{stream}").is_null().to_numpy(), place : place + width] = np.nan
        place += width
    return state


def _doubts(folder: LeRobotFolder, columns: Columns) -> list[str]:
    found = []
    starts = columns.starts
    seen = {name: columns.values[name] for name in (STATE, ACTION) if name in columns.values}
    for name, values in columns.values.items():
        missing = name == STATE and columns.contract is not None  # NaN stands for what was masked there
        found += [] if missing else checks.not_finite(name, columns.names[name], values)
        found += checks.spread(name, *_moving(columns, name), starts) if name in seen else []
        if folder.stats and name in folder.stats and np.isfinite(values).all():
            found += checks.stored(name, folder.stats[name], values)
    found += checks.episodes(columns.lengths, seen, starts)
    if ACTION in seen:
        found += checks.jumps(ACTION, columns.names[ACTION], seen[ACTION], starts)
        limits = action_limits(columns)
        if limits is not None:
            found += checks.limits(columns.names[ACTION], seen[ACTION], *limits)
    if columns.contract is not None and (frames := folder.frames(["stamp_ns"])) is not None:
        found += checks.holes(frames.column("stamp_ns").to_numpy(), starts, columns.contract.step_ns)
    if any(not task.strip() for task in folder.tasks):
        found.append("an empty task: the instruction is missing")
    return found


def action_limits(columns: Columns) -> tuple[np.ndarray, np.ndarray] | None:
    """The contract's limits (D,) of the column of actions, where it is the contract's; those of a plan row by row."""
    contract = columns.contract
    if contract is None or ACTION not in columns.values:
        return None
    rows, rest = divmod(columns.values[ACTION].shape[1], len(contract.action_names))
    if rest or (rows != 1 and not contract.plans):
        return None
    return np.tile(contract.action_low, rows), np.tile(contract.action_high, rows)


def _moving(columns: Columns, name: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and values of a feature without the first row of plans, which is where the robot is."""
    names, values = columns.names[name], columns.values[name]
    first = len(columns.contract.action_names) if name == ACTION and columns.contract and columns.contract.plans else 0
    return names[first:], values[:, first:]


def _pictures(folder: LeRobotFolder, columns: Columns) -> Iterator[Frames]:
    """Every camera in a sample of the episodes, picture by picture, so that no episode need fit into memory."""
    count = len(folder.episodes)
    for camera in folder.info.cameras:
        for episode in np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int)):
            yield _look(folder, camera, int(episode))


def _look(folder: LeRobotFolder, camera: str, episode: int) -> Frames:
    length = folder.episodes[episode].length
    wanted = sorted({0, length // 2, length - 1})
    sampled = set(np.linspace(0, length - 1, min(length, ALIKE)).astype(int).tolist()) | set(wanted)
    same, shown, black = [], [], 0
    for i, (pixels, is_same) in enumerate(_each(folder, camera, episode, sampled)):
        same.append(is_same)
        if i in sampled:
            black += bool(pixels.mean() < BLACK)
        if i in wanted:
            step = max(1, pixels.shape[0] // 360)
            shown.append((i, pixels[::step, ::step].copy()))
    return Frames(camera, episode, tuple(shown), checks.runs(same), black, len(sampled))


def _each(folder: LeRobotFolder, camera: str, episode: int, wanted: set[int]) -> Iterator[tuple[np.ndarray, bool]]:
    """Each picture (of PNGs those of ``wanted`` alone are decoded), and whether it is the one before once more."""
    entry = folder.episodes[episode]
    nothing = np.zeros((0, 0, 3), np.uint8)
    if camera in entry.videos:
        span, last = entry.videos[camera], nothing
        for picture in video.decode(folder.path / span.file, folder.info.fps, span.start, entry.length):
            alike = last.shape == picture.shape and bool(cv2.absdiff(picture, last).mean() < SAME)
            yield picture, alike
            last = picture
        return
    before: bytes | None = None
    for i, encoded in enumerate(folder.encoded(camera, episode)):
        yield decode_png(encoded) if i in wanted else nothing, encoded is before
        before = encoded


def _picture_doubts(folder: LeRobotFolder, looked: list[Frames]) -> list[str]:
    found = []
    for camera in folder.info.cameras:
        of = [one for one in looked if one.camera == camera]
        least = max(STILL_FRAMES, round(STILL_S * folder.info.fps))
        still = [one for one in of if one.frozen[1] >= least]
        if still:
            named = [f"{one.episode} ({one.frozen[1] / folder.info.fps:.2f} s from frame {one.frozen[0]} on)"
                     for one in still]  # fmt: skip
            found.append(f"{camera}: the same picture for long in {len(still)} of the {len(of)} episodes looked at: "
                         f"{listed(named)}")  # fmt: skip
        black = [f"{one.episode} ({one.black} of {one.looked_at})" for one in of if one.black]
        if black:
            found.append(f"{camera}: black pictures in {len(black)} of the {len(of)} episodes looked at: "
                         f"{listed(black)}")  # fmt: skip
    return found


def _describe(report: Report, folder: LeRobotFolder, columns: Columns) -> None:
    for camera in folder.info.cameras:
        feature = folder.info.features[camera]
        height, width = feature.shape[:2]
        name = camera.removeprefix("observation.images.")
        report.lines.append(f"image {name}: {width}x{height} RGB, {feature.dtype}")
    for feature_name, values in columns.values.items():
        for i, name in enumerate(columns.names[feature_name]):
            column = values[:, i].astype(np.float64)
            shown = _figures(column[np.isfinite(column)])
            report.lines.append(f"{feature_name:<18} {name:<22} {shown}")
    counts = tasks(folder)
    report.lines += [f"instruction: {task!r} ({count} frames)" for task, count in counts.most_common(20)]
    if len(counts) > 20:
        report.lines.append(f"and {len(counts) - 20} more instructions")


def _figures(column: np.ndarray) -> str:
    if not len(column):
        return "(never there)"
    figures = {"min": column.min(), "mean": column.mean(), "max": column.max(), "std": column.std()}
    return "  ".join(f"{key} {number(float(value)):>10}" for key, value in figures.items())


def tasks(folder: LeRobotFolder) -> Counter[str]:
    """Frames of each task."""
    found = Counter(folder.column("task_index").tolist())
    return Counter({folder.tasks[index]: count for index, count in found.items()})


def conversion(folder: LeRobotFolder) -> Mapping[str, Any] | None:
    """The report of the conversion that made the dataset."""
    from vla_core.card import read_json

    found = read_json(folder.path / "vla_ros" / "report.json")
    return found if isinstance(found, dict) else None


def _count(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"
