"""``vla reinforce``: a checkpoint improved by its own trials in the simulator."""

from __future__ import annotations

import argparse
from pathlib import Path

from vla_core.cli import positive


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `reinforce` to a parser."""
    parser = commands.add_parser("reinforce", help="improve a checkpoint by its own trials in simulation (PPO)")
    parser.add_argument("checkpoint", help="with a gaussian head: a folder, or a name on the hub")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as ppo.kl=0.01 exploration.least_std=0.1"
    )
    parser.add_argument("--task", default="push-v3", help="the world")
    parser.add_argument("--steps", type=positive, default=200_000, help="control steps in the simulator")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=positive, default=1, help="processes that run episodes")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--logs", type=Path, help="TensorBoard folder; default: OUT.training/tensorboard")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from vla_core.checkpoint import check_replaceable
    from vla_core.config import from_dict, override
    from vla_core.progress import bar
    from vla_core.reinforcement.reinforce import Reinforcement, reinforce
    from vla_core.training.command import run_folder

    check_replaceable(parsed.out)
    values = {"task": parsed.task, "steps": parsed.steps, "seed": parsed.seed}
    options = from_dict(Reinforcement, override(values, parsed.overrides))
    logs = parsed.logs or run_folder(parsed.out) / "tensorboard"
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    with bar("reinforce", options.steps) as advance:
        result = reinforce(parsed.checkpoint, options, parsed.workers, logs,
                           lambda progress: advance(min(progress.steps, options.steps), progress.note))  # fmt: skip
    result.checkpoint.save(parsed.out)
    print(f"{parsed.out}: {result.steps} control steps in {result.episodes} episodes, {result.seconds:.0f} s, "
          f"success while trying {result.history[0].success:.2f} at first, {result.history[-1].success:.2f} at last; "
          f"TensorBoard: {logs}")  # fmt: skip
    return 0
