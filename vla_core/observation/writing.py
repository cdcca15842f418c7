"""The messages of a vehicle's sensors as serialized bytes (CDR), for simulators and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_core.observation.messages import header, serialize, typestore

Numbers = Sequence[float] | np.ndarray
POINT_TYPES = {"f4": 7, "u2": 4}  # numpy's names of sensor_msgs/PointField datatypes


def imu(stamp_ns: int, orientation: Numbers | None, angular_velocity: Numbers,
        acceleration: Numbers, frame_id: str = "") -> bytes:  # fmt: skip
    """Serialized ``sensor_msgs/Imu``; rad/s and m/s2, gravity included. None says that there is no orientation."""
    types = typestore().types
    vector, unknown = types["geometry_msgs/msg/Vector3"], np.zeros(9)
    turned = (0.0, 0.0, 0.0, 1.0) if orientation is None else orientation
    no_orientation = np.array([-1.0, *np.zeros(8)])  # the message's convention
    message = types["sensor_msgs/msg/Imu"](
        header=header(stamp_ns, frame_id),
        orientation=types["geometry_msgs/msg/Quaternion"](*turned),
        orientation_covariance=no_orientation if orientation is None else unknown,
        angular_velocity=vector(*angular_velocity), angular_velocity_covariance=unknown,
        linear_acceleration=vector(*acceleration), linear_acceleration_covariance=unknown,
    )  # fmt: skip
    return serialize("sensor_msgs/msg/Imu", message)


def odometry(stamp_ns: int, pose: Numbers, linear: Numbers, angular: Numbers,
             frame_id: str = "odom", child_frame_id: str = "base_link") -> bytes:  # fmt: skip
    """Serialized ``nav_msgs/Odometry`` of ``pose`` (7,): x, y, z, quaternion; velocities in the child frame."""
    types = typestore().types
    vector, unknown = types["geometry_msgs/msg/Vector3"], np.zeros(36)
    message = types["nav_msgs/msg/Odometry"](
        header=header(stamp_ns, frame_id), child_frame_id=child_frame_id,
        pose=types["geometry_msgs/msg/PoseWithCovariance"](pose=_pose(pose), covariance=unknown),
        twist=types["geometry_msgs/msg/TwistWithCovariance"](
            twist=types["geometry_msgs/msg/Twist"](linear=vector(*linear), angular=vector(*angular)),
            covariance=unknown,
        ),
    )  # fmt: skip
    return serialize("nav_msgs/msg/Odometry", message)


def camera_info(stamp_ns: int, intrinsics: np.ndarray, height: int, width: int, frame_id: str = "") -> bytes:
    """Serialized ``sensor_msgs/CameraInfo`` of a camera without distortion; ``intrinsics`` (3, 3) is its K."""
    types = typestore().types
    matrix = np.asarray(intrinsics, dtype=np.float64)
    message = types["sensor_msgs/msg/CameraInfo"](
        header=header(stamp_ns, frame_id), height=height, width=width, distortion_model="plumb_bob", d=np.zeros(5),
        k=matrix.reshape(-1), r=np.eye(3).reshape(-1), p=np.hstack([matrix, np.zeros((3, 1))]).reshape(-1),
        binning_x=0, binning_y=0,
        roi=types["sensor_msgs/msg/RegionOfInterest"](x_offset=0, y_offset=0, height=0, width=0, do_rectify=False),
    )  # fmt: skip
    return serialize("sensor_msgs/msg/CameraInfo", message)


def point_cloud(stamp_ns: int, columns: Mapping[str, np.ndarray], frame_id: str = "") -> bytes:
    """Serialized ``sensor_msgs/PointCloud2`` of one row of points; columns (N,) float32 or uint16, packed in order."""
    types = typestore().types
    layout = np.dtype([(name, values.dtype.str) for name, values in columns.items()])
    count = len(next(iter(columns.values())))
    points = np.empty(count, dtype=layout)
    for name, values in columns.items():
        points[name] = values
    fields, offset = [], 0
    for name in columns:
        kind = layout[name]
        fields.append(
            types["sensor_msgs/msg/PointField"](name=name, offset=offset, datatype=POINT_TYPES[kind.str[1:]], count=1)
        )
        offset += kind.itemsize
    message = types["sensor_msgs/msg/PointCloud2"](
        header=header(stamp_ns, frame_id), height=1, width=count, fields=fields, is_bigendian=False,
        point_step=layout.itemsize, row_step=layout.itemsize * count, data=points.view(np.uint8), is_dense=True,
    )  # fmt: skip
    return serialize("sensor_msgs/msg/PointCloud2", message)


def transforms(stamp_ns: int, parent: str, mounts: Mapping[str, Numbers]) -> bytes:
    """Serialized ``tf2_msgs/TFMessage``: child frames with their mounts (7,) in ``parent``."""
    types = typestore().types
    vector, quaternion = types["geometry_msgs/msg/Vector3"], types["geometry_msgs/msg/Quaternion"]
    stamped = [
        types["geometry_msgs/msg/TransformStamped"](
            header=header(stamp_ns, parent), child_frame_id=child,
            transform=types["geometry_msgs/msg/Transform"](
                translation=vector(*mount[:3]), rotation=quaternion(*mount[3:])
            ),
        )
        for child, mount in mounts.items()
    ]  # fmt: skip
    return serialize("tf2_msgs/msg/TFMessage", types["tf2_msgs/msg/TFMessage"](transforms=stamped))


def boxes(stamp_ns: int, found: Sequence[tuple[int, str, Numbers, Numbers, Numbers]],
          frame_id: str = "map", lifetime_ns: int = 0) -> bytes:  # fmt: skip
    """Serialized ``visualization_msgs/MarkerArray`` of cubes: id, namespace, pose (7,), size (3,) m, colour (4,)."""
    types = typestore().types
    seconds, nanoseconds = divmod(lifetime_ns, 1_000_000_000)
    markers = [
        types["visualization_msgs/msg/Marker"](
            header=header(stamp_ns, frame_id), ns=namespace, id=index, type=1, action=0, pose=_pose(pose),
            scale=types["geometry_msgs/msg/Vector3"](*size), color=types["std_msgs/msg/ColorRGBA"](*colour),
            lifetime=types["builtin_interfaces/msg/Duration"](sec=seconds, nanosec=nanoseconds), frame_locked=False,
            points=[], colors=[], texture_resource="",
            texture=types["sensor_msgs/msg/CompressedImage"](header=header(0), format="", data=np.zeros(0, np.uint8)),
            uv_coordinates=[], text="",
            mesh_resource="", mesh_file=types["visualization_msgs/msg/MeshFile"](
                filename="", data=np.zeros(0, np.uint8)
            ),
            mesh_use_embedded_materials=False,
        )
        for index, namespace, pose, size, colour in found
    ]  # fmt: skip
    return serialize("visualization_msgs/msg/MarkerArray", types["visualization_msgs/msg/MarkerArray"](markers=markers))


def _pose(pose: Numbers) -> Any:
    types = typestore().types
    return types["geometry_msgs/msg/Pose"](
        position=types["geometry_msgs/msg/Point"](*pose[:3]),
        orientation=types["geometry_msgs/msg/Quaternion"](*pose[3:]),
    )
