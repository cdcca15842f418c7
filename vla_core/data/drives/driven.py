"""Where a vehicle went: the trajectory that a recording's own future is, as the label of each of its instants."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vla_core.contract import NANOSECONDS
from vla_core.observation.ego_motion import matrix

TURN_M = 2.0  # as the planners on nuScenes have it: Hu et al. 2023 (UniAD), Jiang et al. 2023 (VAD)
TURN_LEFT, TURN_RIGHT, STRAIGHT = "turn left", "turn right", "go straight"


@dataclass(frozen=True, eq=False)
class DrivenPath:
    """Poses of ``base_link`` in a fixed frame: ``stamps_ns`` (N,) int64, rising; ``poses`` (N, 7) as in ego_motion."""

    stamps_ns: np.ndarray
    poses: np.ndarray

    def __post_init__(self) -> None:
        if len(self.stamps_ns) < 2 or not (np.diff(self.stamps_ns) > 0).all():
            raise ValueError(f"{len(self.stamps_ns)} stamps, expected at least two that rise")

    def pose(self, at_ns: int) -> np.ndarray:
        """The pose (7,) of the nearest stamp."""
        after = int(np.clip(np.searchsorted(self.stamps_ns, at_ns), 1, len(self.stamps_ns) - 1))
        before = after - 1
        nearer_before = at_ns - self.stamps_ns[before] <= self.stamps_ns[after] - at_ns
        found: np.ndarray = self.poses[before if nearer_before else after]
        return found

    def trajectory(self, at_ns: int, rows: int, step_ns: int) -> np.ndarray | None:
        """Rows (rows, 4): x, y in m and yaw in rad of the poses at ``at_ns``, one step later, …, in the first of them,
        and the speed along each heading in m/s; None where the recording does not reach that far."""
        stamps_ns = at_ns + step_ns * np.arange(rows)
        if stamps_ns[0] < self.stamps_ns[0] or stamps_ns[-1] > self.stamps_ns[-1]:
            return None
        x, y, yaw, speed = self._at(stamps_ns)
        cos, sin = np.cos(yaw[0]), np.sin(yaw[0])
        dx, dy = x - x[0], y - y[0]
        turned = (yaw - yaw[0] + np.pi) % (2 * np.pi) - np.pi
        return np.stack([cos * dx + sin * dy, cos * dy - sin * dx, turned, speed], axis=1)

    def twist(self, at_ns: int) -> tuple[float, float]:
        """Speed along the heading in m/s and turn rate in rad/s at a stamp."""
        speed = float(self._at(np.array([at_ns]))[3][0])
        yaw_rate = np.gradient(self._heading, self._seconds)
        return speed, float(np.interp((at_ns - self.stamps_ns[0]) / NANOSECONDS, self._seconds, yaw_rate))

    def _at(self, stamps_ns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        seconds = (stamps_ns - self.stamps_ns[0]) / NANOSECONDS
        columns = (self.poses[:, 0], self.poses[:, 1], self._heading, self._speed)
        x, y, yaw, speed = (np.interp(seconds, self._seconds, column) for column in columns)
        return x, y, yaw, speed

    @cached_property
    def _seconds(self) -> np.ndarray:
        seconds: np.ndarray = (self.stamps_ns - self.stamps_ns[0]) / NANOSECONDS
        return seconds

    @cached_property
    def _heading(self) -> np.ndarray:
        qx, qy, qz, qw = self.poses[:, 3:].T
        heading: np.ndarray = np.unwrap(np.arctan2(2 * (qw * qz + qx * qy), qw**2 + qx**2 - qy**2 - qz**2))
        return heading

    @cached_property
    def _speed(self) -> np.ndarray:
        vx, vy = np.gradient(self.poses[:, 0], self._seconds), np.gradient(self.poses[:, 1], self._seconds)
        speed: np.ndarray = vx * np.cos(self._heading) + vy * np.sin(self._heading)
        return speed


def spoken(rows: np.ndarray) -> str:
    """What a passenger would have said before this trajectory (H, 4): by how far its end lies to a side."""
    sideways = float(rows[-1, 1])
    if abs(sideways) < TURN_M:
        return STRAIGHT
    return TURN_LEFT if sideways > 0 else TURN_RIGHT


def pose_of(transform: np.ndarray) -> np.ndarray:
    """A transform (4, 4) as a pose (7,)."""
    return np.concatenate([transform[:3, 3], quaternion_of(transform[:3, :3])])


def transform_of(translation: np.ndarray, wxyz: np.ndarray) -> np.ndarray:
    """The transform (4, 4) of a translation (3,) and a quaternion w, x, y, z."""
    w, x, y, z = np.asarray(wxyz, dtype=np.float64) / np.linalg.norm(wxyz)
    return matrix(np.array([*translation, x, y, z, w]))


def quaternion_of(rotation: np.ndarray) -> tuple[float, float, float, float]:
    """The unit quaternion x, y, z, w with w >= 0 of a rotation (3, 3), also of one with rounding errors.

    The eigenvector of the largest eigenvalue of Bar-Itzhack's matrix (2000, "New Method for Extracting the Quaternion
    from a Rotation Matrix").
    """
    r = np.asarray(rotation, dtype=np.float64)
    k = np.array([
        [r[0, 0] - r[1, 1] - r[2, 2], 0, 0, 0],
        [r[0, 1] + r[1, 0], r[1, 1] - r[0, 0] - r[2, 2], 0, 0],
        [r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], r[2, 2] - r[0, 0] - r[1, 1], 0],
        [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], r.trace()],
    ])  # fmt: skip
    _, vectors = np.linalg.eigh(k)  # of the lower triangle
    x, y, z, w = vectors[:, -1]
    sign = -1.0 if w < 0 else 1.0
    return float(sign * x), float(sign * y), float(sign * z), float(sign * w)
