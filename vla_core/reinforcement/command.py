"""``vla reinforce``: a checkpoint improved by its own trials; ``vla dream``: actor and critic of a world model."""

from __future__ import annotations

import argparse
from pathlib import Path

from vla_core.cli import positive


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both to a parser."""
    _add_reinforce(commands)
    parser = commands.add_parser("dream", help="an actor and a critic from a world model's imagination (DreamerV3)")
    parser.add_argument("world", help="folder of `vla train-world`, or a name on the hub")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as steps=5000 dreaming.horizon=20")
    parser.add_argument("--dataset", type=Path, required=True, help="what was seen, where its dreams begin")
    parser.add_argument("--out", type=Path, required=True, help="folder, for `dreamer` in a planner.yaml")
    parser.set_defaults(run=_dream)


def _add_reinforce(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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


def _dream(parsed: argparse.Namespace) -> int:
    import numpy as np

    from vla_core.config import from_dict, override
    from vla_core.data.dataset import load
    from vla_core.data.sequences import Sequences, ends
    from vla_core.hub import local_folder
    from vla_core.progress import bar
    from vla_core.reinforcement.dream import Dreams, check_replaceable, dream, save
    from vla_core.world_checkpoint import WorldCheckpoint, world_fingerprint

    check_replaceable(parsed.out)
    options = from_dict(Dreams, override({}, parsed.overrides))
    world = WorldCheckpoint.load(parsed.world)
    data = load(local_folder(parsed.dataset, "dataset"), None, world.config.observation)
    # What was earned is of no account: in dreams the model says what things are worth.
    sequences = Sequences(data, options.ticks, world.normalizer, np.zeros(data.frames, np.float32), ends(data, ()))
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    with bar("dream", options.steps) as advance:
        dreamer = dream(world.model, sequences, options,
                        lambda step, figures: advance(step, f"return {figures.imagined_return:.3g}"))  # fmt: skip
    save(dreamer, world_fingerprint(parsed.world), parsed.out)
    print(f"{parsed.out}: {options.steps} steps in the imagination of {parsed.world}")
    return 0
