"""Where the sensors of the simulated vehicle are, and how far they see around.

A mount is (7,): x, y, z in m and quaternion x, y, z, w of the sensor's frame in base_link (REP 105). Cameras have
optical frames, x right, y down, z forward; the others x forward, y left, z up (REP 103). The mounts are those of
config/models/driving.yaml; a test compares them.
"""

from __future__ import annotations

import math

import numpy as np

Mount = tuple[float, float, float, float, float, float, float]

BASE = "base_link"
CAMERAS: dict[str, float] = {  # horizontal and vertical field of view in degrees; together they see all round
    "front": 90.0,
    "front_left": 80.0,
    "front_right": 80.0,
    "back": 100.0,
    "back_left": 80.0,
    "back_right": 80.0,
}
MOUNTS: dict[str, Mount] = {
    "front": (1.7, 0.0, 1.5, -0.5, 0.5, -0.5, 0.5),
    "front_left": (1.5, 0.5, 1.5, -0.6743797, 0.2126311, -0.2126311, 0.6743797),
    "front_right": (1.5, -0.5, 1.5, -0.2126311, 0.6743797, -0.6743797, 0.2126311),
    "back": (0.0, 0.0, 1.5, -0.5, -0.5, 0.5, 0.5),
    "back_left": (1.0, 0.5, 1.5, -0.6963642, -0.1227878, 0.1227878, 0.6963642),
    "back_right": (1.0, -0.5, 1.5, 0.1227878, 0.6963642, -0.6963642, -0.1227878),
    "lidar": (1.0, 0.0, 1.8, 0.0, 0.0, 0.0, 1.0),
    "radar_front": (3.4, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0),
    "radar_front_left": (2.4, 0.8, 0.8, 0.0, 0.0, 0.7071068, 0.7071068),
    "radar_front_right": (2.4, -0.8, 0.8, 0.0, 0.0, -0.7071068, 0.7071068),
    "radar_back": (-0.6, 0.0, 0.5, 0.0, 0.0, 1.0, 0.0),
    "imu": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
}
FRAMES: dict[str, str] = {
    name: f"camera_{name}_optical_frame" if name in CAMERAS else "imu_link" if name == "imu" else name
    for name in MOUNTS
}  # fmt: skip


def rotation(mount: Mount) -> np.ndarray:
    """The axes of the sensor's frame as columns (3, 3), in base_link."""
    x, y, z, w = np.array(mount[3:]) / math.hypot(*mount[3:])
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip


def intrinsics(camera: str, size: int) -> np.ndarray:
    """K (3, 3) of a camera's square picture of ``size`` pixels, whose centres have whole coordinates."""
    focal = size / 2 / math.tan(math.radians(CAMERAS[camera]) / 2)
    centre = (size - 1) / 2
    return np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1]])
