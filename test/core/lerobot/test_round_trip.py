"""What is written comes back, in both versions: by this project's reader, by pandas, and after being written again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test.core.lerobot.made import FEATURES, FPS, Made, episode, feature_sets, write
from vla_core.data.lerobot.layout import AUTOMATIC, VERSIONS, Feature, LeRobotError, image, vector
from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.data.lerobot.rewrite import rewrite
from vla_core.data.lerobot.statistics import Aggregate, column_statistics
from vla_core.data.lerobot.video import VideoOptions, decode

SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(path: Path, features: dict[str, Feature], episodes: list[Made]) -> LeRobotFolder:
    """Compare a dataset with what was written to it."""
    folder = LeRobotFolder(path)
    lengths = [len(made.rows) for made in episodes]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    assert [(e.length, e.from_index) for e in folder.episodes] == list(zip(lengths, starts.tolist(), strict=False))
    for key, feature in features.items():
        if feature.visual:
            for index, made in enumerate(episodes):
                if feature.dtype == "image":
                    assert folder.encoded(key, index) == made.rows.images[key]
                    np.testing.assert_array_equal(folder.images(key, index), made.pictures[key])
                else:
                    shown = np.stack(list(decode(made.rows.videos[key], folder.info.fps)))
                    np.testing.assert_array_equal(folder.images(key, index), shown)
        else:
            found, due = folder.column(key), np.concatenate([made.rows.columns[key] for made in episodes])
            assert found.dtype == due.dtype
            np.testing.assert_array_equal(found, due)
    frames = np.concatenate([np.arange(length) for length in lengths])
    np.testing.assert_array_equal(folder.column("frame_index"), frames)
    np.testing.assert_array_equal(folder.column("timestamp"), (frames / folder.info.fps).astype(np.float32))
    np.testing.assert_array_equal(folder.column("index"), np.arange(len(frames)))
    np.testing.assert_array_equal(folder.column("episode_index"), np.repeat(np.arange(len(lengths)), lengths))
    assert [folder.tasks[i] for i in folder.column("task_index")] == [t for made in episodes for t in made.rows.tasks]
    assert [e.tasks for e in folder.episodes] == [tuple(dict.fromkeys(made.rows.tasks)) for made in episodes]
    check_statistics(folder, episodes)
    return folder


def check_statistics(folder: LeRobotFolder, episodes: list[Made]) -> None:
    due = Aggregate()
    for index, made in enumerate(episodes):
        own = {key: folder.column(key)[folder.column("episode_index") == index] for key in AUTOMATIC}
        due.add(made.rows.statistics | {key: column_statistics(values) for key, values in own.items()})
    assert folder.stats is not None
    assert folder.stats.keys() == due.result().keys()
    for key, expected in due.result().items():
        for name, value in expected.items():
            np.testing.assert_allclose(folder.stats[key][name], value, rtol=1e-12, atol=1e-12, err_msg=f"{key} {name}")


@given(feature_sets(), st.integers(0, 2**32 - 1), st.lists(st.integers(1, 9), min_size=1, max_size=5),
       st.sampled_from(VERSIONS), st.integers(1, 3), st.sampled_from([20, 12.5, 29.97]))  # fmt: skip
@SETTINGS
def test_any_episodes_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    features: dict[str, Feature],
    seed: int,
    lengths: list[int],
    version: str,
    every: int,
    fps: float,
) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("any") / "dataset"
    episodes = []
    for length in lengths:
        tasks = rng.choice(["push", "pull it", "x" * 200], length).tolist()
        episodes.append(episode(rng, features, length, every=every, tasks=tasks))
    write(path, features, episodes, version=version, fps=fps)
    folder = check(path, features, episodes)
    assert folder.info.version == version
    assert folder.info.features == {**features, **AUTOMATIC}
    assert folder.description is not None
    assert [e["length"] for e in folder.description["episodes"]] == lengths


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_videos_come_back_as_they_were_encoded(tmp_path: Path, version: str, codec: str) -> None:
    rng = np.random.default_rng(0)
    features = FEATURES | {"observation.images.wrist": image(32, 48, video=True)}
    episodes = [episode(rng, features, n, scratch=tmp_path, codec=codec) for n in (5, 1, 8)]
    write(tmp_path / "dataset", features, episodes, version=version)
    folder = check(tmp_path / "dataset", features, episodes)
    for index, made in enumerate(episodes):  # and near what the camera saw
        shown = folder.images("observation.images.wrist", index).astype(int)
        assert np.abs(shown - made.pictures["observation.images.wrist"]).mean() < 6
    info = folder.info.features["observation.images.wrist"].info
    assert info is not None
    assert (info["video.codec"], info["video.height"], info["video.fps"]) == (codec, 32, FPS)


def test_files_roll_at_their_limits(tmp_path: Path) -> None:
    """Several files and chunks of each kind; no episode is split, and the places in meta are right."""
    rng = np.random.default_rng(1)
    features = FEATURES | {"observation.images.wrist": image(32, 48, video=True)}
    episodes = [episode(rng, features, n, scratch=tmp_path, history=2) for n in (3, 9, 2, 7, 1, 6)]
    write(tmp_path / "dataset", features, episodes, data_file_mb=0.01, video_file_mb=0.005)
    folder = check(tmp_path / "dataset", features, episodes)
    files = {entry.data_file for entry in folder.episodes}
    assert 1 < len(files) < len(episodes)
    assert len({entry.videos["observation.images.wrist"].file for entry in folder.episodes}) > 1
    for file in files:
        held = [entry for entry in folder.episodes if entry.data_file == file]
        metadata = pq.read_metadata(folder.path / file)  # a row group an episode, as LeRobot has it
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        assert groups == [entry.length for entry in held]


def test_videos_of_another_kind_begin_a_new_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    features = {"action": FEATURES["action"], "observation.images.wrist": image(32, 48, video=True)}
    episodes = [episode(rng, features, 4, scratch=tmp_path, codec=codec) for codec in ("h264", "h264", "av1")]
    write(tmp_path / "dataset", features, episodes)
    folder = check(tmp_path / "dataset", features, episodes)
    spans = [entry.videos["observation.images.wrist"] for entry in folder.episodes]
    assert [(span.file[-8:-4], span.start) for span in spans] == [("-000", 0), ("-000", 4), ("-001", 0)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("history", [1, 3])
def test_history_refers_to_the_same_rows_as_before(tmp_path: Path, version: str, history: int) -> None:
    rng = np.random.default_rng(history)
    episodes = [episode(rng, FEATURES, n, history=history) for n in (4, 1, 6, 3)]
    write(tmp_path / "dataset", FEATURES, episodes, version=version, data_file_mb=0.001)
    folder = LeRobotFolder(tmp_path / "dataset")
    frames, past = folder.frames(), folder.past()
    assert frames is not None
    assert past is not None
    stamps, values = frames["stamp_ns"].to_pylist(), past["value"].to_pylist()
    seen = [[stamps[r] if r >= 0 else values[-r - 1] for r in row] for row in frames["history"].to_pylist()]
    due = []
    for made in episodes:
        own, before = made.rows.frames, made.rows.past
        assert own is not None
        assert before is not None
        due += [[own["stamp_ns"][r].as_py() if r >= 0 else before["value"][-r - 1].as_py() for r in row]
                for row in own["history"].to_pylist()]  # fmt: skip
    assert seen == due
    one = folder.frames(["stamp_ns"], episode=2)
    assert one is not None
    assert episodes[2].rows.frames is not None
    assert one.equals(episodes[2].rows.frames.select(["stamp_ns"]))


@pytest.mark.parametrize("versions", [("v3.0", "v2.1"), ("v2.1", "v3.0"), ("v3.0", "v3.0")])
def test_a_dataset_can_be_written_again_in_another_version(tmp_path: Path, versions: tuple[str, str]) -> None:
    rng = np.random.default_rng(4)
    features = FEATURES | {"observation.images.wrist": image(32, 48, video=True), "note": Feature("string", (1,))}
    episodes = [episode(rng, features, n, scratch=tmp_path, history=2, every=2) for n in (5, 3, 7)]
    write(tmp_path / "one", features, episodes, version=versions[0])
    rewrite(LeRobotFolder(tmp_path / "one"), tmp_path / "two", version=versions[1])
    one, two = LeRobotFolder(tmp_path / "one"), check(tmp_path / "two", features, episodes)
    assert two.info.version == versions[1]
    assert two.description == one.description
    assert (one.frames(), one.past()) == (two.frames(), two.past())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == ".") == []


@pytest.mark.parametrize("version", VERSIONS)
def test_pictures_that_repeat_are_stored_once(tmp_path: Path, version: str) -> None:
    rng = np.random.default_rng(5)
    features = {"action": FEATURES["action"], "observation.images.front": image(64, 96)}
    for every in (1, 8):
        made = episode(rng, features, 64, every=every)
        write(tmp_path / f"every{every}", features, [made], version=version)
        unique = sum(map(len, set(made.rows.images["observation.images.front"])))
        stored = sum(path.stat().st_size for path in (tmp_path / f"every{every}/data").rglob("*.parquet"))
        assert unique < stored < 1.1 * unique + 20_000
        pictures = LeRobotFolder(tmp_path / f"every{every}").encoded("observation.images.front", 0)
        assert len({id(picture) for picture in pictures}) == 64 // every


def test_pandas_reads_the_files(tmp_path: Path) -> None:
    """What LeRobot reads with pandas: the tasks, whose index is the text."""
    rng = np.random.default_rng(6)
    made = episode(rng, FEATURES, 6, tasks=["b", "b", "a", "a", "b", "c d"])
    write(tmp_path / "dataset", FEATURES, [made])
    tasks = pd.read_parquet(tmp_path / "dataset/meta/tasks.parquet")
    assert tasks.index.tolist() == ["b", "a", "c d"]
    assert tasks["task_index"].tolist() == [0, 1, 2]
    data = pd.read_parquet(tmp_path / "dataset/data/chunk-000/file-000.parquet")
    np.testing.assert_array_equal(np.stack(data["action"]), made.rows.columns["action"])
    described = pq.read_schema(tmp_path / "dataset/data/chunk-000/file-000.parquet").metadata[b"huggingface"]
    assert json.loads(described)["info"]["features"]["observation.images.front"] == {"_type": "Image"}


def test_modality_names_groups_and_cameras(tmp_path: Path) -> None:
    write(tmp_path / "dataset", FEATURES, [episode(np.random.default_rng(7), FEATURES, 2)], version="v2.1")
    assert json.loads((tmp_path / "dataset/meta/modality.json").read_text()) == {
        "state": {"arm": {"start": 0, "end": 2}, "gripper": {"start": 2, "end": 3}},
        "action": {"action": {"start": 0, "end": 2}},
        "video": {"front": {"original_key": "observation.images.front"}},
        "annotation": {"human.task_description": {"original_key": "task_index"}},
    }


def test_modality_of_names_that_do_not_stand_together(tmp_path: Path) -> None:
    """Every entry is in exactly one group, and no group is lost to another of its name."""
    features = {"action": vector(("a_2.x", "a.x", "b.x", "a.y", "plain", "a.z"))}
    write(tmp_path / "dataset", features, [episode(np.random.default_rng(7), features, 2)], version="v2.1")
    groups = json.loads((tmp_path / "dataset/meta/modality.json").read_text())["action"]
    assert list(groups) == ["a_2", "a", "b", "a_3", "action", "a_4"]
    assert [(group["start"], group["end"]) for group in groups.values()] == [(i, i + 1) for i in range(6)]


def test_annotations_and_depth_of_newer_datasets_do_not_stop_the_rest(tmp_path: Path) -> None:
    """LeRobot 0.6 has columns of nested annotations, and cameras with one channel."""
    made = episode(np.random.default_rng(8), FEATURES, 4)
    write(tmp_path / "dataset", FEATURES, [made])
    path = tmp_path / "dataset/meta/info.json"
    info = json.loads(path.read_text())
    info["features"]["language_events"] = {"dtype": "language", "shape": [1], "names": None}
    info["features"]["observation.images.front"]["shape"] = [16, 24, 1]
    path.write_text(json.dumps(info))
    folder = LeRobotFolder(tmp_path / "dataset")
    np.testing.assert_array_equal(folder.column("action"), made.rows.columns["action"])
    with pytest.raises(LeRobotError, match="no column 'language_events'; choices: action"):
        folder.column("language_events")
    with pytest.raises(LeRobotError, match=r"front has shape \(16, 24, 1\); only RGB"):
        folder.images("observation.images.front", 0)
    with pytest.raises(LeRobotError, match="language_events cannot be written again"):
        rewrite(folder, tmp_path / "again")


def test_lists_without_their_length_are_read(tmp_path: Path) -> None:
    """As LeRobot's older datasets store vectors."""
    made = episode(np.random.default_rng(8), FEATURES, 4)
    write(tmp_path / "dataset", FEATURES, [made])
    path = tmp_path / "dataset/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("action")
    loose = pa.array(made.rows.columns["action"].tolist(), pa.list_(pa.float32()))
    pq.write_table(table.set_column(place, "action", loose), path)
    np.testing.assert_array_equal(LeRobotFolder(tmp_path / "dataset").column("action"), made.rows.columns["action"])


def test_video_options_change_the_size(tmp_path: Path) -> None:
    from vla_core.data.lerobot.video import encode

    seen = episode(np.random.default_rng(9), {"c": image(64, 96)}, 20).pictures["c"]
    sizes = []
    for crf in (10, 40):
        encode(tmp_path / f"{crf}.mp4", seen, FPS, VideoOptions(crf=crf, gop=10))
        sizes.append((tmp_path / f"{crf}.mp4").stat().st_size)
    assert sizes[0] > 1.5 * sizes[1]
