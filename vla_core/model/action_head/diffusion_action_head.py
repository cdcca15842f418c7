"""Chunks of actions by denoising: the head of mini-VLA, with the mathematics of DDPM and DDIM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.model.action_head.base import (
    ActionHeadBase,
    masked_mean,
    mlp,
    register_action_head,
)
from vla_core.model.action_head.schedule import (
    NoiseSchedule,
    ScheduleKind,
    inference_timesteps,
)


@dataclass(frozen=True, kw_only=True)
class DiffusionHeadConfig:
    """Sizes, schedule and sampler of :class:`DiffusionActionHead`.

    ``prediction``   what the denoiser's output is: the noise, or the clean chunk
    ``clip_sample``  bound on the estimated clean chunk while sampling, in normalized action units;
                     None does not clip
    ``sampler``      ``mini_vla_seed`` is the published mini-VLA's step, for its models only
    """

    type: Literal["diffusion"] = "diffusion"
    hidden_dim: int = 128
    layers: int = 2
    time_dim: int = 32
    train_steps: int = 50
    inference_steps: int = 10
    schedule: ScheduleKind = "cosine"
    prediction: Literal["epsilon", "sample"] = "epsilon"
    sampler: Literal["ddpm", "ddim", "mini_vla_seed"] = "ddim"
    clip_sample: float | None = 1.0

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(f"layers: expected at least 1, found {self.layers}")
        if self.time_dim < 2 or self.time_dim % 2:
            raise ConfigError(f"time_dim: expected an even number, found {self.time_dim}")
        if self.train_steps < 1:
            raise ConfigError(f"train_steps: expected at least 1, found {self.train_steps}")
        if not 1 <= self.inference_steps <= self.train_steps:
            raise ConfigError(
                f"inference_steps: expected 1 to train_steps ({self.train_steps}), found {self.inference_steps}"
            )
        if self.sampler == "mini_vla_seed" and self.inference_steps != self.train_steps:
            raise ConfigError(
                f"inference_steps: the sampler mini_vla_seed visits every step, expected "
                f"train_steps ({self.train_steps}), found {self.inference_steps}"
            )


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Return sines and cosines (B, dim) of ``t`` (B,) at frequencies from 1 to 1,000."""
    frequencies = torch.logspace(0.0, 3.0, dim // 2, device=t.device)
    angles = t[:, None] * frequencies  # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ChunkDenoiser(nn.Module):
    """An MLP over the flattened noisy chunk, the time and the context."""

    def __init__(self, *, chunk_dim: int, time_dim: int, context_dim: int, hidden_dim: int, layers: int) -> None:
        super().__init__()
        self.time_dim = time_dim
        self.net = mlp(chunk_dim + time_dim + context_dim, hidden_dim, layers, chunk_dim)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """``x_t`` (B, H, A), ``t`` (B,) int64, ``context`` (B, D) -> (B, H, A)."""
        time = time_embedding(t, self.time_dim)
        out: Tensor = self.net(torch.cat([x_t.flatten(1), time, context], dim=-1))
        return out.view_as(x_t)


@register_action_head("diffusion")
class DiffusionActionHead(ActionHeadBase):
    """Denoises a chunk of Gaussian noise into actions (Chi et al. 2023, "Diffusion Policy")."""

    def __init__(self, config: DiffusionHeadConfig, *, horizon: int, action_dim: int, context_dim: int) -> None:
        super().__init__(config, horizon=horizon, action_dim=action_dim, context_dim=context_dim)
        self.schedule = NoiseSchedule(config.schedule, config.train_steps)
        self.denoiser = ChunkDenoiser(
            chunk_dim=horizon * action_dim,
            time_dim=config.time_dim,
            context_dim=context_dim,
            hidden_dim=config.hidden_dim,
            layers=config.layers,
        )

    def loss(
        self,
        context: Tensor,
        actions: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        # The denoiser sees the whole chunk, so that padding is blanked in its input as well.
        actions = torch.where(mask[..., None], actions, 0.0)
        t = torch.randint(
            self.config.train_steps,
            (len(actions),),
            generator=generator,
            device=actions.device,
        )
        noise = _normal_like(actions, generator)
        output = self.denoiser(self.schedule.add_noise(actions, t, noise), t, context)
        target = noise if self.config.prediction == "epsilon" else actions
        return masked_mean((output - target).square(), mask)

    def predict(self, context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        times = inference_timesteps(self.config.train_steps, self.config.inference_steps)
        x = _normal_like(context.new_empty(len(context), self.horizon, self.action_dim), generator)
        for t, previous in zip(times, [*times[1:], -1], strict=True):
            x = self._step(x, self._clean_estimate(x, t, context), t, previous, generator)
        return x

    def _clean_estimate(self, x_t: Tensor, t: int, context: Tensor) -> Tensor:
        time = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        x0: Tensor = self.denoiser(x_t, time, context)
        if self.config.prediction == "epsilon":
            x0 = self.schedule.sample_from_epsilon(x_t, time, x0)
        if self.config.clip_sample is not None:
            x0 = x0.clamp(-self.config.clip_sample, self.config.clip_sample)
        return x0

    def _step(
        self,
        x_t: Tensor,
        x0: Tensor,
        t: int,
        previous: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        if self.config.sampler == "ddim":
            return self.schedule.ddim_step(x_t, x0, t, previous, torch.zeros_like(x_t))
        noise = _normal_like(x_t, generator)
        if self.config.sampler == "ddpm":
            return self.schedule.ddpm_step(x_t, x0, t, previous, noise)
        return self.schedule.mini_vla_seed_step(x0, t, noise)


def _normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
