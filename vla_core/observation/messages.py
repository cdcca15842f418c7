"""ROS messages as the bytes that travel: CDR in, CDR out, without ROS.

Subscriptions hand over serialized bytes, bags hold the same bytes, and simulators publish bytes made here. One
decoder therefore serves live, recorded and simulated data. Message definitions are those of ROS 2 Kilted.
"""

from __future__ import annotations

import functools
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from vla_core.contract import NANOSECONDS
from vla_core.errors import VlaError
from vla_core.resources import share

_LITTLE, _BIG = struct.Struct("<iI"), struct.Struct(">iI")  # a stamp's seconds and nanoseconds
OWN_MESSAGES = ("ActionChunk", "Episode", "TrajectoryPoint", "Trajectory")


class MessageError(VlaError):
    """A message that is not what its contract says."""


@dataclass(frozen=True)
class Message:
    """Serialized message: ``stamp_ns`` is its header's stamp, or the time of receipt where it has no header.

    ``receive_ns`` is when it was recorded; None where that is not known.
    """

    topic: str
    type: str
    stamp_ns: int
    data: bytes
    receive_ns: int | None = field(default=None, compare=False)


@functools.cache
def typestore() -> Typestore:
    """The message types of ROS 2 Kilted and of this package; :func:`known_type` adds installed ones."""
    store = get_typestore(Stores.ROS2_KILTED)
    for name in OWN_MESSAGES:
        text = share(f"msg/{name}.msg").read_text(encoding="utf-8")
        store.register(get_types_from_msg(text, f"vla_ros/msg/{name}"))
    return store


def known_type(type_name: str) -> None:
    """Make sure that ``type_name`` is defined, from an installed message package if need be; raise otherwise."""
    if type_name in typestore().fielddefs:
        return
    package = type_name.split("/")[0]
    _register_installed(package)
    if type_name not in typestore().fielddefs:
        near = [name for name in typestore().fielddefs if name.startswith(f"{package}/")]
        raise MessageError(
            f"unknown message type {type_name!r}; known in {package!r}: {', '.join(sorted(near)) or '(nothing)'}; "
            f"install the package {package!r} and source its workspace"
        )


def _register_installed(package: str) -> None:
    """Learn the messages of an installed package, and of those it is made of, from its share folder's ``.msg``."""
    found: dict[str, Any] = {}
    for prefix in filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)):
        for file in sorted(Path(prefix, "share", package, "msg").glob("*.msg")):
            found |= get_types_from_msg(file.read_text(encoding="utf-8"), f"{package}/msg/{file.stem}")
    new = {name: fields for name, fields in found.items() if name not in typestore().fielddefs}
    typestore().register(new)
    for fields in new.values():
        for _, (kind, detail) in fields[1]:
            name = detail if kind == Nodetype.NAME else detail[0][1] if kind != Nodetype.BASE else ""
            if isinstance(name, str) and "/" in name and name not in typestore().fielddefs:
                _register_installed(name.split("/")[0])


def serialize(type_name: str, message: Any) -> bytes:
    """CDR bytes, little-endian, with the encapsulation header that rclpy and rosbag2 use."""
    return bytes(typestore().serialize_cdr(message, type_name))


def deserialize(type_name: str, data: bytes | memoryview) -> Any:
    """Message object whose arrays are views of ``data``; raises :class:`MessageError` when the bytes do not fit."""
    try:
        return typestore().deserialize_cdr(memoryview(data), type_name)  # slices of bytes would be copies
    except Exception as error:  # rosbags raises several types on malformed bytes, struct.error among them
        raise MessageError(f"{len(data)} bytes do not decode as {type_name}: {error}") from None


@functools.cache
def has_header(type_name: str) -> bool:
    """Whether the first field of ``type_name`` is a ``std_msgs/Header``."""
    known_type(type_name)
    fields = typestore().fielddefs[type_name][1]
    return bool(fields) and fields[0][1][1] == "std_msgs/msg/Header"


def header_stamp_ns(type_name: str, data: bytes | memoryview) -> int | None:
    """Stamp of a serialized message with a header, read without decoding the rest; None without a header."""
    if not has_header(type_name):
        return None
    if len(data) < 12:
        raise MessageError(f"{len(data)} bytes are too few for a {type_name}")
    seconds, nanoseconds = (_LITTLE if data[1] & 1 else _BIG).unpack_from(data, 4)
    return int(seconds) * NANOSECONDS + int(nanoseconds)


def time_message(stamp_ns: int) -> Any:
    """``builtin_interfaces/Time`` of integer nanoseconds."""
    seconds, nanoseconds = divmod(stamp_ns, NANOSECONDS)
    return typestore().types["builtin_interfaces/msg/Time"](sec=seconds, nanosec=nanoseconds)


def header(stamp_ns: int, frame_id: str = "") -> Any:
    """``std_msgs/Header``."""
    return typestore().types["std_msgs/msg/Header"](stamp=time_message(stamp_ns), frame_id=frame_id)


def joint_state(stamp_ns: int, names: tuple[str, ...], field: str, values: np.ndarray, frame_id: str = "") -> bytes:
    """Serialized ``sensor_msgs/JointState`` with ``values`` (len(names),) in its array ``field``."""
    arrays = {key: np.zeros(0) for key in ("position", "velocity", "effort")}
    arrays[field] = np.asarray(values, dtype=np.float64)
    cls = typestore().types["sensor_msgs/msg/JointState"]
    return serialize("sensor_msgs/msg/JointState", cls(header=header(stamp_ns, frame_id), name=list(names), **arrays))


def text(value: str) -> bytes:
    """Serialized ``std_msgs/String``."""
    return serialize("std_msgs/msg/String", typestore().types["std_msgs/msg/String"](data=value))


def image(stamp_ns: int, pixels: np.ndarray, frame_id: str = "") -> bytes:
    """Serialized ``sensor_msgs/Image``, rgb8, of ``pixels`` (H, W, 3) uint8 RGB."""
    height, width, _ = pixels.shape
    cls = typestore().types["sensor_msgs/msg/Image"]
    message = cls(
        header=header(stamp_ns, frame_id), height=height, width=width, encoding="rgb8", is_bigendian=0,
        step=3 * width, data=np.ascontiguousarray(pixels).reshape(-1),
    )  # fmt: skip
    return serialize("sensor_msgs/msg/Image", message)


def compressed_image(stamp_ns: int, encoded: np.ndarray, format: str, frame_id: str = "") -> bytes:
    """Serialized ``sensor_msgs/CompressedImage`` of ``encoded`` (bytes,) uint8."""
    cls = typestore().types["sensor_msgs/msg/CompressedImage"]
    message = cls(header=header(stamp_ns, frame_id), format=format, data=encoded.reshape(-1))
    return serialize("sensor_msgs/msg/CompressedImage", message)
