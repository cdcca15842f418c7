"""Groups by name, rates by step, decay where it belongs, and parameters that wait."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vla_core.config import ConfigError, from_dict
from vla_core.training.optimizer import build_optimizer, parameter_groups, rate_share, set_learning_rates
from vla_core.training.options import ParameterGroup, Training
from vla_core.training.trainer import Result, train

from ..helpers import dataset
from ..whole_models import one_thread as one_thread
from .toy_run import toy_recipe


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(2, 2))
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)


def options(*groups: dict[str, Any], **more: Any) -> Training:
    return from_dict(Training, {"groups": list(groups), "learning_rate": 1e-3, "weight_decay": 0.1, **more})


def test_every_trained_parameter_is_in_one_group_with_its_rate_and_decay() -> None:
    model = Toy()
    wanted = options({"pattern": "vision.0.*", "learning_rate": 1e-5, "weight_decay": 0.5},
                     {"pattern": "vision.*", "freeze_until": 3})  # fmt: skip
    groups = parameter_groups(model, wanted)
    assert {g.name: sorted(g.parameters) for g in groups} == {
        "vision.0.*": ["vision.0.bias", "vision.0.weight"],
        "vision.*": ["vision.1.bias", "vision.1.weight"],
        "rest": ["head.bias", "head.weight", "scale"],
    }
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (part["highest"], part["weight_decay"])
        for part in build_optimizer(model, groups, wanted).param_groups for p in part["params"]
    }  # fmt: skip
    assert found == {
        "vision.0.weight": (1e-5, 0.5), "vision.0.bias": (1e-5, 0.0),
        "vision.1.weight": (1e-3, 0.0), "vision.1.bias": (1e-3, 0.0),
        "head.weight": (1e-3, 0.1), "head.bias": (1e-3, 0.0), "scale": (1e-3, 0.1),
    }  # fmt: skip
    everywhere = build_optimizer(model, groups, options(decay_all=True)).param_groups
    assert {part["weight_decay"] for part in everywhere} == {0.5, 0.1}


def test_a_pattern_that_names_nothing_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"groups\[1\]\.pattern: 'visoin\.\*' names no parameter; .*vision\.\* \(4\)"):
        parameter_groups(Toy(), options({"pattern": "head.*"}, {"pattern": "visoin.*"}))
    with pytest.raises(ConfigError, match="names no parameter that an earlier group does not have"):
        parameter_groups(Toy(), options({"pattern": "vision.*"}, {"pattern": "vision.0.*"}))
    with pytest.raises(ConfigError, match="nothing is trained at the first step"):
        parameter_groups(Toy(), options({"pattern": "*", "freeze_until": 1}))
    with pytest.raises(ConfigError, match="every part is frozen"):
        parameter_groups(Toy().requires_grad_(False), options())


@pytest.mark.parametrize(("data", "said"), [
    ({"groups": [{"pattern": "a", "learning_rate": 0}]}, r"groups\[0\]\.learning_rate"),
    ({"groups": [{"pattern": "a", "freeze_until": 5, "freeze_after": 5}]}, r"groups\[0\]\.freeze_after"),
    ({"groups": [{"name": "a"}]}, r"groups\[0\]\.name: unknown key"),
    ({"batch_size": 10, "accumulate": 3}, "accumulate: expected a divisor of batch_size"),
    ({"precision": "fp16", "distributed": "fsdp"}, "precision: fp16 cannot be scaled"),
    ({"min_ratio": 2}, "min_ratio"), ({"explosion": 0}, "explosion"), ({"keep": 0}, "keep"),
    ({"image_shift": 1, "augment": {"images": {"shift": 1}}}, "image_shift: is short for"),
    ({"evaluate": {"world": "metaworld:push-v3", "episodes": 0}}, "evaluate.episodes"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_dict(Training, data)


@given(
    steps=st.integers(1, 500), warmup=st.integers(0, 600), least=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "linear", "constant"]), step=st.integers(0, 499),
)  # fmt: skip
def test_rates_stay_between_their_bounds_and_are_torchs(
    steps: int, warmup: int, least: float, schedule: Any, step: int
) -> None:
    step = min(step, steps - 1)
    chosen = Training(steps=steps, warmup_steps=warmup, min_ratio=least, schedule=schedule)
    share = rate_share(chosen, step)
    assert 0 < share <= 1
    if step + 1 < warmup:
        assert share <= (step + 1) / warmup
        return
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    peer: Any = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=least),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, max(least, 1e-9), total_iters=steps),
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    }[schedule]()
    peer.last_epoch = step
    assert math.isclose(share, peer._get_closed_form_lr()[0], rel_tol=1e-6, abs_tol=1e-8)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_group_follows_the_same_course(kind: str) -> None:
    chosen = options({"pattern": "vision.*", "learning_rate": 1e-2}, steps=10, warmup_steps=0, optimizer=kind)
    model = Toy()
    optimizer = build_optimizer(model, parameter_groups(model, chosen), chosen)
    for step in range(10):
        rates = set_learning_rates(optimizer, chosen, step)
        assert rates["vision.*"] == pytest.approx(10 * rates["rest"])


def weights(result: Result) -> dict[str, torch.Tensor]:
    return result.checkpoint.model.state_dict()


def test_what_is_frozen_for_a_while_is_changed_by_nothing() -> None:
    """Decay is on, and the frozen part would be decayed, or moved by stale moments, if the optimizer saw it."""

    def run(steps: int, until: int, after: int | None = None) -> dict[str, torch.Tensor]:
        groups = (ParameterGroup(pattern="state_encoder.*", freeze_until=until, freeze_after=after),)
        return weights(train(toy_recipe(steps=steps, groups=groups, schedule="constant", weight_decay=0.5), dataset()))

    def encoder(found: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [value for name, value in found.items() if name.startswith("state_encoder.")]

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    first, waiting, moved = encoder(run(1, until=99)), run(4, until=99), run(5, until=4)
    assert same(first, encoder(waiting)) and not same(first, encoder(moved))
    assert not torch.equal(waiting["head.net.0.weight"], moved["head.net.0.weight"])
    stopped = encoder(run(2, until=0, after=2))
    assert not same(first, stopped) and same(stopped, encoder(run(6, until=0, after=2)))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(accumulate: int) -> None:
    """Windows at the ends of episodes have fewer known steps, so that the mean of the parts' means is another loss."""
    seen: dict[int, list[float]] = {1: [], accumulate: []}
    results = {
        parts: train(toy_recipe("flow", steps=6, accumulate=parts), dataset((5, 5, 5, 5)),
                     report=lambda p, parts=parts: seen[parts].append(p.loss))
        for parts in (1, accumulate)
    }  # fmt: skip
    torch.testing.assert_close(seen[1], seen[accumulate], rtol=1e-5, atol=0)
    torch.testing.assert_close(weights(results[1]), weights(results[accumulate]), rtol=1e-4, atol=1e-5)
