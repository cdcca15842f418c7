"""Vectors by dotted paths, rotations between two orientations, and camera calibrations."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_core.contract import Stream
from vla_core.observation import messages
from vla_core.observation.calibration import Calibration
from vla_core.observation.decode import decode
from vla_core.observation.image import resize
from vla_core.observation.messages import MessageError, serialize, typestore
from vla_core.observation.vector import blend, check_paths, paths, quaternions, slerp

IMU = "sensor_msgs/msg/Imu"
ODOMETRY = "nav_msgs/msg/Odometry"
TYPES = typestore().types


def stream(type_name: str, *names: str, **changes: object) -> Stream:
    options = {"rate_hz": 100.0, "max_age_s": 0.1, "names": names, "units": ("",) * len(names), **changes}
    return Stream(topic="s", type=type_name, **options)  # type: ignore[arg-type]


def xyz(values: tuple[float, ...]) -> object:
    return TYPES["geometry_msgs/msg/Vector3"](**dict(zip("xyz", values, strict=True)))


def imu(gyro: tuple[float, ...] = (1.0, 2.0, 3.0), orientation_covariance: float = 0.0, frame: str = "imu") -> bytes:
    covariance = np.zeros(9)
    covariance[0] = orientation_covariance
    message = TYPES[IMU](
        header=messages.header(5, frame), orientation=TYPES["geometry_msgs/msg/Quaternion"](x=0, y=0, z=0.6, w=0.8),
        orientation_covariance=covariance, angular_velocity=xyz(gyro), angular_velocity_covariance=np.zeros(9),
        linear_acceleration=xyz((4, 5, 6)), linear_acceleration_covariance=np.arange(9.0),
    )  # fmt: skip
    return serialize(IMU, message)


def test_entries_of_an_imu_by_their_paths() -> None:
    wanted = stream(IMU, "linear_acceleration.z", "angular_velocity.x", "orientation.w",
                    "linear_acceleration_covariance.4")  # fmt: skip
    found = decode(wanted, imu())
    assert isinstance(found, np.ndarray) and found.dtype == np.float64
    assert found.tolist() == [6, 1, 0.8, 4]


def test_an_imu_that_has_no_orientation_says_so() -> None:
    """REP 145: a driver sets the first covariance to -1 where it does not measure; the zeros there are no numbers."""
    data = imu(orientation_covariance=-1)
    assert np.asarray(decode(stream(IMU, "angular_velocity.y"), data)).tolist() == [2]
    with pytest.raises(MessageError, match=r"^s: this IMU does not measure orientation .*REP 145"):
        decode(stream(IMU, "angular_velocity.y", "orientation.w"), data)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_named(bad: float) -> None:
    data = imu((1.0, bad, 3.0))
    assert np.asarray(decode(stream(IMU, "angular_velocity.x"), data)).tolist() == [1]
    with pytest.raises(MessageError, match=rf"^s: angular_velocity.y is {bad}: not finite"):
        decode(stream(IMU, "angular_velocity.x", "angular_velocity.y"), data)
    joints = messages.joint_state(0, ("a", "b"), "effort", np.array([0.0, bad]))
    with pytest.raises(MessageError, match=rf"^s: b is {bad}: not finite"):
        decode(stream("sensor_msgs/msg/JointState", "a", "b", field="effort"), joints)


def test_odometry_twists_and_types_nobody_thought_of() -> None:
    pose = TYPES["geometry_msgs/msg/Pose"](
        position=TYPES["geometry_msgs/msg/Point"](x=7.0, y=8.0, z=9.0),
        orientation=TYPES["geometry_msgs/msg/Quaternion"](x=0, y=0, z=0, w=1),
    )  # fmt: skip
    twist = TYPES["geometry_msgs/msg/Twist"](linear=xyz((1, 2, 3)), angular=xyz((4, 5, 6)))
    odometry = TYPES[ODOMETRY](
        header=messages.header(0), child_frame_id="base",
        pose=TYPES["geometry_msgs/msg/PoseWithCovariance"](pose=pose, covariance=np.zeros(36)),
        twist=TYPES["geometry_msgs/msg/TwistWithCovariance"](twist=twist, covariance=np.zeros(36)),
    )  # fmt: skip
    names = ("pose.pose.position.y", "twist.twist.angular.z", "pose.pose.orientation.w")
    assert np.asarray(decode(stream(ODOMETRY, *names), serialize(ODOMETRY, odometry))).tolist() == [8, 6, 1]
    type_name = "geometry_msgs/msg/Twist"
    assert np.asarray(decode(stream(type_name, "angular.x"), serialize(type_name, twist))).tolist() == [4]
    type_name = "geometry_msgs/msg/TwistStamped"
    stamped = TYPES[type_name](header=messages.header(0), twist=twist)
    assert np.asarray(decode(stream(type_name, "twist.linear.y"), serialize(type_name, stamped))).tolist() == [2]
    type_name = "std_msgs/msg/Float64MultiArray"
    layout = TYPES["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
    data = serialize(type_name, TYPES[type_name](layout=layout, data=np.array([1.5, 2.5])))
    assert np.asarray(decode(stream(type_name, "data.1"), data)).tolist() == [2.5]
    with pytest.raises(MessageError, match=r"^s: no element 2 of data.2: the message has 2"):
        decode(stream(type_name, "data.2"), data)


def test_paths_of_a_type_are_listed() -> None:
    expected = [f"{part}.{axis}" for part in ("linear", "angular") for axis in "xyz"]
    assert paths("geometry_msgs/msg/Twist") == expected
    assert paths("geometry_msgs/msg/TwistStamped") == [f"twist.{path}" for path in expected]
    assert "orientation_covariance.<i>" in paths(IMU) and "orientation.w" in paths(IMU)
    assert paths("std_msgs/msg/String") == []


@pytest.mark.parametrize(
    "name", ["linear", "linear.q", "linear.x.y", "linear.0", "", "header.frame_id", "linear..x", "angular.x."]
)
def test_a_path_to_no_number_lists_those_there_are(name: str) -> None:
    with pytest.raises(
        MessageError, match=rf"Twist has no number at '{name}'; choices: linear.x, linear.y, .*angular.z"
    ):
        check_paths("geometry_msgs/msg/Twist", ["linear.x", name])


def test_an_index_beyond_a_fixed_array_is_refused_by_the_type() -> None:
    check_paths(IMU, ["orientation_covariance.8"])
    with pytest.raises(MessageError, match=r"no number at 'orientation_covariance\.9': 9 elements"):
        check_paths(IMU, ["orientation_covariance.9"])


def test_the_frame_of_the_contract_is_checked() -> None:
    assert np.asarray(decode(stream(IMU, "angular_velocity.x", frame_id="imu"), imu())).tolist() == [1]
    with pytest.raises(MessageError, match=r"^s: frame 'imu', expected the contract's frame_id 'base'"):
        decode(stream(IMU, "angular_velocity.x", frame_id="base"), imu())


# --- rotations ------------------------------------------------------------------------------------------------------


def turn(axis: np.ndarray, angle: float) -> np.ndarray:
    return np.append(np.sin(angle / 2) * axis / np.linalg.norm(axis), np.cos(angle / 2))


axes = st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda a: np.linalg.norm(a) > 0.1).map(np.array)


@given(axes, st.floats(-3.1, 3.1), st.floats(-3.1, 3.1), st.floats(0, 1), st.sampled_from([1.0, -1.0]))
def test_slerp_turns_at_constant_speed_the_shorter_way(
    axis: np.ndarray, start: float, by: float, weight: float, sign: float
) -> None:
    """About one axis the rotation between angles a and a + b at weight w is that by a + w b."""
    found = slerp(turn(axis, start), sign * turn(axis, start + by), weight)
    expected = turn(axis, start + weight * by)
    assert abs(abs(found @ expected) - 1) < 1e-9 and np.linalg.norm(found) == pytest.approx(1)


def test_a_quaternion_of_zeros_is_refused() -> None:
    with pytest.raises(MessageError, match="quaternion of length 0 is no rotation"):
        slerp(np.zeros(4), np.array([0, 0, 0, 1.0]), 0.5)


def test_blend_is_linear_but_for_rotations() -> None:
    axis = np.array([0, 0, 1.0])
    a, b = np.append([1.0, -2.0], turn(axis, 0.2)), np.append([3.0, 2.0], -turn(axis, 1.0))
    found = blend(a, b, 0.25, [[2, 3, 4, 5]])
    np.testing.assert_allclose(found, np.append([1.5, -1.0], turn(axis, 0.4)), atol=1e-12)
    np.testing.assert_array_equal(blend(a, b, 0.0, []), a)
    np.testing.assert_array_equal(blend(a, b, 1.0, []), b)


def test_quaternions_are_found_by_their_fields_name() -> None:
    names = ("pose.orientation.w", "pose.position.x", *(f"pose.orientation.{axis}" for axis in "xyz"))
    assert quaternions(names) == [[2, 3, 4, 0]]
    assert quaternions(("angular_velocity.x", "shoulder")) == []
    with pytest.raises(MessageError, match=r"name pose.orientation.x, .y, .z and .w, not only w, z"):
        quaternions(("pose.orientation.z", "pose.orientation.w"))


# --- calibration ----------------------------------------------------------------------------------------------------

INFO = "sensor_msgs/msg/CameraInfo"
K = np.array([[500.0, 0, 319.5], [0, 480.0, 239.5], [0, 0, 1]])


def info(
    k: np.ndarray = K, binning: int = 0, roi: tuple[int, int, int, int] = (0, 0, 0, 0), **changes: object
) -> bytes:
    x, y, width, height = roi
    fields = {
        "header": messages.header(0, "optical"), "height": 480, "width": 640, "distortion_model": "plumb_bob",
        "d": np.array([0.1, -0.2, 0, 0, 0.05]), "k": k.reshape(-1), "r": np.eye(3).reshape(-1),
        "p": np.hstack([k, [[-50.0], [0], [0]]]).reshape(-1), "binning_x": binning, "binning_y": binning,
        "roi": TYPES["sensor_msgs/msg/RegionOfInterest"](x_offset=x, y_offset=y, width=width, height=height,
                                                         do_rectify=False),
    }  # fmt: skip
    return serialize(INFO, TYPES[INFO](**{**fields, **changes}))


def calibration(data: bytes) -> Calibration:
    found = decode(stream(INFO), data)
    assert isinstance(found, Calibration)
    return found


def test_a_calibration_is_what_the_camera_says() -> None:
    found = calibration(info())
    np.testing.assert_array_equal(found.intrinsics, K)
    np.testing.assert_array_equal(found.distortion, [0.1, -0.2, 0, 0, 0.05])
    np.testing.assert_array_equal(found.projection[:, :3], K)
    assert (found.width, found.height, found.model, found.frame_id) == (640, 480, "plumb_bob", "optical")
    assert found.projection[0, 3] == -50


@pytest.mark.parametrize(("height", "width"), [(120, 160), (240, 640), (96, 96), (480, 640)])
def test_scaled_intrinsics_point_at_the_same_thing_in_the_resized_picture(height: int, width: int) -> None:
    """A blob around a projected point, shrunk by the picture's own resize: its centre is where the new K projects."""
    point = np.array([0.2, -0.1, 1.0])
    u, v = (K @ point)[:2]
    y, x = np.mgrid[:480, :640]
    blob = 250 * np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * 12.0**2))
    small = resize(np.repeat(blob[..., None], 3, 2).astype(np.uint8), height, width)[..., 0].astype(float)
    y, x = np.mgrid[:height, :width]
    centre = np.array([(small * x).sum(), (small * y).sum()]) / small.sum()
    found = calibration(info()).scaled(height, width)
    np.testing.assert_allclose((found.intrinsics @ point)[:2], centre, atol=0.03)
    np.testing.assert_allclose(found.projection[:, :3], found.intrinsics)
    assert (found.height, found.width) == (height, width)


def test_a_region_of_interest_and_binning_move_and_scale() -> None:
    """The centre of the region's pixel (x, y) is that of the whole picture's pixel (x + offset, y + offset)."""
    roi = calibration(info(roi=(100, 40, 320, 200)))
    point = np.array([0.1, 0.05, 1.0])
    np.testing.assert_allclose(roi.intrinsics @ point, K @ point - [100, 40, 0])
    assert (roi.width, roi.height) == (320, 200)
    binned = calibration(info(binning=2))
    expected = cv2.resize(np.stack(np.meshgrid(np.arange(640.0), np.arange(480.0)), -1), (320, 240),
                          interpolation=cv2.INTER_AREA)  # fmt: skip
    u, v = (binned.intrinsics @ point)[:2].round().astype(int)
    assert np.abs(expected[v, u] - (K @ point)[:2]).max() <= 1
    assert (binned.width, binned.height) == (320, 240)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (info(np.zeros((3, 3))), "not calibrated"),
        (info(K * np.nan), "not finite"),
        (info(width=0), "0x480 pixels"),
    ],
)
def test_a_calibration_that_is_none_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(MessageError, match=rf"^s: .*{says}"):
        calibration(data)
