"""Plans against bags whose drive is a closed form: a circle, and road users that stand or go straight on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_core.contract import RobotContract
from vla_core.data.bag import BagError
from vla_core.evaluation.driven import (
    EGO,
    boxes_of,
    compared,
    has_truth,
    labelled_plans,
    plans,
    read_drive,
    steady_plans,
)
from vla_core.evaluation.open_loop import Replay
from vla_core.evaluation.planning import figures
from vla_core.observation import messages
from vla_core.observation.messages import Message, serialize, typestore
from vla_core.sim.driving.layout import Solid

from .helpers import MS, START, mark, write_bag

SECOND = 1000 * MS
SPEED, YAW_RATE = 6.0, 0.3
STEP = SECOND // 2
CONTRACT = RobotContract.load("driving")


def new(kind: str, **fields: Any) -> Any:
    return typestore().types[kind](**fields)


def pose(x: float, y: float, yaw: float) -> Any:
    turn = new("geometry_msgs/msg/Quaternion", x=0.0, y=0.0, z=math.sin(yaw / 2), w=math.cos(yaw / 2))
    return new("geometry_msgs/msg/Pose", position=new("geometry_msgs/msg/Point", x=x, y=y, z=0.0), orientation=turn)


def vector(x: float, y: float = 0.0, z: float = 0.0) -> Any:
    return new("geometry_msgs/msg/Vector3", x=x, y=y, z=z)


def circle(seconds: float) -> tuple[float, float, float]:
    """Where the vehicle is: on a circle of 20 m around (0, 20), from the origin on."""
    angle = YAW_RATE * seconds
    return SPEED / YAW_RATE * math.sin(angle), SPEED / YAW_RATE * (1 - math.cos(angle)), angle


def odometry(stamp_ns: int) -> Message:
    twist = new("geometry_msgs/msg/Twist", linear=vector(SPEED), angular=vector(0.0, 0.0, YAW_RATE))
    data = new(
        "nav_msgs/msg/Odometry", header=messages.header(stamp_ns, "map"), child_frame_id="base_link",
        pose=new("geometry_msgs/msg/PoseWithCovariance", pose=pose(*circle((stamp_ns - START) / SECOND)),
                 covariance=np.zeros(36)),
        twist=new("geometry_msgs/msg/TwistWithCovariance", twist=twist, covariance=np.zeros(36)),
    )  # fmt: skip
    return Message("ground_truth/odom", "nav_msgs/msg/Odometry", stamp_ns, serialize("nav_msgs/msg/Odometry", data))


def objects(stamp_ns: int, users: Sequence[tuple[int, int, Any]]) -> Message:
    """Markers of id, type and pose; a CUBE (1) is a road user of 4 x 2 x 1.5 m."""
    duration = new("builtin_interfaces/msg/Duration", sec=0, nanosec=0)
    grey = new("std_msgs/msg/ColorRGBA", r=0.5, g=0.5, b=0.5, a=1.0)
    picture = new("sensor_msgs/msg/CompressedImage", header=messages.header(0), format="", data=np.zeros(0, np.uint8))
    mesh = new("visualization_msgs/msg/MeshFile", filename="", data=np.zeros(0, np.uint8))
    markers = [
        new("visualization_msgs/msg/Marker", header=messages.header(stamp_ns, "map"), ns="car", id=number, type=kind,
            action=0, pose=where, scale=vector(4.0, 2.0, 1.5), color=grey, lifetime=duration, frame_locked=False,
            points=[], colors=[], texture_resource="", texture=picture, uv_coordinates=[], text="", mesh_resource="",
            mesh_file=mesh, mesh_use_embedded_materials=False)
        for number, kind, where in users
    ]  # fmt: skip
    kind = "visualization_msgs/msg/MarkerArray"
    return Message("ground_truth/objects", kind, stamp_ns, serialize(kind, new(kind, markers=markers)))


def bag(path: Path, seconds: float = 6.0, users: Any = lambda seconds: []) -> Path:
    """50 Hz of odometry and 5 Hz of objects."""
    out = [mark(START, 0, seed=7)]
    for k in range(round(50 * seconds) + 1):
        stamp_ns = START + k * SECOND // 50
        out.append(odometry(stamp_ns))
        if k % 10 == 0:
            out.append(objects(stamp_ns, users(k / 50)))
    return write_bag(path, out, CONTRACT)


def stamps(*seconds: float) -> np.ndarray:
    return np.array([START + round(s * SECOND) for s in seconds])


def test_the_true_plan_has_no_error_and_the_straight_one_that_of_the_chord(tmp_path: Path) -> None:
    drive = read_drive(bag(tmp_path / "bag"))
    assert (drive.world, drive.seed, drive.users) == ("lift", 7, ())
    assert has_truth(tmp_path / "bag")
    times = np.arange(7) * 0.5
    true = np.array([circle(t) for t in times])
    found = compared(drive, stamps(0.0, 1.1, 2.0), np.stack([true] * 3), STEP)
    assert found.known.all()
    assert found.displacement() == pytest.approx(np.zeros((3, 7)), abs=2e-3)  # between two samples, the chord
    straight = np.stack([SPEED * times, np.zeros(7), np.zeros(7)], axis=-1)
    off = compared(drive, stamps(1.0), straight[None], STEP).displacement()[0]
    assert off == pytest.approx(np.linalg.norm(straight[:, :2] - true[:, :2], axis=1), abs=1e-6)


def test_going_on_steadily_is_right_on_a_circle(tmp_path: Path) -> None:
    drive = read_drive(bag(tmp_path / "bag"))
    found = figures([steady_plans(drive, stamps(0.0, 1.0, 2.5), 7, STEP)])
    assert found["fde"] == pytest.approx(0, abs=1e-3)
    assert found["collision_rate"] == 0


def test_the_end_of_the_recording_is_not_known(tmp_path: Path) -> None:
    drive = read_drive(bag(tmp_path / "bag", seconds=4.0))
    found = compared(drive, stamps(0.5, 2.0), np.zeros((2, 7, 3)), STEP)
    assert found.known.tolist() == [[True] * 7, [True] * 5 + [False] * 2]
    assert not found.driven_hit.any()


def test_road_users_are_where_they_were_at_the_waypoints_time(tmp_path: Path) -> None:
    def users(seconds: float) -> list[tuple[int, int, Any]]:
        # One comes along y = 10 from the right at 5 m/s, seen from 1 s on. A picture of a plan is no road user.
        moving = [(0, 1, pose(30.0 - 5 * seconds, 10.0, math.pi))] if seconds >= 1 else []
        return [*moving, (1, 4, pose(0.0, 0.0, 0.0))]

    drive = read_drive(bag(tmp_path / "bag", users=users))
    assert [user.size for user in drive.users] == [(4.0, 2.0, 1.5)]
    boxes = drive.boxes(stamps(0.2, 1.0, 1.3, 6.0))[:, 0]
    assert np.isnan(boxes[0, 0])
    assert boxes[1:, 0] == pytest.approx([25, 23.5, 0])
    assert np.abs(boxes[1:, 2]) == pytest.approx([math.pi] * 3)
    # Standing at (14.6 .. 19.2, 9 .. 11) it is hit from when the other's front, 2 m before its middle, is at 19.2 on
    # (1.76 s) until its back has passed 14.6 (3.48 s).
    start = drive.pose(stamps(0.0))
    assert start[0] == pytest.approx([0, 0, 0])
    stand = np.tile([14.6 + EGO.rear_m, 10.0, 0.0], (7, 1))
    found = compared(drive, stamps(0.0), stand[None], STEP)
    assert found.hit.tolist() == [[False, False, False, False, True, True, True]]
    assert not found.driven_hit[0, :2].any()


def test_what_stands_in_the_way(tmp_path: Path) -> None:
    def solid(x: float, z: float, height: float) -> Solid:
        return Solid(kind="pole", position=(x, 0.0, z), heading=0.0, size=(1.0, 1.0, height), colour=(1, 1, 1))

    boxes = boxes_of([solid(10.0, 1.0, 2.0), solid(10.0, 4.0, 2.0)])  # the second hangs above the road
    assert boxes == pytest.approx(np.array([[10, 0, 0, 1, 1]]))
    drive = read_drive(bag(tmp_path / "bag"))
    straight = np.stack([SPEED * np.arange(7) * 0.5, np.zeros(7), np.zeros(7)], axis=-1)
    # The front bumper, 3.7 m before the axle, is at the pole from x = 5.8 on; the back leaves it at x = 11.4.
    found = compared(drive, stamps(0.0), straight[None], STEP, boxes)
    assert found.hit.tolist() == [[False, False, True, True, False, False, False]]


def test_plans_of_a_replay_take_their_columns_by_name(tmp_path: Path) -> None:
    drive = read_drive(bag(tmp_path / "bag"))
    rows = np.zeros((1, 7, 4))
    rows[0, :, :3] = [circle(t) for t in np.arange(7) * 0.5]
    replayed = Replay(
        names=CONTRACT.action_names, units=CONTRACT.action_units, half_range=np.ones(4), stamps_ns=stamps(1.0),
        predicted=rows, recorded=rows, known=np.ones((1, 7), dtype=bool),
    )  # fmt: skip
    assert figures([plans(drive, replayed, CONTRACT)])["fde"] == pytest.approx(0, abs=1e-3)
    # Against the recorded rows alone, which are the same here, there is nothing to be hit.
    again = dataclasses.replace(replayed, predicted=rows + np.array([1.0, 0.0, 0.0, 0.0]))
    found = figures([labelled_plans(again, CONTRACT, drive.path)])
    assert (found["l2_1s"], found["ade"], found["collision_rate"]) == pytest.approx((1, 1, 0))
    with pytest.raises(BagError, match="expected x, y and yaw among its actions, found hand_x"):
        plans(drive, replayed, RobotContract.load("metaworld_sawyer"))


def test_a_bag_without_ground_truth_says_so(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", [mark(START, 0), dataclasses.replace(odometry(START), topic="odom")], CONTRACT)
    assert not has_truth(path)
    with pytest.raises(BagError, match="no topic 'ground_truth/odom'"):
        read_drive(path)
