"""The presets of config/models with random weights, their plain counterparts, and inputs for both."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from test.benchmarks.model_peers import PlainDriving, PlainVLA
from vla_core.contract import RobotContract
from vla_core.model.inputs import Masked, ModelInputs
from vla_core.model.vla import build_model
from vla_core.model.vla.multi_sensor_vla import pose_matrix
from vla_core.model.vla.sizes import model_sizes
from vla_core.training.recipe import load_preset, load_recipe

WORDS = 12  # ids of an instruction
VOCABULARY = 1000


@dataclass(frozen=True, kw_only=True)
class Case:
    """A preset as it is measured: how many of its layers (None: all), and the batch of a training step."""

    preset: str
    vision_layers: int | None = None
    language_layers: int | None = None
    train_batch: int = 1
    memory: bool = True

    @property
    def title(self) -> str:
        """What a row's name begins with."""
        cut = [f"{count} {part} layers" for part, count in (("vision", self.vision_layers),
                                                            ("language", self.language_layers)) if count]  # fmt: skip
        return f"{self.preset} ({', '.join(cut)})" if cut else self.preset


CASES = {
    case.preset: case
    for case in (
        Case(preset="tiny", train_batch=32),
        Case(preset="small", train_batch=4),
        Case(preset="edge"),
        Case(preset="base", vision_layers=6, language_layers=6),
        Case(preset="large", vision_layers=2, language_layers=1, memory=False),
        Case(preset="driving", vision_layers=2, language_layers=4),
    )
}


def configuration(case: Case) -> Any:
    """The model configuration: the preset's, without pretrained weights, with the case's layers."""
    recipe = load_preset(case.preset)
    if hasattr(recipe.vision, "pretrained"):
        recipe = dataclasses.replace(recipe, vision=dataclasses.replace(recipe.vision, pretrained=None))
    if hasattr(recipe.language, "pretrained"):
        recipe = dataclasses.replace(recipe, language=dataclasses.replace(recipe.language, pretrained=None))
    if case.vision_layers:
        cut = dataclasses.replace(recipe.vision, architecture={"num_hidden_layers": case.vision_layers})
        recipe = dataclasses.replace(recipe, vision=cut)
    if case.language_layers:
        recipe = dataclasses.replace(
            recipe, language=dataclasses.replace(recipe.language, layers=case.language_layers)
        )  # fmt: skip
    if case.preset == "driving":
        sizes = model_sizes(load_recipe("driving").observation, RobotContract.load("vehicle"), VOCABULARY)
    else:
        sizes = {"cameras": ("front",), "state_dim": 8, "action_dim": 7, "vocab_size": VOCABULARY}
    return recipe.config(**sizes)


def make(case: Case) -> torch.nn.Module:
    """The model of this package."""
    torch.manual_seed(0)
    return build_model(configuration(case))


def make_plain(case: Case) -> torch.nn.Module:
    """The plain modules of the same sizes."""
    torch.manual_seed(0)
    config = configuration(case)
    if case.preset == "driving":
        return PlainDriving(config, {name: pose_matrix(pose) for name, pose in config.mounts.items()})
    return PlainVLA(config)


def inputs_of(case: Case, batch: int = 1, words: int = WORDS) -> ModelInputs:
    """Observations in which all is there."""
    config = configuration(case)
    random = torch.Generator().manual_seed(1)
    yes = torch.ones(batch, dtype=torch.bool)
    sensors: dict[str, Any] = {}
    if case.preset == "driving":
        spec = load_recipe("driving").observation
        sensors["clouds"] = {
            name: rows(batch, spec.clouds[name].max_points, len(columns), random, 20.0)
            for name, columns in config.clouds.items()
        }
        sensors["sequences"] = {
            name: rows(batch, 40, len(columns), random) for name, columns in config.sequences.items()
        }  # fmt: skip
        height, width = config.vision.size
        camera = torch.tensor([[300.0, 0.0, width / 2], [0.0, 300.0, height / 2], [0.0, 0.0, 1.0]])
        sensors["intrinsics"] = {name: Masked(camera.expand(batch, 3, 3), yes) for name in config.cameras}
    return ModelInputs(
        images={name: torch.rand(batch, 3, *config.vision.size, generator=random) for name in config.cameras},
        state=torch.randn(batch, config.state_dim, generator=random),
        tokens=torch.randint(3, VOCABULARY, (batch, words), generator=random),
        image_mask=dict.fromkeys(config.cameras, yes),
        state_mask=yes,
        token_mask=torch.ones(batch, words, dtype=torch.bool),
        **sensors,
    )


def rows(batch: int, count: int, columns: int, random: torch.Generator, scale: float = 1.0) -> Masked:
    """Points or samples (B, N, C); x, y and z of points spread over ``scale`` m, less in z."""
    values = torch.randn(batch, count, columns, generator=random)
    values[..., :2] *= scale
    return Masked(values, torch.ones(batch, count, dtype=torch.bool))


def chunk_of(case: Case, batch: int) -> tuple[Tensor, Tensor]:
    """Actions and mask of a training batch."""
    config = configuration(case)
    random = torch.Generator().manual_seed(2)
    shape = (batch, config.horizon, config.action_dim)
    return torch.rand(shape, generator=random) * 2 - 1, torch.ones(shape[:2], dtype=torch.bool)


@torch.no_grad()
def encode(model: Any, inputs: ModelInputs) -> None:
    """Observations to context, for either kind of model; one in training mode runs its whole sequence at once."""
    model(inputs) if isinstance(model, PlainVLA) else model.encode(inputs)


def predict(model: Any, inputs: ModelInputs, *, anew: bool = False) -> None:
    """Observations to a chunk; ``anew``: as in the first control step with an instruction."""
    if anew and not isinstance(model, PlainVLA):
        model.prefix_cache.clear()
    model.predict(inputs)


def train(model: Any, inputs: ModelInputs, actions: Tensor, mask: Tensor) -> None:
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    loss = model.loss(inputs, actions) if isinstance(model, PlainVLA) else model.loss(inputs, actions, mask)
    loss.backward()


def on(device: str, make_one: Callable[[Case], torch.nn.Module], case: Case) -> torch.nn.Module:
    """A model on ``device``; what was there before is freed first."""
    gc.collect()
    model = make_one(case).to(device)
    for plain in (part for part in model.modules() if isinstance(part, PlainDriving)):
        plain.poses = {name: pose.to(device) for name, pose in plain.poses.items()}
    return model
