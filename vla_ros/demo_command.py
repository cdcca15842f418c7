"""``vla demo``'s command line, apart from the demo itself, whose imports take seconds."""

from __future__ import annotations

import argparse
import webbrowser
from os import environ
from pathlib import Path

from vla_core.cli import not_negative, positive


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` to the `vla` command line."""
    parser = commands.add_parser("demo", help="record, train, run live, replay and report, on Meta-World")
    parser.add_argument("--task", default="push-v3", help="Meta-World task")
    parser.add_argument("--camera", help="MuJoCo camera of the task; default: the recipe's")
    parser.add_argument("--episodes", type=positive, default=50, help="demonstrations to record")
    parser.add_argument("--recipe", default="mini_vla", help="a name in config/train, or a YAML file")
    parser.add_argument("--seed", type=not_negative, default=0, help="seed of the first demonstration")
    parser.add_argument("--evaluation-episodes", type=positive, default=50, help="live episodes per figure")
    parser.add_argument("--held-out-episodes", type=positive, default=5, help="bags for held-out loss and replay")
    parser.add_argument("--realtime-episodes", type=positive, default=10, help="live episodes for latencies")
    parser.add_argument("--max-steps", type=positive, default=200, help="control steps until a live episode fails")
    parser.add_argument("--baseline-steps", type=positive, help="training steps of the baseline; default: its recipe's")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="its earlier content is removed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, such as training.steps=500")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from vla_ros.demo import Demo, DemoOptions

    options = DemoOptions(
        out=parsed.out, task=parsed.task, camera=parsed.camera, episodes=parsed.episodes,
        recipe=parsed.recipe, seed=parsed.seed, evaluation_episodes=parsed.evaluation_episodes,
        held_out_episodes=parsed.held_out_episodes, realtime_episodes=parsed.realtime_episodes,
        max_steps=parsed.max_steps, overrides=tuple(parsed.overrides),
        baseline_steps=parsed.baseline_steps,
    )  # fmt: skip
    page = Demo(options).run()
    print(f"report: {page}")
    if environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(page.resolve().as_uri())
    return 0
