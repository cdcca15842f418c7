"""Lets a teleoperator, or an expert, take over from a policy; see :mod:`vla_core.runtime.takeover` for the topics.

The policy is started with its commands remapped (``hand/command:=policy/hand/command``); ``vla up dagger`` does so.
With ``safety`` the commands go to ``candidate/<topic>``, for the safety node behind it.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from typing import Any

from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.node import Node
from std_msgs.msg import Bool

from vla_core.data.happened import INTERVENTION_PREFIX
from vla_core.observation.messages import header_stamp_ns
from vla_core.runtime.takeover import POLICY_PREFIX, TAKEOVER_TOPIC, TELEOP_PREFIX, Passed, Takeover
from vla_ros import diagnostics, process
from vla_ros.bridge import COMMAND_QOS, LATCHED_QOS, command_publishers, message_class
from vla_ros.parameters import contract_of, declare, value


class TakeoverNode(Node):
    """See the module; parameters are declared in ``__init__``."""

    def __init__(self, **options: Any) -> None:
        super().__init__("takeover", **options)
        declare(self, "contract", "", "the robot's contract: a name in config/robots, or a file")
        declare(self, "checkpoint", "", "folder of a policy; its contract counts when contract is empty")
        declare(self, "safety", False, "a safety node stands behind: send commands to candidate/<topic>")
        self.contract = contract_of(self)
        self.counts: Counter[str] = Counter()
        self._commands = command_publishers(self, self.contract, candidates=value(self, "safety"))
        actions = {action.topic: message_class(action.type) for action in self.contract.actions.values()}
        self._types = {action.topic: action.type for action in self.contract.actions.values()}
        self._marks = {
            topic: self.create_publisher(kind, INTERVENTION_PREFIX + topic, COMMAND_QOS)
            for topic, kind in actions.items()
        }
        self.switches = {topic: Takeover() for topic in actions}
        self.create_subscription(Bool, TAKEOVER_TOPIC, self._on_takeover, LATCHED_QOS)
        for topic, kind in actions.items():
            for teleop, prefix in ((True, TELEOP_PREFIX), (False, POLICY_PREFIX)):
                heard = partial(self._on_command, topic, teleop)
                self.create_subscription(kind, prefix + topic, heard, COMMAND_QOS, raw=True)
        self._diagnostics = diagnostics.publisher(self)
        # A stopped simulated clock must not stop the diagnostics.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(diagnostics.PERIOD_S, self._publish_diagnostics, clock=steady)

    @property
    def taken(self) -> bool:
        """Whether the teleoperator is in command."""
        return any(switch.taken for switch in self.switches.values())

    def stop(self) -> None:
        """Nothing is left to do: who commands through this node sends the last safe command."""

    def _on_takeover(self, message: Bool) -> None:
        if message.data != self.taken:
            self.counts["interventions"] += message.data
            self.get_logger().info("the teleoperator takes over" if message.data else "the policy drives")
        for topic, switch in self.switches.items():
            self._send(topic, switch.hand_over(message.data))

    def _on_command(self, topic: str, teleop: bool, data: bytes) -> None:
        stamp_ns = header_stamp_ns(self._types[topic], data)
        if stamp_ns is None:  # such as Twist: the newest is the one that counts
            stamp_ns = int(self.get_clock().now().nanoseconds)
        self._send(topic, self.switches[topic].command(teleop, stamp_ns, data))

    def _send(self, topic: str, passed: Passed | None) -> None:
        if passed is None:
            return
        self.counts["commands"] += 1
        if passed.intervention:  # first, so that a recorder has the mark when the tick ends
            self.counts["intervened"] += 1
            self._marks[topic].publish(passed.data)
        self._commands[topic].publish(passed.data)

    def _publish_diagnostics(self) -> None:
        values = {"taken_over": self.taken, **{name: self.counts[name] for name in
                                               ("interventions", "intervened", "commands")}}  # fmt: skip
        message = "the teleoperator is in command" if self.taken else "the policy is in command"
        status = diagnostics.status(self, "takeover", values, message, diagnostics.OK, self.contract.name)
        diagnostics.publish(self, self._diagnostics, [status])


def main() -> int:
    """Entry point of ``takeover_node``."""
    return process.main(TakeoverNode)


if __name__ == "__main__":
    sys.exit(main())
