"""``vla convert``: bags to a dataset beside reading the same bags with rosbags, and the memory that it takes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import Reader

import vla_core
from test.benchmarks.framework import BenchmarkError, Row, Settings, Suite, compared, peak_mb
from vla_core.commands import encode
from vla_core.contract import NANOSECONDS, Action, RobotContract, Stream
from vla_core.data.bag import CONTRACT_KEY, BagWriter
from vla_core.data.convert import convert
from vla_core.observation import messages
from vla_core.observation.image import encode_jpeg
from vla_core.observation.messages import serialize, typestore
from vla_core.observation.spec import CloudSpec, ImageSize, ObservationSpec

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
CLOUD, JOINTS = "sensor_msgs/msg/PointCloud2", "sensor_msgs/msg/JointState"
JOINT_NAMES = tuple(f"joint_{i}" for i in range(7))
STEP = NANOSECONDS // 100
START = 1_700_000_000 * NANOSECONDS
POINTS = 60_000
BAGS = 4
SECONDS = {"raw": 5, "jpeg": 8, "clouds": 10, "states": 40}  # of each bag
MODEL_SIDE = 128
BASE = RobotContract(
    name="bench",
    rate_hz=50.0,
    observations={
        "arm": Stream(topic="joint_states", type=JOINTS, rate_hz=100.0, max_age_s=0.1, names=JOINT_NAMES,
                      units=("rad",) * 7),
    },
    actions={"arm": Action(topic="command", type=JOINTS, field="position", names=JOINT_NAMES, units=("rad",) * 7,
                           low=(-3.0,) * 7, high=(3.0,) * 7, safe=("hold",) * 7)},
)  # fmt: skip
SENSORS = {
    "raw": Stream(topic="camera", type=IMAGE, rate_hz=25.0, max_age_s=0.2),
    "jpeg": Stream(topic="camera", type=COMPRESSED, rate_hz=25.0, max_age_s=0.2),
    "clouds": Stream(topic="lidar", type=CLOUD, rate_hz=10.0, max_age_s=0.3, names=("x", "y", "z", "intensity"),
                     units=("m", "m", "m", "1")),
}  # fmt: skip
CAMERA_SPEC = ObservationSpec(state=("arm",), images={"sensor": ImageSize(height=MODEL_SIDE, width=MODEL_SIDE)})
SPECS = {
    "raw": CAMERA_SPEC, "jpeg": CAMERA_SPEC, "states": ObservationSpec(state=("arm",)),
    "clouds": ObservationSpec(state=("arm",), clouds={"sensor": CloudSpec(max_points=4096)}),
}  # fmt: skip


def payloads(kind: str) -> list[Callable[[int], bytes]]:
    """Messages of the kind's sensor, as functions of their stamps."""
    rng = np.random.default_rng(0)
    if kind == "states":
        return []
    if kind == "clouds":
        return [cloud(rng.random((POINTS, 4), dtype=np.float32)) for _ in range(8)]
    smooth = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (640, 480), interpolation=cv2.INTER_CUBIC)
    found: list[Callable[[int], bytes]] = []
    for k in range(24):
        noise = rng.integers(-3, 4, smooth.shape)
        pixels = np.clip(np.roll(smooth, 9 * k, axis=1).astype(int) + noise, 0, 255).astype(np.uint8)
        if kind == "raw":
            found.append(lambda stamp, pixels=pixels: messages.image(stamp, pixels))  # type: ignore[misc]
        else:
            data = encode_jpeg(pixels, 90)
            found.append(lambda stamp, data=data: messages.compressed_image(stamp, data, "jpeg"))  # type: ignore[misc]
    return found


def cloud(points: np.ndarray) -> Callable[[int], bytes]:
    """A LiDAR's message of points (N, 4) float32."""
    types = typestore().types
    fields = [types["sensor_msgs/msg/PointField"](name=name, offset=4 * i, datatype=7, count=1)
              for i, name in enumerate(("x", "y", "z", "intensity"))]  # fmt: skip
    data = points.view(np.uint8).reshape(-1)

    def message(stamp_ns: int) -> bytes:
        return serialize(CLOUD, types[CLOUD](
            header=messages.header(stamp_ns), height=1, width=len(points), fields=fields, is_bigendian=False,
            point_step=16, row_step=16 * len(points), data=data, is_dense=True,
        ))  # fmt: skip

    return message


def record(folder: Path, kind: str, number: int, seconds: float) -> list[Path]:
    """Bags of a robot with seven joints at 100 Hz and one sensor."""
    sensor = SENSORS.get(kind)
    contract = BASE if sensor is None else replace(BASE, observations={**BASE.observations, "sensor": sensor})
    sensed, every = payloads(kind), 10 if kind == "clouds" else 4
    bags = [folder / kind / f"bag_{i:03d}" for i in range(number)]
    for place, bag in enumerate(bags):
        bag.parent.mkdir(parents=True, exist_ok=True)
        with BagWriter(bag, {CONTRACT_KEY: contract.to_yaml()}) as writer:
            writer.add_topic("joint_states", JOINTS)
            writer.add_topic("command", JOINTS)
            if sensor is not None:
                writer.add_topic(sensor.topic, sensor.type)
            for k in range(int(100 * seconds)):
                stamp = START + k * STEP
                values = np.sin(0.01 * k + np.arange(7))
                writer.write("joint_states", stamp, messages.joint_state(stamp, JOINT_NAMES, "position", values))
                if k % 2 == 0:
                    writer.write("command", stamp, encode(BASE.actions["arm"], stamp, values[None], STEP))
                if sensor is not None and k % every == 0:
                    writer.write(sensor.topic, stamp, sensed[(k // every + place) % len(sensed)](stamp))
    return bags


def iterate(bags: list[Path]) -> float:
    """Seconds that rosbags takes to read every message of every bag, without looking at any."""
    start = time.perf_counter()
    for bag in bags:
        with Reader(bag) as reader:
            for _ in reader.messages():
                pass
    return time.perf_counter() - start


def speed(kind: str, title: str, goal: str) -> Callable[[Settings], Iterator[Row]]:
    """All cores of the machine, a bag each, against one thread that only reads."""

    def run(settings: Settings) -> Iterator[Row]:
        pairs = []
        with tempfile.TemporaryDirectory() as name:
            bags = record(Path(name), kind, 4 * BAGS if settings.long else BAGS, SECONDS[kind])
            size = sum(file.stat().st_size for bag in bags for file in bag.iterdir()) / 1e6
            for i in range(4):
                raw = iterate(bags)
                start = time.perf_counter()
                convert(bags, Path(name) / f"set_{i}", SPECS[kind])
                if i:  # the first run fills the page cache
                    pairs.append((size / (time.perf_counter() - start), size / raw))
        yield compared(f"{size:.0f} MB of bags to a dataset: {title}", "MB/s", pairs, "rosbags, reading alone", goal)

    return run


def peak(kind: str, number: int, seconds: float) -> float:
    """The most that a process had resident (MB) that converted bags one after the other."""
    command = [sys.executable, "-m", "test.benchmarks.data_convert", kind, str(number), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(vla_core.__file__).parents[1])
    if done.returncode:
        raise BenchmarkError(f"converting {number} bags: {' '.join(done.stderr.split())[-300:]}")
    return float(done.stdout)


def memory(settings: Settings) -> Iterator[Row]:
    """Ten times as many bags, and bags that are ten times as long."""
    pairs = [(peak("raw", 100, 0.5), peak("raw", 10, 0.5)) for _ in range(2)]
    yield compared("peak memory of converting 100 bags", "MB", pairs, "of converting 10 bags", "<= 1.1")
    pairs = [(peak("raw", 1, 40), peak("raw", 1, 4)) for _ in range(2)]
    yield compared("peak memory of converting a bag of 40 s", "MB", pairs, "of converting a bag of 4 s", "<= 1.3")


BENCHMARKS: Suite = {
    "convert, raw camera": speed("raw", "camera 640x480 raw, joints", ">= 0.5"),
    "convert, JPEG camera": speed("jpeg", "camera 640x480 JPEG, joints", ">= 0.5"),
    "convert, point clouds": speed("clouds", f"LiDAR of {POINTS} points, joints", ">= 0.8"),
    "convert, states": speed("states", "joints alone", ">= 0.8"),
    "convert, memory": memory,
}


def main() -> None:
    """Convert bags of a kind in this process; prints the peak of the resident memory in MB."""
    kind, number, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    with tempfile.TemporaryDirectory() as name:
        bags = record(Path(name), kind, number, seconds)
        convert(bags, Path(name) / "set", SPECS[kind], workers=1)
    print(peak_mb())


if __name__ == "__main__":
    main()
