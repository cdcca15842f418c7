"""Bags to a dataset: bit for bit what the robot saw, whole or not at all, resumable, with figures that are right."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vla_core.cli import main
from vla_core.contract import ContractError, RobotContract
from vla_core.data import bag as bags
from vla_core.data import shards
from vla_core.data.bag import BagError
from vla_core.data.convert import ConvertError, convert, state_names
from vla_core.data.folder import load
from vla_core.data.lerobot.episode import EpisodeRows
from vla_core.data.lerobot.layout import Feature, image, vector
from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.data.lerobot.statistics import column_statistics, image_statistics
from vla_core.data.lerobot.video import VideoOptions
from vla_core.data.lerobot.writer import LeRobotWriter
from vla_core.data.reconvert import reconvert
from vla_core.data.report import ThresholdError, Thresholds
from vla_core.data.side import Seen, SideRows, encode_png
from vla_core.errors import VlaError
from vla_core.observation.builder import Observation, ObservationSpec
from vla_core.observation.image import resize
from vla_core.observation.messages import Message

from .bags import KINDS, write_kind
from .helpers import (
    CONTRACT,
    MS,
    SPEC,
    START,
    STEP,
    arm,
    camera,
    command,
    mark,
    stream_messages,
    task,
    with_stream,
    write_bag,
)
from .replayed import read_episode
from .test_multi_sensor import MANY, assert_equal, recording
from .test_multi_sensor import SPEC as MANY_SPEC

ROOT = Path(__file__).parents[2]


def observations(path: Path, contract: RobotContract, spec: ObservationSpec) -> list[Observation]:
    """All observations of a dataset, from its own columns and its side rows."""
    folder = LeRobotFolder(path)
    rows = SideRows(folder.frames(), folder.past(), contract, spec)
    state = folder.column("observation.state")
    pictures = {name: np.concatenate([folder.images(f"observation.images.{name}", e.index) for e in folder.episodes])
                for name in spec.images}  # fmt: skip
    texts = [folder.tasks[i] for i in folder.column("task_index")]

    def seen(row: int) -> Seen:
        return Seen({name: array[row] for name, array in pictures.items()}, state[row], texts[row])

    return [rows.observation(row, seen) for row in range(len(rows))]


def described(path: Path) -> dict:
    return json.loads((path / "vla_ros" / "dataset.json").read_text())


def names(path: Path) -> list[str]:
    return [entry["bag"] for entry in described(path)["episodes"]]


def digest(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(path.rglob("*")) if file.is_file()}  # fmt: skip


def many_messages(seed: int) -> list[Message]:
    recorded = recording(np.random.default_rng(seed), 300 * MS)
    commands = [command(START + k * STEP + 3 * MS, k / 100, -k / 100) for k in range(31)]
    return sorted([mark(START, 0), *recorded, *commands, mark(START + 310 * MS, 1)], key=lambda m: m.stamp_ns)


# --- what is in it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_a_dataset_holds_what_was_recorded(tmp_path: Path, version: str) -> None:
    paths = [write_bag(tmp_path / f"bag{i}", stream_messages(20 + i, seed=i)) for i in range(2)]
    progress: list[int] = []
    done = convert(paths, tmp_path / "set", SPEC, version=version, progress=progress.append)
    assert progress == [1, 2] and done.path == tmp_path / "set"
    assert sorted(os.listdir(tmp_path)) == ["bag0", "bag1", "set"]
    folder = LeRobotFolder(tmp_path / "set")
    assert (folder.info.version, folder.info.fps, folder.info.robot_type) == (version, 100.0, "toy")
    assert folder.info.features["observation.state"].names == ("shoulder", "elbow")
    assert folder.info.features["action"].names == CONTRACT.action_names
    expected = [read_episode(path, CONTRACT, SPEC) for path in paths]
    assert [entry.length for entry in folder.episodes] == [20, 21]
    np.testing.assert_array_equal(folder.column("action"), np.concatenate([e.actions for e in expected]))
    assert folder.tasks == ("lift it",)
    flat = [observation for episode in expected for observation in episode.observations]
    for found, observation in zip(observations(done.path, CONTRACT, SPEC), flat, strict=True):
        assert_equal(found, observation)
    for i, entry in enumerate(described(done.path)["episodes"]):
        assert (entry["bag"], entry["seed"], entry["task"], entry["outcome"]) == (f"bag{i}", i, "lift", "succeeded")
        assert (entry["instruction"], entry["dropped_ticks"], entry["length"]) == ("lift it", 0, 20 + i)


@pytest.mark.parametrize(("version", "masked"), [("v3.0", False), ("v3.0", True), ("v2.1", True)])
def test_every_sensor_history_and_mask_comes_back(tmp_path: Path, version: str, masked: bool) -> None:
    contract = MANY
    if masked:
        gone = {n: s if s.latched else dataclasses.replace(s, missing="mask") for n, s in MANY.observations.items()}
        contract = dataclasses.replace(MANY, observations=gone)
    paths = []
    for seed in range(2):
        recorded = many_messages(seed)
        if masked:
            recorded = [m for m in recorded if m.topic in ("arm/command", "task", "episode")
                        or not 100 * MS < m.stamp_ns - START - 10 * MS * len(m.topic) < 230 * MS]  # fmt: skip
        paths.append(write_bag(tmp_path / f"bag{seed}", recorded, contract))
    done = convert(paths, tmp_path / "set", MANY_SPEC, version=version)
    expected = [o for path in paths for o in read_episode(path, contract, MANY_SPEC).observations]
    found = observations(done.path, contract, MANY_SPEC)
    assert len(found) == len(expected) > 30
    if masked:
        assert len({name for o in expected for name, there in o.present.items() if not there}) > 3
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)
    state = LeRobotFolder(done.path).info.features["observation.state"].names
    assert state == state_names(contract, MANY_SPEC)
    assert state[:3] == ("arm.shoulder", "arm.elbow", "odom.pose.pose.position.x")


def test_a_picture_that_several_ticks_see_is_stored_once(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", stream_messages(40))
    pictures = LeRobotFolder(convert([path], tmp_path / "set", SPEC).path).encoded("observation.images.camera", 0)
    assert len(pictures) == 40 and len(set(pictures)) == 10


def test_videos_show_what_the_camera_saw(tmp_path: Path) -> None:
    """A picture of even size, smooth enough for a codec: within a few levels of the original."""
    spec = dataclasses.replace(SPEC, images={"camera": dataclasses.replace(SPEC.images["camera"], height=48, width=64)})
    paths = [write_bag(tmp_path / f"bag{i}", stream_messages(12 + i, seed=i)) for i in range(2)]
    done = convert(paths, tmp_path / "set", spec, video=VideoOptions(crf=4))
    folder = LeRobotFolder(done.path)
    assert any("not bit for bit" in note for note in done.report.notes)
    for entry, path in zip(folder.episodes, paths, strict=True):
        shown = folder.images("observation.images.camera", entry.index).astype(float)
        saw = np.stack([o.images["camera"] for o in read_episode(path, CONTRACT, spec).observations])
        assert shown.shape == saw.shape and np.abs(shown - saw).mean() < 8
        wrong = np.abs(shown - np.roll(saw, 4, axis=0)).mean()
        assert wrong > 30, "another picture would not pass"


def test_marks_split_a_bag_into_episodes_and_words_change_within_one(tmp_path: Path) -> None:
    """Ticks before the first start and after an end belong to no episode."""
    first, second = START + 4 * STEP, START + 20 * STEP
    recorded: list[Message] = [task(START, "wait")]
    for k in range(40):
        stamp = START + k * STEP
        recorded += [camera(stamp, k), arm(stamp, k), command(stamp, 0.1)]
    recorded += [mark(first, 0, seed=3), mark(first + 9 * STEP, 1, seed=3), mark(second, 0, seed=4)]
    recorded += [
        task(second - STEP, "lift it"),
        task(second + 5 * STEP, "drop it"),
        mark(second + 15 * STEP, 2, seed=4),
    ]
    recorded.sort(key=lambda m: m.stamp_ns)
    path = write_bag(tmp_path / "day", recorded)
    done = convert([path], tmp_path / "set", SPEC, keep_failed=True)
    folder = LeRobotFolder(done.path)
    entries = described(done.path)["episodes"]
    assert [(e["part"], e["seed"], e["outcome"], e["length"]) for e in entries] == [
        (1, 3, "succeeded", 10), (2, 4, "failed", 16)]  # fmt: skip
    stamps = folder.frames().column("stamp_ns").to_pylist()
    assert stamps == [first + k * STEP for k in range(10)] + [second + k * STEP for k in range(16)]
    texts = [folder.tasks[i] for i in folder.column("task_index")]
    assert texts == ["wait"] * 10 + ["lift it"] * 5 + ["drop it"] * 11
    report = done.report
    assert (report.ticks, report.outside_ticks, report.dropped_ticks) == (26, 14, 0)
    only = convert([path], tmp_path / "good", SPEC)
    assert only.report.left_out == [{"bag": "day", "part": 2, "why": "failed"}]
    assert [e["part"] for e in described(only.path)["episodes"]] == [1]


def test_failed_and_aborted_and_unfinished_episodes_are_no_demonstrations(tmp_path: Path) -> None:
    paths = [write_bag(tmp_path / f"bag{o}", stream_messages(5, outcome=o)) for o in (1, 2, 3)]
    unfinished = [m for m in stream_messages(5) if m.topic != "episode"] + [mark(START, 0)]
    paths.append(write_bag(tmp_path / "bag4", unfinished))
    done = convert(paths, tmp_path / "good", SPEC)
    assert names(done.path) == ["bag1"]
    left_out = [("bag2", "failed"), ("bag3", "aborted"), ("bag4", "never ended")]
    assert [(e["bag"], e["why"]) for e in described(done.path)["left_out"]] == left_out
    assert names(convert(paths, tmp_path / "all", SPEC, keep_failed=True).path) == ["bag1", "bag2", "bag3", "bag4"]
    with pytest.raises(
        ConvertError, match=r"none of the 3 episodes succeeded \(the first, bag2: failed\).*--keep-failed"
    ):
        convert(paths[1:], tmp_path / "none", SPEC)
    assert not (tmp_path / "none").exists()


def test_bags_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [write_bag(tmp_path / day / "bag", stream_messages(5, seed=i)) for i, day in enumerate(("mon", "tue"))]
    assert names(convert(paths, tmp_path / "set", SPEC).path) == ["mon/bag", "tue/bag"]
    with pytest.raises(ConvertError, match=r"named twice: .*bag; a bag is converted once"):
        convert([paths[0], paths[0]], tmp_path / "twice", SPEC)


# --- the report -----------------------------------------------------------------------------------------------------


def lossy(path: Path, contract: RobotContract = CONTRACT) -> tuple[Path, list[Message]]:
    """A bag whose camera is late, lost for a while and then gone, whose commands have a hole."""
    recorded = [m for m in stream_messages(60) if m.topic not in ("cam/raw", "arm/command")]
    recorded += [camera(START + 4 * k * STEP + (k % 3) * MS, k) for k in range(15) if k not in (4, 5, 6)]
    recorded += [command(START + k * STEP + MS, 0.1) for k in range(60) if not 40 <= k < 43]
    return write_bag(path, sorted(recorded, key=lambda m: m.stamp_ns), contract), recorded


def test_figures_against_brute_force(tmp_path: Path) -> None:
    contract = with_stream("camera", missing="mask", max_age_s=0.06)
    path, recorded = lossy(tmp_path / "bag", contract)
    report = convert([path], tmp_path / "set", SPEC).report
    stamps = sorted(m.stamp_ns for m in recorded if m.topic == "cam/raw")
    ticks = [START + k * STEP for k in range(60)]
    ages = [tick - max(s for s in stamps if s <= tick) for tick in ticks]
    matched = [age for age in ages if age <= 60 * MS]
    figures = report.streams["camera"]
    assert (figures.messages, figures.ticks, figures.matched) == (12, 60, len(matched))
    assert (figures.missing, figures.stale, figures.late, figures.future) == (0, 60 - len(matched), 0, 0)
    error = figures.error_ms()
    assert error is not None and 0 < len(matched) < 60
    assert error["mean"] == pytest.approx(np.mean(matched) / 1e6)
    assert error["max"] == max(matched) / 1e6
    assert error["p95"] == pytest.approx(np.quantile(matched, 0.95, method="inverted_cdf") / 1e6, abs=1e-9)
    assert report.streams["action.arm"].matched == 57 and report.dropped_ticks == 3
    assert report.streams["arm"].match == 1.0 and report.frames == 57
    stored = json.loads((tmp_path / "set" / "vla_ros" / "report.json").read_text())
    assert stored["streams"]["camera"]["error_ms"] == error and stored["by_bag"]["bag"]["dropped_ticks"] == 3
    line = next(line for line in report.table().splitlines() if line.startswith("camera"))
    assert f"{len(matched) / 60:.3f}" in line and f"{error['p95']:.1f}" in line


def test_refused_ticks_count_what_was_missing_and_what_was_stale(tmp_path: Path) -> None:
    path, recorded = lossy(tmp_path / "bag", with_stream("camera", max_age_s=0.06))
    figures = convert([path], tmp_path / "set", SPEC).report.streams["camera"]
    stamps = [m.stamp_ns for m in recorded if m.topic == "cam/raw"]
    fresh = sum(any(0 <= START + k * STEP - s <= 60 * MS for s in stamps) for k in range(60))
    assert (figures.matched, figures.missing, figures.stale) == (fresh, 0, 60 - fresh)


def test_figures_of_many_bags_add_up(tmp_path: Path) -> None:
    contract = with_stream("camera", missing="mask", max_age_s=0.06)
    one = convert([lossy(tmp_path / "a", contract)[0]], tmp_path / "one", SPEC).report.streams["camera"]
    both = convert([lossy(tmp_path / "b", contract)[0], tmp_path / "a"], tmp_path / "two", SPEC).report.streams[
        "camera"
    ]
    assert (both.messages, both.ticks, both.stale) == (2 * one.messages, 2 * one.ticks, 2 * one.stale)
    assert both.error_ms() == one.error_ms()


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"min_match": 0.95}, r"bag: camera \(cam/raw\) is there at 50 of 60 ticks, 0\.833, below .*min_match 0\.95"),
        ({"max_error_ms": 45}, r"bag: camera \(cam/raw\) is up to 60\.0 ms from its tick, above .*max_error_ms 45"),
    ],
)
def test_a_threshold_fails_the_conversion(tmp_path: Path, limits: dict[str, float], says: str) -> None:
    good = write_bag(tmp_path / "good", stream_messages(20), with_stream("camera", missing="mask", max_age_s=0.06))
    path, _ = lossy(tmp_path / "bag", with_stream("camera", missing="mask", max_age_s=0.06))
    with pytest.raises(ThresholdError, match=says):
        convert([good, path], tmp_path / "set", SPEC, thresholds=Thresholds(**limits), resume=False)
    assert sorted(os.listdir(tmp_path)) == ["bag", "good"]
    loose = {key: 0.5 if key == "min_match" else 100 for key in limits}
    assert convert([good, path], tmp_path / "set", SPEC, thresholds=Thresholds(**loose)).report.episodes == 2


@pytest.mark.parametrize("limits", [{"min_match": 1.5}, {"max_lost": -0.1}, {"max_error_ms": 0.0}])
def test_thresholds_that_make_no_sense(limits: dict[str, float]) -> None:
    with pytest.raises(ThresholdError, match=f"{next(iter(limits))}: expected"):
        Thresholds(**limits)


# --- bags that are bad ----------------------------------------------------------------------------------------------


def spoil(folder: Path) -> dict[str, Path]:
    """Bags that are bad in different ways, after two good ones."""
    recorded = stream_messages(20)
    found = {"a good one": write_bag(folder / "a good one", recorded)}
    found["cut"] = write_bag(folder / "cut", recorded)
    (file,) = found["cut"].glob("*.mcap")
    os.truncate(file, file.stat().st_size // 2)
    found["unclosed"] = write_bag(folder / "unclosed", recorded)
    (found["unclosed"] / "metadata.yaml").unlink()
    found["no camera"] = write_bag(folder / "no camera", [m for m in recorded if m.topic != "cam/raw"])
    wrong = [Message("cam/raw", "std_msgs/msg/String", START, m.data) if m.topic == "cam/raw" else m for m in recorded]
    found["types"] = write_bag(folder / "types", wrong)
    found["contract"] = write_bag(folder / "contract", recorded, with_stream("arm", max_age_s=0.5))
    bad = [dataclasses.replace(m, data=m.data[:40]) if m.topic == "cam/raw" else m for m in recorded]
    found["undecodable"] = write_bag(folder / "undecodable", bad)
    found["no answer"] = write_bag(
        folder / "no answer", [m for m in recorded if m.topic != "arm/command"] + [command(START - 90 * STEP, 0.1)]
    )
    found["z good one"] = write_bag(folder / "z good one", recorded)
    return found


SAYS = {
    "cut": "truncated or damaged", "unclosed": "never closed", "no camera": "no topic 'cam/raw'",
    "types": "'cam/raw' holds std_msgs/msg/String", "contract": "observations.arm.max_age_s",
    "undecodable": "cam/raw: .* do not decode", "no answer": "no tick has both an observation and a command",
}  # fmt: skip


def test_bad_bags_are_named_and_skipped(tmp_path: Path) -> None:
    found = spoil(tmp_path / "bags")
    done = convert(list(found.values()), tmp_path / "set", SPEC, on_bad="skip")
    assert names(done.path) == ["a good one", "z good one"]
    assert [entry["bag"] for entry in done.report.bad] == list(SAYS)
    stored = json.loads((done.path / "vla_ros" / "report.json").read_text())["bad"]
    for entry, (name, says) in zip(stored, SAYS.items(), strict=True):
        with pytest.raises(VlaError, match=says) as caught:  # the same text, when one is told to stop
            convert([found["a good one"], found[name]], tmp_path / "none", SPEC, resume=False)
        assert str(caught.value) == entry["error"] and str(found[name]) in entry["error"]
        assert "\n" not in entry["error"] and f"BAD: {entry['error']}" in done.report.table()
    assert sorted(os.listdir(tmp_path)) == ["bags", "set"]


def test_when_all_bags_are_bad_there_is_no_dataset(tmp_path: Path) -> None:
    found = spoil(tmp_path / "bags")
    with pytest.raises(ConvertError, match=r"all 2 bags are bad; the first: .*no topic 'cam/raw'"):
        convert([found["no camera"], found["types"]], tmp_path / "set", SPEC, on_bad="skip")
    assert os.listdir(tmp_path) == ["bags"]
    with pytest.raises(BagError, match="never closed"):  # no contract to begin with
        convert([found["unclosed"]], tmp_path / "set", SPEC, on_bad="skip")


def test_the_first_whole_bag_gives_the_contract_when_bad_ones_are_skipped(tmp_path: Path) -> None:
    found = spoil(tmp_path / "bags")
    done = convert([found["unclosed"], found["a good one"]], tmp_path / "set", SPEC, on_bad="skip")
    assert names(done.path) == ["a good one"]


def test_a_topic_on_another_clock_makes_a_bad_bag(tmp_path: Path) -> None:
    ahead = [(m, m.stamp_ns - (3000 * MS if m.topic == "arm/state" else 0)) for m in stream_messages(30)]
    with bags.BagWriter(tmp_path / "bag", {bags.CONTRACT_KEY: CONTRACT.to_yaml()}) as writer:
        for topic, type_name in {m.topic: m.type for m, _ in ahead}.items():
            writer.add_topic(topic, type_name)
        for message, receive_ns in ahead:
            writer.write(message.topic, receive_ns, message.data)
    with pytest.raises(BagError, match=r"no tick has both|arm \(arm/state\): of 30 messages 0 .* and 30 in the future"):
        convert([tmp_path / "bag"], tmp_path / "set", SPEC)


def test_bags_of_another_contract_are_refused_and_remapped_topics_are_not(tmp_path: Path) -> None:
    first = write_bag(tmp_path / "first", stream_messages(5))
    other = write_bag(tmp_path / "other", stream_messages(5), with_stream("arm", max_age_s=0.5))
    with pytest.raises(ContractError, match=r"observations\.arm\.max_age_s.*0\.05.*other has 0\.5"):
        convert([first, other], tmp_path / "set", SPEC)
    moved = [dataclasses.replace(m, topic="left/state") if m.topic == "arm/state" else m for m in stream_messages(5)]
    remapped = write_bag(tmp_path / "remapped", moved, with_stream("arm", topic="left/state"))
    assert convert([first, remapped], tmp_path / "set", SPEC).report.episodes == 2


def test_the_contract_given_by_hand_must_be_that_of_the_bags(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", stream_messages(5))
    other = dataclasses.replace(CONTRACT, rate_hz=50.0)
    with pytest.raises(ContractError, match=r"rate_hz: the dataset has 50\.0, .*bag has 100\.0"):
        convert([path], tmp_path / "set", SPEC, other)


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("keep")
    path = write_bag(tmp_path / "bag", stream_messages(5))
    with pytest.raises(ConvertError, match="exists already"):
        convert([path], tmp_path / "set", SPEC)
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["mine.txt"]
    with pytest.raises(ConvertError, match="no bags"):
        convert([], tmp_path / "other", SPEC)
    with pytest.raises(ConvertError, match=r"'v1\.0' cannot be written; choices: v2\.1, v3\.0"):
        convert([path], tmp_path / "other", SPEC, version="v1.0")
    with pytest.raises(VlaError, match="has no observation 'lidar'"):  # no fault of a bag, so never skipped
        convert([path], tmp_path / "other", ObservationSpec(state=("lidar",)), on_bad="skip")
    assert sorted(os.listdir(tmp_path)) == ["bag", "set"]


@pytest.mark.parametrize("kept", [0, 3, 1000])
def test_statistics_of_a_camera_are_those_of_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """However many of the pictures are still in memory when the episode ends."""
    monkeypatch.setattr(shards, "KEPT_BYTES", kept * 6 * 8 * 3)
    made = convert([write_bag(tmp_path / "bag", stream_messages(15))], tmp_path / "set", SPEC)
    folder = LeRobotFolder(made.path)
    expected = image_statistics(list(folder.images("observation.images.camera", 0)))
    assert folder.stats is not None
    for name, value in expected.items():
        np.testing.assert_allclose(folder.stats["observation.images.camera"][name], value, err_msg=name)


# --- interrupted, in parallel, on a full disk -----------------------------------------------------------------------

RUN = """
import os, signal, sys
from pathlib import Path
from vla_core.data.convert import convert
from vla_core.observation.spec import ImageSize, ObservationSpec

SPEC = ObservationSpec(images={"camera": ImageSize(height=6, width=8)}, state=("arm",), instruction="task")
if __name__ == "__main__":
    out, number, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    def progress(done):
        print(done, flush=True)
        if done == 2 and number:
            os.kill(os.getpid(), number)
    convert(sorted(out.parent.glob("bag*")), out, SPEC, workers=workers, progress=progress)
"""


def interrupted(out: Path, number: int, workers: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RUN, str(out), str(number), str(workers)], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)  # fmt: skip


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGKILL, 1), (signal.SIGINT, 2)])
def test_an_interrupted_conversion_goes_on_where_it_was(tmp_path: Path, number: int, workers: int) -> None:
    paths = [write_bag(tmp_path / f"bag{i}", stream_messages(15, seed=i)) for i in range(4)]
    whole = convert(paths, tmp_path / "whole", SPEC)
    run = interrupted(tmp_path / "set", number, workers)
    assert run.returncode in (-number, 1), run.stderr
    assert not (tmp_path / "set").exists()
    shards = {file: file.stat().st_mtime_ns for file in (tmp_path / ".set.partial" / "shards").glob("*/bag.json")}
    assert 2 <= len(shards) <= 4
    untouched: list[bool] = []
    convert(paths, tmp_path / "set", SPEC, progress=lambda done: untouched.append(
        all(file.stat().st_mtime_ns == then for file, then in shards.items())
    ))  # fmt: skip
    assert untouched == [True] * 4, "what was done is not done again"
    assert digest(tmp_path / "set") == digest(whole.path)
    assert not (tmp_path / ".set.partial").exists()


def test_shards_of_other_wishes_or_damaged_ones_are_made_anew(tmp_path: Path) -> None:
    paths = [write_bag(tmp_path / f"bag{i}", stream_messages(15, seed=i)) for i in range(2)]
    bad = write_bag(tmp_path / "bag2", [m for m in stream_messages(15) if m.topic != "cam/raw"])

    def fail() -> list[Path]:
        with pytest.raises(BagError, match="no topic 'cam/raw'"):
            convert([*paths, bad], tmp_path / "set", SPEC)
        return sorted((tmp_path / ".set.partial" / "shards").iterdir())

    first = fail()
    assert len(first) == 2 and first == fail(), "kept, so that a bad bag costs only itself"
    (victim, *_) = sorted(first[0].glob("*.arrow"))
    os.truncate(victim, victim.stat().st_size - 8)
    done = convert(paths, tmp_path / "set", SPEC)
    assert digest(done.path) == digest(convert(paths, tmp_path / "again", SPEC).path)
    assert sorted(os.listdir(tmp_path)) == ["again", "bag0", "bag1", "bag2", "set"]
    with pytest.raises(BagError):
        convert([*paths, bad], tmp_path / "other", SPEC)
    before = {path.name for path in (tmp_path / ".other.partial" / "shards").iterdir()}
    small = dataclasses.replace(SPEC, images={})
    with pytest.raises(BagError):
        convert([*paths, write_bag(tmp_path / "bag3", [m for m in stream_messages(9) if m.topic != "arm/state"])],
                tmp_path / "other", small)  # fmt: skip
    after = {path.name for path in (tmp_path / ".other.partial" / "shards").iterdir()}
    assert len(after) == 2 and not before & after


@pytest.mark.parametrize("kind", ["video", "pictures"])
def test_processes_make_no_difference(tmp_path: Path, kind: str) -> None:
    spec = dataclasses.replace(SPEC, images={"camera": dataclasses.replace(SPEC.images["camera"], height=16, width=16)})
    paths = [write_bag(tmp_path / f"bag{i}", stream_messages(8 + i, seed=i)) for i in range(5)]
    video = VideoOptions() if kind == "video" else None
    alone = convert(paths, tmp_path / "one", spec, video=video, workers=1)
    several = convert(paths, tmp_path / "two", spec, video=video, workers=2)
    assert digest(alone.path) == digest(several.path)


RAY = """
import sys
from pathlib import Path
from vla_core.data.convert import convert
from vla_core.errors import VlaError
from vla_core.observation.spec import ImageSize, ObservationSpec

SPEC = ObservationSpec(images={"camera": ImageSize(height=6, width=8)}, state=("arm",), instruction="task")
out = Path(sys.argv[1])
try:
    convert(sorted(out.parent.glob("bag*")), out, SPEC, workers=2, ray=True)
except VlaError as error:
    print(error)
"""


def test_ray_gives_the_same_or_says_how_to_install_it(tmp_path: Path) -> None:
    """Where Ray is installed a local cluster converts; where it is not, that is said before anything is left."""
    paths = [write_bag(tmp_path / f"bag{i}", stream_messages(8, seed=i)) for i in range(3)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    run = subprocess.run([sys.executable, "-c", RAY, str(tmp_path / "set")], cwd=ROOT, text=True, capture_output=True,
                         timeout=180, env=environment)  # fmt: skip
    assert run.returncode == 0, run.stderr
    if importlib.util.find_spec("ray") is None:
        assert "Ray is not installed: pip install ray, or leave --ray out" in run.stdout
        assert sorted(os.listdir(tmp_path)) == ["bag0", "bag1", "bag2"]
    else:
        assert digest(tmp_path / "set") == digest(convert(paths, tmp_path / "alone", SPEC).path)


def test_two_conversions_to_one_place_do_not_mix(tmp_path: Path) -> None:
    paths = [write_bag(tmp_path / f"bag{i}", stream_messages(8, seed=i)) for i in range(2)]
    refused: list[str] = []

    def again(done: int) -> None:
        with pytest.raises(ConvertError, match="another process is converting to it") as caught:
            convert(paths, tmp_path / "set", SPEC)
        refused.append(str(caught.value))

    convert(paths, tmp_path / "set", SPEC, progress=again)
    assert len(refused) == 2 and names(tmp_path / "set") == ["bag0", "bag1"]


FULL = """
import resource, signal, sys
from pathlib import Path
from vla_core.data.convert import convert
from vla_core.errors import VlaError
from vla_core.observation.spec import ImageSize, ObservationSpec

SPEC = ObservationSpec(images={"camera": ImageSize(height=6, width=8)}, state=("arm",), instruction="task")

if __name__ == "__main__":
    out, limit, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        convert(sorted(out.parent.glob("bag*")), out, SPEC, workers=workers, on_bad="skip")
    except VlaError as error:
        print(error)
        sys.exit(3)
"""


@pytest.mark.parametrize(("limit", "workers"), [(2_000, 1), (9_000, 2)])
def test_a_full_disk_is_a_clear_error_and_no_dataset(tmp_path: Path, limit: int, workers: int) -> None:
    """A limit on the size of files stands in for a disk: writing beyond it fails as on a full one."""
    for i in range(2):
        write_bag(tmp_path / f"bag{i}", stream_messages(40, seed=i))
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "set"), str(limit), str(workers)], cwd=ROOT,
                         text=True, capture_output=True, timeout=120)  # fmt: skip
    assert run.returncode == 3, run.stderr
    assert "cannot be written" in run.stdout and run.stdout.count("\n") == 1
    assert not (tmp_path / "set").exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit
    assert names(convert(sorted(tmp_path.glob("bag*")), tmp_path / "set", SPEC).path) == ["bag0", "bag1"]


# --- every form of input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bag_gives_the_same_dataset(tmp_path: Path, kind: str) -> None:
    recorded = sorted(stream_messages(25), key=lambda m: m.stamp_ns)
    plain = convert([write_bag(tmp_path / "plain" / "bag", recorded)], tmp_path / "expected", SPEC)
    done = convert([write_kind(tmp_path / "other" / "bag", recorded, kind)], tmp_path / "set", SPEC)
    assert digest(done.path) == digest(plain.path)


def test_a_dataset_goes_to_the_other_version_and_back(tmp_path: Path) -> None:
    """With its side rows, past ticks and report; and into the same observations."""
    paths = [write_bag(tmp_path / f"bag{i}", many_messages(i), MANY) for i in range(2)]
    first = convert(paths, tmp_path / "v30", MANY_SPEC)
    told = reconvert(first.path, tmp_path / "v21", version="v2.1")
    assert told == f"2 episodes of {first.path} (v3.0) are now v2.1"
    reconvert(tmp_path / "v21", tmp_path / "back")
    assert LeRobotFolder(tmp_path / "v21").info.version == "v2.1"
    expected = observations(first.path, MANY, MANY_SPEC)
    for place in ("v21", "back"):
        found = observations(tmp_path / place, MANY, MANY_SPEC)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
        assert described(tmp_path / place)["episodes"] == described(first.path)["episodes"]
        report = "vla_ros/report.json"
        assert (tmp_path / place / report).read_bytes() == (first.path / report).read_bytes()
    with pytest.raises(ContractError, match="rate_hz"):
        reconvert(first.path, tmp_path / "x", contract=dataclasses.replace(MANY, rate_hz=50.0))
    with pytest.raises(ConvertError, match="was built for another observation than the recipe's"):
        reconvert(first.path, tmp_path / "x", spec=SPEC)
    assert not (tmp_path / "x").exists()


def foreign(folder: Path) -> np.ndarray:
    """A dataset of others: larger pictures, more columns, other names, no side rows. Returns its pictures."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 9, 12, 16, 3), dtype=np.uint8)
    features = {
        "observation.state": vector(("elbow", "wrist", "shoulder")), "action": vector(CONTRACT.action_names[::-1]),
        "observation.images.camera": image(12, 16), "reward": Feature("float32", (1,)),
    }  # fmt: skip
    with LeRobotWriter(folder, fps=100, features=features, robot_type="theirs", description=None) as writer:
        for episode in range(2):
            columns = {key: rng.normal(size=(9, *features[key].shape)).astype(np.float32)
                       for key in ("observation.state", "action", "reward")}  # fmt: skip
            statistics = {key: column_statistics(column) for key, column in columns.items()}
            statistics["observation.images.camera"] = image_statistics(list(pictures[episode]))
            encoded = [encode_png(picture) for picture in pictures[episode]]
            writer.add(EpisodeRows(columns=columns, tasks=["sort"] * 9, statistics=statistics,
                                   images={"observation.images.camera": encoded}))  # fmt: skip
    return pictures


def test_a_dataset_of_others_becomes_one_of_ours_with_a_contract(tmp_path: Path) -> None:
    pictures = foreign(tmp_path / "theirs")
    kept = reconvert(tmp_path / "theirs", tmp_path / "v21", version="v2.1")
    assert "it has no contract, so name one with --contract" in kept
    theirs = LeRobotFolder(tmp_path / "v21")
    assert theirs.description is None and "reward" in theirs.info.features
    with pytest.raises(ConvertError, match="name a recipe too"):
        reconvert(tmp_path / "v21", tmp_path / "ours", contract=CONTRACT)
    told = reconvert(tmp_path / "v21", tmp_path / "ours", contract=CONTRACT, spec=SPEC)
    assert "are bound to the contract toy" in told
    ours = LeRobotFolder(tmp_path / "ours")
    state, action = theirs.column("observation.state"), theirs.column("action")
    np.testing.assert_array_equal(ours.column("observation.state"), state[:, [2, 0]])
    np.testing.assert_array_equal(ours.column("action"), action[:, ::-1])
    assert "reward" not in ours.info.features and ours.tasks == ("sort",)
    found = observations(tmp_path / "ours", CONTRACT, SPEC)
    assert [o.stamp_ns for o in found] == [k * STEP for k in range(9)] * 2
    for row, seen in enumerate(found):
        np.testing.assert_array_equal(seen.images["camera"], resize(pictures.reshape(18, 12, 16, 3)[row], 6, 8))
        assert seen.instruction == "sort" and all(seen.present.values())
    data = load(tmp_path / "ours")
    assert data.contract == CONTRACT and data.spec == SPEC and data.frames == 18
    with pytest.raises(VlaError, match=r"has no entry arm\.knee or knee; choices: elbow, shoulder, wrist"):
        reconvert(tmp_path / "theirs", tmp_path / "x", spec=SPEC,
                  contract=with_stream("arm", names=("elbow", "knee")))  # fmt: skip


# --- the command ----------------------------------------------------------------------------------------------------

RECIPE = """
observation:
  images: {camera: {height: 6, width: 8}}
  state: [arm]
  instruction: task
model: {type: mini_vla}
"""


def test_the_command_prints_the_report_and_names_the_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path / "bags")
    (tmp_path / "toy.yaml").write_text(RECIPE)
    words = ["convert", "bags", "--out", "set", "--recipe", "toy.yaml"]
    assert main(words) == 1
    assert "the contracts disagree at observations.arm.max_age_s" in capsys.readouterr().err
    assert main([*words, "--on-bad", "skip", "--min-match", "1.1"]) == 1
    assert "min_match: expected a share" in capsys.readouterr().err
    assert main([*words, "--on-bad", "skip", "--max-error-ms", "20"]) == 1
    assert "a good one: camera (cam/raw) is up to 30.0 ms from its tick" in capsys.readouterr().err
    assert main([*words, "--on-bad", "skip", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "set: 2 episodes, 40 ticks" in printed and printed.count("BAD: ") == len(SAYS)
    assert main(["convert", "set", "--out", "older", "--version", "v2.1"]) == 0
    assert "2 episodes of set (v3.0) are now v2.1" in capsys.readouterr().out
    assert names(tmp_path / "older") == ["a good one", "z good one"]
    for wrong, says in (
        (["set", "bags"], "a dataset is converted by itself"), (["set", "--video"], "--video: belongs to bags"),
        (["bags", "--crf", "9"], "--crf: belongs to --video"), (["bags", "--video", "vp9"], "choices: av1, h264"),
    ):  # fmt: skip
        assert main(["convert", *wrong, "--out", "other"]) == 1
        assert says in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bags", "older", "set", "toy.yaml"]
