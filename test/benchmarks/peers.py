"""What a plain rclpy program of a few lines would do: the peers that the nodes are compared with, as processes.

    python -m test.benchmarks.peers chain --namespace bare --type sensor_msgs/msg/Image

``chain``   subscribes to serialized joints and images as the policy node does and answers each image with a command
``decoding``the same with ordinary subscriptions, decoding and resizing the image before it answers
``timer``   publishes a command on a timer
``model``   computes one prediction after the other, without ROS
``store``   keeps the newest serialized messages of a contract's streams, and counts them
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vla_ros import middleware

DEPTH = 50


def answering(node: Any, camera_type: str, decode: bool) -> None:
    """Answer each image with a command, once the joints are there."""
    from sensor_msgs.msg import JointState

    from test.benchmarks.robots import NAMES, robot
    from vla_ros.bridge import COMMAND_QOS, message_class, stream_qos

    streams = robot(camera_type, 1.0).observations
    publisher = node.create_publisher(JointState, "command", COMMAND_QOS)
    joints: deque[bytes] = deque(maxlen=1)

    def on_image(message: Any) -> None:
        if decode:
            to_model(message)
        if joints:
            publisher.publish(command(node, JointState, NAMES))

    def subscribe(name: str, callback: Callable[[Any], None]) -> None:
        kind = message_class(streams[name].type)
        node.create_subscription(kind, streams[name].topic, callback, stream_qos(streams[name]), raw=not decode)

    subscribe("joints", lambda message: joints.append(message))  # rclpy wants a signature, append has none
    subscribe("camera", on_image)


def command(node: Any, message_type: Any, names: tuple[str, ...]) -> Any:
    """A command of zeros, stamped now."""
    message = message_type()
    message.header.stamp = node.get_clock().now().to_msg()
    message.name, message.velocity = list(names), [0.0] * len(names)
    return message


def to_model(message: Any) -> Any:
    """Pixels at the model's size, as any node has to make them: OpenCV and nothing else."""
    import cv2
    import numpy as np

    from test.benchmarks.robots import SIDE

    if hasattr(message, "format"):
        pixels: Any = cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_COLOR_RGB)
    else:
        pixels = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)
    return cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def timing(node: Any, rate_hz: float) -> None:
    """Publish a command on a timer."""
    from sensor_msgs.msg import JointState

    from test.benchmarks.robots import NAMES
    from vla_ros.bridge import COMMAND_QOS

    publisher = node.create_publisher(JointState, "command", COMMAND_QOS)
    node.create_timer(1.0 / rate_hz, lambda: publisher.publish(command(node, JointState, NAMES)))


def storing(node: Any, contract: Path) -> dict[str, int]:
    """Keep the newest messages of every stream; returns the counts that go on growing, by topic."""
    from vla_core.contract import RobotContract
    from vla_ros.bridge import message_class, stream_qos

    counts: dict[str, int] = {}

    def keep(topic: str) -> Callable[[bytes], None]:
        held: deque[bytes] = deque(maxlen=DEPTH)

        def callback(data: bytes) -> None:
            held.append(data)
            counts[topic] += 1

        return callback

    for stream in RobotContract.load(contract).observations.values():
        counts[stream.topic] = 0
        kind, callback = message_class(stream.type), keep(stream.topic)
        node.create_subscription(kind, stream.topic, callback, stream_qos(stream), raw=True)
    return counts


def predict_for_ever(checkpoint: Path) -> None:
    """The model's load in a process of its own; prints the milliseconds of each prediction when SIGINT ends it."""
    from test.benchmarks.policies import predict_ms
    from vla_core.runtime.policy import CheckpointPolicy

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it otherwise
    policy = CheckpointPolicy.load(checkpoint)
    times_ms: list[float] = []
    try:
        while True:
            times_ms.append(predict_ms(policy))
    except KeyboardInterrupt:
        print(json.dumps(times_ms), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run a peer until SIGINT; ``store`` then prints its counts as JSON."""
    parser = argparse.ArgumentParser(prog="python -m test.benchmarks.peers")
    parser.add_argument("peer", choices=("chain", "decoding", "timer", "model", "store"))
    parser.add_argument("--namespace", default="bare")
    parser.add_argument("--type", default="")
    parser.add_argument("--rate-hz", type=float, default=100.0)
    parser.add_argument("--contract", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.peer == "model":
            predict_for_ever(options.checkpoint)
        else:
            spin(options)
    except KeyboardInterrupt:
        pass
    return 0


def spin(options: argparse.Namespace) -> None:
    """The node of a peer, on rclpy's own spin."""
    middleware.configure()
    import rclpy
    from rclpy.executors import ExternalShutdownException
    from rclpy.node import Node

    rclpy.init(args=[])
    node = Node(options.peer, namespace=options.namespace)
    counts: dict[str, int] = {}
    if options.peer == "timer":
        timing(node, options.rate_hz)
    elif options.peer == "store":
        counts = storing(node, options.contract)
    else:
        answering(node, options.type, decode=options.peer == "decoding")
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        print(json.dumps(counts), flush=True)
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
