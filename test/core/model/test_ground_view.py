"""The view of the ground against a renderer of a flat world, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_core.model.sensor.bev import BEVConfig, BEVEncoder, Cameras, GridConfig
from vla_core.model.sensor.ground_view import GroundView, ground

from .test_bev import NAN, pinhole, pose

GRID = GridConfig(x_m=(0.0, 12.0), y_m=(-6.0, 6.0), resolution_m=1.0)
HEIGHT, WIDTH = 60, 80


def painted(points: Tensor) -> Tensor:
    """The colours (..., 3) of a flat world: smooth, so that neither sampling nor a small blur shows."""
    x, y = points[..., 0], points[..., 1]
    return torch.stack([0.5 + 0.03 * x, 0.5 + 0.06 * y, 0.5 + 0.02 * x - 0.04 * y], dim=-1).clamp(0, 1)


def picture(intrinsics: Tensor, camera: Tensor) -> Tensor:
    """(3, H, W) of the ground by casting a ray through every pixel's centre; black above the horizon."""
    v, u = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).double()
    rays = pixels @ torch.linalg.inv(intrinsics.double()).T @ camera[:3, :3].double().T
    down = rays[..., 2] < -1e-6
    reach = torch.where(down, -camera[2, 3].double() / torch.where(down, rays[..., 2], -1.0), 0.0)
    colours = painted(camera[:3, 3].double() + reach[..., None] * rays)
    return torch.where(down[..., None], colours, 0.0).permute(2, 0, 1).float()


def seeing(yaws: tuple[float, ...], batch: int = 1, focal: float = 40.0) -> Cameras:
    intrinsics = pinhole(focal, HEIGHT, WIDTH)
    tilt = torch.eye(4)
    angle = -0.35  # the optical axis below the horizon
    tilt[1:3, 1:3] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    poses = [pose(yaw, (0.2, 0.1 * i, 1.6)) @ tilt for i, yaw in enumerate(yaws)]
    pictures = torch.stack([picture(intrinsics, place) for place in poses])
    count = len(yaws)
    return Cameras(
        pictures.expand(batch, -1, -1, -1, -1).clone(), intrinsics.expand(batch, count, 3, 3).clone(),
        torch.stack(poses).expand(batch, -1, 4, 4).clone(), torch.ones(batch, count, dtype=torch.bool),
        (HEIGHT, WIDTH),
    )  # fmt: skip


def transparent() -> GroundView:
    """A view whose features are the pictures themselves, at half their size."""
    view = GroundView(camera_dim=3, width=3)
    with torch.no_grad():
        view.stem.weight.zero_()
        view.stem.bias.fill_(2.0)  # what a pixel of 0 becomes is -2, and the ReLU wants it positive
        for channel in range(3):
            view.stem.weight[channel, channel, 1:3, 1:3] = 0.25
    return view


def colours(map_: Tensor) -> Tensor:
    """The colours of a map of :func:`transparent`: (B, X, Y, 3)."""
    return (map_.permute(0, 2, 3, 1) - 2.0) / 4.0 + 0.5


@pytest.mark.parametrize("yaws", [(0.0,), (0.5,), (0.7, -0.7)])
def test_what_is_painted_on_the_ground_is_where_it_is(yaws: tuple[float, ...]) -> None:
    cameras, view = seeing(yaws), transparent()
    seen = view.places(cameras, GRID)[1].any(dim=1).view(1, *GRID.shape)
    expected = painted(ground(GRID)).view(1, *GRID.shape, 3)
    places, inside = view.places(cameras, GRID)
    # A pixel from the picture's edge the convolution sees the padding.
    inner = (inside & (places.abs() < 0.95).all(dim=-1)).any(dim=1) & ~(inside & (places.abs() >= 0.95).any(-1)).any(1)
    inner = inner.view_as(seen)
    assert inner.sum() > 30
    found = colours(view(cameras, GRID))
    torch.testing.assert_close(found[inner], expected[inner], atol=0.02, rtol=0)
    assert not view(cameras, GRID).permute(0, 2, 3, 1)[~seen].any(), "what no camera sees is 0"


@settings(deadline=None, max_examples=30)
@given(yaw=st.floats(-3, 3), focal=st.floats(20, 80), row=st.integers(0, 11), column=st.integers(0, 11))
def test_places_are_those_of_the_pinhole_equation(yaw: float, focal: float, row: int, column: int) -> None:
    cameras = seeing((yaw,), focal=focal)
    place, seen = (part[0, 0, row * 12 + column] for part in transparent().places(cameras, GRID))
    point = torch.tensor([row + 0.5, column + 0.5 - 6.0, 0.0, 1.0], dtype=torch.float64)
    inside = torch.linalg.inv(cameras.camera_to_ego[0, 0].double()) @ point
    u, v, depth = cameras.intrinsics[0, 0].double() @ inside[:3]
    visible = depth > 0.3 and -0.5 < u / depth < WIDTH - 0.5 and -0.5 < v / depth < HEIGHT - 0.5
    edge = depth < 0.31 or min((u / depth + 0.5).abs(), (u / depth - WIDTH + 0.5).abs(), (v / depth + 0.5).abs(),
                               (v / depth - HEIGHT + 0.5).abs()) < 1e-2  # fmt: skip
    if not edge:
        assert bool(seen) == bool(visible)
        if visible:
            expected = torch.stack([(u / depth + 0.5) / WIDTH * 2 - 1, (v / depth + 0.5) / HEIGHT * 2 - 1])
            torch.testing.assert_close(place.double(), expected, atol=1e-4, rtol=0)


def test_a_missing_camera_has_no_influence_and_others_see_as_alone() -> None:
    cameras, view = seeing((0.6, -0.6), batch=2), GroundView(camera_dim=3, width=4)
    cameras.mask[1, 0] = False
    cameras.features[1, 0], cameras.intrinsics[1, 0], cameras.camera_to_ego[1, 0] = NAN, NAN, NAN
    found = view(cameras, GRID)
    alone = view(Cameras(*(part[:, 1:] for part in cameras[:4]), cameras.size), GRID)
    torch.testing.assert_close(found[1], alone[1])
    torch.testing.assert_close(found[0], view(seeing((0.6, -0.6)), GRID)[0])
    gradient = torch.autograd.grad(found.square().sum(), view.stem.weight)[0]
    assert gradient.isfinite().all()
    cameras.mask[:] = False
    assert not view(cameras, GRID).any(), "the map of what is missing is 0: its embedding is added"


def test_it_is_a_source_of_the_birds_eye_view() -> None:
    config = BEVConfig(grid=GRID, width=6, patch=4, output_dim=10, cameras="ground")
    torch.manual_seed(0)
    encoder = BEVEncoder(config, camera_dim=3).eval()
    cameras = seeing((0.0, 0.8), batch=2)
    before = encoder(cameras).values
    cameras.features[1] = 1 - cameras.features[1]
    after = encoder(cameras).values
    torch.testing.assert_close(before[0], after[0])
    assert before.shape == (2, 9, 10) and (before[1] - after[1]).abs().max() > 1e-3
