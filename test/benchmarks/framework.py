"""Rows of figures: how a benchmark states what it measured, how a suite runs, is kept and is shown.

A benchmark is a function that takes :class:`Settings` and yields rows; a suite is a dictionary of them by name. Timings
of a shared machine say little by themselves, so that a row compares with a peer measured in the same run, in pairs
that take turns: ``ratio`` is the median of the pairs' ratios. A missed goal is shown and kept, and fails nothing.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vla_core.errors import VlaError
from vla_core.progress import bar

OPERATORS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}
VERSIONS_OF = ("torch", "numpy", "opencv-python-headless", "rosbags", "ros-kilted-rclpy", "ros-kilted-rmw-fastrtps-cpp")


class BenchmarkError(VlaError):
    """A benchmark that could not measure, or that measured something else than it says."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a benchmark may be told: ``long`` asks for the whole length where the default is cut to fit 10 minutes."""

    long: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure.

    ``value``, ``peer_value`` and ``ratio`` are medians over the ``runs``; ``spread`` is the lowest and the highest run:
    of the ratio where there is a peer, of the value elsewhere. ``goal`` reads ``<= 1.3`` and speaks of the ratio
    where there is a peer, of the value elsewhere; an empty one asks for nothing.
    """

    name: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None
    ratio: float | None = None
    runs: int
    spread: tuple[float, float]
    goal: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; None without a goal."""
        if not self.goal:
            return None
        sign, bound = parse_goal(self.goal)
        return OPERATORS[sign](self.value if self.ratio is None else self.ratio, bound)


Benchmark = Callable[[Settings], Iterable[Row]]
Suite = dict[str, Benchmark]


def parse_goal(goal: str) -> tuple[str, float]:
    """``"<= 1.3"`` to ``("<=", 1.3)``."""
    match = re.fullmatch(r"(<=|>=|==) (-?\d+(?:\.\d+)?)", goal)
    if match is None:
        raise BenchmarkError(f"goal {goal!r} cannot be read; expected {', '.join(OPERATORS)} and a number: '<= 1.3'")
    return match[1], float(match[2])


def measured(name: str, unit: str, values: Sequence[float], goal: str = "") -> Row:
    """A row without a peer; ``values`` has one number a run."""
    _check(name, values)
    return Row(name=name, value=float(np.median(values)), unit=unit, runs=len(values),
               spread=(float(min(values)), float(max(values))), goal=goal)  # fmt: skip


def compared(name: str, unit: str, pairs: Sequence[tuple[float, float]], peer: str, goal: str = "") -> Row:
    """A row with a peer; ``pairs`` has one (value, peer's value) a run, taken next to each other in time."""
    values, peer_values = [value for value, _ in pairs], [value for _, value in pairs]
    _check(name, values)
    _check(f"{name}, peer {peer}", peer_values)
    if min(peer_values) <= 0:
        raise BenchmarkError(f"{name}: the peer {peer} measured {min(peer_values)}; a ratio needs positive numbers")
    ratios = [value / peer_value for value, peer_value in pairs]
    return Row(name=name, value=float(np.median(values)), unit=unit, peer=peer,
               peer_value=float(np.median(peer_values)), ratio=float(np.median(ratios)), runs=len(pairs),
               spread=(min(ratios), max(ratios)), goal=goal)  # fmt: skip


def _check(name: str, values: Sequence[float]) -> None:
    if not len(values) or not np.isfinite(values).all():
        raise BenchmarkError(f"{name}: expected finite numbers, found {list(values)}")


@dataclass
class Report:
    """What a suite measured; ``failed`` says of each benchmark that could not measure why."""

    suite: str
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it is written to JSON."""
        return {
            "suite": self.suite,
            "machine": machine(),
            "versions": versions(),
            "rows": [dataclasses.asdict(row) | {"spread": list(row.spread)} for row in self.rows],
            "failed": self.failed,
            "seconds": round(self.seconds, 1),
        }

    def save(self, folder: Path) -> Path:
        """Write ``<suite>.json``; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.suite}.json"
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path


def run_suite(name: str, suite: Suite, settings: Settings) -> Report:
    """Run all benchmarks of a suite; one that cannot measure is named and the others go on."""
    report = Report(name)
    start = time.monotonic()
    with bar(name, len(suite)) as advance:
        for done, (title, benchmark) in enumerate(suite.items()):
            advance(done, title)
            try:
                report.rows += benchmark(settings)
            except (VlaError, OSError, subprocess.SubprocessError) as error:
                report.failed[title] = str(error)
        advance(len(suite))
    report.seconds = time.monotonic() - start
    return report


def show(report: Report, console: Console) -> None:
    """Print a report as a table."""
    table = Table(title=f"{report.suite}: {report.seconds:.0f} s", title_justify="left")
    table.add_column("name", overflow="fold")
    for heading in ("value", "peer's", "ratio", "lowest", "highest", "runs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("goal", no_wrap=True)
    for row in report.rows:
        verdict = {None: "", True: f"[green]{row.goal} met[/]", False: f"[red]{row.goal} missed[/]"}[row.met]
        peer_value = "" if row.peer_value is None else number(row.peer_value)
        table.add_row(row.name, f"{number(row.value)} {row.unit}", peer_value,
                      "" if row.ratio is None else number(row.ratio), number(row.spread[0]), number(row.spread[1]),
                      str(row.runs), verdict)  # fmt: skip
    console.print(table)
    for peer in dict.fromkeys(row.peer for row in report.rows if row.peer):
        names = [row.name for row in report.rows if row.peer == peer]
        console.print(f"peer of {len(names)} rows from {names[0]!r}: {peer}", highlight=False)
    for title, reason in report.failed.items():
        console.print(f"[red]failed[/] {title}: {reason}", highlight=False)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = max(0, 2 - int(np.floor(np.log10(abs(value))))) if value else 0
    return f"{value:.{min(digits, 6)}f}"


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """What was measured."""
    found = {"python": platform.python_version(), "vla_ros": _revision()}
    for package in VERSIONS_OF:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # a ROS 2 installation has no wheels; its name follows
    if "ROS_DISTRO" in os.environ:
        found["ros"] = os.environ["ROS_DISTRO"]
    return found


def _revision() -> str:
    """The commit of this checkout, with a plus sign when files differ from it."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if git("status", "--porcelain") else "")
    except FileNotFoundError:
        return "unknown"


def peak_mb() -> float:
    """The most that was resident so far, of this program alone: ru_maxrss would count the parent before it, too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
