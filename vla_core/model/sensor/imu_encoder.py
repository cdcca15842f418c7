"""Windows of an IMU to one token: an LSTM of two layers over accelerations and angular velocities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vla_core.model.checks import at_least_one
from vla_core.model.sensor.base import SENSOR_REGISTRY, SensorEncoder, there
from vla_core.model.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class IMUConfig:
    """Sizes of :class:`IMUEncoder`."""

    type: Literal["imu"] = "imu"
    layers: int = 2
    output_dim: int = 128

    def __post_init__(self) -> None:
        at_least_one(self, "layers", "output_dim")

    def fake(self, batch: int, *, input_dim: int = 6, length: int = 20) -> tuple[Tensor, Tensor]:
        """Values and mask that :class:`IMUEncoder` takes."""
        return torch.randn(batch, length, input_dim), torch.ones(batch, length, dtype=torch.bool)


class IMUEncoder(SensorEncoder):
    """A window (B, T, input_dim), oldest first and normalized, with mask (B, T), to one token.

    Only the samples that are there count, wherever the others are: before them, after them or between.
    """

    Config = IMUConfig

    def __init__(self, config: IMUConfig, *, input_dim: int = 6) -> None:
        super().__init__()
        self.config = config
        self.output_dim = config.output_dim
        self.lstm = nn.LSTM(input_dim, config.output_dim, num_layers=config.layers, batch_first=True)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tokens:
        values, mask = there(values, mask, 2)
        packed = pack(values, mask)
        states, _ = self.lstm(packed.to(self.dtype))  # (B, T, D)
        # An LSTM never looks ahead, so that its state at the last sample is the one without the padding.
        last = (mask.sum(dim=1) - 1).clamp(min=0)
        newest = states.gather(1, last[:, None, None].expand(-1, 1, self.output_dim))
        return Tokens(newest, mask.any(dim=1, keepdim=True))


def pack(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` (B, T, C) with the rows that are there first, in their order; the shape stays."""
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order[..., None].expand_as(values))


SENSOR_REGISTRY["imu"] = IMUEncoder
