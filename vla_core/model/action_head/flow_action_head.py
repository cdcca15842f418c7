"""Chunks of actions by flow matching (Lipman et al. 2023, "Flow Matching for Generative Modeling").

Conventions of pi0 and SmolVLA: x_t = t epsilon + (1 - t) a, so that t = 1 is noise and t = 0 the chunk; the network
gives the velocity dx/dt = epsilon - a.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vla_core.model.action_head.base import (
    blanked,
    masked_mean,
    normal_like,
    register_action_head,
    uniform,
    widened,
)
from vla_core.model.action_head.denoiser import DenoisingActionHead, DenoisingHeadConfig
from vla_core.model.action_head.guidance import ChunkPrefix, guide
from vla_core.model.checks import at_least_one
from vla_core.model.tokens import Tokens

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0  # of the time embedding
BETA_SHAPE, TIME_SCALE, MIN_TIME = 1.5, 0.999, 0.001  # t = 0.999 Beta(1.5, 1) + 0.001: more of the noisy times


@dataclass(frozen=True, kw_only=True)
class FlowHeadConfig(DenoisingHeadConfig):
    """Number of Euler steps of :class:`FlowActionHead`; the denoiser's sizes are the base's."""

    type: Literal["flow"] = "flow"
    inference_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "inference_steps")

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
class FlowActionHead(DenoisingActionHead):
    """Carries Gaussian noise along a learned velocity field to a chunk."""

    Config = FlowHeadConfig

    def __init__(self, config: FlowHeadConfig, *, horizon: int, action_dim: int, context_dim: int) -> None:
        super().__init__(
            config, horizon=horizon, action_dim=action_dim, context_dim=context_dim, embed=flow_time_embedding
        )  # fmt: skip

    def loss(
        self,
        context: Tokens,
        actions: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        # The network sees the whole chunk, so that padding is blanked in its input as well.
        actions = widened(blanked(actions, mask))
        even = uniform(len(actions), generator, actions.device)
        t = TIME_SCALE * even ** (1 / BETA_SHAPE) + MIN_TIME  # Beta(a, 1) has the distribution function u^a
        noise = normal_like(actions, generator)
        share = t[:, None, None]
        velocity = self.denoise(share * noise + (1 - share) * actions, t, context, generator)
        return masked_mean((velocity - (noise - actions)).square(), mask)

    def predict(
        self, context: Tokens, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        steps = self.config.inference_steps
        velocity = self.sampler(context)
        x = self.noise(context, generator)
        for k in range(steps, 0, -1):
            t, after = k / steps, (k - 1) / steps
            clean = guide(partial(_clean_estimate, t=t, velocity=velocity), x, 1 - t, t, prefix)
            # Euler: x + (after - t) v with v = (x - clean) / t, written so that the last step ends at `clean` itself.
            x = clean + after / t * (x - clean)
        return x


def _clean_estimate(x_t: Tensor, t: float, velocity: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return x_t - t * velocity(x_t, x_t.new_full((len(x_t),), t))
