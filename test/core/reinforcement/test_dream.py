"""What was learned in imagination: as a folder, for one world model alone, and in a planner's hands."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from test.core.helpers import START
from test.core.test_planner_policy import PLANNER, seen, setup
from test.core.test_world_model import one_thread as one_thread
from test.core.test_world_model import world
from test.core.test_world_training import pushed, sequences
from vla_core.checkpoint import CheckpointError
from vla_core.cli import main
from vla_core.model.world_model import State
from vla_core.planning.imagination import imagined_returns
from vla_core.planning.policy import PlannerPolicy
from vla_core.reinforcement.dream import Dreams, dream, load, proposal, save
from vla_core.reinforcement.imagination import Dreamer, Dreaming
from vla_core.runtime.loading import load_policy
from vla_core.world_checkpoint import WorldCheckpoint, world_fingerprint

SMALL = Dreaming(horizon=3, hidden=8, layers=1)


def dreamer(made: WorldCheckpoint, seed: int = 0) -> Dreamer:
    return Dreamer(made.model, made.model.feature_dim, 2, SMALL, seed)


@torch.no_grad()
def test_a_folder_gives_the_same_actor_and_critic_back_for_the_same_world_alone(tmp_path: Path) -> None:
    made = world()
    before = dreamer(made)
    save(before, "abc", tmp_path / "dreamer")
    after = load(tmp_path / "dreamer", made.model, "abc")
    state = made.model.imagine(made.model.initial(4), torch.randn(4, 2, 2), sample=False).map(lambda x: x[:, -1])
    assert torch.equal(after.act(state), before.act(state)) and torch.equal(after.value(state), before.value(state))
    save(dreamer(made, 1), "abc", tmp_path / "dreamer")  # an older one is replaced
    assert not torch.equal(load(tmp_path / "dreamer", made.model, "abc").act(state), before.act(state))
    with pytest.raises(CheckpointError, match="learned in the world model abc, but the planner's is def; run `vla dre"):
        load(tmp_path / "dreamer", made.model, "def")
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="exists and is no dreamer"):
        save(before, "abc", tmp_path / "other")


@torch.no_grad()
def test_a_proposal_is_what_the_actor_does_step_by_step() -> None:
    made = world()
    actor, state = dreamer(made), made.model.initial(1)
    found = proposal(actor, made.model, state, 4)
    assert found.shape == (1, 4, 2)
    for k in range(4):
        torch.testing.assert_close(found[:, k], actor.act(state))
        state = made.model.imagine(made.model.initial(1), found[:, : k + 1], sample=False).map(lambda x: x[:, -1])


def test_it_begins_at_what_was_seen_and_leaves_the_world_as_it_is() -> None:
    made, data = world(), sequences(pushed(2, 12))
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    told: list[int] = []
    options = Dreams(steps=3, batch_size=2, ticks=8, starts=6, dreaming=SMALL)
    found = dream(made.model, data, options, lambda step, figures: told.append(step))
    again = dream(made.model, data, options)
    assert told == [1, 2, 3]
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())
    for name, tensor in found.parts.state_dict().items():
        assert torch.equal(tensor, again.parts.state_dict()[name]), "a seed gives the same again"


def test_a_planner_plans_with_what_the_critic_says_of_the_end() -> None:
    """The plan is worth what its rewards and the critic say, and no less than the actor's own way."""

    class Wants(Dreamer):
        def value(self, state: State) -> torch.Tensor:
            return 1e3 * (1 + state.deter[..., 0])

    made = world()
    wants = Wants(made.model, made.model.feature_dim, 2, SMALL)
    plain, planned = PlannerPolicy(setup(), made), PlannerPolicy(setup(), made, dreamer=wants)
    worth = {}
    for name, policy in (("plain", plain), ("planned", planned)):
        policy.predict(seen(0, 0.4, 0.1))
        assert policy._planned is not None
        state, actions, _ = policy._planned
        with torch.no_grad():
            for who, rows in ((name, actions[None]), ("actor", proposal(wants, made.model, state, PLANNER.horizon))):
                worth[who] = float(imagined_returns(made.model, state, rows, value=wants.value))
    assert worth["planned"] > worth["plain"] and worth["planned"] >= worth["actor"] - 1e-3
    assert planned.report()["predicted_return"] == pytest.approx(worth["planned"], rel=1e-5)


def test_a_file_names_it_and_a_command_makes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, folder = world(), tmp_path / "planner"
    folder.mkdir()
    made.save(folder / "world")
    save(dreamer(made), world_fingerprint(folder / "world"), folder / "dreamer")
    values = {"type": "planner", "world": "world", "dreamer": "dreamer",
              "planner": {"type": "cem", "horizon": 6, "candidates": 8, "elites": 2}}  # fmt: skip
    (folder / "planner.yaml").write_text(yaml.safe_dump(values))
    policy = load_policy(folder)
    assert isinstance(policy, PlannerPolicy) and policy.dreamer is not None
    assert np.isfinite(policy.predict(dataclasses.replace(seen(0), stamp_ns=START)).actions).all()
    missing = ["dream", str(folder / "world"), "--dataset", str(tmp_path / "no"), "--out", str(folder / "dreamer")]
    assert main(missing) == 1 and "no LeRobotDataset here" in capsys.readouterr().err
