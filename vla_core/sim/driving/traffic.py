"""The other road users: they keep to their lanes, their lights and their distance, and repeat exactly.

Nothing is drawn at random: what they do follows from the scenario and from what the ego vehicle does. Vehicles drive
along their path by the intelligent driver model (Treiber, Hennecke, Helbing 2000, "Congested traffic states"), whose
two terms, of the free road and of what is ahead, are kept apart: the smaller one counts. Ahead is whatever is in their
corridor, other users or the ego vehicle, a red light, their stop, or a junction where others have the right of way.
One that has reached the end of its path has left the world. Pedestrians wait to be triggered, walk, and stop short of
what stands in their way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vla_core.sim.driving.geometry import Line, ego_front, ego_middle
from vla_core.sim.driving.layout import LENGTH_M, WIDTH_M, EgoState, Lane, Light, Pose, RoadUser, Scenario, Spawn, Town

ACCELERATION, BRAKING, HARDEST_BRAKING = 1.5, 2.0, 8.0  # m/s2
HEADWAY_S, STANDSTILL_M = 1.2, 2.0
AT_LINE_M = 0.5  # where a vehicle stands before a line
SIGHT_M = 45.0
MARGIN_M = 0.2  # beside a vehicle, in which nobody else may be
LATERAL_ACCELERATION = 2.0  # m/s2, in curves
ON_FOOT_S = (0.0, 0.7, 1.4, 2.1)  # where a walking pedestrian is looked for
ARRIVAL_S = 4.5  # somebody who is so close to the crossing has the right of way
IN_THE_WAY_M = 1.0  # ahead of a pedestrian


@dataclass
class _Vehicle:
    """A vehicle and its way; ``speeds`` (N,) m/s are those that it would drive alone, ``gates`` where it may wait."""

    spawn: Spawn
    line: Line
    speeds: np.ndarray
    lights: tuple[tuple[float, Light], ...]
    gates: tuple[_Gate, ...]
    s: float
    speed: float
    acceleration: float = 0.0
    gone: bool = False

    @property
    def length(self) -> float:
        return self.spawn.size[0]

    @property
    def front(self) -> float:
        return self.s + self.length / 2


@dataclass(frozen=True)
class _Gate:
    """Where a path enters a junction that others cross first: ``rivals`` are lines, and the stations of the crossing
    on them.
    """

    s: float
    rivals: tuple[tuple[Line, float], ...]


@dataclass
class _Pedestrian:
    spawn: Spawn
    start: np.ndarray
    direction: np.ndarray
    length: float
    walked: float = 0.0
    triggered: bool = False
    speed: float = 0.0

    def at(self, ahead: float = 0.0) -> Pose:
        x, y = self.start + min(self.walked + ahead, self.length) * self.direction
        return Pose(x=float(x), y=float(y), heading=math.atan2(self.direction[1], self.direction[0]))


class Traffic:
    """Everybody of a scenario but the ego vehicle.

    :meth:`step` is :meth:`decide` and :meth:`move`; a simulator that moves them in small steps calls the second more
    often than the first.
    """

    def __init__(self, scenario: Scenario) -> None:
        self._town = scenario.town
        self._all = [_actor(spawn, scenario.town) for spawn in scenario.spawns]

    @property
    def users(self) -> tuple[RoadUser, ...]:
        """Who is there now, in the order of the spawns."""
        return tuple(_road_user(number, actor) for number, actor in enumerate(self._all)
                     if isinstance(actor, _Pedestrian) or not actor.gone)  # fmt: skip

    def step(self, time_s: float, dt: float, ego: EgoState) -> tuple[RoadUser, ...]:
        """Decide by what is there at ``time_s`` and go on for ``dt`` s; returns who is where then."""
        self.decide(time_s, ego)
        self.move(dt)
        return self.users

    def decide(self, time_s: float, ego: EgoState) -> None:
        """Everybody's acceleration from now on, from all that is there now."""
        seen = _Seen.of(self._all, ego)
        for number, actor in enumerate(self._all):
            if isinstance(actor, _Pedestrian):
                _walk(actor, ego, seen)
            elif not actor.gone and actor.spawn.speed_mps > 0:
                actor.acceleration = _accelerate(actor, number, seen, time_s)

    def move(self, dt: float) -> None:
        """Everybody goes on for ``dt`` s as decided."""
        for actor in self._all:
            if isinstance(actor, _Pedestrian):
                actor.walked = min(actor.walked + actor.speed * dt, actor.length)
                continue
            before = actor.speed
            actor.speed = max(before + actor.acceleration * dt, 0.0)
            # Braking to a stand within the step: the way is v2 / 2a, not the mean of both ends.
            stopped = actor.speed == 0 and actor.acceleration < 0
            actor.s += before**2 / (-2 * actor.acceleration) if stopped else (before + actor.speed) / 2 * dt
            actor.gone = actor.s > actor.line.length + 1e-6


@dataclass(frozen=True)
class _Seen:
    """All that is in the way of others, M rows: ``owner`` is the place among the actors, -1 the ego vehicle."""

    owner: np.ndarray
    xy: np.ndarray
    heading: np.ndarray
    size: np.ndarray
    speed: np.ndarray

    @classmethod
    def of(cls, actors: list[_Vehicle | _Pedestrian], ego: EgoState) -> _Seen:
        middle = ego_middle(ego.pose)
        rows = [(-1.0, middle.x, middle.y, middle.heading, LENGTH_M, WIDTH_M, ego.speed_mps)]
        for number, actor in enumerate(actors):
            length, width, _ = actor.spawn.size
            if isinstance(actor, _Pedestrian):
                for ahead_s in ON_FOOT_S if actor.speed > 0 else (0.0,):
                    pose = actor.at(ahead_s * actor.speed)
                    rows.append((number, pose.x, pose.y, pose.heading, length, width, actor.speed))
            elif not actor.gone:
                pose = actor.line.pose(actor.s, actor.spawn.offset_m)
                rows.append((number, pose.x, pose.y, pose.heading, length, width, actor.speed))
        table = np.array(rows)
        return cls(table[:, 0].astype(int), table[:, 1:3], table[:, 3], table[:, 4:6], table[:, 6])


def _actor(spawn: Spawn, town: Town) -> _Vehicle | _Pedestrian:
    if spawn.walk is not None:
        start, end = np.array(spawn.walk, dtype=np.float64)
        length = float(np.hypot(*(end - start)))
        return _Pedestrian(spawn, start, (end - start) / max(length, 1e-9), length)
    lanes = [town.lanes[number] for number in spawn.path]
    line = Line(np.concatenate([lane.centre for lane in lanes]))
    speeds = _speeds(line, lanes, spawn)
    starts = np.cumsum([0.0, *(Line(lane.centre).length for lane in lanes)])
    lights = tuple(
        (float(line.project(np.array([town.lights[lane.light].stop[:2]]), start, end)[0][0]), town.lights[lane.light])
        for lane, start, end in zip(lanes, starts, starts[1:], strict=False) if lane.light is not None
    )  # fmt: skip
    gates = tuple(
        _Gate(float(start), rivals)
        for lane, start in zip(lanes, starts, strict=False) if (rivals := _rivals(lane, lanes, town))
    )  # fmt: skip
    first = float(np.interp(spawn.s, line.stations, speeds))
    standing = spawn.stop_at_s is not None and spawn.s >= spawn.stop_at_s
    return _Vehicle(spawn, line, speeds, lights, gates, spawn.s, 0.0 if standing else first)


def _speeds(line: Line, lanes: list[Lane], spawn: Spawn) -> np.ndarray:
    """What a vehicle drives alone at each point (N,) m/s: the lanes' limits, curves and braking before them."""
    ends = np.cumsum([Line(lane.centre).length for lane in lanes])
    limits = np.array([lane.speed_mps for lane in lanes])[
        np.minimum(np.searchsorted(ends, line.stations), len(lanes) - 1)
    ]
    curvature = np.abs(np.gradient(line.headings, line.stations))
    speeds = np.minimum(np.minimum(limits, spawn.speed_mps), np.sqrt(LATERAL_ACCELERATION / (curvature + 1e-3)))
    for i in range(len(speeds) - 2, -1, -1):
        step = line.stations[i + 1] - line.stations[i]
        speeds[i] = min(speeds[i], math.sqrt(speeds[i + 1] ** 2 + 2 * BRAKING * step))
    return np.asarray(speeds)


def _rivals(lane: Lane, path: list[Lane], town: Town) -> tuple[tuple[Line, float], ...]:
    """Whom one must let pass before ``lane``: those in the roundabout, and on a left turn those who come straight."""
    if lane.junction is None:
        return ()
    before = next((other for other in path if lane.id in other.successors), None)
    if before is None or before.junction == lane.junction:
        return ()  # it is in the junction already
    wanted = {"roundabout": ("roundabout",), "left": ("straight", "right")}.get(lane.turn, ())
    mine = Line(lane.centre)
    found = []
    for other in town.lanes.values():
        if other.junction != lane.junction or other.turn not in wanted or other.id in (*before.successors, lane.id):
            continue
        before_it = [b.centre for b in town.lanes.values() if other.id in b.successors][:1]
        line = Line(np.concatenate([*before_it, other.centre]))
        own = Line(other.centre)
        distance = np.linalg.norm(own.points[:, None] - mine.points, axis=2).min(axis=1)
        if distance.min() < 1.5:
            found.append((line, line.length - own.length + float(own.stations[distance.argmin()])))
    return tuple(found)


def _accelerate(me: _Vehicle, number: int, seen: _Seen, time_s: float) -> float:
    wanted = float(np.interp(me.s, me.line.stations, me.speeds))
    chosen = max(ACCELERATION * (1 - (me.speed / max(wanted, 0.1)) ** 4), -BRAKING)
    for gap, speed in _ahead(me, seen, seen.owner != number):
        chosen = min(chosen, _behind(me.speed, gap, speed, STANDSTILL_M))
    for line_s in _closed(me, seen, time_s):
        chosen = min(chosen, _behind(me.speed, line_s - me.front, 0.0, AT_LINE_M))
    if me.spawn.stop_at_s is not None:  # its middle comes to stand there
        chosen = min(chosen, _behind(me.speed, me.spawn.stop_at_s - me.s, 0.0, 0.1))
    return max(chosen, -HARDEST_BRAKING)


def _behind(speed: float, gap: float, leader: float, standstill: float) -> float:
    """The intelligent driver model's acceleration behind something ``gap`` m ahead that drives at ``leader`` m/s."""
    if gap <= standstill / 2:
        return -HARDEST_BRAKING
    closing = speed * (speed - leader) / (2 * math.sqrt(ACCELERATION * BRAKING))
    return ACCELERATION * (1 - ((standstill + max(speed * HEADWAY_S + closing, 0.0)) / gap) ** 2)


def _ahead(me: _Vehicle, seen: _Seen, others: np.ndarray) -> list[tuple[float, float]]:
    """Gap in m and speed along the path of all that is in the corridor ahead."""
    here = me.line.pose(me.s, me.spawn.offset_m)
    others = others & (np.hypot(seen.xy[:, 0] - here.x, seen.xy[:, 1] - here.y) < SIGHT_M)
    if not others.any():
        return []
    s, offset, heading = me.line.project(seen.xy[others], me.s, me.s + SIGHT_M)
    cos, sin = np.cos(seen.heading[others] - heading), np.sin(seen.heading[others] - heading)
    length, width = seen.size[others].T / 2
    reach = np.abs(length * cos) + np.abs(width * sin)
    aside = np.abs(offset - me.spawn.offset_m) - np.abs(length * sin) - np.abs(width * cos)
    there = (s > me.s) & (aside < me.spawn.size[1] / 2 + MARGIN_M)
    gaps, speeds = (s - reach - me.front)[there], (seen.speed[others] * cos)[there]
    return list(zip(gaps.tolist(), speeds.tolist(), strict=True))


def _closed(me: _Vehicle, seen: _Seen, time_s: float) -> list[float]:
    """Stations of the lines ahead that it must not cross now."""
    closed = []
    for line_s, light in me.lights:
        gap = line_s - me.front
        if -0.3 < gap < SIGHT_M and (colour := light.colour(time_s)) != "green":
            hardest = HARDEST_BRAKING if colour == "red" else BRAKING
            if me.speed**2 / (2 * hardest) < gap + 0.3:
                closed.append(line_s)
    for gate in me.gates:
        gap = gate.s - me.front
        if -0.3 < gap < SIGHT_M / 2 and me.speed**2 / (2 * 2 * BRAKING) < gap + 0.3 and _taken(gate, seen):
            closed.append(gate.s)
    return closed


def _taken(gate: _Gate, seen: _Seen) -> bool:
    """Whether somebody who has the right of way is about to come."""
    moving = seen.speed > 0.5
    for line, crossing in gate.rivals:
        s, offset, heading = line.project(seen.xy)
        aligned = np.cos(seen.heading - heading) > 0.5
        arrives = (s < crossing + 3.0) & (s > crossing - np.maximum(seen.speed * ARRIVAL_S, 6.0)) & (s > 0)
        if (moving & aligned & arrives & (np.abs(offset) < 1.5)).any():
            return True
    return False


def _walk(me: _Pedestrian, ego: EgoState, seen: _Seen) -> None:
    """Start when the ego vehicle is near enough; stop short of a vehicle."""
    if not me.triggered:
        front = np.array(ego_front(ego.pose))
        foot = me.start + np.clip((front - me.start) @ me.direction, 0.0, me.length) * me.direction
        me.triggered = float(np.hypot(*(front - foot))) <= me.spawn.trigger_m
    if not me.triggered or me.walked >= me.length:
        me.speed = 0.0
        return
    here = me.at()
    away = seen.xy - (here.x, here.y)
    long, left = away @ me.direction, me.direction[0] * away[:, 1] - me.direction[1] * away[:, 0]
    cos, sin = np.abs(np.cos(seen.heading - here.heading)), np.abs(np.sin(seen.heading - here.heading))
    reach, aside = seen.size[:, 0] / 2 * cos + seen.size[:, 1] / 2 * sin, seen.size[:, 0] / 2 * sin
    blocked = (long > 0) & (long - reach < me.spawn.size[0] / 2 + IN_THE_WAY_M) & (np.abs(left) < aside + 0.3)
    me.speed = 0.0 if (blocked & (seen.size[:, 0] > 2.0)).any() else me.spawn.speed_mps


def _road_user(number: int, actor: _Vehicle | _Pedestrian) -> RoadUser:
    pose = actor.at() if isinstance(actor, _Pedestrian) else actor.line.pose(actor.s, actor.spawn.offset_m)
    return RoadUser(id=number, kind=actor.spawn.kind, pose=pose, size=actor.spawn.size, speed_mps=actor.speed)
