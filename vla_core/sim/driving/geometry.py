"""Lines and boxes in the plane: stations along a line, and whether oriented boxes overlap.

Legend: N points of a line, M points asked for, K boxes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_core.sim.driving.layout import LENGTH_M, REAR_OVERHANG_M, Pose


def wrap(angle: float) -> float:
    """The same angle in [-pi, pi), rad."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


class Line:
    """A polyline with stations: ``points`` (N, 2), ``headings`` (N,) and ``stations`` (N,) float64, in m and rad.

    Args:
        centre: (N, 3) x, y, heading; headings may jump by full turns, points may repeat.
    """

    def __init__(self, centre: np.ndarray) -> None:
        steps = np.hypot(*np.diff(centre[:, :2], axis=0).T)
        kept = np.concatenate([[True], steps > 1e-9])  # where lanes meet, a point comes twice
        self.points = np.ascontiguousarray(centre[kept, :2], dtype=np.float64)
        self.headings = np.unwrap(centre[kept, 2].astype(np.float64))
        self.stations = np.concatenate([[0.0], np.cumsum(steps[steps > 1e-9])])
        self._directions = np.stack([np.cos(self.headings), np.sin(self.headings)], axis=-1)

    @property
    def length(self) -> float:
        """Station of the last point."""
        return float(self.stations[-1])

    def pose(self, s: float, offset: float = 0.0) -> Pose:
        """The place at station ``s``, ``offset`` to the left; beyond the ends it goes straight on."""
        last = len(self.stations) - 1
        i = min(max(int(np.searchsorted(self.stations, s)) - 1, 0), max(last - 1, 0))
        j = min(i + 1, last)
        span = self.stations[j] - self.stations[i]
        share = min(max((s - self.stations[i]) / span, 0.0), 1.0) if span else 0.0
        heading = float(self.headings[i] + share * (self.headings[j] - self.headings[i]))
        x, y = self.points[i] + share * (self.points[j] - self.points[i])
        beyond = s - min(max(s, 0.0), self.length)
        cos, sin = math.cos(heading), math.sin(heading)
        return Pose(x=float(x + beyond * cos - offset * sin), y=float(y + beyond * sin + offset * cos), heading=heading)

    def project(
        self, points: np.ndarray, from_s: float = -math.inf, to_s: float = math.inf
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of ``points`` (M, 2): station, offset to the left and the line's heading there, (M,) each.

        Along the direction of the nearest point of the line, which is exact where it is straight; beyond the ends it
        goes straight on. Only what lies between two stations is searched, for lines that come back to themselves.
        """
        low, high = 0, len(self.stations)
        if from_s > 0:
            low = min(int(np.searchsorted(self.stations, from_s)), high - 1)
        if to_s < self.stations[-1]:
            high = max(int(np.searchsorted(self.stations, to_s)), low + 1)
        near = self.points[low:high]
        nearest = low + ((points[:, None, 0] - near[:, 0]) ** 2 + (points[:, None, 1] - near[:, 1]) ** 2).argmin(axis=1)
        away, along = points - self.points[nearest], self._directions[nearest]
        station = self.stations[nearest] + (away * along).sum(axis=1)
        offset = along[:, 0] * away[:, 1] - along[:, 1] * away[:, 0]
        return station, offset, self.headings[nearest]


@dataclass(frozen=True)
class Boxes:
    """K oriented boxes: ``centres`` (K, 2), ``headings`` (K,), ``halves`` (K, 2) half length and half width."""

    centres: np.ndarray
    headings: np.ndarray
    halves: np.ndarray

    @classmethod
    def of(cls, poses: Sequence[Pose], sizes: Sequence[tuple[float, ...]]) -> Boxes:
        """Boxes with their middles at ``poses``; sizes are length, width and whatever follows."""
        places = np.array([(p.x, p.y, p.heading) for p in poses], dtype=np.float64).reshape(-1, 3)
        halves = np.array([size[:2] for size in sizes], dtype=np.float64).reshape(-1, 2) / 2
        return cls(places[:, :2], places[:, 2], halves)

    @property
    def axes(self) -> np.ndarray:
        """Unit vectors (K, 2, 2) along length and width."""
        cos, sin = np.cos(self.headings), np.sin(self.headings)
        return np.stack([np.stack([cos, sin], axis=-1), np.stack([-sin, cos], axis=-1)], axis=-2)

    @property
    def corners(self) -> np.ndarray:
        """(K, 4, 2), counterclockwise from the front left."""
        signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
        return self.centres[:, None] + (signs * self.halves[:, None]) @ self.axes


def overlaps(one: Boxes, many: Boxes) -> np.ndarray:
    """Which of ``many`` (K,) the box ``one`` overlaps; touching is none.

    Two convex shapes are apart exactly if a direction of one of their sides separates them (separating axes; Gottschalk
    et al. 1996, "OBBTree").
    """
    gap = many.centres - one.centres[0]
    mine, theirs = one.axes[0], many.axes
    cross = np.abs(theirs @ mine.T)  # (K, theirs, mine): cosines between the sides
    reach_mine = one.halves[0] + np.einsum("ki,kij->kj", many.halves, cross)
    reach_theirs = many.halves + cross @ one.halves[0]
    apart = (np.abs(gap @ mine.T) >= reach_mine).any(axis=1)
    apart |= (np.abs(np.einsum("kj,kij->ki", gap, theirs)) >= reach_theirs).any(axis=1)
    return ~apart


def ego_middle(pose: Pose) -> Pose:
    """The middle of the ego vehicle's box, whose rear axle is at ``pose``."""
    ahead = LENGTH_M / 2 - REAR_OVERHANG_M
    return Pose(x=pose.x + ahead * math.cos(pose.heading), y=pose.y + ahead * math.sin(pose.heading),
                heading=pose.heading)  # fmt: skip


def ego_front(pose: Pose) -> tuple[float, float]:
    """The middle of the ego vehicle's front bumper (x, y)."""
    ahead = LENGTH_M - REAR_OVERHANG_M
    return pose.x + ahead * math.cos(pose.heading), pose.y + ahead * math.sin(pose.heading)
