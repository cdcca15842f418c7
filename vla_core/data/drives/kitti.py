"""KITTI raw data (Geiger et al. 2013) as messages, a drive a folder ``…_sync``.

The layout is that of the raw data's development kit (cvlibs.net/datasets/kitti), synced and rectified:

    2011_09_26/calib_{cam_to_cam,velo_to_cam,imu_to_velo}.txt
    2011_09_26/2011_09_26_drive_0001_sync/
        image_02/{timestamps.txt,data/0000000000.png}           left colour camera; image_03 is the right one
        velodyne_points/{timestamps.txt,data/0000000000.bin}    float32 x, y, z, reflectance
        oxts/{timestamps.txt,data/0000000000.txt}               30 numbers of GPS and IMU

``base_link`` is the foot of the IMU on the road, 0.93 m below it. Poses are the development kit's: Mercator's
projection, scaled by the latitude of the first. A file that is missing (some sweeps are) leaves its instant out.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import numpy as np

from vla_core.contract import NANOSECONDS
from vla_core.data.drives.drive import Drive, DriveError, cloud
from vla_core.data.drives.driven import DrivenPath, pose_of
from vla_core.observation import messages, writing

EARTH_M = 6378137.0
IMU_HEIGHT_M = 0.93
CAMERAS = {"image_02": "front", "image_03": "front_right"}
LIDAR_COLUMNS = ("x", "y", "z", "intensity")
OXTS_NUMBERS = 30


def find_drives(root: Path) -> list[Drive]:
    """The drives below ``root``, which holds folders of days."""
    drives: list[Drive] = [KittiDrive(path) for path in sorted(root.glob("*/*_drive_*_sync")) if path.is_dir()]
    if not drives:
        raise DriveError(f"{root}: no folder <day>/<day>_drive_<number>_sync; expected KITTI's synced raw data")
    return drives


class KittiDrive(Drive):
    """One drive at 10 Hz."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = folder.name

    @cached_property
    def _calibration(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for name in ("cam_to_cam", "velo_to_cam", "imu_to_velo"):
            file = self._folder.parent / f"calib_{name}.txt"
            if not file.is_file():
                raise DriveError(f"{file} is missing; the calibration is a download of its own, by day")
            for line in file.read_text(encoding="utf-8").splitlines():
                key, _, numbers = line.partition(":")
                if key not in ("calib_time", "") and numbers.strip():
                    found[key if name == "cam_to_cam" else f"{name}.{key}"] = np.array(numbers.split(), dtype=float)
        return found

    def _entry(self, key: str, size: int) -> np.ndarray:
        if key not in self._calibration or len(self._calibration[key]) != size:
            raise DriveError(f"{self._folder.parent}: the calibration has no {key} of {size} numbers")
        return self._calibration[key]

    def _rigid(self, name: str) -> np.ndarray:
        transform = np.eye(4)
        transform[:3, :3] = self._entry(f"{name}.R", 9).reshape(3, 3)
        transform[:3, 3] = self._entry(f"{name}.T", 3)
        return transform

    def frames(self) -> dict[str, np.ndarray]:
        base_of_imu = np.eye(4)
        base_of_imu[2, 3] = IMU_HEIGHT_M
        base_of_lidar = base_of_imu @ np.linalg.inv(self._rigid("imu_to_velo"))
        rectified = np.eye(4)
        rectified[:3, :3] = self._entry("R_rect_00", 9).reshape(3, 3)
        base_of_rectified = base_of_lidar @ np.linalg.inv(rectified @ self._rigid("velo_to_cam"))
        found = {"lidar": pose_of(base_of_lidar), "imu": pose_of(base_of_imu)}
        for folder, name in CAMERAS.items():
            if (self._folder / folder).is_dir():
                projection = self._entry(f"P_rect_{folder[-2:]}", 12).reshape(3, 4)
                camera = np.eye(4)
                camera[:3, 3] = -np.linalg.inv(projection[:, :3]) @ projection[:, 3]
                found[name] = pose_of(base_of_rectified @ camera)
        return found

    @cached_property
    def _oxts(self) -> tuple[np.ndarray, np.ndarray]:
        """Stamps (N,) int64 ns and rows (N, 30)."""
        stamps, rows = [], []
        for stamp_ns, file in self._files("oxts", "txt"):
            numbers = np.array(file.read_text(encoding="utf-8").split(), dtype=float)
            if len(numbers) != OXTS_NUMBERS or not np.isfinite(numbers).all():
                raise DriveError(f"{file}: {len(numbers)} numbers, expected {OXTS_NUMBERS} finite ones")
            stamps.append(stamp_ns)
            rows.append(numbers)
        if len(rows) < 2:
            raise DriveError(f"{self._folder}/oxts: {len(rows)} instants, expected a drive")
        return np.array(stamps, dtype=np.int64), np.stack(rows)

    @cached_property
    def path(self) -> DrivenPath:
        stamps, rows = self._oxts
        poses = np.stack([pose_of(transform) for transform in oxts_poses(rows)])
        return DrivenPath(stamps, poses)

    def sensors(self) -> Iterator[tuple[str, int, bytes]]:
        stamps, rows = self._oxts
        entries: list[tuple[int, str, Path | np.ndarray]] = [
            (stamp_ns, "imu", row) for stamp_ns, row in zip(stamps.tolist(), rows, strict=True)
        ]
        entries += [(stamp_ns, "lidar", file) for stamp_ns, file in self._files("velodyne_points", "bin")]
        for folder in CAMERAS:
            if (self._folder / folder).is_dir():
                entries += [(stamp_ns, folder, file) for stamp_ns, file in self._files(folder, "png")]
        for stamp_ns, name, source in sorted(entries, key=lambda entry: entry[:2]):
            if isinstance(source, np.ndarray):
                yield name, stamp_ns, writing.imu(stamp_ns, None, source[17:20], source[11:14], "imu")
            elif name == "lidar":
                yield name, stamp_ns, self._sweep(stamp_ns, source)
            else:
                yield from self._picture(stamp_ns, name, source)

    def _sweep(self, stamp_ns: int, file: Path) -> bytes:
        points = np.fromfile(file, dtype="<f4")
        if len(points) % len(LIDAR_COLUMNS):
            raise DriveError(f"{file}: {len(points)} numbers are no rows of {', '.join(LIDAR_COLUMNS)}")
        return cloud(stamp_ns, points.reshape(-1, len(LIDAR_COLUMNS)), LIDAR_COLUMNS, "lidar")

    def _picture(self, stamp_ns: int, folder: str, file: Path) -> Iterator[tuple[str, int, bytes]]:
        name, number = CAMERAS[folder], folder[-2:]
        encoded = np.fromfile(file, dtype=np.uint8)
        yield name, stamp_ns, messages.compressed_image(stamp_ns, encoded, "rgb8; png compressed bgr8", name)
        width, height = self._entry(f"S_rect_{number}", 2).round().astype(int).tolist()
        intrinsics = self._entry(f"P_rect_{number}", 12).reshape(3, 4)[:, :3]
        yield f"{name}_info", stamp_ns, writing.camera_info(stamp_ns, intrinsics, height, width, name)

    def _files(self, folder: str, suffix: str) -> Iterator[tuple[int, Path]]:
        """Stamps and files: line n of the stamps belongs to the file of number n."""
        stamps = self._folder / folder / "timestamps.txt"
        if not stamps.is_file():
            raise DriveError(f"{stamps} is missing; expected KITTI's synced raw data")
        for number, line in enumerate(stamps.read_text(encoding="utf-8").splitlines()):
            file = stamps.parent / "data" / f"{number:010d}.{suffix}"
            if line.strip() and file.is_file():
                yield stamp_of(line), file


def stamp_of(line: str) -> int:
    """Nanoseconds of a line such as ``2011-09-26 13:02:25.964389445``, taken as UTC."""
    day, _, fraction = line.strip().partition(".")
    try:
        seconds = datetime.strptime(day, "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc).timestamp()
        return int(seconds) * NANOSECONDS + int(f"{fraction:0<9}"[:9] or 0)
    except ValueError:
        raise DriveError(f"no time stamp: {line.strip()!r}; expected one like 2011-09-26 13:02:25.964389445") from None


def oxts_poses(rows: np.ndarray) -> np.ndarray:
    """Poses (N, 4, 4) of ``base_link`` from rows (N, 30), which begin with latitude and longitude in degrees, altitude
    in m, and roll, pitch and yaw in rad; x points east, y north, and the first pose lies in the origin."""
    latitude, longitude, altitude, roll, pitch, yaw = rows[:, :6].T
    scale = np.cos(np.radians(latitude[0]))
    x = scale * np.radians(longitude) * EARTH_M
    y = scale * EARTH_M * np.log(np.tan(np.radians(90 + latitude) / 2))
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    cr, sr, cp, sp, cy, sy = np.cos(roll), np.sin(roll), np.cos(pitch), np.sin(pitch), np.cos(yaw), np.sin(yaw)
    poses[:, 0, :3] = np.stack([cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr], axis=1)
    poses[:, 1, :3] = np.stack([sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr], axis=1)
    poses[:, 2, :3] = np.stack([-sp, cp * sr, cp * cr], axis=1)
    place = np.stack([x, y, altitude], axis=1) + poses[:, :3, :3] @ np.array([0.0, 0.0, -IMU_HEIGHT_M])
    poses[:, :3, 3] = place - place[0]
    return poses
