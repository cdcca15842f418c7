"""What a simulator in lockstep has sent: who answers an instant waits for that, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from rclpy.time import Time

from vla_ros.bridge import TICK_TOPIC
from vla_ros.msg import Tick


def tick_qos(depth: int) -> QoSProfile:
    """Latched: whoever is matched late still gets the tick that waits for its answer."""
    return QoSProfile(depth=depth, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


TICK_QOS = tick_qos(1)


class Ticks:
    """The newest ``vla_ros/msg/Tick``; ``on_tick`` is called when one comes.

    ``depth`` of them may wait: one is enough for who answers, as the next one waits for the answer. A graph without
    them has ``stamp_ns`` None, and ``used`` False: its nodes judge by rates what is still to come.
    """

    def __init__(self, node: Node, on_tick: Callable[[], None], depth: int = 1) -> None:
        self._node = node
        self._on_tick = on_tick
        self.stamp_ns: int | None = None
        self._newest: dict[str, int] = {}
        self.subscription: Subscription = node.create_subscription(Tick, TICK_TOPIC, self.take, tick_qos(depth))

    @property
    def used(self) -> bool:
        """Whether somebody sends them."""
        return self.stamp_ns is not None or self._node.count_publishers(TICK_TOPIC) > 0

    def newest_ns(self, topic: str) -> int | None:
        """Stamp of the newest message that was sent on a topic for this tick; None when there was none."""
        return self._newest.get(topic)

    def topics(self) -> list[str]:
        """On which something was sent for this tick."""
        return list(self._newest)

    def take(self, message: Tick) -> None:
        """Note a message."""
        self.stamp_ns = Time.from_msg(message.header.stamp).nanoseconds
        stamps = [Time.from_msg(stamp).nanoseconds for stamp in message.newest]
        self._newest = dict(zip(message.topics, stamps, strict=True))
        self._on_tick()
