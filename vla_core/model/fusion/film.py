"""Features modulated by a condition (Perez et al. 2018, "FiLM: Visual Reasoning with a General Conditioning Layer")."""

from __future__ import annotations

from torch import Tensor, nn


class FiLM(nn.Module):
    """(1 + gamma(condition)) * features + beta(condition), a gamma and a beta for each feature.

    Begins as the identity.
    """

    def __init__(self, *, feature_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.gamma_beta = nn.Linear(condition_dim, 2 * feature_dim)
        nn.init.zeros_(self.gamma_beta.weight)
        nn.init.zeros_(self.gamma_beta.bias)

    def forward(self, features: Tensor, condition: Tensor, dim: int = -1) -> Tensor:
        """``features`` whose dimension ``dim`` is the feature's: (B, ..., D), or (B, D, H, W) with 1.

        ``condition`` is (B, condition_dim).
        """
        gamma, beta = self.gamma_beta(condition).chunk(2, dim=-1)
        shape = [len(condition)] + [1] * (features.dim() - 1)
        shape[dim] = gamma.shape[-1]
        return (1 + gamma.view(shape)) * features + beta.view(shape)
