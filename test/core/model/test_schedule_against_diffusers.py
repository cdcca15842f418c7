"""Every sampling step, against the schedulers of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from vla_core.model.action_head.schedule import NoiseSchedule, inference_timesteps

TRAIN_STEPS = 50


def theirs(cls: Any, prediction: str, inference_steps: int) -> Any:
    scheduler = cls(
        num_train_timesteps=TRAIN_STEPS,
        prediction_type=prediction,
        clip_sample=False,
        timestep_spacing="trailing",
        beta_schedule="squaredcos_cap_v2",
    )
    scheduler.set_timesteps(inference_steps)
    return scheduler


def ours_x0(schedule: NoiseSchedule, prediction: str, x: torch.Tensor, t: int, output: torch.Tensor) -> torch.Tensor:
    if prediction == "sample":
        return output
    return schedule.sample_from_epsilon(x, torch.full((len(x),), t), output)


@pytest.mark.parametrize("inference_steps", [5, 10, 50])
@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler])
def test_each_step_equals_theirs(cls: Any, prediction: str, inference_steps: int) -> None:
    scheduler = theirs(cls, prediction, inference_steps)
    schedule = NoiseSchedule("cosine", TRAIN_STEPS)
    times = inference_timesteps(TRAIN_STEPS, inference_steps)
    assert times == scheduler.timesteps.tolist()
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 4, generator=random)
    for t, previous in zip(times, [*times[1:], -1], strict=True):
        output = torch.randn(x.shape, generator=random)  # whatever a denoiser may say
        x0 = ours_x0(schedule, prediction, x, t, output)
        if cls is DDIMScheduler:
            expected = scheduler.step(output, t, x, eta=0.0).prev_sample
            ours = schedule.ddim_step(x, x0, t, previous, torch.zeros_like(x))
        else:
            expected = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(t)).prev_sample
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
            ours = schedule.ddpm_step(x, x0, t, previous, noise)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        x = expected.clamp(-3, 3)


def test_noise_is_added_as_theirs() -> None:
    scheduler = theirs(DDPMScheduler, "epsilon", 10)
    schedule = NoiseSchedule("cosine", TRAIN_STEPS)
    x0, noise = torch.randn(2, 50, 8, 4, generator=torch.Generator().manual_seed(1))
    t = torch.arange(TRAIN_STEPS)
    torch.testing.assert_close(schedule.add_noise(x0, t, noise), scheduler.add_noise(x0, noise, t))
