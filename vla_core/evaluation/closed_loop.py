"""Closed-loop evaluation in one process: the same messages, buffer, builder and policy as over ROS, without it.

An episode depends on its policy, world, instruction and seed alone, not on what was run before it: it can be run again
alone, in any order and in any process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_core.contract import NANOSECONDS, RobotContract, Safety
from vla_core.errors import VlaError
from vla_core.evaluation.metrics import roughness, summarize
from vla_core.observation.builder import Unobserved
from vla_core.observation.messages import Message, text
from vla_core.runtime.chunk_executor import ChunkExecutor
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.policy import Policy
from vla_core.sim.actuation import body_of
from vla_core.sim.base import Journey, View, World, details_of, instruction_now, is_over
from vla_core.sim.faults import Faults
from vla_core.sim.worlds import find, make_world, task_of

EPISODE_NS = 1000 * NANOSECONDS  # from one seed's first tick to the next one's
EPISODES = 2_000_000  # of them fit into the 32 bits that a stamp's seconds have
WATCHED_HZ = 25  # about as many pictures a second for people


@dataclass(frozen=True)
class EpisodeResult:
    """Outcome of one episode, and how smooth it was.

    ``score``           best in [0, 1], where the benchmark knows more than success
    ``boundary_jumps``  at every new chunk, as :class:`~vla_core.runtime.execution_metrics.ExecutionMetrics` has it; of
                        trajectories there are none: each begins where the robot is
    ``roughness``       largest norm of the commands' second difference, as a share of each action's range, from the
                        first chunk on; of a vehicle, those that its follower makes
    ``inference_ms``    wall time of each prediction
    ``refused``         ticks at which a stream was lost that the policy needs, and the robot was stopped
    ``details``         figures of the world's own, such as a drive's collisions
    ``said``            the instructions in their order, where the world says them itself
    """

    seed: int
    success: bool
    steps: int
    boundary_jumps: tuple[float, ...] = ()
    roughness: float = 0.0
    score: float | None = None
    inference_ms: tuple[float, ...] = ()
    refused: int = 0
    details: dict[str, float] = field(default_factory=dict)
    said: tuple[str, ...] = ()


def start_of(seed: int) -> int:
    """Stamp of the first tick of the episode of ``seed``, nanoseconds.

    Each seed has its own, because a policy's sampling noise follows from the stamps.
    """
    return (1 + seed % EPISODES) * EPISODE_NS


def watched_steps(contract: RobotContract) -> int:
    """Control steps from one picture for people to the next."""
    return max(1, round(contract.rate_hz / WATCHED_HZ))


def seen_by(policy: Policy) -> RobotContract:
    """The policy's contract with those observations alone that it sees: a world need not make the others.

    A vehicle keeps the odometry that its trajectories are followed by.
    """
    contract = policy.contract
    followed = [] if contract.following is None else [contract.following.odometry]
    observations = {name: contract.observations[name] for name in dict.fromkeys([*policy.spec.names, *followed])}
    any_of = tuple(name for name in contract.any_of if name in observations)
    return dataclasses.replace(contract, observations=observations, any_of=any_of, safety=Safety())


def run_episode(
    world: World,
    core: PolicyCore,
    instruction: str | None,
    seed: int,
    max_steps: int,
    start_ns: int | None = None,
    delay_steps: int = 0,
    watch: Callable[[np.ndarray], None] | None = None,
    faults: Faults | None = None,
    each_step: Callable[[World], None] | None = None,
) -> EpisodeResult:
    """One episode from ``seed`` until success, the world's own end, or ``max_steps`` control steps.

    A chunk inferred at a tick comes into force ``delay_steps`` control steps later, while the world goes on with the
    older chunks; where none covers a tick any more, the contract's safe action is sent. 0 is lockstep. A policy that
    refuses, since a stream is lost, stops the robot by the safe action until the stream is back.

    Args:
        instruction: None takes what the world says, and changes on the way.
        start_ns: stamp of the first tick; None takes the seed's own (:func:`start_of`).
        watch: is given a picture for people every :func:`watched_steps`, and a last one.
        faults: what is wrong with the sensors.
        each_step: is given the world after each control step, such as to note its reward.

    Raises:
        Unobserved: without faults the policy was refused at every tick: the world does not have what it needs.
    """
    contract = core.contract
    start_ns = start_of(seed) if start_ns is None else start_ns
    _forget(core, start_ns)
    world.reset(seed)
    body = body_of(world, contract, strict=faults is None)
    sensors = None if faults is None else faults.begin(start_ns)
    said: list[str] = []
    refused: list[Unobserved] = []
    step = -1
    for step in range(max_steps):
        stamp_ns = start_ns + step * contract.step_ns
        _say(core, instruction_now(world) if instruction is None else instruction, said, stamp_ns)
        pictures = _needs_pictures(world, core, stamp_ns, step, sensors is not None)
        messages = world.observe_state(stamp_ns) + (world.observe_camera(stamp_ns) if pictures else [])
        _observe(core, body.hear(messages if sensors is None else sensors.apply(messages, stamp_ns)), stamp_ns)
        refusal = _infer(core, stamp_ns, delay_steps)
        refused += [] if refusal is None else [refusal]
        values = body.obey(core.command(stamp_ns), stamp_ns, refusal is not None)
        if watch is not None and step % watched_steps(contract) == 0:
            if isinstance(world, Journey):
                world.watch_plan(body.plan(stamp_ns))
            watch(world.render_for_people())
        later = _needs_pictures(world, core, stamp_ns + contract.step_ns, step + 1, sensors is not None)
        world.step(values, pictures=later)
        if each_step is not None:
            each_step(world)
        if is_over(world):
            break
    if refused and faults is None and len(refused) == step + 1:
        raise refused[-1]
    if watch is not None:
        watch(world.render_for_people())
    return EpisodeResult(
        seed, world.success, step + 1, () if contract.plans else tuple(core.metrics.values("boundary_jump")),
        roughness(body.sent()), world.score, tuple(core.inference_ms), len(refused), details_of(world),
        tuple(said) if instruction is None else (),
    )  # fmt: skip


def _say(core: PolicyCore, words: str | None, said: list[str], stamp_ns: int) -> None:
    """Tell the policy what is said now; what was planned for other words is dropped, as the robot does."""
    if words is None:
        raise VlaError("this world says no instruction of its own; give one")
    if said and said[-1] == words:
        return
    if core.policy.spec.instruction:
        core.add(core.policy.spec.instruction, text(words), stamp_ns)
        if said:
            core.drop_plan(stamp_ns - 1)
    said.append(words)


def _infer(core: PolicyCore, stamp_ns: int, delay_steps: int) -> Unobserved | None:
    """A new chunk when one is due; where the policy refuses, its plan ends and the reason is returned."""
    if not core.executor.due(stamp_ns):
        return None
    arrival_ns = stamp_ns + delay_steps * core.contract.step_ns
    try:
        core.infer(stamp_ns, lambda: arrival_ns)
    except Unobserved as refusal:
        core.drop_plan(stamp_ns)
        return refusal
    return None


def _forget(core: PolicyCore, start_ns: int) -> None:
    """Nothing of an earlier episode is left, neither what was seen and planned nor what was measured."""
    core.executor = ChunkExecutor(core.executor.execution, core.metrics)
    core.forget()
    core.start_episode(start_ns)
    core.metrics.clear()
    core.inference_ms.clear()


def _observe(core: PolicyCore, messages: Iterable[Message], stamp_ns: int) -> None:
    for message in messages:
        for name in core.builder.by_topic.get(message.topic, ()):
            core.add(name, message.data, stamp_ns)


def _needs_pictures(world: World, core: PolicyCore, stamp_ns: int, step: int, faulty: bool) -> bool:
    """Whether the policy may ever see the pictures of this tick.

    With a new picture at every tick, no memory of older ones and no ``faulty`` sensors that bring back an older one,
    only those count from which a chunk is inferred.
    """
    spec = core.policy.spec
    if not spec.images or step % world.steps_per_frame:
        return False
    return world.steps_per_frame > 1 or spec.history > 1 or faulty or core.executor.due(stamp_ns)


def evaluate(
    world: World,
    core: PolicyCore,
    instruction: str | None,
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
        world_name: such as ``push-v3``, ``libero_spatial:3`` or ``driving:mixed``; the instruction is the world's own.
        max_steps: None takes the task's own.
    """
    task = task_of(world_name)
    camera = policy.provenance.get("camera") if find(world_name)[0].chooses_camera else None
    world = make_world(world_name, seen_by(policy), View(camera=camera))
    try:
        words = None if isinstance(world, Journey) else task.instruction
        results = evaluate(world, PolicyCore(policy), words, seeds, max_steps or task.max_steps)
    finally:
        world.close()
    return summarize(results)
