"""What a head draws while it samples: from a generator, written down, or given from outside.

A graph has no generator. Its noise is an input, drawn beforehand by the calls that the head itself would have made, so
that graph and model give the same chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from vla_core.errors import VlaError


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One call: standard ``normal`` noise, or ``exponential`` noise of rate 1, float32 of ``shape``."""

    kind: Literal["normal", "exponential"]
    shape: tuple[int, ...]


class DrawLog(torch.Generator):
    """A generator that writes down what is drawn from it."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []


class GivenDraws(torch.Generator):
    """No generator, but what one has given before: ``noise`` (M,), the draws one after the other."""

    def __new__(cls, noise: Tensor) -> GivenDraws:  # torch's own takes a device
        return super().__new__(cls)

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self._noise = noise
        self._taken = 0

    def take(self, shape: Sequence[int]) -> Tensor:
        """The next draw."""
        count = prod(shape)
        if self._taken + count > len(self._noise):
            raise VlaError(f"the head draws more than the {len(self._noise)} numbers that were drawn for it")
        part = self._noise[self._taken : self._taken + count]
        self._taken += count
        return part.view(*shape)


class EachRow(torch.Generator):
    """A generator for each row of a batch: a row draws what it would draw alone, whatever stands beside it."""

    generators: tuple[torch.Generator, ...]

    def __new__(cls, generators: Sequence[torch.Generator]) -> EachRow:
        made = super().__new__(cls)
        made.generators = tuple(generators)
        return made


def normal(
    shape: Sequence[int], generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
) -> Tensor:  # fmt: skip
    """Standard normal noise of ``shape``; its first dimension is that of the batch.

    It is drawn where the generator is, so that a seed means the same noise on every device.
    """
    if isinstance(generator, EachRow):
        return torch.cat([normal((1, *shape[1:]), each, dtype, device) for each in generator.generators])
    if isinstance(generator, GivenDraws):
        return generator.take(shape).to(dtype)
    if isinstance(generator, DrawLog):
        generator.draws.append(Draw(kind="normal", shape=tuple(shape)))
    drawn_on = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=drawn_on).to(device)


def category(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """A category int64 (N,) for each row of ``weights`` (N, K), drawn with probabilities in proportion to them.

    torch draws one category as the largest of weight / exponential noise (an exponential race), which is what
    is done here with noise that is given. Of a batch the rows of ``weights`` stand in the order of its rows.
    """
    if isinstance(generator, EachRow):
        parts = weights.unflatten(0, (len(generator.generators), -1))
        return torch.cat([category(part, each) for part, each in zip(parts, generator.generators, strict=True)])
    if isinstance(generator, GivenDraws):
        return (weights / generator.take(weights.shape)).argmax(dim=-1)
    if isinstance(generator, DrawLog):
        generator.draws.append(Draw(kind="exponential", shape=tuple(weights.shape)))
    drawn_on = weights if generator is None else weights.to(generator.device)
    return torch.multinomial(drawn_on, 1, generator=generator)[:, 0].to(weights.device)


def draw(draws: Sequence[Draw], generator: torch.Generator) -> Tensor:
    """The noise (M,) of ``draws``, one after the other: that which the head itself would draw from ``generator``."""
    parts = [
        torch.randn(each.shape, generator=generator) if each.kind == "normal"
        else torch.empty(each.shape).exponential_(generator=generator)
        for each in draws
    ]  # fmt: skip
    return torch.cat([part.flatten() for part in parts]) if parts else torch.zeros(0)
