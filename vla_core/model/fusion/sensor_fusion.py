"""The tokens of several modalities to tokens in which each knows of the others; any of them may be absent.

Shapes: B batch, N tokens of all modalities, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.attention import AttentionBlock
from vla_core.model.checks import at_least_one
from vla_core.model.fusion.film import FiLM
from vla_core.model.tokens import Tokens, join, masked_mean


class FusionMLP(nn.Module):
    """Concatenate the tokens and mix them: (B, num_tokens, d_model) -> (B, d_model).

    An absent token is replaced by an embedding that is learned for its place, so that what stood
    in it cannot matter and absence is something the model was trained with.
    """

    def __init__(self, *, num_tokens: int, d_model: int) -> None:
        super().__init__()
        self.absent = nn.Parameter(torch.zeros(num_tokens, d_model))
        self.net = nn.Sequential(
            nn.Linear(num_tokens * d_model, d_model),
            nn.ReLU(),
            nn.Linear(d_model, d_model),
            nn.LayerNorm(d_model),
        )

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """``mask`` (B, num_tokens) bool is True where a token is present."""
        tokens = torch.where(mask[..., None], tokens, self.absent)
        out: Tensor = self.net(tokens.flatten(1))
        return out


class Fusion(nn.Module):
    """Tokens by modality to one :class:`~vla_core.model.tokens.Tokens` of the same width.

    What stands at absent tokens has no influence; a modality of which nothing is there gives nothing and gets nothing.
    """

    def __init__(self, config: Any, *, modalities: Sequence[str], d_model: int) -> None:
        super().__init__()
        if not modalities or len(set(modalities)) != len(modalities):
            raise VlaError(f"a fusion of the modalities {list(modalities)}; expected distinct names, at least one")
        self.config = config
        self.modalities = tuple(modalities)
        self.output_dim = d_model

    @abstractmethod
    def forward(self, parts: Mapping[str, Tokens]) -> Tokens:
        """``parts`` has every modality; one that the robot lacks has a mask of False, or no tokens."""

    def ordered(self, parts: Mapping[str, Tokens]) -> list[Tokens]:
        """The parts in the order of ``modalities``, with 0 at absent tokens."""
        if set(parts) != set(self.modalities):
            raise VlaError(f"tokens of {choices(parts)}; this fusion was made for {choices(self.modalities)}")
        return [clean(parts[name]) for name in self.modalities]


FUSION_REGISTRY: dict[str, type[Any]] = {}


def build_fusion(config: Any, *, modalities: Sequence[str], d_model: int) -> Fusion:
    """Build the fusion that is registered under ``config.type``."""
    if config.type not in FUSION_REGISTRY:
        raise VlaError(f"no fusion {config.type!r} registered; choices: {choices(FUSION_REGISTRY)}")
    fusion: Fusion = FUSION_REGISTRY[config.type](config, modalities=modalities, d_model=d_model)
    return fusion


def clean(tokens: Tokens) -> Tokens:
    """The same tokens with 0 at absent ones."""
    return Tokens(torch.where(tokens.mask[..., None], tokens.values, 0.0), tokens.mask)


@dataclass(frozen=True, kw_only=True)
class PooledFusionConfig:
    """Of :class:`PooledFusion`, which has no sizes of its own."""

    type: Literal["mlp"] = "mlp"


class PooledFusion(Fusion):
    """The mean token of each modality through :class:`FusionMLP`: one token (B, 1, D)."""

    Config = PooledFusionConfig

    def __init__(self, config: PooledFusionConfig, *, modalities: Sequence[str], d_model: int) -> None:
        super().__init__(config, modalities=modalities, d_model=d_model)
        self.mlp = FusionMLP(num_tokens=len(modalities), d_model=d_model)

    def forward(self, parts: Mapping[str, Tokens]) -> Tokens:
        ordered = self.ordered(parts)
        means = torch.stack([masked_mean(part) for part in ordered], dim=1)  # (B, modalities, D)
        mask = torch.stack([part.mask.any(dim=1) for part in ordered], dim=1)
        return Tokens(self.mlp(means, mask)[:, None], mask.any(dim=1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class CrossModalConfig:
    """Sizes of :class:`CrossModalFusion`."""

    type: Literal["cross_modal"] = "cross_modal"
    layers: int = 2
    heads: int = 8

    def __post_init__(self) -> None:
        at_least_one(self, "layers", "heads")


class CrossModalFusion(Fusion):
    """Each modality attends to all others, ``layers`` times; all tokens in the order of the modalities.

    The weights are shared; an embedding tells them which modality a token is of. A modality that is alone attends to
    nothing, and passes through the layers' MLPs only.
    """

    Config = CrossModalConfig

    def __init__(self, config: CrossModalConfig, *, modalities: Sequence[str], d_model: int) -> None:
        super().__init__(config, modalities=modalities, d_model=d_model)
        if d_model % config.heads:
            raise ConfigError(f"heads: expected a divisor of the width {d_model}, found {config.heads}")
        self.modality = nn.Parameter(0.02 * torch.randn(len(modalities), d_model))
        self.blocks = nn.ModuleList(AttentionBlock(width=d_model, heads=config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, parts: Mapping[str, Tokens]) -> Tokens:
        ordered = self.ordered(parts)
        values, mask = join(ordered)
        owner = torch.cat(
            [part.mask.new_full(part.mask.shape[1:], i, dtype=torch.int64) for i, part in enumerate(ordered)]
        )
        allowed = ((owner[:, None] != owner) & mask[:, None])[:, None]  # (B, 1, N, N)
        x = values + self.modality[owner]
        for block in cast("list[AttentionBlock]", self.blocks):
            x = block(x, *block.remember(x), allowed)
        return clean(Tokens(self.norm(x), mask))


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig:
    """Sizes of :class:`HierarchicalFusion`; ``scene`` are the modalities of its first stage."""

    type: Literal["hierarchical"] = "hierarchical"
    scene: tuple[str, ...] = ("lidar", "radar")
    layers: int = 1
    heads: int = 8

    def __post_init__(self) -> None:
        at_least_one(self, "layers", "heads")
        if not self.scene:
            raise ConfigError("scene: expected at least one modality, found none")


class HierarchicalFusion(Fusion):
    """Stage 1: what measures space, LiDAR and radar, to a scene. Stage 2: the scene and all others, as vision.

    Both stages are a :class:`CrossModalFusion`. The tokens of the scene come first.
    """

    Config = HierarchicalConfig

    def __init__(self, config: HierarchicalConfig, *, modalities: Sequence[str], d_model: int) -> None:
        super().__init__(config, modalities=modalities, d_model=d_model)
        self.others = tuple(name for name in modalities if name not in config.scene)
        missing = [name for name in config.scene if name not in modalities]
        if missing or not self.others or "scene" in modalities:
            raise ConfigError(f"scene: expected some but not all of {choices(modalities)}, none of them named 'scene'; "
                              f"found {choices(config.scene)}")  # fmt: skip
        stage = CrossModalConfig(layers=config.layers, heads=config.heads)
        self.space = CrossModalFusion(stage, modalities=config.scene, d_model=d_model)
        self.whole = CrossModalFusion(stage, modalities=("scene", *self.others), d_model=d_model)

    def forward(self, parts: Mapping[str, Tokens]) -> Tokens:
        by_name = dict(zip(self.modalities, self.ordered(parts), strict=True))
        scene = self.space({name: by_name[name] for name in self.config.scene})
        whole: Tokens = self.whole({"scene": scene, **{name: by_name[name] for name in self.others}})
        return whole


@dataclass(frozen=True, kw_only=True)
class FiLMFusionConfig:
    """Of :class:`FiLMFusion`: the modality that modulates the others, such as the instruction or the state."""

    type: Literal["film"] = "film"
    condition: str


class FiLMFusion(Fusion):
    """One modality's mean token scales and shifts the tokens of all others; absent, it leaves them as they are."""

    Config = FiLMFusionConfig

    def __init__(self, config: FiLMFusionConfig, *, modalities: Sequence[str], d_model: int) -> None:
        super().__init__(config, modalities=modalities, d_model=d_model)
        if config.condition not in modalities or len(modalities) < 2:
            raise ConfigError(f"condition: expected one of several modalities {choices(modalities)}, "
                              f"found {config.condition!r}")  # fmt: skip
        self.film = FiLM(feature_dim=d_model, condition_dim=d_model)

    def forward(self, parts: Mapping[str, Tokens]) -> Tokens:
        by_name = dict(zip(self.modalities, self.ordered(parts), strict=True))
        condition = by_name.pop(self.config.condition)
        values, mask = join(list(by_name.values()))
        known = condition.mask.any(dim=1)[:, None, None]
        modulated = torch.where(known, self.film(values, masked_mean(condition)), values)
        return clean(Tokens(modulated, mask))


FUSION_REGISTRY.update(
    mlp=PooledFusion, cross_modal=CrossModalFusion, hierarchical=HierarchicalFusion, film=FiLMFusion
)  # fmt: skip
