"""Infractions and scores of a drive, from what happens alone: how a vehicle is driven does not matter here.

The terms are those of the CARLA leaderboard (driving score = route completion x a penalty for every infraction; metres
driven off the road are not completed) and of Bench2Drive (Jia et al. 2024; success = the route was completed in time,
without an infraction). Comfort is judged by the bounds of nuPlan (Caesar et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from vla_core.sim.driving.geometry import Boxes, Line, ego_front, ego_middle, overlaps
from vla_core.sim.driving.layout import (
    DRIVABLE,
    HEIGHT_M,
    LENGTH_M,
    REAR_OVERHANG_M,
    WHEELBASE_M,
    WIDTH_M,
    EgoState,
    Pose,
    RoadUser,
    Scenario,
)

Struck = Literal["pedestrian", "vehicle", "static"]
PENALTIES: dict[Struck, float] = {"pedestrian": 0.5, "vehicle": 0.6, "static": 0.65}
RED_LIGHT_PENALTY = 0.7
PEOPLE = ("pedestrian", "cyclist")
VEHICLES = ("car", "bus", "truck")
LOWEST_M = 0.2  # a solid below this is driven over: a kerb

APART_S = 1.0  # an object that was not touched for so long counts anew when it is touched again
DEVIATION_M = 8.0
BLOCKED_S, STANDING_M = 20.0, 1.0  # who is that long within so many metres without a reason is blocked
STANDING_MPS = 0.1
OFF_ROAD_M = 1.0  # driven off the road before it is an infraction
NEAR_GOAL_M = 1.0
STAND_M = 4.0  # from the end of a route where it ends at a stand
REASON_M = 15.0  # ahead, within which a user or a red light is a reason to stand
BESIDE_M = 0.5  # from the vehicle's way, in which a user is in it

# nuPlan: longitudinal acceleration, lateral acceleration, and the size of both derivatives together.
COMFORT_LONGITUDINAL, COMFORT_LATERAL, COMFORT_JERK = (-4.05, 2.40), 4.89, 8.37

_WHEELS = np.array([(x, y) for x in (0.0, WHEELBASE_M) for y in (WIDTH_M / 2, -WIDTH_M / 2)])
_DRIVABLE = np.array([int(surface) for surface in DRIVABLE])


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a drive went so far.

    ``route_completion`` in [0, 1] is the share of the route that was driven, less what was driven off the road;
    ``driving_score`` in [0, 1] is that times ``penalty``. Accelerations are those of the vehicle in m/s2, of which
    ``comfort`` is the share of the time within nuPlan's bounds, and ``jerk_p95`` in m/s3. ``collisions_per_km`` of a
    single drive is no figure to average: divide the sums.
    """

    success: bool = False
    driving_score: float = 0.0
    route_completion: float = 0.0
    penalty: float = 1.0
    collisions_pedestrian: int = 0
    collisions_vehicle: int = 0
    collisions_static: int = 0
    red_lights: int = 0
    off_road_m: float = 0.0
    off_road_share: float = 0.0
    deviated: bool = False
    blocked: bool = False
    timeout: bool = False
    seconds: float = 0.0
    km: float = 0.0
    collisions_per_km: float = 0.0
    speed_mean: float = 0.0
    acceleration_max: float = 0.0
    braking_max: float = 0.0
    acceleration_p95: float = 0.0
    lateral_max: float = 0.0
    lateral_p95: float = 0.0
    jerk_max: float = 0.0
    jerk_p95: float = 0.0
    comfort: float = 1.0

    @property
    def collisions(self) -> int:
        """Of all kinds."""
        return self.collisions_pedestrian + self.collisions_vehicle + self.collisions_static


class Rules:
    """Watches one episode. Call :meth:`update` after every step, in order; the first call is the start."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._line = Line(scenario.route.path[:, :3])
        town = scenario.town
        solids = [
            (number, solid) for number, solid in enumerate(town.solids)
            if solid.position[2] + solid.size[2] / 2 > LOWEST_M and solid.position[2] - solid.size[2] / 2 < HEIGHT_M
        ]  # fmt: skip
        self._solid_ids = [number for number, _ in solids]
        self._solids = Boxes.of(
            [Pose(x=s.position[0], y=s.position[1], heading=s.heading) for _, s in solids], [s.size for _, s in solids]
        )
        self._solid_reach = np.hypot(*self._solids.halves.T)
        self._struck_at: dict[tuple[str, int], float] = {}
        self._counts: dict[Struck, int] = dict.fromkeys(get_args(Struck), 0)
        self._red = 0
        self._station = self._furthest = 0.0
        self._driven = self._off_road = self._seconds = 0.0
        self._deviated = self._blocked = self._timeout = self._arrived = False
        self._before: tuple[float, EgoState] | None = None
        self._stood = (0.0, Pose(x=0.0, y=0.0, heading=0.0))  # since when, and where
        self._motion: list[tuple[float, float, float]] = []  # time, longitudinal and lateral acceleration

    @property
    def length(self) -> float:
        """Of the route, m."""
        return self._line.length

    @property
    def reached(self) -> float:
        """How far along the route the vehicle has come, m; what is said follows from it."""
        return self._furthest

    @property
    def over(self) -> bool:
        """The episode has ended: arrived, or given up."""
        return self._arrived or self._deviated or self._blocked or self._timeout

    def update(
        self,
        time_s: float,
        ego: EgoState,
        users: Sequence[RoadUser],
        touched: Iterable[tuple[str, int]] = (),
    ) -> None:
        """What is true at ``time_s``.

        Args:
            users: everybody there.
            touched: what the simulator's contacts since the last call were with: the kind of a solid or road user, and
                its place in the scenario.
        """
        if self.over:
            return
        self._note_struck(time_s, ego, users, touched)
        self._note_progress(ego)
        if self._before is None:
            self._stood = (time_s, ego.pose)
        else:
            self._note_step(time_s, ego, users)
        self._before = (time_s, ego)
        self._seconds = time_s
        self._arrived = self._has_arrived(ego)
        self._timeout = not self._arrived and time_s >= self._scenario.route.limit_s

    def score(self) -> Score:
        """The score so far."""
        share = self._off_road / self._driven if self._driven > 0 else 0.0
        length = max(self._line.length, 1e-6)
        completion = (1.0 if self._arrived else min(self._furthest / length, 1.0)) * (1 - share)
        penalty = RED_LIGHT_PENALTY**self._red * math.prod(PENALTIES[k] ** n for k, n in self._counts.items())
        collisions, km = sum(self._counts.values()), self._driven / 1000
        clean = not collisions and not self._red and self._off_road <= OFF_ROAD_M
        return Score(
            success=self._arrived and clean, driving_score=completion * penalty, route_completion=completion,
            penalty=penalty, collisions_pedestrian=self._counts["pedestrian"],
            collisions_vehicle=self._counts["vehicle"], collisions_static=self._counts["static"],
            red_lights=self._red, off_road_m=self._off_road, off_road_share=share, deviated=self._deviated,
            blocked=self._blocked, timeout=self._timeout, seconds=self._seconds, km=km,
            collisions_per_km=collisions / km if km > 0 else 0.0,
            speed_mean=self._driven / self._seconds if self._seconds > 0 else 0.0, **self._comfort(),
        )  # fmt: skip

    def _note_struck(
        self, time_s: float, ego: EgoState, users: Sequence[RoadUser], touched: Iterable[tuple[str, int]]
    ) -> None:
        """Count objects that the vehicle's box overlaps, or that the simulator says were touched."""
        middle = ego_middle(ego.pose)
        box = Boxes.of([middle], [(LENGTH_M, WIDTH_M)])
        struck = {(kind, number) for kind, number in touched if kind != "kerb"}
        if users:
            hit = overlaps(box, Boxes.of([user.pose for user in users], [user.size for user in users]))
            struck |= {(user.kind, user.id) for user, yes in zip(users, hit, strict=True) if yes}
        away = np.hypot(*(self._solids.centres - (middle.x, middle.y)).T) - self._solid_reach
        near = np.flatnonzero(away < LENGTH_M)
        if len(near):
            several = Boxes(self._solids.centres[near], self._solids.headings[near], self._solids.halves[near])
            numbers = [self._solid_ids[i] for i in near[overlaps(box, several)]]
            struck |= {(self._scenario.town.solids[number].kind, number) for number in numbers}
        for thing in sorted(struck):
            if time_s - self._struck_at.get(thing, -math.inf) > APART_S:
                self._counts[_struck_kind(thing[0])] += 1
            self._struck_at[thing] = time_s

    def _note_progress(self, ego: EgoState) -> None:
        here = np.array([[ego.pose.x, ego.pose.y]])
        # Near the last place alone, so that a route which crosses itself is not cut short.
        station, offset, _ = self._line.project(here, self._station - 5.0, self._station + 10.0)
        self._station = min(max(float(station[0]), 0.0), self._line.length)
        beyond = abs(float(station[0]) - self._station)
        self._deviated = math.hypot(float(offset[0]), beyond) > DEVIATION_M
        if not self._deviated:
            self._furthest = max(self._furthest, self._station)

    def _note_step(self, time_s: float, ego: EgoState, users: Sequence[RoadUser]) -> None:
        assert self._before is not None
        before_s, before = self._before
        dt = time_s - before_s
        driven = math.hypot(ego.pose.x - before.pose.x, ego.pose.y - before.pose.y)
        self._driven += driven
        if self._wheels_off(ego.pose) >= 2:
            self._off_road += driven
        self._red += self._ran_red(before_s, before.pose, time_s, ego.pose)
        if dt > 0:
            self._motion.append((time_s, (ego.speed_mps - before.speed_mps) / dt, ego.speed_mps * ego.yaw_rate))
        self._note_standing(time_s, ego, users)

    def _note_standing(self, time_s: float, ego: EgoState, users: Sequence[RoadUser]) -> None:
        """Blocked is who does not get away from a place; one that trembles at a wall stands, too."""
        place = self._stood[1]
        moved = math.hypot(ego.pose.x - place.x, ego.pose.y - place.y) > STANDING_M
        if moved or self._has_reason(time_s, users):
            self._stood = (time_s, ego.pose)
        self._blocked = time_s - self._stood[0] > BLOCKED_S

    def _wheels_off(self, pose: Pose) -> int:
        """How many wheels are off the road; they are at the vehicle's sides."""
        cos, sin = math.cos(pose.heading), math.sin(pose.heading)
        places = _WHEELS @ np.array([[cos, sin], [-sin, cos]]) + (pose.x, pose.y)
        return int((~np.isin(self._scenario.town.ground.at(places), _DRIVABLE)).sum())

    def _ran_red(self, before_s: float, before: Pose, time_s: float, pose: Pose) -> int:
        """Stop lines that the front crossed in their direction on the way between two poses, while they were red."""
        (x0, y0), (x1, y1) = ego_front(before), ego_front(pose)
        found = 0
        for light in self._scenario.town.lights:
            x, y, heading = light.stop
            cos, sin = math.cos(heading), math.sin(heading)
            behind, beyond = (x0 - x) * cos + (y0 - y) * sin, (x1 - x) * cos + (y1 - y) * sin
            if not behind <= 0 < beyond:
                continue
            share = behind / (behind - beyond)
            aside = (y0 + share * (y1 - y0) - y) * cos - (x0 + share * (x1 - x0) - x) * sin
            if abs(aside) <= light.width_m / 2 and light.colour(before_s + share * (time_s - before_s)) == "red":
                found += 1
        return found

    def _has_reason(self, time_s: float, users: Sequence[RoadUser]) -> bool:
        """Whether something ahead on the route explains that the vehicle stands: a user in its way, or a red light."""
        things = [(user.pose.x, user.pose.y, user.size[1] / 2) for user in users]
        things += [(*light.stop[:2], 0.0) for light in self._scenario.town.lights if light.colour(time_s) != "green"]
        if not things:
            return False
        places = np.array(things)
        front = self._station + LENGTH_M - REAR_OVERHANG_M
        station, offset, _ = self._line.project(places[:, :2], self._station, front + REASON_M)
        ahead = (station > front - 1.0) & (station < front + REASON_M)
        return bool((ahead & (np.abs(offset) < WIDTH_M / 2 + places[:, 2] + BESIDE_M)).any())

    def _has_arrived(self, ego: EgoState) -> bool:
        left = self._line.length - self._station
        if self._scenario.route.stop_at_end:
            return left < STAND_M and abs(ego.speed_mps) < STANDING_MPS
        return left < NEAR_GOAL_M

    def _comfort(self) -> dict[str, float]:
        if not self._motion:
            return {}
        times, along, aside = np.array(self._motion).T
        steps = np.maximum(np.diff(times), 1e-9)
        jerk = np.hypot(np.diff(along) / steps, np.diff(aside) / steps)
        fine = (along >= COMFORT_LONGITUDINAL[0]) & (along <= COMFORT_LONGITUDINAL[1])
        fine &= np.abs(aside) <= COMFORT_LATERAL
        fine[1:] &= jerk <= COMFORT_JERK
        return {
            "acceleration_max": float(max(along.max(), 0.0)), "braking_max": float(max(-along.min(), 0.0)),
            "acceleration_p95": float(np.percentile(np.abs(along), 95)),
            "lateral_max": float(np.abs(aside).max()), "lateral_p95": float(np.percentile(np.abs(aside), 95)),
            "jerk_max": float(jerk.max(initial=0.0)),
            "jerk_p95": float(np.percentile(jerk, 95)) if len(jerk) else 0.0, "comfort": float(fine.mean()),
        }  # fmt: skip


def _struck_kind(kind: str) -> Struck:
    return "pedestrian" if kind in PEOPLE else "vehicle" if kind in VEHICLES else "static"
