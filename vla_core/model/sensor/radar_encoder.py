"""Radar to tokens: point targets as a set, or range-Doppler maps by convolutions.

Shapes: B batch, N targets, C columns or channels, H range bins, W Doppler bins, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_core.errors import VlaError
from vla_core.model.checks import at_least_one
from vla_core.model.graph import in_graph
from vla_core.model.sensor.base import SENSOR_REGISTRY, SensorEncoder, masked_max, point_set, shared_mlp, there
from vla_core.model.tokens import Tokens, masked_mean

COORDINATES = 3  # of a cell of a map: range, and the sine and cosine of the Doppler bin


@dataclass(frozen=True, kw_only=True)
class RadarConfig:
    """Sizes of :class:`RadarEncoder`, and which ``form`` of radar data it takes.

    ``output``: ``global`` is one token, ``tokens`` one a target, or one a cell of the last feature map.
    """

    type: Literal["radar"] = "radar"
    form: Literal["targets", "range_doppler"] = "targets"
    widths: tuple[int, ...] = (64, 128)
    output: Literal["global", "tokens"] = "global"
    output_dim: int = 128

    def __post_init__(self) -> None:
        at_least_one(self, "widths", "output_dim")

    def fake(self, batch: int, *, input_dim: int = 5, size: tuple[int, int] = (32, 64)) -> tuple[Tensor, Tensor]:
        """Values and mask that :class:`RadarEncoder` takes: ``size`` is the number of targets first, or (H, W)."""
        if self.form == "targets":
            return torch.randn(batch, size[0], input_dim), torch.ones(batch, size[0], dtype=torch.bool)
        return torch.randn(batch, input_dim, *size), torch.ones(batch, dtype=torch.bool)


class RadarEncoder(SensorEncoder):
    """Radar data, normalized, to tokens.

    ``targets``: (B, N, input_dim), such as x, y, vx, vy and rcs, with mask (B, N).
    ``range_doppler``: maps (B, input_dim, H, W), range down and Doppler across, with mask (B,).
    """

    Config = RadarConfig

    def __init__(self, config: RadarConfig, *, input_dim: int = 5) -> None:
        super().__init__()
        self.config = config
        self.input_dim = input_dim
        self.output_dim = config.output_dim
        self.net = (_Targets if config.form == "targets" else _RangeDoppler)(config, input_dim)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tokens:
        dims, axis = (3, 2) if self.config.form == "targets" else (4, 1)
        if values.dim() != dims or values.shape[axis] != self.input_dim:
            shape = f"(B, N, {self.input_dim})" if dims == 3 else f"(B, {self.input_dim}, H, W)"
            raise VlaError(f"radar data of shape {tuple(values.shape)}; form {self.config.form!r} takes {shape}")
        values, mask = point_set(values, mask) if dims == 3 else there(values, mask, 1)
        tokens: Tokens = self.net(values.to(self.dtype), mask)
        return tokens


class _Targets(nn.Module):
    """One MLP for every target, then their maximum and mean (Zaheer et al. 2017, "Deep Sets")."""

    def __init__(self, config: RadarConfig, input_dim: int) -> None:
        super().__init__()
        self.pooled = config.output == "global"
        self.mlp = shared_mlp(input_dim, config.widths)
        self.out = nn.Linear((2 if self.pooled else 1) * config.widths[-1], config.output_dim)

    def forward(self, values: Tensor, mask: Tensor) -> Tokens:
        features = self.mlp(values)  # (B, N, D)
        if not self.pooled:
            return Tokens(self.out(features), mask)
        pooled = torch.cat([masked_max(features, mask), masked_mean(Tokens(features, mask))], dim=-1)
        return Tokens(self.out(pooled)[:, None], mask.any(dim=1, keepdim=True))


class _RangeDoppler(nn.Module):
    """Convolutions of stride 2; a cell of the last map is told where it is, since both axes are measurements."""

    def __init__(self, config: RadarConfig, input_dim: int) -> None:
        super().__init__()
        self.pooled = config.output == "global"
        ins = (input_dim, *config.widths[:-1])
        self.convolutions = nn.ModuleList(WrappedConv(a, b) for a, b in zip(ins, config.widths, strict=True))
        self.place = nn.Linear(config.widths[-1] + COORDINATES, config.widths[-1])
        self.out = nn.Linear(config.widths[-1], config.output_dim)

    def forward(self, values: Tensor, mask: Tensor) -> Tokens:
        for convolution in self.convolutions:
            values = convolution(values).relu()
        cells = values.permute(0, 2, 3, 1)  # (B, h, w, D)
        places = _counted(cells) if in_graph() else coordinates(*cells.shape[1:3]).to(cells)
        places = places.expand(len(cells), -1, -1, -1)
        features = self.place(torch.cat([cells, places], dim=-1)).relu().flatten(1, 2)  # (B, h w, D)
        if self.pooled:
            return Tokens(self.out(features.amax(dim=1))[:, None], mask[:, None])
        return Tokens(self.out(features), mask[:, None].expand(-1, features.shape[1]))


class WrappedConv(nn.Module):
    """A 3x3 convolution of stride 2 that knows Doppler to be circular: (B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2)).

    A radial velocity beyond the unambiguous one comes in again at the other side of the map.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, 3, stride=2, padding=(1, 0))

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(values, (1, 1, 0, 0), mode="circular"))
        return out


def coordinates(height: int, width: int) -> Tensor:
    """Where the cells of a map are, (H, W, 3): range from -1 to 1, sine and cosine of the Doppler bin's angle."""
    distance = torch.linspace(-1.0, 1.0, height)[:, None].expand(height, width)
    angle = (torch.arange(width) * (2 * math.pi / width)).expand(height, width)
    return torch.stack([distance, angle.sin(), angle.cos()], dim=-1)


def _counted(cells: Tensor) -> Tensor:
    """The coordinates of the cells (B, H, W, D) of a graph, whose sizes are no numbers yet: (H, W, 3)."""
    ones = torch.ones_like(cells[0, ..., 0])
    row, column = ones.cumsum(dim=0) - 1, ones.cumsum(dim=1) - 1
    distance = 2 * row / (ones.sum(dim=0, keepdim=True) - 1).clamp(min=1) - 1
    angle = 2 * math.pi * column / ones.sum(dim=1, keepdim=True)
    return torch.stack([distance, angle.sin(), angle.cos()], dim=-1)


SENSOR_REGISTRY["radar"] = RadarEncoder
