"""A policy of two tasks looks at its camera and its instruction, and `vla inspect --sensitivity` says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_core.checkpoint import Checkpoint
from vla_core.cli import main
from vla_core.config import to_dict
from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.evaluation.sensitivity import sensitivity
from vla_core.observation import messages
from vla_core.observation.builder import Observation, ObservationSpec
from vla_core.observation.messages import Message
from vla_core.observation.spec import ImageSize
from vla_core.runtime.policy import CheckpointPolicy

from .helpers import IMAGE, START, STEP, arm, command, mark, task, with_stream, write_bag
from .whole_models import one_thread as one_thread

CONTRACT = with_stream("camera", rate_hz=100.0)
SIDE = 8
TASKS = {"go to the red one": 0, "go to the blue one": 2}
RECIPE = {
    "observation": to_dict(ObservationSpec(
        images={"camera": ImageSize(height=SIDE, width=SIDE)}, state=("arm",), instruction="task"
    )),
    "model": "model.yaml",
    "execution": {"steps": 1},
    "training": {"steps": 300, "batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 20, "ema_decay": 0.98},
}  # fmt: skip
MODEL = {
    "type": "vla", "horizon": 1,
    "vision": {"type": "tiny_cnn", "image_size": SIDE, "output_dim": 32, "channels": [16, 32]},
    "projector": {"type": "mlp"},
    "language": {"type": "tiny_gru", "d_model": 32},
    "head": {"type": "mlp", "hidden_dim": 64},
    "context": "all",
}  # fmt: skip


def picture(rng: np.random.Generator) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """A red and a blue quarter of a grey picture, and where they are by channel: x, y, each -0.8 or 0.8."""
    pixels = rng.integers(60, 120, (SIDE, SIDE, 3), dtype=np.uint8)
    half, places = SIDE // 2, {}
    for channel, quarter in zip((0, 2), rng.permutation(4)[:2], strict=True):
        row, column = divmod(int(quarter), 2)
        corner = pixels[row * half : (row + 1) * half, column * half : (column + 1) * half]
        corner[:] = 0
        corner[..., channel] = 255
        places[channel] = 1.6 * np.array([column, row]) - 0.8
    return pixels, places


def episode(seed: int, ticks: int = 50) -> list[Message]:
    """A new picture at every tick; the command points at the square of the instruction."""
    rng = np.random.default_rng(seed)
    text, channel = list(TASKS.items())[seed % 2]
    start = START + seed * 100_000 * STEP
    out = [mark(start, 0, seed), task(start, text)]
    for k in range(ticks):
        stamp_ns = start + k * STEP
        pixels, places = picture(rng)
        x, y = places[channel]
        out += [Message("cam/raw", IMAGE, stamp_ns, messages.image(stamp_ns, pixels))]
        out += [arm(stamp_ns, *rng.normal(size=2)), command(stamp_ns, x, y)]
    return [*out, mark(start + ticks * STEP, 1, seed)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bags, the dataset of them, and a policy that was trained on it, all as typed."""
    folder = tmp_path_factory.mktemp("two_tasks")
    for seed in range(12):
        write_bag(folder / "bags" / f"e{seed:02d}", episode(seed), CONTRACT)
    write_bag(folder / "one", episode(0), CONTRACT)
    (folder / "model.yaml").write_text(json.dumps(MODEL))
    (folder / "recipe.yaml").write_text(json.dumps({**RECIPE, "model": str(folder / "model.yaml")}))
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["convert", "bags", "--out", "data", "--recipe", "recipe.yaml"]) == 0
        assert main(["train", "recipe.yaml", "--dataset", "data", "--out", "policy"]) == 0
    return folder


def shares(found: object) -> dict[str, float]:
    return {change.what: change.share for change in found.changes}  # type: ignore[attr-defined]


def test_it_learned_both_tasks(place: Path) -> None:
    policy = CheckpointPolicy.load(place / "policy")
    rng, errors = np.random.default_rng(999), []
    for k in range(40):
        pixels, places = picture(rng)
        for text, channel in TASKS.items():
            seen = Observation(START + k, {"camera": pixels}, np.zeros(2, np.float32), text, {})
            errors.append(np.abs(policy.predict(seen).actions[0] - places[channel]))
    assert np.mean(errors) < 0.3, "pictures it never saw; a policy that ignores one of its inputs has 0.5 and more"
    assert policy.checkpoint.model.prefix_cache.computed > 1


@pytest.mark.parametrize("data", ["data", "bags"])
def test_it_looks_at_its_camera_and_its_instruction_and_not_at_its_joints(place: Path, data: str) -> None:
    found = sensitivity(Checkpoint.load(place / "policy"), place / data)
    share = shares(found)
    assert share["instruction swapped"] > 0.7 and share["camera black"] > 0.7
    assert share["state masked"] < 0.5 * share["camera black"]
    assert share["other noise"] == 0, "its head samples nothing"
    assert found.samples >= 250 and set(found.instructions) == set(TASKS) and not found.not_measured


def test_a_policy_without_eyes_and_ears_is_found_out(place: Path) -> None:
    checkpoint = Checkpoint.load(place / "policy")
    with torch.no_grad():
        checkpoint.model.language.embedding.weight.zero_()
        for parameter in checkpoint.model.vision.parameters():
            parameter.zero_()
    share = shares(sensitivity(checkpoint, place / "data", samples=50))
    assert share["instruction swapped"] < 1e-5 and share["camera black"] < 1e-5 < share["state masked"]


def test_as_typed(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert main(["inspect", "policy", "--sensitivity", "bags", "--samples", "60", "--out", "new/s.json"]) == 0
    text = capsys.readouterr().out
    assert "over 60 ticks" in text and "camera black" in text and "shoulder" in text
    record = json.loads((place / "new" / "s.json").read_text())
    assert record["samples"] == 60 and {c["what"] for c in record["changes"]} == {
        "instruction swapped", "camera black", "state masked", "other noise"
    }  # fmt: skip
    assert 0.2 < record["spread"]["shoulder"] < 1.0
    assert main(["inspect", "policy"]) == 0 and "vla, " in capsys.readouterr().out
    assert main(["inspect", "policy", "--out", "x.json"]) == 1


def test_one_instruction_cannot_be_swapped(place: Path) -> None:
    found = sensitivity(Checkpoint.load(place / "policy"), place / "one", samples=20)
    assert "instruction swapped" not in shares(found)
    assert found.not_measured == {"instruction swapped": "the data has only 'go to the red one'"}
    assert "not measured" in found.table()


def test_data_of_another_robot_or_another_observation(place: Path) -> None:
    checkpoint = Checkpoint.load(place / "policy")
    (camera,) = checkpoint.config.observation.images
    size = ImageSize(height=5, width=5)
    spec = dataclasses.replace(checkpoint.config.observation, images={camera: size})
    other = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, observation=spec))
    with pytest.raises(VlaError, match=f"another observation; it has no images.{camera} 5x5"):
        sensitivity(other, place / "data")
    sawyer = dataclasses.replace(checkpoint, contract=RobotContract.load("metaworld_sawyer"))
    with pytest.raises(VlaError, match="contracts disagree"):
        sensitivity(sawyer, place / "data")
