"""A run that leads nowhere: found by its loss and its gradient, stopped, with the batch that did it saved."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from vla_core.data.batches import Batch
from vla_core.data.dataset import Dataset
from vla_core.errors import VlaError
from vla_core.model.inputs import Masked, ModelInputs

WINDOW = 100  # losses that the median is of
EARLIEST = 50  # losses before which nothing is called an explosion


class TrainingError(VlaError):
    """A run that cannot go on."""


class LossWatch:
    """Looks at every loss; ``limit`` is how many times the running median a loss may be away from it.

    Where the median is near zero, as a likelihood's can be, the median distance from it counts instead.
    """

    def __init__(self, limit: float | None, losses: Iterable[float] = ()) -> None:
        self.limit = limit
        self.losses: deque[float] = deque(losses, maxlen=WINDOW)

    def fault(self, loss: float, norm: float, norm_may_overflow: bool = False) -> str | None:
        """What is wrong with a step's loss and gradient norm, in words; None takes the loss in."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm) and not norm_may_overflow:
            return f"the gradient's norm is {norm} at a loss of {loss:.4g}"
        if self.limit is not None and len(self.losses) >= EARLIEST and loss > 0:
            median = float(np.median(self.losses))
            scale = max(abs(median), float(np.median(np.abs(np.asarray(self.losses) - median))))
            if loss - median > self.limit * scale > 0:
                return f"the loss is {loss:.4g}, more than {self.limit:g} times its running median {median:.4g}"
        self.losses.append(loss)
        return None


def save_batch(
    folder: Path, step: int, batches: Sequence[Batch], datasets: Sequence[Dataset], rank: int, facts: dict[str, Any]
) -> Path:
    """Write the batches of a step with where each sample comes from; returns the folder, ``step_<step>`` in it."""
    place = folder / f"step_{step:08d}"
    place.mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(batches):
        tensors = {f"inputs.{name}": tensor for name, tensor in _tensors(batch.inputs)}
        tensors |= {"actions": batch.actions, "mask": batch.mask}
        tensors |= {f"truths.{name}": numbers for name, numbers in batch.truths.items()}
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()},
                  place / f"batch_{rank}_{number}.safetensors")  # fmt: skip
    record = facts | {"rank": rank, "samples": [sample for batch in batches for sample in origins(batch, datasets)]}
    (place / f"report_{rank}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return place


def origins(batch: Batch, datasets: Sequence[Dataset]) -> list[dict[str, Any]]:
    """Dataset, episode and frame within it of every sample of a batch."""
    found = []
    for number, row in batch.rows.tolist():
        data = datasets[number]
        place = int(data.episode_of[row])
        episode = data.episodes[place]
        found.append({"dataset": data.name, "episode": episode.index, "bag": episode.bag,
                      "frame": row - int(data.starts[place]), "instruction": data.instruction(row)})  # fmt: skip
    return found


def _tensors(inputs: ModelInputs) -> Iterable[tuple[str, Tensor]]:
    for name, value in vars(inputs).items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, ModelInputs):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _tensors(value))
        elif isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, Masked):
                    yield f"{name}.{key}.values", item.values
                    yield f"{name}.{key}.mask", item.mask
                else:
                    yield f"{name}.{key}", item
