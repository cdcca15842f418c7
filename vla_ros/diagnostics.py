"""What a node tells people about itself: ``diagnostic_msgs/DiagnosticArray`` on ``/diagnostics`` (REP-107)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node
from rclpy.publisher import Publisher

TOPIC = "/diagnostics"
PERIOD_S = 1.0
MAX_FAULTS = 4  # named in one diagnostic message
OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR


class Faults:
    """The last fault, and the first ones since they were taken: those name the cause, what follows are consequences."""

    def __init__(self) -> None:
        self.last = ""
        self.count = 0
        self._first: list[str] = []

    def note(self, text: str) -> None:
        """Keep a fault."""
        self.last = text
        self.count += 1
        if len(self._first) < MAX_FAULTS and text not in self._first:
            self._first.append(text)

    def take(self) -> list[str]:
        """The first ones since the last call."""
        taken, self._first = self._first, []
        return taken


def publisher(node: Node) -> Publisher:
    """The publisher that :func:`publish` sends with."""
    return node.create_publisher(DiagnosticArray, TOPIC, 10)


def status(
    node: Node, part: str, values: Mapping[str, Any], message: str, level: bytes = OK, hardware: str = ""
) -> DiagnosticStatus:
    """One status of a ``part`` of the node; ``values`` become text, and ``message`` says how it is in a line."""
    return DiagnosticStatus(
        name=f"{node.get_fully_qualified_name()}: {part}", hardware_id=hardware, level=level, message=message,
        values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
    )  # fmt: skip


def fault_status(node: Node, part: str, values: Mapping[str, Any], fault: str, hardware: str) -> DiagnosticStatus:
    """A status that warns of ``fault``, or says ok when there is none."""
    return status(node, part, values, fault or "ok", WARN if fault else OK, hardware)


def publish(node: Node, to: Publisher, statuses: list[DiagnosticStatus]) -> None:
    """Send statuses with the node's time."""
    message = DiagnosticArray(status=statuses)
    message.header.stamp = node.get_clock().now().to_msg()
    to.publish(message)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
