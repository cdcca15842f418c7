"""Episodes of any policy that :func:`~vla_core.runtime.loading.load_policy` knows, planners too, over processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from vla_core.errors import VlaError
from vla_core.evaluation.closed_loop import run_episode, seen_by
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.loading import load_policy
from vla_core.sim.base import View
from vla_core.sim.worlds import find, make_world, task_of
from vla_core.threads import one_thread


class Evaluator:
    """A policy and its world; an episode depends on its seed alone."""

    def __init__(self, place: Path, task: str, max_steps: int) -> None:
        policy = load_policy(place)
        self._core = PolicyCore(policy)
        simulator, _ = find(task)
        self._words = None if simulator.journey else task_of(task).instruction
        camera = policy.provenance.get("camera") if simulator.chooses_camera else None
        self._world = make_world(task, seen_by(policy), View(camera=camera or None))
        self._max_steps = max_steps

    def run(self, seed: int) -> dict[str, Any]:
        """The outcome of one episode."""
        with one_thread():
            result = run_episode(self._world, self._core, self._words, seed, self._max_steps)
        times = sorted(result.inference_ms)
        return {"seed": seed, "success": result.success, "steps": result.steps,
                "inference_ms_p50": times[len(times) // 2] if times else None}  # fmt: skip

    def close(self) -> None:
        """Free the world."""
        self._world.close()


def evaluated(place: Path, task: str, seeds: Sequence[int], max_steps: int, workers: int,
              progress: Callable[[int], None] = lambda done: None) -> list[dict[str, Any]]:  # fmt: skip
    """The outcomes in the order of ``seeds``; they do not depend on ``workers``."""
    found = []
    if workers == 1:
        evaluator = Evaluator(place, task, max_steps)
        try:
            for seed in seeds:
                found.append(evaluator.run(seed))
                progress(len(found))
        finally:
            evaluator.close()
        return found
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (place, task, max_steps)) as pool:
        try:
            for outcome in pool.map(_work, seeds):
                found.append(outcome)
                progress(len(found))
        except BrokenProcessPool:
            raise VlaError("a worker process was killed, for want of memory perhaps; try fewer --workers") from None
    return found


_evaluator: Evaluator | None = None  # of a worker process


def _start(place: Path, task: str, max_steps: int) -> None:
    global _evaluator
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C ends the pool
    torch.set_num_threads(1)
    _evaluator = Evaluator(place, task, max_steps)


def _work(seed: int) -> dict[str, Any]:
    assert _evaluator is not None
    return _evaluator.run(seed)
