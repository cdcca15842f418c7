"""Where a simulated vehicle is, as ``/tf``, for RViz and Foxglove: ``odom`` by its odometry, ``map`` by the truth."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy

from vla_core.contract import RobotContract
from vla_core.observation import writing
from vla_core.observation.ego_motion import matrix
from vla_core.observation.messages import Message, deserialize
from vla_ros.bridge import message_class

TF = "tf2_msgs/msg/TFMessage"
TRUTH = "ground_truth/odom"


class Frames:
    """Broadcasts, while somebody listens, odom to base_link, and map to odom where the truth is known (REP 105)."""

    def __init__(self, node: Node, contract: RobotContract) -> None:
        assert contract.following is not None
        self._topic = contract.stream(contract.following.odometry).topic
        qos = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
        self._publisher = node.create_publisher(message_class(TF), "/tf", qos)

    def tell(self, observed: Iterable[Message], truth: Iterable[Message]) -> None:
        """Broadcast from the newest odometry among the messages of a tick, and the truth at it."""
        if not self._publisher.get_subscription_count():
            return
        placed = max((m for m in observed if m.topic == self._topic), key=lambda m: m.stamp_ns, default=None)
        if placed is None:
            return
        odometry = deserialize(placed.type, placed.data)
        wheel, frame = _pose(odometry), odometry.header.frame_id
        self._send(placed.stamp_ns, frame, odometry.child_frame_id, wheel)
        for message in truth:
            if message.topic == TRUTH:
                true = deserialize(message.type, message.data)
                self._send(placed.stamp_ns, true.header.frame_id, frame, correction(_pose(true), wheel))

    def _send(self, stamp_ns: int, parent: str, child: str, pose: np.ndarray) -> None:
        self._publisher.publish(writing.transforms(stamp_ns, parent, {child: pose}))


def correction(true: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The pose (7,) of the frame in which a vehicle is seen at ``seen``, in that where it is at ``true``."""
    (x, y, z, w), (a, b, c, d) = true[3:], seen[3:] * (-1, -1, -1, 1)
    turned = (w * a + x * d + y * c - z * b, w * b - x * c + y * d + z * a, w * c + x * b - y * a + z * d,
              w * d - x * a - y * b - z * c)  # fmt: skip
    turn = matrix(np.array([0.0, 0.0, 0.0, *turned]))[:3, :3]
    return np.concatenate([true[:3] - turn @ seen[:3], turned])


def _pose(odometry: object) -> np.ndarray:
    pose = odometry.pose.pose  # type: ignore[attr-defined]
    place, turn = pose.position, pose.orientation
    return np.array([place.x, place.y, place.z, turn.x, turn.y, turn.z, turn.w])
