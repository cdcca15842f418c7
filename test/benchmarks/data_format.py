"""LeRobot's format: what LeRobot makes of the files written here, and what writing, reading and loading them costs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import vla_core
from test.benchmarks.framework import BenchmarkError, Row, Settings, Suite, compared, measured, peak_mb
from test.benchmarks.lerobot_env import NAME, LeRobot
from vla_core.contract import RobotContract
from vla_core.data.lerobot.episode import EpisodeRows
from vla_core.data.lerobot.layout import Feature, image, vector
from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.data.lerobot.statistics import column_statistics, image_statistics, sample_indices
from vla_core.data.lerobot.video import encode
from vla_core.data.lerobot.writer import LeRobotWriter
from vla_core.data.side import encode_png

SIDE = 96
CAMERA = "observation.images.image"
FRAMES_EACH = 100
HORIZON = 16
BATCH = 32
TASKS = ("push the puck to the goal", "pick up the puck", "open the drawer")
CONTRACT = Path(vla_core.__file__).parents[1] / "config/robots/metaworld_sawyer.yaml"


@cache
def contract() -> RobotContract:
    """Meta-World's: 39 state numbers and 4 actions at 80 Hz, a camera at 20 Hz."""
    return RobotContract.load(CONTRACT)


def features(video: bool) -> dict[str, Feature]:
    """The features of that robot, as ``vla convert`` names them."""
    robot = contract()
    actions = tuple(f"{name}.{entry}" for name, action in robot.actions.items() for entry in action.names)
    return {
        "observation.state": vector(tuple(f"state.{entry}" for entry in robot.stream("state").names)),
        CAMERA: image(SIDE, SIDE, video=video),
        "action": vector(actions),
    }


def pictures(rng: np.random.Generator, number: int) -> np.ndarray:
    """A table seen by a moving camera, with the noise of a sensor: (number, SIDE, SIDE, 3) uint8."""
    scene = cv2.resize(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8), (3 * SIDE, 3 * SIDE)).astype(np.int16)
    path = np.cumsum(rng.integers(0, 3, (number, 2)), axis=0) % (2 * SIDE)
    views = np.stack([scene[y : y + SIDE, x : x + SIDE] for y, x in path])
    return np.clip(views + rng.integers(-2, 3, views.shape), 0, 255).astype(np.uint8)


def episode(rng: np.random.Generator, video: bool, scratch: Path, length: int = FRAMES_EACH) -> EpisodeRows:
    """A random episode; the camera has a new picture every fourth frame."""
    kinds = features(video)
    columns = {key: rng.normal(size=(length, *kind.shape)).astype(np.float32)
               for key, kind in kinds.items() if not kind.visual}  # fmt: skip
    seen = np.repeat(pictures(rng, -(-length // 4)), 4, axis=0)[:length]
    statistics = {key: column_statistics(column) for key, column in columns.items()}
    statistics[CAMERA] = image_statistics([seen[index] for index in sample_indices(length)])
    rows = EpisodeRows(columns=columns, tasks=[TASKS[int(rng.integers(3))]] * length, statistics=statistics)
    if video:
        rows.videos[CAMERA] = scratch / f"{rng.integers(2**60)}.mp4"
        encode(rows.videos[CAMERA], seen, contract().rate_hz)
    else:
        encoded = [encode_png(picture) for picture in seen[::4]]
        rows.images[CAMERA] = [encoded[index // 4] for index in range(length)]
    return rows


def write(folder: Path, episodes: Iterable[EpisodeRows], video: bool = False, version: str = "v3.0") -> None:
    """Write a dataset that has no folder ``vla_ros``: one of others, as far as this package is concerned."""
    with LeRobotWriter(folder, version=version, fps=contract().rate_hz, features=features(video),
                       robot_type="metaworld_sawyer", description=None) as writer:  # fmt: skip
        for rows in episodes:
            writer.add(rows)


@contextmanager
def dataset(episodes: int, video: bool = False, version: str = "v3.0") -> Iterator[Path]:
    """A dataset in a folder that goes away."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name) / "scratch"
        scratch.mkdir()
        write(Path(name) / "dataset", (episode(rng, video, scratch) for _ in range(episodes)), video, version)
        yield Path(name) / "dataset"


# What LeRobot makes of it.


def expected(folder: LeRobotFolder) -> dict[str, np.ndarray]:
    """Every array that LeRobot's items have to have, and the statistics."""
    found = {name: folder.column(name) for name in folder.info.columns}
    for key in folder.info.cameras:
        found[key] = np.concatenate([folder.images(key, entry.index) for entry in folder.episodes])
    found["task"] = np.array([folder.tasks[index] for index in folder.column("task_index")])
    assert folder.stats is not None
    return found | {f"stats/{key}/{name}": value for key, of in folder.stats.items() for name, value in of.items()}


def reads(video: bool, version: str) -> Callable[[Settings], Iterator[Row]]:
    """LeRobot opens a dataset, after converting it where it is of v2.1, and finds what was written."""

    def run(settings: Settings) -> Iterator[Row]:
        with dataset(20 if settings.long else 4, video, version) as folder, LeRobot(folder.parent / "log") as lerobot:
            np.savez(folder.parent / "expected.npz", **expected(LeRobotFolder(folder)))
            if version == "v2.1":
                lerobot.ask("convert", folder=str(folder))
            found = lerobot.ask("check", folder=str(folder), expected=str(folder.parent / "expected.npz"))
        kind = f"{version} with {'video' if video else 'images'}"
        yield measured(f"{NAME} reads {kind}: frames", "frames", [found["frames"]])
        for name, number in (("values", sum(found["different"].values())), ("statistics", found["statistics"]),
                             ("windows", found["windows"])):  # fmt: skip
            yield measured(f"{NAME} reads {kind}: {name} that differ", name, [number], "== 0")

    return run


def appends(settings: Settings) -> Iterator[Row]:
    """LeRobot records an episode into a dataset of ours; it is read with what was there and what came."""
    with dataset(3) as folder, LeRobot(folder.parent / "log") as lerobot:
        before = LeRobotFolder(folder)
        actions, seen = before.column("action"), before.images(CAMERA, 2)
        lerobot.ask("append", folder=str(folder), frames=5)
        after = LeRobotFolder(folder)
        due = np.concatenate([actions, np.repeat(np.arange(5, dtype=np.float32)[:, None], 4, axis=1)])
        wrong = int((after.column("action") != due).sum())
        wrong += int((after.images(CAMERA, 2) != seen).sum())
        wrong += int((after.images(CAMERA, 3) != np.arange(5, dtype=np.uint8)[:, None, None, None]).sum())
    yield measured(f"{NAME} records into a dataset: values that differ", "values", [wrong], "== 0")


# What it costs.


def bare(path: Path, episodes: list[EpisodeRows]) -> float:
    """Seconds that pyarrow alone takes to write the same columns to one file."""
    start, writer = time.perf_counter(), None
    for rows in episodes:
        columns: dict[str, Any] = {key: pa.FixedSizeListArray.from_arrays(column.ravel(), column.shape[1])
                                   for key, column in rows.columns.items()}  # fmt: skip
        columns |= {key: pa.array(encoded) for key, encoded in rows.images.items()}
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema, dictionary_pagesize_limit=2**29)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return time.perf_counter() - start


def writing(settings: Settings) -> Iterator[Row]:
    """Encoded pictures pass through; statistics of the numbers are the writer's, of pictures and state the caller's."""
    rng, number = np.random.default_rng(0), 100 if settings.long else 40
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        episodes = [episode(rng, False, place) for _ in range(number)]
        for _ in range(9):
            shutil.rmtree(place / "dataset", ignore_errors=True)
            start = time.perf_counter()
            write(place / "dataset", episodes)
            frames, took = number * FRAMES_EACH, time.perf_counter() - start
            pairs.append((frames / took, frames / bare(place / "bare.parquet", episodes)))
    yield compared("dataset written, pictures encoded before", "frames/s", pairs, "pyarrow writing the same columns")


def reading(settings: Settings) -> Iterator[Row]:
    """All pictures of a dataset, against OpenCV decoding each different one from memory in one thread."""
    with dataset(100 if settings.long else 40) as path:
        folder = LeRobotFolder(path)
        frames, pairs = folder.frames_total, []
        for _ in range(5):
            start = time.perf_counter()
            for entry in folder.episodes:
                folder.images(CAMERA, entry.index)
            took = time.perf_counter() - start
            encoded = [set(folder.encoded(CAMERA, entry.index)) for entry in folder.episodes]
            start = time.perf_counter()
            for each in encoded:
                for picture in each:
                    cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR_RGB)
            pairs.append((frames / took, frames / (time.perf_counter() - start)))
        yield compared("pictures of a dataset decoded", "frames/s", pairs, "cv2.imdecode of each different picture")
        times = []
        for _ in range(9):
            start = time.perf_counter()
            folder.column("observation.state")
            times.append(1e3 * (time.perf_counter() - start))
        yield measured(f"39 numbers of {frames} frames read", "ms", times)


def memory(settings: Settings) -> Iterator[Row]:
    """The most that a process had resident that writes ten times as many episodes."""

    def peak(number: int) -> float:
        command = [sys.executable, "-m", "test.benchmarks.data_format", str(number)]
        root = Path(vla_core.__file__).parents[1]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
        if done.returncode:
            raise BenchmarkError(f"writing {number} episodes: {' '.join(done.stderr.split())[-300:]}")
        return float(done.stdout)

    pairs = [(peak(400), peak(40)) for _ in range(3)]
    yield compared("peak memory of writing 400 episodes", "MB", pairs, "of writing 40 episodes", "<= 1.1")


def loading(settings: Settings) -> Iterator[Row]:
    """Shuffled batches of pictures, state and a chunk of actions from the same dataset, in turns."""
    from itertools import islice

    from vla_core.data.batches import Batches
    from vla_core.data.folder import load
    from vla_core.data.loader import Loader
    from vla_core.model.vlm.text_encoder import WordTokenizer
    from vla_core.observation.normalizer import Normalization, Normalizer
    from vla_core.observation.spec import ImageSize, ObservationSpec

    spec = ObservationSpec(images={"image": ImageSize(height=SIDE, width=SIDE)}, state=("state",))
    batches = 40 if settings.long else 10
    for video in (False, True):
        with dataset(40, video) as folder:
            data = load(folder, contract(), spec)
            tokenizer = WordTokenizer()
            tokenizer.fit(data.tasks)
            source = Batches(data, HORIZON, Normalizer(Normalization(), data.statistics()), tokenizer)
            ours = iter(Loader(source, batch_size=BATCH, seed=0))
            for workers in (0, 2):
                pairs = []
                with LeRobot(folder.parent / "log") as lerobot:  # a decoder that was open cannot be taken to workers
                    lerobot.ask("open", folder=str(folder), batch_size=BATCH, workers=workers, horizon=HORIZON)
                    lerobot.ask("load", batches=2)
                    for _ in range(5):
                        start = time.perf_counter()
                        number = sum(len(batch.actions) for batch in islice(ours, 10 * batches))
                        rate = number / (time.perf_counter() - start)
                        answer: dict[str, Any] = lerobot.ask("load", batches=batches)
                        pairs.append((rate, answer["items"] / answer["seconds"]))
                kind = "video" if video else "images"
                peer = f"{NAME}'s dataset in a DataLoader, without normalization and words to ids"
                yield compared(f"batches of {BATCH} from {kind}, decoded before; peer with {workers} workers",
                               "items/s", pairs, peer, ">= 3")  # fmt: skip
                yield measured(f"peak memory of the peer, {kind}, {workers} workers", "MB", [answer["peak_mb"]])


BENCHMARKS: Suite = {
    **{f"LeRobot reads {version} {'video' if video else 'images'}": reads(video, version)
       for version in ("v3.0", "v2.1") for video in (False, True)},
    "LeRobot records into it": appends,
    "format, writing": writing,
    "format, reading": reading,
    "format, memory": memory,
    "loader beside LeRobot's": loading,
}  # fmt: skip


def main() -> None:
    """Write a dataset of as many episodes as asked; prints the peak of the resident memory in MB."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name) / "dataset", (episode(rng, False, Path(name)) for _ in range(int(sys.argv[1]))))
    print(peak_mb())


if __name__ == "__main__":
    main()
