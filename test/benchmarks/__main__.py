"""``python -m test.benchmarks [suite ...]``: run suites, write ``out/bench/<suite>.json``, print tables."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from rich.console import Console

from test.benchmarks.framework import BenchmarkError, Settings, Suite, run_suite, show
from vla_core.errors import VlaError, choices

# A suite's module has BENCHMARKS: name to function. It is imported when it runs, so that none needs another's packages.
SUITES = {
    "data": "test.benchmarks.data", "driving": "test.benchmarks.driving", "model": "test.benchmarks.model",
    "policy": "test.benchmarks.policy",
    "robot": "test.benchmarks.robot", "serve": "test.benchmarks.serving",
    "world": "test.benchmarks.world",
}  # fmt: skip

FILE_WIDTH = 140  # of tables that no terminal shows


def load_suite(name: str, only: str = "") -> Suite:
    """The benchmarks of a suite whose names contain ``only``."""
    if name not in SUITES:
        raise BenchmarkError(f"no suite {name!r}; choices: {choices(SUITES)}")
    suite: Suite = importlib.import_module(SUITES[name]).BENCHMARKS
    chosen = {title: benchmark for title, benchmark in suite.items() if only in title}
    if not chosen:
        raise BenchmarkError(f"suite {name}: no benchmark's name contains {only!r}; choices: {choices(suite)}")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when everything was measured, whether or not it met its goal."""
    parser = argparse.ArgumentParser(prog="python -m test.benchmarks", description="Measure, and compare with peers.")
    parser.add_argument("suites", nargs="*", help=f"some of: {', '.join(SUITES)}; all without a name")
    parser.add_argument("--only", default="", metavar="WORDS", help="benchmarks whose names contain this")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of <suite>.json")
    parser.add_argument("--long", action="store_true", help="no cuts for the sake of 10 minutes a suite")
    options = parser.parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
    failed = 0
    try:
        suites = {name: load_suite(name, options.only) for name in options.suites or SUITES}
        for name, suite in suites.items():
            report = run_suite(name, suite, Settings(long=options.long))
            path = report.save(options.out)
            show(report, console)
            console.print(f"{path}: {len(report.rows)} rows", highlight=False)
            failed += len(report.failed)
    except VlaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
