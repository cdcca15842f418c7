"""The ego vehicle's actuators: from a command to torques and steering angles of a MuJoCo vehicle, and its state."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_core.sim.driving.layout import MAX_STEERING, WHEELBASE_M, EgoState, Pose
from vla_core.sim.driving.scene import MASS_KG, TIMESTEP_S, TRACK_M, WHEEL_RADIUS_M, WHEELS

BRAKED = np.array([0.2, 0.2, 0.3, 0.3])  # shares of the braking force, in the order of WHEELS
DRIVEN = np.array([0.5, 0.5, 0.0, 0.0])
TURNING_KG = 4 * 0.4 * 20.0  # what the wheels' inertia adds to the mass


@dataclass(frozen=True, kw_only=True)
class Actuators:
    """How a command becomes motion.

    A command works after ``delay_s``. Steering follows it as a first-order lag of ``steering_lag_s``, at
    ``steering_rate`` rad/s at most; the speed controller asks for ``speed_gain`` m/s2 per m/s, within ``accelerate``
    and ``brake`` (m/s2), and gets it with a lag of ``force_lag_s``.
    """

    delay_s: float = 0.06
    steering_lag_s: float = 0.08
    steering_rate: float = 0.9
    speed_gain: float = 5.0
    force_lag_s: float = 0.05
    accelerate: float = 3.0
    brake: float = 6.0


class Vehicle:
    """Actuators of the vehicle in ``data``; :meth:`control` goes before every physics step."""

    def __init__(self, model: Any, data: Any, actuators: Actuators | None = None) -> None:
        self.actuators = actuators or Actuators()
        self._data = data
        self._spins = np.array([int(model.joint(f"spin/{wheel}").dofadr[0]) for wheel in WHEELS])
        self._waiting: deque[tuple[int, float, float]] = deque()
        self._steering_goal = self._speed_goal = 0.0
        self.steering = 0.0
        self._force = 0.0  # m/s2
        self._steps = 0

    def command(self, steering: float, speed: float) -> None:
        """Aim for a steering angle in rad (the middle one of both front wheels) and a speed in m/s."""
        after = self._steps + round(self.actuators.delay_s / TIMESTEP_S)
        self._waiting.append((after, min(max(steering, -MAX_STEERING), MAX_STEERING), speed))

    def control(self) -> None:
        """Set the controls of one physics step."""
        a = self.actuators
        while self._waiting and self._waiting[0][0] <= self._steps:
            _, self._steering_goal, self._speed_goal = self._waiting.popleft()
        self._steps += 1
        most = a.steering_rate * TIMESTEP_S
        change = (self._steering_goal - self.steering) * TIMESTEP_S / a.steering_lag_s
        self.steering += min(max(change, -most), most)
        wanted = a.speed_gain * (self._speed_goal - self.speed)
        wanted = min(max(wanted, -a.brake), a.accelerate)
        self._force += (wanted - self._force) * TIMESTEP_S / a.force_lag_s
        total = self._force * (MASS_KG + TURNING_KG) * WHEEL_RADIUS_M
        control = self._data.ctrl
        control[:2] = ackermann(self.steering)
        control[2:] = total * (DRIVEN if total > 0 else BRAKED)

    @property
    def speed(self) -> float:
        """m/s of base_link, along the heading."""
        qpos, qvel = self._data.qpos, self._data.qvel
        w, x, y, z = qpos[3:7].tolist()
        return float(qvel[0] * (1 - 2 * (y * y + z * z)) + qvel[1] * 2 * (x * y + w * z))

    def wheel_speeds(self) -> np.ndarray:
        """m/s (4,) at which the wheels roll, in the order of WHEELS."""
        return self._data.qvel[self._spins] * WHEEL_RADIUS_M

    def state(self) -> EgoState:
        """The vehicle now."""
        x, y = self._data.qpos[:2].tolist()
        return EgoState(
            pose=Pose(x=x, y=y, heading=heading(self._data.qpos)), speed_mps=self.speed,
            yaw_rate=float(self._data.qvel[5]), steering=self.steering,
        )  # fmt: skip


def heading(qpos: np.ndarray) -> float:
    """The heading in rad of a free joint's position (7,)."""
    w, x, y, z = qpos[3:7].tolist()
    return math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def ackermann(steering: float) -> tuple[float, float]:
    """Angles of the left and the right front wheel, whose axes meet that of the rear axle in one point."""
    slope = math.tan(steering) / WHEELBASE_M
    return (
        math.atan(WHEELBASE_M * slope / (1 - slope * TRACK_M / 2)),
        math.atan(WHEELBASE_M * slope / (1 + slope * TRACK_M / 2)),
    )
