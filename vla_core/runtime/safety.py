"""The safety stage without ROS: candidate commands in, commands that keep the contract's limits out.

It is deterministic: all it knows of time are the two readings that come with each call, ``now_ns`` of the ROS clock
and ``steady_ns`` of a clock that never jumps. Candidates are answered at once, with their own stamp; ``tick`` covers
the case that none come. Between them commands are placed on the control grid:

- A command's limits are those of one control period, whatever the jitter of its arrival: derivatives of jittering
  stamps would be noise. The grid follows the stamps; a command less than a quarter period after its place is dropped
  as early, one that comes a period late may move for two, and a longer pause gives no more than two.
- A fault is answered by the declared safe action until its cause is over; then commands are followed again from
  where the output is, within the limits. ``latch`` needs a reset as well.

In simulated time only that clock counts, as it may stand still or skip: no single skip makes anything silent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_core.commands import check_action, decode, encode
from vla_core.config import ConfigError
from vla_core.contract import NANOSECONDS, Action, RobotContract, Stream
from vla_core.observation.decode import decode as decode_observation
from vla_core.observation.messages import MessageError, header_stamp_ns
from vla_core.runtime.guard import Guard, Proposal
from vla_core.runtime.trajectory_guard import TrajectoryGuard
from vla_core.runtime.watch import Watch

EARLY = 0.25  # periods; what comes sooner after the last command has no place on the grid
LATE = 1.75  # periods; what comes later may move for two
SEVERITY = ("clamp", "hold", "stop", "latch")
WITH_REACTION = ("workspace", "not_finite", "command_age", "heartbeat", "sensor", "clock")
ALIKE = {"undecodable": "not_finite", "policy": "heartbeat"}  # causes that have the reaction of another

Frame = dict[str, bytes]  # topic to serialized command


@dataclass
class _Output:
    """What one action's commands need beside its limits."""

    action: Action
    guard: Guard | TrajectoryGuard
    heartbeat: Watch
    at_ns: int | None = None  # the last command's place on the control grid
    candidate_ns: int | None = None
    fault: tuple[str, str] | None = None  # cause and description of what the last candidate did wrong


class SafetyStage:
    """See the module. ``simulated`` means that ``now_ns`` is simulated time.

    ``sensors`` are the observations to pass to :meth:`sensor`; of those in ``measured`` it needs the message itself.
    ``policy_fault`` is why the policy says that it cannot act, empty while it can; it is reacted to as to its silence.
    """

    def __init__(self, contract: RobotContract, simulated: bool = False) -> None:
        self.contract, self.simulated = contract, simulated
        safety = contract.safety
        self._jump_ns = round(safety.clock_jump_s * NANOSECONDS)
        self._command_age_ns = round(safety.command_age_s * NANOSECONDS)
        axes = safety.workspace.axes if safety.workspace else ()
        self._outputs: dict[str, _Output] = {}
        self._starts: dict[str, str] = {}  # action to the observation of its joints
        for name, action in contract.actions.items():
            check_action(action)
            mine = [axis for axis in axes if axis.action in action.names]
            guard: Guard | TrajectoryGuard
            if action.publish == "chunk":
                if mine and (action.kind != "position" or action.type in TrajectoryGuard.RELATIVE):
                    raise ConfigError(f"safety.workspace.axes: {mine[0].action} of {action.topic} is no place in the "
                                      "workspace; choices: positions of joints, or commands of one step")  # fmt: skip
                guard = TrajectoryGuard(action, contract.chunk_step_ns, mine)
            else:
                guard = Guard(action, 1 / contract.rate_hz, mine)
            heartbeat = Watch(round(safety.heartbeat_s * NANOSECONDS), self._jump_ns)
            self._outputs[name] = _Output(action, guard, heartbeat)
            stream = _measuring(contract, action)
            if stream is not None:
                self._starts[name] = stream
        watched = (
            [n for n, s in contract.observations.items() if s.rate_hz] if safety.sensors is None else safety.sensors
        )
        self.measured = {*self._starts.values(), *([safety.workspace.stream] if safety.workspace else [])}
        self.sensors = tuple(n for n in contract.observations if n in watched or n in self.measured)
        self._watches = {name: Watch(_max_age_ns(contract.observations[name]), self._jump_ns) for name in self.sensors}
        self._positions: dict[str, tuple[dict[str, float], int]] = {}  # newest of the measured streams, and its stamp
        self._now_ns: int | None = None
        self._steady_ns = 0
        self.policy_fault = ""
        self._clock_fault = ""
        self._latched = ""
        self._stop_sent = False  # whether the safe action was sent since the last fault
        self._state = "waiting"
        self.counts: dict[str, int] = dict.fromkeys(
            ("candidates", "commands", "passed", "early", "unanswered", "stops", "latches"), 0
        )
        self.reasons: dict[str, str] = {}  # cause to its last description
        if simulated:
            self._restart_watches()

    # What people see of it.

    @property
    def state(self) -> str:
        """waiting (nothing was commanded), passing, intervening, stopping or latched."""
        return self._state

    @property
    def rests(self) -> bool:
        """Whether every action's last command was its safe action, or none was sent."""
        return all(output.guard.rests for output in self._outputs.values())

    @property
    def commanded(self) -> bool:
        """Whether any command was sent."""
        return self.counts["commands"] > 0

    @property
    def latched(self) -> str:
        """Why it is latched; empty when it is not."""
        return self._latched

    def stop_periods(self) -> int:
        """Bound on the control periods until a stop from here rests, where positions are held and not sent to zero."""
        guards = [output.guard for output in self._outputs.values()]
        return max(guard.stop_periods() if isinstance(guard, Guard) else 1 for guard in guards)

    def faults(self) -> dict[str, str]:
        """What is wrong now: where (a cause, a sensor, an action) to its description."""
        return {place: f"{cause}: {text}" for place, (cause, text) in self._faults().items()}

    def ages_s(self) -> dict[str, float | None]:
        """Age of each sensor's newest message, seconds; None when nothing was received."""
        ages = {name: watch.age_ns for name, watch in self._watches.items()}
        return {name: None if age is None else age / NANOSECONDS for name, age in ages.items()}

    # In and out.

    def sensor(self, name: str, data: bytes, now_ns: int, steady_ns: int) -> None:
        """A message of one of the ``sensors``; raises :class:`MessageError` for one that cannot be used.

        Such a message counts as none: the sensor will be stale.
        """
        self._advance(now_ns, steady_ns)
        stream = self.contract.observations[name]
        stamp = header_stamp_ns(stream.type, data)
        stamp_ns = now_ns if stamp is None else stamp
        positions = self._positions_of(stream, data) if name in self.measured else {}
        if self._watches[name].arrive(stamp_ns, now_ns) and positions:
            self._positions[name] = (positions, stamp_ns)

    def candidate(self, name: str, data: bytes, now_ns: int, steady_ns: int) -> Frame:
        """Answer a candidate of action ``name``: its command, the safe one instead, or none."""
        self._advance(now_ns, steady_ns)
        output = self._outputs[name]
        action = output.action
        self.counts["candidates"] += 1
        at_ns, rows, fault = now_ns, None, None
        try:
            stamp = header_stamp_ns(action.type, data)
            rows = decode(action, data)
            at_ns = now_ns if stamp is None else stamp
        except MessageError as error:
            text = str(error)
            fault = ("undecodable", text if text.startswith(action.topic) else f"{action.topic}: {text}")
        if self.simulated and rows is not None:  # the clock comes by a topic of its own, and may be behind
            if now_ns - at_ns > self._jump_ns:
                self._jumped(at_ns - now_ns)
            if now_ns - at_ns > self._jump_ns or at_ns > now_ns:
                now_ns = at_ns
        output.heartbeat.restart(0)
        output.candidate_ns = now_ns
        if rows is not None:
            fault = self._candidate_fault(action, rows, at_ns, now_ns)
            if fault and fault[0] == "command_age":
                at_ns = now_ns
        output.fault = fault
        early = self.counts["early"]
        frame = self._answer(name, rows, at_ns, data)
        self.counts["unanswered"] += not frame and self.counts["early"] == early
        return frame

    def tick(self, now_ns: int, steady_ns: int) -> Frame:
        """Look for faults, once a control period; the safe commands, where no candidates give rise to them."""
        self._advance(now_ns, steady_ns)
        asked = [output for output in self._outputs.values() if output.candidate_ns is not None]
        if not asked or not self._must_stop():
            return {}
        # Candidates give rise to commands while they come: in lockstep, who waits for an answer must get one.
        at_once = not self._stop_sent and not self.simulated
        frame: Frame = {}
        for output in asked:
            silent_ns = output.heartbeat.age_ns
            if at_once or silent_ns is None or silent_ns >= 1.5 * self.contract.step_ns:
                frame |= self._act_safely(output, now_ns, "latch")
        return frame

    def halt(self, now_ns: int, steady_ns: int) -> Frame:
        """Safe commands for a stage that is about to end; call it once a period until it ``rests``."""
        self._advance(now_ns, steady_ns)
        frame: Frame = {}
        for output in self._outputs.values():
            if output.candidate_ns is not None:
                frame |= self._act_safely(output, now_ns, "halt")
        return frame

    def end(self, now_ns: int) -> Frame:
        """The declared safe action at once, whatever the limits: for an end that cannot wait for :meth:`halt`."""
        frame: Frame = {}
        for output in self._outputs.values():
            action, guard = output.action, output.guard
            if output.candidate_ns is None or guard.rests or isinstance(guard, TrajectoryGuard):
                continue
            assert guard.states is not None, "what does not rest has moved"
            values = [0.0 if entry.safe_zero else entry.value(state)
                      for entry, state in zip(guard.entries, guard.states, strict=True)]  # fmt: skip
            frame[action.topic] = encode(action, now_ns, np.array([values]), self.contract.step_ns)
        return frame

    def trip(self, reason: str) -> None:
        """Latch from outside."""
        self._latch("trip", reason)

    def reset(self, now_ns: int, steady_ns: int) -> str:
        """Release a latch; returns why not, or an empty text."""
        self._advance(now_ns, steady_ns)
        if not self._latched:
            return "nothing is latched"
        if self.faults():
            return f"the cause persists: {'; '.join(self.faults().values())}"
        self._latched = ""
        self._state = "stopping"
        return ""

    # Faults.

    def _candidate_fault(self, action: Action, rows: np.ndarray, at_ns: int, now_ns: int) -> tuple[str, str] | None:
        bad = [name for name, column in zip(action.names, rows.T, strict=True) if not np.isfinite(column).all()]
        if bad:
            return "not_finite", f"{', '.join(bad)} of {action.topic} not finite"
        age_ns = now_ns - at_ns
        limit_ns, side = (self._command_age_ns, "ago") if age_ns > 0 else (self._jump_ns, "ahead")
        if abs(age_ns) <= limit_ns:
            return None
        text = f"{action.topic} stamped {abs(age_ns) / NANOSECONDS:.3g} s {side}, limit {limit_ns / NANOSECONDS:.3g} s"
        return "command_age", text

    def _faults(self) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        if self._clock_fault:
            found["clock"] = ("clock", self._clock_fault)
        if self.policy_fault:
            found["policy"] = ("policy", self.policy_fault)
        for name, watch in self._watches.items():
            if watch.fault:
                found[name] = ("sensor", f"{name} ({self.contract.observations[name].topic}) {watch.fault}")
        for name, output in self._outputs.items():
            if output.fault:
                found[name] = output.fault
            elif output.candidate_ns is not None and output.heartbeat.fault:
                found[name] = ("heartbeat", f"candidates of {output.action.topic} {output.heartbeat.fault}")
        return found

    def _reaction(self, cause: str) -> str:
        cause = ALIKE.get(cause, cause)
        key = cause if cause in WITH_REACTION else "limits"
        reaction: str = getattr(self.contract.safety.reactions, key)
        return reaction

    def _must_stop(self) -> bool:
        """Take note of the faults of this moment; whether they, or a latch, ask for the safe action."""
        stop = False
        for cause, text in self._faults().values():
            self.reasons[cause] = text
            reaction = self._reaction(cause)
            stop |= reaction in ("stop", "latch")
            if reaction == "latch":
                self._latch(cause, text)
        if stop and self._state not in ("stopping", "latched"):
            self.counts["stops"] += 1
            self._state = "stopping"
            self._stop_sent = False
        return stop or bool(self._latched)

    def _latch(self, cause: str, text: str) -> None:
        self.reasons[cause] = text
        if not self._latched:
            self._latched = text
            self._stop_sent = False
            self.counts["latches"] += 1
        self._state = "latched"

    # Commands.

    def _answer(self, name: str, rows: np.ndarray | None, at_ns: int, data: bytes) -> Frame:
        output = self._outputs[name]
        guard = output.guard
        stop = self._must_stop()
        # A stamp of the future must not use up the periods until then.
        grid_ns = at_ns if self.simulated else min(at_ns, self._now_ns or at_ns)
        periods = 1 if isinstance(guard, TrajectoryGuard) else self._periods(output, grid_ns)
        if not periods:
            self.counts["early"] += 1
            return {}
        if stop:
            if isinstance(guard, Guard) and rows is not None and np.isfinite(rows).all():
                guard.ask(rows[0], periods)
            return self._safe(output, at_ns, periods)
        if output.fault is not None or rows is None:  # declared to hold
            return self._hold(output, at_ns, periods, [output.fault[0]] if output.fault else [])
        waits = self._place(name, guard, at_ns)
        if waits:
            self.reasons["start"] = waits
            return {}
        whole = isinstance(guard, TrajectoryGuard)
        proposal = guard.propose(rows, at_ns) if whole else guard.propose(rows[0], periods)
        broken = {cause: text for cause, text in proposal.own.items() if self._reaction(cause) != "clamp"}
        if "workspace" in proposal.causes and self._reaction("workspace") != "clamp":
            broken["workspace"] = proposal.causes["workspace"]
        if broken:
            return self._refuse(output, broken, at_ns, periods)
        self._state = "intervening" if proposal.altered else "passing"
        self.reasons |= proposal.causes
        return self._send(output, proposal, at_ns, None if proposal.altered else data, list(proposal.causes))

    def _refuse(self, output: _Output, broken: dict[str, str], at_ns: int, periods: int) -> Frame:
        """React to a candidate that breaks limits; the fault lasts until one breaks none."""
        cause = max(broken, key=lambda cause: SEVERITY.index(self._reaction(cause)))
        self.reasons |= broken
        if self._reaction(cause) == "hold":
            return self._hold(output, at_ns, periods, list(broken))
        output.fault = (cause, broken[cause])
        self._must_stop()
        return self._safe(output, at_ns, periods)

    def _act_safely(self, output: _Output, now_ns: int, otherwise: str) -> Frame:
        """A safe command that answers no candidate, if one has its place now."""
        if isinstance(output.guard, TrajectoryGuard):
            return {} if output.guard.rests else self._safe(output, now_ns, 1, otherwise)
        periods = self._periods(output, now_ns)
        return self._safe(output, now_ns, periods, otherwise) if periods else {}

    def _hold(self, output: _Output, at_ns: int, periods: int, causes: list[str]) -> Frame:
        """Repeat the last command; of trajectories, the last one goes on by itself."""
        self._state = "intervening"
        proposal = None if isinstance(output.guard, TrajectoryGuard) else output.guard.hold(periods)
        if proposal is None:
            return {}
        return self._send(output, proposal, at_ns, None, causes)

    def _safe(self, output: _Output, at_ns: int, periods: int, otherwise: str = "latch") -> Frame:
        """The next command on the way to the safe action; a trajectory leads there whole, and is sent once.

        ``otherwise`` names the cause when nothing is wrong any more.
        """
        causes = list(dict.fromkeys(cause for cause, _ in self._faults().values())) or [otherwise]
        guard = output.guard
        self._clock_fault = ""  # it is answered now: what follows is on the new clock
        self._stop_sent = True
        if isinstance(guard, TrajectoryGuard):
            # In lockstep, who waits for an answer must get one each time.
            proposal = None if guard.rests and not self.simulated else guard.stop(at_ns)
        else:
            self._place_measured(guard, at_ns)
            proposal = guard.stop(periods)
        if proposal is None:
            return {}
        return self._send(output, proposal, proposal.stamp_ns or at_ns, None, causes)

    def _send(self, output: _Output, proposal: Proposal, at_ns: int, data: bytes | None, causes: list[str]) -> Frame:
        """Commit to a proposal; a candidate that passes leaves bit for bit as it came."""
        output.guard.commit(proposal)
        self.counts["commands"] += 1
        for cause in causes:
            self.counts[cause] = self.counts.get(cause, 0) + 1
        if data is None:
            whole = output.action.publish == "chunk"
            step_ns = self.contract.chunk_step_ns if whole else self.contract.step_ns
            data = encode(output.action, at_ns, proposal.rows, step_ns)
        else:
            self.counts["passed"] += 1
        return {output.action.topic: data}

    def _periods(self, output: _Output, at_ns: int) -> int:
        """Control periods that a command at ``at_ns`` may move for: 0 (early), 1 or 2."""
        step_ns = self.contract.step_ns
        if output.at_ns is None:
            output.at_ns = at_ns
            return 1
        passed = (at_ns - output.at_ns) / step_ns
        if passed < EARLY:
            return 0
        periods = 1 if passed < LATE else 2
        output.at_ns = at_ns if passed > periods + 1 - EARLY else output.at_ns + periods * step_ns
        return periods

    # Where the robot is.

    def _place(self, name: str, guard: Guard | TrajectoryGuard, at_ns: int) -> str:
        """Tell a guard where the robot is; what is missing for a first command."""
        if isinstance(guard, Guard):
            self._place_measured(guard, at_ns)
        if guard.states is not None or name not in self._starts:
            return ""
        stream = self._starts[name]
        if stream not in self._positions or self._watches[stream].fault:
            return f"no measured position of {name} yet: {stream} ({self.contract.observations[stream].topic})"
        positions, _ = self._positions[stream]
        guard.start(np.array([positions[entry] for entry in guard.action.names]))
        return ""

    def _place_measured(self, guard: Guard, at_ns: int) -> None:
        workspace = self.contract.safety.workspace
        if workspace is None or guard.states is None or workspace.stream not in self._positions:
            return
        if any(entry.axis is not None and not entry.is_position for entry in guard.entries):
            positions, stamp_ns = self._positions[workspace.stream]
            guard.place(positions, max(0.0, (at_ns - stamp_ns) / self.contract.step_ns))

    @staticmethod
    def _positions_of(stream: Stream, data: bytes) -> dict[str, float]:
        values = decode_observation(stream, data)
        assert isinstance(values, np.ndarray), "a stream with names gives numbers"
        return dict(zip(stream.names, values.tolist(), strict=True))

    # Time.

    def _advance(self, now_ns: int, steady_ns: int) -> None:
        """Let the time since the last call pass; notice a clock that jumped."""
        if self._now_ns is not None:
            moved_ns, steady_moved_ns = now_ns - self._now_ns, steady_ns - self._steady_ns
            expected_ns = max(moved_ns, 0) if self.simulated else steady_moved_ns
            if abs(moved_ns - expected_ns) > self._jump_ns:
                self._jumped(moved_ns - expected_ns)
            for watch in [*self._watches.values(), *(output.heartbeat for output in self._outputs.values())]:
                watch.elapse(min(expected_ns, watch.limit_ns // 2) if self.simulated else expected_ns)
        self._now_ns, self._steady_ns = now_ns, steady_ns

    def _jumped(self, by_ns: int) -> None:
        side = "back" if by_ns < 0 else "ahead"
        self._clock_fault = f"the clock jumped {side} by {abs(by_ns) / NANOSECONDS:.3g} s"
        self._restart_watches()
        for output in self._outputs.values():
            output.at_ns = None

    def _restart_watches(self) -> None:
        # Simulated time may reach us before what the sensors saw at it: their time starts now.
        for watch in self._watches.values():
            watch.restart(0 if self.simulated else None)


def _max_age_ns(stream: Stream) -> int:
    assert stream.max_age_ns is not None, "the contract has checked that watched streams have an age"
    return stream.max_age_ns


def _measuring(contract: RobotContract, action: Action) -> str | None:
    """The observation that measures the positions which ``action`` commands; None when there is none."""
    if action.kind != "position" or (action.publish == "chunk" and action.type in TrajectoryGuard.RELATIVE):
        return None
    for name, stream in contract.observations.items():
        if set(action.names) <= set(stream.names) and stream.field in (None, "position"):
            return name
    return None
