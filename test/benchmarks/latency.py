"""From an observation to its command: the policy node without its model's time, against bare rclpy chains.

Three nodes run as processes of their own and are asked in turn, one observation at a time, by a fourth that measures
from giving the image to rclpy to the arrival of the command. The policy node runs with ``inference: synchronous``,
where the observation's arrival drives the answer; with ``asynchronous`` commands leave on the control clock, and the
wait for it, half a period in the mean, would hide what is measured here. From each of its answers the model's time
for that very observation is taken off: tensors and prediction, as the node itself logs it.

Decoding belongs to a policy's graph and not to a chain of messages, so that three rows answer for each image:

``against bare``            the peer takes the same serialized messages with the same QoS and answers with a command;
                            what is above it is all of this package's own work, decoding and resizing included
``unobserved, …``           the same without the time of observing (decoding, resizing), as the node itself logs it:
                            what storing, scheduling, executing and encoding cost
``against decoding``        the peer is the plain node that does that work too: ordinary subscriptions, OpenCV to the
                            model's pixels, a command
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from test.benchmarks.framework import BenchmarkError, Row, Settings, compared
from test.benchmarks.policies import save_small
from test.benchmarks.processes import Processes
from test.benchmarks.robots import robot

RUNS = 5
COUNT = 120  # observations a run, to each node
LONG_COUNT = 600
RATE_HZ = 200.0  # more than the nodes are asked, so that an image is never taken for the next observation's
GOAL = "<= 1.3"
PEERS = {
    "bare": "bare rclpy chain: serialized image in, command out",
    "decoding": "plain rclpy node: image in, decoded and resized by OpenCV, command out",
}


def latency(title: str, camera_type: str, width: int, height: int) -> Callable[[Settings], Iterator[Row]]:
    """The benchmark of one image size and kind."""

    def benchmark(settings: Settings) -> Iterator[Row]:
        count = LONG_COUNT if settings.long else COUNT
        found, log = _measure(camera_type, width, height, RUNS * count)
        policy = found["policy"] - log["inference_ms"]
        yield from _rows(title, policy, found, "bare")
        if "observe_ms" in log:
            yield from _rows(f"{title}, unobserved", policy - log["observe_ms"], found, "bare")
        yield from _rows(title, policy, found, "decoding")

    return benchmark


def _rows(title: str, policy: np.ndarray, found: dict[str, np.ndarray], peer: str) -> Iterator[Row]:
    """The 50th and the 99th percentile of latencies (n,) in ms, in runs of equal length."""
    for percent in (50, 99):
        pairs = [
            (float(np.percentile(own, percent)), float(np.percentile(other, percent)))
            for own, other in zip(policy.reshape(RUNS, -1), found[peer].reshape(RUNS, -1), strict=True)
        ]
        yield compared(f"{title}, against {peer}, p{percent}", "ms", pairs, PEERS[peer], GOAL)


def _measure(
    camera_type: str, width: int, height: int, count: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Latencies (count,) of each node, and of the policy's log what it needed for the same observations; all in ms."""
    with tempfile.TemporaryDirectory() as scratch, Processes(Path(scratch)) as group:
        folder = Path(scratch)
        save_small(folder / "checkpoint", robot(camera_type, RATE_HZ))
        policy = group.start("policy", "vla_ros.policy_node", "--ros-args", "-r", "__ns:=/policy",
                             "-p", f"checkpoint:={folder / 'checkpoint'}", "-p", "inference:=synchronous",
                             "-p", f"log_dir:={folder / 'log'}")  # fmt: skip
        for name, peer in (("bare", "chain"), ("decoding", "decoding")):
            group.start(name, "test.benchmarks.peers", peer, "--namespace", name, "--type", camera_type)
        probe = group.start("probe", "test.benchmarks.probes", "latency", "policy", *PEERS, "--type", camera_type,
                            "--size", str(width), str(height), "--count", str(count),
                            "--out", str(folder / "latency.json"))  # fmt: skip
        group.finish(probe, 120 + 0.5 * count)
        group.stop(policy)
        found = json.loads((folder / "latency.json").read_text(encoding="utf-8"))
        log = json.loads((folder / "log" / "latency.json").read_text(encoding="utf-8"))
    if len(log["inference_ms"]) < count:
        raise BenchmarkError(f"the policy answered {count} observations and inferred {len(log['inference_ms'])} times")
    stages = {name: np.asarray(log[name][-count:]) for name in ("inference_ms", "observe_ms") if name in log}
    return {name: np.asarray(values) / 1e6 for name, values in found.items()}, stages
