"""The plots, tables and contact sheets of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.inspect import figures
from vla_core.inspect.dataset import ACTION, STATE, Columns, Frames, action_limits, conversion, tasks
from vla_core.inspect.report import Picture, Section, Table, number

TRACED = 3  # episodes
SHEET = 8  # episodes of a contact sheet, two a row
HEAD = ("stream", "topic", "messages", "Hz", "match", "mean ms", "p95 ms", "max ms", "missing", "stale", "future",
        "late")  # fmt: skip


def sections(folder: LeRobotFolder, columns: Columns, looked: Sequence[Frames]) -> list[Section]:
    """What can be seen of a dataset, as parts of a page."""
    found = [Section("Episodes", table=_tasks(folder), pictures=_lengths(columns))]
    sheets = [Picture(camera, _sheet([one for one in looked if one.camera == camera], folder.info.fps), "jpeg")
              for camera in folder.info.cameras]  # fmt: skip
    if sheets:
        note = "First, middle and last picture of a sample of the episodes."
        found.append(Section("Cameras", note, pictures=sheets))
    seen = [name for name in (ACTION, STATE) if name in columns.values]
    for name in seen:
        plots = [
            Picture(_caption(columns, name), _distributions(columns, name)),
            Picture("A panel for each of some episodes.", _traces(columns, name, folder.info.fps)),
        ]
        found.append(Section(name, table=_statistics(columns, name), pictures=plots))
    others = [name for name in columns.values if name not in seen]
    for name in others:
        found.append(Section(name, table=_statistics(columns, name)))
    report = conversion(folder)
    if report is not None:
        found.append(_conversion(report))
    return found


def _tasks(folder: LeRobotFolder) -> Table:
    return Table(("instruction", "frames"), [(task, str(count)) for task, count in tasks(folder).most_common()])


def _lengths(columns: Columns) -> list[Picture]:
    if len(columns.lengths) == 1:
        return []
    plot = figures.histograms({"length": columns.lengths.astype(float)}, "frames")
    return [Picture("Lengths of the episodes.", plot)]


def _statistics(columns: Columns, feature: str) -> Table:
    rows: list[tuple[str, ...]] = []
    for name, column in zip(columns.names[feature], columns.values[feature].T, strict=True):
        there = column[np.isfinite(column)].astype(np.float64)
        if not len(there):
            rows.append((name, *("",) * 6, "0 %"))
            continue
        q01, q99 = np.quantile(there, [0.01, 0.99])
        shown = (there.min(), q01, there.mean(), q99, there.max(), there.std())
        rows.append((name, *(number(float(x)) for x in shown), f"{100 * len(there) / len(column):.0f} %"))
    return Table(("entry", "min", "1 %", "mean", "99 %", "max", "std", "there"), rows)


def _caption(columns: Columns, feature: str) -> str:
    width = len(columns.names[feature])
    first = f", the first {figures.PANELS} of {width} entries" if width > figures.PANELS else ""
    return f"All frames{first}{'; dashed: the limits of the contract' if _has_limits(columns, feature) else ''}."


def _has_limits(columns: Columns, feature: str) -> bool:
    return feature == ACTION and action_limits(columns) is not None


def _distributions(columns: Columns, feature: str) -> bytes:
    values = dict(zip(columns.names[feature], columns.values[feature].T.astype(np.float64), strict=True))
    marks = {}
    limits = action_limits(columns) if feature == ACTION else None
    if limits is not None:
        marks = {name: list(pair) for name, pair in zip(values, zip(*limits, strict=True), strict=True)}
    return figures.histograms(values, "", marks)


def _traces(columns: Columns, feature: str, fps: float) -> bytes:
    count = len(columns.lengths)
    chosen = np.unique(np.linspace(0, count - 1, min(count, TRACED)).astype(int))
    groups = {}
    for episode in chosen:
        values = columns.values[feature][columns.starts[episode] : columns.starts[episode + 1]]
        groups[f"episode {episode}"] = (np.arange(len(values)) / fps, values, columns.names[feature])
    return figures.traces(groups)


def _sheet(looked: Sequence[Frames], fps: float) -> bytes:
    chosen = [looked[i] for i in np.unique(np.linspace(0, len(looked) - 1, min(len(looked), SHEET)).astype(int))]
    each = [[(f"{one.episode}: {frame / fps:.1f} s", pixels) for frame, pixels in one.shown] for one in chosen]
    return figures.contact_sheet([[*left, *right] for left, right in zip(each[::2], [*each[1::2], []], strict=False)])


def _conversion(report: Mapping[str, Any]) -> Section:
    rows = []
    for name, stream in (report.get("streams") or {}).items():
        error = stream.get("error_ms") or {}
        cells = [stream.get("rate_hz"), stream.get("match"), *(error.get(key) for key in ("mean", "p95", "max"))]
        counts = [str(stream.get(key, "")) for key in ("missing", "stale", "future", "late")]
        rows.append((name, str(stream.get("topic", "")), str(stream.get("messages", "")),
                     *("" if cell is None else number(cell) for cell in cells), *counts))  # fmt: skip
    labels = {"bags": "bags", "ticks": "ticks", "dropped_ticks": "dropped", "outside_ticks": "outside of episodes"}
    facts = ", ".join(f"{report[key]} {label}" for key, label in labels.items() if key in report)
    left_out = [f"{entry.get('bag')}: {entry.get('why')}" for entry in report.get("left_out") or ()]
    bad = [str(entry.get("error")) for entry in report.get("bad") or ()]
    note = ". ".join([facts, *(["Left out: " + "; ".join(left_out)] if left_out else []),
                      *(["Bad: " + "; ".join(bad)] if bad else [])])  # fmt: skip
    return Section("Conversion", note, Table(HEAD, rows))
