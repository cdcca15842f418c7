"""What every action head is: a context vector to a chunk of actions, with its own training loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vla_core.errors import VlaError, choices
from vla_core.model.action_head.guidance import ChunkPrefix

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
    def predict(
        self, context: Tensor, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        """Return the chunk (B, H, A) for ``context`` (B, D), sampled to continue ``prefix`` where one is given.

        A head whose config says ``guidable`` takes a prefix, any other refuses it; ``prefix`` None draws the same
        noise as one of weights 0, and gives the same chunk.
        """


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


class ChunkDenoiser(nn.Module):
    """An MLP over the flattened noisy chunk, the embedded time and the context."""

    def __init__(self, *, chunk_dim: int, time_dim: int, context_dim: int, hidden_dim: int, layers: int,
                 embed: Callable[[Tensor, int], Tensor]) -> None:  # fmt: skip
        super().__init__()
        self.time_dim = time_dim
        self.embed = embed
        self.net = mlp(chunk_dim + time_dim + context_dim, hidden_dim, layers, chunk_dim)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """``x_t`` (B, H, A), ``t`` (B,), ``context`` (B, D) -> (B, H, A)."""
        time = self.embed(t, self.time_dim)
        out: Tensor = self.net(torch.cat([x_t.flatten(1), time, context], dim=-1))
        return out.view_as(x_t)


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal noise of the shape, type and device of ``x``."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


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
