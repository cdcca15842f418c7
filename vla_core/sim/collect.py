"""Demonstrations of the scripted expert, in process: one rosbag2 bag an episode, as the recorder node writes them.

The messages are those of a recorded lockstep run of ``simulator_node``: the contract's observations, the instruction,
the episode's marks and, on the command topic, **the label: what the expert would do in this state**. What the robot
really executed is the label too, unless something else was asked for. Then it is on ``executed/<command topic>`` as
well, which no converter takes for the label:

- perturbed demonstrations (``Noise``): bursts of a disturbance are added to what is executed, so that the data holds
  states beside the expert's way, and how it comes back from them (DART, Laskey et al. 2017);
- a policy that drives (``Driver``): the data holds the states that the policy reaches, labelled by the expert
  (DAgger, Ross et al. 2011). Episodes that it fails are marked as failed; convert them with ``--keep-failed``.

The expert is asked once a tick whoever drives, so one with a memory keeps a true one.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.commands import decode, encode
from vla_core.config import ConfigError
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.data.bag import CONTRACT_KEY, BagWriter
from vla_core.data.episodes import EPISODE_STATES, EPISODE_TOPIC, EPISODE_TYPE
from vla_core.data.recording import DROPPED_KEY
from vla_core.errors import VlaError
from vla_core.observation import messages
from vla_core.sim.base import IMAGES
from vla_core.sim.instructions import Split, instructions
from vla_core.sim.metaworld import LONGEST_EPISODE, MetaWorld
from vla_core.threads import one_thread

START_NS = NANOSECONDS  # simulated time starts after zero, which ROS reads as "no time yet"
EXECUTED = "executed/"
STATES = {name: state for state, name in EPISODE_STATES.items()}


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Bursts of disturbance on what is executed.

    ``scale`` is the largest disturbance of an entry as a share of half its range, ``share`` the share of ticks that are
    disturbed, ``steps`` the shortest and the longest burst. Within a burst the disturbance is constant, drawn
    uniformly: an average over independent ticks would cancel itself.
    """

    scale: float = 0.5
    share: float = 0.3
    steps: tuple[int, int] = (4, 12)

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 2:
            raise ConfigError(f"noise.scale: expected above 0 and at most 2, found {self.scale}")
        if not 0 < self.share < 1:
            raise ConfigError(f"noise.share: expected between 0 and 1, found {self.share}")
        if not 1 <= self.steps[0] <= self.steps[1]:
            raise ConfigError(f"noise.steps: expected 1 <= shortest <= longest, found {self.steps}")


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

    The sentences ``instructions`` of a task take turns over its episodes, unless ``instruction`` says something else.
    """

    tasks: tuple[str, ...] = ("push-v3",)
    episodes: int = 50
    seed: int = 0
    camera: str = "corner2"
    camera_size: int = 128
    images: bool = True
    instruction: str | None = None
    instructions: Split = "canonical"
    max_steps: int = 200
    noise: Noise | None = None
    driver: Driver | None = None

    def __post_init__(self) -> None:
        for name, least in (("episodes", 1), ("seed", 0), ("camera_size", 16), ("max_steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, found {getattr(self, name)}")
        if self.max_steps > LONGEST_EPISODE:
            raise ConfigError(f"max_steps: Meta-World's episodes end after {LONGEST_EPISODE}, found {self.max_steps}")
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


def collect(
    out: Path,
    collection: Collection,
    contract: RobotContract,
    workers: int = 1,
    progress: Callable[[Sequence[Collected]], None] = lambda done: None,
) -> list[Collected]:
    """Write a bag per episode to ``out``, in a folder per task where there are several.

    The result depends on ``collection`` and ``contract`` alone, not on ``workers``. Bags are written beside ``out`` and
    moved there when all of them are whole; an interrupted collection leaves nothing.

    Args:
        contract: the robot; without images it loses its image streams (:func:`without_images`).
        workers: processes; 1 stays in this one.
        progress: called with all that is done, after each episode.
    """
    if out.exists():
        raise VlaError(f"{out} exists already; remove it or choose another folder")
    contract = contract if collection.images else without_images(contract)
    for task in collection.tasks:  # bad names fail here, before minutes of work
        MetaWorld(task, collection.camera, contract).close()
        instructions(task, collection.instructions)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    jobs = [
        _Job(partial / (task if len(collection.tasks) > 1 else "") / f"episode_{index:06d}", task, index)
        for task in collection.tasks for index in range(collection.episodes)
    ]  # fmt: skip
    try:
        done: list[Collected] = []
        with _runner(workers, collection, contract) as run:
            for episode in run(jobs):
                done.append(episode)
                progress(done)
        os.replace(partial, out)
    except BrokenProcessPool:
        raise VlaError("a worker process was killed, for want of memory perhaps; try fewer --workers") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    order = {job.bag: place for place, job in enumerate(jobs)}
    done.sort(key=lambda episode: order[episode.bag])
    return [dataclasses.replace(episode, bag=out / episode.bag.relative_to(partial)) for episode in done]


def without_images(contract: RobotContract) -> RobotContract:
    """The contract of the same robot with its cameras off."""
    kept = {name: stream for name, stream in contract.observations.items() if stream.type not in IMAGES}
    sensors = contract.safety.sensors
    if sensors is not None:
        sensors = tuple(name for name in sensors if name in kept)
    safety = dataclasses.replace(contract.safety, sensors=sensors)
    return dataclasses.replace(contract, observations=kept, safety=safety)


@dataclass(frozen=True)
class _Job:
    bag: Path
    task: str
    index: int


@contextmanager
def _runner(
    workers: int, collection: Collection, contract: RobotContract
) -> Iterator[Callable[[list[_Job]], Iterator[Collected]]]:
    """What runs jobs, each of whose results comes when it is done: here, or in other processes."""
    if workers == 1:
        with nullcontext() if collection.driver is None else one_thread():
            collector = _Collector(collection, contract)
            try:
                yield lambda jobs: map(collector.run, jobs)
            finally:
                collector.close()
        return
    # A fork of a process that has rendered has a graphics context that it cannot use.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (collection, contract))

    def run(jobs: list[_Job]) -> Iterator[Collected]:
        waiting: set[Future[Collected]] = {pool.submit(_work, job) for job in jobs}
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


_collector: _Collector | None = None  # of a worker process


def _start_worker(collection: Collection, contract: RobotContract) -> None:
    global _collector
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C ends the pool
    if collection.driver is not None:
        one_thread().__enter__()  # for as long as the process lives
    _collector = _Collector(collection, contract)


def _work(job: _Job) -> Collected:
    assert _collector is not None
    return _collector.run(job)


class _Collector:
    """Runs episodes; keeps the simulator of the newest task."""

    def __init__(self, collection: Collection, contract: RobotContract) -> None:
        self._collection, self._contract = collection, contract
        (self._action,) = contract.actions.values()  # MetaWorld has checked that it is one
        self._core = None if collection.driver is None else _load_core(collection.driver, contract)
        self._world: MetaWorld | None = None

    def close(self) -> None:
        if self._world is not None:
            self._world.close()

    def run(self, job: _Job) -> Collected:
        """One episode into ``job.bag``; a bag that an error cut short is deleted."""
        options = self._collection
        world = self._load(job.task)
        words = (options.instruction,) if options.instruction else instructions(job.task, options.instructions)
        instruction = words[job.index % len(words)]
        seed = options.seed + job.index
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

    def _load(self, task: str) -> MetaWorld:
        if self._world is None or self._world.task != task:
            self.close()
            self._world = MetaWorld(task, self._collection.camera, self._contract, self._collection.camera_size)
        return self._world

    def _episode(self, writer: BagWriter, world: MetaWorld, job: _Job, seed: int, instruction: str) -> int:
        """Drive until success or ``max_steps``, writing what a recorder would hear; returns the steps taken."""
        options, action, step_ns = self._collection, self._action, self._contract.step_ns
        self._declare(writer)
        mark = {"index": job.index, "seed": seed, "task": job.task, "instruction": instruction}
        writer.write(EPISODE_TOPIC, START_NS, _mark("started", START_NS, steps=0, **mark))
        for stream in self._contract.observations.values():
            if stream.latched:
                writer.write(stream.topic, START_NS, messages.text(instruction))
        world.reset(seed)
        # Of its own generator: the simulator's must give the same episode with and without noise.
        rng = np.random.default_rng([seed, 1])
        disturbance = _Disturbance(options.noise, action.low, action.high, rng)
        driver = None if self._core is None else _Drive(self._core, options.driver, instruction, rng)
        step, stamp_ns = 0, START_NS
        while step < options.max_steps and not world.success:
            stamp_ns = START_NS + step * step_ns
            observed = world.observe_state(stamp_ns)
            if step % world.steps_per_frame == 0:
                observed += world.observe_camera(stamp_ns)
            for message in observed:
                writer.write(message.topic, stamp_ns, message.data)
            # Through the bytes of the command message, as the robot gets it.
            label = encode(action, stamp_ns, world.expert()[None], step_ns)
            writer.write(action.topic, stamp_ns, label)
            values = decode(action, label)[0]
            if driver is not None:
                values = driver.command(observed, stamp_ns, step, values)
            values = disturbance.on(values)
            if self._records_executed:
                writer.write(EXECUTED + action.topic, stamp_ns, encode(action, stamp_ns, values[None], step_ns))
            world.step(values)
            step += 1
        state = "succeeded" if world.success else "failed"
        writer.write(EPISODE_TOPIC, stamp_ns, _mark(state, stamp_ns, steps=step, **mark))
        return step

    @property
    def _records_executed(self) -> bool:
        return self._collection.noise is not None or self._collection.driver is not None

    def _declare(self, writer: BagWriter) -> None:
        for stream in {s.topic: s for s in self._contract.observations.values()}.values():
            writer.add_topic(stream.topic, stream.type, stream.latched)
        writer.add_topic(self._action.topic, self._action.type)
        if self._records_executed:
            writer.add_topic(EXECUTED + self._action.topic, self._action.type)
        writer.add_topic(EPISODE_TOPIC, EPISODE_TYPE, True)


class _Disturbance:
    """The bursts of one episode."""

    def __init__(self, noise: Noise | None, low: Sequence[float], high: Sequence[float],
                 rng: np.random.Generator) -> None:  # fmt: skip
        self._noise, self._rng = noise, rng
        self._low, self._high = np.asarray(low), np.asarray(high)
        self._left = 0
        self._value = np.zeros(len(self._low))

    def on(self, values: np.ndarray) -> np.ndarray:
        """What is executed instead of ``values`` (A,), within the action's bounds."""
        noise = self._noise
        if noise is None:
            return values
        if self._left == 0 and self._rng.random() < _burst_rate(noise):
            self._left = int(self._rng.integers(noise.steps[0], noise.steps[1] + 1))
            half = (self._high - self._low) / 2
            self._value = noise.scale * half * self._rng.uniform(-1, 1, len(half))
        if self._left == 0:
            return values
        self._left -= 1
        return np.clip(values + self._value, self._low, self._high)


def _burst_rate(noise: Noise) -> float:
    """Chance that a burst begins at an undisturbed tick, so that ``share`` of all ticks are disturbed."""
    length = sum(noise.steps) / 2
    return noise.share / (length * (1 - noise.share) + noise.share)


class _Drive:
    """One episode of a policy that the expert takes over from in some segments."""

    def __init__(self, core: Any, driver: Driver | None, instruction: str, rng: np.random.Generator) -> None:
        assert driver is not None
        self._core, self._driver, self._rng = core, driver, rng
        self._expert_drives = True
        core.start_episode(START_NS)
        if core.policy.spec.instruction:
            core.add(core.policy.spec.instruction, messages.text(instruction), START_NS)

    def command(self, observed: list[messages.Message], stamp_ns: int, step: int, expert: np.ndarray) -> np.ndarray:
        """What is executed (A,): the policy's command or the expert's."""
        core = self._core
        for message in observed:
            for name in core.builder.by_topic.get(message.topic, ()):
                core.add(name, message.data, stamp_ns)
        if step % self._driver.segment_steps == 0:
            self._expert_drives = self._rng.random() < self._driver.beta
            core.drop_plan(stamp_ns - 1)
        return expert if self._expert_drives else np.asarray(core.step(stamp_ns).values)


def _load_core(driver: Driver, contract: RobotContract) -> Any:
    """The policy as the robot would run it; its contract must be the robot's."""
    from vla_core.runtime.core import PolicyCore
    from vla_core.runtime.policy import Policy

    policy = Policy.load(driver.checkpoint)
    policy.contract.check_same(contract, str(driver.checkpoint), "the robot")
    return PolicyCore(policy)


def _mark(state: str, stamp_ns: int, **fields: Any) -> bytes:
    cls = messages.typestore().types[EPISODE_TYPE]
    return messages.serialize(EPISODE_TYPE, cls(header=messages.header(stamp_ns), state=STATES[state], **fields))
