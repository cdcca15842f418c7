"""A spinning LiDAR of 32 beams by ray casting.

The head turns clockwise, ten times a second, and starts at the back. It fires BATCH columns at an instant, every
20 ms, from where it then is: a cloud of a moving vehicle is skewed as a real one's is. Columns of a cloud, in the
sensor's frame at each point's own time:

- ``x``, ``y``, ``z`` m
- ``intensity`` 0 to 1: the share of light that comes back, by material and incidence
- ``time`` s, from the header's stamp, which is the end of the sweep: 0 or less
- ``ring`` beam, 0 the lowest
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vla_core.sim.driving.layout import Raster, Surface
from vla_core.sim.driving.rays import cast, groups
from vla_core.sim.driving.scene import RAY_GROUP, SOLID_GROUP, Scene, mujoco_module

BEAMS, COLUMNS, BATCH = 32, 360, 72
LOWEST, HIGHEST = np.radians(-30.0), np.radians(10.0)
REACH_M = 60.0
NOISE_M = 0.02
DROPOUT = (0.01, 0.02)  # share of lost points close by, and what is added at full reach
GROUND_REFLECTIVITY = {
    Surface.GRASS: 0.30, Surface.ROAD: 0.12, Surface.MARKING: 0.80, Surface.SIDEWALK: 0.28, Surface.CROSSWALK: 0.75,
    Surface.STOP_LINE: 0.85,
}  # fmt: skip


def directions() -> np.ndarray:
    """Unit vectors (COLUMNS, BEAMS, 3) in the sensor's frame, in the order of firing."""
    azimuth = np.pi - 2 * np.pi * np.arange(COLUMNS) / COLUMNS
    elevation = np.linspace(LOWEST, HIGHEST, BEAMS)
    flat = np.cos(elevation)
    return np.stack(
        [np.cos(azimuth)[:, None] * flat, np.sin(azimuth)[:, None] * flat,
         np.broadcast_to(np.sin(elevation), (COLUMNS, BEAMS))], axis=-1,
    )  # fmt: skip


class Lidar:
    """Scans ``scene``; randomness comes from ``random`` alone."""

    def __init__(self, scene: Scene, data: Any, ground: Raster, random: np.random.Generator) -> None:
        self._mujoco = mujoco_module()
        self._scene, self._data, self._ground, self._random = scene, data, ground, random
        self._directions = directions()
        self._groups = groups(SOLID_GROUP, RAY_GROUP)
        self._plane = int(scene.model.geom("plane").id)
        self._painted = np.array([GROUND_REFLECTIVITY[surface] for surface in Surface])
        self._column = 0
        self._parts: list[dict[str, np.ndarray]] = []

    def fire(self, position: np.ndarray, axes: np.ndarray, time_s: float) -> dict[str, np.ndarray] | None:
        """Fire the next columns from ``position`` (3,) with the sensor's ``axes`` (3, 3) as columns, in the map.

        Returns the columns of the cloud where they complete one.
        """
        local = self._directions[self._column : self._column + BATCH].reshape(-1, 3)
        rays = local @ axes.T
        ids, ranges = cast(self._scene.model, self._data, position, rays, self._groups, REACH_M)
        self._parts.append(self._returns(position, local, rays, ids, ranges, time_s))
        self._column = (self._column + BATCH) % COLUMNS
        if self._column:
            return None
        cloud = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        cloud["time"] = (cloud["time"] - time_s).astype(np.float32)
        self._parts.clear()
        return cloud

    def _returns(self, position: np.ndarray, local: np.ndarray, rays: np.ndarray, ids: np.ndarray, ranges: np.ndarray,
                 time_s: float) -> dict[str, np.ndarray]:  # fmt: skip
        chance, noise = self._random.random(len(rays)), self._random.standard_normal(len(rays))
        hit = np.flatnonzero((ranges >= 0) & (chance >= DROPOUT[0] + DROPOUT[1] * ranges / REACH_M))
        ids, ranges, rays = ids[hit], ranges[hit], rays[hit]
        points = position + ranges[:, None] * rays
        material = self._scene.reflectivity[ids]
        ground = np.flatnonzero(ids == self._plane)
        material[ground] = self._painted[self._ground.at(points[ground, :2])]
        intensity = material * (0.25 + 0.75 * self._incidence(ids, points, rays))
        x, y, z = (local[hit] * (ranges + NOISE_M * noise[hit])[:, None]).astype(np.float32).T
        return {
            "x": x, "y": y, "z": z, "intensity": intensity.astype(np.float32),
            "time": np.full(len(hit), time_s), "ring": (hit % BEAMS).astype(np.uint16),
        }  # fmt: skip

    def _incidence(self, ids: np.ndarray, points: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Cosines (N,) between rays and the surfaces that they meet."""
        cosine = np.abs(rays[:, 2])  # of the ground
        at = np.flatnonzero(ids != self._plane)
        if not len(at):
            return cosine
        model, data, geoms, kinds = self._scene.model, self._data, ids[at], self._mujoco.mjtGeom
        axes = data.geom_xmat[geoms].reshape(-1, 3, 3)
        place = np.einsum("nji,nj->ni", axes, points[at] - data.geom_xpos[geoms])
        ray = np.einsum("nji,nj->ni", axes, rays[at])
        size, kind = model.geom_size[geoms], model.geom_type[geoms]
        face = (np.abs(place) / np.maximum(size, 1e-9)).argmax(axis=1)
        box = np.abs(np.take_along_axis(ray, face[:, None], axis=1)[:, 0])
        lid = np.abs(place[:, 2]) >= size[:, 1] - 1e-6
        radius = np.hypot(place[:, 0], place[:, 1])
        side = np.abs(place[:, 0] * ray[:, 0] + place[:, 1] * ray[:, 1]) / np.maximum(radius, 1e-9)
        ball = np.abs((place * ray).sum(axis=1)) / np.maximum(np.linalg.norm(place, axis=1), 1e-9)
        cosine[at] = np.select(
            [kind == kinds.mjGEOM_BOX, kind == kinds.mjGEOM_SPHERE], [box, ball],
            np.where(lid, np.abs(ray[:, 2]), side),
        )  # fmt: skip
        return cosine
