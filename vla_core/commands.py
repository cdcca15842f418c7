"""Commands: from rows of the action vector to the messages that a robot obeys, and back.

Each message type has one codec, which both writes and reads it, so that what was recorded is what was sent. A frame
is all messages of one instant: they are encoded before any is sent, and one bad number drops the frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_core.contract import NANOSECONDS, Action, RobotContract
from vla_core.errors import choices
from vla_core.observation.messages import MessageError, deserialize, header, known_type, serialize, typestore

Rows = np.ndarray  # (H, A): H instants of the A entries of one action, in the contract's units


@dataclass(frozen=True)
class Codec:
    """``encode(action, stamp_ns, rows, step_ns)`` gives a message, ``decode(message, action)`` its rows (H, A).

    ``chunks`` tells whether one message can hold several rows.
    """

    encode: Callable[[Action, int, Rows, int], Any]
    decode: Callable[[Any, Action], Rows]
    chunks: bool = False


def encode(action: Action, stamp_ns: int, rows: Rows, step_ns: int) -> bytes:
    """Serialized message of ``rows`` (H, A) from ``stamp_ns`` on, ``step_ns`` apart; a step's message takes one row."""
    rows = np.asarray(rows, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != len(action.names) or len(rows) == 0:
        raise MessageError(f"{action.topic}: command of shape {rows.shape}, expected (rows, {len(action.names)}): "
                           f"{list(action.names)}")  # fmt: skip
    bad = [name for name, column in zip(action.names, rows.T, strict=True) if not np.isfinite(column).all()]
    if bad:
        raise MessageError(f"{action.topic}: command dropped: {', '.join(bad)} not finite")
    message = codec(action).encode(action, stamp_ns, rows, step_ns)
    try:
        return serialize(action.type, message)
    except OverflowError as error:  # a field of 32 bits; it must not become infinite on the way
        raise MessageError(f"{action.topic}: command dropped: {rows[0].tolist()}: {error}") from None


def decode(action: Action, data: bytes | memoryview) -> Rows:
    """Rows (H, A) float64 of a message of the action's topic; raises :class:`MessageError` naming the topic."""
    try:
        return codec(action).decode(deserialize(action.type, data), action)
    except MessageError as error:
        text = str(error)
        raise MessageError(text if text.startswith(action.topic) else f"{action.topic}: {text}") from None


def encode_frame(
    contract: RobotContract, stamp_ns: int, values: np.ndarray, plan: tuple[int, Rows] | None = None
) -> dict[str, bytes]:
    """Topic to serialized message of the actions that are due.

    Args:
        values: the command (A,) for ``stamp_ns``, of the whole action vector.
        plan: stamp of the first row, and rows (H, A), for actions that publish chunks; without one they are left out.

    A bad number in any of them drops the whole frame: half a command is none.
    """
    rows = np.asarray(values, dtype=np.float64)[None]
    if rows.shape != (1, len(contract.action_names)):
        raise MessageError(f"command of shape {rows.shape[1:]}, expected ({len(contract.action_names)},): "
                           f"{list(contract.action_names)}")  # fmt: skip
    now = contract.split(rows)
    later = {} if plan is None else contract.split(plan[1])
    frame = {}
    for name, action in contract.actions.items():
        if action.publish == "step":
            frame[action.topic] = encode(action, stamp_ns, now[name], contract.step_ns)
        elif plan is not None:
            frame[action.topic] = encode(action, plan[0], later[name], contract.chunk_step_ns)
    return frame


def codec(action: Action) -> Codec:
    """The codec of an action's type; the error lists the choices."""
    if action.type not in CODECS:
        raise MessageError(f"{action.topic}: no codec for commands of type {action.type!r}; choices: {choices(CODECS)}")
    known_type(action.type)
    found = CODECS[action.type]
    if action.publish == "chunk" and not found.chunks:
        able = choices(name for name, entry in CODECS.items() if entry.chunks)
        raise MessageError(f"{action.topic}: a {action.type} holds one step, not a chunk; choices: {able}")
    return found


def check_action(action: Action) -> None:
    """Raise unless commands of this action can be written: its type is known and its names fit the type."""
    encode(action, 0, np.zeros((1, len(action.names))), NANOSECONDS)


# sensor_msgs/JointState and trajectory_msgs/JointTrajectory: named joints, one of three arrays.

JOINT_FIELDS = {"position": "positions", "velocity": "velocities", "effort": "effort"}


def _joint_field(action: Action) -> str:
    if action.field not in JOINT_FIELDS:
        raise MessageError(f"{action.topic}: field {action.field!r}; choices: {choices(JOINT_FIELDS)}")
    return action.field


def _encode_joint_state(action: Action, stamp_ns: int, rows: Rows, step_ns: int) -> Any:
    arrays = {key: np.zeros(0) for key in JOINT_FIELDS}
    arrays[_joint_field(action)] = rows[0]
    return _new(action.type, header=header(stamp_ns, action.frame_id), name=list(action.names), **arrays)


def _decode_joint_state(message: Any, action: Action) -> Rows:
    values = np.asarray(getattr(message, _joint_field(action)))
    return _in_order(action, list(message.name), values[None, :])


def _encode_joint_trajectory(action: Action, stamp_ns: int, rows: Rows, step_ns: int) -> Any:
    field = JOINT_FIELDS[_joint_field(action)]
    empty = dict.fromkeys(("positions", "velocities", "accelerations", "effort"), np.zeros(0))
    # A row is the target of its step: a controller has until the step's end to get there.
    points = [
        _new("trajectory_msgs/msg/JointTrajectoryPoint", time_from_start=_duration((k + 1) * step_ns),
             **{**empty, field: row})
        for k, row in enumerate(rows)
    ]  # fmt: skip
    return _new(action.type, header=header(stamp_ns, action.frame_id), joint_names=list(action.names), points=points)


def _decode_joint_trajectory(message: Any, action: Action) -> Rows:
    field = JOINT_FIELDS[_joint_field(action)]
    rows = [np.asarray(getattr(point, field)) for point in message.points]
    if not rows or len({len(row) for row in rows}) != 1:
        raise MessageError(f"{action.topic}: {len(rows)} points whose {field} have {[len(row) for row in rows]} values")
    return _in_order(action, list(message.joint_names), np.stack(rows))


def _in_order(action: Action, names: list[str], rows: Rows) -> Rows:
    """Columns of ``rows`` (H, len(names)) in the contract's order."""
    if rows.shape[1] != len(names):
        raise MessageError(f"{action.topic}: {len(names)} names but {rows.shape[1]} values in {action.field!r}")
    if tuple(names) == action.names:  # the usual case costs no search
        return rows
    index = {name: i for i, name in enumerate(names)}
    absent = [name for name in action.names if name not in index]
    if absent:
        raise MessageError(f"{action.topic}: no entry {', '.join(absent)}; the message has: {choices(index)}")
    return rows[:, [index[name] for name in action.names]]


# std_msgs/Float64MultiArray: positions in an array, as ros2_control's forward controllers take them; no stamp.


def _encode_array(action: Action, stamp_ns: int, rows: Rows, step_ns: int) -> Any:
    layout = _new("std_msgs/msg/MultiArrayLayout", dim=[], data_offset=0)
    return _new(action.type, layout=layout, data=rows[0])


def _decode_array(message: Any, action: Action) -> Rows:
    if len(message.data) != len(action.names):
        raise MessageError(f"{action.topic}: {len(message.data)} values, expected {len(action.names)}")
    return np.asarray(message.data, dtype=np.float64)[None, :]


# Messages whose entries are named by dotted paths; what is not named stays 0, which is no motion.


def _encode_paths(inside: str) -> Callable[[Action, int, Rows, int], Any]:
    def encode_paths(action: Action, stamp_ns: int, rows: Rows, step_ns: int) -> Any:
        message = _zero(action.type)
        if hasattr(message, "header"):
            message.header = header(stamp_ns, action.frame_id)
        for name, entry in zip(action.names, rows[0], strict=True):
            *parents, leaf = _path(inside, name)
            place = message
            for parent in parents:
                place = getattr(place, parent, None)
            if not isinstance(getattr(place, leaf, None), float):
                raise MessageError(f"{action.topic}: no number {name!r} in {action.type}, "
                                   f"such as {choices(_numbers(message, inside))}")  # fmt: skip
            setattr(place, leaf, float(entry))
        return message

    return encode_paths


def _decode_paths(inside: str) -> Callable[[Any, Action], Rows]:
    def decode_paths(message: Any, action: Action) -> Rows:
        values = []
        for name in action.names:
            entry = message
            for part in _path(inside, name):
                entry = getattr(entry, part)
            values.append(float(entry))
        return np.array([values])

    return decode_paths


def _path(inside: str, name: str) -> list[str]:
    return [*filter(None, [inside]), *name.split(".")]


def _numbers(message: Any, inside: str) -> list[str]:
    """Dotted paths of the numbers in ``message.<inside>``."""
    found: list[str] = []

    def walk(part: Any, path: str) -> None:
        for name, entry in vars(part).items():
            if isinstance(entry, float):
                found.append(f"{path}{name}")
            elif hasattr(entry, "__msgtype__") and name != "header":
                walk(entry, f"{path}{name}.")

    walk(getattr(message, inside) if inside else message, "")
    return found


# nav_msgs/Path and vla_ros/msg/Trajectory: where to be, row by row.

COORDINATES = ("x", "y", "z", "yaw")
MOTION = ("speed", "acceleration")


def _columns(action: Action, rows: Rows, known: tuple[str, ...]) -> dict[str, np.ndarray]:
    unknown = [name for name in action.names if name not in known]
    absent = [name for name in ("x", "y") if name not in action.names]
    if unknown or absent:
        raise MessageError(f"{action.topic}: names {list(action.names)} for a {action.type}; it needs x and y and "
                           f"takes {choices(known)}")  # fmt: skip
    columns = dict(zip(action.names, rows.T, strict=True))
    zero = np.zeros(len(rows))
    if "yaw" not in columns:
        columns["yaw"] = _tangent(columns["x"], columns["y"])
    return {name: columns.get(name, zero) for name in known}


def _tangent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Heading (H,) rad along a path, for policies that predict none; the last step's holds at the end."""
    if len(x) < 2:
        return np.zeros(len(x))
    heading = np.arctan2(np.diff(y), np.diff(x))
    return np.append(heading, heading[-1])


def _pose(x: float, y: float, z: float, yaw: float) -> Any:
    return _new(
        "geometry_msgs/msg/Pose",
        position=_new("geometry_msgs/msg/Point", x=float(x), y=float(y), z=float(z)),
        orientation=_new("geometry_msgs/msg/Quaternion", x=0.0, y=0.0, z=float(np.sin(yaw / 2)),
                         w=float(np.cos(yaw / 2))),
    )  # fmt: skip


def _encode_path(action: Action, stamp_ns: int, rows: Rows, step_ns: int) -> Any:
    columns = _columns(action, rows, COORDINATES)
    poses = [
        _new("geometry_msgs/msg/PoseStamped", header=header(stamp_ns + k * step_ns, action.frame_id),
             pose=_pose(*(columns[name][k] for name in COORDINATES)))
        for k in range(len(rows))
    ]  # fmt: skip
    return _new(action.type, header=header(stamp_ns, action.frame_id), poses=poses)


def _encode_trajectory(action: Action, stamp_ns: int, rows: Rows, step_ns: int) -> Any:
    columns = _columns(action, rows, COORDINATES + MOTION)
    points = [
        _new("vla_ros/msg/TrajectoryPoint", time_from_start=_duration(k * step_ns),
             pose=_pose(*(columns[name][k] for name in COORDINATES)),
             **{name: float(columns[name][k]) for name in MOTION})
        for k in range(len(rows))
    ]  # fmt: skip
    return _new(action.type, header=header(stamp_ns, action.frame_id), points=points)


def _decode_path(message: Any, action: Action) -> Rows:
    return _pose_rows(action, [stamped.pose for stamped in message.poses], message.poses)


def _decode_trajectory(message: Any, action: Action) -> Rows:
    return _pose_rows(action, [point.pose for point in message.points], message.points)


def _pose_rows(action: Action, poses: list[Any], points: list[Any]) -> Rows:
    if not poses:
        raise MessageError(f"{action.topic}: a {action.type} without a single point")
    columns = {
        "x": [pose.position.x for pose in poses], "y": [pose.position.y for pose in poses],
        "z": [pose.position.z for pose in poses],
        "yaw": [_yaw(pose.orientation) for pose in poses],
    }  # fmt: skip
    columns |= {name: [getattr(point, name) for point in points] for name in MOTION if hasattr(points[0], name)}
    return np.array([columns[name] for name in action.names], dtype=np.float64).T


def _yaw(q: Any) -> float:
    """Heading in (-pi, pi] of a quaternion, whichever of its two signs it comes with."""
    return float(np.arctan2(2 * (q.w * q.z + q.x * q.y), q.w**2 + q.x**2 - q.y**2 - q.z**2))


def _new(type_name: str, **fields: Any) -> Any:
    return typestore().types[type_name](**fields)


def _zero(type_name: str) -> Any:
    """A message of nested zeros."""
    fields = {}
    for name, (kind, detail) in typestore().fielddefs[type_name][1]:
        if kind.name == "BASE":
            fields[name] = "" if detail[0] == "string" else 0.0 if str(detail[0]).startswith("float") else 0
        else:
            fields[name] = _zero(str(detail))
    return _new(type_name, **fields)


def _duration(nanoseconds: int) -> Any:
    seconds, rest = divmod(nanoseconds, NANOSECONDS)
    return _new("builtin_interfaces/msg/Duration", sec=seconds, nanosec=rest)


# Extend by assigning a codec to a type name: CODECS["my_msgs/msg/Wheels"] = Codec(encode_wheels, decode_wheels)
CODECS: dict[str, Codec] = {
    "sensor_msgs/msg/JointState": Codec(_encode_joint_state, _decode_joint_state),
    "std_msgs/msg/Float64MultiArray": Codec(_encode_array, _decode_array),
    "trajectory_msgs/msg/JointTrajectory": Codec(_encode_joint_trajectory, _decode_joint_trajectory, chunks=True),
    "geometry_msgs/msg/Twist": Codec(_encode_paths(""), _decode_paths("")),
    "geometry_msgs/msg/TwistStamped": Codec(_encode_paths("twist"), _decode_paths("twist")),
    "ackermann_msgs/msg/AckermannDrive": Codec(_encode_paths(""), _decode_paths("")),
    "ackermann_msgs/msg/AckermannDriveStamped": Codec(_encode_paths("drive"), _decode_paths("drive")),
    "nav_msgs/msg/Path": Codec(_encode_path, _decode_path, chunks=True),
    "vla_ros/msg/Trajectory": Codec(_encode_trajectory, _decode_trajectory, chunks=True),
}
