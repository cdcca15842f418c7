"""Chunk execution under latency, without simulator and without training: a point that has to pass an obstacle.

A point of first-order velocity dynamics goes from left to right; a disc is in its way, and both ways round it are
right. The policy is a Gaussian mixture over chunks whose two components are the two ways from where the point was
observed; its denoiser is known in closed form and stands in for the network of a flow or diffusion head, so that
sampling and guidance run through the code that runs on robots. What it makes of a chunk that comes late is thus
owed to the execution strategy alone: naive execution flips between the ways, averaging goes through the middle.

Time is simulated: latencies are numbers, and a run repeats exactly for a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vla_core.evaluation.metrics import roughness, summarize
from vla_core.model.action_head.base import ActionHeadBase
from vla_core.model.action_head.diffusion_action_head import DiffusionActionHead, DiffusionHeadConfig
from vla_core.model.action_head.flow_action_head import FlowActionHead, FlowHeadConfig
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.tokens import Tokens, masked_mean, present
from vla_core.runtime.chunk import ActionChunk, Continuation
from vla_core.runtime.chunk_executor import ChunkExecutor
from vla_core.runtime.execution import STRATEGIES, Execution
from vla_core.runtime.execution_metrics import ExecutionMetrics
from vla_core.threads import one_thread

STEP_NS = 20_000_000  # 50 Hz
STEP_S = STEP_NS / 1e9
HORIZON = 50  # 1 s
SPEED = 1.0  # m/s, of every plan
LIMIT = 1.5  # m/s, of every command entry
LAG_S = 0.06  # time constant of the point's velocity
START, GOAL = np.array([-1.5, 0.0]), np.array([1.5, 0.0])
RADIUS = 0.3  # m, of the disc at the origin
WAYPOINT = 0.5  # m, above or below the disc
REACHED = 0.15  # m
MAX_STEPS = 300
SPREAD, SMOOTH_ROWS, JITTER_SHARE = 0.15, 8.0, 0.1  # of the chunks of one way: m/s, rows, share of white noise
PREFERENCE = 8.0  # 1/m: how fast the point's side makes up the policy's mind
HeadKind = Literal["flow", "diffusion"]


class MixtureDenoiser(nn.Module):
    """The exact denoiser of x = signal a + noise epsilon for a ~ sum_k p_k N(mean_k, C), in a network's place.

    ``C`` (H, H) is the covariance over rows, the same for each action entry. Per component the clean chunk's
    expectation is mean + signal C (signal^2 C + noise^2 I)^-1 (x - signal mean); the mixture weighs it with the
    posterior probability of the component. The context holds the means and the logarithms of p.
    """

    def __init__(self, covariance: np.ndarray, levels: Callable[[float], tuple[float, float]], velocity: bool) -> None:
        super().__init__()
        variances, basis = np.linalg.eigh(covariance)
        self.variances = torch.from_numpy(np.maximum(variances, 0.0)).float()  # (H,)
        self.basis = torch.from_numpy(basis).float()  # (H, H), columns
        self.levels, self.velocity = levels, velocity

    def remember(self, context: Tokens) -> Tensor:
        """The one token that the context is."""
        return masked_mean(context)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """``x_t`` (B, H, A), ``t`` (B,), ``context`` (B, 2 H A + 2): the velocity, or the clean chunk."""
        batch, rows, width = x_t.shape
        signal, noise = self.levels(float(t[0]))
        means = context[:, :-2].view(batch, 2, rows, width)
        total = signal**2 * self.variances + noise**2  # (H,)
        offset = self.basis.T @ (x_t[:, None] - signal * means)  # (B, 2, H, A)
        log_likelihood = -0.5 * (offset.square() / total[:, None]).sum(dim=(2, 3))  # C is the same in both
        share = (context[:, -2:] + log_likelihood).softmax(dim=1)
        clean = means + self.basis @ ((signal * self.variances / total)[:, None] * offset)
        expected: Tensor = (share[:, :, None, None] * clean).sum(dim=1)
        return (x_t - expected) / t[:, None, None] if self.velocity else expected


def make_head(kind: HeadKind, covariance: np.ndarray, steps: int = 5) -> ActionHeadBase:
    """A head whose denoiser is the exact one of the mixture; actions are (H, 2)."""
    sizes = {"horizon": len(covariance), "action_dim": 2, "context_dim": 4 * len(covariance) + 2}
    if kind == "flow":
        flow = FlowActionHead(FlowHeadConfig(inference_steps=steps), **sizes)
        flow.denoiser = MixtureDenoiser(covariance, lambda t: (1 - t, t), velocity=True)  # type: ignore[assignment]
        return flow
    config = DiffusionHeadConfig(inference_steps=steps, prediction="sample", clip_sample=None)
    diffusion = DiffusionActionHead(config, **sizes)
    schedule = diffusion.schedule
    diffusion.denoiser = MixtureDenoiser(  # type: ignore[assignment]
        covariance, lambda t: schedule.signal_and_noise(int(t)), velocity=False
    )
    return diffusion


def chunk_covariance(rows: int = HORIZON) -> np.ndarray:
    """Covariance (H, H) of a chunk round its mean, (m/s)^2: smooth over rows, with a share of white noise."""
    distance = np.arange(rows)[:, None] - np.arange(rows)[None, :]
    smooth = np.exp(-0.5 * (distance / SMOOTH_ROWS) ** 2)
    covariance: np.ndarray = SPREAD**2 * ((1 - JITTER_SHARE) * smooth + JITTER_SHARE * np.eye(rows))
    return covariance


def plan(position: np.ndarray, side: int, rows: int = HORIZON) -> np.ndarray:
    """Velocities (H, 2) of the way from ``position`` round the disc on ``side`` (+1 above, -1 below) to the goal."""
    place, out = position.astype(float), np.zeros((rows, 2))
    for k in range(rows):
        # Beside the disc the way is along its side; the goal is in sight once it is passed.
        target = np.array([RADIUS, side * WAYPOINT]) if place[0] < RADIUS else GOAL
        if place[0] < -RADIUS - 0.2:
            target = np.array([-RADIUS, side * WAYPOINT])
        towards = target - place
        distance = float(np.linalg.norm(towards))
        out[k] = towards / max(distance, SPEED * STEP_S) * SPEED if distance > 1e-9 else 0.0
        place = place + STEP_S * out[k]
    return out


def context_for(position: np.ndarray) -> Tensor:
    """The denoiser's context (1, 2 H A + 2): both ways, and how likely the policy takes each."""
    means = np.stack([plan(position, 1), plan(position, -1)])
    logit = PREFERENCE * position[1] if position[0] < RADIUS else 0.0
    return torch.from_numpy(np.concatenate([means.ravel(), [logit / 2, -logit / 2]])).float()[None]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time from an observation to its chunk: uniform in ``ms`` times 1 ± ``jitter``."""

    ms: float
    jitter: float = 0.2

    def draw_ns(self, rng: np.random.Generator) -> int:
        """One chunk's latency, nanoseconds."""
        return round(1e6 * self.ms * (1 + self.jitter * rng.uniform(-1, 1)))


@dataclass(frozen=True)
class Trial:
    """One passage."""

    success: bool
    boundary_jumps: tuple[float, ...]
    roughness: float


def run_trial(head: ActionHeadBase, execution: Execution, latency: Latency, seed: int) -> Trial:
    """One passage from the start: success is the goal reached without touching the disc.

    Until the first chunk, and where none covers a tick, the point is told to stand still.
    """
    rng = np.random.default_rng(seed)
    low, high = np.full(2, -LIMIT), np.full(2, LIMIT)
    metrics = ExecutionMetrics(low, high)
    executor = ChunkExecutor(execution, metrics)
    position, velocity = START + rng.normal(0, [0.02, 0.05]), np.zeros(2)
    sent: list[np.ndarray] = []
    success = False
    for step in range(MAX_STEPS):
        now_ns = step * STEP_NS
        if executor.due(now_ns):
            chunk = _sample(head, position, now_ns, executor.continuation(now_ns), seed)
            executor.push(chunk, now_ns + latency.draw_ns(rng))
        found = executor.action(now_ns)
        command = np.zeros(2) if found is None else np.clip(found[0], low, high)
        if found is not None or sent:  # smoothness is asked of what follows the first chunk
            sent.append(command)
        velocity = command + (velocity - command) * math.exp(-STEP_S / LAG_S)
        position = position + STEP_S * velocity
        if np.linalg.norm(position) < RADIUS:
            break
        if np.linalg.norm(position - GOAL) < REACHED:
            success = True
            break
    return Trial(success, tuple(metrics.values("boundary_jump")), roughness(np.reshape(sent, (-1, 2)) / (high - low)))


@torch.no_grad()
def _sample(head: ActionHeadBase, position: np.ndarray, now_ns: int, continues: Continuation | None,
            seed: int) -> ActionChunk:  # fmt: skip
    noise = int(np.random.SeedSequence([seed, now_ns]).generate_state(1)[0])
    prefix = None
    if continues is not None:
        prefix = ChunkPrefix(
            actions=torch.from_numpy(continues.actions).float(), weights=torch.from_numpy(continues.weights).float(),
            frozen=continues.frozen, max_guidance=continues.max_guidance,
        )  # fmt: skip
    chunk = head.predict(present(context_for(position)), torch.Generator().manual_seed(noise), prefix)[0]
    return ActionChunk(now_ns, STEP_NS, chunk.numpy().astype(np.float64), continues)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is compared: every strategy at every latency, over the same seeds."""

    strategies: tuple[str, ...] = STRATEGIES
    latencies_ms: tuple[float, ...] = (0.0, 100.0, 200.0, 300.0, 500.0)
    jitter: float = 0.2
    trials: int = 20
    seed: int = 0
    head: HeadKind = "flow"
    steps: int = 10


@one_thread()
def bench(
    options: BenchOptions, progress: Callable[[int, str], None] = lambda done, note: None
) -> list[dict[str, Any]]:
    """A row per strategy and latency: success with its 95 % interval (Wilson), boundary jump and roughness."""
    head = make_head(options.head, chunk_covariance())
    rows: list[dict[str, Any]] = []
    for strategy in options.strategies:
        execution = Execution().changed({"strategy": strategy, "steps": options.steps, "blend_steps": 8})
        for ms in options.latencies_ms:
            latency = Latency(ms=ms, jitter=options.jitter)
            trials = [run_trial(head, execution, latency, options.seed + i) for i in range(options.trials)]
            rows.append({"strategy": strategy, "latency_ms": ms, "jitter": options.jitter, **summarize(trials)})
            progress(len(rows), f"{strategy} at {ms:g} ms: {rows[-1]['success_rate']:.2f}")
    return rows
