"""What flows between the parts of a model: tokens of one width, and which of them are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """``values`` (B, N, D), and ``mask`` (B, N) bool, True where a token is present.

    What stands in ``values`` at an absent token must not matter to anybody.
    """

    values: Tensor
    mask: Tensor


def present(values: Tensor) -> Tokens:
    """Tokens (B, N, D) that are all there; (B, D) becomes one token."""
    if values.dim() == 2:
        values = values[:, None]
    return Tokens(values, torch.ones(values.shape[:2], dtype=torch.bool, device=values.device))


def join(parts: Sequence[Tokens]) -> Tokens:
    """All tokens of ``parts``, in their order, along N."""
    return Tokens(torch.cat([part.values for part in parts], dim=1), torch.cat([part.mask for part in parts], dim=1))


def masked_mean(tokens: Tokens) -> Tensor:
    """Mean (B, D) of the present tokens; 0 where none is."""
    weights = tokens.mask[..., None].to(tokens.values.dtype)
    # where, not times: an absent token may hold NaN.
    total = torch.where(tokens.mask[..., None], tokens.values, 0.0).sum(dim=1)
    return total / weights.sum(dim=1).clamp(min=1.0)
