"""The privileged driver: it knows the route, the lights and everybody's place, and plans three seconds ahead.

Each plan follows from the state alone, so that it labels any state, disturbed ones too: a kinematic bicycle with the
vehicle's steering is rolled out along the route by pure pursuit (Coulter 1992, "Implementation of the Pure Pursuit Path
Tracking Algorithm"), at the safe speed behind whatever is in the way (Krauss 1998, "Microscopic Modeling of Traffic
Flow"). So whatever is planned can be driven.

Legend: U road users, P points around each one's box, W points of the route near the vehicle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_core.sim.driving.geometry import Line, wrap
from vla_core.sim.driving.layout import (
    LENGTH_M,
    MAX_STEERING,
    REAR_OVERHANG_M,
    WHEELBASE_M,
    WIDTH_M,
    EgoState,
    Light,
    RoadUser,
    Scenario,
)
from vla_core.sim.driving.routes import RouteTracker

ROWS, STEP_S = 7, 0.5
DT_S = 0.1
SIGHT_M = 50.0
LIGHT_M = 40.0  # ahead, up to which the colour of a light is told
FRONT_M = LENGTH_M - REAR_OVERHANG_M

ACCELERATION, EASY, COMFORTABLE, HARDEST = 2.0, 2.0, 3.0, 6.0  # m/s2: up; planned, usual and last braking
REACTION_S = 0.35  # in which a wanted speed is taken up
HEADWAY_S, STANDSTILL_M = 1.3, 4.0  # behind a vehicle; more than imitation is off by
BESIDE_M, TOUCH_M = 0.3, 0.15  # to what stands beside the way, and beside the vehicle off its way
LINE_M, WALKER_M = 2.0, 2.5  # before a stop line and a pedestrian; more than imitation is off by
YELLOW_MPS2 = 4.0  # braking that a yellow light is worth
STEERING_RATE = 0.9  # rad/s
LATERAL_MPS2 = 2.5
WALK_S = np.arange(0.0, 4.1, 0.4)  # where a walking pedestrian will be looked for
CROSS_S = np.arange(0.0, 3.1, 0.5)  # and a crossing vehicle

# Past a bus: speed, room beside it, more than imitation is off by; way to move over.
PASSING_MPS, PASSING_M, RAMP_M = 5.5, 1.3, 16.0
TURNING_IN_M = 7.5  # the vehicle is over so far before the bus, as its rear axle goes


@dataclass(frozen=True)
class _Wall:
    """Something that the front must stay behind: ``s`` its station now, ``speed`` along the route."""

    s: float
    speed: float = 0.0
    headway_s: float = 0.4


@dataclass(frozen=True)
class _Pass:
    """The way around a standing bus: from ``begin`` on to the left, by ``offset`` m from ``rear`` to ``front``."""

    begin: float
    rear: float
    front: float
    offset: float

    def at(self, s: float) -> float:
        """Offset to the left at a station."""
        if s < self.rear:
            return self.offset * _smooth((s - self.begin) / (self.rear - self.begin))
        return self.offset * _smooth(1.0 - (s - self.front) / RAMP_M)


def _smooth(share: float) -> float:
    share = min(max(share, 0.0), 1.0)
    return share * share * (3 - 2 * share)


@dataclass(frozen=True)
class _Box:
    """A road user along the route: stations ``low`` to ``high``, offsets ``right`` to ``left``, speed along it."""

    user: RoadUser
    low: float
    high: float
    right: float
    left: float
    along: float


class Expert:
    """Drives a scenario's route.

    :meth:`plan` answers every state; the only memory is where on the route the vehicle last was.
    """

    def __init__(self, scenario: Scenario) -> None:
        self._overtakes = scenario.kind == "overtake"
        self._tracker = RouteTracker(scenario.route)
        path = scenario.route.path
        self._length = float(self._tracker.line.length)
        self._end = self._length if scenario.route.stop_at_end else None
        self._spacing = self._length / (len(path) - 1)
        ahead = np.arange(1, int(80 / self._spacing)) * self._spacing  # it goes straight on behind the goal
        x, y, heading, speed = path[-1]
        beyond = np.stack((x + ahead * np.cos(heading), y + ahead * np.sin(heading),
                           np.full_like(ahead, heading), np.full_like(ahead, speed)), axis=1)  # fmt: skip
        whole = np.concatenate((path, beyond))
        self._line = Line(whole[:, :3])
        self._x, self._y, self._heading, self._speed = (column.tolist() for column in whole.T)
        self._lights = _lights(scenario, self._tracker.line)

    def progress(self, ego: EgoState) -> float:
        """The furthest station of the route that was reached, in m."""
        return self._tracker.progress(ego)

    def light(self, ego: EgoState, time_s: float) -> str:
        """The colour of the route's light whose stop line is at most 40 m ahead; "none" where there is none."""
        s, _ = self._tracker.locate(ego)
        ahead = [light for line_s, light in self._lights if -0.3 < line_s - s - FRONT_M < LIGHT_M]
        return ahead[0].colour(time_s) if ahead else "none"

    def plan(self, ego: EgoState, users: Sequence[RoadUser], time_s: float) -> np.ndarray:
        """Where the vehicle shall be now and 0.5, 1, ... 3 s from now.

        Returns:
            (7, 4) float64 rows x, y (m), yaw (rad), speed (m/s) in ``base_link`` as it is now.
        """
        s, offset = self._tracker.locate(ego)
        if s >= self._length - 1.0:  # behind the goal
            s = float(self._line.project(np.array([[ego.pose.x, ego.pose.y]]), s - 5.0, s + 40.0)[0][0])
        boxes = self._boxes(ego, users, s)
        bus = self._standing(boxes, s) if self._overtakes else None
        walls = self._red(s, ego.speed_mps, time_s)
        passing = None
        if bus is not None:
            passing = self._around(bus)
            if s < passing.begin + 2.0 and offset < 0.7 and not self._room(passing, users, s):
                walls.append(_Wall(passing.begin + FRONT_M))
                passing = None
        walls += self._behind(boxes, s, passing, ego)
        if self._end is not None:
            walls.append(_Wall(self._end + FRONT_M))
        rows, clash = self._rolled(ego, s, walls, passing, boxes)
        if clash is not None:  # off its lane it may not get past something beside it: it brakes
            rows, _ = self._rolled(ego, s, [*walls, clash], passing, ())
        return rows

    def _boxes(self, ego: EgoState, users: Sequence[RoadUser], s: float) -> list[_Box]:
        """The users in sight, along the route."""
        near = [u for u in users if math.hypot(u.pose.x - ego.pose.x, u.pose.y - ego.pose.y) < SIGHT_M]
        if not near:
            return []
        pose = np.array([(u.pose.x, u.pose.y, u.pose.heading, u.size[0] / 2, u.size[1] / 2) for u in near])
        cos, sin = np.cos(pose[:, 2]), np.sin(pose[:, 2])
        along, across = pose[:, 3:4] * _AROUND[:, 0], pose[:, 4:5] * _AROUND[:, 1]  # (U, P)
        x = pose[:, 0:1] + cos[:, None] * along - sin[:, None] * across
        y = pose[:, 1:2] + sin[:, None] * along + cos[:, None] * across
        points = np.stack((x.ravel(), y.ravel()), axis=1)
        station, offset, heading = self._line.project(points, s - 15.0, s + SIGHT_M)
        station, offset = station.reshape(x.shape), offset.reshape(x.shape)
        ahead = np.cos(pose[:, 2] - heading.reshape(x.shape)[:, -1]) * [u.speed_mps for u in near]
        low, high, right, left = station.min(1), station.max(1), offset.min(1), offset.max(1)
        return [
            _Box(*row)
            for row in zip(
                near, low.tolist(), high.tolist(), right.tolist(), left.tolist(), ahead.tolist(), strict=True
            )
        ]

    def _red(self, s: float, speed: float, time_s: float) -> list[_Wall]:
        """The lines of lights that are not green, where the vehicle can still stop."""
        walls = []
        for line_s, light in self._lights:
            gap = line_s - s - FRONT_M
            colour = light.colour(time_s) if -0.3 < gap < SIGHT_M else "green"
            worth = HARDEST if colour == "red" else YELLOW_MPS2
            if colour != "green" and speed**2 / (2 * worth) <= max(gap, 0.3):
                walls.append(_Wall(line_s - min(LINE_M, max(gap, 0.0))))
        return walls

    def _standing(self, boxes: Sequence[_Box], s: float) -> _Box | None:
        """The first vehicle that stands in the lane and is not yet passed."""
        found = [
            box for box in boxes
            if box.user.kind != "pedestrian" and abs(box.along) < 0.3 and box.right < 1.2 and box.left > -1.2
            and box.high + RAMP_M > s - 5.0
        ]  # fmt: skip
        return min(found, key=lambda box: box.low, default=None)

    def _around(self, bus: _Box) -> _Pass:
        offset = bus.left + PASSING_M + WIDTH_M / 2
        rear = bus.low - TURNING_IN_M
        return _Pass(begin=rear - RAMP_M, rear=rear, front=bus.high + REAR_OVERHANG_M + 1.5, offset=offset)

    def _room(self, way: _Pass, users: Sequence[RoadUser], s: float) -> bool:
        """Whether nobody is on the other lane, or comes there from however far, before the vehicle is back."""
        end = way.front + RAMP_M
        needed = (end - s) / (0.8 * PASSING_MPS) + 1.0
        places = np.array([(user.pose.x, user.pose.y) for user in users])
        for user, at, offset, heading in zip(users, *self._line.project(places, s - 10.0), strict=True):
            along, half = user.speed_mps * math.cos(user.pose.heading - heading), user.size[0] / 2
            oncoming = along < -0.3 and at + half > s - 2.0 and at - half + along * needed < end + 6.0
            standing = abs(along) <= 0.3 and way.begin < at + half and at - half < end
            if abs(offset - way.offset) < 1.6 + user.size[1] / 2 and (oncoming or standing):
                return False
        return True

    def _behind(self, boxes: Sequence[_Box], s: float, passing: _Pass | None, ego: EgoState) -> list[_Wall]:
        """What is in the way, or about to be."""
        walls = []
        reach = WIDTH_M / 2 + BESIDE_M
        for box in boxes:
            middle = passing.at((box.low + box.high) / 2) if passing else 0.0
            if box.user.kind == "pedestrian" and box.user.speed_mps > 0.1:
                walls += self._crossed(box, s, WALK_S, reach + 0.3, None, WALKER_M)
            elif box.user.speed_mps > 0.5 and abs(box.along) < 0.8 * box.user.speed_mps:
                walls += self._crossed(box, s, CROSS_S, reach + 1.0, ego.speed_mps, STANDSTILL_M + 1.5)
            ahead = box.low - s - FRONT_M > -1.0
            if ahead and box.right - middle < reach and box.left - middle > -reach:
                room = WALKER_M if box.user.kind == "pedestrian" else STANDSTILL_M
                walls.append(_Wall(box.low - room, max(box.along, 0.0), HEADWAY_S if box.along > 0.3 else 0.4))
        return walls

    def _crossed(
        self, box: _Box, s: float, times: np.ndarray, reach: float, speed: float | None, room: float
    ) -> list[_Wall]:
        """Where somebody on the way across the route will be in the corridor.

        With the vehicle's ``speed`` only if it would be there at the same time.
        """
        pose, pace = box.user.pose, box.user.speed_mps
        where = np.stack(
            (pose.x + pace * times * math.cos(pose.heading), pose.y + pace * times * math.sin(pose.heading)), axis=1
        )
        station, offset, _ = self._line.project(where, s - 5.0, s + SIGHT_M)
        met = (np.abs(offset) < reach) & (station > s + FRONT_M - 0.5)
        if speed is not None:
            front = s + FRONT_M + max(speed, 2.0) * times
            met &= (front > station - 4.0) & (front - LENGTH_M < station + 4.0)
        return [_Wall(float(station[met].min()) - room)] if met.any() else []

    def _rolled(
        self, ego: EgoState, s: float, walls: Sequence[_Wall], passing: _Pass | None, boxes: Sequence[_Box]
    ) -> tuple[np.ndarray, _Wall | None]:
        """A kinematic bicycle (7, 4) along the route, behind the walls; and the first box that it would touch."""
        x, y, heading, speed, steering = ego.pose.x, ego.pose.y, ego.pose.heading, ego.speed_mps, ego.steering
        start, clash = (x, y, heading), None
        beside = [
            box for box in boxes if box.low > s + FRONT_M - 0.5 and abs(box.along) > 0.8 * box.user.speed_mps - 0.1
        ]
        room = TOUCH_M if speed > 1.0 else 0.02  # from a stand it squeezes past
        rows = [(0.0, 0.0, 0.0, speed)]
        for step in range(1, round((ROWS - 1) * STEP_S / DT_S) + 1):
            steering = self._steered(x, y, heading, speed, steering, s, passing)
            wanted, hard = self._wanted(s, speed, (step - 1) * DT_S, walls, passing)
            curvature = math.tan(steering) / WHEELBASE_M
            wanted = min(wanted, math.sqrt(LATERAL_MPS2 / max(abs(curvature), 1e-3)))
            pull = min(max((wanted - speed) / REACTION_S, -HARDEST if hard else -COMFORTABLE), ACCELERATION)
            after = max(speed + pull * DT_S, 0.0)
            if after < 0.12 and wanted < 0.12:
                after = 0.0
            way = (speed + after) / 2 * DT_S
            turned = heading + way * curvature / 2
            x, y, heading, speed = (
                x + way * math.cos(turned),
                y + way * math.sin(turned),
                heading + way * curvature,
                after,
            )
            s, offset, turned = self._onward(x, y, heading, s + way)
            if clash is None and beside:
                clash = _clash(beside, s, offset, turned, step * DT_S, room)
            if step % round(STEP_S / DT_S) == 0:
                rows.append(_seen_from(start, x, y, heading, speed))
        return np.array(rows), clash

    def _at(self, s: float) -> tuple[float, float, float]:
        """x, y and heading of the route at a station."""
        place = min(max(s / self._spacing, 0.0), len(self._x) - 1.001)
        i = int(place)
        share = place - i
        return (
            self._x[i] + share * (self._x[i + 1] - self._x[i]),
            self._y[i] + share * (self._y[i + 1] - self._y[i]),
            self._heading[i] + share * (self._heading[i + 1] - self._heading[i]),
        )

    def _onward(self, x: float, y: float, heading: float, s: float) -> tuple[float, float, float]:
        """Station, offset to the left and angle to the route of a pose near station ``s``."""
        px, py, direction = self._at(s)
        cos, sin = math.cos(direction), math.sin(direction)
        return s + (x - px) * cos + (y - py) * sin, (y - py) * cos - (x - px) * sin, heading - direction

    def _steered(
        self, x: float, y: float, heading: float, speed: float, steering: float, s: float, passing: _Pass | None
    ) -> float:
        """Pure pursuit's steering angle, as fast as the wheels turn."""
        ahead = s + max(2.8, 0.6 * speed)
        px, py, direction = self._at(ahead)
        if passing is not None:
            offset = passing.at(ahead)
            px, py = px - offset * math.sin(direction), py + offset * math.cos(direction)
        dx, dy = px - x, py - y
        aside = -dx * math.sin(heading) + dy * math.cos(heading)
        wanted = math.atan(2 * WHEELBASE_M * aside / max(dx * dx + dy * dy, 1.0))
        if dx * math.cos(heading) + dy * math.sin(heading) < 0:  # it looks the other way: turn as hard as it goes
            wanted = math.copysign(MAX_STEERING, aside)
        wanted = min(max(wanted, -MAX_STEERING), MAX_STEERING)
        change = STEERING_RATE * DT_S
        return steering + min(max(wanted - steering, -change), change)

    def _wanted(
        self, s: float, speed: float, later: float, walls: Sequence[_Wall], passing: _Pass | None
    ) -> tuple[float, bool]:
        """The speed to take up, and whether something in the way asks for it."""
        i = min(max(int((s + 0.3 * speed) / self._spacing), 0), len(self._speed) - 1)
        limit = self._speed[i]
        if passing is not None and passing.begin < s < passing.front + RAMP_M:
            limit = min(limit, PASSING_MPS)
        safe = math.inf
        for wall in walls:
            gap = wall.s + wall.speed * later - s - FRONT_M
            slow = EASY * wall.headway_s
            safe = min(safe, -slow + math.sqrt(slow**2 + wall.speed**2 + 2 * EASY * max(gap, 0.0)))
            if gap <= 0:
                safe = min(safe, 0.5 * wall.speed)
        return min(limit, safe), safe < limit


_AROUND = np.array([(1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (0.5, 1), (0.5, -1),
                    (-0.5, 1), (-0.5, -1), (0, 0)], dtype=np.float64)  # fmt: skip


def _clash(boxes: Sequence[_Box], s: float, offset: float, turned: float, later: float, room: float) -> _Wall | None:
    """What the vehicle would touch at a place along the route, some time later: a wall before it."""
    cos, sin = math.cos(turned), math.sin(turned)
    half = WIDTH_M / 2 * abs(cos) + room
    front, back = offset + FRONT_M * sin, offset - REAR_OVERHANG_M * sin
    right, left = min(front, back) - half, max(front, back) + half
    for box in boxes:
        moved = box.along * later
        inside = box.low + moved < s + FRONT_M * cos and box.high + moved > s - REAR_OVERHANG_M
        if inside and box.right < left and box.left > right:
            return _Wall(box.low - 0.5, max(box.along, 0.0))
    return None


def _lights(scenario: Scenario, line: Line) -> tuple[tuple[float, Light], ...]:
    """The stations of the route's stop lines, with their lights."""
    found = []
    for number in scenario.route.lanes:
        lane = scenario.town.lanes[number]
        if lane.light is None:
            continue
        light = scenario.town.lights[lane.light]
        s, offset, _ = line.project(np.array([light.stop[:2]]))
        if abs(float(offset[0])) < lane.width_m and float(s[0]) <= line.length:
            found.append((float(s[0]), light))
    return tuple(found)


def _seen_from(
    start: tuple[float, float, float], x: float, y: float, heading: float, speed: float
) -> tuple[float, float, float, float]:
    dx, dy, cos, sin = x - start[0], y - start[1], math.cos(start[2]), math.sin(start[2])
    return cos * dx + sin * dy, -sin * dx + cos * dy, wrap(heading - start[2]), speed
