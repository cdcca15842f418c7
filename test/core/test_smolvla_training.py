"""SmolVLA fine-tuned by ``vla train``, from LeRobot's layout and from a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from test.core.helpers import SPEC, episodes, observations, write_dataset
from test.core.published_smolvla import publish, weights
from vla_core.checkpoint import Checkpoint
from vla_core.cli import main
from vla_core.config import to_dict
from vla_core.contract import RobotContract
from vla_core.model.vla.sizes import model_sizes
from vla_core.pretrained.smolvla import save
from vla_core.runtime.policy import CheckpointPolicy
from vla_core.training import state
from vla_core.training.recipe import load_recipe

FROZEN = {"expert": ".vlm.", "all": ".vision_model.", "lora": ".base_layer."}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy in LeRobot's layout, a dataset of the toy robot and the recipe for both."""
    found = tmp_path_factory.mktemp("smolvla")
    publish(found / "policy")
    write_dataset(found / "data", episodes((6, 5)))
    recipe = {
        "observation": to_dict(SPEC), "normalization": {"state": "mean_std", "action": "mean_std"},
        "model": {"type": "smolvla", "pretrained": str(found / "policy"), "image_size": 64, "horizon": 5,
                  "lora": {"r": 2}, "head": {"inference_steps": 3}},
        "execution": {"steps": 2},
        "training": {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "schedule": "constant",
                     "ema_decay": None, "open_loop": 0, "save_every": 100, "validate_every": 100},
    }  # fmt: skip
    (found / "toy.yaml").write_text(yaml.safe_dump(recipe))
    return found


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_to_disk", lambda folder: None)


def run(place: Path, out: Path, *words: str) -> Checkpoint:
    command = ["train", str(place / "toy.yaml"), *words, "--dataset", str(place / "data"), "--out", str(out)]
    assert main(command) == 0
    return Checkpoint.load(out)


def plain(name: str) -> str:
    """Name of a tensor before it had adapters."""
    return name.replace(".base_layer.", ".")


@pytest.mark.parametrize("trained", ["expert", "all", "lora"])
def test_it_is_trained_from_lerobots_layout(place: Path, tmp_path: Path, trained: str) -> None:
    found = run(place, tmp_path / "out", f"model.trained={trained}")
    start = {name.removeprefix("model."): value.float() for name, value in weights().items()}
    moved = {name for name, value in found.model.state_dict().items()
             if plain(name) in start and not torch.equal(value, start[plain(name)])}  # fmt: skip
    assert {"state_proj.weight", "action_out_proj.bias"} <= moved
    assert not any(FROZEN[trained] in name for name in moved), sorted(moved)[:3]
    assert any("lm_expert" in name for name in moved) == (trained != "lora")
    policy = CheckpointPolicy(found)
    chunk = policy.predict(observations(episodes((3,))[0])[0])
    assert chunk.actions.shape == (5, 2)

    save(found, tmp_path / "lerobot")
    saved = load_file(tmp_path / "lerobot" / "model.safetensors")
    assert set(saved) == set(weights())
    key = "model.vlm_with_expert.lm_expert.layers.1.mlp.up_proj.weight"
    assert not torch.equal(saved[key], weights()[key].float())  # adapters are merged
    assert (trained == "lora") == any("lora" in name for name in found.model.state_dict())  # and still there here


def test_it_learns_and_goes_on_from_a_checkpoint(place: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    run(place, tmp_path / "first", "training.steps=40", "training.gradient_checkpointing=true")
    run(place, tmp_path / "second", f"model.pretrained={tmp_path / 'first'}", "training.steps=1")
    losses = [float(text) for text in re.findall(r"s, loss ([0-9.]+)", capsys.readouterr().out)]
    start = run(place, tmp_path / "third", "training.steps=1")
    losses.append(float(re.findall(r"s, loss ([0-9.]+)", capsys.readouterr().out)[0]))
    assert losses[1] < 0.8 * losses[2], losses  # the first loss of the second run and of one from the start
    assert start.config.model.vlm == str(place / "policy" / "vlm")
    assert start.config.model.architecture["text_config"]["num_hidden_layers"] == 16
    same = Checkpoint.load(tmp_path / "second").tokenizer.to_dict()
    assert same == start.tokenizer.to_dict()


def test_the_recipe_is_for_the_published_base() -> None:
    recipe = load_recipe("smolvla")
    assert recipe.model.pretrained == "lerobot/smolvla_base"
    assert (recipe.model.layers, recipe.model.trained, recipe.training.learning_rate) == (16, "expert", 1e-4)
    robot = RobotContract.load("metaworld_sawyer")
    assert recipe.model.config(**model_sizes(recipe.observation, robot, 49280)).state_dim == 4
