"""Everything of the policy node but its model, under the sensors of a vehicle, against a process that stores bytes.

Six JPEG cameras at 30 Hz (200 kB each), four IMUs at 200 Hz and a LiDAR of 120,000 points at 10 Hz are published by one
process to two: the policy node, and bare rclpy subscriptions that keep the newest serialized messages in a deque. Both
take the same messages at the same time, with the same QoS, so that each window of time gives a pair of CPU times.

The policy node is active: it stores, sends commands at 50 Hz, publishes diagnostics, and observes once a second, which
decodes one picture of each camera, one cloud and the IMUs. In the model's place is a function that returns zeros
(:mod:`test.benchmarks.without_model`). The peer does nothing of that.

A message is lost when it was published and the node did not store it, by the node's own /diagnostics. Memory is the
node's resident memory beyond what it held before the load began; shared memory of the middleware is part of it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from test.benchmarks.framework import BenchmarkError, Row, Settings, compared, measured
from test.benchmarks.policies import save_sensing
from test.benchmarks.processes import Child, Processes, wait_for
from test.benchmarks.robots import CAMERAS, IMUS, JPEG_BYTES, LIDARS, POINTS, vehicle
from vla_core.observation.memory_buffer import MemoryBuffer
from vla_ros.bridge import stream_qos
from vla_ros.middleware import SEGMENT_BYTES

RUNS = 5
WINDOW_S = 15
LONG_WINDOW_S = 118  # 600 s in all
SETTLE_S = 10
CPU_GOAL = "<= 1.5"
PEER = "bare rclpy subscriptions that keep the same serialized messages"


@dataclass(frozen=True)
class Sample:
    """One second of the run: CPU times so far, seconds, and the policy node's resident memory, bytes."""

    at_s: float
    policy_s: float
    bare_s: float
    rss: int


def sensing(settings: Settings) -> Iterator[Row]:
    """CPU, lost messages and memory."""
    window_s = LONG_WINDOW_S if settings.long else WINDOW_S
    with tempfile.TemporaryDirectory() as scratch, Processes(Path(scratch)) as group:
        folder = Path(scratch)
        save_sensing(folder / "checkpoint", vehicle())
        (folder / "contract.yaml").write_text(vehicle().to_yaml(), encoding="utf-8")
        policy = group.start("policy", "test.benchmarks.without_model", "--ros-args",
                             "-p", f"checkpoint:={folder / 'checkpoint'}")  # fmt: skip
        bare = group.start(
            "bare", "test.benchmarks.peers", "store", "--namespace", "", "--contract", str(folder / "contract.yaml")
        )
        watch = group.start("watch", "test.benchmarks.probes", "diagnostics", "--out", str(folder / "seen.json"))
        wait_for(lambda: "is ready" in policy.output() or policy.process.poll() is not None, "the policy node")
        policy.check()
        time.sleep(2.0)
        before = policy.rss_bytes()
        load = group.start("load", "test.benchmarks.load", "--cameras", f"{CAMERAS}x1280x720@30", "--imus",
                           f"{IMUS}@200", "--lidars", f"{LIDARS}x{POINTS}@10", "--jpeg-bytes", str(JPEG_BYTES),
                           "--subscribers", "2", "--seconds", str(SETTLE_S + RUNS * window_s))  # fmt: skip
        samples = list(_sampled(load, policy, bare))
        published = json.loads(group.finish(load, 5.0).splitlines()[-1])["published"]
        time.sleep(2.5)  # the next diagnostics count the last message
        group.stop(watch)
        seen = json.loads((folder / "seen.json").read_text("utf-8"))
        kept = json.loads(group.stop(bare).splitlines()[-1])
    yield compared("policy node without its model, CPU of a core", "%", cpu_windows(samples, window_s), PEER, CPU_GOAL)
    yield from _losses(published, seen, kept)
    yield from _memory(samples, before)


def _sampled(load: Child, policy: Child, bare: Child) -> Iterator[Sample]:
    """A sample a second while the load runs."""
    start = time.monotonic()
    while load.process.poll() is None:
        policy.check()
        bare.check()
        yield Sample(time.monotonic() - start, policy.cpu_s(), bare.cpu_s(), policy.rss_bytes())
        time.sleep(1.0)


def cpu_windows(samples: Sequence[Sample], window_s: float) -> list[tuple[float, float]]:
    """CPU of both in percent of a core, in the last RUNS windows before the load ended."""
    at = np.array([s.at_s for s in samples])
    used = np.array([[s.policy_s, s.bare_s] for s in samples])
    edges = [int(np.argmin(abs(at - (at[-1] - k * window_s)))) for k in range(RUNS, -1, -1)]
    if len(set(edges)) < len(edges):
        raise BenchmarkError(f"the load ran for {at[-1]:.0f} s, too short for {RUNS} windows of {window_s:.0f} s")
    shares = 100 * np.diff(used[edges], axis=0) / np.diff(at[edges])[:, None]
    return [(float(own), float(peer)) for own, peer in shares]


def middleware_bytes() -> int:
    """What the middleware may hold for the policy node: each stream's queue, and the publisher's shared memory."""
    sizes = {"CompressedImage": JPEG_BYTES, "PointCloud2": 16 * POINTS, "Imu": 0}  # an IMU's 324 bytes are none here
    queues = sum(stream_qos(s).depth * sizes[s.type.rpartition("/")[2]] for s in vehicle().observations.values())
    return queues + SEGMENT_BYTES


def _losses(published: dict[str, int], seen: dict[str, dict[str, str]], kept: dict[str, int]) -> Iterator[Row]:
    """Messages that were published and not stored, IMUs first: their goal is none."""
    status = seen.get("/policy: policy", {})
    if not int(status.get("chunks", 0)) or not int(status.get("commands", 0)):
        raise BenchmarkError(f"the policy node did not act: {status}")
    stored = {values["topic"]: int(values["received"]) for values in seen.values() if "received" in values}
    if set(published) - set(stored):
        raise BenchmarkError(f"/diagnostics name no {', '.join(sorted(set(published) - set(stored)))}")
    for kind, goal in (("imu", "== 0"), ("camera", ""), ("lidar", "")):
        topics = [topic for topic in published if topic.startswith(kind)]
        total = sum(published[topic] for topic in topics)
        for who, counts in (("policy node", stored), ("bare subscriptions", kept)):
            lost = sum(published[topic] - counts[topic] for topic in topics)
            if lost < 0:
                raise BenchmarkError(f"the {who} got {-lost} {kind} messages too many: somebody else publishes them")
            name = f"{kind} messages of {total} that the {who} lost"
            yield measured(name, "messages", [lost], goal if who == "policy node" else "")


def _memory(samples: Sequence[Sample], before: int) -> Iterator[Row]:
    """The peak against the stated bound, and what the second half adds."""
    peak = max(s.rss for s in samples) - before
    bound = MemoryBuffer(vehicle().observations).bound_bytes + middleware_bytes()
    yield compared(
        "memory of the policy node above its start, peak",
        "MB",
        [(peak / 1e6, bound / 1e6)],
        "the stated bound: the memory buffer's, and the middleware's queues and shared memory",
        "<= 1",
    )
    half = samples[len(samples) // 2 :]
    slope = np.polyfit([s.at_s for s in half], [s.rss for s in half], 1)[0]
    yield measured("memory growth in the second half", "MB/min", [60 * slope / 1e6])
