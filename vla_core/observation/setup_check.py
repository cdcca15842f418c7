"""Whether a robot's sensors are set up as its policy was trained: frames, calibrations, columns, transforms.

What is wrong here is wrong with the robot's drivers and mounts, and stays wrong: a model would see places that are
elsewhere. A message that is only damaged is none of this module's business; decoding says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vla_core.contract import RobotContract
from vla_core.errors import choices
from vla_core.observation.calibration import camera_info
from vla_core.observation.decode import decode
from vla_core.observation.ego_motion import matrix
from vla_core.observation.messages import MessageError, deserialize
from vla_core.observation.point_cloud import aliases
from vla_core.observation.spec import ObservationSpec

TRANSFORMS = "tf2_msgs/msg/TFMessage"
DISTANCE_M, ANGLE_DEG = 0.05, 2.0  # how far a transform may be from the mount that the model was trained with
DEFAULT_BASE = "base_link"

Mounts = Mapping[str, Sequence[float]]  # by stream: x, y, z in m, quaternion x, y, z, w of the sensor in the base frame
Firsts = Mapping[str, bytes]  # by stream: its first message


class Transforms:
    """Frames and their parents, as ``/tf_static`` and ``/tf`` tell them; the newest word counts.

    ``refused`` says by child frame why a transform that came is none.
    """

    def __init__(self) -> None:
        self._parents: dict[str, tuple[str, np.ndarray]] = {}
        self.refused: dict[str, str] = {}

    def add(self, data: bytes | memoryview) -> None:
        """Take a ``tf2_msgs/TFMessage``; raises :class:`MessageError` for bytes that are none."""
        for stamped in deserialize(TRANSFORMS, data).transforms:
            t, q = stamped.transform.translation, stamped.transform.rotation
            pose = np.array([t.x, t.y, t.z, q.x, q.y, q.z, q.w])
            parent, child = stamped.header.frame_id.lstrip("/"), stamped.child_frame_id.lstrip("/")
            if not np.isfinite(pose).all() or abs(float(np.linalg.norm(pose[3:])) - 1) > 0.01:
                self.refused[child] = (f"{parent} -> {child} with {pose.tolist()}, expected finite numbers and a unit "
                                       "quaternion")  # fmt: skip
                continue
            pose[3:] /= np.linalg.norm(pose[3:])
            self._parents[child] = (parent, matrix(pose))
            self.refused.pop(child, None)

    def frames(self) -> list[str]:
        """All frames that are known."""
        return sorted({*self._parents, *(parent for parent, _ in self._parents.values())})

    def between(self, frame: str, base: str) -> np.ndarray | None:
        """The transform (4, 4) that takes points of ``frame`` to ``base``; None where nothing connects the two."""
        here, there = self._up(frame.lstrip("/")), self._up(base.lstrip("/"))
        common = next((name for name in here if name in there), None)
        return None if common is None else np.linalg.inv(there[common]) @ here[common]

    def _up(self, frame: str) -> dict[str, np.ndarray]:
        """Every frame above ``frame``, itself first, and the transform (4, 4) from ``frame`` to it."""
        found = {frame: np.eye(4)}
        while frame in self._parents:
            parent, step = self._parents[frame]
            if parent in found:  # a loop: nothing further up
                break
            found[parent] = step @ found[frame]
            frame = parent
        return found


def connected(contract: RobotContract, mounts: Mounts, firsts: Firsts, transforms: Transforms) -> bool:
    """Whether transforms connect every mounted sensor's frame to the base."""
    return not any(
        check_mount(contract, mounts, name, firsts, transforms, required=True)
        and not check_mount(contract, mounts, name, firsts, transforms, required=False)
        for name in mounts
    )


def base_frame(contract: RobotContract) -> str:
    """The frame that mounts are in: that of the actions, ``base_link`` where they name none."""
    return next((action.frame_id for action in contract.actions.values() if action.frame_id), DEFAULT_BASE)


def mounts_of(spec: ObservationSpec, model: Any) -> dict[str, Sequence[float]]:
    """The mounts by which a model with the configuration ``model`` places what it sees."""
    trained = {name: pose for name, pose in getattr(model, "mounts", {}).items() if name in spec.names}
    moved = {name: cloud.mount for name, cloud in spec.clouds.items() if cloud.ego_motion is not None}
    return {**moved, **trained}


def check(
    contract: RobotContract, spec: ObservationSpec, mounts: Mounts, firsts: Firsts, transforms: Transforms
) -> list[str]:
    """One line for everything that is wrong or missing, with topic, frame and field; empty when all is well.

    ``firsts`` holds the first message of every stream of ``spec`` that came, ``transforms`` all that came.
    """
    lines = []
    for name in spec.names:
        stream = contract.stream(name)
        if name in firsts:
            wrong = check_message(contract, name, firsts[name])
            lines += wrong or _undecodable(contract, name, firsts[name])
        elif not stream.latched:
            rate = "" if stream.rate_hz is None else f" at {stream.rate_hz:g} Hz"
            frame = "" if stream.frame_id is None else f", frame {stream.frame_id!r}"
            lines.append(f"{name} ({stream.topic}{frame}): found nothing, expected {stream.type}{rate}; start its "
                         "driver, or remap the topic")  # fmt: skip
    for image in spec.calibrations:
        lines += check_calibration(contract, spec, image, firsts)
    for name in mounts:
        lines += check_mount(contract, mounts, name, firsts, transforms, required=True)
    return lines


def check_message(contract: RobotContract, name: str, data: bytes) -> list[str]:
    """What a message of stream ``name`` says against its contract: frame, calibration and columns."""
    stream = contract.stream(name)
    try:
        message = deserialize(stream.type, data)
    except MessageError:
        return []
    frame = _frame(message)
    where = f"{name} ({stream.topic}, frame {frame!r})"
    lines = []
    if stream.frame_id is not None and frame is not None and frame != stream.frame_id:
        lines.append(f"{where}, header.frame_id: found {frame!r}, expected the contract's {stream.frame_id!r}; set it "
                     "in the driver, or train with a contract that says so")  # fmt: skip
    if stream.type == "sensor_msgs/msg/CameraInfo":
        if message.k[0] == 0:
            lines.append(f"{where}, K[0]: found 0, which says that the camera is not calibrated, expected the focal "
                         "length in pixels; calibrate it")  # fmt: skip
        elif not message.width or not message.height:
            lines.append(f"{where}, width and height: found {message.width}x{message.height}, expected the size of the "
                         "picture; calibrate the camera")  # fmt: skip
    if stream.type == "sensor_msgs/msg/PointCloud2":
        columns = list(_columns(message))
        for wanted in stream.names:
            if not any(alias in columns for alias in (wanted, *aliases(wanted))):
                unit = _unit(stream.units[stream.names.index(wanted)])
                lines.append(f"{where}, field {wanted!r}: found only {choices(columns)}, expected it in {unit}; have "
                             "the driver send it, or train without it")  # fmt: skip
    return lines


def check_calibration(contract: RobotContract, spec: ObservationSpec, image: str, firsts: Firsts) -> list[str]:
    """What the ``CameraInfo`` of a camera says against its pictures: size, after binning and region, and frame."""
    info = spec.calibrations[image]
    if image not in firsts or info not in firsts:
        return []
    streams = contract.stream(image), contract.stream(info)
    try:
        picture, told = (deserialize(s.type, firsts[name]) for s, name in zip(streams, (image, info), strict=True))
        calibration = camera_info(told)
        height, width = np.asarray(decode(streams[0], firsts[image])).shape[:2]
    except MessageError:
        return []  # it is told of each of them
    where = f"{info} ({streams[1].topic}, frame {_frame(told)!r})"
    of = f"{image} ({streams[0].topic}, frame {_frame(picture)!r})"
    lines = []
    if (calibration.width, calibration.height) != (width, height):
        lines.append(f"{where}, width and height: found the calibration of pictures of {calibration.width}x"
                     f"{calibration.height} (after binning and region of interest), expected the {width}x{height} of "
                     f"{of}; calibrate the camera at the size that it sends")  # fmt: skip
    if _frame(told) != _frame(picture):
        lines.append(f"{where}, header.frame_id: found {_frame(told)!r}, expected the {_frame(picture)!r} of {of}; a "
                     "picture and its calibration have one frame")  # fmt: skip
    return lines


def check_mount(
    contract: RobotContract, mounts: Mounts, name: str, firsts: Firsts, transforms: Transforms, required: bool
) -> list[str]:
    """What the transform of a sensor says against the mount that the model was trained with.

    ``required`` says that a transform must connect the sensor's frame to the base by now.
    """
    stream, base = contract.stream(name), base_frame(contract)
    frame = stream.frame_id
    if frame is None and name in firsts:
        try:
            frame = _frame(deserialize(stream.type, firsts[name]))
        except MessageError:
            return []
    if frame is None:
        return []
    where = f"{name} ({stream.topic}, frame {frame!r})"
    found = transforms.between(frame, base)
    if found is None:
        if not required:
            return []
        known = choices(transforms.frames()) if transforms.frames() else "none"
        refused = "".join(f" (refused: {why})" for why in transforms.refused.values())
        return [f"{where}, /tf_static: found the frames {known}{refused}, expected transforms that connect {frame!r} "
                f"to {base!r}; publish them, as robot_state_publisher or static_transform_publisher do"]  # fmt: skip
    trained = matrix(np.asarray(mounts[name], dtype=np.float64))
    apart_m = float(np.linalg.norm(found[:3, 3] - trained[:3, 3]))
    apart_deg = _angle_deg(found[:3, :3].T @ trained[:3, :3])
    if apart_m <= DISTANCE_M and apart_deg <= ANGLE_DEG:
        return []
    return [f"{where}, /tf_static: found it at {_place(found)} in {base!r}, expected the checkpoint's mounts.{name}, "
            f"{_place(trained)}: {apart_m:.3g} m and {apart_deg:.3g} deg apart, limits {DISTANCE_M:g} m and "
            f"{ANGLE_DEG:g} deg; correct the transform, or train with this mount"]  # fmt: skip


def _undecodable(contract: RobotContract, name: str, data: bytes) -> list[str]:
    try:
        decode(contract.stream(name), data)
    except MessageError as error:
        return [f"{name} ({contract.stream(name).topic}): {error}"]
    return []


def _frame(message: Any) -> str | None:
    header = getattr(message, "header", None)
    return None if header is None else str(header.frame_id)


def _columns(message: Any) -> Iterator[str]:
    for field in message.fields:
        yield from ([field.name] if field.count <= 1 else [f"{field.name}.{i}" for i in range(field.count)])


def _unit(unit: str) -> str:
    return "the device's unit" if unit in ("", "1") else unit


def _angle_deg(rotation: np.ndarray) -> float:
    """Angle of a rotation (3, 3); by its sine where the cosine is flat."""
    sine = np.linalg.norm(rotation - rotation.T) / (2 * np.sqrt(2))
    return float(np.degrees(np.arctan2(sine, (np.trace(rotation) - 1) / 2)))


def _place(transform: np.ndarray) -> str:
    """Position, and turns about x, y and z (REP 103: applied in this order about fixed axes), for people."""
    r = transform[:3, :3]
    turns = np.degrees(
        [np.arctan2(r[2, 1], r[2, 2]), np.arcsin(np.clip(-r[2, 0], -1, 1)), np.arctan2(r[1, 0], r[0, 0])]
    )
    x, y, z = (f"{number:.2f}" for number in transform[:3, 3] + 0.0)
    roll, pitch, yaw = (f"{round(float(number), 1) + 0.0:.1f}" for number in turns)
    return f"({x}, {y}, {z}) m, roll {roll}, pitch {pitch}, yaw {yaw} deg"
