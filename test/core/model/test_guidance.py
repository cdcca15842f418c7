"""Guided sampling against closed forms: Gaussian actions, whose denoiser and posterior are known exactly."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vla_core.errors import VlaError
from vla_core.model.action_head.base import ActionHeadBase, build_action_head
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.model.action_head.flow_action_head import FlowActionHead, FlowHeadConfig
from vla_core.model.action_head.guidance import ChunkPrefix, guidance_scale, guide
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig
from vla_core.model.tokens import Tokens, present

H, A = 6, 2
GUIDABLE = [
    FlowHeadConfig(hidden_dim=16, inference_steps=5),
    DiffusionHeadConfig(hidden_dim=16, prediction="epsilon", sampler="ddim", clip_sample=None),
    DiffusionHeadConfig(hidden_dim=16, prediction="sample", sampler="ddim"),
    DiffusionHeadConfig(hidden_dim=16, prediction="sample", sampler="ddpm"),
    DiffusionHeadConfig(hidden_dim=16, prediction="v"),
    FlowHeadConfig(denoiser="transformer", hidden_dim=16, inference_steps=5),
    DiffusionHeadConfig(denoiser="transformer", hidden_dim=16, inference_steps=5, prediction="sample"),
    FlowHeadConfig(hidden_dim=16, inference_steps=5, context_drop=0.1, guidance_scale=2.0),
]


def build(config: Any) -> ActionHeadBase:
    """A head with weights of its own everywhere: a transformer's gates begin at 0, behind which it ignores most."""
    torch.manual_seed(0)
    head = build_action_head(config, horizon=H, action_dim=A, context_dim=8)
    if getattr(config, "denoiser", "mlp") == "transformer":
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.2)
    return head


def tokens(batch: int) -> Tokens:
    """Three tokens, of which the last row lacks one."""
    values = torch.randn((batch, 3, 8), generator=seeded(3))
    mask = torch.ones(batch, 3, dtype=torch.bool)
    mask[-1, 1] = False
    return Tokens(values, mask)


def prefix(weights: list[float], frozen: int = 0, max_guidance: float = 5.0, actions: Tensor | None = None) -> Any:
    given_actions = torch.linspace(-0.8, 0.8, H * A).view(H, A) if actions is None else actions
    return ChunkPrefix(
        actions=given_actions, weights=torch.tensor(weights), frozen=frozen, max_guidance=max_guidance
    )  # fmt: skip


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class GaussianVelocity(nn.Module):
    """The exact velocity for a ~ N(mean, spread^2): E[epsilon - a | x_t] at x_t = t epsilon + (1 - t) a."""

    def __init__(self, mean: float, spread: float) -> None:
        super().__init__()
        self.mean, self.spread = mean, spread

    def remember(self, context: Tokens) -> None:
        """The context says nothing."""

    def forward(self, x_t: Tensor, t: Tensor, memory: None) -> Tensor:
        t = t[:, None, None]
        residual = (x_t - (1 - t) * self.mean) / (t**2 + (1 - t) ** 2 * self.spread**2)
        return t * residual - (self.mean + (1 - t) * self.spread**2 * residual)


def test_euler_steps_follow_the_exact_flow_of_a_gaussian() -> None:
    """The flow carries noise e to mean + spread e: quantiles go to quantiles."""
    head = FlowActionHead(FlowHeadConfig(inference_steps=2000), horizon=H, action_dim=A, context_dim=8)
    head.denoiser = GaussianVelocity(0.3, 0.5)  # type: ignore[assignment]
    with torch.no_grad():
        chunk = head.predict(present(torch.zeros(50, 8)), seeded())
    noise = torch.randn((50, H, A), generator=seeded())
    torch.testing.assert_close(chunk, 0.3 + 0.5 * noise, atol=5e-3, rtol=0)


def test_one_euler_step_is_the_mean() -> None:
    """At t = 1 nothing is known but the mean."""
    head = FlowActionHead(FlowHeadConfig(inference_steps=1), horizon=H, action_dim=A, context_dim=8)
    head.denoiser = GaussianVelocity(0.3, 0.5)  # type: ignore[assignment]
    with torch.no_grad():
        torch.testing.assert_close(head.predict(present(torch.zeros(4, 8)), seeded()), torch.full((4, H, A), 0.3))


def test_the_least_loss_is_that_of_the_exact_velocity() -> None:
    """For Gaussian actions the expected loss of the exact velocity is E[Var(epsilon - a | x_t)], known per time."""
    spread = 0.5
    head = FlowActionHead(FlowHeadConfig(), horizon=H, action_dim=A, context_dim=8)
    head.denoiser = GaussianVelocity(0.3, spread)  # type: ignore[assignment]
    actions = 0.3 + spread * torch.randn((40_000, H, A), generator=seeded(1))
    loss = head.loss(present(torch.zeros(40_000, 8)), actions, torch.ones(40_000, H, dtype=torch.bool), seeded(2))
    # Var(epsilon - a | x_t) = 1 + s^2 - (t - (1 - t) s^2)^2 / (t^2 + (1 - t)^2 s^2) at t = 0.999 b + 0.001, where b has
    # the density 1.5 sqrt(b) of Beta(1.5, 1).
    b = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t = 0.999 * b + 0.001
    variance = 1 + spread**2 - (t - (1 - t) * spread**2) ** 2 / (t**2 + (1 - t) ** 2 * spread**2)
    expected = (1.5 * b.sqrt() * variance).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("assumed", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("spread", [1.0, 0.5])
@pytest.mark.parametrize(("signal", "noise"), [(0.3, 0.7), (0.8, 0.2), (0.6, 0.8), (0.28, 0.96)])
def test_guidance_of_a_gaussian_in_closed_form(spread: float, assumed: float, signal: float, noise: float) -> None:
    """Clean estimate c = s^2 a x / (a^2 s^2 + n^2) has the slope J = c / x; guided: c + scale J W (y - c)."""
    slope = spread**2 * signal / (signal**2 * spread**2 + noise**2)
    x = torch.randn((3, H, A), generator=seeded())
    weights = [1.0, 0.8, 0.5, 0.2, 0.0, 0.0]
    target = dataclasses.replace(prefix(weights, max_guidance=1e9), spread=assumed)
    found = guide(lambda x: slope * x, x, signal, noise, target)
    clean = slope * x
    gain = (signal**2 * assumed**2 + noise**2) / (signal * assumed**2) * slope
    expected = clean + gain * torch.tensor(weights)[:, None] * (target.actions - clean)
    torch.testing.assert_close(found, expected)
    if spread == assumed:
        assert gain == pytest.approx(1.0), "for the assumed variance the estimate arrives where the weight is 1"


@given(st.floats(0.01, 0.99), st.floats(0, 20))
def test_scale_is_that_of_the_paper_and_bounded(tau: float, beta: float) -> None:
    """Black et al. 2025: velocity weight min(beta, (1 - tau) / (tau r^2)), over the remaining time 1 - tau."""
    r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
    weight = min(beta, (1 - tau) / (tau * r2))
    assert guidance_scale(tau, 1 - tau, beta) == pytest.approx((1 - tau) * weight)
    assert guidance_scale(0.0, 1.0, beta) == beta


def test_flow_and_diffusion_are_guided_alike() -> None:
    """At equal ratio of signal to noise, dividing x by signal + noise turns one into the other."""
    tau, weights = 0.4, [1.0, 0.8, 0.5, 0.2, 0.0, 0.0]
    size = math.hypot(tau, 1 - tau)
    x = torch.randn((2, H, A), generator=seeded())

    def estimate(x: Tensor) -> Tensor:
        return torch.tanh(x.cumsum(1))

    flow = guide(estimate, x, tau, 1 - tau, prefix(weights, max_guidance=2.0))
    diffusion = guide(
        lambda y: estimate(y * size), x / size, tau / size, (1 - tau) / size, prefix(weights, max_guidance=2.0)
    )
    torch.testing.assert_close(flow, diffusion)


def test_the_product_is_the_transposed_jacobian() -> None:
    """Against the whole Jacobian from another differentiation."""
    mixing = torch.randn((H * A, H * A), generator=seeded())

    def estimate(x: Tensor) -> Tensor:
        return torch.sin(x.flatten(1) @ mixing.T).view_as(x)

    x = torch.randn((1, H, A), generator=seeded(1))
    weights = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0, 0.0])
    target = prefix(weights.tolist())
    jacobian = torch.autograd.functional.jacobian(lambda x: estimate(x).flatten(), x).view(H * A, H * A)
    error = (weights[:, None] * (target.actions - estimate(x)[0])).flatten()
    expected = estimate(x) + guidance_scale(0.5, 0.5, 5.0) * (jacobian.T @ error).view(1, H, A)
    torch.testing.assert_close(guide(estimate, x, 0.5, 0.5, target), expected)


def test_a_transformer_is_guided_by_its_own_jacobian() -> None:
    """One Euler step is clean + beta J^T W (y - clean) at the noise, with J by another differentiation."""
    head: Any = build(FlowHeadConfig(denoiser="transformer", hidden_dim=16, inference_steps=1))
    weights, context = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0, 0.0]), tokens(1)
    x, memory = torch.randn((1, H, A), generator=seeded()), head.denoiser.remember(context)

    def clean(x: Tensor) -> Tensor:
        return x - head.denoiser(x, torch.ones(1), memory)

    jacobian = torch.autograd.functional.jacobian(lambda x: clean(x).flatten(), x).view(H * A, H * A)
    target = prefix(weights.tolist(), max_guidance=2.0)
    error = (weights[:, None] * (target.actions - clean(x)[0])).flatten()
    expected = clean(x) + 2.0 * (jacobian.T @ error).view(1, H, A)
    assert (jacobian.view(H, A, H, A).abs().amax(dim=(1, 3)) > 0).all(), "each step depends on each"
    with torch.no_grad():
        torch.testing.assert_close(head.predict(context, seeded(), target), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", GUIDABLE)
def test_weights_of_zero_change_no_bit(config: Any) -> None:
    head = build(config)
    context = tokens(3)
    with torch.no_grad():
        free = head.predict(context, seeded())
        guided = head.predict(context, seeded(), prefix([0.0] * H))
    assert torch.equal(free, guided)


@pytest.mark.parametrize("config", GUIDABLE)
@settings(max_examples=15, deadline=None)
@given(frozen=st.integers(0, H), seed=st.integers(0, 1000))
def test_frozen_rows_are_the_old_ones(config: Any, frozen: int, seed: int) -> None:
    """To 1e-6 of a normalized unit, also where the network is far from any Gaussian."""
    head = build(config)
    actions = torch.rand((H, A), generator=seeded(seed)) * 2 - 1
    weights = [1.0] * frozen + [0.3] * (H - frozen)
    with torch.no_grad():
        chunk = head.predict(tokens(2), seeded(seed), prefix(weights, frozen, actions=actions))
    assert (chunk[:, :frozen] - actions[:frozen]).abs().max().item() <= 1e-6 if frozen else True
    assert not chunk.requires_grad


def test_guidance_brings_a_chunk_closer_to_the_plan_and_leaves_the_rest_to_the_model() -> None:
    """Independent rows: a row without weight is the unguided one, a row with weight 1 is nearly the plan's."""
    head = FlowActionHead(FlowHeadConfig(inference_steps=20), horizon=H, action_dim=A, context_dim=8)
    head.denoiser = GaussianVelocity(0.0, 1.0)  # type: ignore[assignment]
    target = prefix([1.0, 1.0, 1.0, 0.5, 0.0, 0.0], max_guidance=1e9)
    with torch.no_grad():
        free = head.predict(present(torch.zeros(64, 8)), seeded())
        guided = head.predict(present(torch.zeros(64, 8)), seeded(), target)
    torch.testing.assert_close(guided[:, 4:], free[:, 4:])
    assert (guided[:, :3] - target.actions[:3]).abs().max() < 1e-3
    before = (free[:, 3] - target.actions[3]).abs().mean()
    assert (guided[:, 3] - target.actions[3]).abs().mean() < 0.6 * before


def test_heads_that_cannot_be_guided_say_so() -> None:
    seed_sampler = DiffusionHeadConfig(
        schedule="mini_vla_seed", sampler="mini_vla_seed", train_steps=16, inference_steps=16, clip_sample=None
    )
    for config, message in (
        (MLPHeadConfig(), "'mlp'.*choices: diffusion, flow"),
        (seed_sampler, "choices: ddim, ddpm"),
    ):
        with pytest.raises(VlaError, match=message):
            build(config).predict(tokens(1), None, prefix([0.0] * H))
