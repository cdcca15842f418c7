"""IMU and wheel odometry: what they measure, with bias, noise and drift."""

from __future__ import annotations

import math

import numpy as np

from vla_core.sim.driving.scene import TRACK_M

GYRO_BIAS, GYRO_NOISE = 0.002, 0.004  # rad/s
ACCELERATION_BIAS, ACCELERATION_NOISE = 0.05, 0.08  # m/s2
RADIUS_ERROR = 0.01  # of all wheels together, and
SIDE_ERROR = 0.0005  # of the left ones against the right ones, which turns the odometry
WHEEL_NOISE = 0.02  # m/s
STANDING_MPS = 0.01  # a wheel below it counts nothing


class Imu:
    """Adds this unit's bias, drawn once, and noise."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        self._bias = random.standard_normal(6) * np.repeat([GYRO_BIAS, ACCELERATION_BIAS], 3)

    def measure(self, gyro: np.ndarray, acceleration: np.ndarray) -> np.ndarray:
        """(6,) float64: angular velocity in rad/s, acceleration in m/s2 with gravity, from the true ones (3,)."""
        noise = self._random.standard_normal(6) * np.repeat([GYRO_NOISE, ACCELERATION_NOISE], 3)
        return np.concatenate([gyro, acceleration]) + self._bias + noise


class WheelOdometry:
    """Dead reckoning with the rear wheels, from where the vehicle stood first; radii are known with an error.

    ``pose`` (3,) x, y, heading in the frame odom; ``speed`` m/s; ``yaw_rate`` rad/s.
    """

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        scale, side = random.standard_normal(2) * (RADIUS_ERROR, SIDE_ERROR)
        self._scales = np.array([1 + scale - side, 1 + scale + side])
        self.pose = np.zeros(3)
        self.speed = self.yaw_rate = 0.0

    def add(self, wheels: np.ndarray, period_s: float) -> None:
        """The true speeds (2,) m/s of the left and the right rear wheel over the last ``period_s``."""
        noise = WHEEL_NOISE * self._random.standard_normal(2)
        turning = np.abs(wheels) > STANDING_MPS
        left, right = np.where(turning, wheels * self._scales + noise, 0.0)
        self.speed, self.yaw_rate = float(left + right) / 2, float(right - left) / TRACK_M
        middle = self.pose[2] + self.yaw_rate * period_s / 2
        self.pose += (
            self.speed * math.cos(middle) * period_s,
            self.speed * math.sin(middle) * period_s,
            self.yaw_rate * period_s,
        )
