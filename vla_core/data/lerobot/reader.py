"""Reading a LeRobotDataset v3.x or v2.x, whoever wrote it.

What a folder says of itself is checked against its files as they are read: a dataset that was cut off, mixed or changed
by another tool is an error that names the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from vla_core.data.lerobot import layout, tables, video
from vla_core.data.lerobot.entries import EpisodeEntry, read_all, read_episodes, read_tasks
from vla_core.data.lerobot.episode import EpisodeRows, Stats
from vla_core.data.lerobot.layout import AUTOMATIC, Feature, Info, LeRobotError
from vla_core.data.lerobot.parts import Parts
from vla_core.data.lerobot.statistics import STATISTICS, Aggregate, column_statistics, image_statistics, sample_indices
from vla_core.errors import choices

if TYPE_CHECKING:
    import pyarrow as pa

DECODED_AT_ONCE = 256  # frames whose encoded pictures stand in memory


class LeRobotFolder:
    """A dataset on disk; only its description is read at once. Threads may share it.

    Attributes:
        info: ``meta/info.json``.
        tasks: text of each task index.
        episodes: in the order of their index, without gaps.
        stats: of the dataset, or None where it has none.
        description: ``vla_ros/dataset.json``, or None for a dataset of others.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.info = Info.read(self.path)
        self.tasks = read_tasks(self.path, self.info)
        self.episodes = read_episodes(self.path, self.info)
        self.stats = self._read_stats()
        self.description = self._read_description()
        self._data = Parts(self.path, tuple(dict.fromkeys(entry.data_file for entry in self.episodes)))
        self._checked = False

    @property
    def frames_total(self) -> int:
        """Frames of all episodes."""
        return self.info.total_frames

    def column(self, name: str) -> np.ndarray:
        """A column of all frames (N, *shape) in its feature's dtype; automatic columns are (N,)."""
        feature = self._feature(name, visual=False)
        self._check_rows()
        return _numbers(self._data.read([name]), name, feature, self.path)

    def encoded(self, key: str, episode: int) -> list[bytes]:
        """The encoded pictures of an image feature; equal neighbours are one object."""
        return [picture for _, pictures in self._encoded(key, episode) for picture in pictures]

    def images(self, key: str, episode: int, out: np.ndarray | None = None) -> np.ndarray:
        """The pictures (n, H, W, 3) uint8 RGB of a camera in one episode, in ``out`` where it is given."""
        entry, feature = self._entry(episode), self._feature(key, visual=True)
        shape = (entry.length, *feature.shape)
        out = np.empty(shape, np.uint8) if out is None else out
        if out.shape != shape or out.dtype != np.uint8:
            raise LeRobotError(f"{key}: {out.dtype} {out.shape} for pictures of uint8 {shape}")
        if feature.dtype == "video":
            span = entry.videos[key]
            decoded = video.decode(self.path / span.file, self.info.fps, span.start, entry.length)
            for frame, picture in enumerate(decoded):
                _place(picture, out[frame], f"{self.path / span.file}: {key}")
            return out
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for start, pictures in self._encoded(key, episode):
                new = [i for i, picture in enumerate(pictures) if i == 0 or picture is not pictures[i - 1]]
                where = [f"{self.path / entry.data_file}: {key}, frame {start + i}" for i in new]
                list(pool.map(_decode, [pictures[i] for i in new], [out[start + i] for i in new], where))
                for i, until in zip(new, [*new[1:], len(pictures)], strict=True):
                    out[start + i + 1 : start + until] = out[start + i]
        return out

    def frames(self, columns: Sequence[str] | None = None, episode: int | None = None) -> pa.Table | None:
        """Side rows, one a frame, of all episodes or of one; None for a dataset that has none."""
        parts = self._frames_parts
        if parts is None:
            return None
        if parts.rows != self.frames_total:
            raise LeRobotError(f"{self.path}: {parts.rows} side rows for {self.frames_total} frames; the dataset is "
                               "not whole")  # fmt: skip
        if episode is None:
            return parts.read(columns)
        entry = self._entry(episode)
        return parts.read(columns, entry.from_index, entry.from_index + entry.length)

    def past(self, columns: Sequence[str] | None = None, rows: tuple[int, int] | None = None) -> pa.Table | None:
        """Side rows that are no frames, all or those from ``rows[0]`` to ``rows[1]``; None where there are none."""
        parts = self._past_parts
        if parts is None:
            return None
        start, stop = (0, parts.rows) if rows is None else rows
        return parts.read(columns, start, stop)

    def rows(self, episode: int, scratch: Path) -> EpisodeRows:
        """An episode as the writer takes it; its videos are cut out into ``scratch`` without encoding again."""
        entry = self._entry(episode)
        self._check_rows()
        names = [name for name in self.info.columns if name not in AUTOMATIC]
        start, stop = entry.from_index, entry.from_index + entry.length
        table = self._data.read([*names, "task_index"], start, stop)
        columns = {name: _numbers(table, name, self.info.features[name], self.path) for name in names}
        task_index = _numbers(table, "task_index", AUTOMATIC["task_index"], self.path)
        images = {key: self.encoded(key, episode) for key in self.info.cameras if key not in self.info.video_keys}
        videos = {}
        for key, span in entry.videos.items():
            videos[key] = scratch / f"{key}.mp4"
            video.cut(self.path / span.file, self.info.fps, span.start, entry.length, videos[key])
        statistics = {name: column_statistics(column) for name, column in columns.items() if column.dtype != object}
        statistics |= {key: self._camera_statistics(key, episode) for key in self.info.cameras}
        frames, past = self._side_of(episode)
        return EpisodeRows(
            columns=columns, tasks=[self._task(int(index)) for index in task_index], statistics=statistics,
            images=images, videos=videos, frames=frames, past=past,
            entry={} if self.description is None else dict(self.description["episodes"][episode]),
        )  # fmt: skip

    # What the folder says of itself.

    def _feature(self, name: str, visual: bool) -> Feature:
        there = self.info.cameras if visual else self.info.columns
        if name not in there:
            raise LeRobotError(f"{self.path}: no {'camera' if visual else 'column'} {name!r}; choices: "
                               f"{choices(there)}")  # fmt: skip
        feature = self.info.features[name]
        if visual and (len(feature.shape) != 3 or feature.shape[2] != 3):
            raise LeRobotError(f"{self.path}: {name} has shape {feature.shape}; only RGB (height, width, 3) is read")
        return feature

    def _entry(self, episode: int) -> EpisodeEntry:
        if not 0 <= episode < len(self.episodes):
            raise LeRobotError(f"{self.path}: no episode {episode}; there are {len(self.episodes)}")
        return self.episodes[episode]

    def _task(self, index: int) -> str:
        if not 0 <= index < len(self.tasks):
            raise LeRobotError(f"{self.path}: task {index} in a frame; there are {len(self.tasks)}")
        return self.tasks[index]

    def _check_rows(self) -> None:
        """Raise unless the rows of the data files are those of the episodes, in their order; once."""
        if self._checked:
            return
        table = self._data.read(["episode_index", "frame_index"])
        lengths = np.array([entry.length for entry in self.episodes])
        found = [_numbers(table, name, AUTOMATIC[name], self.path) for name in ("episode_index", "frame_index")]
        due = [np.repeat(np.arange(len(lengths)), lengths), np.concatenate([np.arange(n) for n in lengths])]
        if any(not np.array_equal(one, other) for one, other in zip(found, due, strict=True)):
            raise LeRobotError(
                f"{self.path}: the rows of the data files are not those of the episodes in meta; rewrite the dataset "
                "with LeRobot's own tools"
            )
        self._checked = True

    def _read_stats(self) -> Stats | None:
        if (self.path / layout.STATS).is_file():
            plain = layout.read_json(self.path / layout.STATS, "")
            return {key: {name: np.asarray(value) for name, value in found.items()} for key, found in plain.items()}
        if self.info.v30 or not (self.path / layout.EPISODES_STATS_V21).is_file():
            return None
        aggregate = Aggregate()
        for statistics in self._episode_stats:
            aggregate.add(statistics)
        return aggregate.result()

    def _read_description(self) -> dict[str, Any] | None:
        path = self.path / layout.DESCRIPTION
        if not path.parent.is_dir():
            return None
        found = layout.read_json(path, "the folder vla_ros is not whole; remove it, or convert the bags again")
        try:
            lengths = [int(entry["length"]) for entry in found["episodes"]]
        except (KeyError, TypeError, ValueError) as error:
            raise LeRobotError(f"{path}: damaged: {error!r}") from None
        if lengths != [entry.length for entry in self.episodes]:
            raise LeRobotError(f"{path}: speaks of {len(lengths)} episodes that are not the {len(self.episodes)} in "
                               "meta: the dataset was changed by another tool; convert the bags again, or remove the "
                               "folder vla_ros to read it as a dataset of others")  # fmt: skip
        return dict(found)

    @cached_property
    def _episode_stats(self) -> list[Stats]:
        """Statistics of each episode as they are stored; empty where there are none."""
        if not self.info.v30:
            path = self.path / layout.EPISODES_STATS_V21
            if not path.is_file():
                return []
            lines = sorted(layout.read_lines(path, ""), key=lambda line: int(line["episode_index"]))
            return [{key: {name: np.atleast_1d(value) for name, value in found.items()}
                     for key, found in line["stats"].items()} for line in lines]  # fmt: skip
        table = read_all(self.path, "meta/episodes")
        names = [name for name in table.column_names if name.startswith("stats/")]
        stats: list[Stats] = [{} for _ in self.episodes]
        for name in names:
            key, statistic = name.removeprefix("stats/").rsplit("/", 1)
            for episode, value in enumerate(table.column(name).to_pylist()):
                stats[episode].setdefault(key, {})[statistic] = np.atleast_1d(value)
        return stats

    def _camera_statistics(self, key: str, episode: int) -> dict[str, np.ndarray]:
        stored = self._episode_stats[episode].get(key, {}) if episode < len(self._episode_stats) else {}
        if all(name in stored for name in STATISTICS):
            return {name: stored[name] for name in STATISTICS}
        pictures = self.images(key, episode)
        return image_statistics([pictures[index] for index in sample_indices(len(pictures))])

    @cached_property
    def _frames_parts(self) -> Parts | None:
        return self._side("vla_ros/frames")

    @cached_property
    def _past_parts(self) -> Parts | None:
        return self._side("vla_ros/past")

    def _side(self, folder: str) -> Parts | None:
        files = sorted(str(path.relative_to(self.path)) for path in self.path.glob(f"{folder}/*/*.parquet"))
        return Parts(self.path, tuple(files)) if files else None

    def _side_of(self, episode: int) -> tuple[pa.Table | None, pa.Table | None]:
        """Side rows of an episode with references to its own rows, and its rows of the past."""
        frames = self.frames(episode=episode)
        if frames is None or self.description is None:
            return None, None
        lengths = [int(entry.get("past", 0)) for entry in self.description["episodes"]]
        start = sum(lengths[:episode])
        known = "past" in self.description["episodes"][episode]
        past = self.past(rows=(start, start + lengths[episode])) if known else None
        if "history" in frames.column_names:
            place = frames.column_names.index("history")
            own = tables.rebased(frames.column("history"), -self.episodes[episode].from_index, -start)
            frames = frames.set_column(place, frames.schema.field("history"), own)
        return frames, past

    def _encoded(self, key: str, episode: int) -> Iterator[tuple[int, list[bytes]]]:
        """Encoded pictures of an episode in pieces, each with its first frame."""
        entry, feature = self._entry(episode), self._feature(key, visual=True)
        if feature.dtype != "image":
            raise LeRobotError(f"{self.path}: {key} is a video; its pictures are not encoded one by one")
        last: bytes | None = None
        for start in range(0, entry.length, DECODED_AT_ONCE):
            stop = min(start + DECODED_AT_ONCE, entry.length)
            table = self._data.read([key], entry.from_index + start, entry.from_index + stop)
            pictures: list[bytes] = []
            for picture in _bytes_of(table, key, self.path / entry.data_file):
                last = last if picture == last else picture
                assert last is not None
                pictures.append(last)
            yield start, pictures


def _numbers(table: pa.Table, name: str, feature: Feature, folder: Path) -> np.ndarray:
    array = tables.to_numpy(table.column(name), feature, f"{folder}: {name}")
    return array[:, 0] if name in AUTOMATIC else array


def _bytes_of(table: pa.Table, key: str, path: Path) -> list[bytes]:
    """The encoded pictures of a column of images."""
    import pyarrow as pa

    column = table.column(key).combine_chunks()
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = column.field("bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise LeRobotError(f"{path}: {key} holds {kind}; expected encoded pictures")
    if column.null_count:
        raise LeRobotError(
            f"{path}: {key} has {column.null_count} pictures that are names of files; expected them inside"
        )
    return list(column.to_pylist())


def _decode(encoded: bytes, out: np.ndarray, where: str) -> None:
    try:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:  # of no bytes
        picture = None
    if picture is None:
        raise LeRobotError(f"{where}: {len(encoded)} bytes that no picture decodes from")
    _place(picture, out, where)


def _place(picture: np.ndarray, out: np.ndarray, where: str) -> None:
    if picture.shape != out.shape:
        raise LeRobotError(f"{where}: a picture of {picture.shape}; info.json says {out.shape}")
    out[:] = picture
