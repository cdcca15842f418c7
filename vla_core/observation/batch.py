"""Model inputs from observations: the one step from numbers of the robot to tensors, for training and inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vla_core.model.inputs import ModelInputs
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.observation.builder import ImageSize, Observation
from vla_core.observation.normalizer import Normalizer


def make_inputs(
    images: Mapping[str, np.ndarray | torch.Tensor],
    state: np.ndarray,
    instructions: Sequence[str],
    normalizer: Normalizer,
    tokenizer: WordTokenizer,
    image_mask: Mapping[str, np.ndarray] | None = None,
) -> ModelInputs:
    """Batch of B observations.

    Args:
        images: per camera (B, H, W, 3) uint8 RGB.
        state: (B, S) in physical units; NaN where a stream is missing, which becomes 0, the mean, and masks the state.
        instructions: B texts.
        image_mask: per camera (B,) bool, False where the picture is missing; None where all are there.
    """
    masks = image_mask or {name: np.ones(len(state), dtype=bool) for name in images}
    missing = np.isnan(state)
    normalized = np.where(missing, np.float32(0), normalizer.normalize("state", state))
    return ModelInputs(
        images={name: _to_float(pixels) for name, pixels in images.items()},
        state=torch.from_numpy(normalized),
        tokens=tokenizer.batch(list(instructions)),
        image_mask={name: torch.from_numpy(masks[name]) for name in images},
        state_mask=torch.from_numpy(~missing.any(axis=1)),
    )


def collate(
    observations: Sequence[Observation],
    normalizer: Normalizer,
    tokenizer: WordTokenizer,
    images: Mapping[str, ImageSize] | None = None,
) -> ModelInputs:
    """Batch of observations of the same spec; a missing picture is black and masked.

    ``images`` are those of the spec; without them, a camera must be there in at least one of the observations.
    """
    seen = {name: pixels.shape for o in observations for name, pixels in o.images.items()}
    shapes = seen if images is None else {name: (size.height, size.width, 3) for name, size in images.items()}
    return make_inputs(
        {n: np.stack([o.images.get(n, np.zeros(s, np.uint8)) for o in observations]) for n, s in shapes.items()},
        np.stack([o.state for o in observations]),
        [o.instruction for o in observations],
        normalizer,
        tokenizer,
        {name: np.array([name in o.images for o in observations]) for name in shapes},
    )


def _to_float(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [0, 1]."""
    tensor = torch.as_tensor(pixels)
    return tensor.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255.0
