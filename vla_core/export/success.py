"""Success in simulation of a checkpoint and of what was made of it, in the same episodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vla_core.evaluation.plan import EvaluationError, Wanted, make_plan
from vla_core.evaluation.runner import run_plan
from vla_core.evaluation.suites import assignments

EPISODES, FIRST_SEED = 20, 10_000


def success(places: Mapping[str, Path | str], task: str, episodes: int, seed: int = FIRST_SEED) -> dict[str, float]:
    """The share of ``episodes`` of the world ``task``, from ``seed`` on, that each of ``places`` succeeds in."""
    wanted = [Wanted(label=label, trainings=((str(place),),)) for label, place in places.items()]
    tasks = assignments((task,), None, "canonical", None, None)
    plan, _ = make_plan(wanted, tasks, range(seed, seed + episodes))
    outcomes = list(run_plan(plan, 1, None))
    broken = [outcome.error for outcome in outcomes if outcome.result is None]
    if broken:
        raise EvaluationError(f"{task}: an episode could not be run: {broken[0]}")
    reached = [0] * len(places)
    for outcome in outcomes:
        reached[outcome.job.run] += outcome.result is not None and outcome.result.success
    return {label: count / episodes for label, count in zip(places, reached, strict=True)}
