"""Point clouds to tokens: PointNet++ (Qi et al. 2017, "PointNet++: Deep Hierarchical Feature Learning on Point Sets").

Shapes: B batch, N points, S centroids, K neighbors, C columns, D features.

The order of the points never matters, not even in ties: points are first put into an order of their own
(:func:`canonical_order`), of which everything after it is a function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError
from vla_core.model.checks import at_least_one
from vla_core.model.graph import in_graph
from vla_core.model.sensor.base import SENSOR_REGISTRY, SensorEncoder, masked_max, point_set, shared_mlp
from vla_core.model.tokens import Tokens

# Pairs whose distances the ball query holds at a time, 12 bytes each: what a cache keeps, or what fills a GPU.
CPU_PAIRS, GPU_PAIRS = 1 << 18, 1 << 24
INDEX_BITS = 32


@dataclass(frozen=True, kw_only=True)
class SetAbstractionConfig:
    """One level: ``points`` centroids, each with up to ``neighbors`` points within ``radius_m``, through ``widths``."""

    points: int
    radius_m: float
    neighbors: int
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        at_least_one(self, "points", "neighbors", "widths")
        if not self.radius_m > 0:
            raise ConfigError(f"radius_m: expected a positive length, found {self.radius_m}")


@dataclass(frozen=True, kw_only=True)
class PointCloudConfig:
    """Sizes of :class:`PointCloudEncoder`; the widths are the paper's, the radii suit a vehicle.

    ``output``: ``global`` is one token, ``centroids`` one for each centroid of the last level, ``both`` the global one
    and then the others. ``extent_m`` is the length that is 1 to the network where it is told places.
    """

    type: Literal["point_cloud"] = "point_cloud"
    levels: tuple[SetAbstractionConfig, ...] = (
        SetAbstractionConfig(points=512, radius_m=1.0, neighbors=32, widths=(64, 64, 128)),
        SetAbstractionConfig(points=128, radius_m=4.0, neighbors=64, widths=(128, 128, 256)),
    )
    global_widths: tuple[int, ...] = (256, 512, 1024)
    output: Literal["global", "centroids", "both"] = "global"
    output_dim: int = 512
    extent_m: float = 50.0

    def __post_init__(self) -> None:
        at_least_one(self, "global_widths", "output_dim")
        if not self.levels:
            raise ConfigError("levels: expected at least one, found none")
        if not self.extent_m > 0:
            raise ConfigError(f"extent_m: expected a positive length, found {self.extent_m}")

    def fake(self, batch: int, *, input_dim: int = 4, points: int = 256) -> tuple[Tensor, Tensor]:
        """Values and mask that :class:`PointCloudEncoder` takes."""
        return torch.randn(batch, points, input_dim) * self.extent_m / 2, torch.ones(batch, points, dtype=torch.bool)


def canonical_order(values: Tensor, mask: Tensor) -> Tensor:
    """Index (B, N) that sorts points (B, N, C) by their columns, the first one first, and puts the absent ones last.

    Equal for every permutation of the points, up to points that are equal in all columns.
    """
    order = torch.arange(values.shape[1], device=values.device).expand(mask.shape)
    keys = [(~mask).int(), *values.unbind(-1)]
    for key in reversed(keys):  # stable sorts from the least to the most significant key
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, ...) of ``values`` (B, N, D): (B, ..., D)."""
    flat = index.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).view(*index.shape, values.shape[-1])


@torch.no_grad()
def farthest_points(xyz: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Farthest-point sampling: each centroid is the point farthest from all before it, the first in case of ties.

    Begins with the first point that is there. Ends when every place is taken, because there are fewer points than
    ``count``, or because the rest are copies of points: what follows is masked.

    Args:
        xyz: (B, N, 3) float32 in m, finite; N at least 1.
        mask: (B, N) bool.

    Returns:
        Indices (B, count) int64 and which of them are centroids (B, count) bool.
    """
    axes = xyz.permute(2, 0, 1).contiguous()  # (3, B, N)
    nearest = torch.where(mask, float("inf"), -1.0)  # squared distance to the nearest centroid so far
    offset, square = torch.empty_like(axes), torch.empty_like(nearest)
    chosen, distance = [], []
    for _ in range(count):
        last = nearest.argmax(dim=1, keepdim=True)  # the first of several
        chosen.append(last)
        distance.append(nearest.gather(1, last))
        torch.sub(axes, axes.gather(2, last.expand(3, -1, -1)), out=offset)
        torch.mul(offset[0], offset[0], out=square)
        square.addcmul_(offset[1], offset[1]).addcmul_(offset[2], offset[2])
        torch.minimum(nearest, square, out=nearest)
    return torch.cat(chosen, dim=1), torch.cat(distance, dim=1) > 0


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Between all points of ``a`` (B, S, 3) and ``b`` (B, N, 3): (B, S, N)."""
    if in_graph():  # which has no such operator
        return sum(((a[:, :, None, i] - b[:, None, :, i]).square() for i in range(3)), torch.zeros(())).sqrt()
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def ball_query(
    xyz: Tensor, mask: Tensor, centers: Tensor, *, radius: float, neighbors: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ``neighbors`` points nearest to each center that lie within ``radius``, the first in case of ties.

    The paper leaves open which points a full ball keeps; the nearest ones do not depend on their order.

    Args:
        xyz: (B, N, 3) float32 in m, finite; N at least 1.
        mask: (B, N) bool.
        centers: (B, S, 3).

    Returns:
        Indices (B, S, K) int64, nearest first, and which of them are neighbors (B, S, K) bool; K is at most N.
    """
    count = min(neighbors, xyz.shape[1])
    number = torch.arange(xyz.shape[1], device=xyz.device)
    pairs = CPU_PAIRS if xyz.device.type == "cpu" else GPU_PAIRS
    rows = centers.shape[1] if in_graph() else max(1, pairs // (len(xyz) * xyz.shape[1]))
    parts = []
    for some in centers.split(rows, dim=1):
        distance = distances(some, xyz)  # (B, rows, N)
        distance = distance.masked_fill_(~mask[:, None], float("inf"))
        if in_graph():  # graphs take the first of several by themselves, and know nothing of bits
            near = distance.topk(count, dim=-1, largest=False)
            return near.indices, near.values <= radius
        # The bits of a float that is not negative grow with it; with the index below them no two keys are equal.
        key = distance.view(torch.int32).long().bitwise_left_shift_(INDEX_BITS).bitwise_or_(number)
        parts.append(key.topk(count, dim=-1, largest=False).values)
    key = torch.cat(parts, dim=1)
    distance = (key >> INDEX_BITS).int().view(torch.float32)
    return key & ((1 << INDEX_BITS) - 1), distance <= radius


class PointNetSetAbstraction(nn.Module):
    """Sample centroids, group their neighbors, and describe each group by a PointNet: a shared MLP and a maximum."""

    def __init__(self, config: SetAbstractionConfig, *, feature_dim: int) -> None:
        super().__init__()
        self.config = config
        self.mlp = shared_mlp(3 + feature_dim, config.widths)

    def forward(self, xyz: Tensor, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``xyz`` (B, N, 3), ``features`` (B, N, D) and ``mask`` (B, N) of the centroids, (B, S, ...) each.

        Offsets from the centroid are divided by the radius (Qian et al. 2022, "PointNeXt").
        """
        config = self.config
        index, found = farthest_points(xyz, mask, config.points)
        centers = gather_rows(xyz, index)  # (B, S, 3)
        near, grouped = ball_query(xyz, mask, centers, radius=config.radius_m, neighbors=config.neighbors)
        offsets = (gather_rows(xyz, near) - centers[:, :, None]) / config.radius_m  # (B, S, K, 3)
        groups = torch.cat([offsets.to(features.dtype), gather_rows(features, near)], dim=-1)
        return centers, masked_max(self.mlp(groups), grouped), found


class PointCloudEncoder(SensorEncoder):
    """PointNet++: a cloud (B, N, input_dim) with mask (B, N) to tokens.

    The columns are x, y, z in m, then others such as intensity, which are features and had better be near 1 in size.
    """

    Config = PointCloudConfig

    def __init__(self, config: PointCloudConfig, *, input_dim: int = 4) -> None:
        super().__init__()
        if input_dim < 3:
            raise VlaError(f"a point cloud of {input_dim} columns; expected x, y, z and what else there is")
        self.config = config
        self.input_dim = input_dim
        self.output_dim = config.output_dim
        self.levels = nn.ModuleList()
        width = input_dim - 3
        for level in config.levels:
            self.levels.append(PointNetSetAbstraction(level, feature_dim=width))
            width = level.widths[-1]
        if config.output != "centroids":
            self.overall = shared_mlp(3 + width, config.global_widths)
            self.fc = nn.Linear(config.global_widths[-1], config.output_dim)
        if config.output != "global":
            self.token = nn.Linear(3 + width, config.output_dim)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tokens:
        if values.shape[-1] != self.input_dim:
            raise VlaError(f"a point cloud of {values.shape[-1]} columns; this encoder was made for {self.input_dim}")
        values, mask = point_set(values.float(), mask)
        order = canonical_order(values, mask)
        values, mask = gather_rows(values, order), mask.gather(1, order)
        xyz, features = values[..., :3].contiguous(), values[..., 3:].to(self.dtype)
        for level in self.levels:
            xyz, features, mask = level(xyz, features, mask)
        return self._tokens(torch.cat([(xyz / self.config.extent_m).to(self.dtype), features], dim=-1), mask)

    def _tokens(self, described: Tensor, mask: Tensor) -> Tokens:
        """``described`` (B, S, 3 + D): place and features of the last centroids."""
        parts: list[Tensor] = []
        masks: list[Tensor] = []
        if self.config.output != "centroids":
            parts.append(self.fc(masked_max(self.overall(described), mask))[:, None])
            masks.append(mask.any(dim=1, keepdim=True))
        if self.config.output != "global":
            parts.append(self.token(described))
            masks.append(mask)
        return Tokens(torch.cat(parts, dim=1), torch.cat(masks, dim=1))


SENSOR_REGISTRY["point_cloud"] = PointCloudEncoder
