"""Meta-World's MT10, and what its tasks are called in words: their own sentence, paraphrases, and unseen ones."""

from __future__ import annotations

import functools
from typing import Literal

from vla_core.config import ConfigError, load_yaml
from vla_core.errors import choices
from vla_core.resources import share
from vla_core.sim.metaworld import instruction_for

# Ten tasks of one robot, in the order of Yu et al. 2019 (Meta-World), with the third version of their rewards.
MT10: tuple[str, ...] = (
    "reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3",
    "button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3",
)  # fmt: skip

Split = Literal["canonical", "train", "unseen", "swapped"]
SPLITS: tuple[Split, ...] = ("canonical", "train", "unseen", "swapped")


def instructions(task: str, split: Split = "canonical") -> tuple[str, ...]:
    """Return sentences for a task.

    ``canonical``  its own
    ``train``      its own and the paraphrases to train with
    ``unseen``     the paraphrases that are kept for evaluation
    ``swapped``    the own sentences of the other nine tasks of MT10: who succeeds all the same did not listen

    Raises :class:`ConfigError` for an unknown split, and for a task that has no such sentences.
    """
    if split not in SPLITS:
        raise ConfigError(f"instructions: found the split {split!r}, expected one of {choices(SPLITS)}")
    own = instruction_for(task)
    if split == "canonical":
        return (own,)
    known = _paraphrases()
    if task not in known:
        raise ConfigError(f"instructions: no {split} sentences for {task!r}; there are some for: {choices(known)}")
    if split == "swapped":
        return tuple(instruction_for(other) for other in MT10 if other != task)
    return (own, *known[task]["train"]) if split == "train" else tuple(known[task]["unseen"])


@functools.cache
def _paraphrases() -> dict[str, dict[str, list[str]]]:
    return load_yaml(share("config/instructions/mt10.yaml"))
