"""The demo's report: one JSON file of figures and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.evaluation import plots
from vla_core.evaluation.metrics import percentile, wilson_interval
from vla_core.evaluation.open_loop import Replay
from vla_core.evaluation.parity import Parity
from vla_core.evaluation.results import versions
from vla_core.training.trainer import Result

OBJECT_IN_STATE = (
    "This policy sees Meta-World's 39 numbers, which hold the object's position and the goal: it can do without its "
    "camera."
)
OBJECT_UNSEEN = "This policy has no number that tells where the object is: it must see it."


@dataclass(frozen=True)
class LiveRun:
    """Outcomes and latencies of one live run, read from the files that its nodes wrote."""

    title: str
    outcomes: list[dict[str, Any]]
    late_ticks: int
    latencies: dict[str, list[float]]
    counts: dict[str, int]

    @classmethod
    def load(cls, title: str, folder: Path) -> LiveRun:
        """Read ``episodes.json`` of the simulator and ``latency.json`` of the policy."""
        try:
            episodes = json.loads((folder / "episodes.json").read_text(encoding="utf-8"))
            latency = json.loads((folder / "latency.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise VlaError(f"the run {title!r} left no results: {error}") from None
        counts = latency.pop("counts")
        return cls(title, episodes["episodes"], episodes["late_ticks"], latency, counts)

    @property
    def successes(self) -> int:
        """Episodes that succeeded."""
        return sum(bool(outcome["success"]) for outcome in self.outcomes)

    @property
    def rate(self) -> float:
        """Share of episodes that succeeded."""
        return self.successes / max(1, len(self.outcomes))

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        return wilson_interval(self.successes, len(self.outcomes))


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Everything that the report tells."""

    task: str
    camera: str
    recipe: str
    contract: RobotContract
    demonstrations: int
    frames: int
    bag_bytes: int
    training: Result
    history: list[tuple[int, float, float | None]]
    live: LiveRun
    black_camera: LiveRun
    swapped: LiveRun
    swapped_instruction: str
    baseline: LiveRun
    baseline_recipe: str
    realtime: LiveRun
    parity: Parity
    replay: Replay
    max_steps: int
    video: Path
    seconds: float


def figures(result: DemoResult) -> dict[str, Any]:
    """The content of ``report.json``."""
    live, realtime = result.live, result.realtime
    steps = [outcome["steps"] for outcome in live.outcomes if outcome["success"]]
    inference = realtime.latencies["inference_ms"]
    command = realtime.latencies["observation_to_command_ms"]
    replayed = result.replay.figures()
    return {
        "task": result.task,
        "camera": result.camera,
        "recipe": result.recipe,
        "success_rate": live.rate,
        "success_ci95": list(live.interval),
        "episodes": len(live.outcomes),
        "max_steps": result.max_steps,
        "mean_steps": sum(steps) / len(steps) if steps else None,
        "baseline_recipe": result.baseline_recipe,
        "baseline_success_rate": result.baseline.rate,
        "baseline_success_ci95": list(result.baseline.interval),
        "black_camera_success_rate": result.black_camera.rate,
        "black_camera_success_ci95": list(result.black_camera.interval),
        "other_instruction": result.swapped_instruction,
        "other_instruction_success_rate": result.swapped.rate,
        "other_instruction_success_ci95": list(result.swapped.interval),
        "realtime_success_rate": realtime.rate,
        "realtime_episodes": len(realtime.outcomes),
        "realtime_late_ticks": realtime.late_ticks,
        "realtime_counts": realtime.counts,
        "inference_ms_p50": percentile(inference, 50),
        "inference_ms_p99": percentile(inference, 99),
        "observation_to_command_ms_p50": percentile(command, 50),
        "observation_to_command_ms_p99": percentile(command, 99),
        "train_seconds": result.training.seconds,
        "train_loss": result.training.loss,
        "held_out_loss": result.training.validation_loss,
        "parameters": sum(p.numel() for p in result.training.checkpoint.model.parameters()),
        "replay_mae": replayed["mae"],
        "replay_mae_per_action": replayed["mae_per_action"],
        "replay_mae_per_step": replayed["mae_per_step"],
        "parity_max_abs_diff": result.parity.inputs_max_abs_diff,
        "parity_chunk_max_abs_diff": result.parity.chunks_max_abs_diff,
        "parity_compared": result.parity.compared,
        "demonstrations": result.demonstrations,
        "frames": result.frames,
        "bag_bytes": result.bag_bytes,
        "seconds": result.seconds,
        "outcomes": {run.title: run.outcomes for run in _runs(result)},
        "versions": versions(),
    }


def write_report(result: DemoResult, folder: Path) -> Path:
    """Write ``report.json`` and ``report.html``; returns the page."""
    numbers = figures(result)
    (folder / "report.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(result, numbers), encoding="utf-8")
    return page


def _runs(result: DemoResult) -> list[LiveRun]:
    return [result.live, result.black_camera, result.swapped, result.baseline, result.realtime]


def _ms(value: float | None) -> str:
    """A time; a busy machine may command nothing in realtime, since every picture is too old when it comes."""
    return "none" if value is None else f"{value:.1f}"


def _page(result: DemoResult, numbers: dict[str, Any]) -> str:
    low, high = numbers["success_ci95"]
    bars = plots.success_bars([
        (label, run.rate, *run.interval)
        for label, run in zip(
            [result.recipe, "black camera", "other instruction", f"{result.baseline_recipe} (baseline)", "realtime"],
            _runs(result), strict=True,
        )
    ])  # fmt: skip
    video = picture(result.video.read_bytes(), "gif", "live episodes") if result.video.is_file() else ""
    tiles = "".join(
        f"<div class=tile><b>{value}</b><span>{html.escape(label)}</span></div>"
        for label, value in (
            (f"success on {numbers['episodes']} unseen seeds, {low:.2f} to {high:.2f} (95 %)",
             f"{numbers['success_rate']:.2f}"),
            ("baseline, the published mini-VLA on the same bags", f"{numbers['baseline_success_rate']:.2f}"),
            ("training", f"{numbers['train_seconds']:.0f} s"),
            ("inference, median", f"{_ms(numbers['inference_ms_p50'])} ms"),
            ("observation to command, median / p99",
             f"{_ms(numbers['observation_to_command_ms_p50'])} / {_ms(numbers['observation_to_command_ms_p99'])} ms"),
            ("largest difference of a model input, live against its bag", f"{numbers['parity_max_abs_diff']:g}"),
        )
    )  # fmt: skip
    per_action = "".join(
        f"<tr><td>{html.escape(name)}<td>{entry['mae']:.4f}<td>{html.escape(entry['unit'])}"
        for name, entry in numbers["replay_mae_per_action"].items()
    )
    facts = "".join(
        f"<tr><td>{html.escape(name)}<td>{html.escape(str(value))}"
        for name, value in (
            ("demonstrations", numbers["demonstrations"]), ("ticks in the training set", numbers["frames"]),
            ("bags", f"{numbers['bag_bytes'] / 1e6:.1f} MB"), ("parameters", f"{numbers['parameters']:,}"),
            ("steps of a successful episode, mean", numbers["mean_steps"]),
            ("whole run", f"{numbers['seconds'] / 60:.1f} min"), *numbers["versions"].items(),
        )
    )  # fmt: skip
    sight = (
        f"With the camera blackened success is {numbers['black_camera_success_rate']:.2f}; with the instruction "
        f"“{html.escape(numbers['other_instruction'])}” it is {numbers['other_instruction_success_rate']:.2f}. "
        + (OBJECT_IN_STATE if "state" in result.training.checkpoint.config.observation.state else OBJECT_UNSEEN)
    )
    return f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>{html.escape(result.task)}: {html.escape(result.recipe)}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
h1{{margin-bottom:0}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.8rem;margin:1rem 0}}
.tile{{background:#f3f5f7;border-radius:.5rem;padding:.8rem}} .tile b{{display:block;font-size:1.6rem}}
.tile span{{color:#555;font-size:.9rem}} img{{max-width:100%}} table{{border-collapse:collapse}}
td,th{{padding:.15rem .8rem;border-bottom:1px solid #ddd;text-align:left}} .video img{{width:384px}}
</style>
<h1>{html.escape(result.task)} with {html.escape(result.recipe)}</h1>
<p>Recorded, trained, run live and replayed over ROS 2. Camera {html.escape(result.camera)},
contract {html.escape(result.contract.name)}; scores are from lockstep runs of at most {result.max_steps} steps,
latencies from {numbers["realtime_episodes"]} episodes in realtime.</p>
<div class=tiles>{tiles}</div>
<h2>Live episodes</h2><div class=video>{video}</div>
<h2>Success</h2>{picture(bars, "png", "success rates")}<p>{sight}</p>
<h2>Training</h2>{picture(plots.training_curve(result.history), "png", "loss")}
<h2>Latency in realtime</h2>{
        picture(
            plots.latency_histograms(
                {
                    "inference": result.realtime.latencies["inference_ms"],
                    "observation to command": result.realtime.latencies["observation_to_command_ms"],
                }
            ),
            "png",
            "latencies",
        )
    }
<p>{numbers["realtime_late_ticks"]} control ticks of the simulator were late in {numbers["realtime_episodes"]}
episodes; the policy sent {result.realtime.counts["commands"]} commands and
{result.realtime.counts["safe_commands"]} safe ones, between episodes and where no chunk was valid.</p>
<h2>Replay of a held-out bag</h2>
{picture(plots.replay_traces(result.replay), "png", "predicted and recorded actions")}
{picture(plots.replay_errors(result.replay), "png", "error over the horizon")}
<table><tr><th>action<th>mean absolute error<th>unit{per_action}</table>
<h2>Facts</h2><table>{facts}</table></html>
"""


def picture(data: bytes, kind: str, label: str) -> str:
    """An image inside a page."""
    return f'<img alt="{html.escape(label)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
