"""A robot's worth of messages, cheaply: serialized once, stamped afresh, published as bytes.

    python -m test.benchmarks.load --cameras 5x1280x720@30 --lidars 1x120000@10 --imus 4@200 --seconds 60 --episode

The sensors of a kind share its rate, with their phases spread over the period. The schedule is absolute: a message
that comes late is published late and counted, never skipped. At its end the process prints one line of JSON: the
messages published per topic, how late they left, and the CPU time that this took.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import re
import signal
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_core.contract import NANOSECONDS
from vla_core.data.episodes import EPISODE_TOPIC
from vla_core.errors import VlaError
from vla_core.observation import messages
from vla_core.observation.messages import header, typestore
from vla_ros import middleware

STAMP = struct.Struct("<iI")
STAMP_OFFSET = 4  # behind the encapsulation header; the stamp is the first field of a std_msgs/Header
INSTRUCTION_TOPIC = "instruction"
COMMAND_TOPIC = "command"
POINT_BYTES = {16: ("x", "y", "z", "intensity"), 22: ("x", "y", "z", "intensity", "ring", "time")}
FIELD_TYPES = {"ring": ("<u2", 4)}  # numpy type and PointField constant; all others are FLOAT32
SETTLE_S = 30.0
MATCH_S = 1.0  # a subscriber may learn of its publisher later than the other way round, and nobody tells


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """One topic of the load: ``template`` is a serialized message whose header's stamp is patched before it leaves."""

    topic: str
    type: str
    rate_hz: float
    template: bytes


def jpeg(width: int, height: int, size: int, seed: int = 0) -> np.ndarray:
    """A decodable JPEG (size,) uint8 of exactly ``size`` bytes: a grained picture, padded behind its end marker.

    Raises:
        VlaError: ``size`` is too small for any quality at this resolution.
    """
    import cv2

    rng = np.random.default_rng(seed)
    shapes = cv2.resize(rng.integers(0, 256, (9, 16, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    picture = np.clip(shapes + rng.normal(0, 12, shapes.shape), 0, 255).astype(np.uint8)
    best: np.ndarray | None = None
    low, high = 1, 100
    while low <= high:  # the size grows with the quality
        quality = (low + high) // 2
        encoded: np.ndarray = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].reshape(-1)
        if len(encoded) <= size:
            best, low = encoded, quality + 1
        else:
            high = quality - 1
    if best is None:
        raise VlaError(f"no JPEG of {width}x{height} fits {size} bytes; the smallest has {len(encoded)}")
    return np.concatenate([best, np.zeros(size - len(best), np.uint8)])


def cameras(count: int, width: int, height: int, rate_hz: float, jpeg_bytes: int | None) -> list[Sensor]:
    """Cameras ``camera_<i>/image``: ``CompressedImage`` of ``jpeg_bytes``, or raw rgb8 ``Image`` when that is None."""
    found = []
    for i in range(count):
        frame = f"camera_{i}"
        if jpeg_bytes is None:
            pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
            data, kind = messages.image(0, pixels, frame), "sensor_msgs/msg/Image"
            topic = f"raw_{i}/image"
        else:
            encoded = jpeg(width, height, jpeg_bytes, i)
            data, kind = messages.compressed_image(0, encoded, "jpeg", frame), "sensor_msgs/msg/CompressedImage"
            topic = f"camera_{i}/image"
        found.append(Sensor(topic=topic, type=kind, rate_hz=rate_hz, template=data))
    return found


def lidars(count: int, points: int, rate_hz: float, point_bytes: int = 16) -> list[Sensor]:
    """LiDARs ``lidar_<i>/points``: x, y, z, intensity (16 bytes a point), with ring and time 22."""
    if point_bytes not in POINT_BYTES:
        raise VlaError(f"a point has {point_bytes} bytes; choices: {', '.join(map(str, POINT_BYTES))}")
    types = typestore().types
    layout = np.dtype([(name, FIELD_TYPES.get(name, ("<f4", 7))[0]) for name in POINT_BYTES[point_bytes]])
    fields = [
        types["sensor_msgs/msg/PointField"](
            name=name, offset=layout.fields[name][1], datatype=FIELD_TYPES.get(name, ("<f4", 7))[1], count=1
        )
        for name in layout.names
    ]
    found = []
    for i in range(count):
        rng = np.random.default_rng(i)
        cloud = np.zeros(points, layout)
        for name in layout.names:
            cloud[name] = rng.integers(0, 64, points) if name == "ring" else rng.uniform(-50, 50, points)
        message = types["sensor_msgs/msg/PointCloud2"](
            header=header(0, f"lidar_{i}"), height=1, width=points, fields=fields, is_bigendian=False,
            point_step=layout.itemsize, row_step=layout.itemsize * points, data=cloud.view(np.uint8), is_dense=True,
        )  # fmt: skip
        data = messages.serialize("sensor_msgs/msg/PointCloud2", message)
        found.append(Sensor(topic=f"lidar_{i}/points", type="sensor_msgs/msg/PointCloud2", rate_hz=rate_hz,
                            template=data))  # fmt: skip
    return found


def imus(count: int, rate_hz: float) -> list[Sensor]:
    """IMUs ``imu_<i>/data`` at rest, m/s² and rad/s."""
    types = typestore().types
    vector = types["geometry_msgs/msg/Vector3"]
    found = []
    for i in range(count):
        message = types["sensor_msgs/msg/Imu"](
            header=header(0, f"imu_{i}"),
            orientation=types["geometry_msgs/msg/Quaternion"](x=0.0, y=0.0, z=0.0, w=1.0),
            orientation_covariance=np.zeros(9), angular_velocity=vector(x=0.0, y=0.0, z=0.0),
            angular_velocity_covariance=np.zeros(9), linear_acceleration=vector(x=0.0, y=0.0, z=9.81),
            linear_acceleration_covariance=np.zeros(9),
        )  # fmt: skip
        data = messages.serialize("sensor_msgs/msg/Imu", message)
        found.append(Sensor(topic=f"imu_{i}/data", type="sensor_msgs/msg/Imu", rate_hz=rate_hz, template=data))
    return found


def joint_states(count: int, joints: int, rate_hz: float) -> list[Sensor]:
    """Joint states ``joints_<i>/state`` of ``joint_0`` to ``joint_<joints - 1>``, rad."""
    names = tuple(f"joint_{j}" for j in range(joints))
    return [
        Sensor(topic=f"joints_{i}/state", type="sensor_msgs/msg/JointState", rate_hz=rate_hz,
               template=messages.joint_state(0, names, "position", np.linspace(-1.0, 1.0, joints)))
        for i in range(count)
    ]  # fmt: skip


def contract(sensors: Sequence[Sensor], rate_hz: float = 10.0) -> dict[str, Any]:
    """A robot contract, as its YAML would read, whose observations are exactly ``sensors`` and an instruction.

    Joint states get names and units; the command is a ``JointState`` of two velocities on ``command``.
    """
    observations: dict[str, Any] = {}
    for sensor in sensors:
        name = sensor.topic.replace("/", "_")
        observations[name] = {
            "topic": sensor.topic, "type": sensor.type, "rate_hz": sensor.rate_hz, "max_age_s": 0.5,
        }  # fmt: skip
        if sensor.type == "sensor_msgs/msg/JointState":
            joints = list(messages.deserialize(sensor.type, sensor.template).name)
            observations[name] |= {"field": "position", "names": joints, "units": ["rad"] * len(joints)}
    observations["instruction"] = {"topic": INSTRUCTION_TOPIC, "type": "std_msgs/msg/String", "latched": True}
    action = {
        "topic": COMMAND_TOPIC, "type": "sensor_msgs/msg/JointState", "field": "velocity", "names": ["a", "b"],
        "units": ["rad/s"] * 2, "low": [-1.0] * 2, "high": [1.0] * 2, "safe": ["zero"] * 2, "kind": "velocity",
    }  # fmt: skip
    return {"name": "load", "rate_hz": rate_hz, "observations": observations, "actions": {"drive": action}}


def schedule(rates_hz: Sequence[float], seconds: float) -> Iterator[tuple[int, int]]:
    """(due ns from the start, sensor) in order of time: k / rate plus the sensor's share of its period.

    Equal rates are spread: the j-th of n sensors of one rate starts j / n periods late. Every sensor publishes
    ``round(rate * seconds)`` times.
    """
    heap: list[tuple[int, int, int]] = []
    for i, rate in enumerate(rates_hz):
        alike = [j for j, other in enumerate(rates_hz) if other == rate]
        phase_ns = round(NANOSECONDS / rate * alike.index(i) / len(alike))
        if round(rate * seconds):
            heap.append((phase_ns, i, 0))
    heapq.heapify(heap)
    while heap:
        due_ns, i, k = heap[0]
        yield due_ns, i
        if k + 1 < round(rates_hz[i] * seconds):
            start_ns = due_ns - round(NANOSECONDS * k / rates_hz[i])
            heapq.heapreplace(heap, (start_ns + round(NANOSECONDS * (k + 1) / rates_hz[i]), i, k + 1))
        else:
            heapq.heappop(heap)


class Stopped(Exception):
    """SIGINT or SIGTERM."""


class Load:
    """Publishers of ``sensors`` on a node named ``load``; make it after ``middleware.configure()`` and ``rclpy.init``.

    Args:
        sensors: what to publish.
        reliable: QoS of every sensor; best effort otherwise.
        instruction: latched text on ``instruction``.
        depth: history of each publisher.
    """

    def __init__(self, sensors: Sequence[Sensor], *, reliable: bool, instruction: str, depth: int = 50) -> None:
        from rclpy.node import Node
        from rclpy.qos import QoSProfile, ReliabilityPolicy
        from std_msgs.msg import String
        from vla_ros.msg import Episode

        from vla_ros.bridge import EPISODE_QOS, message_class

        self.sensors = list(sensors)
        self.counts = [0] * len(self.sensors)
        self.late_ns: list[int] = []
        self.instruction = instruction
        self.node = Node("load")
        policy = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
        qos = QoSProfile(depth=depth, reliability=policy)
        self._publishers = [self.node.create_publisher(message_class(s.type), s.topic, qos) for s in self.sensors]
        self._instruction = self.node.create_publisher(String, INSTRUCTION_TOPIC, EPISODE_QOS)
        self._instruction.publish(messages.text(instruction))
        self._episode_class = Episode
        self._episodes = self.node.create_publisher(Episode, EPISODE_TOPIC, EPISODE_QOS)

    def wait_for_subscribers(self, count: int, timeout_s: float) -> None:
        """Until every sensor has ``count`` subscribers; the error names those that have not."""
        deadline = time.monotonic() + timeout_s
        while True:
            alone = [p.topic_name for p in self._publishers if p.get_subscription_count() < count]
            if not alone:
                time.sleep(MATCH_S)
                return
            if time.monotonic() > deadline:
                raise VlaError(f"waited {timeout_s:.0f} s in vain for {count} subscribers of {', '.join(alone)}")
            time.sleep(0.02)

    def mark(self, state: int) -> None:
        """Begin or end an episode, after everything that was published before has arrived."""
        from rclpy.time import Time

        self._wait_for_acks()
        mark = self._episode_class(state=state, index=0, seed=-1, task="load", instruction=self.instruction)
        mark.header.stamp = Time(nanoseconds=time.time_ns()).to_msg()
        self._episodes.publish(mark)
        self._wait_for_acks()

    def run(self, seconds: float) -> None:
        """Publish on schedule."""
        buffers = [bytearray(s.template) for s in self.sensors]
        start_ns = time.monotonic_ns()
        for due_ns, i in schedule([s.rate_hz for s in self.sensors], seconds):
            early_ns = start_ns + due_ns - time.monotonic_ns()
            if early_ns > 0:
                time.sleep(early_ns / NANOSECONDS)
            self.late_ns.append(time.monotonic_ns() - start_ns - due_ns)
            STAMP.pack_into(buffers[i], STAMP_OFFSET, *divmod(time.time_ns(), NANOSECONDS))
            self._publishers[i].publish(bytes(buffers[i]))
            self.counts[i] += 1

    def report(self) -> dict[str, Any]:
        """What was published, by topic, and how it went."""
        late_ms = np.asarray(self.late_ns or [0]) / 1e6
        return {
            "published": {s.topic: count for s, count in zip(self.sensors, self.counts, strict=True)},
            "bytes": sum(len(s.template) * count for s, count in zip(self.sensors, self.counts, strict=True)),
            "late_ms": {"p50": float(np.median(late_ms)), "p99": float(np.percentile(late_ms, 99)),
                        "max": float(late_ms.max())},
            "cpu_s": time.process_time(),
        }  # fmt: skip

    def _wait_for_acks(self) -> None:
        from rclpy.duration import Duration

        for publisher in (*self._publishers, self._instruction, self._episodes):
            publisher.wait_for_all_acked(Duration(seconds=SETTLE_S))


def sensors_of(options: argparse.Namespace) -> list[Sensor]:
    """The sensors that the command line asks for."""
    found: list[Sensor] = []
    for count, width, height, rate in options.cameras:
        found += cameras(int(count), int(width), int(height), rate, options.jpeg_bytes)
    for count, width, height, rate in options.raw_cameras:
        found += cameras(int(count), int(width), int(height), rate, None)
    for count, points, rate in options.lidars:
        found += lidars(int(count), int(points), rate, options.point_bytes)
    for count, rate in options.imus:
        found += imus(int(count), rate)
    for count, joints, rate in options.joints:
        found += joint_states(int(count), int(joints), rate)
    if not found:
        raise VlaError("nothing to publish; name some of --cameras --raw-cameras --lidars --imus --joints")
    topics = [s.topic for s in found]
    if len(set(topics)) < len(topics):
        raise VlaError("each option once: a second one would publish on the topics of the first")
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `sensors_of` reads the result."""
    parser = argparse.ArgumentParser(prog="python -m test.benchmarks.load", description="Publish a load of sensors.")
    for option, numbers, example in (
        ("--cameras", 3, "5x1280x720@30"),
        ("--raw-cameras", 3, "1x640x480@30"),
        ("--lidars", 2, "1x120000@10"),
        ("--imus", 1, "4@200"),
        ("--joints", 2, "1x7@100"),
    ):
        parser.add_argument(option, action="append", default=[], type=_numbers(numbers, example), metavar=example)
    parser.add_argument("--jpeg-bytes", type=int, default=200_000, help="size of each JPEG")
    parser.add_argument("--point-bytes", type=int, default=16, choices=sorted(POINT_BYTES), help="size of a point")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--reliable", action="store_true", help="reliable publishers; best effort otherwise")
    parser.add_argument("--instruction", default="push the load", help="latched text on `instruction`")
    parser.add_argument("--subscribers", type=int, default=1, help="wait for this many on each topic")
    parser.add_argument("--wait-s", type=float, default=30.0, help="how long to wait for them")
    parser.add_argument("--episode", action="store_true", help="mark an episode around the load")
    return parser.parse_args(arguments)


def _numbers(count: int, example: str) -> Any:
    pattern = re.compile(r"x".join([r"(\d+)"] * count) + r"@(\d+(?:\.\d+)?)")

    def parse(text: str) -> tuple[float, ...]:
        match = pattern.fullmatch(text)
        if match is None or not all(float(group) > 0 for group in match.groups()):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected positive numbers as in {example}")
        return tuple(float(group) for group in match.groups())

    return parse


def _on_signal(number: int, frame: Any) -> None:
    raise Stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: publish, mark the episode, print the report."""
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)
    middleware.configure()
    import rclpy
    from rclpy.signals import SignalHandlerOptions
    from vla_ros.msg import Episode

    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    load: Load | None = None
    try:
        load = Load(sensors_of(options), reliable=options.reliable, instruction=options.instruction)
        load.wait_for_subscribers(options.subscribers, options.wait_s)
        if options.episode:
            load.mark(Episode.START)
        with contextlib.suppress(Stopped):
            load.run(options.seconds)
        if options.episode:
            load.mark(Episode.SUCCEEDED)
        print(json.dumps(load.report()), flush=True)
        return 0
    except Stopped:
        return 130
    except VlaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if load is not None:
            load.node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
