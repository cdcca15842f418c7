"""Messages written without ROS, against rclpy's own serialization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from geometry_msgs.msg import Quaternion, Transform, TransformStamped, Vector3
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Header, String
from tf2_msgs.msg import TFMessage
from vla_ros.msg import ActionChunk, Episode

from vla_core.commands import encode_frame
from vla_core.observation import messages

STAMP_NS = 1_234_567_890_123_456_789
HEADER = Header(stamp=Time(sec=1_234_567_890, nanosec=123_456_789), frame_id="base")


def same(ours: bytes, theirs: Any) -> bool:
    """rclpy reads our bytes as its message. Its own bytes differ where nothing is read: in padding and at the end."""
    return bool(deserialize_message(ours, type(theirs)) == theirs)


def test_joint_state_is_read_by_rclpy() -> None:
    ours = messages.joint_state(STAMP_NS, ("a", "bc"), "velocity", np.array([0.5, -1.5]), "base")
    theirs = JointState(header=HEADER, name=["a", "bc"], velocity=[0.5, -1.5])
    assert same(ours, theirs)


def test_image_is_read_by_rclpy() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    theirs = Image(header=HEADER, height=3, width=5, encoding="rgb8", step=15, data=pixels.tobytes())
    assert same(messages.image(STAMP_NS, pixels, "base"), theirs)


def test_compressed_image_is_read_by_rclpy() -> None:
    data = np.arange(7, dtype=np.uint8)
    theirs = CompressedImage(header=HEADER, format="jpeg", data=data.tobytes())
    assert same(messages.compressed_image(STAMP_NS, data, "jpeg", "base"), theirs)


@pytest.mark.parametrize("text", ["", "push the puck", "schiebe die Scheibe zum Ziel, größer"])
def test_string_is_read_by_rclpy(text: str) -> None:
    assert same(messages.text(text), String(data=text))


def test_own_messages_are_read_without_ros() -> None:
    chunk = ActionChunk(header=HEADER, names=["x", "y"], units=["m", "1"], horizon=2, actions=[1.0, 2.0, 3.0, 4.0])
    chunk.observation_stamp = HEADER.stamp
    read = messages.deserialize("vla_ros/msg/ActionChunk", serialize_message(chunk))
    assert (read.names, read.units, read.horizon, read.actions.tolist()) == (["x", "y"], ["m", "1"], 2, [1, 2, 3, 4])
    assert messages.header_stamp_ns("vla_ros/msg/ActionChunk", serialize_message(chunk)) == STAMP_NS
    mark = Episode(header=HEADER, state=Episode.FAILED, index=3, seed=-1, task="t", instruction="i", steps=9)
    read = messages.deserialize("vla_ros/msg/Episode", serialize_message(mark))
    assert (read.state, read.index, read.seed, read.task, read.instruction, read.steps) == (2, 3, -1, "t", "i", 9)


def test_transforms_are_read_without_ros() -> None:
    moved = Transform(translation=Vector3(x=1.5, z=2.0), rotation=Quaternion(z=0.6, w=0.8))
    theirs = TFMessage(transforms=[TransformStamped(header=HEADER, child_frame_id="lidar", transform=moved)])
    (read,) = messages.deserialize("tf2_msgs/msg/TFMessage", serialize_message(theirs)).transforms
    assert (read.header.frame_id, read.child_frame_id) == ("base", "lidar")
    assert (read.transform.translation.x, read.transform.rotation.z) == (1.5, 0.6)
    again = messages.serialize("tf2_msgs/msg/TFMessage", messages.typestore().types["tf2_msgs/msg/TFMessage"]([read]))
    assert same(again, theirs)


def test_commands_are_read_by_rclpy(contract) -> None:  # type: ignore[no-untyped-def]
    data = encode_frame(contract, STAMP_NS, np.array([0.1, -0.2, 0.3, 1.0]))[contract.actions["hand"].topic]
    command = deserialize_message(data, JointState)
    assert command.header == HEADER
    assert list(command.name) == ["hand_x", "hand_y", "hand_z", "gripper"]
    assert list(command.velocity) == [0.1, -0.2, 0.3, 1.0]
