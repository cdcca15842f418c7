"""Radars: a few dozen returns with radial velocity, by rays that find the surfaces in view.

Columns of a scan, in the sensor's frame: ``x``, ``y``, ``z`` m; ``velocity`` m/s of the target relative to the sensor
along the line of sight, positive where it moves away; ``rcs`` dBsm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_core.sim.driving.rays import cast, groups
from vla_core.sim.driving.scene import SOLID_GROUP, Scene

RCS_DBSM = {
    "car": 10.0, "bus": 17.0, "truck": 18.0, "pedestrian": -4.0, "cyclist": 1.0, "building": 15.0, "trunk": 0.0,
    "crown": -5.0, "pole": 4.0, "barrier": 8.0, "kerb": -8.0, "light": 5.0,
}  # fmt: skip
SHOWN = {  # how often a ray that meets it becomes a return; walls are wide, and would fill the scan
    "car": 0.8, "bus": 0.6, "truck": 0.6, "pedestrian": 0.7, "cyclist": 0.7, "building": 0.12, "trunk": 0.4,
    "crown": 0.08, "pole": 0.5, "barrier": 0.2, "kerb": 0.1, "light": 0.5,
}  # fmt: skip
MAX_RETURNS = 64
NOISE_M, NOISE_RAD, NOISE_MPS, NOISE_DB = 0.15, np.radians(0.5), 0.1, 3.0
MISSED = 0.05  # of the road users in a scan
CLUTTER = 2.0  # false returns of a scan, on average


@dataclass(frozen=True, kw_only=True)
class Beam:
    """What a radar covers: degrees to both sides, m, and the rays of its grid."""

    half_deg: float
    reach_m: float
    columns: int
    elevations_deg: tuple[float, ...]


BEAMS = {
    "radar_front": Beam(half_deg=30, reach_m=80, columns=81, elevations_deg=(-1.0, 1.0, 3.0)),
    "radar_front_left": Beam(half_deg=65, reach_m=50, columns=91, elevations_deg=(-2.0, 1.0)),
    "radar_front_right": Beam(half_deg=65, reach_m=50, columns=91, elevations_deg=(-2.0, 1.0)),
    "radar_back": Beam(half_deg=45, reach_m=60, columns=81, elevations_deg=(-1.0, 2.0)),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Motion:
    """Velocities in the map: ``sensor`` (3,) m/s; of the road users ``users`` (U, 3) m/s and ``rates`` (U,) rad/s."""

    sensor: np.ndarray
    users: np.ndarray
    rates: np.ndarray


class Radar:
    """One of BEAMS in ``scene``; randomness comes from ``random`` alone."""

    def __init__(self, name: str, scene: Scene, data: Any, random: np.random.Generator) -> None:
        self._beam = BEAMS[name]
        self._scene, self._data, self._random = scene, data, random
        half = np.radians(self._beam.half_deg)
        azimuth, elevation = np.meshgrid(
            np.linspace(-half, half, self._beam.columns), np.radians(self._beam.elevations_deg)
        )
        self._angles = np.stack([azimuth.reshape(-1), elevation.reshape(-1)])
        self._rays = _unit(*self._angles)
        self._groups = groups(SOLID_GROUP)
        kinds = [owner.kind if owner else "" for owner in scene.owner]
        self._user = np.array([o.number if o and o.kind in _USERS else -1 for o in scene.owner])
        self._rcs = np.array([RCS_DBSM.get(kind, 0.0) for kind in kinds])
        self._shown = np.array([SHOWN.get(kind, 0.0) for kind in kinds])

    def scan(self, position: np.ndarray, axes: np.ndarray, motion: Motion) -> dict[str, np.ndarray]:
        """Columns (N,) float32 of at most MAX_RETURNS and false ones, from ``position`` (3,) with ``axes`` (3, 3)."""
        random, rays = self._random, self._rays @ axes.T
        ids, ranges = cast(self._scene.model, self._data, position, rays, self._groups, self._beam.reach_m)
        hit = np.flatnonzero(ranges >= 0)
        ids, ranges = ids[hit], ranges[hit]
        fading = 1 - 0.5 * (ranges / self._beam.reach_m) ** 2
        missed = random.random(len(self._scene.users) + 1) < MISSED
        missed[-1] = False  # of what is no road user
        kept = (random.random(len(hit)) < self._shown[ids] * fading) & ~missed[self._user[ids]]
        hit, ids, ranges = hit[kept], ids[kept], ranges[kept]
        if len(hit) > MAX_RETURNS:
            few = np.sort(random.choice(len(hit), MAX_RETURNS, replace=False))
            hit, ids, ranges = hit[few], ids[few], ranges[few]
        velocity = self._velocity(ids, position + ranges[:, None] * rays[hit], rays[hit], motion)
        return self._measure(self._angles[:, hit], ranges, velocity, self._rcs[ids])

    def _velocity(self, ids: np.ndarray, points: np.ndarray, rays: np.ndarray, motion: Motion) -> np.ndarray:
        """Radial velocities (N,) of the points, which turn with their bodies."""
        moving = -np.broadcast_to(motion.sensor, points.shape).copy()
        user = self._user[ids]
        at = np.flatnonzero(user >= 0)
        middle = self._data.mocap_pos[np.array(self._scene.users, dtype=np.int64)[user[at]]]
        arm, rate = points[at] - middle, motion.rates[user[at]]
        moving[at] += motion.users[user[at]]
        moving[at, 0] -= rate * arm[:, 1]
        moving[at, 1] += rate * arm[:, 0]
        return (moving * rays).sum(axis=1)

    def _measure(self, angles: np.ndarray, ranges: np.ndarray, velocity: np.ndarray,
                 rcs: np.ndarray) -> dict[str, np.ndarray]:  # fmt: skip
        """What is sent: noisy returns, and false ones among them."""
        random, false = self._random, int(self._random.poisson(CLUTTER))
        half = np.radians(self._beam.half_deg)
        azimuth = np.concatenate([angles[0], random.uniform(-half, half, false)])
        elevation = np.concatenate([angles[1], random.uniform(-0.03, 0.03, false)])
        ranges = np.concatenate([ranges, random.uniform(2.0, self._beam.reach_m, false)])
        velocity = np.concatenate([velocity, random.normal(0.0, 4.0, false)])
        rcs = np.concatenate([rcs, random.normal(-5.0, 4.0, false)])
        noise = random.standard_normal((4, len(ranges)))
        points = _unit(azimuth + NOISE_RAD * noise[0], elevation) * (ranges + NOISE_M * noise[1])[:, None]
        x, y, z = points.astype(np.float32).T
        return {
            "x": x, "y": y, "z": z, "velocity": (velocity + NOISE_MPS * noise[2]).astype(np.float32),
            "rcs": (rcs + NOISE_DB * noise[3]).astype(np.float32),
        }  # fmt: skip


_USERS = ("car", "bus", "truck", "pedestrian", "cyclist")


def _unit(azimuth: np.ndarray, elevation: np.ndarray) -> np.ndarray:
    flat = np.cos(elevation)
    return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=-1)
