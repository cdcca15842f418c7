"""``radar_msgs/RadarScan`` to columns by name, as a radar that sends a point cloud gives them."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla_core.contract import Stream
from vla_core.errors import choices
from vla_core.observation.messages import MessageError
from vla_core.observation.point_cloud import aliases, finite_rows

FIELDS = ("range", "azimuth", "elevation", "doppler_velocity", "amplitude")
COLUMNS = ("x", "y", "z", *FIELDS)


def radar_scan(message: Any, stream: Stream) -> np.ndarray:
    """Returns (N, len(names)) float32: x, y, z in m (x forward, y left, z up), or the scan's own fields.

    Azimuth is positive anticlockwise and elevation upwards, in rad (REP 103). ``amplitude`` is in dB and no radar
    cross-section: a name ``rcs`` is refused. Returns that are not finite are left out.
    """
    found = [_find(name, stream) for name in stream.names]
    rows = np.array([[getattr(entry, name) for name in FIELDS] for entry in message.returns], dtype=np.float64)
    distance, azimuth, elevation, velocity, amplitude = rows.reshape(-1, len(FIELDS)).T
    flat = distance * np.cos(elevation)
    columns = {
        "x": flat * np.cos(azimuth), "y": flat * np.sin(azimuth), "z": distance * np.sin(elevation),
        "range": distance, "azimuth": azimuth, "elevation": elevation, "doppler_velocity": velocity,
        "amplitude": amplitude,
    }  # fmt: skip
    return finite_rows(np.stack([columns[name] for name in found], axis=1).astype(np.float32))


def _find(name: str, stream: Stream) -> str:
    there = [alias for alias in (name, *aliases(name)) if alias in COLUMNS]
    if not there:
        raise MessageError(f"{stream.topic}: a radar scan has no column {name!r}; choices: {choices(COLUMNS)}")
    return there[0]
