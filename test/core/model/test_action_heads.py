"""Both heads learn a chunk, ignore padding and answer alike for one generator seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vla_core.config import ConfigError
from vla_core.errors import VlaError
from vla_core.model.action_head.base import (
    ACTION_HEAD_REGISTRY,
    ActionHeadBase,
    build_action_head,
    masked_mean,
    register_action_head,
)
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.model.action_head.flow_action_head import FlowHeadConfig
from vla_core.model.action_head.mlp_action_head import MLPActionHead, MLPHeadConfig

HEADS = [
    DiffusionHeadConfig(),
    DiffusionHeadConfig(prediction="sample", sampler="ddpm"),
    DiffusionHeadConfig(
        schedule="mini_vla_seed",
        sampler="mini_vla_seed",
        train_steps=16,
        inference_steps=16,
        clip_sample=None,
    ),
    MLPHeadConfig(),
    FlowHeadConfig(),
]


def build(config: Any, horizon: int = 4) -> ActionHeadBase:
    torch.manual_seed(0)
    return build_action_head(config, horizon=horizon, action_dim=3, context_dim=8)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("config", HEADS)
def test_shapes(config: Any) -> None:
    head = build(config)
    context = torch.randn(5, 8)
    assert head.predict(context).shape == (5, 4, 3)
    loss = head.loss(context, torch.randn(5, 4, 3), torch.ones(5, 4, dtype=torch.bool))
    assert loss.shape == ()


@pytest.mark.parametrize("config", HEADS)
def test_what_stands_in_padding_steps_changes_neither_loss_nor_gradient(config: Any) -> None:
    head = build(config)
    context, actions = torch.randn(5, 8), torch.randn(5, 4, 3)
    mask = torch.arange(4) < torch.tensor([1, 2, 3, 4, 4])[:, None]
    other = torch.where(mask[..., None], actions, torch.tensor(float("nan")))

    loss = head.loss(context, actions, mask, seeded())
    gradients = torch.autograd.grad(loss, list(head.parameters()))
    other_loss = head.loss(context, other, mask, seeded())
    other_gradients = torch.autograd.grad(other_loss, list(head.parameters()))
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))


def test_masked_mean_counts_real_steps_alone() -> None:
    error = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [100.0, 100.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    assert masked_mean(error, mask).item() == pytest.approx(20 / 6)
    assert masked_mean(error, torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("config", HEADS)
def test_one_seed_one_answer(config: Any) -> None:
    head = build(config)
    context = torch.randn(5, 8)
    torch.manual_seed(1)
    first = head.predict(context, seeded())
    torch.manual_seed(2)  # the global generator has no say
    assert torch.equal(first, head.predict(context, seeded()))


TWO_WAYS = [
    *(DiffusionHeadConfig(prediction=p, sampler=s) for p in ("epsilon", "sample") for s in ("ddpm", "ddim")),
    FlowHeadConfig(),
]


@pytest.mark.parametrize("config", TWO_WAYS)
def test_a_sampling_head_learns_two_ways_to_act(config: Any) -> None:
    """Half the demonstrations go left, half go right: the answer is one of them, not the mean."""
    head = build(config)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    generator = seeded()
    context = torch.zeros(128, 8)
    side = torch.where(torch.arange(128) % 2 == 0, 0.8, -0.8)
    actions = side[:, None, None].expand(128, 4, 3)
    mask = torch.ones(128, 4, dtype=torch.bool)
    for _ in range(1000):
        loss = head.loss(context, actions, mask, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        chunk = head.predict(context, generator)
    assert ((chunk.abs() - 0.8).abs().amax(dim=(1, 2)) < 0.2).float().mean() > 0.9
    assert 0.2 < (chunk[:, 0, 0] > 0).float().mean() < 0.8


@pytest.mark.parametrize("config", [HEADS[0], HEADS[1], HEADS[3], HEADS[4]])
def test_overfits_one_batch(config: Any) -> None:
    head = build(config)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    generator = seeded()
    context = torch.randn(16, 8, generator=generator)
    actions = torch.rand(16, 4, 3, generator=generator) * 1.6 - 0.8
    mask = torch.ones(16, 4, dtype=torch.bool)
    repeat = 8  # many draws of noise and time a step
    for _ in range(600):
        loss = head.loss(
            context.repeat(repeat, 1),
            actions.repeat(repeat, 1, 1),
            mask.repeat(repeat, 1),
            generator,
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        error = (head.predict(context, generator) - actions).abs().mean()
    assert error < 0.08


def test_an_unknown_head_is_named_with_the_choices() -> None:
    class Config:
        type = "crystal_ball"

    with pytest.raises(VlaError, match="'crystal_ball' registered; choices: diffusion, flow, mlp"):
        build(Config())


def test_an_outsider_adds_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    base = "vla_core.model.action_head.base.ACTION_HEAD_REGISTRY"
    monkeypatch.setattr(base, dict(ACTION_HEAD_REGISTRY))

    @register_action_head("stand_in")
    class StandIn(MLPActionHead):
        pass

    class Config:
        type, hidden_dim, layers = "stand_in", 16, 1

    assert isinstance(build(Config()), StandIn)
    with pytest.raises(VlaError, match="'stand_in' is registered twice"):
        register_action_head("stand_in")(StandIn)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inference_steps": 51}, r"inference_steps: expected 1 to train_steps \(50\), found 51"),
        ({"train_steps": 0}, "train_steps: expected at least 1"),
        ({"layers": 0}, "layers: expected at least 1"),
        ({"time_dim": 7}, "time_dim: expected an even number"),
        ({"sampler": "mini_vla_seed"}, "visits every step"),
    ],
)
def test_impossible_configs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiffusionHeadConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inference_steps": 0}, "inference_steps: expected at least 1, found 0"),
        ({"hidden_dim": 0}, "hidden_dim: expected at least 1"),
        ({"time_dim": 7}, "time_dim: expected an even number"),
    ],
)
def test_impossible_flow_configs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowHeadConfig(**values)
