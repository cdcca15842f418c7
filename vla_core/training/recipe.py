"""A recipe: everything that decides a training run, from one YAML file and ``key=value`` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from vla_core.config import ConfigError, config_file, from_dict, load_yaml, override
from vla_core.contract import RobotContract
from vla_core.data.options import DataOptions
from vla_core.model.vla import MODEL_REGISTRY
from vla_core.model.vla import MiniVLARecipe as MiniVLARecipe
from vla_core.model.vla.sizes import check_images, check_rates, check_sees, model_sizes
from vla_core.observation.builder import ObservationSpec
from vla_core.observation.normalizer import Normalization
from vla_core.runtime.execution import Execution
from vla_core.training.options import Training as Training


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a policy sees, what it is, how it is executed, and on what and how it is trained.

    ``camera`` is the simulator's camera that ``vla demo`` records with unless it is told another. In a file ``model``
    may be the name of a preset in ``config/models``, or the path of such a file.
    """

    camera: str = "corner2"
    observation: ObservationSpec
    model: Annotated[Any, MODEL_REGISTRY, "Recipe"] = field(default_factory=MiniVLARecipe)
    normalization: Normalization = field(default_factory=Normalization)
    execution: Execution = field(default_factory=Execution)
    data: DataOptions = field(default_factory=DataOptions)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        self.execution.check(self.model.horizon, self.model.head)

    def model_config(self, contract: RobotContract, vocab_size: int) -> Any:
        """The whole model configuration for the robot; raises :class:`ConfigError` where the two do not fit."""
        check_sees(self.model.type, MODEL_REGISTRY[self.model.type].sees, self.observation)
        check_images(self.model, self.observation)
        check_rates(self.model, contract)
        return self.model.config(**model_sizes(self.observation, contract, vocab_size))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by file name, or by the name of one in ``config/train``."""
    path = config_file(name, "config/train", "recipe")
    whole = [assignment for assignment in overrides if assignment.partition("=")[0] == "model"]
    parts = [assignment for assignment in overrides if assignment not in whole]
    try:
        data = override(load_yaml(path), whole)
        if isinstance(data.get("model"), str):
            data["model"] = load_yaml(config_file(data["model"], "config/models", "model preset"))
        return from_dict(Recipe, override(data, parts))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load_preset(name: str, overrides: Sequence[str] = ()) -> Any:
    """Load a model's recipe by file name, or by the name of one in ``config/models``."""
    path = config_file(name, "config/models", "model preset")
    try:
        return from_dict(_Model, {"model": override(load_yaml(path), overrides)}).model
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A file of ``config/models``."""

    model: Annotated[Any, MODEL_REGISTRY, "Recipe"]
