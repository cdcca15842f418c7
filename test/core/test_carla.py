"""config/robots/carla.yaml against messages in the layouts of carla_ros_bridge."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla_core.commands import decode as decode_command
from vla_core.commands import encode
from vla_core.contract import RobotContract
from vla_core.observation import writing
from vla_core.observation.builder import CloudSpec, ImageSize, ObservationBuilder, ObservationSpec
from vla_core.observation.messages import deserialize, header, serialize, text, typestore

CARLA = RobotContract.load("carla")
STAMP = 10_000_000_000
SPEC = ObservationSpec(
    images={"front": ImageSize(height=60, width=80)}, calibrations={"front": "front_info"}, state=("motion",),
    clouds={"lidar": CloudSpec(max_points=100), "radar_front": CloudSpec(max_points=100)}, sequences=("imu",),
    instruction="instruction",
)  # fmt: skip


def bgra(pixels: np.ndarray) -> bytes:
    """The bridge's picture: bgra8, 800x600."""
    height, width, _ = pixels.shape
    data = np.dstack([pixels[..., ::-1], np.full((height, width), 255, dtype=np.uint8)])
    message = typestore().types["sensor_msgs/msg/Image"](
        header=header(STAMP, "ego_vehicle/rgb_front"), height=height, width=width, encoding="bgra8", is_bigendian=0,
        step=4 * width, data=np.ascontiguousarray(data).reshape(-1),
    )  # fmt: skip
    return serialize("sensor_msgs/msg/Image", message)


def columns(names: str, rows: list[list[float]]) -> dict[str, np.ndarray]:
    return dict(zip(names.split(), np.array(rows, dtype=np.float32).T, strict=True))


def test_what_the_bridge_sends_is_what_a_policy_sees() -> None:
    builder = ObservationBuilder(CARLA, SPEC)
    red = np.zeros((600, 800, 3), dtype=np.uint8)
    red[..., 0] = 200
    pose = [30.0, -4.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    k = np.array([[400.0, 0, 400], [0, 400, 300], [0, 0, 1]])
    messages = {
        "front": bgra(red),
        "front_info": writing.camera_info(STAMP, k, 600, 800, "ego_vehicle/rgb_front"),
        "lidar": writing.point_cloud(STAMP, columns("x y z intensity", [[5, 1, -2.4, 0.9]]), "ego_vehicle/lidar"),
        "radar_front": writing.point_cloud(
            STAMP, columns("x y z Range Velocity AzimuthAngle ElevationAngle", [[20, 1, 0, 20.02, -3.5, 0.05, 0]]),
            "ego_vehicle/radar_front"),
        "imu": writing.imu(STAMP, None, [0, 0, 0.1], [0.5, 0, 9.81], "ego_vehicle/imu"),
        "motion": writing.odometry(STAMP, pose, [8.0, 0, 0], [0, 0, 0.1], "map", "ego_vehicle"),
        "instruction": text("turn left"),
    }  # fmt: skip
    buffer = builder.make_buffer()
    for name, data in messages.items():
        buffer.add(name, STAMP, data)
    seen = builder.build(buffer, STAMP)
    np.testing.assert_array_equal(seen.images["front"], np.broadcast_to([200, 0, 0], (60, 80, 3)))
    assert seen.calibrations["front"].intrinsics[0, 0] == 40
    np.testing.assert_allclose(seen.clouds["lidar"], [[5, 1, -2.4, 0.9]], rtol=1e-6)
    np.testing.assert_allclose(seen.clouds["radar_front"], [[20, 1, 0, -3.5]])
    np.testing.assert_allclose(seen.state, [8.0, 0.1], rtol=1e-6)
    assert seen.sequences["imu"].mask[-1] and seen.instruction == "turn left"


def test_its_vehicle_is_commanded_by_ackermann_messages_without_a_header() -> None:
    following: Any = CARLA.following
    action = following.command
    assert action.topic == "carla/ego_vehicle/ackermann_cmd"
    data = encode(action, STAMP, np.array([[-0.25, 6.5]]), CARLA.step_ns)
    message = deserialize("ackermann_msgs/msg/AckermannDrive", data)
    assert (message.steering_angle, message.speed, message.acceleration) == (-0.25, 6.5, 0.0)
    np.testing.assert_array_equal(decode_command(action, data), [[-0.25, 6.5]])
