"""Chunks of actions by flow matching (Lipman et al. 2023, "Flow Matching for Generative Modeling").

Conventions of pi0 and SmolVLA: x_t = t epsilon + (1 - t) a, so that t = 1 is noise and t = 0 the chunk; the network
gives the velocity dx/dt = epsilon - a.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vla_core.config import ConfigError
from vla_core.model.action_head.base import (
    ActionHeadBase,
    ChunkDenoiser,
    masked_mean,
    normal_like,
    register_action_head,
)
from vla_core.model.action_head.guidance import ChunkPrefix, guide

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0  # of the time embedding
BETA_SHAPE, TIME_SCALE, MIN_TIME = 1.5, 0.999, 0.001  # t = 0.999 Beta(1.5, 1) + 0.001: more of the noisy times


@dataclass(frozen=True, kw_only=True)
class FlowHeadConfig:
    """Sizes of :class:`FlowActionHead` and its number of Euler steps."""

    type: Literal["flow"] = "flow"
    hidden_dim: int = 128
    layers: int = 2
    time_dim: int = 32
    inference_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "layers", "inference_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.time_dim < 2 or self.time_dim % 2:
            raise ConfigError(f"time_dim: expected an even number, found {self.time_dim}")

    @property
    def guidable(self) -> bool:
        """Whether a chunk can be sampled so that it continues another one."""
        return True


def flow_time_embedding(t: Tensor, dim: int) -> Tensor:
    """Return sines and cosines (B, dim) of ``t`` (B,) in [0, 1] with periods from 0.004 to 4."""
    periods = torch.logspace(math.log10(MIN_PERIOD), math.log10(MAX_PERIOD), dim // 2, device=t.device)
    angles = 2 * math.pi * t[:, None] / periods  # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@register_action_head("flow")
class FlowActionHead(ActionHeadBase):
    """Carries Gaussian noise along a learned velocity field to a chunk."""

    def __init__(self, config: FlowHeadConfig, *, horizon: int, action_dim: int, context_dim: int) -> None:
        super().__init__(config, horizon=horizon, action_dim=action_dim, context_dim=context_dim)
        self.denoiser = ChunkDenoiser(
            chunk_dim=horizon * action_dim, context_dim=context_dim, time_dim=config.time_dim,
            hidden_dim=config.hidden_dim, layers=config.layers, embed=flow_time_embedding,
        )  # fmt: skip

    def loss(
        self,
        context: Tensor,
        actions: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        # The network sees the whole chunk, so that padding is blanked in its input as well.
        actions = torch.where(mask[..., None], actions, 0.0)
        uniform = torch.rand(len(actions), generator=generator, device=actions.device)
        t = TIME_SCALE * uniform ** (1 / BETA_SHAPE) + MIN_TIME  # Beta(a, 1) has the distribution function u^a
        noise = normal_like(actions, generator)
        share = t[:, None, None]
        velocity = self.denoiser(share * noise + (1 - share) * actions, t, context)
        return masked_mean((velocity - (noise - actions)).square(), mask)

    def predict(
        self, context: Tensor, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        steps = self.config.inference_steps
        x = normal_like(context.new_empty(len(context), self.horizon, self.action_dim), generator)
        for k in range(steps, 0, -1):
            t, after = k / steps, (k - 1) / steps
            clean = guide(partial(self._clean_estimate, t=t, context=context), x, 1 - t, t, prefix)
            # Euler: x + (after - t) v with v = (x - clean) / t, written so that the last step ends at `clean` itself.
            x = clean + after / t * (x - clean)
        return x

    def _clean_estimate(self, x_t: Tensor, t: float, context: Tensor) -> Tensor:
        velocity: Tensor = self.denoiser(x_t, x_t.new_full((len(x_t),), t), context)
        return x_t - t * velocity
