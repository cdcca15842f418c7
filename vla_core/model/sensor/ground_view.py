"""The ground as cameras see it, seen from above: inverse perspective mapping (Mallot et al. 1991).

Where roads are flat, no depth need be predicted: every cell of the ground has its place in the pictures, and what is
painted on it is where it is. What stands on the ground begins at its foot and is smeared away from the camera.

Shapes: B batch, K cameras, C channels, (H, W) pixels, (h, w) half as many, N cells of the grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_core.model.graph import in_graph

if TYPE_CHECKING:
    from vla_core.model.sensor.bev import Cameras, GridConfig

NEAREST_M = 0.3  # in front of a camera; nearer, a picture shows nothing of the ground


class GroundView(nn.Module):
    """Pictures to a map: each cell has the features where its middle, on the ground, is in the pictures.

    The features are those of one convolution of stride 2, whose kernel of 4 keeps the pixels' centres in place. Where
    several cameras see a cell it has their mean, where none does 0.
    """

    def __init__(self, *, camera_dim: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(camera_dim, width, 4, stride=2, padding=1)

    def forward(self, cameras: Cameras, grid: GridConfig) -> Tensor:
        """The map (B, width, X, Y); ``cameras.features`` are the pictures (B, K, 3, H, W) themselves, in [0, 1]."""
        batch, count = cameras.mask.shape
        pictures = torch.where(cameras.mask[..., None, None, None], cameras.features, 0.0)
        pixels = ((pictures.flatten(0, 1) - 0.5) * 4.0).to(self.stem.weight.dtype)  # a standard deviation of about 1
        features = self.stem(pixels.contiguous(memory_format=torch.channels_last)).relu().unflatten(0, (batch, count))
        places, seen = self.places(cameras, grid)
        total = features.new_zeros(batch, features.shape[2], seen.shape[-1])
        for k in range(count):
            # Those of other cameras need no look into this one.
            cells = slice(None) if in_graph() else seen[:, k].any(dim=0).nonzero()[:, 0]
            found = F.grid_sample(features[:, k], places[:, k, cells, None].to(features.dtype), align_corners=False)
            found = torch.where(seen[:, k, None, cells], found[..., 0], 0.0)
            total = total + found if in_graph() else total.index_add(2, cells, found)
        mean = total / seen.sum(dim=1).clamp(min=1)[:, None].to(total.dtype)
        return mean.unflatten(2, grid.shape)

    @torch.no_grad()
    def places(self, cameras: Cameras, grid: GridConfig) -> tuple[Tensor, Tensor]:
        """Where the cells are in the pictures (B, K, N, 2), from -1 to 1 across and down, and in which (B, K, N)."""
        from vla_core.model.sensor.bev import full_precision

        known = cameras.mask[..., None, None]
        device = cameras.mask.device
        eye = torch.eye(4, device=device)
        intrinsics = torch.where(known, cameras.intrinsics.float(), eye[:3, :3])  # a missing camera's may be anything
        poses = torch.where(known, cameras.camera_to_ego.float(), eye)
        with full_precision(eye):
            turned = intrinsics @ poses[..., :3, :3].mT  # (B, K, 3, 3): ego frame to pixels times depth
            offset = -(turned @ poses[..., :3, 3:])  # (B, K, 3, 1)
            points = turned @ ground(grid, device).T + offset  # (B, K, 3, N)
        u, v, depth = points.unbind(2)
        ahead = depth > NEAREST_M
        depth = torch.where(ahead, depth, 1.0)
        height, width = cameras.size
        # The centre of pixel 0 is at 0, its edge at -1/2.
        across, down = ((value / depth + 0.5) * (2 / size) - 1 for value, size in ((u, width), (v, height)))
        seen = ahead & (across.abs() < 1) & (down.abs() < 1) & cameras.mask[..., None]
        return torch.stack([torch.where(seen, across, 0.0), torch.where(seen, down, 0.0)], dim=-1), seen


def ground(grid: GridConfig, device: torch.device | str = "cpu") -> Tensor:
    """The middles (N, 3) of the cells on the ground, m of the ego frame; row by row as maps are."""
    x, y = (
        low + grid.resolution_m * (torch.arange(cells, device=device, dtype=torch.float32) + 0.5)
        for low, cells in zip((grid.x_m[0], grid.y_m[0]), grid.shape, strict=True)
    )
    x, y = torch.meshgrid(x, y, indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)], dim=-1).flatten(0, 1)
