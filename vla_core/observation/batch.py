"""Model inputs from observations: the one step from numbers of the robot to tensors, for training and inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vla_core.errors import VlaError
from vla_core.model.inputs import Masked, ModelInputs, Remembers
from vla_core.model.vlm.text_encoder import PAD, HubTokenizer, WordTokenizer
from vla_core.observation.builder import Observation, ObservationSpec
from vla_core.observation.normalizer import Normalizer

Tokenizer = WordTokenizer | HubTokenizer


def make_inputs(
    images: Mapping[str, np.ndarray | torch.Tensor],
    state: np.ndarray,
    instructions: Sequence[str],
    normalizer: Normalizer,
    tokenizer: Tokenizer,
    image_mask: Mapping[str, np.ndarray] | None = None,
    instruction_mask: np.ndarray | None = None,
    floats: bool = True,
) -> ModelInputs:
    """Batch of B observations.

    Args:
        images: per camera (B, H, W, 3) uint8 RGB.
        state: (B, S) in physical units; NaN where a stream is missing, which becomes 0, the mean, and masks the state.
        instructions: B texts.
        image_mask: per camera (B,) bool, False where the picture is missing; None where all are there.
        instruction_mask: (B,) bool, False where the instruction is missing; None where all are there.
        floats: False leaves the pictures (B, 3, H, W) uint8, for :func:`with_floats` on another device.
    """
    masks = image_mask or {name: np.ones(len(state), dtype=bool) for name in images}
    missing = np.isnan(state)
    normalized = np.where(missing, np.float32(0), normalizer.normalize("state", state))
    different = {text: place for place, text in enumerate(dict.fromkeys(instructions))}  # a batch repeats a few
    tokens = tokenizer.batch(list(different))[[different[text] for text in instructions]]
    token_mask = tokens != getattr(tokenizer, "pad_id", PAD)
    if instruction_mask is not None:
        token_mask = token_mask & torch.from_numpy(instruction_mask)[:, None]
    return ModelInputs(
        images={name: (_to_float if floats else _channels_first)(pixels) for name, pixels in images.items()},
        state=torch.from_numpy(normalized),
        tokens=tokens,
        image_mask={name: torch.from_numpy(masks[name]) for name in images},
        state_mask=torch.from_numpy(~missing.any(axis=1)),
        token_mask=token_mask,
    )


def collate(
    observations: Sequence[Observation],
    normalizer: Normalizer,
    tokenizer: Tokenizer,
    spec: ObservationSpec | None = None,
    floats: bool = True,
    remembers: Remembers = "everything",
) -> ModelInputs:
    """Batch of observations of the same spec; what is missing is 0 and masked, and a missing picture is black.

    Without ``spec`` only images, state and instruction are taken, and a camera must be there in at least one of the
    observations. ``floats`` as in :func:`make_inputs`. ``remembers`` is what the model reads of past ticks, so that no
    pictures and clouds are made ready for one that reads but their state.
    """
    seen = {name: pixels.shape for o in observations for name, pixels in o.images.items()}
    shapes = seen if spec is None else {name: (size.height, size.width, 3) for name, size in spec.images.items()}
    known = None
    if spec is not None and spec.instruction:
        known = np.array([o.present.get(spec.instruction, True) for o in observations])
    inputs = make_inputs(
        {n: np.stack([o.images.get(n, np.zeros(s, np.uint8)) for o in observations]) for n, s in shapes.items()},
        np.stack([o.state for o in observations]),
        [o.instruction for o in observations],
        normalizer,
        tokenizer,
        {name: np.array([name in o.images for o in observations]) for name in shapes},
        known,
        floats,
    )
    if spec is None or not spec.extras:
        return inputs
    return dataclasses.replace(
        inputs,
        clouds={name: _rows(name, [_cloud(o, name) for o in observations], normalizer) for name in spec.clouds},
        sequences={name: _rows(name, [_window(o, name) for o in observations], normalizer) for name in spec.sequences},
        maps={name: _maps(name, [o.maps.get(name) for o in observations], normalizer) for name in spec.maps},
        intrinsics={name: _intrinsics([o.calibrations.get(name) for o in observations]) for name in spec.calibrations},
        history=_history(observations, normalizer, tokenizer, _remembered(spec, remembers), floats),
    )


def _history(
    observations: Sequence[Observation], normalizer: Normalizer, tokenizer: Tokenizer, spec: ObservationSpec,
    floats: bool,
) -> ModelInputs | None:  # fmt: skip
    """The past ticks of all observations as one batch, then (B, T, ...)."""
    ticks = spec.history - 1
    if ticks == 0:
        return None
    found = sorted({len(o.history) for o in observations})
    if found != [ticks]:
        raise VlaError(f"observations with histories of {found} past ticks; the spec's history of {spec.history} has "
                       f"{ticks}")  # fmt: skip
    past = [tick for o in observations for tick in o.history]
    flat = collate(past, normalizer, tokenizer, dataclasses.replace(_without_motion(spec), history=1), floats)
    return flat.map(lambda tensor: tensor.unflatten(0, (len(observations), ticks)))


def _remembered(spec: ObservationSpec, remembers: Remembers) -> ObservationSpec:
    if remembers == "everything":
        return spec
    return ObservationSpec(state=spec.state, instruction=spec.instruction, history=spec.history)


def _without_motion(spec: ObservationSpec) -> ObservationSpec:
    """The same spec for ticks that stand alone: the builder has moved their clouds already."""
    clouds = {name: dataclasses.replace(cloud, ego_motion=None) for name, cloud in spec.clouds.items()}
    return dataclasses.replace(spec, clouds=clouds)


def _cloud(observation: Observation, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    points = observation.clouds.get(name)
    return None if points is None else (points, np.ones(len(points), dtype=bool))


def _window(observation: Observation, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    window = observation.sequences.get(name)
    return None if window is None else (window.values, window.mask)


def _rows(name: str, parts: Sequence[tuple[np.ndarray, np.ndarray] | None], normalizer: Normalizer) -> Masked:
    """Rows (N, C) and masks (N,) of different lengths as one batch (B, N, C), padded at the end; never of no row."""
    longest = max([1, *(len(part[1]) for part in parts if part is not None)])
    values = np.zeros((len(parts), longest, len(normalizer.columns[name])), dtype=np.float32)
    mask = np.zeros((len(parts), longest), dtype=bool)
    for i, part in enumerate(parts):
        if part is not None:
            there = part[1] & np.isfinite(part[0]).all(axis=-1)
            mask[i, : len(there)] = there
            values[i, : len(there)][there] = normalizer.normalize(name, part[0][there])
    return Masked(torch.from_numpy(values), torch.from_numpy(mask))


def _maps(name: str, parts: Sequence[np.ndarray | None], normalizer: Normalizer) -> Masked:
    """Maps (H, W) of one size to (B, 2, H, W): the values, 0 where they are no numbers, and where they are numbers."""
    shapes = {part.shape for part in parts if part is not None} or {(1, 1)}
    if len(shapes) > 1:
        raise VlaError(f"{name}: maps of different sizes in one batch: {sorted(shapes)}")
    values = np.zeros((len(parts), 2, *shapes.pop()), dtype=np.float32)
    for i, part in enumerate(parts):
        if part is not None:
            there = np.isfinite(part)
            values[i, 0][there] = normalizer.normalize(name, part[there][:, None])[:, 0]
            values[i, 1] = there
    return Masked(torch.from_numpy(values), torch.tensor([part is not None for part in parts]))


def _intrinsics(parts: Sequence[object]) -> Masked:
    matrices = [getattr(part, "intrinsics", np.zeros((3, 3))) for part in parts]
    values = torch.from_numpy(np.stack(matrices).astype(np.float32))
    return Masked(values, torch.tensor([part is not None for part in parts]))


def with_floats(inputs: ModelInputs) -> ModelInputs:
    """The same batch with its pictures as float32 in [0, 1], to the bit what :func:`make_inputs` makes of them."""
    past = None if inputs.history is None else with_floats(inputs.history)
    return dataclasses.replace(inputs, images={n: _scaled(p) for n, p in inputs.images.items()}, history=past)


def _scaled(pixels: torch.Tensor) -> torch.Tensor:
    if pixels.dtype == torch.float32:
        return pixels
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    # By a tensor: a GPU would multiply by the reciprocal of a plain number, which rounds otherwise.
    return values.div_(torch.tensor(255.0, device=values.device))


def _channels_first(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) to (B, 3, H, W), a view."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2)


def _to_float(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [0, 1]; one pass over the pixels."""
    first = np.asarray(pixels).transpose(0, 3, 1, 2)
    values = np.empty(first.shape, dtype=np.float32)
    np.divide(first, np.float32(255), out=values, dtype=np.float32)
    return torch.from_numpy(values)
