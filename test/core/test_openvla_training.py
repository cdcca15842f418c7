"""OpenVLA fine-tuned on our datasets: the published loss, adapters and what becomes of them, patches that are kept."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from test.core import published_openvla as published
from test.core.helpers import CONTRACT, SPEC, episodes
from test.core.published_openvla import SENTENCES, picture
from test.core.test_openvla import (
    actions_reference,
    llama_reference,
    observed,
    patches_reference,
    question_reference,
    tensors,
)
from vla_core.checkpoint import Checkpoint
from vla_core.contract import RobotContract
from vla_core.data.dataset import Dataset
from vla_core.errors import VlaError
from vla_core.model.inputs import ModelInputs
from vla_core.model.vla.openvla import OpenVLA, OpenVLARecipe
from vla_core.model.vla.openvla_decode import RegressionConfig
from vla_core.model.vla.openvla_vision import FeatureTable
from vla_core.model.vlm.lora import LoRAConfig
from vla_core.observation.builder import ObservationSpec
from vla_core.observation.normalizer import Normalization
from vla_core.pretrained.openvla import load, merged_weights, save
from vla_core.runtime.execution import Execution
from vla_core.runtime.policy import CheckpointPolicy
from vla_core.training.recipe import Recipe, Training, load_recipe
from vla_core.training.trainer import Result, train

SEEN = dataclasses.replace(SPEC, state=())
LORA = LoRAConfig(r=4, alpha=2)


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with published.tiny_backbones():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.publish(tmp_path_factory.mktemp("openvla") / "tiny")


def dataset(spec: ObservationSpec = SEEN) -> Dataset:
    made = episodes((12, 10))
    if not spec.state:
        made = [dataclasses.replace(one, state=np.zeros((len(one), 0), np.float32)) for one in made]
    return Dataset.from_episodes(CONTRACT, spec, made)


def recipe(folder: Path, spec: ObservationSpec = SEEN, training: dict[str, Any] | None = None, **model: Any) -> Recipe:
    options = {"steps": 3, "batch_size": 6, "warmup_steps": 0, "learning_rate": 1e-2, "ema_decay": None}
    made = OpenVLARecipe(pretrained=str(folder), **model)
    return Recipe(
        observation=spec, model=made, execution=Execution(steps=made.horizon),
        normalization=Normalization(state="mean_std" if spec.state else "none", action="quantile",
                                    clip={"action": 1.0}),
        training=Training(**{**options, **(training or {})}),
    )  # fmt: skip


def run(folder: Path, spec: ObservationSpec = SEEN, training: dict[str, Any] | None = None, **model: Any) -> Result:
    return train(recipe(folder, spec, training, **model), dataset(spec))


def batch(checkpoint: Checkpoint, texts: tuple[str, ...]) -> ModelInputs:
    rows = [observed({"camera": picture(seed)}, text) for seed, text in enumerate(texts)]
    return CheckpointPolicy(checkpoint).inputs(rows)


# -- the loss --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def loss_reference(folder: Path, pixels: np.ndarray, text: str, action: list[float]) -> float:
    """Next words by transformers' own loss, labels at the answer and at the end of the text alone."""
    weights = tensors(folder)
    llama = llama_reference(weights)
    words = 32000 - np.digitize(np.clip(action, -1, 1), np.linspace(-1, 1, 256))
    question = question_reference(folder, text)
    answer = [*words.tolist(), 2]
    embedded = llama.get_input_embeddings()(torch.tensor([[*question, *answer]]))
    patches = patches_reference(weights, pixels)
    sequence = torch.cat([embedded[:, :1], patches, embedded[:, 1:]], dim=1)
    labels = torch.tensor([[-100] * (len(question) + patches.shape[1]) + answer])
    return float(llama(inputs_embeds=sequence, labels=labels).loss)


def test_the_loss_is_the_published_one(folder: Path) -> None:
    checkpoint = load(folder, CONTRACT, unnorm_key="arm")
    texts = ("open", *SENTENCES)  # of different lengths
    actions = torch.tensor([[0.3, -0.7], [1.5, -1.0], [0.0, 0.996]])
    expected = [
        loss_reference(folder, picture(i), text, action.tolist())
        for i, (text, action) in enumerate(zip(texts, actions, strict=True))
    ]
    inputs = batch(checkpoint, texts)
    model = checkpoint.model
    with torch.no_grad():
        every = model.loss(inputs, actions[:, None], torch.ones(3, 1, dtype=torch.bool))
        some = model.loss(inputs, torch.where(torch.arange(3)[:, None, None] == 1, torch.nan, actions[:, None]),
                          torch.tensor([[True], [False], [True]]))  # fmt: skip
    assert float(every) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(some) == pytest.approx((expected[0] + expected[2]) / 2, rel=1e-5)


def test_the_loss_of_a_chunk_is_its_mean_absolute_error(tmp_path: Path) -> None:
    folder = published.publish(tmp_path / "oft", head=True)
    checkpoint = load(folder, CONTRACT, unnorm_key="arm", horizon=3)
    inputs = batch(checkpoint, SENTENCES)
    actions = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    with torch.no_grad():
        found = checkpoint.model.loss(inputs, torch.where(mask[..., None], actions, torch.nan), mask)
        error = (checkpoint.model.predict(inputs) - actions).abs().mean(dim=-1)
    assert float(found) == pytest.approx(float(error[mask].mean()), rel=1e-6)


# -- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_alone_are_trained_and_merge_into_the_published_layout(folder: Path, tmp_path: Path) -> None:
    losses = []
    for steps in (1, 8):
        made = recipe(folder, training={"steps": steps, "open_loop": 0}, lora=LORA)
        result = train(made, dataset(), validation=dataset())
        losses.append(result.validation_loss or np.nan)
    assert losses[1] < losses[0] - 0.2
    before, after = tensors(folder), result.checkpoint.model.state_dict()
    plain = {name.replace(".base_layer.", "."): value for name, value in after.items() if ".lora_" not in name}
    assert set(plain) == set(before)
    assert all(torch.equal(plain[name], before[name]) for name in before)
    adapted = {name.split(".lora_")[0] for name in after if ".lora_" in name}
    linear = {name.removesuffix(".weight") for name in before if name.endswith("proj.weight") or ".fc" in name}
    unread = ("vision_backbone.featurizer.blocks.2", "vision_backbone.fused_featurizer.blocks.2",
              "vision_backbone.fused_featurizer.attn_pool")  # fmt: skip
    assert {name for name in linear if name.endswith(("q_proj", "down_proj"))} <= adapted
    assert {"projector.fc3", "language_model.lm_head", "vision_backbone.featurizer.blocks.1.attn.qkv"} <= adapted
    assert not {name for name in adapted if name.startswith(unread) or "patch_embed" in name}

    result.checkpoint.save(tmp_path / "ours")
    ours = Checkpoint.load(tmp_path / "ours")
    save(ours, tmp_path / "theirs")
    merged = tensors(tmp_path / "theirs")
    assert set(merged) == set(before)
    layer = "language_model.model.layers.1.mlp.down_proj"
    change = after[f"{layer}.lora_B.default.weight"] @ after[f"{layer}.lora_A.default.weight"] * (LORA.alpha / LORA.r)
    torch.testing.assert_close(merged[f"{layer}.weight"], before[f"{layer}.weight"] + change, atol=1e-6, rtol=1e-6)
    assert change.abs().max() > 1e-3

    # What the original code would say of the merged weights, by the independent reference.
    found = CheckpointPolicy(ours).predict(observed({"camera": picture(3)}, "drop it")).actions
    normalized, _ = actions_reference(tmp_path / "theirs", picture(3), "drop it")
    statistics = ours.normalizer.statistics["action"]
    low, high = np.array(statistics["q01"]), np.array(statistics["q99"])
    np.testing.assert_allclose(found[0], 0.5 * (normalized + 1) * (high - low) + low, atol=1e-4)
    again = load(tmp_path / "theirs", CONTRACT)
    assert again.config.provenance["unnorm_key"] == "vla_ros"


def test_a_model_that_is_merged_in_place_has_the_exported_weights(folder: Path) -> None:
    model = run(folder, lora=LORA).checkpoint.model
    exported = dict(merged_weights(model))
    model.merge_lora()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, exported[name], atol=1e-6, rtol=1e-6)
    assert model.config.lora is None


def test_adapters_of_bfloat16_weights_keep_small_steps(tmp_path: Path) -> None:
    folder = published.publish(tmp_path / "half", dtype=torch.bfloat16)
    result = run(folder, training={"steps": 1, "learning_rate": 1e-6, "precision": "bf16"}, lora=LORA)
    moved = [value for name, value in result.checkpoint.model.state_dict().items() if ".lora_B." in name]
    assert {value.dtype for value in moved} == {torch.float32}
    assert any(0 < value.abs().max() < 2e-6 for value in moved)


def test_the_whole_model_is_trained_but_for_what_no_patch_passes(folder: Path) -> None:
    before, after = tensors(folder), run(folder, training={"learning_rate": 1e-3}).checkpoint.model.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith((
        "vision_backbone.featurizer.blocks.2.", "vision_backbone.featurizer.norm.",
        "vision_backbone.fused_featurizer.blocks.2.", "vision_backbone.fused_featurizer.norm.",
        "vision_backbone.fused_featurizer.attn_pool."))}  # fmt: skip


def test_a_regression_head_is_added_to_a_model_of_words(folder: Path) -> None:
    """Fine-tuning as OpenVLA-OFT does it: adapters, and a new head that is trained whole."""
    model = {"head": RegressionConfig(), "horizon": 3, "lora": LORA}
    losses = []
    for steps in (1, 15):
        made = recipe(folder, SPEC, {"steps": steps, "learning_rate": 3e-3, "open_loop": 0}, **model)
        result = train(made, dataset(SPEC), validation=dataset(SPEC))
        losses.append(result.validation_loss or np.nan)
    assert losses[1] < 0.9 * losses[0]
    names = set(result.checkpoint.model.state_dict())
    assert {"action_head.model.fc2.weight", "proprio_projector.fc1.weight"} <= names
    trained = {name for name, weight in result.checkpoint.model.named_parameters() if weight.requires_grad}
    assert all(".lora_" in name or name.startswith(("action_head.", "proprio_projector.")) for name in trained)
    assert {"action_head.model.fc2.weight", "proprio_projector.fc1.weight"} <= trained
    assert not any("lm_head" in name for name in trained)


def test_frozen_parts_have_no_adapters(folder: Path) -> None:
    names = run(folder, training={"steps": 1}, lora=LORA, frozen=("vision_backbone",)).checkpoint.model.state_dict()
    adapted = {name.split(".")[0] for name in names if ".lora_" in name}
    assert adapted == {"projector", "language_model"}
    with pytest.raises(VlaError, match="no linear layer is left"):
        run(folder, lora=LORA, frozen=("vision_backbone", "projector", "language_model"))


def test_recomputed_activations_change_nothing(folder: Path) -> None:
    plain, recomputed = (run(folder, training={"gradient_checkpointing": on}, lora=LORA) for on in (False, True))
    assert recomputed.loss == pytest.approx(plain.loss, rel=1e-6)
    weights = recomputed.checkpoint.model.state_dict()
    for name, value in plain.checkpoint.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=1e-6, rtol=1e-5)


def test_quantization_says_what_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(VlaError, match="need a GPU with CUDA, and there is none here"):
        run(folder, lora=LORA, quantization="nf4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(VlaError, match="pip install 'vla_ros"):
        run(folder, lora=LORA, quantization="int8")
    with pytest.raises(VlaError, match="cannot be trained; set lora"):
        run(folder, quantization="nf4")


# -- patches that are kept -------------------------------------------------------------------------------------------


def test_kept_patches_change_no_number(folder: Path) -> None:
    options: dict[str, Any] = {"lora": LORA, "frozen": ("vision_backbone",)}
    steps = {"steps": 5}
    plain = run(folder, training=steps, **options)
    kept = run(folder, training=steps, feature_cache_mb=16, **options)
    assert kept.loss == plain.loss
    weights = kept.checkpoint.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.checkpoint.model.state_dict().items())


def test_how_often_patches_were_known_is_told(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, training={"steps": 8, "validate_every": 8}, lora=LORA, frozen=("vision_backbone",),
                  feature_cache_mb=16)  # fmt: skip
    result = train(made, dataset(), validation=dataset())
    # 48 pictures were asked for; the dataset has 22.
    assert (48 - 22) / 48 <= result.measured["features/hit_rate"] < 1


def test_a_table_computes_each_picture_once_and_forgets_the_oldest() -> None:
    asked: list[int] = []

    def compute(pictures: torch.Tensor) -> torch.Tensor:
        asked.append(len(pictures))
        return 2 * pictures.flatten(1)[:, None]  # (M, 1, D)

    draw = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    table = FeatureTable(limit_mb=1)
    torch.testing.assert_close(table.get(draw[[0, 1, 0]], compute), compute(draw[[0, 1, 0]]), atol=0, rtol=0)
    asked.clear()
    table.get(draw[[1, 2]], compute)
    assert asked == [1]
    assert table.hit_rate == pytest.approx(2 / 5)  # twice in one batch counts, too
    table.limit = 2 * 3 * 16 * 16 * 4  # two of them
    table.get(draw[[3]], compute)
    asked.clear()
    table.get(draw[[2, 3]], compute)
    assert asked == []
    table.get(draw[[0, 1]], compute)
    assert asked == [2]


# -- the recipe ------------------------------------------------------------------------------------------------------


def test_the_recipe_is_the_published_way_of_fine_tuning() -> None:
    made = load_recipe("openvla_lora")
    assert isinstance(made.model, OpenVLARecipe)
    assert made.model.lora == LoRAConfig(r=32, alpha=16)
    config = made.model_config(RobotContract.load("libero"), 32001)
    assert (config.cameras, config.action_dim, config.state_dim) == (("agentview",), 7, 0)
    modes = made.normalization.modes_of("action", RobotContract.load("libero").action_names)
    assert modes == ("quantile",) * 6 + ("none",)


def test_a_state_that_nobody_reads_is_refused(folder: Path) -> None:
    with pytest.raises(VlaError, match=r"state_dim: found 2, .* leave observation.state empty"):
        run(folder, spec=SPEC)


def test_the_model_takes_pictures_of_another_size(folder: Path) -> None:
    """The dataset's are 6 by 8 pixels, the model's 28 by 28."""
    model = run(folder, training={"steps": 1}, lora=LORA).checkpoint.model
    assert isinstance(model, OpenVLA)
    assert model.config.vision[0].image_size == 28
