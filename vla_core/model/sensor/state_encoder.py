"""Numbers of the robot's state to one feature vector."""

from __future__ import annotations

from torch import Tensor, nn


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
