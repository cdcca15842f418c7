"""OpenVLA's eyes: one or two vision transformers over the same picture, and what is done to the picture before.

The transformers are those of timm, under timm's names, so that published tensors fit as they are; layer scales are
called ``scale_factor`` there. Patches are read after the second-to-last block. What comes later (the last block, the
last norm, the attention pooling) is in the checkpoints all the same, and kept: what is written back must be whole.

Shapes: M pictures, N patches, D width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.model.checks import at_least_one
from vla_core.model.vlm.vision_encoder import IMAGENET, RGB, SIGLIP, normalize

EPSILON = 1e-6  # of timm's vision transformers
CROP = 0.9  # share of the picture's area that a model trained with random crops sees at inference
Resize = Literal["resize-naive", "letterbox", "resize-crop"]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Architecture of one vision transformer; ``name`` is timm's. ``pooling``: it ends in an attention pooling."""

    name: str
    image_size: int = 224
    patch_size: int = 14
    width: int
    depth: int
    heads: int
    inner: int
    registers: int = 0
    class_token: bool = False
    layer_scale: bool = False
    pooling: bool = False
    mean: RGB = SIGLIP[0]
    std: RGB = SIGLIP[1]

    def __post_init__(self) -> None:
        at_least_one(self, "patch_size", "width", "heads", "inner")
        if self.depth < 2:
            raise ConfigError(f"depth: expected at least 2, since the second-to-last block is read, found {self.depth}")
        if self.width % self.heads:
            raise ConfigError(f"heads: expected a divisor of width ({self.width}), found {self.heads}")
        if self.image_size < self.patch_size:
            raise ConfigError(f"image_size: expected at least one patch of {self.patch_size}, found {self.image_size}")

    @property
    def tokens(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2


def _siglip(name: str, image_size: int, patch_size: int = 14, width: int = 1152, depth: int = 27, heads: int = 16,
            inner: int = 4304) -> BackboneConfig:  # fmt: skip
    return BackboneConfig(name=name, image_size=image_size, patch_size=patch_size, width=width, depth=depth,
                          heads=heads, inner=inner, pooling=True)  # fmt: skip


def _dino(name: str, registers: int) -> BackboneConfig:
    return BackboneConfig(name=name, width=1024, depth=24, heads=16, inner=4096, registers=registers, class_token=True,
                          layer_scale=True, mean=IMAGENET[0], std=IMAGENET[1])  # fmt: skip


# By timm's name, as a published config.json gives it. Others: BACKBONES["vit_…"] = BackboneConfig(name="vit_…", …)
BACKBONES: dict[str, BackboneConfig] = {
    backbone.name: backbone
    for backbone in (
        _dino("vit_large_patch14_reg4_dinov2.lvd142m", 4),
        _siglip("vit_so400m_patch14_siglip_224", 224),
        _siglip("vit_so400m_patch14_siglip_384", 384),
        _siglip("vit_base_patch16_siglip_224", 224, 16, 768, 12, 12, 3072),
    )
}


class Backbone(nn.Module):
    """One vision transformer: normalized pictures (M, 3, S, S) to the patches (M, N, D) of the second-to-last block."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, config.tokens, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, width)) if config.registers else None
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        if config.pooling:
            self.attn_pool = _Pooling(config)
        self.recompute = False
        self.freeze_unread()

    @property
    def unread(self) -> list[nn.Module]:
        """The parts that no patch passes."""
        return [self.blocks[-1], self.norm, *([self.attn_pool] if self.config.pooling else [])]

    def freeze_unread(self) -> None:
        """What gets no gradient must not ask for one: distributed training would wait for it."""
        for part in self.unread:
            part.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed
        first = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*first, x], dim=1)
        for block in list(self.blocks)[:-1]:
            if self.recompute and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x[:, -self.config.tokens :]


class _Block(nn.Module):
    """Attention and MLP, each after a norm and beside a skip connection."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        scale: Callable[[], nn.Module] = (lambda: _Scale(config.width)) if config.layer_scale else nn.Identity
        self.norm1 = nn.LayerNorm(config.width, eps=EPSILON)
        self.attn = _Attention(config)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(config.width, eps=EPSILON)
        self.mlp = _MLP(config)
        self.ls2 = scale()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _Attention(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (M, heads, N, D / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.inner)
        self.fc2 = nn.Linear(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class _Pooling(nn.Module):
    """SigLIP's attention pooling: it makes one vector of a picture, which OpenVLA does not read; only its weights."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width = config.width
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = _MLP(config)


class Vision(nn.Module):
    """Pictures (M, 3, H, W) in [0, 1] to patches (M, N, D); of two backbones D is the sum of both widths."""

    def __init__(self, backbones: tuple[BackboneConfig, ...], resize: Resize, center_crop: bool) -> None:
        super().__init__()
        self.configs, self.resize, self.center_crop = backbones, resize, center_crop
        self.featurizer = Backbone(backbones[0])
        if len(backbones) == 2:
            self.fused_featurizer = Backbone(backbones[1])
        self.width = sum(backbone.width for backbone in backbones)

    @property
    def backbones(self) -> list[Backbone]:
        """One, or two that see the same picture."""
        return [self.featurizer, *([self.fused_featurizer] if len(self.configs) == 2 else [])]

    def forward(self, pictures: Tensor) -> Tensor:
        fill = self.configs[-1].mean  # the published processor keeps the last backbone's
        dtype = self.featurizer.pos_embed.dtype
        seen = []
        for backbone in self.backbones:
            config = backbone.config
            pixels = prepare(pictures, config.image_size, self.resize, self.center_crop, fill)
            seen.append(backbone(normalize(pixels, config.mean, config.std).to(dtype)))
        return torch.cat(seen, dim=2)


class Projector(nn.Module):
    """Patches (M, N, D) into the language model's width; three layers behind two backbones, two behind one."""

    def __init__(self, vision_width: int, width: int, fused: bool) -> None:
        super().__init__()
        inner = 4 * vision_width if fused else width
        self.fc1 = nn.Linear(vision_width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.fc3 = nn.Linear(width, width) if fused else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        return x if self.fc3 is None else self.fc3(F.gelu(x))


def prepare(pictures: Tensor, size: int, resize: Resize, center_crop: bool, fill: RGB) -> Tensor:
    """Bring pictures (M, 3, H, W) in [0, 1] to ``size`` pixels a side, as the published preprocessing does.

    ``resize-naive`` stretches, ``letterbox`` pads to a square with ``fill`` first, ``resize-crop`` cuts what is beyond
    a square. ``center_crop`` then takes the middle 90 % of the area, stretched to ``size`` again. Every step ends in
    8 bits, as it does where pictures are bytes.
    """
    if resize == "letterbox":
        pictures = _pad(pictures, fill)
    pictures = _resized(pictures, size, keep_aspect=resize == "resize-crop")
    return _cropped(pictures) if center_crop else pictures


def _pad(pictures: Tensor, fill: RGB) -> Tensor:
    height, width = pictures.shape[2:]
    side = max(height, width)
    x, y = (side - width) // 2, (side - height) // 2
    colour = torch.tensor([int(255 * value) / 255 for value in fill], device=pictures.device, dtype=pictures.dtype)
    padded = colour[None, :, None, None].expand(len(pictures), -1, height + 2 * y, width + 2 * x).clone()
    padded[:, :, y : y + height, x : x + width] = pictures
    return padded


def _resized(pictures: Tensor, size: int, keep_aspect: bool) -> Tensor:
    """Bicubic with antialiasing, as Pillow does it; ``keep_aspect``: the shorter side to ``size``, then the middle."""
    height, width = pictures.shape[2:]
    target = (size, size)
    if keep_aspect:
        short = min(height, width)
        target = (size * height // short, size * width // short)
    for step in ((height, target[1]), target):  # along the rows, then along the columns, in bytes after each
        if pictures.shape[2:] != step:
            pictures = F.interpolate(pictures, step, mode="bicubic", antialias=True, align_corners=False)
            pictures = (255 * pictures.clamp(0, 1)).round() / 255
    top, left = (round((side - size) / 2) for side in target)
    return pictures[:, :, top : top + size, left : left + size]


def _cropped(pictures: Tensor) -> Tensor:
    """The middle 90 % of the area at the same size: bilinear from corner to corner, as TensorFlow's crop_and_resize."""
    side = pictures.shape[-1]
    line = torch.linspace(-1, 1, side, device=pictures.device, dtype=pictures.dtype) * CROP**0.5
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).expand(len(pictures), -1, -1, -1)
    found = F.grid_sample(pictures, grid, mode="bilinear", align_corners=True)
    return (255.5 * found.clamp(0, 1)).floor().clamp(max=255) / 255


class FeatureTable:
    """Patches of pictures that were seen before: what a frozen backbone makes of a picture never changes.

    Keyed by the picture's bytes, so that a frame is found again whichever batch it comes in; at most ``limit_mb`` of
    them, on the CPU, and those that were not asked for the longest go first.
    """

    def __init__(self, limit_mb: int) -> None:
        self.limit = limit_mb * 2**20
        self.asked = self.found = self.bytes = 0
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()

    @property
    def hit_rate(self) -> float:
        """Share of the pictures asked for that were found."""
        return self.found / self.asked if self.asked else 0.0

    def get(self, pictures: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Patches (M, N, D) of ``pictures``; ``compute`` is asked for those that are not known."""
        keys = [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in pictures.cpu().contiguous()]
        new = {key: place for place, key in enumerate(keys) if key not in self._rows}
        rows = {key: self._rows[key] for key in keys if key in self._rows}
        if new:
            features = compute(pictures[list(new.values())]).detach()
            for key, row in zip(new, features.cpu(), strict=True):
                rows[key] = self._keep(key, row.clone())
        for key in keys:
            if key in self._rows:
                self._rows.move_to_end(key)
        self.asked += len(keys)
        self.found += len(keys) - len(new)
        return torch.stack([rows[key] for key in keys]).to(pictures.device)

    def clear(self) -> None:
        """Forget all pictures."""
        self._rows.clear()
        self.bytes = 0

    def _keep(self, key: bytes, row: Tensor) -> Tensor:
        self._rows[key] = row
        self.bytes += row.nbytes
        while self.bytes > self.limit and self._rows:
            self.bytes -= self._rows.popitem(last=False)[1].nbytes
        return row
