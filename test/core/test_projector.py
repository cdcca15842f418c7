"""Projectors: masks, variable numbers of tokens, and attention against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError
from vla_core.model.tokens import Tokens, present
from vla_core.model.vlm.vision_projector import (
    Attention,
    AttentionPoolingConfig,
    MaxPoolingConfig,
    MLPProjectorConfig,
    PerceiverConfig,
    build_projector,
)

CONFIGS: dict[str, Any] = {
    "mlp": MLPProjectorConfig(),
    "attention_pooling": AttentionPoolingConfig(num_queries=5, num_heads=4),
    "perceiver": PerceiverConfig(num_latents=5, num_heads=4),
    "max_pooling": MaxPoolingConfig(num_tokens=5, channels=8),
}
quick = settings(max_examples=20, deadline=None)


def build(name: str) -> Any:
    torch.manual_seed(0)
    return build_projector(CONFIGS[name], vision_dim=12, llm_dim=16)


def some_mask(batch: int, count: int, seed: int) -> torch.Tensor:
    return torch.rand(batch, count, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize("name", CONFIGS)
@given(batch=st.integers(1, 4), count=st.integers(1, 9), seed=st.integers(0, 99))
@quick
def test_absent_tokens_are_as_if_they_were_not_there(name: str, batch: int, count: int, seed: int) -> None:
    projector, mask = build(name), some_mask(batch, count, seed)
    values = torch.randn(batch, count, 12, generator=torch.Generator().manual_seed(seed))
    out = projector(Tokens(values.masked_fill(~mask[..., None], float("nan")), mask))
    assert out.values.isfinite().all()
    assert out.values.shape == (batch, count if name == "mlp" else 5, 16)
    for b in range(batch):
        if not mask[b].any():
            assert not out.mask[b].any()
            continue
        alone = projector(present(values[b : b + 1, mask[b]]))
        assert alone.mask.all()
        torch.testing.assert_close(out.values[b][out.mask[b]], alone.values[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["attention_pooling", "perceiver", "max_pooling"])
@given(seed=st.integers(0, 99))
@quick
def test_pooling_asks_for_a_set(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    projector, values = build(name), torch.randn(2, 7, 12, generator=generator)
    mask = some_mask(2, 7, seed)
    order = torch.randperm(7, generator=generator)
    out, other = projector(Tokens(values, mask)), projector(Tokens(values[:, order], mask[:, order]))
    torch.testing.assert_close(out.values, other.values, atol=1e-5, rtol=1e-4)


def test_max_pooling_hears_one_loud_token_among_many() -> None:
    """What one cell of a thousand holds moves the answer as much as if it were alone."""
    projector = build("max_pooling")
    with torch.no_grad():
        projector.ask.weight.zero_()[0, 3] = 1.0
        projector.ask.bias.zero_()
    quiet = torch.rand(1, 1000, 12)
    loud = quiet.clone()
    loud[0, 417, 3] = 7.0
    moved = projector(present(loud)).values - projector(present(quiet)).values
    expected = projector.out.weight[:, 0] * (7.0 - quiet[0, :, 3].max())
    torch.testing.assert_close(moved.flatten(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_torchs_batch_first(masked: bool) -> None:
    torch.manual_seed(0)
    own, torchs = Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        torchs.in_proj_weight.copy_(torch.cat([own.to_q.weight, own.to_kv.weight]))
        torchs.in_proj_bias.copy_(torch.cat([own.to_q.bias, own.to_kv.bias]))
        torchs.out_proj.load_state_dict(own.out.state_dict())
    queries, keys = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    mask = some_mask(3, 7, 4) if masked else None
    expected, _ = torchs(queries, keys, keys, key_padding_mask=None if mask is None else ~mask)
    torch.testing.assert_close(own(queries, keys, mask), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_do_not_see_each_other(name: str) -> None:
    projector, values = build(name), torch.randn(3, 6, 12)
    changed = values.clone()
    changed[1] += 1.0
    out, other = projector(present(values)).values, projector(present(changed)).values
    assert torch.equal(out[[0, 2]], other[[0, 2]]) and not torch.equal(out[1], other[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_trained_also_where_a_row_is_empty(name: str) -> None:
    projector, mask = build(name), torch.tensor([[True, True, False], [False, False, False]])
    projector(Tokens(torch.randn(2, 3, 12), mask)).values.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in projector.parameters())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_bfloat16(name: str) -> None:
    projector, values = build(name), torch.randn(2, 6, 12)
    exact = projector(present(values)).values
    rough = projector.to(torch.bfloat16)(present(values)).values
    assert rough.dtype is torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.1, rtol=0.05)


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="num_queries: expected at least 1, found 0"):
        AttentionPoolingConfig(num_queries=0)
    with pytest.raises(ConfigError, match="channels: expected at least 1, found 0"):
        MaxPoolingConfig(channels=0)
    with pytest.raises(VlaError, match="num_heads: expected a divisor of the width 12, found 8"):
        build_projector(PerceiverConfig(), vision_dim=12, llm_dim=12)
    with pytest.raises(VlaError, match="no projector 'qformer' registered; choices: attention_pooling, max"):
        build_projector(type("Other", (), {"type": "qformer"}), vision_dim=8, llm_dim=8)
