"""Attention of time steps to a sliding memory, whose streaming is the whole window's result at any length.

Shapes: B batch, Q queries, M memories, L layers, H heads, D = H d width.

In a stack of causal self-attention the cached keys of the second layer know of steps that have left the window, so
that a stream and a window of the same length disagree as soon as the window slides. Here the queries alone go through
the layers; the keys and values of every layer come from one step's embedding and nothing else. What a stream keeps
of a step is then what the window computes of it.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from vla_core.model.attention import AttentionBlock


class Memory(NamedTuple):
    """``keys`` and ``values`` (B, L, H, M, d) of what is remembered, oldest first, and ``mask`` (B, M) bool."""

    keys: Tensor
    values: Tensor
    mask: Tensor

    def push(self, newest: Memory) -> Memory:
        """The memory after ``newest`` came in and as much of the oldest went; this one stays as it is."""
        size = self.mask.shape[1]
        joined = _join(self, newest)
        start = joined.mask.shape[1] - size
        return Memory(
            joined.keys.narrow(3, start, size), joined.values.narrow(3, start, size), joined.mask.narrow(1, start, size)
        )


class TemporalEncoder(nn.Module):
    """Queries at time steps attend to memories of several kinds by content and by age.

    The age, in steps, enters as a learned bias per layer, kind and head (Raffel et al. 2020), which begins as a
    preference for what is new (Press et al. 2022, "ALiBi"). Only differences of time count, so that a stream may go
    on for ever.
    """

    def __init__(self, *, width: int, layers: int, heads: int, max_len: int, kinds: int = 1) -> None:
        super().__init__()
        self.max_len = max_len
        self.blocks = nn.ModuleList(AttentionBlock(width=width, heads=heads) for _ in range(layers))
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
        recency = -slopes[:, None] * torch.arange(max_len)  # (H, max_len)
        self.age_bias = nn.Parameter(recency.expand(layers, kinds, -1, -1).clone())
        self.norm = nn.LayerNorm(width)

    def remember(self, embeddings: Tensor, mask: Tensor) -> Memory:
        """The memory of ``embeddings`` (B, M, D), of which those of ``mask`` (B, M) are there."""
        pairs = [block.remember(embeddings) for block in cast("list[AttentionBlock]", self.blocks)]
        return Memory(torch.stack([k for k, _ in pairs], dim=1), torch.stack([v for _, v in pairs], dim=1), mask)

    def nothing(self, batch: int, size: int) -> Memory:
        """A memory of ``size`` that holds nothing yet."""
        weight = self.age_bias
        heads = weight.shape[2]
        width = self.norm.normalized_shape[0]
        empty = weight.new_zeros(batch, len(self.blocks), heads, size, width // heads)
        return Memory(empty, empty, torch.zeros(batch, size, dtype=torch.bool, device=weight.device))

    def forward(self, queries: Tensor, memories: list[tuple[Memory, Tensor]]) -> tuple[Tensor, Tensor]:
        """What the queries (B, Q, D) are after they attended to ``memories``, and which of them heard anything.

        Each memory, one a kind, comes with the ages (Q, M) of its entries: how many steps they are older than the
        query. Ages below 0 are the future and those from ``max_len`` on are forgotten.
        """
        memory, ages, kinds = self._together(memories)
        in_reach = (ages >= 0) & (ages < self.max_len)
        allowed = (in_reach & memory.mask[:, None])[:, None]  # (B, 1, Q, M)
        clamped = ages.clamp(0, self.max_len - 1)
        for i, block in enumerate(self.blocks):
            bias = self.age_bias[i].transpose(0, 1)[:, kinds, clamped]  # (H, Q, M)
            queries = block(queries, memory.keys[:, i], memory.values[:, i], allowed, bias)
        return self.norm(queries), allowed[:, 0].any(dim=-1)

    def _together(self, memories: list[tuple[Memory, Tensor]]) -> tuple[Memory, Tensor, Tensor]:
        memory = memories[0][0]
        for other, _ in memories[1:]:
            memory = _join(memory, other)
        ages = torch.cat([ages for _, ages in memories], dim=1)
        kinds = [torch.full((ages.shape[1],), kind, device=ages.device) for kind, (_, ages) in enumerate(memories)]
        return memory, ages, torch.cat(kinds)


def _join(a: Memory, b: Memory) -> Memory:
    return Memory(
        torch.cat([a.keys, b.keys], dim=3), torch.cat([a.values, b.values], dim=3), torch.cat([a.mask, b.mask], dim=1)
    )
