"""What an exported graph takes of an observation: the builder's own numbers, in arrays whose sizes are fixed.

Only the number of words is free. Clouds are padded to their ``max_points`` and windows to their length: every encoder
masks what is not there, and a size that is known makes graphs that every engine runs, with the same result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.model.vlm.text_encoder import PAD
from vla_core.observation.builder import Observation, ObservationSpec

Kind = Literal["uint8", "float32", "float64", "int64", "bool"]
MIN_WORDS = 2  # exporters take a size of 1 for a constant
WORDS, ROWS, COLUMNS = "words", "rows", "columns"
Feed = dict[str, np.ndarray]


class ExportError(VlaError):
    """A policy that cannot be exported, or an exported one that cannot be trusted to run."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output of a graph; the sizes that are names are free."""

    name: str
    dtype: Kind
    shape: tuple[int | str, ...]

    def check(self, value: np.ndarray) -> None:
        """Raise :class:`ExportError` for an array of another type or shape."""
        fits = len(value.shape) == len(self.shape) and all(
            isinstance(size, str) or size == found for size, found in zip(self.shape, value.shape, strict=True)
        )
        if value.dtype != np.dtype(self.dtype) or not fits:
            raise ExportError(f"{self.name}: found {value.dtype} {list(value.shape)}, the graph takes {self.dtype} "
                              f"{list(self.shape)}")  # fmt: skip


def ports(spec: ObservationSpec, contract: RobotContract, noise: int) -> tuple[Port, ...]:
    """The inputs of a policy's graph, in their order; ``noise`` numbers are drawn for an answer."""
    found = []
    for name, size in spec.images.items():
        found += [Port(name=f"image.{name}", dtype="uint8", shape=(1, size.height, size.width, 3)),
                  Port(name=f"image_mask.{name}", dtype="bool", shape=(1,))]  # fmt: skip
    width = sum(len(contract.stream(name).names) for name in spec.state)
    if width:
        found.append(Port(name="state", dtype="float32", shape=(1, width)))
    found += [Port(name="tokens", dtype="int64", shape=(1, WORDS)),
              Port(name="token_mask", dtype="bool", shape=(1, WORDS))]  # fmt: skip
    rows = {name: ("cloud", cloud.max_points) for name, cloud in spec.clouds.items()}
    rows.update({name: ("sequence", contract.stream(name).window_length) for name in spec.sequences})
    for name, (kind, count) in rows.items():
        columns = len(contract.stream(name).names)
        found += [Port(name=f"{kind}.{name}", dtype="float32", shape=(1, count, columns)),
                  Port(name=f"{kind}_mask.{name}", dtype="bool", shape=(1, count))]  # fmt: skip
    for name in spec.maps:
        found += [Port(name=f"map.{name}", dtype="float32", shape=(1, f"{ROWS} of {name}", f"{COLUMNS} of {name}")),
                  Port(name=f"map_mask.{name}", dtype="bool", shape=(1,))]  # fmt: skip
    for name in spec.calibrations:
        found += [Port(name=f"intrinsics.{name}", dtype="float32", shape=(1, 3, 3)),
                  Port(name=f"intrinsics_mask.{name}", dtype="bool", shape=(1,))]  # fmt: skip
    if spec.history > 1 and width:
        found.append(Port(name="history.state", dtype="float32", shape=(1, spec.history - 1, width)))
    if noise:
        found.append(Port(name="noise", dtype="float32", shape=(noise,)))
    return tuple(found)


def feed(observation: Observation, spec: ObservationSpec, contract: RobotContract, tokenizer: Any) -> Feed:
    """The inputs but the noise, by name; what is missing is 0 and masked, and NaN in a state and in a map."""
    found: Feed = {}
    for name, size in spec.images.items():
        picture = observation.images.get(name)
        blank = np.zeros((size.height, size.width, 3), dtype=np.uint8)
        _put(found, "image", name, (blank if picture is None else picture)[None], np.array([picture is not None]))
    if len(observation.state):
        found["state"] = observation.state[None]
    found["tokens"], found["token_mask"] = _words(observation, spec, tokenizer)
    for name, cloud in spec.clouds.items():
        points = observation.clouds.get(name)
        there = None if points is None else np.ones(len(points), dtype=bool)
        _put(found, "cloud", name, *_padded(name, points, there, cloud.max_points, len(contract.stream(name).names)))
    for name in spec.sequences:
        window, stream = observation.sequences.get(name), contract.stream(name)
        values, there = (None, None) if window is None else (window.values, window.mask)
        _put(found, "sequence", name, *_padded(name, values, there, stream.window_length, len(stream.names)))
    for name in spec.maps:
        seen = observation.maps.get(name)
        values = np.full((2, 2), np.nan, dtype=np.float32) if seen is None else seen.astype(np.float32)
        _put(found, "map", name, values[None], np.array([seen is not None]))
    for name in spec.calibrations:
        known = observation.calibrations.get(name)
        matrix = np.zeros((3, 3)) if known is None else known.intrinsics
        _put(found, "intrinsics", name, matrix[None].astype(np.float32), np.array([known is not None]))
    if spec.history > 1 and len(observation.state):
        found["history.state"] = np.stack([tick.state for tick in observation.history])[None]
    return found


def check(inputs: Mapping[str, np.ndarray], expected: Sequence[Port]) -> list[np.ndarray]:
    """The arrays in the order of the graph; raises :class:`ExportError` for one that does not fit."""
    for port in expected:
        port.check(inputs[port.name])
    return [np.ascontiguousarray(inputs[port.name]) for port in expected]


def _put(found: Feed, kind: str, name: str, values: np.ndarray, mask: np.ndarray) -> None:
    found[f"{kind}.{name}"], found[f"{kind}_mask.{name}"] = values, mask


def _words(observation: Observation, spec: ObservationSpec, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask (1, L), as ``observation.batch`` makes them; at least two places."""
    pad: int = getattr(tokenizer, "pad_id", PAD)
    ids = tokenizer.batch([observation.instruction]).numpy()
    ids = np.pad(ids, ((0, 0), (0, max(0, MIN_WORDS - ids.shape[1]))), constant_values=pad)
    known = spec.instruction is None or observation.present.get(spec.instruction, True)
    return ids, (ids != pad) & known


def _padded(
    name: str, values: np.ndarray | None, mask: np.ndarray | None, count: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """``values`` (N, C) and their mask (N,) as (1, count, C) and (1, count)."""
    whole, there = np.zeros((1, count, columns), dtype=np.float32), np.zeros((1, count), dtype=bool)
    if values is not None and mask is not None:
        if len(values) > count:
            raise ExportError(f"{name}: found {len(values)} rows, the graph takes at most {count}")
        whole[0, : len(values)], there[0, : len(values)] = values, mask
    return whole, there
