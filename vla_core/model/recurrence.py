"""A GRU over a number of steps that an exporter leaves free; torch's own is unrolled for the number it is shown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vla_core.model.graph import in_graph


def gru(part: nn.GRU, values: Tensor, start: Tensor | None = None) -> Tensor:
    """The hidden states (B, T, H) of one batch-first layer over ``values`` (B, T, D), from ``start`` (1, B, H) or 0."""
    if start is None and in_graph() and not torch.jit.is_tracing():  # type: ignore[attr-defined]
        hidden: Tensor = torch.ops.vla_core.gru(
            values, part.weight_ih_l0, part.weight_hh_l0, part.bias_ih_l0, part.bias_hh_l0
        )  # fmt: skip
        return hidden
    states, _ = part(values, start)
    return states


@torch.library.custom_op("vla_core::gru", mutates_args=())
def _gru(
    values: Tensor, input_weight: Tensor, hidden_weight: Tensor, input_bias: Tensor, hidden_bias: Tensor
) -> Tensor:
    start = values.new_zeros(1, len(values), hidden_weight.shape[1])
    weights = [input_weight, hidden_weight, input_bias, hidden_bias]
    states, _ = torch.gru(values, start, weights, True, 1, 0.0, False, False, True)
    return states


@_gru.register_fake
def _(values: Tensor, input_weight: Tensor, hidden_weight: Tensor, input_bias: Tensor, hidden_bias: Tensor) -> Any:
    return values.new_empty(values.shape[0], values.shape[1], hidden_weight.shape[1])
