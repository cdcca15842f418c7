"""Ablations: what a policy owes to each of its parts, from one file of variants and one command, as one table.

A file of ``config/ablations`` names a recipe and two kinds of changes to it. *Variants* are overrides of the recipe,
each trained from the same data: without a sensor, with another fusion or head. *Conditions* take something from the
trained reference while it runs: its sight, its instruction, a sensor. All do the same episodes, so that each is told
from the reference by the differences of the very same seeds.

What is done stays done: a variant whose checkpoint is there is not trained again, one that was interrupted goes on
where it was, and an evaluation that is there is read. Where the file has changed in between, the folder says so.

    OUT/table.md, table.json
    OUT/<variant>/seed<k>/checkpoint, checkpoint.training, settings.json
    OUT/<variant>/seed<k>/evaluations/<condition>.json     as `vla evaluate --out` writes them
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla_core.config import ConfigError, config_file, from_dict, load_yaml, override, to_dict
from vla_core.data.dataset import Dataset
from vla_core.errors import choices
from vla_core.evaluation.metrics import bootstrap_interval, percentile, wilson_interval
from vla_core.evaluation.plan import Entry, EvaluationError, Plan, Run, Wanted, make_plan
from vla_core.evaluation.results import load_results, results, save_results, versions
from vla_core.evaluation.runner import Outcome, run_plan
from vla_core.evaluation.suites import Assignment, assignments
from vla_core.evaluation.table import table
from vla_core.progress import bar
from vla_core.training.recipe import Recipe, load_recipe
from vla_core.training.state import RunFolder
from vla_core.training.trainer import train

FORMAT = "vla_ros_ablations_v1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
INTACT = "intact"  # nothing is taken away
Split = Literal["canonical", "train", "unseen", "swapped"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What is taken from a policy while it runs.

    ``black`` blackens its pictures, ``instructions`` are those of ``vla evaluate`` (``swapped``: another task's), and
    ``faults`` its sensors' (:mod:`vla_core.sim.faults`), such as ``lidar=dropped``.
    """

    black: bool = False
    instructions: Split = "canonical"
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ablations:
    """The content of a file.

    ``variants`` and ``conditions`` by name; ``reference`` is the variant that the others are told from, and that the
    conditions are for. ``trainings`` of each variant have the seeds 0, 1, …; ``overrides`` are for all of them.
    ``episodes`` of each task have the seeds ``seed``, ``seed`` + 1, …
    """

    recipe: str
    tasks: tuple[str, ...] = ()
    suite: str | None = None
    episodes: int = 30
    seed: int = 10_000
    max_steps: int | None = None
    trainings: int = 1
    reference: str
    overrides: tuple[str, ...] = ()
    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)
    conditions: dict[str, Condition] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tasks and self.suite is None:
            raise ConfigError("tasks: expected at least one, or a suite")
        if self.reference not in self.variants:
            raise ConfigError(f"reference: no variant {self.reference!r}; choices: {choices(self.variants)}")
        for name in ("episodes", "trainings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if INTACT in self.conditions:
            raise ConfigError(f"conditions.{INTACT}: this name is for the policy from which nothing is taken")
        for kind in ("variants", "conditions"):
            for name in getattr(self, kind):
                if not NAME.fullmatch(name):
                    raise ConfigError(f"{kind}.{name}: a name is a folder's: letters, digits and . _ + -")

    def recipe_of(self, variant: str, training: int = 0) -> Recipe:
        """The variant's recipe, with the seed of its ``training``."""
        changes = (*self.overrides, *self.variants[variant], f"training.seed={training}")
        try:
            return load_recipe(self.recipe, changes)
        except ConfigError as error:
            raise ConfigError(f"variant {variant}: {error}") from None


def load_ablations(name: str, changes: Sequence[str] = ()) -> Ablations:
    """Read the file ``name``, or the one of that name in ``config/ablations``, with ``key=value`` changes to it."""
    path = config_file(name, "config/ablations", "file of ablations")
    try:
        return from_dict(Ablations, override(load_yaml(path), changes))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


class Study:
    """Ablations in their folder.

    Args:
        opened: the datasets and what is held out, as a recipe sees them.
        data: what the datasets are called, which must not change between two runs.
        only: variants and conditions to do; all of them without. What else is done is in the table all the same.
    """

    def __init__(
        self,
        ablations: Ablations,
        out: Path,
        opened: Callable[[Recipe], tuple[list[Dataset], list[Dataset] | None]],
        data: Sequence[str],
        *,
        workers: int = 1,
        only: Sequence[str] = (),
    ) -> None:
        known = (*ablations.variants, *ablations.conditions)
        for name in only:
            if name not in known:
                raise EvaluationError(f"no variant or condition {name!r}; choices: {choices(known)}")
        self.ablations, self.out = ablations, out
        self._opened, self._data, self._workers, self._only = opened, list(data), workers, set(only)
        # Bad overrides fail here, not after hours.
        self._recipes = {
            (name, k): ablations.recipe_of(name, k) for name in ablations.variants for k in range(ablations.trainings)
        }

    def run(self) -> dict[str, Any]:
        """Train and evaluate all; the table is written anew after each step. Returns its record."""
        record = self.table()
        for variant, condition in self._wanted():
            for k in range(self.ablations.trainings):
                checkpoint = self._checkpoint(variant, k)
                if not (checkpoint / "config.json").is_file():
                    self._train(variant, k, checkpoint)
            done = [self._evaluate(variant, condition, k) for k in range(self.ablations.trainings)]
            if any(done):
                record = self.table()
        return record

    def table(self) -> dict[str, Any]:
        """Write ``table.json`` and ``table.md`` of what is done so far; returns the record."""
        rows = [row for row in map(self._row, self._rows()) if row is not None]
        by_name = {row["name"]: row for row in rows}
        reference = by_name.get(self.ablations.reference)
        for row in rows:
            row |= _difference(row, reference)
        record = {
            "format": FORMAT, "ablations": to_dict(self.ablations), "data": self._data,
            "rows": [{key: value for key, value in row.items() if key != "by_seed"} for row in rows],
            "missing": [name for name, _, _ in self._rows() if name not in by_name], "versions": versions(),
        }  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)
        save_results(record, self.out / "table.json")
        (self.out / "table.md").write_text(markdown(record), encoding="utf-8")
        return record

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        """Name, variant and condition of each row of the table."""
        for variant in self.ablations.variants:
            yield variant, variant, INTACT
        for condition in self.ablations.conditions:
            yield condition, self.ablations.reference, condition

    def _wanted(self) -> Iterator[tuple[str, str]]:
        for name, variant, condition in self._rows():
            if not self._only or name in self._only or variant == name == self.ablations.reference:
                yield variant, condition

    def _checkpoint(self, variant: str, training: int) -> Path:
        return self.out / variant / f"seed{training}" / "checkpoint"

    def _evaluation(self, variant: str, condition: str, training: int) -> Path:
        return self._checkpoint(variant, training).parent / "evaluations" / f"{condition}.json"

    def _train(self, variant: str, training: int, checkpoint: Path) -> None:
        folder, recipe = checkpoint.parent, self._recipes[variant, training]
        settings = {"recipe": _plain(recipe), "data": self._data}
        _check_settings(folder / "settings.json", settings)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        states = folder / "checkpoint.training"
        datasets, held_out = self._opened(recipe)
        provenance = {"recipe": self.ablations.recipe, "variant": variant, "dataset": " ".join(self._data),
                      "camera": recipe.camera}  # fmt: skip
        with bar(f"train {variant}, seed {training}", recipe.training.steps) as advance:
            result = train(
                recipe, datasets, held_out, states / "tensorboard", lambda p: advance(p.step, p.note), provenance,
                folder=states, resume=bool(RunFolder(states).states()), say=print,
            )  # fmt: skip
        result.checkpoint.save(checkpoint)

    def _evaluate(self, variant: str, condition: str, training: int) -> bool:
        """Run the episodes unless it is done; whether anything was."""
        path = self._evaluation(variant, condition, training)
        plan = self._plan(variant, condition, training)
        if path.is_file():
            _, before = load_results(path)
            if before != plan:
                raise EvaluationError(f"{path}: is of another checkpoint, or of other episodes; remove it, or choose "
                                      "another --out")  # fmt: skip
            return False
        outcomes: list[Outcome] = []
        with bar(f"evaluate {variant}, seed {training}, {condition}", len(plan.jobs())) as advance:
            for outcome in run_plan(plan, self._workers):
                outcomes.append(outcome)
                succeeded = sum(o.result is not None and o.result.success for o in outcomes)
                advance(len(outcomes), f"{succeeded} of {len(outcomes)} succeeded")
        timing = {"workers": self._workers, "seconds": sum(outcome.seconds for outcome in outcomes)}
        save_results(results(plan, outcomes, ["vla", "ablate"], timing), path)
        return True

    def _plan(self, variant: str, condition: str, training: int) -> Plan:
        ablations = self.ablations
        taken = Condition() if condition == INTACT else ablations.conditions[condition]
        tasks = assignments(ablations.tasks, ablations.suite, taken.instructions, None, ablations.max_steps)
        seeds = range(ablations.seed, ablations.seed + ablations.episodes)
        return planned(variant, self._checkpoint(variant, training), tasks, seeds, taken)

    def _row(self, named: tuple[str, str, str]) -> dict[str, Any] | None:
        """Figures of a row over all its trainings; None where one of them is not done."""
        name, variant, condition = named
        paths = [self._evaluation(variant, condition, k) for k in range(self.ablations.trainings)]
        if not all(path.is_file() for path in paths):
            return None
        runs = [run for path in paths for run in load_results(path)[0]["runs"]]
        episodes = [episode for run in runs for episode in run["episodes"]]
        kind = "variant" if condition == INTACT else "condition"
        return {
            "name": name, "kind": kind, "trainings": len(paths),
            "change": list(self.ablations.variants[variant]) if condition == INTACT
            else to_dict(self.ablations.conditions[condition]),
            **summary(episodes), "inference_ms_p50": _median([run["timing"]["inference_ms_p50"] for run in runs]),
            "evaluations": [str(path.relative_to(self.out)) for path in paths],
        }  # fmt: skip


def planned(label: str, checkpoint: Path, tasks: Sequence[Assignment], seeds: Sequence[int], taken: Condition) -> Plan:
    """The episodes of a checkpoint from which something is taken; ``tasks`` say the condition's instructions."""
    wanted = Wanted(label=label, trainings=((str(checkpoint),),))
    plan, _ = make_plan([wanted], tasks, seeds, black=taken.black, faults=taken.faults)
    return plan


def together(plans: Sequence[Plan]) -> Plan:
    """One plan of several that differ in their policies alone, so that one set of processes runs them all."""
    entries: list[Entry] = []
    runs: list[Run] = []
    for plan in plans:
        runs += [replace(run, entry=run.entry + len(entries)) for run in plan.runs]
        entries += plan.entries
    return replace(plans[0], entries=tuple(entries), runs=tuple(runs))


def summary(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Success (Wilson) and score (bootstrap over seeds) of episodes as an evaluation's file has them; and by seed.

    ``by_seed`` has for each task and seed the mean over trainings; episodes that could not be run are counted in
    ``errors`` alone.
    """
    done = [episode for episode in episodes if "error" not in episode]
    successes = sum(bool(episode["success"]) for episode in done)
    by_seed: dict[tuple[str, int], list[float]] = {}
    for episode in done:
        by_seed.setdefault((episode["task"], episode["seed"]), []).append(merit(episode))
    means = {key: float(np.mean(values)) for key, values in by_seed.items()}
    scored = bool(done) and all(episode["score"] is not None for episode in done)
    names = sorted({name for episode in done for name in episode.get("details") or {}})
    return {
        "episodes": len(done), "errors": len(episodes) - len(done), "successes": successes,
        "success_rate": successes / len(done) if done else None, "success_ci95": wilson_interval(successes, len(done)),
        "score": float(np.mean(list(means.values()))) if scored else None,
        "score_ci95": bootstrap_interval(list(means.values())) if scored else None,
        "details": {name: float(np.mean([episode["details"][name] for episode in done])) for name in names},
        "by_seed": means,
    }  # fmt: skip


def merit(episode: Mapping[str, Any]) -> float:
    """What an episode is worth in [0, 1]: its score where the benchmark has one, else its success."""
    return float(episode["success"] if episode["score"] is None else episode["score"])


def _difference(row: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any]:
    """Mean difference to the reference over the same seeds, with its interval."""
    if reference is None or row["name"] == reference["name"]:
        return {"difference": None, "difference_ci95": None}
    shared = [key for key in row["by_seed"] if key in reference["by_seed"]]
    deltas = [row["by_seed"][key] - reference["by_seed"][key] for key in shared]
    return {"difference": float(np.mean(deltas)) if deltas else None, "difference_ci95": bootstrap_interval(deltas)}


def markdown(record: Mapping[str, Any]) -> str:
    """The table for people, in Markdown: what was trained, and what was taken away."""
    rows = record["rows"]
    scored = any(row["score"] is not None for row in rows)
    text = ["# Ablations", ""]
    for kind, title in (("variant", "Trained"), ("condition", "Taken away from the reference while it runs")):
        shown = [row for row in rows if row["kind"] == kind]
        if shown:
            head = [kind, "episodes", *(["score"] if scored else []), "success", "difference", "inference p50 [ms]"]
            text += [f"## {title}", "", *table(head, [_cells(row, scored) for row in shown]), ""]
    text += [
        f"Reference: {record['ablations']['reference']}; trainings of each: {record['ablations']['trainings']}. "
        "Intervals are 95 %: of success by Wilson over all episodes, of score and difference by bootstrap over seeds, "
        "each the mean of its trainings. The difference is that of the "
        f"{'score' if scored else 'success'} to the reference on the same seeds.",
    ]
    text += [f"Not done yet: {', '.join(record['missing'])}."] * bool(record["missing"])
    text += [f"{row['name']}: {row['errors']} episodes could not be run." for row in rows if row["errors"]]
    return "\n".join(text) + "\n"


def _cells(row: Mapping[str, Any], scored: bool) -> list[str]:
    return [
        row["name"], str(row["episodes"]), *([_number(row["score"], row["score_ci95"])] if scored else []),
        _number(row["success_rate"], row["success_ci95"]),
        _number(row["difference"], row["difference_ci95"], sign="+"),
        "-" if row["inference_ms_p50"] is None else f"{row['inference_ms_p50']:.1f}",
    ]  # fmt: skip


def _number(value: float | None, interval: Sequence[float] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    low, high = interval or (value, value)
    return f"{value:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def _median(values: Sequence[float | None]) -> float | None:
    return percentile([value for value in values if value is not None], 50)


def _plain(recipe: Recipe) -> Any:
    """The recipe as JSON gives it back."""
    return json.loads(json.dumps(to_dict(recipe)))


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise where an earlier training of the folder had other settings."""
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(_changed(before, settings, ""))
    if changed:
        raise EvaluationError(f"{path.parent}: a training with other settings began here: {'; '.join(changed[:5])}; "
                              "remove the folder, or choose another --out")  # fmt: skip


def _changed(before: Any, after: Any, path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from _changed(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif before != after:
        yield f"{path} was {before!r}, now {after!r}"
