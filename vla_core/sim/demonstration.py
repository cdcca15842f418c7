"""One episode of a world's expert, or of a policy that the expert labels, as a bag: see :mod:`vla_core.sim.collect`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.commands import decode, encode
from vla_core.config import ConfigError
from vla_core.contract import NANOSECONDS, Action, RobotContract
from vla_core.data.bag import CONTRACT_KEY, BagWriter
from vla_core.data.episodes import EPISODE_STATES, EPISODE_TOPIC, EPISODE_TYPE
from vla_core.data.happened import EXECUTED_PREFIX, REWARD_TOPIC, REWARD_TYPE
from vla_core.data.recording import DROPPED_KEY
from vla_core.observation import messages
from vla_core.observation.builder import Unobserved
from vla_core.observation.messages import Message
from vla_core.sim.actuation import Follower
from vla_core.sim.base import HasExpert, HasReward, Journey, SimulationError, View, World, instruction_now, is_over
from vla_core.sim.instructions import Split, instructions
from vla_core.sim.metaworld import LONGEST_EPISODE
from vla_core.sim.noise import Disturbance, Noise
from vla_core.sim.worlds import SIM_REGISTRY, find, make_world, task_of

START_NS = NANOSECONDS  # simulated time starts after zero, which ROS reads as "no time yet"
EXECUTED = EXECUTED_PREFIX
STRING = "std_msgs/msg/String"
STATES = {name: state for state, name in EPISODE_STATES.items()}


@dataclass(frozen=True, kw_only=True)
class Driver:
    """A checkpoint that drives instead of the expert.

    ``beta`` is the share of segments of ``segment_steps`` control steps that the expert drives all the same.
    """

    checkpoint: str
    beta: float = 0.5
    segment_steps: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"beta: expected 0 to 1, found {self.beta}")
        if self.segment_steps < 1:
            raise ConfigError(f"segment_steps: expected at least 1, found {self.segment_steps}")


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What is collected: ``episodes`` of each task, from seeds ``seed`` on.

    ``tasks`` name worlds, such as ``push-v3`` or ``driving:mixed``. The sentences ``instructions`` of a task take turns
    over its episodes, unless ``instruction`` says something else, or the world says them itself. ``camera``,
    ``camera_size`` and ``max_steps``: None takes the world's own. ``rewards`` records the world's reward of each step.
    """

    tasks: tuple[str, ...] = ("push-v3",)
    episodes: int = 50
    seed: int = 0
    camera: str | None = None
    camera_size: int | None = None
    images: bool = True
    instruction: str | None = None
    instructions: Split = "canonical"
    max_steps: int | None = None
    noise: Noise | None = None
    driver: Driver | None = None
    rewards: bool = False

    def __post_init__(self) -> None:
        for name, least in (("episodes", 1), ("seed", 0), ("camera_size", 16), ("max_steps", 1)):
            found = getattr(self, name)
            if found is not None and found < least:
                raise ConfigError(f"{name}: expected at least {least}, found {found}")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"tasks: expected distinct tasks, at least one, found {list(self.tasks)}")


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One episode: its bag and how it ended."""

    bag: Path
    task: str
    seed: int
    success: bool
    steps: int


@dataclass(frozen=True)
class Job:
    """One episode to record, the ``index``-th of its task."""

    bag: Path
    task: str
    index: int


def expert_world(task: str, collection: Collection, contract: RobotContract) -> World:
    """The task's world; raises :class:`SimulationError` for one without an expert."""
    if find(task)[0] is SIM_REGISTRY["metaworld"] and (collection.max_steps or 0) > LONGEST_EPISODE:
        raise ConfigError(f"max_steps: {task} ends after {LONGEST_EPISODE}, found {collection.max_steps}")
    world = make_world(task, contract, View(camera=collection.camera, size=collection.camera_size))
    if not isinstance(world, HasExpert):
        world.close()
        raise SimulationError(f"{task}: nobody in this world knows what is right; demonstrations need one with an "
                              "expert, such as push-v3 or driving:mixed")  # fmt: skip
    if collection.rewards and not isinstance(world, HasReward):
        world.close()
        raise SimulationError(f"{task}: this world knows no reward; collect without, and train the world model with "
                              "rewards from outcomes or from a success classifier")  # fmt: skip
    return world


def sentences(task: str, collection: Collection) -> tuple[str, ...]:
    """What is said in a task's episodes, in turns."""
    if collection.instruction is not None:
        return (collection.instruction,)
    simulator, name = find(task)
    if simulator is SIM_REGISTRY["metaworld"]:
        return instructions(name, collection.instructions)
    if collection.instructions != "canonical":
        raise SimulationError(f"{task} has no paraphrases: expected the instructions canonical, found "
                              f"{collection.instructions!r}")  # fmt: skip
    return (task_of(task).instruction,)


def obeyed_action(contract: RobotContract) -> Action:
    """The commands that the robot obeys."""
    (action,) = contract.actions.values()  # the world has checked that it is one
    return action if contract.following is None else contract.following.command


class Demonstrator:
    """Runs episodes; keeps the simulator of the newest task."""

    def __init__(self, collection: Collection, contract: RobotContract) -> None:
        self._collection, self._contract = collection, contract
        (self._action,) = contract.actions.values()
        self._obeyed = obeyed_action(contract)
        self._core = None if collection.driver is None else _load_core(collection.driver, contract)
        self._world: tuple[str, World] | None = None

    def close(self) -> None:
        if self._world is not None:
            self._world[1].close()
            self._world = None

    def run(self, job: Job) -> Collected:
        """One episode into ``job.bag``; a bag that an error cut short is deleted."""
        world = self._load(job.task)
        seed = self._collection.seed + job.index
        world.reset(seed)
        told = sentences(job.task, self._collection)
        own = None if self._collection.instruction is not None else instruction_now(world)
        instruction = own or told[job.index % len(told)]
        job.bag.parent.mkdir(exist_ok=True)
        metadata = {CONTRACT_KEY: self._contract.to_yaml(), "instruction": instruction, "task": job.task,
                    "seed": str(seed), DROPPED_KEY: "{}"}  # fmt: skip
        try:
            with BagWriter(job.bag, metadata) as writer:
                steps = self._episode(writer, world, job, seed, instruction)
                writer.set_metadata("outcome", "succeeded" if world.success else "failed")
        except BaseException:
            shutil.rmtree(job.bag, ignore_errors=True)
            raise
        return Collected(bag=job.bag, task=job.task, seed=seed, success=world.success, steps=steps)

    def _load(self, task: str) -> World:
        if self._world is None or self._world[0] != task:
            self.close()
            self._world = task, expert_world(task, self._collection, self._contract)
        return self._world[1]

    def _episode(self, writer: BagWriter, world: World, job: Job, seed: int, instruction: str) -> int:
        """Drive until the end or ``max_steps``, writing what a recorder would hear; returns the steps taken."""
        options, step_ns = self._collection, self._contract.step_ns
        most = options.max_steps or task_of(job.task).max_steps
        mark = {"index": job.index, "seed": seed, "task": job.task, "instruction": instruction}
        self._declare(writer)
        writer.write(EPISODE_TOPIC, START_NS, _mark("started", START_NS, steps=0, **mark))
        extra = _Extra(writer, world)
        extra.write_statics()
        # Of its own generator: the simulator's must give the same episode with and without noise.
        rng = np.random.default_rng([seed, 1])
        disturbance = Disturbance(options.noise, self._obeyed, rng)
        body = None if self._contract.following is None else Follower(self._contract)
        driver = None if self._core is None else _Drive(self._core, options.driver, rng)
        said, step, stamp_ns = "", 0, START_NS
        while step < most and not is_over(world):
            stamp_ns = START_NS + step * step_ns
            now = instruction if options.instruction is not None else instruction_now(world) or instruction
            if now != said:
                said = now
                self._say(writer, driver, now, stamp_ns)
            observed = world.observe_state(stamp_ns)
            if step % world.steps_per_frame == 0:
                observed += world.observe_camera(stamp_ns)
            for message in sorted(observed, key=lambda message: message.stamp_ns):
                writer.write(message.topic, message.stamp_ns, message.data)  # which comes when it was measured
            extra.write_truth(stamp_ns)
            assert isinstance(world, HasExpert), "it was checked when it was made"
            label = encode(self._action, stamp_ns, world.expert_rows(), self._contract.chunk_step_ns)
            writer.write(self._action.topic, stamp_ns, label)
            values = self._drive(body, driver, observed, label, stamp_ns, step)
            if body is not None:
                self._write(writer, self._obeyed.topic, stamp_ns, values)
            values = disturbance.on(values)
            if self._records_executed:
                self._write(writer, EXECUTED + self._obeyed.topic, stamp_ns, values)
            world.step(values)
            if options.rewards:
                assert isinstance(world, HasReward), "it was checked when it was made"
                writer.write(REWARD_TOPIC, stamp_ns, messages.serialize(REWARD_TYPE, _float64(world.reward)))
            step += 1
        state = "succeeded" if world.success else "failed"
        writer.write(EPISODE_TOPIC, stamp_ns, _mark(state, stamp_ns, steps=step, **mark))
        return step

    def _drive(self, body: Follower | None, driver: _Drive | None, observed: list[Message], label: bytes,
               stamp_ns: int, step: int) -> np.ndarray:  # fmt: skip
        """The command (A,) of whoever drives, by way of the follower where there is one."""
        expert = decode(self._action, label)  # through the bytes of the message, as the robot gets it
        if body is not None:
            body.hear(observed)
        if driver is None or driver.expert_drives(observed, stamp_ns, step):
            if body is None:
                return expert[0]
            body.follow(expert, stamp_ns)
            return body.drive(stamp_ns)
        command = driver.command(stamp_ns, refuses=body is not None)
        if body is None:
            return np.asarray(command.values)
        return body.obey(command, stamp_ns, command is None)

    def _say(self, writer: BagWriter, driver: _Drive | None, words: str, stamp_ns: int) -> None:
        for stream in self._contract.observations.values():
            if stream.latched and stream.type == STRING:
                writer.write(stream.topic, stamp_ns, messages.text(words))
        if driver is not None:
            driver.say(words, stamp_ns)

    def _write(self, writer: BagWriter, topic: str, stamp_ns: int, values: np.ndarray) -> None:
        writer.write(topic, stamp_ns, encode(self._obeyed, stamp_ns, values[None], self._contract.step_ns))

    @property
    def _records_executed(self) -> bool:
        return self._collection.noise is not None or self._collection.driver is not None

    def _declare(self, writer: BagWriter) -> None:
        for stream in {s.topic: s for s in self._contract.observations.values()}.values():
            writer.add_topic(stream.topic, stream.type, stream.latched)
        writer.add_topic(self._action.topic, self._action.type)
        if self._obeyed is not self._action:
            writer.add_topic(self._obeyed.topic, self._obeyed.type)
        if self._records_executed:
            writer.add_topic(EXECUTED + self._obeyed.topic, self._obeyed.type)
        if self._collection.rewards:
            writer.add_topic(REWARD_TOPIC, REWARD_TYPE)
        writer.add_topic(EPISODE_TOPIC, EPISODE_TYPE, True)


class _Extra:
    """What a world tells beside the contract's streams: where its sensors are, and the truth for scores."""

    def __init__(self, writer: BagWriter, world: World) -> None:
        self._writer = writer
        self._world = world if isinstance(world, Journey) else None
        self._known: set[str] = set()

    def write_statics(self) -> None:
        if self._world is not None:
            self._write(self._world.statics(START_NS), START_NS, latched=True)

    def write_truth(self, stamp_ns: int) -> None:
        if self._world is not None:
            self._write(self._world.ground_truth(stamp_ns), stamp_ns, latched=False)

    def _write(self, found: Sequence[Message], stamp_ns: int, latched: bool) -> None:
        for message in found:
            if message.topic not in self._known:
                self._known.add(message.topic)
                self._writer.add_topic(message.topic, message.type, latched)
            self._writer.write(message.topic, stamp_ns, message.data)


class _Drive:
    """One episode of a policy that the expert takes over from in some segments."""

    def __init__(self, core: Any, driver: Driver | None, rng: np.random.Generator) -> None:
        assert driver is not None
        self._core, self._driver, self._rng = core, driver, rng
        self._expert_drives = True
        core.start_episode(START_NS)

    def say(self, words: str, stamp_ns: int) -> None:
        """Tell the policy; what it planned for other words is dropped."""
        core = self._core
        if core.policy.spec.instruction:
            core.add(core.policy.spec.instruction, messages.text(words), stamp_ns)
            core.drop_plan(stamp_ns - 1)

    def expert_drives(self, observed: list[Message], stamp_ns: int, step: int) -> bool:
        """Whether the expert has this tick; the policy sees it all the same."""
        core = self._core
        for message in observed:
            for name in core.builder.by_topic.get(message.topic, ()):
                core.add(name, message.data, stamp_ns)
        if step % self._driver.segment_steps == 0:
            self._expert_drives = self._rng.random() < self._driver.beta
            core.drop_plan(stamp_ns - 1)
        return self._expert_drives

    def command(self, stamp_ns: int, refuses: bool) -> Any:
        """The policy's command; None where it refuses, if it may: a vehicle is braked then."""
        try:
            return self._core.step(stamp_ns)
        except Unobserved:
            if not refuses:
                raise
            self._core.drop_plan(stamp_ns)
            return None


def _load_core(driver: Driver, contract: RobotContract) -> Any:
    """The policy as the robot would run it; its contract must be the robot's."""
    from vla_core.runtime.core import PolicyCore
    from vla_core.runtime.loading import load_policy

    policy = load_policy(driver.checkpoint)
    policy.contract.check_same(contract, str(driver.checkpoint), "the robot")
    return PolicyCore(policy)


def _float64(value: float) -> Any:
    return messages.typestore().types[REWARD_TYPE](data=float(value))


def _mark(state: str, stamp_ns: int, **fields: Any) -> bytes:
    cls = messages.typestore().types[EPISODE_TYPE]
    return messages.serialize(EPISODE_TYPE, cls(header=messages.header(stamp_ns), state=STATES[state], **fields))
