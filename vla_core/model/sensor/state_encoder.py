"""Numbers of the robot's state to one feature vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vla_core.model.checks import at_least_one
from vla_core.model.sensor.base import SENSOR_REGISTRY, SensorEncoder, there
from vla_core.model.tokens import Tokens


class StateEncoderMLP(nn.Module):
    """Two layers and a norm: (B, state_dim) normalized -> (B, d_model)."""

    def __init__(self, *, state_dim: int, d_model: int, hidden_dim: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(state_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, d_model),
            nn.LayerNorm(d_model),
        )

    def forward(self, state: Tensor) -> Tensor:
        out: Tensor = self.net(state)
        return out


@dataclass(frozen=True, kw_only=True)
class StateConfig:
    """Sizes of :class:`StateEncoder`."""

    type: Literal["state"] = "state"
    hidden_dim: int = 64
    output_dim: int = 128

    def __post_init__(self) -> None:
        at_least_one(self, "hidden_dim", "output_dim")

    def fake(self, batch: int, *, input_dim: int) -> tuple[Tensor, Tensor]:
        """Values and mask that :class:`StateEncoder` takes."""
        return torch.randn(batch, input_dim), torch.ones(batch, dtype=torch.bool)


class StateEncoder(SensorEncoder):
    """One token a state: (B, input_dim) normalized, mask (B,), to 1 token; a history (B, T, input_dim) to T."""

    Config = StateConfig

    def __init__(self, config: StateConfig, *, input_dim: int) -> None:
        super().__init__()
        self.config = config
        self.output_dim = config.output_dim
        self.mlp = StateEncoderMLP(state_dim=input_dim, d_model=config.output_dim, hidden_dim=config.hidden_dim)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tokens:
        values, mask = there(values, mask, values.dim() - 1)
        tokens: Tensor = self.mlp(values.to(self.dtype))
        return Tokens(tokens, mask) if values.dim() == 3 else Tokens(tokens[:, None], mask[:, None])


SENSOR_REGISTRY["state"] = StateEncoder
