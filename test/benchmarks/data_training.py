"""The training loop: what it adds to forward, backward and optimizer, what storing a state costs, and its memory."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import vla_core
from test.benchmarks.data_format import contract, dataset
from test.benchmarks.data_loading import BATCH, EPISODES, Steps, recipe, source
from test.benchmarks.framework import BenchmarkError, Row, Settings, Suite, compared, measured
from vla_core.data.dataset import Dataset, load
from vla_core.training.recipe import Recipe
from vla_core.training.trainer import Progress, train

RUNS = 5
WARM = 5  # steps before the clock starts


def plan(steps: int, ema: bool = True) -> Recipe:
    """The recipe ``vla_tiny`` for so many steps after the warm-up, which measures and stores nothing on the way."""
    wanted = recipe()
    training = dataclasses.replace(
        wanted.training, steps=WARM + steps, batch_size=BATCH, save_every=10**6, validate_every=10**6,
        ema_decay=0.999 if ema else None,
    )  # fmt: skip
    return dataclasses.replace(wanted, training=training)


def rate(wanted: Recipe, data: Dataset, logs: Path | None) -> float:
    """Samples a second of the loop after the warm-up."""
    stamps: list[float] = []

    def report(progress: Progress) -> None:
        stamps.append(time.perf_counter())

    train(wanted, data, log_dir=logs, report=report)
    return (len(stamps) - WARM) * BATCH / (stamps[-1] - stamps[WARM - 1])


def loop(settings: Settings) -> Iterator[Row]:
    """All that a run does at a step, beside a bare loop over one batch in memory, in turns."""
    steps = 100 if settings.long else 20
    with dataset(EPISODES) as path, tempfile.TemporaryDirectory() as logs:
        data = load(path, contract(), plan(steps).observation)
        batches = source(data, plan(steps))
        bare, held = Steps(batches, plan(steps)), itertools.repeat(batches.draw(np.arange(BATCH)))
        bare.rate(held, WARM)
        for ema in (False, True):
            wanted = plan(steps, ema)
            pairs = [(rate(wanted, data, Path(logs)), bare.rate(held, steps)) for _ in range(RUNS)]
            yield compared(f"training loop of tiny from disk{', with EMA' if ema else ''}", "samples/s", pairs,
                           "bare loop over one batch", ">= 0.95" if not ema else "")  # fmt: skip


def storing(settings: Settings) -> Iterator[Row]:
    """A state with optimizer and averaged weights, until it is on the disk."""
    seconds: list[float] = []
    with dataset(4) as path, tempfile.TemporaryDirectory() as place:
        wanted = plan(3)
        data = load(path, contract(), wanted.observation)
        every = dataclasses.replace(wanted, training=dataclasses.replace(wanted.training, save_every=1))
        for run, kind in enumerate([wanted, every] * 3):
            start = time.perf_counter()
            train(kind, data, folder=Path(place) / str(run))
            seconds.append(time.perf_counter() - start)
    states = WARM + 3 - 1  # the last step stores in both
    yield measured("storing a state of tiny", "s",
                   [(many - one) / states for one, many in zip(seconds[::2], seconds[1::2], strict=True)])  # fmt: skip


def memory(settings: Settings) -> Iterator[Row]:
    """Most memory of a training process, with ten times as many episodes, pages of files that are mapped aside."""

    def held(path: Path) -> float:
        command = [sys.executable, "-m", "test.benchmarks.data_training", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False,
                              cwd=Path(vla_core.__file__).parents[1])  # fmt: skip
        if done.returncode:
            raise BenchmarkError(f"training on {path}: {' '.join(done.stderr.split())[-300:]}")
        return float(done.stdout.splitlines()[-1])

    with dataset(200) as large, dataset(20) as small:
        pairs = [(held(large), held(small)) for _ in range(2)]
    yield compared("memory of training tiny on 200 episodes", "MB", pairs, "on 20 episodes", "<= 1.1")


BENCHMARKS: Suite = {"training, loop": loop, "training, storing": storing, "training, memory": memory}


def main() -> None:
    """Train for a few steps; prints the anonymous memory in MB, the most that was seen."""
    most: list[float] = []

    def report(progress: Progress) -> None:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        most.append(max(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")))

    wanted = plan(30)
    train(wanted, load(sys.argv[1], contract(), wanted.observation), report=report)
    print(max(most))


if __name__ == "__main__":
    main()
