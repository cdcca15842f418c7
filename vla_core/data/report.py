"""What a conversion found: per stream how many ticks it served, how far its samples were in time, and what was lost."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from vla_core.contract import NANOSECONDS
from vla_core.data.bag import BagInfo
from vla_core.data.episodes import Commands, Tick
from vla_core.data.recording import DROPPED_KEY
from vla_core.errors import VlaError
from vla_core.observation.builder import NO_LIMIT_NS, ObservationBuilder
from vla_core.observation.memory_buffer import MemoryBuffer
from vla_core.observation.sampling import Picked, pick

BIN_NS = 100_000  # time errors of many bags are kept in steps of 0.1 ms
MS = 1e6


class ThresholdError(VlaError):
    """A conversion that is worse than what was asked for."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What every stream of every bag must keep.

    ``min_match`` is the least share of ticks at which it must be there, ``max_error_ms`` the largest distance in time
    between a tick and its sample; None asks for nothing. ``max_lost`` is the largest share of a topic's messages that
    may be too late to be sorted or stamped in the future; a bag with more is a bad one.
    """

    min_match: float | None = None
    max_error_ms: float | None = None
    max_lost: float = 0.05

    def __post_init__(self) -> None:
        for key in ("min_match", "max_lost"):
            share = getattr(self, key)
            if share is not None and not 0 <= share <= 1:
                raise ThresholdError(f"{key}: expected a share from 0 to 1, found {share}")
        if self.max_error_ms is not None and not self.max_error_ms > 0:
            raise ThresholdError(f"max_error_ms: expected a positive time, found {self.max_error_ms}")


@dataclass
class StreamReport:
    """Counts of one stream; those of several bags add up.

    ``messages`` came over ``seconds``. Of ``ticks`` it was there at ``matched``; at ``missing`` nothing had come, at
    ``stale`` what had come was older than its limit or too far from the tick. ``late`` messages came too late to be
    sorted, ``future`` ones were stamped in the future and left out, ``dropped`` ones the recorder had no room for, by
    what it wrote into the bag. The time error is the distance between tick and
    sample; of a command, None.
    """

    topic: str
    messages: int = 0
    seconds: float = 0.0
    ticks: int = 0
    matched: int = 0
    missing: int = 0
    stale: int = 0
    late: int = 0
    future: int = 0
    dropped: int = 0
    error_sum_ns: int = 0
    error_max_ns: int = 0
    errors: Counter[int] = field(default_factory=Counter)  # by steps of BIN_NS

    @property
    def match(self) -> float | None:
        """Share of ticks at which it was there."""
        return self.matched / self.ticks if self.ticks else None

    @property
    def lost(self) -> float:
        """Share of messages that are late or from the future."""
        return (self.late + self.future) / self.messages if self.messages else 0.0

    def add_errors(self, errors_ns: np.ndarray) -> None:
        """Take in time errors (N,) int64 nanoseconds, of either sign."""
        if len(errors_ns):
            size = np.abs(errors_ns)
            self.error_sum_ns += int(size.sum())
            self.error_max_ns = max(self.error_max_ns, int(size.max()))
            bins, counts = np.unique(size // BIN_NS, return_counts=True)
            self.errors.update(dict(zip(bins.tolist(), counts.tolist(), strict=True)))

    def merge(self, other: StreamReport) -> None:
        """Add the counts of another bag."""
        for f in fields(self):
            if f.name == "error_max_ns":
                self.error_max_ns = max(self.error_max_ns, other.error_max_ns)
            elif f.name != "topic":
                setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def error_ms(self) -> dict[str, float] | None:
        """Mean, 95th percentile (rounded down to 0.1 ms) and maximum of the time error, ms; None without any."""
        count = sum(self.errors.values())
        if not count:
            return None
        ordered = sorted(self.errors.items())
        place = int(np.searchsorted(np.cumsum([n for _, n in ordered]), 0.95 * count))
        p95_ns = ordered[place][0] * BIN_NS
        return {"mean": self.error_sum_ns / count / MS, "p95": p95_ns / MS, "max": self.error_max_ns / MS}

    def to_dict(self) -> dict[str, Any]:
        """Figures for the report."""
        rate = self.messages / self.seconds if self.seconds else None
        return {
            "topic": self.topic, "messages": self.messages, "rate_hz": rate, "ticks": self.ticks, "match": self.match,
            "error_ms": self.error_ms(), "missing": self.missing, "stale": self.stale, "late": self.late,
            "future": self.future, "dropped": self.dropped,
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Everything, as plain data that :meth:`from_state` reads."""
        return {**asdict(self), "errors": sorted(self.errors.items())}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StreamReport:
        """What :meth:`state` wrote."""
        return cls(**{**state, "errors": Counter(dict(state["errors"]))})


class BagCounts:
    """Counts over the ticks of one bag, while its buffer is at each of them."""

    def __init__(self, builder: ObservationBuilder, buffer: MemoryBuffer, commands: Commands) -> None:
        self._builder, self._buffer, self._commands = builder, buffer, commands
        self._errors = {name: array("q") for name in builder.streams}
        self._missing: Counter[str] = Counter()
        self._stale: Counter[str] = Counter()
        self._answered = self.ticks = 0

    def add(self, tick: Tick) -> None:
        """Count a tick; the buffer must still be at it."""
        self.ticks += 1
        self._answered += tick.action is not None
        ages = {} if tick.observation is None else tick.observation.ages_ns
        if len(ages) == len(self._errors):
            for name, age_ns in ages.items():
                self._errors[name].append(age_ns)
            return
        until_ns = NO_LIMIT_NS if self._builder.contract.offline else tick.stamp_ns
        for name, stream in self._builder.streams.items():
            found = pick(self._buffer, name, stream, tick.stamp_ns, until_ns)
            if isinstance(found, Picked):
                self._errors[name].append(tick.stamp_ns - found.stamp_ns)
            elif found == "nothing received":
                self._missing[name] += 1
            else:
                self._stale[name] += 1

    def result(self, bag: BagInfo, late: Mapping[str, int], future: Mapping[str, int]) -> dict[str, StreamReport]:
        """Reports by stream, and by action as ``action.<name>``."""
        seconds = (bag.end_ns - bag.start_ns) / NANOSECONDS
        dropped = json.loads(bag.metadata.get(DROPPED_KEY, "{}"))

        def counted(topic: str) -> StreamReport:
            return StreamReport(topic, messages=bag.counts[topic], seconds=seconds, ticks=self.ticks,
                                late=late.get(topic, 0), future=future.get(topic, 0),
                                dropped=int(dropped.get(topic, 0)))  # fmt: skip

        found = {}
        for name, stream in self._builder.streams.items():
            report = found[name] = counted(stream.topic)
            report.matched, report.missing = len(self._errors[name]), self._missing[name]
            report.stale = self._stale[name]
            if not stream.latched:  # how long a text has held says nothing
                report.add_errors(np.frombuffer(self._errors[name], np.int64))
        for name, action in self._builder.contract.actions.items():
            report = found[f"action.{name}"] = counted(action.topic)
            report.matched = self._answered
            report.missing = self.ticks - self._answered
        return found


@dataclass
class Report:
    """The report of a conversion: figures of all bags together, and of each."""

    bags: int = 0
    episodes: int = 0
    frames: int = 0
    ticks: int = 0
    dropped_ticks: int = 0
    outside_ticks: int = 0
    streams: dict[str, StreamReport] = field(default_factory=dict)
    by_bag: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    bad: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, streams: Mapping[str, StreamReport], counts: Mapping[str, int]) -> None:
        """Take in a bag; ``counts`` has its ``ticks``, ``dropped_ticks`` and ``outside_ticks``."""
        self.bags += 1
        self.ticks += counts["ticks"]
        self.dropped_ticks += counts["dropped_ticks"]
        self.outside_ticks += counts["outside_ticks"]
        for key, stream in streams.items():
            self.streams.setdefault(key, StreamReport(stream.topic)).merge(stream)
        self.by_bag[name] = {**counts, "streams": {key: stream.to_dict() for key, stream in streams.items()}}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``report.json``."""
        return {
            "bags": self.bags, "episodes": self.episodes, "frames": self.frames, "ticks": self.ticks,
            "dropped_ticks": self.dropped_ticks, "outside_ticks": self.outside_ticks, "left_out": self.left_out,
            "bad": self.bad, "notes": self.notes,
            "streams": {key: stream.to_dict() for key, stream in self.streams.items()}, "by_bag": self.by_bag,
        }  # fmt: skip

    def table(self) -> str:
        """The figures of all bags as text for a terminal."""
        head = ("stream", "topic", "messages", "rate Hz", "match", "mean ms", "p95 ms", "max ms", "missing", "stale",
                "future", "late", "dropped")  # fmt: skip
        rows: list[tuple[str, ...]] = [head]
        for name, stream in self.streams.items():
            figures = stream.to_dict()
            error = figures["error_ms"]
            rows.append((
                name, stream.topic, str(stream.messages), _number(figures["rate_hz"], ".1f"),
                _number(figures["match"], ".3f"),
                *(_number(None if error is None else error[key], ".1f") for key in ("mean", "p95", "max")),
                *(str(figures[key]) for key in ("missing", "stale", "future", "late", "dropped")),
            ))  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                           for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
                 for row in rows]  # fmt: skip
        lines.append(f"{self.bags} bags, {self.episodes} episodes, {self.frames} frames; of {self.ticks} ticks "
                     f"{self.dropped_ticks} dropped, {self.outside_ticks} outside of episodes")  # fmt: skip
        lines += [f"left out: {entry['bag']}: {entry['why']}" for entry in self.left_out]
        lines += [f"BAD: {entry['error']}" for entry in self.bad]
        return "\n".join([*lines, *self.notes])


def check_lost(streams: Mapping[str, StreamReport], limits: Thresholds) -> str | None:
    """Why a bag is a bad one: too many of its messages are late or stamped in the future; None when it is fine."""
    for name, stream in streams.items():
        if stream.lost > limits.max_lost:
            return (f"{name} ({stream.topic}): of {stream.messages} messages {stream.late} are stamped before what "
                    f"came long before them and {stream.future} in the future of their receipt; expected at most a "
                    f"share of {limits.max_lost:g}: a clock that was set, or differs from the recorder's")  # fmt: skip
    return None


def check(bag: str, streams: Mapping[str, StreamReport], limits: Thresholds) -> None:
    """Raise :class:`ThresholdError` with the first stream of a bag that does not keep the thresholds."""
    for name, stream in streams.items():
        if limits.min_match is not None and stream.match is not None and stream.match < limits.min_match:
            raise ThresholdError(f"{bag}: {name} ({stream.topic}) is there at {stream.matched} of {stream.ticks} "
                                 f"ticks, {stream.match:.3f}, below the threshold min_match {limits.min_match:g} "
                                 f"(missing at {stream.missing}, stale at {stream.stale})")  # fmt: skip
        error = stream.error_ms()
        if limits.max_error_ms is not None and error is not None and error["max"] > limits.max_error_ms:
            raise ThresholdError(f"{bag}: {name} ({stream.topic}) is up to {error['max']:.1f} ms from its tick, above "
                                 f"the threshold max_error_ms {limits.max_error_ms:g} (mean {error['mean']:.1f}, p95 "
                                 f"{error['p95']:.1f})")  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
