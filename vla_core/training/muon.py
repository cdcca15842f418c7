"""Muon: momentum whose matrices are made orthogonal, so that every direction of a layer learns as fast as any other.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the size of an update is that of Liu et
al. 2025, "Muon is Scalable for LLM Training": as AdamW's, so that one learning rate fits both. ``torch.optim.Muon`` is
the same for parameters of two dimensions and nothing else; here a kernel of a convolution is a matrix too, a row for
each channel it makes, and what is not a matrix is AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of an odd polynomial that draws singular values to about 1
ROUNDS = 5
MOMENTUM = 0.95
RMS = 0.2  # of an update's elements per learning rate, which is about AdamW's
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NARROWEST = 16  # rows and columns; of what is narrower, such as the entry of three colours, an element is worth more


class Muon(torch.optim.Optimizer):
    """Muon for the groups with ``matrices=True``, fused AdamW for all others; decay is decoupled in both."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "matrices": False})
        rest = [group for group in self.param_groups if not group["matrices"]]
        self._rest = torch.optim.AdamW(rest, fused=True) if rest else None
        if self._rest is not None:
            self._rest.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["matrices"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._turn(parameter, group["lr"], group["weight_decay"])
        if self._rest is not None:
            self._rest.step()
        return loss

    def _turn(self, parameter: Tensor, rate: float, decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        update = gradient.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
        scale = RMS * max(update.shape) ** 0.5
        parameter.mul_(1 - rate * decay)
        parameter.add_(orthogonal(update).view_as(parameter), alpha=-rate * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """About ``U V^T`` of ``matrix`` (M, N) = ``U S V^T``: singular values are between 0.7 and 1.2.

    Newton and Schulz's iteration on the smaller of the two Gram matrices. The polynomials of all rounds commute, so the
    matrix itself, which may be much longer than wide, is multiplied once, in the end.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.mT).mT
    a, b, c = COEFFICIENTS
    matrix = matrix.float()
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    gram = matrix @ matrix.mT
    identity = torch.eye(len(gram), device=gram.device)
    whole = identity
    for _ in range(ROUNDS):
        factor = a * identity + b * gram + c * (gram @ gram)
        whole = factor @ whole
        gram = factor @ gram @ factor
    return whole @ matrix


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the weights of linear layers and convolutions, as wide as orthogonality has a meaning."""
    return {
        f"{name}.weight" if name else "weight"
        for name, layer in model.named_modules()
        if isinstance(layer, LAYERS) and min(layer.weight.flatten(1).shape) >= NARROWEST
    }
