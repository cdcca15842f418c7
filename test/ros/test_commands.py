"""Commands written without ROS, against rclpy's own messages and serialization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ackermann_msgs.msg import AckermannDrive, AckermannDriveStamped
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import Point, Pose, PoseStamped, Quaternion, Twist, TwistStamped, Vector3
from nav_msgs.msg import Path
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray, Header
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint
from vla_ros.msg import Trajectory, TrajectoryPoint

from vla_core.commands import decode, encode
from vla_core.contract import Action

STAMP_NS = 1_234_567_890_900_000_000
STEP_NS = 250_000_000
HALF = np.sqrt(0.5)


def header(steps: int = 0) -> Header:
    seconds, rest = divmod(STAMP_NS + steps * STEP_NS, 10**9)
    return Header(stamp=Time(sec=seconds, nanosec=rest), frame_id="base")


def pose(x: float, y: float, z: float, w: float) -> Pose:
    return Pose(position=Point(x=x, y=y), orientation=Quaternion(z=z, w=w))


def action(type_name: str, *names: str, **fields: Any) -> Action:
    count = len(names)
    return Action(
        topic="command", type=type_name, names=names, units=("1",) * count, low=(-9.0,) * count, high=(9.0,) * count,
        safe=("zero",) * count, frame_id="base", **fields,
    )  # fmt: skip


TWIST = Twist(linear=Vector3(x=0.5), angular=Vector3(z=-0.25))
CASES = [
    (action("sensor_msgs/msg/JointState", "a", "bc", field="position"), [[0.5, -0.25]],
     JointState(header=header(), name=["a", "bc"], position=[0.5, -0.25])),
    (action("std_msgs/msg/Float64MultiArray", "a", "b"), [[0.5, -0.25]], Float64MultiArray(data=[0.5, -0.25])),
    (action("geometry_msgs/msg/Twist", "linear.x", "angular.z"), [[0.5, -0.25]], TWIST),
    (action("geometry_msgs/msg/TwistStamped", "linear.x", "angular.z"), [[0.5, -0.25]],
     TwistStamped(header=header(), twist=TWIST)),
    (action("ackermann_msgs/msg/AckermannDriveStamped", "steering_angle", "speed"), [[-0.25, 3.5]],
     AckermannDriveStamped(header=header(), drive=AckermannDrive(steering_angle=-0.25, speed=3.5))),
    (action("trajectory_msgs/msg/JointTrajectory", "a", "bc", field="position", publish="chunk"),
     [[0.5, -0.25], [1.0, 2.0]],
     JointTrajectory(header=header(), joint_names=["a", "bc"], points=[
         JointTrajectoryPoint(positions=[0.5, -0.25], time_from_start=Duration(nanosec=250_000_000)),
         JointTrajectoryPoint(positions=[1.0, 2.0], time_from_start=Duration(nanosec=500_000_000))])),
    (action("nav_msgs/msg/Path", "x", "y", "yaw", publish="chunk"), [[1.0, 2.0, 0.0], [3.0, 4.0, np.pi / 2]],
     Path(header=header(), poses=[PoseStamped(header=header(), pose=pose(1.0, 2.0, 0.0, 1.0)),
                                  PoseStamped(header=header(1), pose=pose(3.0, 4.0, HALF, HALF))])),
    (action("vla_ros/msg/Trajectory", "x", "y", "speed", publish="chunk"), [[1.0, 2.0, 0.5], [1.0, 4.0, 0.75]],
     Trajectory(header=header(), points=[
         TrajectoryPoint(pose=pose(1.0, 2.0, HALF, HALF), speed=0.5),
         TrajectoryPoint(pose=pose(1.0, 4.0, HALF, HALF), speed=0.75, time_from_start=Duration(nanosec=250_000_000))])),
]  # fmt: skip


@pytest.mark.parametrize(("one", "rows", "theirs"), CASES, ids=lambda v: v.type if isinstance(v, Action) else "")
def test_rclpy_reads_what_is_written_and_writes_what_is_read(one: Action, rows: Any, theirs: Any) -> None:
    ours = encode(one, STAMP_NS, np.array(rows), STEP_NS)
    read = deserialize_message(ours, type(theirs))
    flat, expected = numbers(read), numbers(theirs)
    assert flat == pytest.approx(expected, abs=1e-15) and texts(read) == texts(theirs)
    written = serialize_message(theirs)[: len(ours)]  # it asks for more room than it fills
    assert decode(one, written) == pytest.approx(np.array(rows), abs=1e-15)


def walk(message: Any) -> list[Any]:
    """All fields of a message, in order."""
    if hasattr(message, "get_fields_and_field_types"):
        return [leaf for name in message.get_fields_and_field_types() for leaf in walk(getattr(message, name))]
    if isinstance(message, str | int | float):
        return [message]
    return [len(message), *(leaf for part in message for leaf in walk(part))]


def numbers(message: Any) -> list[float]:
    return [leaf for leaf in walk(message) if not isinstance(leaf, str)]


def texts(message: Any) -> list[str]:
    return [leaf for leaf in walk(message) if isinstance(leaf, str)]
