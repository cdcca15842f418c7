"""How a lane graph is built: lines of constant curvature, roads of two lanes, crossings and roundabouts.

Everything is made of straight lines and circular arcs, whose offsets are lines and arcs again, so that a lane meets its
successor in position and heading exactly. Traffic keeps to the right.

Legend: N points of a line, each x, y, heading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from vla_core.sim.driving.geometry import wrap
from vla_core.sim.driving.layout import Lane, Turn

STEP_M = 0.4  # between the points of a line; at most 0.5 on the outside of the sharpest bend
STRAIGHT_RAD = 0.7  # a junction's path that turns less goes straight on


def line(start: Sequence[float] | np.ndarray, *pieces: tuple[float, float]) -> np.ndarray:
    """A line (N, 3) from the pose ``start`` through ``pieces`` of (length in m, curvature in 1/m, left positive)."""
    x, y, heading = (float(value) for value in start)
    points = [np.array([[x, y, heading]])]
    for length, curvature in pieces:
        s = np.linspace(0.0, length, max(int(np.ceil(length / STEP_M)), 1) + 1)[1:]
        turned = heading + curvature * s
        chord = s * np.sinc(curvature * s / (2 * np.pi))  # of an arc of length s
        middle = heading + curvature * s / 2
        points.append(np.stack((x + chord * np.cos(middle), y + chord * np.sin(middle), turned), axis=1))
        x, y, heading = points[-1][-1]
    return np.concatenate(points)


def beside(centre: np.ndarray, offset_m: float) -> np.ndarray:
    """The line ``offset_m`` to the left of ``centre`` (N, 3), in the same direction."""
    x, y, heading = centre.T
    return np.stack((x - offset_m * np.sin(heading), y + offset_m * np.cos(heading), heading), axis=1)


def backwards(centre: np.ndarray) -> np.ndarray:
    """The same line, driven the other way."""
    return np.asarray(centre[::-1] + np.array([0.0, 0.0, np.pi]))


def connector(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The line and arc (N, 3) that join two poses (3,) whose headings' lines meet, or lie on one straight line."""
    turn = wrap(end[2] - start[2])
    gap = end[:2] - start[:2]
    if abs(turn) < 1e-9:
        return _ending(line(start, (float(np.hypot(*gap)), 0.0)), end)
    ahead, behind = (np.array([np.cos(pose[2]), np.sin(pose[2])]) for pose in (start, end))
    first, last = np.linalg.solve(np.stack((ahead, behind), axis=1), gap)  # m to the point where the lines meet
    if min(first, last) <= 0:
        raise ValueError(f"no arc joins the poses {start} and {end}: their lines do not meet between them")
    tangent = min(first, last)
    curvature = np.tan(turn / 2) / tangent
    pieces = [(first - tangent, 0.0), (turn / curvature, curvature), (last - tangent, 0.0)]
    return _ending(line(start, *(piece for piece in pieces if piece[0] > 1e-6)), end)


def _ending(centre: np.ndarray, end: np.ndarray) -> np.ndarray:
    """``centre`` with the sum of its rounding errors taken out of its last point."""
    centre[-1, :2] = end[:2]
    return centre


def stations(centre: np.ndarray) -> np.ndarray:
    """The stations (N,) in m of a line's points."""
    return np.concatenate(([0.0], np.cumsum(np.hypot(*np.diff(centre[:, :2], axis=0).T))))


def at_station(centre: np.ndarray, s: float) -> np.ndarray:
    """The pose (3,) at station ``s`` of a line."""
    along = stations(centre)
    heading = np.unwrap(centre[:, 2])
    return np.array([np.interp(s, along, column) for column in (centre[:, 0], centre[:, 1], heading)])


@dataclass(frozen=True, eq=False, kw_only=True)
class Road:
    """Two lanes along ``centre`` (N, 3): ``forth`` in its direction on the right, ``back`` against it on the left."""

    centre: np.ndarray
    forth: int
    back: int
    width_m: float  # of a lane

    @property
    def length_m(self) -> float:
        """Length of the centre line."""
        return float(stations(self.centre)[-1])


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A road seen from a junction: the lane that comes in, the lane that goes out, and the direction outwards."""

    road: Road
    incoming: int
    outgoing: int
    angle: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Junction:
    """Where roads meet. ``radius_m`` is from ``centre`` to where the arms end; ``ring_m`` a roundabout's lane centre.

    ``ways`` gives the lanes within the junction from one arm to another, by their places among ``arms``. The arms go
    counterclockwise, from the one that the network came from.
    """

    id: int
    centre: tuple[float, float]
    radius_m: float
    arms: tuple[Arm, ...]
    ways: dict[tuple[int, int], tuple[int, ...]]
    ring_m: float | None = None


@dataclass
class Network:
    """Lanes, roads and junctions as they are laid."""

    lanes: dict[int, Lane] = field(default_factory=dict)
    roads: list[Road] = field(default_factory=list)
    junctions: list[Junction] = field(default_factory=list)

    def lane(
        self, centre: np.ndarray, width_m: float, speed_mps: float, turn: Turn = "none", junction: int | None = None
    ) -> int:
        """Lay one lane; its id."""
        number = len(self.lanes)
        self.lanes[number] = Lane(
            id=number, centre=centre, width_m=width_m, speed_mps=speed_mps, turn=turn, junction=junction
        )
        return number

    def change(self, lane: int, **fields: int | None) -> None:
        """Set fields of a lane."""
        self.lanes[lane] = replace(self.lanes[lane], **fields)  # type: ignore[arg-type]

    def join(self, *chain: int) -> None:
        """Each lane is followed by the next."""
        for before, after in pairwise(chain):
            followers = self.lanes[before].successors
            if after not in followers:
                self.lanes[before] = replace(self.lanes[before], successors=(*followers, after))

    def road(self, centre: np.ndarray, width_m: float, speed_mps: float) -> Road:
        """Lay a road of one lane in each direction."""
        forth = self.lane(beside(centre, -width_m / 2), width_m, speed_mps)
        back = self.lane(backwards(beside(centre, width_m / 2)), width_m, speed_mps)
        self.change(forth, opposite=back)
        self.change(back, opposite=forth)
        road = Road(centre=centre, forth=forth, back=back, width_m=width_m)
        self.roads.append(road)
        return road

    def crossing(self, road: Road, roads: Sequence[Road], radius_m: float, speed_mps: float) -> Junction:
        """Join the end of ``road`` with the starts of ``roads``, which point away from one centre, ``radius_m`` off."""
        number = len(self.junctions)
        arms = _arms(road, roads)
        ways: dict[tuple[int, int], tuple[int, ...]] = {}
        for i, start in enumerate(arms):
            for j, end in enumerate(arms):
                if i == j:
                    continue
                pose = self.lanes[start.incoming].centre[-1], self.lanes[end.outgoing].centre[0]
                centre = connector(*pose)
                turn = wrap(pose[1][2] - pose[0][2])
                name: Turn = "straight" if abs(turn) < STRAIGHT_RAD else "left" if turn > 0 else "right"
                speed = self.lanes[start.incoming].speed_mps if name == "straight" else speed_mps
                way = self.lane(centre, road.width_m, speed, name, number)
                self.join(start.incoming, way, end.outgoing)
                ways[i, j] = (way,)
        x, y, heading = road.centre[-1]
        middle = (float(x + radius_m * np.cos(heading)), float(y + radius_m * np.sin(heading)))
        self.junctions.append(Junction(id=number, centre=middle, radius_m=radius_m, arms=arms, ways=ways))
        return self.junctions[-1]

    def roundabout(
        self, road: Road, roads: Sequence[Road], radius_m: float, ring_m: float, entry_m: float, speed_mps: float
    ) -> Junction:
        """Join like :meth:`crossing`, through a ring whose lane has the radius ``ring_m``, driven counterclockwise.

        An arc of radius ``entry_m`` leads in and out; ``radius_m`` must be :func:`roundabout_radius`'s, where an arm
        meets the arc.
        """
        number, width = len(self.junctions), road.width_m
        arms = _arms(road, roads)
        x, y, heading = road.centre[-1]
        middle = np.array([x + radius_m * np.cos(heading), y + radius_m * np.sin(heading)])
        touch = float(np.arctan2(width / 2 + entry_m, radius_m))  # the arcs meet the ring so far beside the arm
        sweep = np.pi / 2 - touch

        def ring(start: float, end: float) -> int:
            angle = (end - start) % (2 * np.pi)
            point = middle + ring_m * np.array([np.cos(start), np.sin(start)])
            centre = line((*point, start + np.pi / 2), (angle * ring_m, 1 / ring_m))
            return self.lane(centre, width, speed_mps, "roundabout", number)

        def reach(centre: np.ndarray) -> int:
            return self.lane(centre, width, speed_mps, "roundabout", number)

        entries, exits, passing, between = [], [], [], []
        for arm, after in zip(arms, (*arms[1:], arms[0]), strict=True):
            entries.append(reach(line(self.lanes[arm.incoming].centre[-1], (sweep * entry_m, -1 / entry_m))))
            start = self.lanes[arm.outgoing].centre[0]
            exits.append(reach(backwards(line((*start[:2], start[2] - np.pi), (sweep * entry_m, 1 / entry_m)))))
            passing.append(ring(arm.angle - touch, arm.angle + touch))
            between.append(ring(arm.angle + touch, after.angle - touch))
        ways: dict[tuple[int, int], tuple[int, ...]] = {}
        count = len(arms)
        for i in range(count):
            self.join(arms[i].incoming, entries[i], between[i], passing[(i + 1) % count])
            self.join(between[i], exits[(i + 1) % count], arms[(i + 1) % count].outgoing)
            self.join(passing[i], between[i])
            for exit_number in range(1, count):
                j = (i + exit_number) % count
                inner: list[int] = []
                for k in range(i, i + exit_number - 1):
                    inner += [between[k % count], passing[(k + 1) % count]]
                ways[i, j] = (entries[i], *inner, between[(j - 1) % count], exits[j])
        self.junctions.append(
            Junction(
                id=number,
                centre=(float(middle[0]), float(middle[1])),
                radius_m=radius_m,
                arms=arms,
                ways=ways,
                ring_m=ring_m,
            )
        )
        return self.junctions[-1]


def roundabout_radius(ring_m: float, entry_m: float, width_m: float) -> float:
    """How far from a roundabout's centre its arms end: where an arc of radius ``entry_m`` can leave the lane's centre
    and touch the ring from outside.
    """
    return float(np.sqrt((ring_m + entry_m) ** 2 - (width_m / 2 + entry_m) ** 2))


def _arms(road: Road, roads: Sequence[Road]) -> tuple[Arm, ...]:
    """The arms of a junction, counterclockwise from the road that ends there."""
    own = Arm(road=road, incoming=road.forth, outgoing=road.back, angle=float(road.centre[-1, 2] + np.pi))
    others = [Arm(road=out, incoming=out.back, outgoing=out.forth, angle=float(out.centre[0, 2])) for out in roads]
    return (own, *sorted(others, key=lambda arm: (arm.angle - own.angle) % (2 * np.pi)))
