"""The plots and contact sheets of a bag."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from vla_core.contract import NANOSECONDS
from vla_core.inspect import figures
from vla_core.inspect.report import Picture, Section, Table, number
from vla_core.inspect.timing import LEAST, SILENT, Timing
from vla_core.inspect.tracks import Track

TRACED = 1500  # points of a trace
TIMELINE_NOTE = "Orange: silent for longer than the contract's age allows, or for more than ten usual intervals."


def sections(tracks: Mapping[str, Track], timings: Mapping[str, Timing], duration_s: float) -> list[Section]:
    """What can be seen of a bag, as parts of a page."""
    found = []
    sheets = [Picture(topic, _sheet(track, timings[topic]), "jpeg") for topic, track in tracks.items() if track.shots]
    if sheets:
        found.append(Section("Cameras", pictures=sheets))
    groups = {title: group for topic, track in tracks.items() for title, group in _groups(track, timings[topic])}
    if groups:
        plot = Picture("Every stream over time.", figures.traces(groups))
        found.append(Section("Numbers", table=_numbers(tracks), pictures=[plot]))
    heard = [topic for topic, track in tracks.items() if track.count]
    seconds, gaps = {t: timings[t].seconds for t in heard}, {t: timings[t].gaps for t in heard}
    plot = Picture("Messages by their stamps.", figures.timeline(seconds, gaps, duration_s))
    found.append(Section("Timeline", TIMELINE_NOTE, pictures=[plot]))
    rated = {topic: timing for topic, timing in timings.items()
             if len(timing.intervals_ms) >= LEAST and tracks[topic].type not in SILENT}  # fmt: skip
    if rated:
        marks = {topic: [t.period_ms] for topic, t in rated.items() if t.period_ms is not None}
        plot = Picture("Time between two stamps; dashed: the contract's.", figures.histograms(
            {topic: t.intervals_ms for topic, t in rated.items()}, "ms", marks, log=True))  # fmt: skip
        found.append(Section("Intervals", pictures=[plot]))
    late = {topic: t.latencies_ms for topic, t in rated.items() if len(t.latencies_ms) and np.ptp(t.latencies_ms) > 0}
    if late:
        plot = Picture("From a message's stamp to its receipt.", figures.histograms(late, "ms", log=True))
        found.append(Section("Latency", pictures=[plot]))
    return found


def _sheet(track: Track, timing: Timing) -> bytes:
    shown = [(f"{(shot.stamp_ns - timing.zero_ns) / NANOSECONDS:.2f} s", shot.pixels) for shot in track.shots
             if shot.pixels is not None]  # fmt: skip
    return figures.contact_sheet([shown])


def _groups(track: Track, timing: Timing) -> Iterator[tuple[str, figures.Group]]:
    """Panels of the traces with their titles."""
    for name, kept in track.numbers.items():
        step = max(1, len(kept.rows) // TRACED)
        x = (np.array(kept.stamps_ns[::step]) - timing.zero_ns) / NANOSECONDS
        title = name if name == track.topic else f"{name} ({track.topic})"
        yield title, (x, np.stack(kept.rows[::step]), kept.names)


def _numbers(tracks: Mapping[str, Track]) -> Table:
    rows = []
    for track in tracks.values():
        for name, kept in track.numbers.items():
            for entry, column in zip(kept.names, np.stack(kept.rows).T, strict=True):
                figures_ = (column.min(), column.mean(), column.max(), column.std())
                still = "never moves" if np.ptp(column) == 0 else ""
                rows.append((name, entry, *map(number, figures_), still))
    return Table(("stream", "entry", "min", "mean", "max", "std", ""), rows)
