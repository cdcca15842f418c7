"""Model inputs and normalized chunks of a dataset, by row, through the step that the robot takes too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vla_core.data.dataset import Dataset, DatasetError
from vla_core.data.windows import ChunkWindows
from vla_core.errors import choices
from vla_core.model.inputs import ModelInputs, Remembers
from vla_core.observation.batch import Tokenizer, collate, make_inputs
from vla_core.observation.normalizer import Normalizer


class Batch(NamedTuple):
    """B samples: inputs, ``actions`` (B, H, A) normalized float32, ``mask`` (B, H) bool, where actions are known.

    ``truths`` name -> (B,) int64 is the class of what was true, -1 where nobody said.

    ``rows`` (B, 2) int64 tells the dataset's number and the frame in it. The batch is a part of the global batch of
    ``total`` samples of training step ``step``, from sample ``first`` on.
    """

    inputs: ModelInputs
    actions: Tensor
    mask: Tensor
    rows: np.ndarray
    step: int = 0
    first: int = 0
    total: int = 0
    truths: Mapping[str, Tensor] = MappingProxyType({})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        return self._replace(inputs=self.inputs.map(change), actions=change(self.actions), mask=change(self.mask),
                             truths={name: change(number) for name, number in self.truths.items()})  # fmt: skip


class Batches:
    """The windows of one dataset, drawn by their number: 0 to ``len(batches)`` - 1."""

    def __init__(
        self, dataset: Dataset, horizon: int, normalizer: Normalizer, tokenizer: Tokenizer,
        remembers: Remembers = "everything", classes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:  # fmt: skip
        """``remembers`` is what the model reads of past ticks, ``classes`` the words of the truths that it tells."""
        self.dataset, self.horizon = dataset, horizon
        self.normalizer, self.tokenizer, self.remembers = normalizer, tokenizer, remembers
        self._windows = ChunkWindows(dataset, horizon)
        self.lengths: tuple[int, ...] = (len(dataset.window_rows),)
        self.weights: tuple[float, ...] | None = None
        self._truths = {name: _numbered(dataset, name, words) for name, words in (classes or {}).items()}

    def __len__(self) -> int:
        return self.lengths[0]

    def draw(self, index: np.ndarray, floats: bool = True) -> Batch:
        """The windows of these numbers (B,); ``floats`` as in :func:`vla_core.observation.batch.make_inputs`."""
        rows = self.dataset.window_rows[index]
        actions, mask = self._windows.chunks(rows)
        return Batch(
            inputs=self.inputs(rows, floats),
            actions=torch.from_numpy(self.normalizer.normalize("action", actions)),
            mask=torch.from_numpy(mask),
            rows=np.stack([np.zeros_like(rows), rows], axis=1),
            total=len(rows),
            truths={name: torch.from_numpy(numbers[rows]) for name, numbers in self._truths.items()},
        )

    def inputs(self, rows: np.ndarray, floats: bool = True) -> ModelInputs:
        """What the robot's model would see at these frames (B,)."""
        data = self.dataset
        if data.observations is not None:
            seen = [data.observations[int(row)] for row in rows]
            return collate(seen, self.normalizer, self.tokenizer, data.spec, floats, self.remembers)
        masks = {name: there[rows] for name, there in data.present.items()}
        spoken = masks.get(data.spec.instruction or "")
        texts = [data.instruction(row) for row in rows]
        if spoken is not None:
            texts = [text if there else "" for text, there in zip(texts, spoken, strict=True)]
        return make_inputs(
            {name: self._pixels(name, rows, masks.get(name)) for name in data.images},
            data.state[rows],
            texts,
            self.normalizer,
            self.tokenizer,
            {name: masks.get(name, np.ones(len(rows), dtype=bool)) for name in data.images},
            spoken,
            floats,
        )

    def _pixels(self, name: str, rows: np.ndarray, there: np.ndarray | None) -> np.ndarray:
        """(B, H, W, 3); a picture that is missing is black, whatever stands in its place."""
        pixels = self.dataset.images[name][rows]
        if there is not None:
            pixels[~there] = 0
        return pixels


def _numbered(dataset: Dataset, name: str, classes: Sequence[str]) -> np.ndarray:
    """The classes (N,) int64 of a truth, -1 where nobody said."""
    if name not in dataset.truths:
        raise DatasetError(f"{dataset.name}: does not say what {name} was, which the model is to learn; it says "
                           f"{choices(dataset.truths)}; record ground_truth/{name}, or train without: "
                           "model.auxiliary={}")  # fmt: skip
    words = dataset.truths[name]
    strange = np.setdiff1d(words, [*classes, ""])
    if len(strange):
        raise DatasetError(f"{dataset.name}: {name} was {str(strange[0])!r}; the model tells {choices(classes)}")
    return np.select([words == word for word in classes], range(len(classes)), default=-1).astype(np.int64)
