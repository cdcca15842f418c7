"""From the model's state back to what was seen, and to what it is worth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vla_core.model.world_model.distributions import TwoHotConfig, two_hot_loss, two_hot_mean


def norm_mlp(width_in: int, hidden: int, layers: int, width_out: int) -> nn.Sequential:
    """``layers`` layers with layer norm and SiLU, and a linear output."""
    parts: list[nn.Module] = []
    for i in range(layers):
        parts += [nn.Linear(width_in if i == 0 else hidden, hidden, bias=False), nn.LayerNorm(hidden), nn.SiLU()]
    return nn.Sequential(*parts, nn.Linear(hidden if layers else width_in, width_out))


class ImageDecoder(nn.Module):
    """Features (..., F) to pictures (..., 3, H, W) in [0, 1]: each layer doubles the side."""

    def __init__(self, feature_dim: int, channels: tuple[int, ...], size: tuple[int, int]) -> None:
        super().__init__()
        self.shape = (channels[0], size[0] >> len(channels), size[1] >> len(channels))
        self.enter = nn.Linear(feature_dim, self.shape[0] * self.shape[1] * self.shape[2])
        widths = (*channels, 3)
        layers: list[nn.Module] = []
        for i, width in enumerate(channels):
            layers += [nn.GroupNorm(1, width), nn.SiLU(), nn.ConvTranspose2d(width, widths[i + 1], 4, 2, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        leading = features.shape[:-1]
        maps = self.enter(features).reshape(-1, *self.shape)
        return torch.sigmoid(self.layers(maps)).unflatten(0, leading)


class TwoHotHead(nn.Module):
    """A number by its two-hot code (:mod:`.distributions`); it begins at 0 everywhere."""

    bins: Tensor

    def __init__(self, feature_dim: int, hidden: int, layers: int, config: TwoHotConfig) -> None:
        super().__init__()
        self.net = norm_mlp(feature_dim, hidden, layers, config.bins)
        out: Any = self.net[-1]
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.register_buffer("bins", config.places(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """The mean (...) at features (..., F)."""
        return two_hot_mean(self.net(features), self.bins)

    def loss(self, features: Tensor, values: Tensor) -> Tensor:
        """Cross entropy (...) with ``values`` (...)."""
        return two_hot_loss(self.net(features), values, self.bins)
