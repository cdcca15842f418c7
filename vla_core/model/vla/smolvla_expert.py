"""The two transformers of SmolVLA side by side: the language model over what is seen, the expert over the actions.

Of each of its layers the language model leaves keys and values. In the layers where the expert attends to itself they
stand before its own; elsewhere the expert attends to them alone, through projections of its own. Nothing of the prefix
depends on the actions, so all this is made once for all Euler steps.

Legend: B batch, P tokens of the prefix, H rows of a chunk, G groups (heads that share keys and values), R heads of a
group, d width of a head, W and E widths of language model and expert. The numbers are those of LeRobot, whose rotary
embedding has the base 10,000 whatever the language model's record says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vla_core.model.fast import linear

ROTARY_BASE = 10_000.0
MULTIPLE = 256  # of the width inside the expert's layers


class KeyValue(NamedTuple):
    """Keys and values of a layer, (B, G, P, d) each."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Remembered:
    """What the expert needs of the prefix: a layer's keys and values, ``valid`` (B, P), and whether all of it is."""

    layers: list[KeyValue]
    valid: Tensor
    whole: bool


def inner_width(width: int) -> int:
    """Width inside the expert's layers: 8/3 of its own, up to a multiple of 256."""
    inner = 4 * int(2 * width / 3)
    return MULTIPLE * ((inner + MULTIPLE - 1) // MULTIPLE)


def expert_model(text: Any, *, layers: int, width: float, crosses: Callable[[int], bool]) -> nn.Module:
    """The expert beside a language model of the record ``text``; ``crosses`` says which layers attend to the prefix."""
    import copy

    from transformers import AutoModel

    record = copy.deepcopy(text)
    record.hidden_size = int(text.hidden_size * width)
    record.intermediate_size = inner_width(record.hidden_size)
    record.num_hidden_layers = layers
    expert: Any = AutoModel.from_config(record)
    remembered = text.num_key_value_heads * text.head_dim
    for i, layer in enumerate(expert.layers):
        if crosses(i):
            layer.self_attn.k_proj = nn.Linear(remembered, remembered, bias=text.attention_bias)
            layer.self_attn.v_proj = nn.Linear(remembered, remembered, bias=text.attention_bias)
    expert.embed_tokens = None
    built: nn.Module = expert
    return built


class Rotation(NamedTuple):
    """Cosine and sine (B, 1, L, d / 2) of tokens at ``positions`` (B, L)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, width: int) -> Rotation:
        exponents = (2.0 / width) * torch.arange(width // 2, dtype=torch.float32, device=positions.device)
        angles = positions[:, None, :, None].to(torch.float32) / ROTARY_BASE**exponents
        return cls(angles.cos(), angles.sin())

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate ``x`` (B, n, L, d), whose halves are the two coordinates of each plane."""
        first, second = x.to(torch.float32).chunk(2, dim=-1)
        turned = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        return torch.cat(turned, dim=-1).to(x.dtype)


class Prefix:
    """The language model's layers over the prefix; its last layer gives keys and values alone."""

    def __init__(self, layers: Sequence[Any], groups: int, recompute: bool = False) -> None:
        self.layers, self.groups, self.recompute = layers, groups, recompute

    def __call__(self, x: Tensor, positions: Tensor, mask: Tensor,
                 past: Sequence[KeyValue] | None = None) -> list[KeyValue]:  # fmt: skip
        """Keys and values of each layer for ``x`` (B, L, W), behind ``past``.

        ``mask`` (B, 1, L, P) is added to the logits.
        """
        turn = Rotation.at(positions, self.layers[0].self_attn.head_dim)
        x = x.to(self.layers[0].input_layernorm.weight.dtype)  # autocast narrows products, not what they are added to
        found = []
        for i, layer in enumerate(self.layers):
            last = i + 1 == len(self.layers)
            before = None if past is None else past[i]
            x, *parts = _run(self.recompute, self._layer, layer, x, turn, mask, before, last)
            found.append(KeyValue(*parts))
        return found

    def _layer(self, layer: Any, x: Tensor, turn: Rotation, mask: Tensor, past: KeyValue | None,
               last: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        normed = norm(layer.input_layernorm, x)
        key = turn(_heads(linear(layer.self_attn.k_proj, normed), self.groups))
        value = _heads(linear(layer.self_attn.v_proj, normed), self.groups)
        if past is not None:
            key, value = torch.cat([past.key, key], dim=2), torch.cat([past.value, value], dim=2)
        if last:
            return x, key, value
        heads = layer.self_attn.q_proj.out_features // key.shape[-1]
        query = turn(_heads(linear(layer.self_attn.q_proj, normed), heads))
        return _after(layer, x, attend(query, key, value, mask)), key, value


class Expert:
    """The expert's layers over a chunk, for one prefix and any number of times."""

    def __init__(self, layers: Sequence[Any], crosses: Sequence[bool], stride: int, groups: int, seen: Remembered,
                 rows: int, recompute: bool = False) -> None:  # fmt: skip
        """``crosses``: which layers do; ``stride``: layers of the language model for one of the expert."""
        self.layers, self.crosses, self.groups, self.recompute = layers, crosses, groups, recompute
        places = torch.arange(rows, device=seen.valid.device)
        head = seen.layers[0].key.shape[-1]
        self.alone = Rotation.at(places[None], head)
        self.behind = Rotation.at(seen.valid.sum(dim=1, keepdim=True) + places, head)
        before = seen.valid[:, None, None, :]
        causal = places[:, None] >= places
        dtype = seen.layers[0].key.dtype
        self.cross_mask = None if seen.whole else bias(before.expand(-1, 1, rows, -1), dtype)
        self.self_mask = bias(torch.cat([before.expand(-1, 1, rows, -1),
                                         causal.expand(len(before), 1, -1, -1)], dim=-1), dtype)  # fmt: skip
        self.seen = [self._projected(layer, cross, seen.layers[i * stride])
                     for i, (layer, cross) in enumerate(zip(layers, crosses, strict=True))]  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        """(B, H, E) to (B, H, E), before the last norm."""
        x = x.to(self.layers[0].input_layernorm.weight.dtype)
        for layer, cross, seen in zip(self.layers, self.crosses, self.seen, strict=True):
            x = _run(self.recompute, self._layer, layer, x, cross, seen)
        return x

    def _projected(self, layer: Any, cross: bool, seen: KeyValue) -> KeyValue:
        """What the layer attends to of the prefix."""
        if not cross:
            return seen
        key, value = (part.transpose(1, 2).flatten(2) for part in seen)  # (B, P, G d)
        return KeyValue(
            _heads(linear(layer.self_attn.k_proj, key), self.groups).contiguous(),
            _heads(linear(layer.self_attn.v_proj, value), self.groups).contiguous(),
        )

    def _layer(self, layer: Any, x: Tensor, cross: bool, seen: KeyValue) -> Tensor:
        normed = norm(layer.input_layernorm, x)
        heads = layer.self_attn.q_proj.out_features // seen.key.shape[-1]
        query = _heads(linear(layer.self_attn.q_proj, normed), heads)
        if cross:
            return _after(layer, x, attend(self.alone(query), *seen, self.cross_mask))
        own_key = self.behind(_heads(linear(layer.self_attn.k_proj, normed), self.groups))
        own_value = _heads(linear(layer.self_attn.v_proj, normed), self.groups)
        key, value = torch.cat([seen.key, own_key], dim=2), torch.cat([seen.value, own_value], dim=2)
        return _after(layer, x, attend(self.behind(query), key, value, self.self_mask))


def norm(part: Any, x: Tensor) -> Tensor:
    """Root-mean-square norm by the layer's own weight."""
    return F.rms_norm(x, (x.shape[-1],), part.weight, part.variance_epsilon)


def bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the logits where ``allowed`` bool: 0, or minus infinity."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, float("-inf"))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of ``query`` (B, G R, L, d) to (B, G, P, d): (B, L, G R d)."""
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    together = query.reshape(batch, groups, heads // groups * rows, width)  # the heads of a group as more rows
    if mask is not None:
        mask = mask.repeat(1, 1, heads // groups, 1).to(query.dtype)
    heard = F.scaled_dot_product_attention(together, key, value, attn_mask=mask)
    return heard.reshape(batch, heads, rows, width).transpose(1, 2).flatten(2)


def _after(layer: Any, x: Tensor, heard: Tensor) -> Tensor:
    """The rest of a layer behind its attention."""
    x = x + linear(layer.self_attn.o_proj, heard)
    normed = norm(layer.post_attention_layernorm, x)
    gated = linear(layer.mlp.gate_proj, normed, "silu") * linear(layer.mlp.up_proj, normed)
    return x + linear(layer.mlp.down_proj, gated)


def _heads(x: Tensor, count: int) -> Tensor:
    """(B, L, n d) to (B, n, L, d)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _run(recompute: bool, layer: Callable[..., Any], *arguments: Any) -> Any:
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *arguments, use_reentrant=False)
    return layer(*arguments)
