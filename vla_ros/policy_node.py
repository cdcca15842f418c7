"""The policy as a lifecycle node: observations in, commands and whole chunks out.

configure loads the checkpoint, checks it against the robot's contract, warms the model up and subscribes; activate
starts to act; deactivate sends the contract's safe action and stops. Subscriptions only store bytes.

``inference: asynchronous`` is for robots: the model runs in a worker, and commands leave on the control clock from the
chunk executor. ``synchronous`` answers every observation with one command of the same stamp, for lockstep simulation.
"""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.time import Time

from vla_core.checkpoint import fingerprint
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.errors import VlaError
from vla_core.evaluation.metrics import percentile
from vla_core.evaluation.parity import InputLog
from vla_core.observation import messages
from vla_core.observation.builder import Unobserved
from vla_core.runtime.chunk_executor import ActionChunk
from vla_core.runtime.core import LATENCIES, Command, PolicyCore
from vla_core.runtime.policy import Policy
from vla_ros import process
from vla_ros.bridge import (
    CHUNK_TOPIC,
    COMMAND_QOS,
    command_publisher,
    subscribe_episodes,
    subscribe_stream,
)
from vla_ros.msg import ActionChunk as ActionChunkMessage
from vla_ros.msg import Episode
from vla_ros.parameters import choice, declare, value

MAX_FAULTS = 4  # named in one diagnostic message
SYNCHRONOUS_POLL_S = 0.02


class PolicyNode(LifecycleNode):
    """See the module; parameters are declared in ``__init__``."""

    def __init__(self, **options: Any) -> None:
        super().__init__("policy", **options)
        declare(self, "checkpoint", "", "folder of a trained policy")
        declare(self, "contract", "", "the robot's contract, a name in config/robots or a file; may differ from "
                                      "the checkpoint's in topics only; empty takes the checkpoint's")  # fmt: skip
        declare(self, "inference", "asynchronous", "asynchronous (robots) or synchronous (lockstep simulation)")
        declare(self, "seed", 0, "seed of the policy's sampling noise")
        declare(self, "autostart", True, "configure and activate at start")
        declare(self, "log_dir", "", "folder for latencies and model inputs at the end; empty writes none")
        self.core: PolicyCore | None = None
        self._active = False
        self._subscriptions_held: list[Any] = []
        self._timers_held: list[Any] = []
        self._publishers_held: list[Any] = []
        self._worker: threading.Thread | None = None
        self._wake = threading.Event()
        self._last_tick_ns = -1
        self._acted = False  # whether this episode has had a chunk
        self._last_values: np.ndarray | None = None
        self._answered_ns = -1
        self._latency_ms: deque[float] = deque(maxlen=LATENCIES)
        self.fault = ""  # the last one
        self._faults: list[str] = []  # the first ones since the last diagnostics
        self._counts = {"commands": 0, "safe_commands": 0, "chunks": 0, "faults": 0}
        self._input_log: InputLog | None = None

    def autostart(self) -> bool:
        """Configure and activate when the parameter asks for it; False when a transition failed (it was logged)."""
        if not value(self, "autostart"):
            return True
        transitions = (self.trigger_configure, self.trigger_activate)
        return all(trigger() == TransitionCallbackReturn.SUCCESS for trigger in transitions)

    # Lifecycle. Exceptions in these callbacks would be swallowed by rclpy: each is caught, logged and remembered.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load, check, warm up, subscribe."""
        result = self._guarded(self._configure)
        if result != TransitionCallbackReturn.SUCCESS:
            self._cleanup()  # nothing half-made stays behind for the next try
        return result

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start to act."""
        return self._guarded(self._activate)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Send the safe action and stop acting."""
        return self._guarded(self._deactivate)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe and forget the policy."""
        return self._guarded(self._cleanup)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Safe action first, then as cleanup."""
        return self._guarded(self.stop)

    def stop(self) -> None:
        """End in order: safe action, worker, logs, subscriptions. Harmless when there is nothing to end."""
        self._deactivate()
        self._cleanup()

    def _guarded(self, action: Any) -> TransitionCallbackReturn:
        try:
            action()
        except VlaError as error:
            self.fault = str(error)
            self.get_logger().error(self.fault)
            return TransitionCallbackReturn.FAILURE
        except Exception:
            self.fault = traceback.format_exc()
            self.get_logger().error(self.fault)
            return TransitionCallbackReturn.ERROR
        return TransitionCallbackReturn.SUCCESS

    def _configure(self) -> None:
        folder = value(self, "checkpoint")
        if not folder:
            raise VlaError("parameter checkpoint is empty; name the folder of a trained policy")
        self._synchronous = choice(self, "inference", ("asynchronous", "synchronous")) == "synchronous"
        policy = Policy.load(folder, int(value(self, "seed")))
        if value(self, "contract"):
            robot = RobotContract.load(value(self, "contract"))
            policy.contract.check_same(robot, f"checkpoint {folder}", value(self, "contract"))
            policy.contract = policy.contract.with_topics_of(robot)
        core = PolicyCore(policy)
        core.warm_up()
        core.inference_ms.clear()
        self.core = core
        self._fingerprint = fingerprint(folder)
        self._last_tick_ns, self._answered_ns, self._last_values = -1, -1, None  # nothing of an earlier policy
        rates = {name: s.rate_hz for name, s in core.builder.streams.items() if s.rate_hz}
        if not rates:
            raise VlaError(f"checkpoint {folder}: it sees no stream with a rate, so nothing sets its pace")
        self._pace = max(rates, key=lambda name: rates[name])  # ticks follow the fastest stream
        self._input_log = None
        if value(self, "log_dir"):
            Path(value(self, "log_dir")).mkdir(parents=True, exist_ok=True)  # fails here, not after the run
            self._input_log = InputLog()
        self._command_publisher = command_publisher(self, core.contract)
        self._chunk_publisher = self.create_publisher(ActionChunkMessage, CHUNK_TOPIC, COMMAND_QOS)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._publishers_held = [self._command_publisher, self._chunk_publisher, self._diagnostics]
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # a stopped simulated clock must not stop the diagnostics
        self._timers_held = [self.create_timer(1.0, self._publish_diagnostics, clock=steady)]
        if self._synchronous:
            # Messages drive the ticks; the timer only covers the wait for the first listener.
            self._timers_held.append(self.create_timer(SYNCHRONOUS_POLL_S, self._answer, clock=steady))
        self._subscriptions_held = [
            *(subscribe_stream(self, stream, self._storing(name)) for name, stream in core.builder.streams.items()),
            subscribe_episodes(self, self._on_episode),
        ]
        self.get_logger().info(f"policy {self._fingerprint} of {folder} is ready")

    def _activate(self) -> None:
        assert self.core is not None
        self._active = True
        if not self._synchronous:
            self._control_timer = self.create_timer(self.core.contract.step_ns / NANOSECONDS, self._control)
            self._worker = threading.Thread(target=self._work, name="inference", daemon=True)
            self._worker.start()

    def _deactivate(self) -> None:
        was_active, self._active = self._active, False
        self._wake.set()
        if self._worker is not None:
            self._worker.join()
            self._worker = None
        if was_active and self.core is not None:
            if not self._synchronous:
                self.destroy_timer(self._control_timer)
            self.core.executor.clear()
            if self._last_values is not None:
                self._publish_safe(self._now_ns(), "deactivated")

    def _cleanup(self) -> None:
        if self.core is None:
            return
        self._write_logs(self.core)
        for subscription in self._subscriptions_held:
            self.destroy_subscription(subscription)
        for timer in self._timers_held:
            self.destroy_timer(timer)
        for publisher in self._publishers_held:
            self.destroy_publisher(publisher)
        self._subscriptions_held, self._timers_held, self._publishers_held = [], [], []
        self.core = None

    # Messages in.

    def _storing(self, name: str) -> Any:
        def store(data: bytes) -> None:
            core = self.core
            if core is None:
                return
            try:
                core.add(name, data, self._now_ns())
            except VlaError as error:
                self._report_fault(str(error))
                return
            if self._synchronous:
                self._answer()
            else:
                self._wake.set()

        return store

    def _on_episode(self, message: Episode) -> None:
        if message.state == Episode.START and self.core is not None:
            start_ns = Time.from_msg(message.header.stamp).nanoseconds
            self.core.start_episode(start_ns)
            if self._last_tick_ns != start_ns:  # else the first observation overtook this mark and is answered
                self._last_tick_ns = -1
                self._acted = False

    # Commands out, synchronous.

    def _answer(self) -> None:
        """Answer the newest observation once all of it is there."""
        core = self.core
        if core is None or not self._active or not self._command_publisher.get_subscription_count():
            return
        tick_ns = core.buffer.newest_ns(self._pace)
        if tick_ns is None or tick_ns == self._last_tick_ns or core.builder.due(core.buffer, tick_ns):
            return
        self._last_tick_ns = tick_ns
        try:
            chunk = core.infer(tick_ns) if core.executor.due(tick_ns) else None
        except VlaError as error:
            self._report_fault(str(error))
            self._publish_safe(tick_ns, str(error))
            return
        command = core.command(tick_ns)
        assert command is not None, "a chunk of this tick covers it"
        self._publish_command(command)
        if chunk is not None:
            self._publish_chunk(chunk)

    # Commands out, asynchronous.

    def _work(self) -> None:
        """The worker: a new chunk whenever one is due and there is a newer observation."""
        core = self.core
        assert core is not None
        while self._active:
            self._wake.wait()
            self._wake.clear()
            tick_ns = core.buffer.newest_ns(self._pace)
            # Another stamp is a newer one, or one of a clock that was set back: both are to be acted on.
            if not self._active or tick_ns is None or tick_ns == self._last_tick_ns or not core.executor.due(tick_ns):
                continue
            self._last_tick_ns = tick_ns
            try:
                chunk = core.infer(tick_ns)
                self._acted = True
                self._publish_chunk(chunk)
            except Unobserved as unobserved:
                if self._acted:  # before an episode's first chunk, streams are still starting up
                    self._report_fault(str(unobserved))
            except Exception as error:  # whatever it is: the control clock goes on, with the safe action
                self._report_fault(f"inference failed: {error}")

    def _control(self) -> None:
        """The control clock: the action for now, or the safe one when no chunk covers now."""
        assert self.core is not None
        now_ns = self._now_ns()
        command = self.core.command(now_ns)
        if command is not None:
            self._publish_command(command)
        elif self._last_values is not None:
            self._publish_safe(now_ns, "no chunk covers this instant")

    def _publish_command(self, command: Command) -> None:
        assert self.core is not None
        try:
            data = messages.command(self.core.contract.action, command.stamp_ns, command.values)
        except VlaError as error:
            self._report_fault(str(error))
            self._publish_safe(command.stamp_ns, str(error))
            return
        self._command_publisher.publish(data)
        self._last_values = command.values
        self._counts["commands"] += 1
        observed_ns = command.chunk.observation_stamp_ns
        if observed_ns != self._answered_ns and not self._synchronous:
            self._answered_ns = observed_ns
            self._latency_ms.append((self._now_ns() - observed_ns) / 1e6)

    def _publish_safe(self, stamp_ns: int, reason: str) -> None:
        """The contract's safe action: zero, or the last value, per entry."""
        assert self.core is not None
        action = self.core.contract.action
        last = self._last_values if self._last_values is not None else np.zeros(len(action.names))
        held = np.array([safe == "hold" for safe in action.safe])
        self._command_publisher.publish(messages.command(action, stamp_ns, np.where(held, last, 0.0)))
        self._counts["safe_commands"] += 1
        self._note_fault(reason)

    def _publish_chunk(self, chunk: ActionChunk) -> None:
        core = self.core
        if core is None:
            return
        action = core.contract.action
        message = ActionChunkMessage()
        message.header.stamp = self.get_clock().now().to_msg()
        message.header.frame_id = action.frame_id
        message.observation_stamp = Time(nanoseconds=chunk.observation_stamp_ns).to_msg()
        message.step.sec, message.step.nanosec = divmod(chunk.step_ns, NANOSECONDS)
        message.valid_until = Time(nanoseconds=chunk.valid_until_ns).to_msg()
        message.names, message.units = list(action.names), list(action.units)
        message.horizon = len(chunk.actions)
        message.actions = chunk.actions.reshape(-1).tolist()
        self._chunk_publisher.publish(message)
        self._counts["chunks"] += 1
        if self._input_log is not None and core.last_observation is not None:
            self._input_log.add(core.last_observation, chunk)

    # What people see of it.

    def _note_fault(self, text: str) -> None:
        """Keep a fault for the diagnostics: the first ones name the cause, what follows are consequences."""
        self.fault = text
        if len(self._faults) < MAX_FAULTS and text not in self._faults:
            self._faults.append(text)

    def _report_fault(self, text: str) -> None:
        self._note_fault(text)
        self._counts["faults"] += 1
        self.get_logger().warning(text, throttle_duration_sec=1.0)

    def _publish_diagnostics(self) -> None:
        if self.core is None:
            return
        values: dict[str, Any] = {"checkpoint": self._fingerprint, "active": self._active, **self._counts}
        recent = self.core.inference_ms.copy()  # in one step: the worker appends
        for name, samples in (("inference_ms", list(recent)), ("observation_to_command_ms", list(self._latency_ms))):
            values |= {f"{name}_p50": percentile(samples, 50), f"{name}_p99": percentile(samples, 99)}
        faults, self._faults = self._faults, []
        fault = "; ".join(filter(None, [*faults, *self._absent(self.core), self._type_conflict(self.core)]))
        status = DiagnosticStatus(
            name=f"{self.get_fully_qualified_name()}: policy", hardware_id=self.core.contract.name,
            level=DiagnosticStatus.WARN if fault else DiagnosticStatus.OK, message=fault or "ok",
            values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
        )  # fmt: skip
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)

    def _absent(self, core: PolicyCore) -> list[str]:
        """What an active policy waits for, also before anything came and after all of it fell silent."""
        if not self._active:
            return []
        # In lockstep time stands still between the ticks, and only what never came is absent.
        at_ns = (core.buffer.newest_ns(self._pace) or 0) if self._synchronous else self._now_ns()
        return core.builder.absent(core.buffer, at_ns)

    def _type_conflict(self, core: PolicyCore) -> str:
        """Name a topic that somebody publishes with another type: the middleware would only stay silent about it."""
        for name, stream in core.builder.streams.items():
            if core.buffer.newest_ns(name) is not None:
                continue
            for publisher in self.get_publishers_info_by_topic(stream.topic):
                if publisher.topic_type != stream.type:
                    return (f"{name} ({stream.topic}): node {publisher.node_name} publishes {publisher.topic_type}, "
                            f"the contract says {stream.type}")  # fmt: skip
        return ""

    def _write_logs(self, core: PolicyCore) -> None:
        if self._input_log is None:
            return
        folder = Path(value(self, "log_dir"))
        record = {
            "inference_ms": list(core.inference_ms),
            "observation_to_command_ms": list(self._latency_ms),
            "counts": self._counts,
        }
        (folder / "latency.json").write_text(json.dumps(record), encoding="utf-8")
        self._input_log.save(folder / "inputs.safetensors", core.policy)
        self._input_log = None

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def _run(node: Any, executor: Any, stop: process.Stop) -> int:
    return process.spin(executor, stop) if node.autostart() else 1


def main() -> int:
    """Entry point of ``policy_node``."""
    return process.main(PolicyNode, _run)


if __name__ == "__main__":
    sys.exit(main())
