"""The exponential moving average of the weights, kept beside the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from vla_core.training.distributed import local


class Average:
    """Averaged values of named parameters, whose window grows with the run, so that the start does not linger.

    Of a sharded parameter it has this process's shard.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._live = [local(p.detach()) for p in parameters.values()]
        self.values = {name: p.detach().clone() for name, p in parameters.items()}
        self._kept = [local(value) for value in self.values.values()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step``, counted from 0."""
        weight = 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(self._kept, self._live, weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights; bit for bit its own again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for live, kept in zip(self._live, self._kept, strict=True):
            own = live.clone()
            live.copy_(kept)
            kept.copy_(own)
