"""From serialized message to value: pixels, a map, points, a vector in the contract's order, a calibration, or text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from vla_core.contract import Stream
from vla_core.errors import choices
from vla_core.observation.calibration import Calibration, camera_info
from vla_core.observation.image import compressed_to_array, raw_to_array
from vla_core.observation.messages import MessageError, deserialize, known_type
from vla_core.observation.point_cloud import point_cloud
from vla_core.observation.radar import radar_scan
from vla_core.observation.vector import imu, joints, numbers

Value = np.ndarray | Calibration | str
Kind = Literal["image", "map", "cloud", "vector", "calibration", "text"]
Decoder = Callable[[Any, Stream], Value]

# Extend by assigning a function to a type name: DECODERS["my_msgs/msg/Tactile"] = decode_tactile. A type without a
# decoder is read as a vector, by the dotted paths in Stream.names.
DECODERS: dict[str, Decoder] = {
    "sensor_msgs/msg/Image": lambda message, stream: raw_to_array(message),
    "sensor_msgs/msg/CompressedImage": lambda message, stream: compressed_to_array(message),
    "sensor_msgs/msg/CameraInfo": lambda message, stream: camera_info(message),
    "sensor_msgs/msg/PointCloud2": point_cloud,
    "radar_msgs/msg/RadarScan": radar_scan,
    "sensor_msgs/msg/JointState": joints,
    "sensor_msgs/msg/Imu": imu,
    "std_msgs/msg/String": lambda message, stream: str(message.data),
}
# What the values of a type can be. A type that is not here is checked when its first message comes.
KINDS: dict[str, tuple[Kind, ...]] = {
    "sensor_msgs/msg/Image": ("image", "map"),
    "sensor_msgs/msg/CompressedImage": ("image", "map"),
    "sensor_msgs/msg/CameraInfo": ("calibration",),
    "sensor_msgs/msg/PointCloud2": ("cloud",),
    "radar_msgs/msg/RadarScan": ("cloud",),
    "sensor_msgs/msg/JointState": ("vector",),
    "sensor_msgs/msg/Imu": ("vector",),
    "std_msgs/msg/String": ("text",),
}


def decode(stream: Stream, data: bytes | memoryview) -> Value:
    """Decode one message of ``stream``; raises :class:`MessageError` naming the topic.

    Pictures become (H, W, 3) uint8 RGB, depth and range-Doppler maps (H, W), clouds (N, len(names)) float32,
    ``CameraInfo`` a :class:`Calibration`, ``String`` text, all others vectors (len(names),) float64 in the contract's
    order. A vector that is not finite is refused, a frame that is not the contract's too.
    """
    try:
        if stream.type not in DECODERS and not stream.names:
            raise MessageError(f"no decoder for {stream.type!r}; choices: {choices(DECODERS)}, or names, the dotted "
                               "paths of its numbers")  # fmt: skip
        message = deserialize(stream.type, data)
        _check_frame(message, stream)
        value = DECODERS.get(stream.type, numbers)(message, stream)
        _check_finite(value, stream)
        return value
    except MessageError as error:
        text = str(error)
        raise MessageError(text if text.startswith(stream.topic) else f"{stream.topic}: {text}") from None


def kinds(type_name: str) -> tuple[Kind, ...]:
    """What the values of a type can be; empty when only its decoder, registered elsewhere, knows."""
    known_type(type_name)
    return KINDS.get(type_name, () if type_name in DECODERS else ("vector",))


def is_kind(value: Value, kind: Kind, stream: Stream) -> bool:
    """Whether a decoded value of ``stream`` can be used as ``kind``."""
    if not isinstance(value, np.ndarray):
        return kind == ("text" if isinstance(value, str) else "calibration")
    return {
        "image": value.ndim == 3 and value.shape[-1] == 3 and value.dtype == np.uint8,
        "map": value.ndim == 2,
        "cloud": value.ndim == 2 and value.shape[-1] == len(stream.names) and value.dtype == np.float32,
        "vector": value.shape == (len(stream.names),),
    }.get(kind, False)


def _check_frame(message: Any, stream: Stream) -> None:
    if stream.frame_id is None:
        return
    found = getattr(getattr(message, "header", None), "frame_id", stream.frame_id)
    if found != stream.frame_id:
        raise MessageError(f"frame {found!r}, expected the contract's frame_id {stream.frame_id!r}")


def _check_finite(value: Value, stream: Stream) -> None:
    if isinstance(value, np.ndarray) and value.ndim == 1 and not np.isfinite(value).all():
        names = stream.names if len(stream.names) == len(value) else range(len(value))
        bad = [f"{name} is {number}" for name, number in zip(names, value, strict=True) if not np.isfinite(number)]
        raise MessageError(f"{', '.join(bad)}: not finite")
