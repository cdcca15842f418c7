"""Sensors of a differential-drive robot through rclpy, live and from a bag of the same bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import Quaternion, Vector3
from nav_msgs.msg import Odometry
from sensor_msgs.msg import CompressedImage, Imu, PointCloud2, PointField
from std_msgs.msg import Header, String

from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.data.bag import BagWriter, read
from vla_core.observation.builder import CloudSpec, ImageSize, Observation, ObservationBuilder, ObservationSpec
from vla_core.observation.image import encode_jpeg
from vla_core.observation.messages import header_stamp_ns
from vla_ros.bridge import message_class, stream_qos, subscribe_stream

from .conftest import Ros

START_NS = 1_700_000_000 * NANOSECONDS
SPEC = ObservationSpec(
    images={"front": ImageSize(height=24, width=32)}, state=("odom",), instruction="instruction",
    clouds={"lidar": CloudSpec(max_points=50, ego_motion="odom")}, sequences=("imu",), history=3,
)  # fmt: skip


def sensor_messages(contract: RobotContract) -> list[tuple[str, Any]]:
    """Half a second of (stream, message), each as its rclpy class."""
    frames = {name: stream.frame_id or "" for name, stream in contract.observations.items()}
    rng = np.random.default_rng(0)

    def header(name: str, stamp_ns: int) -> Header:
        seconds, nanoseconds = divmod(START_NS + stamp_ns, NANOSECONDS)
        return Header(stamp=Time(sec=seconds, nanosec=nanoseconds), frame_id=frames[name])

    found: list[tuple[str, Any]] = [("instruction", String(data="drive to the door"))]
    fields = [PointField(name=n, offset=4 * k, datatype=7, count=1) for k, n in enumerate(("x", "y", "z", "intensity"))]
    for k in range(50):
        at = k * NANOSECONDS // 100
        found.append(("imu", Imu(header=header("imu", at), angular_velocity=Vector3(x=0.1 * k, y=1.0, z=-1.0))))
        if k % 2 == 0:
            odometry = Odometry(header=header("odom", at), child_frame_id="base_link")
            odometry.pose.pose.position.x = 0.05 * k
            odometry.pose.pose.orientation = Quaternion(z=np.sin(0.01 * k), w=np.cos(0.01 * k))
            found.append(("odom", odometry))
        if k % 10 == 0:
            points = rng.random((80, 4), dtype=np.float32)
            found.append(("lidar", PointCloud2(
                header=header("lidar", at), height=1, width=80, fields=fields, point_step=16, row_step=1280,
                is_dense=True, data=points.tobytes(),
            )))  # fmt: skip
        if k % 5 == 0:
            jpeg = encode_jpeg(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
            found.append(("front", CompressedImage(header=header("front", at), format="jpeg", data=jpeg.tobytes())))
    return found


def test_live_sensors_and_their_bag_give_the_same_observation(ros: Ros, tmp_path: Path) -> None:
    contract = RobotContract.load("diff_drive")
    contract = dataclasses.replace(contract, observations={  # every message arrives, so that the count tells the end
        name: stream if stream.latched else dataclasses.replace(stream, reliability="reliable")
        for name, stream in contract.observations.items()
    })  # fmt: skip
    builder = ObservationBuilder(contract, SPEC)
    live = builder.make_buffer()
    robot, policy = ros.node("robot"), ros.node("policy")
    streams = contract.observations
    publishers = {
        name: robot.create_publisher(message_class(s.type), s.topic, stream_qos(s, 100)) for name, s in streams.items()
    }
    received = 0
    bag = BagWriter(tmp_path / "bag")

    def store(name: str) -> Any:
        def callback(data: bytes) -> None:
            nonlocal received
            stamp_ns = header_stamp_ns(streams[name].type, data)
            live.add(name, START_NS if stamp_ns is None else stamp_ns, data)
            bag.write(streams[name].topic, START_NS, data)
            received += 1

        return callback

    for name, stream in streams.items():
        bag.add_topic(stream.topic, stream.type, stream.latched)
        subscribe_stream(policy, stream, store(name), depth=100)
    ros.spin_until(lambda: all(p.get_subscription_count() for p in publishers.values()), "the subscriptions")
    sent = sensor_messages(contract)
    for name, message in sent:
        publishers[name].publish(message)
    ros.spin_until(lambda: received == len(sent), "all messages")
    bag.close()

    recorded = builder.make_buffer()
    for message in read(tmp_path / "bag"):
        for name in builder.by_topic[message.topic]:
            recorded.add(name, message.stamp_ns, message.data)
    at_ns = START_NS + 415 * NANOSECONDS // 1000
    here, there = builder.build(live, at_ns), ObservationBuilder(contract, SPEC).build(recorded, at_ns)
    for a, b in zip((*here.history, here), (*there.history, there), strict=True):
        assert_same(a, b)
    assert here.instruction == "drive to the door" and here.images["front"].shape == (24, 32, 3)
    assert here.clouds["lidar"].shape == (50, 4) and here.sequences["imu"].mask.any()
    assert here.sequences["imu"].values[-1, 0] == np.float32(0.1 * 41), "the newest that is not after the tick"
    assert here.state[0] == np.float32(0.05 * 40)


def assert_same(a: Observation, b: Observation) -> None:
    assert (a.stamp_ns, a.instruction, a.ages_ns, a.present) == (b.stamp_ns, b.instruction, b.ages_ns, b.present)
    np.testing.assert_array_equal(a.state, b.state)
    np.testing.assert_array_equal(a.images["front"], b.images["front"])
    np.testing.assert_array_equal(a.clouds["lidar"], b.clouds["lidar"])
    np.testing.assert_array_equal(a.sequences["imu"].values, b.sequences["imu"].values)
    np.testing.assert_array_equal(a.sequences["imu"].mask, b.sequences["imu"].mask)
