"""Plain regression of the chunk: the head to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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
class MLPHeadConfig:
    """Sizes of :class:`MLPActionHead`."""

    type: Literal["mlp"] = "mlp"
    hidden_dim: int = 128
    layers: int = 2

    def __post_init__(self) -> None:
        at_least_one(self, "hidden_dim", "layers")


@register_action_head("mlp")
class MLPActionHead(ActionHeadBase):
    """An MLP from the mean token to the whole chunk, trained with the absolute error."""

    Config = MLPHeadConfig

    def __init__(self, config: MLPHeadConfig, *, horizon: int, action_dim: int, context_dim: int) -> None:
        super().__init__(config, horizon=horizon, action_dim=action_dim, context_dim=context_dim)
        self.net = mlp(context_dim, config.hidden_dim, config.layers, horizon * action_dim)

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
        chunk = widened(self.net(self.pooled(context)))
        return chunk.view(-1, self.horizon, self.action_dim)
