"""``sensor_msgs/PointCloud2`` of any layout to columns (N, C) float32 by name.

Drivers name the same thing differently. A name that a message has is taken as it is; else the names of its row in
:data:`ALIASES` are tried. The numbers keep the driver's units, which the contract states per name:

- intensity is in device units: 0 to 255 (Velodyne, Hesai, Livox, RoboSense) or raw photon counts (Ouster).
- time is relative to the header's stamp. Velodyne ``time`` is float32 in s, Ouster ``t`` and Livox ``offset_time``
  uint32 in ns, Autoware ``time_stamp`` uint32 in ns. A 64-bit ``timestamp`` (Hesai and RoboSense in s, Livox's
  PointCloud2 in ns) is absolute; the header's stamp is subtracted before it becomes a float32, which could not hold it.
- velocity is radial and in m/s. Most radars count receding targets as positive, not all; some subtract their own
  motion in a further column (``v_r_compensated``), which has no alias and is asked for by its own name.
- rcs is in dBsm. nuScenes stores ``rcs`` beside ``vx`` and ``vy``, which are no radial velocity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_core.contract import NANOSECONDS, Stream
from vla_core.errors import choices
from vla_core.observation.messages import MessageError

ALIASES: dict[str, tuple[str, ...]] = {
    "intensity": ("intensity", "i", "reflectivity"),  # Velodyne, Hesai, Ouster; Autoware's short form; Livox
    "time": ("time", "t", "timestamp", "time_stamp", "offset_time", "time_offset"),
    "ring": ("ring", "channel", "line"),  # Velodyne, Hesai, Ouster; Autoware; Livox
    "velocity": (
        "velocity", "doppler", "doppler_velocity", "radial_velocity", "radial_speed", "range_rate", "v_r", "vr",
    ),  # TI mmWave; Oculii; radar_msgs; smartmicro; Continental ARS 548 in Autoware; View of Delft
    "rcs": ("rcs", "RCS", "radar_cross_section"),  # nuScenes and Autoware; Continental ARS 548; simulators
}  # fmt: skip
TIMES = ALIASES["time"]
ABSOLUTE_TIMES = ("timestamp", "time_stamp")  # where they have 64 bits
UNIT_NS = {"s": NANOSECONDS, "ms": 1_000_000, "us": 1_000, "ns": 1}
DATATYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}  # sensor_msgs/PointField


@dataclass(frozen=True)
class _Layout:
    """Where the columns of a message lie: name to type and offset, and the shape of the grid of points."""

    columns: dict[str, tuple[np.dtype, int]]
    height: int
    width: int
    point_step: int
    row_step: int


def point_cloud(message: Any, stream: Stream) -> np.ndarray:
    """Points (N, len(names)) float32 in the order of ``stream.names``; points that are not finite are left out.

    A view of the message without a copy, where the names are native float32 columns at equal distances (x, y, z and
    intensity as most drivers send them), rows are not padded and all points are finite.
    """
    layout = _layout(message)
    found = [_find(layout, name, stream) for name in stream.names]
    if layout.height * layout.width == 0:
        return np.zeros((0, len(stream.names)), dtype=np.float32)
    points = _view(message, layout, found)
    if points is None:
        grid = np.empty((layout.height, layout.width, len(found)), dtype=np.float32)
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and left out
            for k, name in enumerate(found):
                grid[..., k] = _column(message, layout, name, stream.units[k])
        points = grid.reshape(-1, len(found))
    return finite_rows(points)


def finite_rows(points: np.ndarray) -> np.ndarray:
    """The rows of ``points`` (N, C) that are finite; the same array where all are."""
    with np.errstate(invalid="ignore"):
        total = points.sum(dtype=np.float64)
    if np.isfinite(total):  # one sum is cheaper than a look at each, and in float64 it cannot overflow
        return points
    return points[np.isfinite(points).all(axis=1)]


def subsample(points: np.ndarray, max_points: int) -> np.ndarray:
    """At most ``max_points`` rows of ``points`` (N, C): row floor(i N / max_points) for i = 0, 1, ...

    In the order of the message, evenly spread and without chance, so that the robot and the dataset see the same.
    """
    count = len(points)
    return points if count <= max_points else points[np.arange(max_points) * count // max_points]


def aliases(name: str) -> tuple[str, ...]:
    """All names that drivers give to ``name``, itself among them."""
    return next((group for group in ALIASES.values() if name in group), (name,))


def _layout(message: Any) -> _Layout:
    height, width, step = int(message.height), int(message.width), int(message.point_step)
    row_step = int(message.row_step) if height > 1 else width * step  # of a single row some drivers leave it at 0
    order = ">" if message.is_bigendian else "<"
    columns = {}
    for field in message.fields:
        if field.datatype not in DATATYPES:
            raise MessageError(f"field {field.name!r} has datatype {field.datatype}; choices: {choices(DATATYPES)}")
        dtype = np.dtype(order + DATATYPES[field.datatype])
        count = max(int(field.count), 1)
        if height * width and field.offset + count * dtype.itemsize > step:
            raise MessageError(f"field {field.name!r} at {field.offset} does not fit into a point of {step} bytes")
        for i in range(count):
            name = field.name if count == 1 else f"{field.name}.{i}"
            columns[name] = (dtype, int(field.offset) + i * dtype.itemsize)
    needed = (height - 1) * row_step + width * step if height * width else 0
    if row_step < width * step or len(message.data) < needed:
        raise MessageError(f"a cloud of {width}x{height} points of {step} bytes, rows of {row_step}, needs {needed} "
                           f"bytes and rows of at least {width * step}, found {len(message.data)} bytes")  # fmt: skip
    return _Layout(columns, height, width, step, row_step)


def _find(layout: _Layout, name: str, stream: Stream) -> str:
    if name in layout.columns:
        return name
    there = [alias for alias in aliases(name) if alias in layout.columns]
    if len(there) != 1:
        why = f"several fields may be {name!r}: {choices(there)}; name one" if there else f"no field {name!r}"
        raise MessageError(f"{stream.topic}: {why}; the message has: {choices(layout.columns)}")
    return there[0]


def _view(message: Any, layout: _Layout, names: list[str]) -> np.ndarray | None:
    """The columns as one strided array on the message's own bytes; None where they do not lie so."""
    offsets = [layout.columns[name][1] for name in names]
    gaps = set(np.diff(offsets).tolist()) or {4}
    packed = layout.height == 1 or layout.row_step == layout.width * layout.point_step
    if not packed or len(gaps) != 1 or any(layout.columns[name][0] != np.float32 for name in names):
        return None
    return np.ndarray((layout.height * layout.width, len(names)), np.float32, buffer=message.data, offset=offsets[0],
                      strides=(layout.point_step, gaps.pop()))  # fmt: skip


def _column(message: Any, layout: _Layout, name: str, unit: str) -> np.ndarray:
    """One column (height, width) in its own type, on the message's bytes; absolute times relative to the header."""
    dtype, offset = layout.columns[name]
    column = np.ndarray((layout.height, layout.width), dtype, buffer=message.data, offset=offset,
                        strides=(layout.row_step, layout.point_step))  # fmt: skip
    if name not in ABSOLUTE_TIMES or dtype.itemsize < 8:
        return column
    if unit not in UNIT_NS:
        raise MessageError(f"field {name!r} is an absolute time in {unit!r}; choices of the unit: {choices(UNIT_NS)}")
    stamp = message.header.stamp
    return column - (int(stamp.sec) * NANOSECONDS + int(stamp.nanosec)) / UNIT_NS[unit]
