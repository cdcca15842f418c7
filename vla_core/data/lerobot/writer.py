"""Writing a LeRobotDataset, episode by episode: memory does not grow with their number.

v3.0 fills parquet files of 100 MB and videos of 200 MB with many episodes; v2.1 has a file an episode. Encoded pictures
and videos pass through as they are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

import numpy as np

from vla_core.data.lerobot import layout, tables
from vla_core.data.lerobot.episode import EpisodeRows, Stats
from vla_core.data.lerobot.layout import AUTOMATIC, V30, VERSIONS, Feature, Info, LeRobotError
from vla_core.data.lerobot.meta import episodes_schema, modality, plain, write_tasks
from vla_core.data.lerobot.statistics import STATISTICS, Aggregate, column_statistics
from vla_core.data.lerobot.video import Joined, describe
from vla_core.errors import choices

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP_LIMIT = 128 * tables.MB  # of encoded pictures that stand in memory as one table
EPISODES_AT_ONCE = 64


class LeRobotWriter:
    """A dataset being written; it stands at ``path`` when :meth:`finish` returns, and not before.

    It grows in ``.<name>.partial/dataset`` beside its place. Left by an exception, the context manager aborts;
    otherwise it finishes.

    Args:
        features: all columns and cameras but the automatic columns, in their order.
        description: what dataset.json holds beside ``episodes``; its ``format`` is the caller's. None writes none.
        data_file_mb, video_file_mb: where v3.0 begins a new file.
    """

    def __init__(
        self,
        path: Path,
        *,
        version: str = V30,
        fps: float,
        features: Mapping[str, Feature],
        robot_type: str | None,
        description: Mapping[str, Any] | None,
        data_file_mb: float = layout.DATA_FILE_MB,
        video_file_mb: float = layout.VIDEO_FILE_MB,
    ) -> None:
        if version not in VERSIONS:
            raise LeRobotError(f"LeRobotDataset {version!r} cannot be written; choices: {choices(VERSIONS)}")
        if path.exists():
            raise LeRobotError(f"{path} exists already; remove it or choose another folder")
        _check_features(features)
        if not fps > 0:
            raise LeRobotError(f"fps {fps}; expected a positive number")
        self.path = path
        self.description = None if description is None else dict(description)
        self._info = Info(
            version=version, fps=fps, robot_type=robot_type, features={**features, **AUTOMATIC},
            data_path=layout.DATA_V30 if version == V30 else layout.DATA_V21,
            data_file_mb=data_file_mb, video_file_mb=video_file_mb,
        )  # fmt: skip
        if self._info.video_keys:
            self._info = replace(self._info, video_path=layout.VIDEO_V30 if version == V30 else layout.VIDEO_V21)
        self._folder = path.with_name(f".{path.name}.partial") / "dataset"
        shutil.rmtree(self._folder, ignore_errors=True)
        with tables.writing(self._folder):
            (self._folder / "meta").mkdir(parents=True)
        self._tasks: dict[str, int] = {}
        self._entries: list[dict[str, Any]] = []
        self._frames = self._past = 0
        self._aggregate = Aggregate()
        self._schema = tables.data_schema(self._info.features)
        self._files: dict[str, tables.GrowingParquet] = {}
        self._videos: dict[str, Joined] = {}
        self._video_numbers: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []  # of meta/episodes
        self._lines: dict[str, TextIO] = {}
        self._state: Literal["open", "finished", "aborted"] = "open"

    def add(self, rows: EpisodeRows) -> int:
        """Append an episode; returns its index.

        Rows that do not fit are refused, and the dataset goes on without them. Any other error aborts it: what is
        written in part must not be finished.
        """
        self._check(rows)
        try:
            return self._add(rows)
        except BaseException:
            self.abort()
            raise

    def _add(self, rows: EpisodeRows) -> int:
        index, length = len(self._entries), len(rows)
        for task in rows.tasks:
            self._tasks.setdefault(task, len(self._tasks))
        automatic = self._automatic(rows, index)
        statistics = {key: rows.statistics[key] for key in self._info.features if key not in AUTOMATIC
                      and self._info.features[key].dtype != "string"}  # fmt: skip
        statistics |= {key: column_statistics(column) for key, column in automatic.items()}
        self._aggregate.add(statistics)
        places = self._write_data(rows, {**rows.columns, **automatic}, index)
        places |= self._write_videos(rows, index)
        tasks = list(dict.fromkeys(rows.tasks))
        if self._info.v30:
            self._write_episode(index, length, tasks, places, statistics)
        else:
            self._line(layout.EPISODES_V21, {"episode_index": index, "tasks": tasks, "length": length})
            self._line(layout.EPISODES_STATS_V21, {"episode_index": index, "stats": plain(statistics)})
        self._write_side(rows)
        entry = dict(rows.entry) | {"episode_index": index, "length": length}
        self._entries.append(entry if rows.past is None else entry | {"past": rows.past.num_rows})
        self._frames += length
        return index

    def finish(self) -> None:
        """Write what belongs to the whole dataset and move the folder to its place."""
        self._check_open()
        if not self._entries:
            self.abort()
            raise LeRobotError(f"{self.path}: a dataset of no episodes")
        try:
            self._close_files()
            self._write_meta()
            with tables.writing(self.path):
                _to_disk(self._folder)
                os.replace(self._folder, self.path)
        except BaseException:
            self.abort()
            raise
        self._state = "finished"
        self._remove_parent()

    def abort(self) -> None:
        """Remove what was written; after :meth:`finish` nothing is removed."""
        if self._state != "open":
            return
        self._state = "aborted"
        for file in self._files.values():
            file.abort()
        for video in self._videos.values():
            with suppress(LeRobotError):
                video.close()
        for text in self._lines.values():
            with suppress(OSError):
                text.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._remove_parent()

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if kind is None:
            self.finish()
        else:
            self.abort()

    # What an episode is made of.

    def _check_open(self) -> None:
        if self._state != "open":
            raise LeRobotError(f"{self.path}: the writer is {self._state}; begin another one")

    def _check(self, rows: EpisodeRows) -> None:
        """Raise unless the episode has exactly the features of the dataset, each whole."""
        self._check_open()
        length, features = len(rows), {k: v for k, v in self._info.features.items() if k not in AUTOMATIC}
        if not length:
            raise LeRobotError("an episode of no frames")
        _check_keys("columns", rows.columns, [k for k, v in features.items() if not v.visual])
        _check_keys("images", rows.images, [k for k, v in features.items() if v.dtype == "image"])
        _check_keys("videos", rows.videos, [k for k, v in features.items() if v.dtype == "video"])
        _check_keys("statistics", rows.statistics, [k for k, v in features.items() if v.dtype != "string"])
        for key, column in rows.columns.items():
            _check_column(key, column, features[key], length)
        for key, pictures in rows.images.items():
            if len(pictures) != length:
                raise LeRobotError(f"{key}: {len(pictures)} pictures; expected one for each of {length} frames")
        for key, found in rows.statistics.items():
            _check_keys(f"statistics of {key}", found, STATISTICS, exactly=False)
        if rows.frames is not None and rows.frames.num_rows != length:
            raise LeRobotError(f"{rows.frames.num_rows} side rows; expected one for each of {length} frames")
        if self._entries and (rows.frames is None) == (layout.FRAMES in self._files):
            raise LeRobotError("some episodes have side rows and some have none; expected all or none")

    def _automatic(self, rows: EpisodeRows, index: int) -> dict[str, np.ndarray]:
        frame = np.arange(len(rows), dtype=np.int64)
        return {
            "timestamp": (frame / self._info.fps).astype(np.float32), "frame_index": frame,
            "episode_index": np.full(len(rows), index), "index": frame + self._frames,
            "task_index": np.array([self._tasks[task] for task in rows.tasks], dtype=np.int64),
        }  # fmt: skip

    def _write_data(self, rows: EpisodeRows, columns: dict[str, np.ndarray], index: int) -> dict[str, Any]:
        size = sum(column.nbytes for column in columns.values())
        size += sum(len(picture) for pictures in rows.images.values() for picture in _different(pictures))
        if self._info.v30:
            file = self._file(layout.DATA_V30, self._schema, rows)
            chunk, number = file.reserve(size)
        else:
            chunk, number = index // layout.CHUNKS_SIZE, 0
            name = layout.DATA_V21.format(episode_chunk=chunk, episode_index=index)
            file = self._parquet(name, self._schema, rows)
        for start, stop in _pieces(rows):
            file.write(self._table(rows, columns, start, stop))
        if not self._info.v30:
            file.close()
        return {
            "data/chunk_index": chunk, "data/file_index": number, "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + len(rows),
        }  # fmt: skip

    def _table(self, rows: EpisodeRows, columns: dict[str, np.ndarray], start: int, stop: int) -> pa.Table:
        import pyarrow as pa

        arrays = [
            tables.pictures(rows.images[key][start:stop], start) if key in rows.images
            else tables.to_arrow(columns[key][start:stop], self._info.features[key])
            for key in self._schema.names
        ]  # fmt: skip
        return pa.Table.from_arrays(arrays, schema=self._schema)

    def _write_videos(self, rows: EpisodeRows, index: int) -> dict[str, Any]:
        places: dict[str, Any] = {}
        for key, source in rows.videos.items():
            joined = self._video(key, source, index)
            first = joined.frames
            joined.append(source, len(rows))
            places |= {
                f"videos/{key}/chunk_index": self._video_numbers[key] // layout.CHUNKS_SIZE,
                f"videos/{key}/file_index": self._video_numbers[key] % layout.CHUNKS_SIZE,
                f"videos/{key}/from_timestamp": first / self._info.fps,
                f"videos/{key}/to_timestamp": joined.frames / self._info.fps,
            }  # fmt: skip
            if not self._info.v30:
                joined.close()
            if self._info.features[key].info is None:
                known = replace(self._info.features[key], info=describe(source, self._info.fps))
                self._info = replace(self._info, features={**self._info.features, key: known})
        return places

    def _video(self, key: str, source: Path, index: int) -> Joined:
        """The file that takes the next episode: the present one, until it is full or holds another kind of video."""
        present = self._videos.get(key)
        if present is not None and self._info.v30:
            with tables.reading(source):
                size = source.stat().st_size
            if present.fits(source) and present.bytes + size < self._info.video_file_mb * tables.MB:
                return present
            present.close()
        self._video_numbers[key] = self._video_numbers.get(key, -1) + 1
        chunk, number = divmod(self._video_numbers[key], layout.CHUNKS_SIZE)
        assert self._info.video_path is not None
        name = self._info.video_path.format(
            video_key=key, chunk_index=chunk, file_index=number, episode_index=index, episode_chunk=chunk
        )
        self._videos[key] = Joined(self._folder / name, self._info.fps)
        return self._videos[key]

    def _write_episode(
        self, index: int, length: int, tasks: list[str], places: dict[str, Any], statistics: Stats
    ) -> None:
        row = {"episode_index": index, "tasks": tasks, "length": length, **places}
        row |= {f"stats/{key}/{name}": value.tolist() for key, found in statistics.items()
                for name, value in found.items()}  # fmt: skip
        if layout.EPISODES_V30 not in self._files:
            schema = episodes_schema(self._info, statistics)
            self._files[layout.EPISODES_V30] = self._parquet(layout.EPISODES_V30, schema, None)
        file = self._files[layout.EPISODES_V30]
        chunk, number = file.reserve(16 * len(row))
        self._rows.append(row | {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": number})
        if len(self._rows) == EPISODES_AT_ONCE:
            self._write_rows()

    def _write_rows(self) -> None:
        import pyarrow as pa

        if self._rows:
            file = self._files[layout.EPISODES_V30]
            file.write(pa.Table.from_pylist(self._rows, schema=file.schema))
            self._rows = []

    def _write_side(self, rows: EpisodeRows) -> None:
        for pattern, table in ((layout.FRAMES, rows.frames), (layout.PAST, rows.past)):
            if table is None:
                continue
            if "history" in table.column_names:
                place = table.column_names.index("history")
                history = tables.rebased(table.column("history"), self._frames, self._past)
                table = table.set_column(place, table.schema.field("history"), history)
            file = self._file(pattern, table.schema)
            if table.schema != file.schema:
                raise LeRobotError(f"side rows of {pattern.split('/')[1]} with columns {table.schema.names}; the "
                                   f"first episode had {file.schema.names}, or other types")  # fmt: skip
            file.reserve(table.nbytes)
            file.write(table)
        self._past += 0 if rows.past is None else rows.past.num_rows

    # Files.

    def _file(self, pattern: str, schema: pa.Schema, rows: EpisodeRows | None = None) -> tables.GrowingParquet:
        if pattern not in self._files:
            self._files[pattern] = self._parquet(pattern, schema, rows)
        return self._files[pattern]

    def _parquet(self, pattern: str, schema: pa.Schema, rows: EpisodeRows | None) -> tables.GrowingParquet:
        images = {} if rows is None else rows.images
        repeating = [
            key for key, pictures in images.items() if 4 * sum(1 for _ in _different(pictures)) < 3 * len(rows or ())
        ]
        integers = [field.name for field in schema if str(field.type) in ("int64", "string")]
        # LeRobot makes each episode a row group, so that one can be read alone.
        gather = tables.GATHERED_BYTES if rows is None else 0
        return tables.GrowingParquet(
            self._folder, pattern, schema, limit_mb=self._info.data_file_mb, chunks_size=self._info.chunks_size,
            gather=gather,
            dictionary=[f"{key}.bytes" for key in repeating] + integers, plain=[f"{key}.bytes" for key in images],
        )  # fmt: skip

    def _line(self, name: str, item: dict[str, Any]) -> None:
        with tables.writing(self._folder / name):
            if name not in self._lines:
                self._lines[name] = (self._folder / name).open("w", encoding="utf-8")
            self._lines[name].write(json.dumps(item, ensure_ascii=False) + "\n")

    def _close_files(self) -> None:
        self._write_rows()
        for file in self._files.values():
            file.close()
        for video in self._videos.values():
            video.close()
        for text in self._lines.values():
            with tables.writing(self._folder):
                text.close()

    def _write_meta(self) -> None:
        """Tasks, statistics, this project's description, and last the file that makes the folder a dataset."""
        if self._info.v30:
            write_tasks(self._folder / layout.TASKS_V30, self._tasks)
            self._json(layout.STATS, plain(self._aggregate.result()))
        else:
            for task, index in self._tasks.items():
                self._line(layout.TASKS_V21, {"task_index": index, "task": task})
            with tables.writing(self._folder / layout.TASKS_V21):
                self._lines[layout.TASKS_V21].close()
            self._json(layout.MODALITY, modality(self._info))
        if self.description is not None:
            self._json(layout.DESCRIPTION, self.description | {"episodes": self._entries})
        self._info = replace(
            self._info, total_episodes=len(self._entries), total_frames=self._frames, total_tasks=len(self._tasks),
            splits={"train": f"0:{len(self._entries)}"},
        )  # fmt: skip
        self._json(layout.INFO, self._info.to_dict())

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        path = self._folder / name
        with tables.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")

    def _remove_parent(self) -> None:
        with suppress(OSError):  # the caller may keep something of its own there
            self._folder.parent.rmdir()


def _to_disk(folder: Path) -> None:
    """Past every cache: a power cut after the renaming must not leave a name without content."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            if path.is_file():
                os.fsync(handle)
            else:
                with suppress(OSError):  # some file systems cannot for folders
                    os.fsync(handle)
        finally:
            os.close(handle)


def _check_features(features: Mapping[str, Feature]) -> None:
    for key, feature in features.items():
        if key in AUTOMATIC:
            raise LeRobotError(f"feature {key!r} is written for every dataset; leave it out")
        if "/" in key or not key:
            raise LeRobotError(f"feature {key!r}; LeRobot's names have no '/'")
        if feature.visual and (len(feature.shape) != 3 or feature.shape[2] != 3):
            raise LeRobotError(f"{key}: shape {feature.shape}; expected (height, width, 3)")
        if len(feature.shape) > 5:
            raise LeRobotError(f"{key}: {len(feature.shape)} dimensions; LeRobot has at most 5")
        if feature.names is not None and len(feature.shape) == 1 and len(feature.names) != feature.shape[0]:
            raise LeRobotError(f"{key}: {len(feature.names)} names for {feature.shape[0]} entries")


def _check_keys(what: str, found: Mapping[str, Any], due: Any, exactly: bool = True) -> None:
    missing, more = [key for key in due if key not in found], [key for key in found if key not in due]
    if missing or (more and exactly):
        raise LeRobotError(f"{what} of an episode: {choices(found)}; expected {choices(due)}")


def _check_column(key: str, column: np.ndarray, feature: Feature, length: int) -> None:
    dtype = layout.numpy_dtype(feature)
    if column.dtype != dtype or column.shape != (length, *feature.shape):
        raise LeRobotError(f"{key}: {column.dtype} {column.shape}; expected {dtype} {(length, *feature.shape)}")
    if column.dtype.kind == "f" and not np.isfinite(column).all():
        rows = np.unique(np.nonzero(~np.isfinite(column))[0])
        raise LeRobotError(f"{key}: not finite in {len(rows)} of {length} frames, first in frame {rows[0]}")


def _different(pictures: list[bytes]) -> Iterator[bytes]:
    """Each picture once, where neighbours are the same object."""
    last: bytes | None = None
    for picture in pictures:
        if picture is not last:
            yield picture
        last = picture


def _pieces(rows: EpisodeRows) -> Iterator[tuple[int, int]]:
    """Ranges of frames whose pictures fit in memory beside the encoded ones."""
    start = size = 0
    for frame in range(len(rows)):
        here = sum(len(pictures[frame]) for pictures in rows.images.values())
        if size and size + here > ROW_GROUP_LIMIT:
            yield start, frame
            start, size = frame, 0
        size += here
    yield start, len(rows)
