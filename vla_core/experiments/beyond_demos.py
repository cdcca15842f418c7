"""Beyond the demonstrations: what planning and reinforcement add to a policy that imitated a few of them.

From the same few demonstrations, for each training seed:

- ``imitation``  the policy that imitates them
- ``planning``   model-predictive control in a world model, with the imitation policy's chunk as proposal. The model
                 learned from the demonstrations and from episodes that the imitation policy drove, disturbed
- ``ppo``        the imitation policy, improved by its own trials

All do the same unseen seeds. What is done stays done, so an interrupted experiment goes on where it was:

    OUT/demonstrations, dataset                     of all training seeds
    OUT/seed<k>/imitation, ppo                      checkpoints (with their ``.training``)
    OUT/seed<k>/practice, practice_data, world      what the imitation policy experienced, and the model of it
    OUT/seed<k>/planner.yaml
    OUT/seed<k>/<method>.json                       every episode's outcome
    OUT/seed<k>/<stage>.cost.json                   steps in the simulator and seconds of each stage
    OUT/report.json, report.html
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from vla_core.checkpoint import Checkpoint
from vla_core.config import ConfigError, to_dict
from vla_core.contract import RobotContract
from vla_core.data.convert import convert
from vla_core.data.dataset import Dataset, load
from vla_core.evaluation.plan import EvaluationError
from vla_core.experiments.outcomes import evaluated
from vla_core.experiments.report import write_report
from vla_core.observation.builder import ObservationSpec
from vla_core.planning.plan import CEMConfig, PlannerConfig
from vla_core.progress import bar
from vla_core.reinforcement.reinforce import Reinforcement, reinforce
from vla_core.sim.collect import Collection, Driver, collect
from vla_core.sim.noise import Noise
from vla_core.sim.worlds import find, task_of
from vla_core.training.command import run_folder
from vla_core.training.recipe import load_recipe
from vla_core.training.state import RunFolder
from vla_core.training.trainer import train
from vla_core.training.world_recipe import load_world_recipe
from vla_core.training.world_trainer import train_world

METHODS = ("imitation", "planning", "ppo")
PRACTICE_SEED = 300_000  # of the episodes that the world model learns from; those of PPO's trials are lower


@dataclass(frozen=True, kw_only=True)
class Planning:
    """The world model's recipe, what it learns from beside the demonstrations, and the search in it.

    ``practice`` episodes are driven by the imitation policy, disturbed by ``noise``; a share ``held_out`` of all
    episodes is kept for its figures. ``stay_near`` and ``discount`` as :class:`~vla_core.planning.policy.PlannerSetup`.
    """

    world: str = "push_state"
    overrides: tuple[str, ...] = ()
    practice: int = 120
    noise: Noise = field(default_factory=lambda: Noise(scale=0.5, share=0.4, steps=(4, 16)))
    held_out: float = 0.15
    planner: PlannerConfig = field(default_factory=CEMConfig)
    stay_near: float = 0.0
    discount: float = 0.99
    steps: int = 2


@dataclass(frozen=True, kw_only=True)
class BeyondDemos:
    """The experiment's choices.

    ``trainings``  training seeds 0, 1, …: each has its own imitation, practice, world model and trials, of the same
                   ``demonstrations``, from seed 0 on
    ``episodes``   of each training and method, from seed ``seed`` on
    """

    task: str = "push-v3"
    demonstrations: int = 10
    trainings: int = 3
    episodes: int = 50
    seed: int = 10_000
    recipe: str = "push_state"
    overrides: tuple[str, ...] = ()
    methods: tuple[str, ...] = METHODS
    planning: Planning = field(default_factory=Planning)
    ppo: Reinforcement = field(default_factory=Reinforcement)

    def __post_init__(self) -> None:
        for name in ("demonstrations", "trainings", "episodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or METHODS[0] not in self.methods:
            raise ConfigError(f"methods: expected imitation and some of {', '.join(METHODS[1:])}, found "
                              f"{', '.join(self.methods)}")  # fmt: skip


class Experiment:
    """The experiment in its folder."""

    def __init__(self, options: BeyondDemos, out: Path, workers: int = 1) -> None:
        self.options, self.out, self._workers = options, out, workers
        simulator, _ = find(options.task)
        self.contract = RobotContract.load(simulator.contract)
        self.limit = task_of(options.task).max_steps
        self.recipe = load_recipe(options.recipe, options.overrides)  # bad ones fail here, not after an hour
        self.world = load_world_recipe(options.planning.world, options.planning.overrides)

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; the report is written after each method. Returns its content."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        self._once("demonstrations", self._demonstrate)
        self._once("dataset", self._to_imitate)
        record: dict[str, Any] = {}
        for method in self.options.methods:
            for k in range(self.options.trainings):
                self._prepare(method, self.out / f"seed{k}", k)
                self._evaluate(method, self.out / f"seed{k}")
                record = write_report(self.options, self.contract, self.out)
        return record

    # -- the stages ------------------------------------------------------------------------------------------------

    def _prepare(self, method: str, folder: Path, k: int) -> None:
        folder.mkdir(exist_ok=True)
        if method == "imitation":
            self._once("imitation", lambda place: self._imitate(place, k), folder)
        elif method == "ppo":
            self._once("ppo", lambda place: self._reinforce(folder / "imitation", place, k), folder)
        else:
            self._once("practice", lambda place: self._practise(folder / "imitation", place, k), folder)
            bags = [self.out / "demonstrations", folder / "practice"]
            self._once(
                "practice_data", lambda place: self._convert(bags, place, self.world.observation, failed=True), folder
            )
            self._once("world", lambda place: self._model(folder / "practice_data", place, k), folder)
            self._write_planner(folder)

    def _demonstrate(self, place: Path) -> int:
        options = self.options
        collection = Collection(tasks=(options.task,), episodes=options.demonstrations, images=bool(self._images),
                                rewards=True)  # fmt: skip
        return self._collect(place, collection)

    def _practise(self, checkpoint: Path, place: Path, k: int) -> int:
        planning = self.options.planning
        collection = Collection(
            tasks=(self.options.task,), episodes=planning.practice, seed=PRACTICE_SEED + k * planning.practice,
            images=bool(self._images), noise=planning.noise, rewards=True,
            driver=Driver(checkpoint=str(checkpoint), beta=0.0),
        )  # fmt: skip
        return self._collect(place, collection)

    def _collect(self, place: Path, collection: Collection) -> int:
        contract = self.contract
        if collection.driver is not None:
            contract = Checkpoint.load(collection.driver.checkpoint).contract
        with bar(place.name, collection.episodes) as advance:
            done = collect(place, collection, contract, self._workers, lambda done: advance(len(done)))
        return sum(episode.steps for episode in done)

    def _to_imitate(self, place: Path) -> int:
        return self._convert([self.out / "demonstrations"], place, self.recipe.observation, failed=False)

    def _convert(self, places: Sequence[Path], out: Path, spec: ObservationSpec, failed: bool) -> int:
        bags = [bag for place in places for bag in sorted(place.iterdir()) if (bag / "metadata.yaml").is_file()]
        with bar(out.name, len(bags)) as advance:
            convert(bags, out, spec, keep_failed=failed, workers=self._workers, progress=advance)
        return 0

    def _imitate(self, place: Path, k: int) -> int:
        recipe = replace(self.recipe, training=replace(self.recipe.training, seed=k))
        folder = RunFolder(run_folder(place))
        provenance = {"recipe": self.options.recipe, "dataset": str(self.out / "dataset"), "camera": recipe.camera}
        with bar(f"imitation {k}", recipe.training.steps) as advance:
            result = train(
                recipe, self._load(self.out / "dataset"), None, folder.path / "tensorboard",
                lambda progress: advance(progress.step, progress.note), provenance, folder=folder.path,
                resume=bool(folder.states()),
            )  # fmt: skip
        result.checkpoint.save(place)
        return 0

    def _model(self, data: Path, place: Path, k: int) -> int:
        recipe = replace(
            self.world, training=replace(self.world.training, seed=k),
            data=replace(self.world.data, validation=replace(self.world.data.validation,
                                                             fraction=self.options.planning.held_out)),
        )  # fmt: skip
        dataset = load(data, None, recipe.observation, recipe.data.cache)
        with bar(f"world {k}", recipe.training.steps) as advance:
            result = train_world(recipe, dataset, None, run_folder(place) / "tensorboard",
                                 lambda progress: advance(progress.step, progress.note))  # fmt: skip
        result.checkpoint.save(place)
        if result.held_out is not None:
            from vla_core.evaluation.world import returns

            found = returns(result.checkpoint.model, result.held_out)
            figures = {"episodes": len(found.true), "observed": found.observed_correlation,
                       "imagined": found.imagined_correlation, "true": found.true.tolist(),
                       "predicted": found.observed.tolist()}  # fmt: skip
            _write(place.parent / "world_returns.json", figures)
        return 0

    def _reinforce(self, checkpoint: Path, place: Path, k: int) -> int:
        options = replace(self.options.ppo, task=self.options.task, seed=k)
        with bar(f"ppo {k}", options.steps) as advance:
            result = reinforce(
                checkpoint, options, self._workers, run_folder(place) / "tensorboard",
                lambda progress: advance(min(progress.steps, options.steps), progress.note),
            )  # fmt: skip
        result.checkpoint.save(place)
        _write(place.parent / "ppo_history.json", [vars(progress) for progress in result.history])
        return result.steps

    def _write_planner(self, folder: Path) -> None:
        planning = self.options.planning
        setup = {
            "type": "planner", "world": "world", "checkpoint": "imitation", "planner": to_dict(planning.planner),
            "stay_near": planning.stay_near, "discount": planning.discount, "surprise": None,
            "execution": {"steps": planning.steps},
        }  # fmt: skip
        (folder / "planner.yaml").write_text(yaml.safe_dump(setup, sort_keys=False), encoding="utf-8")

    def _evaluate(self, method: str, folder: Path) -> None:
        place, options = folder / f"{method}.json", self.options
        if place.is_file():
            return
        policy = folder / ("planner.yaml" if method == "planning" else method)
        seeds = range(options.seed, options.seed + options.episodes)
        began = time.monotonic()
        with bar(f"evaluate {method} {folder.name}", options.episodes) as advance:
            results = evaluated(policy, options.task, seeds, self.limit, self._workers, advance)
        _write(place, {"method": method, "seconds": time.monotonic() - began, "episodes": results})

    # -- what is kept ----------------------------------------------------------------------------------------------

    @property
    def _images(self) -> bool:
        return bool(self.recipe.observation.images or self.world.observation.images)

    def _load(self, place: Path) -> Dataset:
        return load(place, None, self.recipe.observation, self.recipe.data.cache)

    def _once(self, name: str, make: Callable[[Path], int], folder: Path | None = None) -> None:
        """Make a stage unless its cost was written, which is done last; the cost of a broken try is not counted."""
        folder = folder or self.out
        cost = folder / f"{name}.cost.json"
        if cost.is_file():
            return
        place = folder / name
        if place.exists():  # whole, but interrupted before its cost was written
            shutil.rmtree(place)
        began = time.monotonic()
        steps = make(place)
        _write(cost, {"steps": steps, "seconds": time.monotonic() - began, "workers": self._workers,
                      "load": os.getloadavg()[0]})  # fmt: skip

    def _check_settings(self) -> None:
        """The folder's earlier settings must be these ones, but for how many trainings and which methods."""
        place = self.out / "settings.json"
        found = json.loads(json.dumps(to_dict(self.options)))
        before = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else found
        fixed = (name for name in found if name not in ("trainings", "methods"))
        for name in fixed:
            if before.get(name) != found[name]:
                raise EvaluationError(f"{self.out}: an experiment with other settings began here: {name} was "
                                      f"{before.get(name)!r}; remove the folder, or choose another --out")  # fmt: skip
        _write(place, found)


def _write(place: Path, content: Any) -> None:
    """Written whole: what is there counts as done."""
    partial = place.with_name(f".{place.name}.partial")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(partial, place)
