"""One head for every step of a chunk, told apart by what is learned for the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vla_core.model.action_head.base import (
    ActionHeadBase,
    blanked,
    masked_mean,
    mlp,
    register_action_head,
    widened,
)
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.checks import at_least_one
from vla_core.model.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class ActionChunkerConfig:
    """Sizes of the head inside of :class:`ActionChunker`."""

    type: Literal["chunker"] = "chunker"
    hidden_dim: int = 128
    layers: int = 2

    def __post_init__(self) -> None:
        at_least_one(self, "hidden_dim", "layers")


@register_action_head("chunker")
class ActionChunker(ActionHeadBase):
    """Features (B, D) to a chunk (B, H, A): the same head at each step, on the features plus the step's embedding.

    Its weights hardly grow with the horizon. Trained with the absolute error.
    """

    Config = ActionChunkerConfig

    def __init__(
        self,
        config: ActionChunkerConfig,
        *,
        horizon: int,
        action_dim: int,
        context_dim: int,
        action_head: nn.Module | None = None,
    ) -> None:
        """``action_head`` maps (..., D) to (..., A), None: an MLP of the config's sizes."""
        super().__init__(config, horizon=horizon, action_dim=action_dim, context_dim=context_dim)
        self.steps = nn.Parameter(torch.randn(horizon, context_dim))  # as large as features of unit variance
        self.action_head = action_head or mlp(context_dim, config.hidden_dim, config.layers, action_dim)

    def forward(self, features: Tensor) -> Tensor:
        """``features`` (B, D) -> (B, H, A)."""
        return widened(self.action_head(features[:, None] + self.steps))

    def loss(
        self,
        context: Tokens,
        actions: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return masked_mean((self.predict(context) - blanked(actions, mask)).abs(), mask)

    def predict(
        self, context: Tokens, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        self.refuse(prefix)
        chunk: Tensor = self(self.pooled(context))
        return chunk
