"""What a node tells people about itself: ``diagnostic_msgs/DiagnosticArray`` on ``/diagnostics`` (REP-107)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node
from rclpy.publisher import Publisher

TOPIC = "/diagnostics"
PERIOD_S = 1.0
OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR


def publisher(node: Node) -> Publisher:
    """The publisher that :func:`publish` sends with."""
    return node.create_publisher(DiagnosticArray, TOPIC, 10)


def status(node: Node, part: str, hardware: str, fault: str, values: Mapping[str, Any], level: bytes = WARN) -> Any:
    """One status: ``level`` and the text ``fault`` when there is one, else OK; ``values`` become text."""
    return DiagnosticStatus(
        name=f"{node.get_fully_qualified_name()}: {part}", hardware_id=hardware,
        level=level if fault else OK, message=fault or "ok",
        values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
    )  # fmt: skip


def publish(node: Node, to: Publisher, statuses: list[Any]) -> None:
    """Send statuses with the node's time."""
    message = DiagnosticArray(status=statuses)
    message.header.stamp = node.get_clock().now().to_msg()
    to.publish(message)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
