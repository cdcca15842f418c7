"""The observations of several robots in one call of the model, off the event loop.

A connection has one observation here at a time, and they are taken in the order of their arrival: whoever waits is
served after at most one observation of each other robot.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from vla_core.errors import VlaError
from vla_core.observation.builder import Observation
from vla_core.runtime.chunk import ActionChunk, Continuation
from vla_core.runtime.policy import Policy
from vla_core.serving.metrics import Metrics

log = logging.getLogger(__name__)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Answer:
    """A chunk, how long its observation waited, and the model's call that computed it."""

    chunk: ActionChunk
    queue_s: float
    infer_s: float
    batch: int


@dataclass(eq=False)
class _Ask:
    observation: Observation
    continues: Continuation | None
    gone: Callable[[], bool]
    answer: asyncio.Future[Answer]
    since_s: float = field(default_factory=time.perf_counter)


class Batcher:
    """Up to ``size`` observations a call; the first of them waits at most ``wait_s`` for others.

    While a call runs the next ones gather, so that without any waiting a busy server has large batches and an idle one
    answers at once. Nobody waits when each of the ``clients`` has asked already.
    """

    def __init__(
        self, policy: Policy, metrics: Metrics, *, size: int, wait_s: float, clients: Callable[[], int]
    ) -> None:  # fmt: skip
        self._policy, self._metrics = policy, metrics
        self._size, self._wait_s, self._clients = size, wait_s, clients
        self._asks: deque[_Ask] = deque()
        self._arrived = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, "inference")

    async def ask(
        self, observation: Observation, continues: Continuation | None, gone: Callable[[], bool]
    ) -> Answer:  # fmt: skip
        """The answer to an observation.

        Raises what the policy raises for this observation, whatever it raises for others; and :class:`ClientGone`
        where the client is ``gone`` before its turn: who gave up and asked anew must not be computed for twice.
        """
        ask = _Ask(observation, continues, gone, asyncio.get_running_loop().create_future())
        self._asks.append(ask)
        self._arrived.set()
        return await ask.answer

    async def run_in_worker(self, call: Callable[[], None]) -> None:
        """Run something else where the model runs."""
        await asyncio.get_running_loop().run_in_executor(self._worker, call)

    async def run(self) -> None:
        """Answer until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next()
            if not batch:
                continue
            start_s = time.perf_counter()
            chunks = await loop.run_in_executor(self._worker, self._compute, batch)
            infer_s = time.perf_counter() - start_s
            self._metrics.batch.observe(len(batch))
            self._metrics.inference.observe(infer_s)
            for ask, chunk in zip(batch, chunks, strict=True):
                queue_s = start_s - ask.since_s
                self._metrics.queue.observe(queue_s)
                if ask.answer.done():  # cancelled: the server ends
                    continue
                if isinstance(chunk, ActionChunk):
                    ask.answer.set_result(Answer(chunk, queue_s, infer_s, len(batch)))
                else:
                    ask.answer.set_exception(chunk)

    def close(self) -> None:
        """End the worker; a call that runs ends first."""
        self._worker.shutdown(cancel_futures=True)

    async def _next(self) -> list[_Ask]:
        """The asks of the next call; those of clients that are gone are dropped."""
        await self._wait(None)
        until_s = self._asks[0].since_s + self._wait_s
        while len(self._asks) < min(self._size, self._clients()) and (left_s := until_s - time.perf_counter()) > 0:
            await self._wait(left_s, more=True)
        batch: list[_Ask] = []
        while self._asks and len(batch) < self._size:
            ask = self._asks.popleft()
            if ask.gone():
                ask.answer.set_exception(ClientGone())
            else:
                batch.append(ask)
        return batch

    async def _wait(self, timeout_s: float | None, more: bool = False) -> None:
        """Until somebody asks: anybody, or with ``more`` somebody else."""
        if self._asks and not more:
            return
        self._arrived.clear()
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout_s)
        except asyncio.TimeoutError:
            return

    def _compute(self, batch: Sequence[_Ask]) -> Sequence[ActionChunk | Exception]:
        """In the worker. Where a call fails as a whole, each observation is tried alone: it may be that of another."""
        try:
            return self._policy.predict_batch([a.observation for a in batch], [a.continues for a in batch])
        except Exception as error:
            if len(batch) == 1:
                return [self._named(error)]
        return [self._alone(ask) for ask in batch]

    def _alone(self, ask: _Ask) -> ActionChunk | Exception:
        try:
            return self._policy.predict(ask.observation, ask.continues)
        except Exception as error:
            return self._named(error)

    @staticmethod
    def _named(error: Exception) -> Exception:
        if isinstance(error, VlaError):
            return error
        log.error("the model failed", exc_info=error)
        return VlaError(f"the model failed: {type(error).__name__}: {error}")
