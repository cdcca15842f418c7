"""Fusions against their formulas written out, and absent modalities without influence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.errors import VlaError
from vla_core.model.attention import AttentionBlock, masked_attention
from vla_core.model.fusion.film import FiLM
from vla_core.model.fusion.sensor_fusion import (
    FUSION_REGISTRY,
    CrossModalConfig,
    CrossModalFusion,
    FiLMFusionConfig,
    Fusion,
    HierarchicalConfig,
    HierarchicalFusion,
    PooledFusionConfig,
    build_fusion,
)
from vla_core.model.tokens import Tokens, masked_mean, present

MODALITIES = ("vision", "lidar", "radar")
WIDTH = 16
CONFIGS: dict[str, Any] = {
    "mlp": PooledFusionConfig(),
    "cross_modal": CrossModalConfig(layers=2, heads=4),
    "hierarchical": HierarchicalConfig(layers=2, heads=4),
    "film": FiLMFusionConfig(condition="radar"),
}
seeds = st.integers(0, 2**32 - 1)


def make(name: str) -> Fusion:
    torch.manual_seed(0)
    fusion = build_fusion(CONFIGS[name], modalities=MODALITIES, d_model=WIDTH)
    for parameter in fusion.parameters():  # FiLM and absent embeddings begin at 0, which would hide faults
        nn.init.normal_(parameter, std=0.3)
    return fusion.eval()


def random_parts(seed: int, batch: int, counts: tuple[int, ...], share: float = 1.0) -> dict[str, Tokens]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Tokens(
            torch.randn(batch, count, WIDTH, generator=generator),
            torch.rand(batch, count, generator=generator) < share,
        )
        for name, count in zip(MODALITIES, counts, strict=True)
    }


def without(parts: dict[str, Tokens], *names: str) -> dict[str, Tokens]:
    """The same with some modalities absent, and NaN in their place."""
    return {
        name: Tokens(torch.full_like(t.values, float("nan")), torch.zeros_like(t.mask)) if name in names else t
        for name, t in parts.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
@given(seed=seeds, batch=st.integers(1, 3), counts=st.tuples(*[st.integers(0, 4)] * 3), share=st.floats(0, 1))
@settings(max_examples=20)
def test_absent_tokens_have_no_influence(name: str, seed: int, batch: int, counts: Any, share: float) -> None:
    fusion = make(name)
    parts = random_parts(seed, batch, counts, share)
    noisy = {n: Tokens(torch.where(t.mask[..., None], t.values, float("nan")), t.mask) for n, t in parts.items()}
    a, b = fusion(parts), fusion(noisy)
    assert torch.equal(a.mask, b.mask) and torch.equal(a.values[a.mask], b.values[b.mask])
    assert a.values.isfinite().all() and a.values.shape == (*a.mask.shape, WIDTH)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lost", [("vision",), ("radar",), ("lidar", "radar"), ("vision", "lidar"), MODALITIES])
def test_an_absent_modality_is_one_without_tokens(name: str, lost: tuple[str, ...]) -> None:
    fusion, parts = make(name), random_parts(0, 2, (3, 4, 2))
    masked = fusion(without(parts, *lost))
    none = fusion({n: Tokens(t.values[:, :0], t.mask[:, :0]) if n in lost else t for n, t in parts.items()})
    torch.testing.assert_close(masked.values[masked.mask], none.values[none.mask], atol=1e-6, rtol=1e-5)
    assert masked.mask.any() == (len(lost) < 3 and not (name == "film" and lost == ("vision", "lidar")))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_finite_with_a_modality_alone(name: str) -> None:
    fusion, parts = make(name), without(random_parts(0, 2, (3, 4, 2)), "lidar", "radar")
    values = parts["vision"].values.requires_grad_()
    fused = fusion(parts)
    fused.values[fused.mask].square().sum().backward()
    assert values.grad is not None and values.grad.isfinite().all() and values.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in fusion.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_present_modality_matters(name: str) -> None:
    fusion, parts = make(name), random_parts(0, 2, (3, 4, 2))
    fused = fusion(parts)
    for modality in MODALITIES:
        other = {**parts, modality: Tokens(parts[modality].values.flip(-1), parts[modality].mask)}
        assert (fusion(other).values - fused.values).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_batches_do_not_mix(name: str) -> None:
    fusion, parts = make(name), random_parts(0, 4, (3, 4, 2), 0.7)
    together = fusion(parts)
    for i in range(4):
        alone = fusion({n: Tokens(t.values[i : i + 1], t.mask[i : i + 1]) for n, t in parts.items()})
        torch.testing.assert_close(together.values[i], alone.values[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16(name: str) -> None:
    fusion, parts = make(name), without(random_parts(0, 3, (3, 4, 2), 0.8), "lidar")
    exact = fusion(parts)
    rough = fusion.bfloat16()({n: Tokens(t.values.bfloat16(), t.mask) for n, t in parts.items()})
    assert rough.values.dtype == torch.bfloat16 and rough.values.isfinite().all()
    assert (rough.values.float() - exact.values).abs().mean() < 0.05 * exact.values.std()


def attention_by_hand(block: AttentionBlock, x: Tensor, owner: list[int], mask: Tensor) -> Tensor:
    """One layer for one sample, query by query: (N, D), absent tokens left as they are."""
    memory = block.memory_norm(x)
    keys, values = block.key_value(memory).chunk(2, dim=-1)
    queries = block.query(block.query_norm(x))
    size = x.shape[1] // block.heads
    out = x.clone()
    for i in range(len(x)):
        others = [j for j in range(len(x)) if owner[j] != owner[i] and mask[j]]
        if not mask[i]:
            continue
        if others:
            heads = []
            for h in range(block.heads):
                part = slice(h * size, (h + 1) * size)
                weights = (keys[others, part] @ queries[i, part] / size**0.5).softmax(dim=0)
                heads.append(weights @ values[others, part])
            out[i] = x[i] + block.out(torch.cat(heads))
        out[i] = out[i] + block.mlp(out[i])
    return out


@given(seed=seeds, counts=st.tuples(*[st.integers(0, 4)] * 3), share=st.sampled_from([0.3, 0.8, 1.0]))
@settings(max_examples=25)
def test_each_modality_attends_to_all_others_and_not_to_itself(seed: int, counts: Any, share: float) -> None:
    fusion = make("cross_modal")
    assert isinstance(fusion, CrossModalFusion)
    parts = random_parts(seed, 1, counts, share)
    owner = [i for i, count in enumerate(counts) for _ in range(count)]
    mask = torch.cat([t.mask[0] for t in parts.values()])
    x = torch.cat([t.values[0] for t in parts.values()]) + fusion.modality[owner]
    for block in fusion.blocks:
        assert isinstance(block, AttentionBlock)
        x = attention_by_hand(block, x, owner, mask)
    fused = fusion(parts)
    torch.testing.assert_close(fused.values[0][mask], fusion.norm(x)[mask], atol=1e-5, rtol=1e-4)
    assert torch.equal(fused.mask[0], mask) and not fused.values[0][~mask].any()


def test_tokens_of_one_modality_do_not_see_each_other_in_one_layer() -> None:
    torch.manual_seed(0)
    fusion = CrossModalFusion(CrossModalConfig(layers=1, heads=4), modalities=("a", "b"), d_model=WIDTH)
    parts = {"a": present(torch.randn(1, 3, WIDTH)), "b": present(torch.randn(1, 2, WIDTH))}
    other = {**parts, "a": present(parts["a"].values.clone())}
    other["a"].values[:, 0, 0] += 1.0  # of one entry: a shift of all is nothing to a layer norm
    a, b = fusion(parts).values, fusion(other).values
    torch.testing.assert_close(a[:, 1:3], b[:, 1:3])
    assert ((a - b).abs().amax(dim=-1) > 1e-4)[0].tolist() == [True, False, False, True, True]


def test_the_scene_is_made_before_it_meets_vision() -> None:
    fusion = make("hierarchical")
    assert isinstance(fusion, HierarchicalFusion)
    parts = random_parts(0, 2, (3, 4, 2))
    scene = fusion.space({"lidar": parts["lidar"], "radar": parts["radar"]})
    whole = fusion.whole({"scene": scene, "vision": parts["vision"]})
    torch.testing.assert_close(fusion(parts).values, whole.values)
    assert scene.values.shape == (2, 6, WIDTH)
    blind = fusion.space({"lidar": parts["lidar"], "radar": without(parts, "radar")["radar"]})
    assert blind.mask.sum() == 8 and (blind.values[:, :4] - scene.values[:, :4]).abs().max() > 1e-3


def test_film_is_its_formula_and_begins_as_the_identity() -> None:
    torch.manual_seed(0)
    film = FiLM(feature_dim=3, condition_dim=2)
    features, condition = torch.randn(4, 5, 3), torch.randn(4, 2)
    assert torch.equal(film(features, condition), features)
    nn.init.normal_(film.gamma_beta.weight)
    nn.init.normal_(film.gamma_beta.bias)
    gamma, beta = F.linear(condition, film.gamma_beta.weight, film.gamma_beta.bias).split(3, dim=-1)
    expected = torch.stack([(1 + gamma[i]) * features[i] + beta[i] for i in range(4)])
    torch.testing.assert_close(film(features, condition), expected)
    maps = torch.randn(4, 3, 2, 5)
    by_channel = film(maps.flatten(2).mT, condition).mT.view_as(maps)
    torch.testing.assert_close(film(maps, condition, dim=1), by_channel)


def test_film_by_an_absent_condition_changes_nothing() -> None:
    fusion, parts = make("film"), random_parts(0, 2, (3, 4, 2))
    fused = fusion(without(parts, "radar"))
    assert torch.equal(fused.values, torch.cat([parts["vision"].values, parts["lidar"].values], dim=1))
    known = fusion(parts)
    mean = masked_mean(parts["radar"])
    torch.testing.assert_close(known.values[:, :3], fusion.film(parts["vision"].values, mean))  # type: ignore[operator]


def plain_attention(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor) -> Tensor:
    """The formula, without the library's care for queries that attend to nothing."""
    bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    return (query @ key.mT / query.shape[-1] ** 0.5 + bias).softmax(dim=-1) @ value


@pytest.mark.parametrize("plain", [False, True])
def test_attention_to_nothing_is_zero_and_has_a_gradient(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:  # as an exported model computes it
        monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(3))
    allowed = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    allowed[0, :, 1] = False
    out = masked_attention(query, key, value, allowed)
    assert not out[0, :, 1].any() and out[0, :, 0].all()
    torch.testing.assert_close(out[1], plain_attention(query, key, value, attn_mask=allowed)[1])
    out.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (query, key, value))


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_come_back(name: str) -> None:
    assert FUSION_REGISTRY[name].Config is type(CONFIGS[name])
    assert from_dict(type(CONFIGS[name]), to_dict(CONFIGS[name])) == CONFIGS[name]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(VlaError, match="tokens of lidar, vision; this fusion was made for lidar, radar, vision"):
        parts = random_parts(0, 1, (1, 1, 1))
        make("mlp")({name: parts[name] for name in ("vision", "lidar")})
    with pytest.raises(VlaError, match="distinct names"):
        build_fusion(PooledFusionConfig(), modalities=("a", "a"), d_model=4)
    with pytest.raises(ConfigError, match="heads: expected a divisor of the width 6, found 4"):
        build_fusion(CrossModalConfig(heads=4), modalities=("a",), d_model=6)
    with pytest.raises(ConfigError, match="scene: expected some but not all of lidar, radar"):
        build_fusion(HierarchicalConfig(), modalities=("lidar", "radar"), d_model=8)
    with pytest.raises(ConfigError, match="condition: expected one of several modalities a, b, found 'c'"):
        build_fusion(FiLMFusionConfig(condition="c"), modalities=("a", "b"), d_model=8)
    with pytest.raises(ConfigError, match="layers: expected at least 1, found 0"):
        CrossModalConfig(layers=0)
