"""Vision tokens to the width of the language model, as many as they are or fewer.

Shapes: B batch, N vision tokens, Q queries or latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.sensor.base import masked_max
from vla_core.model.tokens import Tokens, present


@dataclass(frozen=True, kw_only=True)
class MLPProjectorConfig:
    """Two layers; ``hidden_dim`` null: as wide as the language model."""

    type: Literal["mlp"] = "mlp"
    hidden_dim: int | None = None


class MLPProjector(nn.Module):
    """Each token by itself: (B, N, vision_dim) -> (B, N, llm_dim)."""

    Config = MLPProjectorConfig

    def __init__(self, config: MLPProjectorConfig, *, vision_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.config, self.output_dim = config, llm_dim
        hidden_dim = config.hidden_dim or llm_dim
        self.proj = nn.Sequential(nn.Linear(vision_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, llm_dim))

    def forward(self, tokens: Tokens) -> Tokens:
        dtype = next(self.proj.parameters()).dtype
        return Tokens(self.proj(_clean(tokens, dtype)), tokens.mask)


@dataclass(frozen=True, kw_only=True)
class AttentionPoolingConfig:
    """``num_queries`` learned questions to the image."""

    type: Literal["attention_pooling"] = "attention_pooling"
    num_queries: int = 64
    num_heads: int = 8

    def __post_init__(self) -> None:
        _at_least_one(self, "num_queries", "num_heads")


class AttentionPoolingProjector(nn.Module):
    """Learned queries attend to the tokens once: (B, N, vision_dim) -> (B, num_queries, llm_dim)."""

    Config = AttentionPoolingConfig

    def __init__(self, config: AttentionPoolingConfig, *, vision_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.config, self.output_dim = config, llm_dim
        self.queries = nn.Parameter(0.02 * torch.randn(1, config.num_queries, llm_dim))
        self.proj = nn.Linear(vision_dim, llm_dim)
        self.norm = nn.LayerNorm(llm_dim)
        self.cross_attn = Attention(llm_dim, config.num_heads)

    def forward(self, tokens: Tokens) -> Tokens:
        keys = self.norm(self.proj(_clean(tokens, self.proj.weight.dtype)))
        queries = self.queries.expand(keys.shape[0], -1, -1)
        return _kept(self.cross_attn(queries, keys, tokens.mask), tokens)


@dataclass(frozen=True, kw_only=True)
class PerceiverConfig:
    """``num_latents`` tokens, refined by ``num_layers`` rounds of looking, exchanging and thinking."""

    type: Literal["perceiver"] = "perceiver"
    num_latents: int = 64
    num_layers: int = 2
    num_heads: int = 8
    expansion: int = 4

    def __post_init__(self) -> None:
        _at_least_one(self, "num_latents", "num_layers", "num_heads", "expansion")


class PerceiverProjector(nn.Module):
    """Latents that attend to any number of tokens again and again: (B, N, vision_dim) -> (B, num_latents, llm_dim).

    Jaegle et al. 2021, "Perceiver: General Perception with Iterative Attention".
    """

    Config = PerceiverConfig

    def __init__(self, config: PerceiverConfig, *, vision_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.config, self.output_dim = config, llm_dim
        self.latents = nn.Parameter(0.02 * torch.randn(1, config.num_latents, llm_dim))
        self.proj = nn.Linear(vision_dim, llm_dim)
        self.norm_in = nn.LayerNorm(llm_dim)
        self.layers = nn.ModuleList(
            PerceiverLayer(llm_dim, config.num_heads, config.expansion) for _ in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(llm_dim)

    def forward(self, tokens: Tokens) -> Tokens:
        keys = self.norm_in(self.proj(_clean(tokens, self.proj.weight.dtype)))
        latents = self.latents.expand(keys.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, keys, tokens.mask)
        return _kept(self.norm_out(latents), tokens)


@dataclass(frozen=True, kw_only=True)
class MaxPoolingConfig:
    """``num_tokens`` made of the strongest answers to ``channels`` questions."""

    type: Literal["max_pooling"] = "max_pooling"
    num_tokens: int = 1
    channels: int = 128

    def __post_init__(self) -> None:
        _at_least_one(self, "num_tokens", "channels")


class MaxPoolingProjector(nn.Module):
    """How strongly each channel speaks where it speaks most: (B, N, vision_dim) -> (B, num_tokens, llm_dim).

    What is small in the picture, a traffic light, is as loud as what is large, from the first step of training on; an
    attention that does not yet know where to look averages it away. Tokens that carry their place tell that, too.
    """

    Config = MaxPoolingConfig

    def __init__(self, config: MaxPoolingConfig, *, vision_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.config, self.output_dim = config, llm_dim
        self.ask = nn.Linear(vision_dim, config.channels)
        self.out = nn.Linear(config.channels, config.num_tokens * llm_dim)

    def forward(self, tokens: Tokens) -> Tokens:
        answers = self.ask(_clean(tokens, self.ask.weight.dtype))
        loudest = masked_max(answers, tokens.mask)  # (B, channels)
        return _kept(self.out(loudest).unflatten(1, (self.config.num_tokens, -1)), tokens)


class PerceiverLayer(nn.Module):
    """One round: look at the tokens, exchange between latents, think alone; each added to what was there."""

    def __init__(self, dim: int, num_heads: int, expansion: int) -> None:
        super().__init__()
        self.norm_look, self.look = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.norm_exchange, self.exchange = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.think = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, expansion * dim), nn.GELU(), nn.Linear(expansion * dim, dim)
        )

    def forward(self, latents: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        latents = latents + self.look(self.norm_look(latents), keys, mask)
        among = self.norm_exchange(latents)
        latents = latents + self.exchange(among, among)
        return latents + self.think(latents)


class Attention(nn.Module):
    """Multi-head attention, batch first: queries (B, Q, D), keys (B, N, D), ``mask`` (B, N) True where a key is there.

    A row without any key gets zeros, and the output layer's bias.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise VlaError(f"num_heads: expected a divisor of the width {dim}, found {num_heads}")
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self._heads(self.to_q(queries))  # (B, heads, Q, d)
        k, v = (self._heads(x) for x in self.to_kv(keys).chunk(2, dim=-1))  # (B, heads, N, d)
        if mask is None:
            seen = F.scaled_dot_product_attention(q, k, v)
        else:
            some = mask.any(dim=1)[:, None, None, None]  # a softmax over nothing is NaN
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :] | ~some)
            seen = torch.where(some, seen, 0.0)
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


PROJECTOR_REGISTRY: dict[str, Any] = {
    "mlp": MLPProjector,
    "attention_pooling": AttentionPoolingProjector,
    "perceiver": PerceiverProjector,
    "max_pooling": MaxPoolingProjector,
}


def build_projector(config: Any, *, vision_dim: int, llm_dim: int) -> Any:
    """Build the projector that is registered under ``config.type``."""
    if config.type not in PROJECTOR_REGISTRY:
        raise VlaError(f"no projector {config.type!r} registered; choices: {choices(PROJECTOR_REGISTRY)}")
    return PROJECTOR_REGISTRY[config.type](config, vision_dim=vision_dim, llm_dim=llm_dim)


def _clean(tokens: Tokens, dtype: torch.dtype) -> Tensor:
    """The values with zeros where no token is: attention weights of 0 do not stop NaN."""
    return torch.where(tokens.mask[..., None], tokens.values, 0.0).to(dtype)


def _kept(values: Tensor, source: Tokens) -> Tokens:
    """``values`` (B, Q, D), present in the rows where ``source`` has a token."""
    return Tokens(values, present(values).mask & source.mask.any(dim=1, keepdim=True))


def _at_least_one(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}: expected at least 1, found {getattr(config, name)}")
