"""mini-VLA: one token a camera, one for the instruction, one for the state, fused, then a head.

Sizes follow the published mini-VLA (github.com/keivalya/mini-vla), about 302,000 parameters with
one camera, 39 state numbers and a horizon of 1.
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
from vla_core.model.action_head.base import ACTION_HEAD_REGISTRY, build_action_head, check_head
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.fusion.sensor_fusion import FusionMLP
from vla_core.model.inputs import ModelInputs
from vla_core.model.sensor.state_encoder import StateEncoderMLP
from vla_core.model.tokens import present
from vla_core.model.vla.base import MODEL_REGISTRY, PolicyModel
from vla_core.model.vlm.sentence_encoder import SentenceConfig as SentenceConfig  # registers it
from vla_core.model.vlm.text_encoder import TEXT_REGISTRY, TextTinyGRUConfig, build_text_encoder, text_tokenizer
from vla_core.model.vlm.vision_encoder import ImageEncoderTinyCNN, TinyCNNConfig


@dataclass(frozen=True, kw_only=True)
class MiniVLAConfig:
    """What :class:`MiniVLA` is built from; ``vision.d_model`` must equal ``d_model``."""

    type: Literal["mini_vla"] = "mini_vla"
    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int
    horizon: int
    vocab_size: int
    d_model: int = 128
    vision: TinyCNNConfig = field(default_factory=TinyCNNConfig)
    text: Annotated[Any, TEXT_REGISTRY] = field(default_factory=TextTinyGRUConfig)
    head: Annotated[Any, ACTION_HEAD_REGISTRY] = field(default_factory=DiffusionHeadConfig)

    def __post_init__(self) -> None:
        check_head(self.head)
        for name in ("state_dim", "action_dim", "horizon"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.vocab_size < 2:
            raise ConfigError(f"vocab_size: expected at least 2 (padding and unknown), found {self.vocab_size}")
        if len(set(self.cameras)) != len(self.cameras):
            raise ConfigError(f"cameras: expected distinct names, found {list(self.cameras)}")
        if self.vision.d_model != self.d_model:
            raise ConfigError(f"vision.d_model: expected d_model ({self.d_model}), found {self.vision.d_model}")


@dataclass(frozen=True, kw_only=True)
class MiniVLARecipe:
    """The free choices of :class:`MiniVLAConfig`; cameras, sizes and vocabulary follow from the dataset."""

    type: Literal["mini_vla"] = "mini_vla"
    horizon: int = 8
    d_model: int = 128
    vision: TinyCNNConfig = field(default_factory=TinyCNNConfig)
    text: Annotated[Any, TEXT_REGISTRY] = field(default_factory=TextTinyGRUConfig)
    head: Annotated[Any, ACTION_HEAD_REGISTRY] = field(default_factory=DiffusionHeadConfig)

    def __post_init__(self) -> None:
        check_head(self.head)
        if self.horizon < 1:
            raise ConfigError(f"horizon: expected at least 1, found {self.horizon}")
        if self.vision.d_model != self.d_model:
            raise ConfigError(f"vision.d_model: expected d_model ({self.d_model}), found {self.vision.d_model}")

    def config(self, cameras: tuple[str, ...], state_dim: int, action_dim: int, vocab_size: int) -> MiniVLAConfig:
        """The whole model configuration for a dataset."""
        return MiniVLAConfig(
            cameras=cameras, state_dim=state_dim, action_dim=action_dim, vocab_size=vocab_size,
            horizon=self.horizon, d_model=self.d_model, vision=self.vision, text=self.text, head=self.head,
        )  # fmt: skip


class MiniVLA(PolicyModel):
    """Observations to a chunk of normalized actions (B, horizon, action_dim)."""

    Config = MiniVLAConfig
    Recipe = MiniVLARecipe

    @staticmethod
    def tokenizer(recipe: MiniVLARecipe, texts: Iterable[str]) -> Any:
        """Return the text encoder's tokenizer, fitted to ``texts`` where it is one of words."""
        return text_tokenizer(recipe.text, texts)

    def __init__(self, config: MiniVLAConfig) -> None:
        super().__init__()
        self._config = config
        self.image_encoders = nn.ModuleList(ImageEncoderTinyCNN(config.vision) for _ in config.cameras)
        self.text_encoder = build_text_encoder(config.text, vocab_size=config.vocab_size, d_model=config.d_model)
        self.state_encoder = StateEncoderMLP(state_dim=config.state_dim, d_model=config.d_model)
        self.fusion = FusionMLP(num_tokens=len(config.cameras) + 2, d_model=config.d_model)
        self.head = build_action_head(
            config.head,
            horizon=config.horizon,
            action_dim=config.action_dim,
            context_dim=config.d_model,
        )

    @property
    def config(self) -> MiniVLAConfig:
        """What rebuilds this model, where there is no hub too: its text encoder tells what it has become."""
        return dataclasses.replace(self._config, text=self.text_encoder.config)

    def encode(self, inputs: ModelInputs) -> Tensor:
        """Return the context (B, d_model); raises :class:`VlaError` when a camera is not given."""
        self._check_cameras(inputs)
        text = self.text_encoder(inputs.tokens)
        state = self.state_encoder(inputs.state.to(self.fusion.absent.dtype))
        images = [
            encoder(inputs.images[name])
            for name, encoder in zip(self._config.cameras, self.image_encoders, strict=True)
        ]
        image_masks = [inputs.image_mask[name] for name in self._config.cameras]
        tokens = torch.stack([*images, text, state], dim=1)  # (B, cameras + 2, d_model)
        always = torch.ones_like(inputs.state_mask)
        mask = torch.stack([*image_masks, always, inputs.state_mask], dim=1)
        context: Tensor = self.fusion(tokens, mask)
        return context

    def loss(
        self,
        inputs: ModelInputs,
        actions: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the head's scalar loss for ``actions`` (B, H, A) where ``mask`` (B, H) is True."""
        return self.head.loss(present(self.encode(inputs)), actions, mask, generator)

    @torch.no_grad()
    def predict(
        self, inputs: ModelInputs, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        """Return the chunk (B, H, A) in normalized action units, continuing ``prefix`` where one is given."""
        return self.head.predict(present(self.encode(inputs)), generator, prefix)

    def _check_cameras(self, inputs: ModelInputs) -> None:
        missing = [name for name in self._config.cameras if name not in inputs.images or name not in inputs.image_mask]
        if missing:
            raise VlaError(
                f"model inputs lack the camera {missing[0]!r} or its mask; cameras given: {choices(inputs.images)}"
            )


MODEL_REGISTRY["mini_vla"] = MiniVLA
