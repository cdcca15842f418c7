"""Vectors out of messages: entries named by dotted paths, such as ``pose.pose.position.x``, and joints by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from rosbags.interfaces import Nodetype

from vla_core.contract import Stream
from vla_core.errors import choices
from vla_core.observation.messages import MessageError, known_type, typestore

TEXTS = ("string", "wstring")
# REP 145: an IMU driver sets the first covariance to -1 where it does not measure the quantity at all.
IMU_COVARIANCES = {name: f"{name}_covariance" for name in ("orientation", "angular_velocity", "linear_acceleration")}


def joints(message: Any, stream: Stream) -> np.ndarray:
    """Entries ``stream.names`` of a ``sensor_msgs/JointState``, (len(names),) float64."""
    values = np.asarray(getattr(message, stream.field or "position"))
    if len(values) != len(message.name):
        raise MessageError(f"{stream.topic}: {len(message.name)} names but {len(values)} values in {stream.field!r}")
    if tuple(message.name) == stream.names:  # the usual case costs no search
        return values
    index = {name: i for i, name in enumerate(message.name)}
    absent = [name for name in stream.names if name not in index]
    if absent:
        raise MessageError(f"{stream.topic}: no entry {', '.join(absent)}; the message has: {choices(index)}")
    return values[[index[name] for name in stream.names]]


def numbers(message: Any, stream: Stream) -> np.ndarray:
    """Entries ``stream.names``, dotted paths, of any message, (len(names),) float64."""
    return np.array([reader(message) for reader in _readers(stream.type, stream.names)], dtype=np.float64)


def imu(message: Any, stream: Stream) -> np.ndarray:
    """Entries of a ``sensor_msgs/Imu``; what it declares as not measured is refused."""
    for quantity, covariance in IMU_COVARIANCES.items():
        if getattr(message, covariance)[0] == -1 and any(name.startswith(f"{quantity}.") for name in stream.names):
            raise MessageError(f"{stream.topic}: this IMU does not measure {quantity} ({covariance}[0] is -1, "
                               "REP 145); take it out of names")  # fmt: skip
    return numbers(message, stream)


def paths(type_name: str) -> list[str]:
    """Dotted paths of all numbers of a message type; ``<i>`` stands for an index, headers are left out."""
    known_type(type_name)
    return list(_paths(type_name))


def check_paths(type_name: str, names: Iterable[str]) -> None:
    """Raise :class:`MessageError` unless each of ``names`` is the path of a number of ``type_name``."""
    _readers(type_name, tuple(names))


def quaternions(names: tuple[str, ...]) -> list[list[int]]:
    """Positions (x, y, z, w) of the quaternions among dotted paths; raises when one is there in part.

    A quaternion is told by its field's name: ``orientation`` or ``rotation``.
    """
    found: dict[str, dict[str, int]] = {}
    for i, name in enumerate(names):
        parent, _, leaf = name.rpartition(".")
        if parent.rpartition(".")[2] in ("orientation", "rotation"):
            found.setdefault(parent, {})[leaf] = i
    for parent, parts in found.items():
        if set(parts) != set("xyzw"):
            raise MessageError(f"a rotation is interpolated whole: name {parent}.x, .y, .z and .w, not only "
                               f"{choices(parts)}")  # fmt: skip
    return [[parts[axis] for axis in "xyzw"] for parts in found.values()]


def slerp(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    """From quaternion ``a`` (4,) to ``b`` the shorter way, at constant angular velocity (Shoemake 1985).

    The result has unit length, and the sign of ``a``.
    """
    norms = np.linalg.norm(a), np.linalg.norm(b)
    if not min(norms) > 1e-6:
        raise MessageError(f"a quaternion of length {min(norms):.3g} is no rotation")
    a, b = a / norms[0], b / norms[1]
    cosine = float(a @ b)
    b = b if cosine >= 0 else -b  # q and -q are the same rotation
    angle = np.arccos(min(abs(cosine), 1.0))
    if angle < 1e-4:  # the sines vanish; here the chord is the arc to the last digit
        blended = (1 - weight) * a + weight * b
    else:
        blended = (np.sin((1 - weight) * angle) * a + np.sin(weight * angle) * b) / np.sin(angle)
    return blended / np.linalg.norm(blended)


def blend(a: np.ndarray, b: np.ndarray, weight: float, rotations: list[list[int]]) -> np.ndarray:
    """From vector ``a`` (D,) at weight 0 to ``b`` at 1: linearly, and along the arc where it holds quaternions."""
    values = (1 - weight) * a + weight * b
    for places in rotations:
        values[places] = slerp(a[places], b[places], weight)
    return values


@functools.cache
def _readers(type_name: str, names: tuple[str, ...]) -> list[Callable[[Any], Any]]:
    known_type(type_name)
    return [_reader(type_name, name) for name in names]


def _reader(type_name: str, path: str) -> Callable[[Any], Any]:
    """The function that reads ``path``; wrong paths are refused by the definition of the type, before any message."""
    steps: list[Callable[[Any], Any]] = []
    kind: Nodetype = Nodetype.NAME
    detail: Any = type_name
    for part in path.split("."):
        if kind == Nodetype.NAME and part in (fields := dict(typestore().fielddefs[detail][1])):
            kind, detail = fields[part]
            steps.append(functools.partial(_attribute, part))
        elif kind in (Nodetype.ARRAY, Nodetype.SEQUENCE) and part.isdecimal():
            if kind == Nodetype.ARRAY and int(part) >= detail[1]:
                raise MessageError(f"{type_name} has no number at {path!r}: {detail[1]} elements there")
            kind, detail = detail[0]
            steps.append(functools.partial(_element, path, int(part)))
        else:
            kind, detail = Nodetype.BASE, ("string", 0)
            break
    if kind != Nodetype.BASE or detail[0] in TEXTS:
        raise MessageError(f"{type_name} has no number at {path!r}; choices: {', '.join(paths(type_name)) or '(none)'}")
    return lambda message: functools.reduce(lambda value, step: step(value), steps, message)


def _attribute(name: str, message: Any) -> Any:
    return getattr(message, name)


def _element(path: str, index: int, values: Any) -> Any:
    if index >= len(values):
        raise MessageError(f"no element {index} of {path}: the message has {len(values)}")
    return values[index]


def _paths(type_name: str) -> Iterator[str]:
    kind: Nodetype
    detail: Any
    for name, (kind, detail) in typestore().fielddefs[type_name][1]:
        place = name
        if kind in (Nodetype.ARRAY, Nodetype.SEQUENCE):
            (kind, detail), place = detail[0], f"{name}.<i>"
        if kind == Nodetype.BASE and detail[0] not in TEXTS:
            yield place
        elif kind == Nodetype.NAME and detail != "std_msgs/msg/Header":
            yield from (f"{place}.{inner}" for inner in _paths(detail))
