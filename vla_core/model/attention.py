"""Attention in which what is absent has no part, and the block of a transformer around it.

Shapes: B batch, H heads, Q queries, M memories (what is attended to), D = H d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Scaled dot-product attention; a query that may attend to nothing gets 0.

    ``query`` (B, H, Q, d), ``key`` and ``value`` (B, H, M, d), all finite; ``allowed`` bool, and ``bias``, which is
    added to the logits, broadcast to (B, H, Q, M). Returns (B, H, Q, d).
    """
    some = allowed.any(dim=-1, keepdim=True)
    mask = allowed | ~some  # the softmax of an exported model gives NaN over nothing
    if bias is not None:
        mask = torch.where(mask, bias.to(query.dtype), float("-inf"))
    return torch.where(some, F.scaled_dot_product_attention(query, key, value, attn_mask=mask), 0.0)


class AttentionBlock(nn.Module):
    """x + attention(x, memory), then x + mlp(x), each on normalized inputs (Xiong et al. 2020).

    The memory's keys and values come apart from :meth:`remember`, so that a caller may keep them.
    """

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm = nn.LayerNorm(width)
        self.memory_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, H, M, d), of ``memory`` (B, M, D)."""
        key, value = self.key_value(self.memory_norm(memory)).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, allowed: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x`` (B, Q, D) after it attended to what :meth:`remember` returned; the rest as :func:`masked_attention`.

        A query that may attend to nothing passes the attention unchanged.
        """
        query = self._split(self.query(self.query_norm(x)))
        heard = masked_attention(query, key, value, allowed, bias).transpose(1, 2).flatten(2)  # (B, Q, D)
        alone = ~allowed.any(dim=-1).any(dim=1)[..., None]  # (B, Q, 1)
        x = x + torch.where(alone, 0.0, self.out(heard))  # without its bias, too
        return x + self.mlp(x)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
