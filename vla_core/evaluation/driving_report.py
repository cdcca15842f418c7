"""The driving demo's report: one JSON file of figures and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_core.contract import RobotContract
from vla_core.evaluation import drive_figures, planning, plots
from vla_core.evaluation.driving import Driven, difference, figures
from vla_core.evaluation.metrics import percentile
from vla_core.evaluation.planning import Plans
from vla_core.evaluation.results import versions
from vla_core.training.trainer import Result

OPEN_LOOP = (
    "Open-loop error alone does not predict driving: a policy may follow a recorded drive closely and yet go astray "
    "once its own errors decide what it sees next, and another one that differs from the recording may drive well. "
    "Both are stated; the driving score is the one that counts."
)
TOP = ("driving_score", "driving_score_ci95", "success_rate", "success_ci95", "route_completion",
       "route_completion_ci95", "collisions_per_km", "collisions_per_km_ci95", "off_road_share")  # fmt: skip
DISPLACEMENTS = ("l2_1s", "l2_2s", "l2_3s", "miss_rate", "ade", "fde")


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Drives with something taken away, and what that was, in words."""

    driven: Driven
    what: str


@dataclass(frozen=True, kw_only=True)
class Film:
    """A drive from above: a video's file, and what it shows."""

    path: Path
    title: str


@dataclass(frozen=True, kw_only=True)
class DriveResult:
    """Everything that the report tells. ``seconds`` are the steps' wall times, by name."""

    recipe: str
    contract: RobotContract
    drives: int
    frames: int
    bag_bytes: int
    training: Result
    history: Sequence[tuple[int, float, float | None]]
    live: Driven
    plans: Sequence[Plans]
    steady: Sequence[Plans]
    ablations: Sequence[Ablation] = ()
    films: Sequence[Film] = ()
    glimpses: Sequence[drive_figures.Glimpse] = ()
    notes: Sequence[str] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


def report(result: DriveResult) -> dict[str, Any]:
    """The content of ``report.json``.

    Scores and completions are in percent, displacements in m, the other rates in [0, 1] or per km. ``l2_1s`` is that
    at the horizon; ``open_loop`` has both habits of averaging (:mod:`vla_core.evaluation.planning`).
    """
    closed = figures(result.live)
    opened = planning.figures(result.plans)
    return {
        "recipe": result.recipe, **{name: closed[name] for name in TOP}, "episodes": closed["episodes"],
        **{name: opened[name] for name in DISPLACEMENTS}, "open_loop_collision_rate": opened["collision_rate"],
        "closed_loop": closed, "kinds": {kind: figures(result.live.of_kind(kind)) for kind in result.live.kinds},
        "open_loop": opened, "open_loop_steady": planning.figures(result.steady),
        "ablations": {each.driven.name: _ablated(each, result.live) for each in result.ablations},
        "routes": [route.to_dict() for route in result.live.routes], "comfort": closed["comfort"],
        "latency": {
            name: {"p50": percentile(values, 50), "p99": percentile(values, 99), "count": len(values)}
            for name, values in result.live.latencies.items()
        },
        "training": {
            "seconds": result.training.seconds, "loss": result.training.loss,
            "held_out_loss": result.training.validation_loss,
            "parameters": sum(p.numel() for p in result.training.checkpoint.model.parameters()),
            "drives": result.drives, "frames": result.frames, "bag_bytes": result.bag_bytes,
        },
        "notes": list(result.notes), "seconds": dict(result.seconds), "versions": versions(),
    }  # fmt: skip


def _ablated(ablation: Ablation, live: Driven) -> dict[str, Any]:
    found = figures(ablation.driven)
    against = difference(ablation.driven, live)
    return {
        "what": ablation.what, **{name: found[name] for name in TOP}, "episodes": found["episodes"],
        "difference": None if against is None else against[0],
        "difference_ci95": None if against is None else against[1],
        "routes": [route.to_dict() for route in ablation.driven.routes],
    }  # fmt: skip


def write_report(result: DriveResult, folder: Path) -> Path:
    """Write ``report.json`` and ``report.html``; returns the page."""
    numbers = report(result)
    (folder / "report.json").write_text(json.dumps(numbers, indent=1, allow_nan=False), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(result, numbers), encoding="utf-8")
    return page


STYLE = """
:root{color-scheme:light dark;--ink:#1d2329;--soft:#5b6670;--back:#fff;--tile:#f2f5f7;--line:#d9dfe4;--mark:#0072b2}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaee;--soft:#9aa7b3;--back:#14181c;--tile:#1f262c;--line:#36414a;
--mark:#56b4e9}}
body{font:16px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:var(--ink);
background:var(--back)}
h1{margin-bottom:.2rem}h2{margin:2.2rem 0 .5rem}.soft,figcaption{color:var(--soft);font-size:.9rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:.8rem;margin:1rem 0}
.tile{background:var(--tile);border-radius:.5rem;padding:.8rem}.tile b{display:block;font-size:1.6rem;line-height:1.3}
.first{outline:2px solid var(--mark)}.wide{overflow-x:auto}.tile span{color:var(--soft);font-size:.9rem}
table{border-collapse:collapse;font-size:.93rem}td,th{padding:.2rem .8rem .2rem 0;border-bottom:1px solid var(--line);
text-align:left;vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.plots{display:flex;flex-wrap:wrap;gap:.8rem}img{max-width:100%;background:#fff;border-radius:.5rem}
.films{display:grid;grid-template-columns:repeat(auto-fill,minmax(18rem,1fr));gap:.8rem}figure{margin:0 0 .8rem}
video{width:100%;border-radius:.5rem;background:#000}.says{border-left:.3rem solid var(--mark);padding:.3rem 1rem;
background:var(--tile);border-radius:.3rem}
"""


def _page(result: DriveResult, numbers: Mapping[str, Any]) -> str:
    closed, opened, steady = numbers["closed_loop"], numbers["open_loop"], numbers["open_loop_steady"]
    sections = [
        _tiles(numbers),
        f"<p class=says>{OPEN_LOOP}</p>",
        "<h2>Closed loop</h2>",
        f"<p class=soft>Driven live over ROS 2 on {closed['episodes']} routes that no training held, "
        f"{closed['km']:.1f} km in all, in lockstep: trajectory, follower, steering and speed. Driving score: route "
        "completion times a factor for each infraction (CARLA's leaderboard); success: the route in time and without "
        "any (Bench2Drive). Intervals are 95 %, over routes.</p>",
        _picture(drive_figures.route_scores(result.live.routes), "driving score of each route"),
        _table(["route", "routes", "driving score", "success", "completion", "infractions"],
               [_kind(kind, found) for kind, found in [("all", closed), *numbers["kinds"].items()]]),
        _films(result.films),
        _ablations(result, numbers),
        "<h2>Open loop</h2>",
        f"<p class=soft>Plans at {opened['ticks']} ticks of {opened['routes']} held-out drives against what was then "
        "driven. At the horizon as UniAD has it, mean up to it as ST-P3 and VAD have it; the two do not compare. "
        "“Steady” goes on at the speed and yaw rate of the tick and looks at nothing.</p>",
        _table(["", "policy", "95 %", "steady"], [
            [words, _number(opened[name]), _range(opened.get(f"{name}_ci95")), _number(steady[name])]
            for words, name in _OPEN_ROWS
        ]),
        _picture(drive_figures.displacement({"policy": result.plans, "steady": result.steady}), "displacement"),
        _glimpses(result.glimpses),
        "<h2>Training and time</h2><div class=plots>",
        _picture(plots.training_curve(list(result.history)), "loss"),
        _picture(plots.latency_histograms({k: list(v) for k, v in result.live.latencies.items()}), "latencies")
        if result.live.latencies else "",
        "</div>", _table(["", ""], _facts(result, numbers)),
        _routes(numbers["routes"]),
    ]  # fmt: skip
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>Driving: {html.escape(result.recipe)}</title><style>{STYLE}</style>"
        f"<h1>Driving: {html.escape(result.recipe)}</h1><p class=soft>From {_sensors(result)} to a trajectory. "
        f"Recorded, trained, driven live and replayed over ROS 2; contract {html.escape(result.contract.name)}.</p>"
        f"{''.join(sections)}</html>\n"
    )


def _sensors(result: DriveResult) -> str:
    """What the policy sees, in words."""
    seen = result.training.checkpoint.config.observation
    counted = ((len(seen.images), "camera"), (len(seen.clouds), "point cloud"))
    parts = [f"{count} {word}{'s' * (count > 1)}" for count, word in counted if count]
    parts += [*map(html.escape, (*seen.sequences, *seen.state)), *(["words"] if seen.instruction else [])]
    return ", ".join(parts) or "nothing"


_OPEN_ROWS = (
    *((f"displacement at {h} s [m]", f"l2_{h}s") for h in planning.HORIZONS_S),
    ("displacement, mean of these [m]", "l2_mean"),
    *((f"displacement, mean up to {h} s [m]", f"l2_{h}s_up_to") for h in planning.HORIZONS_S),
    ("displacement, mean of these [m]", "l2_mean_up_to"),
    ("ADE, mean of all waypoints [m]", "ade"),
    ("FDE, the last waypoint [m]", "fde"),
    ("miss rate, the last more than 2 m away", "miss_rate"),
    ("collision rate, at any waypoint", "collision_rate"),
    *((f"collision rate at {h} s", f"collision_rate_{h}s") for h in planning.HORIZONS_S),
    *((f"collision rate up to {h} s", f"collision_rate_{h}s_up_to") for h in planning.HORIZONS_S),
)


def _tiles(numbers: Mapping[str, Any]) -> str:
    tiles = (
        (f"{numbers['driving_score']:.1f}", f"driving score of 100, {_range(numbers['driving_score_ci95'], 1)}"),
        (f"{numbers['success_rate']:.2f}", f"success on {numbers['episodes']} unseen routes, "
                                           f"{_range(numbers['success_ci95'])}"),
        (f"{numbers['route_completion']:.1f} %", "route completion"),
        (_number(numbers["collisions_per_km"]), f"collisions per km, {_range(numbers['collisions_per_km_ci95'])}"),
        (f"{numbers['l2_1s']:.2f} / {numbers['l2_2s']:.2f} / {numbers['l2_3s']:.2f} m", "open loop: displacement at 1, "
                                                                                      "2 and 3 s"),
        (_number(numbers["open_loop_collision_rate"], 3), "open loop: share of plans that hit something"),
    )  # fmt: skip
    return "<div class=tiles>" + "".join(
        f"<div class='tile{' first' * (place < 2)}'><b>{value}</b><span>{html.escape(label)}</span></div>"
        for place, (value, label) in enumerate(tiles)
    ) + "</div>"  # fmt: skip


def _kind(kind: str, found: Mapping[str, Any]) -> list[str]:
    return [
        kind, str(found["episodes"]), f"{found['driving_score']:.1f} ({_range(found['driving_score_ci95'], 1)})",
        f"{found['success_rate']:.2f} ({_range(found['success_ci95'])})", f"{found['route_completion']:.1f} %",
        _infractions(found["infractions"]),
    ]  # fmt: skip


def _infractions(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {words}" if count > 1 else words for words, count in found.items()) or "none"


def _films(films: Sequence[Film]) -> str:
    shown = "".join(
        f"<figure>{_moving(film)}<figcaption>{html.escape(film.title)}</figcaption></figure>"
        for film in films if film.path.is_file()
    )  # fmt: skip
    return f"<h2>Drives from above</h2><div class=films>{shown}</div>" if shown else ""


def _moving(film: Film) -> str:
    data = base64.b64encode(film.path.read_bytes()).decode()
    if film.path.suffix == ".gif":
        return f'<img alt="{html.escape(film.title)}" src="data:image/gif;base64,{data}">'
    return f'<video controls muted loop playsinline preload=metadata src="data:video/mp4;base64,{data}"></video>'


def _ablations(result: DriveResult, numbers: Mapping[str, Any]) -> str:
    if not result.ablations:
        return ""
    found = numbers["ablations"]
    rows = [[
        name.replace("_", " "), str(each["episodes"]),
        f"{each['driving_score']:.1f} ({_range(each['driving_score_ci95'], 1)})",
        f"{each['success_rate']:.2f} ({_range(each['success_ci95'])})",
        "-" if each["difference"] is None else f"{each['difference']:+.1f} ({_range(each['difference_ci95'], 1)})",
        each["what"],
    ] for name, each in found.items()]  # fmt: skip
    bars = [(result.live.name, numbers["driving_score"], numbers["driving_score_ci95"])]
    bars += [
        (name.replace("_", " "), each["driving_score"], each["driving_score_ci95"]) for name, each in found.items()
    ]
    return (
        "<h2>What is taken away</h2><p class=soft>The same checkpoint on the first of the same routes, with something "
        "taken away while it drives. The difference is that of the driving score on the same routes.</p>"
        + _picture(drive_figures.score_bars(bars), "driving scores")
        + _table(["", "routes", "driving score", "success", "difference", "what"], rows)
    )


def _glimpses(shown: Sequence[drive_figures.Glimpse]) -> str:
    if not shown:
        return ""
    pictures = "".join(
        f"<figure>{_picture(drive_figures.glimpse(each), each.observation.instruction)}"
        f"<figcaption>{each.seconds:.1f} s into a held-out drive</figcaption></figure>" for each in shown
    )  # fmt: skip
    return (
        "<h2>What the policy sees</h2><p class=soft>Its cameras, the mean size of the features of its bird's eye view, "
        f"and the scene from above.</p>{pictures}"
    )


def _routes(routes: Sequence[Mapping[str, Any]]) -> str:
    rows = [[
        str(route["seed"]), route["kind"], route["instruction"], "yes" if route["success"] else "no",
        f"{route['score']:.1f}", f"{route['completion']:.1f}", f"{route['seconds']:.1f}",
        _infractions(route["infractions"]),
    ] for route in routes]  # fmt: skip
    head = ["seed", "kind", "instructions", "success", "score", "completion [%]", "time [s]", "infractions"]
    return f"<h2>Routes</h2>{_table(head, rows)}"


def _facts(result: DriveResult, numbers: Mapping[str, Any]) -> list[list[str]]:
    training = numbers["training"]
    comfort = numbers["comfort"]
    return [
        ["recorded drives", str(training["drives"])], ["ticks in the training set", str(training["frames"])],
        ["bags", f"{training['bag_bytes'] / 1e6:.0f} MB"], ["parameters", f"{training['parameters']:,}"],
        ["training", f"{training['seconds']:.0f} s"],
        ["share of the time within nuPlan's bounds of comfort", f"{comfort['comfort']:.2f}"],
        ["mean speed", f"{comfort['speed_mean']:.1f} m/s"],
        *([f"{name.removesuffix('_ms').replace('_', ' ')}, p50 / p99",
           f"{_number(found['p50'], 1)} / {_number(found['p99'], 1)} ms"]
          for name, found in numbers["latency"].items()),
        *([f"step: {name}", f"{seconds:.0f} s"] for name, seconds in numbers["seconds"].items()),
        *(["note", note] for note in result.notes), *([name, text] for name, text in numbers["versions"].items()),
    ]  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numeric = [bool(rows) and all(_is_figure(row[i]) for row in rows) for i in range(len(head))]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(
            f"<{tag}{' class=n' * right}>{html.escape(cell)}" for cell, right in zip(cells, numeric, strict=True)
        )

    return f"<div class=wide><table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table></div>"


def _is_figure(cell: str) -> bool:
    return cell == "-" or (cell[:1] in tuple("+-0123456789") and not cell[-1:].isalpha())


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _range(interval: Sequence[float] | None, digits: int = 2) -> str:
    return "-" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def _picture(data: bytes, label: str) -> str:
    return f'<img alt="{html.escape(label)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
