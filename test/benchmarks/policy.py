"""How fast policies answer as graphs and quantized, and SmolVLA beside LeRobot's own code.

``vla bench policy`` measures; here its figures become rows with goals.
"""

from __future__ import annotations

from collections.abc import Iterator

from test.benchmarks.framework import BenchmarkError, Row, Settings, Suite, compared, measured
from vla_core.evaluation.policy_bench import WAYS, BenchOptions, bench, preset

GOAL = "<= 0.5"  # of the eager latency: twice as fast


def ways_of(name: str, settings: Settings, ways: tuple[str, ...], goal: str = "") -> Iterator[Row]:
    """A preset's latency in each way, beside the eager one of the same round."""
    options = BenchOptions(ways=ways, rounds=40 if settings.long else 12, calls=20)
    record = bench(preset(name), options, name)
    if record["refused"]:
        raise BenchmarkError("; ".join(f"{way}: {why}" for way, why in record["refused"].items()))
    rows = {row["way"]: row for row in record["rows"]}
    eager = rows.pop("eager")["round_ms"]
    for way, row in rows.items():
        pairs = list(zip(row["round_ms"], eager, strict=True))
        fast = goal if way in ("onnx", "compiled") else ""
        yield compared(f"{name}, {way}: latency", "ms", pairs, "eager, in this run", fast)
        yield measured(f"{name}, {way}: largest error", "of the half range", [row["max_error"]])
        yield measured(f"{name}, {way}: memory of its process", "MB", [row["memory_mb"]])


def tiny(settings: Settings) -> Iterator[Row]:
    """The preset `tiny` in every way."""
    yield from ways_of("tiny", settings, tuple(WAYS), GOAL)


def driving(settings: Settings) -> Iterator[Row]:
    """The preset `driving_tiny`, of many sensors."""
    yield from ways_of("driving_tiny", settings, ("eager", "torchscript", "onnx"))


def smolvla(settings: Settings) -> Iterator[Row]:
    """SmolVLA with LeRobot's own code beside it, the same weights in both."""
    from test.benchmarks.smolvla import compare

    found = compare("smolvla-256m", chunks=9 if settings.long else 5)
    ours, theirs = found["ours_wall_s"], found["lerobot_wall_s"]
    yield compared("SmolVLA 256M: a chunk", "s", [(ours, theirs)], "LeRobot's own code, in this run", "<= 0.667")
    yield measured("SmolVLA 256M: largest difference", "normalized", [found["largest_difference"]], "<= 0.0001")


BENCHMARKS: Suite = {"tiny": tiny, "driving_tiny": driving, "smolvla": smolvla}
