"""The report of :mod:`vla_core.experiments.beyond_demos`: one JSON file of figures and one self-contained page."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_core.config import to_dict
from vla_core.contract import RobotContract
from vla_core.evaluation import plots
from vla_core.evaluation.metrics import bootstrap_interval, wilson_interval
from vla_core.evaluation.report import picture
from vla_core.evaluation.results import versions

if TYPE_CHECKING:
    from vla_core.experiments.beyond_demos import BeyondDemos

FORMAT = "vla_ros_beyond_demos_v1"
WANTED_GAIN = 0.20  # of success, in points / 100
WANTED_CORRELATION = 0.9
STAGES = {"imitation": ("imitation",), "planning": ("practice", "practice_data", "world"), "ppo": ("ppo",)}
TITLES = {"imitation": "imitation", "planning": "planning, imitation as proposal", "ppo": "PPO from the imitation"}


def write_report(options: BeyondDemos, contract: RobotContract, out: Path) -> dict[str, Any]:
    """Write ``report.json`` and ``report.html`` of what is done so far; returns the figures."""
    methods = {name: row for name in options.methods if (row := _method(name, options, out)) is not None}
    base = methods.get("imitation")
    for name, row in methods.items():
        if name != "imitation" and base is not None:
            row |= _gain(row, base)
    for row in methods.values():
        del row["by_training"]
    record = {
        "format": FORMAT, "options": to_dict(options), "task": options.task, "robot": contract.name,
        "demonstrations": {"episodes": options.demonstrations, **_read(out / "demonstrations.cost.json")},
        "methods": methods, "reward_prediction": _rewards(options, out),
        "minutes": sum(_read(cost)["seconds"] for cost in out.glob("**/*.cost.json")) / 60,
        "missing": [name for name in options.methods
                    if name not in methods or len(methods[name]["trainings"]) < options.trainings],
        "versions": versions(),
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (out / "report.html").write_text(_page(record, _curves(options, out)), encoding="utf-8")
    return record


def _method(name: str, options: BeyondDemos, out: Path) -> dict[str, Any] | None:
    """Figures over the trainings that are done; None without any."""
    found: dict[int, dict[int, bool]] = {}
    trainings, inference = [], []
    for k in range(options.trainings):
        folder = out / f"seed{k}"
        if not (folder / f"{name}.json").is_file():
            continue
        episodes = _read(folder / f"{name}.json")["episodes"]
        found[k] = {episode["seed"]: episode["success"] for episode in episodes}
        successes = sum(found[k].values())
        costs = [_read(folder / f"{stage}.cost.json") for stage in STAGES[name]]
        inference += [e["inference_ms_p50"] for e in episodes if e["inference_ms_p50"] is not None]
        trainings.append({
            "seed": k, "trials": len(episodes), "successes": successes, "success_rate": successes / len(episodes),
            "success_ci95": wilson_interval(successes, len(episodes)),
            "environment_steps": sum(cost["steps"] for cost in costs),
            "minutes": sum(cost["seconds"] for cost in costs) / 60,
        })  # fmt: skip
    if not trainings:
        return None
    successes, trials = (sum(row[key] for row in trainings) for key in ("successes", "trials"))
    return {
        "trials": trials, "successes": successes, "success_rate": successes / trials,
        "success_ci95": wilson_interval(successes, trials),
        "environment_steps": float(np.mean([row["environment_steps"] for row in trainings])),
        "minutes": float(np.mean([row["minutes"] for row in trainings])),
        "inference_ms_p50": float(np.median(inference)) if inference else None,
        "trainings": trainings, "by_training": found,
    }  # fmt: skip


def _gain(row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """What a method adds, on the very same trainings and seeds; the interval is by bootstrap over seeds."""
    both = sorted(set(row["by_training"]) & set(base["by_training"]))
    if not both:
        return {"gain": None, "gain_ci95": None, "gained_enough": None}
    seeds = sorted(row["by_training"][both[0]])
    paired = [float(np.mean([row["by_training"][k][s] - base["by_training"][k][s] for k in both])) for s in seeds]
    gain = float(np.mean(paired))
    return {"gain": gain, "gain_ci95": bootstrap_interval(paired), "gained_enough": gain >= WANTED_GAIN}


def _rewards(options: BeyondDemos, out: Path) -> dict[str, Any] | None:
    """Spearman's rank correlation of predicted and true returns of held-out episodes."""
    places = [out / f"seed{k}" / "world_returns.json" for k in range(options.trainings)]
    found = [_read(place) for place in places if place.is_file()]
    if not found:
        return None
    observed = [one["observed"] for one in found]
    return {
        "rank_correlation": observed, "imagined_rank_correlation": [one["imagined"] for one in found],
        "episodes": [one["episodes"] for one in found], "least": min(observed),
        "correlated_enough": min(observed) >= WANTED_CORRELATION,
    }  # fmt: skip


def _curves(options: BeyondDemos, out: Path) -> bytes | None:
    """Success while PPO tries, by environment steps."""
    places = [(k, out / f"seed{k}" / "ppo_history.json") for k in range(options.trainings)]
    found = {k: _read(place) for k, place in places if place.is_file()}
    if not found:
        return None
    return plots.lines(
        {f"training {k}": [(point["steps"], point["success"]) for point in history] for k, history in found.items()},
        "control steps in the simulator", "success while trying",
    )  # fmt: skip


def _read(place: Path) -> Any:
    return json.loads(place.read_text(encoding="utf-8"))


def _page(record: Mapping[str, Any], curves: bytes | None) -> str:
    methods = record["methods"]
    bars = plots.success_bars([(TITLES[n], row["success_rate"], *row["success_ci95"]) for n, row in methods.items()])
    rows = "".join(
        f"<tr><td>{html.escape(TITLES[name])}<td>{_ranged(row['success_rate'], row['success_ci95'])}"
        f"<td>{', '.join(format(one['success_rate'], '.2f') for one in row['trainings'])}<td>{_points(row)}"
        f"<td>{row['environment_steps']:,.0f}<td>{row['minutes']:.1f}<td>{row['inference_ms_p50'] or 0:.1f}"
        for name, row in methods.items()
    )
    rewards = record["reward_prediction"]
    predicted = "" if rewards is None else (
        f"<p>Rank correlation of the world model's predicted return with the true one, on held-out episodes: "
        f"{', '.join(format(value, '.3f') for value in rewards['rank_correlation'])}.</p>"
    )  # fmt: skip
    missing = f"<p>Not done yet: {', '.join(record['missing'])}.</p>" if record["missing"] else ""
    curve = "" if curves is None else f"<h2>PPO</h2>{picture(curves, 'png', 'success while trying')}"
    facts = "".join(f"<tr><td>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in record["versions"].items())
    demonstrations = record["demonstrations"]
    return f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>Beyond the demonstrations: {html.escape(record["task"])}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
img{{max-width:100%}} table{{border-collapse:collapse}}
td,th{{padding:.15rem .8rem;border-bottom:1px solid #ddd;text-align:left}}
</style>
<h1>Beyond the demonstrations: {html.escape(record["task"])}</h1>
<p>{demonstrations["episodes"]} demonstrations ({demonstrations["steps"]} control steps). Each method on the same unseen
seeds, {record["options"]["episodes"]} for each training; intervals are 95 % (Wilson over all episodes; of the gain,
bootstrap over seeds). Costs are those of one training, beside the demonstrations and the imitation.</p>
{missing}
<table><tr><th>method<th>success<th>by training<th>gain [points]<th>control steps<th>minutes<th>inference p50 [ms]{rows}
</table>{picture(bars, "png", "success rates")}{predicted}{curve}
<h2>Facts</h2><table>{facts}</table></html>
"""


def _ranged(value: float, interval: Any, form: str = ".2f") -> str:
    return f"{value:{form}} ({interval[0]:{form}} to {interval[1]:{form}})"


def _points(row: Mapping[str, Any]) -> str:
    """The gain in points with its interval; nothing of what gains are measured from."""
    if row.get("gain") is None:
        return ""
    return _ranged(100 * row["gain"], [100 * value for value in row["gain_ci95"] or (row["gain"],) * 2], "+.0f")
