"""Small towns from a seed: an approach road, a junction, roads out of it, and what stands beside them.

A :class:`District` is a :class:`~vla_core.sim.driving.layout.Town` whose places have names, so that routes can be told
through it. The ground is painted in cells of 0.125 m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from vla_core.sim.driving.geometry import Boxes, overlaps
from vla_core.sim.driving.layout import Light, Pose, Raster, Solid, Surface, Town
from vla_core.sim.driving.network import (
    Arm,
    Junction,
    Network,
    Road,
    at_station,
    beside,
    line,
    roundabout_radius,
    stations,
)
from vla_core.sim.driving.paint import CROSSWALK_M, SIDEWALK_M, Crosswalk, hull, painted

Plan = Literal["crossing", "roundabout", "street"]

SETBACK_M = 0.6  # of a stop line or a crosswalk from where the lane ends
POLE_M = 1.3  # of a light's pole from the road
ROOM_M = 15.0  # between two roads, away from the junction that they share


@dataclass(frozen=True, kw_only=True)
class District:
    """A town and its places: the road that the route starts on, the junctions in driving order, the crosswalks."""

    town: Town
    start: Road
    junctions: tuple[Junction, ...]
    crosswalks: tuple[Crosswalk, ...]


def build(plan: Plan, seed: int, *, lights: bool | None = None, crosswalk: bool | None = None) -> District:
    """The town of a seed; ``lights`` at its crossings and a ``crosswalk`` on the first road are the seed's choice
    where None.
    """
    rng = np.random.default_rng((seed, ("crossing", "roundabout", "street").index(plan)))
    network = _laid(plan, rng)
    lit = bool(rng.random() < 0.45) if lights is None else lights
    walk = bool(rng.random() < 0.35) if crosswalk is None else crosswalk
    start = network.roads[0]
    crosswalks = [_crosswalk(start, float(rng.uniform(0.5, 0.62)) * start.length_m)] if walk else []
    if plan == "crossing" and rng.random() < 0.4:  # one more, over an exit
        road = network.junctions[0].arms[int(rng.integers(1, 4))].road
        crosswalks.append(_crosswalk(road, SETBACK_M))
    boards = _lights(network, crosswalks, rng) if lit and plan == "crossing" else ()
    ground = painted(network, crosswalks, boards)
    town = Town(lanes=network.lanes, ground=ground, lights=boards, solids=_solids(network, ground, boards, rng))
    return District(town=town, start=start, junctions=tuple(network.junctions), crosswalks=tuple(crosswalks))


def _laid(plan: Plan, rng: np.random.Generator) -> Network:
    """Roads and junctions whose roads keep apart."""
    for _ in range(200):
        network = {"crossing": _crossing_town, "roundabout": _roundabout_town, "street": _street}[plan](rng)
        if _apart(network.roads):
            return network
    raise AssertionError(f"no {plan} town was found in 200 draws")


def _bend(
    rng: np.random.Generator, length: float, first: float, last: float, most: float = 1 / 35
) -> list[tuple[float, float]]:
    """Pieces of a road of ``length``: straight, bent by up to ``most`` 1/m, straight."""
    return [(first, 0.0), (length - first - last, float(rng.uniform(-most, most))), (last, 0.0)]


def _width(rng: np.random.Generator) -> float:
    return float(rng.uniform(3.5, 3.8))


def _approach(rng: np.random.Generator, network: Network, length: float, width: float, speed: float) -> Road:
    heading = rng.uniform(-np.pi, np.pi)
    return network.road(line((0.0, 0.0, heading), *_bend(rng, length, 12.0, 16.0)), width, speed)


def _exits(
    rng: np.random.Generator,
    network: Network,
    road: Road,
    turns: Sequence[float],
    radius: float,
    lengths: Sequence[float],
    speed: float,
) -> list[Road]:
    """Roads out of a junction ``radius`` ahead of the end of ``road``, each turned by so many rad."""
    x, y, heading = road.centre[-1]
    x, y = x + radius * np.cos(heading), y + radius * np.sin(heading)
    out = []
    for turn, length in zip(turns, lengths, strict=True):
        start = (x + radius * np.cos(heading + turn), y + radius * np.sin(heading + turn), heading + turn)
        pieces = _bend(rng, length, 6.0, min(26.0, length / 2), 1 / 45)
        out.append(network.road(line(start, *pieces), road.width_m, speed))
    return out


def _crossing_town(rng: np.random.Generator) -> Network:
    network, width = Network(), _width(rng)
    speed, slow = float(rng.uniform(6.0, 8.0)), float(rng.uniform(4.0, 5.0))
    road = _approach(rng, network, float(rng.uniform(46.0, 66.0)), width, speed)
    radius = float(rng.uniform(9.5, 11.0))
    turns = np.array([-np.pi / 2, 0.0, np.pi / 2]) + rng.uniform(-0.15, 0.15, 3)
    exits = _exits(rng, network, road, turns.tolist(), radius, rng.uniform(54.0, 62.0, 3).tolist(), speed)
    network.crossing(road, exits, radius, slow)
    if rng.random() < 0.3:  # a second junction behind one exit: a crossing or a T
        ahead = exits[int(rng.integers(3))]
        choice = [(-np.pi / 2, 0.0), (0.0, np.pi / 2), (-np.pi / 2, np.pi / 2)][int(rng.integers(3))]
        further = _exits(rng, network, ahead, choice, radius, rng.uniform(36.0, 40.0, 2).tolist(), speed)
        network.crossing(ahead, further, radius, slow)
    return network


def _roundabout_town(rng: np.random.Generator) -> Network:
    network, width = Network(), _width(rng)
    speed, slow = float(rng.uniform(6.0, 8.0)), float(rng.uniform(4.2, 5.0))
    road = _approach(rng, network, float(rng.uniform(42.0, 58.0)), width, speed)
    ring, entry = float(rng.uniform(12.0, 14.5)), float(rng.uniform(9.0, 11.0))
    radius = roundabout_radius(ring, entry, width)
    turns = np.array([-np.pi / 2, 0.0, np.pi / 2]) + rng.uniform(-0.1, 0.1, 3)
    exits = _exits(rng, network, road, turns.tolist(), radius, rng.uniform(46.0, 52.0, 3).tolist(), speed)
    network.roundabout(road, exits, radius, ring, entry, slow)
    return network


def _street(rng: np.random.Generator) -> Network:
    """One road, long enough for a bus in the middle of it."""
    network, width, heading = Network(), _width(rng), rng.uniform(-np.pi, np.pi)
    bends = rng.uniform(-1 / 60, 1 / 60, 2)
    lengths = 22.0, rng.uniform(20.0, 32.0), rng.uniform(38.0, 46.0), rng.uniform(20.0, 30.0), 45.0
    pieces = list(zip(lengths, (0.0, bends[0], 0.0, bends[1], 0.0), strict=True))
    network.road(line((0.0, 0.0, heading), *pieces), width, float(rng.uniform(6.0, 8.0)))
    return network


def _apart(roads: Sequence[Road]) -> bool:
    """Whether no two roads come close to one another, save where both begin or end at one junction."""
    for i, first in enumerate(roads):
        for second in roads[:i]:
            gaps = np.hypot(*(first.centre[:, None, :2] - second.centre[None, :, :2]).transpose(2, 0, 1))
            ends = [(p, q) for p in (0, -1) for q in (0, -1) if gaps[p, q] < 48.0]
            for p, q in ends:  # the junction's surroundings
                near = stations(first.centre)
                near = near if p == 0 else near[-1] - near
                other = stations(second.centre)
                other = other if q == 0 else other[-1] - other
                gaps = np.where((near < 20.0)[:, None] & (other < 20.0), np.inf, gaps)
            if gaps.min() < ROOM_M:
                return False
    return True


def _crosswalk(road: Road, s: float) -> Crosswalk:
    x, y, heading = at_station(road.centre, s + CROSSWALK_M / 2)
    reach = road.width_m + 0.5 * SIDEWALK_M
    side = np.array([-np.sin(heading), np.cos(heading)]) * reach
    ends = ((float(x - side[0]), float(y - side[1])), (float(x + side[0]), float(y + side[1])))
    return Crosswalk(road=road, s=s, ends=ends)


def _lights(network: Network, crosswalks: Sequence[Crosswalk], rng: np.random.Generator) -> tuple[Light, ...]:
    """A light for every lane that enters a crossing; arms that face one another share their phase.

    Boards stand behind the crossing on the right, where a camera that looks ahead sees them from afar and from the
    stop line.
    """
    boards: list[Light] = []
    for junction in network.junctions:
        green, yellow, clear = float(rng.uniform(7.0, 9.0)), 2.5, 2.0
        half, offset = green + yellow + clear, float(rng.uniform(0.0, 20.0))
        facing = junction.arms[0].angle
        for arm in junction.arms:
            lane = network.lanes[arm.incoming]
            zebra = any(walk.road is arm.road and walk.road.forth == arm.outgoing for walk in crosswalks)
            setback = SETBACK_M + (CROSSWALK_M + 1.0) * zebra
            stop = at_station(lane.centre, float(stations(lane.centre)[-1]) - setback)
            across = abs(np.sin(arm.angle - facing)) > 0.7
            network.change(lane.id, light=len(boards))
            boards.append(
                Light(
                    position=_board(junction, arm, lane.width_m),
                    heading=arm.angle,
                    stop=(float(stop[0]), float(stop[1]), float(stop[2])),
                    width_m=lane.width_m,
                    green_s=green,
                    yellow_s=yellow,
                    red_s=2 * half - green - yellow,
                    offset_s=offset + half * across,
                )
            )
    return tuple(boards)


def _board(junction: Junction, arm: Arm, width: float) -> tuple[float, float, float]:
    """Behind the crossing, to the right of it as ``arm``'s traffic sees it, off the road."""
    heading = arm.angle + np.pi
    right = min(
        (((other.angle - arm.angle) % (2 * np.pi)) for other in junction.arms if other is not arm), default=np.pi
    )
    ahead = np.array([np.cos(heading), np.sin(heading)])
    side = np.array([np.sin(heading), -np.cos(heading)])
    area = hull(junction, 0.0).astype(np.float32)
    along = (0.5 if right > 2.4 else 0.86) * junction.radius_m  # without a road to the right, beside the way on
    across = width + POLE_M
    while True:
        x, y = np.array(junction.centre) + along * ahead + across * side
        if cv2.pointPolygonTest(area, (float(x), float(y)), True) < -POLE_M:
            return float(x), float(y), 3.6
        across += 0.1


def _solids(network: Network, ground: Raster, boards: Sequence[Light], rng: np.random.Generator) -> tuple[Solid, ...]:
    """Poles of the lights, buildings, trees and lamps along the roads, none of them over a road or another one."""
    found = [_pole(board.position, board.position[2] - 0.5) for board in boards]
    plots = _Plots(ground)
    for road in network.roads:
        for side in (-1.0, 1.0):
            s = float(rng.uniform(2.0, 8.0))
            while s < road.length_m:
                wide, deep, high = rng.uniform(7.0, 15.0), rng.uniform(7.0, 11.0), rng.uniform(3.5, 12.0)
                pose = at_station(road.centre, min(s + wide / 2, road.length_m))
                away = road.width_m + SIDEWALK_M + rng.uniform(1.0, 4.0) + deep / 2
                place = beside(pose[None], side * away)[0]
                if rng.random() < 0.8 and plots.take(place, wide + 1.0, deep + 1.0, (Surface.GRASS,)):
                    colour = np.array(_WALLS[int(rng.integers(len(_WALLS)))]) * rng.uniform(0.85, 1.1)
                    found.append(_solid("building", place, (wide, deep, high), 0.0, colour))
                s += float(wide + rng.uniform(2.0, 10.0))
            for s in np.arange(rng.uniform(2.0, 9.0), road.length_m, rng.uniform(8.0, 14.0)):
                away = road.width_m + SIDEWALK_M + rng.uniform(0.6, 1.6)
                place = beside(at_station(road.centre, float(s))[None], side * away)[0]
                if plots.take(place, 3.0, 3.0, (Surface.GRASS, Surface.SIDEWALK)):
                    found += _tree(place, rng) if rng.random() < 0.7 else [_pole(place, 5.0)]
    return tuple(found)


class _Plots:
    """Who has which piece of the ground."""

    def __init__(self, ground: Raster) -> None:
        self._ground = ground
        self._poses: list[Pose] = []
        self._sizes: list[tuple[float, float]] = []

    def take(self, place: np.ndarray, length: float, width: float, surfaces: Sequence[Surface]) -> bool:
        """Claim a box if all of it lies on ``surfaces``, and nobody has a part of it."""
        if not np.isin(self._ground.at(_under(place, length, width)), surfaces).all():
            return False
        x, y, heading = (float(value) for value in place)
        pose, size = Pose(x=x, y=y, heading=heading), (length, width)
        if overlaps(Boxes.of([pose], [size]), Boxes.of(self._poses, self._sizes)).any():
            return False
        self._poses.append(pose)
        self._sizes.append(size)
        return True


_WALLS = ((0.72, 0.66, 0.58), (0.62, 0.36, 0.3), (0.55, 0.57, 0.6), (0.8, 0.78, 0.7), (0.45, 0.4, 0.36))


def _solid(
    kind: Literal["building", "trunk", "crown", "pole"],
    place: Sequence[float] | np.ndarray,
    size: tuple[float, float, float],
    bottom: float,
    colour: np.ndarray,
) -> Solid:
    red, green, blue = (float(value) for value in np.clip(colour, 0.0, 1.0))
    return Solid(
        kind=kind,
        position=(float(place[0]), float(place[1]), float(bottom + size[2] / 2)),
        heading=float(place[2]) if kind == "building" else 0.0,
        size=(float(size[0]), float(size[1]), float(size[2])),
        colour=(red, green, blue),
        shape="box" if kind == "building" else "cylinder",
    )


def _pole(place: Sequence[float], height: float) -> Solid:
    return _solid("pole", (place[0], place[1], 0.0), (0.16, 0.16, height), 0.0, np.array([0.3, 0.3, 0.32]))


def _tree(place: np.ndarray, rng: np.random.Generator) -> list[Solid]:
    trunk, crown = float(rng.uniform(1.8, 2.6)), float(rng.uniform(2.0, 3.0))
    green = np.array([0.2, 0.42, 0.16]) * rng.uniform(0.75, 1.25)
    return [
        _solid("trunk", place, (0.35, 0.35, trunk), 0.0, np.array([0.36, 0.26, 0.18])),
        _solid("crown", place, (crown, crown, crown * 1.2), trunk, green),
    ]


def _under(place: np.ndarray, length: float, width: float) -> np.ndarray:
    """Points (N, 2) half a metre apart within a box on the ground."""
    along = np.linspace(-length / 2, length / 2, int(length * 2) + 1)
    across = np.linspace(-width / 2, width / 2, int(width * 2) + 1)
    x, y = (axis.ravel() for axis in np.meshgrid(along, across))
    cos, sin = np.cos(place[2]), np.sin(place[2])
    return np.stack((place[0] + cos * x - sin * y, place[1] + sin * x + cos * y), axis=1)
