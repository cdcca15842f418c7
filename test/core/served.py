"""A policy server in a thread of its own, and policies that tests can hold up, for the tests of vla_core.serving."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import pytest

from vla_core.observation.builder import Observation
from vla_core.runtime.chunk import ActionChunk, Continuation
from vla_core.runtime.execution import Execution
from vla_core.runtime.policy import Policy, PolicyError
from vla_core.serving.metadata import RemoteHead
from vla_core.serving.openpi_form import OpenpiForm
from vla_core.serving.server import PolicyServer, ServerOptions

from .helpers import CONTRACT, SPEC

DEADLINE_S = 30.0
QUICK: dict[str, Any] = {"port": 0, "ping_s": 1.0, "handshake_s": 1.0, "drain_s": 10.0}


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until ``condition`` holds; fails the test at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {DEADLINE_S:.0f} s in vain for {what}")
        time.sleep(0.005)


class Echo(Policy):
    """Answers with the state it was asked with: row k is the state plus k. ``go`` holds every call up."""

    def __init__(self, fingerprint: str = "echo") -> None:
        self.contract, self.spec, self.execution = CONTRACT, SPEC, Execution(steps=2)
        self.horizon, self.head, self.fingerprint = 4, RemoteHead(type="echo", guidable=True), fingerprint
        self.go = threading.Event()
        self.go.set()
        self.batches: list[list[Observation]] = []
        self.continued: list[Continuation | None] = []

    def predict(self, observation: Observation, continues: Continuation | None = None) -> ActionChunk:
        return self.predict_batch([observation], [continues])[0]

    def predict_batch(
        self, observations: Sequence[Observation], continues: Sequence[Continuation | None]
    ) -> list[ActionChunk]:  # fmt: skip
        self.batches.append(list(observations))
        self.continued += continues
        assert self.go.wait(DEADLINE_S)
        if any(observation.instruction == "break" for observation in observations):
            raise RuntimeError("the model\nbroke")
        if any(observation.instruction == "refuse" for observation in observations):
            raise PolicyError("refused")
        return [
            ActionChunk(o.stamp_ns, self.contract.chunk_step_ns, np.float64(o.state) + np.arange(4.0)[:, None])
            for o in observations
        ]  # fmt: skip


class Served:
    """A server of ``policy`` in a thread, until the block ends."""

    def __init__(self, policy: Policy, openpi: OpenpiForm | None = None, **options: Any) -> None:
        self.policy, self.options = policy, ServerOptions(**{**QUICK, **options})
        self._openpi = openpi
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._over = False

    def __enter__(self) -> Served:
        self._thread.start()
        self.server = self.run(self._make())
        self.starting = asyncio.run_coroutine_threadsafe(self.server.start(), self._loop)
        if self.policy.__class__ is not Echo or self.policy.go.is_set():  # type: ignore[attr-defined]
            self.starting.result(DEADLINE_S)
        else:
            until(lambda: self.server._server is not None, "a server that listens")
        self.host, self.port = self.server.address
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        try:
            self.stop()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(DEADLINE_S)
            self._loop.close()

    async def _make(self) -> PolicyServer:
        return PolicyServer(self.policy, self.options, self._openpi)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE_S)

    def stop(self) -> None:
        if not self._over:
            self._over = True
            self.run(self.server.stop())

    @property
    def url(self) -> str:
        return f"ws://{self.host}:{self.port}"

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Status and body of a page."""
        request = urllib.request.Request(f"http://{self.host}:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """A figure of /metrics, with its labels; 0 where it is not there yet."""
        lines = (line.rsplit(" ", 1) for line in self.get("/metrics")[1].splitlines() if not line.startswith("#"))
        return float(dict(lines).get(name, "0"))  # type: ignore[arg-type]
