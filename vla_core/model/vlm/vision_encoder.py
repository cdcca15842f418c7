"""Images to one feature vector: the small convolutional encoder of mini-VLA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class TinyCNNConfig:
    """Sizes of :class:`ImageEncoderTinyCNN`; the defaults are those of the published mini-VLA.

    ``pooling``: ``average`` forgets where a feature was seen, ``spatial_softmax`` keeps only that.
    """

    type: Literal["tiny_cnn"] = "tiny_cnn"
    d_model: int = 128
    pooling: Literal["average", "spatial_softmax"] = "average"
    channels: tuple[int, ...] = (32, 64, 128)

    def __post_init__(self) -> None:
        if not self.channels:
            raise ConfigError("channels: expected at least one layer, found none")


def spatial_softmax(features: Tensor) -> Tensor:
    """Return the expected image coordinates of each channel, its features taken as log-weights.

    ``features`` (B, C, H, W) -> (B, 2 C): all x, then all y, each from -1 (left, top) to 1.
    Levine et al. 2016, "End-to-End Training of Deep Visuomotor Policies".
    """
    height, width = features.shape[-2:]
    weights = features.flatten(2).softmax(dim=-1).view_as(features)
    x = torch.linspace(-1.0, 1.0, width, device=features.device, dtype=features.dtype)
    y = torch.linspace(-1.0, 1.0, height, device=features.device, dtype=features.dtype)
    expected_x = (weights.sum(dim=2) * x).sum(dim=-1)  # (B, C)
    expected_y = (weights.sum(dim=3) * y).sum(dim=-1)  # (B, C)
    return torch.cat([expected_x, expected_y], dim=-1)


def average_pool(features: Tensor) -> Tensor:
    """Return the mean of each channel's positive part: (B, C, H, W) -> (B, C)."""
    return features.relu().mean(dim=(2, 3))


class ImageEncoderTinyCNN(nn.Module):
    """Convolutions of stride 2, a pooling, a projection: (B, 3, H, W) in [0, 1] -> (B, d_model)."""

    pool: Callable[[Tensor], Tensor]

    def __init__(self, config: TinyCNNConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width_in = 3
        for i, width in enumerate(config.channels):
            kernel = 5 if i == 0 else 3
            if i > 0:
                layers.append(nn.ReLU())
            layers.append(nn.Conv2d(width_in, width, kernel, stride=2, padding=kernel // 2))
            width_in = width
        self.convolutions = nn.Sequential(*layers)
        if config.pooling == "average":
            self.pool, pooled = average_pool, width_in
        else:
            self.pool, pooled = spatial_softmax, 2 * width_in
        self.project = nn.Linear(pooled, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.norm(self.project(self.pool(self.convolutions(image))))
        return out
