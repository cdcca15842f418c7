"""Where a SmolVLA comes from: records and weights of vision-language models, and policies in LeRobot's layout."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vla_core import hub
from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.vla.smolvla_config import BACKBONES, SmolVLAConfig, SmolVLARecipe
from vla_core.model.vlm import pretrained
from vla_core.model.vlm.text_encoder import HubTokenizer

FAMILY = "smolvlm"
FILES = ("config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json",
         "policy_*_normalizer_processor.safetensors", "policy_*_unnormalizer_processor.safetensors",
         "statistics.json", "tokenizer.json", "contract.yaml", "train_config.json")  # fmt: skip
PREFIX = "model."  # of LeRobot's tensors
HEAD = "vlm_with_expert.vlm.lm_head.weight"
# Of the old layout: statistics among the weights.
STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.", "unnormalize_targets.", "normalize.",
              "unnormalize.", "input_normalizer.", "output_normalizer.", "normalalize_inputs.")  # fmt: skip

VISION_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
                 "patch_size", "hidden_act", "layer_norm_eps")  # fmt: skip
TEXT_FIELDS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings",
               "hidden_act", "attention_bias", "mlp_bias")  # fmt: skip

# What LeRobot's config.json may say, and what it must say where this package computes nothing else.
REFUSED: dict[str, Any] = {
    "adapt_to_pi_aloha": False, "use_delta_joint_actions_aloha": False, "add_image_special_tokens": False,
    "n_obs_steps": 1, "use_peft": False,
}  # fmt: skip
WITHOUT_EFFECT = (
    "type", "n_action_steps", "device", "use_amp", "push_to_hub", "repo_id", "private", "tags", "license",
    "pretrained_path", "empty_cameras", "use_cache", "freeze_vision_encoder", "train_expert_only", "train_state_proj",
    "optimizer_lr", "optimizer_betas", "optimizer_eps", "optimizer_weight_decay", "optimizer_grad_clip_norm",
    "scheduler_warmup_steps", "scheduler_decay_steps", "scheduler_decay_lr", "load_vlm_weights", "prefix_length",
    "pad_language_to", "rtc_config", "compile_model", "compile_mode", "use_quantization", "resize_imgs_with_padding",
)  # fmt: skip
READ = (
    "input_features", "output_features", "normalization_mapping", "chunk_size", "max_state_dim", "max_action_dim",
    "tokenizer_max_length", "num_steps", "num_vlm_layers", "num_expert_layers", "attention_mode",
    "self_attn_every_n_layers", "expert_width_multiplier", "min_period", "max_period", "vlm_model_name",
)  # fmt: skip


@dataclass(frozen=True)
class Repository:
    """A policy's folder, in LeRobot's layout or one of this package."""

    name: str
    folder: Path
    values: dict[str, Any]  # of config.json
    unknown: tuple[str, ...] = ()  # keys of it that may be there all the same

    @property
    def ours(self) -> bool:
        """Whether it is a checkpoint of this package."""
        return "format" in self.values

    @cached_property
    def structure(self) -> dict[str, Any]:
        """The fields of a recipe that the weights decide."""
        if self.ours:
            model = self.values["model"]
            if model.get("type") != "smolvla":
                raise VlaError(f"{self.name}: found a model of type {model.get('type')!r}, expected 'smolvla'")
            return {key: model[key] for key in (*STRUCTURE, "vlm")}
        return {**_structure(self.name, self.values, self.unknown), "vlm": self.values.get("vlm_model_name")}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All that ``model.safetensors`` holds."""
        try:
            return load_file(self.folder / "model.safetensors")
        except (SafetensorError, OSError) as error:
            raise VlaError(f"{self.folder}/model.safetensors: damaged: {error}") from None

    @property
    def weights(self) -> dict[str, Tensor]:
        """Of the model, by the names that it has here."""
        if self.ours:
            return self.tensors
        found = {}
        for name, tensor in self.tensors.items():
            if not name.startswith(STATISTICS):
                found[name.replace("_orig_mod.", "").removeprefix(PREFIX)] = tensor
        return found

    def load_into(self, model: nn.Module) -> None:
        """Copy all weights, as float32; raises :class:`VlaError` naming what is missing, unexpected or misshapen."""
        own, found = model.state_dict(), self.weights
        missing, extra = sorted(set(own) - set(found)), sorted(set(found) - set(own))
        wrong = [f"{name} {tuple(found[name].shape)} instead of {tuple(value.shape)}"
                 for name, value in own.items() if name in found and found[name].shape != value.shape]  # fmt: skip
        if missing or extra or wrong:
            raise VlaError(f"{self.name}: weights do not fit: missing {_few(missing)}, unexpected {_few(extra)}, of "
                           f"another shape {_few(wrong)}")  # fmt: skip
        model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in found.items()}, strict=True)


STRUCTURE = ("layers", "expert_layers", "expert_width", "attention", "self_attention_every", "image_size",
             "max_state_dim", "max_action_dim")  # fmt: skip


def open_repository(name: Path | str, revision: str | None = None, unknown: tuple[str, ...] = ()) -> Repository:
    """A local folder or a hub's repository; raises :class:`VlaError` where it is no SmolVLA.

    ``unknown`` are keys of LeRobot's config.json that this package does not know and that change nothing.
    """
    folder = hub.foreign_folder(name, FILES, revision)
    absent = [file for file in ("config.json", "model.safetensors") if not (folder / file).is_file()]
    if absent:
        there = choices(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise VlaError(f"{name}: no policy: {', '.join(absent)} missing; found: {there}")
    values = read_json(folder / "config.json")
    if "format" not in values and values.get("type", "smolvla") != "smolvla":
        raise VlaError(f"{name}: found a policy of type {values['type']!r}, expected 'smolvla'")
    return Repository(str(name), folder, values, unknown)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VlaError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise VlaError(f"{path}: found {type(values).__name__}, expected an object")
    return values


def backbone(recipe: SmolVLARecipe) -> str:
    """Hub name or folder of the vision-language model of a recipe; raises where it has none, random weights."""
    if recipe.vlm is not None:
        return recipe.vlm
    if recipe.pretrained is not None:
        repository = open_repository(recipe.pretrained)
        if repository.ours:
            return str(repository.folder)
        return str(repository.structure["vlm"] or BACKBONES[recipe.model_name].hub)
    if recipe.architecture:
        raise VlaError("tokenizer: a model of random weights has none; name one with model.vlm, or take the one that "
                       "is saved with the model")  # fmt: skip
    return BACKBONES[recipe.model_name].hub


def read_tokenizer(name: str) -> HubTokenizer:
    """The tokenizer of a vision-language model, or the one in a checkpoint; the prompt ends in a newline."""
    own = Path(name) / "tokenizer.json"
    if own.is_file() and (data := read_json(own)).get("type") == "hub":
        return HubTokenizer.from_dict(data)
    tokenizer = pretrained.read_tokenizer(name)
    if tokenizer.pad_token_id is None:
        raise VlaError(f"{name}: its tokenizer names no padding token")
    return HubTokenizer(tokenizer.backend_tokenizer.to_str(), pad_id=tokenizer.pad_token_id)


def resolve(
    config: SmolVLAConfig, repository: Repository | None = None
) -> tuple[SmolVLAConfig, Repository | None]:  # fmt: skip
    """The configuration with the record of the weights that it names, and those weights, in case ``repository``."""
    if config.pretrained is None:
        return config, None
    repository = repository or open_repository(config.pretrained)
    for key in STRUCTURE:
        if repository.structure[key] != getattr(config, key):
            raise ConfigError(f"model.{key}: found {getattr(config, key)!r}, but {repository.structure[key]!r} in "
                              f"{repository.name}, whose weights are asked for")  # fmt: skip
    return with_record(config, repository), repository


def with_record(config: SmolVLAConfig, repository: Repository) -> SmolVLAConfig:
    """``config`` with the record of the vision-language model of ``repository``, for weights that come from it."""
    name = config.vlm or repository.structure["vlm"]
    if repository.ours:
        known = repository.values["model"]["architecture"]
    else:
        known = BACKBONES[config.model_name].architecture if name is None else architecture(_read_record(name))
    return dataclasses.replace(
        config, pretrained=None, vlm=name, architecture=known, language_head=HEAD in repository.weights
    )  # fmt: skip


def record(config: SmolVLAConfig) -> Any:
    """The transformers record of the vision-language model, with as many layers as are used."""
    if not config.architecture and config.vlm is not None:
        found = _read_record(config.vlm)
    else:
        known, own = BACKBONES[config.model_name].architecture, config.architecture
        merged = {key: {**value, **own.get(key, {})} if isinstance(value, dict) else own.get(key, value)
                  for key, value in known.items()}  # fmt: skip
        unknown = sorted(set(own) - set(known))
        if unknown:
            raise ConfigError(f"architecture.{unknown[0]}: unknown key; choices: {choices(known)}")
        found = pretrained.record_of({"model_type": FAMILY, **merged}, (FAMILY,))
    text, vision = found.text_config, found.vision_config
    for name, value, expected in (("text_config.model_type", text.model_type, "llama"),
                                  ("text_config.hidden_act", text.hidden_act, "silu"),
                                  ("vision_config.hidden_act", vision.hidden_act, "gelu_pytorch_tanh")):  # fmt: skip
        if value != expected:
            raise VlaError(f"architecture.{name}: found {value!r}, expected {expected!r}")
    if config.layers > text.num_hidden_layers:
        raise VlaError(f"layers: found {config.layers}, the language model has {text.num_hidden_layers}")
    side, scale = config.image_size // vision.patch_size, found.scale_factor
    if config.image_size != vision.image_size or side % scale:
        raise VlaError(f"image_size: found {config.image_size}, the vision encoder takes {vision.image_size} pixels "
                       f"in patches of {vision.patch_size}, {scale}x{scale} to a token")  # fmt: skip
    text.num_hidden_layers = config.layers
    return found


def architecture(found: Any) -> dict[str, Any]:
    """The plain data of a record that :func:`record` reads back."""
    return {
        "vision_config": {key: getattr(found.vision_config, key) for key in VISION_FIELDS},
        "text_config": {key: getattr(found.text_config, key) for key in TEXT_FIELDS},
        "scale_factor": found.scale_factor,
    }


def vision_language_model(config: SmolVLAConfig, found: Any) -> nn.Module:
    """Vision encoder, connector and language model: with the publisher's weights where none others are to come."""
    auto = pretrained.library("transformers").AutoModel
    kind = auto._model_mapping[type(found)]
    if config.architecture:
        random: nn.Module = pretrained.random_model(kind, found, torch.float32)
        return random
    name = config.vlm or BACKBONES[config.model_name].hub
    loaded: nn.Module = pretrained.load_model(auto, name, found, torch.float32)
    return loaded


def _read_record(name: str) -> Any:
    found = pretrained.read_record(name)
    pretrained.check_family(found, (FAMILY,), name)
    return found


def _structure(name: str, values: dict[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """LeRobot's words for the fields of a recipe; what is not said there is LeRobot's default."""
    for key, expected in REFUSED.items():
        if values.get(key, expected) != expected:
            raise VlaError(f"{name}: config.json has {key} {values[key]!r}, expected {expected!r}: nothing else is "
                           "computed here")  # fmt: skip
    unknown = sorted(set(values) - set(REFUSED) - set(WITHOUT_EFFECT) - set(READ) - set(known))
    if unknown:
        raise VlaError(f"{name}: config.json has unknown keys {', '.join(unknown)}; if they change nothing: --ignore "
                       f"{' '.join(unknown)}")  # fmt: skip
    size = values.get("resize_imgs_with_padding", [512, 512])
    if not size or size[0] != size[1]:
        raise VlaError(f"{name}: config.json has resize_imgs_with_padding {size}, expected a square")
    expert_layers = values.get("num_expert_layers", -1)
    return {
        "layers": values.get("num_vlm_layers", 16),
        "expert_layers": expert_layers if expert_layers > 0 else None,
        "expert_width": values.get("expert_width_multiplier", 0.75),
        "attention": "cross" if "cross" in values.get("attention_mode", "cross_attn") else "self",
        "self_attention_every": max(0, values.get("self_attn_every_n_layers", 2)),
        "image_size": size[0],
        "max_state_dim": values.get("max_state_dim", 32),
        "max_action_dim": values.get("max_action_dim", 32),
    }


def _few(names: list[str], most: int = 4) -> str:
    return (", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")) or "none"
