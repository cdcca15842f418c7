"""Sensor encoders against brute force, and whatever is absent without influence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.errors import VlaError
from vla_core.model.sensor import (
    SENSOR_REGISTRY,
    IMUConfig,
    IMUEncoder,
    PointCloudConfig,
    PointCloudEncoder,
    RadarConfig,
    RadarEncoder,
    SensorEncoder,
    StateConfig,
    StateEncoder,
    build_sensor,
)
from vla_core.model.sensor.base import masked_max
from vla_core.model.sensor.lidar_encoder import (
    PointNetSetAbstraction,
    SetAbstractionConfig,
    ball_query,
    canonical_order,
    farthest_points,
)
from vla_core.model.sensor.radar_encoder import WrappedConv
from vla_core.model.tokens import Tokens

SMALL = PointCloudConfig(
    levels=(
        SetAbstractionConfig(points=8, radius_m=1.0, neighbors=6, widths=(8, 12)),
        SetAbstractionConfig(points=4, radius_m=3.0, neighbors=4, widths=(16,)),
    ),
    global_widths=(16, 24),
    output="both",
    output_dim=10,
    extent_m=4.0,
)
ENCODERS = {
    "point_cloud": (SMALL, {"input_dim": 5}),
    "radar_targets": (RadarConfig(widths=(8, 12), output_dim=10), {"input_dim": 5}),
    "radar_tokens": (RadarConfig(widths=(8, 12), output="tokens", output_dim=10), {"input_dim": 5}),
    "radar_map": (RadarConfig(form="range_doppler", widths=(4, 8), output_dim=10), {"input_dim": 2}),
    "radar_cells": (RadarConfig(form="range_doppler", widths=(4, 8), output="tokens", output_dim=10), {"input_dim": 2}),
    "imu": (IMUConfig(output_dim=10), {"input_dim": 6}),
    "state": (StateConfig(hidden_dim=8, output_dim=10), {"input_dim": 7}),
}


def make(name: str) -> tuple[SensorEncoder, Tensor, Tensor]:
    torch.manual_seed(0)
    config, sizes = ENCODERS[name]
    values, mask = config.fake(3, **sizes)  # type: ignore[attr-defined]
    return build_sensor(config, **sizes).eval(), values, mask


def lattice(seed: int, batch: int, points: int, columns: int) -> np.ndarray:
    """Points on eighths of a metre, where float32 distances are exact and many of them equal."""
    return np.random.default_rng(seed).integers(-12, 13, (batch, points, columns)).astype(np.float32) / 8


def same(a: Tokens, b: Tokens, tolerance: float = 1e-5) -> None:
    assert torch.equal(a.mask, b.mask)
    torch.testing.assert_close(a.values[a.mask], b.values[b.mask], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_gives_tokens_of_its_width(name: str) -> None:
    encoder, values, mask = make(name)
    tokens = encoder(values, mask)
    assert tokens.values.shape == (*tokens.mask.shape, encoder.output_dim) and tokens.mask.all()
    same(tokens, encoder(values))  # no mask: all is there


@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_absent_has_no_influence(name: str) -> None:
    encoder, values, mask = make(name)
    mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0] = False  # a sample without anything
    other = values.clone()
    other[~mask] = float("nan")
    a, b = encoder(values, mask), encoder(other, mask)
    assert torch.equal(a.mask, b.mask) and not a.mask[0].any() and a.mask.any()
    assert torch.equal(a.values[a.mask], b.values[b.mask])


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_are_finite_where_parts_are_absent(name: str) -> None:
    encoder, values, mask = make(name)
    mask[0] = False
    values[0] = float("nan")
    tokens = encoder(values, mask)
    tokens.values[tokens.mask].square().sum().backward()
    for parameter in encoder.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_samples_of_a_batch_do_not_mix(name: str) -> None:
    encoder, values, mask = make(name)
    together = encoder(values, mask)
    for i in range(len(values)):
        alone = encoder(values[i : i + 1], mask[i : i + 1])
        same(Tokens(together.values[i : i + 1], together.mask[i : i + 1]), alone)


@pytest.mark.parametrize("name", ENCODERS)
def test_bfloat16_weights_take_float32_data(name: str) -> None:
    encoder, values, mask = make(name)
    exact = encoder(values, mask)
    rough = encoder.bfloat16()(values, mask)
    assert rough.values.dtype == torch.bfloat16 and torch.equal(rough.mask, exact.mask)
    scale = exact.values.std()
    assert (rough.values.float() - exact.values).abs().mean() < 0.05 * scale


@pytest.mark.parametrize("name", ENCODERS)
def test_mixed_precision(name: str) -> None:
    encoder, values, mask = make(name)
    exact = encoder(values, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = encoder(values, mask)
    assert torch.equal(rough.mask, exact.mask)
    assert (rough.values.float() - exact.values).abs().mean() < 0.05 * exact.values.std()


@pytest.mark.parametrize("name", ENCODERS)
def test_configs_come_back(name: str) -> None:
    config, _ = ENCODERS[name]
    assert from_dict(type(config), to_dict(config)) == config
    assert SENSOR_REGISTRY[config.type].Config is type(config)  # type: ignore[attr-defined]


def test_an_encoder_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Sonar:
        type: str = "sonar"

    class SonarEncoder(nn.Module):
        Config = Sonar

        def __init__(self, config: Sonar, *, input_dim: int) -> None:
            super().__init__()
            self.output_dim = input_dim

    with pytest.raises(VlaError, match=r"no sensor encoder 'sonar'.*imu, path, point_cloud, radar, state"):
        build_sensor(Sonar(), input_dim=3)
    monkeypatch.setitem(SENSOR_REGISTRY, "sonar", SonarEncoder)
    assert build_sensor(Sonar(), input_dim=3).output_dim == 3


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: PointCloudConfig(levels=()), "levels: expected at least one"),
        (lambda: PointCloudConfig(output_dim=0), "output_dim: expected at least 1, found 0"),
        (lambda: PointCloudConfig(extent_m=float("nan")), "extent_m: expected a positive length"),
        (lambda: SetAbstractionConfig(points=1, radius_m=0.0, neighbors=1, widths=(1,)), "radius_m"),
        (lambda: SetAbstractionConfig(points=1, radius_m=1.0, neighbors=1, widths=()), "widths: expected at least 1"),
        (lambda: RadarConfig(widths=(8, 0)), r"widths: expected at least 1, found \[8, 0\]"),
        (lambda: IMUConfig(layers=0), "layers: expected at least 1"),
    ],
)
def test_configs_that_make_no_sense(make_config: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config()  # type: ignore[operator]


def test_data_of_another_shape_is_refused() -> None:
    with pytest.raises(VlaError, match="of 4 columns; this encoder was made for 5"):
        PointCloudEncoder(SMALL, input_dim=5)(torch.zeros(1, 3, 4))
    with pytest.raises(VlaError, match=r"'targets' takes \(B, N, 5\)"):
        RadarEncoder(RadarConfig())(torch.zeros(1, 5, 8, 8))
    with pytest.raises(VlaError, match=r"expected torch.bool \(2, 3\)"):
        IMUEncoder(IMUConfig())(torch.zeros(2, 3, 6), torch.ones(2, 4, dtype=torch.bool))


def test_the_maximum_of_what_is_there() -> None:
    values = torch.tensor([[-1.0, 5.0], [-2.0, 3.0], [9.0, 9.0]])
    mask = torch.tensor([True, True, False])
    assert masked_max(values, mask).tolist() == [-1.0, 5.0]
    assert masked_max(values, torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0]


# --- PointNet++ ---


def farthest_by_hand(xyz: np.ndarray, mask: np.ndarray, count: int) -> list[int]:
    """The definition: each next point maximizes the distance to the set so far, until only copies are left."""
    candidates = [i for i in range(len(xyz)) if mask[i]]
    chosen = candidates[:1]
    while candidates and len(chosen) < count:
        distance = [min(float(((xyz[i] - xyz[j]) ** 2).sum()) for j in chosen) for i in candidates]
        if max(distance) == 0:
            break
        chosen.append(candidates[int(np.argmax(distance))])
    return chosen


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.floats(0, 1))
@settings(max_examples=60)
def test_farthest_points_are_those_of_the_definition(
    seed: int, batch: int, points: int, count: int, share: float
) -> None:
    xyz = lattice(seed, batch, points, 3)
    mask = np.random.default_rng(seed).random((batch, points)) < share
    index, found = farthest_points(torch.from_numpy(xyz), torch.from_numpy(mask), count)
    for b in range(batch):
        expected = farthest_by_hand(xyz[b], mask[b], count)
        assert index[b][found[b]].tolist() == expected
        assert found[b].tolist() == [i < len(expected) for i in range(count)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 20))
@settings(max_examples=60)
def test_ball_query_is_the_nearest_within_the_radius(
    seed: int, batch: int, points: int, neighbors: int, eighths: int
) -> None:
    xyz, centers = lattice(seed, batch, points, 3), lattice(seed + 1, batch, 5, 3)
    mask = np.random.default_rng(seed).random((batch, points)) < 0.8
    radius = eighths / 8
    index, found = ball_query(
        torch.from_numpy(xyz), torch.from_numpy(mask), torch.from_numpy(centers), radius=radius, neighbors=neighbors
    )
    for b in range(batch):
        for s in range(5):
            square = ((xyz[b].astype(np.float64) - centers[b, s]) ** 2).sum(axis=1)
            inside = [i for i in range(points) if mask[b, i] and square[i] <= radius**2]
            expected = sorted(inside, key=lambda i: (square[i], i))[:neighbors]
            assert index[b, s][found[b, s]].tolist() == expected


def test_ball_query_in_parts_is_ball_query(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    xyz, mask = torch.randn(2, 50, 3), torch.ones(2, 50, dtype=torch.bool)
    whole = ball_query(xyz, mask, xyz, radius=0.7, neighbors=5)
    monkeypatch.setattr("vla_core.model.sensor.lidar_encoder.CPU_PAIRS", 300)
    parts = ball_query(xyz, mask, xyz, radius=0.7, neighbors=5)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


def test_set_abstraction_is_the_paper_s_formula() -> None:
    torch.manual_seed(0)
    config = SetAbstractionConfig(points=4, radius_m=0.9, neighbors=5, widths=(6, 7))
    layer = PointNetSetAbstraction(config, feature_dim=2)
    xyz, features, mask = torch.randn(1, 20, 3), torch.randn(1, 20, 2), torch.rand(1, 20) < 0.8
    centers, described, found = layer(xyz, features, mask)
    chosen = farthest_by_hand(xyz[0].numpy(), mask[0].numpy(), 4)
    assert found.all()
    for s, i in enumerate(chosen):
        distance = (xyz[0] - xyz[0, i]).norm(dim=-1)
        near = sorted((float(distance[j]), j) for j in range(20) if mask[0, j] and distance[j] <= 0.9)[:5]
        rows = [layer.mlp(torch.cat([(xyz[0, j] - xyz[0, i]) / 0.9, features[0, j]])) for _, j in near]
        torch.testing.assert_close(described[0, s], torch.stack(rows).amax(dim=0), atol=1e-5, rtol=1e-5)
        assert torch.equal(centers[0, s], xyz[0, i])


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
@settings(max_examples=40)
def test_canonical_order_sorts_the_columns_and_puts_the_absent_last(seed: int, points: int) -> None:
    values = lattice(seed, 1, points, 4).round()  # many points are equal in some columns
    mask = np.random.default_rng(seed).random((1, points)) < 0.7
    order = canonical_order(torch.from_numpy(values), torch.from_numpy(mask))[0].tolist()
    assert order == sorted(range(points), key=lambda i: (not mask[0, i], *values[0, i].tolist(), i))


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(0, 9), st.booleans())
@settings(max_examples=25)
def test_neither_order_nor_padding_of_a_cloud_matters(seed: int, points: int, padding: int, ties: bool) -> None:
    torch.manual_seed(0)
    encoder = PointCloudEncoder(SMALL, input_dim=5).eval()
    rng = np.random.default_rng(seed)
    cloud = lattice(seed, 1, points, 5) if ties else rng.normal(size=(1, points, 5)).astype(np.float32)
    padded = np.full((1, points + padding, 5), np.nan, dtype=np.float32)
    places = rng.permutation(points + padding)[:points]
    padded[:, places] = cloud[:, rng.permutation(points)]
    mask = np.isin(np.arange(points + padding), places)[None]
    plain = encoder(torch.from_numpy(cloud))
    same(plain, encoder(torch.from_numpy(padded), torch.from_numpy(mask)))
    if not padding:  # bit for bit where the shapes are equal
        assert torch.equal(plain.values, encoder(torch.from_numpy(padded)).values)


@pytest.mark.parametrize("points", [0, 1, 3])
def test_clouds_of_few_points(points: int) -> None:
    tokens = PointCloudEncoder(SMALL, input_dim=4)(torch.randn(2, points, 4))
    assert tokens.mask.sum(dim=1).tolist() == [points + min(points, 1)] * 2
    assert tokens.values[tokens.mask].isfinite().all()
    assert RadarEncoder(RadarConfig())(torch.randn(2, points, 5)).mask.all() == bool(points)


def test_outputs_are_the_global_token_and_those_of_the_centroids() -> None:
    torch.manual_seed(0)
    both = PointCloudEncoder(SMALL, input_dim=4)
    cloud = torch.randn(2, 30, 4)
    tokens = both(cloud)
    assert tokens.values.shape == (2, 1 + 4, 10)
    for output, part in (("global", slice(0, 1)), ("centroids", slice(1, 5))):
        alone = PointCloudEncoder(dataclasses.replace(SMALL, output=output), input_dim=4)  # type: ignore[arg-type]
        alone.load_state_dict({k: v for k, v in both.state_dict().items() if k in alone.state_dict()})
        torch.testing.assert_close(alone(cloud).values, tokens.values[:, part])


def test_where_things_are_matters_to_the_global_token() -> None:
    torch.manual_seed(0)
    encoder = PointCloudEncoder(SMALL, input_dim=3)
    cloud = torch.randn(1, 30, 3)
    assert (encoder(cloud).values - encoder(cloud + torch.tensor([2.0, 0.0, 0.0])).values).abs().max() > 1e-2


# --- radar ---


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(0, 9))
@settings(max_examples=25)
def test_neither_order_nor_padding_of_targets_matters(seed: int, targets: int, padding: int) -> None:
    torch.manual_seed(0)
    encoder = RadarEncoder(RadarConfig(widths=(8, 12), output_dim=6))
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.normal(size=(2, targets, 5)).astype(np.float32))
    padded = torch.full((2, targets + padding, 5), float("nan"))
    places = rng.permutation(targets + padding)[:targets]
    padded[:, places] = values
    mask = torch.zeros(2, targets + padding, dtype=torch.bool)
    mask[:, places] = True
    same(encoder(values), encoder(padded, mask))


@pytest.mark.parametrize("shift", [2, 8, -4])
def test_doppler_is_circular_and_range_is_not(shift: int) -> None:
    torch.manual_seed(0)
    layer, values = WrappedConv(2, 3), torch.randn(1, 2, 16, 16)
    around = layer(values.roll(shift, dims=3))
    torch.testing.assert_close(around, layer(values).roll(shift // 2, dims=3))
    assert (layer(values.roll(shift, dims=2)) - layer(values).roll(shift // 2, dims=2)).abs().max() > 1e-3


def test_the_place_of_an_echo_is_seen() -> None:
    torch.manual_seed(0)
    encoder = RadarEncoder(RadarConfig(form="range_doppler", widths=(8, 16), output_dim=8), input_dim=1)
    echo = torch.zeros(1, 1, 16, 16)
    echo[..., 6, 6] = 5.0
    here = encoder(echo).values
    assert (here - encoder(echo.roll(4, dims=2)).values).abs().max() > 1e-3
    assert (here - encoder(echo.roll(4, dims=3)).values).abs().max() > 1e-3


# --- IMU and state ---


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    st.sampled_from(["left", "right", "mixed"]),
)
@settings(max_examples=40)
def test_a_padded_window_is_the_window_alone(seed: int, lengths: list[int], side: str) -> None:
    torch.manual_seed(0)
    encoder = IMUEncoder(IMUConfig(output_dim=8)).eval()
    rng = np.random.default_rng(seed)
    total = max(lengths) + 3
    values, mask = (
        torch.full((len(lengths), total, 6), float("nan")),
        torch.zeros(len(lengths), total, dtype=torch.bool),
    )
    windows = [torch.from_numpy(rng.normal(size=(length, 6)).astype(np.float32)) for length in lengths]
    for i, window in enumerate(windows):
        n = len(window)
        start = {"left": total - n, "right": 0}.get(side)
        places = np.sort(rng.permutation(total)[:n]) if start is None else np.arange(start, start + n)
        values[i, places], mask[i, places] = window, True
    tokens = encoder(values, mask)
    assert tokens.mask[:, 0].tolist() == [length > 0 for length in lengths]
    for i, window in enumerate(windows):
        if len(window):
            _, (hidden, _) = encoder.lstm(window[None])
            torch.testing.assert_close(tokens.values[i, 0], hidden[-1, 0], atol=1e-6, rtol=1e-5)


def test_the_imu_has_two_layers() -> None:
    count = sum(p.numel() for p in IMUEncoder(IMUConfig(output_dim=128)).parameters())
    assert count == 4 * (128 * (6 + 128) + 2 * 128) + 4 * (128 * (128 + 128) + 2 * 128)


def test_a_history_of_states_is_a_token_each() -> None:
    encoder = StateEncoder(StateConfig(output_dim=10), input_dim=4)
    states = torch.randn(2, 5, 4)
    tokens = encoder(states, torch.tensor([[True] * 5, [False, True, True, True, True]]))
    assert tokens.values.shape == (2, 5, 10) and tokens.mask.sum() == 9
    torch.testing.assert_close(tokens.values[:, 2], encoder(states[:, 2]).values[:, 0])
