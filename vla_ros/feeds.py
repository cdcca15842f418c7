"""Which topics of a robot are recorded, and how they are subscribed to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from vla_core.contract import RobotContract, Stream
from vla_core.errors import VlaError
from vla_ros.bridge import CHUNK_TOPIC, stream_qos

CHUNK_TYPE = "vla_ros/msg/ActionChunk"
LATCHED_DEPTH = 100  # several publishers latch transforms, and an instruction may change while the recorder is busy


@dataclass(frozen=True)
class Feed:
    """A topic to record."""

    topic: str
    type: str
    latched: bool
    stream: Stream | None = None

    def qos(self, depth: int) -> QoSProfile:
        """The contract's for an observation; commands and chunks are reliable."""
        if self.latched:
            return QoSProfile(depth=LATCHED_DEPTH, reliability=ReliabilityPolicy.RELIABLE,
                              durability=DurabilityPolicy.TRANSIENT_LOCAL)  # fmt: skip
        if self.stream is not None:
            return stream_qos(self.stream, depth)
        return QoSProfile(depth=depth, reliability=ReliabilityPolicy.RELIABLE)


def is_static(topic: str) -> bool:
    """Whether a topic holds static transforms, latched by every publisher for itself."""
    return topic.rpartition("/")[2] == "tf_static"


def chosen_feeds(contract: RobotContract, names: Sequence[str], also: Sequence[str]) -> list[Feed]:
    """Observations, all commands, the policy's chunks, and other topics; a topic of several streams once.

    Args:
        names: of observations; empty texts are none, and none means all.
        also: topic=type, several in a text separated by spaces.
    """
    chosen = [name for name in names if name]
    streams = [contract.stream(name) for name in chosen or contract.observations]
    feeds = [Feed(stream.topic, stream.type, stream.latched, stream) for stream in streams]
    feeds += [Feed(action.topic, action.type, False) for action in contract.actions.values()]
    feeds.append(Feed(CHUNK_TOPIC, CHUNK_TYPE, False))
    if contract.following is not None:
        feeds.append(Feed(contract.following.command.topic, contract.following.command.type, False))
    for rule in (rule for entry in also for rule in entry.split()):
        topic, equals, type_name = rule.partition("=")
        if not topic or not equals or "/msg/" not in type_name:
            raise VlaError(f"parameter also: found {rule!r}, expected topic=type such as /tf=tf2_msgs/msg/TFMessage")
        feeds.append(Feed(topic, type_name, is_static(topic)))
    return list({feed.topic: feed for feed in reversed(feeds)}.values())[::-1]
