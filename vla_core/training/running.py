"""What a run needs of its process: signals, clocks, seeds and figures that come late."""

from __future__ import annotations

import ctypes
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class Figures:
    """A few numbers on their way from the device, read when they are needed."""

    def __init__(self, values: Tensor) -> None:
        self._ready = None
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> list[float]:
        """The numbers; waits for the device where they are not there yet."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._host.tolist()


class Clock:
    """Seconds of a run, over its interruptions, and its speed since the last of them."""

    def __init__(self, first_step: int, seconds: float) -> None:
        self._first, self._before, self._began, self._aside = first_step, seconds, time.perf_counter(), 0.0

    def seconds(self) -> float:
        """Since the run began, but for the time in which it did not run."""
        return self._before + time.perf_counter() - self._began

    def seconds_left(self, step: int, steps: int) -> float:
        """Until ``steps``, at the pace until now."""
        return (time.perf_counter() - self._began) / max(1, step - self._first) * (steps - step)

    def steps_per_s(self, step: int) -> float:
        """Of the training alone, without what is done aside."""
        return (step - self._first) / max(1e-9, time.perf_counter() - self._began - self._aside)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done in the block is no training."""
        began = time.perf_counter()
        yield
        self._aside += time.perf_counter() - began


@contextmanager
def interruptible(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end the step first, a second Ctrl-C ends at once. Gives whether one came."""
    came: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in came:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_memory(device: torch.device) -> None:
    """Let the C library keep what a CPU's tensors free, from now on: fresh pages for each are a tenth of a step.

    Of glibc; others are left alone. What it has then is found again by the process, not by others.
    """
    library = ctypes.CDLL(None)
    if device.type == "cpu" and hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def step_seed(seed: int, step: int) -> int:
    """32 bits for a step, as far from those of its neighbours as from any others."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def seed_everything(seed: int, device: torch.device) -> None:
    """The generators that nobody hands over, such as dropout's."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would note a stack trace for each absent accelerator
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def peak_mb(device: torch.device) -> float:
    """Most memory that the process, or on an accelerator its tensors, ever had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
