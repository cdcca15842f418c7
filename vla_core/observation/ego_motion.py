"""Ego-motion compensation: where the points of a past cloud are, seen from where the sensor is now.

A pose is (7,) float64: position x, y, z in m and quaternion x, y, z, w of a child frame in its parent frame.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from vla_core.contract import Stream
from vla_core.observation.decode import decode
from vla_core.observation.messages import MessageError
from vla_core.observation.vector import blend

POSE_TYPES = {  # where the pose is in a message
    "nav_msgs/msg/Odometry": "pose.pose",
    "geometry_msgs/msg/PoseWithCovarianceStamped": "pose.pose",
    "geometry_msgs/msg/PoseStamped": "pose",
}
_AXES = (*(f"position.{axis}" for axis in "xyz"), *(f"orientation.{axis}" for axis in "xyzw"))


def decode_pose(stream: Stream, data: bytes) -> np.ndarray:
    """The pose (7,) of a message of an odometry stream, whichever of its numbers the contract names."""
    pose = np.array(decode(_pose_stream(stream), data))
    length = float(np.linalg.norm(pose[3:]))
    if not abs(length - 1) < 0.01:
        raise MessageError(f"{stream.topic}: the orientation has length {length:.3g}, expected a unit quaternion")
    pose[3:] /= length
    return pose


@functools.cache
def _pose_stream(stream: Stream) -> Stream:
    names = tuple(f"{POSE_TYPES[stream.type]}.{axis}" for axis in _AXES)
    return dataclasses.replace(stream, names=names, units=("",) * len(names))


def interpolate_pose(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    """From pose ``a`` at weight 0 to ``b`` at 1, at constant linear and angular velocity."""
    return blend(a, b, weight, [[3, 4, 5, 6]])


def matrix(pose: np.ndarray) -> np.ndarray:
    """The transform (4, 4) that takes points of the child frame to the parent frame."""
    x, y, z, w = pose[3:]
    result = np.eye(4)
    result[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    result[:3, 3] = pose[:3]
    return result


def relative(past: np.ndarray, now: np.ndarray, mount: np.ndarray) -> np.ndarray:
    """The transform (4, 4) from the sensor's frame at base pose ``past`` to its frame at base pose ``now``."""
    sensor = matrix(mount)
    return np.linalg.inv(matrix(now) @ sensor) @ matrix(past) @ sensor


def move(points: np.ndarray, columns: tuple[str, ...], transform: np.ndarray) -> np.ndarray:
    """A copy of ``points`` (N, C) float32 whose columns x, y and z are moved; the others stay as they are."""
    places = [columns.index(axis) for axis in "xyz"]
    moved = points.copy()
    moved[:, places] = points[:, places].astype(np.float64) @ transform[:3, :3].T + transform[:3, 3]
    return moved
