"""What of a chunk can be drawn, and where: against closed forms."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from nav_msgs.msg import Path as PathMessage
from visualization_msgs.msg import MarkerArray
from vla_ros.msg import ActionChunk

from vla_core.contract import Axis, RobotContract, Safety, Workspace
from vla_core.errors import VlaError
from vla_core.observation import messages
from vla_ros.bridge import CHUNK_TOPIC, COMMAND_QOS, message_class, stream_qos
from vla_ros.chunk_viewer_node import ChunkViewerNode, find_track, points

from .conftest import Ros, parameters

BOX = Workspace(
    stream="hand",
    axes=tuple(Axis(action=f"hand_{axis}", position=f"hand_{axis}", low=-1.0, high=1.0) for axis in "xyz"),
)


@pytest.fixture
def boxed(contract: RobotContract) -> RobotContract:
    return dataclasses.replace(contract, safety=Safety(workspace=BOX))


def test_velocities_are_integrated_from_where_the_robot_is(boxed: RobotContract) -> None:
    track = find_track(boxed)
    speed, origin = np.array([0.1, -0.2, 0.3]), np.array([0.5, 0.6, 0.2])
    actions = np.tile([*speed, 1.0], (8, 1))  # the gripper is no coordinate
    shown = points(track, actions, 0.0125, origin)
    k = np.arange(1, 9)[:, None]
    np.testing.assert_allclose(shown, origin + speed * 0.0125 * k, atol=1e-12)


def test_trajectories_are_shown_as_they_are() -> None:
    track = find_track(RobotContract.load("vehicle"))
    actions = np.array([[1.0, 2.0, 0.1, 5.0], [3.0, 4.0, 0.2, 6.0]])  # x, y, yaw, speed
    assert points(track, actions, 0.5, None).tolist() == [[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]]
    assert track.frame_id == "base_link"


def test_joints_alone_cannot_be_drawn() -> None:
    with pytest.raises(VlaError, match=r"'arm' has no action named x and y, and no safety.workspace"):
        find_track(RobotContract.load("arm"))


def test_markers_and_path_of_a_chunk(ros: Ros, boxed: RobotContract, tmp_path: Any) -> None:
    file = tmp_path / "contract.yaml"
    file.write_text(boxed.to_yaml())
    ros.add(ChunkViewerNode(context=ros.context, parameter_overrides=parameters(contract=str(file), keep=2)))
    robot = ros.node("robot")
    paths: list[Any] = []
    markers: list[Any] = []
    robot.create_subscription(PathMessage, f"{CHUNK_TOPIC}/path", paths.append, 5)
    robot.create_subscription(MarkerArray, f"{CHUNK_TOPIC}/markers", markers.append, 5)
    stream = boxed.observations["hand"]
    hand = robot.create_publisher(message_class(stream.type), stream.topic, stream_qos(stream))
    chunks = robot.create_publisher(ActionChunk, CHUNK_TOPIC, COMMAND_QOS)
    chunk = ActionChunk(names=list(boxed.action_names), units=list(boxed.action_units), horizon=4)
    chunk.observation_stamp.sec, chunk.step.nanosec = 7, 12_500_000
    chunk.actions = np.tile([0.8, 0.0, 0.0, 0.0], 4).tolist()

    def sent() -> bool:
        hand.publish(messages.joint_state(7 * 10**9, stream.names, "position", np.array([0.1, 0.6, 0.2, 1.0])))
        chunks.publish(chunk)
        return len(markers) > 4

    ros.spin_until(sent, "markers")
    path = paths[-1]
    assert path.header.frame_id == "base" and path.header.stamp.sec == 7
    shown = [(p.pose.position.x, p.pose.position.y, p.pose.position.z) for p in path.poses]
    np.testing.assert_allclose(shown, [(0.1 + 0.01 * k, 0.6, 0.2) for k in (1, 2, 3, 4)], atol=1e-9)
    assert [p.header.stamp.nanosec for p in path.poses] == [k * 12_500_000 for k in range(4)]
    newest, older = markers[-1].markers
    chunk.names, chunk.horizon = [*boxed.action_names[::-1]], 1  # a policy that lists its actions in another order
    chunk.actions = [0.0, 0.0, 0.0, 0.8]
    shown_before = len(paths)
    ros.spin_until(lambda: sent() and len(paths[-1].poses) == 1, "the other order")
    assert len(paths) > shown_before
    np.testing.assert_allclose(paths[-1].poses[0].pose.position.x, 0.11, atol=1e-9)
    assert (newest.id, older.id) == (0, 1) and newest.color.a == 1.0 and older.color.a == 0.5
