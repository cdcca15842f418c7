"""The standard model: cameras and an instruction through a language model, whose features an action head reads.

Shapes: B batch, K cameras, Q tokens a camera, L words, N injected tokens, D width of the language model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.action_head import ACTION_HEAD_REGISTRY, FlowHeadConfig, build_action_head
from vla_core.model.action_head.base import check_head
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.checks import at_least_one
from vla_core.model.graph import in_graph
from vla_core.model.inputs import ModelInputs
from vla_core.model.sensor.state_encoder import StateConfig, StateEncoder
from vla_core.model.temporal.history import HistoryConfig, HistoryEncoder
from vla_core.model.tokens import Tokens, join, present
from vla_core.model.vla.base import MODEL_REGISTRY, PolicyModel
from vla_core.model.vlm import (
    ENCODER_REGISTRY,
    LANGUAGE_REGISTRY,
    PROJECTOR_REGISTRY,
    AttentionPoolingConfig,
    LoRAConfig,
    PrefixCache,
    PrefixTable,
    TinyCNNEncoderConfig,
    TinyGRUConfig,
    build_language,
    build_projector,
    build_tokenizer,
    build_vision_encoder,
)

PARTS = ("vision", "projector", "state", "memory", "language", "head")


@dataclass(frozen=True, kw_only=True)
class VLARecipe:
    """The free choices of :class:`VLAConfig`; cameras, sizes and vocabulary follow from the dataset.

    ``memory``          of past ticks' states, where the observation has a history
    ``readout_tokens``  learned tokens at the end of the sequence, which have seen all of it
    ``context``         what the action head reads: the features of those, or of the whole sequence
    ``frozen``          parts that are not trained
    """

    type: Literal["vla"] = "vla"
    horizon: int = 8
    vision: Annotated[Any, ENCODER_REGISTRY] = field(default_factory=TinyCNNEncoderConfig)
    projector: Annotated[Any, PROJECTOR_REGISTRY] = field(default_factory=AttentionPoolingConfig)
    language: Annotated[Any, LANGUAGE_REGISTRY] = field(default_factory=TinyGRUConfig)
    head: Annotated[Any, ACTION_HEAD_REGISTRY] = field(default_factory=FlowHeadConfig)
    memory: HistoryConfig = field(default_factory=HistoryConfig)
    readout_tokens: int = 4
    context: Literal["readout", "all"] = "readout"
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_head(self.head)
        at_least_one(self, "horizon", "readout_tokens")
        injected = getattr(self.language, "injected", "after_text")
        if self.context == "readout" and injected != "after_text":
            raise ConfigError(f"context: the readout stands last only with language.injected 'after_text', found "
                              f"{injected!r}; choices: all")  # fmt: skip

    def config(self, **sizes: Any) -> VLAConfig:
        """The whole model configuration for a dataset."""
        return VLAConfig(**_values(self), **sizes)


@dataclass(frozen=True, kw_only=True)
class VLAConfig(VLARecipe):
    """What :class:`VLAModel` is built from. Its sizes follow from the data: see ``model.vla.sizes``."""

    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int
    vocab_size: int
    history: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.cameras)) != len(self.cameras):
            raise ConfigError(f"cameras: expected distinct names, found {list(self.cameras)}")
        if not self.cameras and not self.state_dim:
            raise ConfigError("cameras: expected at least one where no state is seen; the observation has neither")
        if self.action_dim < 1 or self.state_dim < 0:
            raise ConfigError(f"action_dim: expected at least 1, and state_dim at least 0, found {self.action_dim} "
                              f"and {self.state_dim}")  # fmt: skip
        if self.vocab_size < 2:
            raise ConfigError(f"vocab_size: expected at least 2, found {self.vocab_size}")
        if not 1 <= self.history <= self.memory.max_len:
            raise ConfigError(f"memory.max_len: expected at least the observation's history of {self.history} ticks, "
                              f"found {self.memory.max_len}")  # fmt: skip
        if self.history > 1 and self.state_dim == 0:
            raise ConfigError("history: of past ticks the state is seen, but the observation has none")


class VLAModel(PolicyModel):
    """[instruction, cameras, state, memory, readout] through the language model, then the action head.

    The instruction stands first, so that a control loop computes its part once (``prefix_cache``), and training, too,
    where the language model is frozen (``prefix_table``). Elsewhere in training it is computed anew. A token that is
    missing is masked, whatever stands in it. Without cameras there is neither a vision encoder nor a projector.

    Of the past ticks the states are remembered. The actions between them are not part of an observation, and masked.
    """

    Config: type[Any] = VLAConfig
    Recipe: type[Any] = VLARecipe
    sees: tuple[str, ...] = ("images", "state", "instruction", "history")
    remembers = "state"
    parts: tuple[str, ...] = PARTS

    def __init__(self, config: VLAConfig) -> None:
        super().__init__()
        self._config = config
        self.language = build_language(config.language, vocab_size=config.vocab_size)
        width = self.width = int(self.language.input_dim)
        self.vision: Any = None
        self.projector: Any = None
        self.camera: Any = None
        if config.cameras:
            self.vision = build_vision_encoder(config.vision)
            self.projector = build_projector(config.projector, vision_dim=self.vision.output_dim, llm_dim=width)
            self.camera = nn.Parameter(0.02 * torch.randn(len(config.cameras), width))
        self.state = (
            StateEncoder(StateConfig(output_dim=width), input_dim=config.state_dim) if config.state_dim else None
        )
        self.memory = _Memory(config, width) if config.history > 1 else None
        self.readout = nn.Parameter(0.02 * torch.randn(config.readout_tokens, width))
        self.head = build_action_head(
            config.head, horizon=config.horizon, action_dim=config.action_dim, context_dim=self.language.output_dim
        )
        self.prefix_cache, self.prefix_table = PrefixCache(), PrefixTable()
        self._freeze_parts()

    @property
    def config(self) -> VLAConfig:
        """What rebuilds this model, where there is no hub too: its parts tell what they have become."""
        vision = self._config.vision if self.vision is None else self.vision.config
        return dataclasses.replace(self._config, vision=vision, language=self.language.config)

    @staticmethod
    def tokenizer(recipe: VLARecipe, texts: Iterable[str]) -> Any:
        """Return the language model's tokenizer, fitted to ``texts`` where it is one of words."""
        return build_tokenizer(recipe.language, texts)

    def encode(self, inputs: ModelInputs) -> Tokens:
        """Return the context (B, N, D) of the action head; raises :class:`VlaError` for what is not given."""
        return self.read(inputs, self.see(inputs))

    def read(self, inputs: ModelInputs, seen: list[Tokens]) -> Tokens:
        """Return what the language model makes of the instruction and of what was ``seen``: the head's context."""
        injected = join([*seen, present(self.ask(inputs, seen))])
        features: Tokens = self.language(inputs.tokens, injected, mask=inputs.token_mask, cache=self._cache(inputs))
        if self._config.context == "readout":
            features = Tokens(*(part[:, -self._config.readout_tokens :] for part in features))
        return features

    def _cache(self, inputs: ModelInputs) -> PrefixCache | PrefixTable | None:
        """Where the instructions' part comes from, if it needs not be computed."""
        if getattr(self._config.language, "injected", None) != "after_text" or in_graph():
            return None
        if not self.training:
            return self.prefix_cache
        # A missing instruction is no instruction that could be looked up.
        whole = inputs.token_mask is None or bool(inputs.token_mask[:, 0].all())
        return self.prefix_table if whole and self.language.repeats else None

    def ask(self, inputs: ModelInputs, seen: list[Tokens]) -> Tensor:
        """Return the readout tokens (B, R, D) that stand behind what was ``seen``."""
        return self.readout.expand(len(inputs.tokens), -1, -1)

    def see(self, inputs: ModelInputs) -> list[Tokens]:
        """Return what the language model reads beside the instruction, all of width D."""
        if self.vision is None:
            return self.own(inputs)
        images, mask = self.images(inputs)
        return [self.project(self.vision(images, mask), mask), *self.own(inputs)]

    def images(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return the pictures (B, K, 3, H, W) in the order of the configuration, and which are there (B, K)."""
        names = self._config.cameras
        missing = [name for name in names if name not in inputs.images or name not in inputs.image_mask]
        if missing:
            raise VlaError(
                f"model inputs lack the camera {missing[0]!r} or its mask; cameras given: {choices(inputs.images)}"
            )
        images = torch.stack([inputs.images[name] for name in names], dim=1)
        return images, torch.stack([inputs.image_mask[name] for name in names], dim=1)

    def project(self, seen: Tokens, mask: Tensor) -> Tokens:
        """Return (B, K Q, D) of vision tokens (B, K N, ...), each camera by itself and with its own embedding."""
        batch, cameras = mask.shape
        alone = Tokens(*(part.unflatten(1, (cameras, -1)).flatten(0, 1) for part in seen))  # (B K, N, ...)
        values, there = self.projector(alone)
        values = values.unflatten(0, (batch, cameras)) + self.camera[:, None]  # (B, K, Q, D)
        return Tokens(values.flatten(1, 2), there.unflatten(0, (batch, cameras)).flatten(1, 2))

    def own(self, inputs: ModelInputs) -> list[Tokens]:
        """Return the tokens of the robot's own state and of its memory, where it has them."""
        tokens = [] if self.state is None else [self.state(inputs.state, inputs.state_mask)]
        if self.memory is None:
            return tokens
        if inputs.history is None:
            raise VlaError(f"model inputs lack the history of {self._config.history - 1} past ticks")
        return [*tokens, self.memory(inputs)]

    def loss(
        self, inputs: ModelInputs, actions: Tensor, mask: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the head's scalar loss for ``actions`` (B, H, A) where ``mask`` (B, H) is True."""
        return self.head.loss(self.encode(inputs), actions, mask, generator)

    @torch.no_grad()
    def predict(
        self, inputs: ModelInputs, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        """Return the chunk (B, H, A), float32 in normalized action units, continuing ``prefix`` where one is given."""
        return self.head.predict(self.encode(inputs), generator, prefix)

    def forget(self) -> None:
        """Drop the keys and values that are kept of instructions."""
        self.prefix_cache.clear()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations of the vision encoder and the language model in the backward pass."""
        for part in (self.vision, self.language):
            if hasattr(part, "enable_gradient_checkpointing"):
                part.enable_gradient_checkpointing()

    def enable_lora(self, r: int = 16, alpha: float = 32.0) -> None:
        """Train adapters of rank ``r`` in place of the language model's weights, which may have been frozen."""
        if not hasattr(self.language, "enable_lora"):
            raise VlaError(f"LoRA: the language model {self.language.config.type!r} takes no adapters; choices: llm")
        self.language.enable_lora(LoRAConfig(r=r, alpha=alpha))
        kept = tuple(part for part in self._config.frozen if part != "language")
        self._config = dataclasses.replace(self._config, frozen=kept)

    def freeze(self, part: str) -> None:
        """Train nothing of ``part``, one of ``parts``; all but a language model stay in eval mode."""
        self._config = dataclasses.replace(self._config, frozen=tuple(dict.fromkeys((*self._config.frozen, part))))
        self._freeze_parts()

    def train(self, mode: bool = True) -> VLAModel:
        super().train(mode)
        for name in self._config.frozen:
            part = self.get_submodule(name)
            if not hasattr(part, "freeze"):  # one that has it knows: in eval mode no activation is recomputed
                part.eval()
        return self

    def _freeze_parts(self) -> None:
        for name in self._config.frozen:
            part = getattr(self, name, None) if name in self.parts else None
            if part is None:
                there = [other for other in self.parts if getattr(self, other, None) is not None]
                raise ConfigError(f"frozen: no part {name!r}; choices: {choices(there)}")
            if hasattr(part, "freeze"):
                part.freeze()
            else:
                part.requires_grad_(False)
                part.eval()


class _Memory(nn.Module):
    """The states of the past ticks and of this one to one token."""

    def __init__(self, config: VLAConfig, width: int) -> None:
        super().__init__()
        self.encoder = HistoryEncoder(config.memory, obs_dim=config.state_dim, action_dim=config.action_dim)
        self.encoder.action.requires_grad_(False)  # nothing reaches it
        self.out = nn.Linear(config.memory.context_dim, width)

    def forward(self, inputs: ModelInputs) -> Tokens:
        past = inputs.history
        assert past is not None, "VLAModel.own checks it"
        states = torch.cat([past.state, inputs.state[:, None]], dim=1)
        mask = torch.cat([past.state_mask, inputs.state_mask[:, None]], dim=1)
        actions = states.new_zeros(*past.state_mask.shape, self.encoder.action_dim)
        values, there = self.encoder(states, actions, mask, torch.zeros_like(past.state_mask))
        return Tokens(self.out(values), there)


def _values(recipe: Any) -> dict[str, Any]:
    return {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}


MODEL_REGISTRY["vla"] = VLAModel
