"""Where jobs run: in this process, in several of this machine, or on a Ray cluster. Results come in the jobs' order."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar

import cv2

from vla_core.errors import VlaError

Job = TypeVar("Job", contravariant=True)
Result = TypeVar("Result", covariant=True)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES = 32 * 1024 * 1024  # allocations up to this size are kept; the most that glibc takes


class ExecutorError(VlaError):
    """Processes that cannot do the work."""


class Work(Protocol[Job, Result]):
    """What is done with a job; ``stopped`` is to be asked now and then, and True means to raise."""

    def __call__(self, job: Job, stopped: Callable[[], bool]) -> Result: ...


@contextmanager
def results(
    work: Work[Job, Result], jobs: Iterable[Job], workers: int, ray: bool = False
) -> Iterator[Iterator[Result]]:
    """Results of ``work`` for each of ``jobs``; what an unfinished job is doing is stopped at the end.

    Args:
        work: a function of a module, since other processes import it.
        workers: processes of this machine; 1 works in this process. On Ray: jobs at a time.
    """
    found: Generator[Result, None, None]
    if ray:
        found = _on_ray(work, jobs, workers)
    elif workers == 1:
        found = (work(job, _never) for job in jobs)
    else:
        found = _in_processes(work, jobs, workers)
    with closing(found):
        yield found


def _never() -> bool:
    return False


def _in_processes(work: Work[Job, Result], jobs: Iterable[Job], workers: int) -> Generator[Result, None, None]:
    """New interpreters, not forks: this process may have threads, of torch or of ROS."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(stop,))
    try:
        yield from _in_order(lambda job: pool.submit(_run, work, job), jobs, 2 * workers)
    except BrokenProcessPool:
        raise ExecutorError("a worker process died (out of memory, or killed); run again with fewer workers, and it "
                            "goes on where it was") from None  # fmt: skip
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(submit: Callable[[Job], Future[Result]], jobs: Iterable[Job], ahead: int) -> Iterator[Result]:
    """Keep ``ahead`` jobs submitted, and give their results as they were submitted."""
    running: deque[Future[Result]] = deque()
    for job in jobs:
        running.append(submit(job))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


_stop: Any = None  # of a worker process: an event that is set when it should stop


def _begin(stop: Any) -> None:
    """Set a worker process up: Ctrl-C is the main process's affair, and without that one nobody needs this one."""
    global _stop
    _stop = stop
    cv2.setNumThreads(1)  # as many processes as cores are enough threads
    _keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="watch the main process", daemon=True).start()


def _keep_memory() -> None:
    """Have glibc keep the memory of a picture for the next one.

    Without this each decoded picture is pages that the kernel fills with zeros and takes back: up to a quarter of the
    time of converting JPEGs. Other C libraries go on as they do.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2 * KEPT_BYTES)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _run(work: Work[Job, Result], job: Job) -> Result:
    return work(job, _stop.is_set)


def _on_ray(work: Work[Job, Result], jobs: Iterable[Job], workers: int) -> Generator[Result, None, None]:
    """Over the cluster that Ray is configured for; jobs and results must be on storage that all machines share."""
    try:
        import ray
    except ImportError:
        raise ExecutorError("Ray is not installed: pip install ray, or leave --ray out") from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    task = ray.remote(max_retries=0)(_run_on_ray)
    running: deque[Any] = deque()
    try:
        for job in jobs:
            running.append(task.remote(work, job))
            if len(running) > 2 * workers:
                yield ray.get(running.popleft())
        while running:
            yield ray.get(running.popleft())
    except ray.exceptions.WorkerCrashedError:
        raise ExecutorError("a Ray worker died; run again, and it goes on where it was") from None
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)


def _run_on_ray(work: Work[Job, Result], job: Job) -> Result:
    return work(job, _never)
