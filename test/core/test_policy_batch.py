"""Several observations in one call of the model: each gets the chunk that it would get alone, noise and all."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from vla_core.checkpoint import PolicyConfig
from vla_core.model.action_head.base import ACTION_HEAD_REGISTRY
from vla_core.model.vla import build_model
from vla_core.observation.builder import ImageSize, Observation
from vla_core.runtime.chunk import Continuation
from vla_core.runtime.policy import CheckpointPolicy, PolicyError

from .helpers import SPEC, START, STEP, checkpoint, pixels
from .whole_models import one_thread as one_thread
from .whole_models import vla_config

TOLERANCE = 1e-5
HEADS: dict[str, Any] = {
    "mlp": {"type": "mlp"},
    "chunker": {"type": "chunker"},
    "ddim": {"type": "diffusion", "sampler": "ddim"},
    "ddpm": {"type": "diffusion", "sampler": "ddpm"},
    "seed": {"type": "diffusion", "sampler": "mini_vla_seed", "train_steps": 10, "schedule": "mini_vla_seed"},
    "diffusion_transformer": {"type": "diffusion", "denoiser": "transformer"},
    "flow": {"type": "flow"},
    "flow_guided_by_context": {"type": "flow", "context_drop": 0.1, "guidance_scale": 2.0},
    "flow_transformer": {"type": "flow", "denoiser": "transformer"},
    "gaussian_mean": {"type": "gaussian"},
    "gaussian_sample": {"type": "gaussian", "answer": "sample"},
    "discrete": {"type": "discrete"},
    "discrete_sample": {"type": "discrete", "answer": "sample"},
    "transformer": {"type": "transformer"},
    "transformer_sample": {"type": "transformer", "bins": 256, "answer": "sample"},
}
DRAWING = {name for name in HEADS if name.startswith(("dd", "diffusion", "flow", "seed")) or name.endswith("sample")}


def head(name: str) -> Any:
    options = {key: value for key, value in HEADS[name].items() if key != "type"}
    return ACTION_HEAD_REGISTRY[HEADS[name]["type"]].Config(**options)


def policy(name: str) -> CheckpointPolicy:
    torch.manual_seed(3)
    return CheckpointPolicy(checkpoint(head(name)), seed=5)


def observe(number: int, **changes: Any) -> Observation:
    rng = np.random.default_rng(number)
    values: dict[str, Any] = {
        "stamp_ns": START + number * STEP, "images": {"camera": pixels(number)},
        "state": rng.normal(size=2).astype(np.float32), "instruction": ("lift it", "lift", "")[number % 3],
        "ages_ns": {}, "present": {"camera": True, "arm": True, "task": True},
    }  # fmt: skip
    return Observation(**{**values, **changes})


def plan(number: int, frozen: int, **changes: Any) -> Continuation:
    rng = np.random.default_rng(100 + number)
    weights = np.array([1.0, 0.8, 0.3, 0.0])
    values = {"actions": rng.uniform(-0.3, 0.3, (4, 2)), "weights": weights, "frozen": frozen, "max_guidance": 5.0}
    return Continuation(**{**values, **changes})


SEEN = [observe(0), observe(1, images={}, present={"camera": False, "arm": True, "task": True}), observe(2),
        observe(3, state=np.float32([np.nan, np.nan])), observe(4)]  # fmt: skip


def check(of: CheckpointPolicy, seen: list[Observation], continues: list[Continuation | None]) -> list[np.ndarray]:
    alone = [of.predict(observation, plan) for observation, plan in zip(seen, continues, strict=True)]
    together = of.predict_batch(seen, continues)
    for one, other, observation, plan in zip(alone, together, seen, continues, strict=True):
        assert other.observation_stamp_ns == observation.stamp_ns and other.continues is plan
        assert np.abs(one.actions - other.actions).max() < TOLERANCE
    return [chunk.actions for chunk in together]


@pytest.mark.parametrize("name", HEADS)
def test_a_batch_gives_each_the_chunk_that_it_gets_alone(name: str) -> None:
    of = policy(name)
    check(of, SEEN, [None] * 5)
    # Two that see the same at different times differ by their noise alone, which is their own.
    twin = dataclasses.replace(SEEN[0], stamp_ns=START + 99 * STEP)
    first, second = check(of, [SEEN[0], twin], [None, None])
    assert (np.abs(first - second).max() > TOLERANCE) == (name in DRAWING)


def test_every_head_is_proved() -> None:
    assert {HEADS[name]["type"] for name in HEADS} == set(ACTION_HEAD_REGISTRY)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "flow", "flow_transformer", "flow_guided_by_context"])
def test_each_continues_its_own_plan(name: str) -> None:
    of = policy(name)
    plans = [plan(0, 1), None, plan(2, 2, spread=0.3), plan(3, 0, max_guidance=1.0), None]
    guided = check(of, SEEN, plans)
    free = [chunk.actions for chunk in of.predict_batch(SEEN, [None] * 5)]
    for chunk, other, continues in zip(guided, free, plans, strict=True):
        assert (np.abs(chunk - other).max() > TOLERANCE) == (continues is not None)
        if continues is not None:
            assert np.allclose(chunk[: continues.frozen], continues.actions[: continues.frozen], atol=1e-5)


def test_one_that_is_not_finite_is_refused_with_its_stamp() -> None:
    of = policy("mlp")
    bad = dataclasses.replace(SEEN[2], state=np.float32([np.inf, 0]))
    with pytest.raises(PolicyError, match=f"non-finite action at stamp {bad.stamp_ns}"):
        of.predict_batch([SEEN[0], bad], [None, None])


@pytest.mark.parametrize("name", ["flow", "discrete_sample"])
def test_a_model_with_a_memory_of_instructions(name: str) -> None:
    """The newest batch's instructions are kept; others must not get them."""
    config = vla_config(cameras=("camera",), state_dim=2, history=1, vocab_size=4, head=head(name))
    torch.manual_seed(0)
    made = checkpoint(head(name))
    spec = dataclasses.replace(SPEC, images={"camera": ImageSize(height=8, width=8)})
    settings = PolicyConfig(model=config, observation=spec, execution=made.config.execution)
    of = CheckpointPolicy(dataclasses.replace(made, config=settings, model=build_model(config).eval()), seed=5)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (len(SEEN), 8, 8, 3), dtype=np.uint8)
    seen = [dataclasses.replace(o, images={"camera": picture}) for o, picture in zip(SEEN, pictures, strict=True)]
    for _ in range(2):
        check(of, seen, [None] * 5)
        check(of, seen[::-1], [None] * 5)
