"""What every model of this package takes: one record of batch-first tensors and masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Remembers = Literal["everything", "state"]  # what a model reads of past ticks


class Masked(NamedTuple):
    """``values`` whose leading dimensions are those of ``mask`` bool; 0 where it is False."""

    values: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """One batch of observations, already normalized.

    ``images``      camera name -> (B, 3, H, W) float32 in [0, 1]
    ``state``       (B, S) float32, normalized
    ``tokens``      (B, L) int64, right-padded with the tokenizer's padding
    ``image_mask``  camera name -> (B,) bool, False where the image is missing or too old
    ``state_mask``  (B,) bool, False where the state is missing or too old
    ``token_mask``  (B, L) bool, False at padding and where the instruction is missing; None: all of it is there but
                    the padding
    ``clouds``      stream name -> (B, N, C), mask (B, N); coordinates in m, other columns normalized
    ``sequences``   stream name -> (B, L, C) normalized, oldest first, mask (B, L)
    ``maps``        stream name -> (B, 2, H, W), mask (B,): the value, normalized, and 1 where it is a number
    ``intrinsics``  camera name -> (B, 3, 3) in pixels of its image, mask (B,)
    ``extrinsics``  stream name -> (B, 4, 4), the sensor's pose in the robot's base frame, mask (B,); what is not
                    given is taken from the model's configuration
    ``history``     the T past ticks, oldest first: the same record with (B, T, ...) in place of (B, ...)
    """

    images: dict[str, Tensor]
    state: Tensor
    tokens: Tensor
    image_mask: dict[str, Tensor]
    state_mask: Tensor
    token_mask: Tensor | None = None
    clouds: dict[str, Masked] = field(default_factory=dict)
    sequences: dict[str, Masked] = field(default_factory=dict)
    maps: dict[str, Masked] = field(default_factory=dict)
    intrinsics: dict[str, Masked] = field(default_factory=dict)
    extrinsics: dict[str, Masked] = field(default_factory=dict)
    history: ModelInputs | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> ModelInputs:
        """Return the same record with every tensor changed, masks included."""
        values = {f.name: _map(getattr(self, f.name), change) for f in dataclasses.fields(self)}
        return ModelInputs(**values)

    def to(self, device: torch.device | str) -> ModelInputs:
        """Return the same batch on ``device``."""
        return self.map(lambda tensor: tensor.to(device))

    def sensor(self, name: str) -> Masked | None:
        """The cloud, sequence or map of a stream; None where the batch has none of that name."""
        return self.clouds.get(name) or self.sequences.get(name) or self.maps.get(name)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, ModelInputs):
        return value.map(change)
    if isinstance(value, Masked):
        return Masked(change(value.values), change(value.mask))
    return {name: _map(item, change) for name, item in value.items()}
