"""Operators of torch that the ONNX exporter does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import vla_core.model.recurrence  # noqa: F401 - its operator


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """By torch's operator, what it is in ONNX of version ``opset``."""
    import onnxscript

    op: Any = getattr(onnxscript, f"opset{opset}")

    def sort_stable(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
        # By ONNX's definition TopK puts the lower index first among equals: it is stable.
        size = op.Slice(op.Shape(self), [dim], [dim + 1] if dim != -1 else [2**31 - 1], [0])
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    def gru(values: Any, input_weight: Any, hidden_weight: Any, input_bias: Any, hidden_bias: Any) -> Any:
        """One batch-first layer; ONNX has the gates in another order: update, reset, new."""

        def ordered(weight: Any) -> Any:
            size = weight.shape[0] // 3
            reset, update, new = (op.Slice(weight, [k * size], [(k + 1) * size], [0]) for k in range(3))
            return op.Concat(update, reset, new, axis=0)

        one = op.Constant(value_ints=[0])
        states, _ = op.GRU(
            op.Transpose(values, perm=[1, 0, 2]), op.Unsqueeze(ordered(input_weight), one),
            op.Unsqueeze(ordered(hidden_weight), one),
            op.Unsqueeze(op.Concat(ordered(input_bias), ordered(hidden_bias), axis=0), one),
            hidden_size=hidden_weight.shape[1], linear_before_reset=1,
        )  # fmt: skip
        return op.Transpose(op.Squeeze(states, op.Constant(value_ints=[1])), perm=[1, 0, 2])

    return {torch.ops.aten.sort.stable: sort_stable, torch.ops.vla_core.gru.default: gru}
