"""A planner as a policy: what it knows of the world, what it answers, when it refuses, and where it comes from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from test.core.helpers import CONTRACT, SPEC, START, STEP, arm, camera, checkpoint, task
from test.core.test_world_model import one_thread as one_thread
from test.core.test_world_model import world
from vla_core.config import ConfigError
from vla_core.observation.builder import ImageSize, Observation, ObservationSpec
from vla_core.planning import CEMConfig
from vla_core.planning.policy import PlannerPolicy, PlannerSetup
from vla_core.planning.tracking import Tracker
from vla_core.planning.views import joined, seen_by
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.loading import load_policy
from vla_core.runtime.policy import CheckpointPolicy, PolicyError
from vla_core.world_checkpoint import WorldCheckpoint

PLANNER = CEMConfig(horizon=6, candidates=20, elites=4, iterations=2)


def setup(**changes: Any) -> PlannerSetup:
    return dataclasses.replace(PlannerSetup(world="world", planner=PLANNER), **changes)


def seen(k: int, x: float = 0.0, y: float = 0.0) -> Observation:
    state = np.array([x, y], dtype=np.float32)
    return Observation(START + k * STEP, {}, state, "", {"arm": 0}, present={"arm": True})


def knowing(limits: tuple[float, ...]) -> WorldCheckpoint:
    made = world()
    return dataclasses.replace(made, config=dataclasses.replace(made.config, surprise=limits, surprise_window=2))


@torch.no_grad()
def test_the_state_between_observations_follows_what_was_commanded() -> None:
    """Observations at ticks 0, 1, 4 and 6, against the recurrent model itself."""
    made = world()
    tracker, rng = Tracker(made), np.random.default_rng(0)
    commands = rng.uniform(-1, 1, (6, 2))
    places = {0: (0.1, 0.2), 1: (0.3, -0.2), 4: (0.5, 0.0), 6: (-0.1, 1.0)}
    model, rssm = made.model, made.model.rssm
    actions = torch.from_numpy(made.normalizer.normalize("action", commands))
    embedded = {k: model.embed(made.inputs([seen(k, *xy)])) for k, xy in places.items()}
    state = model.encode(made.inputs([seen(0, *places[0])]))
    expected = {0: state}
    for k in range(1, 7):
        if k in places:
            state = rssm.update(state, actions[[k - 1]], embedded[k], sample=False).states
            expected[k] = state
        else:
            state = rssm.step(state, actions[[k - 1]], sample=False)
    for k in range(7):
        if k in places:
            torch.testing.assert_close(tracker.see(seen(k, *places[k])).deter, expected[k].deter)
        if k < 6:
            tracker.commanded(START + k * STEP, commands[k])
    tracker.forget()
    torch.testing.assert_close(tracker.see(seen(9, 0.1, 0.2)).deter, expected[0].deter)


@torch.no_grad()
def test_what_was_not_commanded_is_the_safe_action_and_time_that_goes_back_begins_anew() -> None:
    made = world()
    tracker = Tracker(made)
    tracker.see(seen(0))
    tracker.commanded(START, np.array([0.5, 0.7]))
    found = tracker.see(seen(6)).deter
    rows = np.array([[0.5, 0.7], [0.5, 0.7], *[[0.0, 0.7]] * 4])  # the shoulder to zero, the elbow held
    state = made.model.encode(made.inputs([seen(0)]))
    actions = torch.from_numpy(made.normalizer.normalize("action", rows))
    for k in range(5):
        state = made.model.rssm.step(state, actions[[k]], sample=False)
    again = made.model.rssm.update(state, actions[[5]], made.model.embed(made.inputs([seen(6)])), sample=False)
    torch.testing.assert_close(found, again.states.deter)
    torch.testing.assert_close(tracker.see(seen(2)).deter, made.model.encode(made.inputs([seen(2)])).deter)


def test_a_chunk_is_finite_within_limits_the_same_again_and_told_of() -> None:
    policy = PlannerPolicy(setup(), world())
    chunk = policy.predict(seen(0, 0.4, 0.1))
    assert chunk.actions.shape == (6, 2) and np.isfinite(chunk.actions).all()
    assert (chunk.actions >= CONTRACT.action_low).all() and (chunk.actions <= CONTRACT.action_high).all()
    again = PlannerPolicy(setup(), policy.world).predict(seen(0, 0.4, 0.1))
    np.testing.assert_array_equal(again.actions, chunk.actions)
    report = policy.report()
    assert report["planner"] == "cem" and report["plans"] == 1 and report["overruns"] == 0
    assert report["candidates_evaluated"] == report["candidates"] == 41  # two iterations, and the last mean
    assert isinstance(report["predicted_return"], float) and policy.imagined() is None and policy.fault == ""


def test_it_drives_the_robots_loop_with_a_policy_that_proposes() -> None:
    torch.manual_seed(0)
    proposer = CheckpointPolicy(checkpoint())
    policy = PlannerPolicy(setup(stay_near=1e6), world(), proposer)
    assert policy.spec.images == SPEC.images and policy.execution.steps == 2
    core = PolicyCore(policy)
    core.warm_up()
    core.start_episode(START)
    core.add("task", task(START, "lift it").data, START)
    told = []
    for k in range(5):
        stamp_ns = START + k * STEP
        for message in (camera(stamp_ns, k), arm(stamp_ns, 0.1 * k)):
            core.add({"cam/raw": "camera", "arm/state": "arm"}[message.topic], message.data, stamp_ns)
        told.append(core.step(stamp_ns).values)
    assert policy.report()["plans"] == 6  # three of the warm-up, then every second tick
    # With such a price of leaving it, the plan is the proposal.
    core.start_episode(START)
    alone = PolicyCore(CheckpointPolicy(checkpoint(model=proposer.checkpoint.model)))
    alone.add("task", task(START, "lift it").data, START)
    for message in (camera(START, 0), arm(START, 0.0)):
        alone.add({"cam/raw": "camera", "arm/state": "arm"}[message.topic], message.data, START)
    np.testing.assert_allclose(told[0], alone.step(START).values, atol=1e-5)


def test_a_world_that_is_not_what_was_expected_is_a_named_fault() -> None:
    policy = PlannerPolicy(setup(), knowing((1e-9,)))
    policy.predict(seen(0))
    policy.predict(seen(1))  # the window is not full yet
    with pytest.raises(PolicyError, match="model_disagrees: what is seen is not what the world model expected"):
        policy.predict(seen(2))
    assert policy.fault.startswith("model_disagrees:") and policy.report()["disagreements"] == 1
    policy.forget()
    assert policy.fault == ""
    for quiet in (PlannerPolicy(setup(surprise=None), knowing((1e-9,))), PlannerPolicy(setup(), knowing((1e9, 1e9))),
                  PlannerPolicy(setup(), knowing(()))):  # fmt: skip
        for k in range(4):
            quiet.predict(seen(k))
        assert quiet.fault == ""


def test_out_of_time_it_answers_with_what_it_has() -> None:
    time = iter(range(1000))
    policy = PlannerPolicy(setup(budget_s=0.5), world(), now=lambda: float(next(time)))
    chunk = policy.predict(seen(0))
    assert np.isfinite(chunk.actions).all() and policy.report()["overruns"] == 1


def test_it_is_loaded_from_a_file_or_a_folder_and_faults_name_it(tmp_path: Path) -> None:
    world().save(tmp_path / "w")
    checkpoint().save(tmp_path / "c")
    file = tmp_path / "planner.yaml"
    plain = {"type": "planner", "world": "w", "checkpoint": "c", "planner": {"type": "mppi", "horizon": 5}}
    file.write_text(yaml.safe_dump(plain))
    for place in (file, tmp_path, str(tmp_path)):
        found = load_policy(place, seed=3)
        assert isinstance(found, PlannerPolicy) and found.horizon == 5 and found.seed == 3
        assert found.setup.planner.type == "mppi" and isinstance(found.proposer, CheckpointPolicy)
        assert len(found.fingerprint) == 25
    file.write_text(yaml.safe_dump({**plain, "planner": {"type": "astar"}}))
    with pytest.raises(ConfigError, match=r"planner.yaml: planner.type: found 'astar', expected one of cem, mppi, sho"):
        load_policy(file)


def test_two_models_see_their_parts_of_one_observation() -> None:
    other = ObservationSpec(images={"camera": ImageSize(height=6, width=8)})
    whole = joined(ObservationSpec(state=("arm",)), other)
    assert whole.state == ("arm",) and whole.images == other.images
    observation = dataclasses.replace(seen(0, 1.0, 2.0), images={"camera": np.zeros((6, 8, 3), np.uint8)},
                                      present={"arm": True, "camera": True})  # fmt: skip
    part = seen_by(observation, whole, other, CONTRACT)
    assert part.state.shape == (0,) and set(part.images) == {"camera"} and set(part.present) == {"camera"}
    part = seen_by(observation, whole, ObservationSpec(state=("arm",)), CONTRACT)
    assert part.state.tolist() == [1.0, 2.0] and part.images == {}
    larger = ObservationSpec(images={"camera": ImageSize(height=12, width=16)})
    with pytest.raises(ConfigError, match=r"observation.images.camera: .*height=12.* and .*height=6"):
        joined(larger, other)
