"""A normal distribution of the chunk: what reinforcement learning draws from, and an estimate of what is unknown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from vla_core.model.action_head.base import (
    ActionHeadBase,
    blanked,
    hidden_layers,
    masked_mean,
    normal_like,
    register_action_head,
    widened,
)
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.checks import at_least_one
from vla_core.model.tokens import Tokens

MIN_LOG_STD, MAX_LOG_STD = -20.0, 2.0


@dataclass(frozen=True, kw_only=True)
class GaussianHeadConfig:
    """Sizes of :class:`GaussianMLPActionHead`; ``predict`` answers the ``mean`` or draws a ``sample``."""

    type: Literal["gaussian"] = "gaussian"
    hidden_dim: int = 128
    layers: int = 2
    answer: Literal["mean", "sample"] = "mean"

    def __post_init__(self) -> None:
        at_least_one(self, "hidden_dim", "layers")


@register_action_head("gaussian")
class GaussianMLPActionHead(ActionHeadBase):
    """Mean and standard deviation of every entry of the chunk, trained with the negative log-likelihood.

    The entries are independent given the context. The logarithm of the standard deviation is clamped to [-20, 2].
    """

    Config = GaussianHeadConfig

    def __init__(self, config: GaussianHeadConfig, *, horizon: int, action_dim: int, context_dim: int) -> None:
        super().__init__(config, horizon=horizon, action_dim=action_dim, context_dim=context_dim)
        self.trunk = hidden_layers(context_dim, config.hidden_dim, config.layers)
        self.mean_head = nn.Linear(config.hidden_dim, horizon * action_dim)
        self.log_std_head = nn.Linear(config.hidden_dim, horizon * action_dim)

    def forward(self, context: Tokens) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, each (B, H, A) float32."""
        features = self.trunk(self.pooled(context))
        mean, log_std = widened(self.mean_head(features)), widened(self.log_std_head(features))
        chunk = (self.horizon, self.action_dim)
        return mean.unflatten(1, chunk), log_std.clamp(MIN_LOG_STD, MAX_LOG_STD).unflatten(1, chunk)

    def rsample(self, context: Tokens, generator: torch.Generator | None = None) -> Tensor:
        """A chunk (B, H, A) that is differentiable in mean and standard deviation (the reparameterization trick)."""
        mean, log_std = self(context)
        return mean + log_std.exp() * normal_like(mean, generator)

    def log_prob(self, context: Tokens, actions: Tensor, mask: Tensor) -> Tensor:
        """Log-density (B,) of ``actions`` (B, H, A): the sum over the steps where ``mask`` (B, H) is True."""
        return torch.where(mask[..., None], self._log_density(context, actions, mask), 0.0).sum(dim=(1, 2))

    def entropy(self, context: Tokens, mask: Tensor) -> Tensor:
        """Differential entropy (B,) in nats: the sum over the steps where ``mask`` (B, H) is True."""
        mean, log_std = self(context)
        return torch.where(mask[..., None], Normal(mean, log_std.exp()).entropy(), 0.0).sum(dim=(1, 2))

    def loss(
        self,
        context: Tokens,
        actions: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return -masked_mean(self._log_density(context, actions, mask), mask)

    def predict(
        self, context: Tokens, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        self.refuse(prefix)
        if self.config.answer == "sample":
            return self.rsample(context, generator)
        mean, _ = self(context)
        return mean

    def _log_density(self, context: Tokens, actions: Tensor, mask: Tensor) -> Tensor:
        mean, log_std = self(context)
        return Normal(mean, log_std.exp()).log_prob(blanked(actions, mask))  # (B, H, A)
