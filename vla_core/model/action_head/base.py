"""What every action head is: a context vector to a chunk of actions, with its own training loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vla_core.errors import VlaError, choices

Head = TypeVar("Head", bound="type[ActionHeadBase]")


class ActionHeadBase(nn.Module):
    """Context (B, D) to a chunk (B, horizon, action_dim) in normalized action units."""

    def __init__(self, config: Any, *, horizon: int, action_dim: int, context_dim: int) -> None:
        """``config`` holds what only this kind of head has; the rest is the model's to say."""
        super().__init__()
        self.config = config
        self.horizon = horizon
        self.action_dim = action_dim
        self.context_dim = context_dim

    @abstractmethod
    def loss(
        self,
        context: Tensor,
        actions: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the scalar training loss over the steps where ``mask`` is True.

        ``context`` (B, D), ``actions`` (B, H, A), ``mask`` (B, H) bool; what stands in ``actions``
        at masked steps, past the end of an episode, has no influence.
        """

    @abstractmethod
    def predict(self, context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the chunk (B, H, A) for ``context`` (B, D)."""


ACTION_HEAD_REGISTRY: dict[str, type[ActionHeadBase]] = {}


def register_action_head(name: str) -> Callable[[Head], Head]:
    """Make a head buildable by the ``type`` of its config."""

    def register(cls: Head) -> Head:
        if name in ACTION_HEAD_REGISTRY:
            raise VlaError(f"action head {name!r} is registered twice; give one another name")
        ACTION_HEAD_REGISTRY[name] = cls
        return cls

    return register


def build_action_head(config: Any, *, horizon: int, action_dim: int, context_dim: int) -> ActionHeadBase:
    """Build the head that is registered under ``config.type``."""
    if config.type not in ACTION_HEAD_REGISTRY:
        raise VlaError(f"no action head {config.type!r} registered; choices: {choices(ACTION_HEAD_REGISTRY)}")
    cls = ACTION_HEAD_REGISTRY[config.type]
    return cls(config, horizon=horizon, action_dim=action_dim, context_dim=context_dim)


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``error`` (B, H, A) over the steps where ``mask`` (B, H) is True."""
    total = torch.where(mask[..., None], error, 0.0).sum()
    return total / (mask.sum() * error.shape[-1]).clamp(min=1)


def mlp(width_in: int, hidden_dim: int, layers: int, width_out: int) -> nn.Sequential:
    """Return ``layers`` hidden layers with ReLU and a linear output."""
    parts: list[nn.Module] = []
    for i in range(layers):
        parts += [nn.Linear(width_in if i == 0 else hidden_dim, hidden_dim), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(hidden_dim, width_out))
