"""Writers that end early leave nothing that looks whole, and folders that are not whole are refused by name."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from test.core.lerobot.made import FEATURES, FPS, Made, episode, write
from vla_core.data.lerobot.layout import VERSIONS, Feature, LeRobotError, image
from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.data.lerobot.rewrite import rewrite
from vla_core.data.lerobot.video import Joined, VideoOptions, cut, decode, encode
from vla_core.data.lerobot.writer import LeRobotWriter

WITH_VIDEO = FEATURES | {"observation.images.wrist": image(32, 48, video=True)}
LENGTHS = (4, 3, 5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dataset of each version; tests work on copies."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("whole")
    episodes = [episode(rng, WITH_VIDEO, n, scratch=folder, history=1) for n in LENGTHS]
    for version in VERSIONS:
        write(folder / version, WITH_VIDEO, episodes, version=version)
    return {version: folder / version for version in VERSIONS}


def writer(path: Path, features: dict[str, Feature] = FEATURES) -> LeRobotWriter:
    return LeRobotWriter(path, fps=FPS, features=features, robot_type=None, description={"format": "made"})


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Writers that end early.


def test_nothing_stands_at_the_place_before_the_end(tmp_path: Path) -> None:
    made = episode(np.random.default_rng(0), FEATURES, 3)
    with writer(tmp_path / "dataset") as out:
        out.add(made.rows)
        assert left(tmp_path) == [".dataset.partial"]
        assert not (tmp_path / ".dataset.partial/dataset/meta/info.json").exists()
    assert left(tmp_path) == ["dataset"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_removes_what_was_written(tmp_path: Path, error: type[BaseException]) -> None:
    rng = np.random.default_rng(0)
    videos = tmp_path / "videos"
    videos.mkdir()
    with pytest.raises(error), writer(tmp_path / "dataset", WITH_VIDEO) as out:
        out.add(episode(rng, WITH_VIDEO, 3, scratch=videos, history=1).rows)
        raise error
    assert left(tmp_path) == ["videos"]


def test_what_the_caller_keeps_beside_it_stays(tmp_path: Path) -> None:
    """Shards of a conversion stand in the same folder."""
    kept = tmp_path / ".dataset.partial/shards/0"
    kept.mkdir(parents=True)
    made = episode(np.random.default_rng(0), FEATURES, 3)
    with pytest.raises(RuntimeError), writer(tmp_path / "dataset") as out:
        raise RuntimeError
    assert kept.is_dir()
    with writer(tmp_path / "dataset") as out:
        out.add(made.rows)
    assert kept.is_dir()
    assert LeRobotFolder(tmp_path / "dataset").frames_total == 3


SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np
from test.core.lerobot.made import FEATURES, episode
from test.core.lerobot.test_damage import WITH_VIDEO, writer
from vla_core.data.lerobot.layout import LeRobotError

mode, folder = sys.argv[1], Path(sys.argv[2])
rng = np.random.default_rng(0)
if mode == "kill":
    out = writer(folder / "dataset")
    out.add(episode(rng, FEATURES, 50).rows)
    print("added", flush=True)
    sys.stdin.read()
camera = "observation.images.wrist" if mode == "videos" else "observation.images.front"
features = {key: WITH_VIDEO[key] for key in ("action", camera)}
made = [episode(rng, features, 50, scratch=folder) for _ in range(20)]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with writer(folder / "dataset", features) as out:
        for each in made:
            out.add(each.rows)
except LeRobotError as error:
    print(error)
"""


@pytest.mark.parametrize("mode", ["data", "videos"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, mode: str) -> None:
    """A limit on the size of files stands for the full disk."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode, str(tmp_path)], capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf".*\.dataset\.partial/dataset/{mode}.*: cannot be written: .*(File too large|27).*\n",
                        done.stdout), done.stdout  # fmt: skip
    assert "Traceback" not in done.stderr
    assert [name for name in left(tmp_path) if "dataset" in name] == []


def test_a_killed_writer_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT, "kill", str(tmp_path)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"added\n"
        process.send_signal(signal.SIGKILL)
    assert left(tmp_path) == [".dataset.partial"]
    with pytest.raises(LeRobotError, match=r"info\.json is missing: no LeRobotDataset here, or one that was never fin"):
        LeRobotFolder(tmp_path / ".dataset.partial/dataset")
    write(tmp_path / "dataset", FEATURES, [episode(np.random.default_rng(0), FEATURES, 3)])  # the next one begins anew
    assert left(tmp_path) == ["dataset"]


def test_an_existing_place_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    with pytest.raises(LeRobotError, match="exists already"):
        writer(tmp_path / "dataset")


def test_no_episode_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(LeRobotError, match="a dataset of no episodes"), writer(tmp_path / "dataset"):
        pass
    assert left(tmp_path) == []


def spoil(made: Made, how: str) -> None:
    rows = made.rows
    if how == "shape":
        rows.columns["action"] = rows.columns["action"][:, :1]
    elif how == "dtype":
        rows.columns["action"] = rows.columns["action"].astype(np.float64)
    elif how == "missing":
        del rows.columns["action"]
    elif how == "more":
        rows.columns["reward"] = np.zeros((3, 1), np.float32)
    elif how == "nan":
        rows.columns["action"][1, 0] = np.nan
    elif how == "pictures":
        rows.images["observation.images.front"].pop()
    elif how == "statistics":
        del rows.statistics["action"]["std"]
    elif how == "side":
        rows.frames = pa.table({"stamp_ns": [1, 2]})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"action: float32 \(3, 1\); expected float32 \(3, 2\)"),
        ("dtype", r"action: float64 \(3, 2\); expected float32 \(3, 2\)"),
        ("missing", "columns of an episode: observation.state; expected action, observation.state"),
        ("more", "columns of an episode: action, observation.state, reward; expected action, observation.state"),
        ("nan", "action: not finite in 1 of 3 frames, first in frame 1"),
        ("pictures", "observation.images.front: 2 pictures; expected one for each of 3 frames"),
        ("statistics", "statistics of action of an episode: .*; expected .*std"),
        ("side", "2 side rows; expected one for each of 3 frames"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_the_others_stay(tmp_path: Path, how: str, message: str) -> None:
    rng = np.random.default_rng(0)
    bad, good = episode(rng, FEATURES, 3), episode(rng, FEATURES, 3)
    spoil(bad, how)
    with writer(tmp_path / "dataset") as out:
        out.add(good.rows)
        with pytest.raises(LeRobotError, match=message):
            out.add(bad.rows)
    assert LeRobotFolder(tmp_path / "dataset").frames_total == 3


def test_an_error_in_the_middle_of_an_episode_ends_the_dataset(tmp_path: Path) -> None:
    """Its numbers were written, its video was not: nobody may finish that."""
    videos = tmp_path / "videos"
    videos.mkdir()
    rng = np.random.default_rng(0)
    good, bad = (episode(rng, WITH_VIDEO, 3, scratch=videos).rows for _ in range(2))
    bad.videos[WRIST].write_bytes(b"no video")
    with pytest.raises(LeRobotError, match="the writer is aborted; begin another one"):  # noqa: SIM117
        with writer(tmp_path / "dataset", WITH_VIDEO) as out:
            out.add(good)
            with pytest.raises(LeRobotError, match="cannot be read"):
                out.add(bad)
    assert left(tmp_path) == ["videos"]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"index": Feature("int64", (1,))}, "'index' is written for every dataset"),
        ({"a/b": Feature("int64", (1,))}, "no '/'"),
        ({"cam": Feature("image", (4, 4, 1))}, r"expected \(height, width, 3\)"),
        ({"x": Feature("float32", (2,), ("one",))}, "1 names for 2 entries"),
    ],
)
def test_features_that_lerobot_cannot_have(tmp_path: Path, features: dict[str, Feature], message: str) -> None:
    with pytest.raises(LeRobotError, match=message):
        writer(tmp_path / "dataset", features)
    assert left(tmp_path) == []


def test_unknown_dtypes_versions_and_codecs() -> None:
    with pytest.raises(LeRobotError, match=r"unknown dtype 'complex64'.*float32"):
        Feature("complex64", (1,))
    with pytest.raises(LeRobotError, match=r"shape \(\).*\(1,\) for a single number"):
        Feature("float32", ())
    with pytest.raises(LeRobotError, match=r"v1.6.*choices: v2.1, v3.0"):
        LeRobotWriter(Path("x"), version="v1.6", fps=1, features={}, robot_type=None, description=None)
    with pytest.raises(LeRobotError, match="codec 'mjpeg'; choices: av1, h264"):
        VideoOptions(codec="mjpeg")


# Folders that are not whole.


def cut_off(path: Path, size: int = 40) -> None:
    path.write_bytes(path.read_bytes()[:-size])


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def read_all(folder: Path) -> None:
    """Everything that a reader can be asked for."""
    found = LeRobotFolder(folder)
    for name in found.info.columns:
        found.column(name)
    for entry in found.episodes:
        for key in found.info.cameras:
            found.images(key, entry.index)
    found.frames()
    found.past()


INFO = "meta/info.json"
DATA = "data/chunk-000/file-000.parquet"
OURS = "vla_ros/dataset.json"
EPISODE = "data/chunk-000/episode_000001.parquet"
WRIST = "observation.images.wrist"


@pytest.mark.parametrize(
    ("version", "harm", "message"),
    [
        ("v3.0", lambda f: (f / DATA).unlink(), rf"{DATA} is missing: the dataset is not whole"),
        ("v3.0", lambda f: cut_off(f / DATA), rf"{DATA}: it has no footer: its writer did not finalize"),
        ("v3.0", lambda f: (f / DATA).write_bytes(b""), rf"{DATA}: it has no footer"),
        ("v3.0", lambda f: cut_off(f / "meta/tasks.parquet"), r"tasks.parquet: it has no footer"),
        ("v3.0", lambda f: shutil.rmtree(f / "meta/episodes"), r"meta/episodes: no parquet file"),
        ("v3.0", lambda f: (f / INFO).write_text("{"), r"info.json: damaged: "),
        ("v3.0", lambda f: edit(f / INFO, lambda i: i.pop("fps")), r"not what LeRobot writes: KeyError.*fps"),
        ("v3.0", lambda f: edit(f / INFO, lambda i: i.update(codebase_version="v1.6")), r"expected v3.x or v2"),
        ("v3.0", lambda f: edit(f / INFO, lambda i: i.update(total_frames=13)), r"says 3 episodes and 13 fr"),
        ("v3.0", lambda f: edit(f / OURS, lambda d: d["episodes"].pop()), r"changed by another tool"),
        ("v3.0", lambda f: (f / OURS).unlink(), r"dataset.json is missing: the folder vla_ros is not"),
        ("v3.0", lambda f: cut_off(next(f.glob("vla_ros/frames/*/*"))), r"frames/.*it has no footer"),
        ("v3.0", lambda f: next(f.glob(f"videos/{WRIST}/*/*")).unlink(), r"file-000.mp4: cannot be decoded: .*No such"),
        ("v3.0", lambda f: cut_off(next(f.glob(f"videos/{WRIST}/*/*")), 2000), r"file-000.mp4: cannot be decoded"),
        ("v2.1", lambda f: (f / EPISODE).unlink(), r"episode_000001.parquet is missing"),
        ("v2.1", lambda f: cut_off(f / "meta/episodes.jsonl"), r"episodes.jsonl: damaged"),
        ("v2.1", lambda f: (f / "meta/tasks.jsonl").unlink(), r"tasks.jsonl is missing: the dataset is not whole"),
        ("v2.1", lambda f: next(f.glob(f"videos/*/{WRIST}/*1.mp4")).unlink(), r"episode_000001.mp4: cannot be decoded"),
    ],
)  # fmt: skip
def test_damage_is_named(
    whole: dict[str, Path], tmp_path: Path, version: str, harm: Callable[[Path], Any], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole[version], folder)
    read_all(folder)
    harm(folder)
    with pytest.raises(LeRobotError, match=message) as caught:
        read_all(folder)
    assert "\n" not in str(caught.value)


def harmed(data: bytes, rng: np.random.Generator) -> bytes:
    """Bits that are flipped, an end that is missing, or bytes that are others."""
    found = bytearray(data)
    kind = rng.integers(3)
    if kind == 0:
        for _ in range(int(rng.integers(1, 4))):
            found[rng.integers(len(found))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del found[int(rng.integers(len(found))) :]
    else:
        start, length = int(rng.integers(len(found))), int(rng.integers(1, 50))
        found[start : start + length] = rng.bytes(min(length, len(found) - start))
    return bytes(found)


@pytest.mark.parametrize("version", VERSIONS)
def test_any_damage_is_an_error_or_changes_nothing(whole: dict[str, Path], tmp_path: Path, version: str) -> None:
    """Whatever happens to a file, nothing else than a LeRobotError is raised, and numbers and pictures are not others.

    Videos have no checksums, and the numbers of a JSON file could be any: these are only asked not to crash.
    """
    folder, known = tmp_path / "copy", LeRobotFolder(whole[version])
    columns = {name: known.column(name) for name in known.info.columns}
    front = [known.images("observation.images.front", index) for index in range(len(LENGTHS))]
    shutil.copytree(whole[version], folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    raised = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        path = files[rng.integers(len(files))]
        data = path.read_bytes()
        path.write_bytes(harmed(data, rng))
        try:
            read_all(folder)
            if path.suffix == ".parquet":
                found = LeRobotFolder(folder)
                assert all(np.array_equal(found.column(name), column) for name, column in columns.items())
                assert all(np.array_equal(found.images("observation.images.front", i), p) for i, p in enumerate(front))
        except LeRobotError as error:
            assert "\n" not in str(error)
            raised += 1
        path.write_bytes(data)
    assert raised > 30
    read_all(folder)


def with_column(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    path = folder / DATA
    table = pq.read_table(path)
    place = table.column_names.index(name)
    pq.write_table(table.set_column(place, name, change(table.column(name))), path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("episode_index", lambda c: pa.array(c.to_pylist()[::-1]), "the rows of the data files are not those"),
        ("action", lambda c: pa.array([[1.0]] * len(c)), r"action: 12 values in 12 frames; expected shape \(2,\)"),
        ("action", lambda c: pa.array([None, *c.to_pylist()[1:]]), "action: 1 frames have no value"),
        ("observation.images.front", lambda c: pa.array([{"bytes": None, "path": "a.png"}] * len(c)),
         "holds struct.*expected encoded pictures|12 pictures outside"),
        ("observation.images.front", lambda c: pa.array([{"bytes": b"no", "path": "a.png"}] * len(c)),
         "front, frame 0: 2 bytes that no picture decodes from"),
        ("observation.images.front", lambda c: pa.array([{"bytes": b"", "path": "a.png"}] * len(c)),
         "front, frame 0: 0 bytes that no picture decodes from"),
    ],
)  # fmt: skip
def test_rows_that_are_not_what_meta_says(
    whole: dict[str, Path], tmp_path: Path, name: str, change: Callable[[Any], Any], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole["v3.0"], folder)
    with_column(folder, name, change)
    with pytest.raises(LeRobotError, match=message):
        read_all(folder)


def test_pictures_of_another_size_are_refused(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole["v3.0"], folder)
    edit(folder / "meta/info.json", lambda i: i["features"]["observation.images.front"].update(shape=[16, 25, 3]))
    with pytest.raises(LeRobotError, match=r"a picture of \(16, 24, 3\); info.json says \(16, 25, 3\)"):
        read_all(folder)


def test_wrong_names_name_the_choices(whole: dict[str, Path]) -> None:
    folder = LeRobotFolder(whole["v3.0"])
    with pytest.raises(LeRobotError, match="no column 'actions'; choices: action, episode_index"):
        folder.column("actions")
    with pytest.raises(LeRobotError, match=r"no camera 'front'; choices: observation.images.front, observation.im"):
        folder.images("front", 0)
    with pytest.raises(LeRobotError, match="no episode 3; there are 3"):
        folder.images(WRIST, 3)
    with pytest.raises(LeRobotError, match="is a video"):
        folder.encoded(WRIST, 0)


# Videos.


def test_videos_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    seen = episode(np.random.default_rng(0), {"c": image(32, 48)}, 6, every=6).pictures["c"]
    encode(tmp_path / "v.mp4", seen, 20, VideoOptions(gop=4))
    with pytest.raises(LeRobotError, match="ends after 6 frames; expected 7"):
        list(decode(tmp_path / "v.mp4", 20, 0, 7))
    with pytest.raises(LeRobotError, match=r"a frame at 0.0500.* s; expected multiples of 1/30 s"):
        list(decode(tmp_path / "v.mp4", 30))
    with pytest.raises(LeRobotError, match="frame 2 follows frame 0; expected one every 1/40 s"):
        list(decode(tmp_path / "v.mp4", 40))
    with pytest.raises(LeRobotError, match="6 frames from frame 0 on; expected 7"):
        Joined(tmp_path / "j.mp4", 20).append(tmp_path / "v.mp4", 7)
    with pytest.raises(LeRobotError, match="frame 2 is no key frame"):
        cut(tmp_path / "v.mp4", 20, 2, 2, tmp_path / "c.mp4")
    with pytest.raises(LeRobotError, match="no frames"):
        encode(tmp_path / "empty.mp4", [], 20)
    with pytest.raises(LeRobotError, match="needs even sizes"):
        encode(tmp_path / "odd.mp4", [np.zeros((31, 48, 3), np.uint8)], 20)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(LeRobotError, match=r"text.mp4: cannot be decoded"):
        list(decode(tmp_path / "text.mp4", 20))


def test_videos_whose_frames_refer_to_later_ones_are_cut_and_joined(tmp_path: Path) -> None:
    """Others encode with B-frames, whose packets do not stand in the order of time."""
    import av

    pictures = [episode(np.random.default_rng(n), {"c": image(32, 48)}, n).pictures["c"] for n in (9, 14)]
    for index, seen in enumerate(pictures):
        with av.open(str(tmp_path / f"{index}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=20, options={"bf": "3", "g": "6"})
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for picture in seen:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    shown = [np.stack(list(decode(tmp_path / f"{index}.mp4", 20))) for index in range(2)]
    joined = Joined(tmp_path / "joined.mp4", 20)
    for index, seen in enumerate(pictures):
        assert joined.fits(tmp_path / f"{index}.mp4")
        joined.append(tmp_path / f"{index}.mp4", len(seen))
    joined.close()
    np.testing.assert_array_equal(np.stack(list(decode(tmp_path / "joined.mp4", 20))), np.concatenate(shown))
    cut(tmp_path / "joined.mp4", 20, 9, 14, tmp_path / "cut.mp4")
    np.testing.assert_array_equal(np.stack(list(decode(tmp_path / "cut.mp4", 20))), shown[1])
    cut(tmp_path / "joined.mp4", 20, 0, 9, tmp_path / "first.mp4")
    np.testing.assert_array_equal(np.stack(list(decode(tmp_path / "first.mp4", 20))), shown[0])


def test_rewriting_a_damaged_dataset_leaves_nothing(whole: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(whole["v2.1"], tmp_path / "copy")
    next((tmp_path / "copy").glob(f"videos/*/{WRIST}/*2.mp4")).unlink()
    with pytest.raises(LeRobotError, match=r"episode_000002.mp4"):
        rewrite(LeRobotFolder(tmp_path / "copy"), tmp_path / "again")
    assert left(tmp_path) == ["copy"]
