"""The path encoder: dead reckoning against circles and an integrator of SciPy, and what is absent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from vla_core.config import ConfigError
from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.model.sensor import PathConfig, PathEncoder
from vla_core.model.sensor.path_encoder import reckoned
from vla_core.training.recipe import load_recipe

STEP_S = 0.02


@given(speed=st.floats(0.5, 12.0), rate=st.floats(-0.8, 0.8).filter(lambda w: abs(w) > 0.01), rows=st.integers(2, 500))
def test_a_circle_behind_lies_on_that_circle(speed: float, rate: float, rows: int) -> None:
    path = reckoned(torch.tensor([[[speed, rate]]], dtype=torch.float64).expand(1, rows, 2), STEP_S)[0].numpy()
    ago = STEP_S * np.arange(1 - rows, 1)
    x, y = speed / rate * np.sin(rate * ago), speed / rate * (1 - np.cos(rate * ago))
    np.testing.assert_allclose(path[:, 2], rate * ago, atol=1e-9)  # turned by more than half a circle, too
    # A chord of the step's angle a is shorter than its arc by a share of a^2 / 24.
    bound = (rate * STEP_S) ** 2 / 24 * speed * STEP_S * rows + 1e-9
    assert np.hypot(path[:, 0] - x, path[:, 1] - y).max() <= 1.01 * bound


def test_any_way_is_that_of_an_integrator() -> None:
    def speeds(t: float) -> tuple[float, float]:
        return 6.0 + 3.0 * np.sin(0.7 * t), 0.5 * np.cos(1.3 * t) + 0.2

    times = STEP_S * np.arange(1, 401)
    # Each row's speeds are those of the middle of its step.
    values = torch.tensor([speeds(t - STEP_S / 2) for t in times], dtype=torch.float64)[None]
    found = reckoned(values, STEP_S)[0].numpy()

    def moving(t: float, place: np.ndarray) -> tuple[float, float, float]:
        ahead, turning = speeds(t)
        return ahead * np.cos(place[2]), ahead * np.sin(place[2]), turning

    driven = solve_ivp(moving, (0, times[-1]), (0.0, 0.0, 0.0), t_eval=times, rtol=1e-9, atol=1e-9).y.T
    back = driven[-1, 2]
    rotation = np.array([[np.cos(back), np.sin(back)], [-np.sin(back), np.cos(back)]])
    np.testing.assert_allclose(found[:, :2], (driven[:, :2] - driven[-1, :2]) @ rotation.T, atol=2e-3)
    np.testing.assert_allclose(found[:, 2], driven[:, 2] - back, atol=1e-4)


def test_the_same_way_is_the_same_at_any_speed() -> None:
    torch.manual_seed(0)
    encoder = PathEncoder(PathConfig(length_m=20.0)).eval()
    tokens = []
    for speed in (4.0, 8.0):  # a curve of 20 m of radius, then 5 m straight on
        curve, straight = int(40 / speed / STEP_S), int(5 / speed / STEP_S)
        rates = torch.cat([torch.full((curve,), speed / 20), torch.zeros(straight)])
        tokens.append(encoder(torch.stack([torch.full_like(rates, speed), rates], dim=-1)[None]).values)
    assert torch.allclose(*tokens, atol=0.05)
    other = torch.stack([torch.full_like(rates, speed), -rates], dim=-1)[None]
    assert not torch.allclose(encoder(other).values, tokens[1], atol=0.5)


def test_a_place_is_the_newest_one_so_far_behind() -> None:
    """By brute force over the rows, of a way with a stand and a reversal of the wheel in it."""
    torch.manual_seed(0)
    config = PathConfig(points=6, length_m=5.0)
    encoder = PathEncoder(config).eval()
    rng = np.random.default_rng(0)
    speeds = np.concatenate([rng.uniform(1, 6, 60), np.zeros(30), rng.uniform(0, 3, 60)])
    values = torch.tensor(np.stack([speeds, rng.uniform(-0.5, 0.5, 150)], axis=-1), dtype=torch.float32)[None]
    seen: list[torch.Tensor] = []
    encoder.mlp[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(values)
    path = reckoned(values, STEP_S)[0]
    for k, wanted in enumerate(np.linspace(0, 5, 6)):
        row = max(t for t in range(150) if STEP_S * speeds[t + 1 :].sum() >= wanted - 1e-5)
        x, y, _, _, yaw, there = seen[0].view(6, 6)[k].tolist()
        np.testing.assert_allclose([2.5 * x, 2.5 * y, torch.pi * yaw], path[row], atol=1e-4)
        assert there == 1


def test_what_is_absent_has_no_influence_and_a_short_way_is_not_a_long_one() -> None:
    torch.manual_seed(0)
    encoder = PathEncoder(PathConfig(points=5)).eval()
    values = torch.tensor([4.0, 0.3]).expand(2, 40, 2).clone()
    values[:, :20] = float("nan")
    mask = torch.arange(40).expand(2, 40) >= 20
    mask = mask & torch.tensor([True, False])[:, None]
    values[1] = float("inf")
    tokens = encoder(values, mask)
    assert tokens.values.shape == (2, 1, 64) and tokens.values.isfinite().all()
    assert tokens.mask.tolist() == [[True], [False]]
    longer = torch.tensor([40.0, 0.3]).expand(1, 40, 2)
    assert not torch.allclose(encoder(longer).values, tokens.values[:1], atol=1e-3)


def test_half_precision_keeps_the_metres() -> None:
    torch.manual_seed(0)
    encoder = PathEncoder(PathConfig()).eval()
    values = torch.tensor([[[9.0, 0.05]]]).expand(1, 400, 2)
    whole = encoder(values).values
    assert torch.allclose(encoder.bfloat16()(values).values.float(), whole, atol=0.06)


@pytest.mark.parametrize(("changes", "message"), [
    ({"rate_hz": 0.0}, "rate_hz: expected a positive number, found 0.0"),
    ({"length_m": float("nan")}, "length_m: expected a positive number, found nan"),
    ({"points": 0}, "points: expected at least 1, found 0"),
])  # fmt: skip
def test_configurations_that_cannot_be(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PathConfig(**changes)  # type: ignore[arg-type]


def test_columns_that_are_no_speeds() -> None:
    with pytest.raises(VlaError, match="2 columns, the forward speed and the yaw rate; found 6"):
        PathEncoder(PathConfig(), input_dim=6)


def test_a_rate_that_is_not_the_streams_is_refused() -> None:
    recipe, contract = load_recipe("drive"), RobotContract.load("driving")
    assert recipe.model_config(contract, 8).sensors["way"].rate_hz == contract.stream("way").rate_hz
    slow = load_recipe("drive", ["model.sensors.way.rate_hz=20"])
    with pytest.raises(ConfigError, match=r"way.rate_hz: 20, but the stream way of 'driving' comes at 50 Hz"):
        slow.model_config(contract, 8)
