"""Batches of a run in their order, made ahead of time in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import torch

from vla_core.data.batches import Batch, Batches
from vla_core.data.mixture import Mixture
from vla_core.data.sampler import Sampler
from vla_core.errors import VlaError
from vla_core.observation.batch import with_floats


class LoaderError(VlaError):
    """A batch that cannot be shared among processes."""


class Loader:
    """The batches of a training run from ``start_step`` on, without end.

    Each global step has ``batch_size`` samples, which are a pure function of ``seed`` and the step. They are dealt to
    ``accumulate`` micro-batches of ``world_size`` processes each: iteration gives those of ``rank``, ``accumulate``
    batches a step. ``prefetch`` batches are made ahead; 0 makes each when it is asked for.
    """

    def __init__(
        self,
        source: Batches | Mixture,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        prefetch: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        parts = world_size * accumulate
        if batch_size < 1 or batch_size % parts:
            raise LoaderError(f"a batch of {batch_size} samples cannot be shared by {world_size} processes with "
                              f"{accumulate} micro-batches each; take a multiple of {parts}")  # fmt: skip
        if not 0 <= rank < world_size:
            raise LoaderError(f"rank {rank} of {world_size} processes")
        self.source = source
        self.batch_size, self.start_step = batch_size, start_step
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.prefetch, self.device = prefetch, torch.device(device)
        self._sampler = Sampler(source.lengths, source.weights, seed)

    def __iter__(self) -> Iterator[Batch]:
        wanted = ((step, part) for step in count(self.start_step) for part in range(self.accumulate))
        if self.prefetch == 0:
            yield from (self._ready(self._drawn(step, part)) for step, part in wanted)
        pool = _one_worker()
        ahead: deque[Future[Batch]] = deque()
        try:
            for step, part in wanted:
                ahead.append(pool.submit(self._drawn, step, part))
                if len(ahead) > self.prefetch:
                    yield self._ready(ahead.popleft().result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, step: int, part: int = 0) -> Batch:
        """Micro-batch ``part`` of this process at a step."""
        return self._ready(self._drawn(step, part))

    def _drawn(self, step: int, part: int) -> Batch:
        """The batch in the CPU's memory; for another device its pictures stay bytes, a quarter of what they will be."""
        size = self.batch_size // (self.world_size * self.accumulate)
        first = (part * self.world_size + self.rank) * size
        rows = self._sampler.rows(step, self.batch_size)[first : first + size]
        batch = self.source.draw(rows, floats=self.device.type == "cpu")
        if self.device.type == "cuda":
            batch = batch.map(lambda tensor: tensor.contiguous().pin_memory())
        return batch._replace(step=step, first=first, total=self.batch_size)

    def _ready(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        moved = batch.to(self.device)
        return moved._replace(inputs=with_floats(moved.inputs))


def _one_worker() -> ThreadPoolExecutor:
    """A thread, which keeps the order, and whose own operations leave the other cores to the model.

    With a team of threads of its own it took a third of a step's time from the model.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, "loader", torch.set_num_threads, (1,))
    pool.submit(torch.get_num_threads).result()
    torch.set_num_threads(before)  # torch takes what was set last for every thread to come
    return pool
