"""A robot for the tests of the policy node: it publishes what a robot would, and keeps what it is told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from vla_ros.msg import ActionChunk

from vla_core.contract import RobotContract
from vla_core.observation import messages
from vla_core.observation.image import encode_jpeg
from vla_ros.bridge import COMMAND_QOS, message_class, stream_qos
from vla_ros.policy_node import PolicyNode

from .conftest import Ros, parameters


def make_policy(ros: Ros, checkpoint: Path, **values: Any) -> PolicyNode:
    overrides = parameters(checkpoint=str(checkpoint), autostart=False, **values)
    node: PolicyNode = ros.add(PolicyNode(context=ros.context, parameter_overrides=overrides))
    return node


class Robot:
    """Publishes what a robot would, and keeps what it is told."""

    def __init__(self, ros: Ros, contract: RobotContract) -> None:
        self.ros, self.contract = ros, contract
        self.node = ros.node("robot")
        self.publishers = {
            name: self.node.create_publisher(message_class(s.type), s.topic, stream_qos(s))
            for name, s in contract.observations.items()
        }
        self.commands: list[JointState] = []
        self.chunks: list[ActionChunk] = []
        self.diagnostics: list[Any] = []
        action = contract.actions["hand"]
        self.node.create_subscription(JointState, action.topic, self.commands.append, COMMAND_QOS)
        self.node.create_subscription(ActionChunk, "action_chunk", self.chunks.append, COMMAND_QOS)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", lambda m: self.diagnostics.extend(m.status), 10)
        self.publishers["instruction"].publish(String(data="push the puck to the goal"))

    def observe(self, *, image: bool = True, stamp_ns: int | None = None) -> int:
        stamp = self.node.get_clock().now().nanoseconds if stamp_ns is None else stamp_ns
        state = self.contract.observations["state"]
        self.publishers["state"].publish(
            messages.joint_state(stamp, state.names, "position", np.zeros(len(state.names)))
        )
        if image:
            pixels = np.full((64, 64, 3), 100, dtype=np.uint8)
            self.publishers["image"].publish(messages.compressed_image(stamp, encode_jpeg(pixels), "jpeg"))
        return stamp

    def drive_until(self, condition: Any, what: str, *, image: bool = True) -> None:
        """Publish at about the contract's rate until ``condition`` holds."""
        last = 0.0

        def done() -> bool:
            nonlocal last
            if time.monotonic() - last > 0.0125:
                last = time.monotonic()
                self.observe(image=image)
            return bool(condition())

        self.ros.spin_until(done, what)

    def fault(self, words: str) -> bool:
        return any(words in status.message for status in self.diagnostics)
