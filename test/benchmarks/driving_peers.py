"""Plain PyTorch for the suite ``driving``: the arithmetic of the package's parts, written the short way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from test.benchmarks.model_peers import normed_mlp, scatter


def narrowed(config: Any) -> Any:
    """A BEV configuration as :class:`test.benchmarks.model_peers.LiftSplat` reads it, of one source's width."""
    return SimpleNamespace(grid=config.grid, depth_m=config.depth_m, depth_bins=config.depth_bins,
                           width=config.source_width or config.width)  # fmt: skip


class GroundView(nn.Module):
    """Every cell looked up in every picture; those that show it are averaged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=2, padding=1)

    def forward(self, pictures: Tensor, intrinsics: Tensor, poses: Tensor, grid: Any) -> Tensor:
        """``pictures`` (B, K, 3, H, W) and their geometry; the map (B, width, X, Y)."""
        batch, count, _, height, width = pictures.shape
        x = grid.x_m[0] + (torch.arange(grid.shape[0]) + 0.5) * grid.resolution_m
        y = grid.y_m[0] + (torch.arange(grid.shape[1]) + 0.5) * grid.resolution_m
        x, y = torch.meshgrid(x, y, indexing="ij")
        cells = torch.stack([x, y, torch.zeros_like(x), torch.ones_like(x)]).flatten(1)  # (4, N)
        pixels = intrinsics @ (torch.linalg.inv(poses) @ cells)[:, :, :3]  # (B, K, 3, N)
        depth = pixels[:, :, 2]
        places = (pixels[:, :, :2] / depth[:, :, None] + 0.5) * 2 / torch.tensor([[width], [height]]) - 1
        seen = (depth > 0.3) & (places.abs() < 1).all(dim=2)  # (B, K, N)
        features = self.stem((pictures.flatten(0, 1) - 0.5) * 4).relu()
        found = F.grid_sample(features, places.mT.flatten(0, 1)[:, :, None].nan_to_num(), align_corners=False)
        found = torch.where(seen.flatten(0, 1)[:, None], found[..., 0], 0.0).unflatten(0, (batch, count))
        mean = found.sum(dim=1) / seen.sum(dim=1).clamp(min=1)[:, None]
        return mean.unflatten(2, grid.shape)


class Pillars(nn.Module):
    """All points through the MLP, wherever they are; what is beyond the grid is left out at the end."""

    def __init__(self, columns: int, width: int) -> None:
        super().__init__()
        self.mlp = normed_mlp(columns + 3, width, width)

    def forward(self, cloud: Tensor, pose: Tensor, grid: Any) -> Tensor:
        """``cloud`` (B, N, C), x, y and z first; ``pose`` (4, 4). The map (B, width, X, Y)."""
        places = cloud[..., :3] @ pose[:3, :3].T + pose[:3, 3]
        low = places.new_tensor([grid.x_m[0], grid.y_m[0]])
        cell = ((places[..., :2] - low) / grid.resolution_m).floor()
        ones = torch.ones_like(places[..., :1])
        total = scatter(torch.cat([places, ones], dim=-1), places, grid, "sum").flatten(2)  # (B, 4, X Y)
        index = (cell[..., 0] * grid.shape[1] + cell[..., 1]).clamp(0, grid.shape[0] * grid.shape[1] - 1).long()
        found = total.gather(2, index[:, None].expand(-1, 4, -1)).transpose(1, 2)
        mean = found[..., :3] / found[..., 3:].clamp(min=1)
        centre = low + (cell + 0.5) * grid.resolution_m
        described = torch.cat([places[..., :2] - centre, places - mean, places[..., 2:], cloud[..., 3:]], dim=-1)
        return scatter(self.mlp(described), places, grid, "max")
