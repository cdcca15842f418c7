"""Convolutions that look at a map as a whole: stage by stage coarser and wider, with an instruction in mind.

Shapes: B batch, D channels, (X, Y) cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from vla_core.errors import VlaError
from vla_core.model.fusion.film import FiLM


class Tower(nn.Module):
    """Stages that halve the map, (B, width, X, Y) -> (B, widths[-1], X / 2^n, Y / 2^n); without any, the map itself.

    With ``condition_dim``, each stage is modulated by a condition (Perez et al. 2018, "FiLM").
    """

    def __init__(self, width: int, widths: Sequence[int], condition_dim: int | None = None) -> None:
        super().__init__()
        self.conditioned = condition_dim is not None
        self.stages = nn.ModuleList(Stage(*pair, condition_dim) for pair in pairwise((width, *widths)))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``condition`` is (B, condition_dim), of a tower that was made for one."""
        if self.conditioned != (condition is not None):
            raise VlaError(f"a condition is {'not ' * (condition is None)}given to a bird's eye view that was made "
                           f"with{'' if self.conditioned else 'out'} one")  # fmt: skip
        for stage in self.stages:
            x = stage(x, condition)
        return x


class Stage(nn.Module):
    """A convolution of stride 2, then a residual block of two, the first of them modulated (He et al. 2016)."""

    def __init__(self, width_in: int, width: int, condition_dim: int | None) -> None:
        super().__init__()
        self.down = nn.Sequential(*conv_layer(width_in, width, stride=2))
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width)
        self.film = None if condition_dim is None else FiLM(feature_dim=width, condition_dim=condition_dim)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        x = self.down(x)
        y = self.norm(self.first(x))
        if self.film is not None:
            y = self.film(y, condition, dim=1)
        out: Tensor = (x + self.second(y.relu())).relu()
        return out


def conv_layer(width_in: int, width: int, stride: int = 1) -> tuple[nn.Module, ...]:
    """A 3x3 convolution, a norm over the map, a ReLU."""
    return nn.Conv2d(width_in, width, 3, stride=stride, padding=1), nn.GroupNorm(1, width), nn.ReLU()
