"""Between a contract and rclpy: message classes, QoS, raw subscriptions and publishers of serialized messages."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSCompatibility,
    QoSPolicyKind,
    QoSProfile,
    ReliabilityPolicy,
    qos_check_compatible,
)
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import MessageInfo, Subscription

from vla_core.contract import RobotContract, Stream
from vla_core.data.episodes import EPISODE_TOPIC
from vla_core.data.recording import LossCounter
from vla_core.errors import VlaError
from vla_core.observation.setup_check import TRANSFORMS
from vla_ros.msg import Episode

CHUNK_TOPIC = "action_chunk"
FAULT_TOPIC = "candidate/fault"  # std_msgs/String: why the policy cannot act, empty while it can
TICK_TOPIC = "tick"  # of a simulator in lockstep: vla_ros/msg/Tick
TF_TOPIC, TF_STATIC_TOPIC = "/tf", "/tf_static"
QOS_OVERRIDES = QoSOverridingOptions(
    (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
)
COMMAND_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
LATCHED_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
EPISODE_QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def message_class(type_name: str) -> Any:
    """The Python class of a ROS type such as ``sensor_msgs/msg/JointState``."""
    package, _, name = type_name.partition("/msg/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError):
        raise VlaError(f"message type {type_name!r} is not installed; install the package {package!r}") from None


def queue_depth(stream: Stream) -> int:
    """Messages that wait in the middleware: half a second of them, for the time that a callback may be kept waiting."""
    return max(10, math.ceil((stream.rate_hz or 0.0) / 2))


def stream_qos(stream: Stream, depth: int | None = None) -> QoSProfile:
    """QoS of a contract stream; a latched one is transient-local, so that late joiners get its value."""
    if stream.latched:
        return QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    reliable = stream.reliability == "reliable"
    return QoSProfile(
        depth=depth or queue_depth(stream),
        history=HistoryPolicy.KEEP_LAST,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
    )


def lost_before(losses: LossCounter, topic: str, info: MessageInfo) -> int:
    """How many messages of this one's publisher are missing before it; 0 where the middleware does not tell."""
    publisher = info["publisher_gid"] or {}
    return losses.lost_before(topic, publisher.get("data", b""), info["publication_sequence_number"])


def misfit(node: Node, stream: Stream) -> str:
    """Why a publisher of a stream's topic is not heard: another type, or a QoS that does not fit; empty when none."""
    for publisher in node.get_publishers_info_by_topic(stream.topic):
        who = f"node {publisher.node_name} publishes"
        if publisher.topic_type != stream.type:
            return f"{who} {publisher.topic_type}, the contract says {stream.type}"
        verdict, reason = qos_check_compatible(publisher.qos_profile, stream_qos(stream))
        if verdict == QoSCompatibility.ERROR:
            return f"{who} with a QoS that does not fit: {reason.rstrip('; ')}"
    return ""


def subscribe_stream(
    node: Node, stream: Stream, callback: Callable[[bytes], None], depth: int | None = None
) -> Subscription:
    """Subscribe to the serialized messages of a stream: callbacks store bytes, decoding comes later.

    The contract's QoS can be overridden by ROS 2's parameters ``qos_overrides./<topic>.subscription.<policy>``.
    """
    try:
        return node.create_subscription(
            message_class(stream.type), stream.topic, callback, stream_qos(stream, depth), raw=True,
            qos_overriding_options=QOS_OVERRIDES,
        # rclpy's own events would only log a QoS that does not fit, and cost the executor a handle each at every
        # message: :func:`misfit` finds it, and the other type too.
        event_callbacks=SubscriptionEventCallbacks(use_default_callbacks=False),
        )  # fmt: skip
    except RuntimeError as error:
        topic = node.resolve_topic_name(stream.topic)
        raise VlaError(f"no subscription of {topic}: {error}; its QoS comes from the contract and from the parameters "
                       f"qos_overrides.{topic}.subscription.<policy>") from None  # fmt: skip


def waiting(subscription: Subscription) -> Iterator[bytes]:
    """Take the serialized messages that wait in the queue of a raw subscription, oldest first, without an executor."""
    while True:
        with subscription.handle:
            taken = subscription.handle.take_message(subscription.msg_type, True)
        if taken is None:
            return
        yield taken[0]


def subscribe_transforms(node: Node, topic: str, callback: Callable[[bytes], None]) -> Subscription:
    """Subscribe to ``/tf_static``, which is latched by each of its publishers, or to ``/tf``."""
    static = topic == TF_STATIC_TOPIC
    durability = DurabilityPolicy.TRANSIENT_LOCAL if static else DurabilityPolicy.VOLATILE
    qos = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE, durability=durability)
    return node.create_subscription(message_class(TRANSFORMS), topic, callback, qos, raw=True)


def subscribe_episodes(node: Node, callback: Callable[[Any], None]) -> Subscription:
    """Subscribe to the borders of episodes. Create it last: its presence tells that the others are there."""
    return node.create_subscription(Episode, EPISODE_TOPIC, callback, EPISODE_QOS)


def publish_streams(node: Node, contract: RobotContract, depth: int) -> dict[str, Publisher]:
    """A publisher per topic of the contract's observations; reliable, which serves subscriptions of either kind."""
    return {
        stream.topic: node.create_publisher(
            message_class(stream.type), stream.topic, stream_qos(every_message(stream), depth)
        )
        for stream in contract.observations.values()
    }


def every_message(stream: Stream) -> Stream:
    """The stream, sent or received reliably.

    In lockstep, who waits for all that a tick lists must not lose a message on a busy machine.
    """
    return dataclasses.replace(stream, reliability="reliable")


def candidate_topic(topic: str) -> str:
    """Where commands go that the safety node still has to pass."""
    return f"/candidate{topic}" if topic.startswith("/") else f"candidate/{topic}"


def command_publishers(node: Node, contract: RobotContract, candidates: bool = False) -> dict[str, Publisher]:
    """A publisher per command topic of the contract; ``candidates`` send to :func:`candidate_topic`."""
    return {
        action.topic: node.create_publisher(
            message_class(action.type), candidate_topic(action.topic) if candidates else action.topic, COMMAND_QOS
        )
        for action in contract.actions.values()
    }
