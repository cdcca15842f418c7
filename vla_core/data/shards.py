"""One bag to a shard: its episodes as files that the dataset is put together from.

A shard is a folder named by a fingerprint of its bag and of what was asked for; it appears whole or not at all, so a
conversion that was killed goes on from the shards that are there. An episode's numbers, its side rows and its pictures
are Arrow files that grow while the bag is read and are mapped into memory when they are used: memory grows neither with
the number of bags nor with their length.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from vla_core.config import to_dict
from vla_core.contract import RobotContract
from vla_core.data import side
from vla_core.data.bag import CONTRACT_KEY, BagError, opened
from vla_core.data.episodes import EpisodeInfo, EpisodeReader, Tick
from vla_core.data.folder import ACTION, IMAGES, STATE
from vla_core.data.happened import EXECUTED, INTERVENED, REWARD, CommandsAndMore, Happened
from vla_core.data.lerobot.episode import EpisodeRows, Stats
from vla_core.data.lerobot.layout import LeRobotError
from vla_core.data.lerobot.statistics import column_statistics, image_statistics, sample_indices
from vla_core.data.lerobot.video import VideoOptions, decode, encode
from vla_core.data.plans import check_rows
from vla_core.data.report import BagCounts, StreamReport, Thresholds, check_lost
from vla_core.errors import VlaError
from vla_core.observation.builder import Observation, ObservationSpec

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
BATCH = 256  # ticks that are written at once
QUEUE = 32  # pictures that wait to be encoded
KEPT_BYTES = 16 * 1024 * 1024  # of an episode's first pictures stay in memory for the statistics
NO_DEMONSTRATION = ("started", "failed", "aborted")


class Interrupted(Exception):
    """The conversion was told to stop."""


@dataclass(frozen=True, kw_only=True)
class BagJob:
    """What is to be made of one bag; ``name`` is what dataset and report call it, ``plan_rows`` H of its plans.

    ``happened`` is what is taken over beside observations and labels.
    """

    path: Path
    name: str
    shards: Path
    contract: RobotContract
    spec: ObservationSpec
    keep_failed: bool
    video: VideoOptions | None
    thresholds: Thresholds
    plan_rows: int | None = None
    happened: Happened = field(default_factory=Happened)

    def fingerprint(self) -> str:
        """Equal for the same bag (by its description, and its files' sizes and times) and the same wishes."""
        metadata = self.path / "metadata.yaml"
        try:
            text = metadata.read_bytes() if metadata.is_file() else b""
            states = [(f.name, f.stat()) for f in sorted(self.path.iterdir()) if f.is_file()]
        except OSError as error:
            raise BagError(f"{self.path}: cannot be read: {error.strerror}") from None
        files = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
        wishes = [FORMAT, self.name, files, to_dict(self.contract), to_dict(self.spec), self.keep_failed,
                  None if self.video is None else asdict(self.video), self.thresholds.max_lost,
                  self.plan_rows, asdict(self.happened)]  # fmt: skip
        return hashlib.sha256(text + json.dumps(wishes).encode()).hexdigest()[:24]


@dataclass
class Shard:
    """What became of a bag: the folder of its episodes and their entries, or the ``error`` that makes it a bad one."""

    name: str
    folder: Path | None = None
    episodes: Sequence[dict[str, Any]] = ()
    left_out: Sequence[dict[str, Any]] = ()
    streams: dict[str, StreamReport] | None = None
    counts: dict[str, int] | None = None
    error: str | None = None
    kind: str = ""


def convert_bag(job: BagJob, stopped: Callable[[], bool] = lambda: False) -> Shard:
    """The shard of a bag: the one that is there, or a new one. What is wrong with the bag is in the result.

    ``stopped`` is asked now and then; when it answers True, :class:`Interrupted` is raised.
    """
    try:
        folder = job.shards / job.fingerprint()
        found = _read_shard(folder)
        if found is None:
            _write_shard(job, folder, stopped)
            found = _read_shard(folder)
    except LeRobotError:  # a video that cannot be written says nothing about the bag
        raise
    except VlaError as error:
        kind = next(c.__name__ for c in type(error).__mro__ if c.__name__ in ("ContractError", "BagError", "VlaError"))
        return Shard(job.name, error=str(error), kind=kind)
    assert found is not None, "it was just written"
    return found


def _read_shard(folder: Path) -> Shard | None:
    try:
        plain = json.loads((folder / "bag.json").read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in plain["files"].items()):
            return None
    except (OSError, ValueError, KeyError):
        return None  # not there, or not what was written: made anew
    streams = {name: StreamReport.from_state(state) for name, state in plain["streams"].items()}
    return Shard(plain["name"], folder, plain["episodes"], plain["left_out"], streams, plain["counts"])


def _write_shard(job: BagJob, folder: Path, stopped: Callable[[], bool]) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        description = _convert(job, partial, stopped)
        description["files"] = {f.name: f.stat().st_size for f in sorted(partial.iterdir())}
        (partial / "bag.json").write_text(json.dumps(description), encoding="utf-8")
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _convert(job: BagJob, folder: Path, stopped: Callable[[], bool]) -> dict[str, Any]:
    """Write the files of all episodes of a bag; returns what ``bag.json`` says."""
    with opened(job.path) as bag:
        contract = job.contract
        if CONTRACT_KEY in bag.info.metadata and bag.info.contract != contract:
            contract.check_same(bag.info.contract, "the dataset", str(job.path))
            contract = contract.with_topics_of(bag.info.contract)
        commands = CommandsAndMore(contract, job.happened, bag.info.topics)
        return _convert_open(job, EpisodeReader(bag, contract, job.spec, commands), folder, stopped)


def _convert_open(job: BagJob, reader: EpisodeReader, folder: Path, stopped: Callable[[], bool]) -> dict[str, Any]:
    counts = BagCounts(reader.builder, reader.buffer, reader.commands)
    sinks: dict[int, _EpisodeSink] = {}
    dropped: Counter[int] = Counter()
    outside: Counter[int] = Counter()
    ticks: Counter[int] = Counter()
    try:
        for tick in reader:
            if tick.stamp_ns > reader.end_ns(tick.episode):
                outside[tick.episode] += 1
                continue
            counts.add(tick)
            ticks[tick.episode] += 1
            if tick.observation is None or tick.action is None:
                dropped[tick.episode] += 1
                continue
            check_rows(tick.action, job.plan_rows, f"{job.path}: at {tick.stamp_ns} ns")
            if not np.isfinite(tick.action).all():
                raise BagError(f"{job.path}: a command is not finite at {tick.stamp_ns} ns: {tick.action.tolist()}")
            _check_reward(job, tick)
            if tick.episode not in sinks:
                sinks[tick.episode] = _EpisodeSink(folder, tick.episode, job)
            sinks[tick.episode].add(tick.observation, tick.action, tick)
            if sum(ticks.values()) % BATCH == 0 and stopped():
                raise Interrupted
        streams = counts.result(reader.bag.info, reader.late, reader.future)
        lost = check_lost(streams, job.thresholds)
        if lost:
            raise BagError(f"{job.path}: {lost}")
        episodes, left_out = _close(job, reader, sinks, ticks, dropped, outside)
    finally:
        for sink in sinks.values():
            sink.abort()
    return {
        "name": job.name, "episodes": episodes, "left_out": left_out,
        "streams": {name: stream.state() for name, stream in streams.items()},
        "counts": {"ticks": sum(ticks.values()), "dropped_ticks": sum(dropped.values()),
                   "outside_ticks": sum(outside.values())},
    }  # fmt: skip


def _check_reward(job: BagJob, tick: Tick) -> None:
    if job.happened.reward and (tick.reward is None or not np.isfinite(tick.reward)):
        what = "no reward" if tick.reward is None else f"a reward that is not finite ({tick.reward})"
        raise BagError(f"{job.path}: {what} at {tick.stamp_ns} ns, though the bag has the topic of rewards")


def _close(
    job: BagJob, reader: EpisodeReader, sinks: dict[int, _EpisodeSink], ticks: Counter[int], dropped: Counter[int],
    outside: Counter[int],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Finish the episodes that are demonstrations; returns their entries, and why others are left out."""
    if not sinks:
        raise BagError(f"{job.path}: no tick has both an observation and a command: {len(reader.commands)} commands, "
                       f"{sum(dropped.values())} ticks without{_reasons(reader)}")  # fmt: skip
    infos = reader.infos
    if len(infos) > 1 and 0 in sinks:  # nobody asked for what was before the first start
        outside[0] += ticks.pop(0) - dropped.pop(0, 0)
        sinks.pop(0).discard()
    entries, left_out = [], []
    for number in sorted(ticks):
        where = {"bag": job.name} if len(ticks) == 1 else {"bag": job.name, "part": number}
        info, sink = infos[number], sinks.get(number)
        if sink is None:
            left_out.append({**where, "why": "no tick has both an observation and a command"})
        elif info.outcome in NO_DEMONSTRATION and not job.keep_failed:
            left_out.append({**where, "why": "never ended" if info.outcome == "started" else info.outcome})
            sink.discard()
        else:
            entries.append({**where, "dropped_ticks": dropped[number], **sink.close(info)})
    return entries, left_out


def _reasons(reader: EpisodeReader) -> str:
    return f"; at the last one: {'; '.join(reader.refused)}" if reader.refused else ""


class _EpisodeSink:
    """The files of one episode while its ticks come in."""

    def __init__(self, folder: Path, number: int, job: BagJob) -> None:
        import pyarrow as pa

        self._folder, self._number, self._spec, self._contract = folder, number, job.spec, job.contract
        self._past = side.PastTicks(job.spec)
        self._rows: list[tuple[Observation, np.ndarray, list[int], list[int]]] = []
        self._happened = job.happened
        self._ticks: list[Tick] = []
        self._file = self._path("rows.arrow")
        fields = [*side.frames_schema(job.contract, job.spec), *_own_fields(job)]
        self._schema = pa.schema(fields)
        self._writer = _ArrowFile(self._file, self._schema)
        self._past_writer: _ArrowFile | None = None
        if job.spec.history > 1:
            self._past_writer = _ArrowFile(self._path("past.arrow"), side.past_schema(job.contract, job.spec))
        self._cameras: dict[str, _Pictures | _Video] = {}
        for name, size in job.spec.images.items():
            if job.video is None:
                self._cameras[name] = _Pictures(self._path(f"{name}.arrow"), (size.height, size.width))
            else:
                path, rate = self._path(f"{name}.mp4"), job.contract.rate_hz
                self._cameras[name] = _Video(path, rate, job.video, (size.height, size.width))
        self._length = 0

    def add(self, observation: Observation, action: np.ndarray, tick: Tick) -> None:
        """Append a tick."""
        if self._happened != Happened():
            self._ticks.append(tick)
        history = self._past.add(observation) if self._spec.history > 1 else []
        pictures = [camera.add(observation.images.get(name)) for name, camera in self._cameras.items()]
        self._rows.append((observation, action, history, pictures))
        if len(self._rows) == BATCH:
            self._flush()

    def close(self, info: EpisodeInfo) -> dict[str, Any]:
        """Make the files whole; returns the episode's entry."""
        self._flush()
        self._end()
        rows = _mapped(self._file)
        tasks = rows.column("task").unique().to_pylist()
        statistics: Stats = {ACTION: column_statistics(_matrix(rows, "action"))}
        for column in _happened_columns(self._happened):
            statistics[column] = column_statistics(_matrix(rows, column))
        if self._spec.state:
            statistics[STATE] = column_statistics(_matrix(rows, "state"))
        sample = sample_indices(self._length)
        for name, camera in self._cameras.items():
            statistics[f"{IMAGES}{name}"] = image_statistics(camera.take(sample))
        return {
            "number": self._number, "length": self._length, "seed": info.seed, "task": info.task,
            "instruction": next(filter(None, tasks), info.instruction), "outcome": info.outcome,
            "spoken": info.instruction,
            "statistics": {key: {k: v.tolist() for k, v in found.items()} for key, found in statistics.items()},
        }  # fmt: skip

    def discard(self) -> None:
        """Remove the files."""
        self.abort()
        for file in self._folder.glob(f"{self._number:06d}.*"):
            file.unlink()

    def abort(self) -> None:
        """Let go of the files as they are."""
        with suppress(Exception):  # a full disk, which has been told already
            self._end()

    def _end(self) -> None:
        self._writer.close()
        if self._past_writer is not None:
            self._past_writer.close()
        for camera in self._cameras.values():
            camera.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._rows:
            return
        observations = [row[0] for row in self._rows]
        table = side.side_table(observations, self._contract, self._spec, [row[2] for row in self._rows])
        columns = {name: table.column(name) for name in table.column_names}
        columns["action"] = side.fixed_lists(np.stack([row[1].reshape(-1) for row in self._rows]))
        if self._spec.state:
            state = np.stack([observation.state for observation in observations])
            columns["state"] = side.fixed_lists(np.where(np.isnan(state), np.float32(0), state))
        if self._happened.executed:
            done = [row[1] if tick.executed is None else tick.executed
                    for row, tick in zip(self._rows, self._ticks, strict=True)]  # fmt: skip
            columns[EXECUTED] = side.fixed_lists(np.stack(done).astype(np.float32))
        if self._happened.reward:
            columns[REWARD] = side.fixed_lists(np.array([[tick.reward] for tick in self._ticks], dtype=np.float32))
        if self._happened.intervened:
            marks = np.array([[tick.intervened] for tick in self._ticks], dtype=np.float32)
            columns[INTERVENED] = side.fixed_lists(marks)
        for place, name in enumerate(self._happened.truth_columns):
            columns[name] = pa.array([tick.truths[place] for tick in self._ticks], pa.string())
        columns["task"] = pa.array([observation.instruction for observation in observations])
        for place, name in enumerate(self._cameras):
            columns[f"picture.{name}"] = pa.array([row[3][place] for row in self._rows], pa.int32())
        self._writer.write(pa.table(columns, schema=self._schema))
        if self._past_writer is not None and self._past.fresh:
            self._past_writer.write(side.past_table(self._past.fresh, self._contract, self._spec))
            self._past.fresh.clear()
        for camera in self._cameras.values():
            camera.flush()
        self._length += len(self._rows)
        self._rows.clear()
        self._ticks.clear()

    def _path(self, name: str) -> Path:
        return self._folder / f"{self._number:06d}.{name}"


def _own_fields(job: BagJob) -> list[pa.Field]:
    """Columns of a shard beside the side rows."""
    import pyarrow as pa

    contract, spec = job.contract, job.spec
    width = len(contract.action_names) * (job.plan_rows or 1)
    fields = [pa.field("action", pa.list_(pa.float32(), width)), pa.field("task", pa.string())]
    if job.happened.executed:
        fields.append(pa.field(EXECUTED, pa.list_(pa.float32(), len(contract.action_names))))
    if job.happened.reward:
        fields.append(pa.field(REWARD, pa.list_(pa.float32(), 1)))
    if job.happened.intervened:
        fields.append(pa.field(INTERVENED, pa.list_(pa.float32(), 1)))
    fields += [pa.field(name, pa.string()) for name in job.happened.truth_columns]
    if spec.state:
        fields.append(pa.field("state", pa.list_(pa.float32(), side.state_size(contract, spec))))
    return fields + [pa.field(f"picture.{name}", pa.int32()) for name in spec.images]


def _happened_columns(happened: Happened) -> tuple[str, ...]:
    wanted = {EXECUTED: happened.executed, REWARD: happened.reward, INTERVENED: happened.intervened}
    return tuple(name for name, there in wanted.items() if there)


class _ArrowFile:
    """An Arrow file that grows by tables."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        import pyarrow as pa

        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)
        self._closed = False

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._writer.close()
            self._sink.close()


class _Pictures:
    """Different pictures of a camera as PNGs; a tick is the number of its picture."""

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        import pyarrow as pa

        self._path, self._schema = path, pa.schema([pa.field("png", pa.large_binary())])
        self._file = _ArrowFile(path, self._schema)
        self._blank = np.zeros((*size, 3), dtype=np.uint8)
        self._last: np.ndarray | None = None
        self._kept: list[np.ndarray] = []
        self._waiting: list[Future[bytes]] = []
        self._ticks: list[int] = []
        self._count = 0

    def add(self, pixels: np.ndarray | None) -> int:
        """The number of a tick's picture; None is black."""
        pixels = self._blank if pixels is None else pixels
        if pixels is not self._last:
            self._last = pixels
            if self._count * pixels.nbytes < KEPT_BYTES:
                self._kept.append(pixels)
            self._waiting.append(_encoders().submit(side.encode_png, pixels))
            if len(self._waiting) > QUEUE:  # encoding is slower than reading: do not pile pictures up
                self._waiting[-QUEUE].result()
            self._count += 1
        self._ticks.append(self._count - 1)
        return self._count - 1

    def flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            encoded = pa.array([waiting.result() for waiting in self._waiting], pa.large_binary())
            self._waiting.clear()
            self._file.write(pa.table([encoded], schema=self._schema))

    def close(self) -> None:
        self.flush()
        self._file.close()

    def take(self, frames: np.ndarray) -> Sequence[np.ndarray]:
        """Pictures of some frames, ascending, of the closed file."""
        numbers = np.array(self._ticks)[frames]
        kept = int(np.searchsorted(numbers, len(self._kept)))
        pictures = PictureList(_mapped(self._path), numbers[kept:])
        return _Decoded(len(frames), lambda: chain((self._kept[i] for i in numbers[:kept]), _each_once(pictures)))


@functools.cache
def _encoders() -> ThreadPoolExecutor:
    """Threads that encode pictures while the next messages are read and decoded."""
    return ThreadPoolExecutor(2, thread_name_prefix="png")


class _Video:
    """A camera's pictures on their way to a video, which another thread encodes."""

    def __init__(self, path: Path, fps: float, options: VideoOptions, size: tuple[int, int]) -> None:
        self._path, self._fps, self._options = path, fps, options
        self._blank = np.zeros((*size, 3), dtype=np.uint8)
        self._queue: Queue[np.ndarray | None] = Queue(QUEUE)
        self._error: BaseException | None = None
        self._closed = False
        self._thread = Thread(target=self._encode, name=f"video {path.name}", daemon=True)
        self._thread.start()

    def add(self, pixels: np.ndarray | None) -> int:
        self._queue.put(self._blank if pixels is None else pixels)
        return 0

    def flush(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()
        self.flush()

    def take(self, frames: np.ndarray) -> Sequence[np.ndarray]:
        """Pictures of some frames, ascending, as the video shows them."""
        wanted = Counter(frames.tolist())
        shown = enumerate(decode(self._path, self._fps))
        return _Decoded(len(frames), lambda: (pixels for i, pixels in shown for _ in range(wanted[i])))

    def _encode(self) -> None:
        try:
            encode(self._path, self._pictures(), self._fps, self._options)
        except BaseException as error:  # raised where the pictures come from
            self._error = error
            for _ in self._pictures():
                pass

    def _pictures(self) -> Iterator[np.ndarray]:
        while (pixels := self._queue.get()) is not None:
            yield pixels


class _Decoded(Sequence[np.ndarray]):
    """Pictures that are decoded one after the other: all of a long episode would not fit into memory."""

    def __init__(self, count: int, pictures: Callable[[], Iterator[np.ndarray]]) -> None:
        self._count, self._pictures = count, pictures

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._pictures()

    def __getitem__(self, place: Any) -> Any:
        raise TypeError("pictures that are decoded in order have no places")


def _each_once(encoded: Sequence[bytes]) -> Iterator[np.ndarray]:
    """Decoded pictures; neighbours that are one object are decoded once."""
    last: tuple[bytes, np.ndarray] | None = None
    for data in encoded:
        if last is None or last[0] is not data:
            last = data, side.decode_png(data)
        yield last[1]


class PictureList(Sequence[bytes]):
    """Encoded pictures by frame, read from the mapped file when they are asked for; neighbours are one object."""

    def __init__(self, pictures: pa.Table, numbers: np.ndarray) -> None:
        self._chunks = pictures.column("png").chunks
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])
        self._numbers = numbers
        self._last = -1, b""

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, frame: int) -> bytes: ...

    @overload
    def __getitem__(self, frame: slice) -> list[bytes]: ...

    def __getitem__(self, frame: int | slice) -> bytes | list[bytes]:
        if isinstance(frame, slice):
            return [self[i] for i in range(*frame.indices(len(self)))]
        number = int(self._numbers[frame])
        if number != self._last[0]:
            chunk = int(np.searchsorted(self._ends, number, side="right"))
            scalar = self._chunks[chunk][number - (int(self._ends[chunk - 1]) if chunk else 0)]
            self._last = number, scalar.as_buffer().to_pybytes()
        return self._last[1]


def episode_rows(shard: Shard, entry: dict[str, Any], job: BagJob) -> EpisodeRows:
    """An episode of a shard as the dataset's writer takes it."""
    assert shard.folder is not None
    stem = shard.folder / f"{entry['number']:06d}"
    rows = _mapped(stem.with_suffix(".rows.arrow"))
    columns = {ACTION: _matrix(rows, "action"), **{c: _matrix(rows, c) for c in _happened_columns(job.happened)}}
    if job.spec.state:
        columns[STATE] = _matrix(rows, "state")
    for name in job.happened.truth_columns:
        columns[name] = np.array(rows.column(name).to_pylist(), dtype=object)[:, None]
    images: dict[str, Any] = {}
    videos: dict[str, Path] = {}
    for name in job.spec.images:
        if job.video is None:
            numbers = rows.column(f"picture.{name}").to_numpy()
            images[f"{IMAGES}{name}"] = PictureList(_mapped(stem.with_suffix(f".{name}.arrow")), numbers)
        else:
            videos[f"{IMAGES}{name}"] = stem.with_suffix(f".{name}.mp4")
    known = {key: value for key, value in entry.items() if key not in ("number", "length", "spoken", "statistics")}
    return EpisodeRows(
        columns=columns, tasks=[text or entry["spoken"] for text in rows.column("task").to_pylist()],
        statistics={key: {k: np.array(v) for k, v in found.items()} for key, found in entry["statistics"].items()},
        images=images, videos=videos,
        frames=rows.select(side.frames_schema(job.contract, job.spec).names),
        past=_mapped(stem.with_suffix(".past.arrow")) if job.spec.history > 1 else None, entry=known,
    )  # fmt: skip


def _mapped(path: Path) -> pa.Table:
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _matrix(rows: pa.Table, name: str) -> np.ndarray:
    """A column of lists of one size as (N, size)."""
    column = rows.column(name)
    return np.concatenate([np.asarray(chunk.flatten()) for chunk in column.chunks]).reshape(len(column), -1)


@contextmanager
def written(out: Path) -> Iterator[None]:
    """Errors of the disk, in the words of this package."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{out}: cannot be written: {error.strerror or ' '.join(str(error).split())}") from None


class DiskError(VlaError):
    """The disk refuses."""
