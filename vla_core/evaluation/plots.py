"""Figures as PNG bytes. Colours are told apart by people who do not see red and green alike (Okabe & Ito)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from vla_core.evaluation.open_loop import Replay

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"


def png(figure: Any) -> bytes:
    """Encode and close a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def replay_traces(replay: Replay) -> bytes:
    """Recorded action and first predicted step over time, one panel an action, with some whole chunks behind."""
    seconds = (replay.stamps_ns - replay.stamps_ns[0]) / 1e9
    step = np.median(np.diff(seconds)) if len(seconds) > 1 else 1.0
    count = len(replay.names)
    figure, axes = plt.subplots(count, 1, figsize=(8, 1.7 * count), sharex=True, squeeze=False)
    horizon = replay.predicted.shape[1]
    for i, axis in enumerate(axes[:, 0]):
        for row in range(0, len(seconds), horizon):
            axis.plot(seconds[row] + step * np.arange(horizon), replay.predicted[row, :, i], color=ORANGE, lw=0.8,
                      alpha=0.6)  # fmt: skip
        axis.plot(seconds, replay.recorded[:, 0, i], color=BLUE, lw=1.6, label="recorded")
        axis.plot(seconds, replay.predicted[:, 0, i], color=ORANGE, lw=1.2, ls="--", label="predicted")
        axis.set_ylabel(f"{replay.names[i]}\n[{replay.units[i]}]")
    axes[0, 0].legend(loc="upper right", ncols=2, fontsize=8)
    axes[-1, 0].set_xlabel("time [s]")
    return png(figure)


def replay_errors(replay: Replay) -> bytes:
    """Error over the horizon, one line an action, as a share of its half range."""
    share = replay.error() / replay.half_range
    figure, axis = plt.subplots(figsize=(5, 3))
    for i, name in enumerate(replay.names):
        axis.plot(np.arange(1, share.shape[1] + 1), np.nanmean(share[..., i], axis=0), marker="o", label=name)
    axis.set_xlabel("step of the chunk")
    axis.set_ylabel("mean absolute error\n/ half range")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    return png(figure)


def success_bars(rows: list[tuple[str, float, float, float]]) -> bytes:
    """Success rates with 95 % intervals; rows of label, rate, low, high."""
    figure, axis = plt.subplots(figsize=(6, 0.5 + 0.45 * len(rows)))
    for place, (label, rate, low, high) in enumerate(reversed(rows)):
        axis.barh(place, rate, color=BLUE if label == rows[0][0] else GREY, height=0.6)
        axis.errorbar(rate, place, xerr=[[rate - low], [high - rate]], color="black", capsize=3, lw=1)
    axis.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    axis.set_xlim(0, 1)
    axis.set_xlabel("success rate, 95 % interval (Wilson)")
    return png(figure)


def lines(curves: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> bytes:
    """Curves of shares by their names; ``x`` and ``y`` are the axes' labels."""
    figure, axis = plt.subplots(figsize=(6, 3))
    for name, points in curves.items():
        axis.plot([point[0] for point in points], [point[1] for point in points], lw=1, label=name)
    axis.set_ylim(0, 1)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.legend(fontsize=8)
    return png(figure)


def training_curve(history: list[tuple[int, float, float | None]]) -> bytes:
    """Training and held-out loss over steps."""
    figure, axis = plt.subplots(figsize=(5, 3))
    axis.plot([h[0] for h in history], [h[1] for h in history], color=BLUE, lw=1, label="training (smoothed)")
    held_out = [(h[0], h[2]) for h in history if h[2] is not None]
    if held_out:
        axis.plot(*zip(*held_out, strict=True), color=ORANGE, marker="o", ms=3, label="held out (averaged weights)")
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(fontsize=8)
    return png(figure)


def latency_histograms(samples: dict[str, list[float]]) -> bytes:
    """Distributions of latencies, milliseconds, on one axis each."""
    figure, axes = plt.subplots(1, len(samples), figsize=(4.5 * len(samples), 2.6), squeeze=False)
    for axis, (name, values) in zip(axes[0], samples.items(), strict=True):
        shown = np.asarray(values)
        axis.hist(shown, bins=40, range=(0, float(np.percentile(shown, 99.5)) if len(shown) else 1.0), color=GREEN)
        axis.set_xlabel(f"{name} [ms]")
        axis.set_ylabel("count")
    return png(figure)


def latency_study(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Success, boundary jump and roughness over latency, one line a strategy; bands are 95 % intervals."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2))
    colours = dict(zip(dict.fromkeys(row["strategy"] for row in rows), (GREY, ORANGE, GREEN, BLUE), strict=False))
    panels = (("success_rate", "success_ci95", "success rate"),
              ("boundary_jump", "boundary_jump_ci95", "boundary jump"),
              ("roughness", "roughness_ci95", "largest second difference"))  # fmt: skip
    for axis, (key, interval, label) in zip(axes, panels, strict=True):
        for strategy, colour in colours.items():
            shown = [row for row in rows if row["strategy"] == strategy and row[key] is not None]
            ms = [row["latency_ms"] for row in shown]
            axis.plot(ms, [row[key] for row in shown], color=colour, marker="o", ms=3, label=strategy)
            bounds = [row[interval] or (row[key], row[key]) for row in shown]
            axis.fill_between(ms, [low for low, _ in bounds], [high for _, high in bounds], color=colour, alpha=0.15)
        axis.set_xlabel("latency [ms]")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    return png(figure)


def comparison(groups: Sequence[Mapping[str, Any]]) -> bytes:
    """A row for each policy, strategy and delay: success, inference time and smoothness, with 95 % intervals."""
    labels = [f"{g['group']}, {g['execution']['strategy']}" + (f", {g['delay_steps']} late" if g["delay_steps"] else "")
              for g in groups]  # fmt: skip
    colours = dict(
        zip(dict.fromkeys(g["group"] for g in groups), (BLUE, ORANGE, GREEN, GREY) * len(groups), strict=False)
    )
    panels = (
        ("success rate", [(g["success_rate"], g["success_ci95"]) for g in groups]),
        ("inference, p50 to p99 [ms]", [(g["timing"]["inference_ms_p50"], (g["timing"]["inference_ms_p50"],
                                        g["timing"]["inference_ms_p99"])) for g in groups]),
        ("boundary jump", [(g["boundary_jump"], g["boundary_jump_ci95"]) for g in groups]),
        ("roughness", [(g["roughness"], g["roughness_ci95"]) for g in groups]),
    )  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 0.9 + 0.4 * len(groups)), sharey=True, squeeze=False)
    for axis, (title, points) in zip(axes[0], panels, strict=True):
        for place, (group, (value, interval)) in enumerate(zip(groups, points, strict=True)):
            if value is None:
                continue
            low, high = interval or (value, value)
            axis.errorbar(value, place, xerr=[[max(0.0, value - low)], [max(0.0, high - value)]], fmt="o", ms=4,
                          color=colours[group["group"]], capsize=3, lw=1)  # fmt: skip
        axis.set_xlabel(title)
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_xlim(-0.02, 1.02)
    axes[0][0].set_yticks(range(len(groups)), labels)
    axes[0][0].set_ylim(len(groups) - 0.5, -0.5)
    return png(figure)


def save(data: bytes, path: Path) -> None:
    """Write an encoded figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
