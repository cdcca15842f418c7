"""``vla train-world`` and ``vla evaluate-world``: a world model from a dataset, and how good it is."""

from __future__ import annotations

import argparse
import shlex
import sys
import typing
from datetime import timedelta
from pathlib import Path

from vla_core.progress import bar, console

REPORT_FOLDER = "report"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both to a parser."""
    train = commands.add_parser("train-world", help="a training set to a world model, with a report on held-out data")
    train.add_argument("recipe", help="a name in config/world, or a YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.steps=500")
    train.add_argument("--dataset", type=Path, required=True, help="folder of a dataset, or a name on the hub")
    train.add_argument(
        "--validation", type=Path, help="what is held out; default: episodes by data.validation.fraction"
    )
    train.add_argument("--contract", help="of a dataset that has none: a name in config/robots, or a file")
    train.add_argument("--out", type=Path, required=True, help="folder to create; the run's own is OUT.training")
    train.add_argument("--logs", type=Path, help="TensorBoard folder; default: OUT.training/tensorboard")
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the newest state in OUT.training")
    again.add_argument("--restart", action="store_true", help="remove the states of an earlier run")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate-world", help="imagined pictures and rewards against real ones")
    evaluate.add_argument("world", type=Path, help="folder of a world model")
    evaluate.add_argument("--dataset", type=Path, required=True, help="episodes that it was not trained on")
    evaluate.add_argument("--rewards", choices=("simulator", "outcome"), help="default: as it was trained")
    evaluate.add_argument("--context", type=int, default=5, help="ticks that are seen")
    evaluate.add_argument("--ahead", type=int, default=45, help="ticks that are imagined")
    evaluate.add_argument("--out", type=Path, required=True, help="folder for report.json, report.html and pictures")
    evaluate.set_defaults(run=_evaluate)


def _train(parsed: argparse.Namespace) -> int:
    from vla_core.contract import RobotContract
    from vla_core.data.dataset import load
    from vla_core.evaluation.world_report import write_report
    from vla_core.hub import local_folder
    from vla_core.training.state import RunFolder
    from vla_core.training.trainer import Interrupted, Progress
    from vla_core.training.world_recipe import load_world_recipe
    from vla_core.training.world_trainer import train_world
    from vla_core.world_checkpoint import FILES, check_replaceable

    check_replaceable(parsed.out)
    recipe = load_world_recipe(parsed.recipe, parsed.overrides)
    folder = RunFolder(parsed.out.with_name(f"{parsed.out.name}.training"), files=FILES)
    if parsed.restart:
        folder.clear()
    elif not parsed.resume:
        folder.check_new()
    contract = RobotContract.load(parsed.contract) if parsed.contract else None
    places = [place for place in (parsed.dataset, parsed.validation) if place is not None]
    datasets = [load(local_folder(p, "dataset"), contract, recipe.observation, recipe.data.cache) for p in places]
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    logs = parsed.logs or folder.path / "tensorboard"

    def told(progress: Progress) -> None:
        left = timedelta(seconds=round(progress.seconds_left))
        advance(progress.step, progress.note if console.is_terminal else f"{progress.note}  {left} left")

    try:
        with bar("train world", recipe.training.steps) as advance:
            result = train_world(
                recipe, datasets[0], datasets[1] if len(datasets) > 1 else None, logs, told,
                {"recipe": parsed.recipe, "dataset": str(parsed.dataset)}, folder=folder.path, resume=parsed.resume,
                say=print,
            )  # fmt: skip
    except Interrupted as stopped:
        print(f"{stopped}; the state is in {folder.path}; continue with: {_again(parsed)}", file=sys.stderr)
        raise
    result.checkpoint.save(parsed.out)
    held = "" if result.validation_loss is None else f", held-out loss {result.validation_loss:.4f}"
    print(f"{parsed.out}: {result.seconds:.0f} s, loss {result.loss:.4f}{held}; TensorBoard: {logs}")
    if result.held_out is not None:
        print(write_report(result.checkpoint, result.held_out, folder.path / REPORT_FOLDER))
    return 0


def _evaluate(parsed: argparse.Namespace) -> int:
    from vla_core.data.dataset import load
    from vla_core.data.sequences import RewardSource, Sequences, arrival_rewards, ends
    from vla_core.errors import VlaError
    from vla_core.evaluation.world_report import write_report
    from vla_core.hub import local_folder
    from vla_core.world_checkpoint import WorldCheckpoint

    world = WorldCheckpoint.load(parsed.world)
    data = load(local_folder(parsed.dataset, "dataset"), world.contract, world.config.observation)
    source = parsed.rewards or world.config.rewards
    if source == "classifier":
        raise VlaError(f"{parsed.world}: its rewards are a classifier's, which is not in the folder; compare it with "
                       "--rewards outcome or --rewards simulator")  # fmt: skip
    rewards = arrival_rewards(data, typing.cast("RewardSource", source))
    sequences = Sequences(data, 2, world.normalizer, rewards, ends(data, ()))
    print(write_report(world, sequences, parsed.out, context=parsed.context, ahead=parsed.ahead))
    return 0


def _again(parsed: argparse.Namespace) -> str:
    words = ["vla", "train-world", parsed.recipe, *parsed.overrides]
    for option in ("dataset", "validation", "contract", "out", "logs"):
        if getattr(parsed, option):
            words += [f"--{option}", str(getattr(parsed, option))]
    return shlex.join([*words, "--resume"])
