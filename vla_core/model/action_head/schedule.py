"""The noise of a diffusion: its schedule, the forward process and the steps back.

Legend: t counts from 0 (least noise) to T - 1 (most); abar_t is the product of alpha_0 … alpha_t,
the share of the signal's variance that is left; abar at t = -1 is 1, the clean sample.
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

ScheduleKind = Literal["cosine", "linear", "mini_vla_seed"]

MAX_BETA = 0.999


def make_betas(kind: ScheduleKind, steps: int) -> Tensor:
    """Return the variances (T,) float64 that each step adds.

    ``cosine``         Nichol & Dhariwal 2021, eq. 17 (diffusers' squaredcos_cap_v2)
    ``linear``         Ho et al. 2020, 1e-4 … 0.02 at 1,000 steps, scaled to ``steps``
    ``mini_vla_seed``  1e-4 … 1e-2 whatever the number of steps. At 16 steps abar ends at 0.92, so
                       that sampling starts from noise that training never saw: only for models
                       that were published with it.
    """
    if kind == "cosine":

        def abar(time: float) -> float:
            return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [1.0 - abar((t + 1) / steps) / abar(t / steps) for t in range(steps)]
        return torch.tensor(betas, dtype=torch.float64).clamp(max=MAX_BETA)
    if kind == "linear":
        scale = 1000 / steps
        betas_ = torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)
        return betas_.clamp(max=MAX_BETA)
    return torch.linspace(1e-4, 1e-2, steps, dtype=torch.float64)


def inference_timesteps(train_steps: int, inference_steps: int) -> list[int]:
    """Return the times that sampling visits, from T - 1 down, evenly spaced.

    The first is always T - 1, the only time at which a sample is pure noise (Lin et al. 2023,
    "Common Diffusion Noise Schedules and Sample Steps are Flawed", trailing spacing).
    """
    stride = train_steps / inference_steps
    return [round(train_steps - i * stride) - 1 for i in range(inference_steps)]


class NoiseSchedule(nn.Module):
    """A schedule's constants, and the arithmetic on them.

    Samples are (B, …) float; ``t`` is (B,) int64. The buffers follow from the config and are thus
    not stored with the weights; they stay float32 when those become bfloat16, which has two digits.
    """

    betas: Tensor
    alpha_bar: Tensor

    def __init__(self, kind: ScheduleKind, steps: int) -> None:
        super().__init__()
        betas = make_betas(kind, steps)
        self.register_buffer("betas", betas.float(), persistent=False)
        self.register_buffer("alpha_bar", torch.cumprod(1.0 - betas, dim=0).float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseSchedule:
        """What ``to`` and ``cuda`` do to buffers: they move, and keep their type."""
        return super()._apply(lambda buffer: buffer.to(fn(buffer).device), recurse)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t."""
        abar = _like(self.alpha_bar[t], x0)
        return abar.sqrt() * x0 + (1.0 - abar).sqrt() * noise

    def sample_from_epsilon(self, x_t: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """Return x_0, solved from x_t and the noise in it."""
        abar = _like(self.alpha_bar[t], x_t)
        return (x_t - (1.0 - abar).sqrt() * epsilon) / abar.sqrt()

    def velocity(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return v = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x_0, of Salimans & Ho 2022, appendix D."""
        abar = _like(self.alpha_bar[t], x0)
        return abar.sqrt() * noise - (1.0 - abar).sqrt() * x0

    def sample_from_velocity(self, x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """Return x_0, solved from x_t and its v."""
        abar = _like(self.alpha_bar[t], x_t)
        return abar.sqrt() * x_t - (1.0 - abar).sqrt() * velocity

    def epsilon_from_sample(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """Return the noise, solved from x_t and the clean sample in it."""
        abar = _like(self.alpha_bar[t], x_t)
        return (x_t - abar.sqrt() * x0) / (1.0 - abar).sqrt()

    def ddpm_step(self, x_t: Tensor, x0: Tensor, t: int, previous: int, noise: Tensor) -> Tensor:
        """Draw x at ``previous`` < ``t`` from the posterior q(x_previous | x_t, x_0).

        Ho et al. 2020, eq. 6 and 7, with alpha_t = abar_t / abar_previous, which makes it exact
        also when times are skipped. At ``previous`` = -1 the answer is ``x0``.
        """
        abar, abar_previous = self._alpha_bar(t), self._alpha_bar(previous)
        alpha = abar / abar_previous
        weight_x0 = abar_previous.sqrt() * (1.0 - alpha) / (1.0 - abar)
        weight_xt = alpha.sqrt() * (1.0 - abar_previous) / (1.0 - abar)
        variance = (1.0 - alpha) * (1.0 - abar_previous) / (1.0 - abar)
        return weight_x0 * x0 + weight_xt * x_t + variance.sqrt() * noise

    def ddim_step(self, x_t: Tensor, x0: Tensor, t: int, previous: int, noise: Tensor, eta: float = 0.0) -> Tensor:
        """Return x at ``previous`` < ``t`` (Song et al. 2021, eq. 12).

        ``eta`` = 0 is deterministic and ignores ``noise``; ``eta`` = 1 is the posterior above.
        """
        abar, abar_previous = self._alpha_bar(t), self._alpha_bar(previous)
        epsilon = (x_t - abar.sqrt() * x0) / (1.0 - abar).sqrt()
        variance = (1.0 - abar_previous) / (1.0 - abar) * (1.0 - abar / abar_previous)
        sigma = eta * variance.sqrt()
        towards_xt = (1.0 - abar_previous - sigma**2).clamp(min=0.0).sqrt()
        return abar_previous.sqrt() * x0 + towards_xt * epsilon + sigma * noise

    def mini_vla_seed_step(self, x0: Tensor, t: int, noise: Tensor) -> Tensor:
        """Return sqrt(alpha_t) x_0 + sqrt(beta_t) noise, and x_0 itself at t = 0.

        What the published mini-VLA does instead of the posterior; it is not one.
        """
        if t == 0:
            return x0
        return (1.0 - self.betas[t]).sqrt() * x0 + self.betas[t].sqrt() * noise

    def signal_and_noise(self, t: int) -> tuple[float, float]:
        """Return the factors of x_0 and of the noise in x_t."""
        abar = float(self.alpha_bar[t])
        return math.sqrt(abar), math.sqrt(1.0 - abar)

    def _alpha_bar(self, t: int) -> Tensor:
        return self.alpha_bar[t] if t >= 0 else torch.ones_like(self.alpha_bar[0])


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *([1] * (x.dim() - 1)))
