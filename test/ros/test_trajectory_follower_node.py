"""The trajectory follower on topics: trajectories become drive commands, and every fault brakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ackermann_msgs.msg import AckermannDriveStamped
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry, Path
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.time import Time
from vla_ros.msg import Episode, Tick, Trajectory

from vla_core.commands import encode
from vla_core.contract import NANOSECONDS, RobotContract
from vla_ros.bridge import COMMAND_QOS, EPISODE_QOS, every_message, stream_qos
from vla_ros.lockstep import TICK_QOS
from vla_ros.trajectory_follower_node import TrajectoryFollowerNode

from .conftest import Ros, parameters

OK = TransitionCallbackReturn.SUCCESS
CONTRACT = RobotContract.load("driving")
ACTION = CONTRACT.actions["trajectory"]
TICK = NANOSECONDS // 5
START = 10 * NANOSECONDS
SPEED = 5.0


def rows(curvature: float = 0.0, speed: float = SPEED) -> np.ndarray:
    """A trajectory (7, 4) along a circle at constant speed."""
    way = speed * np.arange(7) * 0.5
    yaw = curvature * way
    x, y = way * np.sinc(yaw / np.pi), way * yaw / 2 * np.sinc(yaw / 2 / np.pi) ** 2
    return np.stack([x, y, yaw, np.full(7, speed)], axis=1)


class Vehicle:
    """Odometry and a planner around the node; keeps the drive commands as (stamp, steering, speed)."""

    def __init__(self, ros: Ros) -> None:
        self.ros = ros
        self.node = ros.node("vehicle")
        heard = every_message(CONTRACT.observations["odom"])  # as a simulator sends it
        self.odometry = self.node.create_publisher(Odometry, "odom", stream_qos(heard))
        self.plans = self.node.create_publisher(Trajectory, ACTION.topic, COMMAND_QOS)
        self.episodes = self.node.create_publisher(Episode, "episode", EPISODE_QOS)
        self.ticks: Any = None
        self.commands: list[tuple[int, float, float]] = []
        self.paths: list[Path] = []
        self.diagnostics: list[Any] = []
        self.node.create_subscription(AckermannDriveStamped, "drive", self._on_command, COMMAND_QOS)
        self.node.create_subscription(Path, "trajectory_follower/path", self.paths.append, 10)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", lambda m: self.diagnostics.extend(m.status), 10)

    def make_ticks(self) -> None:
        self.ticks = self.node.create_publisher(Tick, "tick", TICK_QOS)

    def _on_command(self, message: AckermannDriveStamped) -> None:
        stamp_ns = Time.from_msg(message.header.stamp).nanoseconds
        self.commands.append((stamp_ns, message.drive.steering_angle, message.drive.speed))

    def now(self) -> int:
        return int(self.node.get_clock().now().nanoseconds)

    def move(self, stamp_ns: int, x: float = 0.0, speed: float = SPEED, frame_id: str = "odom") -> None:
        message = Odometry(child_frame_id="base_link")
        message.header.stamp, message.header.frame_id = Time(nanoseconds=stamp_ns).to_msg(), frame_id
        message.pose.pose.position.x, message.twist.twist.linear.x = x, speed
        self.odometry.publish(message)

    def plan(self, stamp_ns: int, plan: np.ndarray | list[list[float]]) -> None:
        self.plans.publish(encode(ACTION, stamp_ns, np.asarray(plan, dtype=float), CONTRACT.chunk_step_ns))

    def tick(self, stamp_ns: int, newest: dict[str, int]) -> None:
        message = Tick(topics=list(newest), newest=[Time(nanoseconds=ns).to_msg() for ns in newest.values()])
        message.header.stamp = Time(nanoseconds=stamp_ns).to_msg()
        self.ticks.publish(message)

    def said(self, words: str) -> bool:
        return any(words in status.message for status in self.diagnostics)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        self.ros.spin_until(condition, what)

    def answered(self, stamp_ns: int) -> tuple[float, float]:
        self.wait(lambda: any(c[0] == stamp_ns for c in self.commands), f"the answer to {stamp_ns}")
        ((steering, speed),) = [c[1:] for c in self.commands if c[0] == stamp_ns]
        return steering, speed

    def spins(self) -> None:
        """Give a command that must not come the time to come."""
        for _ in range(20):
            self.ros.executor.spin_once(timeout_sec=0.01)


def make(ros: Ros, **values: Any) -> TrajectoryFollowerNode:
    overrides = parameters(**{"contract": "driving", "autostart": False, **values})
    node: TrajectoryFollowerNode = ros.add(TrajectoryFollowerNode(context=ros.context, parameter_overrides=overrides))
    return node


def started(ros: Ros, **values: Any) -> tuple[TrajectoryFollowerNode, Vehicle]:
    """An active node and a vehicle that hear each other."""
    vehicle = Vehicle(ros)
    node = make(ros, **values)
    assert node.trigger_configure() == OK and node.trigger_activate() == OK
    return node, connected(vehicle)


def connected(vehicle: Vehicle) -> Vehicle:
    publishers = (vehicle.odometry, vehicle.plans, vehicle.episodes)
    vehicle.wait(lambda: all(p.get_subscription_count() for p in publishers)
                 and vehicle.node.count_publishers("drive") > 0, "the follower")  # fmt: skip
    return vehicle


def test_every_trajectory_is_answered_once_with_its_stamp(ros: Ros) -> None:
    node, vehicle = started(ros, mode="synchronous")
    for k in range(5):
        at = START + k * TICK
        for i in range(9, -1, -1):
            vehicle.move(at - i * 20_000_000, x=SPEED * (k * 0.2 - i * 0.02))
        vehicle.plan(at, rows(0.05))
        steering, speed = vehicle.answered(at)
        assert steering == pytest.approx(np.arctan(2.8 * 0.05), rel=0.02) and speed == pytest.approx(SPEED)
    vehicle.spins()
    assert [c[0] for c in vehicle.commands] == [START + k * TICK for k in range(5)]
    assert node.follower is not None and node.follower.fault == ""
    assert node.counts == {"odometry": 50, "trajectories": 5, "commands": 5}


def test_an_answer_waits_for_the_odometry(ros: Ros) -> None:
    _, vehicle = started(ros, mode="synchronous")
    vehicle.move(START - 20_000_000)
    vehicle.plan(START, rows())
    vehicle.spins()
    assert vehicle.commands == []
    vehicle.move(START)
    assert vehicle.answered(START)[1] == pytest.approx(SPEED)


def test_with_ticks_it_waits_for_what_was_sent_and_for_nothing_else(ros: Ros) -> None:
    """An odometry that fails must not stop a simulator that waits for its answer."""
    node, vehicle = started(ros, mode="synchronous")
    vehicle.make_ticks()
    vehicle.wait(lambda: node.count_publishers("tick") > 0 and vehicle.ticks.get_subscription_count() > 0, "ticks")
    vehicle.move(START)
    vehicle.plan(START, rows())
    vehicle.spins()
    assert vehicle.commands == [], "the tick tells what else is to come"
    vehicle.tick(START, {"odom": START, "imu/data": START})
    assert vehicle.answered(START)[1] == pytest.approx(SPEED)
    late = START + TICK
    vehicle.tick(late, {"odom": late - 100_000_000})  # delayed
    vehicle.plan(late, rows())
    vehicle.spins()
    assert len(vehicle.commands) == 1
    vehicle.move(late - 100_000_000, x=0.5)
    assert vehicle.answered(late)[1] == pytest.approx(SPEED)
    lost = late + TICK
    vehicle.tick(lost, {"imu/data": lost})  # dropped
    vehicle.plan(lost, rows())
    assert vehicle.answered(lost)[1] < SPEED
    vehicle.wait(lambda: vehicle.said("odom: 0.3 s old, limit 0.2 s"), "the fault")


def test_a_stop_and_a_trajectory_of_no_use_are_answered_too(ros: Ros) -> None:
    _, vehicle = started(ros, mode="synchronous")
    vehicle.move(START)
    vehicle.plan(START, rows())
    assert vehicle.answered(START)[1] == pytest.approx(SPEED)
    stop = START + TICK
    vehicle.move(stop, x=1.0)
    vehicle.plan(stop, [[0.0, 0.0, 0.0, 0.0]])
    assert vehicle.answered(stop)[1] == pytest.approx(SPEED - 4.0 * 0.3)
    bad = stop + TICK
    message = Trajectory()
    message.header.stamp, message.header.frame_id = Time(nanoseconds=bad).to_msg(), "base_link"
    vehicle.move(bad, x=1.9)
    vehicle.plans.publish(message)
    assert vehicle.answered(bad)[1] == pytest.approx(SPEED - 4.0 * 0.5)
    vehicle.wait(lambda: vehicle.said("without a single point"), "the fault")


def test_an_episode_forgets_the_one_before(ros: Ros) -> None:
    """The vehicle stands elsewhere; no jump is to be seen in that."""
    node, vehicle = started(ros, mode="synchronous")
    vehicle.move(START)
    vehicle.plan(START, rows())
    vehicle.answered(START)
    second = START + 5 * NANOSECONDS
    mark = Episode(state=Episode.START)
    mark.header.stamp = Time(nanoseconds=second).to_msg()
    vehicle.episodes.publish(mark)
    vehicle.wait(lambda: node.follower is not None and node.follower.odometry_ns is None, "the reset")
    vehicle.move(second, x=700.0)
    vehicle.plan(second, rows())
    assert vehicle.answered(second)[1] == pytest.approx(SPEED)
    assert not [status for status in vehicle.diagnostics if "jumped" in status.message]


def test_realtime_commands_on_its_own_clock_and_brakes_when_plans_end(ros: Ros) -> None:
    node, vehicle = started(ros)
    begin, last = time.monotonic(), [0.0, 0.0]

    def drive(planning: bool) -> None:
        elapsed = time.monotonic() - begin
        if elapsed - last[0] > 0.02:
            last[0] = elapsed
            vehicle.move(vehicle.now(), x=SPEED * elapsed)
        if planning and elapsed - last[1] > 0.2:
            last[1] = elapsed
            vehicle.plan(vehicle.now(), rows())

    def going() -> bool:
        drive(True)
        return sum(abs(c[2] - SPEED) < 1e-5 for c in vehicle.commands) > 20

    vehicle.wait(going, "commands")
    assert len({c[0] for c in vehicle.commands}) == len(vehicle.commands)

    def stopped() -> bool:
        drive(False)
        return vehicle.commands[-1][2] == 0.0

    vehicle.wait(stopped, "a stand")
    assert vehicle.said("old, limit 0.6 s")
    assert node.follower is not None and node.follower.braking


def test_before_a_trajectory_it_says_nothing(ros: Ros) -> None:
    _, vehicle = started(ros)
    for _ in range(10):
        vehicle.move(vehicle.now(), speed=0.0)
        vehicle.spins()
    assert vehicle.commands == []


def test_deactivation_brakes_to_a_stand(ros: Ros) -> None:
    node, vehicle = started(ros)
    last = 0.0

    def going() -> bool:
        nonlocal last
        if time.monotonic() - last > 0.02:
            last = time.monotonic()
            vehicle.move(vehicle.now(), speed=2.0)
            vehicle.plan(vehicle.now(), rows(0.1, 2.0))
        return len([c for c in vehicle.commands if c[2] > 1.9]) > 3

    vehicle.wait(going, "commands")
    assert node.trigger_deactivate() == OK
    vehicle.wait(lambda: vehicle.commands[-1][2] == 0.0, "a stand")
    braked = [c for c in vehicle.commands if 0 < c[2] < 1.9]
    assert braked and all(c[1] > 0.2 for c in braked), "it keeps to the bend"
    count = len(vehicle.commands)
    vehicle.plan(vehicle.now(), rows())
    vehicle.spins()
    assert len(vehicle.commands) == count
    assert node.trigger_activate() == OK and node.trigger_deactivate() == OK and node.trigger_cleanup() == OK


def test_people_see_the_path_in_the_odometrys_frame(ros: Ros) -> None:
    node, vehicle = started(ros, mode="synchronous")
    vehicle.wait(lambda: node.count_subscribers("trajectory_follower/path") > 0, "a viewer")
    vehicle.move(START, x=100.0)
    vehicle.plan(START, rows())
    vehicle.wait(lambda: bool(vehicle.paths), "the path")
    path = vehicle.paths[0]
    assert path.header.frame_id == "odom" and Time.from_msg(path.header.stamp).nanoseconds == START
    assert [p.pose.position.x for p in path.poses] == pytest.approx([100.0 + 2.5 * k for k in range(7)])
    assert Time.from_msg(path.poses[2].header.stamp).nanoseconds == START + NANOSECONDS


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"contract": ""}, "parameters contract and checkpoint are empty"),
        ({"contract": "metaworld_sawyer"}, "has no following"),
        ({"mode": "sometimes"}, "choices: realtime, synchronous"),
    ],
)
def test_what_cannot_be_followed_fails_at_configure(ros: Ros, values: dict[str, Any], words: str) -> None:
    node = make(ros, **values)
    assert node.trigger_configure() != OK
    assert words in node.fault


def test_a_terminated_process_brakes(ros: Ros, domain: int) -> None:
    command = [
        sys.executable,
        "-m",
        "vla_ros.program",
        "trajectory_follower_node",
        "--ros-args",
        "-p",
        "contract:=driving",
    ]
    vehicle = Vehicle(ros)
    process = subprocess.Popen(command, env=os.environ)
    try:
        connected(vehicle)
        last = 0.0

        def going() -> bool:
            nonlocal last
            if time.monotonic() - last > 0.02:
                last = time.monotonic()
                vehicle.move(vehicle.now(), speed=2.0)
                vehicle.plan(vehicle.now(), rows(0.0, 2.0))
            return any(c[2] > 1.9 for c in vehicle.commands)

        vehicle.wait(going, "commands")
        process.send_signal(signal.SIGTERM)
        vehicle.wait(lambda: vehicle.commands[-1][2] == 0.0, "a stand")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
