"""What every model of this package takes: one record of batch-first tensors and masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """One batch of observations, already normalized.

    ``images``      camera name -> (B, 3, H, W) float32 in [0, 1]
    ``state``       (B, S) float32, normalized
    ``tokens``      (B, L) int64, right-padded with 0
    ``image_mask``  camera name -> (B,) bool, False where the image is missing or too old
    ``state_mask``  (B,) bool, False where the state is missing or too old
    """

    images: dict[str, Tensor]
    state: Tensor
    tokens: Tensor
    image_mask: dict[str, Tensor]
    state_mask: Tensor

    def to(self, device: torch.device | str) -> ModelInputs:
        """Return the same batch on ``device``."""
        return ModelInputs(
            images={name: image.to(device) for name, image in self.images.items()},
            state=self.state.to(device),
            tokens=self.tokens.to(device),
            image_mask={name: mask.to(device) for name, mask in self.image_mask.items()},
            state_mask=self.state_mask.to(device),
        )
