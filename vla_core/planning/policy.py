"""A planner as a policy: chunks that a world model expects most of, with a trained policy's chunk as proposal.

It is a file ``planner.yaml``, or a folder with one:

    type: planner
    world: world                # folder of `vla train-world`, or a name on the hub; relative to the file
    checkpoint: checkpoint      # a policy that proposes; may be left out
    dreamer: dreamer            # of `vla dream`: another that proposes, and what lies beyond the horizon; likewise
    planner: {type: cem, horizon: 12}
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vla_core.config import ConfigError, from_dict, load_yaml, override
from vla_core.model.world_model import State
from vla_core.observation.builder import Observation
from vla_core.planning.imagination import score_from
from vla_core.planning.plan import CEMConfig, Plan, Planner, PlannerConfig
from vla_core.planning.tracking import Tracker
from vla_core.planning.views import joined, seen_by
from vla_core.reinforcement.dream import load as load_dreamer
from vla_core.reinforcement.dream import proposal as dreamt
from vla_core.reinforcement.imagination import Dreamer
from vla_core.runtime.chunk import ActionChunk, Continuation
from vla_core.runtime.execution import Execution
from vla_core.runtime.policy import Policy, PolicyError, noise_seed
from vla_core.world_checkpoint import WorldCheckpoint, world_fingerprint

DISAGREES = "model_disagrees"
SHOWN = 6  # pictures of a rollout


@dataclass(frozen=True, kw_only=True)
class PlannerSetup:
    """``planner.yaml``.

    ``world``       folder of a world model, or a name on the hub
    ``checkpoint``  a policy whose chunk is proposed to the planner; null: none
    ``dreamer``     folder of `vla dream`: its actor proposes too, its critic says what lies beyond the horizon
    ``planner``     how it searches
    ``discount``    of a reward from a step to the next
    ``stay_near``   what a squared unit of distance from the proposal costs, in normalized actions summed over rows
    ``budget_s``    time for a chunk, the proposal's inference included; null: all iterations
    ``surprise``    how many times the learned threshold posterior and prior may differ before nothing is planned
                    any more (the fault ``model_disagrees``); null: it is not watched
    ``execution``   how its chunks are executed; null: as the checkpoint's, or every half horizon
    """

    type: Literal["planner"] = "planner"
    world: str
    checkpoint: str | None = None
    dreamer: str | None = None
    planner: PlannerConfig = field(default_factory=CEMConfig)
    discount: float = 0.99
    stay_near: float = 0.0
    budget_s: float | None = None
    surprise: float | None = 1.0
    execution: Execution | None = None

    def __post_init__(self) -> None:
        if not 0 < self.discount <= 1:
            raise ConfigError(f"discount: expected above 0 and at most 1, found {self.discount}")
        if not 0 <= self.stay_near < float("inf"):
            raise ConfigError(f"stay_near: expected a number from 0 on, found {self.stay_near}")
        for name in ("budget_s", "surprise"):
            found = getattr(self, name)
            if found is not None and not 0 < found < float("inf"):
                raise ConfigError(f"{name}: expected null or a positive number, found {found}")


def load_setup(path: Path, overrides: Sequence[str] = ()) -> PlannerSetup:
    """Read a planner's file; places in it are relative to it."""
    try:
        setup = from_dict(PlannerSetup, override(load_yaml(path), overrides))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return dataclasses.replace(setup, world=_beside(path, setup.world),
                               checkpoint=setup.checkpoint and _beside(path, setup.checkpoint),
                               dreamer=setup.dreamer and _beside(path, setup.dreamer))  # fmt: skip


def setup_from(world: str, checkpoint: str | None, overrides: Sequence[str] = ()) -> PlannerSetup:
    """The same without a file; ``overrides`` are ``key=value`` of what would be in it."""
    plain: dict[str, object] = {"world": world, "checkpoint": checkpoint, "planner": {"type": "cem"}}
    try:
        return from_dict(PlannerSetup, override(plain, overrides))
    except ConfigError as error:
        raise ConfigError(f"planner: {error}") from None


def _beside(path: Path, place: str) -> str:
    """A place that is relative to the file ``path``, where it is there; else as it is."""
    found = path.parent / place
    return str(found) if found.exists() else place


class PlannerPolicy(Policy):
    """See the module.

    Args:
        proposer: the policy of ``setup.checkpoint``; another one may be given, or None for none.
        dreamer: what was learned in the world model's imagination; another one may be given, or None for none.
        seed: of the candidates, with the observation's stamp: a replayed observation after a replayed past gives the
            chunk that the robot got, unless time was short.
        now: the clock of the time budget, s.
    """

    def __init__(
        self, setup: PlannerSetup, world: WorldCheckpoint, proposer: Policy | None = None, *,
        dreamer: Dreamer | None = None, seed: int = 0, now: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        if proposer is not None:
            proposer.contract.check_same(world.contract, f"checkpoint {proposer.source}", "the world model")
        self.setup, self.world, self.proposer = setup, world, proposer
        self.contract = world.contract
        self.spec = world.config.observation if proposer is None else joined(proposer.spec, world.config.observation)
        self.horizon, self.head = setup.planner.horizon, setup.planner
        steps = max(1, self.horizon // 2)
        own = Execution(steps=steps) if proposer is None else proposer.execution
        self.execution = setup.execution or dataclasses.replace(own, steps=min(own.steps, self.horizon))
        self.execution.check(self.horizon, self.head)
        self.provenance: Mapping[str, str] = dict(world.config.provenance)
        self.model = None if proposer is None else proposer.model
        self.dreamer, self.seed, self._now = dreamer, seed, now
        bounds = np.stack([self.contract.action_low, self.contract.action_high])
        low, high = torch.from_numpy(world.normalizer.normalize("action", bounds))
        self.planner = Planner(setup.planner, torch.minimum(low, high), torch.maximum(low, high))
        self.tracker = Tracker(world)
        self.counts = {"plans": 0, "candidates": 0, "overruns": 0, "disagreements": 0}
        self._lock = threading.Lock()
        self._fault = ""
        self._planned: tuple[State, torch.Tensor, Plan] | None = None
        self._planned_ns: int | None = None

    @classmethod
    def load(cls, setup: PlannerSetup, seed: int = 0, dataset: str | None = None, source: str = "") -> PlannerPolicy:
        """The planner with its models from their folders."""
        from vla_core.runtime.loading import load_policy

        proposer = None if setup.checkpoint is None else load_policy(setup.checkpoint, seed, dataset)
        world, own = WorldCheckpoint.load(setup.world), world_fingerprint(setup.world)
        dreamer = None if setup.dreamer is None else load_dreamer(setup.dreamer, world.model, own)
        policy = cls(setup, world, proposer, dreamer=dreamer, seed=seed)
        policy.source = source or setup.world
        names = [own, *(() if proposer is None else (proposer.fingerprint,))]
        policy.fingerprint = "+".join(filter(None, names))
        return policy

    @torch.inference_mode()
    def predict(self, observation: Observation, continues: Continuation | None = None) -> ActionChunk:
        """The best chunk that was found in time; raises :class:`PolicyError` for a proposal that is not finite, and
        when what is seen is not what the model expected, which is the :attr:`fault` ``model_disagrees``."""
        began, stamp_ns = self._now(), observation.stamp_ns
        contract = self.contract
        state = self.tracker.see(seen_by(observation, self.spec, self.world.config.observation, contract))
        self._watch(stamp_ns)
        proposed = self._proposed(observation)
        dreamer = self.dreamer
        proposals = [] if proposed is None else [proposed]
        if dreamer is not None:
            proposals.append(dreamt(dreamer, self.world.model, state, self.horizon))
        score = score_from(self.world.model, state, discount=self.setup.discount,
                           value=None if dreamer is None else dreamer.value,
                           stay_near=None if proposed is None else proposed[0],
                           weight=self.setup.stay_near)  # fmt: skip
        budget_s = self.setup.budget_s
        with self._lock:
            passed = 0 if self._planned_ns is None else round((stamp_ns - self._planned_ns) / contract.chunk_step_ns)
            if not 0 <= passed < self.horizon:
                self.planner.forget()
        found = self.planner.plan(
            score, passed=max(0, passed), proposals=torch.cat(proposals) if proposals else None,
            budget_s=None if budget_s is None else budget_s - (self._now() - began), now=self._now,
            generator=torch.Generator().manual_seed(noise_seed(self.seed, stamp_ns)),
        )  # fmt: skip
        with self._lock:
            self._planned, self._planned_ns = (state, found.actions, found), stamp_ns
            self.counts["plans"] += 1
            self.counts["candidates"] += found.candidates
            self.counts["overruns"] += found.overrun_s > 0
        actions = self.world.normalizer.unnormalize("action", found.actions.numpy())
        actions = np.clip(actions, contract.action_low, contract.action_high)
        return ActionChunk(stamp_ns, contract.chunk_step_ns, actions, continues)

    def forget(self) -> None:
        self.tracker.forget()
        self._fault = ""
        if self.proposer is not None:
            self.proposer.forget()
        with self._lock:
            self.planner.forget()
            self._planned, self._planned_ns = None, None

    def executed(self, at_ns: int, values: np.ndarray) -> None:
        self.tracker.commanded(at_ns, values)
        if self.proposer is not None:
            self.proposer.executed(at_ns, values)

    def report(self) -> dict[str, float | int | str | None]:
        with self._lock:
            planned = self._planned
        plan = None if planned is None else planned[2]
        own: dict[str, float | int | str | None] = {
            "planner": self.setup.planner.type, **self.counts,
            "candidates_evaluated": None if plan is None else plan.candidates,
            "predicted_return": None if plan is None else plan.value,
            "overrun_ms": None if plan is None else 1e3 * plan.overrun_s,
            "surprise": self.tracker.surprise,
        }  # fmt: skip
        return {**({} if self.proposer is None else self.proposer.report()), **own}

    @torch.inference_mode()
    def imagined(self) -> np.ndarray | None:
        """Pictures of the newest plan's rollout side by side, a row a camera: (H, W, 3) uint8 RGB."""
        with self._lock:
            planned = self._planned
        model = self.world.model
        if planned is None or not model.config.cameras:
            return None
        state, actions, _ = planned
        states = model.imagine(state, actions[None], sample=False)
        shown = np.unique(np.linspace(0, len(actions) - 1, min(SHOWN, len(actions))).round().astype(int))
        decoded = model.decode(states.map(lambda x: x[0, shown]))
        rows = [torch.cat(list(pictures), dim=-1) for pictures in decoded.images.values()]  # (3, H, n W)
        strip = torch.cat(rows, dim=-2).permute(1, 2, 0)
        return (strip * 255).round().to(torch.uint8).numpy()

    @property
    def fault(self) -> str:
        return self._fault or ("" if self.proposer is None else self.proposer.fault)

    def close(self) -> None:
        if self.proposer is not None:
            self.proposer.close()

    def _watch(self, stamp_ns: int) -> None:
        found, limit = self.tracker.surprise, self.setup.surprise
        self._fault = ""
        if found is None or limit is None or found <= limit:
            return
        with self._lock:
            self.counts["disagreements"] += 1
        self._fault = (
            f"{DISAGREES}: what is seen is not what the world model expected: posterior and prior are {found:.3g} "
            f"times as far apart as in held-out episodes over the last {self.world.config.surprise_window} "
            f"observations, limit {limit:.3g}"
        )
        raise PolicyError(f"{self._fault} (stamp {stamp_ns})")

    def _proposed(self, observation: Observation) -> torch.Tensor | None:
        """The proposer's chunk (1, H, A), normalized; the last row is held where it is too short."""
        if self.proposer is None:
            return None
        chunk = self.proposer.predict(seen_by(observation, self.spec, self.proposer.spec, self.contract))
        rows = torch.from_numpy(self.world.normalizer.normalize("action", chunk.actions))
        return rows[torch.arange(self.horizon).clamp(max=len(rows) - 1)][None]
