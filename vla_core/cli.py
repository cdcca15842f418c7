"""The ``vla`` command's parts that need no ROS: convert, train, evaluate, latency, replay, inspect.

``vla_ros.cli`` adds what starts nodes. Errors of the user's making are one line on stderr and exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vla_core.errors import VlaError


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def not_negative(text: str) -> int:
    """A whole number from zero on, for argparse."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this module's commands to a parser."""
    convert = commands.add_parser("convert", help="bags to a training set")
    convert.add_argument("bags", type=Path, nargs="+", help="bags, or folders of bags")
    convert.add_argument("--out", type=Path, required=True, help="dataset folder to create")
    convert.add_argument("--recipe", default="mini_vla", help="its observation decides what the dataset holds")
    convert.add_argument("--contract", help="a name in config/robots, or a file; default: the one in the bags")
    convert.add_argument("--keep-failed", action="store_true", help="keep episodes that are marked as failed")
    convert.set_defaults(run=_convert)

    train = commands.add_parser("train", help="a training set to a checkpoint")
    train.add_argument("recipe", help="a name in config/train, or a YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.steps=500")
    train.add_argument("--dataset", type=Path, required=True)
    train.add_argument("--validation", type=Path, help="dataset for the held-out loss")
    train.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    train.add_argument("--logs", type=Path, help="TensorBoard folder; default: OUT's parent / tensorboard")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="closed-loop success in simulation, in one process, without ROS")
    evaluate.add_argument("checkpoint", type=Path)
    evaluate.add_argument("--task", default="push-v3")
    evaluate.add_argument("--camera", help="default: the one that the policy was trained for")
    evaluate.add_argument("--episodes", type=positive, default=50)
    evaluate.add_argument(
        "--seed", type=not_negative, default=10000, help="seed of the first episode; each later one counts up"
    )
    evaluate.add_argument("--max-steps", type=positive, default=200)
    evaluate.add_argument("--instruction", help="default: the task's own")
    evaluate.add_argument("--black-camera", action="store_true")
    evaluate.add_argument(
        "--strategy", nargs="+", metavar="NAME",
        help="how chunks are executed: receding, ensemble, blend, rtc; default: the checkpoint's; several make a table",
    )  # fmt: skip
    evaluate.add_argument(
        "--delay-steps", type=not_negative, nargs="+", default=[0], metavar="N",
        help="control steps until a chunk comes into force, while the world goes on; several make a table",
    )  # fmt: skip
    evaluate.add_argument(
        "--execution", nargs="+", default=[], metavar="key=value", help="further changes to it, such as steps=3"
    )
    evaluate.add_argument("--out", type=Path, help="JSON file for the figures and every episode's outcome")
    evaluate.set_defaults(run=_evaluate)

    latency = commands.add_parser("latency", help="chunk execution under latency, without simulator and checkpoint")
    latency.add_argument("--strategy", nargs="+", metavar="NAME", help="default: all of them")
    latency.add_argument("--latency-ms", type=not_negative, nargs="+", metavar="MS", help="default: 0 to 500")
    latency.add_argument("--jitter", type=float, default=0.2, help="share by which each chunk's latency may differ")
    latency.add_argument("--trials", type=positive, default=20, help="seeds for each row")
    latency.add_argument("--seed", type=not_negative, default=0)
    latency.add_argument("--head", choices=("flow", "diffusion"), default="flow")
    latency.add_argument("--out", type=Path, required=True, help="folder for latency.json and latency.png")
    latency.set_defaults(run=_latency)

    replay = commands.add_parser("replay", help="open-loop error of a checkpoint on recorded bags, with plots")
    replay.add_argument("checkpoint", type=Path)
    replay.add_argument("bag", type=Path)
    replay.add_argument("--out", type=Path, required=True, help="folder for replay.json and plots")
    replay.set_defaults(run=_replay)

    inspect = commands.add_parser("inspect", help="what is in a bag, a dataset or a checkpoint")
    inspect.add_argument("path", type=Path)
    inspect.add_argument(
        "--sensitivity", type=Path, metavar="DATA",
        help="of a checkpoint: how much its actions change when the instruction is swapped, a camera is black or a "
        "sensor is masked, over a dataset or bags",
    )  # fmt: skip
    inspect.add_argument("--samples", type=positive, default=256, help="ticks of DATA that are looked at")
    inspect.add_argument("--out", type=Path, help="JSON file for the sensitivity")
    inspect.set_defaults(run=_inspect)


def main(
    arguments: Sequence[str] | None = None,
    more: Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None] | None = None,
) -> int:
    """Parse and run; ``more`` adds commands of another package."""
    # Before torch is imported: threads that spin while they wait slow the other processes down.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    parser = argparse.ArgumentParser(prog="vla", description="Record, train, run and evaluate robot policies.")
    commands = parser.add_subparsers(metavar="command", required=True)
    add_commands(commands)
    if more is not None:
        more(commands)
    parsed = _parse(parser, arguments)
    try:
        return int(parsed.run(parsed))
    except VlaError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a disk that is full, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse with ``key=value`` assignments anywhere: argparse by itself takes them only before the options."""
    parsed, rest = parser.parse_known_args(arguments)
    assignments = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(assignments) < len(rest) or (rest and not hasattr(parsed, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if assignments:
        parsed.overrides = [*parsed.overrides, *assignments]
    return parsed


def _convert(parsed: argparse.Namespace) -> int:
    from vla_core.contract import RobotContract
    from vla_core.data.bag import find_bags
    from vla_core.data.dataset import convert
    from vla_core.progress import bar
    from vla_core.training.recipe import load_recipe

    spec = load_recipe(parsed.recipe).observation
    contract = RobotContract.load(parsed.contract) if parsed.contract else None
    bags = find_bags(parsed.bags)
    with bar("convert", len(bags)) as advance:
        dataset = convert(bags, parsed.out, spec, contract, parsed.keep_failed, lambda done: advance(done, "bags"))
    print(f"{parsed.out}: {len(dataset.episodes)} episodes, {dataset.frames} ticks")
    return 0


def _train(parsed: argparse.Namespace) -> int:
    from vla_core.checkpoint import check_replaceable
    from vla_core.data.dataset import load
    from vla_core.progress import bar
    from vla_core.training.recipe import load_recipe
    from vla_core.training.trainer import train

    check_replaceable(parsed.out)
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(parsed.recipe, parsed.overrides)
    dataset = load(parsed.dataset)
    validation = load(parsed.validation) if parsed.validation else None
    logs = parsed.logs or parsed.out.parent / "tensorboard"
    with bar("train", recipe.training.steps) as advance:
        result = train(recipe, dataset, validation, logs, lambda p: advance(p.step, p.note),
                       {"recipe": parsed.recipe, "dataset": str(parsed.dataset), "camera": recipe.camera})  # fmt: skip
    result.checkpoint.save(parsed.out)
    held_out = "" if result.validation_loss is None else f", held-out loss {result.validation_loss:.4f}"
    print(f"{parsed.out}: {result.seconds:.0f} s, loss {result.loss:.4f}{held_out}; TensorBoard: {logs}")
    return 0


def _evaluate(parsed: argparse.Namespace) -> int:
    from vla_core.config import override
    from vla_core.evaluation.closed_loop import study
    from vla_core.progress import bar
    from vla_core.runtime.policy import Policy
    from vla_core.sim.metaworld import MetaWorld, instruction_for

    policy = Policy.load(parsed.checkpoint)
    own = policy.checkpoint.config.execution
    changes = override({}, parsed.execution)
    executions = [own.changed({**changes, "strategy": name}) for name in parsed.strategy or [own.strategy]]
    for execution in executions:
        execution.check(policy.checkpoint.config.model.horizon, policy.checkpoint.config.model.head)
    camera = parsed.camera or policy.checkpoint.config.provenance.get("camera", "corner2")
    world = MetaWorld(parsed.task, camera, policy.contract, black_camera=parsed.black_camera)
    instruction = instruction_for(parsed.task) if parsed.instruction is None else parsed.instruction
    seeds = range(parsed.seed, parsed.seed + parsed.episodes)
    with bar("evaluate", len(executions) * len(parsed.delay_steps) * parsed.episodes) as advance:
        runs = study(world, policy, executions, parsed.delay_steps, instruction, seeds, parsed.max_steps, advance)
    for run in runs:
        rate, trials, (low, high) = run["success_rate"], run["trials"], run["success_ci95"]
        late = f"{run['execution']['strategy']}, chunks {run['delay_steps']} steps late"
        jump = "none" if run["boundary_jump"] is None else f"{run['boundary_jump']:.4f}"
        print(f"success {rate:.2f} (95 % interval {low:.2f} to {high:.2f}) over {trials} episodes of {parsed.task}: "
              f"{late}, boundary jump {jump}")  # fmt: skip
    if parsed.out:
        record = {
            "checkpoint": str(parsed.checkpoint), "task": parsed.task, "camera": camera,
            "instruction": instruction, "max_steps": parsed.max_steps, "runs": runs,
        }  # fmt: skip
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        parsed.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return 0


def _latency(parsed: argparse.Namespace) -> int:
    import dataclasses

    from vla_core.evaluation import plots
    from vla_core.evaluation.latency_bench import BenchOptions, bench
    from vla_core.progress import bar

    options = BenchOptions(jitter=parsed.jitter, trials=parsed.trials, seed=parsed.seed, head=parsed.head)
    if parsed.strategy:
        options = dataclasses.replace(options, strategies=tuple(parsed.strategy))
    if parsed.latency_ms:
        options = dataclasses.replace(options, latencies_ms=tuple(float(ms) for ms in parsed.latency_ms))
    with bar("latency", len(options.strategies) * len(options.latencies_ms)) as advance:
        rows = bench(options, advance)
    parsed.out.mkdir(parents=True, exist_ok=True)
    record = {"options": dataclasses.asdict(options), "rows": rows}
    (parsed.out / "latency.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    plots.save(plots.latency_study(rows), parsed.out / "latency.png")
    for row in rows:
        low, high = row["success_ci95"]
        jump = "none" if row["boundary_jump"] is None else f"{row['boundary_jump']:.4f}"
        print(f"{row['strategy']:<9} {row['latency_ms']:>4.0f} ms: success {row['success_rate']:.2f} "
              f"({low:.2f} to {high:.2f}), boundary jump {jump}, roughness {row['roughness']:.3f}")  # fmt: skip
    print(f"latency.json and latency.png in {parsed.out}")
    return 0


def _replay(parsed: argparse.Namespace) -> int:
    from vla_core.evaluation import plots
    from vla_core.evaluation.open_loop import replay
    from vla_core.runtime.core import PolicyCore
    from vla_core.runtime.policy import Policy

    result = replay(parsed.bag, PolicyCore(Policy.load(parsed.checkpoint)))
    parsed.out.mkdir(parents=True, exist_ok=True)
    figures = {"bag": str(parsed.bag), "checkpoint": str(parsed.checkpoint), **result.figures()}
    (parsed.out / "replay.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    plots.save(plots.replay_traces(result), parsed.out / "traces.png")
    plots.save(plots.replay_errors(result), parsed.out / "errors.png")
    print(f"mean absolute error {figures['mae']:.4f} of the half range over {figures['ticks']} ticks; "
          f"plots and replay.json in {parsed.out}")  # fmt: skip
    return 0


def _inspect(parsed: argparse.Namespace) -> int:
    from vla_core.inspect import describe

    if parsed.sensitivity is None:
        if parsed.out is not None:
            raise VlaError("--out: belongs to --sensitivity, which tells on what data")
        print(describe(parsed.path))
        return 0
    from vla_core.checkpoint import Checkpoint
    from vla_core.evaluation.sensitivity import sensitivity

    found = sensitivity(Checkpoint.load(parsed.path), parsed.sensitivity, parsed.samples)
    print(found.table())
    if parsed.out is not None:
        record = {"checkpoint": str(parsed.path), "data": str(parsed.sensitivity), **found.to_dict()}
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        parsed.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return 0
