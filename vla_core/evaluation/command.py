"""``vla evaluate`` and ``vla compare``: both make a plan, run it, and write its results."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_core.cli import not_negative, positive
from vla_core.errors import VlaError

if TYPE_CHECKING:
    from vla_core.evaluation.plan import Plan, Wanted

EPISODES, FIRST_SEED = 50, 10_000
# What decides what is run; --repeat takes it from the file.
_PLANNED = ("task", "suite", "instructions", "instruction", "camera", "camera_size", "black_camera", "episodes",
            "seed", "max_steps", "strategy", "delay_steps", "execution", "fault", "dataset")  # fmt: skip


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands to a parser."""
    evaluate = commands.add_parser("evaluate", help="closed-loop success in simulation, without ROS")
    evaluate.add_argument(
        "checkpoint", nargs="*", help="a folder, or a hub's user/name; several are trainings of one recipe from "
        "different seeds, reported together",
    )  # fmt: skip
    _add_plan(evaluate)
    evaluate.add_argument("--out", type=Path, help="JSON file: figures, every episode, and what is needed to repeat it")
    evaluate.add_argument(
        "--repeat", type=Path, metavar="FILE", help="run what such a file has again, and say whether all ended alike"
    )
    evaluate.set_defaults(run=_evaluate)

    compare = commands.add_parser("compare", help="success, latency and smoothness of policies and strategies, a table")
    compare.add_argument(
        "--checkpoint", nargs="+", required=True, metavar="[LABEL=]PATH",
        help="a policy each; PATH+PATH is an ensemble, whose mean chunk is executed, and PATH,PATH are trainings of "
        "one recipe from different seeds",
    )  # fmt: skip
    _add_plan(compare)
    compare.add_argument(
        "--out", type=Path, required=True, help="folder for comparison.json, comparison.md and comparison.png"
    )
    compare.set_defaults(run=_compare)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", nargs="+", metavar="WORLD",
                        help="such as push-v3, libero_spatial:3, pusht, driving:mixed; default: push-v3")  # fmt: skip
    parser.add_argument("--suite", help="all tasks of mt10, libero_spatial, libero_object, libero_goal, libero_10, "
                        "libero_90, driving")  # fmt: skip
    parser.add_argument(
        "--instructions", choices=("canonical", "train", "unseen", "swapped"),
        help="the tasks' own words (default), paraphrases, or other tasks' words (swapped); seeds take turns",
    )  # fmt: skip
    parser.add_argument("--instruction", help="other words, for every task")
    parser.add_argument(
        "--fault", nargs="+", metavar="STREAM=KIND",
        help="sensors that fail: lidar=dropped, imu=delayed:0.2, front=frozen@5, radar_*=stuck@3-6",
    )  # fmt: skip
    parser.add_argument("--camera", help="of worlds that let one choose; default: the one that the policy was made for")
    parser.add_argument("--camera-size", type=positive, help="rendered height and width, pixels; default: the world's")
    parser.add_argument("--black-camera", action="store_true", default=None, help="show black pictures to the policy")
    parser.add_argument("--episodes", type=positive, help=f"of each task; default: {EPISODES}")
    parser.add_argument(
        "--seed", type=not_negative, help=f"of the first episode, each later one counts up; default: {FIRST_SEED}"
    )
    parser.add_argument("--max-steps", type=positive, help="default: the benchmark's own limit of each task")
    parser.add_argument(
        "--strategy", nargs="+", metavar="NAME",
        help="how chunks are executed: receding, ensemble, blend, rtc; default: the checkpoint's; several make a table",
    )  # fmt: skip
    parser.add_argument(
        "--delay-steps", type=not_negative, nargs="+", metavar="N",
        help="control steps until a chunk comes into force, while the world goes on; several make a table",
    )  # fmt: skip
    parser.add_argument("--execution", nargs="+", metavar="key=value", help="further changes to it, such as steps=3")
    parser.add_argument("--dataset", help="whose statistics a policy takes that was trained on a mixture")
    parser.add_argument("--workers", type=positive, default=1, help="processes; the result does not depend on it")
    parser.add_argument("--device", default="cpu", help="where the models run, such as cuda; default: cpu")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="an MP4 file an episode, its outcome in the name")
    parser.add_argument("--videos-of", choices=("all", "failures"), default="all")


def _evaluate(parsed: argparse.Namespace) -> int:
    from vla_core.evaluation.plan import Wanted
    from vla_core.evaluation.results import check_writable, save_results
    from vla_core.evaluation.table import lines

    if parsed.repeat is not None:
        return _repeat(parsed)
    if not parsed.checkpoint:
        raise VlaError("expected a checkpoint, or --repeat FILE; found neither")
    label = _name(parsed.checkpoint[0]) if len(parsed.checkpoint) == 1 else "training"
    plan, _ = _plan(parsed, [Wanted(label=label, trainings=tuple((path,) for path in parsed.checkpoint))])
    if parsed.out:
        check_writable(parsed.out)
    record = _run(plan, parsed)
    print("\n".join(lines(record)))
    if parsed.out:
        save_results(record, parsed.out)
    return 1 if record["errors"] else 0


def _compare(parsed: argparse.Namespace) -> int:
    from vla_core.evaluation import plots
    from vla_core.evaluation.results import check_writable, save_results
    from vla_core.evaluation.table import lines, markdown

    plan, notes = _plan(parsed, [_wanted(word) for word in parsed.checkpoint], leave_out=True)
    check_writable(parsed.out / "comparison.json")
    record = {**_run(plan, parsed), "left_out": notes}
    text, picture = markdown(record, notes), plots.comparison(record["groups"])
    save_results(record, parsed.out / "comparison.json")
    (parsed.out / "comparison.md").write_text(text, encoding="utf-8")
    plots.save(picture, parsed.out / "comparison.png")
    print("\n".join([*lines(record), *(f"left out: {note}" for note in notes),
                     f"comparison.json, comparison.md and comparison.png in {parsed.out}"]))  # fmt: skip
    return 1 if record["errors"] else 0


def _repeat(parsed: argparse.Namespace) -> int:
    from vla_core.evaluation.results import differences, load_results, save_results

    given = [f"--{name.replace('_', '-')}" for name in _PLANNED if getattr(parsed, name) is not None]
    if given:
        raise VlaError(f"--repeat takes everything from its file, and only other places of the checkpoints; found "
                       f"{', '.join(given)}")  # fmt: skip
    before, plan = load_results(parsed.repeat)
    record = _run(_moved(plan, parsed.checkpoint) if parsed.checkpoint else plan, parsed)
    if parsed.out:
        save_results(record, parsed.out)
    changed = differences(before, record)
    episodes = sum(len(run["episodes"]) for run in record["runs"])
    if not changed:
        print(f"identical: all {episodes} episodes of {parsed.repeat} ended as before, figure by figure")
        return 0
    print("\n".join([f"not identical to {parsed.repeat}:", *changed]))
    return 1


def _moved(plan: Plan, paths: Sequence[str]) -> Plan:
    """The plan with its checkpoints at other places, in its order."""
    import dataclasses

    places = iter(paths)
    count = sum(len(entry.members) for entry in plan.entries)
    if len(paths) != count:
        raise VlaError(f"expected as many checkpoints as in the file, {count}, found {len(paths)}")
    entries = tuple(
        dataclasses.replace(
            entry, members=tuple(dataclasses.replace(member, path=next(places)) for member in entry.members)
        )
        for entry in plan.entries
    )
    return dataclasses.replace(plan, entries=entries)


def _plan(parsed: argparse.Namespace, wanted: Sequence[Wanted], leave_out: bool = False) -> tuple[Plan, list[str]]:
    from vla_core.evaluation.plan import make_plan
    from vla_core.evaluation.suites import assignments

    if parsed.instruction is not None and parsed.instructions is not None:
        raise VlaError("expected --instruction or --instructions, found both")
    names = tuple(parsed.task or (() if parsed.suite else ("push-v3",)))
    first = FIRST_SEED if parsed.seed is None else parsed.seed
    return make_plan(
        wanted,
        assignments(names, parsed.suite, parsed.instructions or "canonical", parsed.instruction, parsed.max_steps),
        range(first, first + (parsed.episodes or EPISODES)),
        strategies=parsed.strategy or (), changes=parsed.execution or (), delays=parsed.delay_steps or (0,),
        camera=parsed.camera, camera_size=parsed.camera_size, black=bool(parsed.black_camera),
        faults=parsed.fault or (),
        dataset=parsed.dataset, leave_out=leave_out,
    )  # fmt: skip


def _run(plan: Plan, parsed: argparse.Namespace) -> dict[str, Any]:
    from vla_core.evaluation.results import results
    from vla_core.evaluation.runner import Videos, run_plan
    from vla_core.progress import bar

    begin = time.monotonic()
    videos = Videos(folder=parsed.videos, of=parsed.videos_of) if parsed.videos else None
    outcomes, succeeded = [], 0
    with bar("evaluate", len(plan.jobs())) as advance:
        for outcome in run_plan(plan, parsed.workers, videos, parsed.device):
            outcomes.append(outcome)
            succeeded += outcome.result is not None and outcome.result.success
            advance(len(outcomes), f"{succeeded} of {len(outcomes)} succeeded")
    timing = {"workers": parsed.workers, "seconds": time.monotonic() - begin}
    return results(plan, outcomes, ["vla", *parsed.words], timing)


def _wanted(word: str) -> Wanted:
    """``[label=]path``, with ``+`` between the members of an ensemble and ``,`` between trainings."""
    from vla_core.evaluation.plan import Wanted

    label, equals, places = word.partition("=")
    if not equals or Path(word).exists():
        label, places = "", word
    trainings = tuple(
        (training,) if Path(training).exists() else tuple(training.split("+"))
        for training in ([places] if Path(places).exists() else places.split(","))
    )
    if not all(path for training in trainings for path in training):
        raise VlaError(f"--checkpoint {word!r}: an empty path; expected [label=]path, path+path or path,path")
    names = ",".join("+".join(map(_name, training)) for training in trainings)
    return Wanted(label=label or names, trainings=trainings)


def _name(path: str) -> str:
    return Path(path).name or path
