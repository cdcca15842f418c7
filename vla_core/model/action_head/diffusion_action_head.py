"""Chunks of actions by denoising: the head of mini-VLA, with the mathematics of DDPM and DDIM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vla_core.config import ConfigError
from vla_core.errors import VlaError
from vla_core.model.action_head.base import (
    blanked,
    integers,
    masked_mean,
    normal_like,
    register_action_head,
    widened,
)
from vla_core.model.action_head.denoiser import DenoisingActionHead, DenoisingHeadConfig
from vla_core.model.action_head.guidance import ChunkPrefix, guide
from vla_core.model.action_head.schedule import (
    NoiseSchedule,
    ScheduleKind,
    inference_timesteps,
)
from vla_core.model.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class DiffusionHeadConfig(DenoisingHeadConfig):
    """Sizes, schedule and sampler of :class:`DiffusionActionHead`; the denoiser's are the base's.

    ``prediction``   what the denoiser's output is: the noise, the clean chunk, or ``v``, which is between them:
                     sqrt(abar) epsilon - sqrt(1 - abar) x_0 (Salimans & Ho 2022, "Progressive Distillation for Fast
                     Sampling of Diffusion Models")
    ``clip_sample``  bound on the estimated clean chunk while sampling, in normalized action units;
                     None does not clip
    ``sampler``      ``mini_vla_seed`` is the published mini-VLA's step, for its models only
    """

    type: Literal["diffusion"] = "diffusion"
    train_steps: int = 50
    inference_steps: int = 10
    schedule: ScheduleKind = "cosine"
    prediction: Literal["epsilon", "sample", "v"] = "epsilon"
    sampler: Literal["ddpm", "ddim", "mini_vla_seed"] = "ddim"
    clip_sample: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
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
class DiffusionActionHead(DenoisingActionHead):
    """Denoises a chunk of Gaussian noise into actions (Chi et al. 2023, "Diffusion Policy")."""

    Config = DiffusionHeadConfig

    def __init__(self, config: DiffusionHeadConfig, *, horizon: int, action_dim: int, context_dim: int) -> None:
        super().__init__(
            config, horizon=horizon, action_dim=action_dim, context_dim=context_dim, embed=time_embedding
        )  # fmt: skip
        self.schedule = NoiseSchedule(config.schedule, config.train_steps)

    def loss(
        self,
        context: Tokens,
        actions: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        # The denoiser sees the whole chunk, so that padding is blanked in its input as well.
        actions = widened(blanked(actions, mask))
        t = integers(self.config.train_steps, len(actions), generator, actions.device)
        noise = normal_like(actions, generator)
        output = self.denoise(self.schedule.add_noise(actions, t, noise), t, context, generator)
        return masked_mean((output - self._target(actions, t, noise)).square(), mask)

    def predict(
        self, context: Tokens, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        if prefix is not None and not self.config.guidable:
            raise VlaError(f"the sampler {self.config.sampler!r} cannot be guided; choices: ddim, ddpm")
        times = inference_timesteps(self.config.train_steps, self.config.inference_steps)
        output = self.sampler(context)
        x = self.noise(context, generator)
        for t, previous in zip(times, [*times[1:], -1], strict=True):
            signal, noise = (1.0, 0.0) if prefix is None else self.schedule.signal_and_noise(t)
            x0 = guide(partial(self._clean_estimate, t=t, output=output), x, signal, noise, prefix)
            if self.config.clip_sample is not None:  # after the guidance, which a clipped entry would not feel
                x0 = x0.clamp(-self.config.clip_sample, self.config.clip_sample)
            x = self._step(x, x0, t, previous, generator)
        return x

    def _target(self, actions: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        if self.config.prediction == "epsilon":
            return noise
        return actions if self.config.prediction == "sample" else self.schedule.velocity(actions, t, noise)

    def _clean_estimate(self, x_t: Tensor, t: int, output: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        time = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        found = output(x_t, time)
        if self.config.prediction == "epsilon":
            return self.schedule.sample_from_epsilon(x_t, time, found)
        return found if self.config.prediction == "sample" else self.schedule.sample_from_velocity(x_t, time, found)

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
