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
from typing import Any, NamedTuple

import numpy as np
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from vla_core.contract import NANOSECONDS
from vla_core.errors import VlaError
from vla_core.observation.definitions import DEFINITIONS
from vla_core.resources import share

_LITTLE, _BIG = struct.Struct("<iI"), struct.Struct(">iI")  # a stamp's seconds and nanoseconds
_COUNT = struct.Struct("<I")
_JOINT_STATE = "sensor_msgs/msg/JointState"
OWN_MESSAGES = ("ActionChunk", "Episode", "Tick", "TrajectoryPoint", "Trajectory")


class MessageError(VlaError):
    """A message that is not what its contract says."""


@dataclass(slots=True, unsafe_hash=True)  # not frozen: a bag makes a million of them, and that takes four times as long
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
    """The message types of ROS 2 Kilted, ackermann_msgs and this package; :func:`known_type` adds installed ones."""
    store = get_typestore(Stores.ROS2_KILTED)
    for name, text in DEFINITIONS["ackermann_msgs"].items():
        store.register(get_types_from_msg(text, f"ackermann_msgs/msg/{name}"))
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
    if type_name == _JOINT_STATE and (known := _known_joint_state(data)) is not None:
        return known
    try:
        return typestore().deserialize_cdr(memoryview(data), type_name)  # slices of bytes would be copies
    except Exception as error:  # rosbags raises several types on malformed bytes, struct.error among them
        raise MessageError(f"{len(data)} bytes do not decode as {type_name}: {error}") from None


def _known_joint_state(data: bytes | memoryview) -> Any | None:
    """A ``sensor_msgs/JointState`` whose names and frame are those of an earlier message; None for any other bytes.

    Decoding and checking names that never change takes most of the time of decoding such a message, and robots send
    them faster than anything else.
    """
    if len(data) < 24 or data[0] or data[1] != 1:  # a header, two empty texts or counts; little-endian CDR
        return None
    found = _joint_names.get(len(data))
    if found is None or data[12 : found.end] != found.block:
        found = _learn_joint_names(data)
        if found is None:
            return None
    place, arrays = found.end, []
    for _ in range(3):  # position, velocity, effort
        if place + 4 > len(data):
            return None
        (count,) = _COUNT.unpack_from(data, place)
        place += 4
        if count:
            place += (4 - place) % 8  # doubles are aligned from behind the 4 bytes of the encapsulation on
        if place + 8 * count > len(data):
            return None
        arrays.append(np.frombuffer(data, "<f8", count, place))
        place += 8 * count
    if len(data) - place > 3:
        return None
    types = typestore().types
    stamp = types["builtin_interfaces/msg/Time"](*_LITTLE.unpack_from(data, 4))
    return types[_JOINT_STATE](types["std_msgs/msg/Header"](stamp, found.frame_id), list(found.names), *arrays)


class _JointNames(NamedTuple):
    """Bytes 12 to ``end`` of a message, ``block``, and what they say."""

    block: bytes
    end: int
    frame_id: str
    names: list[str]


_joint_names: dict[int, _JointNames] = {}  # by the length of the message


def _learn_joint_names(data: bytes | memoryview) -> _JointNames | None:
    """Remember where the names of a message end; None where they are not what they should be."""
    try:
        message: Any = typestore().deserialize_cdr(memoryview(data), _JOINT_STATE)
    except Exception:  # rosbags raises several types on malformed bytes; the caller decodes again and names the error
        return None
    end = 16 + len(message.header.frame_id.encode()) + 1
    end += -end % 4 + 4
    for name in message.name:
        end += -end % 4 + 4 + len(name.encode()) + 1
    end += -end % 4
    if len(_joint_names) >= 64:  # what is sent in ever new lengths is not worth remembering
        _joint_names.clear()
    found = _JointNames(bytes(data[12:end]), end, message.header.frame_id, message.name)
    _joint_names[len(data)] = found
    return found


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
