"""What would spoil a training is named, with the episode; of a dataset in order nothing is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_core.data.dataset import EpisodeData
from vla_core.data.lerobot.episode import EpisodeRows
from vla_core.data.lerobot.layout import image, vector
from vla_core.data.lerobot.statistics import column_statistics, image_statistics
from vla_core.data.lerobot.video import VideoOptions, encode
from vla_core.data.lerobot.writer import LeRobotWriter
from vla_core.errors import VlaError
from vla_core.inspect import checks, describe
from vla_core.inspect.dataset import inspect_dataset

from .helpers import CONTRACT, START, STEP, write_dataset

LENGTHS = (220, 240, 200)
NAMES = ("shoulder", "elbow")


def episodes(lengths: tuple[int, ...] = LENGTHS) -> list[EpisodeData]:
    """In order: smooth actions well within the limits, pictures of noise of which each is there four times."""
    rng = np.random.default_rng(3)
    made = []
    for i, length in enumerate(lengths):
        time, phase = np.arange(length)[:, None] / 30, rng.uniform(0, 6, 2)
        state = np.sin(time + phase).astype(np.float32)
        fresh = rng.integers(0, 256, (-(-length // 4), 6, 8, 3), dtype=np.uint8)
        made.append(EpisodeData(
            images={"camera": np.repeat(fresh, 4, axis=0)[:length]}, state=state,
            action=(0.6 * np.cos(time + phase)).astype(np.float32), stamps_ns=START + STEP * np.arange(length),
            instruction="lift it", seed=i, bag=f"bag_{i}", outcome="succeeded",
        ))  # fmt: skip
    return made


def changed(place: int, **arrays: Any) -> Callable[[list[EpisodeData]], list[EpisodeData]]:
    """Other arrays for the episode ``place``, each from a function of the present one."""

    def change(made: list[EpisodeData]) -> list[EpisodeData]:
        values = {name: of(np.copy(getattr(made[place], name))) for name, of in arrays.items()}
        return [dataclasses.replace(e, **values) if i == place else e for i, e in enumerate(made)]

    return change


def everywhere(**arrays: Any) -> Callable[[list[EpisodeData]], list[EpisodeData]]:
    def change(made: list[EpisodeData]) -> list[EpisodeData]:
        for place in range(len(made)):
            made = changed(place, **arrays)(made)
        return made

    return change


def put(rows: Any, column: Any, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def put_in(array: np.ndarray) -> np.ndarray:
        array[rows, column] = value
        return array

    return put_in


def cut(length: int) -> Callable[[list[EpisodeData]], list[EpisodeData]]:
    def change(made: list[EpisodeData]) -> list[EpisodeData]:
        short = made[0]
        arrays = {"images": {"camera": short.images["camera"][:length]}, "state": short.state[:length],
                  "action": short.action[:length], "stamps_ns": short.stamps_ns[:length]}  # fmt: skip
        return [dataclasses.replace(short, **arrays), *made[1:]]

    return change


def pictured(rows: slice, value: np.ndarray | int) -> Callable[[list[EpisodeData]], list[EpisodeData]]:
    def change(made: list[EpisodeData]) -> list[EpisodeData]:
        pictures = made[1].images["camera"].copy()
        pictures[rows] = value
        return [made[0], dataclasses.replace(made[1], images={"camera": pictures}), *made[2:]]

    return change


FAULTS: dict[str, tuple[Callable[[list[EpisodeData]], list[EpisodeData]], str]] = {
    "an entry that never moves": (
        everywhere(state=put(slice(None), 1, 0.25)), "observation.state: never moves: arm.elbow (0.25)",
    ),
    "a tiny deviation": (
        everywhere(state=lambda s: (s * [1, 1e-3]).astype(np.float32)),
        "observation.state: standard deviation below 0.01: arm.elbow (0.000",
    ),
    "collapsed quantiles": (
        lambda made: changed(0, state=put(slice(3, 6), 0, 1.0))(everywhere(state=put(slice(None), 0, 0.0))(made)),
        "observation.state: collapsed quantiles, normalize it by min_max or not at all: arm.shoulder (0 in 98 % of",
    ),
    "an outlier": (
        changed(1, state=put(17, 0, 60.0)),
        "observation.state: outliers: arm.shoulder at 1 frames, the worst 60 in episode 1, frame 17, where 98 % are",
    ),
    "an episode in which nothing is commanded": (
        changed(2, action=put(slice(None), slice(None), 0.3)), "action never changes in episode 2",
    ),
    "an episode twice": (
        lambda made: [*made, made[1]], "the same numbers in episodes 1 and 3",
    ),
    "a last action of nothing": (
        everywhere(action=put(-1, 0, -0.95)), "action jumps at the end of episodes: shoulder by ",
    ),
    "a first action of nothing": (
        everywhere(action=put(0, 1, 1.7)), "action jumps at the beginning of episodes: elbow by ",
    ),
    "an action beyond its limits": (
        changed(0, action=put(slice(50, 60), 0, 1.2)),
        "action: beyond the contract's limits: shoulder at 10 frames, -0.6 to 1.2 where -1 to 1 are allowed",
    ),
    "a saturated action": (
        everywhere(action=lambda a: np.clip(3 * a, [-1, -2], [1, 2]).astype(np.float32)),
        "action: saturated at the contract's limits: shoulder at 6",
    ),
    "a frozen camera": (
        pictured(slice(40, 160), 77), "observation.images.camera: the same picture for long in 1 of the 3 episodes "
        "looked at: 1 (1.20 s from frame 40 on)",
    ),
    "a black camera": (
        pictured(slice(40, 80), 0), "observation.images.camera: black pictures in 1 of the 3 episodes looked at: 1 (",
    ),
    "a short episode": (
        cut(9), "unusually short episodes, where the median is 200 frames: 0 (9 frames)",
    ),
    "ticks that were dropped": (
        changed(1, stamps_ns=lambda s: np.where(np.arange(len(s)) < 100, s, s + 30 * STEP)),
        "steps are missing, where a tick had no observation or no command: episodes 1 (30 of 270)",
    ),
    "no instruction": (
        lambda made: [dataclasses.replace(e, instruction="") for e in made],
        "an empty task: the instruction is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_dataset_in_order_has_no_warnings(tmp_path: Path, version: str, ours: bool) -> None:
    path = write_dataset(tmp_path / "set", episodes(), ours=ours, version=version)
    report = inspect_dataset(path, pictures=False)
    assert report.warnings == []
    text = describe(path)
    assert "3 episodes, 660 frames (200 to 240 each)" in text and f"LeRobotDataset {version}" in text
    assert ("contract toy" in text) == ours
    assert "image camera: 8x6 RGB, image" in text and "instruction: 'lift it' (660 frames)" in text


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_and_nothing_else(tmp_path: Path, fault: str) -> None:
    change, expected = FAULTS[fault]
    path = write_dataset(tmp_path / "set", change(episodes()))
    report = inspect_dataset(path, pictures=False)
    assert len(report.warnings) == 1 and report.warnings[0].startswith(expected), report.warnings
    assert report.warnings[0] in describe(path)


def test_statistics_that_are_not_those_of_the_rows(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "set", episodes())
    file = path / "meta" / "stats.json"
    stats = json.loads(file.read_text())
    stats["action"]["max"][0] += 0.5
    file.write_text(json.dumps(stats))
    assert inspect_dataset(path, pictures=False).warnings == [
        "action: max in the dataset's statistics are not those of its rows"
    ]


def rewrite(path: Path, column: str, change: Callable[[list[Any]], None]) -> None:
    """Change the values of a column in the only parquet file below ``path``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (file,) = path.rglob("*.parquet")
    table = pq.read_table(file)
    values = table.column(column).to_pylist()
    change(values)
    place, kind = table.column_names.index(column), table.schema.field(column).type
    pq.write_table(table.set_column(place, table.schema.field(column), pa.array(values, kind)), file)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    """Of another's writer; the statistics cannot be right then, and are not blamed."""
    path = write_dataset(tmp_path / "set", episodes(), ours=False)

    def spoil(rows: list[Any]) -> None:
        for k in (5, 6, 300):
            rows[k][1] = float("nan")

    rewrite(path / "data", "action", spoil)
    assert inspect_dataset(path).warnings == ["action: not finite: elbow at 3 of 660 frames"]


def test_what_was_missing_is_no_number(tmp_path: Path) -> None:
    """Zeros stand where a stream was masked; they must not count as its values."""
    path = write_dataset(tmp_path / "set", [dataclasses.replace(e, state=e.state + 50) for e in episodes()])
    gone = slice(100, 110)
    rewrite(path / "vla_ros" / "frames", "age_ns.arm", lambda rows: rows.__setitem__(gone, [None] * 10))
    rewrite(path / "data", "observation.state", lambda rows: rows.__setitem__(gone, [[0.0, 0.0]] * 10))
    report = inspect_dataset(path)
    assert report.warnings == []
    section = next(s for s in report.sections if s.title == "observation.state")
    assert section.table is not None
    assert [row[-1] for row in section.table.rows] == ["98 %", "98 %"]
    assert all(float(row[1]) > 48 for row in section.table.rows)


def test_videos_are_looked_at_too(tmp_path: Path) -> None:
    """Encoded with loss, frozen and black stay what they are."""
    rng = np.random.default_rng(0)
    base = np.kron(rng.integers(40, 200, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    moving = np.stack([np.roll(base, 2 * k, axis=1) for k in range(90)])
    frozen, black = moving.copy(), moving.copy()
    frozen[30:75] = frozen[30]
    black[80:] = 0
    features = {"observation.images.front": image(64, 64, video=True), "action": vector(NAMES)}
    with LeRobotWriter(tmp_path / "set", fps=30, features=features, robot_type="x", description=None) as writer:
        for i, pictures in enumerate((moving, frozen, black)):
            video = tmp_path / f"{i}.mp4"
            encode(video, list(pictures), 30, VideoOptions())
            action = rng.uniform(-1, 1, (90, 2)).astype(np.float32)
            statistics = {"action": column_statistics(action),
                          "observation.images.front": image_statistics(list(pictures))}  # fmt: skip
            writer.add(EpisodeRows(columns={"action": action}, tasks=["go"] * 90, statistics=statistics,
                                   videos={"observation.images.front": video}))  # fmt: skip
    still, dark = inspect_dataset(tmp_path / "set").warnings
    assert "observation.images.front: the same picture for long in 1 of the 3 episodes looked at: 1 (1.4" in still
    assert "black pictures in 1 of the 3 episodes looked at: 2 (" in dark


def test_the_page_has_the_conversion_and_the_tasks(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "set", episodes())
    stream = {"topic": "cam/raw", "messages": 165, "rate_hz": 25.0, "match": 0.875, "missing": 3, "stale": 2, "late": 1,
              "future": 0, "error_ms": {"mean": 15.0, "p95": 30.0, "max": 30.0}}  # fmt: skip
    record = {"bags": 3, "ticks": 700, "dropped_ticks": 40, "streams": {"camera": stream},
              "left_out": [{"bag": "bag_7", "why": "failed"}]}  # fmt: skip
    (path / "vla_ros" / "report.json").write_text(json.dumps(record))
    sections = {section.title: section for section in inspect_dataset(path).sections}
    assert sections["Conversion"].note == "3 bags, 700 ticks, 40 dropped. Left out: bag_7: failed"
    table = sections["Conversion"].table
    assert table is not None and table.rows == [
        ("camera", "cam/raw", "165", "25", "0.875", "15", "30", "30", "3", "2", "0", "1")
    ]
    tasks = sections["Episodes"].table
    assert tasks is not None and tasks.rows == [("lift it", "660")]
    action = sections["action"].table
    assert action is not None
    everything = np.concatenate([e.action for e in episodes()])[:, 0].astype(float)
    q01, q99 = np.quantile(everything, [0.01, 0.99])
    expected = [everything.min(), q01, everything.mean(), q99, everything.max(), everything.std()]
    assert action.rows[0] == ("shoulder", *(f"{value:.4g}" for value in expected), "100 %")


def test_former_and_broken_datasets_are_errors(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "dataset.json").write_text("{}")
    with pytest.raises(VlaError, match="convert the bags again"):
        describe(tmp_path / "old")
    path = write_dataset(tmp_path / "set", episodes())
    (file,) = (path / "data").rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(VlaError, match=r"file-000\.parquet"):
        describe(path)
    (path / "meta" / "info.json").write_text("{")
    with pytest.raises(VlaError, match=r"info\.json: damaged"):
        describe(path)


def test_smooth_data_of_any_scale_is_not_suspected() -> None:
    """Normal noise, uniform noise and switches: no outliers, no jumps."""
    rng = np.random.default_rng(1)
    starts = np.array([0, 300, 700, 1000])
    for scale in (0.1, 1.0, 1e4):
        values = np.stack([rng.normal(size=1000), rng.uniform(-1, 1, 1000), rng.integers(0, 2, 1000)], axis=1) * scale
        assert checks.spread("x", ("a", "b", "c"), values, starts) == []
        assert checks.jumps("x", ("a", "b", "c"), values, starts) == []
    held = np.repeat([[0.0], [1.0]], 500, axis=0)
    assert checks.limits(("grip",), held, np.array([0.0]), np.array([1.0])) == [], "a switch is at its ends by nature"
    assert len(checks.limits(("grip",), held + 0.1, np.array([0.0]), np.array([1.0]))) == 1


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_the_longest_run_is_that_of_a_search(same: list[bool]) -> None:
    same[0] = False
    best = max((end - begin, -begin) for begin in range(len(same)) for end in range(begin + 1, len(same) + 1)
               if all(same[begin + 1 : end]))  # fmt: skip
    assert checks.runs(same)[1] == best[0]
    assert checks.runs(same)[0] == -best[1]


def test_limits_of_the_contract_are_those_of_the_test() -> None:
    assert CONTRACT.action_low.tolist() == [-1, -2] and CONTRACT.action_names == NAMES
