"""The policy node without ROS: messages in, commands out. The live node, the evaluator and the replay all drive it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vla_core.observation.builder import Observation, ObservationBuilder
from vla_core.observation.messages import header_stamp_ns
from vla_core.runtime.chunk import ActionChunk, Continuation
from vla_core.runtime.chunk_executor import ChunkExecutor
from vla_core.runtime.execution import Execution
from vla_core.runtime.execution_metrics import ExecutionMetrics
from vla_core.runtime.policy import Policy

LATENCIES = 10_000  # kept for percentiles; a robot runs for weeks


@dataclass(frozen=True)
class Command:
    """Values (A,) in the contract's units and limits for the tick ``stamp_ns``."""

    stamp_ns: int
    values: np.ndarray
    chunk: ActionChunk


class PolicyCore:
    """Memory buffer, observation builder, policy and chunk executor, wired once.

    ``add`` and ``command`` may be called from other threads than ``infer``. ``execution`` replaces the checkpoint's;
    one that the policy cannot follow is refused. ``wall_clock`` says that times of receipt are those of the sensors'
    clock, so that stamps from the future can be told and refused; a simulated clock lags behind the stamps.
    """

    def __init__(self, policy: Policy, execution: Execution | None = None, wall_clock: bool = False) -> None:
        self.policy = policy
        self.contract = policy.contract
        self._wall_clock = wall_clock
        self.builder = ObservationBuilder(policy.contract, policy.spec)
        self.buffer = self.builder.make_buffer()
        self.observe_ms: deque[float] = deque(maxlen=LATENCIES)
        self.inference_ms: deque[float] = deque(maxlen=LATENCIES)
        self.last_observation: Observation | None = None
        self._low = policy.contract.action_low
        self._high = policy.contract.action_high
        (execution or policy.execution).check_contract(policy.contract)
        if execution is not None:
            execution.check(policy.horizon, policy.head)
        self.metrics = ExecutionMetrics(self._low, self._high)
        self.executor = ChunkExecutor(execution or policy.execution, self.metrics)
        self._plans = 0  # counts up when plans are dropped: a chunk that was begun before is not executed
        self._lock = threading.Lock()

    def add(self, name: str, data: bytes, receive_ns: int) -> int:
        """Store a message of stream ``name``; returns its stamp: the header's, or ``receive_ns`` without one."""
        stamp = header_stamp_ns(self.builder.streams[name].type, data)
        stamp_ns = receive_ns if stamp is None else stamp
        self.buffer.add(name, stamp_ns, data, receive_ns if self._wall_clock else None)
        return stamp_ns

    def start_episode(self, stamp_ns: int) -> None:
        """Forget the past: what was seen before ``stamp_ns`` and what was planned from it."""
        self.buffer.start_episode(stamp_ns)
        self.policy.forget()
        self._replan(stamp_ns)

    def drop_plan(self, seen_ns: int = -1) -> None:
        """Execute nothing more of what is planned or being computed, nor of any observation up to ``seen_ns``."""
        self._replan(seen_ns + 1)
        self.executor.clear()

    def forget(self) -> None:
        """The clock jumped: forget what was seen and planned, and what is being computed from it."""
        self.buffer.clear()
        self.policy.forget()
        self.drop_plan()

    def _replan(self, from_ns: int) -> None:
        with self._lock:
            self._plans += 1
            self.executor.start_episode(from_ns)

    def predict(self, at_ns: int, continues: Continuation | None = None) -> ActionChunk:
        """Observe at ``at_ns`` and predict, executing nothing; raises ``Unobserved`` when a stream is missing or stale.

        ``continues`` is the plan that the chunk is to continue.
        """
        begin = time.perf_counter()
        observation = self.builder.build(self.buffer, at_ns)
        start = time.perf_counter()
        chunk = self.policy.predict(observation) if continues is None else self.policy.predict(observation, continues)
        self.observe_ms.append(1e3 * (start - begin))
        self.inference_ms.append(1e3 * (time.perf_counter() - start))
        self.last_observation = observation
        return chunk

    def infer(self, at_ns: int, arrival: Callable[[], int] | None = None) -> ActionChunk:
        """Predict from the observation at ``at_ns``, continuing the plan in force, and hand the chunk to the executor.

        ``arrival`` tells, once the chunk is there, from when on it may be executed, such as the clock's now. Without
        it time stands still while the model thinks: lockstep.
        """
        plans = self._plans
        chunk = self.predict(at_ns, self.executor.continuation(at_ns))
        with self._lock:
            if plans == self._plans:
                self.executor.push(chunk, None if arrival is None else arrival())
        return chunk

    def command(self, at_ns: int) -> Command | None:
        """The command for ``at_ns``, held to the contract's limits; None when no chunk covers it."""
        found = self.executor.action(at_ns)
        if found is None:
            return None
        values, chunk = found
        values = np.clip(values, self._low, self._high)
        self.policy.executed(at_ns, values)
        return Command(at_ns, values, chunk)

    def step(self, at_ns: int) -> Command:
        """Observe, predict when due, and act: the synchronous loop of lockstep and evaluation."""
        if self.executor.due(at_ns):
            self.infer(at_ns)
        command = self.command(at_ns)
        assert command is not None, "a chunk computed at this tick covers it"
        return command

    def warm_up(self) -> None:
        """Run the model on an empty observation, so that the first real one does not pay for start-up."""
        blank = self.builder.blank()
        for _ in range(3):
            chunk = self.policy.predict(blank)
        if self.executor.execution.strategy == "rtc":  # the guided sampler is another program
            rows = len(chunk.actions)
            for _ in range(3):
                self.policy.predict(blank, Continuation(chunk.actions, np.ones(rows), 1, 1.0))
        self.policy.forget()
