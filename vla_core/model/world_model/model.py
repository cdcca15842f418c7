"""A world model: what will be seen and what it will be worth, for actions that nobody has executed yet.

Shapes: B rows, T ticks, H imagined steps, A action, F features of a state.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.checks import at_least_one
from vla_core.model.inputs import ModelInputs
from vla_core.model.sensor.base import SENSOR_REGISTRY
from vla_core.model.vlm.vision_encoder import ENCODER_REGISTRY, TinyCNNEncoderConfig
from vla_core.model.world_model.decoding import ImageDecoder, TwoHotHead, norm_mlp
from vla_core.model.world_model.distributions import KLBalance, TwoHotConfig, balanced_kl
from vla_core.model.world_model.embedding import ObservationEncoder
from vla_core.model.world_model.rssm import RSSM, Observed, RSSMConfig, State


class WorldBatch(NamedTuple):
    """B sequences of T consecutive ticks.

    ``inputs``      what was seen at each tick, (B, T, ...) in place of (B, ...)
    ``previous``    (B, T, A) normalized, the action that led to the tick; of no account where ``first``
    ``rewards``     (B, T) float32, what arriving at the tick was worth
    ``continues``   (B, T) float32, 0 where the tick ends its episode for good, else 1
    ``first``       (B, T) bool, ticks that begin an episode, or a sequence of which nothing before is known
    ``mask``        (B, T) bool, False at padding
    """

    inputs: ModelInputs
    previous: Tensor
    rewards: Tensor
    continues: Tensor
    first: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> WorldBatch:
        """The same batch on ``device``."""
        return WorldBatch(self.inputs.to(device), *(tensor.to(device) for tensor in self[1:]))


class Decoded(NamedTuple):
    """Pictures (..., 3, H, W) in [0, 1] by camera, and the normalized state (..., S)."""

    images: dict[str, Tensor]
    state: Tensor


@dataclass(frozen=True, kw_only=True)
class WorldModelRecipe:
    """The free choices of :class:`WorldModelConfig`.

    ``vision``      the encoder of each camera; ``pooling`` of its tokens: ``flatten`` keeps where each one was seen
    ``sensors``     an encoder for each cloud, sequence or map that is seen, by the stream's name
    ``embed``       width of an observation's embedding
    ``hidden``      width of the ``layers`` layers of the heads and of the state's decoder
    ``channels``    of the pictures' decoder, from the smallest map on; each layer doubles it
    ``image_scale``, ``state_scale``   weights of the squared errors, which are summed over pixels and entries
    """

    type: Literal["rssm"] = "rssm"
    rssm: RSSMConfig = field(default_factory=RSSMConfig)
    vision: Annotated[Any, ENCODER_REGISTRY] = field(
        default_factory=lambda: TinyCNNEncoderConfig(output_dim=32, channels=(16, 32, 64))
    )
    pooling: Literal["flatten", "mean"] = "flatten"
    sensors: dict[str, Annotated[Any, SENSOR_REGISTRY]] = field(default_factory=dict)
    embed: int = 256
    hidden: int = 256
    layers: int = 2
    channels: tuple[int, ...] = (64, 32, 16)
    reward: TwoHotConfig = field(default_factory=TwoHotConfig)
    kl: KLBalance = field(default_factory=KLBalance)
    image_scale: float = 1.0
    state_scale: float = 1.0

    def __post_init__(self) -> None:
        at_least_one(self, "embed", "hidden", "layers", "channels")
        for name in ("image_scale", "state_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: expected a number from 0 on, found {getattr(self, name)}")

    def config(self, **sizes: Any) -> WorldModelConfig:
        """The whole configuration, with what follows from observation and contract."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(WorldModelRecipe)}
        return WorldModelConfig(**values, **sizes)


@dataclass(frozen=True, kw_only=True)
class WorldModelConfig(WorldModelRecipe):
    """What :class:`WorldModel` is built from.

    ``clouds``, ``sequences``: the columns by stream; ``maps``: their streams (``model.vla.sizes.model_sizes``).
    """

    cameras: tuple[str, ...] = ()
    state_dim: int
    action_dim: int
    clouds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sequences: dict[str, tuple[str, ...]] = field(default_factory=dict)
    maps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action_dim < 1 or self.state_dim < 0:
            raise ConfigError(f"action_dim, state_dim: expected at least 1 and 0, found {self.action_dim} and "
                              f"{self.state_dim}")  # fmt: skip
        streams = {*self.clouds, *self.sequences, *self.maps}
        if set(self.sensors) != streams:
            raise ConfigError(f"sensors: encoders for {choices(self.sensors)}, but the observation has "
                              f"{choices(streams)}; give one for each")  # fmt: skip
        if not self.cameras and not self.state_dim and not streams:
            raise ConfigError("observation: there is nothing to see; expected a camera, a state or another sensor")
        cell = 2 ** len(self.channels)
        if self.cameras and any(side % cell for side in self.vision.size):
            raise ConfigError(f"channels: {len(self.channels)} layers need pictures whose sides are multiples of "
                              f"{cell}, vision.image_size is {list(self.vision.size)}")  # fmt: skip

    def columns(self, name: str) -> int:
        """Numbers in a row of the stream's data."""
        return len(self.clouds.get(name) or self.sequences.get(name) or ("value", "known"))


class WorldModel(nn.Module):
    """An RSSM between encoders and decoders, with heads for reward and continuation."""

    Config = WorldModelConfig
    Recipe = WorldModelRecipe
    sees: tuple[str, ...] = ("images", "state", "clouds", "sequences", "maps")

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ObservationEncoder(config)
        self.rssm = RSSM(config.rssm, action_dim=config.action_dim, embed_dim=config.embed)
        width = self.rssm.feature_dim
        self.feature_dim = width
        self.images = nn.ModuleDict(
            {name.replace(".", "__"): ImageDecoder(width, config.channels, config.vision.size)
             for name in config.cameras}
        )  # fmt: skip
        self.state = norm_mlp(width, config.hidden, config.layers, config.state_dim) if config.state_dim else None
        self.reward = TwoHotHead(width, config.hidden, config.layers, config.reward)
        self.continuation = norm_mlp(width, config.hidden, config.layers, 1)

    # -- what others use -------------------------------------------------------------------------------------------

    def initial(self, batch: int) -> State:
        """States (B, ...) before anything was seen."""
        return self.rssm.initial(batch)

    def embed(self, inputs: ModelInputs) -> Tensor:
        """Embeddings (B, T, E) of what was seen; (B, E) without ticks."""
        return self.encoder(inputs)

    def observe(self, inputs: ModelInputs, previous: Tensor, first: Tensor, state: State | None = None, *,
                sample: bool = True, generator: torch.Generator | None = None) -> Observed:  # fmt: skip
        """Posterior states (B, T, ...) and the prior's parameters, as :meth:`RSSM.observe` says."""
        return self.rssm.observe(self.embed(inputs), previous, first, state, sample=sample, generator=generator)

    def encode(self, inputs: ModelInputs, previous: Tensor | None = None, state: State | None = None, *,
               sample: bool = False, generator: torch.Generator | None = None) -> State:  # fmt: skip
        """The state (B, ...) after seeing one observation (B, ...), the action ``previous`` (B, A) having led to it.

        Without ``previous`` an episode begins.
        """
        batch = len(inputs.state_mask)
        first = torch.full((batch,), previous is None, device=inputs.state_mask.device)
        if previous is None:
            previous = torch.zeros(batch, self.config.action_dim, device=first.device)
        state = self.initial(batch) if state is None else state
        return self.rssm.update(state, previous, self.embed(inputs), first, sample=sample, generator=generator).states

    def imagine(self, state: State, actions: Tensor, *, sample: bool = True,
                generator: torch.Generator | None = None) -> State:  # fmt: skip
        """Expected states (B, H, ...) after each of normalized ``actions`` (B, H, A)."""
        return self.rssm.imagine(state, actions, sample=sample, generator=generator)

    def predict_rewards(self, state: State) -> Tensor:
        """What arriving at each state is worth (...), in the reward's own units."""
        return self.reward(state.features)

    def predict_continues(self, state: State) -> Tensor:
        """Probability (...) that the episode goes on after each state."""
        return torch.sigmoid(self.continuation(state.features)[..., 0])

    def decode(self, state: State) -> Decoded:
        """What would be seen in each state."""
        features = state.features
        images = {name: self.images[name.replace(".", "__")](features) for name in self.config.cameras}
        numbers = features.new_zeros(*features.shape[:-1], 0) if self.state is None else self.state(features)
        return Decoded(images, numbers)

    def divergence(self, observed: Observed) -> Tensor:
        """KL(posterior || prior) (B, T) in nats: how far what was seen is from what was expected."""
        return self.rssm.latent.kl(observed.states.parameters, observed.prior)

    # -- training --------------------------------------------------------------------------------------------------

    def loss(self, batch: WorldBatch, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and its parts as means over the ticks that are there, without gradient."""
        config = self.config
        observed = self.observe(batch.inputs, batch.previous, batch.first, generator=generator)
        features = observed.states.features
        decoded = self.decode(observed.states)
        parts: dict[str, Tensor] = {}
        for name, picture in decoded.images.items():
            error = (picture - batch.inputs.images[name]).square().sum(dim=(-3, -2, -1))
            parts[f"image/{name}"] = config.image_scale * torch.where(batch.inputs.image_mask[name], error, 0.0)
        if self.state is not None:
            error = (decoded.state - batch.inputs.state).square().sum(dim=-1)
            parts["state"] = config.state_scale * torch.where(batch.inputs.state_mask, error, 0.0)
        parts["reward"] = self.reward.loss(features, batch.rewards)
        logits = self.continuation(features)[..., 0]
        parts["continue"] = F.binary_cross_entropy_with_logits(logits, batch.continues, reduction="none")
        kl_loss, divergence = balanced_kl(self.rssm.latent, observed.states.parameters, observed.prior, config.kl)
        parts["kl_loss"] = kl_loss
        means = {name: _mean(part, batch.mask) for name, part in parts.items()}
        total = torch.stack(list(means.values())).sum()
        figures = {name: mean.detach() for name, mean in means.items()}
        return total, {**figures, "kl": _mean(divergence, batch.mask)}


WORLD_MODEL_REGISTRY: dict[str, type[Any]] = {"rssm": WorldModel}


def build_world_model(config: Any) -> WorldModel:
    """Build the world model that is registered under ``config.type``."""
    if config.type not in WORLD_MODEL_REGISTRY:
        raise VlaError(f"no world model {config.type!r} registered; choices: {choices(WORLD_MODEL_REGISTRY)}")
    model: WorldModel = WORLD_MODEL_REGISTRY[config.type](config)
    return model


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
