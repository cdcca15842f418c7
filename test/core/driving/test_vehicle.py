"""The simulated vehicle against a kinematic bicycle, braking distances and what it runs into."""

from __future__ import annotations

import math

import numpy as np
import pytest

from test.core.driving.road import TICK_S, contract, scenario, spawn, ticks, town, user
from vla_core.sim.base import SimulationError
from vla_core.sim.driving.layout import LENGTH_M, REAR_OVERHANG_M, WHEELBASE_M, Solid
from vla_core.sim.driving.scene import Touched
from vla_core.sim.driving.simulation import DrivingSim
from vla_core.sim.driving.vehicle import Actuators, ackermann

BARE = contract()
NOSE_M = LENGTH_M - REAR_OVERHANG_M
PROMPT = Actuators(delay_s=0.0, steering_lag_s=0.0025, steering_rate=100.0, force_lag_s=0.0025)


def drive(**options: object) -> DrivingSim:
    return DrivingSim(scenario(**options), BARE)  # type: ignore[arg-type]


def circle(points: np.ndarray) -> tuple[float, float]:
    """Radius of the circle closest to points (N, 2), and how far they are from it at most."""
    system = np.column_stack([2 * points, np.ones(len(points))])
    x, y, rest = np.linalg.lstsq(system, (points**2).sum(axis=1), rcond=None)[0]
    radius = math.sqrt(rest + x * x + y * y)
    return radius, float(np.abs(np.hypot(*(points - (x, y)).T) - radius).max())


@pytest.mark.parametrize(("steering", "speed"), [(0.1, 2.0), (0.1, 8.0), (-0.3, 5.0), (0.6, 2.0), (-0.6, 4.0)])
def test_radius_of_a_turn(steering: float, speed: float) -> None:
    sim = drive()
    ticks(sim, 25, steering, speed)
    points = []
    for _ in range(40):
        ticks(sim, 1, steering, speed)
        points.append((sim.ego.pose.x, sim.ego.pose.y))
    radius, error = circle(np.array(points))
    assert radius == pytest.approx(WHEELBASE_M / math.tan(abs(steering)), rel=0.05)
    assert error < 0.05
    assert sim.ego.speed_mps == pytest.approx(speed, rel=0.02)
    assert sim.ego.yaw_rate == pytest.approx(math.copysign(sim.ego.speed_mps / radius, steering), rel=0.03)


def test_front_wheels_point_around_one_centre() -> None:
    left, right = ackermann(0.5)
    centre = WHEELBASE_M / math.tan(0.5)
    assert math.tan(left) == pytest.approx(WHEELBASE_M / (centre - 0.8))
    assert math.tan(right) == pytest.approx(WHEELBASE_M / (centre + 0.8))
    assert ackermann(-0.5) == pytest.approx((-right, -left))
    assert ackermann(0.0) == (0.0, 0.0)


def test_it_is_a_bicycle_on_a_winding_way() -> None:
    """Against the bicycle's equations, integrated over the steering and the speed that it really had."""
    sim = drive()
    ticks(sim, 20, 0.0, 6.0)
    x, y, heading = sim.ego.pose.x, sim.ego.pose.y, sim.ego.pose.heading
    for step in range(1000):
        steering, speed = 0.3 * math.sin(step * 0.01), 5.0 + 3.0 * math.sin(step * 0.004)
        before = sim.ego
        sim.step(steering, speed, 0.01)
        rolled = (before.speed_mps + sim.ego.speed_mps) / 2 * 0.01
        turned = rolled * math.tan((before.steering + sim.ego.steering) / 2) / WHEELBASE_M
        x, y = x + rolled * math.cos(heading + turned / 2), y + rolled * math.sin(heading + turned / 2)
        heading += turned
    assert math.hypot(sim.ego.pose.x - x, sim.ego.pose.y - y) < 0.5  # of 50 m
    assert abs(math.remainder(sim.ego.pose.heading - heading, 2 * math.pi)) < 0.02


def test_straight_on_is_straight() -> None:
    sim = drive()
    ticks(sim, 50, 0.0, 8.0)
    assert sim.ego.pose.x > 60
    assert abs(sim.ego.pose.y) < 0.01
    assert abs(sim.ego.pose.heading) < 1e-3


@pytest.mark.parametrize("speed", [2.0, 5.0, 8.0])
def test_braking_distance(speed: float) -> None:
    """v^2 / 2a, and with a delay what is driven until the brakes work."""
    way = {}
    for name, actuators in (("prompt", PROMPT), ("late", Actuators(delay_s=0.1, force_lag_s=0.0025))):
        sim = DrivingSim(scenario(), BARE, actuators=actuators)
        ticks(sim, 30, 0.0, speed)
        start, full = sim.ego.pose.x, sim.ego.speed_mps
        assert full == pytest.approx(speed, rel=0.01)
        ticks(sim, 15, 0.0, 0.0)
        assert abs(sim.ego.speed_mps) < 0.01
        way[name] = sim.ego.pose.x - start
    # 5 1/s of gain make the last 1.2 m/s softer than 6 m/s2: v (1/5 - 1/10) more.
    assert way["prompt"] == pytest.approx(speed**2 / 12 + 0.12, rel=0.15)
    assert way["late"] - way["prompt"] == pytest.approx(0.1 * speed, rel=0.1)


def test_it_gathers_speed_as_told() -> None:
    sim = drive()
    ticks(sim, 1)
    speeds = []
    for _ in range(12):
        ticks(sim, 1, 0.0, 8.0)
        speeds.append(sim.ego.speed_mps)
        assert sim.ego.acceleration < 3.05
    assert np.diff(speeds) == pytest.approx(3.0 * TICK_S, rel=0.02)


def test_steering_comes_late_slowly_and_without_overshoot() -> None:
    sim = drive()
    angles = []
    for _ in range(100):
        sim.step(0.4, 0.0, 0.01)
        angles.append(sim.ego.steering)
    steps = np.diff([0.0, *angles])
    assert max(angles[:6]) == 0.0 < angles[7]  # 60 ms
    assert steps.max() == pytest.approx(0.9 * 0.01, rel=1e-6)
    assert (steps >= 0).all()
    assert angles[-1] == pytest.approx(0.4, abs=0.002)


def test_at_rest_it_rests() -> None:
    sim = drive()
    start = sim.ego.pose
    ticks(sim, 25)
    ticks(sim, 25, 0.5)
    assert math.hypot(sim.ego.pose.x - start.x, sim.ego.pose.y - start.y) < 1e-3
    assert abs(sim.ego.pose.heading - start.heading) < 1e-3
    assert abs(sim.ego.speed_mps) < 1e-6


def test_tyres_hold_no_more_than_they_can() -> None:
    sim = drive()
    ticks(sim, 35, 0.0, 14.0)
    worst = 0.0
    for _ in range(200):
        sim.step(0.6, 14.0, 0.01)
        worst = max(worst, abs(sim.ego.speed_mps * sim.ego.yaw_rate))
    sliding = sim.ego
    # A bicycle would turn with 14^2 tan(0.6) / 2.8 = 48 m/s2; friction of 0.9 allows 8.8, peaks of sliding aside.
    assert worst < 15
    assert math.isfinite(sliding.pose.x)
    ticks(sim, 40)
    assert abs(sim.ego.speed_mps) < 0.01


def test_a_wall_stops_it() -> None:
    wall = Solid(kind="building", position=(30.0, 0.0, 3.0), heading=0.0, size=(2.0, 20.0, 6.0), colour=(0.5, 0.5, 0.5))
    sim = drive(place=town(solids=[wall]))
    front = []
    for _ in range(40):
        ticks(sim, 1, 0.0, 8.0)
        front.append(sim.ego.pose.x + NOSE_M)
        if front[-1] < 28.8:
            assert sim.touched() == set()
    assert sim.touched() == {Touched("building", 0)}
    assert max(front) < 29.2
    assert abs(sim.ego.speed_mps) < 0.2
    assert sim.ego.pose.heading == pytest.approx(0.0, abs=0.05)
    ticks(sim, 5, 0.0, 0.0)
    sim.touched()
    ticks(sim, 1, 0.0, -2.0)
    ticks(sim, 10, 0.0, -2.0)
    sim.touched()
    ticks(sim, 1, 0.0, -2.0)
    assert sim.touched() == set()  # it has backed out


def test_a_person_is_struck_and_gives_way() -> None:
    sim = drive(spawns=[spawn("pedestrian"), spawn("car")])
    sim.set_users([user(0, "pedestrian", 20.0, 0.0), user(1, "car", 20.0, 6.0)])
    touched: set[Touched] = set()
    for _ in range(30):
        ticks(sim, 1, 0.0, 6.0)
        touched |= sim.touched()
    assert touched == {Touched("pedestrian", 0)}
    assert sim.ego.pose.x > 22


def test_a_bus_pushes_it_and_nothing_explodes() -> None:
    sim = drive(spawns=[spawn("bus")])
    sim.set_users([user(0, "bus", -12.0, 0.3)])
    touched, fastest = set(), 0.0
    for tick in range(1, 26):
        sim.step(0.0, 0.0, TICK_S, [user(0, "bus", -12.0 + tick * TICK_S * 3.0, 0.3, speed=3.0)])
        touched |= sim.touched()
        fastest = max(fastest, abs(sim.ego.speed_mps))
    assert touched == {Touched("bus", 0)}
    assert 1.0 < fastest < 6.0
    assert sim.ego.pose.x > 1.0
    assert abs(sim._data.qpos[2]) < 0.3  # on the ground


def test_the_same_commands_give_the_same_drive() -> None:
    ends = []
    for _ in range(2):
        sim = drive(spawns=[spawn("car")])
        sim.set_users([user(0, "car", 15.0, 1.5, 0.4)])
        for tick in range(30):
            ticks(sim, 1, 0.2 * math.sin(tick), 5.0)
        ends.append((sim.ego, sim.touched()))
    assert ends[0] == ends[1]


def test_commands_that_make_no_sense() -> None:
    sim = drive()
    with pytest.raises(SimulationError, match=r"not finite: nan, 1.0"):
        sim.step(math.nan, 1.0, TICK_S)
    for duration in (0.0, 0.015, -0.1):
        with pytest.raises(SimulationError, match=rf"expected a multiple of 0.01 s, found {duration}"):
            sim.step(0.0, 1.0, duration)
