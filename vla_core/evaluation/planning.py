"""Open-loop figures of a planned trajectory, in nuScenes' terms: displacement, misses and collisions.

A plan is what a vehicle means to do over the next seconds, in its own frame at the observation. It is held against what
the vehicle then did, and against where the other road users then were. Two habits of averaging are about, and their
figures must not be compared: UniAD (Hu et al. 2023) takes the waypoint at the horizon, ST-P3 (Hu et al. 2022) and VAD
(Jiang et al. 2023) the mean over all waypoints up to it. Both are given here under their own names.

Legend: N ticks, H waypoints, U road users. A pose is x, y in m and heading in rad; a box is x, y of its middle,
heading, length and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vla_core.evaluation.metrics import bootstrap_interval

HORIZONS_S = (1, 2, 3)
MISS_M = 2.0  # of the last waypoint; nuScenes' prediction challenge and Argoverse have this threshold
TOLERANCE_S = 1e-3


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A vehicle's box around the origin of its poses: the rear axle's middle, ``rear_m`` before the box's end."""

    length_m: float
    width_m: float
    rear_m: float

    def boxes(self, poses: np.ndarray) -> np.ndarray:
        """Its boxes (..., 5) at ``poses`` (..., 3)."""
        forward = self.length_m / 2 - self.rear_m
        x, y, heading = np.moveaxis(np.asarray(poses, dtype=np.float64), -1, 0)
        size = (np.full_like(x, self.length_m), np.full_like(x, self.width_m))
        return np.stack((x + forward * np.cos(heading), y + forward * np.sin(heading), heading, *size), axis=-1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Plans:
    """The plans of one route.

    ``times_s``    (H,) of the waypoints, from the observation on
    ``planned``    (N, H, 3) poses, in the vehicle's frame at the observation
    ``driven``     (N, H, 3) poses that were driven, in the same frame
    ``known``      (N, H) whether that is known: not behind the end of the recording
    ``hit``        (N, H) whether the planned box overlaps a road user or solid of that time
    ``driven_hit`` (N, H) the same for the driven box
    """

    times_s: np.ndarray
    planned: np.ndarray
    driven: np.ndarray
    known: np.ndarray
    hit: np.ndarray
    driven_hit: np.ndarray

    def displacement(self) -> np.ndarray:
        """Distance (N, H) in m between planned and driven positions."""
        return np.linalg.norm(self.planned[..., :2] - self.driven[..., :2], axis=-1)


def into_frame(poses: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """``poses`` (..., 3) of the world as seen from ``frame`` (..., 3), a pose of the world; headings in (-pi, pi]."""
    delta = poses[..., :2] - frame[..., :2]
    cos, sin = np.cos(frame[..., 2]), np.sin(frame[..., 2])
    x, y = cos * delta[..., 0] + sin * delta[..., 1], cos * delta[..., 1] - sin * delta[..., 0]
    return np.stack((x, y, wrapped(poses[..., 2] - frame[..., 2])), axis=-1)


def out_of_frame(poses: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The inverse of :func:`into_frame`."""
    cos, sin = np.cos(frame[..., 2]), np.sin(frame[..., 2])
    x = frame[..., 0] + cos * poses[..., 0] - sin * poses[..., 1]
    y = frame[..., 1] + sin * poses[..., 0] + cos * poses[..., 1]
    return np.stack((x, y, wrapped(poses[..., 2] + frame[..., 2])), axis=-1)


def wrapped(angle: np.ndarray) -> np.ndarray:
    """Angles in (-pi, pi]."""
    return -((math.pi - angle) % (2 * math.pi)) + math.pi


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether boxes (..., 5) share some area: no side of either separates them (the separating axis theorem).

    Boxes that only touch do not overlap. NaN overlaps with nothing.
    """
    apart = b[..., :2] - a[..., :2]
    found = np.ones(np.broadcast_shapes(a.shape[:-1], b.shape[:-1]), dtype=bool)
    for box in (a, b):
        for turn in (0.0, math.pi / 2):
            axis = box[..., 2] + turn
            distance = np.abs(apart[..., 0] * np.cos(axis) + apart[..., 1] * np.sin(axis))
            found &= distance < _reach(a, axis) + _reach(b, axis)
    return found


def _reach(box: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """How far a box extends from its middle along the direction ``axis``, rad."""
    angle = axis - box[..., 2]
    return (box[..., 3] * np.abs(np.cos(angle)) + box[..., 4] * np.abs(np.sin(angle))) / 2


def hits(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether ``boxes`` (..., 5) overlap any of ``others`` (..., U, 5)."""
    if others.shape[-2] == 0:
        return np.zeros(boxes.shape[:-1], dtype=bool)
    return np.any(overlap(boxes[..., None, :], others), axis=-1)


def figures(routes: Sequence[Plans]) -> dict[str, Any]:
    """All figures of at least one plan, with 95 % intervals by bootstrap over the routes (``…_ci95``).

    ``l2_1s`` …                 distance at the waypoint of 1 s, mean over plans (UniAD's)
    ``l2_1s_up_to`` …           mean of the distances of all waypoints up to 1 s (ST-P3's and VAD's)
    ``ade``, ``fde``            mean distance over all waypoints, and that of the last one
    ``miss_rate``               share of plans whose last waypoint is more than 2 m away
    ``collision_rate``          share of plans that overlap a road user or solid at any waypoint
    ``collision_rate_1s`` …     the same at the waypoint of 1 s alone (UniAD's)
    ``collision_rate_1s_up_to`` share of the waypoints up to 1 s that overlap (ST-P3's and VAD's)
    ``…_mean``, ``…_mean_up_to`` the means of those of 1, 2 and 3 s
    ``driven_collision_rate``   share of plans whose driven future overlaps: what no plan can be blamed for

    A displacement at a time counts where the driven pose of that time is known. Of collisions a waypoint counts where
    it is known and the driven vehicle itself is free, as ST-P3 has it. A waypoint at the observation itself, which says
    nothing, is left out.
    """
    if not routes or not any(plans.known.any() for plans in routes):
        raise ValueError("no plan whose future is known")
    found: dict[str, Any] = {"routes": len(routes), "ticks": sum(len(plans.planned) for plans in routes)}
    parts: dict[str, list[tuple[float, float]]] = {}
    for plans in routes:
        for name, part in _sums(plans).items():
            parts.setdefault(name, []).append(part)
    for name, each in parts.items():
        top, below = zip(*each, strict=True)
        found[name] = sum(top) / sum(below) if sum(below) else None
        found[f"{name}_ci95"] = bootstrap_interval(top, below)
    for kind in ("l2", "collision_rate"):
        for suffix in ("", "_up_to"):
            values = [found.get(f"{kind}_{horizon}s{suffix}") for horizon in HORIZONS_S]
            known = [value for value in values if value is not None]
            found[f"{kind}_mean{suffix}"] = sum(known) / len(known) if len(known) == len(values) else None
    return found


def _sums(plans: Plans) -> dict[str, tuple[float, float]]:
    """For each figure its sum over a route and the number of plans or waypoints in it."""
    ahead = plans.times_s > TOLERANCE_S
    times, known = plans.times_s[ahead], plans.known[:, ahead]
    distance, hit = plans.displacement()[:, ahead], plans.hit[:, ahead]
    free = known & ~plans.driven_hit[:, ahead]
    whole, clear = known.all(1), free.all(1)
    found = {
        "ade": _sum(distance.mean(1), whole),
        "fde": _sum(distance[:, -1], whole),
        "miss_rate": _sum(distance[:, -1] > MISS_M, whole),
        "collision_rate": _sum(hit.any(1), clear),
        "driven_collision_rate": _sum(plans.driven_hit[:, ahead].any(1), whole),
    }
    for horizon in HORIZONS_S:
        at = np.flatnonzero(np.abs(times - horizon) < TOLERANCE_S)
        if len(at) == 0:
            continue
        up_to = times < horizon + TOLERANCE_S
        reached = known[:, at[0]]
        found |= {
            f"l2_{horizon}s": _sum(distance[:, at[0]], reached),
            f"l2_{horizon}s_up_to": _sum(distance[:, up_to].mean(1), reached),
            f"collision_rate_{horizon}s": _sum(hit[:, at[0]], free[:, at[0]]),
            f"collision_rate_{horizon}s_up_to": _sum(hit[:, up_to], free[:, up_to]),
        }
    return found


def _sum(values: ArrayLike, counted: ArrayLike) -> tuple[float, float]:
    which = np.asarray(counted)
    return float(np.asarray(values)[which].sum()), float(which.sum())


def steady(speed_mps: float, yaw_rate: float, times_s: np.ndarray) -> np.ndarray:
    """Poses (H, 3) of going on at constant speed and yaw rate: a plan that looks at nothing, to compare others with."""
    heading = yaw_rate * times_s
    if abs(yaw_rate) < 1e-6:
        return np.stack((speed_mps * times_s, np.zeros_like(times_s), heading), axis=-1)
    radius = speed_mps / yaw_rate
    return np.stack((radius * np.sin(heading), radius * (1 - np.cos(heading)), heading), axis=-1)
