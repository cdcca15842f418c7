"""What is measured while a model trains: held-out loss, open-loop error, success in simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_core.contract import RobotContract
from vla_core.data.batches import Batch, Batches
from vla_core.data.mixture import Mixture
from vla_core.model.action_head.base import RowGenerator
from vla_core.model.inputs import ModelInputs
from vla_core.observation.normalizer import Normalizer
from vla_core.runtime.policy import Policy
from vla_core.training.distributed import Processes
from vla_core.training.options import ClosedLoop, Training

Source = Batches | Mixture


class TrainingStep(nn.Module):
    """A model's loss, or with no actions its chunk, as a ``forward``: what can be wrapped, sharded and compiled."""

    def __init__(self, model: Any, precision: str = "fp32") -> None:
        super().__init__()
        self.model = model
        self._type = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def forward(
        self, inputs: ModelInputs, actions: Tensor | None, mask: Tensor | None, generator: torch.Generator | None,
        truths: Mapping[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        device = (inputs.state if actions is None else actions).device.type
        with torch.autocast(device, self._type, enabled=self._type is not None):
            if actions is None:
                return self.model.predict(inputs, generator)
            more = {"truths": truths} if truths else {}  # which most models know nothing of
            return self.model.loss(inputs, actions, mask, generator, **more)


def noise(seed: int, batch: Batch, device: torch.device | str) -> RowGenerator:
    """The noise of a batch: that of its rows in the global batch, whatever other processes and passes have."""
    generator = RowGenerator(device=device)
    generator.manual_seed(seed)
    generator.first, generator.total = batch.first, batch.total
    return generator


@torch.no_grad()
def held_out_loss(step: nn.Module, source: Source, processes: Processes, size: int) -> float:
    """Mean loss over all windows; the noise is the same at every call, so that values compare."""
    step.eval()
    batches = -(-len(source) // size)
    total, count = 0.0, 0
    for number in _dealt(batches, processes):
        batch = _chunk(source, min(number, batches - 1), size).to(processes.device)
        loss = step(batch.inputs, batch.actions, batch.mask, noise(number, batch, processes.device), batch.truths)
        known = int(batch.mask.sum()) if number < batches else 0
        total, count = total + loss.item() * known, count + known
    sums = processes.total(total, count)
    return sums[0] / sums[1]


@torch.no_grad()
def open_loop_error(
    step: nn.Module, source: Source, processes: Processes, contract: RobotContract,
    normalizers: Sequence[Normalizer], options: Training,
) -> dict[str, float]:  # fmt: skip
    """Mean absolute error of sampled chunks: each action in its units, and all as a share of their half ranges.

    Over at most ``options.open_loop`` windows, evenly spaced.
    """
    step.eval()
    ticks, size = options.open_loop, options.validation_batch
    chosen = np.unique(np.linspace(0, len(source) - 1, min(ticks, len(source))).round().astype(np.int64))
    batches = -(-len(chosen) // size)
    error, count = np.zeros(len(contract.action_names)), 0
    for number in _dealt(batches, processes):
        rows = chosen[min(number, batches - 1) * size :][:size]
        batch = source.draw(rows).to(processes.device)
        predicted = step(batch.inputs, None, None, noise(number, batch, processes.device)).cpu().numpy()
        if number >= batches:
            continue
        known, sources = batch.mask.cpu().numpy(), batch.rows[:, 0]
        for i in np.unique(sources):
            mine = sources == i
            truth = normalizers[i].unnormalize("action", batch.actions.cpu().numpy()[mine])
            found = normalizers[i].unnormalize("action", predicted[mine])
            error += (np.abs(found - truth) * known[mine][..., None]).sum(axis=(0, 1))
        count += int(known.sum())
    sums = processes.total(count, *error.tolist())
    mean = np.asarray(sums[1:]) / sums[0]
    half_range = (contract.action_high - contract.action_low) / 2
    named = {f"open_loop/{name}": float(value) for name, value in zip(contract.action_names, mean, strict=True)}
    return {"open_loop/share": float(np.mean(mean / half_range)), **named}


def closed_loop(policy: Policy, options: ClosedLoop, processes: Processes) -> dict[str, float]:
    """Share of episodes that succeed in simulation; the processes share the seeds."""
    from vla_core.evaluation.closed_loop import closed_loop_success

    seeds = range(options.seed, options.seed + options.episodes)[processes.rank :: processes.count]
    done = closed_loop_success(policy, options.world, seeds, options.max_steps) if len(seeds) else {"successes": 0}
    successes, trials = processes.total(done["successes"], len(seeds))
    return {"closed_loop/success": successes / trials}


def check_world(options: ClosedLoop) -> None:
    """Raise at the start of a run what its first evaluation would raise hours later."""
    from vla_core.sim.worlds import task_of

    task_of(options.world)


def _dealt(batches: int, processes: Processes) -> range:
    """This process's batches; all have equally many, as sharded models need it, so that some numbers are too high."""
    return range(processes.rank, processes.count * -(-batches // processes.count), processes.count)


def _chunk(source: Source, number: int, size: int) -> Batch:
    return source.draw(np.arange(number * size, min((number + 1) * size, len(source))))
