"""Planners on a linear-quadratic problem whose optimum is known, batched against a loop, and in time (a fake clock)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from test.core.test_world_model import config as world_config
from test.core.test_world_model import one_thread as one_thread  # for every test here too
from vla_core.config import ConfigError
from vla_core.errors import VlaError
from vla_core.model.world_model import WorldModel
from vla_core.planning import CEMConfig, Deadline, MPPIConfig, Planner, ShootingConfig, plan
from vla_core.planning.deadline import IterationTimes
from vla_core.planning.imagination import imagined_returns, score_from
from vla_core.planning.plan import fitted, shifted

# A mass on a line that is pushed: position and speed, 0.1 s a step.
STATE = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=torch.float64)
INPUT = torch.tensor([[0.005], [0.1]], dtype=torch.float64)
COST = torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64))
EFFORT = torch.tensor([[0.05]], dtype=torch.float64)
START = torch.tensor([1.0, 0.0], dtype=torch.float64)
H = 15
LOW, HIGH = torch.tensor([-20.0], dtype=torch.float64), torch.tensor([20.0], dtype=torch.float64)
PLANNERS = [
    ShootingConfig(horizon=4, candidates=30, iterations=3),
    CEMConfig(horizon=4, candidates=30, iterations=3, elites=6),
    MPPIConfig(horizon=4, candidates=30, iterations=3),
]


def quadratic(actions: Tensor) -> Tensor:
    """Minus the cost (N,) of ``actions`` (N, H, 1) from ``START``."""
    x = START.expand(len(actions), 2)
    cost = torch.zeros(len(actions), dtype=torch.float64)
    for k in range(actions.shape[1]):
        u = actions[:, k]
        x = x @ STATE.T + u @ INPUT.T
        cost = cost + (x @ COST * x).sum(dim=-1) + (u @ EFFORT * u).sum(dim=-1)
    return -cost


def least_cost() -> float:
    """By the Riccati recursion."""
    p = COST.clone()
    for _ in range(H):
        gain = torch.linalg.solve(EFFORT + INPUT.T @ p @ INPUT, INPUT.T @ p @ STATE)
        p = COST + STATE.T @ p @ (STATE - INPUT @ gain)
    return float(START @ (p - COST) @ START)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("config", [
    CEMConfig(horizon=H, candidates=200, iterations=15, elites=20),
    MPPIConfig(horizon=H, candidates=200, iterations=15),
])  # fmt: skip
def test_a_linear_quadratic_problem_is_solved_within_two_percent(config: Any, seed: int) -> None:
    found = plan(quadratic, config, LOW, HIGH, generator=seeded(seed))
    best = least_cost()
    assert best <= -float(quadratic(found.actions[None])) <= 1.02 * best
    assert found.value == pytest.approx(float(quadratic(found.actions[None])))


def test_shooting_is_better_than_its_first_guess_and_worse_than_what_learns() -> None:
    shot = plan(quadratic, ShootingConfig(horizon=H, candidates=300, iterations=5), LOW, HIGH, generator=seeded())
    rest = float(quadratic(torch.zeros(1, H, 1, dtype=torch.float64)))
    assert shot.value is not None and shot.value >= rest
    assert shot.candidates == 1500 and shot.iterations == 5


@pytest.mark.parametrize("config", PLANNERS)
def test_candidates_in_one_tensor_are_worth_what_each_is_in_a_loop(config: Any) -> None:
    def one_by_one(actions: Tensor) -> Tensor:
        return torch.cat([quadratic(row[None]) for row in actions])

    batched = plan(quadratic, config, LOW, HIGH, generator=seeded(1))
    looped = plan(one_by_one, config, LOW, HIGH, generator=seeded(1))
    torch.testing.assert_close(batched.actions, looped.actions)
    assert batched.value == pytest.approx(looped.value)


@torch.no_grad()
def test_a_world_models_returns_of_many_candidates_are_those_of_each() -> None:
    torch.manual_seed(0)
    model = WorldModel(world_config()).eval()
    torch.nn.init.normal_(model.reward.net[-1].weight, std=0.3)  # type: ignore[arg-type]
    start = model.initial(1)
    actions = torch.randn(5, 6, 2)
    found = score_from(model, start, discount=0.9)(actions)
    for row, actual in zip(actions, found, strict=True):
        state, total, weight = start, 0.0, 1.0
        for action in row:  # in the words of the definition
            state = model.rssm.step(state, action[None], sample=False)
            total += weight * float(model.predict_rewards(state))
            weight *= 0.9 * float(model.predict_continues(state))
        assert float(actual) == pytest.approx(total, rel=1e-4)
    with_value = imagined_returns(model, start, actions[:1], discount=0.9, value=lambda s: torch.full((1,), 10.0))
    assert float(with_value - found[0]) == pytest.approx(10 * weight_of(model, start, actions[0]), rel=1e-2)
    near = score_from(model, start, discount=0.9, stay_near=actions[0], weight=2.0)(actions)
    expected = found - 2.0 * (actions - actions[0]).square().sum(dim=(1, 2))
    torch.testing.assert_close(near, expected)


def weight_of(model: WorldModel, state: Any, actions: Tensor) -> float:
    weight = 1.0
    for action in actions:
        state = model.rssm.step(state, action[None], sample=False)
        weight *= 0.9 * float(model.predict_continues(state))
    return weight


# -- always an answer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", PLANNERS)
@pytest.mark.parametrize("broken", [lambda n: torch.full((n,), torch.nan), lambda n: torch.full((n,), -torch.inf)])
def test_a_score_that_is_never_finite_leaves_the_first_proposal(config: Any, broken: Any) -> None:
    proposals = torch.tensor([[[1.0], [2.0], [50.0], [torch.nan]]], dtype=torch.float64)
    found = plan(lambda actions: broken(len(actions)), config, LOW, HIGH, proposals=proposals, generator=seeded())
    assert found.actions.flatten().tolist() == [1.0, 2.0, 20.0, 0.0] and found.value is None


@pytest.mark.parametrize("config", PLANNERS)
def test_returns_that_are_not_finite_are_worse_than_any_other(config: Any) -> None:
    def sometimes(actions: Tensor) -> Tensor:
        found = quadratic(actions)
        return torch.where(actions[:, 0, 0] > 0, torch.nan, found)

    found = plan(sometimes, config, LOW, HIGH, generator=seeded())
    assert found.actions.isfinite().all() and float(found.actions[0]) <= 0 and found.value is not None


@pytest.mark.parametrize("config", PLANNERS)
def test_actions_keep_their_bounds_and_a_good_proposal_is_not_lost(config: Any) -> None:
    low, high = torch.tensor([-1.0, 0.5]), torch.tensor([0.25, 3.0])
    target = torch.tensor([[0.2, 2.9], [-0.9, 0.6], [0.0, 1.0], [0.1, 2.0]])

    def score(actions: Tensor) -> Tensor:
        assert bool((actions >= low).all()) and bool((actions <= high).all())
        return -(actions - target).square().sum(dim=(1, 2))

    proposals = torch.stack([torch.zeros(4, 2), target, torch.full((4, 2), 9.0)])
    found = plan(score, config, low, high, proposals=proposals, generator=seeded())
    torch.testing.assert_close(found.actions, target)
    assert found.value == pytest.approx(0.0, abs=1e-9)


# -- in time -----------------------------------------------------------------------------------------------------------


class FakeTime:
    """A clock that moves when the score is asked."""

    def __init__(self, per_call_s: float) -> None:
        self.now_s, self.per_call_s, self.calls = 100.0, per_call_s, 0

    def now(self) -> float:
        return self.now_s

    def score(self, actions: Tensor) -> Tensor:
        self.calls += 1
        self.now_s += self.per_call_s
        return quadratic(actions)


@pytest.mark.parametrize(("budget_s", "iterations"), [(0.0, 1), (0.99, 1), (2.1, 2), (3.05, 3), (100.0, 20)])
def test_iterations_end_before_the_deadline(budget_s: float, iterations: int) -> None:
    """The first iteration's length is not known before it, so it is begun in any case while there is time."""
    time = FakeTime(1.0)
    config = CEMConfig(horizon=H, candidates=20, elites=4, iterations=20)
    found = plan(time.score, config, LOW, HIGH, deadline=Deadline(budget_s, time.now), generator=seeded())
    assert found.iterations == iterations
    assert found.overrun_s == pytest.approx(max(0.0, time.now_s - 100.0 - budget_s))
    assert budget_s < 1 or found.overrun_s == 0
    assert found.actions.isfinite().all() and found.value is not None


def test_no_time_at_all_gives_the_proposal_untried() -> None:
    time = FakeTime(1.0)
    seen = IterationTimes()
    seen.add(256, 1.0)  # what an earlier plan has shown
    proposals = torch.linspace(0, 1, H, dtype=torch.float64)[None, :, None]
    found = plan(time.score, CEMConfig(horizon=H), LOW, HIGH, proposals=proposals,
                 deadline=Deadline(0.01, time.now, seen))  # fmt: skip
    assert time.calls == 0 and found.value is None and found.candidates == 0 and found.overrun_s == 0
    torch.testing.assert_close(found.actions, proposals[0])


def test_a_planner_remembers_how_long_iterations_take_and_expects_the_longest_of_the_last() -> None:
    time = FakeTime(1.0)
    planner = Planner(CEMConfig(horizon=H, candidates=20, elites=4, iterations=4), LOW, HIGH)
    overruns = []
    for slow in (1.0, 1.0, 4.0, 1.0, 1.0):
        time.per_call_s = slow
        found = planner.plan(time.score, passed=1, budget_s=3.24, now=time.now, generator=seeded())
        overruns.append(found.overrun_s)
    # Only the iteration that took longer than any before was not foreseen, and it keeps no later one from beginning.
    assert overruns == pytest.approx([0, 0, 0.76, 0, 0])
    assert found.iterations > 0


def test_where_all_candidates_do_not_fit_fewer_are_tried() -> None:
    seen = IterationTimes()
    assert seen.expected_s(256) == 0.0
    seen.add(256, 0.9)
    seen.add(256, 1.0)
    assert seen.expected_s(256) == 1.0 and seen.expected_s(64) == 0.25
    seen.add(64, 0.4)
    assert [Deadline(budget, lambda: 0.0, seen).candidates(256) for budget in (None, 1.0, 0.9, 0.5, 0.1, 0.01)] == [
        256, 256, 128, 128, 16, 0
    ]  # fmt: skip
    sizes: list[int] = []

    def score(actions: Tensor) -> Tensor:
        sizes.append(len(actions))
        return quadratic(actions)

    planner = Planner(CEMConfig(horizon=H, candidates=256, elites=24, iterations=1), LOW, HIGH)
    planner._times = seen
    found = planner.plan(score, budget_s=0.5, now=lambda: 0.0, generator=seeded())
    assert sizes[0] == 128 and found.value is not None


def test_the_last_plan_is_proposed_shifted_by_what_has_passed() -> None:
    planner = Planner(CEMConfig(horizon=4, candidates=5, elites=2, iterations=1, std=1e-9), LOW, HIGH)
    planner.last = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    seen: list[Tensor] = []

    def score(actions: Tensor) -> Tensor:
        seen.append(actions)
        return -(actions[:, 0, 0] - 3).square()

    chunk = torch.tensor([[[7.0], [8.0]]], dtype=torch.float64)
    found = planner.plan(score, passed=2, proposals=chunk, generator=seeded())
    assert seen[0][0].flatten().tolist() == [3, 4, 4, 4] and seen[0][1].flatten().tolist() == [7, 8, 8, 8]
    torch.testing.assert_close(found.actions.flatten(), torch.tensor([3.0, 4, 4, 4], dtype=torch.float64))
    planner.forget()
    planner.plan(score, passed=2, generator=seeded())
    assert seen[-2][0].flatten().tolist() == [0, 0, 0, 0]  # the middle of the range
    assert shifted(chunk[0], 9).flatten().tolist() == [8, 8] and fitted(chunk, 1).shape == (1, 1, 1)


def test_smooth_noise_has_its_variance_and_correlation() -> None:
    drawn: list[Tensor] = []

    def keep(actions: Tensor) -> Tensor:
        drawn.append(actions)
        return torch.zeros(len(actions))

    config = MPPIConfig(horizon=6, candidates=20_001, iterations=1, std=0.01, smooth=0.8)
    plan(keep, config, torch.tensor([-1.0]), torch.tensor([1.0]), generator=seeded())
    noise = drawn[0][1:, :, 0].numpy()
    np.testing.assert_allclose(noise.std(axis=0), 0.01, rtol=0.05)
    np.testing.assert_allclose(np.corrcoef(noise.T)[0, 1:3], [0.8, 0.64], atol=0.03)


def test_what_cannot_be_planned_is_named() -> None:
    with pytest.raises(ConfigError, match="elites: expected 1 to candidates"):
        CEMConfig(candidates=4, elites=5)
    with pytest.raises(VlaError, match=r"proposals of shape \(1, 3, 1\), expected \(P, 4, 1\)"):
        plan(quadratic, PLANNERS[1], LOW, HIGH, proposals=torch.zeros(1, 3, 1))
    with pytest.raises(VlaError, match=r"returns of shape \(30, 1\) of 30 candidates"):
        plan(lambda actions: quadratic(actions)[:, None], PLANNERS[1], LOW, HIGH)
    with pytest.raises(VlaError, match="low below high"):
        plan(quadratic, PLANNERS[1], HIGH, LOW)
