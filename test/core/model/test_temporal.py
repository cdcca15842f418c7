"""The history encoder: a stream gives what the window gives, and nothing comes from the future or from before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.errors import VlaError
from vla_core.model.attention import AttentionBlock
from vla_core.model.temporal import HistoryConfig, HistoryEncoder
from vla_core.model.tokens import Tokens

OBS, ACT = 5, 3
NAN = float("nan")


def make(max_len: int = 4, layers: int = 2) -> HistoryEncoder:
    torch.manual_seed(0)
    config = HistoryConfig(context_dim=16, layers=layers, heads=2, max_len=max_len)
    encoder = HistoryEncoder(config, obs_dim=OBS, action_dim=ACT)
    nn.init.normal_(encoder.absent)  # begins at 0, which would hide faults
    nn.init.normal_(encoder.transformer.age_bias)
    return encoder.eval()


def episode(seed: int, batch: int, steps: int, share: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, steps, OBS, generator=generator),
        torch.randn(batch, steps - 1, ACT, generator=generator),
        torch.rand(batch, steps, generator=generator) < share,
        torch.rand(batch, steps - 1, generator=generator) < share,
    )


def stream(encoder: HistoryEncoder, observations: Tensor, actions: Tensor, seen: Tensor, taken: Tensor) -> Tokens:
    memory, contexts = encoder.start(len(observations)), []
    for t in range(observations.shape[1]):
        action = (actions[:, t - 1], taken[:, t - 1]) if t else (None, None)
        context, memory = encoder.step(memory, observations[:, t], action[0], seen[:, t], action[1])
        contexts.append(context)
    return Tokens(torch.cat([c.values for c in contexts], dim=1), torch.cat([c.mask for c in contexts], dim=1))


def same(a: Tokens, b: Tokens) -> None:
    assert torch.equal(a.mask, b.mask)
    torch.testing.assert_close(a.values[a.mask], b.values[b.mask], atol=1e-5, rtol=1e-4)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    steps=st.integers(1, 13),
    max_len=st.integers(1, 5),
    share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
)
@settings(max_examples=50)
def test_stream_sequence_and_window_agree_at_every_step(
    seed: int, batch: int, steps: int, max_len: int, share: float
) -> None:
    encoder = make(max_len, layers=3)
    observations, actions, seen, taken = episode(seed, batch, steps, share)
    whole = encoder.sequence(observations, actions, seen, taken)
    same(whole, stream(encoder, observations, actions, seen, taken))
    for t in range(1, steps + 1):
        first = max(0, t - max_len)  # of the window that ends with step t - 1
        window = (observations[:, first:t], actions[:, first : t - 1], seen[:, first:t], taken[:, first : t - 1])
        step = Tokens(whole.values[:, t - 1 : t], whole.mask[:, t - 1 : t])
        same(step, encoder(*window))
        same(step, encoder(observations[:, :t], actions[:, : t - 1], seen[:, :t], taken[:, : t - 1]))


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
@settings(max_examples=25)
def test_what_is_absent_has_no_influence(seed: int, share: float) -> None:
    encoder = make()
    observations, actions, seen, taken = episode(seed, 2, 6, share)
    plain = encoder.sequence(observations, actions, seen, taken)
    observations = torch.where(seen[..., None], observations, NAN)
    actions = torch.where(taken[..., None], actions, NAN)
    noisy = encoder.sequence(observations, actions, seen, taken)
    assert torch.equal(plain.mask, noisy.mask) and torch.equal(plain.values, noisy.values)
    assert noisy.values.isfinite().all()
    same(noisy, stream(encoder, observations, actions, seen, taken))


@pytest.mark.parametrize("changed", range(8))
def test_a_step_sees_its_window_and_no_more(changed: int) -> None:
    encoder = make(max_len=3, layers=3)
    observations, actions, _, _ = episode(0, 1, 8)
    before = encoder.sequence(observations, actions).values
    observations[:, changed] += 1.0
    moved = (encoder.sequence(observations, actions).values - before).abs().amax(dim=-1)[0] > 1e-5
    assert moved.tolist() == [changed <= t < changed + 3 for t in range(8)]
    if changed < 7:
        before = encoder.sequence(observations, actions).values
        actions[:, changed] += 1.0
        moved = (encoder.sequence(observations, actions).values - before).abs().amax(dim=-1)[0] > 1e-5
        assert moved.tolist() == [changed < t < changed + 3 for t in range(8)]


def test_time_has_no_origin() -> None:
    encoder = make(max_len=3)
    observations, actions, _, _ = episode(0, 1, 3)
    early = encoder(observations, actions)
    long = torch.cat([torch.randn(1, 5000, OBS), observations], dim=1)
    late = encoder(long, torch.cat([torch.randn(1, 5000, ACT), actions], dim=1))
    assert torch.equal(early.values, late.values)


def test_the_order_of_steps_matters() -> None:
    encoder = make()
    observations, actions, _, _ = episode(0, 1, 4)
    swapped = observations[:, [1, 0, 2, 3]]
    assert (encoder(observations, actions).values - encoder(swapped, actions).values).abs().max() > 1e-3


def context_by_hand(encoder: HistoryEncoder, observations: Tensor, actions: Tensor) -> Tensor:
    """The newest context (D,) of one window of at most W steps, entry by entry."""
    steps = len(observations)
    embedded = [encoder.observation(o) for o in observations] + [encoder.action(a) for a in actions]
    places = [(0, steps - 1 - t) for t in range(steps)] + [(1, steps - 1 - t) for t in range(steps - 1)]
    query = encoder.observation(observations[-1])
    bias = encoder.transformer.age_bias
    for layer, block in enumerate(encoder.transformer.blocks):
        assert isinstance(block, AttentionBlock)
        asked = block.query(block.query_norm(query))
        pairs = [block.key_value(block.memory_norm(e)).chunk(2) for e in embedded]
        size, heads = len(query) // block.heads, []
        for h in range(block.heads):
            part = slice(h * size, (h + 1) * size)
            logits = [
                (asked[part] @ key[part]) / size**0.5 + bias[layer, kind, h, age]
                for (key, _), (kind, age) in zip(pairs, places, strict=True)
            ]
            weights = torch.stack(logits).softmax(dim=0)
            heads.append(sum(w * value[part] for w, (_, value) in zip(weights, pairs, strict=True)))
        query = query + block.out(torch.cat(heads))  # type: ignore[arg-type]
        query = query + block.mlp(query)
    return encoder.transformer.norm(query)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_context_is_its_formula(steps: int) -> None:
    encoder = make(max_len=4)
    observations, actions, _, _ = episode(0, 2, steps)
    for i, context in enumerate(encoder(observations, actions).values):
        expected = context_by_hand(encoder, observations[i], actions[i])
        torch.testing.assert_close(context[0], expected, atol=1e-5, rtol=1e-4)


def test_a_step_without_anything_is_masked_and_one_with_a_past_is_not() -> None:
    encoder = make(max_len=3)
    observations, actions, _, _ = episode(0, 1, 6)
    seen = torch.tensor([[False, True, False, False, False, False]])
    contexts = encoder.sequence(observations, actions, seen, torch.zeros(1, 5, dtype=torch.bool))
    assert contexts.mask.tolist() == [[False, True, True, True, False, False]]


def test_a_memory_can_be_continued_twice() -> None:
    encoder = make()
    observations, actions, _, _ = episode(0, 1, 3)
    _, memory = encoder.step(encoder.start(1), observations[:, 0])
    first, _ = encoder.step(memory, observations[:, 1], actions[:, 0])
    encoder.step(memory, observations[:, 2], actions[:, 1])
    again, _ = encoder.step(memory, observations[:, 1], actions[:, 0])
    assert torch.equal(first.values, again.values)


def test_gradients_flow_to_every_weight_and_are_finite() -> None:
    encoder = make()
    observations, actions, seen, taken = episode(0, 3, 6, 0.6)
    seen[0], taken[0] = False, False
    contexts = encoder.sequence(torch.where(seen[..., None], observations, NAN), actions, seen, taken)
    contexts.values[contexts.mask].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_bfloat16_and_mixed_precision() -> None:
    encoder = make()
    observations, actions, seen, taken = episode(0, 3, 6, 0.8)
    exact = encoder.sequence(observations, actions, seen, taken)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = [
            encoder.sequence(observations, actions, seen, taken),
            stream(encoder, observations, actions, seen, taken),
        ]
    rough = encoder.bfloat16().sequence(observations, actions, seen, taken)
    assert rough.values.dtype == torch.bfloat16
    for contexts in (rough, *mixed):
        assert torch.equal(contexts.mask, exact.mask)
        assert (contexts.values.float() - exact.values).abs().mean() < 0.05 * exact.values.std()


def test_it_learns_a_velocity() -> None:
    torch.manual_seed(0)
    encoder = HistoryEncoder(HistoryConfig(context_dim=16, layers=1, heads=2, max_len=4), obs_dim=1, action_dim=1)
    readout = nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*encoder.parameters(), *readout.parameters()], lr=1e-2)
    for _ in range(150):
        observations = torch.randn(64, 4, 1)
        velocity = observations[:, -1] - observations[:, -2]  # in no single observation
        loss = (readout(encoder(observations, torch.zeros(64, 3, 1)).values[:, 0]) - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # the best guess from the newest observation alone has 1, and without any 2


def test_config_and_shapes() -> None:
    config = HistoryConfig(context_dim=16, heads=2)
    assert from_dict(HistoryConfig, to_dict(config)) == config and HistoryEncoder.Config is HistoryConfig
    encoder = HistoryEncoder(config, obs_dim=OBS, action_dim=ACT)
    assert encoder(*config.fake(2, obs_dim=OBS, action_dim=ACT)).values.shape == (2, 1, 16)
    with pytest.raises(ConfigError, match=r"heads: expected a divisor of context_dim \(16\), found 3"):
        HistoryConfig(context_dim=16, heads=3)
    with pytest.raises(ConfigError, match="max_len: expected at least 1, found 0"):
        HistoryConfig(max_len=0)
    with pytest.raises(VlaError, match=r"actions \(2, 4, 3\); expected \(B, T, 5\) and \(B, T - 1, 3\)"):
        encoder(torch.zeros(2, 4, OBS), torch.zeros(2, 4, ACT))
