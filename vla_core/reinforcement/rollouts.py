"""Episodes of a policy that tries things, by the very loop that evaluates it.

An episode is :func:`vla_core.evaluation.closed_loop.run_episode`: serialized messages, memory buffer, observation
builder, normalizer and chunk executor are those of the robot, so that nothing is learned which deployment does not see.
It depends on the weights and its seed alone, not on the number of processes.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from vla_core.checkpoint import Checkpoint
from vla_core.errors import VlaError
from vla_core.evaluation.closed_loop import run_episode, seen_by
from vla_core.observation.builder import Observation
from vla_core.reinforcement.chunks import Exploration, context_of, distribution
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.policy import CheckpointPolicy
from vla_core.sim.base import HasReward, SimulationError, View, World, is_over
from vla_core.sim.worlds import find, make_world, task_of
from vla_core.threads import one_thread

RewardKind = Literal["shaped", "sparse", "dense"]


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What is tried, and how it is rewarded.

    ``reward``  ``sparse``: 1 in the step that succeeds; ``dense``: the world's own, of each step; ``shaped``: success
                and the gain of the world's own, discounted (Ng, Harada and Russell 1999, "Policy invariance under
                reward transformations"), which changes no best policy and tells earlier what leads there
    """

    world: str
    max_steps: int
    reward: RewardKind = "shaped"
    discount: float = 0.99
    exploration: Exploration = field(default_factory=Exploration)


@dataclass(frozen=True)
class Episode:
    """One trial: K decisions over T control steps.

    ``chunks``     (K, R, A) float32, the rows that were drawn to be executed, normalized
    ``begins``     (K,) int64, the control step of each decision; the first is 0
    ``rewards``    (T,) float64
    ``gains``      (T,) float64, the world's own reward of each step as it was, 0 where it has none
    ``ended``      the episode came to its own end: there is nothing after it. Else the time was up
    """

    seed: int
    success: bool
    observations: tuple[Observation, ...]
    chunks: np.ndarray
    begins: np.ndarray
    rewards: np.ndarray
    gains: np.ndarray
    ended: bool

    @property
    def steps(self) -> int:
        """Control steps."""
        return len(self.rewards)


class ExploringPolicy(CheckpointPolicy):
    """A checkpoint that draws its chunks and remembers them, with what it saw."""

    def __init__(self, checkpoint: Checkpoint, exploration: Exploration, seed: int = 0) -> None:
        super().__init__(checkpoint, seed)
        self._exploration = exploration
        self.observations: list[Observation] = []
        self.chunks: list[np.ndarray] = []

    def forget(self) -> None:
        """Another episode begins."""
        self.observations, self.chunks = [], []

    def _run(self, observations: Sequence[Observation], generator: torch.Generator, prefix: object) -> np.ndarray:
        model = self.checkpoint.model
        inputs = self.inputs(observations, self.remembers)
        found = distribution(model, context_of(model, inputs), self.execution.steps, self._exploration)
        drawn: np.ndarray = found.sample(generator).numpy()  # (B, R, A)
        self.observations += observations
        self.chunks += list(drawn)
        return drawn


class Runner:
    """Runs episodes in this process; keeps the world."""

    def __init__(self, checkpoint: Checkpoint, trials: Trials, policy_seed: int = 0) -> None:
        self._trials = trials
        self.policy = ExploringPolicy(checkpoint, trials.exploration, policy_seed)
        self._core = PolicyCore(self.policy)
        self._instruction = None if find(trials.world)[0].journey else task_of(trials.world).instruction
        camera = self.policy.provenance.get("camera") if find(trials.world)[0].chooses_camera else None
        self._world = make_world(trials.world, seen_by(self.policy), View(camera=camera or None))
        if trials.reward != "sparse" and not isinstance(self._world, HasReward):
            self.close()
            raise SimulationError(f"{trials.world}: this world has no reward of its own; take the reward sparse")

    def run(self, seed: int) -> Episode:
        """The episode of ``seed``."""
        policy, world = self.policy, self._world
        policy.forget()
        gains: list[float] = []

        def note(world: World) -> None:
            gains.append(world.reward if isinstance(world, HasReward) else 0.0)

        run_episode(world, self._core, self._instruction, seed, self._trials.max_steps, each_step=note)
        stamps = np.array([observation.stamp_ns for observation in policy.observations])
        ended, success = is_over(world), world.success
        return Episode(
            seed, success, tuple(policy.observations), np.stack(policy.chunks),
            (stamps - stamps[0]) // policy.contract.step_ns, rewards(self._trials, gains, success, ended),
            np.array(gains), ended,
        )  # fmt: skip

    def close(self) -> None:
        """Free the world."""
        self._world.close()


def rewards(trials: Trials, gains: Sequence[float], success: bool, ended: bool) -> np.ndarray:
    """Rewards (T,) of an episode whose steps the world itself rewarded by ``gains`` (T,).

    A shaped reward is d P(s') - P(s) with the newest ``gain`` for the potential P(s), 0 before the first step and at
    an end, and 1 more for success.
    """
    own = np.asarray(gains, dtype=np.float64)
    if trials.reward == "dense":
        return own
    found = np.zeros(len(own))
    if trials.reward == "shaped":
        after = own.copy()
        if ended:
            after[-1] = 0.0
        found += trials.discount * after - np.concatenate([[0.0], own[:-1]])
    found[-1] += float(success)
    return found


class Collector(Protocol):
    """Episodes of the policy with these weights."""

    def __call__(self, weights: Mapping[str, Tensor], seeds: Sequence[int]) -> list[Episode]: ...


@contextmanager
def collector(checkpoint: Path, trials: Trials, workers: int = 1, policy_seed: int = 0) -> Iterator[Collector]:
    """What runs episodes, in the order of their seeds: here, or in ``workers`` processes that keep their worlds."""
    if workers == 1:
        runner = Runner(Checkpoint.load(checkpoint), trials, policy_seed)
        try:
            yield lambda weights, seeds: _run(runner, weights, seeds)
        finally:
            runner.close()
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker,
                               (checkpoint, trials, policy_seed))  # fmt: skip

    def run(weights: Mapping[str, Tensor], seeds: Sequence[int]) -> list[Episode]:
        plain = {name: tensor.numpy() for name, tensor in weights.items()}
        try:
            return list(pool.map(_work, [(plain, seed) for seed in seeds], chunksize=1))
        except BrokenProcessPool:
            raise VlaError("a worker process was killed, for want of memory perhaps; try fewer --workers") from None

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def _run(runner: Runner, weights: Mapping[str, Tensor], seeds: Sequence[int]) -> list[Episode]:
    runner.policy.checkpoint.model.load_state_dict(dict(weights))
    with one_thread():
        return [runner.run(seed) for seed in seeds]


_runner: Runner | None = None  # of a worker process


def _start_worker(checkpoint: Path, trials: Trials, policy_seed: int) -> None:
    global _runner
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C ends the pool
    torch.set_num_threads(1)
    _runner = Runner(Checkpoint.load(checkpoint), trials, policy_seed)


def _work(job: tuple[Mapping[str, np.ndarray], int]) -> Episode:
    assert _runner is not None
    weights, seed = job
    return _run(_runner, {name: torch.from_numpy(values) for name, values in weights.items()}, [seed])[0]
