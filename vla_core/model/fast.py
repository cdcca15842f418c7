"""Linear layers and attention on a CPU by oneDNN, where nothing is differentiated.

torch multiplies float32 matrices by MKL, which reaches less than half of what an AMD core with AVX-512 can do; oneDNN,
which torch carries for its compiler, reaches it on both makes. The numbers are those of torch to the last digits.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_core.model.graph import in_graph

Activation = Literal["none", "gelu", "silu"]

_ONEDNN = {"none": ("none", ""), "gelu": ("gelu", "tanh"), "silu": ("swish", "")}


def linear(part: nn.Module, x: Tensor, activation: Activation = "none") -> Tensor:
    """``activation`` of ``part`` of ``x`` (..., D); ``gelu`` is the one by tanh. ``part`` may have adapters."""
    if type(part) is nn.Linear and fused(x) and part.weight.dtype == x.dtype:
        kind, algorithm = _ONEDNN[activation]
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, part.weight, part.bias, kind, [], algorithm)
        return product
    y: Tensor = part(x)
    if activation == "gelu":
        return F.gelu(y, approximate="tanh")
    return F.silu(y) if activation == "silu" else y


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention of everything to everything: each (N, T, D) in heads, N of them, to (N, T, D)."""
    if not fused(query) or query.dtype != torch.float32:
        return F.scaled_dot_product_attention(query, key, value)
    product, scale = torch.ops.mkldnn._linear_pointwise, 1 / math.sqrt(query.shape[-1])
    out = torch.empty_like(query)
    for head, (q, k, v) in enumerate(zip(query * scale, key, value.mT.contiguous(), strict=True)):
        weights = product(q, k, None, "none", [], "").softmax(dim=-1)  # one head's (T, T) stays in the cache
        out[head] = product(weights, v, None, "none", [], "")
    return out


def fused(x: Tensor) -> bool:
    """Whether oneDNN may be called by itself for ``x``."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not (in_graph() or torch.compiler.is_compiling())
        and _available()
    )


def _available() -> bool:
    """The operator is torch's own business, and may be gone from a version to come."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
