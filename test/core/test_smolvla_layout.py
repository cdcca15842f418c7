"""LeRobot's layouts to a checkpoint and back: strict, with the statistics that are there and no others."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from test.core import published_smolvla as published
from test.core.helpers import checkpoint as other_checkpoint
from test.core.published_smolvla import NORMALIZER, ROBOT, UNNORMALIZER, change_json, part, publish, publish_old
from vla_core.checkpoint import Checkpoint
from vla_core.cli import main
from vla_core.errors import VlaError
from vla_core.model.vla.smolvla import SmolVLA
from vla_core.observation.builder import ImageSize, ObservationBuilder
from vla_core.observation.normalizer import Normalization, Normalizer
from vla_core.pretrained.smolvla import load, save
from vla_core.runtime.policy import CheckpointPolicy

CAMERAS = ("front", "wrist")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish(tmp_path / "policy")


def answer(checkpoint: Checkpoint) -> np.ndarray:
    """Actions in the robot's units for LeRobot's inputs in the robot's units."""
    given = part("given/")
    state = checkpoint.normalizer.normalize("state", given["observation.state"].numpy())
    inputs = dataclasses.replace(published.inputs(checkpoint.tokenizer), state=torch.from_numpy(state))
    normalized = checkpoint.model.sample(inputs, given["noise"])[..., :4]
    return checkpoint.normalizer.unnormalize("action", normalized.numpy())


def same(checkpoint: Checkpoint) -> None:
    np.testing.assert_allclose(answer(checkpoint), part("found/")["actions"].numpy(), atol=1e-4)


def test_both_layouts_act_as_lerobot_does(folder: Path, tmp_path: Path) -> None:
    """From raw numbers to raw numbers, and again from our own checkpoint, without the folder."""
    found = load(folder, ROBOT, cameras=CAMERAS)
    same(found)
    same(load(publish_old(tmp_path / "old"), ROBOT, cameras=CAMERAS))
    assert found.config.model.horizon == found.config.execution.steps == 6
    assert found.config.observation.images == {"front": ImageSize(height=48, width=64),
                                               "wrist": ImageSize(height=40, width=40)}  # fmt: skip
    assert found.config.normalization == Normalization(state="mean_std", action="mean_std", floor=1e-8)
    found.save(tmp_path / "checkpoint")
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()
    again = Checkpoint.load(tmp_path / "checkpoint")
    same(again)
    policy = CheckpointPolicy(again)
    observation = ObservationBuilder(ROBOT, policy.spec).blank()
    assert policy.predict(observation).actions.shape == (6, 4)


def test_it_is_saved_as_lerobot_saves_it(folder: Path, tmp_path: Path) -> None:
    """The same tensors, and in every file of JSON the same words for what decides the actions."""
    found = load(folder, ROBOT, cameras=CAMERAS)
    save(found, tmp_path / "saved")
    same(load(tmp_path / "saved", ROBOT, cameras=CAMERAS))
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[name].float(), value) for name, value in ours.items())
    for name in (NORMALIZER, UNNORMALIZER):
        written, known = load_file(tmp_path / "saved" / name), load_file(folder / name)
        assert set(written) == set(known)
        assert all(torch.equal(written[key], known[key]) for key in known)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        steps = [json.loads((place / name).read_text())["steps"] for place in (folder, tmp_path / "saved")]
        for their, our in zip(*steps, strict=True):
            assert set(our) == set(their) and our["registry_name"] == their["registry_name"]
            assert set(our["config"]) == set(their["config"])
            assert {k: v for k, v in our["config"].items() if k != "features"} == {
                k: v for k, v in their["config"].items() if k != "features"}  # fmt: skip
    config, known = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "saved", folder))
    free = {"input_features", "empty_cameras"}
    assert {k: known[k] for k in config if k not in free} == {k: v for k, v in config.items() if k not in free}
    third = {"observation.images.third", "observation.images.empty_camera_0"}
    assert config["input_features"] == {k: v for k, v in known["input_features"].items() if k not in third}


def test_any_normalization_is_written_as_mean_and_deviation(folder: Path, tmp_path: Path) -> None:
    found = load(folder, ROBOT, cameras=CAMERAS)
    modes = Normalization(state="none", action="min_max", floor=0.5)
    numbers = {"min": [-1.0, 0.0, 2.0, 1.0], "max": [1.0, 4.0, 2.0, 1.5]}
    normalizer = Normalizer(modes, {"action": numbers}, names=found.normalizer.names)
    changed = dataclasses.replace(found, config=dataclasses.replace(found.config, normalization=modes),
                                  normalizer=normalizer)  # fmt: skip
    save(changed, tmp_path / "saved")
    again = load(tmp_path / "saved", ROBOT, cameras=CAMERAS)
    np.testing.assert_allclose(answer(again), answer(changed), atol=1e-5)
    written = load_file(tmp_path / "saved" / UNNORMALIZER)
    assert written["action.mean"].tolist() == [0.0, 2.0, 2.0, 1.25]
    assert written["action.std"].tolist() == [1.0, 2.0, 0.5, 0.5]


def test_statistics_are_never_taken_for_identity(folder: Path, tmp_path: Path) -> None:
    """The published base has its statistics in groups of which LeRobot finds none."""
    for name, prefix in ((NORMALIZER, "observation.state"), (UNNORMALIZER, "action")):
        known = load_file(folder / name)
        renamed = {f"{group}.buffer.{key}": value.clone() for group in ("so100", "so100-red")
                   for key, value in known.items() if key.startswith(prefix)}  # fmt: skip
        save_file(renamed, folder / name)
    with pytest.raises(VlaError) as refused:
        load(folder, ROBOT, cameras=CAMERAS)
    assert "no mean and std of 'observation.state' for mean_std; there are: " in str(refused.value)
    assert "so100.observation.state.mean" in str(refused.value)
    assert "choose one with --statistics: so100, so100-red" in str(refused.value)
    same(load(folder, ROBOT, cameras=CAMERAS, statistics="so100"))
    with pytest.raises(VlaError, match="no group of statistics 'so101'; choices: so100, so100-red"):
        load(folder, ROBOT, cameras=CAMERAS, statistics="so101")
    state, action = (load_file(folder / name) for name in (NORMALIZER, UNNORMALIZER))
    numbers = {"observation.state": {k: state[f"so100.buffer.observation.state.{k}"].tolist() for k in ("mean", "std")},
               "action": {k: action[f"so100.buffer.action.{k}"].tolist() for k in ("mean", "std")}}  # fmt: skip
    (tmp_path / "stats.json").write_text(json.dumps(numbers))
    same(load(folder, ROBOT, cameras=CAMERAS, statistics=str(tmp_path / "stats.json")))
    old = publish_old(tmp_path / "old", "so100.")
    with pytest.raises(VlaError, match="choose one with --statistics: so100"):
        load(old, ROBOT, cameras=CAMERAS)
    same(load(old, ROBOT, cameras=CAMERAS, statistics="so100"))
    none = publish_old(tmp_path / "none")
    save_file(published.weights(), none / "model.safetensors")
    with pytest.raises(VlaError, match=r"no mean and std of 'observation\.state' for mean_std; there are: none"):
        load(none, ROBOT, cameras=CAMERAS)
    change_json(none / "config.json", normalization_mapping={"VISUAL": "IDENTITY", "STATE": "IDENTITY",
                                                             "ACTION": "IDENTITY"})  # fmt: skip
    assert load(none, ROBOT, cameras=CAMERAS).config.normalization.action == "none"  # so it is declared


def broken(folder: Path, change: str) -> None:
    """Damage a folder."""
    weights = load_file(folder / "model.safetensors")
    first = "model.vlm_with_expert.lm_expert.layers.0.mlp.up_proj.weight"
    if change == "missing":
        del weights[first]
    elif change == "extra":
        weights["model.adapter.weight"] = torch.zeros(1)
    elif change == "shape":
        weights[first] = torch.zeros(3, 24)
    save_file(weights, folder / "model.safetensors")
    statistics = load_file(folder / UNNORMALIZER)
    if change == "infinite":
        save_file({**statistics, "action.std": torch.full((4,), torch.inf)}, folder / UNNORMALIZER)
    elif change == "short":
        save_file({**statistics, "action.std": torch.ones(3)}, folder / UNNORMALIZER)
    elif change == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif change == "no weights":
        (folder / "model.safetensors").unlink()
    elif change == "no state file":
        (folder / NORMALIZER).unlink()
    elif change == "step":
        path = folder / "policy_preprocessor.json"
        path.write_text(path.read_text().replace("to_batch_processor", "delta_processor"))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "aloha": ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha True, expected False"),
    "key": ({"new_trick": 1}, "unknown keys new_trick; if they change nothing: --ignore new_trick"),
    "type": ({"type": "act"}, "found a policy of type 'act', expected 'smolvla'"),
    "oblong": ({"resize_imgs_with_padding": [512, 256]}, "resize_imgs_with_padding [512, 256], expected a square"),
    "features": ({"output_features": {}}, "config.json has no feature 'action'"),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "weights do not fit: missing vlm_with_expert.lm_expert.layers.0.mlp.up_proj.weight, unexp"),
        ("extra", "missing none, unexpected adapter.weight, of another shape none"),
        ("shape", "layers.0.mlp.up_proj.weight (3, 24) instead of (256, 24)"),
        ("infinite", "std of 'action': found [inf, inf, inf, inf], expected 4 finite numbers"),
        ("short", "std of 'action': found [1.0, 1.0, 1.0], expected 4 finite numbers"),
        ("truncated", "model.safetensors: damaged: "),
        ("no weights", "no policy: model.safetensors missing; found: config.json"),
        ("no state file", "named by policy_preprocessor.json: cannot be read: "),
        ("step", "policy_preprocessor.json has the step 'delta_processor', which is not done here"),
        *((name, message) for name, (_, message) in CONFIGS.items()),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_named(folder: Path, change: str, message: str) -> None:
    if change in CONFIGS:
        change_json(folder / "config.json", **CONFIGS[change][0])
    else:
        broken(folder, change)
    with pytest.raises(VlaError, match=re.escape(message)) as error:
        load(folder, ROBOT, cameras=CAMERAS)
    assert "\n" not in str(error.value)
    if change == "key":
        same(load(folder, ROBOT, cameras=CAMERAS, ignore=["new_trick"]))


def test_the_contract_must_fit(folder: Path, tmp_path: Path) -> None:
    action = dataclasses.replace(ROBOT.actions["arm"], names=("a",), units=("rad/s",), low=(-1.0,), high=(1.0,),
                                 safe=("zero",))  # fmt: skip
    one = dataclasses.replace(ROBOT, name="one", actions={"arm": action})
    arm = dataclasses.replace(ROBOT.observations["arm"], names=("a", "b"), units=("rad",) * 2)
    two = dataclasses.replace(ROBOT, observations={**ROBOT.observations, "arm": arm})
    for robot, options, message in (
        (one, {"cameras": CAMERAS}, "the policy has 4 numbers in 'action', the contract one has 1"),
        (two, {"cameras": CAMERAS}, "the policy has 3 numbers in 'observation.state', the state of arm has 2"),
        (ROBOT, {}, "--cameras: the contract toy has 2 streams of kind image"),
        (ROBOT, {"cameras": {"front": "observation.images.top"}}, "no such picture; choices: observation.images.front"),
        (ROBOT, {"cameras": {n: "observation.images.front" for n in CAMERAS}}, "one such key for one camera"),
        (ROBOT, {"cameras": (*CAMERAS, "a", "b")}, "--cameras: 4 for a policy of 3 pictures"),
        (ROBOT, {"cameras": CAMERAS, "vlm": str(tmp_path)}, "no usable model there"),
    ):
        with pytest.raises(VlaError, match=re.escape(message)):
            load(folder, robot, **options)


def test_cameras_take_the_keys_that_they_are_given(folder: Path) -> None:
    """The policy sees them in its own order, whatever the contract's."""
    crossed = load(folder, ROBOT, cameras={"wrist": "observation.images.front", "front": None}, image_size=(32, 32))
    assert crossed.config.model.cameras == ("wrist", "front")
    assert crossed.config.model.image_keys == ("observation.images.front", "observation.images.wrist")
    assert set(crossed.config.observation.images.values()) == {ImageSize(height=32, width=32)}
    single = load(folder, ROBOT, cameras={"front": "observation.images.third"})
    assert single.config.model.image_keys == ("observation.images.third",)


def test_save_refuses_what_lerobot_has_no_place_for(folder: Path, tmp_path: Path) -> None:
    found = load(folder, ROBOT, cameras=CAMERAS)
    with pytest.raises(VlaError, match="a model of type 'mini_vla' has no place in LeRobot's layout; choices: smolvla"):
        save(other_checkpoint(), tmp_path / "saved")
    with pytest.raises(VlaError, match="exists; name a new folder"):
        save(found, folder)
    clipped = dataclasses.replace(found.config.normalization, clip={"action": 1.0})
    with pytest.raises(VlaError, match="has neither clipping"):
        save(dataclasses.replace(found, config=dataclasses.replace(found.config, normalization=clipped)),
             tmp_path / "saved")  # fmt: skip
    assert not (tmp_path / "saved").exists()


def test_the_command_imports_and_checks_itself(folder: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "robot.yaml").write_text(ROBOT.to_yaml())
    words = ["import", "smolvla", str(folder), "--contract", str(tmp_path / "robot.yaml"), "--cameras", "front",
             "wrist=observation.images.wrist", "--vlm", str(folder / "vlm"), "--image-size", "32", "48",
             "--out", str(tmp_path / "checkpoint")]  # fmt: skip
    assert main(words) == 0
    assert "camera wrist: changes the actions" in capsys.readouterr().out
    found = Checkpoint.load(tmp_path / "checkpoint")
    same(found)
    assert set(found.config.observation.images.values()) == {ImageSize(height=32, width=48)}


def test_the_output_layer_is_kept(folder: Path, tmp_path: Path) -> None:
    """Published weights may have tied it to the embedding, and then lack it; both are saved as they came."""
    assert "vlm_with_expert.vlm.lm_head.weight" in load(folder, ROBOT, cameras=CAMERAS).model.state_dict()
    weights = load_file(folder / "model.safetensors")
    del weights["model.vlm_with_expert.vlm.lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    found = load(folder, ROBOT, cameras=CAMERAS)
    same(found)
    save(found, tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(weights)
    assert isinstance(found.model, SmolVLA)
