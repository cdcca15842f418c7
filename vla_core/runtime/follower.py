"""From a vehicle's trajectories to its steering and speed, by odometry: pure pursuit.

A trajectory is in ``base_link`` as it was at its stamp. It is moved by what odometry says that the vehicle moved since,
so the frame of the odometry cancels: wherever it has its origin, and however it has drifted, the commands are the same.

A trajectory of one row is no path: it means to brake to a stand, along the path that was followed before.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from vla_core.commands import codec
from vla_core.contract import NANOSECONDS, ContractError, RobotContract
from vla_core.errors import VlaError
from vla_core.observation.decode import decode
from vla_core.observation.ego_motion import interpolate_pose, matrix
from vla_core.observation.messages import MessageError, deserialize, header_stamp_ns

ODOMETRY = "nav_msgs/msg/Odometry"
_POSE = (*(f"pose.pose.position.{axis}" for axis in "xyz"), *(f"pose.pose.orientation.{axis}" for axis in "xyzw"))
_TWIST = ("twist.twist.linear.x", "twist.twist.angular.z")
MEMORY_NS = 5 * NANOSECONDS  # of odometry
CLOCK_JUMP_NS = NANOSECONDS // 2
JUMP_M, JUMP_RAD = 1.0, 0.5  # beyond what the speed explains
STAND_MPS = 0.1  # slower than this is a stand: nobody means to drive at it
SHORTEST_M = 1.0  # of a path that still says where to steer
SAME_PLACE_M = 0.05  # points nearer to each other tell no direction
SUBDIVISIONS = 8  # of the curve between two waypoints


@dataclass(frozen=True, slots=True)
class _Motion:
    """One odometry message: pose (7,) of ``base_link`` in its frame; speed in m/s and yaw rate in rad/s."""

    stamp_ns: int
    pose: np.ndarray
    speed: float
    yaw_rate: float


@dataclass(frozen=True, slots=True)
class _Plan:
    """A trajectory: ``path`` (N, 2) m, fit for pursuit, or None for one that says to stop; ``rows`` (H, A) as sent.

    ``left`` (N,) is how far the path goes on from each of its points, m.
    """

    stamp_ns: int
    rows: np.ndarray
    speeds: np.ndarray
    path: np.ndarray | None
    left: np.ndarray | None


class TrajectoryFollower:
    """Trajectories and odometry in, as messages; steering angle and speed out, at any time.

    Messages may come in any order of topics. What is wrong with one is returned, and the message is ignored whole.
    """

    def __init__(self, contract: RobotContract) -> None:
        """Raises :class:`ContractError` for a contract that does not say how to follow."""
        if contract.following is None:
            raise ContractError(f"contract {contract.name!r} has no following: it does not say how its trajectory "
                                "becomes steering and speed")  # fmt: skip
        self.following = contract.following
        stream = contract.stream(self.following.odometry)
        if stream.type != ODOMETRY or stream.max_age_ns is None:
            raise ContractError(f"following.odometry: {self.following.odometry} is a {stream.type}, expected a "
                                f"{ODOMETRY} with max_age_s")  # fmt: skip
        names = _POSE + _TWIST
        self._odometry = dataclasses.replace(stream, names=names, units=("",) * len(names))
        self._max_age_ns = stream.max_age_ns
        (self._action,) = contract.actions.values()
        self._step_ns = contract.chunk_step_ns
        self._low, self._high = np.array(self.following.command.low), np.array(self.following.command.high)
        self._motions: deque[_Motion] = deque()
        self._plan: _Plan | None = None
        self._path: _Plan | None = None  # the newest with a path: what is braked along
        self._braking: tuple[int, float] | None = None  # since when, and from what speed
        self._command = np.zeros(2)
        self.fault = ""

    def reset(self, from_ns: int | None = None) -> None:
        """Forget what is stamped before ``from_ns``, the start of an episode; without it everything."""
        self._motions = deque(m for m in self._motions if from_ns is not None and m.stamp_ns >= from_ns)
        if self._plan is not None and (from_ns is None or self._plan.stamp_ns < from_ns):
            self._plan = None
        self._path = self._plan
        self._braking = None
        self._command = np.zeros(2)
        self.fault = ""

    def brake(self) -> None:
        """Brake to a stand along the last path, until a trajectory comes."""
        self._plan = None

    @property
    def odometry_ns(self) -> int | None:
        """Stamp of the newest odometry."""
        return self._motions[-1].stamp_ns if self._motions else None

    @property
    def trajectory_ns(self) -> int | None:
        """Stamp of the trajectory in force."""
        return None if self._plan is None else self._plan.stamp_ns

    @property
    def braking(self) -> bool:
        """Whether the last command braked, or stood, for another reason than the trajectory's own speeds."""
        return self._braking is not None

    def add_odometry(self, data: bytes | memoryview) -> str:
        """Take a message; returns what is wrong with it, empty when it was taken.

        A pose that jumped is taken, and what was known before it is forgotten: nothing connects the two.
        """
        try:
            values = decode(self._odometry, data)
            stamp_ns = header_stamp_ns(ODOMETRY, data)
        except VlaError as error:
            return str(error)
        assert isinstance(values, np.ndarray) and stamp_ns is not None
        length = float(np.linalg.norm(values[3:7]))
        if not abs(length - 1) < 0.01:
            return f"{self._odometry.topic}: the orientation has length {length:.3g}, expected a unit quaternion"
        values[3:7] /= length
        motion = _Motion(stamp_ns, values[:7], float(values[7]), float(values[8]))
        fault = ""
        if self._motions:
            last = self._motions[-1]
            back_ns = last.stamp_ns - stamp_ns
            if 0 <= back_ns <= CLOCK_JUMP_NS:
                return f"{self._odometry.topic}: stamped {stamp_ns}, not after the one before, {last.stamp_ns}"
            fault = self._jump(last, motion) if back_ns < 0 else f"stamps went back by {back_ns / NANOSECONDS:.3g} s"
            if fault:
                fault = f"{self._odometry.topic}: {fault}; what was planned before is dropped"
                self._motions.clear()
                self._plan = self._path = None
        self._motions.append(motion)
        while stamp_ns - self._motions[0].stamp_ns > MEMORY_NS:
            self._motions.popleft()
        return fault

    def add_trajectory(self, data: bytes | memoryview) -> str:
        """Take a message, which replaces the one before at once; returns what is wrong with it, else empty."""
        topic = self._action.topic
        try:
            plan = self._planned(data)
        except MessageError as error:
            text = str(error)
            return text if text.startswith(topic) else f"{topic}: {text}"
        if self._plan is not None and 0 < self._plan.stamp_ns - plan.stamp_ns <= CLOCK_JUMP_NS:
            return f"{topic}: stamped {plan.stamp_ns}, before the one in force, {self._plan.stamp_ns}"
        self._plan = plan
        if plan.path is not None:
            self._path = plan
        return ""

    def command(self, at_ns: int) -> np.ndarray:
        """Steering angle in rad and speed in m/s, (2,) float64, for the time ``at_ns``. ``fault`` says why it brakes.

        A fault never raises: it brakes, along the last path as long as odometry tells where that is.
        """
        now = self._motion_at(at_ns)
        self.fault = self._why_not(at_ns, now)
        plan, points = self._plan, self._path_seen(now)
        if self.fault or plan is None or plan.left is None or points is None:
            speed = self._braked(at_ns, now)
        else:
            self._braking = None
            left_m = float(plan.left[_nearest(points)])
            speed = min(self._asked_speed(plan, at_ns), math.sqrt(2 * self.following.braking_mps2 * left_m))
        steering = self._steering(points, now, speed)
        self._command = np.clip([steering, speed], self._low, self._high)
        return self._command.copy()

    def followed(self) -> np.ndarray | None:
        """What is followed, in the frame of the odometry: rows (H, 7) of x, y, z and quaternion; None without it."""
        plan = self._path
        placed = None if plan is None else self._motion_at(plan.stamp_ns)
        if plan is None or placed is None:
            return None
        columns = dict(zip(self._action.names, plan.rows.T, strict=True))
        zero = np.zeros(len(plan.rows))
        half = columns.get("yaw", zero) / 2
        places = np.stack([columns["x"], columns["y"], columns.get("z", zero)], axis=1)
        frame = matrix(placed.pose)
        x, y, z, w = placed.pose[3:]
        s, c = np.sin(half), np.cos(half)  # the product of the frame's quaternion and (0, 0, s, c)
        turned = np.stack([x * c + y * s, y * c - x * s, z * c + w * s, w * c - z * s], axis=1)
        return np.concatenate([places @ frame[:3, :3].T + frame[:3, 3], turned], axis=1)

    # Messages.

    def _planned(self, data: bytes | memoryview) -> _Plan:
        action = self._action
        message = deserialize(action.type, data)
        if action.frame_id and message.header.frame_id != action.frame_id:
            raise MessageError(f"frame {message.header.frame_id!r}, expected the contract's {action.frame_id!r}")
        rows = codec(action).decode(message, action)
        if not np.isfinite(rows).all():
            bad = [name for name, column in zip(action.names, rows.T, strict=True) if not np.isfinite(column).all()]
            raise MessageError(f"{', '.join(bad)} not finite")
        for k, point in enumerate(message.points):
            after_ns = point.time_from_start.sec * NANOSECONDS + point.time_from_start.nanosec
            if after_ns != k * self._step_ns:
                raise MessageError(f"point {k} is {after_ns / NANOSECONDS:.6g} s after the stamp, expected "
                                   f"{k * self._step_ns / NANOSECONDS:.6g} s, the contract's steps")  # fmt: skip
        columns = dict(zip(action.names, rows.T, strict=True))
        path = left = None
        if len(rows) > 1:
            path = _smooth(np.stack([columns["x"], columns["y"]], axis=1))
            steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
            left = np.append(np.cumsum(steps[::-1])[::-1], 0.0)
        stamp_ns = header_stamp_ns(action.type, data)
        assert stamp_ns is not None
        return _Plan(stamp_ns, rows, columns["speed"], path, left)

    def _jump(self, last: _Motion, new: _Motion) -> str:
        """How a pose contradicts the speeds; empty when it does not."""
        elapsed_s = (new.stamp_ns - last.stamp_ns) / NANOSECONDS
        moved = math.dist(last.pose[:3], new.pose[:3])
        turned = 2 * math.acos(min(abs(float(last.pose[3:] @ new.pose[3:])), 1.0))
        if moved > JUMP_M + max(abs(last.speed), abs(new.speed)) * elapsed_s:
            return f"the pose jumped by {moved:.3g} m in {elapsed_s:.3g} s at {new.speed:.3g} m/s"
        if turned > JUMP_RAD + max(abs(last.yaw_rate), abs(new.yaw_rate)) * elapsed_s:
            return f"the pose jumped by {turned:.3g} rad in {elapsed_s:.3g} s at {new.yaw_rate:.3g} rad/s"
        return ""

    # Where the vehicle is.

    def _motion_at(self, at_ns: int) -> _Motion | None:
        """The motion at a time: between two messages, or at most ``max_age_s`` on from the last one; else None."""
        if not self._motions:
            return None
        last = self._motions[-1]
        if at_ns >= last.stamp_ns:
            elapsed_ns = at_ns - last.stamp_ns
            return None if elapsed_ns > self._max_age_ns else _ahead(last, elapsed_ns)
        k = bisect.bisect_right(self._motions, at_ns, key=lambda motion: motion.stamp_ns)
        if k == 0:
            return None
        a, b = self._motions[k - 1], self._motions[k]
        if b.stamp_ns - a.stamp_ns > self._max_age_ns:
            return None
        weight = (at_ns - a.stamp_ns) / (b.stamp_ns - a.stamp_ns)
        return _Motion(
            at_ns, interpolate_pose(a.pose, b.pose, weight), a.speed + weight * (b.speed - a.speed),
            a.yaw_rate + weight * (b.yaw_rate - a.yaw_rate),
        )  # fmt: skip

    def _why_not(self, at_ns: int, now: _Motion | None) -> str:
        """Why the trajectory in force cannot be followed; empty when it can."""
        if not self._motions:
            return f"{self._odometry.topic}: no odometry"
        if now is None:
            age_s = (at_ns - self._motions[-1].stamp_ns) / NANOSECONDS
            return f"{self._odometry.topic}: {age_s:.3g} s old, limit {self._max_age_ns / NANOSECONDS:.3g} s"
        topic = self._action.topic
        if self._plan is None:
            return f"{topic}: no trajectory"
        age_s = (at_ns - self._plan.stamp_ns) / NANOSECONDS
        if age_s > self.following.timeout_s:
            return f"{topic}: {age_s:.3g} s old, limit {self.following.timeout_s:.3g} s"
        if age_s < -CLOCK_JUMP_NS / NANOSECONDS:
            return f"{topic}: stamped {-age_s:.3g} s ahead of the clock"
        if self._motion_at(self._plan.stamp_ns) is None:
            return f"{topic}: {age_s:.3g} s old, and no odometry tells where the vehicle was then"
        if age_s * NANOSECONDS > (len(self._plan.rows) - 1) * self._step_ns > 0:
            return f"{topic}: {age_s:.3g} s old, and its {len(self._plan.rows)} points are driven"
        return ""

    # Commands.

    def _asked_speed(self, plan: _Plan, at_ns: int) -> float:
        times = np.arange(len(plan.speeds)) * self._step_ns / NANOSECONDS
        at_s = (at_ns - plan.stamp_ns) / NANOSECONDS + self.following.lead_s
        speed = float(np.interp(at_s, times, plan.speeds))
        return speed if max(speed, plan.speeds[times > at_s].max(initial=0.0)) > STAND_MPS else 0.0

    def _braked(self, at_ns: int, now: _Motion | None) -> float:
        """Speed while braking to a stand, from what it was when that began."""
        if self._braking is None or at_ns < self._braking[0]:
            self._braking = (at_ns, float(self._command[1]) if now is None else max(now.speed, 0.0))
        since_ns, speed = self._braking
        elapsed_s = (at_ns - since_ns) / NANOSECONDS + self.following.lead_s
        speed -= self.following.braking_mps2 * elapsed_s
        return speed if speed > STAND_MPS else 0.0

    def _path_seen(self, now: _Motion | None) -> np.ndarray | None:
        """The last path (N, 2) as the vehicle sees it now; None where odometry does not tell where it is."""
        path = self._path
        placed = None if path is None else self._motion_at(path.stamp_ns)
        if now is None or path is None or path.path is None or placed is None:
            return None
        moved = np.linalg.inv(matrix(now.pose)) @ matrix(placed.pose)
        return np.asarray(path.path @ moved[:2, :2].T + moved[:2, 3])

    def _steering(self, points: np.ndarray | None, now: _Motion | None, speed: float) -> float:
        """Pure pursuit (Coulter 1992): the arc through the point of the path at the lookahead distance.

        Held where nothing tells it: at a stand, without odometry, at the path's end.
        """
        held = float(self._command[0])
        if points is None or now is None or (speed == 0.0 and abs(now.speed) < STAND_MPS):
            return held
        goal = _goal(points, max(self.following.lookahead_m, self.following.lookahead_s * now.speed))
        if goal is None:
            return held
        curvature = 2 * goal[1] / float(goal @ goal)
        return float(np.arctan(self.following.wheelbase_m * curvature))


def _ahead(motion: _Motion, elapsed_ns: int) -> _Motion:
    """The motion some time later, at the same speed and yaw rate: along an arc."""
    if elapsed_ns == 0:
        return motion
    elapsed_s = elapsed_ns / NANOSECONDS
    half = 0.5 * motion.yaw_rate * elapsed_s
    chord = motion.speed * elapsed_s * np.sinc(half / np.pi)
    pose = motion.pose.copy()
    pose[:3] = (matrix(motion.pose) @ [chord * np.cos(half), chord * np.sin(half), 0.0, 1.0])[:3]
    x, y, z, w = motion.pose[3:]
    s, c = np.sin(half), np.cos(half)
    pose[3:] = [x * c + y * s, y * c - x * s, z * c + w * s, w * c - z * s]
    return dataclasses.replace(motion, stamp_ns=motion.stamp_ns + elapsed_ns, pose=pose)


def _smooth(points: np.ndarray) -> np.ndarray:
    """A curve (N, 2) through waypoints (H, 2), without those at the place of the one before.

    Cubic Hermite pieces over chord length, whose tangents are those of the parabola through three neighbours: a
    polyline of half seconds would cut every bend by several cm, and steer by its corners.
    """
    keep = [0]
    for k in range(1, len(points)):
        if np.hypot(*(points[k] - points[keep[-1]])) > SAME_PLACE_M:
            keep.append(k)
    p = points[keep]  # (K, 2)
    if len(p) < 3:
        return p
    h = np.linalg.norm(np.diff(p, axis=0), axis=1)[:, None]  # (K - 1, 1)
    slope = np.diff(p, axis=0) / h
    inner = (h[1:] * slope[:-1] + h[:-1] * slope[1:]) / (h[1:] + h[:-1])
    tangents = np.concatenate([2 * slope[:1] - inner[:1], inner, 2 * slope[-1:] - inner[-1:]])
    t = np.linspace(0, 1, SUBDIVISIONS, endpoint=False)[None, :, None]
    a, b, u, v = (part[:, None] for part in (p[:-1], p[1:], h * tangents[:-1], h * tangents[1:]))
    curve = (2 * t**3 - 3 * t**2 + 1) * a + (t**3 - 2 * t**2 + t) * u + (3 * t**2 - 2 * t**3) * b + (t**3 - t**2) * v
    return np.concatenate([curve.reshape(-1, 2), p[-1:]])


def _nearest(points: np.ndarray) -> int:
    """Which point of a path (N, 2) the vehicle is at."""
    return int(np.linalg.norm(points, axis=1).argmin())


def _goal(points: np.ndarray, distance: float) -> np.ndarray | None:
    """The first point (2,) of a path (N, 2), seen from the vehicle, that is ``distance`` away, beyond the nearest one.

    A path that is farther off is met at an angle of 45 degrees or less. One that ends before gives its end, as long as
    that is far enough away, and ahead, to tell a direction.
    """
    away = np.linalg.norm(points, axis=1)
    nearest = int(away.argmin())
    distance = max(distance, 2**0.5 * float(away[nearest]))
    beyond = np.flatnonzero(away[nearest:] >= distance)
    if len(beyond) == 0:
        end: np.ndarray = points[-1]
        return end if away[-1] >= SHORTEST_M and end[0] > 0 else None
    k = nearest + int(beyond[0])
    a, way = points[k - 1], points[k] - points[k - 1]
    # |a + t way| = distance
    square, product = float(way @ way), float(a @ way)
    t = (-product + np.sqrt(max(product**2 - square * (float(a @ a) - distance**2), 0.0))) / square
    return a + t * way
