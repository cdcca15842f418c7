"""Closed-loop evaluation in one process: the same messages, buffer, builder and policy as over ROS, without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vla_core.observation.decode import decode_action
from vla_core.observation.messages import command as command_bytes
from vla_core.observation.messages import text
from vla_core.runtime.core import PolicyCore
from vla_core.sim.metaworld import MetaWorld


@dataclass(frozen=True)
class EpisodeResult:
    """Outcome of one episode."""

    seed: int
    success: bool
    steps: int


PAUSE_NS = 1_000_000_000  # between two episodes on the simulated clock, which only ever moves forward


def run_episode(
    world: MetaWorld, core: PolicyCore, instruction: str, seed: int, max_steps: int, start_ns: int = 0
) -> EpisodeResult:
    """One episode from ``seed`` until success or ``max_steps`` control steps; its first tick is ``start_ns``."""
    contract = core.contract
    core.start_episode(start_ns)
    world.reset(seed)
    if core.policy.spec.instruction:
        core.add(core.policy.spec.instruction, text(instruction), start_ns)
    for step in range(max_steps):
        stamp_ns = start_ns + step * contract.step_ns
        observed = world.observe_state(stamp_ns)
        if core.policy.spec.images and step % world.steps_per_frame == 0:
            observed += world.observe_camera(stamp_ns)
        for message in observed:
            for name in core.builder.by_topic.get(message.topic, ()):
                core.add(name, message.data, stamp_ns)
        command = core.step(stamp_ns)
        # Through the bytes of the command message, as the robot would get it.
        world.step(decode_action(contract.action, command_bytes(contract.action, stamp_ns, command.values)))
        if world.success:
            return EpisodeResult(seed, True, step + 1)
    return EpisodeResult(seed, False, max_steps)


def evaluate(
    world: MetaWorld,
    core: PolicyCore,
    instruction: str,
    seeds: Iterable[int],
    max_steps: int,
    progress: Callable[[EpisodeResult], None] = lambda result: None,
) -> list[EpisodeResult]:
    """Run an episode per seed."""
    results, start_ns = [], 0
    for seed in seeds:
        result = run_episode(world, core, instruction, seed, max_steps, start_ns)
        start_ns += result.steps * core.contract.step_ns + PAUSE_NS
        progress(result)
        results.append(result)
    return results
