"""The ground of a town, painted into cells: sidewalks, roads over them, markings over those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from vla_core.sim.driving.layout import Light, Raster, Surface
from vla_core.sim.driving.network import Arm, Junction, Network, Road, backwards, beside, line, stations

CELL_M = 0.125
MARGIN_M = 14.0  # of ground around the roads
SIDEWALK_M = 2.8
LINE_M = 0.16  # width of a marking
CROSSWALK_M = 3.0


@dataclass(frozen=True, kw_only=True)
class Crosswalk:
    """Zebra stripes over ``road``, from station ``s`` to ``s`` + 3 m of its centre line; one walks between ``ends``,
    from the right sidewalk to the left one as seen along the centre line.
    """

    road: Road
    s: float
    ends: tuple[tuple[float, float], tuple[float, float]]


def painted(network: Network, crosswalks: Sequence[Crosswalk], boards: Sequence[Light]) -> Raster:
    """The ground: sidewalks, roads over them, markings over those."""
    points = np.concatenate([lane.centre[:, :2] for lane in network.lanes.values()])
    low, high = points.min(axis=0) - MARGIN_M, points.max(axis=0) + MARGIN_M
    width, height = np.ceil((high - low) / CELL_M).astype(int)
    brush = _Brush(np.full((height, width), Surface.GRASS, np.uint8), (float(low[0]), float(low[1])))
    for extra, surface in ((SIDEWALK_M, Surface.SIDEWALK), (0.0, Surface.ROAD)):
        for road in network.roads:
            brush.strip(road.centre, -road.width_m - extra, road.width_m + extra, surface)
        for junction in network.junctions:
            _junction(brush, network, junction, extra, surface)
    for road in network.roads:
        _markings(brush, road, [walk.s for walk in crosswalks if walk.road is road])
    for junction in network.junctions:
        if junction.ring_m is not None:
            _ring_markings(brush, junction)
    for walk in crosswalks:
        _zebra(brush, walk)
    for board in boards:
        across = board.width_m / 2 - LINE_M
        brush.strip(line(board.stop, (0.4, 0.0)), -across, across, Surface.STOP_LINE)
    return Raster(cells=brush.cells, origin=brush.origin, resolution_m=CELL_M)


class _Brush:
    """Paints polygons into cells."""

    def __init__(self, cells: np.ndarray, origin: tuple[float, float]) -> None:
        self.cells, self.origin = cells, origin

    def polygon(self, corners: np.ndarray, surface: Surface) -> None:
        """Fill what lies within ``corners`` (N, 2)."""
        fine = np.round(((corners - self.origin) / CELL_M - 0.5) * 16).astype(np.int32)
        cv2.fillPoly(self.cells, [fine], int(surface), lineType=cv2.LINE_8, shift=4)

    def strip(self, centre: np.ndarray, right: float, left: float, surface: Surface) -> None:
        """Fill between the offsets ``right`` and ``left`` of a line."""
        edge = np.concatenate((beside(centre, right), backwards(beside(centre, left))))
        self.polygon(edge[:, :2], surface)

    def disc(self, centre: tuple[float, float], radius: float, surface: Surface) -> None:
        """Fill a circle."""
        angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        self.polygon(np.array(centre) + radius * np.stack((np.cos(angle), np.sin(angle)), axis=1), surface)


def _junction(brush: _Brush, network: Network, junction: Junction, extra: float, surface: Surface) -> None:
    """The area between the arms of a crossing, or a ring and the ways in and out of it."""
    if junction.ring_m is None:
        brush.polygon(hull(junction, extra), surface)
        return
    half = junction.arms[0].road.width_m / 2 + 0.5
    for lane in network.lanes.values():
        if lane.junction == junction.id:
            brush.strip(lane.centre, -half - extra, half + extra, surface)
    brush.disc(junction.centre, junction.ring_m - half, Surface.GRASS)


def hull(junction: Junction, extra: float) -> np.ndarray:
    """The corners (N, 2) of a crossing's area, ``extra`` wider than the roads."""
    corners = np.concatenate([_mouth(arm, extra) for arm in junction.arms])
    return np.asarray(cv2.convexHull(corners.astype(np.float32))[:, 0].astype(np.float64))


def _mouth(arm: Arm, extra: float) -> np.ndarray:
    """The two corners (2, 2) where an arm ends."""
    pose = arm.road.centre[:1] if arm.road.forth == arm.outgoing else arm.road.centre[-1:]
    reach = arm.road.width_m + extra
    return np.concatenate((beside(pose, reach), beside(pose, -reach)))[:, :2]


def _markings(brush: _Brush, road: Road, crosswalks: Sequence[float]) -> None:
    """A dashed line in the middle and solid ones at the edges; none within a crosswalk."""
    edge = road.width_m - 0.1
    for side in (-edge, edge - LINE_M):
        brush.strip(road.centre, side, side + LINE_M, Surface.MARKING)
    along = stations(road.centre)
    for s in np.arange(1.0, along[-1] - 3.0, 6.0):
        if any(walk - 3.5 < s < walk + CROSSWALK_M + 0.5 for walk in crosswalks):
            continue
        dash = road.centre[(along >= s) & (along <= s + 3.0)]
        brush.strip(dash, -LINE_M / 2, LINE_M / 2, Surface.MARKING)


def _ring_markings(brush: _Brush, junction: Junction) -> None:
    """A solid line around the island, dashes at the outside where one comes in and goes out."""
    assert junction.ring_m is not None
    half = junction.arms[0].road.width_m / 2
    start = (junction.centre[0] + junction.ring_m, junction.centre[1], np.pi / 2)
    ring = line(start, (2 * np.pi * junction.ring_m, 1 / junction.ring_m))
    brush.strip(ring, half, half + LINE_M, Surface.MARKING)
    along = stations(ring)
    for s in np.arange(0.0, along[-1] - 1.0, 2.0):
        brush.strip(ring[(along >= s) & (along <= s + 1.0)], -half - LINE_M, -half, Surface.MARKING)


def _zebra(brush: _Brush, walk: Crosswalk) -> None:
    """Stripes along the road, half a metre wide and as far apart."""
    along = stations(walk.road.centre)
    piece = walk.road.centre[(along >= walk.s) & (along <= walk.s + CROSSWALK_M)]
    reach = walk.road.width_m - 0.35
    for right in np.arange(-reach, reach - 0.4, 1.0):
        brush.strip(piece, right, right + 0.5, Surface.CROSSWALK)
