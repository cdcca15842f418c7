"""The trajectory follower as a lifecycle node: a vehicle's trajectories in, its steering and speed out.

It follows the contract's trajectory (what the safety node passed, where there is one) by the contract's odometry, and
sends ``following.command``; see ``vla_core/runtime/follower.py``.

``mode: realtime`` commands on its own clock, at ``rate_hz``. ``synchronous`` answers every trajectory with a command of
the same stamp, once the odometry up to that stamp is there, for lockstep simulation; a trajectory that cannot be used
is answered too, by braking.

Without a trajectory, with one that is too old, and without odometry it brakes to a stand along the last path. So it
does when it is deactivated or told to end, for at most ``stop_timeout_s``; then it commands 0 at once.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from geometry_msgs.msg import Point, Pose, PoseStamped, Quaternion
from nav_msgs.msg import Path
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.duration import Duration
from rclpy.time import Time

from vla_core.commands import encode
from vla_core.contract import NANOSECONDS
from vla_core.errors import VlaError
from vla_core.observation.messages import header_stamp_ns
from vla_core.runtime.follower import ODOMETRY, TrajectoryFollower
from vla_ros import diagnostics, process
from vla_ros.bridge import COMMAND_QOS, every_message, message_class, misfit, subscribe_episodes, subscribe_stream
from vla_ros.lifecycle import GuardedNode, run
from vla_ros.lockstep import Ticks
from vla_ros.msg import Episode
from vla_ros.parameters import choice, contract_of, declare, value

ACK_TIMEOUT = Duration(seconds=1)
SYNCHRONOUS_POLL_S = 0.02


class TrajectoryFollowerNode(GuardedNode):
    """See the module; parameters are declared in ``__init__``."""

    def __init__(self, **options: Any) -> None:
        super().__init__("trajectory_follower", **options)
        declare(self, "contract", "", "the vehicle's contract, a name in config/robots or a file")
        declare(self, "checkpoint", "", "folder of a policy; its contract counts when contract is empty")
        declare(self, "mode", "realtime", "realtime (its own clock) or synchronous (answers trajectories: lockstep)")
        declare(self, "rate_hz", 50.0, "realtime: commands per second", low=1.0, high=1000.0)
        declare(self, "autostart", True, "configure and activate at start")
        declare(self, "stop_timeout_s", 4.0, "how long the last stop may brake before 0 is sent at once, s",
                low=0.0, high=30.0)  # fmt: skip
        self.follower: TrajectoryFollower | None = None
        self.counts: Counter[str] = Counter()
        self.faults = diagnostics.Faults()
        self._active = False
        self._held: list[tuple[Callable[[Any], Any], Any]] = []  # how to destroy it, and what
        self._control_timer: Any = None
        self._asked_ns: int | None = None  # synchronous: stamp of the trajectory that is still to be answered
        self._answered_ns = -1  # synchronous: the newest instant that was answered in this episode
        self._odometry_ns: int | None = None  # stamp of the newest odometry that came, of use or not
        self._braked = False

    def remember(self, fault: str) -> None:
        """Keep the line that says why a transition failed."""
        self.faults.note(fault)

    @property
    def fault(self) -> str:
        """The last fault."""
        return self.faults.last

    def configure(self) -> None:
        """Read the contract and subscribe."""
        contract = contract_of(self)
        self._synchronous = choice(self, "mode", ("realtime", "synchronous")) == "synchronous"
        self.follower = follower = TrajectoryFollower(contract)
        self.contract = contract
        self._action = follower.following.command
        self._stream = contract.stream(follower.following.odometry)
        (trajectory,) = contract.actions.values()
        self._trajectory = trajectory
        self._asked_ns = self._odometry_ns = None
        self._answered_ns = -1
        self._publisher = self.create_publisher(message_class(self._action.type), self._action.topic, COMMAND_QOS)
        self._path_publisher = self.create_publisher(Path, "~/path", 1)
        self._diagnostics = diagnostics.publisher(self)
        self._held = [(self.destroy_publisher, p) for p in (self._publisher, self._path_publisher, self._diagnostics)]
        # A stopped simulated clock must not stop the diagnostics.
        timers = [(diagnostics.PERIOD_S, self._publish_diagnostics)]
        if self._synchronous:
            self._ticks = Ticks(self, self._answer)
            self._held.append((self.destroy_subscription, self._ticks.subscription))
            timers.append((SYNCHRONOUS_POLL_S, self._answer))  # covers the wait for the first listener
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._held += [(self.destroy_timer, self.create_timer(*timer, clock=steady)) for timer in timers]
        # Odometry goes first: the executor hands out in this order what waits at the same time.
        subscriptions = (
            subscribe_stream(
                self, every_message(self._stream) if self._synchronous else self._stream, self._on_odometry
            ),
            self.create_subscription(
                message_class(trajectory.type), trajectory.topic, self._on_trajectory, COMMAND_QOS, raw=True
            ),
            subscribe_episodes(self, self._on_episode),
        )
        self._held += [(self.destroy_subscription, subscription) for subscription in subscriptions]
        self.get_logger().info(f"following {trajectory.topic} of {contract.name} by {self._stream.topic}")

    def activate(self) -> None:
        """Start to command."""
        self._active = True
        if not self._synchronous:
            self._control_timer = self.create_timer(1.0 / value(self, "rate_hz"), self._control)

    def deactivate(self) -> None:
        """Brake to a stand."""
        was_active, self._active = self._active, False
        if self._control_timer is not None:
            self.destroy_timer(self._control_timer)
            self._control_timer = None
        if was_active and self.follower is not None:
            self._come_to_rest(self.follower)

    def _come_to_rest(self, follower: TrajectoryFollower) -> None:
        follower.brake()
        start_ns, start_steady_ns = self._now_ns(), time.monotonic_ns()
        # In lockstep time stands still, and nobody takes more than one command.
        timeout_ns = 0 if self._synchronous else round(value(self, "stop_timeout_s") * NANOSECONDS)
        elapsed_ns = 0
        while elapsed_ns < timeout_ns:  # time goes on here, whatever becomes of a simulated clock
            command = follower.command(start_ns + elapsed_ns)
            self._send(command, start_ns + elapsed_ns)
            if command[1] == 0.0:
                break
            time.sleep(1.0 / value(self, "rate_hz"))
            elapsed_ns = time.monotonic_ns() - start_steady_ns
        else:
            self._send(follower.command(start_ns + elapsed_ns) * [1.0, 0.0], start_ns + elapsed_ns)
        self._publisher.wait_for_all_acked(ACK_TIMEOUT)

    def clean_up(self) -> None:
        """Unsubscribe."""
        for destroy, held in self._held:
            destroy(held)
        self._held = []
        self.follower = None

    # Messages in.

    def _on_odometry(self, data: bytes) -> None:
        if self.follower is None:
            return
        self._note(self.follower.add_odometry(data), "odometry")
        stamp_ns = _stamp_ns(ODOMETRY, data)
        if stamp_ns is not None:
            self._odometry_ns = stamp_ns
        self._answer()

    def _on_trajectory(self, data: bytes) -> None:
        if self.follower is None:
            return
        fault = self.follower.add_trajectory(data)
        self._note(fault, "trajectories")
        if not fault:
            self._publish_path(self.follower)
        stamp_ns = _stamp_ns(self._trajectory.type, data)
        if stamp_ns is not None:
            self._asked_ns = stamp_ns
        self._answer()

    def _on_episode(self, message: Episode) -> None:
        if self.follower is None or message.state != Episode.START:
            return
        start_ns = Time.from_msg(message.header.stamp).nanoseconds
        self.follower.reset(start_ns)
        if self._answered_ns != start_ns:  # else the first trajectory overtook this mark and is answered
            self._answered_ns = -1
        if self._asked_ns is not None and self._asked_ns < start_ns:
            self._asked_ns = None

    def _note(self, fault: str, kind: str) -> None:
        self.counts[kind] += 1
        if fault:
            self.counts[f"{kind}_refused"] += 1
            self.faults.note(fault)
            self.get_logger().warning(fault, throttle_duration_sec=1.0)

    # Commands out.

    def _control(self) -> None:
        """The control clock of realtime."""
        now_ns = self._now_ns()
        # Before anything came there is nothing to stop, and a vehicle that others drive is not this node's.
        if self.follower is not None and (self.follower.trajectory_ns is not None or self.counts["commands"]):
            self._command(self.follower, now_ns)

    def _answer(self) -> None:
        """Lockstep: command for the trajectory that came, when all odometry until its stamp is there too."""
        follower, at_ns = self.follower, self._asked_ns
        if not self._synchronous or not self._active or follower is None or at_ns is None:
            return
        if self._ticks.used and at_ns <= self._answered_ns:
            # A stop of the safety node keeps the stamp of what it stops: it is for the tick that is not answered yet.
            if self._ticks.stamp_ns is None or self._ticks.stamp_ns <= self._answered_ns:
                return
            at_ns = self._ticks.stamp_ns
        if not self._publisher.get_subscription_count() or not self._has_odometry(at_ns):
            return
        self._asked_ns, self._answered_ns = None, at_ns
        self._command(follower, at_ns)

    def _has_odometry(self, at_ns: int) -> bool:
        needed_ns: int | None = at_ns
        if self._ticks.used:
            if self._ticks.stamp_ns is None or self._ticks.stamp_ns < at_ns:
                return False
            needed_ns = self._ticks.newest_ns(self._stream.topic) if self._ticks.stamp_ns == at_ns else None
        return needed_ns is None or (self._odometry_ns is not None and self._odometry_ns >= needed_ns)

    def _command(self, follower: TrajectoryFollower, at_ns: int) -> None:
        command = follower.command(at_ns)
        if follower.fault:
            self.counts["faults"] += 1
            self.faults.note(follower.fault)
            self.get_logger().warning(f"braking: {follower.fault}", throttle_duration_sec=1.0)
        self._send(command, at_ns)
        if follower.braking != self._braked:  # people want to know at once
            self._braked = follower.braking
            self._publish_diagnostics()

    def _send(self, command: np.ndarray, at_ns: int) -> None:
        self._publisher.publish(encode(self._action, at_ns, command[None], self.contract.step_ns))
        self.counts["commands"] += 1

    # What people see of it.

    def _publish_path(self, follower: TrajectoryFollower) -> None:
        rows = follower.followed()
        if rows is None or follower.trajectory_ns is None or not self._path_publisher.get_subscription_count():
            return
        path = Path()
        path.header.frame_id = self._stream.frame_id or "odom"
        path.header.stamp = Time(nanoseconds=follower.trajectory_ns).to_msg()
        for k, (x, y, z, *q) in enumerate(rows.tolist()):
            stamped = PoseStamped(pose=Pose(position=Point(x=x, y=y, z=z), orientation=Quaternion(
                x=q[0], y=q[1], z=q[2], w=q[3])))  # fmt: skip
            stamped.header.frame_id = path.header.frame_id
            stamped.header.stamp = Time(nanoseconds=follower.trajectory_ns + k * self.contract.chunk_step_ns).to_msg()
            path.poses.append(stamped)
        self._path_publisher.publish(path)

    def _publish_diagnostics(self) -> None:
        follower = self.follower
        if follower is None:
            return
        now_ns = self._now_ns()
        waiting = []
        if self._odometry_ns is None:
            reason = misfit(self, self._stream)
            waiting = [f"{self._stream.topic}: {reason}"] if reason else []
        causes = "; ".join(dict.fromkeys([*self.faults.take(), *filter(None, [follower.fault]), *waiting]))
        values: dict[str, Any] = {"active": self._active, "braking": follower.braking, **self.counts}
        if not self._synchronous:
            for name, stamp_ns in (("trajectory", follower.trajectory_ns), ("odometry", self._odometry_ns)):
                values[f"{name}_age_s"] = None if stamp_ns is None else (now_ns - stamp_ns) / NANOSECONDS
        state = diagnostics.fault_status(self, "trajectory_follower", values, causes, self.contract.name)
        diagnostics.publish(self, self._diagnostics, [state])

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def _stamp_ns(type_name: str, data: bytes) -> int | None:
    """Stamp of a message that may be damaged in all else."""
    try:
        return header_stamp_ns(type_name, data)
    except VlaError:
        return None


def main() -> int:
    """Entry point of ``trajectory_follower_node``."""
    return process.main(TrajectoryFollowerNode, run)


if __name__ == "__main__":
    sys.exit(main())
