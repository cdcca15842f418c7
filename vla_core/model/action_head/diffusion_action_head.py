"""Chunks of actions by denoising: the head of mini-VLA, with the mathematics of DDPM and DDIM."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vla_core.config import ConfigError
from vla_core.errors import VlaError
from vla_core.model.action_head.base import (
    ActionHeadBase,
    ChunkDenoiser,
    masked_mean,
    normal_like,
    register_action_head,
)
from vla_core.model.action_head.guidance import ChunkPrefix, guide
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

    @property
    def guidable(self) -> bool:
        """Whether a chunk can be sampled so that it continues another one; the published sampler is not a sampler."""
        return self.sampler != "mini_vla_seed"


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Return sines and cosines (B, dim) of ``t`` (B,) at frequencies from 1 to 1,000."""
    frequencies = torch.logspace(0.0, 3.0, dim // 2, device=t.device)
    angles = t[:, None] * frequencies  # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


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
            embed=time_embedding,
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
        noise = normal_like(actions, generator)
        output = self.denoiser(self.schedule.add_noise(actions, t, noise), t, context)
        target = noise if self.config.prediction == "epsilon" else actions
        return masked_mean((output - target).square(), mask)

    def predict(
        self, context: Tensor, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        if prefix is not None and not self.config.guidable:
            raise VlaError(f"the sampler {self.config.sampler!r} cannot be guided; choices: ddim, ddpm")
        times = inference_timesteps(self.config.train_steps, self.config.inference_steps)
        x = normal_like(context.new_empty(len(context), self.horizon, self.action_dim), generator)
        for t, previous in zip(times, [*times[1:], -1], strict=True):
            signal, noise = self.schedule.signal_and_noise(t)
            x0 = guide(partial(self._clean_estimate, t=t, context=context), x, signal, noise, prefix)
            if self.config.clip_sample is not None:  # after the guidance, which a clipped entry would not feel
                x0 = x0.clamp(-self.config.clip_sample, self.config.clip_sample)
            x = self._step(x, x0, t, previous, generator)
        return x

    def _clean_estimate(self, x_t: Tensor, t: int, context: Tensor) -> Tensor:
        time = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        output: Tensor = self.denoiser(x_t, time, context)
        if self.config.prediction == "epsilon":
            return self.schedule.sample_from_epsilon(x_t, time, output)
        return output

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
        noise = normal_like(x_t, generator)
        if self.config.sampler == "ddpm":
            return self.schedule.ddpm_step(x_t, x0, t, previous, noise)
        return self.schedule.mini_vla_seed_step(x0, t, noise)
