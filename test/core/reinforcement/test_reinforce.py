"""Trials through the robot's own path, and a policy that learns from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from test.core.reinforcement.reaching import STEPS, gaussian_checkpoint, reaching, successes
from test.core.toy_world import installed
from vla_core.checkpoint import Checkpoint
from vla_core.evaluation.closed_loop import run_episode, seen_by, start_of
from vla_core.reinforcement.chunks import Exploration, context_of, distribution
from vla_core.reinforcement.ppo import PPO, Learner
from vla_core.reinforcement.reinforce import Reinforcement, reinforce
from vla_core.reinforcement.rollouts import Episode, Trials, collector
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.policy import CheckpointPolicy
from vla_core.sim.base import SimulationError
from vla_core.sim.worlds import make_world

WIDE = Exploration(least_std=0.3, correlation=0.5)
SURE = Exploration(least_std=1e-9)
TRIALS = Trials(world="reaching:it", max_steps=STEPS, exploration=WIDE)


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with reaching():
        yield


@pytest.fixture
def place(tmp_path: Path) -> Path:
    gaussian_checkpoint().save(tmp_path / "imitation")
    return tmp_path / "imitation"


def collected(place: Path, seeds: range, **changes: object) -> list[Episode]:
    trials = Trials(**{**vars(TRIALS), **changes})
    with collector(place, trials) as collect:
        return collect(Checkpoint.load(place).model.state_dict(), seeds)


def test_a_trial_sees_what_the_deployed_policy_sees(place: Path) -> None:
    """With next to no noise the drawn chunk is the answered one, so both runs are the same run."""
    checkpoint = Checkpoint.load(place)
    head = checkpoint.model.head
    with torch.no_grad():
        head.log_std_head.weight.zero_()
        head.log_std_head.bias.fill_(-20.0)
        weights = {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}
    with collector(place, Trials(**{**vars(TRIALS), "exploration": SURE})) as collect:
        (trial,) = collect(weights, [5])
    policy = CheckpointPolicy(checkpoint)
    seen, answered = [], []
    predict = policy.predict

    def noted(observation, continues=None):  # type: ignore[no-untyped-def]
        seen.append(observation)
        answered.append(predict(observation, continues))
        return answered[-1]

    policy.predict = noted  # type: ignore[method-assign]
    result = run_episode(make_world("reaching:it", seen_by(policy)), PolicyCore(policy), "lift it", 5, STEPS)
    assert result.steps == trial.steps
    assert [o.stamp_ns for o in seen] == [o.stamp_ns for o in trial.observations]
    for deployed, tried in zip(seen, trial.observations, strict=True):
        np.testing.assert_allclose(deployed.state, tried.state, atol=1e-6)
    drawn = checkpoint.normalizer.unnormalize("action", trial.chunks)
    np.testing.assert_allclose(drawn, [chunk.actions[:2] for chunk in answered], atol=1e-5)


def test_decisions_come_every_executed_row_and_rewards_every_step(place: Path) -> None:
    for trial in collected(place, range(4)):
        assert trial.begins.tolist() == list(range(0, trial.steps, 2))
        assert trial.chunks.shape == (len(trial.begins), 2, 2)
        assert trial.observations[0].stamp_ns == start_of(trial.seed)
        assert trial.ended == trial.success or trial.steps == STEPS
        assert len(trial.gains) == trial.steps
    (sparse,) = collected(place, range(1), reward="sparse")
    assert sparse.rewards.sum() == float(sparse.success)


def test_a_trial_depends_on_its_seed_and_the_weights_alone(place: Path) -> None:
    weights = Checkpoint.load(place).model.state_dict()
    with collector(place, TRIALS) as collect:
        first, again = collect(weights, [3, 4]), collect(weights, [4])
    np.testing.assert_array_equal(first[1].chunks, again[0].chunks)
    assert not np.array_equal(first[0].chunks[0], first[1].chunks[0])


def test_processes_make_the_same_trials(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a world that new processes find as well: an installed plug-in's."""
    trials = Trials(world="toy:lift", max_steps=6, reward="sparse", exploration=WIDE)
    checkpoint = Checkpoint.load(place)
    with torch.no_grad():  # weights that no process has loaded from the folder
        checkpoint.model.head.mean_head.bias += 0.1
    weights = checkpoint.model.state_dict()
    with installed(tmp_path / "site", monkeypatch):
        found = []
        for workers in (1, 2):
            with collector(place, trials, workers) as collect:
                found.append(collect(weights, [1, 2, 3]))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.chunks, other.chunks)
        np.testing.assert_array_equal(one.rewards, other.rewards)
        assert one.seed == other.seed


def test_a_world_without_a_reward_takes_the_sparse_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test.core.reinforcement import reaching as module

    class Silent(module.Reaching):
        def __getattribute__(self, name: str) -> object:
            if name == "reward":
                raise AttributeError(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(module, "Reaching", Silent)
    with pytest.raises(SimulationError, match="no reward of its own; take the reward sparse"):
        collected(place, range(1))
    assert collected(place, range(1), reward="sparse")[0].steps


def test_an_untouched_policy_is_where_the_imitation_is_and_only_the_critic_learns_first(place: Path) -> None:
    checkpoint = Checkpoint.load(place)
    learner = Learner(checkpoint, PPO(warm_up=1), WIDE)
    before = learner.weights()
    figures = learner.update(collected(place, range(8)))
    assert figures.epochs == 0 and figures.kl_imitation == 0.0 and figures.kl_step == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.weights().items())
    figures = learner.update(collected(place, range(8)))
    assert figures.epochs > 0 and figures.kl_imitation > 0
    changed = {
        name.split(".")[0] for name, tensor in learner.weights().items() if not torch.equal(before[name], tensor)
    }
    assert {"head", "fusion", "state_encoder"} <= changed


def test_the_head_alone_learns_where_it_is_asked_for(place: Path) -> None:
    learner = Learner(Checkpoint.load(place), PPO(warm_up=0, train="head"), WIDE)
    before = learner.weights()
    learner.update(collected(place, range(4)))
    changed = {
        name.split(".")[0] for name, tensor in learner.weights().items() if not torch.equal(before[name], tensor)
    }
    assert changed == {"head"}


def test_a_strong_kl_keeps_the_policy_where_it_is(place: Path) -> None:
    trials = collected(place, range(8))
    far, near = (
        Learner(Checkpoint.load(place), PPO(warm_up=0, kl=weight, target_kl=10.0), WIDE).update(trials).kl_imitation
        for weight in (0.0, 10.0)
    )
    assert near < 0.3 * far


def test_it_learns_to_reach(place: Path, tmp_path: Path) -> None:
    quick = PPO(episodes=25, learning_rate=1e-3, kl=0.0, warm_up=1, discount=0.95, target_kl=0.5)
    options = Reinforcement(task="reaching:it", steps=5000, exploration=WIDE, ppo=quick)
    before = successes(Checkpoint.load(place), range(20_000, 20_020))
    told: list[int] = []
    result = reinforce(place, options, log_dir=tmp_path / "logs", report=lambda p: told.append(p.steps))
    assert before <= 5
    assert successes(result.checkpoint, range(20_000, 20_020)) >= 18
    assert told == [p.steps for p in result.history] and told[-1] == result.steps >= 5000
    assert list((tmp_path / "logs").iterdir())
    result.checkpoint.save(tmp_path / "learned")
    loaded = Checkpoint.load(tmp_path / "learned")
    assert "reaching:it" in loaded.config.provenance["reinforced"]
    inputs_of = CheckpointPolicy(loaded)
    observation = collected(place, range(1))[0].observations[0]
    inputs = inputs_of.inputs([observation])
    found = distribution(loaded.model, context_of(loaded.model, inputs), 2, WIDE)
    assert torch.equal(found.mean, loaded.model.predict(inputs)[:, :2])
