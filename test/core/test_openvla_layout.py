"""OpenVLA's published layout: what is read is checked to the last tensor, and what is written is read back alike."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from test.core import published_openvla as published
from test.core.helpers import CONTRACT, pixels, with_action
from test.core.hub_server import Repository, serve
from test.core.published_openvla import SENTENCES, STATISTICS, picture
from test.core.test_hub import turn_to
from test.core.test_openvla import TWO, observed
from vla_core.checkpoint import Checkpoint
from vla_core.errors import VlaError
from vla_core.pretrained.openvla import load, save
from vla_core.pretrained.openvla_folder import PublishedFolder
from vla_core.runtime.policy import CheckpointPolicy

OFT: dict[str, Any] = {"cameras": ("camera", "wrist"), "state": ("arm",), "horizon": 3}


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with published.tiny_backbones():
        yield


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("published")
    return {
        "whole": published.publish(place / "whole", dtype=torch.bfloat16),
        "sharded": published.publish(place / "sharded", sharded=True),
        "oft": published.publish(place / "oft", head=True, proprio=2),
    }


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        return Path(shutil.copytree(originals[name], tmp_path / name))

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


def answer(checkpoint: Checkpoint, seed: int = 0) -> np.ndarray:
    names = checkpoint.config.observation.images
    state = (0.25, -0.5) if checkpoint.config.observation.state else ()
    pictures = {name: picture(seed + i) for i, name in enumerate(names)}
    return CheckpointPolicy(checkpoint).predict(observed(pictures, SENTENCES[0], state)).actions


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# -- reading ---------------------------------------------------------------------------------------------------------


def test_the_type_of_the_weights_is_kept_or_changed(originals: dict[str, Path]) -> None:
    kept = load(originals["whole"], CONTRACT, unnorm_key="arm")
    assert {weight.dtype for weight in kept.model.parameters()} == {torch.bfloat16}
    assert kept.config.model.dtype == "bfloat16"
    wide = load(originals["whole"], CONTRACT, unnorm_key="arm", dtype="float32")
    assert {weight.dtype for weight in wide.model.parameters()} == {torch.float32}
    assert np.isfinite(answer(kept)).all()


def test_pictures_are_read_at_the_models_size_and_from_the_only_camera(originals: dict[str, Path]) -> None:
    spec = load(originals["whole"], CONTRACT, unnorm_key="arm").config.observation
    assert {name: (size.height, size.width) for name, size in spec.images.items()} == {"camera": (28, 28)}
    assert (spec.instruction, spec.state) == ("task", ())


def test_another_size_is_brought_to_the_models(originals: dict[str, Path]) -> None:
    checkpoint = load(originals["whole"], CONTRACT, unnorm_key="arm", image_size=(6, 8))
    found = CheckpointPolicy(checkpoint).predict(observed({"camera": pixels(0)}, "open"))
    assert np.isfinite(found.actions).all()


def test_statistics_of_another_dataset_that_fits_are_kept(originals: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = load(originals["whole"], CONTRACT, unnorm_key="arm")
    assert set(checkpoint.dataset_statistics) == {"arm", "other"}  # bimanual is of three numbers
    checkpoint.save(tmp_path / "ours")
    arm, other = (Checkpoint.load(tmp_path / "ours", dataset=key) for key in (None, "other"))
    one = np.array([[0.5, -0.25]], dtype=np.float32)
    for read, key in ((arm, "arm"), (other, "other")):
        stats = STATISTICS[key]["action"]
        expected = 0.75 * (stats["q99"][0] - stats["q01"][0]) + stats["q01"][0]
        np.testing.assert_allclose(read.normalizer.unnormalize("action", one), [[expected, -0.25]], atol=1e-12)


def test_fine_tuned_statistics_go_first(copy: Callable[[str], Path]) -> None:
    folder = copy("whole")
    (folder / "dataset_statistics.json").write_text(json.dumps({"mine": STATISTICS["other"]}))
    checkpoint = load(folder, CONTRACT)
    assert checkpoint.config.provenance["unnorm_key"] == "mine"


def test_a_still_entry_keeps_its_value(copy: Callable[[str], Path]) -> None:
    """q01 equal to q99: the published formula gives that value whatever the model says."""
    folder = copy("whole")
    action = {**STATISTICS["arm"]["action"], "q01": [0.5, 0.0], "q99": [0.5, 1.0]}
    (folder / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": action}}))
    found = load(folder, CONTRACT).normalizer.unnormalize("action", np.array([[-1.0, 0.0], [1.0, 0.0]], np.float32))
    np.testing.assert_allclose(found[:, 0], 0.5, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unnorm_key": None}, "--unnorm-key: .* 3 datasets.*; choices: arm, bimanual, other"),
        ({"unnorm_key": "bridge"}, "no statistics of 'bridge'; choices: arm, bimanual, other"),
        ({"unnorm_key": "bimanual"}, "statistics of 'bimanual' are of 3 numbers in 'action', the contract toy has 2"),
        ({"cameras": ("front",)}, "front"),
        ({"instruction": "arm"}, "is no text"),
        ({"state": ("arm",)}, "--state: its projector reads 0 numbers, the streams arm.shoulder|arm.elbow"),
    ],
)
def test_what_the_user_must_say_is_asked_for(originals: dict[str, Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(VlaError, match=message):
        load(originals["whole"], CONTRACT, **{"unnorm_key": "arm", **options})


def test_of_two_cameras_the_one_that_is_seen_must_be_named(originals: dict[str, Path]) -> None:
    with pytest.raises(VlaError, match=r"--cameras: the contract toy has 2 streams of kind image.*camera, wrist"):
        load(originals["whole"], TWO, unnorm_key="arm")


def test_another_number_of_actions_names_both(originals: dict[str, Path]) -> None:
    contract = with_action(names=("a",), units=("1",), low=(-1.0,), high=(1.0,), safe=("zero",))
    with pytest.raises(VlaError, match="of 2 numbers in 'action', the contract toy has 1"):
        load(originals["whole"], contract, unnorm_key="arm")


def _drop(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["projector.fc2.bias"]
    save_file(weights, folder / "model.safetensors")


def _add(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "vision_backbone.film.scale": torch.zeros(1)}, folder / "model.safetensors")


def _reshape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "projector.fc2.bias": torch.zeros(3)}, folder / "model.safetensors")


def _half(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: value.half() for name, value in weights.items()}, folder / "model.safetensors")


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def _other_tokenizer(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(data))


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **changes)


def _text(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = json.loads((folder / "config.json").read_text())["text_config"]
        change_config(folder, text_config={**text, **changes})

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, "missing projector.fc2.bias; unexpected none"),
        (_add, "missing none; unexpected vision_backbone.film.scale"),
        (_reshape, r"of another shape projector.fc2.bias \(3,\) instead of \(32,\)"),
        (_half, "weights of type F16; set dtype"),
        (_cut, "damaged"),
        (_pickled, "pytorch_model.bin is a pickle, which is not read"),
        (_config(norm_stats={}), "no statistics: neither dataset_statistics.json nor norm_stats"),
        (_config(norm_stats={"arm": {}}), "statistics of 'arm' lack 'action'"),
        (_config(norm_stats={"arm": {"action": {"q01": [0.0, float("nan")], "q99": [1.0, 1.0]}}}), "no finite numbers"),
        (_config(rope="yarn"), "unknown key 'rope', whose meaning"),
        (_config(model_type="prismatic"), "model_type 'prismatic', expected 'openvla'"),
        (
            _config(timm_model_ids=["vit_huge", "vit_tiny_siglip"]),
            "no architecture known for 'vit_huge'; choices: vit_b",
        ),
        (_config(use_fused_vision_backbone=False), "2 timm_model_ids and 2 image_sizes, expected 1 of each"),
        (_config(timm_override_act_layers=["quick_gelu", None]), "expected null for GELU"),
        (_text(model_type="mistral"), "text_config.model_type 'mistral'"),
        (_text(experts=8), "text_config: unknown key 'experts'"),
        (_text(rope_scaling={"type": "linear"}), "rope_scaling: found"),
        (_text(hidden_size=64), "of another shape"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json of an OpenVLA; found: model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json missing"),
        (_other_tokenizer, "is not Llama-2's"),
        (lambda folder: (folder / "vision_backbone--5_checkpoint.pt").touch(), "FiLM is not supported"),
        (lambda folder: (folder / "noisy_action_projector--5_checkpoint.pt").touch(), "a diffusion head is not"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    copy: Callable[[str], Path], damage: Callable[[Path], None], message: str
) -> None:
    folder = copy("whole")
    damage(folder)
    with pytest.raises(VlaError, match=message):
        load(folder, CONTRACT, unnorm_key="arm")


def test_a_shard_that_is_missing_or_holds_something_else_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("sharded")
    second = folder / "model-00002-of-00002.safetensors"
    weights = load_file(second)
    save_file({**weights, "more": torch.zeros(1)}, second)
    with pytest.raises(VlaError, match="unexpected tensor more"):
        load(folder, CONTRACT, unnorm_key="arm")
    first = sorted(weights)[0]
    save_file({name: value for name, value in weights.items() if name != first}, second)
    with pytest.raises(VlaError, match=f"tensor {first} missing, which"):
        load(folder, CONTRACT, unnorm_key="arm")
    second.unlink()
    with pytest.raises(VlaError, match=r"model-00002-of-00002.safetensors missing"):
        load(folder, CONTRACT, unnorm_key="arm")


# -- OpenVLA-OFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": None}, "--horizon: the rows of a chunk are not told"),
        ({"state": ()}, "--state: its projector reads 2 numbers, the streams that were named have 0"),
        ({"unnorm_key": "other"}, "statistics of 'other' lack 'proprio'"),
    ],
)
def test_what_oft_needs_is_asked_for(originals: dict[str, Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(VlaError, match=message):
        load(originals["oft"], TWO, **{"unnorm_key": "arm", **OFT, **options})


def test_parts_of_two_steps_and_pickled_code_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("oft")
    again = folder / "action_head--5_checkpoint.pt"
    shutil.copy(folder / "action_head--150000_checkpoint.pt", again)
    with pytest.raises(VlaError, match=r"several files of action_head: .*; keep one"):
        load(folder, TWO, unnorm_key="arm", **OFT)
    again.unlink()
    torch.save({"code": print}, folder / "action_head--150000_checkpoint.pt")
    with pytest.raises(VlaError, match=r"action_head--150000_checkpoint.pt: no weights"):
        load(folder, TWO, unnorm_key="arm", **OFT)


def test_safetensors_of_the_same_name_go_first(copy: Callable[[str], Path]) -> None:
    folder = copy("oft")
    before = answer(load(folder, TWO, unnorm_key="arm", **OFT))
    file = folder / "action_head--150000_checkpoint.pt"
    save_file(torch.load(file, weights_only=True), file.with_suffix(".safetensors"))
    torch.save({"code": print}, file)
    np.testing.assert_array_equal(answer(load(folder, TWO, unnorm_key="arm", **OFT)), before)


def test_the_range_instead_of_quantiles(originals: dict[str, Path]) -> None:
    found = load(originals["oft"], TWO, unnorm_key="arm", bounds="min_max", **OFT)
    np.testing.assert_allclose(found.normalizer.unnormalize("action", np.ones((1, 2), np.float32)), [[2.0, 1.0]])
    assert found.config.normalization.entries == {"action.elbow": "none"}


def test_a_gripper_that_the_robot_turns_round(originals: dict[str, Path], tmp_path: Path) -> None:
    as_said = load(originals["whole"], CONTRACT, unnorm_key="arm")
    turned = load(originals["whole"], CONTRACT, unnorm_key="arm", open_close=("elbow",))
    one, other = answer(as_said), answer(turned)
    np.testing.assert_allclose(other, np.stack([one[:, 0], 1 - 2 * one[:, 1]], axis=1), atol=1e-6)
    inputs = CheckpointPolicy(turned).inputs([observed({"camera": picture(0)}, "open")])
    mask = torch.ones(1, 1, dtype=torch.bool)
    with torch.no_grad():
        losses = [
            made.model.loss(inputs, torch.tensor([[[0.5, gripper]]]), mask)
            for made, gripper in ((as_said, 1.0), (turned, -1.0))
        ]
    assert torch.equal(*losses)
    turned.save(tmp_path / "ours")
    np.testing.assert_array_equal(answer(Checkpoint.load(tmp_path / "ours")), other)
    with pytest.raises(VlaError, match="--open-close shoulder: expected entries that are not normalized: elbow"):
        load(originals["whole"], CONTRACT, unnorm_key="arm", open_close=("shoulder",))


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shard_bytes"), [("whole", 10**9), ("sharded", 3 * 10**6)])
def test_what_is_written_is_what_was_read(
    originals: dict[str, Path], tmp_path: Path, name: str, shard_bytes: int
) -> None:
    checkpoint = load(originals[name], CONTRACT, unnorm_key="arm")
    save(checkpoint, tmp_path / "out", shard_bytes=shard_bytes)
    before, after = tensors(originals[name]), tensors(tmp_path / "out")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (originals[name], tmp_path / "out"))
    for key in ("model_type", "timm_model_ids", "image_sizes", "image_resize_strategy", "use_fused_vision_backbone",
                "pad_token_id", "pad_to_multiple_of", "n_action_bins", "timm_override_act_layers"):  # fmt: skip
        assert new[key] == old[key], key
    assert old["text_config"].items() - {("torch_dtype", "bfloat16")} <= new["text_config"].items()
    assert new["norm_stats"]["arm"]["action"] == STATISTICS["arm"]["action"]
    assert set(new["norm_stats"]) == {"arm", "other"}
    assert json.loads((tmp_path / "out" / "dataset_statistics.json").read_text()) == new["norm_stats"]
    if name == "sharded":
        assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    again = load(tmp_path / "out", CONTRACT, unnorm_key="arm")
    assert dataclasses.asdict(again.config.model) == dataclasses.asdict(checkpoint.config.model)
    np.testing.assert_array_equal(answer(again), answer(checkpoint))


def test_oft_comes_back_with_its_parts(originals: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = load(originals["oft"], TWO, unnorm_key="arm", **OFT)
    save(checkpoint, tmp_path / "out")
    head = torch.load(tmp_path / "out" / "action_head--0_checkpoint.pt", weights_only=True)
    original = torch.load(originals["oft"] / "action_head--150000_checkpoint.pt", weights_only=True)
    assert all(torch.equal(head[name.removeprefix("module.")], value) for name, value in original.items())
    statistics = json.loads((tmp_path / "out" / "dataset_statistics.json").read_text())
    for key in ("q01", "q99", "mean", "std"):
        assert statistics["arm"]["proprio"][key] == STATISTICS["arm"]["proprio"][key]
    np.testing.assert_array_equal(answer(load(tmp_path / "out", TWO, unnorm_key="arm", **OFT)), answer(checkpoint))


def test_nothing_is_overwritten_or_left_half_written(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load(originals["whole"], CONTRACT, unnorm_key="arm")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(VlaError, match="exists; name a new folder"):
        save(checkpoint, tmp_path / "full")

    def fail(*parts: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("vla_core.pretrained.openvla.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_hub_name_is_downloaded_and_one_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(VlaError, match="openvla/openvla-7b is not in the local cache"):
        PublishedFolder.open("openvla/openvla-7b")


def test_a_hub_name_brings_the_published_files_alone(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    files = {path.name: path.read_bytes() for path in originals["whole"].iterdir()}
    code = {"modeling_prismatic.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}
    with serve() as running:
        turn_to(running.address, monkeypatch)
        running.repositories["models/openvla/tiny"] = Repository(commits={"1" * 40: files | code},
                                                                 refs={"main": "1" * 40})  # fmt: skip
        found = PublishedFolder.open("openvla/tiny")
        huggingface_hub.close_session()
    assert {path.name for path in found.path.iterdir()} == set(files)
    assert found.config["model_type"] == "openvla"
