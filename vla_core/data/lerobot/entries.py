"""What a dataset says of its tasks and episodes, in both versions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_core.data.lerobot import layout, tables
from vla_core.data.lerobot.layout import Info, LeRobotError
from vla_core.errors import choices

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class VideoSpan:
    """Frames of an episode in a video file: ``start`` is the index of the first one."""

    file: str
    start: int


@dataclass(frozen=True)
class EpisodeEntry:
    """Where an episode is: frames ``from_index`` to ``from_index + length`` of the dataset."""

    index: int
    length: int
    from_index: int
    tasks: tuple[str, ...]
    data_file: str
    videos: dict[str, VideoSpan]


def read_tasks(folder: Path, info: Info) -> tuple[str, ...]:
    """The text of each task index."""
    return _tasks_v30(folder) if info.v30 else _tasks_v2(folder)


def read_episodes(folder: Path, info: Info) -> tuple[EpisodeEntry, ...]:
    """The episodes in the order of their index, or an error where the list is not that of info.json."""
    entries = _episodes_v30(folder, info) if info.v30 else _episodes_v2(folder, info)
    at = 0
    for number, entry in enumerate(entries):
        if (entry.index, entry.from_index) != (number, at) or entry.length < 1:
            raise LeRobotError(
                f"{folder}: episode {entry.index} of {entry.length} frames at {entry.from_index}; expected episode "
                f"{number} at {at}: the list of episodes is not whole"
            )
        at += entry.length
    said = info.total_episodes, info.total_frames
    if said != (len(entries), at) or not entries:
        raise LeRobotError(
            f"{folder}: info.json says {said[0]} episodes and {said[1]} frames, and the list of episodes has "
            f"{len(entries)} and {at}: the dataset is not whole"
        )
    return entries


def _tasks_v30(folder: Path) -> tuple[str, ...]:
    """Texts by index: the column that pandas calls the index, under its name or none."""

    path = folder / layout.TASKS_V30
    with tables.reading(path), tables.open_parquet(path) as file:
        table = file.read()
    tables.require(table, ["task_index"], path)
    texts = [name for name in table.column_names if name in ("task", "__index_level_0__")]
    if not texts:
        raise LeRobotError(f"{path}: no column task; there are: {choices(table.column_names)}")
    return _by_index(dict(zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist(), strict=True)), path)


def _tasks_v2(folder: Path) -> tuple[str, ...]:
    path = folder / layout.TASKS_V21
    lines = layout.read_lines(path, "the dataset is not whole")
    try:
        return _by_index({int(line["task_index"]): str(line["task"]) for line in lines}, path)
    except (KeyError, TypeError) as error:
        raise LeRobotError(f"{path}: damaged: {error!r}") from None


def _by_index(tasks: dict[int, str], path: Path) -> tuple[str, ...]:
    if sorted(tasks) != list(range(len(tasks))):
        raise LeRobotError(f"{path}: task indices {sorted(tasks)[:10]}; expected 0 to {len(tasks) - 1}")
    return tuple(tasks[index] for index in range(len(tasks)))


def _episodes_v30(folder: Path, info: Info) -> tuple[EpisodeEntry, ...]:
    names = ["episode_index", "length", "tasks", "dataset_from_index", "data/chunk_index", "data/file_index"]
    for key in info.video_keys:
        names += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    rows = read_all(folder, "meta/episodes", names).to_pylist()
    entries = []
    for row in sorted(rows, key=lambda row: int(row["episode_index"])):
        spans = {
            key: VideoSpan(
                _format(info, info.video_path, video_key=key, chunk_index=row[f"videos/{key}/chunk_index"],
                        file_index=row[f"videos/{key}/file_index"]),
                round(row[f"videos/{key}/from_timestamp"] * info.fps),
            )
            for key in info.video_keys
        }  # fmt: skip
        file = _format(info, info.data_path, chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        entries.append(EpisodeEntry(row["episode_index"], row["length"], row["dataset_from_index"],
                                    tuple(row["tasks"]), file, spans))  # fmt: skip
    return tuple(entries)


def _episodes_v2(folder: Path, info: Info) -> tuple[EpisodeEntry, ...]:
    path = folder / layout.EPISODES_V21
    lines = layout.read_lines(path, "the dataset is not whole")
    entries, at = [], 0
    try:
        for line in sorted(lines, key=lambda line: int(line["episode_index"])):
            index, length = int(line["episode_index"]), int(line["length"])
            where = {"episode_chunk": index // info.chunks_size, "episode_index": index}
            spans = {key: VideoSpan(_format(info, info.video_path, video_key=key, **where), 0)
                     for key in info.video_keys}  # fmt: skip
            tasks = tuple(map(str, line["tasks"]))
            entries.append(EpisodeEntry(index, length, at, tasks, _format(info, info.data_path, **where), spans))
            at += length
    except (KeyError, TypeError, ValueError) as error:
        raise LeRobotError(f"{path}: damaged: {error!r}") from None
    return tuple(entries)


def _format(info: Info, pattern: str | None, **values: Any) -> str:
    try:
        return (pattern or "").format(**values)
    except (KeyError, ValueError, IndexError, TypeError):
        raise LeRobotError(f"info.json: path {pattern!r} cannot be filled in with {choices(values)}") from None


def read_all(folder: Path, under: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of all files of a folder, in the order of their names."""
    import pyarrow as pa

    paths = sorted((folder / under).glob("*/*.parquet"))
    if not paths:
        raise LeRobotError(f"{folder / under}: no parquet file; the dataset is not whole")
    found = []
    for path in paths:
        with tables.reading(path), tables.open_parquet(path) as file:
            tables.require(file.schema_arrow, columns or [], path)
            found.append(file.read(columns=columns))
    return pa.concat_tables(found, promote_options="permissive")
