"""The sensors' setup: each line names topic, frame and field, what was found, what was expected, and what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.contract import RobotContract
from vla_core.observation import messages, writing
from vla_core.observation.image import encode_jpeg
from vla_core.observation.messages import MessageError, deserialize, serialize
from vla_core.observation.setup_check import Transforms, base_frame, check, check_mount, connected, mounts_of
from vla_core.observation.spec import CloudSpec, ImageSize, ObservationSpec

CONTRACT = RobotContract.load("driving")
SPEC = ObservationSpec(
    images={"front": ImageSize(height=8, width=8)}, calibrations={"front": "front_info"}, state=("motion",),
    clouds={"lidar": CloudSpec(max_points=10), "radar_front": CloudSpec(max_points=10)}, instruction="instruction",
)  # fmt: skip
OPTICAL = (1.7, 0.0, 1.5, -0.5, 0.5, -0.5, 0.5)
MOUNTS = {"front": OPTICAL, "lidar": (1.0, 0.0, 1.8, 0.0, 0.0, 0.0, 1.0), "radar_front": (3.4, 0.0, 0.5, 0, 0, 0, 1.0)}
FRAMES = {"front": "camera_front_optical_frame", "lidar": "lidar", "radar_front": "radar_front"}
K = np.array([[40.0, 0, 41.5], [0, 40.0, 41.5], [0, 0, 1]])
CAMERA, INFO = "camera/front/image_raw", "camera/front/camera_info"


def cloud(names: tuple[str, ...], frame_id: str, points: int = 3) -> bytes:
    return writing.point_cloud(7, {name: np.ones(points, dtype=np.float32) for name in names}, frame_id)


def firsts(**changes: bytes | None) -> dict[str, bytes]:
    """First messages of sensors that are set up well."""
    good: dict[str, bytes | None] = {
        "front": messages.image(7, np.zeros((84, 84, 3), dtype=np.uint8), FRAMES["front"]),
        "front_info": writing.camera_info(7, K, 84, 84, FRAMES["front"]),
        "motion": writing.odometry(7, (0, 0, 0, 0, 0, 0, 1), (0, 0, 0), (0, 0, 0)),
        "lidar": cloud(("x", "y", "z", "intensity", "time", "ring"), "lidar"),
        "radar_front": cloud(("x", "y", "z", "velocity", "rcs"), "radar_front"),
    }
    return {name: data for name, data in {**good, **changes}.items() if data is not None}


def tree(**changes: Any) -> Transforms:
    """The transforms of the mounts, with other ones for some streams; None leaves one out."""
    found = Transforms()
    mounts = {**MOUNTS, **changes}
    told = {FRAMES[name]: mount for name, mount in mounts.items() if mount is not None}
    if told:
        found.add(writing.transforms(0, "base_link", told))
    return found


def lines(first: dict[str, bytes] | None = None, transforms: Transforms | None = None, **changes: Any) -> list[str]:
    contract = dataclasses.replace(CONTRACT, **changes)
    return check(contract, SPEC, MOUNTS, firsts() if first is None else first, transforms or tree())


def info(change: Callable[[Any], None]) -> bytes:
    """A camera info with something else in it."""
    message = deserialize("sensor_msgs/msg/CameraInfo", writing.camera_info(7, K, 84, 84, FRAMES["front"]))
    message.k = message.k.copy()
    change(message)
    return serialize("sensor_msgs/msg/CameraInfo", message)


def uncalibrated(message: Any) -> None:
    message.k[0] = 0.0


def test_what_is_well_is_well() -> None:
    assert lines() == []
    assert check(CONTRACT, SPEC, {}, firsts(), Transforms()) == [], "without mounts nobody needs transforms"


def test_nothing_came() -> None:
    found = lines({})
    assert found[0] == (
        "front (camera/front/image_raw, frame 'camera_front_optical_frame'): found nothing, expected "
        "sensor_msgs/msg/Image at 5 Hz; start its driver, or remap the topic"
    )
    assert [line.split(" ")[0] for line in found] == ["front", "motion", "lidar", "radar_front", "front_info"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"front_info": None},
            f"front_info ({INFO}, frame 'camera_front_optical_frame'): found nothing, expected "
            "sensor_msgs/msg/CameraInfo at 5 Hz; start its driver, or remap the topic",
        ),
        (
            {"front_info": info(uncalibrated)},
            f"front_info ({INFO}, frame 'camera_front_optical_frame'), K[0]: found 0, which says that the camera is "
            "not calibrated, expected the focal length in pixels; calibrate it",
        ),
        (
            {"front_info": info(lambda m: setattr(m, "width", 0))},
            f"front_info ({INFO}, frame 'camera_front_optical_frame'), width and height: found 0x84, expected the size "
            "of the picture; calibrate the camera",
        ),
        (
            {"front_info": writing.camera_info(7, K, 480, 640, FRAMES["front"])},
            f"front_info ({INFO}, frame 'camera_front_optical_frame'), width and height: found the calibration of "
            f"pictures of 640x480 (after binning and region of interest), expected the 84x84 of front ({CAMERA}, frame "
            "'camera_front_optical_frame'); calibrate the camera at the size that it sends",
        ),
        (
            {"lidar": cloud(("x", "y", "z", "time", "ring"), "lidar")},
            "lidar (lidar/points, frame 'lidar'), field 'intensity': found only ring, time, x, y, z, expected it in "
            "the device's unit; have the driver send it, or train without it",
        ),
        (
            {"radar_front": cloud(("x", "y", "z", "rcs"), "radar_front", points=0)},
            "radar_front (radar/front/points, frame 'radar_front'), field 'velocity': found only rcs, x, y, z, "
            "expected it in m/s; have the driver send it, or train without it",
        ),
        (
            {"lidar": cloud(("x", "y", "z", "intensity", "time", "ring"), "velodyne")},
            "lidar (lidar/points, frame 'velodyne'), header.frame_id: found 'velodyne', expected the contract's "
            "'lidar'; set it in the driver, or train with a contract that says so",
        ),
        ({"motion": b"\\0\\1\\0\\0"}, "motion (odom): odom: 8 bytes do not decode as nav_msgs/msg/Odometry"),
    ],
)  # fmt: skip
def test_each_fault_has_its_line(changes: dict[str, bytes | None], expected: str) -> None:
    (found,) = lines(firsts(**changes))
    assert found.startswith(expected)


def test_every_absent_column_is_named() -> None:
    found = lines(firsts(lidar=cloud(("x", "y", "z"), "lidar")))
    assert [line.split("field ")[1].split(":")[0] for line in found] == ["'intensity'", "'time'", "'ring'"]


def test_a_column_by_the_name_of_another_driver_is_there() -> None:
    assert lines(firsts(radar_front=cloud(("x", "y", "z", "doppler", "RCS"), "radar_front"))) == []


def test_a_picture_and_its_calibration_have_one_frame() -> None:
    """Of contracts that name no frame."""
    streams = {name: dataclasses.replace(s, frame_id=None) for name, s in CONTRACT.observations.items()}
    other = writing.camera_info(7, K, 84, 84, "camera_front")
    (found,) = lines(firsts(front_info=other), observations=streams)
    assert found == (
        f"front_info ({INFO}, frame 'camera_front'), header.frame_id: found 'camera_front', expected the "
        f"'camera_front_optical_frame' of front ({CAMERA}, frame 'camera_front_optical_frame'); a picture and its "
        "calibration have one frame"
    )


@pytest.mark.parametrize(("binning", "roi"), [(1, (0, 0)), (2, (0, 0)), (2, (320, 160)), (1, (64, 48))])
def test_binning_and_region_are_part_of_the_size(binning: int, roi: tuple[int, int]) -> None:
    width, height = ((roi[0] or 640) // binning, (roi[1] or 480) // binning)

    def change(message: Any) -> None:
        message.width, message.height, message.binning_x, message.binning_y = 640, 480, binning, binning
        message.roi.width, message.roi.height = roi

    for size, good in (((height, width), True), ((height, width - 1), False)):
        picture = messages.image(7, np.zeros((*size, 3), dtype=np.uint8), FRAMES["front"])
        assert (lines(firsts(front=picture, front_info=info(change))) == []) is good


def test_a_compressed_picture_has_a_size_too() -> None:
    streams = {**CONTRACT.observations, "front": dataclasses.replace(
        CONTRACT.observations["front"], type="sensor_msgs/msg/CompressedImage")}  # fmt: skip
    jpeg = encode_jpeg(np.zeros((42, 84, 3), dtype=np.uint8))
    (found,) = lines(firsts(front=messages.compressed_image(7, jpeg, "jpeg", FRAMES["front"])), observations=streams)
    assert "of 84x84 (after binning" in found and "expected the 84x42" in found


def test_frames_that_nothing_connects() -> None:
    (found,) = lines(transforms=tree(lidar=None))
    assert found == (
        "lidar (lidar/points, frame 'lidar'), /tf_static: found the frames base_link, camera_front_optical_frame, "
        "radar_front, expected transforms that connect 'lidar' to 'base_link'; publish them, as robot_state_publisher "
        "or static_transform_publisher do"
    )
    assert len(lines(transforms=Transforms())) == 3
    island = tree(lidar=None)
    island.add(writing.transforms(0, "roof", {"lidar": (0, 0, 0, 0, 0, 0, 1)}))
    (found,) = lines(transforms=island)
    assert "'lidar' to 'base_link'" in found and "roof" in found


def test_both_sides_of_a_disagreement_are_named() -> None:
    (found,) = lines(transforms=tree(lidar=(1.0, 0.0, 2.1, 0.0, 0.0, 0.7071068, 0.7071068)))
    assert found == (
        "lidar (lidar/points, frame 'lidar'), /tf_static: found it at (1.00, 0.00, 2.10) m, roll 0.0, pitch 0.0, yaw "
        "90.0 deg in 'base_link', expected the checkpoint's mounts.lidar, (1.00, 0.00, 1.80) m, roll 0.0, pitch 0.0, "
        "yaw 0.0 deg: 0.3 m and 90 deg apart, limits 0.05 m and 2 deg; correct the transform, or train with this mount"
    )


@settings(max_examples=60, deadline=None)
@given(
    shift=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: np.linalg.norm(v) > 1e-3),
    axis=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: np.linalg.norm(v) > 1e-3),
    metres=st.sampled_from([0.0, 0.049, 0.051, 0.5]), degrees=st.sampled_from([0.0, 1.9, 2.1, 90.0, 180.0]),
    sign=st.sampled_from([1.0, -1.0]), stream=st.sampled_from(sorted(MOUNTS)),
)  # fmt: skip
def test_the_limits_hold_in_every_direction(
    shift: tuple[float, ...], axis: tuple[float, ...], metres: float, degrees: float, sign: float, stream: str
) -> None:
    """A mount moved and turned by so much about any axis; a quaternion and its negative are one rotation."""
    trained = np.array(MOUNTS[stream])
    half = np.radians(degrees) / 2
    turn = np.array([*(np.sin(half) * np.array(axis) / np.linalg.norm(axis)), np.cos(half)])
    v, w, a, b = turn[:3], turn[3], trained[3:6], trained[6]
    product = np.array([*(w * a + b * v + np.cross(v, a)), w * b - v @ a])
    moved = np.concatenate([trained[:3] + metres * np.array(shift) / np.linalg.norm(shift), sign * product])
    found = lines(transforms=tree(**{stream: moved}))
    assert (found == []) == (metres < 0.05 and degrees < 2)


def test_a_chain_through_other_frames_is_one_transform() -> None:
    """base_link -> roof -> lidar, where base_link itself hangs below odom."""
    found = tree(lidar=None)
    half = np.sqrt(0.5)
    found.add(writing.transforms(0, "odom", {"base_link": (5.0, 3.0, 0.0, 0.0, 0.0, 0.0, 1.0)}))
    found.add(writing.transforms(0, "base_link", {"roof": (0.5, 0.2, 1.5, 0.0, 0.0, half, half)}))
    found.add(writing.transforms(0, "roof", {"lidar": (-0.2, -0.5, 0.3, 0.0, 0.0, -half, half)}))
    assert lines(transforms=found) == [], "(0.5, 0.2) + 90 deg of (-0.2, -0.5) is (1.0, 0.0)"
    back = found.between("base_link", "lidar")
    assert back is not None
    np.testing.assert_allclose(back[:3, 3], [-1.0, 0.0, -1.8], atol=1e-12)


def test_a_loop_of_frames_ends() -> None:
    found = Transforms()
    for parent, child in (("a", "b"), ("b", "c"), ("c", "a")):
        found.add(writing.transforms(0, parent, {child: (1.0, 0, 0, 0, 0, 0, 1)}))
    assert found.between("a", "base_link") is None


def test_a_transform_that_is_none_is_named() -> None:
    found = tree(lidar=None)
    found.add(writing.transforms(0, "base_link", {"lidar": (1.0, 0, 1.8, 0, 0, 0, 0)}))
    (line,) = lines(transforms=found)
    assert "(refused: base_link -> lidar with [1.0, 0.0, 1.8, 0.0, 0.0, 0.0, 0.0], expected finite numbers" in line
    found.add(writing.transforms(0, "base_link", {"lidar": MOUNTS["lidar"]}))
    assert lines(transforms=found) == []
    with pytest.raises(MessageError, match="do not decode as tf2_msgs"):
        found.add(b"\0\1\0\0\7")


def test_until_transforms_are_asked_for_only_a_disagreement_counts() -> None:
    empty, wrong = Transforms(), tree(lidar=(0, 0, 0, 0, 0, 0, 1))
    assert check_mount(CONTRACT, MOUNTS, "lidar", firsts(), empty, required=False) == []
    assert len(check_mount(CONTRACT, MOUNTS, "lidar", firsts(), wrong, required=False)) == 1
    assert connected(CONTRACT, MOUNTS, firsts(), wrong) and not connected(CONTRACT, MOUNTS, firsts(), tree(lidar=None))


def test_the_mounts_are_those_of_the_model_and_of_moved_clouds() -> None:
    model = SimpleNamespace(mounts={"lidar": MOUNTS["lidar"], "back": OPTICAL})
    moved = dataclasses.replace(SPEC, history=2, clouds={
        "lidar": CloudSpec(max_points=10), "radar_front": CloudSpec(max_points=10, ego_motion="odom",
                                                                    mount=(3.4, 0, 0.5, 0, 0, 0, 1.0))})  # fmt: skip
    assert mounts_of(SPEC, model) == {"lidar": MOUNTS["lidar"]}, "the back is not seen"
    assert mounts_of(SPEC, SimpleNamespace()) == {}
    assert set(mounts_of(moved, model)) == {"lidar", "radar_front"}


@pytest.mark.parametrize(("robot", "frame"), [("driving", "base_link"), ("carla", "ego_vehicle"), ("arm", "base_link")])
def test_the_base_is_the_frame_of_the_actions(robot: str, frame: str) -> None:
    assert base_frame(RobotContract.load(robot)) == frame
