"""What holds for every head: shapes, masks, types of numbers, determinism, and that it learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.errors import VlaError
from vla_core.model.action_head import (
    ACTION_HEAD_REGISTRY,
    ActionChunker,
    ActionChunkerConfig,
    ActionHeadBase,
    DiffusionHeadConfig,
    DiscreteHeadConfig,
    FlowHeadConfig,
    GaussianHeadConfig,
    MLPActionHead,
    MLPHeadConfig,
    TransformerHeadConfig,
    build_action_head,
)
from vla_core.model.action_head.base import masked_mean, register_action_head
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.tokens import Tokens, present
from vla_core.model.vla.mini_vla import MiniVLA, MiniVLAConfig
from vla_core.model.vlm.vision_encoder import TinyCNNConfig
from vla_core.training.recipe import MiniVLARecipe

ANSWERS_ALIKE = [
    MLPHeadConfig(),
    GaussianHeadConfig(),
    ActionChunkerConfig(),
    TransformerHeadConfig(hidden_dim=32, layers=2),
]
HEADS = [
    *ANSWERS_ALIKE,
    DiffusionHeadConfig(),
    DiffusionHeadConfig(prediction="sample", sampler="ddpm"),
    DiffusionHeadConfig(prediction="v", denoiser="transformer", hidden_dim=32),
    DiffusionHeadConfig(context_drop=0.2, guidance_scale=1.5),
    DiffusionHeadConfig(
        schedule="mini_vla_seed", sampler="mini_vla_seed", train_steps=16, inference_steps=16, clip_sample=None
    ),
    FlowHeadConfig(),
    FlowHeadConfig(denoiser="transformer", hidden_dim=32, context_drop=0.2, guidance_scale=2.0),
    GaussianHeadConfig(answer="sample"),
    DiscreteHeadConfig(),
    DiscreteHeadConfig(bins=16, answer="sample"),
    TransformerHeadConfig(hidden_dim=32, layers=2, bins=32, answer="sample"),
]


def name(config: Any) -> str:
    """Such as flow-transformer-2.0: the tag and what is not usual."""
    usual = type(config)()
    return "-".join([config.type, *(str(v) for k, v in vars(config).items() if v != getattr(usual, k))])


every_head = pytest.mark.parametrize("config", HEADS, ids=name)


def build(config: Any, horizon: int = 4) -> ActionHeadBase:
    """A head with random weights also where training begins at 0: there, a head would ignore what it is given."""
    torch.manual_seed(0)
    head = build_action_head(config, horizon=horizon, action_dim=3, context_dim=8)
    for parameter in head.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return head


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def context(batch: int = 5, count: int = 4, width: int = 8) -> Tokens:
    """Tokens of which row i lacks i, but never all."""
    values = torch.randn((batch, count, width), generator=seeded(3))
    return Tokens(values, torch.arange(count) >= torch.arange(batch)[:, None].clamp(max=count - 1))


@every_head
@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 4), horizon=st.integers(1, 9), count=st.integers(0, 6), half=st.booleans(),
    data=st.integers(0, 2**32),
)  # fmt: skip
def test_any_batch_horizon_and_context(
    config: Any, batch: int, horizon: int, count: int, half: bool, data: int
) -> None:
    """Chunks and losses are float32 and finite, also of bfloat16, without a token and without a step."""
    head, generator = build(config, horizon), seeded(data)
    values = torch.randn((batch, count, 8), generator=generator)
    if half:
        head, values = head.to(torch.bfloat16), values.to(torch.bfloat16)
    tokens = Tokens(values, torch.rand((batch, count), generator=generator) < 0.5)
    chunk = head.predict(tokens, generator)
    assert chunk.shape == (batch, horizon, 3) and chunk.dtype == torch.float32 and chunk.isfinite().all()
    actions, mask = torch.randn(batch, horizon, 3), torch.rand((batch, horizon), generator=generator) < 0.7
    loss = head.loss(tokens, actions, mask, generator)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)
    if not mask.any():
        assert loss == 0


@pytest.mark.parametrize("config", ANSWERS_ALIKE, ids=name)
def test_bfloat16_is_float32_to_its_digits(config: Any) -> None:
    head = build(config)
    exact = head.predict(context())
    half = head.to(torch.bfloat16).predict(context())
    torch.testing.assert_close(half, exact, atol=0.03, rtol=0.03)


@every_head
def test_training_in_mixed_precision_is_that_in_float32(config: Any) -> None:
    """Weights in float32, layers in bfloat16: the same loss to the digits of the latter."""
    head, actions, mask = build(config), torch.rand(5, 4, 3) - 0.5, torch.ones(5, 4, dtype=torch.bool)
    exact = head.loss(context(), actions, mask, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head.loss(context(), actions, mask, seeded())
        chunk = head.predict(context(), seeded())
    mixed.backward()
    assert mixed.dtype == chunk.dtype == torch.float32 and chunk.isfinite().all()
    torch.testing.assert_close(mixed, exact, atol=0.02, rtol=0.02)


def outcome(head: ActionHeadBase, tokens: Tokens, actions: Tensor, mask: Tensor) -> list[Tensor]:
    """All that a head can say: loss, its gradient, a chunk."""
    loss = head.loss(tokens, actions, mask, seeded())
    gradient = torch.autograd.grad(loss, list(head.parameters()), allow_unused=True)
    return [loss, *(g for g in gradient if g is not None), head.predict(tokens, seeded())]


@every_head
def test_what_stands_in_padding_steps_changes_neither_loss_nor_gradient(config: Any) -> None:
    head = build(config)
    actions = torch.randn(5, 4, 3)
    mask = torch.arange(4) < torch.tensor([1, 2, 3, 4, 4])[:, None]
    mask[4] = torch.tensor([True, False, True, False])  # a hole in a chunk
    other = torch.where(mask[..., None], actions, torch.tensor(float("nan")))
    before, after = outcome(head, context(), actions, mask), outcome(head, context(), other, mask)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@every_head
def test_what_stands_at_absent_tokens_changes_nothing(config: Any) -> None:
    head, tokens = build(config), context()
    other = Tokens(torch.where(tokens.mask[..., None], tokens.values, torch.tensor(float("nan"))), tokens.mask)
    actions, mask = torch.randn(5, 4, 3), torch.ones(5, 4, dtype=torch.bool)
    before, after = outcome(head, tokens, actions, mask), outcome(head, other, actions, mask)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@every_head
def test_an_absent_token_is_as_good_as_none(config: Any) -> None:
    head, tokens = build(config), context(batch=3)
    tokens = Tokens(tokens.values, tokens.mask & torch.tensor([True, False, True, False]))
    shorter = Tokens(tokens.values[:, ::2], tokens.mask[:, ::2])
    with torch.no_grad():
        torch.testing.assert_close(
            head.predict(tokens, seeded()), head.predict(shorter, seeded()), atol=1e-5, rtol=1e-5
        )  # fmt: skip


@every_head
def test_every_token_that_is_there_matters_and_no_other(config: Any) -> None:
    head, tokens = build(config), context()
    values = tokens.values.requires_grad_()
    mask = torch.ones(5, 4, dtype=torch.bool)
    loss = sum(head.loss(Tokens(values, tokens.mask), torch.randn(5, 4, 3), mask, seeded(i)) for i in range(5))
    (gradient,) = torch.autograd.grad(loss, values)  # type: ignore[arg-type]
    assert torch.equal(gradient.abs().amax(dim=-1) > 0, tokens.mask)


@every_head
def test_one_seed_one_answer(config: Any) -> None:
    head = build(config)
    torch.manual_seed(1)
    first = head.predict(context(), seeded())
    torch.manual_seed(2)  # the global generator has no say
    assert torch.equal(first, head.predict(context(), seeded()))


@pytest.mark.parametrize("config", ANSWERS_ALIKE, ids=name)
def test_rows_of_a_batch_know_nothing_of_each_other(config: Any) -> None:
    head, tokens = build(config), context()
    rows = [head.predict(Tokens(tokens.values[i : i + 1], tokens.mask[i : i + 1])) for i in range(5)]
    torch.testing.assert_close(head.predict(tokens), torch.cat(rows), atol=1e-5, rtol=1e-5)


def test_masked_mean_counts_real_steps_alone() -> None:
    error = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [100.0, 100.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    assert masked_mean(error, mask).item() == pytest.approx(20 / 6)
    assert masked_mean(error, torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0


OVERFIT = [
    *ANSWERS_ALIKE,
    DiffusionHeadConfig(),
    DiffusionHeadConfig(prediction="sample"),
    DiffusionHeadConfig(prediction="v"),
    FlowHeadConfig(),
    FlowHeadConfig(denoiser="transformer", hidden_dim=32, layers=1),
    DiffusionHeadConfig(denoiser="transformer", hidden_dim=32, layers=1, prediction="sample", sampler="ddpm"),
    DiscreteHeadConfig(),
    TransformerHeadConfig(hidden_dim=32, layers=2, bins=64),
]


@pytest.mark.parametrize("config", OVERFIT, ids=name)
def test_overfits_one_batch(config: Any) -> None:
    head = build_action_head(config, horizon=4, action_dim=3, context_dim=8)
    torch.manual_seed(0)
    sampling = config.type in ("diffusion", "flow")
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    generator = seeded()
    count, repeat = (4, 32) if sampling else (4, 1)  # many draws of noise and time a step
    tokens = present(torch.randn((count, 2, 8), generator=generator))
    many = Tokens(tokens.values.repeat(repeat, 1, 1), tokens.mask.repeat(repeat, 1))
    actions = torch.rand(count, 4, 3, generator=generator) * 1.6 - 0.8
    mask = torch.ones(count * repeat, 4, dtype=torch.bool)
    for _ in range(400 if sampling else 200):
        loss = head.loss(many, actions.repeat(repeat, 1, 1), mask, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = (head.predict(tokens, generator) - actions).abs().mean()
    assert error < 0.08


def test_a_chunker_asks_its_head_once_a_step() -> None:
    """An outsider's head, on the features plus the step's embedding, by hand."""
    inner = nn.Linear(8, 3)
    chunker = ActionChunker(ActionChunkerConfig(), horizon=4, action_dim=3, context_dim=8, action_head=inner)
    features = torch.randn(2, 8)
    by_hand = torch.stack([inner(features + chunker.steps[h]) for h in range(4)], dim=1)
    torch.testing.assert_close(chunker(features), by_hand)
    sizes = [sum(p.numel() for p in build(ActionChunkerConfig(), horizon).parameters()) for horizon in (4, 100)]
    assert sizes[1] - sizes[0] == 96 * 8


def test_an_unknown_head_is_named_with_the_choices() -> None:
    class Config:
        type = "crystal_ball"

    choices = "chunker, diffusion, discrete, flow, gaussian, mlp, transformer"
    with pytest.raises(VlaError, match=f"'crystal_ball' registered; choices: {choices}"):
        build(Config())


@pytest.fixture
def registry() -> Iterator[dict[str, Any]]:
    """The registry, which afterwards is as it was."""
    before = dict(ACTION_HEAD_REGISTRY)
    yield ACTION_HEAD_REGISTRY
    ACTION_HEAD_REGISTRY.clear()
    ACTION_HEAD_REGISTRY.update(before)


@dataclass(frozen=True, kw_only=True)
class StandInConfig:
    type: Literal["stand_in"] = "stand_in"
    hidden_dim: int = 16
    layers: int = 1


class StandIn(MLPActionHead):
    Config = StandInConfig  # type: ignore[assignment]


def test_an_outsider_adds_a_head(registry: dict[str, Any]) -> None:
    registry["stand_in"] = StandIn
    assert isinstance(build(StandInConfig()), StandIn)
    with pytest.raises(VlaError, match="'stand_in' is registered twice"):
        register_action_head("stand_in")(StandIn)


def model_config(head: Any) -> dict[str, Any]:
    sizes = {"cameras": ["front"], "state_dim": 4, "action_dim": 2, "horizon": 3, "vocab_size": 8, "d_model": 32}
    return {**sizes, "vision": to_dict(TinyCNNConfig(d_model=32, channels=(8, 16))), "head": head}


def test_a_model_is_configured_with_an_outsiders_head(registry: dict[str, Any]) -> None:
    registry["stand_in"] = StandIn
    config = from_dict(MiniVLAConfig, model_config({"type": "stand_in", "layers": 2}))
    assert config.head == StandInConfig(layers=2) and isinstance(MiniVLA(config).head, StandIn)
    assert from_dict(MiniVLAConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match=r"head\.depth: unknown key; choices: hidden_dim, layers, type"):
        from_dict(MiniVLAConfig, model_config({"type": "stand_in", "depth": 2}))


@every_head
def test_a_model_with_any_head_comes_back_strictly(config: Any) -> None:
    one = MiniVLA(from_dict(MiniVLAConfig, model_config(to_dict(config))))
    assert one.config.head == config
    other = MiniVLA(one.config)
    other.load_state_dict(one.state_dict(), strict=True)
    tokens = context(width=32)
    assert torch.equal(one.head.predict(tokens, seeded()), other.head.predict(tokens, seeded()))


@pytest.mark.parametrize("cls", [MiniVLAConfig, MiniVLARecipe])
def test_a_model_needs_a_head(cls: Any) -> None:
    known = model_config(None) if cls is MiniVLAConfig else {"head": None}
    with pytest.raises(ConfigError, match=r"head: expected the settings of one of chunker, .*, found None"):
        from_dict(cls, known)


@pytest.mark.parametrize("config", [c for c in HEADS if not getattr(c, "guidable", False)], ids=name)
def test_a_head_that_cannot_continue_a_chunk_refuses_to(config: Any) -> None:
    prefix = ChunkPrefix(actions=torch.zeros(4, 3), weights=torch.zeros(4), frozen=0, max_guidance=5.0)
    with pytest.raises(VlaError, match=f"{config.type}.*choices: |sampler.*choices: "):
        build(config).predict(context(), None, prefix)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (DiffusionHeadConfig, {"inference_steps": 51}, r"inference_steps: expected 1 to train_steps \(50\), found 51"),
        (DiffusionHeadConfig, {"train_steps": 0}, "train_steps: expected at least 1"),
        (DiffusionHeadConfig, {"layers": 0}, "layers: expected at least 1"),
        (DiffusionHeadConfig, {"time_dim": 7}, "time_dim: expected an even number"),
        (DiffusionHeadConfig, {"sampler": "mini_vla_seed"}, "visits every step"),
        (FlowHeadConfig, {"inference_steps": 0}, "inference_steps: expected at least 1, found 0"),
        (FlowHeadConfig, {"hidden_dim": 0}, "hidden_dim: expected at least 1"),
        (FlowHeadConfig, {"time_dim": 7}, "time_dim: expected an even number"),
        (FlowHeadConfig, {"denoiser": "transformer", "heads": 5}, r"heads: expected a divisor of hidden_dim \(128\)"),
        (FlowHeadConfig, {"context_drop": 1.0}, "context_drop: expected a probability"),
        (FlowHeadConfig, {"guidance_scale": -1.0, "context_drop": 0.1}, "guidance_scale: expected a number from 0 on"),
        (FlowHeadConfig, {"guidance_scale": 2.0}, "guidance_scale: found 2.0.* context_drop above 0"),
        (MLPHeadConfig, {"layers": 0}, "layers: expected at least 1"),
        (GaussianHeadConfig, {"hidden_dim": 0}, "hidden_dim: expected at least 1"),
        (ActionChunkerConfig, {"layers": 0}, "layers: expected at least 1"),
        (DiscreteHeadConfig, {"bins": 1}, "bins: expected at least 2, found 1"),
        (TransformerHeadConfig, {"bins": 1}, "bins: expected at least 2, found 1"),
        (TransformerHeadConfig, {"answer": "sample"}, "answer: found 'sample', which needs bins"),
        (TransformerHeadConfig, {"heads": 3}, r"heads: expected a divisor of hidden_dim \(128\), found 3"),
    ],
)
def test_impossible_configs(cls: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**values)
