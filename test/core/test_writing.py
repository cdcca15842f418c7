"""Messages of sensors as bytes, read back by rosbags and by the package's own decoders."""

from __future__ import annotations

import numpy as np
import pytest

from vla_core.contract import Stream
from vla_core.observation import writing
from vla_core.observation.calibration import camera_info
from vla_core.observation.decode import decode
from vla_core.observation.messages import deserialize, header_stamp_ns

STAMP = 12_345_678_901_234_567


def test_imu() -> None:
    without = deserialize("sensor_msgs/msg/Imu", writing.imu(STAMP, None, (1, 2, 3), np.array([4, 5, 6]), "imu_link"))
    assert without.orientation_covariance[0] == -1.0
    assert (without.angular_velocity.z, without.linear_acceleration.x) == (3, 4)
    turned = deserialize("sensor_msgs/msg/Imu", writing.imu(STAMP, np.array([0.5] * 4), (0, 0, 0), (0, 0, 0)))
    assert turned.orientation_covariance[0] == 0.0 and turned.orientation.w == 0.5


def test_odometry() -> None:
    data = writing.odometry(STAMP, (1, 2, 3, 0, 0, 0.6, 0.8), (4, 5, 6), (7, 8, 9))
    assert header_stamp_ns("nav_msgs/msg/Odometry", data) == STAMP
    found = deserialize("nav_msgs/msg/Odometry", data)
    assert (found.header.frame_id, found.child_frame_id) == ("odom", "base_link")
    names = ("pose.pose.position.y", "pose.pose.orientation.z", "twist.twist.linear.x", "twist.twist.angular.z")
    stream = Stream(topic="odom", type="nav_msgs/msg/Odometry", rate_hz=1, max_age_s=1, names=names, units=("",) * 4)
    assert decode(stream, data).tolist() == [2, 0.6, 4, 9]


def test_camera_info() -> None:
    matrix = np.array([[50.0, 0, 31.5], [0, 60.0, 23.5], [0, 0, 1]])
    found = camera_info(
        deserialize("sensor_msgs/msg/CameraInfo", writing.camera_info(STAMP, matrix, 48, 64, "optical"))
    )
    assert (found.height, found.width, found.frame_id, found.model) == (48, 64, "optical", "plumb_bob")
    assert (found.intrinsics == matrix).all() and not found.distortion.any()
    assert (found.projection[:, :3] == matrix).all() and not found.projection[:, 3].any()


@pytest.mark.parametrize("count", [0, 1, 100])
def test_point_cloud(count: int) -> None:
    columns = {
        "x": np.arange(count, dtype=np.float32), "ring": np.arange(count, dtype=np.uint16) * 3,
        "time": -np.arange(count, dtype=np.float32) / 7,
    }  # fmt: skip
    data = writing.point_cloud(STAMP, columns, "lidar")
    stream = Stream(topic="t", type="sensor_msgs/msg/PointCloud2", rate_hz=1, max_age_s=1, names=("time", "ring", "x"),
                    units=("s", "1", "m"), frame_id="lidar")  # fmt: skip
    found = decode(stream, data)
    assert found.shape == (count, 3) and found.dtype == np.float32
    assert (found == np.column_stack([columns["time"], columns["ring"], columns["x"]])).all()


def test_transforms_and_boxes() -> None:
    data = writing.transforms(STAMP, "base", {"a": (1, 2, 3, 0, 0, 0, 1), "b": (0,) * 6 + (1,)})
    a, b = deserialize("tf2_msgs/msg/TFMessage", data).transforms
    assert (a.header.frame_id, a.child_frame_id, a.transform.translation.z) == ("base", "a", 3)
    assert (b.child_frame_id, b.transform.rotation.w) == ("b", 1)
    box = (7, "car", (1, 2, 3, 0, 0, 0, 1), (4, 5, 6), (0.1, 0.2, 0.3, 1.0))
    (marker,) = deserialize(
        "visualization_msgs/msg/MarkerArray", writing.boxes(STAMP, [box], "map", 1_500_000_000)
    ).markers
    assert (marker.id, marker.ns, marker.type, marker.action, marker.header.frame_id) == (7, "car", 1, 0, "map")
    assert (marker.scale.y, marker.pose.position.x, marker.lifetime.sec, marker.lifetime.nanosec) == (
        5,
        1,
        1,
        500_000_000,
    )
    assert marker.color.g == pytest.approx(0.2)
