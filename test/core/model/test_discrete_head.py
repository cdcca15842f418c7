"""Bins against NumPy and against OpenVLA's arithmetic; the loss against a sum by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vla_core.model.action_head.discrete_action_head import (
    DiscreteActionHead,
    DiscreteHeadConfig,
    bin_of,
    centre_of,
    masked_cross_entropy,
)
from vla_core.model.tokens import present

floats = st.floats(-1.5, 1.5, width=32)


@given(st.lists(floats | st.sampled_from([-1.0, 1.0, 0.0]), min_size=1), st.sampled_from([2, 3, 64, 256]))
def test_bins_are_those_of_openvla(values: list[float], bins: int) -> None:
    """Token V - digitize(clip(a)); back: clip(V - token - 1, 0, bins - 2), the centre of that bin."""
    edges, vocabulary = np.linspace(-1, 1, bins), 32_000
    tokens = vocabulary - np.digitize(np.clip(values, -1, 1), edges)
    decoded = ((edges[:-1] + edges[1:]) / 2)[np.clip(vocabulary - tokens - 1, 0, bins - 2)]
    index = bin_of(torch.tensor(values), bins)
    np.testing.assert_array_equal(vocabulary - 1 - index.numpy(), tokens)
    np.testing.assert_allclose(centre_of(index, bins).numpy(), decoded, rtol=1e-6, atol=1e-12)


@given(floats, st.integers(2, 300))
def test_a_centre_is_half_a_bin_away_at_most_and_in_its_own_bin(value: float, bins: int) -> None:
    actions = torch.tensor([value])
    centre = centre_of(bin_of(actions, bins), bins)
    assert (centre - actions.clamp(-1, 1)).abs().item() <= 1 / (bins - 1) + 1e-6
    assert torch.equal(centre_of(bin_of(centre, bins), bins), centre)


def test_the_loss_is_the_mean_surprise_of_the_real_entries() -> None:
    logits, actions = torch.randn(3, 2, 2, 8), torch.rand(3, 2, 2) * 2 - 1
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    probability = logits.softmax(-1)
    surprises = [
        -probability[b, h, a, bin_of(actions[b, h, a], 8)].log()
        for b, h in mask.nonzero().tolist() for a in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(masked_cross_entropy(logits, actions, mask), torch.stack(surprises).mean())
    assert masked_cross_entropy(logits, actions, torch.zeros_like(mask)) == 0


@pytest.mark.parametrize("answer", ["likeliest", "sample"])
def test_two_ways_to_act_are_drawn_by_their_share(answer: str) -> None:
    """One action in four is 0.8, the others -0.8."""
    torch.manual_seed(0)
    head = DiscreteActionHead(
        DiscreteHeadConfig(answer=answer), horizon=1, action_dim=1, context_dim=4  # type: ignore[arg-type]
    )  # fmt: skip
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    actions = torch.where(torch.arange(32) % 4 == 0, 0.8, -0.8)[:, None, None]
    for _ in range(100):
        loss = head.loss(present(torch.ones(32, 4)), actions, torch.ones(32, 1, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chunk = head.predict(present(torch.ones(4000, 4)), torch.Generator().manual_seed(2))
    assert ((chunk.abs() - 0.8).abs() < 1 / 255).float().mean() > 0.98
    share = (chunk > 0).float().mean().item()
    assert share == (0 if answer == "likeliest" else pytest.approx(0.25, abs=0.03))
