"""The measuring programs: they send observations, receive commands and write what they saw, as processes.

``latency``  one observation at a time to each of several nodes in turn; the time until its command arrives
``diagnostics``  the last values on /diagnostics
``period``   when the commands of several nodes were stamped and when they arrived, while one of them is fed
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from test.benchmarks.framework import BenchmarkError
from test.benchmarks.load import jpeg
from test.benchmarks.robots import COMPRESSED, NAMES, robot
from vla_core.contract import NANOSECONDS
from vla_core.errors import VlaError
from vla_core.observation import messages
from vla_ros import middleware

STAMP = struct.Struct("<iI")
STAMP_OFFSET = 4  # behind the encapsulation header; the stamp is the first field of a std_msgs/Header
ANSWER_S = 5.0
WARM_UP = 20  # observations that are sent first and not counted


class Robot:
    """Publishes joints and images in a namespace, and keeps (stamp ns, arrival ns) of the commands that come back."""

    def __init__(self, node: Any, namespace: str, camera_type: str, width: int, height: int) -> None:
        from vla_ros.bridge import COMMAND_QOS, message_class, stream_qos

        contract = robot(camera_type, 1.0)
        self.namespace = namespace
        self.commands: list[tuple[int, int]] = []
        self._templates = {
            "joints": bytearray(messages.joint_state(0, NAMES, "position", np.zeros(len(NAMES)))),
            "camera": bytearray(image_bytes(camera_type, width, height)),
        }
        self._publishers = {
            name: node.create_publisher(message_class(s.type), f"/{namespace}/{s.topic}", stream_qos(s))
            for name, s in contract.observations.items()
        }
        action = contract.actions["arm"]
        node.create_subscription(
            message_class(action.type), f"/{namespace}/{action.topic}", self._on_command, COMMAND_QOS, raw=True
        )

    def _on_command(self, data: bytes) -> None:
        arrival_ns = time.time_ns()
        seconds, nanoseconds = STAMP.unpack_from(data, STAMP_OFFSET)
        self.commands.append((seconds * NANOSECONDS + nanoseconds, arrival_ns))

    def matched(self) -> bool:
        """Whether somebody listens to all of it."""
        return all(publisher.get_subscription_count() for publisher in self._publishers.values())

    def observe(self) -> tuple[int, int]:
        """Publish joints, then an image, of one stamp; returns the stamp and when the image was given away, ns."""
        stamp_ns = time.time_ns()
        for template in self._templates.values():
            STAMP.pack_into(template, STAMP_OFFSET, *divmod(stamp_ns, NANOSECONDS))
        data = {name: bytes(template) for name, template in self._templates.items()}
        self._publishers["joints"].publish(data["joints"])
        given_ns = time.time_ns()
        self._publishers["camera"].publish(data["camera"])
        return stamp_ns, given_ns


def image_bytes(camera_type: str, width: int, height: int) -> bytes:
    """A serialized image; a compressed one has one bit per pixel, the size of a good JPEG."""
    if camera_type == COMPRESSED:
        return messages.compressed_image(0, jpeg(width, height, max(10_000, width * height // 8)), "jpeg")
    return messages.image(0, np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def measure_latency(node: Any, spin_once: Callable[[float], None], options: argparse.Namespace) -> dict[str, Any]:
    """Per namespace, nanoseconds from each observation to its command; the order of the nodes changes every round."""
    robots = [Robot(node, name, options.type, *options.size) for name in options.namespaces]
    _spin_until(spin_once, lambda: all(r.matched() for r in robots), "every node to subscribe", 60.0)
    latencies: dict[str, list[int]] = {r.namespace: [] for r in robots}
    for i in range(WARM_UP + options.count):
        for j in range(len(robots)):
            one = robots[(i + j) % len(robots)]
            before = len(one.commands)
            stamp_ns, given_ns = one.observe()
            what = f"the command of {one.namespace} for observation {i}"
            _spin_until(spin_once, lambda one=one, n=before: len(one.commands) > n, what, ANSWER_S)  # type: ignore[misc]
            answered_ns, arrival_ns = one.commands[-1]
            if answered_ns < stamp_ns or len(one.commands) != before + 1:
                raise BenchmarkError(f"{one.namespace} sent something else than one command for observation {i}")
            latencies[one.namespace].append(arrival_ns - given_ns)
            time.sleep(options.pause_s)
    return {name: values[WARM_UP:] for name, values in latencies.items()}


def measure_periods(node: Any, spin_once: Callable[[float], None], options: argparse.Namespace) -> dict[str, Any]:
    """(stamp, arrival) of all commands of each namespace while the first one is fed at ``feed_hz``."""
    fed, *others = (Robot(node, name, options.type, *options.size) for name in options.namespaces)
    _spin_until(spin_once, fed.matched, "the policy to subscribe", 60.0)
    if options.feed_hz:
        node.create_timer(1.0 / options.feed_hz, fed.observe)
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        spin_once(0.1)
    return {one.namespace: one.commands for one in (fed, *others)}


def watch_diagnostics(node: Any, spin_once: Callable[[float], None], options: argparse.Namespace) -> dict[str, Any]:
    """The last values of every status on /diagnostics, by its name, until SIGINT."""
    from diagnostic_msgs.msg import DiagnosticArray

    seen: dict[str, dict[str, str]] = {}

    def keep(message: Any) -> None:
        seen.update({status.name: {pair.key: pair.value for pair in status.values} for status in message.status})

    node.create_subscription(DiagnosticArray, "/diagnostics", keep, 10)
    told: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: told.append(number))
    while not told:
        spin_once(0.1)
    return seen


def _spin_until(spin_once: Callable[[float], None], condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"waited {timeout_s:.0f} s in vain for {what}")
        spin_once(0.1)


PROBES = {"latency": measure_latency, "period": measure_periods, "diagnostics": watch_diagnostics}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write JSON to ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m test.benchmarks.probes")
    parser.add_argument("probe", choices=tuple(PROBES))
    parser.add_argument("namespaces", nargs="*")
    parser.add_argument("--type", default=COMPRESSED, help="of the camera's messages")
    parser.add_argument("--size", nargs=2, type=int, default=(64, 64), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--count", type=int, default=100, help="observations")
    parser.add_argument("--pause-s", type=float, default=0.005, help="between two observations")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--feed-hz", type=float, default=0.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    middleware.configure()
    import rclpy
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
    from rclpy.node import Node

    rclpy.init(args=[])
    node = Node("probe")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        found = PROBES[options.probe](node, executor.spin_once, options)
        options.out.write_text(json.dumps(found), encoding="utf-8")
        return 0
    except VlaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, ExternalShutdownException):
        return 130
    finally:
        executor.shutdown()
        node.destroy_node()
        with contextlib.suppress(Exception):
            rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
