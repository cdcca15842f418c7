"""A recipe of a world model: what it sees, what it is, what counts as reward, and how it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from vla_core.config import ConfigError, config_file, from_dict, load_yaml, override
from vla_core.contract import RobotContract
from vla_core.data.options import DataOptions, Validation
from vla_core.data.sequences import RewardSource
from vla_core.model.vla.sizes import check_images
from vla_core.model.world_model import WORLD_MODEL_REGISTRY, WorldModelRecipe
from vla_core.observation.builder import ObservationSpec
from vla_core.observation.normalizer import Normalization
from vla_core.training.options import ParameterGroup, Training
from vla_core.world_checkpoint import world_sizes


@dataclass(frozen=True, kw_only=True)
class WorldTraining:
    """The optimization, and what is kept on the way; as of a policy (:class:`vla_core.training.options.Training`).

    ``ticks``    length of a sequence; ``batch_size`` sequences make an update
    ``validate_every``, ``validation_batch``   steps from one held-out loss to the next, and of how many sequences
    """

    steps: int = 3000
    batch_size: int = 16
    ticks: int = 32
    learning_rate: float = 6e-4
    weight_decay: float = 0.0
    decay_all: bool = False
    groups: tuple[ParameterGroup, ...] = ()
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    min_ratio: float = 0.1
    gradient_clip: float | None = 100.0
    validate_every: int = 250
    validation_batch: int = 64
    log_every: int = 10
    save_every: int = 1000
    keep: int = 2
    explosion: float | None = 1000.0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.ticks < 2:
            raise ConfigError(f"ticks: expected at least 2, found {self.ticks}")
        self.optimizer  # noqa: B018 - its own checks

    @property
    def optimizer(self) -> Training:
        """What the optimizer's functions take."""
        return Training(
            steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate,
            weight_decay=self.weight_decay, decay_all=self.decay_all, groups=self.groups, schedule=self.schedule,
            warmup_steps=self.warmup_steps, min_ratio=self.min_ratio, gradient_clip=self.gradient_clip,
            validate_every=self.validate_every, validation_batch=self.validation_batch, log_every=self.log_every,
            save_every=self.save_every, keep=self.keep, explosion=self.explosion, seed=self.seed, device=self.device,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WorldRecipe:
    """See the module.

    ``rewards``  what arriving somewhere is worth: the ``simulator``'s reward, the ``outcome`` (1 at the end of an
                 episode that succeeded), or what a ``classifier`` of success, trained from outcomes, says
    ``ends``     outcomes after which there is nothing more to earn: the model learns that the episode is over there.
                 Time that ran out is no such end, and a task that is done is none where its reward goes on
    ``surprise_quantile``  of the divergence of posterior and prior on held-out episodes: the limit above which the
                 model disagrees with what is seen (windows of ``surprise_window`` observations)
    """

    observation: ObservationSpec
    model: Annotated[Any, WORLD_MODEL_REGISTRY, "Recipe"] = field(default_factory=WorldModelRecipe)
    normalization: Normalization = field(default_factory=Normalization)
    rewards: RewardSource = "simulator"
    ends: tuple[str, ...] = ()
    surprise_quantile: float = 0.999
    surprise_window: int = 8
    data: DataOptions = field(default_factory=lambda: DataOptions(validation=Validation(fraction=0.15)))
    training: WorldTraining = field(default_factory=WorldTraining)

    def __post_init__(self) -> None:
        unknown = [outcome for outcome in self.ends if outcome not in ("succeeded", "failed", "aborted")]
        if unknown:
            raise ConfigError(f"ends: no outcome {unknown[0]!r}; choices: aborted, failed, succeeded")
        if not 0 < self.surprise_quantile <= 1:
            raise ConfigError(f"surprise_quantile: expected above 0 and at most 1, found {self.surprise_quantile}")
        if self.surprise_window < 1:
            raise ConfigError(f"surprise_window: expected at least 1, found {self.surprise_window}")

    def model_config(self, contract: RobotContract) -> Any:
        """The whole model configuration for the robot; raises :class:`ConfigError` where the two do not fit."""
        check_images(self.model, self.observation)
        return self.model.config(**world_sizes(self.observation, contract))


def load_world_recipe(name: str, overrides: Sequence[str] = ()) -> WorldRecipe:
    """Load a recipe by file name, or by the name of one in ``config/world``."""
    path = config_file(name, "config/world", "recipe of a world model")
    try:
        return from_dict(WorldRecipe, override(load_yaml(path), overrides))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
