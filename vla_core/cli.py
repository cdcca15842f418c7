"""The ``vla`` command's parts that need no ROS: collect, convert, train, evaluate, ablate, replay, inspect and others.

``vla_ros.cli`` adds what starts nodes. Errors of the user's making are one line on stderr and exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_core.errors import VlaError

if TYPE_CHECKING:
    from vla_core.contract import RobotContract
    from vla_core.evaluation.open_loop import Replay


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
    collect = commands.add_parser("collect", help="demonstrations of a scripted expert in simulation, as bags")
    collect.add_argument("world", nargs="*", help="such as push-v3 or driving:mixed; several give a folder each")
    collect.add_argument("--task", nargs="+", default=[], help="more of them; default: push-v3")
    collect.add_argument("--episodes", type=positive, default=50, help="of each task")
    collect.add_argument("--seed", type=not_negative, default=0, help="of the first episode; each later one counts up")
    collect.add_argument("--out", type=Path, required=True, help="folder to create, for a bag an episode")
    collect.add_argument(
        "--contract", help="a name in config/robots, or a file; default: the world's own robot, or --policy's"
    )
    collect.add_argument("--camera", help="of worlds that let one choose: Meta-World's, default corner2")
    collect.add_argument("--camera-size", type=positive, help="pixels; default: the world's")
    collect.add_argument("--no-images", action="store_true", help="leave the contract's image streams out")
    collect.add_argument("--suite", choices=("mt10",), help="the ten tasks of MT10 instead of --task")
    collect.add_argument("--instruction", help="default: the task's own")
    collect.add_argument(
        "--instructions", choices=("canonical", "train", "unseen"), default="canonical",
        help="the task's own words, or paraphrases that take turns",
    )  # fmt: skip
    collect.add_argument("--max-steps", type=positive, help="default: the world's own limit")
    collect.add_argument(
        "--noise", nargs="+", metavar="key=value",
        help="disturb what is executed in bursts, while the expert's command is recorded: scale=0.5 share=0.3 "
        "entries=[steering_angle]",
    )  # fmt: skip
    collect.add_argument("--rewards", action="store_true", help="record the simulator's reward of each step")
    collect.add_argument("--policy", help="a checkpoint that drives, while the expert's command is recorded (DAgger)")
    collect.add_argument(
        "--beta", type=float, help="share of segments that the expert drives all the same, default 0.5"
    )
    collect.add_argument("--workers", type=positive, default=1, help="processes")
    collect.set_defaults(run=_collect)

    from vla_core.data import command as data  # it needs this module's types of arguments

    data.add_commands(commands)

    from vla_core.pretrained import command as pretrained

    pretrained.add_commands(commands)

    train = commands.add_parser("train", help="a training set to a checkpoint")
    train.add_argument("recipe", help="a name in config/train, or a YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.steps=500")
    train.add_argument(
        "--dataset", action="append", required=True, metavar="PATH[=WEIGHT]",
        help="several are mixed; weights are their shares of the samples, without them each frame counts alike",
    )  # fmt: skip
    train.add_argument(
        "--validation", type=Path, action="append", metavar="PATH",
        help="what is held out, one for each dataset; default: episodes by data.validation.fraction",
    )  # fmt: skip
    train.add_argument("--contract", help="of datasets that have none: a name in config/robots, or a file")
    train.add_argument(
        "--from", dest="start", metavar="CHECKPOINT",
        help="begin with its weights, tokenizer and statistics; the recipe must be its own but for training and data",
    )  # fmt: skip
    train.add_argument("--out", type=Path, required=True, help="checkpoint folder; the run's own is OUT.training")
    train.add_argument("--logs", type=Path, help="TensorBoard folder; default: OUT.training/tensorboard")
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the newest state in OUT.training")
    again.add_argument("--restart", action="store_true", help="remove the states of an earlier run")
    train.set_defaults(run=_train)

    from vla_core.reinforcement import command as reinforcement

    reinforcement.add_commands(commands)

    from vla_core.experiments import command as experiments

    experiments.add_command(commands)

    from vla_core.training import world_command

    world_command.add_commands(commands)

    from vla_core.evaluation import command as evaluation  # it needs this module's types of arguments

    evaluation.add_commands(commands)

    from vla_core.export import command as exporting

    exporting.add_commands(commands)

    from vla_core.evaluation import bench_command

    bench_command.add_commands(commands)

    from vla_core.evaluation import ablate_command

    ablate_command.add_command(commands)

    from vla_core.serving import command as serving

    serving.add_commands(commands)

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
    inspect.add_argument("path", type=Path, nargs="+", help="or a folder of them, or a name on the hub")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="a page with plots and contact sheets")
    inspect.add_argument("--contract", help="for bags without one: a name in config/robots, or a file")
    inspect.add_argument(
        "--sensitivity", type=Path, metavar="DATA",
        help="of a checkpoint: how much its actions change when the instruction is swapped, a camera is black or a "
        "sensor is masked, over a dataset or bags",
    )  # fmt: skip
    inspect.add_argument(
        "--self-check", action="store_true", help="of a checkpoint: do other pictures and another instruction change "
        "its actions?"
    )  # fmt: skip
    inspect.add_argument("--samples", type=positive, default=256, help="ticks of DATA that are looked at")
    inspect.add_argument("--out", type=Path, help="JSON file for the sensitivity")
    inspect.set_defaults(run=_inspect)

    push = commands.add_parser("push", help="upload a checkpoint or a dataset to a model hub")
    push.add_argument("path", type=Path, help="folder of a checkpoint or a dataset")
    push.add_argument("repository", metavar="USER/NAME")
    push.add_argument("--private", action="store_true", help="when the repository is made")
    push.add_argument("--message", default="", help="of the commit")
    push.add_argument("--evaluation", type=Path, metavar="FILE", help="of `vla evaluate`, told in a checkpoint's card")
    push.set_defaults(run=_push)

    pull = commands.add_parser("pull", help="download a checkpoint or a dataset, so that no network is needed later")
    pull.add_argument("repository", metavar="USER/NAME[@REVISION]")
    pull.add_argument("--dataset", action="store_true", help="a dataset and not a checkpoint")
    pull.add_argument("--out", type=Path, help="folder to create; default: the local cache, where the name finds it")
    pull.set_defaults(run=_pull)


def main(
    arguments: Sequence[str] | None = None,
    more: Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None] | None = None,
) -> int:
    """Parse and run; ``more`` adds commands of another package."""
    # Before torch is imported: threads that spin while they wait slow the other processes down. Some microseconds of it
    # cost them nothing, and make a training step, a thousand of whose operations are short, a fifth faster.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
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
    parsed.words = list(sys.argv[1:] if arguments is None else arguments)
    assignments = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(assignments) < len(rest) or (rest and not hasattr(parsed, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if assignments:
        parsed.overrides = [*parsed.overrides, *assignments]
    return parsed


def _collect(parsed: argparse.Namespace) -> int:
    from vla_core.config import from_dict, override
    from vla_core.contract import RobotContract
    from vla_core.progress import bar
    from vla_core.sim.collect import Collection, Driver, collect
    from vla_core.sim.instructions import MT10
    from vla_core.sim.noise import Noise
    from vla_core.sim.worlds import find

    if parsed.beta is not None and parsed.policy is None:
        raise VlaError("--beta: belongs to --policy, which drives the other segments")
    driver = None
    if parsed.policy is not None:
        driver = Driver(checkpoint=parsed.policy, beta=0.5 if parsed.beta is None else parsed.beta)
    worlds = tuple(dict.fromkeys((*parsed.world, *parsed.task))) or ("push-v3",)
    collection = Collection(
        tasks=MT10 if parsed.suite else worlds, episodes=parsed.episodes, seed=parsed.seed,
        camera=parsed.camera, camera_size=parsed.camera_size, images=not parsed.no_images,
        instruction=parsed.instruction, instructions=parsed.instructions, max_steps=parsed.max_steps, driver=driver,
        noise=None if parsed.noise is None else from_dict(Noise, override({}, parsed.noise), "noise"),
        rewards=parsed.rewards,
    )  # fmt: skip
    if parsed.contract or driver is None:
        contract = RobotContract.load(parsed.contract or find(collection.tasks[0])[0].contract)
    else:
        from contextlib import closing

        from vla_core.runtime.loading import load_policy

        with closing(load_policy(parsed.policy)) as policy:
            contract = policy.contract
    total = len(collection.tasks) * collection.episodes
    with bar("collect", total) as advance:
        done = collect(
            parsed.out, collection, contract, parsed.workers,
            lambda done: advance(len(done), f"{sum(e.success for e in done)} of {len(done)} succeeded"),
        )  # fmt: skip
    failed = [f"{e.task} seed {e.seed}" for e in done if not e.success]
    print(f"{parsed.out}: {total} bags, {sum(e.steps for e in done)} ticks, {total - len(failed)} succeeded"
          + (f"; failed: {', '.join(failed[:10])}{', …' * (len(failed) > 10)}" if failed else ""))  # fmt: skip
    return 0


def _train(parsed: argparse.Namespace) -> int:
    from vla_core.training.command import run

    return run(parsed)


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
    from vla_core.runtime.loading import load_policy

    core = PolicyCore(load_policy(parsed.checkpoint))
    result = replay(parsed.bag, core)
    parsed.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"bag": str(parsed.bag), "checkpoint": str(parsed.checkpoint)}
    figures |= result.figures()
    if {"x", "y", "yaw"} <= set(result.names):
        figures["planning"] = _planned(parsed.bag, result, core.contract)
    (parsed.out / "replay.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    plots.save(plots.replay_traces(result), parsed.out / "traces.png")
    plots.save(plots.replay_errors(result), parsed.out / "errors.png")
    print(f"mean absolute error {figures['mae']:.4f} of the half range over {figures['ticks']} ticks; "
          f"plots and replay.json in {parsed.out}")  # fmt: skip
    if "planning" in figures:
        found = {name: value for name, value in figures["planning"].items() if value is not None}
        told = [f"{h} s ahead {found[f'l2_{h}s']:.2f} m" for h in (1, 2, 3) if f"l2_{h}s" in found]
        print(f"displacement from what was driven: {', '.join(told)}")
    return 0


def _planned(bag: Path, replayed: Replay, contract: RobotContract) -> dict[str, Any]:
    """A trajectory's figures in nuScenes' terms."""
    from vla_core.evaluation import driven, planning

    if driven.has_truth(bag):
        return planning.figures([driven.plans(driven.read_drive(bag), replayed, contract)])
    return planning.figures([driven.labelled_plans(replayed, contract, bag)])


def _inspect(parsed: argparse.Namespace) -> int:
    if parsed.sensitivity is not None:
        return _sensitivity(parsed)
    from vla_core.contract import RobotContract
    from vla_core.inspect import inspect, summary
    from vla_core.inspect.page import page

    if parsed.out is not None:
        raise VlaError("--out: belongs to --sensitivity, which tells on what data; --html names the page")
    if parsed.self_check:
        return _self_check(parsed)
    contract = RobotContract.load(parsed.contract) if parsed.contract else None
    reports = inspect(parsed.path, contract, pictures=parsed.html is not None)
    print(summary(reports))
    if parsed.html is not None:
        parsed.html.parent.mkdir(parents=True, exist_ok=True)
        parsed.html.write_text(page(reports), encoding="utf-8")
        print(f"\n{parsed.html}")
    return 0


def _self_check(parsed: argparse.Namespace) -> int:
    from vla_core.pretrained.self_check import self_check
    from vla_core.runtime.loading import load_policy

    for path in parsed.path:
        print("\n".join([f"{path}:", *(f"  {line}" for line in self_check(load_policy(path)).lines())]))
    return 0


def _sensitivity(parsed: argparse.Namespace) -> int:
    from vla_core.checkpoint import Checkpoint
    from vla_core.evaluation.sensitivity import sensitivity

    if len(parsed.path) > 1 or parsed.html is not None:
        raise VlaError("--sensitivity: is of one checkpoint, and goes to --out")
    found = sensitivity(Checkpoint.from_pretrained(parsed.path[0]), parsed.sensitivity, parsed.samples)
    print(found.table())
    if parsed.out is not None:
        record = {"checkpoint": str(parsed.path[0]), "data": str(parsed.sensitivity), **found.to_dict()}
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        parsed.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return 0


def _push(parsed: argparse.Namespace) -> int:
    from vla_core import hub

    print(hub.push(parsed.path, parsed.repository, private=parsed.private, message=parsed.message,
                   evaluation=parsed.evaluation))  # fmt: skip
    return 0


def _pull(parsed: argparse.Namespace) -> int:
    from vla_core import hub

    print(hub.pull(parsed.repository, "dataset" if parsed.dataset else "model", parsed.out))
    return 0


if __name__ == "__main__":  # torchrun -m vla_core.cli train ...
    sys.exit(main())
