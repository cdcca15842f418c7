"""The command period at 100 Hz while a model of 100 ms computes all the time, against a bare rclpy timer.

The policy node runs its model in its worker thread and sends commands on its control clock. The peer is a process with
nothing but an rclpy timer that publishes the same command, while another process computes the same model: the same
load on the machine, without a share in the interpreter. Both nodes run all the time and are measured in turns: in the
policy's turns it is fed with observations and the other model is halted, in the peer's turns it is the other way round.

An error is the distance of one period from 10 ms: between the commands' stamps, taken when the timer's callback runs,
and between their arrivals in a third process.
"""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from test.benchmarks.framework import BenchmarkError, Row, Settings, compared
from test.benchmarks.policies import save_large
from test.benchmarks.processes import Processes
from test.benchmarks.robots import COMPRESSED, robot

RATE_HZ = 100.0
MODEL_MS = 100.0
FEED_HZ = 30.0
RUNS = 5
TURN_S = 8.0
LONG_TURN_S = 30.0
SETTLE_S = 1.0  # of each turn, not counted
GOAL = "<= 1.5"
PEER = "bare rclpy timer in its own process, the same model computing in another"


def period(settings: Settings) -> Iterator[Row]:
    """Period errors at the 50th and 99th percentile, and what the model took in the meantime."""
    turn_s = LONG_TURN_S if settings.long else TURN_S
    with tempfile.TemporaryDirectory() as scratch, Processes(Path(scratch)) as group:
        folder = Path(scratch)
        save_large(folder / "checkpoint", robot(COMPRESSED, RATE_HZ), MODEL_MS)
        policy = group.start("policy", "vla_ros.policy_node", "--ros-args", "-r", "__ns:=/policy",
                             "-p", f"checkpoint:={folder / 'checkpoint'}",
                             "-p", f"log_dir:={folder / 'log'}")  # fmt: skip
        group.start("bare", "test.benchmarks.peers", "timer", "--rate-hz", str(RATE_HZ))
        load = group.start("model", "test.benchmarks.peers", "model", "--checkpoint", str(folder / "checkpoint"))
        errors: list[dict[str, dict[str, np.ndarray]]] = []
        for _ in range(RUNS):
            load.process.send_signal(signal.SIGSTOP)
            own = _turn(group, folder, turn_s, FEED_HZ)["policy"]
            load.process.send_signal(signal.SIGCONT)
            errors.append({"policy": own, "bare": _turn(group, folder, turn_s, 0.0)["bare"]})
        group.stop(policy)
        other_ms = json.loads(group.stop(load).splitlines()[-1])
        inference_ms = json.loads((folder / "log" / "latency.json").read_text(encoding="utf-8"))["inference_ms"]
    busy = sum(inference_ms) / 1e3 / (RUNS * turn_s)
    if busy < 0.8:
        raise BenchmarkError(f"the policy's model computed {100 * busy:.0f} % of the time; expected at least 80 %")
    for when in ("stamp", "arrival"):
        for percent in (50, 99):
            pairs = [(_percentile(e["policy"][when], percent), _percentile(e["bare"][when], percent)) for e in errors]
            goal = GOAL if percent == 99 else ""
            yield compared(f"command period error at 100 Hz, by {when}, p{percent}", "ms", pairs, PEER, goal)
    pair = (_percentile(inference_ms, 50), _percentile(other_ms, 50))
    yield compared("model in the policy node's worker, p50", "ms", [pair],
                   "the same model in a process of its own, beside the bare timer")  # fmt: skip


def _turn(group: Processes, folder: Path, seconds: float, feed_hz: float) -> dict[str, dict[str, np.ndarray]]:
    """Period errors of each node's commands, ms, by stamp and by arrival."""
    out = folder / "period.json"
    probe = group.start("probe", "test.benchmarks.probes", "period", "policy", "bare", "--type", COMPRESSED,
                        "--seconds", str(seconds), "--feed-hz", str(feed_hz), "--out", str(out))  # fmt: skip
    group.finish(probe, seconds + 60)
    return {name: period_errors(np.asarray(times)) for name, times in json.loads(out.read_text("utf-8")).items()}


def period_errors(times_ns: np.ndarray) -> dict[str, np.ndarray]:
    """Distances (n - 1,) of the periods from 1 / RATE_HZ in ms, of ``times_ns`` (n, 2): stamps and arrivals."""
    if times_ns.ndim != 2:
        raise BenchmarkError("no commands arrived")
    settled = times_ns[times_ns[:, 1] >= times_ns[0, 1] + SETTLE_S * 1e9]
    errors = np.abs(np.diff(settled, axis=0) / 1e6 - 1e3 / RATE_HZ)
    return {"stamp": errors[:, 0], "arrival": errors[:, 1]}


def _percentile(values: np.ndarray | list[float], percent: int) -> float:
    return float(np.percentile(values, percent))
