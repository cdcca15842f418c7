"""Model inputs from observations: the one step from numbers of the robot to tensors, for training and inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vla_core.model.inputs import ModelInputs
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.observation.builder import Observation
from vla_core.observation.normalizer import Normalizer


def make_inputs(
    images: Mapping[str, np.ndarray | torch.Tensor],
    state: np.ndarray,
    instructions: Sequence[str],
    normalizer: Normalizer,
    tokenizer: WordTokenizer,
) -> ModelInputs:
    """Batch of B observations.

    Args:
        images: per camera (B, H, W, 3) uint8 RGB.
        state: (B, S) in physical units.
        instructions: B texts.
    """
    batch = len(state)
    return ModelInputs(
        images={name: _to_float(pixels) for name, pixels in images.items()},
        state=torch.from_numpy(normalizer.normalize("state", state)),
        tokens=tokenizer.batch(list(instructions)),
        image_mask={name: torch.ones(batch, dtype=torch.bool) for name in images},
        state_mask=torch.ones(batch, dtype=torch.bool),
    )


def collate(observations: Sequence[Observation], normalizer: Normalizer, tokenizer: WordTokenizer) -> ModelInputs:
    """Batch of observations of the same spec."""
    first = observations[0]
    return make_inputs(
        {name: np.stack([o.images[name] for o in observations]) for name in first.images},
        np.stack([o.state for o in observations]),
        [o.instruction for o in observations],
        normalizer,
        tokenizer,
    )


def _to_float(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [0, 1]."""
    tensor = torch.as_tensor(pixels)
    return tensor.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255.0
