"""Decoded pictures on the disk: made once, made anew when the dataset changes, whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vla_core.data import frame_cache
from vla_core.data.dataset import EpisodeData, load
from vla_core.data.frame_cache import CacheError, open_pictures
from vla_core.data.lerobot.episode import EpisodeRows
from vla_core.data.lerobot.layout import image, vector
from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.data.lerobot.statistics import column_statistics, image_statistics
from vla_core.data.lerobot.video import VideoOptions, encode
from vla_core.data.lerobot.writer import LeRobotWriter
from vla_core.observation.builder import ImageSize, ObservationSpec

from .helpers import CONTRACT, episodes, write_dataset

KEY, SIZE = "observation.images.camera", ImageSize(height=6, width=8)


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir())


def pixels(made: list[EpisodeData]) -> np.ndarray:
    return np.concatenate([e.images["camera"] for e in made])


def test_pictures_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = episodes((5, 4))
    path = write_dataset(tmp_path / "set", made)
    np.testing.assert_array_equal(load(path).images["camera"][:], pixels(made))
    (kept,) = folders(path / ".cache")
    monkeypatch.setattr(frame_cache, "_decoded", None)  # nothing is decoded any more
    np.testing.assert_array_equal(load(path).images["camera"][:], pixels(made))
    assert folders(path / ".cache") == [kept]


def test_a_dataset_that_changed_is_decoded_again(tmp_path: Path) -> None:
    first, second = episodes((5,)), episodes((6,))
    path = write_dataset(tmp_path / "set", first)
    old = load(path).images["camera"]
    (kept,) = folders(path / ".cache")
    other = write_dataset(tmp_path / "other", second)
    os.replace(path / ".cache", other / ".cache")
    new = load(other).images["camera"]
    np.testing.assert_array_equal(new[:], pixels(second))
    assert kept not in folders(other / ".cache") and len(folders(other / ".cache")) == 1, "the old one is gone"
    np.testing.assert_array_equal(old[:], pixels(first)), "but lives as long as it is used"
    small = open_pictures(LeRobotFolder(other), KEY, ImageSize(height=3, width=4), "disk")
    assert small.shape == (6, 3, 4, 3) and len(folders(other / ".cache")) == 2, "sizes stand beside each other"


PROGRAM = """
import sys, pathlib, time
from vla_core.data import frame_cache
from vla_core.data.dataset import load
real = frame_cache._decoded
def slow(*args):
    print("decoding", flush=True)
    for piece in real(*args):
        time.sleep(0.2)
        yield piece
frame_cache._decoded = slow
print(int(load(sys.argv[1]).images["camera"][:].sum()), flush=True)
"""


def run(path: Path, program: str = PROGRAM, **environment: str) -> subprocess.Popen[str]:
    root = Path(frame_cache.__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True, cwd=root,
                            stderr=subprocess.PIPE, env={**os.environ, **environment})  # fmt: skip


def test_of_two_processes_one_decodes_and_both_have_it(tmp_path: Path) -> None:
    made = episodes((4, 4, 4))
    path = write_dataset(tmp_path / "set", made)
    both = [run(path), run(path)]
    told = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    lines = [out.splitlines() for out, _ in told]
    assert [out[-1] for out in lines] == [str(pixels(made).astype(int).sum())] * 2
    assert sum("decoding" in out for out in lines) == 1
    assert len(folders(path / ".cache")) == 1


def test_a_process_that_is_killed_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    made = episodes((4,) * 40)
    path = write_dataset(tmp_path / "set", made)
    process = run(path)
    assert process.stdout is not None and process.stdout.readline() == "decoding\n"
    deadline = time.monotonic() + 60
    while not list((path / ".cache").glob(".camera*/pixels.u8")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert [name[0] for name in folders(path / ".cache")] == ["."], "only what was not finished"
    np.testing.assert_array_equal(load(path).images["camera"][:], pixels(made))
    (kept,) = folders(path / ".cache")
    assert not kept.startswith("."), "what was left is cleared away"


FULL = """
import resource, sys
from vla_core.data.dataset import load
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    load(sys.argv[1])
except ValueError as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    made = episodes((30,))
    path = write_dataset(tmp_path / "set", made)
    process = run(path, FULL)
    told, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    last = told.splitlines()[-1]
    assert last.startswith(f"CacheError: {path}/.cache/camera_8x6_") and "no room for it; make room" in last
    assert "VLA_CACHE_DIR" in last and "data.cache" in last
    assert folders(path / ".cache") == []
    np.testing.assert_array_equal(load(path).images["camera"][:], pixels(made))


def test_places_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's comes first, the dataset's own next, the user's where the dataset cannot be written."""
    made = episodes((3,))
    path = write_dataset(tmp_path / "set", made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("VLA_CACHE_DIR", str(tmp_path / "chosen"))
    load(path)
    (own,) = folders(tmp_path / "chosen")
    assert own.startswith("set-") and folders(tmp_path / "chosen" / own) and not (path / ".cache").exists()
    monkeypatch.delenv("VLA_CACHE_DIR")
    writable = os.access
    monkeypatch.setattr(os, "access", lambda place, mode: place != path and writable(place, mode))
    np.testing.assert_array_equal(load(path).images["camera"][:], pixels(made))
    assert folders(tmp_path / "user" / "vla_ros") == [own] and not (path / ".cache").exists()
    monkeypatch.undo()
    load(path)
    assert len(folders(path / ".cache")) == 1
    monkeypatch.setattr(os, "access", lambda place, mode: place != path and writable(place, mode))
    monkeypatch.setattr(frame_cache, "_decoded", None)
    load(path)  # one that came with a dataset is used though it could not be written
    monkeypatch.setenv("VLA_CACHE_DIR", str(path / "meta" / "info.json"))
    monkeypatch.setattr(frame_cache, "fingerprint", lambda path: "changed")
    with pytest.raises(CacheError, match="cannot be kept there: Not a directory; set VLA_CACHE_DIR"):
        load(path)


def test_a_picture_that_does_not_decode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dataset(tmp_path / "set", episodes((3,)))
    monkeypatch.setattr(LeRobotFolder, "encoded", lambda self, key, episode: [b"\x89PNG cut", b"x", b"y"])
    for cache in ("disk", "memory"):
        with pytest.raises(CacheError, match=r"set: a picture of observation\.images\.camera, \d+ bytes, does not"):
            load(path, cache=cache)  # type: ignore[arg-type]
    assert folders(path / ".cache") == []
    with pytest.raises(CacheError, match="does not decode"):
        load(path, cache="none").images["camera"][np.array([0])]


def write_video(path: Path, tmp_path: Path) -> list[EpisodeData]:
    """Three episodes of a camera in H.264: smooth pictures of 32 x 48 pixels."""
    made = []
    features = {KEY: image(32, 48, video=True), "observation.state": vector(("arm.shoulder", "arm.elbow")),
                "action": vector(CONTRACT.action_names)}  # fmt: skip
    x, y = np.meshgrid(np.arange(48), np.arange(32))
    with LeRobotWriter(path, fps=CONTRACT.rate_hz, features=features, robot_type=None, description=None) as writer:
        for number, episode in enumerate(episodes((9, 5, 7))):
            shades = [np.stack([4 * x + 9 * k, 6 * y + 20 * number, 2 * x + 2 * y + 5 * k], -1) % 200
                      for k in range(len(episode))]  # fmt: skip
            frames = [frame.astype(np.uint8) for frame in shades]
            video = tmp_path / f"{number}.mp4"
            encode(video, frames, CONTRACT.rate_hz, VideoOptions(crf=5))
            columns = {"observation.state": episode.state, "action": episode.action}
            writer.add(EpisodeRows(
                columns=columns, tasks=["go"] * len(episode), videos={KEY: video},
                statistics={**{n: column_statistics(c) for n, c in columns.items()}, KEY: image_statistics(frames)},
            ))  # fmt: skip
            made.append(EpisodeData({"camera": np.stack(frames)}, episode.state, episode.action, episode.stamps_ns,
                                    "go", 0, ""))  # fmt: skip
    return made


@pytest.mark.parametrize("piece", [256, 4])
def test_videos_are_cached_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(frame_cache, "PIECE", piece)
    made = write_video(tmp_path / "set", tmp_path)
    spec = ObservationSpec(images={"camera": ImageSize(height=32, width=48)}, state=("arm",))
    on_disk, in_memory, at_use = (load(tmp_path / "set", CONTRACT, spec, cache=c).images["camera"]  # type: ignore[arg-type]
                                  for c in ("disk", "memory", "none"))  # fmt: skip
    error = on_disk[:].astype(int) - pixels(made)
    assert np.abs(error).mean() < 6, "lossy, but the right frames"
    rows = np.random.default_rng(0).permutation(21)
    np.testing.assert_array_equal(on_disk[rows], in_memory[rows])
    np.testing.assert_array_equal(on_disk[rows], at_use[rows])


def test_decoding_at_use_keeps_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = episodes((6,) * 12)
    folder = LeRobotFolder(write_dataset(tmp_path / "set", made))
    read: list[int] = []
    real = LeRobotFolder.encoded
    monkeypatch.setattr(LeRobotFolder, "encoded", lambda s, key, episode: read.append(episode) or real(s, key, episode))
    monkeypatch.setattr(frame_cache, "KEPT_BYTES", 6 * 300)
    found = open_pictures(folder, KEY, SIZE, "none")
    rows = np.random.default_rng(0).integers(72, size=(5, 8))
    np.testing.assert_array_equal(found[rows], pixels(made)[rows])
    assert len(read) > 12, "more than is kept was asked for"
    monkeypatch.setattr(frame_cache, "KEPT_BYTES", 10**9)
    read.clear()
    generous = open_pictures(folder, KEY, SIZE, "none")
    np.testing.assert_array_equal(generous[rows], pixels(made)[rows])
    assert len(read) == len(set(rows.ravel() // 6))
