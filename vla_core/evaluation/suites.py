"""Benchmarks by name: which tasks, with which words, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.sim.worlds import LIBERO_SUITES, SIM_REGISTRY, find, task_of

METAWORLD_STEPS = 500  # Meta-World's own limit
TASKS_OF_LIBERO = {suite: 90 if suite == "libero_90" else 10 for suite in LIBERO_SUITES}
SUITES = ("mt10", *LIBERO_SUITES, "driving")


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A task of an evaluation: its world's name, its words, of which seeds take turns, and its limit of steps.

    ``said_by`` the ``task``: these words throughout; by the ``world``: it says its own on the way, or those of another
    route (``swapped``), and there are no ``instructions`` here.
    """

    world: str
    instructions: tuple[str, ...] = ()
    max_steps: int
    said_by: Literal["task", "world", "swapped"] = "task"

    def __post_init__(self) -> None:
        if bool(self.instructions) != (self.said_by == "task"):
            raise ConfigError(f"instructions: expected {'at least one' if self.said_by == 'task' else 'none'}, found "
                              f"{len(self.instructions)}")  # fmt: skip
        if self.max_steps < 1:
            raise ConfigError(f"max_steps: expected at least 1, found {self.max_steps}")

    def instruction(self, seed: int) -> str | None:
        """The words of the episode of ``seed``; None where the world says them."""
        return self.instructions[seed % len(self.instructions)] if self.instructions else None


def worlds_of(suite: str) -> tuple[str, ...]:
    """The worlds of a suite; the error lists the suites."""
    if suite in TASKS_OF_LIBERO:
        return tuple(f"{suite}:{index}" for index in range(TASKS_OF_LIBERO[suite]))
    if suite == "mt10":
        from vla_core.sim.instructions import MT10

        return MT10
    if suite == "driving":
        from vla_core.sim.driving.routes import KINDS

        return tuple(f"driving:{kind}" for kind in KINDS)
    raise VlaError(f"unknown suite {suite!r}; choices: {choices(SUITES)}")


def assignments(
    names: tuple[str, ...], suite: str | None = None, instructions: str = "canonical",
    instruction: str | None = None, max_steps: int | None = None,
) -> tuple[Assignment, ...]:  # fmt: skip
    """The tasks ``names`` and those of ``suite``.

    Args:
        instructions: which of a task's words: ``canonical`` (its own), ``train`` or ``unseen`` paraphrases, or
            ``swapped``, those of other tasks. A world that says its own has no paraphrases.
        instruction: other words for all of them.
        max_steps: another limit for all of them.
    """
    found = []
    for name in dict.fromkeys((*names, *(worlds_of(suite) if suite else ()))):
        task = task_of(name)
        limit = METAWORLD_STEPS if suite == "mt10" else task.max_steps
        if instruction is None and find(name)[0].journey:
            found.append(Assignment(world=name, max_steps=max_steps or limit, said_by=_said_by(name, instructions)))
            continue
        words = (instruction,) if instruction is not None else _words(name, task.instruction, instructions)
        found.append(Assignment(world=name, instructions=words, max_steps=max_steps or limit))
    return tuple(found)


def _said_by(name: str, split: str) -> Literal["world", "swapped"]:
    if split not in ("canonical", "swapped"):
        raise VlaError(f"{name} has no paraphrases: expected the instructions canonical or swapped, found {split!r}")
    return "world" if split == "canonical" else "swapped"


def _words(name: str, own: str, split: str) -> tuple[str, ...]:
    if split == "canonical":
        return (own,)
    from vla_core.sim.instructions import Split, instructions

    simulator, task = find(name)
    if simulator is not SIM_REGISTRY["metaworld"]:
        raise VlaError(f"{name} has no paraphrases: expected the instructions canonical, found {split!r}")
    return instructions(task, cast(Split, split))
