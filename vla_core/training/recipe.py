"""A recipe: everything that decides a training run, from one YAML file and ``key=value`` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vla_core.config import ConfigError, from_dict, load_yaml, override
from vla_core.errors import choices
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.model.action_head.flow_action_head import FlowHeadConfig
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig
from vla_core.model.vla.mini_vla import MiniVLAConfig
from vla_core.model.vlm.vision_encoder import TinyCNNConfig
from vla_core.observation.builder import ObservationSpec
from vla_core.observation.normalizer import Normalization
from vla_core.resources import share
from vla_core.runtime.execution import Execution


@dataclass(frozen=True, kw_only=True)
class MiniVLARecipe:
    """The free choices of :class:`MiniVLAConfig`; cameras, sizes and vocabulary follow from the dataset."""

    type: Literal["mini_vla"] = "mini_vla"
    horizon: int = 8
    d_model: int = 128
    vision: TinyCNNConfig = field(default_factory=TinyCNNConfig)
    head: DiffusionHeadConfig | FlowHeadConfig | MLPHeadConfig = field(default_factory=DiffusionHeadConfig)

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ConfigError(f"horizon: expected at least 1, found {self.horizon}")
        if self.vision.d_model != self.d_model:
            raise ConfigError(f"vision.d_model: expected d_model ({self.d_model}), found {self.vision.d_model}")

    def config(self, cameras: tuple[str, ...], state_dim: int, action_dim: int, vocab_size: int) -> MiniVLAConfig:
        """The whole model configuration for a dataset."""
        return MiniVLAConfig(
            cameras=cameras, state_dim=state_dim, action_dim=action_dim, vocab_size=vocab_size,
            horizon=self.horizon, d_model=self.d_model, vision=self.vision, head=self.head,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Training:
    """The optimization. ``image_shift`` (pixels) and ``state_noise`` (normalized units) are its augmentation."""

    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 100
    gradient_clip: float | None = 1.0
    ema_decay: float | None = 0.999
    image_shift: int = 0
    state_noise: float = 0.0
    validate_every: int = 250
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"learning_rate: expected a positive number, found {self.learning_rate}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay: expected null or 0 to 1, found {self.ema_decay}")
        for name in ("image_shift", "state_noise", "warmup_steps", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected at least 0, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a policy sees, what it is, how it is executed and how it is trained.

    ``camera`` is the simulator's camera that ``vla demo`` records with unless it is told another.
    """

    camera: str = "corner2"
    observation: ObservationSpec
    model: MiniVLARecipe = field(default_factory=MiniVLARecipe)
    normalization: Normalization = field(default_factory=Normalization)
    execution: Execution = field(default_factory=Execution)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        self.execution.check(self.model.horizon, self.model.head)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by file name, or by the name of one in ``config/train``."""
    path = Path(name)
    if not path.is_file():
        folder = share("config/train")
        path = folder / f"{name}.yaml"
        if not path.is_file():
            raise ConfigError(f"no recipe {name!r}; choices: {choices(p.stem for p in folder.glob('*.yaml'))}, "
                              "or the path of a YAML file")  # fmt: skip
    try:
        return from_dict(Recipe, override(load_yaml(path), overrides))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
