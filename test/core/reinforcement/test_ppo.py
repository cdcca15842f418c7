"""The parts of PPO against closed forms and brute force."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, kl_divergence

from test.core.reinforcement.reaching import gaussian_checkpoint
from vla_core.config import ConfigError
from vla_core.errors import VlaError
from vla_core.model.tokens import present
from vla_core.reinforcement.chunks import ChunkNormal, Exploration, check_learns, distribution
from vla_core.reinforcement.ppo import PPO, advantages, clipped_loss, macro_rewards, returns
from vla_core.reinforcement.rollouts import Episode, Trials, rewards

SHAPE = (3, 2, 4)


def normal(seed: int, correlation: float) -> tuple[ChunkNormal, MultivariateNormal]:
    """Ours, and torch's over each entry's rows: (B, A) of R."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    log_std = 0.5 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    rows = correlation * torch.ones(2, 2, dtype=torch.float64) + (1 - correlation) * torch.eye(2)
    std = log_std.exp().movedim(1, 2)
    covariance = std[..., :, None] * rows * std[..., None, :]
    return ChunkNormal(mean, log_std, correlation), MultivariateNormal(mean.movedim(1, 2), covariance)


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_densities_are_those_of_torch(correlation: float) -> None:
    (ours, theirs), (other, others) = normal(0, correlation), normal(1, correlation)
    actions = torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions.movedim(1, 2)).sum(1))
    torch.testing.assert_close(ours.entropy(), theirs.entropy().sum(1))
    torch.testing.assert_close(ours.kl(other), kl_divergence(theirs, others).sum(1))
    torch.testing.assert_close(ours.kl(ours), torch.zeros(3, dtype=torch.float64))


def test_draws_have_the_mean_the_deviation_and_the_correlation() -> None:
    ours = ChunkNormal(torch.full((20_000, 2, 1), 0.3), torch.full((20_000, 2, 1), -1.0), 0.8)
    drawn = ours.sample(torch.Generator().manual_seed(0))[..., 0]
    assert drawn.mean() == pytest.approx(0.3, abs=4 * np.exp(-1) / 20_000**0.5)
    assert drawn.std() == pytest.approx(np.exp(-1), rel=0.03)
    assert torch.corrcoef(drawn.T)[0, 1] == pytest.approx(0.8, abs=0.02)


def test_only_executed_rows_are_the_action_and_no_deviation_is_below_the_least() -> None:
    checkpoint = gaussian_checkpoint()
    head = checkpoint.model.head
    context = torch.randn(5, 1, head.context_dim)
    mean, log_std = head(present(context[:, 0]))
    found = distribution(checkpoint.model, present(context[:, 0]), 2, Exploration(least_std=0.5))
    assert found.mean.shape == (5, 2, 2)
    assert torch.equal(found.mean, mean[:, :2])
    torch.testing.assert_close(found.log_std.exp(), log_std[:, :2].exp().clamp(min=0.5))


# --- what is worth what --------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 4), min_size=1, max_size=6)
SHARE = st.floats(0.0, 1.0)


@given(LENGTHS, SHARE, SHARE, st.integers(0, 1000))
def test_advantages_are_the_weighted_mean_of_all_lookaheads(lengths: list[int], discount: float, trace: float,
                                                            seed: int) -> None:  # fmt: skip
    """By the definition: (1 - l) sum over n of l^(n-1) A^(n), with the longest one taking what is left."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=sum(lengths))
    values = rng.normal(size=len(lengths) + 1)
    begins = np.cumsum([0, *lengths])
    found = advantages(
        macro_rewards(steps, begins[:-1], discount), np.array(lengths), values, discount, trace
    )  # fmt: skip

    def lookahead(k: int, n: int) -> float:
        own = steps[begins[k] : begins[k + n]]
        total = sum(discount**i * reward for i, reward in enumerate(own))
        return float(total + discount ** len(own) * values[k + n] - values[k])

    for k in range(len(lengths)):
        left = len(lengths) - k
        parts = [(1 - trace) * trace ** (n - 1) * lookahead(k, n) for n in range(1, left)]
        assert found[k] == pytest.approx(sum(parts) + trace ** (left - 1) * lookahead(k, left), abs=1e-9)


def episode(ended: bool) -> Episode:
    return Episode(0, ended, (), np.zeros((3, 2, 1), np.float32), np.array([0, 2, 4]), np.array([1.0, 2, 3, 4, 5]),
                   np.zeros(5), ended)  # fmt: skip


def test_an_end_is_worth_nothing_more_and_a_limit_of_time_what_the_critic_says() -> None:
    values = np.array([10.0, 20, 30])
    assert returns(episode(True), values, 0.5, 0.0).tolist() == [
        1 + 0.5 * 2 + 0.25 * 20 - 10, 3 + 0.5 * 4 + 0.25 * 30 - 20, 5 - 30,
    ]  # fmt: skip
    assert returns(episode(False), values, 0.5, 0.0).tolist() == [
        1 + 0.5 * 2 + 0.25 * 20 - 10, 3 + 0.5 * 4 + 0.25 * 30 - 20,
    ]  # fmt: skip


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), SHARE, st.booleans())
def test_shaping_changes_every_return_by_the_same(gains: list[float], discount: float, success: bool) -> None:
    """An episode that ends is worth as much as without: potentials cancel (Ng et al. 1999)."""
    sparse, shaped = (
        rewards(Trials(world="w", max_steps=8, reward=kind, discount=discount), gains, success, ended=True)
        for kind in ("sparse", "shaped")
    )
    weights = discount ** np.arange(len(gains))
    assert weights @ shaped == pytest.approx(weights @ sparse, abs=1e-9)
    assert sparse.sum() == success


def test_a_dense_reward_is_the_worlds_own() -> None:
    trials = Trials(world="w", max_steps=8, reward="dense")
    assert rewards(trials, [0.1, 0.5], True, True).tolist() == [0.1, 0.5]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "moves"),
    [(1.1, 2.0, -2.2, True), (1.5, 2.0, -2.4, False), (0.5, 2.0, -1.0, True),
     (1.5, -2.0, 3.0, True), (0.5, -2.0, 1.6, False)],
)  # fmt: skip
def test_the_objective_is_clipped_where_it_would_gain_by_going_further(
    ratio: float, advantage: float, expected: float, moves: bool
) -> None:
    r = torch.tensor([ratio], requires_grad=True)
    loss = clipped_loss(r, torch.tensor([advantage]), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert r.grad is not None and (r.grad.item() != 0) == moves


# --- what is refused ------------------------------------------------------------------------------------------------


def test_options_out_of_range_are_refused() -> None:
    for change in ({"episodes": 0}, {"clip": 0.0}, {"discount": 1.1}, {"kl": -1.0}, {"target_kl": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            PPO(**change)


def test_a_head_without_a_density_and_mixed_chunks_are_refused() -> None:
    checkpoint = gaussian_checkpoint()
    check_learns(checkpoint, "here")
    blend = dataclasses.replace(checkpoint.config.execution, strategy="blend", steps=1)
    mixed = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, execution=blend))
    with pytest.raises(VlaError, match=r"expected execution.strategy receding.*'blend'"):
        check_learns(mixed, "here")
    with pytest.raises(VlaError, match=r"here: .*expected gaussian, found 'mlp'"):
        check_learns(gaussian_checkpoint("mlp"), "here")
