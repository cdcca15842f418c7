"""``vla demo-drive``'s command line, apart from the demo itself, whose imports take seconds."""

from __future__ import annotations

import argparse
import webbrowser
from os import environ
from pathlib import Path

from vla_core.cli import not_negative, positive


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo-drive` to the `vla` command line."""
    parser = commands.add_parser("demo-drive", help="record, train, drive live, replay and report: a car in a town")
    parser.add_argument("--task", default="driving:mixed", help="which routes, such as driving:turn_left")
    parser.add_argument("--drives", type=positive, default=120, help="expert's drives to record for training")
    parser.add_argument(
        "--over-ros", type=not_negative, default=8,
        help="of them by ROS graphs; the others in process, which gives the same bags in half the time",
    )  # fmt: skip
    parser.add_argument("--held-out", type=positive, default=8, help="further ones, for held-out loss and open loop")
    parser.add_argument(
        "--disturbance",
        default="scale=0.35 share=0.22 steps=[2,5] entries=[steering_angle,speed] lowered=[speed] episodes=0.7",
        help="bursts on what is driven while drives are recorded, so that there is something to come back from",
    )  # fmt: skip
    parser.add_argument("--recipe", default="drive", help="a name in config/train, or a YAML file")
    parser.add_argument("--steps", type=positive, help="training steps; default: the recipe's")
    parser.add_argument("--seed", type=not_negative, default=0, help="seed of the first recorded drive")
    parser.add_argument("--routes", type=positive, default=36, help="unseen routes to drive live")
    parser.add_argument("--videos", type=not_negative, default=6, help="drives to show from above")
    parser.add_argument("--ablate", type=not_negative, default=9, help="routes for each thing taken away; 0: none")
    parser.add_argument(
        "--minutes", type=positive, default=19, help="of the whole run, after which nothing more is taken away"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo-drive"), help="its earlier content is removed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, such as training.batch_size=16")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from vla_ros.drive_demo import DriveDemo, DriveOptions

    steps = [] if parsed.steps is None else [f"training.steps={parsed.steps}"]
    options = DriveOptions(
        out=parsed.out, task=parsed.task, drives=parsed.drives, over_ros=parsed.over_ros, held_out=parsed.held_out,
        disturbance=parsed.disturbance, recipe=parsed.recipe, overrides=(*steps, *parsed.overrides), seed=parsed.seed,
        routes=parsed.routes, videos=parsed.videos, ablate=parsed.ablate, minutes=parsed.minutes,
    )  # fmt: skip
    page = DriveDemo(options).run()
    print(f"report: {page}")
    if environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(page.resolve().as_uri())
    return 0
