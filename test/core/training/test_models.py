"""Every model with every head trains, stores, goes on and runs, from recipes of a few thousand parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vla_core.checkpoint import Checkpoint
from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.data.dataset import Dataset
from vla_core.errors import VlaError
from vla_core.model.action_head import base
from vla_core.model.vlm.language_model import LLMBackbone
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.observation.batch import collate
from vla_core.training.measure import TrainingStep
from vla_core.training.recipe import Recipe
from vla_core.training.trainer import train

from ..helpers import MS, dataset
from ..test_batches import data_of
from ..test_multi_sensor import MANY
from ..test_multi_sensor import SPEC as EVERYTHING
from ..test_side import observed, recording
from ..whole_models import one_thread as one_thread
from .toy_run import SMALL

STANDARD: dict[str, Any] = {
    "horizon": 4, "vision": {"type": "tiny_cnn", "image_size": [6, 8], "output_dim": 16, "channels": [8, 8]},
    "projector": {"type": "attention_pooling", "num_queries": 2, "num_heads": 2},
    "language": {"type": "tiny_gru", "d_model": 16}, "readout_tokens": 2,
    "memory": {"context_dim": 8, "layers": 1, "heads": 2, "max_len": 4},
}  # fmt: skip
LLM: dict[str, Any] = {
    "type": "llm", "model_name": "smollm2-135m", "pretrained": None,
    "architecture": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "num_key_value_heads": 1, "vocab_size": 12, "pad_token_id": 0},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mini_vla": {"type": "mini_vla", "horizon": 4, "d_model": 16,
                 "vision": {"type": "tiny_cnn", "d_model": 16, "channels": [8, 8]}},
    "vla": {"type": "vla", **STANDARD},
    "multi_sensor_vla": {
        "type": "multi_sensor_vla", **STANDARD, "vision": {**STANDARD["vision"], "image_size": [3, 4]},
        "fusion": {"type": "cross_modal", "layers": 1, "heads": 2},
        "sensors": {
            "lidar": {"type": "point_cloud", "global_widths": [8], "output_dim": 8,
                      "levels": [{"points": 4, "radius_m": 4.0, "neighbors": 4, "widths": [8]}]},
            "imu": {"type": "imu", "layers": 1, "output_dim": 8},
            "map": {"type": "radar", "form": "range_doppler", "widths": [8], "output_dim": 8},
        },
    },
}  # fmt: skip


@cache
def sensing() -> Dataset:
    """Ticks of a robot with a camera, a LiDAR, an IMU, a map and a history."""
    spec = dataclasses.replace(EVERYTHING, calibrations={})
    seen = observed(MANY, spec, recording(np.random.default_rng(0), 200 * MS))
    return Dataset.from_episodes(MANY, spec, [data_of(seen, MANY, spec)])


def made(model: str, head: str, changes: dict[str, Any] | None = None, **training: Any) -> tuple[Recipe, Dataset]:
    data = sensing() if model == "multi_sensor_vla" else dataset((7, 5))
    options = {"steps": 3, "batch_size": 6, "warmup_steps": 0, "learning_rate": 1e-2, "save_every": 2, **training}
    plain = {
        "observation": data.spec, "execution": {"steps": 2}, "training": options,
        "model": {**MODELS[model], "head": {"type": head, **SMALL[head]}, **(changes or {})},
        "normalization": {"streams": {"lidar": {"intensity": [0, 1]}, "map": {"value": [0, 1]},
                                      "imu": {n: [0, 1] for n in MANY.stream("imu").names}}},
    }  # fmt: skip
    if model != "multi_sensor_vla":
        plain.pop("normalization")
    return from_dict(Recipe, to_dict(plain)), data


@pytest.mark.parametrize("head", sorted(SMALL))
@pytest.mark.parametrize("model", sorted(MODELS))
def test_it_trains_and_what_was_stored_goes_on_and_runs(tmp_path: Path, model: str, head: str) -> None:
    recipe, data = made(model, head)
    seen: list[float] = []
    result = train(recipe, data, folder=tmp_path, report=lambda p: seen.append(p.loss))
    assert len(seen) == 3 and all(np.isfinite(seen))
    (tmp_path / "step_00000003").rename(tmp_path / "unbroken")
    resumed = train(recipe, data, folder=tmp_path, resume=True).checkpoint.model.state_dict()
    own = result.checkpoint.model.state_dict()
    assert all(torch.equal(own[name], resumed[name]) for name in own)
    start = Checkpoint.load(tmp_path / "step_00000002").model.state_dict()
    assert sum(not torch.equal(own[name], start[name]) for name in own) > len(own) / 2

    stored = Checkpoint.load(tmp_path / "unbroken")
    if data.observations is not None:
        inputs = collate([data.observations[3]], stored.normalizer, stored.tokenizer, data.spec)
        chunks = [m.predict(inputs, torch.Generator().manual_seed(0)) for m in (stored.model, result.checkpoint.model)]
        assert torch.equal(*chunks) and chunks[0].isfinite().all()


def tokenizer(config: object, texts: Iterable[str]) -> WordTokenizer:
    """Random language models carry no tokenizer; this is one of words."""
    found = WordTokenizer()
    found.fit(texts)
    return found


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give language models that tokenizer."""
    monkeypatch.setattr(LLMBackbone, "tokenizer", tokenizer)


def test_a_language_model_trains_by_adapters_or_whole(tmp_path: Path, words: None) -> None:
    """What has no gradient is the same in every stored state; adapters are found again by their names."""
    changed: dict[str, set[str]] = {}
    for kind, changes in {
        "adapters": {"language": {**LLM, "lora": {"r": 2, "dropout": 0.1}}},
        "whole": {"language": LLM},
        "frozen": {"language": LLM, "frozen": ["language", "vision"]},
    }.items():
        recipe, data = made("vla", "flow", changes, gradient_checkpointing=True)
        result = train(recipe, data, folder=tmp_path / kind)
        (tmp_path / kind / "step_00000003").rename(tmp_path / f"{kind}_unbroken")
        resumed = train(recipe, data, folder=tmp_path / kind, resume=True).checkpoint.model.state_dict()
        own = result.checkpoint.model.state_dict()
        assert all(torch.equal(own[name], resumed[name]) for name in own), "dropout too"
        start = Checkpoint.load(tmp_path / kind / "step_00000002").model.state_dict()
        changed[kind] = {name for name in own if not torch.equal(own[name], start[name])}
    languages = {kind: {n for n in names if n.startswith("language.")} for kind, names in changed.items()}
    assert languages["adapters"] and all("lora" in name for name in languages["adapters"])
    assert any("mlp" in name for name in languages["whole"]) and not languages["frozen"]
    assert not any(name.startswith("vision.") for name in changed["frozen"])


def test_recomputed_activations_change_nothing(words: None) -> None:
    weights = {}
    for recompute in (False, True):
        recipe, data = made("vla", "transformer", {"language": LLM}, gradient_checkpointing=recompute)
        weights[recompute] = train(recipe, data).checkpoint.model.state_dict()
    for name, value in weights[False].items():
        torch.testing.assert_close(weights[True][name], value)


def test_a_compiled_step_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the tracing, where noise of a part of a batch has to be left alone; the code generator is torch's."""
    monkeypatch.setattr(base, "draw_rows", base.draw_rows)
    monkeypatch.setattr(TrainingStep, "compile", lambda self: nn.Module.compile(self, backend="eager"))
    weights = [train(*made("mini_vla", "flow", compile=on)).checkpoint.model.state_dict() for on in (False, True)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)


def test_a_model_with_nothing_to_recompute_says_so() -> None:
    with pytest.raises(VlaError, match=r"gradient_checkpointing: .*mini_vla"):
        recipe, data = made("mini_vla", "mlp", gradient_checkpointing=True)
        train(recipe, data)


def test_a_head_that_could_not_answer_is_refused() -> None:
    recipe, data = made("mini_vla", "discrete")
    spread = dataclasses.replace(recipe, normalization=dataclasses.replace(recipe.normalization, action="mean_std"))
    with pytest.raises(ConfigError, match=r"normalization\.action: found mean_std"):
        train(spread, data)
