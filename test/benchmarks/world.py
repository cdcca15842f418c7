"""The suite ``world``: imagined steps, plans and training of a world model, and how well a planner keeps its time.

Weights are random: no time depends on what they are. One thread. The sizes are those of config/world/push_state.yaml
(39 numbers, 4 actions), or of push_images.yaml where a row's name says pictures. Beside the plain RSSM the latent is
DreamerV3's, of categories.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from test.benchmarks.framework import BenchmarkError, Row, Settings, Suite, compared, measured
from test.benchmarks.model import threads
from test.benchmarks.world_peer import PlainWorld
from vla_core.model.inputs import ModelInputs
from vla_core.model.world_model import WorldBatch, WorldModel
from vla_core.planning import CEMConfig, Planner
from vla_core.planning.imagination import score_from
from vla_core.training.world_recipe import load_world_recipe

STATE, ACTION = 39, 4
CANDIDATES, HORIZON = 256, 12
ROUNDS, LONG_ROUNDS = 5, 15
BUDGET_S = 0.05  # four control steps at 80 Hz
LOOPED = 16  # candidates that the loop evaluates, of which the rest is reckoned


CATEGORICAL = "model.rssm.latent={type: categorical, groups: 16, classes: 16}"


def model_of(recipe: str, *overrides: str) -> WorldModel:
    """An untrained model of a shipped recipe."""
    torch.manual_seed(0)
    config = load_world_recipe(recipe, overrides)
    cameras = tuple(config.observation.images)
    return WorldModel(config.model.config(cameras=cameras, state_dim=4 if cameras else STATE, action_dim=ACTION))


def batch_of(model: WorldModel, rows: int, ticks: int) -> WorldBatch:
    """Noise in the form of a batch."""
    there = torch.ones(rows, ticks, dtype=torch.bool)
    first = torch.zeros(rows, ticks, dtype=torch.bool)
    first[:, 0] = True
    cameras = model.config.cameras
    inputs = ModelInputs(
        images={name: torch.rand(rows, ticks, 3, 64, 64) for name in cameras},
        state=torch.randn(rows, ticks, model.config.state_dim), tokens=torch.zeros(rows, ticks, 1, dtype=torch.int64),
        image_mask={name: there for name in cameras}, state_mask=there,
    )  # fmt: skip
    return WorldBatch(inputs, torch.randn(rows, ticks, ACTION), torch.rand(rows, ticks), torch.ones(rows, ticks),
                      first, there)  # fmt: skip


def seconds(function: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def pairs(settings: Settings, ours: Callable[[], Any], peer: Callable[[], Any],
          peer_share: float = 1.0) -> list[tuple[float, float]]:  # fmt: skip
    """Calls a second of both, in turns; the peer does ``peer_share`` of a whole call."""
    ours(), peer()
    return [(1 / seconds(ours), peer_share / seconds(peer)) for _ in range(LONG_ROUNDS if settings.long else ROUNDS)]


def imagining(settings: Settings) -> Iterator[Row]:
    """Steps of imagination a second: all candidates at once against one after the other, and against the peer."""
    with threads(1), torch.inference_mode():
        model = model_of("push_state").eval()
        drawing = model_of("push_state", CATEGORICAL).eval()
        plain = PlainWorld(drawing).eval()
        actions = torch.rand(CANDIDATES, HORIZON, ACTION)
        start = model.initial(1)
        whole = drawing.initial(1).map(lambda x: x.expand(CANDIDATES, -1))
        few = actions[:LOOPED]

        def loop() -> None:
            for row in few:
                model.imagine(start, row[None], sample=False)

        steps = CANDIDATES * HORIZON
        found = pairs(settings, lambda: model.imagine(start, actions, sample=False), loop, LOOPED / CANDIDATES)
        yield compared("imagined steps, candidates at once", "steps/s", [(a * steps, b * steps) for a, b in found],
                       "the same model, a loop over candidates", ">= 5")  # fmt: skip
        found = pairs(settings, lambda: drawing.imagine(whole, actions),
                      lambda: plain.rssm.imagine(whole.deter, whole.stoch, actions))  # fmt: skip
        yield compared("imagined steps, latents drawn", "steps/s", [(a * steps, b * steps) for a, b in found],
                       "plain PyTorch RSSM", ">= 1")  # fmt: skip


def planning(settings: Settings) -> Iterator[Row]:
    """Plans a second, of four iterations of 256 candidates and 12 steps."""
    config = CEMConfig(horizon=HORIZON, candidates=CANDIDATES, iterations=4)
    low, high = -torch.ones(ACTION), torch.ones(ACTION)
    with threads(1), torch.inference_mode():
        model = model_of("push_state").eval()
        score = score_from(model, model.initial(1))
        small = CEMConfig(horizon=HORIZON, candidates=LOOPED, iterations=4, elites=8)

        def looped(actions: Tensor) -> Tensor:
            return torch.cat([score(row[None]) for row in actions])

        found = pairs(settings, lambda: Planner(config, low, high).plan(score),
                      lambda: Planner(small, low, high).plan(looped), LOOPED / CANDIDATES)  # fmt: skip
        yield compared("plans (CEM, 4 x 256 candidates, 12 steps)", "plans/s", found, "a loop over candidates", ">= 5")


def deadlines(settings: Settings) -> Iterator[Row]:
    """How far past its deadline a plan comes, of plans that are given 50 ms for up to 100 iterations."""
    config = CEMConfig(horizon=HORIZON, candidates=CANDIDATES, iterations=100)
    count = 400 if settings.long else 100
    with threads(1), torch.inference_mode():
        model = model_of("push_state").eval()
        score = score_from(model, model.initial(1))
        planner = Planner(config, -torch.ones(ACTION), torch.ones(ACTION))
        plans = [planner.plan(score, passed=4, budget_s=BUDGET_S) for _ in range(count)]
    if any(not found.actions.isfinite().all() for found in plans):
        raise BenchmarkError("a plan is not finite")
    late = 1e3 * np.array([found.overrun_s for found in plans])
    yield measured("deadline overrun, 50 ms budget, p99", "ms", [float(np.percentile(late, 99))], "<= 5")
    yield measured("deadline overrun, 50 ms budget, p50", "ms", [float(np.percentile(late, 50))])
    yield measured("iterations within 50 ms", "iterations", [found.iterations for found in plans])


def training(settings: Settings) -> Iterator[Row]:
    """Training steps a second, whole steps of AdamW."""
    for name, recipe, rows, ticks in (("39 numbers, 16 x 32 ticks", "push_state", 16, 32),
                                      ("pictures, 4 x 16 ticks", "push_images", 4, 16)):  # fmt: skip
        with threads(1):
            model = model_of(recipe, CATEGORICAL)
            plain = PlainWorld(model)
            sizes = [sum(p.numel() for p in m.parameters()) for m in (model, plain)]
            if sizes[0] != sizes[1]:
                raise BenchmarkError(f"{recipe}: {sizes[0]} parameters, the peer has {sizes[1]}")
            batch = batch_of(model, rows, ticks)
            steps = [_trainer(model, lambda m=model, b=batch: m.loss(b)[0]),
                     _trainer(plain, lambda m=plain, b=batch: m.loss(b))]  # fmt: skip
            yield compared(f"training steps, {name}", "steps/s", pairs(settings, *steps), "plain PyTorch RSSM", ">= 1")


def _trainer(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()

    return step


BENCHMARKS: Suite = {"imagining": imagining, "planning": planning, "deadlines": deadlines, "training": training}
