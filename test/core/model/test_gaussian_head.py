"""The Gaussian head against torch.distributions and against what its loss must arrive at."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, Normal

from vla_core.model.action_head.gaussian_action_head import GaussianHeadConfig, GaussianMLPActionHead
from vla_core.model.tokens import Tokens, present

H, A = 4, 3
ALL = torch.ones(5, H, dtype=torch.bool)


def build(config: GaussianHeadConfig | None = None) -> GaussianMLPActionHead:
    torch.manual_seed(0)
    return GaussianMLPActionHead(config or GaussianHeadConfig(layers=1), horizon=H, action_dim=A, context_dim=8)


def context(batch: int = 5) -> Tokens:
    return present(torch.randn((batch, 2, 8), generator=torch.Generator().manual_seed(3)))


def test_density_and_entropy_are_those_of_torch() -> None:
    head, actions = build(), torch.randn(5, H, A)
    mean, log_std = head(context())
    theirs = Independent(Normal(mean, log_std.exp()), 2)
    torch.testing.assert_close(head.log_prob(context(), actions, ALL), theirs.log_prob(actions))
    torch.testing.assert_close(head.entropy(context(), ALL), theirs.entropy())
    torch.testing.assert_close(head.loss(context(), actions, ALL), -theirs.log_prob(actions).mean() / (H * A))


def test_masked_steps_are_not_counted() -> None:
    head, mask = build(), torch.arange(H) < torch.tensor([[4], [3], [2], [1], [0]])
    actions = torch.randn(5, H, A).masked_fill(~mask[..., None], float("nan"))
    mean, log_std = head(context())
    for i, count in enumerate([4, 3, 2, 1, 0]):
        theirs = Normal(mean[i, :count], log_std[i, :count].exp())
        found = head.log_prob(context(), actions, mask)[i]
        torch.testing.assert_close(found, theirs.log_prob(actions[i, :count]).sum())
        torch.testing.assert_close(head.entropy(context(), mask)[i], theirs.entropy().sum())


@pytest.mark.parametrize(("bias", "expected"), [(-50.0, -20.0), (50.0, 2.0), (0.5, 0.5)])
def test_the_deviation_is_bounded(bias: float, expected: float) -> None:
    head = build()
    with torch.no_grad():
        head.log_std_head.weight.zero_()
        head.log_std_head.bias.fill_(bias)
    _, log_std = head(context())
    assert (log_std == expected).all()
    assert head.loss(context(), torch.randn(5, H, A), ALL).isfinite()


def test_samples_are_distributed_as_it_says_and_carry_the_gradient() -> None:
    head = build()
    one = context(1)
    many = Tokens(one.values.expand(20_000, -1, -1), one.mask.expand(20_000, -1))
    mean, log_std = head(one)
    samples = head.rsample(many, torch.Generator().manual_seed(1))
    torch.testing.assert_close(samples.mean(0), mean[0], atol=0.04, rtol=0)
    torch.testing.assert_close(samples.std(0), log_std[0].exp(), atol=0, rtol=0.03)
    noise = (samples[0] - mean[0]) / log_std[0].exp()
    (gradient,) = torch.autograd.grad(samples[0].sum(), head.log_std_head.bias)
    torch.testing.assert_close(gradient, (log_std[0].exp() * noise).flatten())  # d (m + e^s z) / d s


def test_predict_answers_the_mean_or_a_sample() -> None:
    mean, sample = build(), build(GaussianHeadConfig(layers=1, answer="sample"))
    assert torch.equal(mean.predict(context()), mean(context())[0])
    found = sample.predict(context(), torch.Generator().manual_seed(4))
    assert torch.equal(found, sample.rsample(context(), torch.Generator().manual_seed(4)))


def test_two_ways_to_act_become_their_mean_and_deviation() -> None:
    """Half go to 0.8 and half to -0.8: the likeliest Gaussian has mean 0 and deviation 0.8."""
    head = build()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    side = torch.where(torch.arange(32) % 2 == 0, 0.8, -0.8)
    actions, mask = side[:, None, None].expand(32, H, A), torch.ones(32, H, dtype=torch.bool)
    for _ in range(200):
        loss = head.loss(present(torch.ones(32, 8)), actions, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean, log_std = head(present(torch.ones(1, 8)))
    torch.testing.assert_close(mean, torch.zeros(1, H, A), atol=0.02, rtol=0)
    torch.testing.assert_close(log_std, torch.full((1, H, A), math.log(0.8)), atol=0.03, rtol=0)
