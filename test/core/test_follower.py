"""Trajectories followed by odometry: closed forms, a kinematic car in closed loop, faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.commands import encode
from vla_core.contract import NANOSECONDS, ContractError, RobotContract
from vla_core.observation import messages
from vla_core.observation.messages import serialize, typestore
from vla_core.runtime.follower import TrajectoryFollower

CONTRACT = RobotContract.load("driving")
ACTION = CONTRACT.actions["trajectory"]
assert CONTRACT.following is not None
FOLLOWING = CONTRACT.following
WHEELBASE = FOLLOWING.wheelbase_m
START = 1_700_000_000 * NANOSECONDS
TICK = NANOSECONDS // 5
HALF = NANOSECONDS // 2
TIMES = np.arange(7) * 0.5


def rotation(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (np.cos, np.sin))
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1.0]])
    about_y = np.array([[cp, 0, sp], [0, 1.0, 0], [-sp, 0, cp]])
    about_x = np.array([[1.0, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return about_z @ about_y @ about_x


def quaternion(r: np.ndarray) -> np.ndarray:
    """x, y, z, w of a rotation (3, 3), by its eigenvector of eigenvalue 1 of the symmetric 4x4 form (Bar-Itzhack)."""
    k = np.array([
        [r[0, 0] - r[1, 1] - r[2, 2], r[1, 0] + r[0, 1], r[2, 0] + r[0, 2], r[2, 1] - r[1, 2]],
        [r[1, 0] + r[0, 1], r[1, 1] - r[0, 0] - r[2, 2], r[2, 1] + r[1, 2], r[0, 2] - r[2, 0]],
        [r[2, 0] + r[0, 2], r[2, 1] + r[1, 2], r[2, 2] - r[0, 0] - r[1, 1], r[1, 0] - r[0, 1]],
        [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], np.trace(r)],
    ])  # fmt: skip
    return np.linalg.eigh(k)[1][:, -1]


def odometry(
    stamp_ns: int, x: float = 0.0, y: float = 0.0, yaw: float = 0.0, speed: float = 0.0, yaw_rate: float = 0.0,
    frame: tuple[np.ndarray, np.ndarray] = (np.eye(3), np.zeros(3)), frame_id: str = "odom",
) -> bytes:  # fmt: skip
    """Serialized odometry of a pose in the plane, seen from a frame (rotation, translation)."""
    types = typestore().types
    place = frame[0] @ [x, y, 0.0] + frame[1]
    q = quaternion(frame[0] @ rotation(yaw))
    vector = types["geometry_msgs/msg/Vector3"]
    message = types["nav_msgs/msg/Odometry"](
        header=messages.header(stamp_ns, frame_id), child_frame_id="base_link",
        pose=types["geometry_msgs/msg/PoseWithCovariance"](
            pose=types["geometry_msgs/msg/Pose"](
                position=types["geometry_msgs/msg/Point"](x=place[0], y=place[1], z=place[2]),
                orientation=types["geometry_msgs/msg/Quaternion"](x=q[0], y=q[1], z=q[2], w=q[3]),
            ), covariance=np.zeros(36),
        ),
        twist=types["geometry_msgs/msg/TwistWithCovariance"](
            twist=types["geometry_msgs/msg/Twist"](
                linear=vector(x=speed, y=0.0, z=0.0), angular=vector(x=0.0, y=0.0, z=yaw_rate)
            ), covariance=np.zeros(36),
        ),
    )  # fmt: skip
    return serialize("nav_msgs/msg/Odometry", message)


def trajectory(stamp_ns: int, rows: np.ndarray | list[list[float]], step_ns: int = HALF) -> bytes:
    return encode(ACTION, stamp_ns, np.asarray(rows, dtype=float), step_ns)


def arc(curvature: float, speed: float = 5.0) -> np.ndarray:
    """Rows (7, 4) along a circle through the origin, at constant speed."""
    yaw = curvature * speed * TIMES
    way = speed * TIMES
    x, y = (
        way * np.sinc(yaw / np.pi),
        way * yaw / 2 * np.sinc(yaw / 2 / np.pi) ** 2,
    )  # sin and 1 - cos over the curvature
    return np.stack([x, y, yaw, np.full(7, speed)], axis=1)


def beside(rows: np.ndarray, left: float) -> np.ndarray:
    """The same rows (7, 4), moved by ``left`` m to the left."""
    return rows + np.array([0.0, left, 0.0, 0.0])


def straight(speeds: np.ndarray) -> np.ndarray:
    """Rows (7, 4) straight ahead with these speeds at the rows."""
    way = np.concatenate([[0.0], np.cumsum((speeds[1:] + speeds[:-1]) / 2 * 0.5)])
    return np.stack([way, 0 * way, 0 * way, speeds], axis=1)


def follower(contract: RobotContract = CONTRACT) -> TrajectoryFollower:
    return TrajectoryFollower(contract)


def taken(fault: str) -> None:
    assert fault == ""


class TestClosedForms:
    @pytest.mark.parametrize("speed", [2.0, 5.0, 9.0])
    @pytest.mark.parametrize("curvature", [0.0, 0.02, -0.02, 0.1, -0.12])
    def test_a_circle_is_steered_along_its_own_arc(self, curvature: float, speed: float) -> None:
        car = follower()
        taken(car.add_odometry(odometry(START, speed=speed)))
        taken(car.add_trajectory(trajectory(START, arc(curvature, speed))))
        steering, asked = car.command(START)
        assert steering == pytest.approx(np.arctan(WHEELBASE * curvature), rel=0.02, abs=1e-9)
        assert asked == pytest.approx(speed)
        assert car.fault == "" and not car.braking

    def test_the_goal_beside_a_straight_path_is_at_the_lookahead_distance(self) -> None:
        """1 m left of a straight path: the chord to the path at distance L has curvature -2 * 1 / L^2."""
        car = follower()
        taken(car.add_odometry(odometry(START, speed=5.0)))
        taken(car.add_trajectory(trajectory(START, beside(arc(0.0), -1.0))))
        lookahead = FOLLOWING.lookahead_s * 5.0
        assert car.command(START)[0] == pytest.approx(-np.arctan(WHEELBASE * 2 / lookahead**2), rel=1e-6)

    def test_it_looks_at_least_the_shortest_distance_ahead(self) -> None:
        car = follower()
        taken(car.add_odometry(odometry(START, speed=1.0)))
        taken(car.add_trajectory(trajectory(START, beside(arc(0.0), 0.5))))
        assert car.command(START)[0] == pytest.approx(np.arctan(WHEELBASE / FOLLOWING.lookahead_m**2), rel=1e-6)

    def test_steering_and_speed_keep_the_commands_bounds(self) -> None:
        car = follower()
        taken(car.add_odometry(odometry(START, speed=3.0)))
        rows = beside(arc(0.0, 14.0), 2.5)
        rows[:, 3] = 99.0
        taken(car.add_trajectory(trajectory(START, rows)))
        assert car.command(START).tolist() == [0.6, 15.0]
        rows[:, 1], rows[:, 3] = -2.5, -2.0
        taken(car.add_trajectory(trajectory(START, rows)))
        assert car.command(START).tolist() == [-0.6, 0.0], "no reverse"

    @pytest.mark.parametrize("left", [4.0, 6.0, -10.0])
    def test_a_path_farther_off_than_the_lookahead_is_met_at_45_degrees(self, left: float) -> None:
        """The goal is at (left, left): an arc of curvature 1 / left."""
        car = follower()
        taken(car.add_odometry(odometry(START, speed=1.0)))
        taken(car.add_trajectory(trajectory(START, beside(arc(0.0), left))))
        expected = np.clip(np.arctan(WHEELBASE / left), -0.6, 0.6)
        assert car.command(START)[0] == pytest.approx(expected, rel=1e-6)

    def test_the_speed_is_that_of_the_plan_a_lead_later(self) -> None:
        car = follower()
        taken(car.add_odometry(odometry(START, speed=2.0)))
        taken(car.add_trajectory(trajectory(START, straight(2.0 + TIMES))))
        for after_ns in (0, 100_000_000, 190_000_000):
            asked = car.command(START + after_ns)[1]
            assert asked == pytest.approx(2.0 + after_ns / NANOSECONDS + FOLLOWING.lead_s)

    def test_a_plan_that_stands_commands_zero_and_holds_the_steering(self) -> None:
        car = follower()
        taken(car.add_odometry(odometry(START, speed=5.0)))
        taken(car.add_trajectory(trajectory(START, arc(0.1))))
        held = car.command(START)[0]
        assert held > 0.2
        later = START + TICK
        taken(car.add_odometry(odometry(later, x=1.0, speed=0.02)))
        taken(car.add_trajectory(trajectory(later, straight(np.full(7, 0.06)) - [0, 0.4, 0, 0])))
        assert car.command(later).tolist() == [held, 0.0], "noise about 0 is no speed"
        assert not car.braking and car.fault == ""

    def test_a_start_from_a_stand_is_no_stand(self) -> None:
        car = follower()
        taken(car.add_odometry(odometry(START)))
        taken(car.add_trajectory(trajectory(START, straight(0.2 * TIMES))))
        assert 0 < car.command(START)[1] <= 0.1

    def test_no_faster_than_it_can_stop_where_the_path_ends(self) -> None:
        """Speeds that the places contradict are not driven blindly: v^2 = 2 a s."""
        car = follower()
        taken(car.add_odometry(odometry(START, speed=1.0)))
        for way, asked in ((0.0, 0.0), (0.5, np.sqrt(2 * 4.0 * 0.5)), (2.0, 4.0), (10.0, 5.0)):
            rows = straight(np.full(7, 5.0))
            rows[:, 0] = np.linspace(0, way, 7)
            taken(car.add_trajectory(trajectory(START, rows)))
            assert car.command(START)[1] == pytest.approx(asked)

    def test_a_path_that_lies_behind_turns_nothing(self) -> None:
        car = follower()
        taken(car.add_odometry(odometry(START, speed=5.0)))
        taken(car.add_trajectory(trajectory(START, arc(0.05))))
        held = car.command(START)[0]
        behind = arc(0.0) - np.array([20.0, -4.0, 0, 0])
        taken(car.add_trajectory(trajectory(START, behind)))
        assert car.command(START).tolist() == [held, 0.0]


class TestFrames:
    @settings(max_examples=40, deadline=None)
    @given(
        angles=st.tuples(*[st.floats(-3.1, 3.1)] * 3), shift=st.tuples(*[st.floats(-1e4, 1e4)] * 3),
        curvature=st.floats(-0.1, 0.1), offset=st.floats(-1, 1), delay_ms=st.integers(0, 300),
    )  # fmt: skip
    def test_the_odometrys_frame_cancels(
        self, angles: tuple[float, float, float], shift: tuple[float, float, float], curvature: float, offset: float,
        delay_ms: int,
    ) -> None:  # fmt: skip
        frames = [(np.eye(3), np.zeros(3)), (rotation(*angles), np.array(shift))]
        commands, paths = [], []
        for frame in frames:
            car = follower()
            for k in range(20):
                s = 0.1 * k
                pose = {"x": s, "y": 0.01 * s * s, "yaw": 0.02 * s, "speed": 5.0, "yaw_rate": 0.1}
                taken(car.add_odometry(odometry(START + k * 20_000_000, frame=frame, **pose)))
            taken(car.add_trajectory(trajectory(START + 100_000_000, beside(arc(curvature), offset))))
            commands.append(car.command(START + (100 + delay_ms) * 1_000_000))
            path = car.followed()
            assert path is not None
            paths.append((path[:, :3] - frame[1]) @ frame[0])
        np.testing.assert_allclose(commands[0], commands[1], atol=1e-6)
        np.testing.assert_allclose(paths[0], paths[1], atol=1e-6)

    def test_the_path_is_moved_by_what_the_vehicle_drove_since(self) -> None:
        """After 2 m straight and a turn of 90 degrees left, a straight path lies to the right."""
        car = follower()
        for k, x in enumerate(np.linspace(0, 2, 11)):
            taken(car.add_odometry(odometry(START + k * 20_000_000, x=x, speed=10.0)))
        taken(car.add_trajectory(trajectory(START, arc(0.0, 8.0))))
        assert car.command(START + TICK)[0] == pytest.approx(0.0, abs=1e-9)
        for k in range(1, 16):
            turned = odometry(START + TICK + k * 20_000_000, x=2.0, yaw=k * np.pi / 30, yaw_rate=5.3)
            taken(car.add_odometry(turned))
        # At a yaw of 90 degrees all of the path is at x = 0 in the vehicle's frame: goal (0, -3), curvature -2/3.
        steering = car.command(START + TICK + 15 * 20_000_000)[0]
        assert steering == -0.6 and car.fault == ""

    def test_between_messages_it_goes_on_along_an_arc(self) -> None:
        """Odometry of 20 ms ago, extrapolated, gives what fresh odometry gives."""
        v, w = 8.0, 0.4
        later = 0.02
        fresh = {"x": v / w * np.sin(w * later), "y": v / w * (1 - np.cos(w * later)), "yaw": w * later}
        commands = []
        for both in (False, True):
            car = follower()
            taken(car.add_odometry(odometry(START, speed=v, yaw_rate=w)))
            if both:
                taken(car.add_odometry(odometry(START + 20_000_000, speed=v, yaw_rate=w, **fresh)))
            taken(car.add_trajectory(trajectory(START, arc(-0.03, 8.0))))
            commands.append(car.command(START + 20_000_000))
        np.testing.assert_allclose(commands[0], commands[1], atol=1e-9)

    def test_the_followed_path_is_in_the_odometrys_frame(self) -> None:
        car = follower()
        taken(car.add_odometry(odometry(START, x=10.0, y=-5.0, yaw=np.pi / 2)))
        assert car.followed() is None
        taken(car.add_trajectory(trajectory(START, arc(0.1))))
        path = car.followed()
        assert path is not None
        rows = arc(0.1)
        np.testing.assert_allclose(path[:, 0], 10.0 - rows[:, 1], atol=1e-9)
        np.testing.assert_allclose(path[:, 1], -5.0 + rows[:, 0], atol=1e-9)
        np.testing.assert_allclose(2 * np.arctan2(path[:, 5], path[:, 6]), rows[:, 2] + np.pi / 2, atol=1e-9)


class Car:
    """A kinematic bicycle with a delay and a lag in its actuators, simulated at 100 Hz."""

    def __init__(self, x: float, y: float, yaw: float, speed: float) -> None:
        self.x, self.y, self.yaw, self.speed, self.steering = x, y, yaw, speed, 0.0
        self.commands = [np.array([0.0, speed])] * 5  # 50 ms on the way
        self.yaw_rate = 0.0

    def advance(self, command: np.ndarray) -> None:
        dt = 0.01
        self.commands.append(command)
        asked = self.commands.pop(0)
        self.steering += np.clip((asked[0] - self.steering) * dt / 0.1, -0.8 * dt, 0.8 * dt)
        self.speed += np.clip((asked[1] - self.speed) / 0.2, -6.0, 3.0) * dt
        self.yaw_rate = self.speed * np.tan(self.steering) / WHEELBASE
        self.x += self.speed * dt * np.cos(self.yaw + self.yaw_rate * dt / 2)
        self.y += self.speed * dt * np.sin(self.yaw + self.yaw_rate * dt / 2)
        self.yaw += self.yaw_rate * dt


Plan = Callable[[Car], np.ndarray]


def drive(car: Car, plan: Plan, ticks: int, hold_ms: int = 200) -> tuple[np.ndarray, TrajectoryFollower]:
    """Positions, speeds and steering (N, 4) at 100 Hz: a plan every 0.2 s, a command every ``hold_ms``."""
    steers = follower()
    trace = []
    stamp = START

    def send_odometry() -> None:
        taken(steers.add_odometry(odometry(stamp, car.x, car.y, car.yaw, car.speed, car.yaw_rate)))

    send_odometry()
    command = np.zeros(2)
    for k in range(20 * ticks):
        if k % 20 == 0:
            taken(steers.add_trajectory(trajectory(stamp, plan(car))))
        if (10 * k) % hold_ms == 0:
            command = steers.command(stamp)
            assert steers.fault == ""
        car.advance(command)
        stamp += 10_000_000
        trace.append([car.x, car.y, car.speed, command[0]])
        if k % 2 == 1:
            send_odometry()
    return np.array(trace), steers


def seen_from(car: Car, points: np.ndarray) -> np.ndarray:
    """Points (N, 2) in the car's frame."""
    c, s = np.cos(car.yaw), np.sin(car.yaw)
    return (points - [car.x, car.y]) @ np.array([[c, -s], [s, c]])


class TestClosedLoop:
    @pytest.mark.parametrize("hold_ms", [20, 200])
    def test_an_s_curve_is_tracked(self, hold_ms: int) -> None:
        """A sine of 4 m amplitude and 60 m length, sharpest radius 23 m, at 7 m/s."""
        x = np.linspace(0, 200, 20001)
        line = np.stack([x, 4 * np.sin(2 * np.pi * x / 60)], axis=1)
        way = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])

        def plan(car: Car) -> np.ndarray:
            at = way[np.hypot(*(line - [car.x, car.y]).T).argmin()] + 7.0 * TIMES
            places = np.stack([np.interp(at, way, line[:, 0]), np.interp(at, way, line[:, 1])], axis=1)
            yaw = np.interp(at, way, np.arctan2(*np.gradient(line, axis=0).T[::-1])) - car.yaw
            return np.column_stack([seen_from(car, places), yaw, np.full(7, 7.0)])

        car = Car(0.0, 0.0, np.arctan(4 * 2 * np.pi / 60), 7.0)
        trace, _ = drive(car, plan, 80, hold_ms)
        assert trace[-1, 0] > 90
        off = np.array([np.hypot(*(line - place).T).min() for place in trace[::5, :2]])
        assert off.max() < 0.1

    def test_a_turn_of_a_crossing_is_tracked(self) -> None:
        """20 m straight, 90 degrees left at radius 9 m, straight on, at 4 m/s."""
        s = np.linspace(0, 60, 6001)
        bend = np.clip((s - 20) / 9, 0, np.pi / 2)
        line = np.stack([np.cumsum(np.cos(bend)), np.cumsum(np.sin(bend))], axis=1) * 0.01

        def plan(car: Car) -> np.ndarray:
            at = s[np.hypot(*(line - [car.x, car.y]).T).argmin()] + 4.0 * TIMES
            places = np.stack([np.interp(at, s, line[:, 0]), np.interp(at, s, line[:, 1])], axis=1)
            return np.column_stack([seen_from(car, places), np.interp(at, s, bend) - car.yaw, np.full(7, 4.0)])

        trace, _ = drive(Car(0.0, 0.0, 0.0, 4.0), plan, 60)
        off = np.array([np.hypot(*(line - place).T).min() for place in trace[::5, :2]])
        assert off.max() < 0.1
        assert trace[-1, 1] > 12

    def test_a_stop_is_where_the_plan_says_and_stays(self) -> None:
        """Braking at 2 m/s2 to a line 30 m ahead, planned anew at every tick as the expert does."""

        def plan(car: Car) -> np.ndarray:
            ahead, speed, rows = 30.0 - car.x, car.speed, []
            x = 0.0
            for k in range(301):
                if k % 50 == 0:
                    rows.append([x, 0.0, 0.0, speed])
                speed = min(speed, np.sqrt(max(0.0, 2 * 2.0 * (ahead - x)))) if ahead - x > 0.02 else 0.0
                x += speed * 0.01
            return np.array(rows)

        trace, _ = drive(Car(0.0, 0.0, 0.0, 8.0), plan, 60)
        assert 29.0 < trace[-1, 0] < 30.5
        assert trace[-200:, 2].max() < 0.01, "it creeps"
        assert trace[:, 2].min() > -1e-9, "it reverses"


def moving(speed: float = 5.0, curvature: float = 0.0) -> TrajectoryFollower:
    """A follower that has commanded along a trajectory at START."""
    car = follower()
    taken(car.add_odometry(odometry(START, speed=speed)))
    taken(car.add_trajectory(trajectory(START, arc(curvature, speed))))
    car.command(START)
    return car


def go_on(car: TrajectoryFollower, until_ns: int, speed: float = 5.0) -> None:
    """Odometry of a straight drive up to a time."""
    assert car.odometry_ns is not None
    stamp = car.odometry_ns + 20_000_000
    while stamp <= until_ns:
        taken(car.add_odometry(odometry(stamp, x=speed * (stamp - START) / NANOSECONDS, speed=speed)))
        stamp += 20_000_000


class TestFaults:
    def test_nothing_received(self) -> None:
        car = follower()
        assert car.command(START).tolist() == [0.0, 0.0]
        assert car.fault == "odom: no odometry" and car.braking
        taken(car.add_odometry(odometry(START, speed=3.0)))
        car.command(START)
        assert car.fault == "planning/trajectory: no trajectory"

    def test_an_old_trajectory_is_braked_along(self) -> None:
        car = moving(5.0, 0.02)
        limit_ns = round(FOLLOWING.timeout_s * NANOSECONDS)
        go_on(car, START + limit_ns)
        assert car.command(START + limit_ns)[1] == pytest.approx(5.0)
        over = START + limit_ns + 20_000_000
        go_on(car, over)
        begun = car.command(over)
        assert car.braking and car.fault == "planning/trajectory: 0.62 s old, limit 0.6 s"
        lead = FOLLOWING.lead_s
        assert begun[1] == pytest.approx(5.0 - FOLLOWING.braking_mps2 * lead)
        assert begun[0] > 0.03, "it keeps to the path"
        go_on(car, over + TICK, 4.9)
        assert car.command(over + TICK)[1] == pytest.approx(5.0 - FOLLOWING.braking_mps2 * (lead + 0.2))
        go_on(car, over + 6 * TICK, 4.9)
        assert car.command(over + 6 * TICK)[1] == 0.0

    def test_a_new_trajectory_ends_the_braking_at_once(self) -> None:
        car = moving()
        late = START + NANOSECONDS
        go_on(car, late)
        assert car.command(late)[1] < 5.0
        taken(car.add_trajectory(trajectory(late, arc(0.0, 6.0))))
        assert car.command(late)[1] == pytest.approx(6.0) and not car.braking and car.fault == ""

    def test_stale_odometry_brakes_with_the_steering_held(self) -> None:
        car = moving(5.0, 0.1)
        held = car.command(START)[0]
        at = START + 250_000_000
        steering, speed = car.command(at)
        assert car.fault == "odom: 0.25 s old, limit 0.2 s"
        assert steering == held and speed == pytest.approx(5.0 - 4.0 * FOLLOWING.lead_s)

    def test_a_jump_of_the_pose_drops_what_was_planned(self) -> None:
        car = moving()
        fault = car.add_odometry(odometry(START + 20_000_000, x=4.0, speed=5.0))
        assert fault == ("odom: the pose jumped by 4 m in 0.02 s at 5 m/s; what was planned before is dropped")
        assert car.command(START + 20_000_000)[1] < 5.0
        assert car.fault == "planning/trajectory: no trajectory"
        fault = car.add_odometry(odometry(START + 40_000_000, x=4.1, yaw=1.5, speed=5.0))
        assert "jumped by 1.5 rad" in fault
        taken(car.add_trajectory(trajectory(START + 40_000_000, arc(0.0))))
        assert car.command(START + 40_000_000)[1] == pytest.approx(5.0)

    def test_a_trajectory_from_before_the_jump_cannot_be_placed(self) -> None:
        car = moving()
        assert car.add_odometry(odometry(START + 20_000_000, x=400.0, speed=5.0))
        taken(car.add_trajectory(trajectory(START + 10_000_000, arc(0.0))))
        assert car.command(START + 20_000_000)[1] < 5.0
        assert car.fault == "planning/trajectory: 0.01 s old, and no odometry tells where the vehicle was then"

    def test_a_gap_in_the_odometry_places_nothing(self) -> None:
        car = moving()
        taken(car.add_odometry(odometry(START + NANOSECONDS, x=5.0, speed=5.0)))
        taken(car.add_trajectory(trajectory(START + HALF, arc(0.0))))
        car.command(START + NANOSECONDS)
        assert "no odometry tells where the vehicle was" in car.fault

    def test_a_clock_that_went_back_starts_anew(self) -> None:
        car = moving()
        fault = car.add_odometry(odometry(START - 10 * NANOSECONDS))
        assert fault == "odom: stamps went back by 10 s; what was planned before is dropped"
        taken(car.add_trajectory(trajectory(START - 10 * NANOSECONDS, arc(0.0, 3.0))))
        assert car.command(START - 10 * NANOSECONDS)[1] == pytest.approx(3.0)

    def test_repeated_and_late_odometry_is_ignored(self) -> None:
        car = moving()
        taken(car.add_odometry(odometry(START + 20_000_000, x=0.1, speed=5.0)))
        before = car.command(START + 20_000_000)
        for stamp in (START + 20_000_000, START + 10_000_000):
            assert "not after the one before" in car.add_odometry(odometry(stamp, x=0.3, y=1.0))
        assert (car.command(START + 20_000_000) == before).all()

    def test_a_late_trajectory_is_ignored_and_one_of_the_same_stamp_replaces(self) -> None:
        car = moving()
        assert "before the one in force" in car.add_trajectory(trajectory(START - 1, arc(0.0, 9.0)))
        assert car.command(START)[1] == pytest.approx(5.0)
        taken(car.add_trajectory(trajectory(START, arc(0.0, 4.0))))
        assert car.command(START)[1] == pytest.approx(4.0)

    def test_a_trajectory_from_the_future(self) -> None:
        car = moving()
        taken(car.add_trajectory(trajectory(START + 2 * NANOSECONDS, arc(0.0))))
        car.command(START)
        assert car.fault == "planning/trajectory: stamped 2 s ahead of the clock"

    def test_a_trajectory_that_is_driven_is_braked(self) -> None:
        patient = dataclasses.replace(FOLLOWING, timeout_s=30.0)
        car = TrajectoryFollower(dataclasses.replace(CONTRACT, following=patient))
        taken(car.add_odometry(odometry(START, speed=5.0)))
        taken(car.add_trajectory(trajectory(START, arc(0.0))))
        go_on(car, START + 2 * NANOSECONDS)
        assert car.command(START + 2 * NANOSECONDS)[1] == pytest.approx(5.0)
        go_on(car, START + 3 * NANOSECONDS + 20_000_000)
        car.command(START + 3 * NANOSECONDS + 20_000_000)
        assert car.fault == "planning/trajectory: 3.02 s old, and its 7 points are driven"

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda m: setattr(m.points[3], "speed", float("nan")), "speed not finite"),
            (lambda m: setattr(m.points[1].pose.position, "y", float("inf")), "y not finite"),
            (lambda m: setattr(m.header, "frame_id", "map"), "frame 'map', expected the contract's 'base_link'"),
            (lambda m: setattr(m, "points", []), "without a single point"),
            (lambda m: setattr(m.points[2].time_from_start, "nanosec", 5), "point 2 is 1 s after the stamp, expected"),
        ],
    )  # fmt: skip
    def test_a_malformed_trajectory_changes_nothing(self, damage: Callable[[object], None], words: str) -> None:
        car, twin = moving(5.0, 0.03), moving(5.0, 0.03)
        message = messages.deserialize(ACTION.type, trajectory(START + TICK, arc(-0.1, 2.0)))
        damage(message)
        assert words in car.add_trajectory(serialize(ACTION.type, message))
        for one in (car, twin):
            go_on(one, START + TICK)
        assert (car.command(START + TICK) == twin.command(START + TICK)).all()

    @pytest.mark.parametrize(
        ("made", "words"),
        [
            (lambda: odometry(START + 20_000_000, x=float("nan")), "not finite"),
            (lambda: odometry(START + 20_000_000, speed=float("inf")), "not finite"),
            (lambda: odometry(START + 20_000_000, frame_id="map"), "frame 'map'"),
            (lambda: odometry(START + 20_000_000, frame=(np.zeros((3, 3)), np.zeros(3)))[:60], "do not decode"),
        ],
    )  # fmt: skip
    def test_malformed_odometry_changes_nothing(self, made: Callable[[], bytes], words: str) -> None:
        car = moving()
        assert words in car.add_odometry(made())
        assert car.odometry_ns == START
        assert car.command(START)[1] == pytest.approx(5.0)

    def test_bytes_that_are_no_message(self) -> None:
        car = moving()
        for data in (b"", b"\0\1\0\0", bytes(40)):
            assert car.add_trajectory(data) and car.add_odometry(data)
        assert car.command(START)[1] == pytest.approx(5.0)

    def test_one_row_says_to_brake_along_the_last_path(self) -> None:
        car = moving(5.0, 0.1)
        held = car.command(START)[0]
        for k in range(1, 9):
            at = START + k * TICK
            speed = max(0.0, 5.0 - 0.8 * k)
            pose = {"x": 0.01 * k, "speed": speed}
            for i in range(9, -1, -1):
                taken(car.add_odometry(odometry(at - i * 20_000_000, **pose)))
            taken(car.add_trajectory(trajectory(at, [[0.0, 0.0, 0.0, 0.0]])))
            steering, asked = car.command(at)
            assert car.fault == "" and car.braking
            begun = 5.0 - 0.8
            expected = begun - FOLLOWING.braking_mps2 * (FOLLOWING.lead_s + 0.2 * (k - 1))
            assert asked == pytest.approx(max(0.0, expected))
            assert steering == pytest.approx(held, rel=0.1)

    def test_a_reset_forgets_all(self) -> None:
        car = moving(5.0, 0.1)
        car.reset()
        assert car.odometry_ns is None and car.trajectory_ns is None
        assert car.command(START).tolist() == [0.0, 0.0]

    def test_a_contract_without_following_is_refused(self) -> None:
        with pytest.raises(ContractError, match="has no following"):
            TrajectoryFollower(RobotContract.load("vehicle"))
