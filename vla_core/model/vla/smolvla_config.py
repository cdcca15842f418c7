"""What a SmolVLA is built from (Shukor et al. 2025, "SmolVLA"; LeRobot's policy `smolvla`).

The language model is the first layers of a SmolVLM2; the action expert stands beside it, layer by layer.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from vla_core.config import ConfigError
from vla_core.errors import choices
from vla_core.model.checks import at_least_one
from vla_core.model.vlm.lora import LoRAConfig


def _smolvlm2(hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    """The record of a SmolVLM2 with SigLIP-base at 512 pixels, as its publisher gives it."""
    return {
        "vision_config": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 512, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        },
        "text_config": {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 64, "vocab_size": 49280,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
        },
        "scale_factor": 4,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Published:
    """Where a vision-language model is, and its record."""

    hub: str
    architecture: dict[str, Any]


BACKBONES = {
    "smolvlm2-500m": Published(
        hub="HuggingFaceTB/SmolVLM2-500M-Video-Instruct", architecture=_smolvlm2(960, 2560, 32, 15, 5)
    ),
    "smolvlm2-256m": Published(
        hub="HuggingFaceTB/SmolVLM2-256M-Video-Instruct", architecture=_smolvlm2(576, 1536, 30, 9, 3)
    ),
}


@dataclass(frozen=True, kw_only=True)
class FlowSampling:
    """The expert as an action head: the number of Euler steps, and the periods of the time embedding."""

    type: Literal["flow"] = "flow"
    inference_steps: int = 10
    min_period: float = 4e-3
    max_period: float = 4.0

    def __post_init__(self) -> None:
        at_least_one(self, "inference_steps")
        if not 0 < self.min_period < self.max_period:
            raise ConfigError(f"min_period: expected a positive number below max_period ({self.max_period}), found "
                              f"{self.min_period}")  # fmt: skip

    @property
    def guidable(self) -> bool:
        """Whether a chunk can be sampled so that it continues another one."""
        return True


@dataclass(frozen=True, kw_only=True)
class SmolVLARecipe:
    """The free choices of :class:`SmolVLAConfig`; cameras, sizes and vocabulary follow from the dataset.

    Where it comes from
        ``pretrained``    a policy's weights: hub name or local folder, in LeRobot's layout or a checkpoint of this
                          package. The structure below must be its own
        ``model_name``    one of ``BACKBONES``
        ``vlm``           hub name or local folder of the vision-language model: the tokenizer, and the weights where
                          ``pretrained`` is null; null: what ``pretrained`` says, else that of ``model_name``
        ``architecture``  fields of the vision-language model's record that differ from ``model_name``'s; with them
                          the weights are random
    Structure
        ``layers``                 of the language model, counted from the first
        ``expert_layers``          a divisor of ``layers``; null: as many
        ``expert_width``           of the expert, as a share of the language model's
        ``attention``              of the expert: ``cross`` to the prefix, or ``self`` attention everywhere
        ``self_attention_every``   every so many-th layer of a ``cross`` expert attends to itself too
        ``image_size``             pixels: pictures are resized with padding to this square
        ``max_tokens``             of an instruction
        ``max_state_dim``, ``max_action_dim``   what state and actions are padded to
        ``image_keys``             what LeRobot calls each camera; empty: ``observation.images.<camera>``
    Training
        ``trained``        ``expert``, with the projections of state and actions; ``all``; or ``lora``: adapters in the
                           language model and the expert, and the projections
        ``freeze_vision``  of ``all``
    """

    type: Literal["smolvla"] = "smolvla"
    horizon: int = 50
    head: FlowSampling = field(default_factory=FlowSampling)
    pretrained: str | None = None
    model_name: Literal["smolvlm2-500m", "smolvlm2-256m"] = "smolvlm2-500m"
    vlm: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    layers: int = 16
    expert_layers: int | None = None
    expert_width: float = 0.75
    attention: Literal["cross", "self"] = "cross"
    self_attention_every: int = 2
    image_size: int = 512
    max_tokens: int = 48
    max_state_dim: int = 32
    max_action_dim: int = 32
    image_keys: tuple[str, ...] = ()
    trained: Literal["expert", "all", "lora"] = "expert"
    freeze_vision: bool = True
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        at_least_one(self, "horizon", "layers", "image_size", "max_tokens", "max_state_dim", "max_action_dim")
        if self.model_name not in BACKBONES:
            raise ConfigError(f"model_name: found {self.model_name!r}, expected one of {choices(BACKBONES)}")
        if not 0 < self.expert_width <= 1:
            raise ConfigError(f"expert_width: expected more than 0 and at most 1, found {self.expert_width}")
        if self.self_attention_every < 0:
            raise ConfigError(f"self_attention_every: expected at least 0 (never), found {self.self_attention_every}")
        if self.expert_layers is not None and (self.expert_layers < 1 or self.layers % self.expert_layers):
            raise ConfigError(f"expert_layers: expected null or a divisor of layers ({self.layers}), found "
                              f"{self.expert_layers}")  # fmt: skip
        every, stride = self.self_attention_every, self.layers // (self.expert_layers or self.layers)
        if self.attention == "cross" and every > 0 and math.gcd(stride, every) > 1:
            raise ConfigError(f"expert_layers: found {self.expert_layers} for {self.layers} layers: LeRobot does not "
                              f"run those with self_attention_every {every}; set expert_layers to null")  # fmt: skip
        if self.architecture and self.pretrained is not None:
            raise ConfigError("architecture: comes with the pretrained weights; set pretrained to null to change it")

    def config(self, cameras: tuple[str, ...], state_dim: int, action_dim: int, vocab_size: int) -> SmolVLAConfig:
        """The whole model configuration for a dataset."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(SmolVLARecipe)}
        return SmolVLAConfig(**own, cameras=cameras, state_dim=state_dim, action_dim=action_dim, vocab_size=vocab_size)


@dataclass(frozen=True, kw_only=True)
class SmolVLAConfig(SmolVLARecipe):
    """What a :class:`SmolVLA` is built from.

    ``cameras``        in the order in which the policy sees them
    ``language_head``  whether the published weights have an output layer of the language model, which is kept
    """

    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int
    vocab_size: int
    language_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise ConfigError(f"cameras: expected at least one, with distinct names, found {list(self.cameras)}")
        if self.image_keys and len(self.image_keys) != len(self.cameras):
            raise ConfigError(f"image_keys: found {len(self.image_keys)} for {len(self.cameras)} cameras")
        for name, most in (("state_dim", self.max_state_dim), ("action_dim", self.max_action_dim)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name}: expected 1 to max_{name} ({most}), found {getattr(self, name)}")
        if self.vocab_size < 2:
            raise ConfigError(f"vocab_size: expected at least 2, found {self.vocab_size}")
