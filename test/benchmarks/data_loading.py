"""Batches for training: whether the model waits for its data, what decoding costs, and how memory grows."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vla_core
from test.benchmarks.data_format import contract, dataset
from test.benchmarks.framework import BenchmarkError, Row, Settings, Suite, compared, measured
from vla_core.data.batches import Batch, Batches
from vla_core.data.dataset import Dataset, load
from vla_core.data.frame_cache import Cache
from vla_core.data.loader import Loader
from vla_core.model.vla import MODEL_REGISTRY, build_model
from vla_core.observation.builder import ImageSize
from vla_core.observation.normalizer import Normalizer
from vla_core.training.augment import Augmentation, ImageAugmentation, augment
from vla_core.training.recipe import Recipe, load_recipe

BATCH = 64
RUNS = 5
EPISODES = 40  # of 100 frames, at a new picture every fourth


def recipe() -> Recipe:
    """The recipe ``vla_tiny`` on the 39 numbers that the dataset has."""
    return load_recipe("vla_tiny", ["observation.state=[state]"])


def source(data: Dataset, wanted: Recipe) -> Batches:
    """The windows of a dataset as a run of the recipe draws them."""
    tokenizer = MODEL_REGISTRY[wanted.model.type].tokenizer(wanted.model, data.tasks)
    return Batches(data, wanted.model.horizon, Normalizer(wanted.normalization, data.statistics()), tokenizer)


class Steps:
    """Forward, backward and optimizer of the ``tiny`` model."""

    def __init__(self, batches: Batches, wanted: Recipe) -> None:
        config = wanted.model_config(batches.dataset.contract, batches.tokenizer.vocab_size)
        self.model = build_model(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def rate(self, batches: Iterator[Batch], steps: int) -> float:
        """Samples a second over so many steps."""
        start = time.perf_counter()
        for batch in itertools.islice(batches, steps):
            loss = self.model.loss(batch.inputs, batch.actions, batch.mask)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        return steps * BATCH / (time.perf_counter() - start)


def training(settings: Settings) -> Iterator[Row]:
    """The ``tiny`` model on the loader's batches, against the same model on one batch held in memory, in turns."""
    wanted, steps = recipe(), 100 if settings.long else 15
    with dataset(EPISODES) as path:
        for cache in ("disk", "none"):
            data = load(path, contract(), wanted.observation, cache=cache)  # type: ignore[arg-type]
            batches = source(data, wanted)
            model = Steps(batches, wanted)
            held = itertools.repeat(batches.draw(np.arange(BATCH)))
            model.rate(held, 5)
            stream = iter(Loader(batches, batch_size=BATCH, seed=0))
            next(stream)
            pairs = [(model.rate(stream, steps), model.rate(held, steps)) for _ in range(RUNS)]
            stream.close()  # type: ignore[attr-defined]
            what = "from disk, decoded before" if cache == "disk" else "decoded at each use"
            yield compared(f"training of tiny, {what}", "samples/s", pairs, "one batch held in memory",
                           ">= 0.9" if cache == "disk" else "")  # fmt: skip


def epochs(settings: Settings) -> Iterator[Row]:
    """The first epoch of a dataset, decoding and writing the cache included, against the second, without a model."""
    wanted, pairs = recipe(), []
    for _ in range(3):
        with dataset(EPISODES) as path:
            times = []
            for _ in range(2):
                start = time.perf_counter()
                batches = source(load(path, contract(), wanted.observation), wanted)
                stream = iter(Loader(batches, batch_size=BATCH, seed=0))
                count = len(batches) // BATCH
                for _ in itertools.islice(stream, count):
                    pass
                stream.close()  # type: ignore[attr-defined]
                times.append(count * BATCH / (time.perf_counter() - start))
            pairs.append((times[0], times[1]))
    yield compared("an epoch that decodes first", "samples/s", pairs, "the epoch after it, opening included")


def drawing(side: int, cache: Cache, augmented: bool, settings: Settings) -> Iterator[Row]:
    """Batches alone, as fast as they come."""
    observation = dataclasses.replace(recipe().observation, images={"image": ImageSize(height=side, width=side)})
    wanted = dataclasses.replace(recipe(), observation=observation)
    change = Augmentation(images=ImageAugmentation(shift=4, crop=0.9, brightness=0.2, contrast=0.2, saturation=0.2,
                                                   hue=0.05), state_noise=0.01)  # fmt: skip
    with dataset(EPISODES) as path:
        batches = source(load(path, contract(), observation, cache=cache), wanted)
        loader = Loader(batches, batch_size=BATCH, seed=0)
        count, rates = (100 if settings.long else 20) if cache == "disk" else 5, []
        for run in range(RUNS):
            start = time.perf_counter()
            for step in range(run * count, (run + 1) * count):
                batch = loader.batch(step)
                if augmented:
                    augment(batch, change, 0)
            rates.append(count * BATCH / (time.perf_counter() - start))
    what = "decoded before" if cache == "disk" else "decoded at each use"
    yield measured(f"batches of {side}x{side}, {what}{', augmented' if augmented else ''}", "samples/s", rates)


def memory(settings: Settings) -> Iterator[Row]:
    """Memory of a process that draws from ten times as many episodes, pages of files that are mapped aside."""

    def held(path: Path) -> float:
        command = [sys.executable, "-m", "test.benchmarks.data_loading", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False,
                              cwd=Path(vla_core.__file__).parents[1])  # fmt: skip
        if done.returncode:
            raise BenchmarkError(f"drawing from {path}: {' '.join(done.stderr.split())[-300:]}")
        return float(done.stdout.splitlines()[-1])

    with dataset(400) as large, dataset(40) as small:
        pairs = [(held(large), held(small)) for _ in range(3)]
    yield compared("memory of drawing from 400 episodes", "MB", pairs, "from 40 episodes", "<= 1.1")


BENCHMARKS: Suite = {
    "loading, training": training,
    "loading, epochs": epochs,
    "loading, 64": partial(drawing, 64, "disk", False),
    "loading, 64 augmented": partial(drawing, 64, "disk", True),
    "loading, 64 at use": partial(drawing, 64, "none", False),
    "loading, 224": partial(drawing, 224, "disk", False),
    "loading, memory": memory,
}


def main() -> None:
    """Draw an epoch from a dataset; prints the anonymous memory in MB, the most that was seen."""
    wanted, most = recipe(), 0.0
    data = load(sys.argv[1], contract(), wanted.observation)
    stream: Any = iter(Loader(source(data, wanted), batch_size=BATCH, seed=0))
    for _ in itertools.islice(stream, data.frames // BATCH):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        most = max(most, *(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")))
    stream.close()
    print(most)


if __name__ == "__main__":
    main()
