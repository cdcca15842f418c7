"""From bags to ticks and training windows, against a reconstruction in the plainest way: loops over lists."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from vla_core.contract import ContractError, RobotContract
from vla_core.data.bag import CONTRACT_KEY, BagError, BagWriter
from vla_core.data.dataset import ChunkWindows, Dataset, DatasetError, convert, load
from vla_core.data.episodes import Commands, read_episode, replay_ticks
from vla_core.errors import VlaError
from vla_core.observation.builder import ObservationBuilder, ObservationSpec
from vla_core.observation.messages import Message

from .helpers import (
    CONTRACT,
    JOINTS,
    MS,
    SPEC,
    START,
    STEP,
    arm,
    camera,
    command,
    dataset,
    mark,
    pixels,
    stream_messages,
    task,
    with_stream,
    write_bag,
)


class Recording:
    """Streams with jitter, gaps and latency, kept as plain numbers beside their messages."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)

        def stamps(period: int, jitter: int, lost: float, first: int) -> list[int]:
            ideal = START + first + np.arange(0, 1200 * MS, period)
            jittered = ideal + rng.integers(-jitter, jitter + 1, len(ideal))
            return sorted({int(t) for t in jittered[rng.random(len(ideal)) >= lost]})

        self.arm = stamps(10 * MS, 2 * MS, 0.1, int(rng.integers(0, 30 * MS)))
        self.camera = stamps(40 * MS, 9 * MS, 0.3, int(rng.integers(0, 90 * MS)))
        self.commands = stamps(10 * MS, 3 * MS, 0.1, int(rng.integers(0, 40 * MS)))
        del self.arm[60:72]  # a silence of the arm, longer than its greatest age
        self.task = START + int(rng.integers(0, 150 * MS))
        self.messages = [
            task(self.task, "lift it"),
            *(arm(t, k / 100, -k) for k, t in enumerate(self.arm)),
            *(camera(t, k) for k, t in enumerate(self.camera)),
            *(command(t, k / 1000, k / 500) for k, t in enumerate(self.commands)),
        ]
        latency = {"arm/state": 1 * MS, "cam/raw": 25 * MS, "arm/command": 2 * MS, "task": 0}
        self.received = sorted((m.stamp_ns + int(rng.integers(0, 1 + latency[m.topic])), i, m)
                               for i, m in enumerate(self.messages))  # fmt: skip

    def write(self, path: Path) -> Path:
        with BagWriter(path, {CONTRACT_KEY: CONTRACT.to_yaml()}) as writer:
            for topic, type_name in {m.topic: m.type for m in self.messages}.items():
                writer.add_topic(topic, type_name)
            for receive_ns, _, message in self.received:
                writer.write(message.topic, receive_ns, message.data)
        return path

    def expected_ticks(self) -> list[int]:
        """From the first stamp at which both sensors are fresh (a period less half a step) and the text is there."""
        stamps = sorted([*self.arm, *self.camera, self.task])
        for now in stamps:
            arms = [t for t in self.arm if t <= now]
            cameras = [t for t in self.camera if t <= now]
            if arms and cameras and self.task <= now and now - arms[-1] < 5 * MS and now - cameras[-1] < 35 * MS:
                return list(range(now, stamps[-1] + STEP, STEP))
        raise AssertionError

    def expected_rows(self) -> list[tuple[int, int, int, int]]:
        """(tick, arm message, camera message, command) of the ticks that have all three."""
        rows = []
        for tick in self.expected_ticks():
            a = max((k for k, t in enumerate(self.arm) if t <= tick), default=None)
            c = max((k for k, t in enumerate(self.camera) if t <= tick), default=None)
            u = min((k for k, t in enumerate(self.commands) if tick <= t < tick + STEP), default=None)
            assert a is not None and c is not None
            if tick - self.arm[a] <= 50 * MS and tick - self.camera[c] <= 100 * MS and u is not None:
                rows.append((tick, a, c, u))
        return rows


@pytest.mark.parametrize("seed", range(12))
def test_ticks_and_episode_against_brute_force(tmp_path: Path, seed: int) -> None:
    recording = Recording(seed)
    builder = ObservationBuilder(CONTRACT, SPEC)
    found = list(replay_ticks([m for _, _, m in recording.received], builder, builder.make_buffer()))
    assert found == recording.expected_ticks()

    episode = read_episode(recording.write(tmp_path / "bag"), CONTRACT, SPEC)
    rows = recording.expected_rows()
    assert 30 < len(rows) < len(found), "the recording must have both good and dropped ticks"
    assert [o.stamp_ns for o in episode.observations] == [tick for tick, *_ in rows]
    assert episode.dropped_ticks == len(found) - len(rows)
    for seen, action, (_, a, c, u) in zip(episode.observations, episode.actions, rows, strict=True):
        np.testing.assert_array_equal(seen.state, np.array([a / 100, -a], np.float32))
        np.testing.assert_array_equal(seen.images["camera"], pixels(c))
        np.testing.assert_array_equal(action, np.array([u / 1000, u / 500], np.float32))
        assert seen.instruction == "lift it"


def test_at_a_tick_the_buffer_holds_no_future() -> None:
    recording = Recording(99)
    builder = ObservationBuilder(CONTRACT, SPEC)
    buffer = builder.make_buffer()
    for tick in replay_ticks(recording.messages, builder, buffer):
        newest = buffer.newest_ns("arm")
        assert newest is not None and newest == max(t for t in recording.arm if t <= tick)


def test_ticks_start_even_if_the_sensors_phases_never_meet() -> None:
    """Three arms at the control rate, a third of a period apart: one of them is always half a period old."""
    third = STEP // 3
    streams = {f"arm{i}": dataclasses.replace(CONTRACT.observations["arm"], topic=f"arm{i}") for i in range(3)}
    contract = dataclasses.replace(CONTRACT, observations=streams)
    builder = ObservationBuilder(contract, ObservationSpec(state=tuple(streams)))
    recorded = [
        dataclasses.replace(arm(START + k * STEP + i * third, k), topic=f"arm{i}") for k in range(10) for i in range(3)
    ]
    ticks = list(replay_ticks(recorded, builder, builder.make_buffer()))
    whole = START + 2 * third
    assert ticks[0] == whole + 2 * STEP, "two periods after all of them were there first"
    assert ticks == list(range(ticks[0], recorded[-1].stamp_ns + STEP, STEP))


def test_a_mark_within_a_recording_forgets_what_was_before() -> None:
    """As the robot does: the tick in which an episode starts sees nothing of the one before it."""
    spec = ObservationSpec(state=("arm",), history=3)
    builder = ObservationBuilder(CONTRACT, spec)
    buffer = builder.make_buffer()
    border = START + 5 * STEP
    recorded = [*(arm(START + k * STEP, k) for k in range(10)), mark(START, 0), mark(border, 0), mark(border, 1)]
    seen = {tick: builder.build(buffer, tick) for tick in replay_ticks(recorded, builder, buffer)}
    assert list(seen) == [START + k * STEP for k in range(10)]
    there = [[past.present["arm"] for past in observation.history] for observation in seen.values()]
    start = [[False, False], [False, True]]
    assert there == [*start, *[[True, True]] * 3, *start, *[[True, True]] * 3]


def test_a_recording_with_two_episodes_does_not_tick_in_between() -> None:
    builder = ObservationBuilder(CONTRACT, ObservationSpec(state=("arm",)))
    first, second = START, START + 50 * STEP
    recorded = [arm(t + k * STEP, k) for t in (first, second) for k in range(3)]
    recorded += [mark(first, 0), mark(second - 5 * STEP, 0)]  # five steps pass before the new episode's first message
    ticks = list(replay_ticks(recorded, builder, builder.make_buffer()))
    assert ticks == [first + k * STEP for k in range(45)] + [second + k * STEP for k in range(3)]


def test_two_observations_of_one_topic_are_both_fed(tmp_path: Path) -> None:
    """Position and velocity of one joint_states topic are two vectors of the contract."""
    speed = dataclasses.replace(CONTRACT.observations["arm"], field="velocity", units=("rad/s", "rad/s"))
    contract = dataclasses.replace(CONTRACT, observations={**CONTRACT.observations, "speed": speed})
    both = []
    for message in stream_messages(8):
        if message.topic == "arm/state":
            message = arm_with_velocity(message.stamp_ns)
        both.append(message)
    path = write_bag(tmp_path / "bag", both, contract)
    episode = read_episode(path, contract, ObservationSpec(state=("arm", "speed")))
    assert episode.observations[0].state.tolist() == [1, 2, 3, 4]


def arm_with_velocity(stamp_ns: int) -> Message:
    from vla_core.observation.messages import header, serialize, typestore

    message = typestore().types[JOINTS](
        header=header(stamp_ns), name=["shoulder", "elbow"], position=np.array([1.0, 2.0]),
        velocity=np.array([3.0, 4.0]), effort=np.zeros(0),
    )  # fmt: skip
    return Message("arm/state", JOINTS, stamp_ns, serialize(JOINTS, message))


def test_a_command_answers_the_tick_of_its_own_period() -> None:
    recorded = [command(START + d, v) for d, v in ((-1, 0.1), (0, 0.2), (STEP - 1, 0.3), (2 * STEP, 0.4))]
    commands = Commands(list(reversed(recorded)), CONTRACT)

    def at(tick_ns: int) -> float | None:
        found = commands.at(tick_ns)
        return None if found is None else float(found[0])

    assert len(commands) == 4
    assert [at(START), at(START + 1), at(START + STEP), at(START + 2 * STEP)] == [0.2, 0.3, None, 0.4]
    assert at(START + 3 * STEP) is None and at(START - STEP) == 0.1


def test_marks_say_what_the_episode_was(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", stream_messages(6, outcome=2, seed=41))
    found = read_episode(path, CONTRACT, SPEC).info
    assert (found.seed, found.task, found.instruction, found.outcome) == (41, "lift", "lift it", "failed")
    unmarked = [m for m in stream_messages(6) if m.topic != "episode"]
    assert read_episode(write_bag(tmp_path / "b2", unmarked), CONTRACT, SPEC).info.outcome == "unknown"


def test_an_episode_without_any_command_in_time_is_refused(tmp_path: Path) -> None:
    recorded = [m for m in stream_messages(6) if m.topic != "arm/command"] + [command(START - 9 * STEP, 1)]
    with pytest.raises(BagError, match="no tick has both an observation and a command: 1 commands, 6 ticks"):
        read_episode(write_bag(tmp_path / "bag", recorded), CONTRACT, SPEC)


# --- datasets -------------------------------------------------------------------------------------------------------


def test_dataset_round_trip(tmp_path: Path) -> None:
    paths = [write_bag(tmp_path / f"bag{i}", stream_messages(20 + i, seed=i)) for i in range(2)]
    progress: list[int] = []
    converted = convert(paths, tmp_path / "set", SPEC, progress=progress.append)
    assert progress == [1, 2]
    for found in (converted, load(tmp_path / "set")):
        assert found.contract == CONTRACT and found.spec == SPEC and found.frames == 41
        for i, episode in enumerate(found.episodes):
            ticks = 20 + i
            assert (episode.instruction, episode.seed, episode.bag) == ("lift it", i, f"bag{i}")
            assert episode.stamps_ns.tolist() == [START + k * STEP for k in range(ticks)]
            assert episode.state.dtype == episode.action.dtype == np.float32
            expected = np.array([[k / 100, i] for k in range(ticks)], np.float32)
            np.testing.assert_array_equal(episode.state, expected)
            expected = np.array([[k / 200, -k / 100] for k in range(ticks)], np.float32)
            np.testing.assert_array_equal(episode.action, expected)
            held = [pixels(1000 * i + k - k % 4) for k in range(ticks)]
            np.testing.assert_array_equal(episode.images["camera"], np.stack(held))


def test_failed_and_aborted_episodes_are_no_demonstrations(tmp_path: Path) -> None:
    paths = [write_bag(tmp_path / f"bag{o}", stream_messages(5, outcome=o)) for o in (1, 2, 3)]
    assert [e.bag for e in convert(paths, tmp_path / "good", SPEC).episodes] == ["bag1"]
    described = json.loads((tmp_path / "good" / "dataset.json").read_text())
    assert described["left_out"] == ["bag2", "bag3"]
    everything = convert(paths, tmp_path / "all", SPEC, keep_failed=True)
    assert [e.bag for e in everything.episodes] == ["bag1", "bag2", "bag3"]
    with pytest.raises(DatasetError, match=r"none of the 2 episodes succeeded.*--keep-failed"):
        convert(paths[1:], tmp_path / "none", SPEC)
    assert not (tmp_path / "none").exists()


def test_a_dataset_says_what_it_cannot_hold(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", stream_messages(12))
    with pytest.raises(DatasetError, match=r"holds images, one state and an instruction, not history; take them out"):
        convert([path], tmp_path / "set", dataclasses.replace(SPEC, history=2))
    lenient = with_stream("camera", missing="mask", max_age_s=0.02)
    gaps = write_bag(tmp_path / "gaps", stream_messages(12), lenient)
    with pytest.raises(DatasetError, match=r"gaps: camera is masked at 3 of 12 ticks, and a dataset has no masks"):
        convert([gaps], tmp_path / "set", SPEC)
    assert not (tmp_path / "set").exists()


def test_an_episode_that_never_ended_is_no_demonstration(tmp_path: Path) -> None:
    """Its last mark is that it started: the recorder was stopped before the outcome was known."""
    unfinished = [m for m in stream_messages(8) if m.topic != "episode"] + [mark(START, 0)]
    whole = write_bag(tmp_path / "whole", stream_messages(8))
    path = write_bag(tmp_path / "unfinished", unfinished)
    assert [e.bag for e in convert([whole, path], tmp_path / "set", SPEC).episodes] == ["whole"]


def test_nothing_is_left_behind_by_a_bad_bag(tmp_path: Path) -> None:
    good = write_bag(tmp_path / "good", stream_messages(6))
    bad = write_bag(tmp_path / "bad", [m for m in stream_messages(6) if m.topic != "task"])
    with pytest.raises(BagError, match="'task'"):
        convert([good, bad], tmp_path / "set", SPEC)
    assert sorted(os.listdir(tmp_path)) == ["bad", "good"]


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("keep")
    with pytest.raises(DatasetError, match="exists already"):
        convert([write_bag(tmp_path / "bag", stream_messages(5))], tmp_path / "set", SPEC)
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["mine.txt"]
    with pytest.raises(DatasetError, match="no bags"):
        convert([], tmp_path / "other", SPEC)


def test_bags_of_another_contract_are_refused_and_remapped_topics_are_not(tmp_path: Path) -> None:
    first = write_bag(tmp_path / "first", stream_messages(5))
    other = write_bag(tmp_path / "other", stream_messages(5), with_stream("arm", max_age_s=0.5))
    with pytest.raises(ContractError, match=r"observations\.arm\.max_age_s.*0\.05.*other has 0\.5"):
        convert([first, other], tmp_path / "set", SPEC)

    moved = [dataclasses.replace(m, topic="left/state") if m.topic == "arm/state" else m for m in stream_messages(5)]
    remapped = write_bag(tmp_path / "remapped", moved, with_stream("arm", topic="left/state"))
    assert len(convert([first, remapped], tmp_path / "set", SPEC).episodes) == 2


@pytest.mark.parametrize("damage", ["[]", "{}", '{"format": "vla_ros_dataset_v1"}', "{", "null", '{"format": "v0"}'])
def test_a_damaged_dataset_is_named(tmp_path: Path, damage: str) -> None:
    convert([write_bag(tmp_path / "bag", stream_messages(5))], tmp_path / "set", SPEC)
    (tmp_path / "set" / "dataset.json").write_text(damage)
    with pytest.raises(DatasetError) as caught:
        load(tmp_path / "set")
    assert str(tmp_path / "set") in str(caught.value) and "\n" not in str(caught.value)


def test_a_dataset_whose_episode_is_cut_or_gone_is_named(tmp_path: Path) -> None:
    convert([write_bag(tmp_path / "bag", stream_messages(5))], tmp_path / "set", SPEC)
    (file,) = (tmp_path / "set" / "episodes").iterdir()
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(DatasetError, match="damaged dataset"):
        load(tmp_path / "set")
    file.unlink()
    with pytest.raises(VlaError, match="damaged dataset"):
        load(tmp_path / "set")
    with pytest.raises(DatasetError, match="no dataset here"):
        load(tmp_path / "absent")


@pytest.mark.parametrize("horizon", [1, 4, 30])
def test_windows_against_a_loop(horizon: int) -> None:
    data = dataset((7, 1, 12))
    windows = ChunkWindows(data, horizon)
    assert len(windows) == 20
    actions, mask = windows.chunks(np.arange(20))
    assert actions.shape == (20, horizon, 2) and mask.shape == (20, horizon)
    row = 0
    for episode in data.episodes:
        for k in range(len(episode)):
            for h in range(horizon):
                assert mask[row, h] == (k + h < len(episode))
                inside = min(k + h, len(episode) - 1)
                np.testing.assert_array_equal(actions[row, h], episode.action[inside])
            np.testing.assert_array_equal(windows.state[row], episode.state[k])
            np.testing.assert_array_equal(windows.images["camera"][row].numpy(), episode.images["camera"][k])
            assert windows.instructions[row] == episode.instruction
            row += 1
    picked = np.array([19, 0, 7])
    np.testing.assert_array_equal(windows.chunks(picked)[0], actions[picked])


def test_a_window_does_not_reach_over_a_gap_in_time() -> None:
    """Ticks that were dropped (a stale camera) leave a hole: row k of a chunk must stay at tick + k steps.

    Trained across the hole, a policy would learn to act early by the length of every hole.
    """
    whole = dataset((10,))
    (episode,) = whole.episodes
    keep = np.array([0, 1, 2, 3, 7, 8, 9])
    holed = dataclasses.replace(
        episode, images={"camera": episode.images["camera"][keep]}, state=episode.state[keep],
        action=episode.action[keep], stamps_ns=episode.stamps_ns[keep],
    )  # fmt: skip
    actions, mask = ChunkWindows(Dataset(whole.contract, whole.spec, [holed]), 4).chunks(np.arange(7))
    for row, tick in enumerate(keep):
        for h in range(4):
            if mask[row, h]:
                np.testing.assert_array_equal(actions[row, h], episode.action[tick + h])
    assert mask.tolist() == [[k + h in keep for h in range(4)] for k in keep]


def test_statistics_are_over_all_ticks_of_all_episodes() -> None:
    data = dataset((7, 12))
    found = data.statistics()
    stacked = np.concatenate([e.action for e in data.episodes]).astype(np.float64)
    np.testing.assert_allclose(found["action"]["mean"], stacked.mean(0))
    assert found["state"]["count"] == [19]


def test_the_contract_given_by_hand_must_be_that_of_the_bags(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", stream_messages(5))
    other: RobotContract = dataclasses.replace(CONTRACT, rate_hz=50.0)
    with pytest.raises(ContractError, match=r"rate_hz: the dataset has 50\.0, .*bag has 100\.0"):
        convert([path], tmp_path / "set", SPEC, other)
