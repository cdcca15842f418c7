"""A small SmolVLA in LeRobot's layout, with what LeRobot answers (``test/references/lerobot_smolvla.py`` made both)."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from test.core.helpers import CONTRACT
from vla_core.model.inputs import ModelInputs

REFERENCE = Path(__file__).parent / "data" / "smolvla.safetensors"
TASKS = ["push it left", "pull it"]
NORMALIZER = "policy_preprocessor_step_5_normalizer_processor.safetensors"
UNNORMALIZER = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
_camera, _arm, _action = CONTRACT.observations["camera"], CONTRACT.observations["arm"], CONTRACT.actions["arm"]
ROBOT = dataclasses.replace(
    CONTRACT,
    observations={
        "front": dataclasses.replace(_camera, topic="front"),
        "wrist": dataclasses.replace(_camera, topic="wrist"),
        "arm": dataclasses.replace(_arm, names=("a", "b", "c"), units=("rad",) * 3),
        "task": CONTRACT.observations["task"],
    },
    actions={"arm": dataclasses.replace(_action, names=("a", "b", "c", "d"), units=("rad/s",) * 4, low=(-9.0,) * 4,
                                        high=(9.0,) * 4, safe=("zero",) * 4)},
)  # fmt: skip


@cache
def reference() -> dict[str, torch.Tensor]:
    """Tensors by ``given/…``, ``found/…``, ``weights/…`` and file."""
    return load_file(REFERENCE)


@cache
def texts() -> dict[str, str]:
    """LeRobot's own JSON files by name."""
    with safe_open(REFERENCE, "pt") as file:
        found: dict[str, str] = json.loads(file.metadata()["files"])
    return found


def publish(folder: Path) -> Path:
    """Write the policy's folder as LeRobot wrote it, and its vision-language model's in ``vlm`` of it."""
    (folder / "vlm").mkdir(parents=True)
    for name, text in texts().items():
        (folder / name).write_text(text.replace('"VLM"', json.dumps(str(folder / "vlm"))))
    save_file(weights(), folder / "model.safetensors")
    for name in (NORMALIZER, UNNORMALIZER):
        save_file(part(f"{name}/"), folder / name)
    return folder


def publish_old(folder: Path, group: str = "") -> Path:
    """The same in the layout before the processors: statistics among the weights, of ``group`` where one is named."""
    publish(folder)
    for path in folder.glob("policy_*"):
        path.unlink()
    state, action = part(f"{NORMALIZER}/"), part(f"{UNNORMALIZER}/")
    old = {f"normalize_inputs.{group}buffer_observation_state.{k}": state[f"observation.state.{k}"]
           for k in ("mean", "std")}  # fmt: skip
    for place in ("normalize_targets", "unnormalize_outputs"):
        old |= {f"{place}.{group}buffer_action.{k}": action[f"action.{k}"].clone() for k in ("mean", "std")}
    save_file({**weights(), **old}, folder / "model.safetensors")
    return folder


def part(prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in reference().items() if name.startswith(prefix)}


def weights() -> dict[str, torch.Tensor]:
    return part("weights/")


def change_json(path: Path, **changes: Any) -> None:
    """Set keys; None takes one out."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def inputs(tokenizer: Any) -> ModelInputs:
    """What LeRobot was given, as this package's models are given it: two observations."""
    given = part("given/")
    there = torch.ones(2, dtype=torch.bool)
    tokens = tokenizer.batch(TASKS)
    return ModelInputs(
        images={name: given[f"observation.images.{name}"] for name in ("front", "wrist")},
        image_mask={"front": there, "wrist": there}, state=reference()["found/state"], state_mask=there,
        tokens=tokens, token_mask=tokens != tokenizer.pad_id,
    )  # fmt: skip
