"""Benchmarks by name: which tasks, with which words, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.sim.worlds import LIBERO_SUITES, SIM_REGISTRY, find, task_of

METAWORLD_STEPS = 500  # Meta-World's own limit
TASKS_OF_LIBERO = {suite: 90 if suite == "libero_90" else 10 for suite in LIBERO_SUITES}
SUITES = ("mt10", *LIBERO_SUITES)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A task of an evaluation: its world's name, its words, of which seeds take turns, and its limit of steps."""

    world: str
    instructions: tuple[str, ...]
    max_steps: int

    def __post_init__(self) -> None:
        if not self.instructions:
            raise ConfigError("instructions: expected at least one")
        if self.max_steps < 1:
            raise ConfigError(f"max_steps: expected at least 1, found {self.max_steps}")

    def instruction(self, seed: int) -> str:
        """The words of the episode of ``seed``."""
        return self.instructions[seed % len(self.instructions)]


def worlds_of(suite: str) -> tuple[str, ...]:
    """The worlds of a suite; the error lists the suites."""
    if suite in TASKS_OF_LIBERO:
        return tuple(f"{suite}:{index}" for index in range(TASKS_OF_LIBERO[suite]))
    if suite == "mt10":
        from vla_core.sim.instructions import MT10

        return MT10
    raise VlaError(f"unknown suite {suite!r}; choices: {choices(SUITES)}")


def assignments(
    names: tuple[str, ...], suite: str | None = None, instructions: str = "canonical",
    instruction: str | None = None, max_steps: int | None = None,
) -> tuple[Assignment, ...]:  # fmt: skip
    """The tasks ``names`` and those of ``suite``.

    Args:
        instructions: which of a task's words: ``canonical`` (its own), ``train`` or ``unseen`` paraphrases, or
            ``swapped``, those of other tasks.
        instruction: other words for all of them.
        max_steps: another limit for all of them.
    """
    found = []
    for name in dict.fromkeys((*names, *(worlds_of(suite) if suite else ()))):
        task = task_of(name)
        limit = METAWORLD_STEPS if suite == "mt10" else task.max_steps
        words = (instruction,) if instruction is not None else _words(name, task.instruction, instructions)
        found.append(Assignment(world=name, instructions=words, max_steps=max_steps or limit))
    return tuple(found)


def _words(name: str, own: str, split: str) -> tuple[str, ...]:
    if split == "canonical":
        return (own,)
    from vla_core.sim.instructions import Split, instructions

    simulator, task = find(name)
    if simulator is not SIM_REGISTRY["metaworld"]:
        raise VlaError(f"{name} has no paraphrases: expected the instructions canonical, found {split!r}")
    return instructions(task, cast(Split, split))
