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
import json
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
from sensor_msgs.msg import Image
from std_msgs.msg import String
from std_srvs.srv import Trigger

from vla_core.commands import check_action, encode_frame
from vla_core.config import override
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.data.recording import LossCounter
from vla_core.errors import VlaError
from vla_core.evaluation.parity import InputLog
from vla_core.observation import messages
from vla_core.observation.builder import Unobserved
from vla_core.observation.decode import decode
from vla_core.pretrained.self_check import self_check
from vla_core.runtime.chunk_executor import ActionChunk
from vla_core.runtime.core import LATENCIES, Command, PolicyCore
from vla_core.runtime.loading import load_policy
from vla_core.runtime.policy import Policy, PolicyError
from vla_ros import diagnostics, process
from vla_ros.bridge import (
    CHUNK_TOPIC,
    COMMAND_QOS,
    FAULT_TOPIC,
    LATCHED_QOS,
    TF_STATIC_TOPIC,
    command_publishers,
    every_message,
    lost_before,
    misfit,
    stream_qos,
    subscribe_episodes,
    subscribe_stream,
    subscribe_transforms,
)
from vla_ros.instruction_server import InstructionServer
from vla_ros.lifecycle import GuardedNode, run
from vla_ros.lockstep import Ticks
from vla_ros.msg import ActionChunk as ActionChunkMessage
from vla_ros.msg import Episode
from vla_ros.parameters import choice, declare, value
from vla_ros.policy_report import RECENT, Counts, percentiles, sensor_values
from vla_ros.sensor_setup import SensorSetup, wait_for_sensors

SYNCHRONOUS_POLL_S = 0.02
WORKER_NICE = 10
PLANNER = "planner"  # the value of the parameter ``policy`` that is no place
JUMP_NS = NANOSECONDS // 2  # a clock that differs by more from the steady one, between two ticks, has jumped


class PolicyNode(GuardedNode):
    """See the module; parameters are declared in ``__init__``."""

    _goals: InstructionServer | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__("policy", **options)
        declare(self, "checkpoint", "", "folder of a trained policy, or the name of one on the hub")
        declare(self, "policy", "", "a policy elsewhere, in place of the checkpoint: the address of a policy server, "
                                    "such as ws://192.168.1.5:8000, or a YAML file that describes one")  # fmt: skip
        declare(self, "dataset", "", "of a policy that was trained on several datasets: the one by whose statistics it "
                                     "runs; empty takes the one that it was deployed for")  # fmt: skip
        declare(self, "contract", "", "the robot's contract, a name in config/robots or a file; may differ from "
                                      "the checkpoint's in topics only; empty takes the checkpoint's")  # fmt: skip
        declare(self, "inference", "asynchronous", "asynchronous (robots) or synchronous (lockstep simulation)")
        declare(self, "device", "cpu", "where a checkpoint's model runs, such as cuda")
        declare(self, "seed", 0, "seed of the policy's sampling noise", low=0)
        declare(self, "execution", [""], "key=value changes to how chunks are executed, such as strategy=rtc, steps=6; "
                                         "[''] takes the checkpoint's")  # fmt: skip
        declare(self, "world", "", "with policy: planner, the folder of the world model that it plans in; checkpoint "
                                   "is the policy that proposes, if any")  # fmt: skip
        declare(self, "planner", [""], "with policy: planner, key=value of its file, such as planner.type=mppi, "
                                       "planner.horizon=12, budget_s=0.04; [''] takes the defaults")  # fmt: skip
        declare(self, "imagined_s", 1.0, "least time between two pictures of the imagined rollout on ~/imagined, s",
                low=0.05, high=60.0)  # fmt: skip
        declare(self, "self_check", False, "at configure ask the policy whether other pictures and another instruction "
                "change its actions, and refuse one that ignores them")  # fmt: skip
        declare(self, "safety", False, "a safety node stands between: send commands to candidate/<topic>")
        declare(self, "check_sensors_s", 0.0, "how long configure waits for all sensors and their transforms, to fail "
                                              "where one is missing or set up wrongly, s; 0 checks them as they come",
                low=0.0, high=600.0)  # fmt: skip
        declare(self, "autostart", True, "configure at start")
        declare(self, "activate", True, "with autostart: act at once; false waits for ~/start or a goal")
        declare(self, "goal_fault_s", 5.0, "end a run_instruction goal when it could command nothing for so long, s",
                low=0.1, high=3600.0)  # fmt: skip
        declare(self, "log_dir", "", "folder for latencies and model inputs at the end; empty writes none")
        declare(self, "log_inputs", True, "log model inputs, which stay in memory until the end: not for long runs")
        self.core: PolicyCore | None = None
        self._policy: Policy | None = None  # also where configure failed after it was loaded
        self._active = False
        self._subscriptions_held: list[Any] = []
        self._timers_held: list[Any] = []
        self._publishers_held: list[Any] = []
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
        self._clocks: tuple[int, int] | None = None  # ROS and steady time of the last control tick
        self._instruction: str | None = None
        self._latency_ms: deque[float] = deque(maxlen=LATENCIES)
        self.faults = diagnostics.Faults()
        self.counts = Counts()
        self.lost: Counter[str] = Counter()  # per stream, on the way here
        self._losses = LossCounter()
        self._input_log: InputLog | None = None
        self._logging = False
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
        if self.core is None:
            return self._answer_service(response, "no policy is loaded; configure first")
        newest_ns = self._newest_tick_ns(self.core)
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
        folder = value(self, "policy") or value(self, "checkpoint")
        if not folder:
            raise VlaError("parameters checkpoint and policy are empty; name the folder of a trained policy, one on "
                           "the hub, or the address of a server")  # fmt: skip
        self._synchronous = choice(self, "inference", ("asynchronous", "synchronous")) == "synchronous"
        policy = self._policy = self._load(folder)
        if value(self, "contract"):
            robot = RobotContract.load(value(self, "contract"))
            policy.contract.check_same(robot, f"checkpoint {folder}", value(self, "contract"))
            policy.contract = policy.contract.with_topics_of(robot)
        if value(self, "self_check"):
            self.get_logger().info(f"self-check: {'; '.join(self_check(policy).lines())}")
        if policy.contract.offline:
            raise VlaError(f"checkpoint {folder}: its contract is offline, it sees the future; no robot has that")
        changes = [change for entry in value(self, "execution") for change in entry.split()]
        execution = policy.execution.changed(override({}, changes))
        core = PolicyCore(policy, execution, wall_clock=not (self._synchronous or value(self, "use_sim_time")))
        interval_ns = execution.interval_ns(core.contract.chunk_step_ns)
        if self._synchronous and core.contract.plans and interval_ns > core.contract.step_ns:
            raise VlaError(f"execution: a new trajectory every {interval_ns / NANOSECONDS:g} s, but in lockstep each "
                           "observation waits for one; set parameter execution to "
                           f"['period_s={core.contract.step_ns / NANOSECONDS:g}']")  # fmt: skip
        for action in core.contract.actions.values():
            check_action(action)
        if value(self, "check_sensors_s"):
            wait_for_sensors(self, core.contract, policy.spec, policy.model, value(self, "check_sensors_s"))
        core.warm_up()
        self.core = core
        self.setup = SensorSetup(core.contract, policy.spec, policy.model)
        self._bounds = (core.contract.action_low, core.contract.action_high)
        self._fingerprint = policy.fingerprint
        self._last_tick_ns, self._answered_ns, self._last_values = -1, -1, None  # nothing of an earlier policy
        self._received_ns, self._episode_ns = {}, 0
        rates = {name: s.rate_hz for name, s in core.builder.streams.items() if s.rate_hz}
        if not rates:
            raise VlaError(f"checkpoint {folder}: it sees no stream with a rate, so nothing sets its pace")
        fastest = sorted(rates, key=lambda name: -rates[name])
        certain = [k for k, name in enumerate(fastest) if core.builder.streams[name].missing == "refuse"]
        self._paces = fastest[: certain[0] + 1] if certain else fastest  # whose stamps may be ticks
        self._input_log, self._logging = None, False
        if value(self, "log_dir"):
            Path(value(self, "log_dir")).mkdir(parents=True, exist_ok=True)  # fails here, not after the run
            self._input_log = InputLog() if value(self, "log_inputs") else None
            self._logging = True
        self._command_publishers = command_publishers(self, core.contract, candidates=value(self, "safety"))
        self._chunk_publisher = self.create_publisher(ActionChunkMessage, CHUNK_TOPIC, COMMAND_QOS)
        self._diagnostics = diagnostics.publisher(self)
        self._imagined_publisher = self.create_publisher(Image, "~/imagined", 1)
        self._imagined_ns = -NANOSECONDS * 60
        self._publishers_held = [*self._command_publishers.values(), self._chunk_publisher, self._diagnostics,
                                 self._imagined_publisher]  # fmt: skip
        self._told, self._fault_publisher = "", None
        if value(self, "safety"):
            self._fault_publisher = self.create_publisher(String, FAULT_TOPIC, LATCHED_QOS)
            self._publishers_held.append(self._fault_publisher)
            self._fault_publisher.publish(String(data=""))  # what was told before the last cleanup is over
        self._instruction_publisher = None
        if core.policy.spec.instruction:
            stream = core.builder.streams[core.policy.spec.instruction]
            self._instruction_publisher = self.create_publisher(String, stream.topic, stream_qos(stream))
            self._publishers_held.append(self._instruction_publisher)
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
        self.get_logger().info(f"policy {self._fingerprint} of {folder} is ready")

    def _load(self, place: str) -> Policy:
        """The policy at ``place``, or the planner that the parameters describe."""
        seed, dataset = int(value(self, "seed")), value(self, "dataset") or None
        if place != PLANNER:
            return load_policy(place, seed, dataset, str(value(self, "device")))
        from vla_core.planning.policy import PlannerPolicy, setup_from

        if not value(self, "world"):
            raise VlaError("parameter world is empty; with policy: planner name the folder of a world model")
        changes = [change for entry in value(self, "planner") for change in entry.split()]
        setup = setup_from(value(self, "world"), value(self, "checkpoint") or None, changes)
        return PlannerPolicy.load(setup, seed, dataset)

    def activate(self) -> None:
        """Start to act."""
        assert self.core is not None
        self._active, self._clocks = True, None
        if not self._synchronous:
            self._period_ns = self.core.contract.step_ns
            self._control_timer = self.create_timer(self._period_ns / NANOSECONDS, self._control)
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
        self._write_logs(self.core)
        for subscription in self._subscriptions_held:
            self.destroy_subscription(subscription)
        for timer in self._timers_held:
            self.destroy_timer(timer)
        for publisher in self._publishers_held:
            self.destroy_publisher(publisher)
        self._subscriptions_held, self._timers_held, self._publishers_held = [], [], []
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
            elif name in self._paces:  # the worker acts on these alone; waking it for all costs a tenth of the node
                self._wake.set()

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
        seen_ns = self._last_tick_ns if self._synchronous else self._newest_tick_ns(core)
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
        if self._instruction_publisher is None or self.core is None:
            raise VlaError("this policy takes no instruction; leave the goal's instruction empty")
        name = self.core.policy.spec.instruction
        assert name is not None, "there is a publisher for it"
        data = messages.text(text)
        self._instruction_publisher.publish(data)
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

    def _newest_tick_ns(self, core: PolicyCore) -> int | None:
        """Ticks follow the fastest stream; one that may be masked and has fallen silent leaves them to the next."""
        newest = {name: core.buffer.newest_ns(name) for name in self._paces}
        latest_ns = max((stamp for stamp in newest.values() if stamp is not None), default=0)
        for name in self._paces:
            stream, stamp_ns = core.builder.streams[name], newest[name]
            fresh = stamp_ns is not None and latest_ns - stamp_ns <= (stream.max_age_ns or 0)
            if fresh or stream.missing == "refuse":
                return stamp_ns
        return None

    # Commands out, synchronous.

    def _whole_tick_ns(self, core: PolicyCore) -> int | None:
        """The newest tick of which everything is here that is to be expected; None while something is not."""
        if not self._ticks.used:
            tick_ns = self._newest_tick_ns(core)
            return None if tick_ns is None or core.builder.due(core.buffer, tick_ns) else tick_ns
        if self._ticks.stamp_ns is None or self._ticks.stamp_ns < self._episode_ns:
            return None
        for topic in self._ticks.topics():
            for name in core.builder.by_topic.get(topic, []):
                if core.builder.streams[name].latched:
                    continue  # it was sent, and acknowledged, before
                sent_ns, here_ns = self._ticks.newest_ns(topic), self._received_ns.get(name)
                if here_ns is None or (sent_ns is not None and here_ns < sent_ns):
                    return None
        return self._ticks.stamp_ns

    def _answer(self) -> None:
        """Answer the newest observation once all of it is there."""
        core = self.core
        if core is None or not self._active or not self._is_listened_to():
            return
        tick_ns = self._whole_tick_ns(core)
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
            self._tell_fault(core.policy.fault)
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
            tick_ns = self._newest_tick_ns(core)
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
                self._tell_fault(core.policy.fault)
            except Exception as error:  # whatever it is: the control clock goes on, with the safe action
                self._report_fault(f"inference failed: {error}")

    def _control(self) -> None:
        """The control clock: the action for now, or the safe one when no chunk covers now or nothing may be trusted."""
        core = self.core
        assert core is not None
        now_ns = self._now_ns()
        if self._clock_jumped(now_ns):
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
            self._tell_fault(fault)

    def _clock_jumped(self, now_ns: int) -> bool:
        """Whether the ROS clock went back, or differs from the steady one, since the last control tick."""
        steady_ns = int(self.steady.now().nanoseconds)
        before, self._clocks = self._clocks, (now_ns, steady_ns)
        if before is None:
            return False
        passed_ns, steady_passed_ns = now_ns - before[0], steady_ns - before[1]
        own = bool(value(self, "use_sim_time"))
        if not own and steady_passed_ns > 1.5 * self._period_ns:  # the steps of simulated time are not this node's
            self.counts.late_ticks += 1
        if passed_ns < 0:
            return True
        # Simulated time may run at any speed, but never skips many control periods at once.
        return passed_ns > 2 * JUMP_NS if own else abs(passed_ns - steady_passed_ns) > JUMP_NS

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
        self._tell_fault("")
        self._send(frame)
        self._last_values = command.values
        self._age_s = (command.stamp_ns - observed_ns) / NANOSECONDS
        self.counts.commands += 1
        if observed_ns != self._answered_ns and not self._synchronous:
            self._answered_ns = observed_ns
            self._latency_ms.append((self._now_ns() - observed_ns) / 1e6)

    def _send(self, frame: dict[str, bytes]) -> None:
        for topic, data in frame.items():
            self._command_publishers[topic].publish(data)

    def _tell_fault(self, fault: str) -> None:
        """Tell the safety stage what keeps the policy from acting, beside what it sees itself."""
        if fault != self._told and self._fault_publisher is not None:
            self._told = fault
            self._fault_publisher.publish(String(data=fault))

    def _is_listened_to(self) -> bool:
        return not self._unheard()

    def _unheard(self) -> list[str]:
        """Command topics without a subscriber: in lockstep nothing is answered before all have one."""
        return [p.topic_name for p in self._command_publishers.values() if not p.get_subscription_count()]

    def _publish_safe(self, stamp_ns: int, reason: str) -> None:
        """The contract's safe action: zero, or the last value, per entry; of a vehicle, a trajectory of one row."""
        assert self.core is not None
        contract = self.core.contract
        # In a frame that moves along, nothing that was said before still holds: one row at its origin means to stop.
        values = np.zeros(len(contract.action_names)) if contract.plans else contract.safe_values(self._last_values)
        if values is not None:
            self._send(encode_frame(contract, stamp_ns, values, (stamp_ns, values[None])))
            self.counts.safe_commands += 1
        self._planned_ns = -1
        self.faults.note(reason)

    def _publish_chunk(self, chunk: ActionChunk) -> None:
        core = self.core
        if core is None:
            return
        contract = core.contract
        message = ActionChunkMessage()
        message.header.stamp = self.get_clock().now().to_msg()
        message.header.frame_id = next(iter(contract.actions.values())).frame_id
        message.observation_stamp = Time(nanoseconds=chunk.observation_stamp_ns).to_msg()
        message.step.sec, message.step.nanosec = divmod(chunk.step_ns, NANOSECONDS)
        message.valid_until = Time(nanoseconds=chunk.valid_until_ns).to_msg()
        message.names, message.units = list(contract.action_names), list(contract.action_units)
        message.horizon = len(chunk.actions)
        message.actions = chunk.actions.reshape(-1).tolist()
        self._chunk_publisher.publish(message)
        self.counts.chunks += 1
        if self._input_log is not None and core.last_observation is not None:
            self._input_log.add(core.last_observation, chunk)
        self._publish_imagined(core, chunk.observation_stamp_ns)

    def _publish_imagined(self, core: PolicyCore, stamp_ns: int) -> None:
        """Show what the newest plan is expected to look like, where somebody looks; in the worker, as it takes time."""
        now_ns = int(self.steady.now().nanoseconds)
        due = now_ns - self._imagined_ns >= value(self, "imagined_s") * NANOSECONDS
        if not due or not self._imagined_publisher.get_subscription_count():
            return
        pixels = core.policy.imagined()
        if pixels is not None:
            self._imagined_ns = now_ns
            self._imagined_publisher.publish(messages.image(stamp_ns, pixels, "imagined"))

    # What people see of it.

    def _report_fault(self, text: str) -> None:
        self.faults.note(text)
        self.counts.faults += 1
        self.get_logger().warning(text, throttle_duration_sec=1.0)

    def _publish_diagnostics(self) -> None:
        core = self.core
        if core is None:
            return
        causes = [*self.faults.take(), core.policy.fault, *self.setup.faults, *self._waiting(core), self._misfit(core)]
        values = {
            "checkpoint": self._fingerprint, "active": self._active, "strategy": core.executor.execution.strategy,
            **self.counts.as_dict(), **percentiles("inference_ms", core.inference_ms),
            **percentiles("observation_to_command_ms", self._latency_ms), **core.metrics.summary(RECENT),
            **core.policy.report(),
        }  # fmt: skip
        now_ns = self._time_of_sight(core)
        hardware = core.contract.name
        diagnostics.publish(self, self._diagnostics, [
            diagnostics.fault_status(self, "policy", values, "; ".join(dict.fromkeys(filter(None, causes))), hardware),
            *(diagnostics.fault_status(self, f"sensor {name}", seen, fault, hardware)
              for name, (fault, seen) in sensor_values(core, now_ns, self.lost).items()),
        ])  # fmt: skip

    def _time_of_sight(self, core: PolicyCore) -> int:
        """The instant that sensors are judged at; in lockstep time stands still between the ticks."""
        return (self._newest_tick_ns(core) or 0) if self._synchronous else self._now_ns()

    def _waiting(self, core: PolicyCore) -> list[str]:
        """What an active policy waits for, also before anything came and after all of it fell silent."""
        if not self._active:
            return []
        if not self._synchronous and value(self, "use_sim_time") and self._now_ns() == 0:
            return ["use_sim_time is true and time is 0: nothing was received on /clock"]
        unheard = self._unheard() if self._synchronous else []
        lost = core.builder.lost(core.buffer, self._time_of_sight(core))
        return [*(f"waiting for a subscriber of {topic}" for topic in unheard), *lost]

    def _misfit(self, core: PolicyCore) -> str:
        """Name a publisher that is not heard: the middleware would only stay silent about it."""
        for name, stream in core.builder.streams.items():
            reason = misfit(self, stream) if core.buffer.newest_ns(name) is None else ""
            if reason:
                return f"{name} ({stream.topic}): {reason}"
        return ""

    def _write_logs(self, core: PolicyCore) -> None:
        if not self._logging:
            return
        folder = Path(value(self, "log_dir"))
        record = {
            "observe_ms": list(core.observe_ms),
            "inference_ms": list(core.inference_ms),
            "observation_to_command_ms": list(self._latency_ms),
            "execution": core.metrics.summary(),
            "counts": self.counts.as_dict(),
        }
        (folder / "latency.json").write_text(json.dumps(record), encoding="utf-8")
        if self._input_log is not None:
            self._input_log.save(folder / "inputs.safetensors", core.policy)
        self._input_log, self._logging = None, False

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def main() -> int:
    """Entry point of ``policy_node``."""
    return process.main(PolicyNode, run)


if __name__ == "__main__":
    sys.exit(main())
