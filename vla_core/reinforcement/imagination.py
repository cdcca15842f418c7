"""Actor and critic that learn in a world model's imagination (Hafner et al. 2023, "Mastering diverse domains through
world models", DreamerV3): no step in the simulator, only states that the model has seen and what it expects of actions.

Shapes: B imagined trajectories, H steps, F features of a state, A entries of an action.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from vla_core.config import ConfigError
from vla_core.model.checks import at_least_one
from vla_core.model.world_model import State
from vla_core.model.world_model.decoding import TwoHotHead, norm_mlp
from vla_core.model.world_model.distributions import TwoHotConfig

LEAST_STD, MOST_STD = 0.1, 1.0  # DreamerV3's bounded normal
LEAST_RANGE = 1.0  # returns that differ by less are not blown up


@dataclass(frozen=True, kw_only=True)
class Dreaming:
    """The algorithm's numbers; ``discount`` and ``trace`` are gamma and lambda of the returns.

    ``entropy``    weight of the actor's entropy
    ``slow``       decay of the averaged critic that the critic is held to
    ``range_decay``  of the running range, 5 % to 95 %, that returns are measured in
    """

    horizon: int = 15
    hidden: int = 128
    layers: int = 2
    learning_rate: float = 3e-4
    gradient_clip: float = 100.0
    discount: float = 0.99
    trace: float = 0.95
    entropy: float = 3e-4
    slow: float = 0.98
    range_decay: float = 0.99
    critic: TwoHotConfig = TwoHotConfig()  # noqa: RUF009 - it is frozen

    def __post_init__(self) -> None:
        at_least_one(self, "horizon", "hidden", "layers")
        for name in ("discount", "trace", "slow", "range_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected 0 to 1, found {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected a positive number, found {getattr(self, name)}")


class Dream(Protocol):
    """What is needed of a world model (:class:`vla_core.model.world_model.WorldModel`)."""

    def imagine(self, state: State, actions: Tensor, *, sample: bool = True,
                generator: torch.Generator | None = None) -> State: ...  # fmt: skip

    def predict_rewards(self, state: State) -> Tensor: ...

    def predict_continues(self, state: State) -> Tensor: ...


def lambda_returns(rewards: Tensor, goes_on: Tensor, values: Tensor, trace: float) -> Tensor:
    """R_t = r_t + c_t ((1 - l) v_t + l R_{t+1}), R_H = v_H (eq. 5), all (B, H).

    ``rewards`` are of arriving at each state, ``goes_on`` the discount times the probability that there is more after
    it, ``values`` what the critic says of it.
    """
    ahead = values[:, -1]
    found = []
    for t in reversed(range(rewards.shape[1])):
        ahead = rewards[:, t] + goes_on[:, t] * ((1 - trace) * values[:, t] + trace * ahead)
        found.append(ahead)
    return torch.stack(found[::-1], dim=1)


class Actor(nn.Module):
    """A normal distribution of the next normalized action (..., A), its mean within [-1, 1]."""

    def __init__(self, feature_dim: int, action_dim: int, options: Dreaming) -> None:
        super().__init__()
        self.net = norm_mlp(feature_dim, options.hidden, options.layers, 2 * action_dim)

    def forward(self, features: Tensor) -> Normal:
        mean, spread = self.net(features).chunk(2, dim=-1)
        return Normal(torch.tanh(mean), LEAST_STD + (MOST_STD - LEAST_STD) * torch.sigmoid(spread + 2.0))


@dataclass(frozen=True)
class Figures:
    """Of one update: mean return that was imagined, losses, and the actor's entropy in nats."""

    imagined_return: float
    actor_loss: float
    critic_loss: float
    entropy: float


class Dreamer:
    """Learns by :meth:`update` from states that the world model has inferred of real observations.

    :meth:`value` and :meth:`act` are what a planner takes: the worth of a state beyond its horizon, and a proposal.
    """

    def __init__(self, world: Any, feature_dim: int, action_dim: int, options: Dreaming, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self._world: Dream = world
        self.options, self.feature_dim, self.action_dim = options, feature_dim, action_dim
        self.actor = Actor(feature_dim, action_dim, options)
        self.critic = TwoHotHead(feature_dim, options.hidden, options.layers, options.critic)
        self._slow = copy.deepcopy(self.critic).requires_grad_(False)
        self._optimizer = torch.optim.Adam(
            [{"params": self.actor.parameters()}, {"params": self.critic.parameters()}], lr=options.learning_rate
        )  # fmt: skip
        self._generator = torch.Generator().manual_seed(seed)
        self._range: float | None = None

    @property
    def parts(self) -> nn.ModuleDict:
        """All weights that are learned."""
        return nn.ModuleDict({"actor": self.actor, "critic": self.critic, "slow": self._slow})

    @torch.no_grad()
    def value(self, state: State) -> Tensor:
        """What a state is worth from there on (N,)."""
        found: Tensor = self._slow(state.features)
        return found

    @torch.no_grad()
    def act(self, state: State) -> Tensor:
        """The actor's mean action (N, A), normalized."""
        found: Tensor = self.actor(state.features).mean
        return found

    def update(self, start: State) -> Figures:
        """Imagine from ``start`` (B, ...), and learn of it; the world model stays as it is."""
        options = self.options
        features, actions, after = self._imagine(start.detach())
        with torch.no_grad():
            rewards = self._world.predict_rewards(after)
            goes_on = options.discount * self._world.predict_continues(after)
            returns = lambda_returns(rewards, goes_on, self._slow(after.features), options.trace)
            # What an earlier end makes unlikely counts less.
            weights = torch.cumprod(torch.cat([torch.ones_like(goes_on[:, :1]), goes_on[:, :-1]], dim=1), dim=1)
            advantage = (returns - self._slow(features)) / self._scale(returns)
        drawn = self.actor(features)
        entropy = drawn.entropy().sum(-1)
        likely = drawn.log_prob(actions).sum(-1)
        actor_loss = -(weights * (likely * advantage + options.entropy * entropy)).mean()
        critic_loss = (weights * (self.critic.loss(features, returns)
                                  + self.critic.loss(features, self._slow(features)))).mean()  # fmt: skip
        self._optimizer.zero_grad(set_to_none=True)
        (actor_loss + critic_loss).backward()
        for part in (self.actor, self.critic):
            nn.utils.clip_grad_norm_(part.parameters(), options.gradient_clip)
        self._optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self._slow.parameters(), self.critic.parameters(), strict=True):
                slow.lerp_(fast, 1 - options.slow)
        return Figures(
            float(returns[:, 0].mean()), actor_loss.item(), critic_loss.item(), float(entropy.detach().mean())
        )

    @torch.no_grad()
    def _imagine(self, state: State) -> tuple[Tensor, Tensor, State]:
        """Features (B, H, F) at which actions (B, H, A) were drawn, and the states (B, H, ...) after them."""
        features, actions, after = [], [], []
        for _ in range(self.options.horizon):
            drawn = self.actor(state.features)
            noise = torch.randn(drawn.mean.shape, generator=self._generator)
            action = drawn.mean + drawn.stddev * noise
            features.append(state.features)
            actions.append(action)
            # The world knows actions within their range alone.
            ahead = self._world.imagine(state, action.clamp(-1, 1)[:, None], generator=self._generator)
            state = ahead.map(lambda x: x[:, 0])
            after.append(state)
        states = State(*(torch.stack(parts, dim=1) for parts in zip(*after, strict=True)))
        return torch.stack(features, dim=1), torch.stack(actions, dim=1), states

    def _scale(self, returns: Tensor) -> float:
        """The running range of returns, 5 % to 95 %, at least 1 (eq. 12)."""
        low, high = torch.quantile(returns.flatten(), torch.tensor([0.05, 0.95], dtype=returns.dtype)).tolist()
        decay = self.options.range_decay
        self._range = high - low if self._range is None else decay * self._range + (1 - decay) * (high - low)
        return max(LEAST_RANGE, self._range)
