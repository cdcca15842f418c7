"""Datasets that LeRobot itself recorded (see recorded.py) are read with the numbers that were recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from test.core.lerobot import recorded
from vla_core.data.lerobot.layout import VERSIONS
from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.data.lerobot.rewrite import rewrite
from vla_core.data.lerobot.statistics import QUANTILES, Aggregate, column_statistics, image_statistics, sample_indices

FOLDER = Path(__file__).with_name("recorded")
PLACES = [(episode, index) for episode, length in enumerate(recorded.LENGTHS) for index in range(length)]
FRAMES = [recorded.frame(*place) for place in PLACES]

# What lerobot 0.4.4 computes differently: the squares of a picture's bytes overflow, and it takes the statistics of a
# matrix over its rows too.
LEROBOTS_OWN = {("observation.images.front", "std"), *(("matrix", name) for name in ("min", "max", "mean", "std"))}


def check(folder: LeRobotFolder) -> None:
    """Compare everything with the formulas that LeRobot recorded from."""
    assert (folder.info.fps, folder.info.robot_type, folder.description) == (recorded.FPS, "toy", None)
    for key, feature in recorded.FEATURES.items():
        due = np.stack([frame[key] for frame in FRAMES])
        assert folder.info.features[key].shape == feature["shape"]
        if feature["dtype"] not in ("image", "video"):
            np.testing.assert_array_equal(folder.column(key), due)
            continue
        seen = np.concatenate([folder.images(key, entry.index) for entry in folder.episodes]).astype(int)
        if feature["dtype"] == "image":
            np.testing.assert_array_equal(seen, due)
        else:  # lossy, and a picture of another frame would be off by 30
            assert np.abs(seen - due).max() < 12
    timestamps = np.array([index / recorded.FPS for _, index in PLACES], np.float32)
    np.testing.assert_array_equal(folder.column("timestamp"), timestamps)
    assert [folder.tasks[i] for i in folder.column("task_index")] == [recorded.task(*place) for place in PLACES]
    assert [set(entry.tasks) for entry in folder.episodes] == [
        {recorded.task(episode, index) for index in range(length)} for episode, length in enumerate(recorded.LENGTHS)
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_lerobot_recorded_is_read(version: str) -> None:
    folder = LeRobotFolder(FOLDER / version)
    assert folder.info.version == version
    check(folder)


def test_there_are_several_files_of_each_kind() -> None:
    """Otherwise the reader's joining of files was not tested on LeRobot's own."""
    folder = LeRobotFolder(FOLDER / "v3.0")
    assert len({entry.data_file for entry in folder.episodes}) == 3
    spans = [entry.videos["observation.images.wrist"] for entry in folder.episodes]
    assert [(span.file[-8:-4], span.start) for span in spans] == [("-000", 0), ("-000", 4), ("-001", 0)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("to", VERSIONS)
def test_what_lerobot_recorded_is_written_again(tmp_path: Path, version: str, to: str) -> None:
    rewrite(LeRobotFolder(FOLDER / version), tmp_path / "again", version=to)
    again = LeRobotFolder(tmp_path / "again")
    assert again.info.version == to
    check(again)


@pytest.mark.parametrize("version", VERSIONS)
def test_statistics_are_lerobots(version: str) -> None:
    """Ours of the recorded frames against those that LeRobot stored; its quantiles come from histograms."""
    folder = LeRobotFolder(FOLDER / version)
    aggregate = Aggregate()
    for entry in folder.episodes:
        rows: Any = slice(entry.from_index, entry.from_index + entry.length)
        own = {name: column_statistics(folder.column(name)[rows]) for name in folder.info.columns}
        pictures = folder.images("observation.images.front", entry.index)
        own["observation.images.front"] = image_statistics([pictures[i] for i in sample_indices(entry.length)])
        aggregate.add(own)
    assert folder.stats is not None
    for key, found in aggregate.result().items():
        for name, value in found.items():
            if name in QUANTILES or (version == "v3.0" and (key, name) in LEROBOTS_OWN):
                continue
            stored = folder.stats[key].get(name)
            assert stored is not None
            np.testing.assert_allclose(value, stored, rtol=1e-5, atol=1e-5, err_msg=f"{key} {name}")
