"""The vehicle's sensors: samples at their own rates while the world moves, handed over as a contract's messages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_core.contract import RobotContract, Stream
from vla_core.errors import choices
from vla_core.observation import writing
from vla_core.observation.messages import Message
from vla_core.sim.base import IMAGES, SimulationError, picture_message
from vla_core.sim.driving.camera import Cameras
from vla_core.sim.driving.imu import Imu, WheelOdometry
from vla_core.sim.driving.layout import EgoState, Raster, RoadUser
from vla_core.sim.driving.lidar import Lidar
from vla_core.sim.driving.mounts import BASE, CAMERAS, FRAMES, MOUNTS, intrinsics, rotation
from vla_core.sim.driving.radar import BEAMS, Motion, Radar
from vla_core.sim.driving.scene import TIMESTEP_S, Scene
from vla_core.sim.driving.vehicle import Vehicle

IMAGE_INFO, CLOUD = "sensor_msgs/msg/CameraInfo", "sensor_msgs/msg/PointCloud2"
IMU, ODOMETRY = "sensor_msgs/msg/Imu", "nav_msgs/msg/Odometry"
TRANSFORMS, MARKERS = "tf2_msgs/msg/TFMessage", "visualization_msgs/msg/MarkerArray"
INFO = "_info"  # ends the name of a camera's calibration
STEP_NS = round(TIMESTEP_S * 1e9)
IMU_STEPS, ODOMETRY_STEPS, LIDAR_STEPS, RADAR_STEPS = 4, 8, 8, 40  # 100, 50, 50 (a fifth of a sweep) and 10 Hz
MAP = "map"
COLOURS = {"car": (0.2, 0.4, 0.9), "bus": (0.9, 0.6, 0.1), "truck": (0.3, 0.6, 0.4), "pedestrian": (0.9, 0.2, 0.2),
           "cyclist": (0.2, 0.8, 0.8)}  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Wanted:
    """Which sensors a contract asks for: sensor to its streams, one of each topic."""

    cameras: dict[str, Stream]
    calibrations: dict[str, Stream]
    clouds: dict[str, Stream]
    imu: tuple[Stream, ...]
    odometry: tuple[Stream, ...]


def wanted(contract: RobotContract) -> Wanted:
    """Raises :class:`SimulationError` for a stream that the vehicle has no sensor for."""
    found = Wanted(cameras={}, calibrations={}, clouds={}, imu=(), odometry=())
    imu: dict[str, Stream] = {}
    odometry: dict[str, Stream] = {}
    for name, stream in contract.observations.items():
        camera = name.removesuffix(INFO)
        frame = FRAMES.get(name)
        if stream.type in IMAGES and name in CAMERAS:
            found.cameras[name] = stream
        elif stream.type == IMAGE_INFO and camera in CAMERAS and camera != name:
            found.calibrations[camera], frame = stream, FRAMES[camera]
        elif stream.type == CLOUD and name in MOUNTS and name not in CAMERAS:
            found.clouds[name] = stream
        elif stream.type == IMU:
            imu[stream.topic], frame = stream, FRAMES["imu"]
        elif stream.type == ODOMETRY:
            odometry[stream.topic], frame = stream, "odom"
        elif not stream.latched:
            has = [*CAMERAS, *(camera + INFO for camera in CAMERAS), "lidar", *BEAMS, "imu", "odom"]
            raise SimulationError(f"contract {contract.name!r}: the simulated vehicle has no {name!r} of type "
                                  f"{stream.type}; choices: {choices(has)}")  # fmt: skip
        if frame is not None and stream.frame_id not in (None, frame):
            raise SimulationError(f"contract {contract.name!r}: {name!r} is in the frame {frame!r} here, the contract "
                                  f"says {stream.frame_id!r}")  # fmt: skip
    return Wanted(cameras=found.cameras, calibrations=found.calibrations, clouds=found.clouds,
                  imu=tuple(imu.values()), odometry=tuple(odometry.values()))  # fmt: skip


class Sensors:
    """Samples what the contract asks for, and nothing else.

    Each sensor has its own random numbers, so that leaving one out changes no other.
    """

    def __init__(self, contract: RobotContract, scene: Scene, data: Any, vehicle: Vehicle, ground: Raster,
                 seed: int) -> None:  # fmt: skip
        self.wanted = wanted(contract)
        self._data, self._vehicle = data, vehicle
        random = {name: np.random.default_rng([seed, 100 + i]) for i, name in enumerate((*MOUNTS, "odometry"))}
        clouds = self.wanted.clouds
        self._lidar = Lidar(scene, data, ground, random["lidar"]) if "lidar" in clouds else None
        self._radars = {name: Radar(name, scene, data, random[name]) for name in clouds if name in BEAMS}
        self._imu = Imu(random["imu"]) if self.wanted.imu else None
        self._odometry = WheelOdometry(random["odometry"]) if self.wanted.odometry else None
        self._axes = {name: rotation(mount) for name, mount in MOUNTS.items()}
        self._waiting: list[tuple[int, str, Any]] = []

    def sample(self, step: int, users: np.ndarray, rates: np.ndarray) -> None:
        """Sample the sensors that are due after physics step ``step``.

        ``users`` (U, 3) m/s and ``rates`` (U,) rad/s are the road users' velocities in the map.
        """
        if self._imu and step % IMU_STEPS == 0:
            self._waiting.append((step, "imu", self._imu.measure(self._data.sensordata[3:], self._data.sensordata[:3])))
        if self._odometry and step % ODOMETRY_STEPS == 0:
            self._odometry.add(self._vehicle.wheel_speeds()[:2], ODOMETRY_STEPS * TIMESTEP_S)
            found = (*self._odometry.pose.tolist(), self._odometry.speed, self._odometry.yaw_rate)
            self._waiting.append((step, "odometry", found))
        if self._lidar and step % LIDAR_STEPS == 0:
            cloud = self._lidar.fire(*self._place("lidar"), step * TIMESTEP_S)
            if cloud is not None:
                self._waiting.append((step, "lidar", cloud))
        if self._radars and step % RADAR_STEPS == 0:
            for name, radar in self._radars.items():
                position, axes = self._place(name)
                motion = Motion(sensor=self._velocity(name), users=users, rates=rates)
                self._waiting.append((step, name, radar.scan(position, axes, motion)))

    def messages(self, step: int, stamp_ns: int) -> list[Message]:
        """What was sampled since the last call, oldest first; ``stamp_ns`` is the stamp of physics step ``step``."""
        found = []
        for at, sensor, values in self._waiting:
            found += self._written(sensor, values, stamp_ns - (step - at) * STEP_NS)
        self._waiting.clear()
        return found

    def pictures(self, cameras: Cameras, stamp_ns: int) -> list[Message]:
        """The cameras' pictures and calibrations, stamped ``stamp_ns``."""
        return self._shown(cameras.pictures(tuple(self.wanted.cameras)), cameras.size, stamp_ns)

    def black_pictures(self, size: int, stamp_ns: int) -> list[Message]:
        """The same of cameras that see nothing, which are not drawn."""
        black = np.zeros((size, size, 3), np.uint8)
        return self._shown(dict.fromkeys(self.wanted.cameras, black), size, stamp_ns)

    def _shown(self, seen: dict[str, np.ndarray], size: int, stamp_ns: int) -> list[Message]:
        pictures = [
            picture_message(stream, stamp_ns, seen[name], FRAMES[name]) for name, stream in self.wanted.cameras.items()
        ]
        calibrations = [
            Message(stream.topic, IMAGE_INFO, stamp_ns,
                    writing.camera_info(stamp_ns, intrinsics(name, size), size, size, FRAMES[name]))
            for name, stream in self.wanted.calibrations.items()
        ]  # fmt: skip
        return pictures + calibrations

    def _place(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and axes (3, 3) of a sensor in the map."""
        base = self._base()
        return self._data.qpos[:3] + base @ np.array(MOUNTS[name][:3]), base @ self._axes[name]

    def _velocity(self, name: str) -> np.ndarray:
        """Of a sensor in the map, (3,) m/s; a free joint's angular velocity is in the body's frame."""
        return self._data.qvel[:3] + self._base() @ np.cross(self._data.qvel[3:6], MOUNTS[name][:3])

    def _base(self) -> np.ndarray:
        w, x, y, z = self._data.qpos[3:7].tolist()
        return rotation((0.0, 0.0, 0.0, x, y, z, w))

    def _written(self, sensor: str, values: Any, stamp_ns: int) -> list[Message]:
        if sensor == "imu":
            data = writing.imu(stamp_ns, None, values[:3].tolist(), values[3:].tolist(), FRAMES["imu"])
            return [Message(stream.topic, IMU, stamp_ns, data) for stream in self.wanted.imu]
        if sensor == "odometry":
            x, y, heading, speed, rate = values
            data = writing.odometry(stamp_ns, flat_pose(x, y, heading), (speed, 0.0, 0.0), (0.0, 0.0, rate))
            return [Message(stream.topic, ODOMETRY, stamp_ns, data) for stream in self.wanted.odometry]
        data = writing.point_cloud(stamp_ns, values, FRAMES[sensor])
        return [Message(self.wanted.clouds[sensor].topic, CLOUD, stamp_ns, data)]


def flat_pose(x: float, y: float, heading: float, z: float = 0.0) -> tuple[float, ...]:
    """A pose (7,) in the plane: x, y, z and quaternion x, y, z, w."""
    return x, y, z, 0.0, 0.0, math.sin(heading / 2), math.cos(heading / 2)


def static_transforms(stamp_ns: int) -> Message:
    """``/tf_static`` of the mounts."""
    mounts = {FRAMES[name]: mount for name, mount in MOUNTS.items()}
    return Message("/tf_static", TRANSFORMS, stamp_ns, writing.transforms(stamp_ns, BASE, mounts))


def ground_truth(stamp_ns: int, ego: EgoState, users: tuple[RoadUser, ...]) -> list[Message]:
    """Where everything really is, in the frame map: ``ground_truth/odom`` and ``ground_truth/objects``."""
    pose = flat_pose(ego.pose.x, ego.pose.y, ego.pose.heading)
    odometry = writing.odometry(stamp_ns, pose, (ego.speed_mps, 0.0, 0.0), (0.0, 0.0, ego.yaw_rate), MAP)
    boxes = [
        (user.id, user.kind, flat_pose(user.pose.x, user.pose.y, user.pose.heading, user.size[2] / 2), user.size,
         (*COLOURS[user.kind], 0.8))
        for user in users
    ]  # fmt: skip
    return [
        Message("ground_truth/odom", ODOMETRY, stamp_ns, odometry),
        Message("ground_truth/objects", MARKERS, stamp_ns, writing.boxes(stamp_ns, boxes, MAP, 400_000_000)),
    ]
