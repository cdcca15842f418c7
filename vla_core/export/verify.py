"""Is the graph the policy? Both answer observations that were never seen by the exporter, and must agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vla_core.checkpoint import Checkpoint
from vla_core.export.record import Agreement
from vla_core.observation.builder import Observation, ObservationBuilder, Window
from vla_core.observation.calibration import Calibration
from vla_core.observation.normalizer import COORDINATES

OBSERVATIONS = 8
REACH_M = 20.0  # of random points
MAP_SIDES = ((16, 24), (9, 7))
SIZES = (0.6, 1.3)  # of random focal lengths, as shares of a picture's height
Answer = Callable[[Observation], np.ndarray]


def observations(checkpoint: Checkpoint, count: int = OBSERVATIONS, seed: int = 0) -> list[Observation]:
    """Random observations of the policy's robot, made from the statistics of what it was trained on.

    Words come from its tokenizer and are of different numbers, clouds of different sizes; the last observations lack
    sensors, more of them each, and the first is the builder's blank.
    """
    blank = ObservationBuilder(checkpoint.contract, checkpoint.config.observation).blank()
    made = [blank]
    for k in range(1, count):
        rng = np.random.default_rng([seed, k])
        absent = 0.4 * (k - count // 2) / count if k > count // 2 else 0.0
        past = tuple(_random(checkpoint, tick, rng, absent) for tick in blank.history)
        made.append(dataclasses.replace(_random(checkpoint, blank, rng, absent), stamp_ns=1_000_003 * k, history=past))
    return [_asked(checkpoint, each) for each in made]


def _asked(checkpoint: Checkpoint, observation: Observation) -> Observation:
    """With an instruction, where the model refuses to act without one."""
    name = checkpoint.config.observation.instruction
    if name is None or not getattr(checkpoint.model, "needs_instruction", False):
        return observation
    return dataclasses.replace(observation, present={**observation.present, name: True})


def agreement(
    expected: Answer, found: Answer, seen: Sequence[Observation], half_range: np.ndarray, bound: float
) -> Agreement:
    """How far ``found`` is from ``expected`` over ``seen``, as shares of the ``half_range`` (A,) of each action."""
    errors = np.stack([np.abs(found(each) - expected(each)) / half_range for each in seen])
    return Agreement(
        observations=len(seen), mean_error=float(errors.mean()), max_error=float(errors.max()), bound=bound
    )


def half_range(checkpoint: Checkpoint) -> np.ndarray:
    """Half of what each action (A,) may be, in the contract's units."""
    contract = checkpoint.contract
    return (contract.action_high - contract.action_low) / 2


def _random(checkpoint: Checkpoint, blank: Observation, rng: np.random.Generator, absent: float) -> Observation:
    """An observation in the form of ``blank``, whose streams are missing with probability ``absent``."""
    spec, contract = checkpoint.config.observation, checkpoint.contract
    gone = {name for name in blank.present if rng.random() < absent}
    return dataclasses.replace(
        blank,
        images={n: _picture(p.shape, rng) for n, p in blank.images.items() if n not in gone},
        state=_state(checkpoint, len(blank.state), gone, rng),
        instruction=_words(checkpoint, rng),
        clouds={n: _rows(checkpoint, n, int(rng.integers(0, size.max_points + 1)), rng)
                for n, size in spec.clouds.items() if n not in gone},
        sequences={n: _window(checkpoint, n, contract.stream(n).window_length, rng)
                   for n in spec.sequences if n not in gone},
        maps={n: _map(checkpoint, n, rng) for n in spec.maps if n not in gone},
        calibrations={n: _calibration(c, spec.images[n].height, rng)
                      for n, c in blank.calibrations.items() if spec.calibrations[n] not in gone},
        present={name: name not in gone for name in blank.present},
    )  # fmt: skip


def _picture(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Noise over a gradient."""
    slope = np.linspace(0, 200, shape[1])[None, :, None] * rng.random(3)
    return (slope + rng.integers(0, 56, shape)).astype(np.uint8)


def _numbers(checkpoint: Checkpoint, name: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Values (rows, columns) float32 that are about 1 deviation, or half of the range, from the middle."""
    shift, scale = checkpoint.normalizer.affine(name)
    return (shift + 0.8 * scale * rng.normal(size=(rows, columns))).astype(np.float32)


def _state(checkpoint: Checkpoint, width: int, gone: set[str], rng: np.random.Generator) -> np.ndarray:
    state = _numbers(checkpoint, "state", 1, width, rng)[0]
    place = 0
    for name in checkpoint.config.observation.state:
        count = len(checkpoint.contract.stream(name).names)
        if name in gone:
            state[place : place + count] = np.nan
        place += count
    return state


def _words(checkpoint: Checkpoint, rng: np.random.Generator) -> str:
    """A few words that the tokenizer knows, or letters where it has no words."""
    known = checkpoint.tokenizer.to_dict().get("words", ["", "", "lift", "the", "red", "cube", "and", "turn", "left"])
    return " ".join(rng.choice(known[2:] or ["go"], int(rng.integers(1, 9))))


def _rows(checkpoint: Checkpoint, name: str, count: int, rng: np.random.Generator) -> np.ndarray:
    columns = checkpoint.normalizer.columns[name]
    values = _numbers(checkpoint, name, count, len(columns), rng)
    for i, column in enumerate(columns):
        if column in COORDINATES:
            values[:, i] = rng.uniform(-REACH_M, REACH_M, count) * (0.1 if column == "z" else 1.0)
    values[rng.random(count) < 0.05] = np.nan  # returns that hit nothing
    return values


def _window(checkpoint: Checkpoint, name: str, length: int, rng: np.random.Generator) -> Window:
    mask = np.arange(length) >= rng.integers(0, length)
    values = _numbers(checkpoint, name, length, len(checkpoint.normalizer.columns[name]), rng)
    return Window(np.where(mask[:, None], values, np.float32(0)), mask)


def _map(checkpoint: Checkpoint, name: str, rng: np.random.Generator) -> np.ndarray:
    rows, columns = MAP_SIDES[int(rng.integers(len(MAP_SIDES)))]
    values = _numbers(checkpoint, name, rows * columns, 1, rng).reshape(rows, columns)
    values[rng.random((rows, columns)) < 0.1] = np.nan
    return values


def _calibration(blank: Calibration, height: int, rng: np.random.Generator) -> Calibration:
    matrix = np.array(blank.intrinsics, dtype=np.float64)
    matrix[0, 0] = matrix[1, 1] = height * rng.uniform(*SIZES)
    matrix[:2, 2] += rng.uniform(-0.1, 0.1, 2) * height
    return dataclasses.replace(blank, intrinsics=matrix)
