"""What a simulated world says, on topics: its sensors with their faults, its words, and what no sensor sees.

Everything that belongs to an instant is sent before the ``Tick`` of that instant, which lists it: whoever answers in
lockstep knows what to wait for, also when a sensor fails.
"""

from __future__ import annotations

from collections.abc import Iterable

from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from rosgraph_msgs.msg import Clock

from vla_core.observation import messages
from vla_core.observation.messages import Message
from vla_core.sim.base import Journey, World
from vla_core.sim.faults import Faults
from vla_ros.bridge import TICK_TOPIC, message_class, publish_streams
from vla_ros.frames import Frames
from vla_ros.lockstep import TICK_QOS
from vla_ros.msg import Tick

QUEUE_DEPTH = 500  # a recorder may lag by some episodes' worth of messages
ACK_TIMEOUT = Duration(seconds=10)
LATCHED_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
TRUTH_QOS = QoSProfile(depth=QUEUE_DEPTH, reliability=ReliabilityPolicy.RELIABLE)


class WorldFeed:
    """Publishes the messages of ``world``; ``simulated_time`` is for worlds that own the clock."""

    def __init__(self, node: Node, world: World, faults: Faults, simulated_time: bool) -> None:
        self._node, self._world, self._faults = node, world, faults
        self._sensors = faults.begin(0)
        self._publishers = publish_streams(node, world.contract, QUEUE_DEPTH)
        self._words = [stream.topic for stream in world.contract.observations.values() if stream.latched]
        self._clock: Publisher | None = None
        self._ticks: Publisher | None = None
        if simulated_time:
            self._clock = node.create_publisher(Clock, "/clock", 10)
            self._ticks = node.create_publisher(Tick, TICK_TOPIC, TICK_QOS)
        self._frames = Frames(node, world.contract) if world.contract.following is not None else None
        self.instruction: str | None = None
        self._spoken: list[str] = []  # topics on which something was said since the last tick

    def announce(self) -> None:
        """Make the publishers beside the contract's, once the world has been reset: whoever listens must find them."""
        if isinstance(self._world, Journey):
            self._announce(self._world.statics(0), LATCHED_QOS)
            self._announce(self._world.ground_truth(0), TRUTH_QOS)

    def _announce(self, observed: Iterable[Message], qos: QoSProfile) -> None:
        for message in observed:
            if message.topic not in self._publishers:
                self._publishers[message.topic] = self._node.create_publisher(
                    message_class(message.type), message.topic, qos
                )

    def begin(self, start_ns: int, instruction: str) -> None:
        """Start an episode with what is latched, before anything that it is about."""
        self._sensors = self._faults.begin(start_ns)
        if isinstance(self._world, Journey):
            self._publish(self._world.statics(start_ns))
        self.instruction = None
        self.say(instruction)

    def say(self, instruction: str) -> None:
        """Publish an instruction that is new, and wait until everybody has it: what follows is about it."""
        if instruction == self.instruction:
            return
        self.instruction = instruction
        for topic in self._words:
            self._publishers[topic].publish(messages.text(instruction))
            self._publishers[topic].wait_for_all_acked(ACK_TIMEOUT)
        self._spoken = self._words

    def observe(self, stamp_ns: int, pictures: bool) -> None:
        """Publish what the sensors saw until ``stamp_ns`` and what has come by then; then the tick."""
        if self._clock is not None:
            self._clock.publish(Clock(clock=Time(nanoseconds=stamp_ns).to_msg()))
        measured = self._sensors.apply(self._world.observe_state(stamp_ns), stamp_ns)
        sent = self._publish(measured)
        if pictures:
            # After the numbers, with the same stamp: a picture takes longer, as a real camera's does.
            sent |= self._publish(self._sensors.apply(self._world.observe_camera(stamp_ns), stamp_ns))
        truth = self._world.ground_truth(stamp_ns) if isinstance(self._world, Journey) else []
        self._publish(truth)
        if self._frames is not None:
            self._frames.tell(measured, truth)
        sent |= dict.fromkeys(self._spoken, stamp_ns)
        self._spoken = []
        if self._ticks is not None:
            tick = Tick(topics=list(sent), newest=[Time(nanoseconds=ns).to_msg() for ns in sent.values()])
            tick.header.stamp = Time(nanoseconds=stamp_ns).to_msg()
            self._ticks.publish(tick)

    def wait_until_heard(self) -> None:
        """Wait for everybody who asked for every message."""
        for publisher in (*self._publishers.values(), *filter(None, [self._ticks])):
            publisher.wait_for_all_acked(ACK_TIMEOUT)

    def _publish(self, observed: Iterable[Message]) -> dict[str, int]:
        """Send them; returns the newest stamp per topic."""
        newest: dict[str, int] = {}
        for message in observed:
            self._publishers[message.topic].publish(message.data)
            newest[message.topic] = max(message.stamp_ns, newest.get(message.topic, 0))
        return newest
