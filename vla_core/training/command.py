"""What ``vla train`` does: datasets from their folders, the run's folder beside the checkpoint, and what is said."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from vla_core.checkpoint import Checkpoint, check_replaceable
from vla_core.contract import RobotContract
from vla_core.data.dataset import load
from vla_core.errors import VlaError
from vla_core.hub import local_folder
from vla_core.progress import bar, console
from vla_core.training.distributed import is_main
from vla_core.training.recipe import load_recipe
from vla_core.training.state import RunFolder
from vla_core.training.trainer import Interrupted, Progress, train


def run_folder(out: Path) -> Path:
    """Where a run that makes the checkpoint ``out`` keeps its states: beside it, since ``out`` is what is handed on."""
    return out.with_name(f"{out.name}.training")


def run(parsed: argparse.Namespace) -> int:
    """Train, or go on training, and write the checkpoint."""
    check_replaceable(parsed.out)
    places, weights = _weighted(parsed.dataset)
    recipe = load_recipe(parsed.recipe, parsed.overrides)
    if weights:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, weights=weights))
    folder = RunFolder(run_folder(parsed.out))
    if is_main() and not (parsed.resume or parsed.restart):
        folder.check_new()
    contract = RobotContract.load(parsed.contract) if parsed.contract else None
    names = _names(places)
    datasets = [
        load(local_folder(place, "dataset"), contract, recipe.observation, recipe.data.cache, name)
        for place, name in zip(places, names, strict=True)
    ]  # fmt: skip
    held_out = [
        load(local_folder(place, "dataset"), contract, recipe.observation, recipe.data.cache)
        for place in parsed.validation or ()
    ]
    if held_out and len(held_out) != len(datasets):
        raise VlaError(f"--validation: found {len(held_out)} for {len(datasets)} datasets; give one for each in their "
                       "order, or hold episodes out with data.validation.fraction")  # fmt: skip
    if is_main():
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        if parsed.restart:
            folder.clear()
    logs = parsed.logs or folder.path / "tensorboard"
    provenance = {"recipe": parsed.recipe, "dataset": " ".join(map(str, places)), "camera": recipe.camera}
    start = None if parsed.start is None else Checkpoint.from_pretrained(parsed.start)
    shown: Any = bar("train", recipe.training.steps) if is_main() else nullcontext(lambda done, note="": None)
    try:
        with shown as advance:
            result = train(
                recipe, datasets, held_out or None, logs, lambda p: advance(p.step, _note(p)), provenance,
                folder=folder.path, resume=parsed.resume, start=start,
                say=print if is_main() else lambda line: None,
            )  # fmt: skip
    except Interrupted as stopped:
        if is_main():
            print(f"{stopped}; the state is in {folder.path}; continue with: {_again(parsed)}", file=sys.stderr)
        raise
    if is_main():
        result.checkpoint.save(parsed.out)
        held = "" if result.validation_loss is None else f", held-out loss {result.validation_loss:.4f}"
        print(f"{parsed.out}: {result.seconds:.0f} s, loss {result.loss:.4f}{held}; TensorBoard: {logs}")
    return 0


def _note(progress: Progress) -> str:
    """The figures; a bar on a terminal shows the time that is left by itself."""
    left = timedelta(seconds=round(progress.seconds_left))
    return progress.note if console.is_terminal else f"{progress.note}  {left} left"


def _names(places: list[Path]) -> list[str]:
    """A dataset is called as its folder is, or by its whole path where two folders are called the same."""
    short = [place.resolve().name for place in places]
    return [str(place) if short.count(name) > 1 else name for place, name in zip(places, short, strict=True)]


def _weighted(given: list[str]) -> tuple[list[Path], dict[str, float]]:
    """Folders of ``PATH`` or ``PATH=WEIGHT``, and the weights by the datasets' names."""
    places: list[Path] = []
    weights: list[float] = []
    for text in given:
        name, equals, weight = text.rpartition("=")
        if not equals or Path(text).exists():
            places.append(Path(text))
            continue
        places.append(Path(name))
        try:
            weights.append(float(weight))
        except ValueError:
            raise VlaError(f"--dataset {text}: expected PATH, or PATH=WEIGHT with a number") from None
    if weights and len(weights) < len(places):
        raise VlaError(f"--dataset: {len(weights)} of {len(places)} have a weight; give PATH=WEIGHT for all, or none")
    return places, dict(zip(_names(places), weights, strict=False))


def _again(parsed: argparse.Namespace) -> str:
    words = ["vla", "train", parsed.recipe, *parsed.overrides]
    for option in ("dataset", "validation"):
        for value in getattr(parsed, option) or ():
            words += [f"--{option}", str(value)]
    for option, value in (("contract", parsed.contract), ("from", parsed.start), ("out", parsed.out),
                          ("logs", parsed.logs)):  # fmt: skip
        if value:
            words += [f"--{option}", str(value)]
    return shlex.join([*words, "--resume"])
