"""The robots of the benchmarks: one of a camera and two joints, and one that carries a whole load of sensors."""

from __future__ import annotations

import dataclasses

from vla_core.contract import Action, RobotContract, Stream

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED = "sensor_msgs/msg/CompressedImage"
JOINTS = "sensor_msgs/msg/JointState"
NAMES = ("shoulder", "elbow")
SIDE = 224  # pixels that the model sees


def robot(camera_type: str, rate_hz: float) -> RobotContract:
    """Camera and joints at the control rate, reliable; a velocity command."""
    return RobotContract(
        name="bench", rate_hz=rate_hz,
        observations={
            "joints": Stream(topic="joints", type=JOINTS, rate_hz=rate_hz, max_age_s=1.0, reliability="reliable",
                             field="position", names=NAMES, units=("rad", "rad")),
            "camera": Stream(topic="camera", type=camera_type, rate_hz=rate_hz, max_age_s=1.0, reliability="reliable"),
        },
        actions={"arm": Action(topic="command", type=JOINTS, field="velocity", kind="velocity", names=NAMES,
                               units=("rad/s", "rad/s"), low=(-1.0, -1.0), high=(1.0, 1.0), safe=("zero", "zero"))},
    )  # fmt: skip


CAMERAS, IMUS, LIDARS, POINTS, JPEG_BYTES = 6, 4, 1, 120_000, 200_000
AXES = tuple(f"{part}.{axis}" for part in ("angular_velocity", "linear_acceleration") for axis in "xyz")
AXES_UNITS = ("rad/s",) * 3 + ("m/s^2",) * 3


def vehicle() -> RobotContract:
    """The topics of :mod:`test.benchmarks.load`: six cameras, four IMUs, a LiDAR; a velocity command at 50 Hz."""
    cameras = {
        f"camera_{i}": Stream(topic=f"camera_{i}/image", type=COMPRESSED, rate_hz=30.0, max_age_s=0.5)
        for i in range(CAMERAS)
    }
    imus = {
        f"imu_{i}": Stream(topic=f"imu_{i}/data", type="sensor_msgs/msg/Imu", rate_hz=200.0, max_age_s=0.5,
                           names=AXES, units=AXES_UNITS)
        for i in range(IMUS)
    }  # fmt: skip
    lidars = {
        f"lidar_{i}": Stream(topic=f"lidar_{i}/points", type="sensor_msgs/msg/PointCloud2", rate_hz=10.0,
                             max_age_s=0.5, names=("x", "y", "z", "intensity"), units=("m", "m", "m", "1"))
        for i in range(LIDARS)
    }  # fmt: skip
    return dataclasses.replace(robot(COMPRESSED, 50.0), observations={**cameras, **imus, **lidars})
