"""Closed-loop evaluation in one process: the same messages, buffer, builder and policy as over ROS, without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_core.commands import decode, encode_frame
from vla_core.config import to_dict
from vla_core.evaluation.metrics import roughness, summarize
from vla_core.observation.messages import text
from vla_core.progress import Advance
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.execution import Execution
from vla_core.runtime.policy import Policy
from vla_core.sim.metaworld import MetaWorld


@dataclass(frozen=True)
class EpisodeResult:
    """Outcome of one episode, and how smooth it was.

    ``boundary_jumps``  at every new chunk, as :class:`~vla_core.runtime.execution_metrics.ExecutionMetrics` has it
    ``roughness``       largest norm of the commands' second difference, as a share of each action's range, from the
                        first chunk on
    """

    seed: int
    success: bool
    steps: int
    boundary_jumps: tuple[float, ...] = ()
    roughness: float = 0.0


PAUSE_NS = 1_000_000_000  # between two episodes on the simulated clock, which only ever moves forward


def run_episode(
    world: MetaWorld,
    core: PolicyCore,
    instruction: str,
    seed: int,
    max_steps: int,
    start_ns: int = 0,
    delay_steps: int = 0,
) -> EpisodeResult:
    """One episode from ``seed`` until success or ``max_steps`` control steps; its first tick is ``start_ns``.

    A chunk inferred at a tick comes into force ``delay_steps`` control steps later, while the world goes on with the
    older chunks; where none covers a tick any more, the contract's safe action is sent. 0 is lockstep.
    """
    contract = core.contract
    core.start_episode(start_ns)
    core.metrics.clear()
    world.reset(seed)
    if core.policy.spec.instruction:
        core.add(core.policy.spec.instruction, text(instruction), start_ns)
    sent: list[np.ndarray] = []  # from the first chunk's first command on
    step = -1
    for step in range(max_steps):
        stamp_ns = start_ns + step * contract.step_ns
        observed = world.observe_state(stamp_ns)
        if core.policy.spec.images and step % world.steps_per_frame == 0:
            observed += world.observe_camera(stamp_ns)
        for message in observed:
            for name in core.builder.by_topic.get(message.topic, ()):
                core.add(name, message.data, stamp_ns)
        if core.executor.due(stamp_ns):
            arrival_ns = stamp_ns + delay_steps * contract.step_ns
            core.infer(stamp_ns, lambda arrival_ns=arrival_ns: arrival_ns)  # type: ignore[misc]
        command = core.command(stamp_ns)
        safe = contract.safe_values(sent[-1] if sent else None)
        if safe is None:  # a robot that was sent nothing yet stands still
            safe = np.zeros(len(contract.action_names))
        values = safe if command is None else command.values
        if command is not None or sent:
            sent.append(values)
        # Through the bytes of the command message, as the robot would get it.
        frame = encode_frame(contract, stamp_ns, values)
        world.step(np.concatenate([decode(action, frame[action.topic])[0] for action in contract.actions.values()]))
        if world.success:
            break
    scale = contract.action_high - contract.action_low
    rough = roughness(np.reshape(sent, (-1, len(scale))) / scale)
    return EpisodeResult(seed, world.success, step + 1, tuple(core.metrics.values("boundary_jump")), rough)


def evaluate(
    world: MetaWorld,
    core: PolicyCore,
    instruction: str,
    seeds: Iterable[int],
    max_steps: int,
    progress: Callable[[EpisodeResult], None] = lambda result: None,
    delay_steps: int = 0,
) -> list[EpisodeResult]:
    """Run an episode per seed."""
    results, start_ns = [], 0
    for seed in seeds:
        result = run_episode(world, core, instruction, seed, max_steps, start_ns, delay_steps)
        start_ns += result.steps * core.contract.step_ns + PAUSE_NS
        progress(result)
        results.append(result)
    return results


def study(
    world: MetaWorld,
    policy: Policy,
    executions: Sequence[Execution],
    delays: Sequence[int],
    instruction: str,
    seeds: Sequence[int],
    max_steps: int,
    advance: Advance,
) -> list[dict[str, Any]]:
    """Figures and every episode for each execution at each delay, over the same seeds.

    Every run starts with nothing measured; RTC is told nothing of the delay that it will meet.
    """
    runs: list[dict[str, Any]] = []
    outcomes: list[bool] = []

    def note(result: EpisodeResult) -> None:
        outcomes.append(result.success)
        ran = outcomes[len(runs) * len(seeds) :]
        advance(len(outcomes), f"{sum(ran)} of {len(ran)} succeeded")

    for execution in executions:
        for delay in delays:
            results = evaluate(world, PolicyCore(policy, execution), instruction, seeds, max_steps, note, delay)
            runs.append({
                "execution": to_dict(execution), "delay_steps": delay, **summarize(results),
                "episodes": [_record(result) for result in results],
            })  # fmt: skip
    return runs


def _record(result: EpisodeResult) -> dict[str, Any]:
    jumps = result.boundary_jumps
    return {
        "seed": result.seed, "success": result.success, "steps": result.steps,
        "boundary_jump": float(np.mean(jumps)) if jumps else None, "roughness": result.roughness,
    }  # fmt: skip
