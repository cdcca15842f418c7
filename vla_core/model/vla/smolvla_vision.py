"""Pictures to tokens of the language model's width: SigLIP, pixel shuffle and a projection.

Legend: M pictures, S side of the square, T patches, D their width, N tokens of a picture, W the language model's width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vla_core.errors import VlaError
from vla_core.model.fast import attention, fused, linear

AT_ONCE = 4  # pictures whose activations are held, where nothing is differentiated


class PictureTokens:
    """What the policy does with its pictures; ``size`` is S in pixels."""

    def __init__(self, size: int) -> None:
        self.size = size

    def fit(self, images: Tensor) -> Tensor:
        """Resize (B, 3, h, w) in [0, 1] to the square, black above and left of them, and scale to [-1, 1]."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise VlaError(f"pictures: found {tuple(images.shape)}, expected (B, 3, height, width)")
        height, width = images.shape[-2:]
        if (height, width) != (self.size, self.size):
            ratio = max(height, width) / self.size
            inner = (int(height / ratio), int(width / ratio))
            images = F.interpolate(images, size=inner, mode="bilinear", align_corners=False)
            images = F.pad(images, (self.size - inner[1], 0, self.size - inner[0], 0))
        return images * 2 - 1

    def __call__(self, model: Any, images: Tensor, there: Tensor, skip: bool) -> tuple[Tensor, Tensor]:
        """Tokens (B, K N, W) of ``images`` (B, K, 3, S, S), and their mask; ``skip`` leaves out what is not there."""
        batch = len(there)
        flat = images.flatten(0, 1)
        if skip:
            flat = flat[there.flatten()]
        width, count = model.text_model.config.hidden_size, self.tokens(model)
        if len(flat) == 0:
            return images.new_zeros(batch, 0, width), there.new_zeros(batch, 0)
        parts = (flat,) if torch.is_grad_enabled() and _trained(model) else flat.split(AT_ONCE)
        encoded = torch.cat([self._encode(model, part) for part in parts]) * width**0.5
        mask = there.repeat_interleave(count, dim=1)
        return encoded.reshape(batch, -1, width), mask[:, mask[0]] if skip else mask

    def tokens(self, model: Any) -> int:
        """N."""
        side = self.size // model.vision_model.patch_size
        return side**2 // model.connector.scale_factor**2

    def _encode(self, model: Any, images: Tensor) -> Tensor:
        """(M, 3, S, S) to (M, N, W)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trained(model)):
            vision = model.vision_model
            side = self.size // vision.patch_size
            patches = torch.ones(len(images), side, side, dtype=torch.bool, device=images.device)
            x = vision.embeddings(pixel_values=images, patch_attention_mask=patches)  # (M, T, D)
            for layer in vision.encoder.layers:
                x = _layer(layer, x)
            tokens: Tensor = model.connector(vision.post_layernorm(x))
            return tokens


def _layer(layer: Any, x: Tensor) -> Tensor:
    attend, mlp = layer.self_attn, layer.mlp
    normed = layer.layer_norm1(x)
    query, key, value = (
        linear(part, normed).unflatten(-1, (attend.num_heads, -1)).transpose(1, 2).contiguous()
        for part in (attend.q_proj, attend.k_proj, attend.v_proj)
    )
    if fused(query):
        heard = torch.stack([attention(*picture) for picture in zip(query, key, value, strict=True)])
    else:
        heard = F.scaled_dot_product_attention(query, key, value)
    x = x + linear(attend.out_proj, heard.transpose(1, 2).flatten(2))
    return x + linear(mlp.fc2, linear(mlp.fc1, layer.layer_norm2(x), "gelu"))


def _trained(model: Any) -> bool:
    """Whether the vision encoder, or what stands behind it, is."""
    return any(p.requires_grad for part in (model.vision_model, model.connector) for p in part.parameters())
