"""Parameters that are trained for a part of the run only."""

from __future__ import annotations

from vla_core.training.optimizer import Group


class FreezeSchedule:
    """Turns gradients on and off by the step; what is frozen is changed by nothing, decay and moments included."""

    def __init__(self, groups: list[Group]) -> None:
        self._groups = groups

    def apply(self, step: int) -> None:
        """Before the forward pass of ``step``: spare what needs no gradient."""
        for group in self._groups:
            on = group.trains(step)
            for parameter in group.parameters.values():
                if parameter.requires_grad != on:
                    parameter.requires_grad_(on)
        self._step = step

    def drop(self) -> None:
        """After the backward pass: wrappers that share gradients may have filled in zeros, which AdamW would follow."""
        for group in self._groups:
            if not group.trains(self._step):
                for parameter in group.parameters.values():
                    parameter.grad = None

    def release(self) -> None:
        """At the end: the model is handed out as it was built."""
        for group in self._groups:
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)
