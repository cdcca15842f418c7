"""Batches of a dataset are to the bit what the robot's own step makes of the same observations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from vla_core.contract import RobotContract
from vla_core.data.batches import Batches
from vla_core.data.dataset import Dataset, DatasetError, EpisodeData
from vla_core.model.inputs import ModelInputs
from vla_core.model.vla.sizes import columns
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.observation.batch import collate, with_floats
from vla_core.observation.builder import Observation, ObservationSpec
from vla_core.observation.normalizer import Normalization, Normalizer

from . import test_multi_sensor as many
from .helpers import CONTRACT, MS, SPEC, dataset, episodes, observations
from .test_side import SPECS, observed


def tokenizer(texts: Sequence[str]) -> WordTokenizer:
    made = WordTokenizer()
    made.fit(texts)
    return made


def batches(data: Dataset, horizon: int = 4) -> Batches:
    streams = columns(data.spec, data.contract)
    return Batches(data, horizon, Normalizer(Normalization(), data.statistics(), streams), tokenizer(data.tasks))


def assert_same(a: ModelInputs, b: ModelInputs, place: str = "inputs") -> None:
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, ModelInputs):
            assert_same(x, y, f"{place}.{f.name}")
        elif isinstance(x, dict):
            assert x.keys() == y.keys(), f"{place}.{f.name}"
            for name in x:
                pairs = zip(x[name], y[name], strict=True) if isinstance(x[name], tuple) else [(x[name], y[name])]
                for one, other in pairs:
                    assert torch.equal(one, other), f"{place}.{f.name}.{name}"
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, y), f"{place}.{f.name}"
        else:
            assert x is y is None, f"{place}.{f.name}"


def data_of(seen: Sequence[Observation], contract: RobotContract, spec: ObservationSpec) -> EpisodeData:
    """An episode of these observations, with black pictures where a camera is missing and commands of its own."""
    pictures = {
        name: np.stack([o.images.get(name, np.full((size.height, size.width, 3), 77, np.uint8)) for o in seen])
        for name, size in spec.images.items()
    }
    action = np.random.default_rng(0).normal(size=(len(seen), len(contract.action_names))).astype(np.float32)
    return EpisodeData(pictures, np.stack([o.state for o in seen]), action, np.array([o.stamp_ns for o in seen]),
                       seen[0].instruction or "drive", 0, "bag", observations=tuple(seen))  # fmt: skip


def test_a_plain_batch_is_that_of_the_observations() -> None:
    made = episodes((20, 15))
    data = dataset((20, 15))
    drawn = batches(data)
    seen = [o for episode in made for o in observations(episode)]
    rows = np.array([34, 0, 20, 19, 7, 7])
    batch = drawn.draw(rows)
    assert_same(batch.inputs, collate([seen[row] for row in rows], drawn.normalizer, drawn.tokenizer, SPEC))
    expected = drawn.normalizer.normalize("action", data.action[rows])
    np.testing.assert_array_equal(batch.actions[:, 0].numpy(), expected)
    assert batch.rows.tolist() == [[0, row] for row in rows] and batch.mask[:, 0].all()
    assert not batch.mask[0, 1:].any(), "the last frame of an episode"


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_batch_of_many_sensors_is_that_of_the_observations(name: str) -> None:
    """Clouds, windows, maps, calibrations and history, with every sensor missing now and then."""
    spec = SPECS[name]
    streams = {n: s if s.latched else dataclasses.replace(s, missing="mask") for n, s in many.MANY.observations.items()}
    contract = dataclasses.replace(many.MANY, observations=streams)
    rng = np.random.default_rng(3)
    recorded = many.recording(rng)
    silent = {topic: int(rng.integers(60, 250)) * MS for topic in sorted({m.topic for m in recorded})}
    first = recorded[0].stamp_ns
    recorded = [m for m in recorded if not 0 <= m.stamp_ns - first - silent[m.topic] < 120 * MS]
    seen = observed(contract, spec, recorded)
    assert any(len(o.present) > sum(o.present.values()) for o in seen)
    data = Dataset.from_episodes(contract, spec, [data_of(seen, contract, spec)])
    drawn = batches(data)
    rows = rng.permutation(len(seen))[:16]
    batch = drawn.draw(rows)
    assert_same(batch.inputs, collate([seen[r] for r in rows], drawn.normalizer, drawn.tokenizer, spec))
    assert (batch.inputs.history is not None) == (spec.history > 1)
    chosen = data.select([0])
    assert chosen.observations is not None and chosen.observations[5] is seen[5]


def test_statistics_do_not_count_what_is_missing() -> None:
    streams = {n: s if s.latched else dataclasses.replace(s, missing="mask") for n, s in many.MANY.observations.items()}
    contract = dataclasses.replace(many.MANY, observations=streams)
    recorded = [m for m in many.recording(np.random.default_rng(0)) if m.topic not in ("arm/state", "odom")
                or m.stamp_ns < many.START + 200 * MS]  # fmt: skip
    seen = observed(contract, many.SPEC, recorded)
    there = np.array([o.present["arm"] for o in seen])
    assert 0 < there.sum() < len(seen)
    data = Dataset.from_episodes(contract, many.SPEC, [data_of(seen, contract, many.SPEC)])
    found = data.statistics()
    state = np.stack([o.state for o in seen]).astype(np.float64)
    np.testing.assert_allclose(found["state"]["mean"][:2], state[there, :2].mean(0))
    windows = np.concatenate([o.sequences["imu"].values[o.sequences["imu"].mask] for o in seen if "imu" in o.sequences])
    np.testing.assert_allclose(found["imu"]["std"], windows.astype(np.float64).std(0))
    clouds = np.concatenate([o.clouds["lidar"] for o in seen if "lidar" in o.clouds])
    np.testing.assert_allclose(found["lidar"]["max"], clouds.max(0))
    cells = np.concatenate([o.maps["map"].ravel() for o in seen if "map" in o.maps]).astype(np.float64)
    np.testing.assert_allclose(found["map"]["mean"], [cells[np.isfinite(cells)].mean()])
    without = data.state.copy()
    without[:, :2] = np.nan
    nowhere = dataclasses.replace(data, state=without, present={**data.present, "arm": np.zeros(len(seen), bool)})
    with pytest.raises(DatasetError, match=f"arm is missing at all {len(seen)} frames"):
        nowhere.statistics()


def test_missing_streams_of_a_plain_spec_are_masked() -> None:
    """Without extras no whole observation is kept: masks come of what was present, pictures are made black."""
    (episode,) = episodes((12,))
    seen = observations(episode)
    for k, name in ((2, "camera"), (5, "arm"), (7, "task")):
        o = seen[k]
        seen[k] = dataclasses.replace(
            o, present={**o.present, name: False}, images={} if name == "camera" else o.images,
            state=np.full(2, np.nan, np.float32) if name == "arm" else o.state,
            instruction="" if name == "task" else o.instruction,
        )  # fmt: skip
    data = Dataset.from_episodes(CONTRACT, SPEC, [data_of(seen, CONTRACT, SPEC)])
    assert data.observations is None and sorted(data.present) == ["arm", "camera", "task"]
    drawn = batches(data)
    rows = np.arange(12)[::-1].copy()
    expected = collate([seen[row] for row in rows], drawn.normalizer, drawn.tokenizer, SPEC)
    assert_same(drawn.draw(rows).inputs, expected)
    assert not expected.token_mask[4].any() and not expected.state_mask[6] and not expected.image_mask["camera"][9]
    part = data.select([0])
    assert part.present["arm"].tolist() == data.present["arm"].tolist()


def test_bytes_that_become_floats_later_are_the_same_floats() -> None:
    drawn = batches(dataset((20,)))
    rows = np.arange(10)
    late = drawn.draw(rows, floats=False).inputs
    assert late.images["camera"].dtype == torch.uint8
    assert_same(with_floats(late), drawn.draw(rows).inputs)


def test_extras_need_whole_observations() -> None:
    spec = dataclasses.replace(SPEC, history=2)
    with pytest.raises(DatasetError, match="history need whole observations, found 0 of 20 frames"):
        Dataset.from_episodes(CONTRACT, spec, episodes((20,)))
    with pytest.raises(DatasetError, match="no episodes"):
        Dataset.from_episodes(CONTRACT, SPEC, [])


def test_selected_episodes_keep_their_order_tasks_and_windows() -> None:
    data = dataclasses.replace(dataset((4, 3, 5)), window_rows=np.array([0, 4, 6, 8, 11]))
    part = data.select([2, 0])
    assert [e.index for e in part.episodes] == [2, 0] and part.frames == 9
    np.testing.assert_array_equal(part.state, np.concatenate([data.state[7:], data.state[:4]]))
    np.testing.assert_array_equal(part.images["camera"][np.arange(9)],
                                  data.images["camera"][np.r_[7:12, 0:4]])  # fmt: skip
    assert part.window_rows.tolist() == [1, 4, 5]
    assert part.tasks == ("lift it",) and part.instruction(8) == "lift it"
    assert part.starts.tolist() == [0, 5, 9] and part.episode_of.tolist() == [0] * 5 + [1] * 4
    with pytest.raises(DatasetError, match="no episode is left"):
        data.select([])
