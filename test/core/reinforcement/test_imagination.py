"""Actor and critic in imagination: returns by brute force, and a world in which the best behaviour is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vla_core.config import ConfigError
from vla_core.model.world_model import State
from vla_core.reinforcement.imagination import Dreamer, Dreaming, lambda_returns


@given(st.integers(1, 6), st.floats(0, 1), st.integers(0, 1000))
def test_returns_are_the_weighted_mean_of_all_lookaheads(steps: int, trace: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rewards, goes_on, values = rng.normal(size=steps), rng.uniform(0, 1, steps), rng.normal(size=steps)
    r, c, v = (torch.from_numpy(x)[None] for x in (rewards, goes_on, values))
    found = lambda_returns(r, c, v, trace)[0]

    def lookahead(t: int, n: int) -> float:
        """n rewards from t on, then the critic."""
        total, share = 0.0, 1.0
        for k in range(t, t + n):
            total += share * rewards[k]
            share *= goes_on[k]
        return total + share * float(values[t + n - 1])

    for t in range(steps):
        left = steps - t
        parts = [(1 - trace) * trace ** (n - 1) * lookahead(t, n) for n in range(1, left)]
        assert float(found[t]) == pytest.approx(sum(parts) + trace ** (left - 1) * lookahead(t, left), abs=1e-9)


class Line:
    """A point on a line that moves by 0.2 of the action; arriving at x is worth 1 - |x|.

    The constant beside x is there for layers that norm their input.
    """

    def imagine(self, state: State, actions: Tensor, *, sample: bool = True,
                generator: torch.Generator | None = None) -> State:  # fmt: skip
        assert actions.abs().max() <= 1, "the world knows actions within their range"
        x = (state.deter[:, None] + 0.2 * actions.cumsum(dim=1)).clamp(-2, 2)
        return State(x, torch.ones_like(x), torch.zeros_like(x))

    def predict_rewards(self, state: State) -> Tensor:
        return 1 - state.deter[..., 0].abs()

    def predict_continues(self, state: State) -> Tensor:
        return torch.ones(state.deter.shape[:-1])


def states(x: Tensor) -> State:
    return State(x[:, None], torch.ones(len(x), 1), torch.zeros(len(x), 1))


def test_it_learns_where_to_go_and_what_it_is_worth() -> None:
    options = Dreaming(horizon=6, hidden=32, layers=1, learning_rate=5e-3, discount=0.8, slow=0.9)
    dreamer = Dreamer(Line(), 2, 1, options)
    generator = torch.Generator().manual_seed(0)
    told = [dreamer.update(states(2 * torch.rand(64, generator=generator) - 1)).imagined_return for _ in range(300)]
    assert np.mean(told[-20:]) > np.mean(told[:20]) + 1
    away = states(torch.tensor([-0.8, 0.8]))
    assert dreamer.act(away)[0, 0] > 0.5 and dreamer.act(away)[1, 0] < -0.5
    worth = dreamer.value(states(torch.tensor([0.0, 0.9, -0.9])))
    assert worth[0] > worth[1] + 0.5 and worth[0] > worth[2] + 0.5
    assert worth[0] < 1.05 / (1 - 0.8)  # more than staying at the best place is impossible


def test_the_world_is_left_as_it_is() -> None:
    class Learned(torch.nn.Module, Line):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def predict_rewards(self, state: State) -> Tensor:
            return self.scale * super().predict_rewards(state)

    world = Learned()
    Dreamer(world, 2, 1, Dreaming(horizon=3, hidden=8)).update(states(torch.linspace(-1, 1, 8)))
    assert world.scale.grad is None


def test_options_out_of_range_are_refused() -> None:
    for change in ({"horizon": 0}, {"discount": 1.5}, {"learning_rate": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            Dreaming(**change)
