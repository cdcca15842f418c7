"""A driving world without physics: a bicycle that a plan steers, and Traffic beside it. For tests of the expert."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from vla_core.sim.driving.expert import Expert
from vla_core.sim.driving.geometry import Boxes, ego_middle, overlaps
from vla_core.sim.driving.layout import (
    DRIVABLE,
    LENGTH_M,
    MAX_STEERING,
    WHEELBASE_M,
    WIDTH_M,
    EgoState,
    Pose,
    Scenario,
)
from vla_core.sim.driving.routes import RouteTracker
from vla_core.sim.driving.traffic import Traffic

TICK_S, DT_S = 0.2, 0.02
Disturb = Callable[[float], tuple[float, float]]  # time: what is added to the steering angle and the speed


@dataclass
class Drive:
    """What happened: ``states`` one a tick, ``hits`` spawns that were touched, ``off_road_s``, ``red`` lines run."""

    done: bool = False
    time_s: float = 0.0
    hits: set[int] = field(default_factory=set)
    solids: int = 0
    off_road_s: float = 0.0
    red: int = 0
    states: list[EgoState] = field(default_factory=list)
    offsets: list[float] = field(default_factory=list)
    plans: list[np.ndarray] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return self.done and not self.hits and not self.solids and not self.red and self.off_road_s == 0


def drive(scenario: Scenario, *, disturb: Disturb | None = None, start: tuple[float, float] = (0.0, 0.0)) -> Drive:
    """Let the expert drive; ``start`` moves the vehicle to the left (m) and turns it (rad)."""
    expert, traffic, tracker, found = Expert(scenario), Traffic(scenario), RouteTracker(scenario.route), Drive()
    x, y, heading, _ = scenario.route.path[0]
    ego = EgoState(
        pose=Pose(x=x - start[0] * math.sin(heading), y=y + start[0] * math.cos(heading), heading=heading + start[1]),
        speed_mps=0.0, yaw_rate=0.0, steering=0.0,
    )  # fmt: skip
    solids = [solid for solid in scenario.town.solids if solid.kind != "crown"]
    walls = Boxes.of(
        [Pose(x=s.position[0], y=s.position[1], heading=s.heading) for s in solids], [s.size for s in solids]
    )
    tick = 0
    while tick * TICK_S < scenario.route.limit_s:
        now = tick * TICK_S
        users = traffic.users
        rows = expert.plan(ego, users, now)
        found.states.append(ego)
        found.plans.append(rows)
        before = ego
        steering, speed = follow(rows, ego)  # once a tick, as in lockstep
        more = disturb(now) if disturb else (0.0, 0.0)
        for _ in range(round(TICK_S / DT_S)):
            ego = _moved(ego, steering + more[0], speed + more[1])
        traffic.step(now, TICK_S, ego)
        tick += 1
        _judge(found, scenario, before, ego, traffic, walls, now)
        s, offset = tracker.locate(ego)
        found.offsets.append(offset)
        end = tracker.line.length
        if s >= end - (0.5 if scenario.route.stop_at_end else 0.0) and not (
            scenario.route.stop_at_end and ego.speed_mps > 0.1
        ):
            found.done = True
            break
    found.time_s = tick * TICK_S
    return found


def follow(rows: np.ndarray, ego: EgoState) -> tuple[float, float]:
    """Steering and speed that follow a plan (7, 4) made here: pure pursuit 3 m or 0.8 s ahead, the speed 0.3 s on."""
    speed = float(np.interp(0.3, np.arange(len(rows)) * 0.5, rows[:, 3]))
    path = np.concatenate([_curve(one, two) for one, two in pairwise(rows)])
    gap = np.hypot(*path.T)
    if gap[-1] < 1.0:
        return ego.steering, speed
    x, y = path[int(np.argmax(gap >= min(max(3.0, 0.8 * ego.speed_mps), gap[-1])))]
    return math.atan(2 * WHEELBASE_M * y / (x * x + y * y)), speed


def _curve(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """The cubic (9, 2) between two waypoints that has their yaws."""
    t = np.linspace(0.0, 1.0, 9)[:, None]
    length = math.hypot(two[0] - one[0], two[1] - one[1])
    a, b = (length * np.array([math.cos(row[2]), math.sin(row[2])]) for row in (one, two))
    ends = (2 * t**3 - 3 * t**2 + 1) * one[:2] + (3 * t**2 - 2 * t**3) * two[:2]
    return np.asarray(ends + (t**3 - 2 * t**2 + t) * a + (t**3 - t**2) * b)


def _moved(ego: EgoState, steering: float, speed: float) -> EgoState:
    """A bicycle whose wheels turn by 0.8 rad/s, and which speeds up by 3 and brakes by 6 m/s2 at most."""
    wanted = min(max(steering, -MAX_STEERING), MAX_STEERING)
    angle = ego.steering + min(max(wanted - ego.steering, -0.8 * DT_S), 0.8 * DT_S)
    pull = min(max((max(speed, 0.0) - ego.speed_mps) / 0.2, -6.0), 3.0)
    after = max(ego.speed_mps + pull * DT_S, 0.0)
    if after < 0.05 and speed < 0.05:
        after = 0.0
    rate = after * math.tan(angle) / WHEELBASE_M
    heading = ego.pose.heading + rate * DT_S
    middle = ego.pose.heading + rate * DT_S / 2
    pose = Pose(
        x=ego.pose.x + after * DT_S * math.cos(middle), y=ego.pose.y + after * DT_S * math.sin(middle), heading=heading
    )
    return EgoState(pose=pose, speed_mps=after, yaw_rate=rate, steering=angle, acceleration=pull)


def wheels(pose: Pose) -> np.ndarray:
    """Where the wheels (4, 2) touch the ground."""
    cos, sin = math.cos(pose.heading), math.sin(pose.heading)
    places = [(0.0, 0.8), (0.0, -0.8), (WHEELBASE_M, 0.8), (WHEELBASE_M, -0.8)]
    return np.array([(pose.x + cos * a - sin * b, pose.y + sin * a + cos * b) for a, b in places])


def _judge(
    found: Drive, scenario: Scenario, before: EgoState, ego: EgoState, traffic: Traffic, walls: Boxes, now: float
) -> None:
    mine = Boxes.of([ego_middle(ego.pose)], [(LENGTH_M, WIDTH_M)])
    users = traffic.users
    others = Boxes.of([user.pose for user in users], [user.size for user in users])
    found.hits |= {users[i].id for i in np.flatnonzero(overlaps(mine, others))}
    found.solids += int(overlaps(mine, walls).sum())
    ground = scenario.town.ground.at(wheels(ego.pose))
    found.off_road_s += TICK_S * (not np.isin(ground, DRIVABLE).all())
    for light in scenario.town.lights:
        if light.colour(now) == "red":
            x, y, heading = light.stop
            ahead, aside = [], []
            for state in (before, ego):
                dx, dy = state.pose.x - x, state.pose.y - y
                ahead.append(
                    dx * math.cos(heading) + dy * math.sin(heading) + 3.7 * math.cos(state.pose.heading - heading)
                )
                aside.append(abs(-dx * math.sin(heading) + dy * math.cos(heading)))
            found.red += (
                ahead[0] <= 0 < ahead[1] and aside[1] < light.width_m / 2 and math.cos(ego.pose.heading - heading) > 0.5
            )
