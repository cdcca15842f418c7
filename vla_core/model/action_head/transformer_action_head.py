"""A chunk written step by step, each step in the knowledge of those before it.

Shapes: B batch, H steps, A entries of an action, N context tokens, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.model.action_head.base import (
    ActionHeadBase,
    blanked,
    masked_mean,
    register_action_head,
    widened,
)
from vla_core.model.action_head.decoder import ChunkDecoder
from vla_core.model.action_head.discrete_action_head import (
    bin_of,
    centre_of,
    check_bins,
    masked_cross_entropy,
    pick,
)
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.checks import at_least_one, divides
from vla_core.model.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class TransformerHeadConfig:
    """Sizes of :class:`TransformerActionHead`.

    ``bins``    null: the steps are numbers, trained with the absolute error; else each entry is one of so many bins
                of [-1, 1], trained with the cross-entropy, and what was drawn at one step binds the next
    ``answer``  the ``likeliest`` bin, or a ``sample`` of them; numbers are not drawn
    """

    type: Literal["transformer"] = "transformer"
    hidden_dim: int = 128
    layers: int = 4
    heads: int = 4
    bins: int | None = None
    answer: Literal["likeliest", "sample"] = "likeliest"

    def __post_init__(self) -> None:
        at_least_one(self, "hidden_dim", "layers", "heads")
        divides(self, "heads", "hidden_dim")
        if self.bins is not None:
            check_bins(self.bins)
        elif self.answer == "sample":
            raise ConfigError("answer: found 'sample', which needs bins to draw from; expected likeliest, or bins")


@register_action_head("transformer")
class TransformerActionHead(ActionHeadBase):
    """A causal transformer over the steps, which attends to every context token.

    It learns with the true action of the step before at hand (teacher forcing); its answer goes by its own. The keys
    and values of steps that are written are kept, so that a chunk costs H steps and not H^2.
    """

    Config = TransformerHeadConfig

    def __init__(self, config: TransformerHeadConfig, *, horizon: int, action_dim: int, context_dim: int) -> None:
        super().__init__(config, horizon=horizon, action_dim=action_dim, context_dim=context_dim)
        self.start = nn.Parameter(0.02 * torch.randn(config.hidden_dim))
        self.step = nn.Linear(action_dim, config.hidden_dim)
        self.decoder = ChunkDecoder(
            width=config.hidden_dim, layers=config.layers, heads=config.heads, context_dim=context_dim,
            horizon=horizon, causal=True, conditioned=False,
        )  # fmt: skip
        self.out = nn.Linear(config.hidden_dim, action_dim * (config.bins or 1))

    def forward(self, context: Tokens, actions: Tensor) -> Tensor:
        """What the head says at each step of ``actions`` (B, H, A), knowing those before: numbers (B, H, A) or logits.

        Logits are (B, H, A, bins). The last step is not looked at. Of fewer steps S < H the answer has S + 1.
        """
        before = self.step(actions[:, : self.horizon - 1].to(self.dtype))  # (B, H - 1, W)
        start = self.start.expand(len(actions), 1, -1)
        steps, _ = self.decoder(torch.cat([start, before], dim=1), self.decoder.remember(context))
        return self._read(steps)

    def loss(
        self,
        context: Tokens,
        actions: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        actions = blanked(actions, mask)  # the head sees the steps before, padding among them
        if self.config.bins is None:
            return masked_mean((self(context, actions) - actions).abs(), mask)
        seen = centre_of(bin_of(actions, self.config.bins), self.config.bins)  # as its own answers will be
        return masked_cross_entropy(self(context, seen), actions, mask)

    def predict(
        self, context: Tokens, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        self.refuse(prefix)
        memory, past = self.decoder.remember(context), None
        x = self.start.expand(len(context.mask), 1, -1)
        written: list[Tensor] = []
        for _ in range(self.horizon):
            steps, past = self.decoder(x, memory, past=past)
            action = self._decide(self._read(steps), generator)  # (B, 1, A)
            written.append(action)
            x = self.step(action.to(self.dtype))
        return torch.cat(written, dim=1)

    def _read(self, steps: Tensor) -> Tensor:
        said = widened(self.out(steps))
        return said if self.config.bins is None else said.unflatten(-1, (self.action_dim, self.config.bins))

    def _decide(self, said: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.config.bins is None:
            return said
        return centre_of(pick(said, self.config.answer, generator), self.config.bins)
