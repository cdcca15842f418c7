"""The LiDAR against rays cast by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from test.core.driving.road import (
    TICK_NS,
    contract,
    decoded,
    scenario,
    spawn,
    ticks,
    town,
    user,
)
from vla_core.observation.messages import deserialize
from vla_core.sim.driving.layout import HEIGHT_M, LENGTH_M, REAR_OVERHANG_M, WIDTH_M, Pose, Solid, Surface
from vla_core.sim.driving.lidar import BEAMS, COLUMNS, NOISE_M, REACH_M, directions
from vla_core.sim.driving.mounts import MOUNTS
from vla_core.sim.driving.rays import cast, groups
from vla_core.sim.driving.scene import RAY_GROUP, REFLECTIVITY, build_scene, mujoco_module
from vla_core.sim.driving.simulation import DrivingSim

LIDAR = contract("lidar")
MOUNT = np.array(MOUNTS["lidar"][:3])
X, Y, Z, INTENSITY, TIME, RING = range(6)
GREY = (0.5, 0.5, 0.5)


def sweeps(sim: DrivingSim, count: int = 1, steering: float = 0.0, speed: float = 0.0) -> list[np.ndarray]:
    """The clouds (N, 6) of ``count`` ticks, two of each, in the contract's columns."""
    found = []
    for _ in range(count):
        ticks(sim, 1, steering, speed)
        found += decoded(sim.numbers(TICK_NS), LIDAR, "lidar")
    return found


def box_range(origin: np.ndarray, rays: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Ranges (N,) to an upright box by slabs, inf where it is missed."""
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (low - origin) / rays, (high - origin) / rays
    near, far = np.minimum(a, b).max(axis=1), np.maximum(a, b).min(axis=1)
    return np.where((far >= near) & (near > 0), near, np.inf)


def cylinder_range(origin: np.ndarray, rays: np.ndarray, place: np.ndarray, radius: float, top: float) -> np.ndarray:
    """Ranges (N,) to the side of an upright cylinder that stands on the ground, inf where it is missed."""
    offset = origin[:2] - place
    a, b = (rays[:, :2] ** 2).sum(axis=1), rays[:, :2] @ offset
    root = b**2 - a * (offset @ offset - radius**2)
    near = np.where(root >= 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
    z = origin[2] + near * rays[:, 2]
    return np.where((near > 0) & (z >= 0) & (z <= top), near, np.inf)


def test_every_point_is_where_a_ray_by_hand_ends() -> None:
    wall = Solid(kind="building", position=(20.0, 6.0, 4.0), heading=0.0, size=(8.0, 4.0, 8.0), colour=GREY)
    pole = Solid(
        kind="pole", position=(8.0, -5.0, 3.0), heading=0.3, size=(0.6, 0.6, 6.0), colour=GREY, shape="cylinder"
    )  # fmt: skip
    sim = DrivingSim(scenario(town(solids=[wall, pole])), LIDAR)
    cloud = sweeps(sim)[-1].astype(np.float64)
    rays = directions().reshape(-1, 3)
    with np.errstate(divide="ignore"):
        ground = np.where(rays[:, 2] < 0, -MOUNT[2] / rays[:, 2], np.inf)
    expected = np.minimum.reduce([
        ground,
        box_range(MOUNT, rays, np.array([16.0, 4.0, 0.0]), np.array([24.0, 8.0, 8.0])),
        cylinder_range(MOUNT, rays, np.array([8.0, -5.0]), 0.3, 6.0),
    ])  # fmt: skip
    points = cloud[:, :3]
    ranges = np.linalg.norm(points, axis=1)
    azimuth = np.arctan2(points[:, 1], points[:, 0])
    column = np.rint((np.pi - azimuth) / (2 * np.pi) * COLUMNS).astype(int) % COLUMNS
    match = column * BEAMS + cloud[:, RING].astype(int)  # which ray each point belongs to
    assert (np.linalg.norm(rays[match] - points / ranges[:, None], axis=1) < 1e-5).all()
    assert len(set(match.tolist())) == len(match)
    error = ranges - expected[match]
    edge = np.abs(error) > 0.15  # a hair beside a silhouette
    assert edge.mean() < 0.002
    assert np.std(error[~edge]) == pytest.approx(NOISE_M, rel=0.1)
    assert abs(np.mean(error[~edge])) < 0.005  # the tyres give by a fraction of a millimetre
    reachable = expected < REACH_M
    assert 0.01 < 1 - len(match) / reachable.sum() < 0.03  # lost points


@pytest.mark.parametrize("x", [0.0, REACH_M - 1, REACH_M + 1, 500.0])
def test_the_ground_is_everywhere(x: float) -> None:
    # Also further from the middle of the map than the LiDAR reaches.
    model = build_scene(scenario(town())).model
    data = mujoco_module().MjData(model)
    mujoco_module().mj_forward(model, data)
    rays = np.array([[0.6, 0.0, -0.8], [0.0, 0.0, -1.0], [0.0, 0.6, 0.8]])
    ids, ranges = cast(model, data, np.array([x, -x, 1.8]), rays, groups(RAY_GROUP), REACH_M)
    assert ranges == pytest.approx([2.25, 1.8, -1])
    assert ids.tolist() == [model.geom("plane").id] * 2 + [-1]


def test_columns() -> None:
    sim = DrivingSim(scenario(), LIDAR)
    first, second = sweeps(sim)
    assert len(first) > 0.6 * BEAMS * COLUMNS
    for cloud in (first, second):
        elevation = np.degrees(np.arctan2(cloud[:, Z], np.hypot(cloud[:, X], cloud[:, Y])))
        assert elevation == pytest.approx(-30 + cloud[:, RING] * 40 / 31, abs=1e-3)
        assert np.unique(cloud[:, TIME]) == pytest.approx([-0.08, -0.06, -0.04, -0.02, 0.0], abs=1e-6)
        assert (np.diff(cloud[:, TIME]) >= 0).all()
        assert (cloud[:, INTENSITY] > 0).all() and (cloud[:, INTENSITY] <= 1).all()
        azimuth = np.unwrap(np.arctan2(cloud[:, Y], cloud[:, X]).astype(np.float64))
        assert azimuth[0] > 3.1 and azimuth[-1] < -3.0 and np.diff(azimuth).max() < 1e-4  # clockwise, from the back
    assert not np.array_equal(first, second)  # noise


def test_intensity_tells_paint_from_asphalt_and_falls_with_incidence() -> None:
    patch = (8.0, 12.0, -2.0, 2.0, Surface.MARKING)
    wall = Solid(kind="building", position=(-15.0, 0.0, 3.0), heading=0.0, size=(2.0, 40.0, 6.0), colour=GREY)
    sim = DrivingSim(scenario(town([patch], [wall])), LIDAR)
    cloud = sweeps(sim)[-1]
    x, y, z = (cloud[:, :3] + MOUNT).T
    ground = np.abs(z) < 0.1
    painted = ground & (x > 8.3) & (x < 11.7) & (np.abs(y) < 1.7)
    asphalt = ground & (np.abs(y) < 3) & (x > 3) & ~((x > 7.5) & (x < 12.5))
    assert cloud[painted, INTENSITY].min() > 2 * cloud[asphalt, INTENSITY].max()
    # lambertian but for a quarter: rho (1/4 + 3/4 cos), with the cosine of a wall across x
    face = (np.abs(x + 14.0) < 0.1) & (z > 0.2)
    cosine = np.abs(cloud[face, X]) / np.linalg.norm(cloud[face, :3], axis=1)
    assert cloud[face, INTENSITY] == pytest.approx(REFLECTIVITY["building"] * (0.25 + 0.75 * cosine), rel=0.01)
    assert face.sum() > 200


def test_a_moving_sensor_skews_its_cloud() -> None:
    """A wall ahead looks bent by the way of a sweep, and straight once each point is moved by its time."""
    wall = Solid(kind="building", position=(61.0, 0.0, 3.0), heading=0.0, size=(2.0, 90.0, 6.0), colour=GREY)
    sim = DrivingSim(scenario(town(solids=[wall]), start=Pose(x=0.0, y=0.0, heading=0.0)), LIDAR)
    sweeps(sim, 16, speed=8.0)
    assert sim.ego.speed_mps > 7.5
    cloud = sweeps(sim, speed=8.0)[-1]
    on = cloud[(cloud[:, Z] > -1.3) & (cloud[:, X] > 5)]
    expected = 60.0 - sim.ego.pose.x - MOUNT[0]
    assert np.ptp(on[:, X]) > 0.3
    corrected = on[:, X] + on[:, TIME] * sim.ego.speed_mps
    assert np.abs(corrected - expected).max() < 0.15
    assert corrected.std() < 0.03


def test_it_sees_others_and_never_its_own_vehicle() -> None:
    sim = DrivingSim(scenario(spawns=[spawn("bus"), spawn("pedestrian")]), LIDAR)
    sim.set_users([user(0, "bus", 15.0, 0.0), user(1, "pedestrian", 6.0, 4.0)])
    points = sweeps(sim)[-1][:, :3] + MOUNT
    own = (points[:, 0] > -REAR_OVERHANG_M) & (points[:, 0] < LENGTH_M - REAR_OVERHANG_M)
    own &= (np.abs(points[:, 1]) < WIDTH_M / 2) & (points[:, 2] < HEIGHT_M) & (points[:, 2] > 0.1)
    assert not own.any()
    high = points[points[:, 2] > 0.3]
    rear = high[np.abs(high[:, 0] - 9.5) < 0.15]
    assert len(rear) > 100 and np.abs(rear[:, 1]).max() < 1.4
    person = high[np.hypot(high[:, 0] - 6.0, high[:, 1] - 4.0) < 0.5]
    assert len(person) > 20
    assert len(high) == len(rear) + len(person) + (np.abs(high[:, 0] - 15.0) < 5.4).sum()  # and nothing else
    sim.set_users([])
    assert not (sweeps(sim)[-1][:, Z] + MOUNT[2] > 0.3).any()


def test_layout_of_the_message() -> None:
    sim = DrivingSim(scenario(), LIDAR)
    ticks(sim, 1)
    messages = [m for m in sim.numbers(7 * TICK_NS) if m.topic == "lidar/points"]
    assert [m.stamp_ns for m in messages] == [7 * TICK_NS - 100_000_000, 7 * TICK_NS]
    cloud = deserialize(messages[0].type, messages[0].data)
    assert cloud.header.frame_id == "lidar"
    assert [(f.name, f.offset, f.datatype, f.count) for f in cloud.fields] == [
        ("x", 0, 7, 1), ("y", 4, 7, 1), ("z", 8, 7, 1), ("intensity", 12, 7, 1), ("time", 16, 7, 1), ("ring", 20, 4, 1),
    ]  # fmt: skip
    assert cloud.point_step == 22 and cloud.row_step == 22 * cloud.width == len(cloud.data) and cloud.height == 1
    assert math.isclose(cloud.width, len(decoded(messages, LIDAR, "lidar")[0]))
