"""Several datasets drawn from as one, each normalized by the statistics of its robot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vla_core.data.batches import Batch, Batches
from vla_core.data.dataset import Dataset
from vla_core.errors import VlaError
from vla_core.model.inputs import Masked, ModelInputs
from vla_core.model.vla.sizes import columns
from vla_core.model.vlm.text_encoder import PAD


class MixtureError(VlaError):
    """Datasets that one model cannot be trained on."""


class Mixture:
    """Windows of several datasets, numbered through; ``weights`` are the datasets' shares of the samples.

    Without weights every window is as likely as any other. What a model sees must have the same layout in all of them:
    cameras and their sizes, widths of state and actions, further streams and their columns, history.
    """

    def __init__(self, parts: Sequence[Batches], weights: Sequence[float] | None = None) -> None:
        if not parts:
            raise MixtureError("a mixture of no datasets")
        for part in parts[1:]:
            _check_layout(parts[0], part)
        self.parts = tuple(parts)
        self.weights = None if weights is None else tuple(weights)
        self.lengths = tuple(map(len, parts))
        self._ends = np.cumsum(self.lengths)
        self._pad = getattr(parts[0].tokenizer, "pad_id", PAD)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def draw(self, index: np.ndarray, floats: bool = True) -> Batch:
        """The windows of these numbers (B,), in their order; ``floats`` as of :class:`Batches`."""
        sources = np.searchsorted(self._ends, index, side="right")
        numbers = index - (self._ends - np.asarray(self.lengths))[sources]
        places, drawn = [], []
        for source in np.unique(sources):
            mine = np.flatnonzero(sources == source)
            batch = self.parts[source].draw(numbers[mine], floats)
            batch.rows[:, 0] = source
            places.append(mine)
            drawn.append(batch)
        if len(drawn) == 1:
            return drawn[0]
        order = np.argsort(np.concatenate(places))
        back = torch.from_numpy(order)
        return Batch(
            inputs=join([b.inputs for b in drawn], self._pad).map(lambda tensor: tensor[back]),
            actions=torch.cat([b.actions for b in drawn])[back],
            mask=torch.cat([b.mask for b in drawn])[back],
            rows=np.concatenate([b.rows for b in drawn])[order],
            total=len(index),
            truths={name: torch.cat([b.truths[name] for b in drawn])[back] for name in drawn[0].truths},
        )


def join(parts: Sequence[ModelInputs], pad_id: int = PAD) -> ModelInputs:
    """One batch of several of the same layout, one after another.

    As in a batch that was made in one piece, tokens, clouds and sequences are padded at the end to the longest.
    """

    def named(field: str, unite: Any) -> dict[str, Any]:
        return {name: unite([getattr(part, field)[name] for part in parts]) for name in getattr(parts[0], field)}

    def rows(found: list[Masked]) -> Masked:
        return Masked(_padded([m.values for m in found], 0), _padded([m.mask for m in found], False))

    def alike(found: list[Masked]) -> Masked:
        return Masked(torch.cat([m.values for m in found]), torch.cat([m.mask for m in found]))

    past = [part.history for part in parts if part.history is not None]
    masks = [part.token_mask for part in parts if part.token_mask is not None]
    return ModelInputs(
        images=named("images", torch.cat), image_mask=named("image_mask", torch.cat),
        state=torch.cat([p.state for p in parts]), state_mask=torch.cat([p.state_mask for p in parts]),
        tokens=_padded([p.tokens for p in parts], pad_id), token_mask=_padded(masks, False) if masks else None,
        clouds=named("clouds", rows), sequences=named("sequences", rows), maps=named("maps", _maps),
        intrinsics=named("intrinsics", alike), extrinsics=named("extrinsics", alike),
        history=join(past, pad_id) if past else None,
    )  # fmt: skip


def _padded(parts: Sequence[Tensor], fill: float) -> Tensor:
    """Tensors (B, ...) joined, each filled up at the end of every axis but the first."""
    size = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
    grown = []
    for part in parts:
        more = [wanted - found for wanted, found in zip(size, part.shape[1:], strict=True)]
        grown.append(F.pad(part, [n for extra in reversed(more) for n in (0, extra)], value=fill))
    return torch.cat(grown)


def _maps(parts: list[Masked]) -> Masked:
    """Maps of one size; where a part has none at all, its size is not known and does not matter."""
    known = {tuple(part.values.shape[-2:]) for part in parts if part.mask.any()}
    if len(known) > 1:
        raise MixtureError(f"maps of different sizes in one batch: {sorted(known)}")
    size = known.pop() if known else tuple(parts[0].values.shape[-2:])
    values = [
        part.values if part.values.shape[-2:] == size else part.values.new_zeros(*part.values.shape[:-2], *size)
        for part in parts
    ]
    return Masked(torch.cat(values), torch.cat([part.mask for part in parts]))


def layout(dataset: Dataset) -> dict[str, Any]:
    """What a model's inputs and outputs look like for a dataset."""
    spec, contract = dataset.spec, dataset.contract
    streams = columns(spec, contract)
    return {
        "images": {name: f"{size.width}x{size.height}" for name, size in spec.images.items()},
        "state": sum(len(contract.stream(name).names) for name in spec.state),
        "action": len(contract.action_names),
        "plan": dataset.plan_rows is not None,
        "instruction": spec.instruction is not None,
        "clouds": {name: streams[name] for name in spec.clouds},
        "sequences": {name: (contract.stream(name).window_length, streams[name]) for name in spec.sequences},
        "maps": sorted(spec.maps),
        "calibrations": sorted(spec.calibrations),
        "history": spec.history,
    }


def _check_layout(first: Batches, other: Batches) -> None:
    ours, theirs = layout(first.dataset), layout(other.dataset)
    for what in ours:
        if ours[what] != theirs[what]:
            raise MixtureError(f"{what}: {first.dataset.name} has {ours[what]}, {other.dataset.name} has "
                               f"{theirs[what]}; one model needs the same layout")  # fmt: skip
    if first.horizon != other.horizon or first.tokenizer is not other.tokenizer:
        raise MixtureError("parts of a mixture share one horizon and one tokenizer")
    modes = dataclasses.asdict(first.normalizer.modes), dataclasses.asdict(other.normalizer.modes)
    if modes[0] != modes[1]:
        raise MixtureError("parts of a mixture are normalized by the same modes")
