"""Past observations and actions to the context of the newest step, from a whole window or step by step.

Shapes: B batch, T steps of the window, oldest first, W ``max_len``, D context width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vla_core.errors import VlaError
from vla_core.model.checks import at_least_one, divides
from vla_core.model.sensor.base import there
from vla_core.model.temporal.temporal_encoder import Memory, TemporalEncoder
from vla_core.model.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class HistoryConfig:
    """Sizes of :class:`HistoryEncoder`; a step sees ``max_len`` observations, itself included."""

    type: Literal["history"] = "history"
    context_dim: int = 256
    layers: int = 2
    heads: int = 4
    max_len: int = 16

    def __post_init__(self) -> None:
        at_least_one(self, "context_dim", "layers", "heads", "max_len")
        divides(self, "heads", "context_dim")

    def fake(self, batch: int, *, obs_dim: int, action_dim: int) -> tuple[Tensor, Tensor]:
        """Observations (B, W, obs_dim) and actions (B, W - 1, action_dim)."""
        return torch.randn(batch, self.max_len, obs_dim), torch.randn(batch, self.max_len - 1, action_dim)


class HistoryMemory(NamedTuple):
    """What a stream keeps: the last W observations and the W - 1 actions between them."""

    observations: Memory
    actions: Memory


class HistoryEncoder(nn.Module):
    """The context of a step from the W observations up to it and the W - 1 actions between them.

    Observation t and the action taken after it both have the time t, so that a step never sees its own action. What
    is absent is not remembered; a step whose own observation is absent asks with a learned embedding instead. The
    context is masked where a step sees nothing at all.
    """

    Config = HistoryConfig

    def __init__(self, config: HistoryConfig, *, obs_dim: int, action_dim: int) -> None:
        super().__init__()
        self.config = config
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.output_dim = config.context_dim
        self.observation = _embedding(obs_dim, config.context_dim)
        self.action = _embedding(action_dim, config.context_dim)
        self.absent = nn.Parameter(torch.zeros(config.context_dim))
        self.transformer = TemporalEncoder(
            width=config.context_dim, layers=config.layers, heads=config.heads, max_len=config.max_len, kinds=2
        )

    def forward(
        self,
        observations: Tensor,
        actions: Tensor,
        observation_mask: Tensor | None = None,
        action_mask: Tensor | None = None,
    ) -> Tokens:
        """The context of the newest step, as one token (B, 1, D).

        Args:
            observations: (B, T, obs_dim), normalized; T may be more than W, and what is older has no influence.
            actions: (B, T - 1, action_dim), normalized; action t was taken after observation t.
            observation_mask: (B, T) bool, None where all are there.
            action_mask: (B, T - 1) bool, None where all are there.
        """
        self._check(observations, actions)
        observations, observation_mask = there(observations, observation_mask, 2)
        actions, action_mask = there(actions, action_mask, 2)
        size = min(observations.shape[1], self.config.max_len)
        return self._encode(
            *_newest(observations, observation_mask, size), *_newest(actions, action_mask, size - 1), queries=1
        )

    def sequence(
        self,
        observations: Tensor,
        actions: Tensor,
        observation_mask: Tensor | None = None,
        action_mask: Tensor | None = None,
    ) -> Tokens:
        """The context of every step of a sequence of any length, (B, T, D); each as of the window that ends there."""
        self._check(observations, actions)
        observations, observation_mask = there(observations, observation_mask, 2)
        actions, action_mask = there(actions, action_mask, 2)
        return self._encode(observations, observation_mask, actions, action_mask, queries=observations.shape[1])

    def start(self, batch: int) -> HistoryMemory:
        """The memory before the first step of an episode."""
        size = self.config.max_len
        return HistoryMemory(self.transformer.nothing(batch, size), self.transformer.nothing(batch, size - 1))

    def step(
        self,
        memory: HistoryMemory,
        observation: Tensor,
        action: Tensor | None = None,
        observation_mask: Tensor | None = None,
        action_mask: Tensor | None = None,
    ) -> tuple[Tokens, HistoryMemory]:
        """The context (B, 1, D) of the next step and the memory after it, as :meth:`forward` of all that came so far.

        Args:
            memory: of the step before, or of :meth:`start`; it stays as it is.
            observation: (B, obs_dim).
            action: (B, action_dim) taken after the observation of the step before; None at the first step.
            observation_mask: (B,) bool, None where all are there.
            action_mask: (B,) bool, None where all are there.
        """
        observation, seen = there(observation, observation_mask, 1)
        if action is None:
            action = observation.new_zeros(len(observation), self.action_dim)
            action_mask = torch.zeros_like(seen)
        action, taken = there(action, action_mask, 1)
        query, observed = self._observe(observation[:, None], seen[:, None])
        memory = HistoryMemory(
            memory.observations.push(observed), memory.actions.push(self._act(action[:, None], taken[:, None]))
        )
        ages = torch.arange(self.config.max_len - 1, -1, -1, device=observation.device)[None]  # (1, W)
        return self._attend(query, memory, ages, ages[:, :-1]), memory

    def _encode(self, observations: Tensor, seen: Tensor, actions: Tensor, taken: Tensor, *, queries: int) -> Tokens:
        """The contexts of the last ``queries`` steps."""
        times = torch.arange(observations.shape[1], device=observations.device)
        query, observed = self._observe(observations, seen)
        ages = times[-queries:, None] - times  # (Q, T)
        action_ages = ages[:, :-1].masked_fill(ages[:, :-1] == 0, -1)  # a step's own action is its future
        memory = HistoryMemory(observed, self._act(actions, taken))
        return self._attend(query[:, -queries:], memory, ages, action_ages)

    def _attend(self, query: Tensor, memory: HistoryMemory, ages: Tensor, action_ages: Tensor) -> Tokens:
        return Tokens(*self.transformer(query, [(memory.observations, ages), (memory.actions, action_ages)]))

    def _observe(self, observations: Tensor, mask: Tensor) -> tuple[Tensor, Memory]:
        """What the steps ask with, (B, T, D), and what is remembered of them."""
        embedded = self.observation(observations.to(self.absent.dtype))
        return torch.where(mask[..., None], embedded, self.absent), self.transformer.remember(embedded, mask)

    def _act(self, actions: Tensor, mask: Tensor) -> Memory:
        return self.transformer.remember(self.action(actions.to(self.absent.dtype)), mask)

    def _check(self, observations: Tensor, actions: Tensor) -> None:
        batch, steps = observations.shape[:2]
        expected = ((batch, steps, self.obs_dim), (batch, max(steps - 1, 0), self.action_dim))
        if not steps or (observations.shape, actions.shape) != expected:
            found = f"observations {tuple(observations.shape)} and actions {tuple(actions.shape)}"
            raise VlaError(f"a history of {found}; expected (B, T, {self.obs_dim}) and (B, T - 1, {self.action_dim}), "
                           "T at least 1")  # fmt: skip


def _newest(values: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    start = values.shape[1] - size
    return values[:, start:], mask[:, start:]


def _embedding(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))
