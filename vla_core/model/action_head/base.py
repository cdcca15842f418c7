"""What every action head is: context tokens to a chunk of actions, with its own training loss.

Shapes: B batch, N context tokens, D their width, H steps of the chunk (``horizon``), A entries of an action.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model import tokens
from vla_core.model.action_head.draws import normal
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.tokens import Tokens

Head = TypeVar("Head", bound="type[ActionHeadBase]")


class ActionHeadBase(nn.Module):
    """Context tokens (B, N, D) to a chunk (B, H, A) in normalized action units.

    A head's class names the dataclass of its settings as ``Config``, so that a file can name the head by its ``type``.
    Chunks and losses are float32 (or wider) whatever the type of the weights. What stands at absent tokens and at
    masked steps has no influence; a row of which no token is there is answered all the same, with finite numbers.
    """

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
        context: Tokens,
        actions: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the scalar training loss over the steps where ``mask`` is True.

        ``actions`` (B, H, A), ``mask`` (B, H) bool; what stands in ``actions`` at masked steps, past the end of an
        episode, has no influence.
        """

    @abstractmethod
    def predict(
        self, context: Tokens, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        """Return the chunk (B, H, A), sampled to continue ``prefix`` where one is given.

        A head whose config says ``guidable`` takes a prefix, any other refuses it; ``prefix`` None draws the same
        noise as one of weights 0, and gives the same chunk.
        """

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def pooled(self, context: Tokens) -> Tensor:
        """The mean (B, D) of the tokens that are there, in the type of the weights."""
        return tokens.masked_mean(context).to(self.dtype)

    def refuse(self, prefix: ChunkPrefix | None) -> None:
        """Raise :class:`VlaError` where a chunk is to continue another one, for heads that cannot."""
        if prefix is not None:
            raise VlaError(f"the head {self.config.type!r} samples nothing that could be guided; "
                           "choices: diffusion, flow")  # fmt: skip


ACTION_HEAD_REGISTRY: dict[str, type[ActionHeadBase]] = {}


def register_action_head(name: str) -> Callable[[Head], Head]:
    """Make a head buildable by the ``type`` of its config; assigning to the registry does so, too."""

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


def check_head(config: Any) -> None:
    """Raise :class:`ConfigError` where a model's field ``head`` holds no head's settings."""
    if not hasattr(config, "type"):
        raise ConfigError(f"head: expected the settings of one of {choices(ACTION_HEAD_REGISTRY)}, found {config!r}")


def widened(x: Tensor) -> Tensor:
    """``x`` as float32, or wider where it is: bfloat16 carries two digits, too few for an action or a loss."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def blanked(actions: Tensor, mask: Tensor) -> Tensor:
    """``actions`` (B, H, A) with 0 where ``mask`` (B, H) is False: a masked NaN would still spoil the gradient."""
    return torch.where(mask[..., None], actions, 0.0)


class RowGenerator(torch.Generator):
    """A generator for the rows from ``first`` on of a batch of ``total`` rows.

    A row's noise is that which it has in the whole batch, however this is divided among processes and passes.
    """

    first: int = 0
    total: int = 0


def draw_rows(rows: int, generator: torch.Generator | None, draw: Callable[[int], Tensor]) -> Tensor:
    """Return ``draw(rows)``, noise for so many rows; with a :class:`RowGenerator`, its part of ``draw(total)``."""
    if not isinstance(generator, RowGenerator):
        return draw(rows)
    return draw(generator.total)[generator.first : generator.first + rows]


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal noise of the shape, type and device of ``x`` (B, ...)."""
    return draw_rows(
        len(x), generator,
        lambda rows: normal((rows, *x.shape[1:]), generator, x.dtype, x.device),
    )  # fmt: skip


def uniform(rows: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Return (B,) numbers from [0, 1)."""
    return draw_rows(rows, generator, lambda count: torch.rand(count, generator=generator, device=device))


def integers(high: int, rows: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Return (B,) int64 from 0 to ``high`` - 1."""
    return draw_rows(
        rows, generator, lambda count: torch.randint(high, (count,), generator=generator, device=device)
    )  # fmt: skip


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``error`` (B, H, A) over the steps where ``mask`` (B, H) is True."""
    total = torch.where(mask[..., None], error, 0.0).sum()
    return total / (mask.sum() * error.shape[-1]).clamp(min=1)


def hidden_layers(width_in: int, hidden_dim: int, layers: int) -> nn.Sequential:
    """Return ``layers`` layers with ReLU."""
    parts: list[nn.Module] = []
    for i in range(layers):
        parts += [nn.Linear(width_in if i == 0 else hidden_dim, hidden_dim), nn.ReLU()]
    return nn.Sequential(*parts)


def mlp(width_in: int, hidden_dim: int, layers: int, width_out: int) -> nn.Sequential:
    """Return ``layers`` hidden layers with ReLU and a linear output."""
    return nn.Sequential(*hidden_layers(width_in, hidden_dim, layers), nn.Linear(hidden_dim, width_out))
