"""Augmentation of training batches: the trainer's alone, never the robot's.

Legend: B samples of this batch, N samples of the global batch that it is a part of, T past ticks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vla_core.config import ConfigError
from vla_core.data.batches import Batch
from vla_core.errors import choices
from vla_core.model.inputs import Masked, ModelInputs

GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601
ERASED = (0.1, 0.4)  # sides of an erased rectangle, as a share of the picture's
DRAWS = 14  # uniform numbers of a picture; all are drawn whatever is asked for, so that options do not move each other
STATE, IMAGES, LOST = 0, 1, 10_000  # streams of random numbers


@dataclass(frozen=True, kw_only=True)
class ImageAugmentation:
    """What is done to the pictures of one camera, in this order; 0 does nothing.

    ``shift``       pixels: each picture is moved by up to so many, repeating its edge (DrQ, Kostrikov et al. 2021)
    ``crop``        the smallest share of a side that is kept, resized to the whole picture; 1 keeps all
    ``brightness``  largest relative change, as are ``contrast`` about the picture's mean grey and ``saturation``
    ``hue``         largest turn of the colour circle, at most 0.5
    ``erase``       probability of a grey rectangle (Zhong et al. 2017)
    """

    shift: int = 0
    crop: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ConfigError(f"shift: expected at least 0 pixels, found {self.shift}")
        if not 0 < self.crop <= 1:
            raise ConfigError(f"crop: expected above 0 to 1, found {self.crop}")
        for name, most in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5), ("erase", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name}: expected 0 to {most:g}, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class SensorLoss:
    """Streams that are lost together with a ``probability`` in a sample, such as all cameras.

    Cameras, clouds, sequences and maps by their names; ``state`` is the whole state, and ``past`` all past ticks: what
    a demonstrator did so far tells so well what it does next that a policy may learn to look at nothing else (de Haan
    et al. 2019, "Causal Confusion in Imitation Learning").
    """

    streams: tuple[str, ...]
    probability: float

    def __post_init__(self) -> None:
        if not self.streams:
            raise ConfigError("streams: expected at least one, found none")
        if not 0 < self.probability < 1:
            raise ConfigError(f"probability: expected above 0 and below 1, found {self.probability}")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """``images`` is done to every camera but those in ``cameras``; ``state_noise`` is a deviation, normalized.

    ``dropout`` takes sensors away, so that a policy learns to do without: a sample then looks as it does on a robot
    that has lost them, in its past ticks too. Each group is drawn by itself.
    """

    images: ImageAugmentation = field(default_factory=ImageAugmentation)
    cameras: dict[str, ImageAugmentation] = field(default_factory=dict)
    state_noise: float = 0.0
    dropout: tuple[SensorLoss, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.state_noise < float("inf"):
            raise ConfigError(f"state_noise: expected at least 0, found {self.state_noise}")

    def of(self, camera: str) -> ImageAugmentation:
        """What is done to a camera."""
        return self.cameras.get(camera, self.images)


def augment(batch: Batch, options: Augmentation, seed: int, any_of: Sequence[str] = ()) -> Batch:
    """``batch`` augmented: a pure function of ``seed``, the batch's step and each sample's place in the global batch.

    A run that goes on, or several processes that share a batch, thus see what one unbroken process sees. The past
    ticks of a sample are moved and coloured as its newest one; the intrinsics follow.

    Of the streams ``any_of``, of which a robot needs at least one (:class:`RobotContract`), dropout leaves one.
    """
    inputs = batch.inputs
    unknown = [name for name in options.cameras if name not in inputs.images]
    if unknown:
        raise ConfigError(f"augment.cameras: no camera {unknown[0]!r}; choices: {choices(inputs.images)}")
    images, intrinsics = dict(inputs.images), dict(inputs.intrinsics)
    past = inputs.history
    past_images, past_intrinsics = (dict(past.images), dict(past.intrinsics)) if past else ({}, {})
    for number, (name, pixels) in enumerate(inputs.images.items()):
        wanted = options.of(name)
        if wanted == ImageAugmentation():
            continue
        draws = _rng(seed, batch.step, IMAGES + number).random((_total(batch), DRAWS), dtype=np.float32)
        change = _Change(wanted, torch.from_numpy(_part(batch, draws)).to(pixels.device), *pixels.shape[-2:])
        images[name] = _masked(change.pixels(pixels), inputs.image_mask[name])
        if name in intrinsics:
            intrinsics[name] = change.intrinsics(intrinsics[name])
        if past is not None and name in past_images:
            past_images[name] = _ticks(past.images[name], past.image_mask[name], change)
            if name in past_intrinsics:
                past_intrinsics[name] = _tick_intrinsics(past_intrinsics[name], change)
    changed = dataclasses.replace(inputs, images=images, intrinsics=intrinsics)
    if past is not None:
        past = dataclasses.replace(past, images=past_images, intrinsics=past_intrinsics)
    if options.state_noise:
        rng = _rng(seed, batch.step, STATE)
        changed = _noisy(changed, batch, options.state_noise, rng)
        past = None if past is None else _noisy(past, batch, options.state_noise, rng)
    if options.dropout:
        lost = _lost(inputs, batch, options.dropout, any_of, _rng(seed, batch.step, LOST))
        changed = without(changed, lost)
        if past is not None:
            forgotten = {name: lost["past"] for name in _there(past)} if "past" in lost else {}
            past = without(without(past, lost), forgotten)
    return batch._replace(inputs=dataclasses.replace(changed, history=past))


def without(inputs: ModelInputs, lost: Mapping[str, Tensor]) -> ModelInputs:
    """``inputs`` in which streams are missing in some samples, as :func:`vla_core.observation.batch.collate` has it.

    ``lost``: stream, or ``state``, to (B,) bool.
    """

    def gone(found: dict[str, Masked]) -> dict[str, Masked]:
        return {
            name: Masked(_zero(found.values, lost[name]), _zero(found.mask, lost[name])) if name in lost else found
            for name, found in found.items()
        }

    images, masks = dict(inputs.images), dict(inputs.image_mask)
    for name in images.keys() & lost.keys():
        images[name], masks[name] = (_zero(part[name], lost[name]) for part in (images, masks))
    state, state_mask = inputs.state, inputs.state_mask
    if "state" in lost:
        state, state_mask = _zero(state, lost["state"]), _zero(state_mask, lost["state"])
    return dataclasses.replace(
        inputs, images=images, image_mask=masks, state=state, state_mask=state_mask, clouds=gone(inputs.clouds),
        sequences=gone(inputs.sequences), maps=gone(inputs.maps), intrinsics=gone(inputs.intrinsics),
    )  # fmt: skip


def _zero(values: Tensor, lost: Tensor) -> Tensor:
    """``values`` (B, ...) with 0, or False, in the rows of ``lost`` (B,)."""
    return values.masked_fill(lost.view(-1, *(1,) * (values.dim() - 1)), 0)


def _lost(
    inputs: ModelInputs, batch: Batch, groups: Sequence[SensorLoss], any_of: Sequence[str], rng: np.random.Generator
) -> dict[str, Tensor]:
    """Stream to (B,) bool."""
    there = _there(inputs)
    if inputs.history is not None:
        there["past"] = inputs.history.state_mask.any(dim=1)
    for number, group in enumerate(groups):
        for name in group.streams:
            if name not in there:
                raise ConfigError(f"augment.dropout.{number}.streams: no stream {name!r}; choices: {choices(there)}")
    drawn = torch.from_numpy(_part(batch, rng.random((_total(batch), len(groups)), dtype=np.float32)))
    drawn = drawn.to(inputs.tokens.device) / torch.tensor([g.probability for g in groups], device=inputs.tokens.device)
    chosen = drawn < 1  # (B, G)
    needed = [name for name in any_of if name in there]
    held = torch.tensor([[name in g.streams for name in needed] for g in groups], device=chosen.device)  # (G, needed)
    if needed and held.any():
        known = torch.stack([there[name] for name in needed], dim=1)  # (B, needed)
        blind = known.any(dim=1) & ~(known & ~_taken(chosen, held)).any(dim=1)
        # The stream that was nearest to being kept is kept, and with it all groups that would take it.
        last = torch.where(known[:, None] & held & chosen[..., None], drawn[..., None], -1.0).amax(dim=1).argmax(dim=1)
        chosen = chosen & ~(blind[:, None] & held.T[last])
    return {
        name: torch.stack([chosen[:, k] for k, g in enumerate(groups) if name in g.streams]).any(dim=0)
        for name in dict.fromkeys(name for group in groups for name in group.streams)
    }


def _taken(chosen: Tensor, held: Tensor) -> Tensor:
    """Which streams (B, n) the groups ``chosen`` (B, G) take, of those that they have, ``held`` (G, n)."""
    return (chosen[..., None] & held).any(dim=1)


def _there(inputs: ModelInputs) -> dict[str, Tensor]:
    """Of every stream whether it is there (B,)."""
    found = {name: sensor.mask.flatten(1).any(dim=1) if sensor.mask.dim() > 1 else sensor.mask
             for part in (inputs.clouds, inputs.sequences, inputs.maps) for name, sensor in part.items()}  # fmt: skip
    return {**inputs.image_mask, **found, "state": inputs.state_mask}


class _Change:
    """One random change for each of B pictures, drawn as numbers (B, DRAWS) in [0, 1)."""

    def __init__(self, options: ImageAugmentation, draws: Tensor, height: int, width: int) -> None:
        self.options, self.height, self.width = options, height, width
        moves, crop, colour, self._erased = draws[:, :2], draws[:, 2:5], draws[:, 5:9], draws[:, 9:]
        span = 2 * options.shift + 1
        self._rows, self._columns = ((moves * span).long().clamp_max(span - 1)).unbind(1)  # (B,) each, 0 to 2 shift
        self._share = options.crop + (1 - options.crop) * crop[:, 0]  # (B,) of each side
        self._top, self._left = ((1 - self._share) * crop[:, 1], (1 - self._share) * crop[:, 2])  # shares of the sides
        around = 2 * colour - 1
        limits = (options.brightness, options.contrast, options.saturation)
        self._brightness, self._contrast, self._saturation = (
            1 + limit * around[:, i] for i, limit in enumerate(limits)
        )
        self._hue = options.hue * around[:, 3]

    def pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] changed."""
        options = self.options
        steps: tuple[tuple[float, Callable[[Tensor], Tensor]], ...] = (
            (options.shift, self._shifted), (1 - options.crop, self._cropped),
            (options.brightness, lambda x: (x * _each(self._brightness)).clamp_(0, 1)),
            (options.contrast, lambda x: _blend(x, grey(x).mean(dim=(-2, -1), keepdim=True), self._contrast)),
            (options.saturation, lambda x: _blend(x, grey(x), self._saturation)),
            (options.hue, lambda x: turn_hue(x, self._hue)), (options.erase, self._with_hole),
        )  # fmt: skip
        for wanted, step in steps:
            if wanted:
                pixels = step(pixels)
        return pixels

    def intrinsics(self, found: Masked) -> Masked:
        """Matrices (B, 3, 3) of the moved and cropped pictures; pixel centres are at whole numbers, as in ROS."""
        values = found.values.clone()
        limit = self.options.shift
        if limit:
            values[:, 0, 2] -= self._columns - limit
            values[:, 1, 2] -= self._rows - limit
        if self.options.crop < 1:
            for row, start, size in ((0, self._left, self.width), (1, self._top, self.height)):
                values[:, row, 2] = (values[:, row, 2] + 0.5 - start * size) / self._share - 0.5
                values[:, row, :2] /= self._share[:, None]
        return Masked(torch.where(found.mask[:, None, None], values, found.values), found.mask)

    def _shifted(self, pixels: Tensor) -> Tensor:
        padded = F.pad(pixels, (self.options.shift,) * 4, mode="replicate")
        windows = padded.unfold(2, self.height, 1).unfold(3, self.width, 1)  # (B, 3, 2 shift + 1, 2 shift + 1, H, W)
        return windows[torch.arange(len(pixels), device=pixels.device), :, self._rows, self._columns]

    def _cropped(self, pixels: Tensor) -> Tensor:
        """Bilinear: a crop is only ever enlarged."""
        zero = torch.zeros_like(self._share)
        across, down = (2 * start + self._share - 1 for start in (self._left, self._top))  # centres in [-1, 1]
        rows = torch.stack([self._share, zero, across, zero, self._share, down], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(rows, list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def _with_hole(self, pixels: Tensor) -> Tensor:
        """A grey rectangle in those pictures that were chosen."""
        low, high = ERASED
        chosen = self._erased[:, 0] < self.options.erase
        sides = low + (high - low) * self._erased[:, 1:3]  # (B, 2): shares of height and width
        starts = self._erased[:, 3:5] * (1 - sides)
        inside = []
        for axis, size in enumerate((self.height, self.width)):
            places = (torch.arange(size, device=pixels.device) + 0.5) / size - starts[:, axis, None]  # (B, size)
            inside.append((places >= 0) & (places < sides[:, axis, None]))
        hole = inside[0][:, :, None] & inside[1][:, None, :] & chosen[:, None, None]  # (B, H, W)
        return pixels.masked_fill(hole[:, None], 0.5)


def grey(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) RGB to (B, 1, H, W)."""
    red, green, blue = pixels.split(1, dim=1)
    return (GREY[0] * red).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """(B, 3, H, W) RGB with the hue of each picture turned by ``turns`` (B,) of the circle, as HSV has it."""
    highest, lowest = pixels.amax(dim=1), pixels.amin(dim=1)  # (B, H, W)
    spread = highest - lowest
    red, green, blue = pixels.unbind(1)
    # Which channel is highest decides the third of the circle; of a grey pixel the spread is 0, and so is all below.
    second = torch.where(highest == red, green - blue, torch.where(highest == green, blue - red, red - green))
    third = torch.where(highest == red, 0.0, torch.where(highest == green, 2.0, 4.0))
    sixths = (second / spread.clamp_min(1e-9)).add_(third).add_(6 * turns[:, None, None])
    # A channel of HSV is V - spread * max(0, min(k, 4 - k, 1)) with k = (offset + sixths) mod 6.
    offsets = torch.tensor((5.0, 3.0, 1.0), dtype=pixels.dtype, device=pixels.device)[:, None, None]
    k = torch.remainder(offsets + sixths[:, None], 6)
    return highest[:, None] - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(spread[:, None])


def _blend(pixels: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(pixels), pixels, _each(weight)).clamp_(0, 1)


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _masked(pixels: Tensor, mask: Tensor) -> Tensor:
    """A picture that is missing stays black."""
    return pixels if mask.all() else pixels * mask[:, None, None, None]


def _ticks(pixels: Tensor, mask: Tensor, change: _Change) -> Tensor:
    """(B, T, 3, H, W) with the same change at every tick."""
    return torch.stack([_masked(change.pixels(p), m) for p, m in zip(pixels.unbind(1), mask.unbind(1), strict=True)], 1)


def _tick_intrinsics(found: Masked, change: _Change) -> Masked:
    ticks = [Masked(v, m) for v, m in zip(found.values.unbind(1), found.mask.unbind(1), strict=True)]
    return Masked(torch.stack([change.intrinsics(tick).values for tick in ticks], dim=1), found.mask)


def _noisy(inputs: ModelInputs, batch: Batch, deviation: float, rng: np.random.Generator) -> ModelInputs:
    state = inputs.state
    drawn = rng.standard_normal((_total(batch), *state.shape[1:]), dtype=np.float32)
    noise = torch.from_numpy(_part(batch, drawn)).to(state.device) * deviation
    return dataclasses.replace(inputs, state=state + noise * inputs.state_mask[..., None])


def _rng(seed: int, step: int, stream: int) -> np.random.Generator:
    return np.random.default_rng((seed, step, stream, 0xA06))


def _total(batch: Batch) -> int:
    return batch.total or len(batch.actions)


def _part(batch: Batch, drawn: np.ndarray) -> np.ndarray:
    """What belongs to this batch of numbers (N, ...) drawn for the global one."""
    return drawn[batch.first : batch.first + len(batch.actions)]
