"""The chunk as an action of reinforcement learning: the rows that are executed, drawn from a policy's Gaussian head.

Shapes: B decisions, R rows that are executed before the next decision (``execution.steps``), A entries of an action.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vla_core.checkpoint import Checkpoint
from vla_core.config import ConfigError
from vla_core.errors import VlaError
from vla_core.model.action_head.gaussian_action_head import GaussianMLPActionHead
from vla_core.model.inputs import ModelInputs
from vla_core.model.tokens import Tokens, present


@dataclass(frozen=True)
class ChunkNormal:
    """Normal distributions of chunks: ``mean`` and ``log_std`` (B, R, A), normalized units.

    Entries of an action are independent; rows of one entry are correlated by ``correlation``, each with each. Noise
    that is drawn anew for every control step averages out before it has moved anything (Eberhard et al. 2023, "Pink
    noise is all you need"). With C = L L^T, the rows' correlation matrix, z = L^-1 (x - mean) / std is white.
    """

    mean: Tensor
    log_std: Tensor
    correlation: float = 0.0

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw (B, R, A), without a gradient."""
        white = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return (self.mean + self.log_std.exp() * (self._factor @ white)).detach()

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-density (B,) of ``actions`` (B, R, A), of all entries together."""
        z = self._whiten((actions - self.mean) * torch.exp(-self.log_std))
        return -(0.5 * z.square() + self.log_std + 0.5 * math.log(2 * math.pi)).sum(dim=(1, 2)) - self._log_volume

    def entropy(self) -> Tensor:
        """Differential entropy (B,), nats."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(dim=(1, 2)) + self._log_volume

    def kl(self, other: ChunkNormal) -> Tensor:
        """KL(self || other) (B,), nats, of distributions of the same correlation.

        For each entry (tr(S2^-1 S1) + d^T S2^-1 d - R + log |S2| / |S1|) / 2 with S = D C D, D the deviations.
        """
        scale = torch.exp(self.log_std - other.log_std).movedim(1, 2)  # (B, A, R)
        mixed = self._whiten(scale[..., :, None] * self._factor)  # L^-1 D2^-1 D1 L, (B, A, R, R)
        trace = mixed.square().sum(dim=(1, 2, 3))
        shift = self._whiten((self.mean - other.mean) * torch.exp(-other.log_std)).square().sum(dim=(1, 2))
        entries = self.mean[0].numel()
        return 0.5 * (trace + shift - entries) + (other.log_std - self.log_std).sum(dim=(1, 2))

    def at(self, index: Tensor) -> ChunkNormal:
        """Those decisions alone."""
        return ChunkNormal(self.mean[index], self.log_std[index], self.correlation)

    @property
    def _factor(self) -> Tensor:
        """L (R, R), lower triangular."""
        rows, c = self.mean.shape[1], self.correlation
        matrix = c * torch.ones(rows, rows, dtype=self.mean.dtype) + (1 - c) * torch.eye(rows, dtype=self.mean.dtype)
        return torch.linalg.cholesky(matrix)

    @property
    def _log_volume(self) -> float:
        """log |L|, of all entries."""
        return float(self._factor.diagonal().log().sum()) * self.mean.shape[2]

    def _whiten(self, x: Tensor) -> Tensor:
        """L^-1 x along the rows of (..., R, n)."""
        return torch.linalg.solve_triangular(self._factor, x, upper=False)


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """How chunks are drawn: ``least_std`` is the smallest standard deviation, in normalized units, and ``correlation``
    that of the noise of a chunk's rows, 0 to below 1.

    Demonstrations of a scripted expert leave next to no deviation, and a policy that tries nothing learns nothing.
    """

    least_std: float = 0.2
    correlation: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.least_std <= 1:
            raise ConfigError(f"least_std: expected above 0 and at most 1, found {self.least_std}")
        if not 0 <= self.correlation < 1:
            raise ConfigError(f"correlation: expected 0 to below 1, found {self.correlation}")


def context_of(model: Any, inputs: ModelInputs) -> Tokens:
    """What the model's head sees of ``inputs``."""
    found = model.encode(inputs)
    return found if isinstance(found, Tokens) else present(found)


def distribution(model: Any, context: Tokens, rows: int, exploration: Exploration) -> ChunkNormal:
    """Of the first ``rows`` of the chunk, as they are drawn."""
    mean, log_std = model.head(context)
    least = math.log(exploration.least_std)
    return ChunkNormal(mean[:, :rows], log_std[:, :rows].clamp(min=least), exploration.correlation)


def check_learns(checkpoint: Checkpoint, place: str) -> None:
    """Raise :class:`VlaError` unless this policy can be improved by its own trials."""
    head, execution = checkpoint.model.head, checkpoint.config.execution
    if not isinstance(head, GaussianMLPActionHead):
        raise VlaError(f"{place}: reinforcement needs a head that tells its actions' density: expected gaussian, found "
                       f"{checkpoint.config.model.head.type!r}; train one with model.head.type=gaussian")  # fmt: skip
    if execution.strategy != "receding" or execution.period_s is not None or checkpoint.contract.plans:
        raise VlaError(f"{place}: reinforcement takes the executed rows of a chunk for one action: expected "
                       "execution.strategy receding, no execution.period_s and a command a step, found "
                       f"{execution.strategy!r}, {execution.period_s} and {checkpoint.contract.name!r}")  # fmt: skip
