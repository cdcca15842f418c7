"""The policy as a lifecycle node: observations in, commands and whole chunks out.

configure loads the checkpoint, or connects to the server of ``policy``, checks it against the robot's contract, warms
the model up and subscribes; activate starts to act; deactivate sends the contract's safe action and stops.
Subscriptions only store bytes. ``~/start``, ``~/stop`` and ``~/reset`` do so by service, and the action
``~/run_instruction`` runs one instruction for a time.

``inference: asynchronous`` is for robots: the model runs in a worker, and commands leave on the control clock from the
chunk executor. ``synchronous`` answers every observation with one command of the same stamp, for lockstep simulation;
of a vehicle, with one trajectory.

The first message of each stream, and ``/tf_static``, are held against what the policy was trained with: a wrong frame,
calibration, column or mount is named on /diagnostics, and the policy does not act. With ``check_sensors_s`` configure
waits for them, and fails with everything that is wrong or missing.

A plan ends at once, in the safe action, when a stream that it needs is lost or stale, when the instruction changes and
when the clock jumps; the next observation begins a new one. When a server is lost, the plan goes on to its end.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.subscription import MessageInfo
from rclpy.time import Time
from std_srvs.srv import Trigger

from vla_core.commands import encode_frame
from vla_core.contract import NANOSECONDS
from vla_core.data.recording import LossCounter
from vla_core.errors import VlaError
from vla_core.observation import messages
from vla_core.observation.builder import Unobserved
from vla_core.observation.decode import decode
from vla_core.runtime.chunk_executor import ActionChunk
from vla_core.runtime.core import LATENCIES, Command, PolicyCore
from vla_core.runtime.policy import Policy, PolicyError
from vla_ros import diagnostics, process
from vla_ros.bridge import (
    TF_STATIC_TOPIC,
    every_message,
    lost_before,
    subscribe_episodes,
    subscribe_stream,
    subscribe_transforms,
)
from vla_ros.instruction_server import InstructionServer
from vla_ros.lifecycle import GuardedNode, run
from vla_ros.lockstep import Ticks
from vla_ros.msg import Episode
from vla_ros.parameters import choice, value
from vla_ros.policy_outputs import PolicyOutputs
from vla_ros.policy_parameters import core_of, declare_parameters, place_of, policy_of
from vla_ros.policy_report import Counts, RunLog, figures, first_misfit, statuses, waiting
from vla_ros.policy_time import ClockWatch, Pace
from vla_ros.sensor_setup import SensorSetup, wait_for_sensors

SYNCHRONOUS_POLL_S = 0.02
WORKER_NICE = 10


class PolicyNode(GuardedNode):
    """See the module; the parameters are in ``policy_parameters``."""

    _goals: InstructionServer | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__("policy", **options)
        declare_parameters(self)
        self.core: PolicyCore | None = None
        self._policy: Policy | None = None  # also where configure failed after it was loaded
        self._active = False
        self._subscriptions_held: list[Any] = []
        self._timers_held: list[Any] = []
        self._control_timer: Any = None
        self._worker: threading.Thread | None = None
        self._wake = threading.Event()
        self._last_tick_ns = -1
        self._episode_ns = 0  # start of this episode
        self._received_ns: dict[str, int] = {}  # per stream: stamp of what came last, of use or not
        self._acted = False  # whether this episode has had a chunk
        self._last_values: np.ndarray | None = None  # of the newest command since activation
        self._answered_ns = -1
        self._age_s = 0.0
        self._planned_ns = -1  # observation stamp of the chunk that was last published as a trajectory
        self._instruction: str | None = None
        self._latency_ms: deque[float] = deque(maxlen=LATENCIES)
        self.faults = diagnostics.Faults()
        self.counts = Counts()
        self.lost: Counter[str] = Counter()  # per stream, on the way here
        self._losses = LossCounter()
        self._log: RunLog | None = None
        self._outputs = PolicyOutputs(self)
        # A stopped simulated clock must stop neither diagnostics nor services.
        self.steady = Clock(clock_type=ClockType.STEADY_TIME)
        for name, callback in (("start", self._on_start), ("stop", self._on_stop), ("reset", self._on_reset)):
            self.create_service(Trigger, f"~/{name}", callback)
        self._goals = InstructionServer(self)

    def remember(self, fault: str) -> None:
        """Keep the line that says why a transition failed."""
        self.faults.note(fault)

    @property
    def fault(self) -> str:
        """The last fault."""
        return self.faults.last

    @property
    def active(self) -> bool:
        """Whether the node acts."""
        return self._active

    @property
    def configured(self) -> bool:
        """Whether a policy is loaded."""
        return self.core is not None

    def destroy_node(self) -> None:
        """Also ends the action server, which rclpy does not."""
        if self._goals is not None:  # else __init__ refused a parameter
            self._goals.destroy()
        super().destroy_node()

    # Services.

    def _on_start(self, request: Any, response: Any) -> Any:
        return self._answer_service(response, self.start())

    def _on_stop(self, request: Any, response: Any) -> Any:
        return self._answer_service(response, self.pause())

    def _on_reset(self, request: Any, response: Any) -> Any:
        """Forget what was seen and planned, as at the start of an episode."""
        core = self.core
        if core is None:
            return self._answer_service(response, "no policy is loaded; configure first")
        newest_ns = self._pace.newest_ns(core)
        self._begin_episode(self._now_ns() if newest_ns is None else newest_ns + 1)
        return self._answer_service(response, "")

    def _answer_service(self, response: Any, problem: str) -> Any:
        response.success, response.message = not problem, problem or "done"
        return response

    def start(self) -> str:
        """Act: configure and activate as far as needed; returns the problem, empty when there is none."""
        if self._active:
            return ""
        if self.finished:
            return "the node was shut down; start a new one"
        for needed, trigger in ((not self.configured, self.trigger_configure), (True, self.trigger_activate)):
            if needed and trigger() != TransitionCallbackReturn.SUCCESS:
                return self.fault
        return ""

    def observation_age_s(self) -> float:
        """Age of the observation behind the newest command."""
        return self._age_s

    def pause(self) -> str:
        """Send the safe action and stop acting; returns the problem, empty when there is none."""
        if self._active and self.trigger_deactivate() != TransitionCallbackReturn.SUCCESS:
            return self.fault
        return ""

    def configure(self) -> None:
        """Load, check, warm up, subscribe."""
        place = place_of(self)
        self._synchronous = choice(self, "inference", ("asynchronous", "synchronous")) == "synchronous"
        policy = self._policy = policy_of(self, place)
        core = core_of(self, policy, place, self._synchronous)
        if value(self, "check_sensors_s"):
            wait_for_sensors(self, core.contract, policy.spec, policy.model, value(self, "check_sensors_s"))
        core.warm_up()
        self.core = core
        self.setup = SensorSetup(core.contract, policy.spec, policy.model)
        self._bounds = (core.contract.action_low, core.contract.action_high)
        self._fingerprint = policy.fingerprint
        self._last_tick_ns, self._answered_ns, self._last_values = -1, -1, None  # nothing of an earlier policy
        self._received_ns, self._episode_ns = {}, 0
        self._pace = Pace(core, place)
        folder = value(self, "log_dir")
        self._log = RunLog(Path(folder), inputs=value(self, "log_inputs")) if folder else None
        self._outputs.create(core, candidates=value(self, "safety"))
        self._timers_held = [self.create_timer(diagnostics.PERIOD_S, self._publish_diagnostics, clock=self.steady)]
        if self._synchronous:
            # Messages drive the ticks; the timer only covers the wait for the first listener.
            self._timers_held.append(self.create_timer(SYNCHRONOUS_POLL_S, self._answer, clock=self.steady))
        for name, stream in core.builder.streams.items():  # one by one, so that a failure undoes those before it
            heard = every_message(stream) if self._synchronous else stream
            self._subscriptions_held.append(subscribe_stream(self, heard, self._storing(name)))
        if self.setup.mounts:
            self._subscriptions_held.append(subscribe_transforms(self, TF_STATIC_TOPIC, self._on_transforms))
        if self._synchronous:
            # After the streams: of what waits at the same time, an instruction goes before the tick that it is for.
            self._ticks = Ticks(self, self._answer)
            self._subscriptions_held.append(self._ticks.subscription)
        self._subscriptions_held.append(subscribe_episodes(self, self._on_episode))
        # What is there by now (torch, the model) stays: a collection that walks through it would stop the control clock
        # for a tenth of a second.
        gc.collect()
        gc.freeze()
        self.get_logger().info(f"policy {self._fingerprint} of {place} is ready")

    def activate(self) -> None:
        """Start to act."""
        assert self.core is not None
        self._active = True
        if not self._synchronous:
            period_ns = self.core.contract.step_ns
            self._clock_watch = ClockWatch(period_ns, self.counts)
            self._control_timer = self.create_timer(period_ns / NANOSECONDS, self._control)
            self._worker = threading.Thread(target=self._work, name="inference", daemon=True)
            self._worker.start()

    def deactivate(self) -> None:
        """Send the safe action and stop acting."""
        was_active, self._active = self._active, False
        try:
            if was_active and self.core is not None:  # first of all: a model may think for long, or for ever
                if self._control_timer is not None:
                    self.destroy_timer(self._control_timer)
                    self._control_timer = None
                self.core.drop_plan()
                if self._last_values is not None:
                    self._publish_safe(self._now_ns(), "deactivated")
        finally:
            # Where the robot will be at the next activation nobody knows: what it held until now is no safe place then.
            self._last_values = None
            self._wake.set()
            if self._worker is not None:
                self._worker.join()
                self._worker = None

    def clean_up(self) -> None:
        """Unsubscribe and forget the policy."""
        if self._policy is not None:
            self._policy.close()
            self._policy = None
        if self.core is None:
            return
        if self._log is not None:
            self._log.write(self.core, self.counts, self._latency_ms)
            self._log = None
        for subscription in self._subscriptions_held:
            self.destroy_subscription(subscription)
        for timer in self._timers_held:
            self.destroy_timer(timer)
        self._subscriptions_held, self._timers_held = [], []
        self._outputs.destroy()
        self.core = None
        gc.unfreeze()

    # Messages in.

    def _storing(self, name: str) -> Any:
        def store(data: bytes, info: MessageInfo) -> None:
            core = self.core
            if core is None:
                return
            self.lost[name] += lost_before(self._losses, name, info)
            self._received_ns[name] = self._stamp_ns(name, data)
            for line in self.setup.message(name, data):
                self._report_fault(line)
            try:
                if name == core.policy.spec.instruction and self._is_overruled(data):
                    return
                core.add(name, data, self._now_ns())
                if name == core.policy.spec.instruction:
                    self._change_instruction(data)
            except VlaError as error:
                self._report_fault(str(error))
                return
            if self._synchronous:
                self._answer()
            elif name in self._pace.streams:
                self._wake.set()  # the worker acts on these alone; waking it for all costs a tenth of the node

        return store

    def _on_transforms(self, data: bytes) -> None:
        try:
            for line in self.setup.transforms(data):
                self._report_fault(line)
        except VlaError as error:
            self._report_fault(f"{TF_STATIC_TOPIC}: {error}")

    def _stamp_ns(self, name: str, data: bytes) -> int:
        """Stamp of a message that may be damaged in all else."""
        assert self.core is not None
        with suppress(VlaError):
            stamp_ns = messages.header_stamp_ns(self.core.builder.streams[name].type, data)
            if stamp_ns is not None:
                return stamp_ns
        return self._now_ns()

    def _change_instruction(self, data: bytes) -> None:
        """What was planned for another instruction must not be executed any more, nor what is being computed.

        Call it when the new one is in the memory: what is computed from now on is for that one.
        """
        core = self.core
        assert core is not None and core.policy.spec.instruction is not None
        text = str(decode(core.builder.streams[core.policy.spec.instruction], data))
        before, self._instruction = self._instruction, text
        if before is None or before == text:
            return
        # In lockstep what was not answered yet still is; a robot waits for an observation of after the change.
        seen_ns = self._last_tick_ns if self._synchronous else self._pace.newest_ns(core)
        core.drop_plan(-1 if seen_ns is None else seen_ns)
        self.counts.instruction_changes += 1

    def _is_overruled(self, data: bytes) -> bool:
        """Whether a goal runs that was given another instruction: what its client asked for is what runs.

        Somebody who repeats an older text, or a latched one that arrives late, must not slip it under the goal.
        """
        core, goals = self.core, self._goals
        assert core is not None and core.policy.spec.instruction is not None and goals is not None
        text = str(decode(core.builder.streams[core.policy.spec.instruction], data))
        if not goals.instruction or text == goals.instruction:
            return False
        self._report_fault(f"instruction {text!r} is not followed: a goal runs {goals.instruction!r}; cancel it first")
        return True

    def instruct(self, text: str) -> None:
        """Tell everybody the instruction, this node among them; raises :class:`VlaError` when the policy has none."""
        name = None if self.core is None else self.core.policy.spec.instruction
        if self.core is None or not name:
            raise VlaError("this policy takes no instruction; leave the goal's instruction empty")
        data = messages.text(text)
        self._outputs.instruct(data)
        self.core.add(name, data, self._now_ns())
        self._change_instruction(data)

    def _on_episode(self, message: Episode) -> None:
        if message.state == Episode.START:
            self._begin_episode(Time.from_msg(message.header.stamp).nanoseconds)
        else:
            assert self._goals is not None, "made before any subscription"
            self._goals.episode_ended(message.state == Episode.SUCCEEDED)

    def _begin_episode(self, start_ns: int) -> None:
        if self.core is None:
            return
        self.core.start_episode(start_ns)
        self._episode_ns = start_ns
        if self._last_tick_ns != start_ns:  # else the first observation overtook this mark and is answered
            self._last_tick_ns = -1
            self._acted = False

    # Commands out, synchronous.

    def _answer(self) -> None:
        """Answer the newest observation once all of it is there."""
        core = self.core
        if core is None or not self._active or self._outputs.unheard():
            return
        tick_ns = self._pace.whole_ns(core, self._ticks, self._received_ns, self._episode_ns)
        if tick_ns is None or tick_ns == self._last_tick_ns:
            return
        if tick_ns < self._last_tick_ns:  # the clock was set back, by however little
            core.drop_plan()
        self._last_tick_ns = tick_ns
        if self.setup.faults:
            core.drop_plan()
            self._publish_safe(tick_ns, self.setup.faults[0])
            return
        try:
            chunk = core.infer(tick_ns) if core.executor.due(tick_ns) else None
        except Exception as error:  # whatever it is: who waits for an answer gets the safe action
            self._report_fault(f"inference failed: {error}")
            self._publish_safe(tick_ns, str(error))
            self._outputs.tell_fault(core.policy.fault)
            return
        self._acted = True
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
        # The model yields the cores to the control clock; on Linux a thread has a nice value of its own. Where a
        # sandbox forbids it the model still computes, only less politely.
        with suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, max(WORKER_NICE, os.getpriority(os.PRIO_PROCESS, thread)))
        while self._active:
            self._wake.wait()
            self._wake.clear()
            tick_ns = self._pace.newest_ns(core)
            # Another stamp is a newer one, or one of a clock that was set back: both are to be acted on.
            if not self._active or tick_ns is None or tick_ns == self._last_tick_ns or not core.executor.due(tick_ns):
                continue
            if self.setup.faults:
                continue
            self._last_tick_ns = tick_ns
            try:
                chunk = core.infer(tick_ns, self._now_ns)
                self._acted = True
                self._publish_chunk(chunk)
            except Unobserved as unobserved:
                if self._acted:  # before an episode's first chunk, streams are still starting up
                    self._report_fault(str(unobserved))
            except PolicyError as error:  # a model gone wrong: nothing that it planned is to be trusted either
                core.drop_plan()
                self._report_fault(f"inference failed: {error}")
                self._outputs.tell_fault(core.policy.fault)
            except Exception as error:  # whatever it is: the control clock goes on, with the safe action
                self._report_fault(f"inference failed: {error}")

    def _control(self) -> None:
        """The control clock: the action for now, or the safe one when no chunk covers now or nothing may be trusted."""
        core = self.core
        assert core is not None
        now_ns = self._now_ns()
        if self._clock_watch.jumped(now_ns, int(self.steady.now().nanoseconds), bool(value(self, "use_sim_time"))):
            core.forget()
            self._report_fault("the clock jumped: what was seen and planned before is forgotten")
        command = core.command(now_ns)
        lost = [*self.setup.faults, *core.builder.lost(core.buffer, now_ns)] if command is not None else []
        if lost:
            core.drop_plan()
            self._report_fault("; ".join(lost))
            command = None
        if command is not None:
            self._publish_command(command)
        elif self._last_values is not None:
            fault = core.policy.fault
            self._publish_safe(now_ns, fault or "no chunk covers this instant")
            self._outputs.tell_fault(fault)

    def _publish_command(self, command: Command) -> None:
        assert self.core is not None
        chunk, plan = command.chunk, None
        observed_ns = chunk.observation_stamp_ns
        if observed_ns != self._planned_ns:  # trajectories go out once a chunk
            plan = (observed_ns, np.clip(chunk.actions, *self._bounds))
        try:
            frame = encode_frame(self.core.contract, command.stamp_ns, command.values, plan)
        except VlaError as error:
            self._report_fault(str(error))
            self._publish_safe(command.stamp_ns, str(error))
            return
        self._planned_ns = observed_ns
        self._outputs.tell_fault("")
        self._outputs.send(frame)
        self._last_values = command.values
        self._age_s = (command.stamp_ns - observed_ns) / NANOSECONDS
        self.counts.commands += 1
        if observed_ns != self._answered_ns and not self._synchronous:
            self._answered_ns = observed_ns
            self._latency_ms.append((self._now_ns() - observed_ns) / 1e6)

    def _publish_safe(self, stamp_ns: int, reason: str) -> None:
        """The contract's safe action: zero, or the last value, per entry; of a vehicle, a trajectory of one row."""
        assert self.core is not None
        contract = self.core.contract
        # In a frame that moves along, nothing that was said before still holds: one row at its origin means to stop.
        values = np.zeros(len(contract.action_names)) if contract.plans else contract.safe_values(self._last_values)
        if values is not None:
            self._outputs.send(encode_frame(contract, stamp_ns, values, (stamp_ns, values[None])))
            self.counts.safe_commands += 1
        self._planned_ns = -1
        self.faults.note(reason)

    def _publish_chunk(self, chunk: ActionChunk) -> None:
        core = self.core
        if core is None:
            return
        self._outputs.chunk(core, chunk)
        self.counts.chunks += 1
        if self._log is not None:
            self._log.add(core, chunk)
        self._outputs.imagined(core, chunk.observation_stamp_ns)

    # What people see of it.

    def _report_fault(self, text: str) -> None:
        self.faults.note(text)
        self.counts.faults += 1
        self.get_logger().warning(text, throttle_duration_sec=1.0)

    def _publish_diagnostics(self) -> None:
        core = self.core
        if core is None:
            return
        # The instant that sensors are judged at; in lockstep time stands still between the ticks.
        at_ns = (self._pace.newest_ns(core) or 0) if self._synchronous else self._now_ns()
        causes = [*self.faults.take(), core.policy.fault, *self.setup.faults]
        if self._active:
            clocked = not self._synchronous and bool(value(self, "use_sim_time"))
            causes += waiting(core, at_ns, self._outputs.unheard() if self._synchronous else [], clocked)
        causes.append(first_misfit(self, core))
        numbers = figures(core, self.counts, self._latency_ms)
        values = {"checkpoint": self._fingerprint, "active": self._active, **numbers}
        self._outputs.diagnostics(statuses(self, core, at_ns, self.lost, values, causes))

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def main() -> int:
    """Entry point of ``policy_node``."""
    return process.main(PolicyNode, run)


if __name__ == "__main__":
    sys.exit(main())
