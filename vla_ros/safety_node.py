"""The safety stage as a lifecycle node: candidate commands in, commands that keep the contract's limits out.

Each candidate on ``candidate/<topic>`` is answered at once with one command of the same stamp on ``<topic>``. A timer
of the control period acts where candidates are absent, or where the policy tells on ``candidate/fault`` that it cannot
act. Heartbeat and ages are measured on a steady clock; with ``use_sim_time`` on the simulated one, so that a graph in
lockstep may think as long as it likes.

``~/reset`` releases a latch, ``~/stop`` latches by hand. When the node is deactivated or told to end, it brings the
robot to the safe action before it goes.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.duration import Duration
from std_msgs.msg import String
from std_srvs.srv import Trigger

from vla_core.contract import NANOSECONDS
from vla_core.errors import VlaError
from vla_core.runtime.safety import Frame, SafetyStage
from vla_ros import diagnostics, process
from vla_ros.bridge import (
    COMMAND_QOS,
    FAULT_TOPIC,
    LATCHED_QOS,
    candidate_topic,
    command_publishers,
    message_class,
    subscribe_stream,
)
from vla_ros.lifecycle import GuardedNode, run
from vla_ros.parameters import contract_of, declare, value

ACK_TIMEOUT = Duration(seconds=1)
CALM_S = 0.1  # least time between two diagnostics that are about no stop
LEVELS = {"waiting": diagnostics.OK, "passing": diagnostics.OK, "intervening": diagnostics.WARN,
          "stopping": diagnostics.ERROR, "latched": diagnostics.ERROR}  # fmt: skip


class SafetyNode(GuardedNode):
    """See the module; parameters are declared in ``__init__``."""

    def __init__(self, **options: Any) -> None:
        super().__init__("safety", **options)
        declare(self, "contract", "", "the robot's contract, a name in config/robots or a file")
        declare(self, "checkpoint", "", "folder of a policy; its contract counts when contract is empty")
        declare(self, "autostart", True, "configure and activate at start")
        declare(self, "stop_timeout_s", 2.0, "how long the last stop may slow down before the safe action is sent "
                                             "whatever the limits, s", low=0.0, high=30.0)  # fmt: skip
        self.stage: SafetyStage | None = None
        self.fault = ""  # why the last transition failed
        self._active = False
        self._held: list[tuple[Callable[[Any], Any], Any]] = []  # how to destroy it, and what
        self._shown = ("waiting", "")  # state and causes of the last diagnostics that were due to a change
        self._shown_s = 0.0

    def remember(self, fault: str) -> None:
        """Keep the line that says why a transition failed."""
        self.fault = fault

    def configure(self) -> None:
        """Read the contract and subscribe."""
        self.contract = contract_of(self)
        self._simulated = bool(value(self, "use_sim_time"))
        self.stage = stage = SafetyStage(self.contract, self._simulated)
        self._command_publishers = command_publishers(self, self.contract)
        self._diagnostics = diagnostics.publisher(self)
        self._held = [(self.destroy_publisher, p) for p in (*self._command_publishers.values(), self._diagnostics)]
        # Sensors go first: the executor hands out in this order what waits at the same time. Only the newest counts.
        for name in stage.sensors:
            stream = self.contract.observations[name]
            self._held.append((self.destroy_subscription, subscribe_stream(self, stream, self._on_sensor(name), 1)))
        for name, action in self.contract.actions.items():
            subscription = self.create_subscription(
                message_class(action.type), candidate_topic(action.topic), self._on_candidate(name), COMMAND_QOS,
                raw=True,
            )  # fmt: skip
            self._held.append((self.destroy_subscription, subscription))
        told = self.create_subscription(String, FAULT_TOPIC, self._on_policy_fault, LATCHED_QOS)
        self._held.append((self.destroy_subscription, told))
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # a stopped simulated clock must not stop the watch
        for period_s, callback in ((self.contract.step_ns / NANOSECONDS, self._tick), (1.0, self._publish_diagnostics)):
            self._held.append((self.destroy_timer, self.create_timer(period_s, callback, clock=steady)))
        for service, answer in (("~/reset", self._on_reset), ("~/stop", self._on_stop)):
            self._held.append((self.destroy_service, self.create_service(Trigger, service, answer)))
        self.get_logger().info(f"watching {', '.join(stage.sensors) or 'no sensor'} of {self.contract.name}")

    def activate(self) -> None:
        """Start to answer candidates."""
        self._active = True

    def deactivate(self) -> None:
        """Bring the robot to the safe action."""
        was_active, self._active = self._active, False
        if not was_active or self.stage is None:
            return
        self._come_to_rest(self.stage)
        latched, policy_fault = self.stage.latched, self.stage.policy_fault
        self.stage = SafetyStage(self.contract, self._simulated)
        self.stage.policy_fault = policy_fault  # it is told once
        if latched:  # only a reset ends it
            self.stage.trip(latched)

    def _come_to_rest(self, stage: SafetyStage) -> None:
        """Slow down within the limits; after the time-out, or when something fails, send the safe action at once."""
        start_ns, start_steady_ns = self._now_ns(), time.monotonic_ns()
        timeout_ns = round(value(self, "stop_timeout_s") * NANOSECONDS)
        sent = False
        for _ in range(3 + timeout_ns // self.contract.step_ns):
            steady_ns = time.monotonic_ns()
            # Time goes on here, whatever becomes of a simulated clock.
            frame = stage.halt(start_ns + steady_ns - start_steady_ns, steady_ns)
            self._publish(frame)
            sent = sent or bool(frame)
            if stage.rests and (sent or not stage.commanded):
                break
            if steady_ns - start_steady_ns > timeout_ns:
                break
            time.sleep(self.contract.step_ns / NANOSECONDS)
        self._publish(stage.end(start_ns + time.monotonic_ns() - start_steady_ns))
        for publisher in self._command_publishers.values():
            publisher.wait_for_all_acked(ACK_TIMEOUT)

    def clean_up(self) -> None:
        """Unsubscribe."""
        for destroy, held in self._held:
            destroy(held)
        self._held = []
        self.stage = None

    # Messages in, commands out.

    def _on_sensor(self, name: str) -> Callable[[bytes], None]:
        def store(data: bytes) -> None:
            if self.stage is not None:
                try:
                    self.stage.sensor(name, data, self._now_ns(), time.monotonic_ns())
                except VlaError as error:
                    self.get_logger().warning(str(error), throttle_duration_sec=1.0)

        return store

    def _on_policy_fault(self, message: String) -> None:
        if self.stage is not None:
            self.stage.policy_fault = message.data
            self._tick()

    def _on_candidate(self, name: str) -> Callable[[bytes], None]:
        def answer(data: bytes) -> None:
            stage = self.stage
            if not self._active or stage is None:
                return
            try:
                self._publish(stage.candidate(name, data, self._now_ns(), time.monotonic_ns()))
            except Exception:  # whatever it is: the robot must not be left with its last command
                self.get_logger().error(traceback.format_exc())
                stage.trip(f"internal error at a candidate of {name}, see the log")
                self._publish(stage.tick(self._now_ns(), time.monotonic_ns()))
            self._report_changes()

        return answer

    def _tick(self) -> None:
        if self._active and self.stage is not None:
            self._publish(self.stage.tick(self._now_ns(), time.monotonic_ns()))
            self._report_changes()

    def _publish(self, frame: Frame) -> None:
        for topic, data in frame.items():
            self._command_publishers[topic].publish(data)

    # What people see and do.

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        assert self.stage is not None, "the service lives as long as the stage"
        refused = self.stage.reset(self._now_ns(), time.monotonic_ns())
        response.success, response.message = not refused, refused or "released"
        self._report_changes()
        return response

    def _on_stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        assert self.stage is not None, "the service lives as long as the stage"
        self.stage.trip("stopped by the service ~/stop")
        response.success, response.message = True, "latched until ~/reset"
        self._tick()
        return response

    def _report_changes(self) -> None:
        """Diagnostics at once when the state, or what a stop is about, has changed."""
        assert self.stage is not None, "called after its use"
        shown = (self.stage.state, "; ".join(self.stage.faults()))
        if shown == self._shown:
            return
        stops = [LEVELS[state] == diagnostics.ERROR for state in (shown[0], self._shown[0])]
        if not any(stops) and time.monotonic() - self._shown_s < CALM_S:
            return  # a clamp that comes and goes with every command
        self._shown = shown
        if stops[0]:
            self.get_logger().warning(f"{shown[0]}: {self._why(self.stage)}", throttle_duration_sec=1.0)
        self._publish_diagnostics()

    @staticmethod
    def _why(stage: SafetyStage) -> str:
        return "; ".join(dict.fromkeys([*stage.faults().values(), *filter(None, [stage.latched])]))

    def _publish_diagnostics(self) -> None:
        stage = self.stage
        if stage is None:
            return
        values: dict[str, Any] = {"active": self._active, "state": stage.state, **stage.counts}
        values |= {f"reason {cause}": text for cause, text in stage.reasons.items()}
        values |= {f"age_s {name}": age for name, age in stage.ages_s().items()}
        message = ": ".join(filter(None, [stage.state, self._why(stage)]))
        status = diagnostics.status(self, "safety", values, message, LEVELS[stage.state], self.contract.name)
        diagnostics.publish(self, self._diagnostics, [status])
        self._shown_s = time.monotonic()

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def main() -> int:
    """Entry point of ``safety_node``."""
    return process.main(SafetyNode, run)


if __name__ == "__main__":
    sys.exit(main())
