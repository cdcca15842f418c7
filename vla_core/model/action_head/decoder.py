"""A transformer over the steps of a chunk, which attend to each other and to the context.

Shapes: B batch, Q steps at hand, M steps attended to, N context tokens, D width of the context, W = heads * d width.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_core.model.attention import masked_attention
from vla_core.model.tokens import Tokens

KeysValues = tuple[Tensor, Tensor]  # each (B, heads, M or N, d)


class ContextMemory(NamedTuple):
    """What every layer attends to of the context, and ``allowed`` (B, 1, 1, N); it serves every step of a sampling."""

    layers: tuple[KeysValues, ...]
    allowed: Tensor


class Adapted(nn.Module):
    """A layer norm and the gate of what follows it.

    With a condition both come from it and the gate begins at 0, so that each block begins as the identity (Peebles
    & Xie 2023, "Scalable Diffusion Models with Transformers", adaLN-Zero); without one, or not ``gated``, it is 1.
    """

    def __init__(self, width: int, conditioned: bool, gated: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=not conditioned)
        self.modulation: nn.Linear | None = None
        if conditioned:
            self.modulation = nn.Linear(width, (3 if gated else 2) * width)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """``x`` (B, Q, W), ``condition`` (B, W) where there is one."""
        if self.modulation is None or condition is None:
            return self.norm(x), 1.0
        scale, shift, *gate = self.modulation(condition)[:, None].split(x.shape[-1], dim=-1)
        return (1 + scale) * self.norm(x) + shift, gate[0] if gate else 1.0


class DecoderBlock(nn.Module):
    """The steps attend to each other, then to the context, then each thinks alone."""

    def __init__(self, *, width: int, heads: int, conditioned: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(Adapted(width, conditioned) for _ in range(3))
        self.query_key_value, self.self_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query, self.key_value, self.cross_out = (
            nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        )  # fmt: skip
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def remember(self, context: Tensor) -> KeysValues:
        """Keys and values of ``context`` (B, N, W)."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def attend(self, x: Tensor, context: KeysValues, allowed: Tensor) -> Tensor:
        """What steps ``x`` (B, Q, W) hear of the context; 0 in rows of which no token is there."""
        heard = self.cross_out(_merge(masked_attention(self._split(self.query(x)), *context, allowed)))
        return torch.where(allowed.any(dim=-1), heard, 0.0)

    def forward(
        self, x: Tensor, context: KeysValues, allowed: Tensor, condition: Tensor | None, past: KeysValues | None,
        causal: bool,
    ) -> tuple[Tensor, KeysValues]:  # fmt: skip
        """``x`` (B, Q, W) after the block, and the keys and values of its steps with those of the ``past``."""
        normed, gate = self.norms[0](x, condition)
        query, key, value = (self._split(part) for part in self.query_key_value(normed).chunk(3, dim=-1))
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        x = x + gate * self.self_out(_merge(_among(query, key, value, causal)))
        normed, gate = self.norms[1](x, condition)
        x = x + gate * self.attend(normed, context, allowed)
        normed, gate = self.norms[2](x, condition)
        return x + gate * self.mlp(normed), (key, value)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ChunkDecoder(nn.Module):
    """A stack of :class:`DecoderBlock`: causal for writing a chunk step by step, else all steps see each other."""

    def __init__(
        self, *, width: int, layers: int, heads: int, context_dim: int, horizon: int, causal: bool, conditioned: bool
    ) -> None:
        super().__init__()
        self.causal = causal
        self.position = nn.Parameter(0.02 * torch.randn(horizon, width))
        self.context = nn.Sequential(nn.LayerNorm(context_dim), nn.Linear(context_dim, width))
        self.blocks = nn.ModuleList(
            DecoderBlock(width=width, heads=heads, conditioned=conditioned) for _ in range(layers)
        )
        self.norm = Adapted(width, conditioned, gated=False)

    def remember(self, context: Tokens) -> ContextMemory:
        """The memory of ``context`` (B, N, D); what stands at absent tokens is not in it."""
        values = torch.where(context.mask[..., None], context.values, 0.0).to(self.position.dtype)
        values = self.context(values)
        blocks = cast("list[DecoderBlock]", self.blocks)
        return ContextMemory(tuple(block.remember(values) for block in blocks), context.mask[:, None, None])

    def forward(
        self, x: Tensor, memory: ContextMemory, condition: Tensor | None = None, past: list[KeysValues] | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """``x`` (B, Q, W), the steps that follow those of the ``past``, and what is to be remembered of them all."""
        done = 0 if past is None else past[0][0].shape[2]
        x = x + self.position[done : done + x.shape[1]]
        present = []
        for i, block in enumerate(self.blocks):
            before = None if past is None else past[i]
            x, kept = block(x, memory.layers[i], memory.allowed, condition, before, self.causal)
            present.append(kept)
        normed, _ = self.norm(x, condition)
        return normed, present


def _among(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention of the last Q of M steps to all M, or where ``causal`` to those up to each."""
    if not causal or query.shape[2] == 1:
        return F.scaled_dot_product_attention(query, key, value)
    steps, done = query.shape[2], key.shape[2] - query.shape[2]
    allowed = torch.ones(steps, done + steps, dtype=torch.bool, device=query.device).tril(done)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)
