"""Plain regression of the chunk: the head to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vla_core.config import ConfigError
from vla_core.errors import VlaError
from vla_core.model.action_head.base import (
    ActionHeadBase,
    masked_mean,
    mlp,
    register_action_head,
)
from vla_core.model.action_head.guidance import ChunkPrefix


@dataclass(frozen=True, kw_only=True)
class MLPHeadConfig:
    """Sizes of :class:`MLPActionHead`."""

    type: Literal["mlp"] = "mlp"
    hidden_dim: int = 128
    layers: int = 2

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(f"layers: expected at least 1, found {self.layers}")


@register_action_head("mlp")
class MLPActionHead(ActionHeadBase):
    """An MLP from the context to the whole chunk, trained with the absolute error."""

    def __init__(self, config: MLPHeadConfig, *, horizon: int, action_dim: int, context_dim: int) -> None:
        super().__init__(config, horizon=horizon, action_dim=action_dim, context_dim=context_dim)
        self.net = mlp(context_dim, config.hidden_dim, config.layers, horizon * action_dim)

    def loss(
        self,
        context: Tensor,
        actions: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return masked_mean((self.predict(context) - actions).abs(), mask)

    def predict(
        self, context: Tensor, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        if prefix is not None:
            raise VlaError("the head 'mlp' samples nothing that could be guided; choices: diffusion, flow")
        chunk: Tensor = self.net(context)
        return chunk.view(-1, self.horizon, self.action_dim)
