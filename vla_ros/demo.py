"""``vla demo``: record, convert, train, run live, replay, report, on a real ROS 2 graph.

Everything is written below one folder; the figures of ``report.json`` come from files of the run, not from memory.
"""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from vla_core.contract import RobotContract
from vla_core.data.bag import find_bags
from vla_core.data.convert import convert
from vla_core.data.dataset import Dataset, load
from vla_core.errors import VlaError
from vla_core.evaluation.open_loop import Replay, replay
from vla_core.evaluation.parity import Parity, compare
from vla_core.evaluation.report import DemoResult, LiveRun, write_report
from vla_core.observation.builder import ObservationSpec
from vla_core.progress import bar
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.loading import load_policy
from vla_core.sim.metaworld import INSTRUCTIONS, MetaWorld, instruction_for
from vla_core.training.recipe import Recipe, load_recipe
from vla_core.training.trainer import Progress, Result, train
from vla_ros.graph import Scalar, load_graph
from vla_ros.graph_runs import GraphRun, run_graphs
from vla_ros.middleware import require_ros

CONTRACT = "metaworld_sawyer"
BASELINE = "mini_vla_seed"
HELD_OUT_SEED = 20_000
EVALUATION_SEED = 10_000
PARITY_SEED = 30_000
MARKER = ".vla_demo"


class DemoError(VlaError):
    """A step of the demo that failed."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What ``vla demo`` is asked for."""

    out: Path
    task: str
    camera: str | None
    episodes: int
    recipe: str
    seed: int
    evaluation_episodes: int
    held_out_episodes: int
    realtime_episodes: int
    max_steps: int
    overrides: tuple[str, ...]
    baseline_steps: int | None


class Demo:
    """The steps in order; each is one method and one progress bar."""

    def __init__(self, options: DemoOptions) -> None:
        self.options = options
        self.out = options.out
        self.contract = RobotContract.load(CONTRACT)
        require_ros()
        # Bad names fail here, before minutes of work.
        self.recipe = load_recipe(options.recipe, options.overrides)
        steps = options.baseline_steps
        self.baseline = load_recipe(BASELINE, [f"training.steps={steps}"] if steps is not None else [])
        self.camera = options.camera or self.recipe.camera
        MetaWorld(options.task, self.camera, self.contract).close()
        if self.out.exists() and any(self.out.iterdir()) and not (self.out / MARKER).is_file():
            raise DemoError(f"{self.out} holds something else than an earlier demo; choose another folder with --out")

    def run(self) -> Path:
        """Run everything; returns the report's page."""
        start = time.monotonic()
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        (self.out / MARKER).write_text("This folder belongs to `vla demo`, which empties it at its start.\n")
        options = self.options
        bags = self._record("record", "bags/train", options.episodes, options.seed)
        held_out_bags = self._record("record held-out", "bags/held_out", options.held_out_episodes, HELD_OUT_SEED)
        data, held_out = self._datasets(self.recipe.observation, "dataset", bags, held_out_bags)
        history: list[Progress] = []
        result = self._train(self.recipe, options.recipe, data, held_out, self.out / "checkpoint", history)
        if self.baseline.observation == self.recipe.observation:
            baseline_data = (data, held_out)
        else:
            baseline_data = self._datasets(self.baseline.observation, "dataset_baseline", bags, held_out_bags)
        self._train(self.baseline, BASELINE, *baseline_data, self.out / "checkpoint_baseline", [])

        live = self._live("live", "checkpoint", video=str(self.out / "live" / "episodes.gif"))
        black = self._live("live, black camera", "checkpoint", black_camera=True)
        other = next(text for task, text in INSTRUCTIONS.items() if text != instruction_for(options.task))
        swapped = self._live("live, other instruction", "checkpoint", instruction=other)
        baseline = self._live("live, baseline", "checkpoint_baseline")
        realtime = self._live("live, realtime", "checkpoint", episodes=options.realtime_episodes, clock="realtime",
                              inference="asynchronous")  # fmt: skip
        parity = self._parity()
        replayed = self._replay(held_out_bags)
        return write_report(
            DemoResult(
                task=options.task, camera=self.camera, recipe=options.recipe, contract=self.contract,
                demonstrations=len(bags), frames=data.frames, bag_bytes=_bytes(self.out / "bags"),
                training=result, history=[(p.step, p.loss, p.validation_loss) for p in history], live=live,
                black_camera=black, swapped=swapped, swapped_instruction=other, baseline=baseline,
                baseline_recipe=BASELINE, realtime=realtime, parity=parity, replay=replayed,
                max_steps=options.max_steps, video=self.out / "live" / "episodes.gif", seconds=time.monotonic() - start,
            ),
            self.out,
        )  # fmt: skip

    def _record(self, title: str, folder: str, episodes: int, seed: int) -> list[Path]:
        options = self.options
        self._graph(title, "record_demo", output=str(self.out / folder), task=options.task,
                    camera=self.camera, seed=seed, episodes=episodes)  # fmt: skip
        return find_bags([self.out / folder])

    def _datasets(
        self, spec: ObservationSpec, name: str, bags: list[Path], held_out: list[Path]
    ) -> tuple[Dataset, Dataset]:
        with bar("convert", len(bags) + len(held_out)) as advance:
            train_set = convert(bags, self.out / name, spec, progress=lambda done: advance(done, "bags"))
            rest = convert(held_out, self.out / f"{name}_held_out", spec,
                           progress=lambda done: advance(len(bags) + done, "bags"))  # fmt: skip
        return load(train_set.path), load(rest.path)

    def _train(self, recipe: Recipe, name: str, data: Dataset, held_out: Dataset, folder: Path,
               history: list[Progress]) -> Result:  # fmt: skip
        with bar(f"train {name}", recipe.training.steps) as advance:

            def report(progress: Progress) -> None:
                if progress.step % 10 == 0 or progress.validation_loss is not None:
                    history.append(progress)
                    advance(progress.step, progress.note)

            provenance = {"recipe": name, "task": self.options.task, "camera": self.camera}
            result = train(recipe, data, held_out, self.out / "tensorboard" / folder.name, report, provenance)
        result.checkpoint.save(folder)
        return result

    def _live(self, title: str, checkpoint: str, *, clock: str = "lockstep", inference: str = "synchronous",
              episodes: int | None = None, **arguments: Scalar) -> LiveRun:  # fmt: skip
        options = self.options
        count = options.evaluation_episodes if episodes is None else episodes
        folder = self.out / "live" / re.sub(r"\W+", "_", title)
        self._graph(title, "push_demo", checkpoint=str(self.out / checkpoint), task=options.task,
                    camera=self.camera, clock=clock, inference=inference, episodes=count, seed=EVALUATION_SEED,
                    max_steps=options.max_steps, results=str(folder / "episodes.json"), log_dir=str(folder),
                    **arguments)  # fmt: skip
        return LiveRun.load(title, folder)

    def _parity(self) -> Parity:
        """Two live episodes, recorded while they run: the logged model inputs against those from the bags."""
        folder = self.out / "parity"
        options = self.options
        self._graph("parity", "record_policy", checkpoint=str(self.out / "checkpoint"), task=options.task,
                    camera=self.camera, output=str(folder / "bags"), seed=PARITY_SEED, episodes=2,
                    max_steps=options.max_steps, log_dir=str(folder))  # fmt: skip
        policy = load_policy(self.out / "checkpoint")
        found = [compare(folder / "inputs.safetensors", bag, policy) for bag in find_bags([folder / "bags"])]
        return Parity(
            sum(p.compared for p in found),
            max(p.inputs_max_abs_diff for p in found),
            max(p.chunks_max_abs_diff for p in found),
        )

    def _replay(self, bags: list[Path]) -> Replay:
        with bar("replay", 1) as advance:
            core = PolicyCore(load_policy(self.out / "checkpoint"))
            result = replay(bags[0], core)
            advance(1, str(bags[0]))
        return result

    def _graph(self, title: str, name: str, *, episodes: int, **arguments: Scalar) -> None:
        """Run a graph to its end; its output goes to a log file, its episodes move the bar."""
        given: dict[str, Scalar] = {"contract": CONTRACT, "episodes": episodes, **arguments}
        run = GraphRun(graph=load_graph(name), arguments=given, episodes=episodes)
        run_graphs(title, [run], self.out / "logs")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
