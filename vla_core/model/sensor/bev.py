"""Bird's eye view: cameras lifted with their geometry, LiDAR and radar splatted, all on one grid around the robot.

The ego frame is REP 103's: x forward, y left, z up, in m. A map is (B, D, X, Y): row i covers x from x_min + i r,
column j covers y from y_min + j r, r the resolution. A camera's frame is an optical one: x right, y down, z forward.

Shapes: B batch, K cameras, (h, w) cells of a camera's feature map, Z depth bins, N points, C columns, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.checks import at_least_one
from vla_core.model.graph import in_graph
from vla_core.model.sensor.base import point_set, shared_mlp
from vla_core.model.sensor.bev_tower import Tower, conv_layer
from vla_core.model.sensor.ground_view import GroundView
from vla_core.model.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The grid of a map, in m of the ego frame. Points outside ``z_m`` are not on it, such as roofs and bridges."""

    x_m: tuple[float, float] = (-51.2, 51.2)
    y_m: tuple[float, float] = (-51.2, 51.2)
    z_m: tuple[float, float] = (-5.0, 3.0)
    resolution_m: float = 0.8

    def __post_init__(self) -> None:
        if not self.resolution_m > 0:
            raise ConfigError(f"resolution_m: expected a positive length, found {self.resolution_m}")
        for name in ("x_m", "y_m", "z_m"):
            low, high = getattr(self, name)
            if not low < high:
                raise ConfigError(f"{name}: expected a lower and then a higher end, found {low} and {high}")
            cells = (high - low) / self.resolution_m
            if name != "z_m" and abs(cells - round(cells)) > 1e-6 * cells:
                raise ConfigError(f"{name}: expected whole cells of {self.resolution_m} m, found {cells:.6g} of them")

    @property
    def shape(self) -> tuple[int, int]:
        """Cells along x and along y."""
        return tuple(round((high - low) / self.resolution_m) for low, high in (self.x_m, self.y_m))  # type: ignore[return-value]


class Cells(NamedTuple):
    """Where points (...) are: ``number`` x * Y + y of the cell, int64, which counts where ``inside`` is True."""

    number: Tensor
    inside: Tensor


def locate(places: Tensor, mask: Tensor, grid: GridConfig) -> Cells:
    """The cells of ``places`` (..., 3), or (..., 2) where the height is unknown, of which ``mask`` (...) are there.

    A cell has its lower edges; the upper ones are the next cell's.
    """
    lows = places.new_tensor((grid.x_m[0], grid.y_m[0]))
    cell = ((places[..., :2] - lows) / grid.resolution_m).floor()
    x, y = cell.unbind(-1)
    inside = mask & (x >= 0) & (x < grid.shape[0]) & (y >= 0) & (y < grid.shape[1])
    if places.shape[-1] == 3:
        inside = inside & (places[..., 2] >= grid.z_m[0]) & (places[..., 2] < grid.z_m[1])
    return Cells(torch.where(inside, x * grid.shape[1] + y, 0.0).long(), inside)


def splat(values: Tensor, cells: Cells, count: int, reduce: Literal["sum", "mean", "max"] = "sum") -> Tensor:
    """The sum, mean or maximum (B, count, D) of ``values`` (B, N, D) by cell; 0 where there is no point.

    Sums are float32 whatever ``values`` are: a cell may hold thousands of points.
    """
    batch, _, width = values.shape
    index = _rows(cells, count)
    total = _by_row(values.float().flatten(0, 1), index.flatten(), batch * (count + 1), reduce)
    return total.view(batch, count + 1, width)[:, :count].to(values.dtype)


def _by_row(values: Tensor, index: Tensor, rows: int, reduce: Literal["sum", "mean", "max"]) -> Tensor:
    """The sum, mean or maximum (rows, D) of ``values`` (M, D) of the same ``index`` (M,); 0 where there is none."""
    total = values.new_zeros(rows, values.shape[1])
    if reduce == "max":
        return total.scatter_reduce(0, index[:, None].expand_as(values), values, "amax", include_self=False)
    total = total.index_add(0, index, values)
    if reduce == "mean":
        points = values.new_zeros(rows).index_add(0, index, torch.ones_like(values[:, 0]))
        total = total / points.clamp(min=1)[:, None]
    return total


def splat_rays(shares: Tensor, context: Tensor, cells: Cells, count: int) -> Tensor:
    """The sum (B, count, D) by cell of pixels' ``context`` (B, P, D) times their ``shares`` (B, Z, P) at each depth.

    ``cells`` are (B, Z, P). One depth at a time: the products of all of them never exist together.
    """
    batch, _, width = context.shape
    index = _rows(cells, count)
    total = context.new_zeros(batch * (count + 1), width, dtype=torch.float32)
    for z in range(shares.shape[1]):
        total.index_add_(0, index[:, z].flatten(), (shares[:, z, :, None] * context).float().flatten(0, 1))
    return total.view(batch, count + 1, width)[:, :count].to(context.dtype)


def _rows(cells: Cells, count: int) -> Tensor:
    """Rows of ``count`` cells a sample and one more behind them, which takes what is outside and is then left out."""
    number = torch.where(cells.inside, cells.number, count)
    first = torch.arange(len(number), device=number.device) * (count + 1)
    return number + first.view(-1, *(1,) * (number.dim() - 1))


def transform(points: Tensor, pose: Tensor) -> Tensor:
    """Points (B, N, 3) of a child frame in its parent frame, by ``pose`` (B, 4, 4)."""
    with full_precision(points):
        return points @ pose[:, :3, :3].mT + pose[:, None, :3, 3]


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context without mixed precision, for geometry: 60 m in bfloat16 are 60 m give or take 0.25."""
    kind = tensor.device.type
    if in_graph():  # nothing is mixed in it
        return nullcontext()
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class Cameras(NamedTuple):
    """What is known of K cameras.

    ``features`` (B, K, C, h, w), maps of the whole pictures; ``intrinsics`` (B, K, 3, 3) of the undistorted pictures
    of ``size`` (height, width) pixels, whose centres have whole coordinates; ``camera_to_ego`` (B, K, 4, 4), the pose
    of the optical frame; ``mask`` (B, K) bool, False where a camera is missing. Geometry is float32.
    """

    features: Tensor
    intrinsics: Tensor
    camera_to_ego: Tensor
    mask: Tensor
    size: tuple[int, int]


class PointSet(NamedTuple):
    """``values`` (B, N, C), x, y and perhaps z first, with ``mask`` (B, N), in a sensor's frame; the pose (B, 4, 4)."""

    values: Tensor
    mask: Tensor
    sensor_to_ego: Tensor


def pixel_rays(intrinsics: Tensor, cells: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Points (..., h w, 3) at depth 1 m in the optical frame, at the centres of the cells of a map of the picture.

    Args:
        intrinsics: (..., 3, 3) of a picture of ``size`` (height, width).
        cells: (h, w) of the map; a cell spans size / cells pixels, and pixel u covers u - 1/2 to u + 1/2.
    """
    axes = [
        (torch.arange(n, device=intrinsics.device, dtype=intrinsics.dtype) + 0.5) * (pixels / n) - 0.5
        for n, pixels in zip(cells, size, strict=True)
    ]
    v, u = torch.meshgrid(*axes, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).flatten(0, 1)  # (h w, 3)
    return pixels @ inverse(intrinsics).mT


def inverse(matrices: Tensor) -> Tensor:
    """The inverses of ``matrices`` (..., 3, 3); in a graph, which has no such operator, by cofactors."""
    if not in_graph():
        return torch.linalg.inv(matrices)
    a, b, c = matrices.unbind(-2)  # rows
    cofactors = torch.stack([_cross(b, c), _cross(c, a), _cross(a, b)], dim=-1)  # columns
    return cofactors / (a * cofactors[..., 0]).sum(dim=-1)[..., None, None]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., [1, 2, 0]] * b[..., [2, 0, 1]] - a[..., [2, 0, 1]] * b[..., [1, 2, 0]]


class LiftSplat(nn.Module):
    """Lift, splat (Philion and Fidler 2020): each pixel's features, spread over its ray by a predicted depth."""

    def __init__(self, *, camera_dim: int, width: int, depth_m: tuple[float, float], depth_bins: int) -> None:
        super().__init__()
        self.width, self.depth_m, self.depth_bins = width, depth_m, depth_bins
        self.depth_and_context = nn.Conv2d(camera_dim, depth_bins + width, 1)

    def forward(self, cameras: Cameras, grid: GridConfig) -> Tensor:
        """The map (B, width, X, Y)."""
        features = torch.where(cameras.mask[..., None, None, None], cameras.features, 0.0)
        out = self.depth_and_context(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        depth, context = out.flatten(3).split([self.depth_bins, self.width], dim=2)  # (B, K, Z, h w), (B, K, D, h w)
        shares = depth.softmax(dim=2).transpose(1, 2).flatten(2)  # (B, Z, K h w)
        places = context.permute(0, 1, 3, 2).flatten(1, 2)  # (B, K h w, D)
        count = grid.shape[0] * grid.shape[1]
        return _as_map(splat_rays(shares, places, self.cells(cameras, grid), count), grid)

    def cells(self, cameras: Cameras, grid: GridConfig) -> Cells:
        """The cells (B, Z, K h w) of all pixels at all depths."""
        known = cameras.mask[..., None, None]
        eye = torch.eye(4, device=known.device)
        # Of a missing camera the geometry may be anything.
        intrinsics = torch.where(known, cameras.intrinsics.float(), eye[:3, :3])
        poses = torch.where(known, cameras.camera_to_ego.float(), eye)
        height, width = cameras.features.shape[-2:]
        with full_precision(eye):
            rays = pixel_rays(intrinsics, (height, width), cameras.size) @ poses[..., :3, :3].mT  # (B, K, h w, 3)
        centers = poses[..., None, :3, 3].expand_as(rays).flatten(1, 2)  # (B, K h w, 3)
        depths = self.depths(rays.device)[:, None, None]
        points = centers[:, None] + depths * rays.flatten(1, 2)[:, None]  # (B, Z, K h w, 3)
        mask = cameras.mask.repeat_interleave(height * width, dim=1)[:, None]
        return locate(points, mask, grid)

    def depths(self, device: torch.device | str = "cpu") -> Tensor:
        """The middles (Z,) of the bins, m along the optical axis; float32 whatever the type of the weights."""
        edges = torch.linspace(*self.depth_m, self.depth_bins + 1, device=device, dtype=torch.float32)
        return (edges[1:] + edges[:-1]) / 2


@dataclass(frozen=True, kw_only=True)
class CloudColumns:
    """A point cloud that is splatted: how many columns it has, and whether its third one is a height."""

    columns: int
    has_height: bool = True

    def __post_init__(self) -> None:
        if self.columns < self.axes:
            raise ConfigError(f"columns: expected at least the {self.axes} coordinates, found {self.columns}")

    @property
    def axes(self) -> int:
        """How many of the columns are coordinates."""
        return 3 if self.has_height else 2


class Pillars(nn.Module):
    """Points of one cell, its pillar, through a shared MLP and a maximum or a mean (Lang et al. 2019, "PointPillars").

    A point's features are its offsets from the cell's centre and from the mean of its pillar, in m of the ego frame,
    its height, and its other columns as they are.
    """

    def __init__(self, cloud: CloudColumns, *, width: int, reduce: Literal["mean", "max"]) -> None:
        super().__init__()
        self.cloud = cloud
        self.reduce: Literal["mean", "max"] = reduce
        self.mlp = shared_mlp(cloud.columns + cloud.axes, (width, width))

    def forward(self, points: PointSet | Sequence[PointSet], grid: GridConfig) -> Tensor:
        """The map (B, width, X, Y) of one sensor's points, or of those of several together."""
        sets = [points] if isinstance(points, PointSet) else points
        found = [self._placed(each) for each in sets]
        values, mask, places = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        cells, count = locate(places, mask, grid), grid.shape[0] * grid.shape[1]
        rows = _rows(cells, count).flatten()
        # Most points of a sweep may lie beyond the grid, or be padding: only the others are described.
        kept = slice(None) if in_graph() else cells.inside.flatten().nonzero()[:, 0]
        rows, places, values = rows[kept], places.flatten(0, 1)[kept], values.flatten(0, 1)[kept]
        total = len(mask) * (count + 1)
        mean = _by_row(places, rows, total, "mean")[rows]
        number = rows % (count + 1)
        x = number // grid.shape[1] * grid.resolution_m + (grid.x_m[0] + grid.resolution_m / 2)
        y = number % grid.shape[1] * grid.resolution_m + (grid.y_m[0] + grid.resolution_m / 2)
        offset = places[:, :2] - torch.stack([x, y], dim=-1)
        described = torch.cat([offset, places - mean, places[:, 2:], values[:, self.cloud.axes :]], dim=-1)
        features = self.mlp(described.to(next(self.parameters()).dtype))  # (M, width)
        flat = _by_row(features.float(), rows, total, self.reduce).view(len(mask), count + 1, -1)[:, :count]
        return _as_map(flat.to(features.dtype), grid)

    def _placed(self, points: PointSet) -> tuple[Tensor, Tensor, Tensor]:
        """Values, their mask, and where they are: (B, N, 3), or (B, N, 2) of points at the sensor's own height."""
        if points.values.shape[-1] != self.cloud.columns:
            raise VlaError(f"points of {points.values.shape[-1]} columns; this map was made for {self.cloud.columns}")
        values, mask = point_set(points.values.float(), points.mask)
        sensor_to_ego = points.sensor_to_ego.float()
        if self.cloud.has_height:
            return values, mask, transform(values[..., :3], sensor_to_ego)
        level = torch.cat([values[..., :2], torch.zeros_like(values[..., :1])], dim=-1)
        return values, mask, transform(level, sensor_to_ego)[..., :2]


def _as_map(flat: Tensor, grid: GridConfig) -> Tensor:
    """(B, cells, D) as (B, D, X, Y): channels last in memory, which convolutions like."""
    return flat.transpose(1, 2).unflatten(2, grid.shape)


@dataclass(frozen=True, kw_only=True)
class BEVConfig:
    """Sizes of :class:`BEVEncoder`.

    ``cameras``: ``lift`` spreads their features over a predicted depth (:class:`LiftSplat`), ``ground`` takes the
    pictures where the cells' ground is in them (:class:`GroundView`);
    ``depth_m`` from the nearest to the farthest, along the optical axis; ``reduce`` is how points of a cell become one;
    ``source_width`` are the channels of each source's map, null: ``width``, which the ``mix_layers`` convolutions of
    all of them have. ``stages`` are the widths of further stages, each of which halves the map (:class:`Tower`).

    ``output``: ``patches`` are tokens that cover ``patch`` x ``patch`` cells of what then is the map; ``global`` are
    ``global_tokens`` that see all of it and where everything is; ``both`` the global ones and then the others.
    """

    type: Literal["bev"] = "bev"
    grid: GridConfig = field(default_factory=GridConfig)
    width: int = 64
    cameras: Literal["lift", "ground"] = "lift"
    depth_m: tuple[float, float] = (1.0, 60.0)
    depth_bins: int = 59
    reduce: Literal["mean", "max"] = "max"
    source_width: int | None = None
    mix_layers: int = 2
    stages: tuple[int, ...] = ()
    output: Literal["patches", "global", "both"] = "patches"
    patch: int = 16
    global_tokens: int = 1
    output_dim: int = 256

    def __post_init__(self) -> None:
        at_least_one(self, "width", "depth_bins", "mix_layers", "patch", "global_tokens", "output_dim")
        if self.stages:
            at_least_one(self, "stages")
        if self.source_width is not None:
            at_least_one(self, "source_width")
        if not 0 < self.depth_m[0] < self.depth_m[1]:
            raise ConfigError(
                f"depth_m: expected a near and a far depth, found {self.depth_m[0]} and {self.depth_m[1]}"
            )
        if any(cells % 2 ** len(self.stages) for cells in self.grid.shape):
            raise ConfigError(f"stages: {len(self.stages)} of them halve the grid's cells {self.grid.shape}, which "
                              f"must be multiples of {2 ** len(self.stages)}")  # fmt: skip
        if self.output != "global" and any(cells % self.patch for cells in self.shape):
            raise ConfigError(f"patch: expected a divisor of the map's cells {self.shape}, found {self.patch}")

    @property
    def shape(self) -> tuple[int, int]:
        """Cells of the map after the last stage, along x and along y."""
        x, y = (cells // 2 ** len(self.stages) for cells in self.grid.shape)
        return x, y

    @property
    def last_width(self) -> int:
        """Channels of the map after the last stage."""
        return self.stages[-1] if self.stages else self.width


class BEVEncoder(nn.Module):
    """Cameras and clouds to one map of the surroundings, and its patches as tokens.

    A source of several sensors' points, such as radars all round, has one map of all of them. Where a source is
    missing, its map is an embedding that is learned for it; with no source there, all tokens are masked.
    """

    Config = BEVConfig

    def __init__(
        self,
        config: BEVConfig,
        *,
        camera_dim: int | None = None,
        clouds: Mapping[str, CloudColumns] | None = None,
        condition_dim: int | None = None,
    ) -> None:
        """``camera_dim`` are the channels of the cameras' feature maps, None without cameras; ``clouds`` by name.

        With ``condition_dim`` the stages are modulated by a condition, such as an instruction.
        """
        super().__init__()
        clouds = dict(clouds or {})
        if camera_dim is None and not clouds:
            raise VlaError("a bird's eye view of nothing; expected cameras or clouds")
        if condition_dim is not None and not config.stages:
            raise VlaError("a bird's eye view without stages has nothing that a condition could modulate")
        self.config = config
        self.output_dim = config.output_dim
        self.names = (*(() if camera_dim is None else ("cameras",)), *clouds)
        source = config.source_width or config.width
        if camera_dim is not None and config.cameras == "ground":
            self.ground_view = GroundView(camera_dim=camera_dim, width=source)
        elif camera_dim is not None:
            self.lift_splat = LiftSplat(
                camera_dim=camera_dim, width=source, depth_m=config.depth_m, depth_bins=config.depth_bins
            )
        self.pillars = nn.ModuleDict(
            {name: Pillars(cloud, width=source, reduce=config.reduce) for name, cloud in clouds.items()}
        )
        self.absent = nn.Parameter(torch.zeros(len(self.names), source))
        widths = (len(self.names) * source, *(config.width,) * config.mix_layers)
        self.mix = nn.Sequential(*(part for pair in pairwise(widths) for part in conv_layer(*pair)))
        self.tower = Tower(config.width, config.stages, condition_dim)
        cells = config.shape[0] * config.shape[1]
        if config.output != "patches":
            self.whole = nn.Linear(config.last_width * cells, config.global_tokens * config.output_dim)
        if config.output != "global":
            self.tokens = nn.Conv2d(config.last_width, config.output_dim, config.patch, stride=config.patch)
            self.place = nn.Parameter(0.02 * torch.randn(cells // config.patch**2, config.output_dim))

    def forward(
        self,
        cameras: Cameras | None = None,
        clouds: Mapping[str, PointSet | Sequence[PointSet]] | None = None,
        condition: Tensor | None = None,
    ) -> Tokens:
        """Tokens (B, N, output_dim), patches row by row; every source of the encoder must be given.

        ``condition`` is (B, condition_dim).
        """
        maps, there = self._sources(cameras, clouds or {})
        above = self.tower(self._mixed(maps, there), condition)
        parts = []
        if self.config.output != "patches":
            parts.append(self.whole(above.flatten(1)).unflatten(1, (self.config.global_tokens, -1)))
        if self.config.output != "global":
            parts.append(self.tokens(above).flatten(2).transpose(1, 2) + self.place)
        values = torch.cat(parts, dim=1)
        return Tokens(values, there.any(dim=1, keepdim=True).expand(values.shape[:2]))

    def map(
        self, cameras: Cameras | None = None, clouds: Mapping[str, PointSet | Sequence[PointSet]] | None = None
    ) -> Tensor:
        """The map (B, width, X, Y) that the stages and the tokens are made of."""
        return self._mixed(*self._sources(cameras, clouds or {}))

    def _sources(
        self, cameras: Cameras | None, clouds: Mapping[str, PointSet | Sequence[PointSet]]
    ) -> tuple[list[Tensor], Tensor]:
        """One map a source, and which of them are there (B, sources) bool."""
        given = {*(() if cameras is None else ("cameras",)), *clouds}
        if given != set(self.names):
            raise VlaError(f"a bird's eye view of {choices(given)}; this one was made of {choices(self.names)}")
        maps, there = [], []
        if cameras is not None:
            look = self.ground_view if self.config.cameras == "ground" else self.lift_splat
            maps.append(look(cameras, self.config.grid))
            there.append(cameras.mask.any(dim=1))
        for name, pillars in self.pillars.items():
            found = clouds[name]
            sets = [found] if isinstance(found, PointSet) else list(found)
            maps.append(pillars(sets, self.config.grid))
            there.append(torch.stack([points.mask.any(dim=1) for points in sets]).any(dim=0))
        return maps, torch.stack(there, dim=1)

    def _mixed(self, maps: list[Tensor], there: Tensor) -> Tensor:
        # The map of what is missing is 0, so that its embedding can be added.
        absent = torch.where(there[..., None], 0.0, self.absent).flatten(1)  # (B, sources width)
        mixed: Tensor = self.mix(torch.cat(maps, dim=1) + absent[..., None, None])
        return mixed
