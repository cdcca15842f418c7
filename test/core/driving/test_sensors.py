"""The simulated vehicle's messages: what, when, in which frame, and the same again for the same seed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from test.core.driving.road import (
    TICK_NS,
    TICK_S,
    contract,
    decoded,
    scenario,
    spawn,
    ticks,
    town,
    user,
)
from vla_core.contract import RobotContract
from vla_core.observation.decode import decode
from vla_core.observation.messages import Message, deserialize, header_stamp_ns
from vla_core.sim.base import SimulationError
from vla_core.sim.driving.layout import Pose, Solid
from vla_core.sim.driving.mounts import BASE, CAMERAS, FRAMES, MOUNTS
from vla_core.sim.driving.simulation import DrivingSim

WHOLE = RobotContract.load("driving")
MOTION = contract("imu", "motion")
GREY = (0.5, 0.5, 0.5)


def world() -> dict[str, object]:
    wall = Solid(kind="building", position=(30.0, 12.0, 4.0), heading=0.3, size=(20.0, 6.0, 8.0), colour=GREY)
    return {"place": town(solids=[wall]), "spawns": [spawn("car"), spawn("pedestrian")]}


def drive(asked: RobotContract, seed: int = 3, count: int = 6, size: int = 32) -> list[Message]:
    """All messages of a short drive past others."""
    sim = DrivingSim(scenario(**world(), seed=seed), asked, size)  # type: ignore[arg-type]
    sim.set_users([user(0, "car", 20.0, 2.0, math.pi), user(1, "pedestrian", 15.0, -5.0)])
    found = []
    for tick in range(count):
        x = 20.0 - 1.5 * tick
        sim.step(0.1, 5.0, TICK_S, [user(0, "car", x, 2.0, math.pi), user(1, "pedestrian", 15.0, -5.0)])
        found += sim.numbers((tick + 1) * TICK_NS) + sim.pictures((tick + 1) * TICK_NS)
    sim.close()
    return found


def test_a_tick_brings_every_stream_at_its_rate_and_the_last_at_its_end() -> None:
    sim = DrivingSim(scenario(), WHOLE)
    ticks(sim, 1)
    sim.numbers(TICK_NS)
    ticks(sim, 1)
    now = 50 * TICK_NS
    found = sim.numbers(now) + sim.pictures(now)
    topics = {stream.topic: stream for stream in WHOLE.observations.values() if not stream.latched}
    assert {message.topic for message in found} == set(topics)
    for topic, stream in topics.items():
        mine = [message for message in found if message.topic == topic]
        assert stream.period_ns is not None
        expected = [now - i * stream.period_ns for i in reversed(range(TICK_NS // stream.period_ns))]
        assert [message.stamp_ns for message in mine] == expected
        for message in mine:
            assert message.type == stream.type
            assert header_stamp_ns(message.type, message.data) == message.stamp_ns
            value = deserialize(message.type, message.data)
            assert value.header.frame_id == stream.frame_id
            decode(stream, message.data)
    assert sim.numbers(now) == []


def test_a_step_of_any_length_keeps_the_rates() -> None:
    sim, stamps = DrivingSim(scenario(), WHOLE, 16), []
    for step in range(1, 21):
        sim.step(0.0, 3.0, 0.05)
        stamps += [(message.topic, message.stamp_ns) for message in sim.numbers(step * 50_000_000)]
    for topic, period in {"imu/data": 10, "odom": 20, "lidar/points": 100, "radar/back/points": 100}.items():
        mine = [stamp // 1_000_000 for name, stamp in stamps if name == topic]
        assert mine == list(range(period, 1001, period))


def test_the_same_seed_and_commands_give_the_same_bytes() -> None:
    first, again, other = drive(WHOLE), drive(WHOLE), drive(WHOLE, seed=4)
    assert first == again
    assert len(first) == len(other)
    different = {a.topic for a, b in zip(first, other, strict=False) if a.data != b.data}
    assert {"lidar/points", "radar/front/points", "imu/data", "odom"} <= different


def test_a_sensor_left_out_changes_no_other() -> None:
    few = contract("lidar", "imu", "front")
    asked = {stream.topic for stream in few.observations.values()}
    whole = drive(WHOLE)
    assert drive(few) == [message for message in whole if message.topic in asked]
    assert len(asked) == 4


def test_only_what_is_asked_for_is_made() -> None:
    sim = DrivingSim(scenario(), contract("front"))
    ticks(sim, 2)
    assert {message.topic for message in sim.numbers(0)} == {"odom"}
    assert [message.topic for message in sim.pictures(0)] == ["camera/front/image_raw"]
    assert DrivingSim(scenario(), contract("lidar")).pictures(0) == []


def test_imu_feels_gravity_and_the_turn() -> None:
    sim = DrivingSim(scenario(), MOTION)
    ticks(sim, 10)
    rest = np.array(decoded(sim.numbers(0), MOTION, "imu"))
    assert rest.mean(axis=0)[3:] == pytest.approx([0, 0, 9.81], abs=0.2)  # what holds it points up
    assert rest.mean(axis=0)[:3] == pytest.approx([0, 0, 0], abs=0.01)
    assert (rest.std(axis=0) > 1e-3).all() and (rest.std(axis=0)[3:] < 0.2).all()
    for steering in (0.25, -0.25):
        ticks(sim, 25, steering, 6.0)
        sim.numbers(0)
        ticks(sim, 10, steering, 6.0)
        turn = np.array(decoded(sim.numbers(0), MOTION, "imu")).mean(axis=0)
        rate = 6.0 * math.tan(steering) / 2.8
        assert turn[2] == pytest.approx(rate, rel=0.03, abs=0.01)
        assert turn[4] == pytest.approx(6.0 * rate, rel=0.05, abs=0.2)  # towards the centre
    fresh = DrivingSim(scenario(), MOTION)
    fresh.step(0.0, 8.0, TICK_S)
    fresh.numbers(0)
    ticks(fresh, 5, 0.0, 8.0)
    assert np.array(decoded(fresh.numbers(0), MOTION, "imu")).mean(axis=0)[3] == pytest.approx(3.0, abs=0.3)


def test_odometry_follows_drifts_and_stands_still() -> None:
    sim = DrivingSim(scenario(start=Pose(x=5.0, y=-1.0, heading=0.9)), MOTION)
    ticks(sim, 3)
    rest = np.array(decoded(sim.numbers(0), MOTION, "odom"))
    assert (rest == rest[0]).all() and rest[0, :7].tolist() == [0, 0, 0, 0, 0, 0, 1]
    turns = [0.1 * math.sin(tick / 12) for tick in range(75)]
    found, truth, rates = [], [], []
    for steering in turns:
        ticks(sim, 1, steering, 8.0)
        found.append(decoded(sim.numbers(0), MOTION, "odom")[-1])
        rates.append(sim.ego.yaw_rate)
        pose = sim.ego.pose
        dx, dy = pose.x - 5.0, pose.y + 1.0
        truth.append((dx * math.cos(0.9) + dy * math.sin(0.9), dy * math.cos(0.9) - dx * math.sin(0.9)))
    error = np.hypot(*(np.array(found)[:, :2] - truth).T)
    assert 0.05 < error[-1] < 8.0  # of about 100 m
    assert error[5] < 0.2
    assert found[-1][7] == pytest.approx(sim.ego.speed_mps, rel=0.04)
    assert np.array(found)[:, 8] == pytest.approx(np.array(rates), abs=0.08)
    assert np.mean(found, axis=0)[8] == pytest.approx(np.mean(rates), abs=0.01)
    last = np.array(found)[-1, 3:7]
    assert np.linalg.norm(last) == pytest.approx(1.0)
    assert 2 * math.atan2(last[2], last[3]) == pytest.approx(sim.ego.pose.heading - 0.9, abs=0.1)


def test_each_vehicle_drifts_in_its_own_way() -> None:
    ends = []
    for seed in range(4):
        sim = DrivingSim(scenario(seed=seed), MOTION)
        ticks(sim, 20, 0.0, 8.0)
        ends.append(decoded(sim.numbers(0), MOTION, "odom")[-1][0] - sim.ego.pose.x)
    assert np.std(ends) > 0.02


def test_transforms_are_the_mounts() -> None:
    (message,) = DrivingSim(scenario(), MOTION).statics(3)
    assert (message.topic, message.type) == ("/tf_static", "tf2_msgs/msg/TFMessage")
    found = deserialize(message.type, message.data).transforms
    assert {t.child_frame_id for t in found} == set(FRAMES.values())
    frames = {frame: name for name, frame in FRAMES.items()}
    for t in found:
        assert t.header.frame_id == BASE
        v, q = t.transform.translation, t.transform.rotation
        assert (v.x, v.y, v.z, q.x, q.y, q.z, q.w) == MOUNTS[frames[t.child_frame_id]]


def test_ground_truth() -> None:
    sim = DrivingSim(scenario(spawns=[spawn("bus"), spawn("car")], start=Pose(x=1.0, y=2.0, heading=0.5)), MOTION)
    sim.set_users([user(1, "car", 9.0, 4.0, 0.3)])
    odometry, objects = sim.ground_truth(77)
    truth = deserialize(odometry.type, odometry.data)
    assert (odometry.topic, truth.header.frame_id, truth.child_frame_id) == ("ground_truth/odom", "map", BASE)
    assert truth.pose.pose.position.x == pytest.approx(1.0)
    assert truth.pose.pose.orientation.z == pytest.approx(math.sin(0.25))
    (marker,) = deserialize(objects.type, objects.data).markers
    assert (objects.topic, marker.ns, marker.id, marker.type) == ("ground_truth/objects", "car", 1, 1)
    assert (marker.pose.position.x, marker.pose.position.y, marker.pose.position.z) == (9.0, 4.0, 0.75)
    assert (marker.scale.x, marker.scale.y, marker.scale.z) == (4.4, 1.8, 1.5)


def test_black_pictures_are_black_and_calibrated() -> None:
    sim = DrivingSim(scenario(), WHOLE, 24, black=True)
    found = sim.pictures(5)
    assert len(found) == 2 * len(CAMERAS)
    for name in CAMERAS:
        (picture,) = decoded(found, WHOLE, name)
        assert picture.shape == (24, 24, 3) and not picture.any()
        (calibration,) = decoded(found, WHOLE, f"{name}_info")
        assert (calibration.width, calibration.height, calibration.model) == (24, 24, "plumb_bob")


def test_contracts_that_ask_for_what_is_not_there() -> None:
    def changed(name: str, **changes: object) -> RobotContract:
        stream = dataclasses.replace(WHOLE.observations["front"], **changes)  # type: ignore[arg-type]
        return dataclasses.replace(WHOLE, observations=WHOLE.observations | {name: stream})

    with pytest.raises(SimulationError, match=r"no 'roof' of type sensor_msgs/msg/Image; choices: back, back_info"):
        DrivingSim(scenario(), changed("roof", topic="roof/image_raw", frame_id=None))
    with pytest.raises(SimulationError, match=r"'front' is in the frame 'camera_front_optical_frame' here.*'camera'"):
        DrivingSim(scenario(), changed("front", frame_id="camera"))
