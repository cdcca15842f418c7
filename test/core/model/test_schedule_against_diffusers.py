"""Every sampling step, and whole samplings, against the schedulers of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from vla_core.model.action_head.diffusion_action_head import DiffusionActionHead, DiffusionHeadConfig
from vla_core.model.action_head.schedule import NoiseSchedule, inference_timesteps
from vla_core.model.tokens import Tokens

TRAIN_STEPS = 50


def theirs(cls: Any, prediction: str, inference_steps: int, clip: float | None = None) -> Any:
    scheduler = cls(
        num_train_timesteps=TRAIN_STEPS,
        prediction_type={"v": "v_prediction"}.get(prediction, prediction),
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        timestep_spacing="trailing",
        beta_schedule="squaredcos_cap_v2",
    )
    scheduler.set_timesteps(inference_steps)
    return scheduler


def ours_x0(schedule: NoiseSchedule, prediction: str, x: torch.Tensor, t: int, output: torch.Tensor) -> torch.Tensor:
    if prediction == "sample":
        return output
    if prediction == "v":
        return schedule.sample_from_velocity(x, torch.full((len(x),), t), output)
    return schedule.sample_from_epsilon(x, torch.full((len(x),), t), output)


@pytest.mark.parametrize("inference_steps", [5, 10, 50])
@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v"])
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


def test_the_velocity_is_theirs() -> None:
    scheduler = theirs(DDPMScheduler, "v", 10)
    schedule = NoiseSchedule("cosine", TRAIN_STEPS)
    x0, noise = torch.randn(2, 50, 8, 4, generator=torch.Generator().manual_seed(1))
    t = torch.arange(TRAIN_STEPS)
    velocity = schedule.velocity(x0, t, noise)
    torch.testing.assert_close(velocity, scheduler.get_velocity(x0, noise, t))
    torch.testing.assert_close(schedule.sample_from_velocity(schedule.add_noise(x0, t, noise), t, velocity), x0)


@pytest.mark.parametrize("denoiser", ["mlp", "transformer"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v"])
@pytest.mark.parametrize(("cls", "sampler"), [(DDIMScheduler, "ddim"), (DDPMScheduler, "ddpm")])
def test_a_whole_sampling_is_theirs(cls: Any, sampler: Any, prediction: Any, clip: float | None, denoiser: Any) -> None:
    """Our denoiser in their loop, with the same noise. A DDIM step here goes by the clean chunk as it was clipped."""
    extra: dict[str, Any] = {"use_clipped_model_output": True} if cls is DDIMScheduler else {}
    torch.manual_seed(0)
    config = DiffusionHeadConfig(
        sampler=sampler, prediction=prediction, clip_sample=clip, train_steps=TRAIN_STEPS, inference_steps=10,
        denoiser=denoiser, hidden_dim=16,
    )  # fmt: skip
    head = DiffusionActionHead(config, horizon=8, action_dim=4, context_dim=6)
    context = Tokens(torch.randn(3, 5, 6), torch.arange(5) < torch.tensor([[5], [2], [1]]))
    scheduler, random = theirs(cls, prediction, 10, clip), torch.Generator().manual_seed(5)
    with torch.no_grad():
        found = head.predict(context, torch.Generator().manual_seed(5))
        x = torch.randn(3, 8, 4, generator=random)
        for t in scheduler.timesteps.tolist():
            output = head.denoiser(x, torch.full((3,), t), head.denoiser.remember(context))
            x = scheduler.step(output, t, x, generator=random, **extra).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)
