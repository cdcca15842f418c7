"""The way that a robot has come, from its speeds: dead reckoning, then a small network over the path behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError
from vla_core.model.checks import at_least_one
from vla_core.model.sensor.base import SENSOR_REGISTRY, SensorEncoder, there
from vla_core.model.tokens import Tokens

ROW = 6  # numbers of a place on the path


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """Sizes of :class:`PathEncoder`.

    ``rate_hz`` is that of the stream; ``points`` places of the path are seen, from here to ``length_m`` behind.
    """

    type: Literal["path"] = "path"
    rate_hz: float = 50.0
    points: int = 16
    length_m: float = 40.0
    hidden_dim: int = 64
    output_dim: int = 64

    def __post_init__(self) -> None:
        at_least_one(self, "points", "hidden_dim", "output_dim")
        for name in ("rate_hz", "length_m"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: expected a positive number, found {getattr(self, name)}")

    def fake(self, batch: int, *, input_dim: int = 2, length: int = 40) -> tuple[Tensor, Tensor]:
        """Values and mask that :class:`PathEncoder` takes."""
        return torch.randn(batch, length, input_dim), torch.ones(batch, length, dtype=torch.bool)


class PathEncoder(SensorEncoder):
    """A window (B, T, 2) of forward speeds in m/s and yaw rates in rad/s, oldest first, mask (B, T), to one token.

    What was turned since an instruction came tells the exits of a roundabout apart. A network would have to learn to
    add rates up; the path behind the robot, in its frame of now, says it at once.

    Its places are at equal distances, not times, so that they tell nothing of how fast it was driven. A policy that
    imitates sees from its own past that a braking has begun, goes on with it, and never asks what it was for (de Haan
    et al. 2019, "Causal Confusion in Imitation Learning").
    """

    Config = PathConfig

    def __init__(self, config: PathConfig, *, input_dim: int = 2) -> None:
        super().__init__()
        if input_dim != 2:
            raise VlaError(f"a path is reckoned from 2 columns, the forward speed and the yaw rate; found {input_dim}")
        self.config = config
        self.output_dim = config.output_dim
        self.mlp = nn.Sequential(
            nn.Linear(ROW * config.points, config.hidden_dim), nn.ReLU(),
            nn.Linear(config.hidden_dim, config.output_dim), nn.LayerNorm(config.output_dim),
        )  # fmt: skip

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tokens:
        values, mask = there(values, mask, 2)
        config = self.config
        path = reckoned(values, 1.0 / config.rate_hz)
        moved = values[..., 0].abs() / config.rate_hz  # m that each row adds
        behind = moved.flip(1).cumsum(dim=1).flip(1) - moved  # (B, T) m from a row's place to here, along the way
        wanted = torch.linspace(0.0, config.length_m, config.points, device=values.device)
        number = torch.arange(values.shape[1], device=values.device)[:, None]
        far = mask[..., None] & (behind[..., None] >= wanted)  # (B, T, K)
        newest = torch.where(far, number, -1).amax(dim=1)  # (B, K): the last row that is so far behind
        places = path.gather(1, newest.clamp(min=0)[..., None].expand(-1, -1, 3))
        x, y, yaw = places.unbind(dim=-1)
        scale = config.length_m / 2
        seen = torch.stack([x / scale, y / scale, yaw.sin(), yaw.cos(), yaw / torch.pi, torch.ones_like(yaw)], dim=-1)
        seen = torch.where((newest >= 0)[..., None], seen, 0.0)
        return Tokens(self.mlp(seen.flatten(1).to(self.dtype))[:, None], mask.any(dim=1, keepdim=True))


def reckoned(values: Tensor, step_s: float) -> Tensor:
    """Where a robot was, in its frame of the last row: x, y in m and the yaw in rad, not wrapped, (B, T, 3).

    ``values`` (B, T, 2) are its forward speed and its yaw rate at each row; row t moves it from the place of row t - 1
    to that of row t, by the heading halfway. Rows that are absent are 0, and move nothing.
    """
    turned = values[..., 1] * step_s
    yaw = turned.cumsum(dim=1)
    ahead, halfway = values[..., 0] * step_s, yaw - turned / 2
    x, y = (ahead * halfway.cos()).cumsum(dim=1), (ahead * halfway.sin()).cumsum(dim=1)
    x, y, back = x - x[:, -1:], y - y[:, -1:], yaw[:, -1:]
    return torch.stack([x * back.cos() + y * back.sin(), y * back.cos() - x * back.sin(), yaw - back], dim=-1)


SENSOR_REGISTRY["path"] = PathEncoder
