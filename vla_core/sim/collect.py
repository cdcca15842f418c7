"""Demonstrations of a world's expert, in process: one rosbag2 bag an episode, as the recorder node writes them.

The messages are those of a recorded lockstep run of ``simulator_node``: the contract's observations, the instruction,
the episode's marks and, on the action's topic, **the label: what the expert would do in this state**. What the robot
really executed is the label too, unless something else was asked for. Then it is on ``executed/<command topic>`` as
well, which no converter takes for the label. Of a vehicle the label is a trajectory; what it obeys are the commands
that its follower makes of it, on their own topic:

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
from pathlib import Path

import numpy as np

from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.sim.base import IMAGES
from vla_core.sim.demonstration import EXECUTED as EXECUTED
from vla_core.sim.demonstration import START_NS as START_NS
from vla_core.sim.demonstration import Collected as Collected
from vla_core.sim.demonstration import Collection as Collection
from vla_core.sim.demonstration import Demonstrator, Job, expert_world, obeyed_action, sentences
from vla_core.sim.demonstration import Driver as Driver
from vla_core.sim.noise import Disturbance
from vla_core.threads import one_thread

CALIBRATION = "sensor_msgs/msg/CameraInfo"


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
    Disturbance(collection.noise, obeyed_action(contract), np.random.default_rng(0))  # its entries are there
    for task in collection.tasks:  # bad names fail here, before minutes of work
        expert_world(task, collection, contract).close()
        sentences(task, collection)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    jobs = [
        Job(partial / (_folder(task) if len(collection.tasks) > 1 else "") / f"episode_{index:06d}", task, index)
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
    cameras = (*IMAGES, CALIBRATION)
    kept = {name: stream for name, stream in contract.observations.items() if stream.type not in cameras}
    sensors = contract.safety.sensors
    if sensors is not None:
        sensors = tuple(name for name in sensors if name in kept)
    safety = dataclasses.replace(contract.safety, sensors=sensors)
    any_of = tuple(name for name in contract.any_of if name in kept)
    return dataclasses.replace(contract, observations=kept, any_of=any_of, safety=safety)


def _folder(task: str) -> str:
    """A task's folder."""
    return task.replace(":", "_").replace("/", "_")


@contextmanager
def _runner(
    workers: int, collection: Collection, contract: RobotContract
) -> Iterator[Callable[[list[Job]], Iterator[Collected]]]:
    """What runs jobs, each of whose results comes when it is done: here, or in other processes."""
    if workers == 1:
        with nullcontext() if collection.driver is None else one_thread():
            collector = Demonstrator(collection, contract)
            try:
                yield lambda jobs: map(collector.run, jobs)
            finally:
                collector.close()
        return
    # A fork of a process that has rendered has a graphics context that it cannot use.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (collection, contract))

    def run(jobs: list[Job]) -> Iterator[Collected]:
        waiting: set[Future[Collected]] = {pool.submit(_work, job) for job in jobs}
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


_collector: Demonstrator | None = None  # of a worker process


def _start_worker(collection: Collection, contract: RobotContract) -> None:
    global _collector
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C ends the pool
    if collection.driver is not None:
        one_thread().__enter__()  # for as long as the process lives
    _collector = Demonstrator(collection, contract)


def _work(job: Job) -> Collected:
    assert _collector is not None
    return _collector.run(job)
