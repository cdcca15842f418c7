"""What the policy node counts and tells people: its numbers, the state of its sensors, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.node import Node

from vla_core.contract import NANOSECONDS
from vla_core.evaluation import metrics
from vla_core.evaluation.parity import InputLog
from vla_core.runtime.chunk_executor import ActionChunk
from vla_core.runtime.core import PolicyCore
from vla_ros.bridge import misfit
from vla_ros.diagnostics import fault_status

RECENT = 500  # samples behind a diagnostic figure: sorting all would hold up the control clock once a second


@dataclass
class Counts:
    """Since the node was made; ``late_ticks`` are control periods of more than one and a half times their length.

    None is counted in simulated time, whose steps are those of who publishes it.
    """

    commands: int = 0
    safe_commands: int = 0
    chunks: int = 0
    faults: int = 0
    late_ticks: int = 0
    instruction_changes: int = 0

    def as_dict(self) -> dict[str, int]:
        """Name to count."""
        return dataclasses.asdict(self)


class RunLog:
    """Latencies and, with ``inputs``, what the model was given, for a folder."""

    def __init__(self, folder: Path, inputs: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)  # fails here, not after the run
        self._folder = folder
        self._inputs = InputLog() if inputs else None

    def add(self, core: PolicyCore, chunk: ActionChunk) -> None:
        """Keep what the newest chunk was made of."""
        if self._inputs is not None and core.last_observation is not None:
            self._inputs.add(core.last_observation, chunk)

    def write(self, core: PolicyCore, counts: Counts, latency_ms: Sequence[float]) -> None:
        """Write the files; ``latency_ms`` is from observation to command."""
        record = {
            "observe_ms": list(core.observe_ms),
            "inference_ms": list(core.inference_ms),
            "observation_to_command_ms": list(latency_ms),
            "execution": core.metrics.summary(),
            "counts": counts.as_dict(),
        }
        (self._folder / "latency.json").write_text(json.dumps(record), encoding="utf-8")
        if self._inputs is not None:
            self._inputs.save(self._folder / "inputs.safetensors", core.policy)


def statuses(
    node: Node, core: PolicyCore, at_ns: int, lost: Mapping[str, int], values: Mapping[str, Any], causes: Sequence[str]
) -> list[DiagnosticStatus]:
    """How the policy is, by ``values`` and the ``causes`` of what is wrong, and each of its sensors at ``at_ns``."""
    hardware = core.contract.name
    return [
        fault_status(node, "policy", values, "; ".join(dict.fromkeys(filter(None, causes))), hardware),
        *(fault_status(node, f"sensor {name}", seen, fault, hardware)
          for name, (fault, seen) in sensor_values(core, at_ns, lost).items()),
    ]  # fmt: skip


def figures(core: PolicyCore, counts: Counts, latency_ms: Sequence[float]) -> dict[str, Any]:
    """The numbers of the policy; ``latency_ms`` is from observation to command."""
    return {
        "strategy": core.executor.execution.strategy, **counts.as_dict(),
        **percentiles("inference_ms", core.inference_ms), **percentiles("observation_to_command_ms", latency_ms),
        **core.metrics.summary(RECENT), **core.policy.report(),
    }  # fmt: skip


def waiting(core: PolicyCore, at_ns: int, unheard: Sequence[str], clocked: bool) -> list[str]:
    """What an active policy waits for, also before anything came and after all of it fell silent.

    ``unheard`` are command topics that must have a subscriber first; ``clocked``: time comes from ``/clock``.
    """
    if clocked and at_ns == 0:
        return ["use_sim_time is true and time is 0: nothing was received on /clock"]
    return [*(f"waiting for a subscriber of {topic}" for topic in unheard), *core.builder.lost(core.buffer, at_ns)]


def first_misfit(node: Node, core: PolicyCore) -> str:
    """Name a publisher that is not heard: the middleware would only stay silent about it."""
    for name, stream in core.builder.streams.items():
        reason = misfit(node, stream) if core.buffer.newest_ns(name) is None else ""
        if reason:
            return f"{name} ({stream.topic}): {reason}"
    return ""


def percentiles(name: str, samples: Sequence[float]) -> dict[str, float | None]:
    """``<name>_p50`` and ``<name>_p99``; None without samples."""
    found = list(samples.copy()) if hasattr(samples, "copy") else list(samples)  # in one step: a worker may append
    return metrics.percentiles(name, found[-RECENT:])


def sensor_values(
    core: PolicyCore, at_ns: int, lost: Mapping[str, int]
) -> dict[str, tuple[str, dict[str, float | int | str | None]]]:
    """Per stream: what is wrong with it (empty: nothing), and its rate, age, duplicates and drops.

    ``lost`` is what the middleware lost per stream, by the gaps in its publishers' numbers.
    """
    out: dict[str, tuple[str, dict[str, float | int | str | None]]] = {}
    lines = [*core.builder.lost(core.buffer, at_ns), *core.builder.masked(core.buffer, at_ns)]
    reasons = {line.split(" ")[0]: line for line in lines}
    for name, stream in core.builder.streams.items():
        statistics = core.buffer.statistics(name)
        newest_ns = core.buffer.newest_ns(name)
        values: dict[str, float | int | str | None] = {
            "topic": stream.topic,
            "age_s": None if newest_ns is None else (at_ns - newest_ns) / NANOSECONDS,
            "expected_hz": stream.rate_hz,
            "lost": lost.get(name, 0),
            **dataclasses.asdict(statistics),
        }
        out[name] = (reasons.get(name, ""), values)
    return out
