"""Which parameters are trained how fast: groups by name, the optimizer, rates that are functions of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from vla_core.config import ConfigError
from vla_core.errors import choices
from vla_core.training.muon import Muon, hidden_matrices
from vla_core.training.options import ParameterGroup, Training

REST = "rest"  # parameters that no pattern names


@dataclass(frozen=True)
class Group:
    """Parameters by name, with their highest learning rate, their decay and the steps that train them."""

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    weight_decay: float
    freeze_until: int = 0
    freeze_after: int | None = None

    def trains(self, step: int) -> bool:
        """Whether ``step``, counted from 0, changes the parameters."""
        return self.freeze_until <= step and (self.freeze_after is None or step < self.freeze_after)


def parameter_groups(model: nn.Module, options: Training) -> list[Group]:
    """All parameters that require gradients, each in one group; a pattern without any raises :class:`ConfigError`."""
    left = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not left:
        raise ConfigError("model: nothing is trained: every part is frozen")
    names = tuple(left)
    groups = []
    for index, wanted in enumerate(options.groups):
        found = {name: p for name, p in left.items() if fnmatchcase(name, wanted.pattern)}
        if not found:
            raise ConfigError(f"training.groups[{index}].pattern: {wanted.pattern!r} names no parameter"
                              f"{_why(wanted, names)}; trained are: {choices(_summary(names))}")  # fmt: skip
        left = {name: p for name, p in left.items() if name not in found}
        groups.append(_group(wanted, found, options))
    if left:
        groups.append(Group(REST, left, options.learning_rate, options.weight_decay))
    if not any(group.trains(0) for group in groups):
        raise ConfigError("training.groups: nothing is trained at the first step; set a freeze_until to 0")
    return groups


def build_optimizer(model: nn.Module, groups: list[Group], options: Training) -> torch.optim.Optimizer:
    """``options.optimizer`` over ``groups`` of ``model``; biases and norms are not decayed unless ``decay_all``."""
    matrices = hidden_matrices(model) if options.optimizer == "muon" else set()
    parts: dict[tuple[str, float, bool], dict[str, Any]] = {}
    for group in groups:
        for name, p in group.parameters.items():
            decay = group.weight_decay if options.decay_all or p.ndim > 1 else 0.0
            part = parts.setdefault((group.name, decay, name in matrices), {
                "params": [], "name": group.name, "highest": group.learning_rate, "lr": group.learning_rate,
                "weight_decay": decay, "matrices": name in matrices,
            })  # fmt: skip
            part["params"].append(p)
    found = list(parts.values())
    return Muon(found) if options.optimizer == "muon" else torch.optim.AdamW(found, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, options: Training, step: int) -> dict[str, float]:
    """Set every group's rate for ``step`` and return them by the group's name."""
    share = rate_share(options, step)
    for group in optimizer.param_groups:
        group["lr"] = group["highest"] * share
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def rate_share(options: Training, step: int) -> float:
    """What is left of the highest rate at ``step``: linear warm-up, then cosine, linear or constant."""
    share = min(1.0, (step + 1) / max(1, options.warmup_steps))
    if options.schedule == "constant":
        return share
    done = step / options.steps
    fallen = 0.5 * (1.0 + math.cos(math.pi * done)) if options.schedule == "cosine" else 1.0 - done
    return share * (options.min_ratio + (1.0 - options.min_ratio) * fallen)


def _group(wanted: ParameterGroup, found: dict[str, nn.Parameter], options: Training) -> Group:
    rate, decay = wanted.learning_rate, wanted.weight_decay
    return Group(
        wanted.pattern, found, options.learning_rate if rate is None else rate,
        options.weight_decay if decay is None else decay, wanted.freeze_until, wanted.freeze_after,
    )  # fmt: skip


def _why(wanted: ParameterGroup, names: tuple[str, ...]) -> str:
    return " that an earlier group does not have" if any(fnmatchcase(n, wanted.pattern) for n in names) else ""


def _summary(names: tuple[str, ...]) -> list[str]:
    """The parts that the names begin with, with the number of parameters: a model has too many to list."""
    parts: dict[str, int] = {}
    for name in names:
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + 1
    return [f"{part}.* ({count})" if f"{part}." in " ".join(names) else part for part, count in parts.items()]
