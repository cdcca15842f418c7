"""Datasets on disk: what was written is what is trained on, ours or others'; what cannot be bound is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_core.config import to_dict
from vla_core.contract import ContractError
from vla_core.data import frame_cache
from vla_core.data.dataset import Dataset, DatasetError, EpisodeData, load
from vla_core.data.folder import FORMAT
from vla_core.data.frame_cache import Cache
from vla_core.data.lerobot.episode import EpisodeRows
from vla_core.data.lerobot.layout import Feature, image, vector
from vla_core.data.lerobot.statistics import column_statistics, image_statistics
from vla_core.data.lerobot.writer import LeRobotWriter
from vla_core.data.side import PastTicks, encode_png, past_table, side_table
from vla_core.observation.builder import ImageSize, ObservationSpec
from vla_core.observation.image import resize

from . import test_multi_sensor as many
from .helpers import CONTRACT, SPEC, dataset, episodes, with_action, write_dataset
from .test_batches import assert_same, batches, data_of
from .test_multi_sensor import assert_equal
from .test_side import SPECS, observed

CACHES: tuple[Cache, ...] = ("disk", "memory", "none")


def assert_same_data(found: Dataset, expected: Dataset) -> None:
    np.testing.assert_array_equal(found.state, expected.state)
    np.testing.assert_array_equal(found.action, expected.action)
    np.testing.assert_array_equal(found.stamps_ns, expected.stamps_ns)
    assert [found.instruction(i) for i in range(found.frames)] == [
        expected.instruction(i) for i in range(expected.frames)
    ]
    rows = np.random.default_rng(0).permutation(found.frames)
    for name in expected.images:
        np.testing.assert_array_equal(found.images[name][rows], expected.images[name][rows])
        np.testing.assert_array_equal(found.images[name][3], expected.images[name][3])


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
@pytest.mark.parametrize("cache", CACHES)
def test_what_was_written_is_read(tmp_path: Path, cache: Cache, version: str) -> None:
    made = episodes((20, 1, 15))
    made[1] = dataclasses.replace(made[1], task="drop", outcome="failed")
    path = write_dataset(tmp_path / "set", made, version=version)
    found = load(path, cache=cache)
    assert (found.name, found.contract, found.spec) == ("set", CONTRACT, SPEC)
    assert_same_data(found, Dataset.from_episodes(CONTRACT, SPEC, made))
    assert [(e.index, e.length, e.bag, e.seed, e.task, e.outcome, e.instruction) for e in found.episodes] == [
        (i, len(e), e.bag, e.seed, e.task, e.outcome, e.instruction) for i, e in enumerate(made)
    ]
    assert found.window_rows.tolist() == list(range(36)) and found.statistics() == load(path).statistics()


@pytest.mark.parametrize("piece", [256, 3])
def test_equal_pictures_are_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """A camera of a quarter of the control's rate: five pictures of 20 frames, however they are read."""
    monkeypatch.setattr(frame_cache, "PIECE", piece)
    (episode,) = episodes((20,))
    held = episode.images["camera"][np.arange(20) // 4 * 4]
    made = [dataclasses.replace(episode, images={"camera": held})] * 2
    for cache in ("disk", "memory"):
        data = load(write_dataset(tmp_path / cache, made), cache=cache)  # type: ignore[arg-type]
        np.testing.assert_array_equal(data.images["camera"][:], np.concatenate([held, held]))
        assert len(data.images["camera"].pixels) == 10


def write_observed(path: Path, contract: Any, spec: ObservationSpec, parts: list[EpisodeData]) -> Path:
    """Whole observations as the converter keeps them: side rows, past ticks, and numbers where there are none."""
    features: dict[str, Feature] = {
        **{f"observation.images.{name}": image(size.height, size.width) for name, size in spec.images.items()},
        "observation.state": vector(tuple(f"{s}.{n}" for s in spec.state for n in contract.stream(s).names)),
        "action": vector(contract.action_names),
    }
    described = {"format": FORMAT, "contract": to_dict(contract), "observation": to_dict(spec)}
    with LeRobotWriter(path, fps=contract.rate_hz, features=features, robot_type=None,
                       description=described) as writer:  # fmt: skip
        for part in parts:
            past = PastTicks(spec)
            history = [past.add(o) for o in part.observations]
            columns = {"observation.state": np.nan_to_num(part.state), "action": part.action}
            images = {f"observation.images.{name}": part.images[name] for name in spec.images}
            statistics = {key: column_statistics(column) for key, column in columns.items()}
            writer.add(EpisodeRows(
                columns=columns, tasks=[o.instruction for o in part.observations],
                images={key: [encode_png(pixels) for pixels in stack] for key, stack in images.items()},
                statistics={**statistics, **{key: image_statistics(list(stack)) for key, stack in images.items()}},
                frames=side_table(part.observations, contract, spec, history),
                past=past_table(past.fresh, contract, spec) if spec.history > 1 else None,
            ))  # fmt: skip
    return path


@pytest.mark.parametrize("name", sorted(SPECS))
def test_observations_come_back_bit_for_bit_with_what_is_missing(tmp_path: Path, name: str) -> None:
    spec = SPECS[name]
    streams = {n: s if s.latched else dataclasses.replace(s, missing="mask") for n, s in many.MANY.observations.items()}
    contract = dataclasses.replace(many.MANY, observations=streams)
    parts = []
    for seed in range(3):
        recorded = [m for m in many.recording(np.random.default_rng(seed)) if m.topic not in ("lidar", "arm/state")
                    or m.stamp_ns > many.START + 150 * many.MS]  # fmt: skip
        seen = observed(contract, spec, recorded)
        parts.append(data_of(seen, contract, spec))
    expected = Dataset.from_episodes(contract, spec, parts)
    path = write_observed(tmp_path / "set", contract, spec, parts)
    for cache in CACHES:
        found = load(path, cache=cache)
        assert found.present.keys() == expected.present.keys()
        np.testing.assert_array_equal(found.state, expected.state)
        assert found.observations is not None and expected.observations is not None
        for row in range(found.frames):
            assert_equal(found.observations[row], expected.observations[row])
        rows = np.random.default_rng(1).permutation(found.frames)[:12]
        ours, theirs = batches(found), batches(expected)
        assert found.statistics() == expected.statistics()
        assert_same(ours.draw(rows).inputs, theirs.draw(rows).inputs)
        part = found.select([2, 1])
        assert part.observations is not None
        assert_equal(part.observations[0], parts[2].observations[0])


def test_fewer_streams_of_a_dataset_may_be_asked_for(tmp_path: Path) -> None:
    spec = SPECS["no history"]
    seen = observed(many.MANY, spec, many.recording(np.random.default_rng(0)))
    part = data_of(seen, many.MANY, spec)
    path = write_observed(tmp_path / "set", many.MANY, spec, [part])
    less = ObservationSpec(images=spec.images, state=("odom",), instruction="task")
    found = load(path, spec=less)
    np.testing.assert_array_equal(found.state, part.state[:, 2:])
    assert found.spec == less and found.observations is None
    fewer = dataclasses.replace(spec, images={}, calibrations={}, state=("arm",), maps=())
    some = load(path, spec=fewer)
    assert some.observations is not None
    kept = dataclasses.replace(seen[4], images={}, calibrations={}, maps={}, state=part.state[4, :2])
    found_one = some.observations[4]
    assert_equal(found_one.clouds, kept.clouds)
    assert_equal(found_one.sequences, kept.sequences)
    assert found_one.maps == found_one.images == {} and found_one.state.tolist() == kept.state.tolist()
    for wanted, lacks in (
        (ObservationSpec(images={"camera": ImageSize(height=6, width=8)}), "images.camera 8x6"),
        (ObservationSpec(state=("arm", "wrist")), r"state\.wrist"),
        (dataclasses.replace(less, history=2), "history 2 of these streams alone"),
        (dataclasses.replace(less, instruction="order"), "instruction order"),
        (dataclasses.replace(less, clouds={"radar": spec.clouds["lidar"]}, sequences=("gyro",), maps=("depth",),
                             calibrations={"camera": "other"}),
         r"clouds\.radar, sequences\.gyro, maps\.depth, calibrations\.camera"),
    ):  # fmt: skip
        with pytest.raises(DatasetError, match=f"was built for another observation; it has no {lacks}; convert"):
            load(path, spec=wanted)


# --- datasets of others -----------------------------------------------------------------------------------------------


def test_others_datasets_are_bound_by_name(tmp_path: Path) -> None:
    made = episodes((6, 4))
    path = write_dataset(tmp_path / "set", made, ours=False)
    expected = Dataset.from_episodes(CONTRACT, SPEC, made)
    found = load(path, CONTRACT, SPEC)
    np.testing.assert_array_equal(found.state, expected.state)
    np.testing.assert_array_equal(found.images["camera"][:], expected.images["camera"][:])
    assert found.stamps_ns.tolist() == [k * CONTRACT.step_ns for n in (6, 4) for k in range(n)]
    assert [(e.instruction, e.length) for e in found.episodes] == [("lift it", 6), ("drop it", 4)]
    # The order is the contract's, not the column's.
    swapped = dataclasses.replace(CONTRACT, actions={"arm": dataclasses.replace(
        CONTRACT.actions["arm"], names=("elbow", "shoulder"), low=(-2.0, -1.0), high=(2.0, 1.0))})  # fmt: skip
    np.testing.assert_array_equal(load(path, swapped, SPEC).action, expected.action[:, ::-1])


def test_others_pictures_are_resized_as_the_robot_resizes(tmp_path: Path) -> None:
    made = episodes((6,))
    path = write_dataset(tmp_path / "set", made, ours=False)
    for height, width in ((3, 4), (9, 16)):
        small = dataclasses.replace(SPEC, images={"camera": ImageSize(height=height, width=width)})
        for cache in CACHES:
            found = load(path, CONTRACT, small, cache=cache).images["camera"]
            assert found.shape == (6, height, width, 3)
            for row in range(6):
                np.testing.assert_array_equal(found[row], resize(made[0].images["camera"][row], height, width))


def write_plain(path: Path, names: tuple[str, ...] | None, fps: float = 100.0) -> Path:
    """A dataset of others without pictures: a state of three entries, an action of two."""
    features = {"observation.state": Feature("float32", (3,), names),
                "action": vector(("shoulder", "elbow"))}  # fmt: skip
    with LeRobotWriter(path, fps=fps, features=features, robot_type=None, description=None) as writer:
        columns = {"observation.state": np.arange(12, dtype=np.float32).reshape(4, 3),
                   "action": np.zeros((4, 2), np.float32)}  # fmt: skip
        statistics = {key: column_statistics(column) for key, column in columns.items()}
        writer.add(EpisodeRows(columns=columns, tasks=["go"] * 4, statistics=statistics))
    return path


BLIND = ObservationSpec(state=("arm",), instruction="task")


def test_entries_are_bound_with_or_without_their_stream(tmp_path: Path) -> None:
    for i, names in enumerate((("x", "elbow", "shoulder"), ("arm.x", "arm.elbow", "arm.shoulder"),
                               ("elbow", "arm.elbow", "shoulder"))):  # fmt: skip
        assert load(write_plain(tmp_path / str(i), names), CONTRACT, BLIND).state[0].tolist() == [2, 1]


@pytest.mark.parametrize(("names", "message"), [
    (("a", "b", "c"), r"observation\.state has no entry arm\.shoulder or shoulder; choices: a, b, c"),
    (("shoulder", "shoulder", "elbow"), r"observation\.state has several entries arm\.shoulder or shoulder"),
    (None, r"observation\.state has shape \(3,\) and no names, the contract has 2: shoulder, elbow"),
])  # fmt: skip
def test_entries_that_cannot_be_bound_are_named(tmp_path: Path, names: tuple[str, ...] | None, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load(write_plain(tmp_path / "set", names), CONTRACT, BLIND)


def test_what_else_others_datasets_may_lack_is_named(tmp_path: Path) -> None:
    names = ("shoulder", "elbow", "x")
    path = write_plain(tmp_path / "set", names)
    with pytest.raises(DatasetError, match="no contract of its own"):
        load(path)
    with pytest.raises(DatasetError, match=r"no camera observation\.images\.camera; choices: \(none\)"):
        load(path, CONTRACT, SPEC)
    with pytest.raises(DatasetError, match=r"has no sequences\.imu; only what vla convert makes"):
        load(path, many.MANY, ObservationSpec(state=("arm",), sequences=("imu",)))
    wide = with_action(names=("shoulder", "elbow", "wrist"), units=("rad/s",) * 3, low=(-1.0,) * 3, high=(1.0,) * 3,
                       safe=("zero",) * 3)  # fmt: skip
    with pytest.raises(DatasetError, match=r"action has no entry arm\.wrist or wrist; choices: elbow, shoulder"):
        load(path, wide, BLIND)
    with pytest.raises(
        DatasetError, match=r"200 frames a second, the contract 'toy' has rate_hz 100: .*set rate_hz to 200"
    ):
        load(write_plain(tmp_path / "fast", names, fps=200), CONTRACT, BLIND)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_another_contract_or_format_is_named(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "set", episodes((4,)))
    with pytest.raises(ContractError, match=r"rate_hz: the contract given has 50\.0, .*set has 100\.0"):
        load(path, dataclasses.replace(CONTRACT, rate_hz=50.0))
    file = path / "vla_ros" / "dataset.json"
    whole = json.loads(file.read_text())
    for change, message in (({"format": "v7"}, "format 'v7', expected 'vla_ros_dataset_v2'"),
                            ({"contract": {"name": 3}}, "contract.name: expected")):  # fmt: skip
        file.write_text(json.dumps({**whole, **change}))
        with pytest.raises(ValueError, match=message):
            load(path)
    file.write_text(json.dumps({key: value for key, value in whole.items() if key != "observation"}))
    with pytest.raises(DatasetError, match="has no 'observation'"):
        load(path)
    with pytest.raises(ValueError, match="absent"):
        load(tmp_path / "absent")


def test_a_dataset_of_the_first_version_is_to_be_converted_again(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "dataset.json").write_text(json.dumps({"format": "vla_ros_dataset_v1"}))
    with pytest.raises(DatasetError, match=r"vla_ros_dataset_v1.*convert the bags again"):
        load(tmp_path / "old")


def test_the_toy_dataset_in_memory_and_on_disk_train_alike(tmp_path: Path) -> None:
    found = load(write_dataset(tmp_path / "set", episodes()))
    ours, theirs = batches(found), batches(dataset())
    rows = np.array([34, 2, 20])
    one, other = ours.draw(rows), theirs.draw(rows)
    assert_same(one.inputs, other.inputs)
    assert one.actions.tolist() == other.actions.tolist() and one.mask.tolist() == other.mask.tolist()
