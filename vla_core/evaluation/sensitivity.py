"""What a policy looks at: how much its actions change when one of its inputs is taken away or replaced.

A policy that was trained well by the figures may have learned to ignore its camera or its instruction; here that is a
number near 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_core.checkpoint import Checkpoint
from vla_core.data import bag as bags
from vla_core.data import dataset as datasets
from vla_core.data.batches import Batches
from vla_core.data.episodes import replay_ticks, replayed
from vla_core.errors import VlaError
from vla_core.model.inputs import Masked, ModelInputs
from vla_core.observation.batch import collate, make_inputs
from vla_core.observation.builder import Observation, ObservationBuilder, Unobserved

BATCH = 64


class SensitivityError(VlaError):
    """Data that the policy cannot be asked about."""


@dataclass(frozen=True)
class Change:
    """How far the actions move when ``what`` happens to an input.

    ``share`` is the root mean square of the change over that of the actions' own spread, both in normalized units;
    ``per_action`` the same for each entry, None where it never moves.
    """

    what: str
    share: float
    per_action: dict[str, float | None]


@dataclass(frozen=True)
class Sensitivity:
    """Over ``samples`` ticks; ``spread`` is the deviation of each action over them, in the contract's units."""

    samples: int
    instructions: tuple[str, ...]
    spread: dict[str, float]
    changes: list[Change]
    not_measured: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """A line for each change, largest first."""
        rows = sorted(self.changes, key=lambda change: -change.share)
        width = max(len(change.what) for change in rows)
        lines = [f"change of the actions, as a share of their spread over {self.samples} ticks"]
        for change in rows:
            entries = ", ".join(
                f"{name} {'still' if value is None else f'{value:.2f}'}" for name, value in change.per_action.items()
            )
            lines.append(f"  {change.what:<{width}}  {change.share:6.2f}  ({entries})")
        lines += [f"  {what}: not measured, {why}" for what, why in self.not_measured.items()]
        return "\n".join(lines)


def sensitivity(checkpoint: Checkpoint, data: Path, samples: int = 256, seed: int = 0) -> Sensitivity:
    """Predict from up to ``samples`` ticks of a dataset, or of bags, as they are and with each input changed in turn.

    The noise that a head samples from is the same for every change; the row ``other noise`` tells what another one
    alone would do, and what is not above it is not seen.
    """
    inputs, instructions = _load(checkpoint, data, samples)
    count = len(inputs.tokens)
    base = _predict(checkpoint, inputs, seed)
    center = base.mean(axis=(0, 1))
    spread = np.sqrt(np.square(base - center).mean(axis=(0, 1)))  # (A,)
    names = checkpoint.contract.action_names

    def change(what: str, other: np.ndarray) -> Change:
        moved = np.sqrt(np.square(other - base).mean(axis=(0, 1)))
        entries = {n: float(m / s) if s > 1e-6 else None for n, m, s in zip(names, moved, spread, strict=True)}
        total = float(np.sqrt(np.square(spread).sum()))
        if total < 1e-6:
            raise SensitivityError(f"{data}: the policy does the same at all {count} ticks; take other data")
        return Change(what, float(np.sqrt(np.square(moved).sum())) / total, entries)

    changes = [change("other noise", _predict(checkpoint, inputs, seed + 1))]
    changes += [change(what, _predict(checkpoint, other, seed)) for what, other in _changed(inputs)]
    different = sorted(set(instructions))
    not_measured = {}
    if len(different) > 1:
        swapped = _swapped(checkpoint, inputs, instructions, different)
        changes.append(change("instruction swapped", _predict(checkpoint, swapped, seed)))
    elif checkpoint.config.observation.instruction:
        not_measured["instruction swapped"] = f"the data has only {different[0]!r}"
    units = checkpoint.normalizer.unnormalize("action", base)
    units -= checkpoint.normalizer.unnormalize("action", np.broadcast_to(center, base.shape))
    named = dict(zip(names, np.sqrt(np.square(units).mean(axis=(0, 1))).tolist(), strict=True))
    return Sensitivity(count, tuple(different), named, changes, not_measured)


def _changed(inputs: ModelInputs) -> Iterator[tuple[str, ModelInputs]]:
    """Each camera made black, and each other input masked, in the past ticks as well."""
    for name in inputs.images:
        yield f"{name} black", _everywhere(inputs, partial(_black, name=name))
    if inputs.state.shape[1]:
        yield (
            "state masked",
            _everywhere(inputs, lambda one: dataclasses.replace(one, state_mask=torch.zeros_like(one.state_mask))),
        )
    for name in (*inputs.clouds, *inputs.sequences, *inputs.maps):
        yield f"{name} masked", _everywhere(inputs, partial(_masked, name=name))


def _everywhere(inputs: ModelInputs, change: Callable[[ModelInputs], ModelInputs]) -> ModelInputs:
    changed = change(inputs)
    past = None if inputs.history is None else change(inputs.history)
    return dataclasses.replace(changed, history=past)


def _black(inputs: ModelInputs, name: str) -> ModelInputs:
    images = {n: torch.zeros_like(pixels) if n == name else pixels for n, pixels in inputs.images.items()}
    return dataclasses.replace(inputs, images=images)


def _masked(inputs: ModelInputs, name: str) -> ModelInputs:
    def without(found: dict[str, Masked]) -> dict[str, Masked]:
        return {n: Masked(s.values, torch.zeros_like(s.mask)) if n == name else s for n, s in found.items()}

    return dataclasses.replace(
        inputs, clouds=without(inputs.clouds), sequences=without(inputs.sequences), maps=without(inputs.maps)
    )


def _swapped(checkpoint: Checkpoint, inputs: ModelInputs, instructions: list[str], different: list[str]) -> ModelInputs:
    """Every row with the next of the data's instructions in place of its own."""
    following = dict(zip(different, [*different[1:], different[0]], strict=True))
    texts = [following[text] for text in instructions]
    nothing = np.zeros((len(texts), inputs.state.shape[1]), np.float32)
    other = make_inputs({}, nothing, texts, checkpoint.normalizer, checkpoint.tokenizer)
    return dataclasses.replace(inputs, tokens=other.tokens, token_mask=other.token_mask)


def _predict(checkpoint: Checkpoint, inputs: ModelInputs, seed: int) -> np.ndarray:
    """Chunks (N, H, A), normalized."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for first in range(0, len(inputs.tokens), BATCH):
        batch = inputs.map(lambda tensor, first=first: tensor[first : first + BATCH])  # type: ignore[misc]
        parts.append(checkpoint.model.predict(batch, generator))
    chunks: np.ndarray = torch.cat(parts).double().numpy()
    return chunks


def _load(checkpoint: Checkpoint, data: Path, samples: int) -> tuple[ModelInputs, list[str]]:
    """Inputs of ticks that are spread over the data evenly, and their instructions."""
    normalizer, tokenizer, spec = checkpoint.normalizer, checkpoint.tokenizer, checkpoint.config.observation
    if (data / "meta" / "info.json").is_file():
        dataset = datasets.load(data, checkpoint.contract, spec)
        rows = _spread(dataset.frames, samples)
        return Batches(dataset, 1, normalizer, tokenizer).inputs(rows), [dataset.instruction(row) for row in rows]
    found = bags.find_bags([data])
    share = max(1, -(-samples // len(found)))
    seen = [observation for path in found for observation in _observations(checkpoint, path, share)][:samples]
    if not seen:
        raise SensitivityError(f"{data}: no tick at which all that the policy needs is there")
    return collate(seen, normalizer, tokenizer, spec), [observation.instruction for observation in seen]


def _observations(checkpoint: Checkpoint, path: Path, samples: int) -> list[Observation]:
    contract, summary = checkpoint.contract, bags.info(path)
    if bags.CONTRACT_KEY in summary.metadata:
        contract.check_same(summary.contract, "the checkpoint", str(path))
        contract = contract.with_topics_of(summary.contract)
    builder = ObservationBuilder(contract, checkpoint.config.observation)
    bags.require_topics(summary, {stream.topic: stream.type for stream in builder.streams.values()})
    buffer, seen = builder.make_buffer(), []
    for tick_ns in replay_ticks(replayed(path, builder), builder, buffer):
        try:
            seen.append(builder.build(buffer, tick_ns))
        except Unobserved:
            continue
    return [seen[i] for i in _spread(len(seen), samples)]


def _spread(count: int, samples: int) -> np.ndarray:
    """Places of at most ``samples`` of ``count`` items, the first and the last among them."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, samples)).round().astype(np.int64))
