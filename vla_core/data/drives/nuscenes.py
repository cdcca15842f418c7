"""nuScenes (Caesar et al. 2020) as messages, a drive a scene.

The layout is that of nuscenes.org's download, as its devkit documents it (docs/schema_nuscenes.md):

    v1.0-mini/{scene,sample,sample_data,calibrated_sensor,sensor,ego_pose}.json     tables of records with tokens
    samples/CAM_FRONT/*.jpg, samples/LIDAR_TOP/*.pcd.bin, samples/RADAR_FRONT/*.pcd  key frames, 2 Hz
    sweeps/…                                                                         what lies between them
    can_bus/scene-0061_ms_imu.json                                                   the CAN bus extension, where it is

Timestamps are microseconds, quaternions w, x, y, z. The ego frame is REP 103's at the middle of the rear axle, on the
ground: ``base_link``. A LiDAR sweep is float32 x, y, z, intensity, ring; a radar's is a binary PCD with vx and vy in
the sensor's frame, from which the radial velocity is made (positive is receding).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.data.drives.drive import Drive, DriveError, cloud
from vla_core.data.drives.driven import DrivenPath, pose_of, transform_of
from vla_core.errors import choices
from vla_core.observation import messages, writing

TABLES = ("scene", "sample", "sample_data", "calibrated_sensor", "sensor", "ego_pose")
LIDAR_COLUMNS = ("x", "y", "z", "intensity", "ring")
RADAR_COLUMNS = ("x", "y", "z", "velocity", "rcs")
PCD_KINDS = {"F": "f", "I": "i", "U": "u"}
MICROSECOND_NS = 1000


class NuScenes:
    """A download at ``root``; ``version`` is the folder of its tables. ``sweeps`` False takes the key frames alone."""

    def __init__(self, root: Path, version: str | None = None, sweeps: bool = True) -> None:
        found = sorted(path.name for path in root.glob("v1.0-*") if path.is_dir())
        if not found:
            raise DriveError(f"{root}: no folder v1.0-… with tables in it; expected nuScenes as it is downloaded")
        if version is None and len(found) > 1:
            raise DriveError(f"{root}: several versions, choose one with --version: {choices(found)}")
        version = version or found[0]
        if version not in found:
            raise DriveError(f"{root}: no version {version!r}; choices: {choices(found)}")
        self.root, self.sweeps = root, sweeps
        self.tables = {name: _table(root / version / f"{name}.json") for name in TABLES}

    def drives(self) -> list[Drive]:
        """A drive per scene."""
        return [Scene(self, scene) for scene in self.tables["scene"].values()]

    @cached_property
    def by_sample(self) -> dict[str, list[dict[str, Any]]]:
        """The records of sensor data of each sample."""
        found: dict[str, list[dict[str, Any]]] = {}
        for record in self.tables["sample_data"].values():
            found.setdefault(record["sample_token"], []).append(record)
        return found


class Scene(Drive):
    """One scene of about 20 s."""

    def __init__(self, source: NuScenes, record: dict[str, Any]) -> None:
        self._source, self._record = source, record
        self.name = str(record["name"])

    @cached_property
    def _data(self) -> list[dict[str, Any]]:
        """The scene's sensor data in the order of time."""
        source, found = self._source, []
        token = self._record["first_sample_token"]
        while token:
            found += [r for r in source.by_sample.get(token, ()) if source.sweeps or r["is_key_frame"]]
            token = source.tables["sample"][token]["next"]
        return sorted(found, key=lambda r: (r["timestamp"], r["token"]))

    @cached_property
    def path(self) -> DrivenPath:
        poses = self._source.tables["ego_pose"]
        by_stamp = {r["timestamp"]: poses[r["ego_pose_token"]] for r in self._data}
        stamps = np.array(sorted(by_stamp), dtype=np.int64)
        if len(stamps) < 2:
            raise DriveError(f"{self.name}: {len(stamps)} instants of sensor data, expected a drive")
        rows = [_pose(by_stamp[stamp]) for stamp in stamps.tolist()]
        return DrivenPath(stamps * MICROSECOND_NS, np.stack(rows))

    def frames(self) -> dict[str, np.ndarray]:
        tables = self._source.tables
        tokens = dict.fromkeys(r["calibrated_sensor_token"] for r in self._data)
        found = {}
        for token in tokens:
            record = tables["calibrated_sensor"][token]
            transform = transform_of(record["translation"], record["rotation"])
            found[_stream(tables, token)] = pose_of(transform)
        return found

    def sensors(self) -> Iterator[tuple[str, int, bytes]]:
        imu = list(self._imu())
        for record in self._data:
            stamp_ns = record["timestamp"] * MICROSECOND_NS
            while imu and imu[0][1] <= stamp_ns:
                yield imu.pop(0)
            yield from self._sensor(record, stamp_ns)
        yield from imu

    def _sensor(self, record: dict[str, Any], stamp_ns: int) -> Iterator[tuple[str, int, bytes]]:
        tables = self._source.tables
        name = _stream(tables, record["calibrated_sensor_token"])
        file = self._source.root / record["filename"]
        if not file.is_file():
            hint = "" if record["is_key_frame"] else "; without the sweeps' files take --keyframes"
            raise DriveError(f"{self.name}: {file} is missing{hint}")
        if name.startswith("lidar"):
            points = np.fromfile(file, dtype="<f4")
            if len(points) % len(LIDAR_COLUMNS):
                raise DriveError(f"{file}: {len(points)} numbers are no rows of {', '.join(LIDAR_COLUMNS)}")
            rows = points.reshape(-1, len(LIDAR_COLUMNS))
            yield name, stamp_ns, cloud(stamp_ns, rows, LIDAR_COLUMNS, name)
        elif name.startswith("radar"):
            yield name, stamp_ns, cloud(stamp_ns, radar_points(file), RADAR_COLUMNS, name)
        else:
            calibrated = tables["calibrated_sensor"][record["calibrated_sensor_token"]]
            intrinsics = np.array(calibrated["camera_intrinsic"], dtype=np.float64)
            if intrinsics.shape != (3, 3):
                raise DriveError(f"{self.name}: {name} has no camera_intrinsic of 3x3 numbers")
            encoded = np.fromfile(file, dtype=np.uint8)
            yield name, stamp_ns, messages.compressed_image(stamp_ns, encoded, "rgb8; jpeg compressed bgr8", name)
            height, width = int(record["height"]), int(record["width"])
            yield f"{name}_info", stamp_ns, writing.camera_info(stamp_ns, intrinsics, height, width, name)

    def _imu(self) -> Iterator[tuple[str, int, bytes]]:
        """The IMU of the CAN bus extension; nothing without it."""
        file = self._source.root / "can_bus" / f"{self.name}_ms_imu.json"
        if not file.is_file():
            return
        for record in sorted(_json(file), key=lambda r: r["utime"]):
            stamp_ns = record["utime"] * MICROSECOND_NS
            turning, force = np.array(record["rotation_rate"]), np.array(record["linear_accel"])
            yield "imu", stamp_ns, writing.imu(stamp_ns, None, turning, force, "imu")


def radar_points(file: Path) -> np.ndarray:
    """Columns x, y, z, velocity, rcs (N, 5) float32 of a binary PCD 0.7 file; raises :class:`DriveError` naming it."""
    data = file.read_bytes()
    head, mark, body = data.partition(b"DATA binary\n")
    entries = dict(line.split(" ", 1) for line in head.decode("ascii", "replace").splitlines() if " " in line)
    absent = [key for key in ("FIELDS", "SIZE", "TYPE", "POINTS") if key not in entries]
    if not mark or absent:
        raise DriveError(f"{file}: no binary PCD 0.7: {', '.join(absent) or 'DATA binary'} is missing")
    names, sizes, kinds = (entries[key].split() for key in ("FIELDS", "SIZE", "TYPE"))
    wanted = [name for name in ("x", "y", "z", "rcs", "vx", "vy") if name not in names]
    if wanted:
        raise DriveError(f"{file}: no field {', '.join(wanted)}; the file has {choices(names)}")
    columns = [(n, f"<{PCD_KINDS[kind]}{size}") for n, size, kind in zip(names, sizes, kinds, strict=True)]
    layout, count = np.dtype(columns), int(entries["POINTS"])
    if len(body) < count * layout.itemsize:
        raise DriveError(f"{file}: {len(body)} bytes for {count} points of {layout.itemsize}; it is cut")
    rows = np.frombuffer(body, layout, count)
    x, y, z = (rows[name].astype(np.float64) for name in "xyz")
    distance = np.maximum(np.sqrt(x**2 + y**2 + z**2), 1e-6)
    velocity = (rows["vx"] * x + rows["vy"] * y) / distance
    points = np.stack([x, y, z, velocity, rows["rcs"]], axis=1).astype(np.float32)
    return points[np.isfinite(points).all(axis=1)]


def _stream(tables: dict[str, dict[str, Any]], calibrated_token: str) -> str:
    """The name of a channel's stream: ``CAM_FRONT`` is ``front``, ``LIDAR_TOP`` ``lidar``."""
    sensor = tables["sensor"][tables["calibrated_sensor"][calibrated_token]["sensor_token"]]
    channel = str(sensor["channel"]).lower()
    return "lidar" if channel.startswith("lidar") else channel.removeprefix("cam_")


def _pose(record: dict[str, Any]) -> np.ndarray:
    return pose_of(transform_of(record["translation"], record["rotation"]))


def _table(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise DriveError(f"{file} is missing; expected the tables {', '.join(TABLES)}")
    return {record["token"]: record for record in _json(file)}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DriveError(f"{file}: no JSON: {error}") from None
