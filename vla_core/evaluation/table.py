"""Results for people: lines on a terminal, a table in Markdown, and a plot of points with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def lines(record: Mapping[str, Any]) -> list[str]:
    """One line a group, with its tasks where there are several, and the errors."""
    out = []
    for group in record["groups"]:
        late = f"{group['execution']['strategy']}, chunks {group['delay_steps']} steps late"
        if group["faults"]:
            late += f", with {', '.join(group['faults'])}"
        jump = "none" if group["boundary_jump"] is None else f"{group['boundary_jump']:.4f}"
        tasks = group["tasks"]
        if len(tasks) > 1:
            width = max(len(task["task"]) for task in tasks)
            out += [f"  {task['task']:<{width}}  {_interval(task)} over {task['trials']} episodes" for task in tasks]
        where = tasks[0]["task"] if len(tasks) == 1 else f"{len(tasks)} tasks, their mean"
        trainings = f" and {group['trainings']} trainings" if group["trainings"] > 1 else ""
        name = f"{group['group']}: " if len({g["group"] for g in record["groups"]}) > 1 else ""
        score = "" if group["score"] is None else f", score {_ranged(group['score'], group['score_ci95'])}"
        out.append(f"{name}success {_interval(group)} over {group['trials']} episodes{trainings} of {where}: "
                   f"{late}, boundary jump {jump}{score}")  # fmt: skip
        out += [f"  {key}: {_ranged(found['mean'], found['ci95'])}" for key, found in group["details"].items()]
    return out + [f"not run: {error}" for error in record["errors"]]


def _ranged(mean: float, interval: Sequence[float] | None) -> str:
    return f"{mean:.3f}" if interval is None else f"{mean:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["success_ci95"]
    rate = "none" if row["success_rate"] is None else f"{row['success_rate']:.2f}"
    return f"{rate} (95 % interval {low:.2f} to {high:.2f})"


def markdown(record: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """The groups as a table, success per task as another where there are several, and how the figures were made."""
    groups = record["groups"]
    names = [task["task"] for task in groups[0]["tasks"]]
    scored = any(group["score"] is not None for group in groups)
    head = ["policy", "strategy", "late [steps]", "episodes", "success", *(["score"] if scored else []),
            "inference p50 / p99 [ms]", "boundary jump", "roughness"]  # fmt: skip
    text = ["# Comparison", "", f"Tasks: {', '.join(names)}", "", *table(head, [_row(g, scored) for g in groups])]
    if len(names) > 1:
        text += ["", "## Success per task", ""]
        text += table(["policy", "strategy", "late [steps]", *names], [
            [g["group"], g["execution"]["strategy"], str(g["delay_steps"]), *(_short(task) for task in g["tasks"])]
            for g in groups
        ])  # fmt: skip
    intervals = sorted({group["interval"] for group in groups})
    text += [
        "", f"Intervals: success per task 95 %, Wilson; its mean over tasks {' or '.join(intervals)}.",
        "Boundary jump: how far a new chunk is from the plan before it. Roughness: the largest second difference of an "
        "episode's commands. Both are means over episodes, as shares of the actions' ranges.",
        f"Inference is timed while {record['timing']['workers']} simulator(s) run on the same machine, on one thread.",
    ]  # fmt: skip
    text += [f"Left out: {note}." for note in notes] + [f"Not run: {error}." for error in record["errors"]]
    return "\n".join(text) + "\n"


def _row(group: Mapping[str, Any], scored: bool) -> list[str]:
    timing = group["timing"]
    return [
        f"{group['group']}" + (f" ({group['trainings']} trainings)" if group["trainings"] > 1 else ""),
        group["execution"]["strategy"], str(group["delay_steps"]), str(group["trials"]), _short(group),
        *([_number(group["score"], 3)] if scored else []),
        f"{_number(timing['inference_ms_p50'], 1)} / {_number(timing['inference_ms_p99'], 1)}",
        _number(group["boundary_jump"], 4), _number(group["roughness"], 3),
    ]  # fmt: skip


def _short(row: Mapping[str, Any]) -> str:
    if row["success_rate"] is None:
        return "-"
    low, high = row["success_ci95"]
    return f"{row['success_rate']:.2f} ({low:.2f} to {high:.2f})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    out = [f"| {' | '.join(row)} |" for row in cells]
    return [out[0], "|" + "---|" * len(head), *out[1:]]
