"""Model-predictive control by sampling: random shooting, the cross-entropy method and path integrals.

All candidates of an iteration are one tensor, and what they are worth is asked in one call. Returns that are not
finite count as worse than any other. A plan is always there, and finite: in the worst case it is the first proposal.

Shapes: N candidates, H steps, A actions, P proposals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.checks import at_least_one
from vla_core.planning.deadline import Deadline, IterationTimes

Score = Callable[[Tensor], Tensor]  # candidates (N, H, A) to their returns (N,)


@dataclass(frozen=True, kw_only=True)
class _Sampling:
    """What the planners share.

    ``horizon``     steps that a plan looks ahead
    ``candidates``  tried at once in an iteration, the proposals among them
    ``iterations``  at most; fewer, and of fewer candidates, where the deadline says so
    ``std``         of the first candidates about the best proposal, as a share of each action's half range
    ``smooth``      correlation of the noise from a step to the next: hands do not tremble
    """

    horizon: int = 12
    candidates: int = 256
    iterations: int = 4
    std: float = 0.5
    smooth: float = 0.0

    def __post_init__(self) -> None:
        at_least_one(self, "horizon", "candidates", "iterations")
        if not 0 < self.std < float("inf"):
            raise ConfigError(f"std: expected a positive number, found {self.std}")
        if not 0 <= self.smooth < 1:
            raise ConfigError(f"smooth: expected 0 to below 1, found {self.smooth}")


@dataclass(frozen=True, kw_only=True)
class ShootingConfig(_Sampling):
    """Random shooting: uniform candidates over the whole range, and the best one; ``std`` is not used."""

    type: Literal["shooting"] = "shooting"


@dataclass(frozen=True, kw_only=True)
class CEMConfig(_Sampling):
    """The cross-entropy method (Rubinstein 1999; Chua et al. 2018): a normal distribution moves to its ``elites``.

    ``momentum`` is what stays of the old mean and deviation; ``min_std`` keeps it from freezing, as a share of the
    half range. The plan is the best candidate ever seen, or the last mean where that is better.
    """

    type: Literal["cem"] = "cem"
    elites: int = 24
    momentum: float = 0.1
    min_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.elites <= self.candidates:
            raise ConfigError(f"elites: expected 1 to candidates ({self.candidates}), found {self.elites}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum: expected 0 to below 1, found {self.momentum}")
        if not 0 <= self.min_std < float("inf"):
            raise ConfigError(f"min_std: expected a number from 0 on, found {self.min_std}")


@dataclass(frozen=True, kw_only=True)
class MPPIConfig(_Sampling):
    """Model-predictive path integral control (Williams et al. 2017): the mean of all candidates, weighted by return.

    Weights are exp of the return in its standard deviations over the candidates, divided by ``temperature``, so that
    no unit of reward matters. The noise shrinks by ``decay`` each iteration.
    """

    type: Literal["mppi"] = "mppi"
    temperature: float = 0.3
    decay: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature: expected a positive number, found {self.temperature}")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay: expected above 0 and at most 1, found {self.decay}")


PLANNER_REGISTRY: dict[str, Any] = {}
PlannerConfig = Annotated[Any, PLANNER_REGISTRY]


@dataclass(frozen=True)
class Plan:
    """The best actions (H, A) that were found, finite and within bounds.

    ``value`` is the return that is expected of them, None where no candidate's return was finite or none was tried;
    ``candidates`` were evaluated in ``iterations``; ``overrun_s`` is how far past the deadline it came.
    """

    actions: Tensor
    value: float | None
    candidates: int
    iterations: int
    elapsed_s: float
    overrun_s: float


def plan(
    score: Score,
    config: Any,
    low: Tensor,
    high: Tensor,
    *,
    proposals: Tensor | None = None,
    deadline: Deadline | None = None,
    generator: torch.Generator | None = None,
) -> Plan:
    """Search for the actions of most return.

    Args:
        score: candidates (N, H, A) to returns (N,), all in one call.
        config: of one of the planners, by its ``type``.
        low: (A,) bounds of the actions, as ``high``.
        proposals: (P, H, A) to begin with, cut to the bounds; the best one is where the search is about. Without any,
            the middle of the range.
        deadline: when it must be there; None takes all iterations.
    """
    if config.type not in PLANNER_REGISTRY:
        raise VlaError(f"no planner {config.type!r} registered; choices: {choices(PLANNER_REGISTRY)}")
    search: _Search = PLANNER_REGISTRY[config.type](score, config, low, high, proposals, generator)
    return search.run(deadline or Deadline(None))


class Planner:
    """Plans one after the other: each is proposed to the next, shifted by the time that has passed.

    Remembers how long iterations take as well, so that the first one of a plan is expected right.
    """

    def __init__(self, config: Any, low: Tensor, high: Tensor) -> None:
        self.config, self.low, self.high = config, low, high
        self.last: Tensor | None = None
        self._times = IterationTimes()

    def forget(self) -> None:
        """Another episode begins."""
        self.last = None

    def plan(self, score: Score, *, passed: int = 0, proposals: Tensor | None = None, budget_s: float | None = None,
             now: Callable[[], float] | None = None, generator: torch.Generator | None = None) -> Plan:  # fmt: skip
        """The next plan, ``passed`` steps after the last one; ``proposals`` (P, h, A) of any length, such as a
        policy's chunk: cut, or their last row held, to the horizon."""
        deadline = Deadline(budget_s, seen=self._times) if now is None else Deadline(budget_s, now, self._times)
        given = [] if self.last is None else [shifted(self.last, passed)[None]]
        if proposals is not None:
            given.append(fitted(proposals, self.config.horizon))
        found = plan(score, self.config, self.low, self.high, proposals=torch.cat(given) if given else None,
                     deadline=deadline, generator=generator)  # fmt: skip
        self.last = found.actions
        return found


def shifted(actions: Tensor, steps: int) -> Tensor:
    """(H, A) without the first ``steps`` rows, the last row held instead."""
    rows = (torch.arange(len(actions)) + steps).clamp(max=len(actions) - 1)
    return actions[rows]


def fitted(actions: Tensor, horizon: int) -> Tensor:
    """(P, h, A) to (P, horizon, A): cut, or the last row held."""
    rows = torch.arange(horizon).clamp(max=actions.shape[1] - 1)
    return actions[:, rows]


class _Search:
    """One plan in the making; a subclass says how candidates are drawn and what is learned from their returns."""

    def __init__(self, score: Score, config: Any, low: Tensor, high: Tensor, proposals: Tensor | None,
                 generator: torch.Generator | None) -> None:  # fmt: skip
        if low.shape != high.shape or low.dim() != 1 or not bool((low < high).all()):
            raise VlaError(
                f"bounds of shapes {tuple(low.shape)} and {tuple(high.shape)}; expected (A,), low below high"
            )
        self.score, self.config, self.low, self.high, self.generator = score, config, low, high, generator
        self.half = (high - low) / 2
        middle = (low + high) / 2
        shape = (config.horizon, len(low))
        if proposals is None:
            proposals = middle.expand(1, *shape)
        if proposals.shape[1:] != shape:
            raise VlaError(f"proposals of shape {tuple(proposals.shape)}, expected (P, {shape[0]}, {shape[1]})")
        proposals = torch.where(proposals.isfinite(), proposals, middle)
        self.proposals = torch.minimum(torch.maximum(proposals, low), high)
        self.mean = self.proposals[0].clone()
        self.std = (config.std * self.half).expand(shape).clone()
        self.best, self.best_value = self.proposals[0], -torch.inf
        self.tried = 0

    def run(self, deadline: Deadline) -> Plan:
        """Iterate until all is done, or time is up."""
        done = 0
        while done < self.config.iterations and (count := deadline.candidates(self.config.candidates)):
            begin_s = deadline.time()
            candidates = self._candidates(done, count)
            self._learn(candidates, self._returns(candidates))
            deadline.timed(count, begin_s)
            done += 1
        if not done:
            deadline.nothing_was_done()
        elif self.answers_mean and deadline.candidates(1):
            begin_s = deadline.time()
            self._returns(self.mean[None])
            deadline.timed(1, begin_s)
        value = None if self.best_value == -torch.inf else float(self.best_value)
        return Plan(self.best.clone(), value, self.tried, done, deadline.elapsed_s, deadline.overrun_s)

    answers_mean = True

    def _candidates(self, iteration: int, count: int) -> Tensor:
        """(``count``, H, A) of this iteration; the first one has all proposals in it."""
        known = self.proposals[:count] if iteration == 0 else self.mean[None]
        return torch.cat([known, self._draw(count - len(known))])

    def _draw(self, count: int) -> Tensor:
        noise = self._noise(count)
        return torch.minimum(torch.maximum(self.mean + self.std * noise, self.low), self.high)

    def _noise(self, count: int) -> Tensor:
        """(count, H, A) of variance 1, correlated from step to step by ``smooth``."""
        shape = (count, *self.mean.shape)
        noise = torch.empty(shape, dtype=self.mean.dtype).normal_(generator=self.generator)
        keep = self.config.smooth
        if keep:
            for k in range(1, shape[1]):
                noise[:, k] = keep * noise[:, k - 1] + (1 - keep**2) ** 0.5 * noise[:, k]
        return noise

    def _returns(self, candidates: Tensor) -> Tensor:
        """What candidates are worth; the best one ever is kept."""
        found = self.score(candidates)
        if found.shape != (len(candidates),):
            raise VlaError(f"returns of shape {tuple(found.shape)} of {len(candidates)} candidates, expected one each")
        found = torch.where(found.isfinite(), found, -torch.inf)
        self.tried += len(candidates)
        place = int(found.argmax())
        if found[place] > self.best_value:
            self.best, self.best_value = candidates[place], float(found[place])
        return found

    def _learn(self, candidates: Tensor, returns: Tensor) -> None:
        """Draw better ones the next time."""


class _Shooting(_Search):
    Config: type[Any] = ShootingConfig
    answers_mean = False

    def _draw(self, count: int) -> Tensor:
        shape = (count, *self.mean.shape)
        return self.low + (self.high - self.low) * torch.empty(shape, dtype=self.mean.dtype).uniform_(
            generator=self.generator
        )


class _CEM(_Search):
    Config: type[Any] = CEMConfig

    def _candidates(self, iteration: int, count: int) -> Tensor:
        if iteration:
            return super()._candidates(iteration, count)
        # Each proposal gets its share of the candidates: nobody knows yet which of them is the good one.
        known = self.proposals[:count]
        more = count - len(known)
        centres = known[torch.arange(more) % len(known)]
        drawn = torch.minimum(torch.maximum(centres + self.std * self._noise(more), self.low), self.high)
        return torch.cat([known, drawn])

    def _learn(self, candidates: Tensor, returns: Tensor) -> None:
        config = self.config
        share = max(2, round(config.elites * len(candidates) / config.candidates))  # where time was short, fewer
        count = min(share, config.elites, int(returns.isfinite().sum()))
        if count == 0:
            return
        elites = candidates[returns.topk(count).indices]
        std = elites.std(dim=0, correction=0) if count > 1 else self.std
        self.mean = config.momentum * self.mean + (1 - config.momentum) * elites.mean(dim=0)
        self.std = (config.momentum * self.std + (1 - config.momentum) * std).clamp(min=0)
        self.std = torch.maximum(self.std, config.min_std * self.half)


class _MPPI(_CEM):
    Config: type[Any] = MPPIConfig

    def _learn(self, candidates: Tensor, returns: Tensor) -> None:
        finite = returns.isfinite()
        if not finite.any():
            return
        spread = returns[finite].std(correction=0).clamp(min=1e-12)
        weights = torch.where(finite, (returns - returns.max()) / (self.config.temperature * spread), -torch.inf)
        self.mean = (weights.softmax(dim=0)[:, None, None] * candidates).sum(dim=0)
        self.std = self.std * self.config.decay


PLANNER_REGISTRY.update({"shooting": _Shooting, "cem": _CEM, "mppi": _MPPI})
