"""Radars against velocities and places that are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from test.core.driving.road import TICK_NS, TICK_S, contract, decoded, scenario, spawn, ticks, town, user
from vla_core.sim.driving.layout import Pose, RoadUser, Solid
from vla_core.sim.driving.mounts import MOUNTS, rotation
from vla_core.sim.driving.radar import BEAMS, CLUTTER, MAX_RETURNS
from vla_core.sim.driving.simulation import DrivingSim

RADARS = contract(*BEAMS)
X, Y, Z, VELOCITY, RCS = range(5)
GREY = (0.5, 0.5, 0.5)


def scans(sim: DrivingSim, name: str, count: int = 1, steering: float = 0.0, speed: float = 0.0,
          users: Sequence[Sequence[RoadUser]] = ()) -> np.ndarray:  # fmt: skip
    """The returns (N, 5) of one radar over ``count`` ticks."""
    found = []
    for tick in range(count):
        sim.step(steering, speed, TICK_S, users[tick] if users else sim.users)
        found += decoded(sim.numbers(TICK_NS), RADARS, name)
    return np.concatenate(found)


def on_map(points: np.ndarray, name: str, pose: Pose) -> np.ndarray:
    """Places (N, 2) of returns in the map."""
    mount = MOUNTS[name]
    base = points[:, :3] @ rotation(mount).T + mount[:3]
    cosine, sine = math.cos(pose.heading), math.sin(pose.heading)
    return base[:, :2] @ np.array([[cosine, sine], [-sine, cosine]]) + (pose.x, pose.y)


@pytest.mark.parametrize(("own", "other"), [(0.0, 6.0), (6.0, 0.0), (6.0, 2.0), (3.0, 8.0), (5.0, -3.0)])
def test_velocity_is_that_of_moving_away(own: float, other: float) -> None:
    sim = DrivingSim(scenario(spawns=[spawn("car")]), RADARS)
    sim.set_users([user(0, "car", 45.0, 0.0)])
    scans(sim, "radar_front", 12, speed=own)
    where = [[user(0, "car", 45.0 + other * TICK_S * (tick + 1), 0.0)] for tick in range(5)]
    found = scans(sim, "radar_front", 5, speed=own, users=where)
    car = found[(np.abs(found[:, Y]) < 1.2) & (np.abs(found[:, RCS] - 10.0) < 12)]
    assert len(car) > 10
    assert sim.ego.speed_mps == pytest.approx(own, abs=0.05)
    assert np.median(car[:, VELOCITY]) == pytest.approx(other - own, abs=0.1)


def test_a_crossing_target_comes_and_goes() -> None:
    """Sideways to a standing radar: the velocity is the projection on the line of sight."""
    sim = DrivingSim(scenario(spawns=[spawn("truck")]), RADARS)
    where = [[user(0, "truck", 2.4 - 16.0 + 5.0 * TICK_S * tick, 12.0)] for tick in range(40)]
    sim.set_users(where[0])
    found = scans(sim, "radar_front_left", 39, users=where[1:])
    truck = found[found[:, RCS] > 6]
    sight = truck[:, :3] / np.linalg.norm(truck[:, :3], axis=1)[:, None]
    # The radar's x is the vehicle's left, so the vehicle's forward is minus its y.
    error = truck[:, VELOCITY] - 5.0 * -sight[:, 1]
    assert len(truck) > 200
    assert np.median(np.abs(error)) < 0.2
    assert truck[:, VELOCITY].min() < -2.0 and truck[:, VELOCITY].max() > 2.0


def test_what_stands_moves_with_the_sensor_of_a_turning_vehicle() -> None:
    """Velocity of a static return = -(v + w x r) on the line of sight, at each mount."""
    poles = [
        Solid(kind="pole", position=(25 * math.cos(a), 9 + 25 * math.sin(a), 3.0), heading=0.0, size=(0.8, 0.8, 6.0),
              colour=GREY, shape="cylinder") for a in np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ]  # fmt: skip
    sim = DrivingSim(scenario(town(solids=poles)), RADARS)
    ticks(sim, 20, 0.3, 5.0)
    sim.numbers(0)
    sim.step(0.3, 5.0, TICK_S)
    messages = sim.numbers(TICK_NS)
    compared = 0
    for name in BEAMS:
        newest = decoded(messages, RADARS, name)[-1].astype(np.float64)
        axes, arm = rotation(MOUNTS[name]), np.array(MOUNTS[name][:3])
        velocity = np.array([sim.ego.speed_mps, 0, 0]) + np.cross([0, 0, sim.ego.yaw_rate], arm)
        sight = newest[:, :3] / np.linalg.norm(newest[:, :3], axis=1)[:, None]
        places = on_map(newest, name, sim.ego.pose)
        gaps = np.linalg.norm(places[:, None] - [pole.position[:2] for pole in poles], axis=2).min(axis=1)
        real = gaps < 0.9
        error = newest[real, VELOCITY] + (sight[real] @ axes.T) @ velocity
        assert np.median(np.abs(error)) < 0.2
        compared += int(real.sum())
    assert compared > 20


@pytest.mark.parametrize("name", BEAMS)
def test_view_reach_clutter_and_columns(name: str) -> None:
    asked = contract(name)
    sim = DrivingSim(scenario(), asked)
    found, counts = [], []
    for _ in range(40):
        ticks(sim, 1)
        for scan in decoded(sim.numbers(TICK_NS), asked, name):
            found.append(scan)
            counts.append(len(scan))
    returns = np.concatenate(found)  # nothing is there: all are false
    assert np.mean(counts) == pytest.approx(CLUTTER, abs=0.7)
    beam = BEAMS[name]
    azimuth = np.degrees(np.arctan2(returns[:, Y], returns[:, X]))
    assert np.abs(azimuth).max() < beam.half_deg + 3
    assert np.abs(azimuth).max() > 0.7 * beam.half_deg
    assert np.linalg.norm(returns[:, :3], axis=1).max() < beam.reach_m + 1


def test_large_things_are_seen_often_and_bright_and_all_are_missed_at_times() -> None:
    sim = DrivingSim(scenario(spawns=[spawn("bus"), spawn("pedestrian")]), RADARS)
    sim.set_users([user(0, "bus", 30.0, 3.0), user(1, "pedestrian", 30.0, -3.0)])
    seen: dict[str, list[np.ndarray]] = {"bus": [], "pedestrian": []}
    for _ in range(150):
        ticks(sim, 1)
        for scan in decoded(sim.numbers(TICK_NS), RADARS, "radar_front"):
            assert len(scan) <= MAX_RETURNS + 10
            place = on_map(scan, "radar_front", sim.ego.pose)
            seen["bus"].append(scan[(np.abs(place[:, 0] - 30) < 6.5) & (np.abs(place[:, 1] - 3) < 2)])
            seen["pedestrian"].append(scan[np.hypot(place[:, 0] - 30, place[:, 1] + 3) < 1.2])
    strong, weak = (np.concatenate(seen[kind]) for kind in ("bus", "pedestrian"))
    assert np.median(strong[:, RCS]) - np.median(weak[:, RCS]) > 12
    assert len(strong) > 2 * len(weak) > 300
    for scans_of in seen.values():
        assert 0.01 < np.mean([len(scan) == 0 for scan in scans_of]) < 0.15


def test_a_crowd_of_returns_is_cut_to_the_most_that_a_scan_holds() -> None:
    cars = [spawn("car") for _ in range(30)]
    sim = DrivingSim(scenario(spawns=cars), RADARS)
    sim.set_users([user(i, "car", 12.0 + 4.0 * (i // 10), -13.5 + 3.0 * (i % 10), math.pi / 2) for i in range(30)])
    ticks(sim, 1)
    scan = decoded(sim.numbers(TICK_NS), RADARS, "radar_front")[-1]
    assert MAX_RETURNS - 10 < len(scan) <= MAX_RETURNS + 10
