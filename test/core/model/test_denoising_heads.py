"""Diffusion and flow: several ways to act, guidance by the context, and the transformer as denoiser."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vla_core.model.action_head.base import ActionHeadBase, build_action_head
from vla_core.model.action_head.denoiser import DenoisingActionHead
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.model.action_head.flow_action_head import FlowHeadConfig
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig
from vla_core.model.tokens import Tokens, join, present

H, A, D = 4, 3, 8


def build(config: Any) -> Any:
    torch.manual_seed(0)
    return build_action_head(config, horizon=H, action_dim=A, context_dim=D)


def stirred(head: DenoisingActionHead) -> DenoisingActionHead:
    """The head with random weights everywhere: a transformer's gates begin at 0."""
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.2)
    return head


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(config: Any, context: Tokens, actions: Tensor, steps: int) -> ActionHeadBase:
    head, generator = build(config), seeded()
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    mask = torch.ones(actions.shape[:2], dtype=torch.bool)
    for _ in range(steps):
        loss = head.loss(context, actions, mask, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


TWO_WAYS = [
    *(DiffusionHeadConfig(prediction=p, sampler=s) for p in ("epsilon", "sample", "v") for s in ("ddpm", "ddim")),
    FlowHeadConfig(),
    FlowHeadConfig(denoiser="transformer", hidden_dim=32, layers=1),
    DiffusionHeadConfig(denoiser="transformer", hidden_dim=32, layers=1, prediction="v"),
]
SIDE = torch.where(torch.arange(128) % 2 == 0, 0.8, -0.8)[:, None, None].expand(128, H, A)
NO_HINT = present(torch.zeros(128, D))


@pytest.mark.parametrize("config", TWO_WAYS, ids=lambda c: f"{c.type}-{c.denoiser}")
def test_a_sampling_head_learns_two_ways_to_act(config: Any) -> None:
    """Half the demonstrations go left, half go right: the answer is one of them, not the mean."""
    head = trained(config, NO_HINT, SIDE, 1000 if config.denoiser == "mlp" else 400)
    with torch.no_grad():
        chunk = head.predict(NO_HINT, seeded(1))
    assert ((chunk.abs() - 0.8).abs().amax(dim=(1, 2)) < 0.2).float().mean() > 0.9
    assert 0.2 < (chunk[:, 0, 0] > 0).float().mean() < 0.8


def test_the_mlp_head_goes_between_the_two_ways() -> None:
    head = trained(MLPHeadConfig(), NO_HINT, SIDE, 600)
    with torch.no_grad():
        chunk = head.predict(NO_HINT)
    assert (chunk == chunk[:1]).all() and chunk.abs().max() < 0.4


BOTH = pytest.mark.parametrize(
    "config",
    [
        DiffusionHeadConfig(context_drop=0.3, clip_sample=None, train_steps=1, inference_steps=1, prediction="v"),
        FlowHeadConfig(context_drop=0.3, inference_steps=1),
        FlowHeadConfig(context_drop=0.3, inference_steps=1, denoiser="transformer", hidden_dim=16),
    ],
    ids=lambda c: f"{c.type}-{c.denoiser}",
)


def scaled(head: DenoisingActionHead, scale: float) -> DenoisingActionHead:
    """The same weights, guided by ``scale``."""
    other = build(dataclasses.replace(head.config, guidance_scale=scale))
    other.load_state_dict(head.state_dict())
    return other


def tokens() -> Tokens:
    return Tokens(
        torch.randn((5, 3, D), generator=seeded(3)), torch.arange(3) < torch.tensor([[1], [2], [3], [3], [0]])
    )


@BOTH
def test_scale_1_is_the_model_itself_and_scale_0_the_one_without_context(config: Any) -> None:
    head = stirred(build(config))
    with torch.no_grad():
        itself = head.predict(tokens(), seeded())
        plain = build(dataclasses.replace(config, context_drop=0.0))  # that has never heard of guidance
        plain.load_state_dict({k: v for k, v in head.state_dict().items() if k != "nothing"})
        assert torch.equal(plain.predict(tokens(), seeded()), itself)
        # Beside 1 the other branch is taken: it arrives at the same in the limit.
        torch.testing.assert_close(scaled(head, 1 + 1e-6).predict(tokens(), seeded()), itself, atol=1e-4, rtol=1e-4)
        alone = plain.predict(present(head.nothing.expand(5, D)), seeded())
        torch.testing.assert_close(scaled(head, 0.0).predict(tokens(), seeded()), alone, atol=1e-4, rtol=1e-4)


@BOTH
def test_one_guided_step_is_the_line_through_both_answers(config: Any) -> None:
    """One step is linear in the denoiser's output: without + scale (with - without)."""
    head = stirred(build(config))
    with torch.no_grad():
        without, with_context = (scaled(head, scale).predict(tokens(), seeded()) for scale in (0.0, 1.0))
        found = scaled(head, 2.5).predict(tokens(), seeded())
    torch.testing.assert_close(found, without + 2.5 * (with_context - without), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("drop", [0.0, 0.25])
def test_training_drops_as_many_contexts_as_it_should(drop: float, monkeypatch: pytest.MonkeyPatch) -> None:
    head = build(FlowHeadConfig(context_drop=drop))
    seen: list[Tokens] = []
    remember = head.denoiser.remember
    monkeypatch.setattr(head.denoiser, "remember", lambda context: seen.append(context) or remember(context))
    many = Tokens(torch.randn(4000, 2, D), torch.tensor([[True, False]]).expand(4000, 2))
    head.loss(many, torch.zeros(4000, H, A), torch.ones(4000, H, dtype=torch.bool), seeded())
    if not drop:
        assert seen[0] is many
        return
    values, mask = seen[0]
    assert (mask.sum(dim=1) == 1).all() and not mask[:, 1].any()
    assert mask[:, 2].float().mean().item() == pytest.approx(drop, abs=0.03)
    assert torch.equal(values[:, 2], head.nothing.expand(4000, D))


def test_guidance_goes_further_than_the_context() -> None:
    """A context of +1 or -1 with an action of 0.3 of it: without context the mean is 0, guided by 2 it is 0.6."""
    sign = torch.where(torch.arange(128) % 2 == 0, 1.0, -1.0)
    context, actions = present(sign[:, None].expand(128, D)), 0.3 * sign[:, None, None].expand(128, H, A)
    config = DiffusionHeadConfig(context_drop=0.3, inference_steps=1, prediction="sample")  # one step: the mean
    head = trained(config, context, actions, 500)
    with torch.no_grad():
        found = [scaled(head, scale).predict(context, seeded()) for scale in (0.0, 1.0, 2.0)]  # type: ignore[arg-type]
    for scale, chunk in zip((0.0, 1.0, 2.0), found, strict=True):
        assert (chunk - scale * actions).abs().mean() < 0.1


@pytest.mark.parametrize("kind", [DiffusionHeadConfig, FlowHeadConfig])
def test_a_new_transformer_block_is_the_identity(kind: Any) -> None:
    """The gates begin at 0 (adaLN-Zero): neither time nor context matters before there was a step of training."""
    head = build(kind(denoiser="transformer", hidden_dim=16))
    x, memory = torch.randn(5, H, A), head.denoiser.remember(tokens())
    early, late = (head.denoiser(x, torch.full((5,), t), memory) for t in (0, 1))
    blocks = head.denoiser.step(x) + head.denoiser.decoder.position
    by_hand = head.denoiser.out(nn.functional.layer_norm(blocks, (16,)))
    torch.testing.assert_close(early, by_hand)
    assert torch.equal(early, late)
    early, late = (stirred(head).denoiser(x, torch.full((5,), t), memory) for t in (0, 1))
    assert not torch.allclose(early, late)


def test_the_transformer_sees_all_steps_and_the_order_of_them() -> None:
    head = stirred(build(FlowHeadConfig(denoiser="transformer", hidden_dim=16)))
    x, t, memory = torch.randn(5, H, A), torch.full((5,), 0.5), head.denoiser.remember(tokens())
    jacobian = torch.autograd.functional.jacobian(lambda x: head.denoiser(x, t, memory)[0], x)[:, :, 0]
    assert (jacobian.abs().amax(dim=(1, 3)) > 0).all()
    assert not torch.allclose(head.denoiser(x.flip(1), t, memory).flip(1), head.denoiser(x, t, memory))


def test_the_transformer_attends_to_tokens_as_torch_does() -> None:
    """The cross-attention of a block, against nn.MultiheadAttention with the same weights."""
    head = stirred(build(FlowHeadConfig(denoiser="transformer", hidden_dim=16, heads=4, layers=1)))
    block, some = head.denoiser.decoder.blocks[0], tokens()  # type: ignore[union-attr]
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    key_weight, value_weight = block.key_value.weight.chunk(2)
    key_bias, value_bias = block.key_value.bias.chunk(2)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([block.query.weight, key_weight, value_weight]))
        theirs.in_proj_bias.copy_(torch.cat([block.query.bias, key_bias, value_bias]))
        theirs.out_proj.load_state_dict(block.cross_out.state_dict())
        queries, values = torch.randn(5, H, 16), torch.randn(5, 3, 16)
        expected, _ = theirs(queries, values, values, key_padding_mask=~some.mask, need_weights=False)
        found = block.attend(queries, block.remember(values), some.mask[:, None, None])
    torch.testing.assert_close(found[:4], expected[:4])
    torch.testing.assert_close(found[4], torch.zeros(H, 16), msg="a row without any token hears nothing")


def test_a_sampling_in_bfloat16_starts_from_the_noise_of_float32() -> None:
    head, half = build(FlowHeadConfig()), build(FlowHeadConfig()).to(torch.bfloat16)
    context = Tokens(tokens().values.to(torch.bfloat16), tokens().mask)
    assert torch.equal(half.noise(context, seeded()), head.noise(tokens(), seeded()))


def test_the_context_is_read_once_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    head = build(DiffusionHeadConfig(denoiser="transformer", hidden_dim=16))
    count: list[int] = []
    remember = head.denoiser.remember
    monkeypatch.setattr(head.denoiser, "remember", lambda context: count.append(1) or remember(context))
    head.predict(join([tokens(), tokens()]), seeded())
    assert count == [1]
