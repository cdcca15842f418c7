"""What every sensor encoder is: numbers of a sensor, and which of them are there, to tokens of one width."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vla_core.errors import VlaError, choices
from vla_core.model.tokens import Tokens


class SensorEncoder(nn.Module):
    """Sensor data to :class:`~vla_core.model.tokens.Tokens` of width ``output_dim``.

    What stands in ``values`` where ``mask`` is False has no influence; where nothing is there, the tokens are masked.
    ``values`` are float32 whatever the type of the weights, since metres do not fit into bfloat16.
    """

    output_dim: int

    @abstractmethod
    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tokens:
        """``mask`` bool has the leading dimensions of ``values``; None where all is there."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype


SENSOR_REGISTRY: dict[str, type[Any]] = {}


def build_sensor(config: Any, **sizes: int) -> SensorEncoder:
    """Build the encoder that is registered under ``config.type``; ``sizes`` are what its model decides."""
    if config.type not in SENSOR_REGISTRY:
        raise VlaError(f"no sensor encoder {config.type!r} registered; choices: {choices(SENSOR_REGISTRY)}")
    encoder: SensorEncoder = SENSOR_REGISTRY[config.type](config, **sizes)
    return encoder


def there(values: Tensor, mask: Tensor | None, dims: int) -> tuple[Tensor, Tensor]:
    """``values`` with 0 where they are absent, and their mask over the first ``dims`` dimensions."""
    if mask is None:
        return values, torch.ones(values.shape[:dims], dtype=torch.bool, device=values.device)
    if mask.dtype != torch.bool or mask.shape != values.shape[:dims]:
        raise VlaError(f"a mask of {mask.dtype} {tuple(mask.shape)} for values {tuple(values.shape)}; expected "
                       f"torch.bool {tuple(values.shape[:dims])}")  # fmt: skip
    return torch.where(mask.reshape(mask.shape + (1,) * (values.dim() - dims)), values, 0.0), mask


def point_set(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`there` for points (B, N, C), of which there is at least one row, masked where N is 0."""
    values, mask = there(values, mask, 2)
    if values.shape[1]:
        return values, mask
    return values.new_zeros(len(values), 1, values.shape[2]), mask.new_zeros(len(values), 1)


def shared_mlp(width_in: int, widths: Sequence[int]) -> nn.Sequential:
    """The same layers at each point, (..., width_in) -> (..., widths[-1]).

    With layer norms, where PointNet has batch norms: those would count the padding, and tie the points to the batch.
    """
    parts: list[nn.Module] = []
    for width in widths:
        parts += [nn.Linear(width_in, width), nn.LayerNorm(width), nn.ReLU()]
        width_in = width
    return nn.Sequential(*parts)


def masked_max(values: Tensor, mask: Tensor) -> Tensor:
    """The maximum of ``values`` (..., N, D) over the N where ``mask`` (..., N) is True; 0 where it never is."""
    lowest = torch.finfo(values.dtype).min
    highest = torch.where(mask[..., None], values, lowest).amax(dim=-2)
    return torch.where(mask.any(dim=-1, keepdim=True), highest, 0.0)
