"""Recurrent state-space model: a deterministic GRU state and a stochastic latent (Hafner et al. 2019, 2023).

    h_t = f(h_{t-1}, z_{t-1}, a_{t-1})        deterministic
    prior      p(z_t | h_t)                   what is expected
    posterior  q(z_t | h_t, e_t)              what is seen, e_t the embedding of the observation

The action of a tick is the one that *led to it*: ``previous[t]`` was executed from tick t - 1 to tick t.

Shapes: B rows, T ticks, H imagined steps, D deterministic state, Z stochastic latent, P its parameters, E embedding,
A action.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_core.errors import VlaError
from vla_core.model.checks import at_least_one
from vla_core.model.world_model.distributions import CategoricalLatentConfig, LatentConfig, build_latent


class State(NamedTuple):
    """What the model knows of the world: ``deter`` (..., D), ``stoch`` (..., Z), ``parameters`` (..., P) of ``stoch``.

    Rows of it are states too: index, expand and stack with :meth:`map`.
    """

    deter: Tensor
    stoch: Tensor
    parameters: Tensor

    @property
    def features(self) -> Tensor:
        """What heads, decoders, actors and critics read: (..., D + Z)."""
        return torch.cat([self.deter, self.stoch], dim=-1)

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """The same change of every tensor, such as ``lambda x: x[:, -1]``."""
        return State(*(change(tensor) for tensor in self))

    def detach(self) -> State:
        """Without gradient."""
        return self.map(torch.Tensor.detach)

    def repeat(self, times: int) -> State:
        """Each row ``times`` times: (B, ...) to (B times, ...), copies side by side."""
        return self.map(lambda x: x.repeat_interleave(times, dim=0))


class Observed(NamedTuple):
    """Posterior states (B, T, ...) and the prior's parameters (B, T, P) at the same ticks."""

    states: State
    prior: Tensor


@dataclass(frozen=True, kw_only=True)
class RSSMConfig:
    """Sizes of :class:`RSSM`; ``deter`` numbers of the GRU's state, ``hidden`` of the layers around it."""

    deter: int = 256
    hidden: int = 256
    latent: LatentConfig = field(default_factory=CategoricalLatentConfig)

    def __post_init__(self) -> None:
        at_least_one(self, "deter", "hidden")


class NormGRUCell(nn.Module):
    """A GRU with one layer norm over all gates (DreamerV2): (B, I), (B, D) to (B, D).

    The update gate begins nearly shut, so that the state is kept from the first training step on.
    """

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.gates = nn.Linear(width_in + width, 3 * width, bias=False)
        self.norm = nn.LayerNorm(3 * width)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        reset, candidate, update = self.norm(self.gates(torch.cat([inputs, state], dim=-1))).chunk(3, dim=-1)
        update = torch.sigmoid(update - 1)
        return torch.lerp(state, torch.tanh(torch.sigmoid(reset) * candidate), update)


class RSSM(nn.Module):
    """See the module. Every function is batch-first; ``sample=False`` takes the most likely latent instead."""

    def __init__(self, config: RSSMConfig, *, action_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.action_dim, self.embed_dim = action_dim, embed_dim
        self.latent = build_latent(config.latent)
        self.feature_dim = config.deter + self.latent.size
        # What the layers read is projected apart, so that actions and embeddings of all ticks go through at once.
        self.from_stoch = nn.Linear(self.latent.size, config.hidden, bias=False)
        self.from_action = nn.Linear(action_dim, config.hidden, bias=False)
        self.input_norm = nn.LayerNorm(config.hidden)
        self.cell = NormGRUCell(config.hidden, config.deter)
        self.prior = _head(config.deter, config.hidden, self.latent.parameters)
        self.posterior_deter = nn.Linear(config.deter, config.hidden, bias=False)
        self.posterior_embed = nn.Linear(embed_dim, config.hidden, bias=False)
        self.posterior = _tail(config.hidden, self.latent.parameters)
        self.initial_deter = nn.Parameter(torch.zeros(config.deter))

    def initial(self, batch: int) -> State:
        """States (B, ...) before anything was seen: a learned one, with the latent that is most likely there."""
        deter = torch.tanh(self.initial_deter).expand(batch, -1)
        parameters = self.prior(deter[:1]).expand(batch, -1)
        return State(deter, self.latent.mode(parameters), parameters)

    def step(self, state: State, action: Tensor, *, sample: bool = True,
             generator: torch.Generator | None = None) -> State:  # fmt: skip
        """The state (B, ...) that is expected after ``action`` (B, A)."""
        deter = self._advance(state.deter, state.stoch, self.from_action(action))
        parameters = self.prior(deter)
        return State(deter, self._draw(parameters, sample, generator), parameters)

    def update(self, state: State, action: Tensor, embedding: Tensor, first: Tensor | None = None, *,
               sample: bool = True, generator: torch.Generator | None = None) -> Observed:  # fmt: skip
        """One tick of :meth:`observe`: after ``action`` (B, A) the observation ``embedding`` (B, E) is seen."""
        if first is None:
            first = torch.zeros(len(action), dtype=torch.bool, device=action.device)
        found = self.observe(embedding[:, None], action[:, None], first[:, None], state, sample=sample,
                             generator=generator)  # fmt: skip
        return Observed(found.states.map(lambda x: x[:, 0]), found.prior[:, 0])

    def observe(self, embeddings: Tensor, previous: Tensor, first: Tensor, state: State | None = None, *,
                sample: bool = True, generator: torch.Generator | None = None) -> Observed:  # fmt: skip
        """Posterior states (B, T, ...) of ticks that were seen.

        Args:
            embeddings: (B, T, E).
            previous: (B, T, A), the action that led to each tick; of no account where ``first``.
            first: (B, T) bool, the ticks that begin an episode: what was before is forgotten there.
            state: (B, ...), that of the tick before the first one; None is :meth:`initial`.
        """
        batch, ticks = first.shape
        if embeddings.shape != (batch, ticks, self.embed_dim) or previous.shape != (batch, ticks, self.action_dim):
            raise VlaError(f"embeddings {tuple(embeddings.shape)} and actions {tuple(previous.shape)} at {batch}x"
                           f"{ticks} ticks; expected (..., {self.embed_dim}) and (..., {self.action_dim})")  # fmt: skip
        fresh = self.initial(batch)
        state = fresh if state is None else state
        acted = self.from_action(torch.where(first[..., None], 0.0, previous))
        seen = self.posterior_embed(embeddings)
        forget = first.any(dim=0).tolist()
        deter, stoch = state.deter, state.stoch
        deters, stochs, posteriors = [], [], []
        for tick in range(ticks):
            if forget[tick]:
                begins = first[:, tick, None]
                deter, stoch = torch.where(begins, fresh.deter, deter), torch.where(begins, fresh.stoch, stoch)
            deter = self._advance(deter, stoch, acted[:, tick])
            parameters = self.posterior(self.posterior_deter(deter) + seen[:, tick])
            stoch = self._draw(parameters, sample, generator)
            deters.append(deter)
            stochs.append(stoch)
            posteriors.append(parameters)
        states = State(torch.stack(deters, 1), torch.stack(stochs, 1), torch.stack(posteriors, 1))
        return Observed(states, self.prior(states.deter))

    def imagine(self, state: State, actions: Tensor, *, sample: bool = True,
                generator: torch.Generator | None = None) -> State:  # fmt: skip
        """Expected states (B, H, ...) after each of ``actions`` (B, H, A), without looking.

        ``state`` (B, ...), or one row for all of them.
        """
        batch = len(actions)
        deter, stoch = (x if len(x) == batch else x.expand(batch, -1) for x in (state.deter, state.stoch))
        acted = self.from_action(actions)
        found = []
        for k in range(actions.shape[1]):
            deter = self._advance(deter, stoch, acted[:, k])
            parameters = self.prior(deter)
            stoch = self._draw(parameters, sample, generator)
            found.append((deter, stoch, parameters))
        return State(*(torch.stack(parts, dim=1) for parts in zip(*found, strict=True)))

    def _advance(self, deter: Tensor, stoch: Tensor, acted: Tensor) -> Tensor:
        return self.cell(F.silu(self.input_norm(self.from_stoch(stoch) + acted)), deter)

    def _draw(self, parameters: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        return self.latent.sample(parameters, generator) if sample else self.latent.mode(parameters)


def _head(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, hidden, bias=False), *_tail(hidden, width_out))


def _tail(hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, width_out))
