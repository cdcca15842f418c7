"""Runs a plan's episodes, in this process or in several.

The result does not depend on how many: an episode depends on its own seed alone, and every process computes with one
thread. An episode that raises, or whose process dies, is reported by task and seed; the others go on.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import re
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import torch

from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.evaluation.closed_loop import EpisodeResult, run_episode, seen_by, watched_steps
from vla_core.evaluation.ensemble import Ensemble
from vla_core.evaluation.plan import EvaluationError, Job, Plan
from vla_core.evaluation.video import VideoWriter
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.loading import load_policy
from vla_core.runtime.policy import Policy
from vla_core.sim.base import View, World
from vla_core.sim.faults import Faults
from vla_core.sim.worlds import make_world
from vla_core.threads import one_thread

DEATHS = 3  # of processes before the first episode is done: they will all die
PATIENCE_S = 5.0  # for a process that was asked to end


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job: a result, or what went wrong in one line."""

    job: Job
    result: EpisodeResult | None = None
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Videos:
    """Where videos go, and of which episodes."""

    folder: Path
    of: Literal["all", "failures"] = "all"


def run_plan(plan: Plan, workers: int = 1, videos: Videos | None = None, device: str = "cpu") -> Iterator[Outcome]:
    """Outcomes as they come; ``workers`` is the number of processes, 1 stays in this one. ``device`` is the models'.

    Raises :class:`VlaError` where a policy or a world cannot be loaded: nothing of it can be run then.
    """
    jobs = plan.jobs()
    if workers == 1:
        runner = Runner(plan, videos, device)
        try:
            with one_thread():
                yield from map(runner.run, jobs)
        finally:
            runner.close()
        return
    pool = _Pool(plan, videos, device, jobs)
    try:
        yield from pool.run(min(workers, len(jobs)))
    finally:
        pool.close()


class Runner:
    """Keeps the policies that it has used, and the newest world."""

    def __init__(self, plan: Plan, videos: Videos | None, device: str = "cpu") -> None:
        self._plan, self._videos, self._device = plan, videos, device
        self._policies: dict[int, Policy] = {}
        self._warm: set[int] = set()  # runs whose first inference, slower than the others, is not the first measured
        self._world: World | None = None
        self._made: tuple[str, RobotContract, View] | None = None

    def run(self, job: Job) -> Outcome:
        """One episode; what it raises is in the outcome, except for a :class:`VlaError` of loading."""
        begin = time.perf_counter()
        run, task = self._plan.runs[job.run], self._plan.tasks[job.task]
        policy = self._policy(run.entry)
        try:
            view = self._plan.entries[run.entry].view
            if task.said_by == "swapped":
                view = dataclasses.replace(view, swapped=True)
            world = self._load(task.world, seen_by(policy), view)
            faults = Faults.parse(run.faults, policy.contract) if run.faults else None
            core = PolicyCore(policy, run.execution)
            if job.run not in self._warm:
                core.warm_up()
                self._warm.add(job.run)
        except VlaError:
            raise
        except Exception as error:
            return Outcome(job=job, error=_line(error), seconds=time.perf_counter() - begin)
        video = self._video(policy.contract)
        try:
            result = run_episode(
                world, core, task.instruction(job.seed), job.seed, task.max_steps,
                delay_steps=run.delay_steps, watch=None if video is None else video.add, faults=faults,
            )  # fmt: skip
            if video is not None:
                self._keep(video, job, result)
                video = None
        except Exception as error:
            return Outcome(job=job, error=_line(error), seconds=time.perf_counter() - begin)
        finally:
            if video is not None:
                video.discard()
        return Outcome(job=job, result=result, seconds=time.perf_counter() - begin)

    def close(self) -> None:
        """Free the world."""
        if self._world is not None:
            self._world.close()
            self._world = self._made = None

    def _policy(self, entry: int) -> Policy:
        if entry not in self._policies:
            plan = self._plan
            members = [load_policy(member.folder(), plan.policy_seed, plan.dataset, self._device)
                       for member in plan.entries[entry].members]  # fmt: skip
            self._policies[entry] = members[0] if len(members) == 1 else Ensemble(members)
        return self._policies[entry]

    def _load(self, name: str, contract: RobotContract, view: View) -> World:
        wanted = (name, contract, view)
        if self._world is None or self._made != wanted:
            self.close()
            self._world = make_world(name, contract, view)
            self._made = wanted
        return self._world

    def _video(self, contract: RobotContract) -> VideoWriter | None:
        if self._videos is None:
            return None
        return VideoWriter(self._videos.folder, contract.rate_hz / watched_steps(contract))

    def _keep(self, video: VideoWriter, job: Job, result: EpisodeResult) -> None:
        assert self._videos is not None
        if self._videos.of == "failures" and result.success:
            video.discard()
            return
        run, task = self._plan.runs[job.run], self._plan.tasks[job.task]
        parts = [self._plan.entries[run.entry].label] if len(self._plan.entries) > 1 else []
        if len(self._plan.runs) > len(self._plan.entries):
            parts += [run.execution.strategy, f"delay{run.delay_steps}", *run.faults]
        parts += [task.world, f"seed{job.seed}", "success" if result.success else "failure"]
        video.save(re.sub(r"[:/ *?]", "_", "_".join(parts)))


def _line(error: BaseException) -> str:
    """An error in one line: a user's own says enough, others need their place."""
    text = " ".join(str(error).split())
    if isinstance(error, VlaError):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"


# --- several processes ----------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: Job


class _Pool:
    """Hands jobs to processes one by one: whoever dies loses one episode, and is replaced."""

    def __init__(self, plan: Plan, videos: Videos | None, device: str, jobs: list[Job]) -> None:
        self._given = plan, videos, device
        self._left = list(jobs)
        self._workers: dict[Connection, _Worker] = {}
        # A fork of a process that has rendered has a graphics context that it cannot use.
        self._context = multiprocessing.get_context("spawn")

    def run(self, workers: int) -> Iterator[Outcome]:
        for _ in range(workers):
            self._start()
        deaths, done = 0, 0
        while self._workers:
            for ready in wait(list(self._workers)):
                worker = self._workers[ready]  # type: ignore[index]
                outcome = self._receive(worker)
                if outcome is None:
                    deaths += 1
                    outcome = Outcome(job=worker.job, error=self._bury(worker))
                    if deaths == DEATHS and not done:
                        raise EvaluationError(f"the first {deaths} processes died: {outcome.error}")
                    if self._left:
                        self._start()
                else:
                    done += 1
                    self._next(worker)
                yield outcome

    def close(self) -> None:
        """End all processes, whatever they do."""
        for worker in self._workers.values():
            worker.process.terminate()
        for worker in self._workers.values():
            worker.process.join(PATIENCE_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def _start(self) -> None:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, *self._given), daemon=True)
        process.start()
        theirs.close()  # with no other end open, the death of the process ends the connection
        worker = _Worker(process, mine, self._take(None))
        self._workers[mine] = worker
        self._send(worker)

    def _next(self, worker: _Worker) -> None:
        """The next job; without one the process ends."""
        if self._left:
            worker.job = self._take(worker.job)
            self._send(worker)
            return
        del self._workers[worker.connection]
        worker.connection.close()
        worker.process.join()

    def _take(self, last: Job | None) -> Job:
        """A job of the world that the worker has loaded; else of one that fewest others have, with most to do."""
        if last is not None and any(job.task == last.task for job in self._left):
            chosen = last.task
        else:
            busy = Counter(worker.job.task for worker in self._workers.values() if worker.job is not last)
            left = Counter(job.task for job in self._left)
            chosen = min(left, key=lambda task: (busy[task], -left[task], task))
        job = next(job for job in self._left if job.task == chosen)
        self._left.remove(job)
        return job

    @staticmethod
    def _send(worker: _Worker) -> None:
        with suppress(OSError):  # it is dead, which receiving will find out
            worker.connection.send(worker.job)

    def _receive(self, worker: _Worker) -> Outcome | None:
        """What the worker answers; None when it died."""
        try:
            answer: Outcome | str = worker.connection.recv()
        except (EOFError, OSError):
            return None
        if isinstance(answer, str):
            raise EvaluationError(answer)
        return answer

    def _bury(self, worker: _Worker) -> str:
        """Forget a dead worker; returns how it died."""
        del self._workers[worker.connection]
        worker.connection.close()
        worker.process.join()
        code = worker.process.exitcode or 0
        if code >= 0:
            return f"its process ended with status {code}"
        hint = "; was the memory full? Try fewer workers" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}"


def _serve(connection: Connection, plan: Plan, videos: Videos | None, device: str) -> None:
    """A worker process: episodes until the connection ends. What cannot be loaded is answered as text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    torch.set_num_threads(1)
    runner = Runner(plan, videos, device)
    try:
        while True:
            job = connection.recv()
            try:
                connection.send(runner.run(job))
            except VlaError as error:
                connection.send(" ".join(str(error).split()))
    except (EOFError, OSError):  # the parent needs no more, or is gone
        return
    finally:
        runner.close()
