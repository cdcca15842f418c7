"""``vla demo-drive``: record the expert's drives, convert, train, drive live on unseen routes, replay, report.

Drives are those of real ROS 2 graphs, two of them side by side, one a core; but most that are recorded for training are
made without ROS, which gives the same bags, bit by bit, in half the time. Everything is written below one folder; the
figures of ``report.json`` come from files of the run, not from memory.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.config import from_dict, override
from vla_core.contract import RobotContract
from vla_core.data.bag import find_bags
from vla_core.data.convert import convert
from vla_core.data.dataset import Dataset, load
from vla_core.errors import VlaError
from vla_core.evaluation.ablations import Condition, Split, load_ablations, planned, together
from vla_core.evaluation.drive_figures import Glimpse, glimpses
from vla_core.evaluation.driven import boxes_of, plans, read_drive, steady_plans
from vla_core.evaluation.driving import Driven, Route
from vla_core.evaluation.driving_report import Ablation, DriveResult, Film, write_report
from vla_core.evaluation.open_loop import replay
from vla_core.evaluation.plan import Plan
from vla_core.evaluation.planning import Plans
from vla_core.evaluation.runner import run_plan
from vla_core.evaluation.suites import assignments
from vla_core.progress import bar
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.loading import load_policy
from vla_core.runtime.policy import Policy
from vla_core.sim.collect import Collection, collect
from vla_core.sim.driving.routes import kind_of, scenario
from vla_core.sim.noise import Noise
from vla_core.sim.worlds import find
from vla_core.threads import one_thread
from vla_core.training.recipe import load_recipe
from vla_core.training.trainer import Progress, Result, train
from vla_ros.graph import Scalar, load_graph
from vla_ros.graph_runs import GraphRun, run_graphs
from vla_ros.middleware import require_ros

CONTRACT = "driving"
SIMULATOR = "driving"  # a task is driving:<kind of routes>
EVALUATION_SEED = 10_000
HELD_OUT_SEED = 20_000
MARKER = ".vla_demo"
CORES = 2  # that graphs and workers share
BATCH = 3  # routes of each condition at a time
GLIMPSES = 2  # of each of the first held-out drives
DRIVE_BYTES = 160_000_000  # on disk: a drive's bag, its rows of the dataset and its decoded pictures
CONDITIONS = ("instruction_swapped", "cameras_black", "cameras_lost", "lidar_lost", "radars_lost", "imu_lost",
              "all_lost")  # fmt: skip


Arguments = Callable[[int], dict[str, Scalar]]  # of a graph, by its place among those side by side


class DriveDemoError(VlaError):
    """A demo that cannot begin."""


@dataclass(frozen=True, kw_only=True)
class DriveOptions:
    """What ``vla demo-drive`` is asked for.

    ``over_ros`` of the ``drives`` are recorded by ROS graphs, the others in process.
    ``ablate`` are the routes of each condition, 0 for none; once ``minutes`` are over, no further ones are begun.
    """

    out: Path
    task: str
    drives: int
    over_ros: int
    held_out: int
    disturbance: str
    recipe: str
    overrides: tuple[str, ...]
    seed: int
    routes: int
    videos: int
    ablate: int
    minutes: int


class DriveDemo:
    """The steps in order; each is one method and one progress bar."""

    def __init__(self, options: DriveOptions) -> None:
        self.options = options
        self.out = options.out
        self.contract = RobotContract.load(CONTRACT)
        require_ros()
        # Bad names fail here, before minutes of work.
        self.recipe = load_recipe(options.recipe, options.overrides)
        self.noise = from_dict(Noise, override({}, words), "noise") if (words := options.disturbance.split()) else None
        known = load_ablations("drive").conditions
        self.conditions = {name: known[name] for name in CONDITIONS} if options.ablate else {}
        simulator, self._kind = find(options.task)
        if simulator.contract != CONTRACT:
            raise DriveDemoError(f"--task {options.task}: expected a world of the contract {CONTRACT!r}, such as "
                                 f"{SIMULATOR}:mixed")  # fmt: skip
        kind_of(self._kind, 0)
        if self.out.exists() and any(self.out.iterdir()) and not (self.out / MARKER).is_file():
            raise DriveDemoError(
                f"{self.out} holds something else than an earlier demo; choose another folder with --out"
            )
        _require_space(self.out, options.drives + options.held_out)
        self._seconds: dict[str, float] = {}
        self._notes: list[str] = []
        self._start = time.monotonic()

    def run(self) -> Path:
        """Run everything; returns the report's page."""
        self._start = time.monotonic()
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        (self.out / MARKER).write_text("This folder belongs to `vla demo-drive`, which empties it at its start.\n")
        options = self.options
        history: list[tuple[int, float, float | None]] = []
        with self._timed("record"):
            over_ros = min(options.over_ros, options.drives)
            bags = self._record("record", over_ros, options.seed, options.disturbance) if over_ros else []
            bags += self._collect(options.drives - over_ros, options.seed + over_ros)
            held_out_bags = self._record("record held-out", options.held_out, HELD_OUT_SEED, "")
        with self._timed("convert"):
            data, held_out = self._datasets(bags, held_out_bags)
        with self._timed("train"):
            result = self._train(data, held_out, history)
        with self._timed("drive live"):
            live = self._live()
        policy = load_policy(self.out / "checkpoint")
        with self._timed("replay"):
            mine, steady, seen = self._replay(policy, held_out_bags)
        with self._timed("ablations"):
            ablations = list(self._ablations())
        self._seconds["all"] = time.monotonic() - self._start
        return write_report(
            DriveResult(
                recipe=options.recipe, contract=self.contract, drives=len(bags), frames=data.frames,
                bag_bytes=_bytes(self.out / "bags"), training=result, history=history, live=live, plans=mine,
                steady=steady, ablations=ablations, films=self._films(live), glimpses=seen,
                notes=self._notes, seconds=self._seconds,
            ),
            self.out,
        )  # fmt: skip

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._seconds[step] = time.monotonic() - start

    def _record(self, title: str, count: int, seed: int, disturbance: str) -> list[Path]:
        folder = self.out / "bags" / title.replace(" ", "_")
        self._graphs(title, "record_drive", count, seed, lambda place: {
            "output": str(folder / str(place)), "disturbance": disturbance,
        })  # fmt: skip
        bags = find_bags([folder])
        if len(bags) != count:
            raise DriveDemoError(f"{title}: {len(bags)} of {count} drives were recorded (log: {self.out / 'logs'})")
        return bags

    def _collect(self, count: int, seed: int) -> list[Path]:
        """Further drives of the expert, as ``vla collect`` makes them: the bags that graphs would have recorded."""
        if count == 0:
            return []
        collection = Collection(tasks=(self.options.task,), episodes=count, seed=seed, noise=self.noise)
        with bar("collect", count) as advance:
            done = collect(self.out / "bags" / "collect", collection, self.contract, CORES,
                           lambda all_of: advance(len(all_of), "in process"))  # fmt: skip
        return [episode.bag for episode in done]

    def _datasets(self, bags: list[Path], held_out: list[Path]) -> tuple[Dataset, Dataset]:
        spec = self.recipe.observation
        with bar("convert", len(bags) + len(held_out)) as advance:
            first = convert(bags, self.out / "dataset", spec, progress=lambda done: advance(done, "bags"))
            rest = convert(held_out, self.out / "dataset_held_out", spec,
                           progress=lambda done: advance(len(bags) + done, "bags"))  # fmt: skip
        cache = self.recipe.data.cache
        return load(first.path, spec=spec, cache=cache), load(rest.path, spec=spec, cache=cache)

    def _train(self, data: Dataset, held_out: Dataset, history: list[tuple[int, float, float | None]]) -> Result:
        recipe = self.recipe
        with bar(f"train {self.options.recipe}", recipe.training.steps) as advance:

            def report(progress: Progress) -> None:
                if progress.step % 10 == 0 or progress.validation_loss is not None:
                    history.append((progress.step, progress.loss, progress.validation_loss))
                    advance(progress.step, progress.note)

            provenance = {"recipe": self.options.recipe, "task": self.options.task}
            result = train(recipe, data, held_out, self.out / "tensorboard", report, provenance)
        result.checkpoint.save(self.out / "checkpoint")
        return result

    def _live(self) -> Driven:
        """Unseen routes, driven by the policy over ROS in lockstep."""
        options, folder = self.options, self.out / "live"
        lanes = self._graphs("drive live", "drive_demo", options.routes, EVALUATION_SEED, lambda place: {
            "checkpoint": str(self.out / "checkpoint"), "clock": "lockstep", "inference": "synchronous",
            "following": "synchronous", "use_sim_time": True,
            "results": str(folder / str(place) / "episodes.json"), "log_dir": str(folder / str(place)),
            "log_inputs": False,
            "video": str(folder / str(place) / "videos"), "video_episodes": -(-options.videos // CORES),
        })  # fmt: skip
        routes: list[Route] = []
        latencies: dict[str, list[float]] = {}
        for place in range(lanes):
            episodes = _read(folder / str(place) / "episodes.json")["episodes"]
            routes += [self._route(e["seed"], e["success"], e["details"], e["instructions"]) for e in episodes]
            for name, values in _read(folder / str(place) / "latency.json").items():
                if isinstance(values, list) and values:  # in lockstep there is no time from observation to command
                    latencies.setdefault(name, []).extend(values)
        return Driven(name=options.recipe, routes=tuple(routes), latencies=latencies)

    def _replay(self, policy: Policy, bags: Sequence[Path]) -> tuple[list[Plans], list[Plans], list[Glimpse]]:
        """Held-out bags through the policy's own core: its plans against what was driven."""
        core, step_ns = PolicyCore(policy), self.contract.chunk_step_ns
        mine: list[Plans] = []
        steady: list[Plans] = []
        seen: list[Glimpse] = []
        with bar("replay", len(bags)) as advance, one_thread():
            for number, path in enumerate(bags):
                drive, replayed = read_drive(path), replay(path, core)
                solids = boxes_of(scenario(self._kind, drive.seed).town.solids)
                mine.append(plans(drive, replayed, self.contract, solids))
                rows = replayed.predicted.shape[1]
                steady.append(steady_plans(drive, replayed.stamps_ns, rows, step_ns, solids))
                if number < 3:
                    seen += glimpses(drive, core, GLIMPSES)
                advance(number + 1, path.name)
        return mine, steady, seen

    def _ablations(self) -> Iterator[Ablation]:
        """The first of the same routes with something taken away; in processes, without ROS, which changes nothing."""
        count = min(self.options.ablate, self.options.routes)
        drives: dict[str, list[Route]] = {name: [] for name in self.conditions}
        with bar("ablations", len(drives) * count) as advance:
            # A few routes of every condition at a time: when the time is over, all have as many.
            for first in range(0, count, BATCH):
                if first and time.monotonic() - self._start > 60 * self.options.minutes:
                    self._notes.append(f"{self.options.minutes} minutes were over: ablations have {first} routes each")
                    break
                seeds = range(EVALUATION_SEED + first, EVALUATION_SEED + min(first + BATCH, count))
                for name, route in self._ablated(seeds):
                    drives[name].append(route)
                    advance(sum(map(len, drives.values())), name)
        for name, routes in drives.items():
            if not routes:
                raise DriveDemoError(f"ablations: {'; '.join(self._notes)}")
            routes.sort(key=lambda route: route.seed)
            yield Ablation(driven=Driven(name=name, routes=tuple(routes)), what=_words(self.conditions[name]))

    def _ablated(self, seeds: Sequence[int]) -> Iterator[tuple[str, Route]]:
        """Drives of all conditions from the same seeds, as they come."""
        for split in dict.fromkeys(condition.instructions for condition in self.conditions.values()):
            plan = self._ablation_plan(split, seeds)
            for outcome in run_plan(plan, CORES):
                name, found = plan.entries[plan.runs[outcome.job.run].entry].label, outcome.result
                if found is None:
                    self._notes.append(f"{name}, seed {outcome.job.seed}, was not driven: {outcome.error}")
                else:
                    yield name, self._route(found.seed, found.success, found.details, found.said)

    def _ablation_plan(self, split: Split, seeds: Sequence[int]) -> Plan:
        """All conditions under which the same is said."""
        tasks = assignments((self.options.task,), None, split)
        return together([
            planned(name, self.out / "checkpoint", tasks, seeds, condition)
            for name, condition in self.conditions.items() if condition.instructions == split
        ])  # fmt: skip

    def _films(self, live: Driven) -> list[Film]:
        found = []
        for route in live.routes:
            for path in (self.out / "live").glob(f"*/videos/seed_{route.seed}.mp4"):
                outcome = "success" if route.success else ", ".join(route.infractions) or "not completed"
                found.append(Film(path=path, title=f"{route.kind}, seed {route.seed}: {outcome}"))
        return found[: self.options.videos]

    def _route(self, seed: int, success: bool, details: dict[str, float], said: Sequence[str]) -> Route:
        return Route(seed=seed, kind=kind_of(self._kind, seed), success=success, details=details,
                     instruction=" → ".join(said))  # fmt: skip

    def _graphs(self, title: str, name: str, episodes: int, seed: int, arguments: Arguments) -> int:
        """Run a graph's episodes, shared by as many graphs as there are cores; returns how many those were."""
        graph = load_graph(name)
        shares = [len(part) for part in np.array_split(np.arange(episodes), CORES) if len(part)]
        runs, first = [], seed
        for place, share in enumerate(shares):
            given: dict[str, Scalar] = {"contract": CONTRACT, "task": self.options.task, "episodes": share,
                                        "seed": first, **arguments(place)}  # fmt: skip
            runs.append(GraphRun(graph=graph, arguments=given, episodes=share))
            first += share
        run_graphs(title, runs, self.out / "logs")
        return len(runs)


def _require_space(out: Path, drives: int) -> None:
    """A disk that would be full in the middle fails before the first drive; what an earlier demo takes is freed."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free + (_bytes(out) if out.exists() else 0)
    needed = drives * DRIVE_BYTES
    if free < needed:
        raise DriveDemoError(
            f"{out}: {drives} drives take about {needed / 1e9:.1f} GB with dataset and pictures, {free / 1e9:.1f} GB "
            "are free; free some, choose another disk with --out, or record fewer with --drives"
        )


def _words(condition: Condition) -> str:
    parts = ["black pictures"] * condition.black
    parts += ["another instruction than the route's"] * (condition.instructions != "canonical")
    return ", ".join([*parts, *condition.faults])


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DriveDemoError(f"the run left no results: {error}") from None
    return found


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
