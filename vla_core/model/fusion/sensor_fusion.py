"""One vector a modality to one context vector, with modalities that may be absent."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FusionMLP(nn.Module):
    """Concatenate the tokens and mix them: (B, num_tokens, d_model) -> (B, d_model).

    An absent token is replaced by an embedding that is learned for its place, so that what stood
    in it cannot matter and absence is something the model was trained with.
    """

    def __init__(self, *, num_tokens: int, d_model: int) -> None:
        super().__init__()
        self.absent = nn.Parameter(torch.zeros(num_tokens, d_model))
        self.net = nn.Sequential(
            nn.Linear(num_tokens * d_model, d_model),
            nn.ReLU(),
            nn.Linear(d_model, d_model),
            nn.LayerNorm(d_model),
        )

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """``mask`` (B, num_tokens) bool is True where a token is present."""
        tokens = torch.where(mask[..., None], tokens, self.absent)
        out: Tensor = self.net(tokens.flatten(1))
        return out
