"""What a run draws from: datasets filtered and split, normalized by their robot's statistics, mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vla_core.checkpoint import Checkpoint
from vla_core.contract import ContractError, RobotContract
from vla_core.data.batches import Batches
from vla_core.data.dataset import Dataset, statistics_of
from vla_core.data.mixture import Mixture
from vla_core.data.options import keep, split, weighted
from vla_core.errors import choices
from vla_core.model.vla import MODEL_REGISTRY
from vla_core.model.vla.sizes import check_sees, classes_of, columns
from vla_core.observation.batch import Tokenizer
from vla_core.observation.normalizer import Normalizer, Statistics, check_modes, entry_names
from vla_core.training.faults import TrainingError
from vla_core.training.recipe import Recipe


@dataclass(frozen=True)
class Sources:
    """Windows to train on and windows that are held out; ``notes`` say what was left out.

    The first dataset is the one that the policy is deployed for: contract and normalizer are its.
    """

    datasets: tuple[Dataset, ...]
    training: Batches | Mixture
    held_out: Batches | Mixture | None
    normalizers: tuple[Normalizer, ...]
    tokenizer: Tokenizer
    notes: tuple[str, ...]

    @property
    def contract(self) -> RobotContract:
        """Of the robot that the policy is for."""
        return self.datasets[0].contract

    @property
    def statistics(self) -> dict[str, Statistics]:
        """Of every dataset, by name, where there are several."""
        if len(self.datasets) == 1:
            return {}
        return {data.name: n.statistics for data, n in zip(self.datasets, self.normalizers, strict=True)}

    def record(self) -> list[dict[str, Any]]:
        """What tells this data from other data."""
        lengths = self.training.lengths
        return [
            {"name": data.name, "frames": data.frames, "windows": count, "statistics": normalizer.statistics}
            for data, count, normalizer in zip(self.datasets, lengths, self.normalizers, strict=True)
        ]


def build_sources(
    recipe: Recipe,
    datasets: Sequence[Dataset],
    validation: Sequence[Dataset | None],
    start: Checkpoint | None = None,
) -> Sources:
    """Filter, split, normalize and mix; ``validation`` has a held-out dataset, or none, for each of ``datasets``.

    Datasets of one robot are normalized by the statistics of all of them, those of other robots by their own.
    What goes on from the weights of ``start`` sees numbers and words as it did: all datasets are normalized by its
    statistics, and its tokenizer reads their instructions.
    """
    kind = MODEL_REGISTRY[recipe.model.type]
    check_sees(recipe.model.type, kind.sees, recipe.observation)
    check_modes(recipe.normalization, recipe.model.head)
    names = [data.name for data in datasets]
    if len(set(names)) < len(names):
        raise TrainingError(f"datasets of the same name: {', '.join(names)}; rename a folder, since statistics and "
                            "weights are kept by name")  # fmt: skip
    unknown = [name for name in recipe.data.weights if name not in names]
    if unknown:
        raise TrainingError(f"data.weights.{unknown[0]}: no such dataset; choices: {choices(names)}")
    trained, held_out, notes = [], [], []
    for data, other in zip(datasets, validation, strict=True):
        _check(recipe, data, datasets[0], other)
        kept, said = keep(data, recipe.data.filter)
        notes += said
        mine, rest = (kept, other) if other is not None else split(kept, recipe.data.validation)
        trained.append(weighted(mine, recipe.data.intervention_weight))
        held_out.append(rest)
    if start is not None:
        _check_start(recipe, start, datasets[0])
        tokenizer: Tokenizer = start.tokenizer
        normalizers = [start.normalizer] * len(trained)
    else:
        tokenizer = kind.tokenizer(recipe.model, list(dict.fromkeys(text for data in trained for text in data.tasks)))
        normalizers = _normalizers(recipe, trained)
    notes += [f"{d.name}: {line}" for d, n in zip(trained, normalizers, strict=True) for line in n.warnings()]
    shape = partial(Batches, horizon=recipe.model.horizon, tokenizer=tokenizer, remembers=kind.remembers,
                    classes=classes_of(recipe.model))  # fmt: skip
    parts = [shape(d, normalizer=n) for d, n in zip(trained, normalizers, strict=True)]
    rest_parts = [
        shape(d, normalizer=n)
        for d, n in zip(held_out, normalizers, strict=True) if d is not None
    ]  # fmt: skip
    weights = [recipe.data.weights.get(name, 1.0) for name in names] if recipe.data.weights else None
    return Sources(tuple(trained), _mixed(parts, weights), _mixed(rest_parts, None) if rest_parts else None,
                   tuple(normalizers), tokenizer, tuple(notes))  # fmt: skip


def _mixed(parts: Sequence[Batches], weights: Sequence[float] | None) -> Batches | Mixture:
    return parts[0] if len(parts) == 1 else Mixture(parts, weights)


def _normalizers(recipe: Recipe, datasets: Sequence[Dataset]) -> list[Normalizer]:
    """One for each dataset; those of one robot share theirs, since a number means the same in all of them."""
    made: list[Normalizer] = []
    for data in datasets:
        robot = [other for other in datasets if _same_robot(data.contract, other.contract)]
        known = [normalizer for other, normalizer in zip(datasets, made, strict=False) if other in robot]
        made.append(known[0] if known else _normalizer(recipe, robot))
    return made


def _normalizer(recipe: Recipe, datasets: Sequence[Dataset]) -> Normalizer:
    data = datasets[0]
    return Normalizer(recipe.normalization, statistics_of(datasets), columns(data.spec, data.contract),
                      entry_names(data.spec, data.contract))  # fmt: skip


def _check_start(recipe: Recipe, start: Checkpoint, first: Dataset) -> None:
    mine = {"observation": recipe.observation, "normalization": recipe.normalization}
    for name, wanted in mine.items():
        if getattr(start.config, name) != wanted:
            raise TrainingError(f"the checkpoint to start from has another {name} than the recipe: "
                                f"{getattr(start.config, name)} against {wanted}")  # fmt: skip
    start.contract.check_same(first.contract, "the checkpoint to start from", f"the dataset {first.name}")


def _check(recipe: Recipe, data: Dataset, first: Dataset, validation: Dataset | None) -> None:
    if data.spec != recipe.observation:
        raise TrainingError(f"the dataset {data.name} was built for another observation than the recipe's: {data.spec} "
                            f"against {recipe.observation}; convert the bags again")  # fmt: skip
    if len(data.contract.action_names) != len(first.contract.action_names):
        raise TrainingError(f"the datasets {first.name} and {data.name} have {len(first.contract.action_names)} and "
                            f"{len(data.contract.action_names)} actions; one model needs the same number")  # fmt: skip
    if validation and (validation.spec != data.spec or _differ(validation.contract, data.contract)):
        raise TrainingError(f"the validation dataset {validation.name} was built for another observation or contract "
                            f"than the dataset {data.name}")  # fmt: skip


def _same_robot(a: RobotContract, b: RobotContract) -> bool:
    """Whether one of them has what the other one has, and perhaps further sensors."""
    return not (_differ(a, b) and _differ(b, a))


def _differ(a: RobotContract, b: RobotContract) -> bool:
    try:
        a.check_same(b, "", "")
    except ContractError:
        return True
    return False
