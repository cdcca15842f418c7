"""A package of somebody else adds an encoder, a head, a sensor and a model, and configs name them: no import needed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.model.action_head import ACTION_HEAD_REGISTRY
from vla_core.model.sensor import SENSOR_REGISTRY
from vla_core.model.vla import MODEL_REGISTRY
from vla_core.model.vlm import ENCODER_REGISTRY
from vla_core.training.recipe import load_preset

from .helpers import SPEC, stream_messages, write_bag

REGISTRIES = (ENCODER_REGISTRY, ACTION_HEAD_REGISTRY, SENSOR_REGISTRY, MODEL_REGISTRY)
PARTS = """
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from vla_core.model.action_head import ACTION_HEAD_REGISTRY, ActionHeadBase
from vla_core.model.action_head.base import masked_mean
from vla_core.model.sensor import SENSOR_REGISTRY, SensorEncoder
from vla_core.model.tokens import Tokens
from vla_core.model.vla import MODEL_REGISTRY, VLAModel, VLAConfig, VLARecipe
from vla_core.model.vlm import ENCODER_REGISTRY, ImageEncoderConfig, VisionEncoderBase


@dataclass(frozen=True, kw_only=True)
class PatchesConfig(ImageEncoderConfig):
    type: Literal["patches"] = "patches"
    patch: int = 4
    output_dim: int = 16


class Patches(VisionEncoderBase):
    Config = PatchesConfig

    def __init__(self, config):
        super().__init__(config)
        self.output_dim = config.output_dim
        self.tokens_per_image = (config.size[0] // config.patch) * (config.size[1] // config.patch)
        self.conv = nn.Conv2d(3, config.output_dim, config.patch, stride=config.patch)

    def encode(self, images):
        return self.conv(images).flatten(2).transpose(1, 2)


ENCODER_REGISTRY["patches"] = Patches


@dataclass(frozen=True, kw_only=True)
class LinearHeadConfig:
    type: Literal["linear"] = "linear"


class LinearHead(ActionHeadBase):
    Config = LinearHeadConfig

    def __init__(self, config, **sizes):
        super().__init__(config, **sizes)
        self.net = nn.Linear(self.context_dim, self.horizon * self.action_dim)

    def loss(self, context, actions, mask, generator=None):
        return masked_mean((self.predict(context) - actions).abs(), mask)

    def predict(self, context, generator=None, prefix=None):
        self.refuse(prefix)
        return self.net(self.pooled(context)).unflatten(-1, (self.horizon, self.action_dim))


ACTION_HEAD_REGISTRY["linear"] = LinearHead


@dataclass(frozen=True, kw_only=True)
class SonarConfig:
    type: Literal["sonar"] = "sonar"
    output_dim: int = 8


class Sonar(SensorEncoder):
    Config = SonarConfig

    def __init__(self, config, *, input_dim):
        super().__init__()
        self.config, self.output_dim = config, config.output_dim
        self.net = nn.Linear(input_dim, config.output_dim)

    def forward(self, values, mask=None):
        return Tokens(self.net(torch.where(mask[..., None], values, 0.0)), mask)


SENSOR_REGISTRY["sonar"] = Sonar


@dataclass(frozen=True, kw_only=True)
class MyRecipe(VLARecipe):
    type: Literal["my_vla"] = "my_vla"

    def config(self, **sizes):
        return MyConfig(**vars(self), **sizes)


@dataclass(frozen=True, kw_only=True)
class MyConfig(VLAConfig):
    type: Literal["my_vla"] = "my_vla"


class MyModel(VLAModel):
    Config, Recipe = MyConfig, MyRecipe


MODEL_REGISTRY["my_vla"] = MyModel
"""
MODEL = {
    "type": "my_vla", "horizon": 4, "vision": {"type": "patches", "image_size": [6, 8], "patch": 2},
    "projector": {"type": "mlp"}, "language": {"type": "tiny_gru", "d_model": 16}, "head": {"type": "linear"},
}  # fmt: skip


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution: a module and its metadata with an entry point, as pip leaves them."""
    before = [dict(registry) for registry in REGISTRIES]
    site = tmp_path / "site"
    metadata = site / "my_parts-0.1.dist-info"
    metadata.mkdir(parents=True)
    (site / "my_parts.py").write_text(PARTS)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-parts\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[vla_ros.plugins]\nmine = my_parts\n")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield site
    sys.modules.pop("my_parts", None)
    for registry, old in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(old)  # type: ignore[arg-type]


def test_what_nobody_registered_is_an_error_with_the_choices() -> None:
    with pytest.raises(
        ConfigError, match=r"vision\.type: found 'patches', expected one of mobilenet_v2, tiny_cnn, vit"
    ):
        load_preset("tiny", ["vision={type: patches}"])


@pytest.mark.usefixtures("plugin")
def test_a_config_names_parts_of_a_plugin(tmp_path: Path) -> None:
    assert "my_parts" not in sys.modules
    recipe = load_preset("tiny", ["vision={type: patches, image_size: 8}", "head={type: linear}"])
    assert "my_parts" in sys.modules and type(recipe.vision).__name__ == "PatchesConfig"
    assert from_dict(type(recipe), to_dict(recipe)) == recipe
    driving = load_preset("driving", ["sensors.imu={type: sonar, output_dim: 4}"])
    assert driving.sensors["imu"].output_dim == 4


def test_a_model_of_a_plugin_is_trained_and_run_by_the_command_line(plugin: Path, tmp_path: Path) -> None:
    """In processes of their own, which never heard of the plug-in: the recipe and the checkpoint name it."""
    write_bag(tmp_path / "bags" / "one", stream_messages(20))
    recipe = {
        "observation": to_dict(SPEC), "model": MODEL, "execution": {"steps": 2},
        "training": {"steps": 2, "batch_size": 8},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    commands = [
        "convert bags --out data --recipe recipe.yaml",
        "train recipe.yaml --dataset data --out policy",
        "replay policy bags/one --out replayed",
        "inspect policy --sensitivity data",
    ]
    program = (
        f"import sys; sys.path[:0] = {[str(plugin), str(Path(__file__).parents[2])]!r}\n"
        "from vla_core.cli import main\n"
        f"for words in {commands!r}: assert main(words.split()) == 0, words\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["model"]["vision"]["type"] == "patches"
