"""Bundles of rays from one point into a scene."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from vla_core.sim.driving.scene import mujoco_module


def groups(*chosen: int) -> np.ndarray:
    """Which groups of geoms rays meet, (6,) uint8 as MuJoCo takes it."""
    mask = np.zeros(6, dtype=np.uint8)
    mask[list(chosen)] = 1
    return mask


def cast(model: Any, data: Any, origin: np.ndarray, rays: np.ndarray, met: np.ndarray,
         reach_m: float) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Geoms (N,) int32 and ranges (N,) float64 in m where ``rays`` (N, 3), of unit length, end; -1 where they do not.

    ``origin`` (3,) and ``rays`` are in the map, ``met`` are the :func:`groups`. Endless planes are level.
    """
    # MuJoCo leaves out shapes whose middle is beyond the reach: also an endless ground, whose middle is anywhere.
    endless = (model.geom_type == mujoco_module().mjtGeom.mjGEOM_PLANE) & (model.geom_size[:, 0] == 0)
    data.geom_xpos[endless, :2] = origin[:2]
    count = len(rays)
    ids, ranges = np.empty(count, np.int32), np.empty(count)
    normals = (None,) if _takes_normals() else ()
    mujoco_module().mj_multiRay(
        model, data, origin, rays.reshape(-1), met, 1, -1, ids, ranges, *normals, count, reach_m
    )  # fmt: skip
    ranges[ranges > reach_m] = -1  # MuJoCo leaves out whole shapes beyond the reach, not points
    return ids, ranges


@functools.cache
def _takes_normals() -> bool:
    """Later releases of MuJoCo 3 can return normals too, in an argument of its own."""
    return "normal:" in str(mujoco_module().mj_multiRay.__doc__)
