"""Fine-tuning by trial: episodes in the simulator, PPO, again; from a checkpoint to a checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vla_core import hub
from vla_core.checkpoint import Checkpoint
from vla_core.config import ConfigError
from vla_core.reinforcement.chunks import Exploration, check_learns
from vla_core.reinforcement.ppo import PPO, Learner
from vla_core.reinforcement.rollouts import Episode, RewardKind, Trials, collector
from vla_core.sim.worlds import task_of
from vla_core.training.callbacks import TensorBoardLog

SEED_STEP = 50_000  # from the first episode of one training seed to that of the next


@dataclass(frozen=True, kw_only=True)
class Reinforcement:
    """What is learned, how long, and how.

    ``steps``      control steps in the simulator; the iteration that reaches them is the last
    ``seed``       of the weights' batches and of the policy's noise
    ``first_seed`` of the episodes; choose ones that neither demonstrations nor evaluations have
    ``max_steps``  of an episode; null: the task's own. Fewer tell as much: a limit is no end of the world
    ``reward``     as :class:`~vla_core.reinforcement.rollouts.Trials` has it
    """

    task: str = "push-v3"
    steps: int = 200_000
    seed: int = 0
    first_seed: int = 100_000
    max_steps: int | None = None
    reward: RewardKind = "shaped"
    exploration: Exploration = field(default_factory=Exploration)
    ppo: PPO = field(default_factory=PPO)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("seed", 0), ("first_seed", 0), ("max_steps", 1)):
            found = getattr(self, name)
            if found is not None and found < least:
                raise ConfigError(f"{name}: expected at least {least}, found {found}")


@dataclass(frozen=True)
class Progress:
    """After an iteration: ``steps`` and ``episodes`` so far, ``success`` and mean reward of its own episodes."""

    iteration: int
    steps: int
    episodes: int
    success: float
    reward: float
    kl_imitation: float

    @property
    def note(self) -> str:
        """In a few words."""
        return f"success {self.success:.2f}  reward {self.reward:.3f}  KL to imitation {self.kl_imitation:.2f}"


@dataclass(frozen=True)
class Result:
    """The policy, and what it cost: control steps in the simulator and wall time."""

    checkpoint: Checkpoint
    steps: int
    episodes: int
    seconds: float
    history: tuple[Progress, ...]


def reinforce(
    place: Path | str,
    options: Reinforcement,
    workers: int = 1,
    log_dir: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Improve the checkpoint at ``place`` by its own trials; the result does not depend on ``workers``."""
    folder = hub.local_folder(place)
    checkpoint = Checkpoint.load(folder)
    check_learns(checkpoint, str(place))
    trials = Trials(
        world=options.task, max_steps=options.max_steps or task_of(options.task).max_steps, reward=options.reward,
        discount=options.ppo.discount, exploration=options.exploration,
    )  # fmt: skip
    learner = Learner(checkpoint, options.ppo, options.exploration, options.seed)
    log = None if log_dir is None else TensorBoardLog(log_dir)
    began, steps, count = time.monotonic(), 0, 0
    history: list[Progress] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over several threads are others, and the other core has a simulator
    try:
        with collector(folder, trials, workers, options.seed) as collect:
            while steps < options.steps:
                first = options.first_seed + options.seed * SEED_STEP + count
                episodes = collect(learner.weights(), range(first, first + options.ppo.episodes))
                figures = learner.update(episodes)
                steps += sum(episode.steps for episode in episodes)
                count += len(episodes)
                history.append(_progress(len(history) + 1, steps, count, episodes, figures.kl_imitation))
                if log is not None:
                    log.write(steps, figures.scalars() | _scalars(history[-1], episodes))
                report(history[-1])
    finally:
        torch.set_num_threads(threads)
        if log is not None:
            log.close()
    told = {"reinforced": f"{options.task}, {steps} control steps of {count} episodes, from {place}"}
    config = dataclasses.replace(checkpoint.config, provenance={**checkpoint.config.provenance, **told})
    learned = dataclasses.replace(checkpoint, config=config, model=learner.model.requires_grad_(True).eval())
    return Result(learned, steps, count, time.monotonic() - began, tuple(history))


def _progress(iteration: int, steps: int, count: int, episodes: list[Episode], kl: float) -> Progress:
    success = sum(episode.success for episode in episodes) / len(episodes)
    reward = sum(float(episode.rewards.sum()) for episode in episodes) / len(episodes)
    return Progress(iteration, steps, count, success, reward, kl)


def _scalars(progress: Progress, episodes: list[Episode]) -> dict[str, float]:
    length = sum(episode.steps for episode in episodes) / len(episodes)
    return {"trials/success": progress.success, "trials/reward": progress.reward, "trials/steps": length}
