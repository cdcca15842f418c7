"""The bird's eye view against closed forms and a loop over every pixel, depth and point."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.errors import VlaError
from vla_core.model.sensor.bev import (
    BEVConfig,
    BEVEncoder,
    Cameras,
    Cells,
    CloudColumns,
    GridConfig,
    LiftSplat,
    Pillars,
    PointSet,
    locate,
    pixel_rays,
    splat,
)
from vla_core.observation.calibration import Calibration

# The optical axes (x right, y down, z forward) in the ego frame of a camera that looks ahead.
AHEAD = torch.tensor([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
GRID = GridConfig(x_m=(-8.0, 8.0), y_m=(-4.0, 4.0), z_m=(-1.0, 3.0), resolution_m=1.0)
SMALL = BEVConfig(grid=GRID, width=6, depth_m=(0.5, 6.5), depth_bins=6, patch=4, output_dim=10)
CLOUDS = {"lidar": CloudColumns(columns=4), "radar": CloudColumns(columns=5, has_height=False)}
NAN = float("nan")


def pose(yaw: float, position: tuple[float, float, float], optical: bool = True) -> Tensor:
    """(4, 4) of a sensor turned by ``yaw`` to the left, rad."""
    turn = torch.tensor([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    result = torch.eye(4)
    result[:3, :3] = turn @ AHEAD if optical else turn
    result[:3, 3] = torch.tensor(position)
    return result


def pinhole(focal: float, height: int, width: int) -> Tensor:
    return torch.tensor([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])


def surround(batch: int = 2, channels: int = 5) -> Cameras:
    torch.manual_seed(1)
    poses = torch.stack([pose(yaw, (0.3, 0.1 * i, 1.2)) for i, yaw in enumerate((0.0, 2.0, -2.0))])
    return Cameras(
        torch.randn(batch, 3, channels, 3, 4), pinhole(30.0, 24, 32).expand(batch, 3, 3, 3),
        poses.expand(batch, 3, 4, 4), torch.ones(batch, 3, dtype=torch.bool), (24, 32),
    )  # fmt: skip


def clouds(batch: int = 2, points: int = 40) -> dict[str, PointSet]:
    torch.manual_seed(2)
    return {
        name: PointSet(
            torch.randn(batch, points, cloud.columns) * 3, torch.rand(batch, points) < 0.8,
            pose(0.7, (1.0, 0.5, 0.2), optical=False).expand(batch, 4, 4),
        )
        for name, cloud in CLOUDS.items()
    }  # fmt: skip


def make(**changes: Any) -> BEVEncoder:
    torch.manual_seed(0)
    encoder = BEVEncoder(dataclasses.replace(SMALL, **changes), camera_dim=5, clouds=CLOUDS)
    torch.nn.init.normal_(encoder.absent)
    return encoder.eval()


# --- the grid ---


@pytest.mark.parametrize(
    ("point", "cell"),
    [
        ((-8.0, -4.0, 0.0), (0, 0)),
        ((0.0, 0.0, 0.0), (8, 4)),
        ((7.99, 3.99, 2.9), (15, 7)),
        ((2.5, -0.5, -1.0), (10, 3)),
        ((8.0, 0.0, 0.0), None),
        ((0.0, 4.0, 0.0), None),
        ((-8.01, 0.0, 0.0), None),
        ((0.0, 0.0, 3.0), None),
        ((0.0, 0.0, -1.01), None),
        ((NAN, 0.0, 0.0), None),
    ],
)
def test_the_cell_of_a_point(point: tuple[float, float, float], cell: tuple[int, int] | None) -> None:
    found = locate(torch.tensor([[point]]), torch.ones(1, 1, dtype=torch.bool), GRID)
    assert found.inside.item() == (cell is not None)
    if cell is not None:
        assert found.number.item() == cell[0] * 8 + cell[1]


def test_without_a_height_every_height_is_on_the_grid() -> None:
    found = locate(torch.tensor([[[2.5, -0.5]]]), torch.ones(1, 1, dtype=torch.bool), GRID)
    assert found.inside.item() and found.number.item() == 10 * 8 + 3


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3), points=st.integers(0, 30))
@settings(max_examples=25)
def test_splat_is_its_definition(reduce: Literal["sum", "mean", "max"], seed: int, batch: int, points: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(batch, points, 3)).astype(np.float32)
    number, inside = rng.integers(0, 6, (batch, points)), rng.random((batch, points)) < 0.8
    values[~inside] = np.nan
    expected = np.zeros((batch, 6, 3))
    for b in range(batch):
        for cell in range(6):
            rows = values[b][(number[b] == cell) & inside[b]]
            if len(rows):
                expected[b, cell] = getattr(rows.astype(np.float64), reduce)(axis=0)
    cells = Cells(torch.from_numpy(number), torch.from_numpy(inside))
    result = splat(torch.from_numpy(values), cells, 6, reduce)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_many_points_of_bfloat16_add_up() -> None:
    cells = Cells(torch.zeros(1, 4096, dtype=torch.int64), torch.ones(1, 4096, dtype=torch.bool))
    assert splat(torch.ones(1, 4096, 1, dtype=torch.bfloat16), cells, 1).item() == 4096  # one by one it stops at 256


# --- cameras ---


@given(
    u=st.integers(0, 31), v=st.integers(0, 23), depth=st.floats(0.5, 60), yaw=st.floats(-3, 3), focal=st.floats(5, 80)
)
@settings(max_examples=50)
def test_a_projected_point_lies_on_its_pixel_s_ray(u: int, v: int, depth: float, yaw: float, focal: float) -> None:
    intrinsics, camera = pinhole(focal, 24, 32).double(), pose(yaw, (1.0, -2.0, 1.5)).double()
    rays = pixel_rays(intrinsics, (24, 32), (24, 32)).view(24, 32, 3)
    world = camera[:3, :3] @ (depth * rays[v, u]) + camera[:3, 3]
    seen = intrinsics @ torch.linalg.solve(camera[:3, :3], world - camera[:3, 3])  # the pinhole equation
    torch.testing.assert_close(seen / seen[2], torch.tensor([u, v, 1.0], dtype=torch.float64), atol=1e-4, rtol=0)
    assert abs(seen[2].item() - depth) < 1e-4 * depth


def test_cells_of_a_map_are_the_pixels_of_the_picture_resized_to_it() -> None:
    size, cells = (24, 32), (3, 8)
    k = pinhole(20.0, *size).double()
    camera = Calibration(
        intrinsics=k.numpy(), distortion=np.zeros(5), rectification=np.eye(3), projection=np.eye(3, 4), width=32,
        height=24, model="plumb_bob", frame_id="",
    )  # fmt: skip
    small = torch.from_numpy(camera.scaled(*cells).intrinsics)
    torch.testing.assert_close(pixel_rays(k, cells, size), pixel_rays(small, cells, cells))


@pytest.mark.parametrize(
    ("yaw", "row", "column"),
    [(0.0, 3, 0), (math.pi / 2, 0, 1), (math.pi, -3, 0), (-math.pi / 2, 0, -2)],
)
def test_the_pixel_in_the_middle_at_a_known_depth(yaw: float, row: int, column: int) -> None:
    """A camera at the origin that looks ahead, left, back and right: straight ahead of it at its one depth."""
    depth = 3.5 if row else 1.5
    lift_splat = LiftSplat(camera_dim=1, width=1, depth_m=(depth - 0.5, depth + 0.5), depth_bins=1)
    cameras = Cameras(
        torch.ones(1, 1, 1, 1, 1), pinhole(10.0, 1, 1)[None, None], pose(yaw, (0.001, 0.001, 0.0))[None, None],
        torch.ones(1, 1, dtype=torch.bool), (1, 1),
    )  # fmt: skip
    expected = torch.zeros(16, 8)
    expected[8 + (row if row >= 0 else row - 1), 4 + column] = 1.0
    torch.nn.init.ones_(lift_splat.depth_and_context.weight)
    torch.nn.init.zeros_(lift_splat.depth_and_context.bias)
    torch.testing.assert_close(lift_splat(cameras, GRID)[0, 0], expected)


def test_up_in_the_picture_is_up_and_left_is_left() -> None:
    """Four pixels, 45 degrees off the axis each way, at depth 2 from a height of 1.2 m: the lower two are on the ground
    at -0.8 m, the upper ones at 3.2 m, above the grid."""
    lift_splat = LiftSplat(camera_dim=1, width=1, depth_m=(1.5, 2.5), depth_bins=1)
    torch.nn.init.ones_(lift_splat.depth_and_context.weight)
    torch.nn.init.zeros_(lift_splat.depth_and_context.bias)
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None, None]  # upper row first, left column first
    cameras = Cameras(features, pinhole(0.5, 2, 2)[None, None], pose(0.0, (0.5, 0.25, 1.2))[None, None],
                      torch.ones(1, 1, dtype=torch.bool), (2, 2))  # fmt: skip
    expected = torch.zeros(16, 8)
    expected[8 + 2, 4 + 2] = 3.0  # x 2.5, y 2.25
    expected[8 + 2, 4 - 2] = 4.0  # x 2.5, y -1.75
    torch.testing.assert_close(lift_splat(cameras, GRID)[0, 0], expected)


def lift_by_hand(lift_splat: LiftSplat, cameras: Cameras, grid: GridConfig) -> np.ndarray:
    """Every pixel at every depth, one after the other, in float64: (B, width, X, Y)."""
    batch, count, _, height, width = cameras.features.shape
    result = np.zeros((batch, lift_splat.width, *grid.shape))
    edges = np.linspace(*lift_splat.depth_m, lift_splat.depth_bins + 1)
    for b in range(batch):
        for k in range(count):
            if not cameras.mask[b, k]:
                continue
            out = lift_splat.depth_and_context(cameras.features[b, k][None])[0].detach().double().numpy()
            share = np.exp(out[: lift_splat.depth_bins])
            share /= share.sum(axis=0)
            inverse = np.linalg.inv(cameras.intrinsics[b, k].double().numpy())
            camera = cameras.camera_to_ego[b, k].double().numpy()
            for i in range(height):
                for j in range(width):
                    u = (j + 0.5) * cameras.size[1] / width - 0.5
                    v = (i + 0.5) * cameras.size[0] / height - 0.5
                    for z in range(lift_splat.depth_bins):
                        depth = (edges[z] + edges[z + 1]) / 2
                        point = camera @ np.append(depth * (inverse @ [u, v, 1.0]), 1.0)
                        x = math.floor((point[0] - grid.x_m[0]) / grid.resolution_m)
                        y = math.floor((point[1] - grid.y_m[0]) / grid.resolution_m)
                        on_grid = 0 <= x < grid.shape[0] and 0 <= y < grid.shape[1]
                        if on_grid and grid.z_m[0] <= point[2] < grid.z_m[1]:
                            result[b, :, x, y] += share[z, i, j] * out[lift_splat.depth_bins :, i, j]
    return result


def test_lift_splat_is_the_loop() -> None:
    torch.manual_seed(0)
    lift_splat = LiftSplat(camera_dim=5, width=3, depth_m=(0.5, 6.5), depth_bins=6)
    cameras = surround()
    cameras.mask[1, 2] = False
    expected = lift_by_hand(lift_splat, cameras, GRID)
    assert (expected != 0).mean() > 0.1
    np.testing.assert_allclose(lift_splat(cameras, GRID).detach().numpy(), expected, atol=1e-5)


def test_lift_splat_has_the_gradient_of_the_sum() -> None:
    torch.manual_seed(0)
    lift_splat = LiftSplat(camera_dim=2, width=3, depth_m=(0.5, 6.5), depth_bins=4).double()
    base = surround(batch=1, channels=2)
    wide = GridConfig(x_m=(-9.0, 9.0), y_m=(-9.0, 9.0), z_m=(-20.0, 20.0), resolution_m=1.0)

    def total(features: Tensor) -> Tensor:
        return lift_splat(base._replace(features=features), wide).sum(dim=(2, 3))

    features = base.features.double()
    context = lift_splat.depth_and_context(features.flatten(0, 1))[:, 4:]
    # Everything is on this grid, so that the shares of a pixel add up to 1. The map's sums are float32.
    torch.testing.assert_close(total(features), context.sum(dim=(0, 2, 3))[None], atol=1e-4, rtol=1e-4)
    weights = torch.randn(3, dtype=torch.float64)
    leaf = features.clone().requires_grad_()
    (total(leaf) * weights).sum().backward()
    assert leaf.grad is not None
    expected = (lift_splat.depth_and_context.weight[4:, :, 0, 0] * weights[:, None]).sum(dim=0)
    torch.testing.assert_close(leaf.grad, expected[:, None, None].expand_as(leaf), atol=1e-4, rtol=1e-4)


# --- clouds ---


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("name", CLOUDS)
def test_pillars_are_the_loop(name: str, reduce: Literal["mean", "max"]) -> None:
    torch.manual_seed(0)
    cloud, points = CLOUDS[name], clouds()[name]
    pillars = Pillars(cloud, width=6, reduce=reduce)
    expected = torch.zeros(2, 6, *GRID.shape)
    for b in range(2):
        members = defaultdict(list)
        for i in range(points.values.shape[1]):
            if not points.mask[b, i]:
                continue
            raw = points.values[b, i].double()
            place = torch.tensor([raw[0], raw[1], raw[2] if cloud.has_height else 0.0], dtype=torch.float64)
            place = points.sensor_to_ego[b, :3, :3].double() @ place + points.sensor_to_ego[b, :3, 3]
            cell = (math.floor(place[0] + 8), math.floor(place[1] + 4))
            if 0 <= cell[0] < 16 and 0 <= cell[1] < 8 and (not cloud.has_height or -1 <= place[2] < 3):
                members[cell].append((place[: cloud.axes], raw[cloud.axes :]))
        assert len(members) > 5 and max(map(len, members.values())) > 1
        for (x, y), rows in members.items():
            mean = torch.stack([place for place, _ in rows]).mean(dim=0)
            center = torch.tensor([x - 8 + 0.5, y - 4 + 0.5], dtype=torch.float64)
            described = [torch.cat([p[:2] - center, p - mean, p[2:], rest]).float() for p, rest in rows]
            features = pillars.mlp(torch.stack(described))
            expected[b, :, x, y] = features.amax(dim=0) if reduce == "max" else features.mean(dim=0)
    torch.testing.assert_close(pillars(points, GRID), expected, atol=1e-4, rtol=1e-4)


@given(seed=st.integers(0, 2**32 - 1), points=st.integers(0, 20), padding=st.integers(0, 5))
@settings(max_examples=20)
def test_neither_order_nor_padding_of_points_matters(seed: int, points: int, padding: int) -> None:
    torch.manual_seed(0)
    pillars = Pillars(CLOUDS["lidar"], width=4, reduce="max")
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.normal(size=(1, points, 4)).astype(np.float32) * 3)
    padded = torch.full((1, points + padding, 4), NAN)
    places = rng.permutation(points + padding)[:points]
    padded[:, places], mask = values, torch.zeros(1, points + padding, dtype=torch.bool)
    mask[:, places] = True
    plain = pillars(PointSet(values, torch.ones(1, points, dtype=torch.bool), torch.eye(4)[None]), GRID)
    torch.testing.assert_close(plain, pillars(PointSet(padded, mask, torch.eye(4)[None]), GRID), atol=1e-5, rtol=1e-5)


# --- the whole ---


def test_tokens_are_the_patches_of_the_map() -> None:
    encoder = make()
    tokens = encoder(surround(), clouds())
    assert tokens.values.shape == (2, 4 * 2, 10) and tokens.mask.all()
    patch = encoder.map(surround(), clouds())[:, :, 4:8, 0:4].flatten(1)  # the second row of patches
    expected = patch @ encoder.tokens.weight.flatten(1).T + encoder.tokens.bias + encoder.place[2]
    torch.testing.assert_close(tokens.values[:, 2], expected, atol=1e-5, rtol=1e-4)


@given(lost=st.lists(st.tuples(st.integers(0, 1), st.sampled_from(["cameras", "camera 1", "lidar", "radar"]))))
@settings(max_examples=25)
def test_what_is_absent_has_no_influence(lost: list[tuple[int, str]]) -> None:
    encoder, cameras, points = make(), surround(), clouds()
    for b, name in lost:
        if name.startswith("camera"):
            cameras.mask[b, slice(None) if name == "cameras" else 1] = False
        else:
            points[name].mask[b] = False
    masked = encoder(cameras, points)
    there = cameras.mask[..., None, None]
    noisy_cameras = Cameras(
        torch.where(there[..., None], cameras.features, NAN), torch.where(there, cameras.intrinsics, NAN),
        torch.where(there, cameras.camera_to_ego, NAN), cameras.mask, cameras.size,
    )  # fmt: skip
    noisy_points = {
        name: PointSet(torch.where(p.mask[..., None], p.values, NAN), p.mask,
                       torch.where(p.mask.any(dim=1)[:, None, None], p.sensor_to_ego, NAN))
        for name, p in points.items()
    }  # fmt: skip
    noisy = encoder(noisy_cameras, noisy_points)
    assert torch.equal(masked.values, noisy.values) and torch.equal(masked.mask, noisy.mask)
    nothing = ~(cameras.mask.any(dim=1) | points["lidar"].mask.any(dim=1) | points["radar"].mask.any(dim=1))
    assert torch.equal(masked.mask, ~nothing[:, None].expand_as(masked.mask))
    gradients = torch.autograd.grad(noisy.values.square().sum(), list(encoder.parameters()), allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_a_missing_source_is_not_one_that_sees_nothing() -> None:
    encoder, points = make(), clouds()
    far = {**points, "lidar": points["lidar"]._replace(values=points["lidar"].values + 1e3)}
    gone = {**points, "lidar": points["lidar"]._replace(mask=torch.zeros_like(points["lidar"].mask))}
    assert (encoder.map(surround(), far) - encoder.map(surround(), gone)).abs().max() > 1e-2


@pytest.mark.parametrize("source", ["cameras", "lidar", "radar"])
def test_every_source_matters_and_batches_do_not_mix(source: str) -> None:
    encoder, cameras, points = make(), surround(), clouds()
    before = encoder(cameras, points).values.detach()
    if source == "cameras":
        cameras.features[1].mul_(-1)
    else:
        points[source].values[1].mul_(-1)
    after = encoder(cameras, points).values
    torch.testing.assert_close(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-3


@pytest.mark.parametrize("mixed", [False, True])
def test_rough_numbers_keep_the_geometry(mixed: bool) -> None:
    encoder, cameras, points = make(), surround(), clouds()
    exact = encoder.map(cameras, points)
    cells = encoder.lift_splat.cells(cameras, GRID)
    if mixed:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough, rough_cells = encoder.map(cameras, points), encoder.lift_splat.cells(cameras, GRID)
    else:
        encoder.bfloat16()
        half = cameras._replace(features=cameras.features.bfloat16())
        rough, rough_cells = encoder.map(half, points), encoder.lift_splat.cells(half, GRID)
        assert encoder(half, points).values.dtype == torch.bfloat16
    assert torch.equal(cells.number, rough_cells.number) and torch.equal(cells.inside, rough_cells.inside)
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.std()


# --- stages ---

DEEP: dict[str, Any] = {"stages": (8, 12), "patch": 2, "source_width": 5, "mix_layers": 1}


def deep(condition_dim: int | None = None, **changes: Any) -> BEVEncoder:
    torch.manual_seed(0)
    encoder = BEVEncoder(dataclasses.replace(SMALL, **{**DEEP, **changes}), camera_dim=5, clouds=CLOUDS,
                         condition_dim=condition_dim)  # fmt: skip
    return encoder.eval()


@pytest.mark.parametrize(("output", "count"), [("patches", 2), ("global", 3), ("both", 5)])
def test_stages_halve_the_map_and_outputs_follow(output: str, count: int) -> None:
    encoder = deep(output=output, global_tokens=3)
    assert encoder.config.shape == (4, 2) and encoder.map(surround(), clouds()).shape == (2, 6, 16, 8)
    tokens = encoder(surround(), clouds())
    assert tokens.values.shape == (2, count, 10) and tokens.mask.all()
    above = encoder.tower(encoder.map(surround(), clouds()))
    assert above.shape == (2, 12, 4, 2)
    if output != "patches":
        whole = (above.flatten(1) @ encoder.whole.weight.T + encoder.whole.bias).view(2, 3, 10)
        torch.testing.assert_close(tokens.values[:, :3], whole, atol=1e-5, rtol=1e-4)
    if output != "global":
        first = above[:, :, :2].flatten(1) @ encoder.tokens.weight.flatten(1).T + encoder.tokens.bias + encoder.place[0]
        torch.testing.assert_close(tokens.values[:, count - 2], first, atol=1e-5, rtol=1e-4)


def test_a_condition_modulates_each_stage_and_begins_as_nothing() -> None:
    encoder, plain = deep(condition_dim=3), deep()
    said = torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 0.5]])
    plain.load_state_dict({n: w for n, w in encoder.state_dict().items() if "film" not in n}, strict=True)
    before = encoder(surround(), clouds(), said).values
    torch.testing.assert_close(before, plain(surround(), clouds()).values)
    for stage in range(2):
        changed = deep(condition_dim=3)
        changed.load_state_dict(encoder.state_dict())
        torch.nn.init.normal_(changed.tower.stages[stage].film.gamma_beta.weight)
        one, other = changed(surround(), clouds(), said).values, changed(surround(), clouds(), said.flip(0)).values
        assert (one - before).abs().max() > 1e-3 and (one - other).abs().max() > 1e-3
    for wrong, told in ((encoder, None), (plain, said)):
        with pytest.raises(VlaError, match="a condition is"):
            wrong(surround(), clouds(), told)


def test_points_of_several_sensors_are_one_source_at_their_places() -> None:
    encoder = make()
    left, right = pose(0.9, (1.0, 0.5, 0.2), optical=False), pose(-0.9, (1.0, -0.5, 0.2), optical=False)
    cloud = clouds()["lidar"]
    parts = [PointSet(cloud.values[:, :25], cloud.mask[:, :25], left.expand(2, 4, 4)),
             PointSet(cloud.values[:, 25:], cloud.mask[:, 25:], right.expand(2, 4, 4))]  # fmt: skip
    placed = cloud.values.clone()
    for rows, place in ((slice(0, 25), left), (slice(25, None), right)):
        placed[:, rows, :3] = placed[:, rows, :3] @ place[:3, :3].T + place[:3, 3]
    whole = PointSet(placed, cloud.mask, torch.eye(4).expand(2, 4, 4))
    found = encoder.map(surround(), {**clouds(), "lidar": parts})
    torch.testing.assert_close(found, encoder.map(surround(), {**clouds(), "lidar": whole}), atol=1e-5, rtol=1e-4)
    gone = [part._replace(mask=torch.zeros_like(part.mask)) for part in parts]
    half = encoder.map(surround(), {**clouds(), "lidar": [parts[0], gone[1]]})
    only = encoder.map(surround(), {**clouds(), "lidar": parts[0]})
    torch.testing.assert_close(half, only)
    nothing = whole._replace(mask=torch.zeros_like(whole.mask))
    torch.testing.assert_close(encoder.map(surround(), {**clouds(), "lidar": gone}),
                               encoder.map(surround(), {**clouds(), "lidar": nothing}))  # fmt: skip


def test_config_and_inputs_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match=r"stages: 4 of them halve the grid's cells \(16, 8\)"):
        dataclasses.replace(SMALL, stages=(4, 4, 4, 4))
    with pytest.raises(ConfigError, match=r"patch: expected a divisor of the map's cells \(8, 4\), found 3"):
        dataclasses.replace(SMALL, stages=(4,), patch=3)
    with pytest.raises(VlaError, match="without stages has nothing that a condition could modulate"):
        BEVEncoder(SMALL, camera_dim=5, condition_dim=3)
    assert from_dict(BEVConfig, to_dict(SMALL)) == SMALL and GridConfig().shape == (128, 128)
    for changes, message in (
        ({"x_m": (1.0, 1.0)}, "x_m: expected a lower and then a higher end"),
        ({"resolution_m": 0.0}, "resolution_m: expected a positive length"),
        ({"resolution_m": 3.0}, "x_m: expected whole cells of 3.0 m, found 5.33333 of them"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(GRID, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"patch: expected a divisor of the map's cells \(16, 8\), found 3"):
        dataclasses.replace(SMALL, patch=3)
    with pytest.raises(ConfigError, match="depth_m: expected a near and a far depth"):
        dataclasses.replace(SMALL, depth_m=(0.0, 5.0))
    with pytest.raises(ConfigError, match="columns: expected at least the 3 coordinates, found 2"):
        CloudColumns(columns=2)
    with pytest.raises(VlaError, match="expected cameras or clouds"):
        BEVEncoder(SMALL)
    with pytest.raises(VlaError, match="view of lidar, radar; this one was made of cameras, lidar, radar"):
        make()(None, clouds())
    with pytest.raises(VlaError, match="points of 5 columns; this map was made for 4"):
        Pillars(CLOUDS["lidar"], width=4, reduce="max")(clouds()["radar"], GRID)
