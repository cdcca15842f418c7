"""SmolVLA in LeRobot's layout to a checkpoint and back: ``vla import smolvla`` and ``vla export --format lerobot``."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from vla_core.checkpoint import Checkpoint, PolicyConfig
from vla_core.contract import RobotContract
from vla_core.errors import VlaError, choices
from vla_core.model.vla.sizes import columns, model_sizes
from vla_core.model.vla.smolvla import SmolVLA, SmolVLARecipe
from vla_core.model.vla.smolvla_config import BACKBONES, FlowSampling
from vla_core.model.vla.smolvla_source import PREFIX, STRUCTURE, Repository, open_repository, read_tokenizer
from vla_core.observation.builder import ImageSize, ObservationSpec
from vla_core.observation.decode import kinds
from vla_core.observation.normalizer import Normalization, Normalizer, entry_names
from vla_core.observation.spec import check_spec
from vla_core.pretrained.lerobot_statistics import FEATURES, modes_of, statistics_of
from vla_core.pretrained.streams import cameras_of, instruction_of
from vla_core.runtime.execution import Execution

FLOOR = 1e-8  # of a deviation: LeRobot's own
EMPTY = "observation.images.empty_camera_"  # a picture that LeRobot makes up, and masks
# Steps of the preprocessor that are done here, or have nothing to do.
STEPS = ("rename_observations_processor", "to_batch_processor", "smolvla_new_line_processor", "tokenizer_processor",
         "device_processor", "normalizer_processor", "unnormalizer_processor")  # fmt: skip


def load(
    source: Path | str,
    contract: RobotContract,
    *,
    cameras: Mapping[str, str | None] | Sequence[str] = (),
    state: Sequence[str] = (),
    instruction: str | None = None,
    statistics: str | None = None,
    image_size: tuple[int, int] | None = None,
    vlm: str | None = None,
    ignore: Sequence[str] = (),
    revision: str | None = None,
) -> Checkpoint:
    """Make a checkpoint of ``source``, a hub name or a local folder in LeRobot's old or new layout.

    Args:
        cameras: image streams, each with the policy's key for it, as ``observation.images.top``; without keys they
            take the policy's in its order. May be left out where the contract has one stream alone.
        state: vectors that make its state, in order; may be left out where there is one alone.
        instruction: the text stream; may be left out where there is one alone.
        statistics: the group of statistics to run by, where the policy has none of its own; or a JSON file of them
            (``meta/stats.json`` of a LeRobot dataset, ``statistics.json`` of a checkpoint).
        image_size: height and width of the pictures that the model is given; by default what the policy says.
        vlm: hub name or local folder of its vision-language model, for record and tokenizer; by default the policy's.
        ignore: keys of its config.json that this package does not know and that change nothing.

    Raises :class:`VlaError` for whatever is missing, unknown, ambiguous or does not fit the contract.
    """
    found = open_repository(source, revision, tuple(ignore))
    if found.ours:
        raise VlaError(f"{source}: is a checkpoint of this package already")
    _check_steps(found)
    keys = _keys(found, cameras_of(contract, tuple(cameras)), dict(cameras) if isinstance(cameras, Mapping) else {})
    spec = ObservationSpec(
        images={name: _size(found, key, image_size) for name, key in keys.items()},
        state=tuple(state) or (_only_vector(contract),), instruction=instruction_of(contract, instruction),
    )  # fmt: skip
    check_spec(spec, contract)
    names = entry_names(spec, contract)
    _check_width(found, "action", len(contract.action_names), f"contract {contract.name}")
    _check_width(found, "observation.state", len(names["state"]), f"state of {choices(spec.state)}")
    modes = modes_of(found)
    own = statistics_of(found, modes, statistics, {"state": len(names["state"]), "action": len(names["action"])})
    normalization = Normalization(state=modes["state"], action=modes["action"], floor=FLOOR)
    vlm = vlm or found.structure["vlm"] or BACKBONES["smolvlm2-500m"].hub
    tokenizer = read_tokenizer(str(vlm))
    values = found.values
    recipe = SmolVLARecipe(
        pretrained=str(found.folder), vlm=str(vlm), horizon=values.get("chunk_size", 50),
        max_tokens=values.get("tokenizer_max_length", 48),
        head=FlowSampling(inference_steps=values.get("num_steps", 10), min_period=values.get("min_period", 4e-3),
                          max_period=values.get("max_period", 4.0)),
        **{key: found.structure[key] for key in STRUCTURE}, image_keys=tuple(keys.values()),
    )  # fmt: skip
    sizes = model_sizes(spec, contract, tokenizer.vocab_size)
    model = SmolVLA(recipe.config(**sizes), found).eval()
    provenance = {"source": str(source)} | ({"revision": revision} if revision else {})
    return Checkpoint(
        config=PolicyConfig(
            model=model.config, observation=spec, normalization=normalization,
            execution=Execution(steps=min(values.get("n_action_steps", recipe.horizon), recipe.horizon)),
            provenance=provenance | ({"statistics": statistics} if statistics else {}),
        ),
        model=model,
        normalizer=Normalizer(normalization, own, columns(spec, contract), names),
        tokenizer=tokenizer,
        contract=contract,
    )  # fmt: skip


def save(checkpoint: Checkpoint, folder: Path | str) -> None:
    """Write ``checkpoint`` in LeRobot's new layout into the new ``folder``, adapters merged.

    Whatever the normalization, it is written as the mean and the deviation that do the same.
    """
    folder = Path(folder)
    if not isinstance(checkpoint.model, SmolVLA):
        raise VlaError(f"a model of type {checkpoint.config.model.type!r} has no place in LeRobot's layout; choices: "
                       "smolvla")  # fmt: skip
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise VlaError(f"{folder}: exists; name a new folder")
    if checkpoint.normalizer.plan_rows is not None or checkpoint.config.normalization.clip:
        raise VlaError("LeRobot's layout has neither clipping nor statistics for each row of a plan; train without "
                       "normalization.clip")  # fmt: skip
    model = checkpoint.model
    if model.config.trained == "lora":
        model = copy.deepcopy(model)
        model.merge_lora()
    features = _features(checkpoint)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        weights = {PREFIX + name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        save_file(weights, partial / "model.safetensors", {"format": "pt"})
        _write(partial / "config.json", _config(checkpoint, features))
        _write_processors(partial, checkpoint, features)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_steps(found: Repository) -> None:
    """Raise for a step of the processors that would not be done."""
    for file in ("policy_preprocessor.json", "policy_postprocessor.json"):
        if not (found.folder / file).is_file():
            continue
        for step in json.loads((found.folder / file).read_text(encoding="utf-8"))["steps"]:
            name = step.get("registry_name", step.get("class"))
            if name not in STEPS:
                raise VlaError(f"{found.name}: {file} has the step {name!r}, which is not done here; known: "
                               f"{choices(STEPS)}")  # fmt: skip


def _keys(found: Repository, cameras: Sequence[str], asked: Mapping[str, str | None]) -> dict[str, str]:
    """The policy's key for each camera, in the policy's order."""
    pictures = [key for key, value in found.values.get("input_features", {}).items() if value["type"] == "VISUAL"]
    pictures = [key for key in pictures if not key.startswith(EMPTY)]
    named = {name: key for name, key in asked.items() if key is not None}
    for name, key in named.items():
        if key not in pictures or list(named.values()).count(key) > 1:
            raise VlaError(f"--cameras {name}={key}: {found.name} has "
                           f"{'one such key for one camera' if key in pictures else 'no such picture'}; choices: "
                           f"{choices(pictures)}")  # fmt: skip
    free = [key for key in pictures if key not in named.values()]
    rest = [name for name in cameras if name not in named]
    if len(rest) > len(free):
        raise VlaError(f"--cameras: {len(cameras)} for a policy of {len(pictures)} pictures: {choices(pictures)}")
    keys = named | dict(zip(rest, free, strict=False))
    return dict(sorted(keys.items(), key=lambda pair: pictures.index(pair[1])))


def _size(found: Repository, key: str, asked: tuple[int, int] | None) -> ImageSize:
    height, width = asked or found.values["input_features"][key]["shape"][-2:]
    return ImageSize(height=height, width=width)


def _only_vector(contract: RobotContract) -> str:
    vectors = [name for name, stream in contract.observations.items() if "vector" in kinds(stream.type)]
    if len(vectors) != 1:
        raise VlaError(f"--state: the contract {contract.name} has {len(vectors)} vectors; name those that make the "
                       f"policy's state; choices: {choices(vectors)}")  # fmt: skip
    return vectors[0]


def _check_width(found: Repository, feature: str, expected: int, whose: str) -> None:
    known = {**found.values.get("input_features", {}), **found.values.get("output_features", {})}
    if feature not in known:
        raise VlaError(f"{found.name}: config.json has no feature {feature!r}; it has: {choices(known)}")
    width = known[feature]["shape"][0]
    if width != expected:
        raise VlaError(f"{found.name}: the policy has {width} numbers in {feature!r}, the {whose} has {expected}")


def _features(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """LeRobot's input and output features."""
    config = checkpoint.model.config
    keys = config.image_keys or tuple(f"observation.images.{name}" for name in config.cameras)
    sizes = checkpoint.config.observation.images
    inputs = {"observation.state": {"type": "STATE", "shape": [config.state_dim]}}
    for name, key in zip(config.cameras, keys, strict=True):
        inputs[key] = {"type": "VISUAL", "shape": [3, sizes[name].height, sizes[name].width]}
    return inputs, {"action": {"type": "ACTION", "shape": [config.action_dim]}}


def _modes() -> dict[str, str]:
    return {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}


def _config(checkpoint: Checkpoint, features: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    model = checkpoint.model.config
    return {
        "type": "smolvla", "n_obs_steps": 1, "input_features": features[0], "output_features": features[1],
        "device": "cpu", "use_amp": False, "push_to_hub": False, "chunk_size": model.horizon,
        "n_action_steps": checkpoint.config.execution.steps, "normalization_mapping": _modes(),
        "max_state_dim": model.max_state_dim, "max_action_dim": model.max_action_dim,
        "resize_imgs_with_padding": [model.image_size, model.image_size], "empty_cameras": 0,
        "adapt_to_pi_aloha": False, "use_delta_joint_actions_aloha": False, "tokenizer_max_length": model.max_tokens,
        "num_steps": model.head.inference_steps, "use_cache": True, "freeze_vision_encoder": model.freeze_vision,
        "train_expert_only": model.trained == "expert", "train_state_proj": True, "vlm_model_name": _vlm(checkpoint),
        "load_vlm_weights": False, "add_image_special_tokens": False, "attention_mode": f"{model.attention}_attn",
        "prefix_length": -1, "pad_language_to": "longest", "num_expert_layers": model.expert_layers or -1,
        "num_vlm_layers": model.layers, "self_attn_every_n_layers": model.self_attention_every or -1,
        "expert_width_multiplier": model.expert_width, "min_period": model.head.min_period,
        "max_period": model.head.max_period,
    }  # fmt: skip


def _vlm(checkpoint: Checkpoint) -> str:
    """What LeRobot takes record and tokenizer from."""
    model = checkpoint.model.config
    return model.vlm or BACKBONES[model.model_name].hub


def _write_processors(folder: Path, checkpoint: Checkpoint, features: tuple[dict[str, Any], dict[str, Any]]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for feature, key in FEATURES.items():
        shift, scale = checkpoint.normalizer.affine(feature)
        width = len(checkpoint.normalizer.names[feature])
        for name, value in (("mean", shift), ("std", scale)):
            tensors[f"{key}.{name}"] = torch.from_numpy(np.broadcast_to(value, width).astype(np.float32).copy())
    both = {**features[0], **features[1]}
    before: list[tuple[str, dict[str, Any]]] = [
        ("rename_observations_processor", {"rename_map": {}}), ("to_batch_processor", {}),
        ("smolvla_new_line_processor", {}),
        ("tokenizer_processor", {
            "max_length": checkpoint.model.config.max_tokens, "task_key": "task", "padding_side": "right",
            "padding": "longest", "truncation": True, "tokenizer_name": _vlm(checkpoint),
        }),
        ("device_processor", {"device": "cpu", "float_dtype": None}),
        ("normalizer_processor", {"eps": FLOOR, "features": both, "norm_map": _modes()}),
    ]  # fmt: skip
    after: list[tuple[str, dict[str, Any]]] = [
        ("unnormalizer_processor", {"eps": FLOOR, "features": features[1], "norm_map": _modes()}),
        ("device_processor", {"device": "cpu", "float_dtype": None}),
    ]  # fmt: skip
    _write_steps(folder, "policy_preprocessor", before, tensors)
    _write_steps(folder, "policy_postprocessor", after, tensors)


def _write_steps(folder: Path, name: str, steps: Iterable[tuple[str, dict[str, Any]]],
                 tensors: dict[str, torch.Tensor]) -> None:  # fmt: skip
    written = []
    for number, (step, config) in enumerate(steps):
        written.append({"registry_name": step, "config": config})
        if step in ("normalizer_processor", "unnormalizer_processor"):
            file = f"{name}_step_{number}_{step}.safetensors"
            save_file(tensors, folder / file)
            written[-1]["state_file"] = file
    _write(folder / f"{name}.json", {"name": name, "steps": written})


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")
