"""Plots and contact sheets of an inspection, as encoded pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

THUMB_HEIGHT = 120  # pixels
SHEET_WIDTH = 1150
Group = tuple[np.ndarray, np.ndarray, Sequence[str]]  # x (N,), values (N, D), names of the D entries
PANELS = 24  # small multiples in one figure


def timeline(
    tracks: Mapping[str, np.ndarray], gaps: Mapping[str, Sequence[tuple[float, float]]], end_s: float
) -> bytes:
    """When messages came: a row for each topic, its seconds (N,) as density, its gaps (begin, end) marked."""
    plt, plots = _library()
    figure, axis = plt.subplots(figsize=(11, 0.6 + 0.32 * len(tracks)))
    bins = np.linspace(0, max(end_s, 1e-3), 401)
    for row, (topic, seconds) in enumerate(tracks.items()):
        counts, _ = np.histogram(seconds, bins)
        shade = np.minimum(1.0, counts / max(1.0, float(np.percentile(counts, 95))))
        axis.imshow(shade[None], extent=(0, bins[-1], row + 0.4, row - 0.4), aspect="auto", cmap="Blues", vmin=0,
                    vmax=1.3)  # fmt: skip
        for begin, end in gaps.get(topic, ()):
            axis.axvspan(begin, end, 1 - (row + 0.9) / len(tracks), 1 - (row + 0.1) / len(tracks), color=plots.ORANGE)
    axis.set_ylim(len(tracks) - 0.5, -0.5)
    axis.set_yticks(range(len(tracks)), list(tracks), fontsize=8)
    axis.set_xlabel("time [s]")
    return bytes(plots.png(figure))


def histograms(
    values: Mapping[str, np.ndarray],
    unit: str,
    marks: Mapping[str, Sequence[float]] | None = None,
    log: bool = False,
) -> bytes:
    """A small histogram for each name; ``marks`` are lines across it, such as an expected value or limits."""
    plt, plots = _library()
    names = list(values)[:PANELS]
    figure, axes = _grid(plt, len(names), 2.75, 1.6)
    for axis, name in zip(axes, names, strict=False):
        shown = values[name][np.isfinite(values[name])]
        low, high = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 1.0)
        around = abs(low) / 2 or 1.0 if high - low <= 1e-9 * abs(low) else 0.0
        axis.hist(shown, bins=50, range=(low - around, high + around), color=plots.BLUE, log=log)
        for mark in (marks or {}).get(name, ()):
            axis.axvline(mark, color=plots.ORANGE, lw=1.2, ls="--")
        axis.set_title(name if len(name) < 34 else f"…{name[-32:]}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_yticks([])
        axis.set_yticks([], minor=True)
        axis.xaxis.set_major_locator(plt.MaxNLocator(5))
        axis.set_xlabel(unit, fontsize=7, labelpad=1)
    return bytes(plots.png(figure))


def traces(groups: Mapping[str, Group], label: str = "time [s]") -> bytes:
    """A panel for each group."""
    plt, plots = _library()
    figure, axes = plt.subplots(len(groups), 1, figsize=(11, 1.75 * len(groups) + 0.4), sharex=True, squeeze=False)
    for axis, (name, (x, values, entries)) in zip(axes[:, 0], groups.items(), strict=True):
        colours = plt.cm.viridis(np.linspace(0.05, 0.9, values.shape[1]))
        for i, colour in enumerate(colours):
            axis.plot(x, values[:, i], lw=0.9, color=colour, label=entries[i])
        axis.set_title(name, fontsize=8, loc="left", pad=2)
        axis.tick_params(labelsize=7)
        if values.shape[1] <= 8:
            axis.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes[-1, 0].set_xlabel(label)
    return bytes(plots.png(figure))


def ranges(rows: Sequence[tuple[str, float, float, float, float, float, float]]) -> bytes:
    """For each entry the range of the data and its middle 98 % inside of its limits.

    Rows of name, low, high, min, q01, q99, max; all are drawn as shares of low to high.
    """
    plt, plots = _library()
    figure, axis = plt.subplots(figsize=(8, 0.7 + 0.32 * len(rows)))
    for place, (_, low, high, least, q01, q99, most) in enumerate(rows):
        share = (np.array([least, q01, q99, most]) - low) / (high - low)
        axis.plot(share[[0, 3]], [place, place], color=plots.GREY, lw=2)
        axis.plot(share[[1, 2]], [place, place], color=plots.BLUE, lw=7, solid_capstyle="butt")
    axis.axvspan(0, 1, color=plots.GREEN, alpha=0.1)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xticks([0, 0.5, 1], ["low", "middle", "high"])
    axis.set_xlabel("the contract's limits; bar: 1 % to 99 % of the data, line: all of it", fontsize=8)
    return bytes(plots.png(figure))


def bars(values: Mapping[str, float], unit: str, log: bool = False) -> bytes:
    """A horizontal bar for each name."""
    plt, plots = _library()
    figure, axis = plt.subplots(figsize=(8, 0.5 + 0.3 * len(values)))
    axis.barh(range(len(values)), list(values.values()), color=plots.BLUE, height=0.65, log=log)
    axis.set_yticks(range(len(values)), list(values), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    return bytes(plots.png(figure))


def lines(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, log: bool = False) -> bytes:
    """Curves by name over a shared axis."""
    plt, plots = _library()
    figure, axis = plt.subplots(figsize=(8, 3))
    palette = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.GREY)
    for i, (name, (xs, ys)) in enumerate(series.items()):
        few = len(xs) < 60
        axis.plot(xs, ys, lw=1.3, color=palette[i % len(palette)], label=name, marker="o" if few else None, ms=3)
    if log:
        axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.legend(fontsize=8)
    return bytes(plots.png(figure))


def contact_sheet(rows: Sequence[Sequence[tuple[str, np.ndarray]]]) -> bytes:
    """JPEG of rows of pictures (H, W, 3) uint8 RGB, each with a short label; all are shown at one height."""
    drawn = [np.concatenate([_thumb(label, pixels) for label, pixels in row], axis=1) for row in rows if row]
    width = max(row.shape[1] for row in drawn)
    padded = [np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in drawn]
    sheet = np.concatenate(padded)
    if width > SHEET_WIDTH:
        height = round(len(sheet) * SHEET_WIDTH / width)
        sheet = cv2.resize(sheet, (SHEET_WIDTH, height), interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])
    return encoded.tobytes()


def _thumb(label: str, pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    shown = (max(1, round(width * THUMB_HEIGHT / height)), THUMB_HEIGHT)
    how = cv2.INTER_AREA if height > THUMB_HEIGHT else cv2.INTER_NEAREST
    thumb = cv2.resize(np.ascontiguousarray(pixels), shown, interpolation=how)
    for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(thumb, label, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, thickness, cv2.LINE_AA)
    return np.pad(thumb, ((0, 0), (0, 4), (0, 0)), constant_values=255)


def _grid(plt: Any, count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    columns = min(4, max(1, count))
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    figure.subplots_adjust(hspace=0.75, wspace=0.15)
    return figure, flat


def _library() -> tuple[Any, Any]:
    """matplotlib's pyplot, without a display, and the house's colours; both take a second to import."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from vla_core.evaluation import plots

    return plt, plots
