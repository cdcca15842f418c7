"""From bags with rewards to a world model: what is taken over, sequences, training that goes on, and its report."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from test.core.helpers import CONTRACT, START, STEP, command, dataset, episodes, stream_messages, write_bag
from test.core.test_world_model import one_thread as one_thread
from vla_core.data.bag import BagError
from vla_core.data.convert import convert
from vla_core.data.dataset import Dataset, DatasetError, EpisodeData, load
from vla_core.data.sequences import Sequences, arrival_rewards, ends, executed, sequence_statistics
from vla_core.evaluation.world import open_loop, rank_correlation, returns, surprise_limits
from vla_core.evaluation.world_report import write_report
from vla_core.model.world_model import GaussianLatentConfig, RSSMConfig, WorldModelRecipe
from vla_core.observation.builder import ObservationSpec
from vla_core.observation.messages import Message, serialize, typestore
from vla_core.observation.normalizer import Normalization
from vla_core.training.faults import TrainingError
from vla_core.training.state import StateError
from vla_core.training.success import classified, train_classifier
from vla_core.training.world_recipe import WorldRecipe, WorldTraining, load_world_recipe
from vla_core.training.world_trainer import train_world
from vla_core.world_checkpoint import WorldCheckpoint

ARM = ObservationSpec(state=("arm",))
FLOAT = "std_msgs/msg/Float64"


def earned(k: int, value: float) -> Message:
    stamp_ns = START + k * STEP
    return Message("reward", FLOAT, stamp_ns, serialize(FLOAT, typestore().types[FLOAT](data=value)))


def done(k: int, shoulder: float, elbow: float) -> Message:
    return dataclasses.replace(command(START + k * STEP, shoulder, elbow), topic="executed/arm/command")


# -- what is taken over ------------------------------------------------------------------------------------------------


def test_rewards_and_executed_commands_become_columns(tmp_path: Path) -> None:
    extra = [m for k in range(12) for m in (earned(k, k / 10), done(k, 0.3, -k / 50))]
    bag = write_bag(tmp_path / "bag", sorted([*stream_messages(12), *extra], key=lambda m: m.stamp_ns))
    convert([bag], tmp_path / "dataset", ARM)
    found = load(tmp_path / "dataset")
    assert found.reward is not None and found.executed is not None
    np.testing.assert_allclose(found.reward, np.arange(12) / 10, atol=1e-6)
    np.testing.assert_allclose(found.executed, [[0.3, -k / 50] for k in range(12)], atol=1e-6)
    np.testing.assert_allclose(found.action[:, 0], np.arange(12) / 200, atol=1e-6)  # the label stays the label
    np.testing.assert_allclose(arrival_rewards(found, "simulator"), [0, *np.arange(11) / 10], atol=1e-6)
    part = found.select([0])
    np.testing.assert_array_equal(part.reward, found.reward)


def test_where_nothing_else_was_executed_it_is_the_label(tmp_path: Path) -> None:
    noisy = [m for k in range(12) for m in (done(k, 0.9, 0.0),)]
    bags = [
        write_bag(tmp_path / "noisy", sorted([*stream_messages(12), *noisy], key=lambda m: m.stamp_ns)),
        write_bag(tmp_path / "clean", stream_messages(12)),
    ]
    convert(bags, tmp_path / "dataset", ARM)
    found = load(tmp_path / "dataset")
    assert found.reward is None and found.executed is not None
    np.testing.assert_allclose(found.executed[:12, 0], 0.9)
    np.testing.assert_array_equal(found.executed[12:], found.action[12:])
    with pytest.raises(DatasetError, match=r"has no column next.reward; record with `vla collect --rewards`"):
        arrival_rewards(found, "simulator")
    assert arrival_rewards(found, "outcome").nonzero()[0].tolist() == [11, 23]


def test_a_tick_without_a_reward_is_named_and_a_bag_without_any_leaves_the_column_out(tmp_path: Path) -> None:
    some = [earned(k, 1.0) for k in range(12) if k != 5]
    bag = write_bag(tmp_path / "bag", sorted([*stream_messages(12), *some], key=lambda m: m.stamp_ns))
    with pytest.raises(BagError, match=rf"no reward at {START + 5 * STEP} ns, though the bag has the topic"):
        convert([bag], tmp_path / "dataset", ARM)
    plain = write_bag(tmp_path / "plain", stream_messages(12))
    convert([plain], tmp_path / "other", ARM)
    assert load(tmp_path / "other").reward is None and load(tmp_path / "other").executed is None


# -- sequences ---------------------------------------------------------------------------------------------------------


def pushed(count: int = 8, ticks: int = 20) -> Dataset:
    """The arm moves as it is told, a tenth of the command a tick; reward -|shoulder|; the expert's label is 0."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        actions = rng.uniform(-1, 1, (ticks, 2)).astype(np.float32)
        state = rng.uniform(-0.3, 0.3, 2) + np.concatenate([np.zeros((1, 2)), np.cumsum(0.2 * actions, 0)[:-1]])
        arrived = -np.abs(state[1:, 0])
        made.append(EpisodeData(
            images={}, state=state.astype(np.float32), action=np.zeros_like(actions), executed=actions,
            reward=np.append(arrived, 0).astype(np.float32), stamps_ns=START + STEP * np.arange(ticks),
            instruction="go", seed=i, bag=f"bag_{i}", outcome="succeeded" if state[-1, 0] > 0 else "failed",
        ))  # fmt: skip
    return Dataset.from_episodes(CONTRACT, ARM, made)


def recipe(**training: Any) -> WorldRecipe:
    model = WorldModelRecipe(rssm=RSSMConfig(deter=16, hidden=16, latent=GaussianLatentConfig(size=4)), embed=16,
                             hidden=16, layers=1)  # fmt: skip
    options = {"steps": 6, "batch_size": 4, "ticks": 8, "warmup_steps": 0, "validate_every": 3, "save_every": 3,
               "learning_rate": 3e-3}  # fmt: skip
    made = WorldRecipe(observation=ARM, model=model, normalization=Normalization(state="mean_std", action="min_max"))
    data = dataclasses.replace(made.data, validation=dataclasses.replace(made.data.validation, fraction=0.25))
    return dataclasses.replace(made, data=data, training=WorldTraining(**{**options, **training}))


def sequences(data: Dataset, ticks: int = 8) -> Sequences:
    from vla_core.world_checkpoint import WorldConfig, world_normalizer

    config = WorldConfig(model=recipe().model_config(CONTRACT), observation=ARM,
                         normalization=recipe().normalization)  # fmt: skip
    normalizer = world_normalizer(config, sequence_statistics(data), CONTRACT)
    return Sequences(data, ticks, normalizer, arrival_rewards(data, "simulator"), ends(data, ("failed",)))


def test_a_window_has_what_led_to_each_tick_and_ends_with_its_episode() -> None:
    data = pushed(2, 10)
    made = sequences(data)
    assert made.starts.tolist() == [0, 1, 2, 10, 11, 12] and made.lengths == (6,)
    batch = made.windows(np.array([2, 6, 10]))
    assert batch.mask.sum(dim=1).tolist() == [8, 4, 8]
    assert batch.first.tolist() == [[True] + [False] * 7] * 3
    actions = made.normalizer.normalize("action", executed(data))
    np.testing.assert_array_equal(batch.previous[0, 1:], actions[2:9])
    np.testing.assert_array_equal(batch.previous[1, 1:4], actions[6:9])
    assert not batch.previous[:, 0].any()
    np.testing.assert_allclose(batch.rewards[0], -np.abs(data.state[2:10, 0]), atol=1e-6)
    np.testing.assert_allclose(batch.rewards[2, 1:], -np.abs(data.state[11:18, 0]), atol=1e-6)
    expected = made.normalizer.normalize("state", data.state[2:10])
    np.testing.assert_allclose(batch.inputs.state[0], expected, atol=1e-6)
    over = [e.outcome == "failed" for e in data.episodes]
    assert [bool(c == 0) for c in (batch.continues[0, -1], made.windows(np.array([12])).continues[0, -1])] == over


def test_a_hole_ends_a_window() -> None:
    data = pushed(1, 20)
    stamps = data.stamps_ns.copy()
    stamps[9:] += STEP
    made = sequences(dataclasses.replace(data, stamps_ns=stamps), 6)
    assert made.starts.tolist() == [0, 1, 2, 3, 9, 10, 11, 12, 13, 14]
    assert made.windows(np.array([7])).mask.sum() == 2
    with pytest.raises(DatasetError, match="its longest episode without a hole has 11 ticks, 12 are needed"):
        made.starts_of(12)


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_run_that_was_interrupted_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    data = pushed()
    whole = train_world(recipe(), data, folder=tmp_path / "whole")
    half = recipe(steps=6)

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step == 5:
            raise Stop

    with pytest.raises(Stop):
        train_world(half, data, report=stop, folder=tmp_path / "half")
    found = train_world(half, data, folder=tmp_path / "half", resume=True, log_dir=tmp_path / "logs")
    for name, tensor in whole.checkpoint.model.state_dict().items():
        assert torch.equal(tensor, found.checkpoint.model.state_dict()[name]), name
    assert found.validation_loss == whole.validation_loss and len(found.checkpoint.config.surprise) >= 1
    assert found.checkpoint.config.surprise == whole.checkpoint.config.surprise
    assert list((tmp_path / "logs").iterdir())
    other = recipe(learning_rate=1.0)
    with pytest.raises(StateError, match=r"training.learning_rate 1.0 instead of 0.003"):
        train_world(other, data, folder=tmp_path / "half", resume=True)


def test_what_was_learned_is_better_than_keeping_the_last_and_ranks_returns(tmp_path: Path) -> None:
    options = recipe(steps=250, batch_size=16, learning_rate=1e-2)
    options = dataclasses.replace(options, model=dataclasses.replace(options.model, state_scale=30.0))
    result = train_world(options, pushed(40))
    assert result.held_out is not None
    model = result.checkpoint.model
    found = open_loop(model, result.held_out, context=4, ahead=10)
    assert found.picture is None and found.state is not None and found.state_copy is not None
    assert found.state.mean() < 0.3 * found.state_copy.mean()
    ranked = returns(model, result.held_out, context=4)
    assert len(ranked.true) == 10 and ranked.observed_correlation > 0.8 and ranked.imagined_correlation > 0.5
    limits = surprise_limits(model, result.held_out, 1.0, 4)
    assert all(math.isfinite(v) and v > 0 for v in limits) and len(limits) == 4  # 20 ticks: windows of 4, 4 apart
    line = write_report(result.checkpoint, result.held_out, tmp_path, context=4)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["ahead"] == 16 and "rank correlation" in line and "<img" in (tmp_path / "report.html").read_text()
    assert numbers["returns"]["spearman_observed"] == pytest.approx(ranked.observed_correlation, abs=0.05)
    result.checkpoint.save(tmp_path / "world")
    assert WorldCheckpoint.load(tmp_path / "world").config.surprise == result.checkpoint.config.surprise


def test_spearmans_correlation_is_scipys_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        a, b = rng.integers(0, 5, 20), rng.normal(size=20)
        assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert math.isnan(rank_correlation(np.ones(4), np.arange(4)))


def test_a_classifier_learns_success_from_outcomes() -> None:
    rng = np.random.default_rng(1)
    made = []
    for i in range(30):  # episodes that end beyond 1 succeeded
        end = 1.5 if i % 2 else 0.5
        state = np.stack([np.linspace(-1, end, 12), rng.normal(size=12)], axis=1).astype(np.float32)
        made.append(EpisodeData(images={}, state=state, action=np.zeros((12, 2), np.float32) + rng.normal(size=(12, 2)),
                                stamps_ns=START + STEP * np.arange(12), instruction="go", seed=i, bag="",
                                outcome="succeeded" if i % 2 else "failed"))  # fmt: skip
    data = Dataset.from_episodes(CONTRACT, ARM, made)
    normalizer = sequences(pushed(2)).normalizer.with_statistics(data.statistics())
    config = recipe().model_config(CONTRACT)
    probability = classified(train_classifier(data, normalizer, config, steps=150), data, normalizer)
    last = data.starts[1:] - 1
    assert probability[last[1::2]].min() > 0.8 and probability[last[::2]].max() < 0.3
    failed = Dataset.from_episodes(CONTRACT, ARM, [e for e in made if e.outcome == "failed"])
    with pytest.raises(TrainingError, match="0 of 15 episodes succeeded"):
        train_classifier(failed, normalizer, config)


def test_rewards_from_outcomes_need_outcomes() -> None:
    data = dataset()
    with pytest.raises(DatasetError, match="episode 0 does not say how it ended"):
        arrival_rewards(data, "outcome")
    assert executed(data) is data.action
    with pytest.raises(DatasetError, match="1 of 2 episodes have reward"):
        mixed = episodes()
        Dataset.from_episodes(CONTRACT, data.spec, [dataclasses.replace(mixed[0], reward=np.zeros(20)), mixed[1]])


def test_the_shipped_recipes_load() -> None:
    for name in ("push_state", "push_images"):
        assert load_world_recipe(name, ["training.steps=7"]).training.steps == 7
