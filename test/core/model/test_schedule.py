"""The steps of the diffusion against closed forms that are computed here, in float64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from vla_core.model.action_head.schedule import NoiseSchedule, inference_timesteps, make_betas

Array = npt.NDArray[np.float64]


def alpha_bar(kind: str, steps: int) -> Array:
    if kind == "cosine":
        f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
        betas = np.minimum(0.999, [1 - f[t + 1] / f[t] for t in range(steps)])
    elif kind == "linear":
        betas = np.minimum(0.999, np.linspace(0.1 / steps, 20.0 / steps, steps))
    else:
        betas = np.linspace(1e-4, 1e-2, steps)
    return np.cumprod(1.0 - betas)


def gaussians(count: int) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((5, 3, 2)) for _ in range(count)]


def tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array).float()


@pytest.mark.parametrize("kind", ["cosine", "linear", "mini_vla_seed"])
@pytest.mark.parametrize("steps", [16, 100])
def test_alpha_bar(kind: str, steps: int) -> None:
    schedule = NoiseSchedule(kind, steps)  # type: ignore[arg-type]
    np.testing.assert_allclose(schedule.alpha_bar.numpy(), alpha_bar(kind, steps), rtol=1e-5)


def test_only_the_seed_schedule_leaves_signal_at_the_end() -> None:
    assert NoiseSchedule("cosine", 50).alpha_bar[-1] < 1e-5
    assert NoiseSchedule("linear", 50).alpha_bar[-1] < 1e-4
    assert NoiseSchedule("mini_vla_seed", 16).alpha_bar[-1] == pytest.approx(0.922, abs=1e-3)


def test_betas_are_variances() -> None:
    for kind in ("cosine", "linear", "mini_vla_seed"):
        betas = make_betas(kind, 16)
        assert bool(((betas > 0) & (betas < 1)).all())


def test_add_noise_and_both_conversions() -> None:
    x0, noise = gaussians(2)
    t = np.array([0, 3, 7, 11, 15])
    abar = alpha_bar("cosine", 16)[t][:, None, None]
    expected = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise

    schedule = NoiseSchedule("cosine", 16)
    times = torch.from_numpy(t)
    x_t = schedule.add_noise(tensor(x0), times, tensor(noise))
    np.testing.assert_allclose(x_t.numpy(), expected, atol=1e-5)
    # At t = 15 there is almost no signal left to solve for, so the tolerance follows abar.
    solved = schedule.sample_from_epsilon(x_t, times, tensor(noise)).numpy()
    assert np.all(np.abs(solved - x0) < 1e-5 / np.sqrt(abar))
    np.testing.assert_allclose(schedule.epsilon_from_sample(x_t, times, tensor(x0)).numpy()[1:], noise[1:], atol=1e-4)


@pytest.mark.parametrize(("t", "previous"), [(15, 14), (9, 8), (9, 4), (1, 0), (4, -1), (0, -1)])
def test_ddpm_step_is_the_posterior(t: int, previous: int) -> None:
    """Bayes' rule on two Gaussians: the prior q(x_previous | x_0), the likelihood q(x_t | ...)."""
    x_t, x0, noise = gaussians(3)
    abar = np.append(alpha_bar("linear", 16), 1.0)  # index -1 is the clean sample
    alpha = abar[t] / abar[previous]
    if previous == -1:
        expected = x0
    else:
        precision = 1 / (1 - abar[previous]) + alpha / (1 - alpha)
        mean = (np.sqrt(abar[previous]) * x0 / (1 - abar[previous]) + np.sqrt(alpha) * x_t / (1 - alpha)) / precision
        expected = mean + noise / np.sqrt(precision)

    step = NoiseSchedule("linear", 16).ddpm_step(tensor(x_t), tensor(x0), t, previous, tensor(noise))
    np.testing.assert_allclose(step.numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("t", "previous"), [(15, 14), (9, 4), (4, -1)])
def test_ddim_step(t: int, previous: int, eta: float) -> None:
    x_t, x0, noise = gaussians(3)
    abar = np.append(alpha_bar("linear", 16), 1.0)
    epsilon = (x_t - np.sqrt(abar[t]) * x0) / np.sqrt(1 - abar[t])
    sigma = eta * np.sqrt((1 - abar[previous]) / (1 - abar[t])) * np.sqrt(1 - abar[t] / abar[previous])
    expected = np.sqrt(abar[previous]) * x0 + np.sqrt(1 - abar[previous] - sigma**2) * epsilon + sigma * noise

    schedule = NoiseSchedule("linear", 16)
    step = schedule.ddim_step(tensor(x_t), tensor(x0), t, previous, tensor(noise), eta)
    np.testing.assert_allclose(step.numpy(), expected, atol=2e-4)


def test_ddim_with_full_noise_is_ddpm() -> None:
    x_t, x0, noise = (tensor(array) for array in gaussians(3))
    schedule = NoiseSchedule("cosine", 50)
    torch.testing.assert_close(
        schedule.ddim_step(x_t, x0, 30, 20, noise, eta=1.0),
        schedule.ddpm_step(x_t, x0, 30, 20, noise),
        atol=1e-5,
        rtol=1e-4,
    )


def test_seed_step_is_what_was_published() -> None:
    _, x0, noise = gaussians(3)
    beta = np.linspace(1e-4, 1e-2, 16)[6]
    schedule = NoiseSchedule("mini_vla_seed", 16)
    step = schedule.mini_vla_seed_step(tensor(x0), 6, tensor(noise))
    np.testing.assert_allclose(step.numpy(), np.sqrt(1 - beta) * x0 + np.sqrt(beta) * noise, atol=1e-6)
    torch.testing.assert_close(schedule.mini_vla_seed_step(tensor(x0), 0, tensor(noise)), tensor(x0))


@pytest.mark.parametrize(
    ("train_steps", "inference_steps", "expected"),
    [(4, 4, [3, 2, 1, 0]), (50, 5, [49, 39, 29, 19, 9]), (16, 1, [15]), (10, 3, [9, 6, 2])],
)
def test_inference_starts_from_pure_noise(train_steps: int, inference_steps: int, expected: list[int]) -> None:
    assert inference_timesteps(train_steps, inference_steps) == expected


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sampling_with_a_perfect_denoiser_recovers_the_distribution(sampler: str) -> None:
    """Data N(2, 0.5^2): the best estimate of x_0 is linear in x_t, so the answer is known."""
    mean, deviation, steps = 2.0, 0.5, 200
    schedule = NoiseSchedule("cosine", steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=generator)
    for t in reversed(range(steps)):
        abar = schedule.alpha_bar[t]
        gain = abar.sqrt() * deviation**2 / (abar * deviation**2 + 1 - abar)
        x0 = mean + gain * (x - abar.sqrt() * mean)
        noise = torch.randn(x.shape, generator=generator)
        step = schedule.ddpm_step if sampler == "ddpm" else schedule.ddim_step
        x = step(x, x0, t, t - 1, noise)
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(deviation, abs=0.02)


def test_the_schedule_stays_exact_when_the_weights_become_bfloat16() -> None:
    exact, head = NoiseSchedule("cosine", 50), torch.nn.Sequential(NoiseSchedule("cosine", 50), torch.nn.Linear(2, 2))
    moved = head.to(torch.bfloat16)[0]
    assert head[1].weight.dtype == torch.bfloat16 and moved.alpha_bar.dtype == torch.float32
    assert torch.equal(moved.alpha_bar, exact.alpha_bar) and torch.equal(moved.betas, exact.betas)
    assert head.to("meta")[0].alpha_bar.device.type == "meta"
