"""What the policy node counts and tells: numbers and the state of its sensors, without the node."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vla_core.contract import NANOSECONDS
from vla_core.evaluation import metrics
from vla_core.runtime.core import PolicyCore

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
