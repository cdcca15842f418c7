"""Writing a chunk step by step: with the cache as without it, and never from the future."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_core.model.action_head.discrete_action_head import bin_of, centre_of
from vla_core.model.action_head.transformer_action_head import TransformerActionHead, TransformerHeadConfig
from vla_core.model.tokens import Tokens, present

A, D = 3, 8
NUMBERS = TransformerHeadConfig(hidden_dim=32, layers=3)
BINS = TransformerHeadConfig(hidden_dim=32, layers=3, bins=64)


def build(config: TransformerHeadConfig, horizon: int = 6) -> TransformerActionHead:
    torch.manual_seed(0)
    return TransformerActionHead(config, horizon=horizon, action_dim=A, context_dim=D)


def context(batch: int = 3, count: int = 5) -> Tokens:
    values = torch.randn((batch, count, D), generator=torch.Generator().manual_seed(3))
    return Tokens(values, torch.arange(count) <= torch.arange(batch)[:, None])


def without_cache(head: TransformerActionHead, tokens: Tokens) -> Tensor:
    """The whole chunk so far through the whole network, again for every step."""
    written = torch.zeros(len(tokens.mask), 0, A, dtype=tokens.values.dtype)
    while written.shape[1] < head.horizon:
        said = head(tokens, written)[:, -1:]
        action = said if head.config.bins is None else centre_of(said.argmax(-1), head.config.bins)
        written = torch.cat([written, action], dim=1)
    return written


@pytest.mark.parametrize("config", [NUMBERS, BINS], ids=["numbers", "bins"])
@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 4), horizon=st.integers(1, 9), count=st.integers(0, 6))
def test_the_cache_changes_nothing(config: Any, batch: int, horizon: int, count: int) -> None:
    head, tokens = build(config, horizon).double(), context(batch, count)
    tokens = Tokens(tokens.values.double(), tokens.mask)  # in float32 rounding adds up to 1e-6 over nine steps
    with torch.no_grad():
        torch.testing.assert_close(head.predict(tokens).double(), without_cache(head, tokens), atol=1e-12, rtol=0)


def test_a_step_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache is for: H steps pass the network, and the context once."""
    head = build(NUMBERS)
    seen: list[int] = []
    kept: list[int] = []
    head.decoder.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    remember = head.decoder.remember
    monkeypatch.setattr(head.decoder, "remember", lambda tokens: kept.append(1) or remember(tokens))
    head.predict(context())
    assert seen == [1] * 6 and kept == [1]


def test_training_shows_the_steps_before_as_they_will_be_read_back() -> None:
    """Centres of bins: where in its bin an action lies makes no difference."""
    head = build(BINS)
    actions, mask = torch.rand(3, 6, A) * 2 - 1, torch.ones(3, 6, dtype=torch.bool)
    centres = centre_of(bin_of(actions, 64), 64)
    assert not torch.equal(actions, centres)
    assert torch.equal(head.loss(context(), actions, mask), head.loss(context(), centres, mask))


def test_no_step_knows_of_itself_or_of_the_future() -> None:
    """The Jacobian of what is said at step h by the actions at step k is 0 for k >= h, and nowhere else."""
    head = build(NUMBERS)
    actions = torch.randn(1, 6, A)
    jacobian = torch.autograd.functional.jacobian(lambda a: head(context(1), a), actions)[0, :, :, 0]  # (H, A, H, A)
    reached = jacobian.abs().amax(dim=(1, 3)) > 0
    assert torch.equal(reached, torch.ones(6, 6, dtype=torch.bool).tril(-1))


def test_steps_of_one_chunk_agree_on_the_way() -> None:
    """Two ways to go, all steps alike: a step that is drawn by itself binds those after it, and both ways occur."""
    config = TransformerHeadConfig(hidden_dim=32, layers=1, bins=16, answer="sample")
    head = TransformerActionHead(config, horizon=4, action_dim=1, context_dim=D)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    side = torch.where(torch.arange(32) % 2 == 0, 0.8, -0.8)
    actions, mask = side[:, None, None].expand(32, 4, 1), torch.ones(32, 4, dtype=torch.bool)
    for _ in range(100):
        loss = head.loss(present(torch.ones(32, D)), actions, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        chunk = head.predict(present(torch.ones(400, D)), torch.Generator().manual_seed(2))
    assert (chunk.sign() == chunk[:, :1].sign()).all(dim=1).float().mean() > 0.98
    assert 0.4 < (chunk[:, 0] > 0).float().mean() < 0.6
    assert ((chunk.abs() - 0.8).abs() < 1 / 15).float().mean() > 0.98
