"""What leaves the policy node, by topic; when to send what is the node's to decide."""

from __future__ import annotations

import time
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.time import Time
from sensor_msgs.msg import Image
from std_msgs.msg import String

from vla_core.contract import NANOSECONDS
from vla_core.observation import messages
from vla_core.runtime.chunk_executor import ActionChunk
from vla_core.runtime.core import PolicyCore
from vla_ros import diagnostics
from vla_ros.bridge import CHUNK_TOPIC, COMMAND_QOS, FAULT_TOPIC, LATCHED_QOS, command_publishers, stream_qos
from vla_ros.msg import ActionChunk as ActionChunkMessage
from vla_ros.parameters import value


class PolicyOutputs:
    """The publishers, from :meth:`create` at configure to :meth:`destroy` at clean-up."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._held: list[Publisher] = []
        self._commands: dict[str, Publisher] = {}
        self._fault: Publisher | None = None
        self._told = ""  # the fault that was last published
        self._imagined_ns = 0  # steady time of the last picture

    def create(self, core: PolicyCore, candidates: bool) -> None:
        """Make them; with ``candidates`` a safety stage stands between: commands, and faults, go to it."""
        self._commands = command_publishers(self._node, core.contract, candidates)
        self._held = [*self._commands.values()]
        self._chunk = self._publisher(ActionChunkMessage, CHUNK_TOPIC, COMMAND_QOS)
        self._diagnostics = diagnostics.publisher(self._node)
        self._held.append(self._diagnostics)
        self._imagined = self._publisher(Image, "~/imagined", 1)
        self._imagined_ns = -NANOSECONDS * 60
        self._told, self._fault = "", None
        if candidates:
            self._fault = self._publisher(String, FAULT_TOPIC, LATCHED_QOS)
            self._fault.publish(String(data=""))  # what was told before the last cleanup is over
        if core.policy.spec.instruction:
            stream = core.builder.streams[core.policy.spec.instruction]
            self._instruction = self._publisher(String, stream.topic, stream_qos(stream))

    def destroy(self) -> None:
        """Undo :meth:`create`; harmless when there is nothing to undo."""
        for publisher in self._held:
            self._node.destroy_publisher(publisher)
        self._held = []

    def send(self, frame: dict[str, bytes]) -> None:
        """The commands of one instant, as :func:`vla_core.commands.encode_frame` makes them."""
        for topic, data in frame.items():
            self._commands[topic].publish(data)

    def unheard(self) -> list[str]:
        """Command topics without a subscriber: in lockstep nothing is answered before all have one."""
        return [p.topic_name for p in self._commands.values() if not p.get_subscription_count()]

    def tell_fault(self, fault: str) -> None:
        """Tell the safety stage what keeps the policy from acting, beside what it sees itself."""
        if fault != self._told and self._fault is not None:
            self._told = fault
            self._fault.publish(String(data=fault))

    def chunk(self, core: PolicyCore, chunk: ActionChunk) -> None:
        """A whole chunk, for who wants to look ahead."""
        contract = core.contract
        message = ActionChunkMessage()
        message.header.stamp = self._node.get_clock().now().to_msg()
        message.header.frame_id = next(iter(contract.actions.values())).frame_id
        message.observation_stamp = Time(nanoseconds=chunk.observation_stamp_ns).to_msg()
        message.step.sec, message.step.nanosec = divmod(chunk.step_ns, NANOSECONDS)
        message.valid_until = Time(nanoseconds=chunk.valid_until_ns).to_msg()
        message.names, message.units = list(contract.action_names), list(contract.action_units)
        message.horizon = len(chunk.actions)
        message.actions = chunk.actions.reshape(-1).tolist()
        self._chunk.publish(message)

    def imagined(self, core: PolicyCore, stamp_ns: int) -> None:
        """Show what the newest plan is expected to look like, where somebody looks; in the worker, as it takes time."""
        now_ns = time.monotonic_ns()
        due = now_ns - self._imagined_ns >= value(self._node, "imagined_s") * NANOSECONDS
        if not due or not self._imagined.get_subscription_count():
            return
        pixels = core.policy.imagined()
        if pixels is not None:
            self._imagined_ns = now_ns
            self._imagined.publish(messages.image(stamp_ns, pixels, "imagined"))

    def instruct(self, data: bytes) -> None:
        """The instruction, to everybody who listens to it; only for a policy that takes one."""
        self._instruction.publish(data)

    def diagnostics(self, statuses: list[DiagnosticStatus]) -> None:
        """What people see of the node."""
        diagnostics.publish(self._node, self._diagnostics, statuses)

    def _publisher(self, kind: Any, topic: str, qos: Any) -> Publisher:
        made = self._node.create_publisher(kind, topic, qos)
        self._held.append(made)
        return made
