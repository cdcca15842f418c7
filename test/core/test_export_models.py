"""Whole models as graphs: language models, memory, and every sensor, with what is missing masked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_core.checkpoint import Checkpoint
from vla_core.contract import RobotContract, Stream
from vla_core.evaluation.policy_bench import fresh
from vla_core.export.verify import observations
from vla_core.model.action_head import MLPHeadConfig
from vla_core.model.fusion.sensor_fusion import CrossModalConfig
from vla_core.model.sensor import RadarConfig
from vla_core.model.temporal.history import HistoryConfig
from vla_core.model.vla.mini_vla import MiniVLARecipe
from vla_core.model.vla.multi_sensor_vla import MultiSensorRecipe
from vla_core.model.vla.vla_model import VLARecipe
from vla_core.model.vlm import AttentionPoolingConfig, TinyCNNEncoderConfig
from vla_core.model.vlm.sentence_encoder import SentenceConfig
from vla_core.model.vlm.text_encoder import HubTokenizer
from vla_core.model.vlm.tiny_transformer import TinyTransformerConfig
from vla_core.model.vlm.vision_encoder import TinyCNNConfig
from vla_core.observation.builder import ObservationSpec
from vla_core.runtime.execution import Execution
from vla_core.training.recipe import Recipe, load_recipe

from .exported import check_alike, exported
from .helpers import CONTRACT, IMAGE, SPEC
from .test_presets import hub_checkpoint
from .whole_models import one_thread  # noqa: F401 - a fixture

HEAD = MLPHeadConfig(hidden_dim=16)
EYE = {
    "vision": TinyCNNEncoderConfig(image_size=(6, 8), output_dim=16, channels=(8,)),
    "projector": AttentionPoolingConfig(num_queries=2, num_heads=2),
    "language": TinyTransformerConfig(d_model=16, layers=1, heads=2),
    "memory": HistoryConfig(context_dim=8, layers=1, heads=2, max_len=4),
    "readout_tokens": 2, "horizon": 4, "head": HEAD,
}  # fmt: skip


def toy(model: Any, spec: ObservationSpec = SPEC, contract: RobotContract = CONTRACT) -> Checkpoint:
    """An untrained policy of the toy robot."""
    return fresh(Recipe(observation=spec, model=model, execution=Execution(steps=2)), contract)


def car() -> Checkpoint:
    """The car of `driving`: lifted cameras, PointNet++, radars, IMU, their bird's eye view; all of it small."""
    level = "[{points: 5, radius_m: 6.0, neighbors: 4, widths: [8]}]"
    return _driving(
        "driving", "vehicle", "model.projector={type: mlp}", "model.bev.depth_bins=4", "model.bev.width=8",
        f"model.sensors.lidar={{type: point_cloud, output: both, levels: {level}, global_widths: [8], output_dim: 8}}",
        "model.sensors.imu={type: imu, layers: 1, output_dim: 8}", "model.language={type: tiny_gru, d_model: 16}",
    )  # fmt: skip


def ground_car() -> Checkpoint:
    """The simulated car of `drive`: the ground's plane, merged radars, an instruction that modulates the map."""
    return _driving("drive", "driving", "model.language={type: tiny_transformer, d_model: 16, layers: 1, heads: 2}")


def _driving(recipe: str, robot: str, *changes: str) -> Checkpoint:
    names = load_recipe(recipe).observation.images
    found = load_recipe(recipe, [
        "model.vision={type: tiny_cnn, image_size: [16, 32], output_dim: 16, channels: [8, 8]}",
        "model.head={type: mlp, hidden_dim: 16}", *changes,
        *(f"observation.images.{name}={{height: 16, width: 32}}" for name in names),
        "observation.clouds.lidar.max_points=40",
    ])  # fmt: skip
    return fresh(found, RobotContract.load(robot))


def doppler() -> Checkpoint:
    """A range-Doppler map, whose size is the sensor's."""
    stream = Stream(topic="doppler", type=IMAGE, rate_hz=25.0, max_age_s=0.1, missing="mask")
    contract = dataclasses.replace(CONTRACT, observations={**CONTRACT.observations, "doppler": stream})
    model = MultiSensorRecipe(
        **EYE, sensors={"doppler": RadarConfig(form="range_doppler", widths=(8, 8), output_dim=8)},
        fusion=CrossModalConfig(layers=1, heads=2),
    )  # fmt: skip
    return toy(model, dataclasses.replace(SPEC, maps=("doppler",)), contract)


def decoder() -> Checkpoint:
    """A published decoder's structure with LoRA, whose prompt is never empty."""
    made = hub_checkpoint()
    tokenizer = HubTokenizer(made.tokenizer.to_dict()["tokenizer"], pad_id=0, prompt="it {instruction}")
    return dataclasses.replace(made, tokenizer=tokenizer)


def sentence() -> Checkpoint:
    """mini-VLA with a sentence encoder, which keeps its sentences; a graph reads them anew."""
    text = SentenceConfig(pretrained=None, architecture={
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    })  # fmt: skip
    vision = TinyCNNConfig(d_model=16, channels=(8,), norm="group", pooling="spatial_softmax")
    return toy(MiniVLARecipe(horizon=4, d_model=16, vision=vision, text=text, head=HEAD))


MODELS = {
    "memory": lambda: toy(VLARecipe(**EYE), dataclasses.replace(SPEC, history=3)),
    "text after pictures": lambda: toy(VLARecipe(**{
        **EYE, "context": "all", "language": dataclasses.replace(EYE["language"], injected="before_text"),
    })),
    "decoder with adapters": decoder,
    "sentence encoder": sentence,
    "range-Doppler map": doppler,
    "car": car,
    "car on the ground's plane": ground_car,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_a_torchscript_graph(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    made = MODELS[name]()
    check_alike(made, exported(tmp_path / "graph", made, "torchscript"), observations(made, 6, seed=5))


def test_what_is_asked_lacks_sensors_and_has_them_all() -> None:
    """The observations that graphs are verified with are no easy ones."""
    made = ground_car()
    seen = observations(made, 12, seed=1)
    assert sum(all(each.present.values()) for each in seen) >= 6
    assert any(not all(each.present.values()) for each in seen)
    counts = {len(each.clouds["lidar"]) for each in seen if "lidar" in each.clouds}
    assert len(counts) > 4 and max(counts) <= 40
    assert len({len(each.instruction.split()) for each in seen}) > 3
    assert any(np.isnan(cloud).any() for each in seen for cloud in each.clouds.values())
