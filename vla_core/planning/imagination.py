"""What actions are worth in a world model's imagination."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vla_core.model.world_model import State, WorldModel
from vla_core.planning.plan import Score

Value = Callable[[State], Tensor]  # states (N, ...) to the return (N,) from there on


def imagined_returns(model: WorldModel, state: State, actions: Tensor, *, discount: float = 0.99,
                     value: Value | None = None) -> Tensor:  # fmt: skip
    """Discounted returns (N,) of ``actions`` (N, H, A), normalized, from one ``state`` (1, ...) or from N states.

    Latents are the most likely ones, so that the same actions are always worth the same. A reward counts as far as the
    episode is expected to go on until then; ``value`` is what lies beyond the horizon.
    """
    states = model.imagine(state, actions, sample=False)
    rewards = model.predict_rewards(states)  # (N, H)
    goes_on = discount * model.predict_continues(states)
    reached = torch.cumprod(torch.cat([torch.ones_like(goes_on[:, :1]), goes_on], dim=1), dim=1)  # (N, H + 1)
    total = (reached[:, :-1] * rewards).sum(dim=1)
    if value is not None:
        total = total + reached[:, -1] * value(states.map(lambda x: x[:, -1]))
    return total


def score_from(model: WorldModel, state: State, *, discount: float = 0.99, value: Value | None = None,
               stay_near: Tensor | None = None, weight: float = 0.0) -> Score:  # fmt: skip
    """A score for :func:`vla_core.planning.plan`.

    ``weight`` is what a squared unit of distance from ``stay_near`` (H, A), summed over the rows, costs: a model knows
    little of what nobody has ever done.
    """

    def score(actions: Tensor) -> Tensor:
        found = imagined_returns(model, state, actions, discount=discount, value=value)
        if stay_near is not None and weight:
            found = found - weight * (actions - stay_near).square().sum(dim=(1, 2))
        return found

    return score
