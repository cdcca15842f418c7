"""OpenVLA's checkpoints to ours and back: ``vla import openvla`` and ``vla export --format openvla``.

A 7B model in bfloat16 takes 15.1 GB. It is held once: shards are read one tensor after the other into a model that had
no memory before, and written from where they lie.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from vla_core.checkpoint import Checkpoint, PolicyConfig
from vla_core.contract import RobotContract
from vla_core.errors import choices
from vla_core.model.vla.openvla import OpenVLA, OpenVLARecipe
from vla_core.model.vla.openvla_decode import ActionTokensConfig, RegressionConfig
from vla_core.model.vla.openvla_vision import BackboneConfig
from vla_core.model.vla.sizes import columns, model_sizes
from vla_core.observation.builder import ImageSize, ObservationSpec
from vla_core.observation.normalizer import Normalization, Normalizer, Statistics, entry_names
from vla_core.observation.spec import check_spec
from vla_core.pretrained.openvla_folder import COMPONENTS, INDEX, STATISTICS, OpenVLAError, PublishedFolder
from vla_core.pretrained.streams import cameras_of, instruction_of
from vla_core.runtime.execution import Execution

Bounds = Literal["quantile", "min_max"]
FLOOR = 1e-12  # statistics are taken as they are: half of q99 - q01 is the scale, however small
PUBLISHED_KEYS = ("mean", "std", "min", "max", "q01", "q99")
SHARD_BYTES = 5 * 10**9


def load(
    source: Path | str,
    contract: RobotContract,
    *,
    unnorm_key: str | None = None,
    cameras: Sequence[str] = (),
    state: Sequence[str] = (),
    instruction: str | None = None,
    revision: str | None = None,
    horizon: int | None = None,
    center_crop: bool = False,
    image_size: tuple[int, int] | None = None,
    bounds: Bounds = "quantile",
    open_close: Sequence[str] = (),
    dtype: Literal["stored", "float32", "bfloat16"] = "stored",
) -> Checkpoint:
    """Make a checkpoint of ``source``, a hub name or a local folder in the published layout.

    Args:
        unnorm_key: the dataset by whose statistics the robot acts; may be left out where there is one alone.
        cameras: image streams in the order of training; may be left out where the contract has one alone.
        state: vectors that OpenVLA-OFT's projector reads, in order.
        instruction: the text stream; may be left out where there is one alone.
        horizon: rows of an OpenVLA-OFT chunk, which its files do not tell: 8 for LIBERO, 25 for ALOHA, 5 for Bridge.
        center_crop: for models that were fine-tuned with random crops, which their files do not tell either.
        image_size: height and width of the pictures that the model is given, by default those of its backbone.
        bounds: what OpenVLA-OFT normalized by: quantiles, or (ALOHA) the range.
        open_close: entries of the action that the model says from 0 (closed) to 1 (open) where the robot takes 1
            (closed) to -1 (open): the gripper of LIBERO and other simulators on robosuite.

    Raises :class:`OpenVLAError` for whatever is missing, ambiguous or does not fit the contract.
    """
    folder = PublishedFolder.open(source, revision)
    statistics = folder.statistics()
    key = _key(folder, statistics, unnorm_key)
    side = folder.backbones()[0].image_size
    height, width = image_size or (side, side)
    spec = ObservationSpec(
        images={name: ImageSize(height=height, width=width) for name in cameras_of(contract, cameras)},
        state=tuple(state), instruction=instruction_of(contract, instruction),
    )  # fmt: skip
    check_spec(spec, contract)
    names = entry_names(spec, contract)
    _check_sizes(folder, statistics[key], key, contract, names["state"])
    if folder.regresses and horizon is None:
        raise OpenVLAError(f"{folder.path}: --horizon: the rows of a chunk are not told by its files; 8 for the "
                           "published LIBERO checkpoints, 25 for ALOHA, 5 for Bridge")  # fmt: skip
    own = _ours(statistics[key], names["state"])
    normalization = _normalization(statistics[key], names, bounds)
    tokenizer = folder.tokenizer()
    recipe = OpenVLARecipe(
        pretrained=str(source), revision=revision, dtype=dtype, horizon=horizon or 1, center_crop=center_crop,
        head=RegressionConfig() if folder.regresses else ActionTokensConfig(),
        open_close=_places(open_close, names["action"], _mask(statistics[key]["action"])),
    )  # fmt: skip
    model = OpenVLA(recipe.config(**model_sizes(spec, contract, tokenizer.vocab_size))).eval()
    steps = recipe.horizon  # the published code executes whole chunks
    return Checkpoint(
        config=PolicyConfig(
            model=model.config, observation=spec, normalization=normalization, execution=Execution(steps=steps),
            provenance={"source": str(source), "unnorm_key": key} | ({"revision": revision} if revision else {}),
        ),
        model=model,
        normalizer=Normalizer(normalization, own, columns(spec, contract), names),
        tokenizer=tokenizer,
        contract=contract,
        dataset_statistics={
            name: _ours(found, names["state"])
            for name, found in statistics.items() if _alike(found, statistics[key], names["state"])
        },
    )  # fmt: skip


def save(checkpoint: Checkpoint, folder: Path | str, *, unnorm_key: str | None = None,
         shard_bytes: int = SHARD_BYTES) -> None:  # fmt: skip
    """Write ``checkpoint`` in the published layout into the new ``folder``, adapters merged.

    ``unnorm_key`` names its statistics; by default that of the import, or ``vla_ros``. The parts of OpenVLA-OFT become
    the torch files that its code reads; they hold tensors alone.
    """
    model, folder = checkpoint.model, Path(folder)
    if not isinstance(model, OpenVLA):
        raise OpenVLAError(f"a model of type {checkpoint.config.model.type!r} has no OpenVLA layout; choices: openvla")
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise OpenVLAError(f"{folder}: exists; name a new folder")
    key = unnorm_key or checkpoint.config.provenance.get("unnorm_key", "vla_ros")
    statistics = {**_mixture(checkpoint), key: _theirs(checkpoint)}
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, model, shard_bytes)
        _write(partial / "config.json", _config(model, statistics))
        _write(partial / STATISTICS, statistics)
        _write(partial / "preprocessor_config.json", _preprocessor(model))
        (partial / "tokenizer.json").write_text(checkpoint.tokenizer.to_dict()["tokenizer"], encoding="utf-8")
        _write(partial / "tokenizer_config.json",
               {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                "pad_token": "<PAD>", "padding_side": "right", "model_max_length": 2048})  # fmt: skip
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def merged_weights(model: OpenVLA) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of the model with its adapters added to the weights, one after the other; the model stays."""
    layers = {name: part for name, part in model.named_modules() if hasattr(part, "get_delta_weight")}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        layer = layers.get(name.partition(".base_layer.")[0]) if ".base_layer." in name else None
        if layer is not None and name.endswith(".weight"):
            delta = layer.get_delta_weight("default").detach()
            tensor = (tensor.float() + delta.float()).to(tensor.dtype)
        yield name.replace(".base_layer.", "."), tensor.detach().cpu().contiguous()


def _key(folder: PublishedFolder, statistics: Mapping[str, Any], asked: str | None) -> str:
    if asked is None and len(statistics) > 1:
        raise OpenVLAError(f"{folder.path}: --unnorm-key: the model was trained on {len(statistics)} datasets; name "
                           f"the one whose robot this is; choices: {choices(statistics)}")  # fmt: skip
    key = next(iter(statistics)) if asked is None else asked
    if key not in statistics:
        raise OpenVLAError(f"{folder.path}: no statistics of {key!r}; choices: {choices(statistics)}")
    return key


def _places(asked: Sequence[str], names: tuple[str, ...], mask: Sequence[bool]) -> tuple[int, ...]:
    """Where the entries ``asked`` stand; what is normalized is not said from 0 to 1."""
    for name in asked:
        if name not in names or mask[names.index(name)]:
            able = [name for name, is_normalized in zip(names, mask, strict=True) if not is_normalized]
            raise OpenVLAError(f"--open-close {name}: expected entries that are not normalized: {choices(able)}")
    return tuple(names.index(name) for name in asked)


def _check_sizes(folder: PublishedFolder, found: Mapping[str, Any], key: str, contract: RobotContract,
                 state: Sequence[str]) -> None:  # fmt: skip
    """Statistics, projector and contract must speak of the same numbers."""
    _check_feature(folder, found, key, "action", len(contract.action_names), f"contract {contract.name}")
    if folder.state_dim != len(state):
        raise OpenVLAError(f"{folder.path}: --state: its projector reads {folder.state_dim} numbers, the streams "
                           f"{choices(state) if state else 'that were named'} have {len(state)}")  # fmt: skip
    if state:
        _check_feature(folder, found, key, "proprio", len(state), "observed state")


def _check_feature(folder: PublishedFolder, found: Mapping[str, Any], key: str, feature: str, expected: int,
                   whose: str) -> None:  # fmt: skip
    if feature not in found:
        raise OpenVLAError(f"{folder.path}: statistics of {key!r} lack {feature!r}; they have: {choices(found)}")
    numbers = found[feature]
    for name in ("q01", "q99"):
        row = numbers.get(name)
        if not isinstance(row, list) or not all(isinstance(v, int | float) and isfinite(v) for v in row):
            raise OpenVLAError(f"{folder.path}: statistics {key}.{feature}.{name} are no finite numbers: {row!r}")
        if len(row) != expected:
            raise OpenVLAError(f"{folder.path}: statistics of {key!r} are of {len(row)} numbers in {feature!r}, the "
                               f"{whose} has {expected}")  # fmt: skip


def _mask(found: Mapping[str, Any]) -> list[bool]:
    """Which entries are normalized; all, where nothing is said."""
    return [bool(value) for value in found.get("mask", [True] * len(found["q01"]))]


def _normalization(found: Mapping[str, Any], names: Mapping[str, tuple[str, ...]], bounds: Bounds) -> Normalization:
    entries: dict[str, Any] = {}
    for feature, theirs in (("action", "action"), ("state", "proprio")):
        if names[feature]:
            masked = zip(names[feature], _mask(found[theirs]), strict=True)
            entries |= {f"{feature}.{name}": "none" for name, is_normalized in masked if not is_normalized}
    return Normalization(
        state=bounds if names["state"] else "none", action=bounds, entries=entries, floor=FLOOR,
        clip={"action": 1.0} | ({"state": 1.0} if names["state"] else {}),
    )  # fmt: skip


def _ours(found: Mapping[str, Any], state: Sequence[str]) -> Statistics:
    features = {"action": "action"} | ({"state": "proprio"} if state else {})
    return {own: {key: found[theirs][key] for key in PUBLISHED_KEYS if key in found[theirs]}
            for own, theirs in features.items()}  # fmt: skip


def _alike(found: Mapping[str, Any], chosen: Mapping[str, Any], state: Sequence[str]) -> bool:
    """Whether a robot could act by these statistics as well: the same entries, normalized alike."""
    features = ("action", "proprio") if state else ("action",)
    return all(
        feature in found and len(found[feature].get("q01", ())) == len(chosen[feature]["q01"])
        and _mask(found[feature]) == _mask(chosen[feature]) for feature in features
    )  # fmt: skip


def _theirs(checkpoint: Checkpoint) -> dict[str, Any]:
    """The statistics that the checkpoint runs by, as an entry of ``norm_stats``."""
    normalizer, spec = checkpoint.normalizer, checkpoint.config.observation
    names = entry_names(spec, checkpoint.contract)
    features = {"action": "action"} | ({"state": "proprio"} if names["state"] else {})
    return {theirs: _feature(normalizer, own, names[own]) for own, theirs in features.items()}


def _feature(normalizer: Normalizer, feature: str, names: tuple[str, ...]) -> dict[str, Any]:
    modes = normalizer.modes.modes_of(feature, names)
    wrong = [name for name, mode in zip(names, modes, strict=True) if mode not in ("quantile", "min_max", "none")]
    if wrong or (feature == "action" and normalizer.plan_rows is not None):
        raise OpenVLAError(f"normalization of {feature} {wrong[0] if wrong else 'plans'}: OpenVLA's layout knows "
                           "quantile, min_max and none for entries of single actions")  # fmt: skip
    found = normalizer.statistics.get(feature, {})
    row = {key: list(found[key]) for key in PUBLISHED_KEYS if key in found}
    for key, ranged in (("q01", "min"), ("q99", "max")):  # the bounds that are in force, under the names that are read
        given = row.get(key) or row.get(ranged) or [0.0] * len(names)
        row[key] = [row[ranged][i] if mode == "min_max" else given[i] for i, mode in enumerate(modes)]
    return {**row, "mask": [mode != "none" for mode in modes]}


def _mixture(checkpoint: Checkpoint) -> dict[str, Any]:
    """The other datasets' statistics."""
    normalizer = checkpoint.normalizer
    names = entry_names(checkpoint.config.observation, checkpoint.contract)
    features = {"action": "action"} | ({"state": "proprio"} if names["state"] else {})
    return {
        key: {theirs: _feature(normalizer.with_statistics(found), own, names[own]) for own, theirs in features.items()}
        for key, found in checkpoint.dataset_statistics.items()
    }


def _config(model: OpenVLA, statistics: Mapping[str, Any]) -> dict[str, Any]:
    config = model.config
    text = {**config.text}
    rope = text.pop("rope_parameters")
    return {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla",
        "arch_specifier": ("fused-" if len(config.vision) == 2 else "no-align+") + "gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-224px" if len(config.vision) == 2 else "siglip-vit-so400m",
        "llm_backbone_id": "llama2-7b-pure", "hf_llm_id": "meta-llama/Llama-2-7b-hf", "llm_max_length": 2048,
        "image_resize_strategy": config.resize, "image_sizes": [backbone.image_size for backbone in config.vision],
        "timm_model_ids": [backbone.name for backbone in config.vision],
        "timm_override_act_layers": [None] * len(config.vision), "output_projector_states": False,
        "use_fused_vision_backbone": len(config.vision) == 2, "pad_token_id": text["pad_token_id"],
        "pad_to_multiple_of": config.padding, "n_action_bins": getattr(config.head, "bins", 256),
        "text_config": {"model_type": "llama", **text, "rope_theta": rope["rope_theta"], "torch_dtype": config.dtype},
        "torch_dtype": config.dtype, "norm_stats": statistics,
    }  # fmt: skip


def _preprocessor(model: OpenVLA) -> dict[str, Any]:
    backbones: tuple[BackboneConfig, ...] = model.config.vision
    return {
        "image_processor_type": "PrismaticImageProcessor", "processor_class": "PrismaticProcessor",
        "use_fused_vision_backbone": len(backbones) == 2, "image_resize_strategy": model.config.resize,
        "input_sizes": [[3, b.image_size, b.image_size] for b in backbones],
        "interpolations": ["bicubic"] * len(backbones),
        "means": [list(b.mean) for b in backbones], "stds": [list(b.std) for b in backbones],
    }  # fmt: skip


def _write_weights(folder: Path, model: OpenVLA, shard_bytes: int) -> None:
    """Shards of at most ``shard_bytes`` with an index; parts of OpenVLA-OFT beside them."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in COMPONENTS}
    shards: list[dict[str, int]] = [{}]
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in merged_weights(model):
        part, _, rest = name.partition(".")
        if part in parts:
            parts[part][rest] = tensor
            continue
        if shard and size + tensor.nbytes > shard_bytes:
            save_file(shard, folder / _shard(len(shards)), {"format": "pt"})
            shards.append({})
            shard, size = {}, 0
        shard[name], shards[-1][name] = tensor, tensor.nbytes
        size += tensor.nbytes
    save_file(shard, folder / _shard(len(shards)), {"format": "pt"})
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / _shard(number)).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    total = sum(sum(names.values()) for names in shards)
    _write(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, tensors in parts.items():
        if tensors:
            torch.save(tensors, folder / f"{name}--0_checkpoint.pt")


def _shard(number: int) -> str:
    return f"part-{number}.safetensors"


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")
