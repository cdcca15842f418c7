"""Which observations of a contract a policy sees, in which form, and whether that can work at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vla_core.config import ConfigError
from vla_core.contract import RobotContract, Stream
from vla_core.errors import VlaError, choices
from vla_core.observation.decode import Kind, kinds
from vla_core.observation.ego_motion import POSE_TYPES
from vla_core.observation.point_cloud import TIMES, UNIT_NS
from vla_core.observation.vector import check_paths, quaternions


@dataclass(frozen=True, kw_only=True)
class ImageSize:
    """Model resolution of a camera, pixels."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ConfigError(f"height: expected at least 1x1 pixels, found {self.width}x{self.height}")


@dataclass(frozen=True, kw_only=True)
class CloudSpec:
    """How a model sees a point cloud: its columns are the stream's names, as (N, C) with N at most ``max_points``.

    Of a larger cloud every so many-th point is taken (``observation.point_cloud.subsample``). ``ego_motion`` names
    the odometry by which the clouds of past ticks are moved to where the sensor is in the newest one; ``mount`` is
    then the sensor's pose in the odometry's child frame: x, y, z in m and the quaternion x, y, z, w.
    """

    max_points: int
    ego_motion: str | None = None
    mount: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)

    def __post_init__(self) -> None:
        if self.max_points < 1:
            raise ConfigError(f"max_points: expected at least 1, found {self.max_points}")
        if len(self.mount) != 7 or not abs(sum(q * q for q in self.mount[3:]) - 1) < 1e-3:
            raise ConfigError(f"mount: expected x, y, z and a quaternion x, y, z, w of unit length, found {self.mount}")


@dataclass(frozen=True, kw_only=True)
class ObservationSpec:
    """Which observations of the contract a policy sees.

    ``images`` are cameras, ``state`` vectors joined in this order, ``clouds`` LiDARs and radars, ``sequences`` windows
    of vectors (IMU), ``maps`` depth or range-Doppler images, ``calibrations`` the ``CameraInfo`` stream of an image.
    ``history`` is the number of control ticks that are seen, the newest included.
    """

    images: dict[str, ImageSize] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    instruction: str | None = None
    clouds: dict[str, CloudSpec] = field(default_factory=dict)
    sequences: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    calibrations: dict[str, str] = field(default_factory=dict)
    history: int = 1

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ConfigError(f"history: expected at least 1 tick, found {self.history}")
        for name in self.calibrations:
            if name not in self.images:
                raise ConfigError(f"calibrations: no image {name!r}; choices: {choices(self.images)}")
        seen = [name for place, name, _ in self.uses() if not place.startswith("calibrations")]
        twice = sorted({name for name in seen if seen.count(name) > 1})
        if twice:
            raise ConfigError(f"{', '.join(twice)}: seen twice; one stream is one of images, state, instruction, "
                              "clouds, sequences or maps")  # fmt: skip
        for name, cloud in self.clouds.items():
            if cloud.ego_motion is not None and self.history == 1:
                raise ConfigError(f"clouds.{name}.ego_motion: moves clouds of past ticks, but history is 1")

    @property
    def names(self) -> tuple[str, ...]:
        """All streams that are needed, odometry for ego-motion compensation included."""
        odometry = (cloud.ego_motion for cloud in self.clouds.values() if cloud.ego_motion)
        return tuple(dict.fromkeys([*(name for _, name, _ in self.uses()), *odometry]))

    @property
    def extras(self) -> tuple[str, ...]:
        """What a model of single images, one state and an instruction does not take, by its place in the spec."""
        single = ("images", "state", "instruction")
        places = [place for place, _, _ in self.uses() if not place.startswith(single)]
        return (*places, *(("history",) if self.history > 1 else ()))

    def uses(self) -> Iterator[tuple[str, str, Kind]]:
        """(place in the spec, stream, what its values must be) of everything that is seen."""
        yield from ((f"images.{name}", name, "image") for name in self.images)
        yield from ((f"state.{name}", name, "vector") for name in self.state)
        if self.instruction:
            yield "instruction", self.instruction, "text"
        yield from ((f"clouds.{name}", name, "cloud") for name in self.clouds)
        yield from ((f"sequences.{name}", name, "vector") for name in self.sequences)
        yield from ((f"maps.{name}", name, "map") for name in self.maps)
        yield from ((f"calibrations.{image}", name, "calibration") for image, name in self.calibrations.items())


def check_spec(spec: ObservationSpec, contract: RobotContract) -> None:
    """Raise :class:`ConfigError` where the contract's streams cannot be what the spec wants of them."""
    for place, name, kind in spec.uses():
        stream = contract.stream(name)
        try:
            _check_use(stream, kind, windowed=place.startswith("sequences"))
        except VlaError as error:
            raise ConfigError(f"observation.{place}: {stream.type} on {stream.topic}: {error}") from None
    for name, cloud in spec.clouds.items():
        if cloud.ego_motion is None:
            continue
        odometry = contract.stream(cloud.ego_motion)
        place = f"observation.clouds.{name}.ego_motion"
        if odometry.type not in POSE_TYPES or odometry.latched:
            raise ConfigError(f"{place}: {cloud.ego_motion} is a {odometry.type}{' and latched' * odometry.latched}; "
                              f"expected a stream with a rate of one of {choices(POSE_TYPES)}")  # fmt: skip
        if not {"x", "y", "z"} <= set(contract.stream(name).names):
            raise ConfigError(f"{place}: only a cloud whose names have x, y and z can be moved, "
                              f"found {choices(contract.stream(name).names)}")  # fmt: skip


def _check_use(stream: Stream, kind: Kind, windowed: bool) -> None:
    possible = kinds(stream.type)
    if possible and kind not in possible:
        raise ConfigError(f"is no {kind} but {' or '.join(possible)}")
    if windowed != (stream.sampling == "window"):
        raise ConfigError(f"sampling {stream.sampling!r}: a sequence needs sampling 'window', and nothing else has it")
    if stream.sampling == "interpolate" and kind != "vector":
        raise ConfigError(f"sampling 'interpolate' is for vectors, not for a {kind}; choices: hold, nearest")
    if kind in ("vector", "cloud") and not stream.names:
        raise ConfigError(f"names: a {kind} needs the names of its {'entries' if kind == 'vector' else 'columns'}")
    if kind == "vector" and stream.type != "sensor_msgs/msg/JointState" and possible:
        check_paths(stream.type, stream.names)
        if stream.sampling == "interpolate":
            quaternions(stream.names)
    for name, unit in zip(stream.names, stream.units, strict=True):
        if kind == "cloud" and name in TIMES and unit not in UNIT_NS:
            raise ConfigError(f"units: {name} is a time in {unit!r}; choices: {choices(UNIT_NS)}")
