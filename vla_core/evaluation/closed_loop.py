"""Closed-loop evaluation in one process: the same messages, buffer, builder and policy as over ROS, without it.

An episode depends on its policy, world, instruction and seed alone, not on what was run before it: it can be run again
alone, in any order and in any process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_core.commands import decode, encode_frame
from vla_core.contract import NANOSECONDS, RobotContract, Safety
from vla_core.evaluation.metrics import roughness, summarize
from vla_core.observation.messages import text
from vla_core.runtime.chunk_executor import ChunkExecutor
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.policy import Policy
from vla_core.sim.base import View, World
from vla_core.sim.worlds import find, make_world, task_of

EPISODE_NS = 1000 * NANOSECONDS  # from one seed's first tick to the next one's
EPISODES = 2_000_000  # of them fit into the 32 bits that a stamp's seconds have
WATCHED_HZ = 25  # about as many pictures a second for people


@dataclass(frozen=True)
class EpisodeResult:
    """Outcome of one episode, and how smooth it was.

    ``score``           best in [0, 1], where the benchmark knows more than success
    ``boundary_jumps``  at every new chunk, as :class:`~vla_core.runtime.execution_metrics.ExecutionMetrics` has it
    ``roughness``       largest norm of the commands' second difference, as a share of each action's range, from the
                        first chunk on
    ``inference_ms``    wall time of each prediction
    """

    seed: int
    success: bool
    steps: int
    boundary_jumps: tuple[float, ...] = ()
    roughness: float = 0.0
    score: float | None = None
    inference_ms: tuple[float, ...] = ()


def start_of(seed: int) -> int:
    """Stamp of the first tick of the episode of ``seed``, nanoseconds.

    Each seed has its own, because a policy's sampling noise follows from the stamps.
    """
    return (1 + seed % EPISODES) * EPISODE_NS


def watched_steps(contract: RobotContract) -> int:
    """Control steps from one picture for people to the next."""
    return max(1, round(contract.rate_hz / WATCHED_HZ))


def seen_by(policy: Policy) -> RobotContract:
    """The policy's contract with those observations alone that it sees: a world need not make the others."""
    contract = policy.contract
    observations = {name: contract.observations[name] for name in policy.spec.names}
    return dataclasses.replace(contract, observations=observations, safety=Safety())


def run_episode(
    world: World,
    core: PolicyCore,
    instruction: str,
    seed: int,
    max_steps: int,
    start_ns: int | None = None,
    delay_steps: int = 0,
    watch: Callable[[np.ndarray], None] | None = None,
) -> EpisodeResult:
    """One episode from ``seed`` until success or ``max_steps`` control steps.

    A chunk inferred at a tick comes into force ``delay_steps`` control steps later, while the world goes on with the
    older chunks; where none covers a tick any more, the contract's safe action is sent. 0 is lockstep.

    Args:
        start_ns: stamp of the first tick; None takes the seed's own (:func:`start_of`).
        watch: is given a picture for people every :func:`watched_steps`, and a last one.
    """
    contract = core.contract
    start_ns = start_of(seed) if start_ns is None else start_ns
    _forget(core, start_ns)
    world.reset(seed)
    if core.policy.spec.instruction:
        core.add(core.policy.spec.instruction, text(instruction), start_ns)
    sent: list[np.ndarray] = []  # from the first chunk's first command on
    step = -1
    for step in range(max_steps):
        stamp_ns = start_ns + step * contract.step_ns
        _observe(world, core, stamp_ns, step)
        if watch is not None and step % watched_steps(contract) == 0:
            watch(world.render_for_people())
        if core.executor.due(stamp_ns):
            arrival_ns = stamp_ns + delay_steps * contract.step_ns
            core.infer(stamp_ns, lambda arrival_ns=arrival_ns: arrival_ns)  # type: ignore[misc]
        command = core.command(stamp_ns)
        safe = contract.safe_values(sent[-1] if sent else None)
        if safe is None:  # a robot that was sent nothing yet stays where it is
            safe = world.rest()
        values = safe if command is None else command.values
        if command is not None or sent:
            sent.append(values)
        # Through the bytes of the command message, as the robot would get it.
        frame = encode_frame(contract, stamp_ns, values)
        values = np.concatenate([decode(action, frame[action.topic])[0] for action in contract.actions.values()])
        world.step(values, pictures=_needs_pictures(world, core, stamp_ns + contract.step_ns, step + 1))
        if world.success:
            break
    if watch is not None:
        watch(world.render_for_people())
    scale = contract.action_high - contract.action_low
    return EpisodeResult(
        seed, world.success, step + 1, tuple(core.metrics.values("boundary_jump")),
        roughness(np.reshape(sent, (-1, len(scale))) / scale), world.score, tuple(core.inference_ms),
    )  # fmt: skip


def _forget(core: PolicyCore, start_ns: int) -> None:
    """Nothing of an earlier episode is left, neither what was seen and planned nor what was measured."""
    core.executor = ChunkExecutor(core.executor.execution, core.metrics)
    core.forget()
    core.start_episode(start_ns)
    core.metrics.clear()
    core.inference_ms.clear()


def _observe(world: World, core: PolicyCore, stamp_ns: int, step: int) -> None:
    observed = world.observe_state(stamp_ns)
    if _needs_pictures(world, core, stamp_ns, step):
        observed += world.observe_camera(stamp_ns)
    for message in observed:
        for name in core.builder.by_topic.get(message.topic, ()):
            core.add(name, message.data, stamp_ns)


def _needs_pictures(world: World, core: PolicyCore, stamp_ns: int, step: int) -> bool:
    """Whether the policy may ever see the pictures of this tick.

    With a new picture at every tick and no memory of older ones, only those count from which a chunk is inferred.
    """
    spec = core.policy.spec
    if not spec.images or step % world.steps_per_frame:
        return False
    return world.steps_per_frame > 1 or spec.history > 1 or core.executor.due(stamp_ns)


def evaluate(
    world: World,
    core: PolicyCore,
    instruction: str,
    seeds: Iterable[int],
    max_steps: int,
    progress: Callable[[EpisodeResult], None] = lambda result: None,
    delay_steps: int = 0,
) -> list[EpisodeResult]:
    """Run an episode per seed."""
    results = []
    for seed in seeds:
        results.append(run_episode(world, core, instruction, seed, max_steps, delay_steps=delay_steps))
        progress(results[-1])
    return results


def closed_loop_success(
    policy: Policy, world_name: str, seeds: Iterable[int], max_steps: int | None = None
) -> dict[str, Any]:
    """Success of a policy in memory, in this process: ``trials``, ``successes``, ``success_rate``, ``success_ci95`` …

    Args:
        world_name: such as ``push-v3`` or ``libero_spatial:3``; the instruction is the task's own.
        max_steps: None takes the task's own.
    """
    task = task_of(world_name)
    camera = policy.checkpoint.config.provenance.get("camera") if find(world_name)[0].chooses_camera else None
    world = make_world(world_name, seen_by(policy), View(camera=camera))
    try:
        results = evaluate(world, PolicyCore(policy), task.instruction, seeds, max_steps or task.max_steps)
    finally:
        world.close()
    return summarize(results)
