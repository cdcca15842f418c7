"""A folder in OpenVLA's published layout: what its files say, read strictly and without the code beside them.

``config.json`` (architecture and ``norm_stats``), ``model.safetensors`` or shards with an index, ``tokenizer.json``,
``dataset_statistics.json`` where it was fine-tuned; of OpenVLA-OFT also ``action_head--{step}_checkpoint.pt`` and
``proprio_projector--{step}_checkpoint.pt``. These are torch pickles: they are read here alone, with
``torch.load(weights_only=True)``, which runs nothing. A ``.safetensors`` of the same name goes first.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vla_core import hub
from vla_core.errors import VlaError, choices
from vla_core.model.vla.openvla import EMPTY, PROMPT
from vla_core.model.vla.openvla_decode import RegressionConfig
from vla_core.model.vla.openvla_vision import BACKBONES, BackboneConfig
from vla_core.model.vlm.pretrained import DTYPES
from vla_core.model.vlm.text_encoder import HubTokenizer

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
STATISTICS = "dataset_statistics.json"
COMPONENTS = ("action_head", "proprio_projector")
REFUSED = {"vision_backbone": "FiLM", "noisy_action_projector": "a diffusion head"}
PATTERNS = ("config.json", STATISTICS, "tokenizer*.json", "*.safetensors", INDEX,
            *(f"{name}--*" for name in (*COMPONENTS, *REFUSED)))  # fmt: skip
STORED = {"F32": "float32", "BF16": "bfloat16"}
# What a published config.json holds. Those of the second group change nothing here.
KEYS = {"model_type", "image_resize_strategy", "image_sizes", "n_action_bins", "norm_stats", "pad_to_multiple_of",
        "pad_token_id", "text_config", "timm_model_ids", "timm_override_act_layers",
        "use_fused_vision_backbone"}  # fmt: skip
SAYS_NOTHING = {"architectures", "auto_map", "arch_specifier", "dtype", "hf_llm_id", "llm_backbone_id",
                "llm_max_length", "output_projector_states", "torch_dtype", "transformers_version",
                "vision_backbone_id", "bos_token_id", "eos_token_id", "_name_or_path"}  # fmt: skip
# Llama's defaults in the transformers that the checkpoints were made with (4.40); a text_config names only the others.
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": None, "vocab_size": 32000, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
         "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "rope_theta": 10000.0,
         "rope_scaling": None}  # fmt: skip
# Neither of the architecture nor of the numbers that come out.
NO_MATTER = {"model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "architectures",
             "initializer_range", "use_cache", "pretraining_tp", "attention_dropout", "_attn_implementation",
             "_attn_implementation_autoset", "return_dict", "is_encoder_decoder"}  # fmt: skip


class OpenVLAError(VlaError):
    """A published checkpoint that does not hold what it must, or that holds what this package cannot run."""


@dataclass(frozen=True)
class PublishedFolder:
    """The folder and its ``config.json``."""

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, source: Path | str, revision: str | None = None) -> PublishedFolder:
        """Take a local folder or a hub name; raises :class:`OpenVLAError` for what cannot be an OpenVLA."""
        path = hub.foreign_folder(source, PATTERNS, revision)
        if not (path / "config.json").is_file():
            there = ", ".join(sorted(p.name for p in path.iterdir())) if path.is_dir() else "no such folder"
            raise OpenVLAError(f"{path}: no config.json of an OpenVLA; found: {there or 'nothing'}")
        config = _json(path / "config.json")
        if config.get("model_type") != "openvla":
            raise OpenVLAError(f"{path}/config.json: model_type {config.get('model_type')!r}, expected 'openvla'")
        unknown = sorted(set(config) - KEYS - SAYS_NOTHING)
        if unknown:
            raise OpenVLAError(f"{path}/config.json: unknown key {unknown[0]!r}, whose meaning cannot be kept; known: "
                               f"{choices(KEYS | SAYS_NOTHING)}")  # fmt: skip
        missing = sorted(KEYS - {"norm_stats", "timm_override_act_layers"} - set(config))
        if missing:
            raise OpenVLAError(f"{path}/config.json: {', '.join(missing)} missing")
        found = cls(path, config)
        for name, what in REFUSED.items():
            if found._files(name):
                raise OpenVLAError(f"{path}: {found._files(name)[0].name}: {what} is not supported; choices: words "
                                   "as actions, or the L1 regression head without FiLM")  # fmt: skip
        return found

    @property
    def regresses(self) -> bool:
        """Whether there is a regression head."""
        return bool(self._files("action_head"))

    @property
    def state_dim(self) -> int:
        """Numbers of the robot's own state that are read; 0 without a projector for them."""
        return self._component("proprio_projector")["fc1.weight"].shape[1] if self._files("proprio_projector") else 0

    def backbones(self) -> tuple[BackboneConfig, ...]:
        """The vision transformers that the timm names stand for."""
        ids, sizes = self.config["timm_model_ids"], self.config["image_sizes"]
        expected = 2 if self.config["use_fused_vision_backbone"] else 1
        if len(ids) != expected or len(sizes) != expected:
            raise OpenVLAError(f"{self.path}/config.json: {len(ids)} timm_model_ids and {len(sizes)} image_sizes, "
                               f"expected {expected} of each by use_fused_vision_backbone")  # fmt: skip
        if any(self.config.get("timm_override_act_layers") or ()):
            raise OpenVLAError(f"{self.path}/config.json: timm_override_act_layers: found "
                               f"{self.config['timm_override_act_layers']}, expected null for GELU")  # fmt: skip
        for name in ids:
            if name not in BACKBONES:
                raise OpenVLAError(f"{self.path}/config.json: timm_model_ids: no architecture known for {name!r}; "
                                   f"choices: {choices(BACKBONES)}")  # fmt: skip
        return tuple(dataclasses.replace(BACKBONES[name], image_size=size)
                     for name, size in zip(ids, sizes, strict=True))  # fmt: skip

    def text(self) -> dict[str, Any]:
        """The language model's architecture in the words of current transformers, defaults spelled out."""
        given: dict[str, Any] = self.config["text_config"]
        if given.get("model_type", "llama") != "llama":
            raise OpenVLAError(f"{self.path}/config.json: text_config.model_type {given['model_type']!r}; expected "
                               "'llama'")  # fmt: skip
        unknown = sorted(set(given) - set(LLAMA) - NO_MATTER - {"head_dim", "rope_parameters"})
        if unknown:
            raise OpenVLAError(f"{self.path}/config.json: text_config: unknown key {unknown[0]!r}; known: "
                               f"{choices(set(LLAMA) | NO_MATTER)}")  # fmt: skip
        values = {**LLAMA, **{key: value for key, value in given.items() if key not in NO_MATTER}}
        theta, scaling = values.pop("rope_theta"), values.pop("rope_scaling")
        if "rope_parameters" not in values:
            if scaling is not None:
                raise OpenVLAError(f"{self.path}/config.json: text_config.rope_scaling: found {scaling}, expected null")
            values["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
        return {**values, "pad_token_id": self.config["pad_token_id"]}

    def resolved(self, config: Any) -> Any:
        """The model's configuration with what this folder says of it, so that it rebuilds the model by itself."""
        head, bins = config.head, self.config["n_action_bins"]
        if self.regresses and not isinstance(head, RegressionConfig):
            raise OpenVLAError(f"{self.path}: has an action head ({self._files('action_head')[0].name}), but the "
                               f"recipe's is {head.type!r}; expected model.head.type l1_regression")  # fmt: skip
        if not isinstance(head, RegressionConfig):
            head = dataclasses.replace(head, bins=bins)
        return dataclasses.replace(
            config, pretrained=None, revision=None, vision=self.backbones(), text=self.text(), head=head,
            padding=self.config["pad_to_multiple_of"], resize=config.resize or self.config["image_resize_strategy"],
            dtype=self._stored() if config.dtype == "stored" else config.dtype,
        )  # fmt: skip

    def tokenizer(self) -> HubTokenizer:
        """The tokenizer with the published prompt."""
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise OpenVLAError(f"{self.path}: tokenizer.json missing; a tokenizer.model alone cannot be read: save it "
                               "once with transformers' fast tokenizer")  # fmt: skip
        tokenizer = HubTokenizer(file.read_text(encoding="utf-8"), pad_id=self.config["pad_token_id"], prompt=PROMPT,
                                 lower=True, last=EMPTY)  # fmt: skip
        start = self.text()["bos_token_id"]
        if tokenizer.vocab_size <= EMPTY or tokenizer.encode("move")[0] != start:
            raise OpenVLAError(f"{file}: is not Llama-2's: {tokenizer.vocab_size} ids, a text begins with "
                               f"{tokenizer.encode('move')[0]}; expected more than {EMPTY}, and {start}")  # fmt: skip
        return tokenizer

    def statistics(self) -> dict[str, Any]:
        """``norm_stats`` by dataset; those of ``dataset_statistics.json`` where it was fine-tuned."""
        file = self.path / STATISTICS
        found = _json(file) if file.is_file() else self.config.get("norm_stats")
        if not found:
            raise OpenVLAError(f"{self.path}: no statistics: neither {STATISTICS} nor norm_stats in config.json; "
                               "without them actions have no units")  # fmt: skip
        return dict(found)

    def weights(self, model: Any) -> dict[str, Tensor]:
        """All tensors of ``model``, in its type, read one after the other.

        A head or a projector that the folder does not have begins anew, with random weights: fine-tuning adds them.
        Raises :class:`OpenVLAError` for what is missing, too many or of another shape.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        dtype = DTYPES[model.config.dtype]
        found = dict(self._tensors(dtype))
        for name in COMPONENTS:
            module = getattr(model, name)
            if module is None and self._files(name):
                raise OpenVLAError(f"{self.path}: {self._files(name)[0].name}: the model has no such part; give it the "
                                   "state that it reads")  # fmt: skip
            if module is not None:
                own = self._component(name) if self._files(name) else _fresh(module).state_dict()
                found |= {f"{name}.{key}": value.to(dtype) for key, value in own.items()}
        check_fit(str(self.path), expected, {name: tuple(tensor.shape) for name, tensor in found.items()})
        return found

    def _tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        for file, names in self._shards().items():
            with _opened(file) as shard:
                there = set(shard.keys())
                for name in sorted(there if names is None else names):
                    if name not in there:
                        raise OpenVLAError(f"{file}: tensor {name} missing, which {INDEX} says is here")
                    yield name, shard.get_tensor(name).to(dtype)
                if names is not None and there - names:
                    raise OpenVLAError(f"{file}: unexpected tensor {min(there - names)}, which {INDEX} does not name")

    def _shards(self) -> dict[Path, set[str] | None]:
        """Files of weights, and the tensors that each must hold; None: whatever it holds."""
        if (self.path / INDEX).is_file():
            names: dict[Path, set[str]] = {}
            for name, file in _json(self.path / INDEX).get("weight_map", {}).items():
                names.setdefault(self.path / Path(file).name, set()).add(name)
            absent = [file.name for file in names if not file.is_file()]
            if absent or not names:
                raise OpenVLAError(f"{self.path}: {', '.join(absent) or 'weight_map of ' + INDEX} missing")
            return dict(names)
        if (self.path / WEIGHTS).is_file():
            return {self.path / WEIGHTS: None}
        pickles = sorted(p.name for p in self.path.glob("*.bin"))
        why = f"; {pickles[0]} is a pickle, which is not read" if pickles else ""
        raise OpenVLAError(f"{self.path}: neither {WEIGHTS} nor {INDEX}{why}; adapters alone must be merged first")

    def _stored(self) -> str:
        file, names = next(iter(self._shards().items()))
        with _opened(file) as shard:
            kind = shard.get_slice(min(names) if names else min(shard.keys())).get_dtype()
        if kind not in STORED:
            raise OpenVLAError(f"{file}: weights of type {kind}; set dtype, choices: {choices(DTYPES)}")
        return STORED[kind]

    def _files(self, name: str) -> list[Path]:
        return sorted(p for p in self.path.glob(f"{name}--*") if p.suffix in (".pt", ".safetensors"))

    def _component(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of ``COMPONENTS``, without the prefix that training in parallel leaves."""
        files = self._files(name)
        steps = sorted({file.stem for file in files})
        if len(steps) != 1:
            raise OpenVLAError(f"{self.path}: several files of {name}: {', '.join(steps)}; keep one")
        safe = [file for file in files if file.suffix == ".safetensors"]
        try:
            found = load_file(safe[0]) if safe else torch.load(files[0], map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever the bytes lead to
            raise OpenVLAError(f"{files[0]}: no weights: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise OpenVLAError(f"{files[0]}: expected tensors by name")
        return {name.removeprefix("module."): value for name, value in found.items()}


def check_fit(where: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise :class:`OpenVLAError` unless both name the same tensors with the same shapes."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    wrong = [f"{name} {found[name]} instead of {shape}" for name, shape in expected.items()
             if name in found and found[name] != shape]  # fmt: skip
    if missing or extra or wrong:
        raise OpenVLAError(f"{where}: weights do not fit config.json: missing {_few(missing)}; unexpected "
                           f"{_few(extra)}; of another shape {_few(wrong)}")  # fmt: skip


def _few(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def _fresh(module: torch.nn.Module) -> torch.nn.Module:
    """A part on the CPU with random weights, whose shape is known from one on the meta device."""
    made = module.to_empty(device="cpu")
    for part in made.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.LayerNorm):
            part.reset_parameters()
    return made


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise OpenVLAError(f"{file}: damaged: {error}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OpenVLAError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise OpenVLAError(f"{file}: expected a mapping, found {type(data).__name__}")
    return data
