"""What an inspection found: one report for each bag, dataset or checkpoint, shown as text or as a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

_NUMBER = re.compile(r"[-+]?([\d.,]+(e[-+]?\d+)?|nan|inf)( ?(%|k?B|MB|GB|m?s|min|Hz))?( \(.*\))?")
MORE = 6  # names of a list that are shown before "and so many more"


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; cells that are numbers stand to the right."""

    head: tuple[str, ...]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """An encoded image with what it shows."""

    caption: str
    data: bytes
    kind: Literal["png", "jpeg"] = "png"


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    note: str = ""
    table: Table | None = None
    pictures: Sequence[Picture] = ()


@dataclass
class Report:
    """``lines`` are what a terminal shows below ``summary``; ``tiles`` (value, label) and ``sections`` are the page's.

    ``figures`` (key to value) stand in the overview of several reports.
    """

    kind: Literal["bag", "dataset", "checkpoint"]
    path: str
    summary: str
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tiles: list[tuple[str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)


def text(report: Report) -> str:
    """The report for a terminal."""
    found = report.warnings or ["none"]
    head = f"{report.kind} {report.path}: {report.summary}"
    return "\n".join([head, *(f"  {line}" for line in report.lines), "  warnings:", *(f"    {line}" for line in found)])


def overview(reports: Sequence[Report]) -> Table:
    """One row for each of several reports."""
    keys = list(dict.fromkeys(key for report in reports for key in report.figures))
    rows = [(report.kind, report.path, str(len(report.warnings)), *(report.figures.get(key, "") for key in keys))
            for report in reports]  # fmt: skip
    return Table(("what", "path", "warnings", *keys), rows)


def aligned(table: Table) -> list[str]:
    """The lines of a table for a terminal."""
    rows = [table.head, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.head))]
    right = [all(is_number(row[i]) for row in table.rows) for i in range(len(table.head))]
    return ["  ".join(cell.rjust(width) if end else cell.ljust(width)
                      for cell, width, end in zip(row, widths, right, strict=True)).rstrip()
            for row in rows]  # fmt: skip


def is_number(cell: str) -> bool:
    """Whether a cell belongs to the right: a number, with or without a unit or an interval, or nothing."""
    return not cell or _NUMBER.fullmatch(cell) is not None


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - MORE
    return ", ".join(names[:MORE]) + (f" and {more} more" if more > 0 else "")


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def number(value: float) -> str:
    """A few digits of a number, whatever its size."""
    return f"{value:.4g}"
