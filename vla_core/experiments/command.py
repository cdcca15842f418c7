"""``vla experiment``: a whole study by one command, with its report."""

from __future__ import annotations

import argparse
from pathlib import Path

from vla_core.cli import positive


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `experiment` to a parser."""
    parser = commands.add_parser("experiment", help="a whole study by one command: beyond_demos")
    parser.add_argument("name", choices=("beyond_demos",))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as task=push-v3 trainings=1")
    parser.add_argument("--out", type=Path, help="folder, default: out/experiments/NAME; what is done in it is not "
                                                 "done again")  # fmt: skip
    parser.add_argument("--workers", type=positive, default=2, help="processes")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from vla_core.config import from_dict, load_yaml, override
    from vla_core.experiments.beyond_demos import BeyondDemos, Experiment
    from vla_core.resources import share

    settings = load_yaml(share("config/experiments") / f"{parsed.name}.yaml")
    options = from_dict(BeyondDemos, override(settings, parsed.overrides))
    out = parsed.out or Path("out/experiments") / parsed.name
    record = Experiment(options, out, parsed.workers).run()
    for name, row in record["methods"].items():
        low, high = row["success_ci95"]
        gain = "" if row.get("gain") is None else f", {100 * row['gain']:+.0f} points"
        print(f"{name}: success {row['success_rate']:.2f} ({low:.2f} to {high:.2f}){gain}; "
              f"{row['environment_steps']:.0f} control steps, {row['minutes']:.1f} min a training")  # fmt: skip
    print(f"report.json and report.html in {out}")
    return 0
