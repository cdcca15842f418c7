"""Recorded drives of other projects: files in their layouts, made here, become bags whose numbers are known."""

from __future__ import annotations

import dataclasses
import json
import math
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_core.cli import main
from vla_core.commands import decode
from vla_core.contract import RobotContract
from vla_core.data import bag as bags
from vla_core.data.drives.driven import DrivenPath, quaternion_of, spoken, transform_of
from vla_core.data.drives.kitti import oxts_poses, stamp_of
from vla_core.data.drives.nuscenes import NuScenes, radar_points
from vla_core.data.episodes import EpisodeReader
from vla_core.observation.builder import CloudSpec, ImageSize, ObservationSpec
from vla_core.observation.decode import decode as decode_stream
from vla_core.observation.ego_motion import decode_pose, matrix
from vla_core.observation.messages import deserialize

RADIUS, SPEED = 20.0, 5.0  # of the circle to the left that everybody drives here
START_US = 1_533_151_603_000_000
LIDAR_AT, LIDAR_TURN = [0.9, 0.0, 1.8], [math.sqrt(0.5), 0.0, 0.0, -math.sqrt(0.5)]  # nuScenes' LiDAR looks along y
INTRINSICS = [[1266.0, 0.0, 816.0], [0.0, 1266.0, 491.0], [0.0, 0.0, 1.0]]


def circle(seconds: float) -> tuple[float, float, float]:
    """x, y and yaw on the circle."""
    yaw = SPEED / RADIUS * seconds
    return RADIUS * math.sin(yaw), RADIUS * (1 - math.cos(yaw)), yaw


def ahead(seconds: np.ndarray) -> np.ndarray:
    """Rows x, y, yaw, speed of the circle, seen from its start."""
    return np.array([[*circle(t), SPEED] for t in seconds.tolist()])


def narrowed(name: str, *absent: str) -> RobotContract:
    """The contract without the streams whose names begin like that."""
    contract = RobotContract.load(name)
    left = {
        key: stream for key, stream in contract.observations.items()
        if key == "front_info" or not key.startswith(absent)
    }  # fmt: skip
    return dataclasses.replace(contract, observations=left)


def imported(root: Path) -> int:
    """``vla import nuscenes`` of the sensors that these scenes have."""
    contract = narrowed("nuscenes", "front_", "back", "radar_front_", "radar_back")
    (root / "small.yaml").write_text(contract.to_yaml())
    out = str(root / "bags")
    return main(["import", "nuscenes", str(root), "--out", out, "--contract", str(root / "small.yaml")])


# --- nuScenes -------------------------------------------------------------------------------------------------------


def write_nuscenes(root: Path, seconds: float = 5.0) -> None:
    """One scene: a front camera and a LiDAR at 10 Hz, of which every fifth is a key frame, and a radar."""
    tables: dict[str, list[dict[str, Any]]] = {
        "sensor": [{"token": c, "channel": c, "modality": "x"} for c in ("CAM_FRONT", "LIDAR_TOP", "RADAR_FRONT")],
        "calibrated_sensor": [
            {"token": "cal_CAM_FRONT", "sensor_token": "CAM_FRONT", "translation": [1.7, 0.0, 1.5],
             "rotation": [0.5, -0.5, 0.5, -0.5], "camera_intrinsic": INTRINSICS},
            {"token": "cal_LIDAR_TOP", "sensor_token": "LIDAR_TOP", "translation": LIDAR_AT, "rotation": LIDAR_TURN,
             "camera_intrinsic": []},
            {"token": "cal_RADAR_FRONT", "sensor_token": "RADAR_FRONT", "translation": [3.4, 0.0, 0.5],
             "rotation": [1.0, 0.0, 0.0, 0.0], "camera_intrinsic": []},
        ],
        "ego_pose": [], "sample_data": [], "sample": [],
        "scene": [{"token": "s", "name": "scene-0061", "first_sample_token": "sample0", "last_sample_token": "",
                   "nbr_samples": 0, "description": "a circle"}],
    }  # fmt: skip
    count = round(seconds * 10) + 1
    for k in range(count):
        is_key, t = k % 5 == 0, k / 10
        stamp = START_US + k * 100_000
        x, y, yaw = circle(t)
        tables["ego_pose"].append({"token": f"pose{k}", "timestamp": stamp, "translation": [400 + x, 1000 + y, 0.0],
                                   "rotation": [math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]})  # fmt: skip
        sample = f"sample{k // 5}"
        if is_key:
            following = "" if k + 5 >= count else f"sample{k // 5 + 1}"
            tables["sample"].append({"token": sample, "timestamp": stamp, "next": following, "prev": ""})
        for channel, suffix in (("CAM_FRONT", "jpg"), ("LIDAR_TOP", "pcd.bin"), ("RADAR_FRONT", "pcd")):
            name = f"{'samples' if is_key else 'sweeps'}/{channel}/{k:04d}.{suffix}"
            write_sensor(root / name, channel, k)
            tables["sample_data"].append({
                "token": f"{channel}{k}", "sample_token": sample, "ego_pose_token": f"pose{k}",
                "calibrated_sensor_token": f"cal_{channel}", "timestamp": stamp, "is_key_frame": is_key,
                "filename": name, "height": 90 if channel == "CAM_FRONT" else 0,
                "width": 160 if channel == "CAM_FRONT" else 0, "fileformat": suffix,
            })  # fmt: skip
    (root / "v1.0-mini").mkdir()
    for name, rows in tables.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))


RADAR_HEAD = """# .PCD v0.7 - Point Cloud Data file format
VERSION 0.7
FIELDS x y z dyn_prop id rcs vx vy vx_comp vy_comp
SIZE 4 4 4 1 2 4 4 4 4 4
TYPE F F F I I F F F F F
COUNT 1 1 1 1 1 1 1 1 1 1
WIDTH 2
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS 2
DATA binary
"""
RADAR_ROW = np.dtype([("place", "<f4", 3), ("dyn", "i1"), ("id", "<i2"), ("rcs", "<f4"), ("v", "<f4", 4)])


def write_sensor(path: Path, channel: str, k: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if channel == "CAM_FRONT":
        cv2.imwrite(str(path), np.full((90, 160, 3), 5 * (k % 50), dtype=np.uint8))
    elif channel == "LIDAR_TOP":
        np.array([[0.0, 10.0, -1.8, 50.0, 3.0], [-4.0, 0.0, 0.0, 7.0, 31.0]], dtype="<f4").tofile(path)
    else:
        rows = np.array([((30.0, 40.0, 0.0), 1, 4, 12.5, (3.0, -1.0, 9.0, 9.0)),
                         ((20.0, 0.0, 0.0), 1, 5, -2.0, (-5.0, 2.0, 9.0, 9.0))], dtype=RADAR_ROW)  # fmt: skip
        path.write_bytes(RADAR_HEAD.encode() + rows.tobytes())


def test_a_nuscenes_scene_becomes_a_bag_that_says_what_the_tables_say(tmp_path: Path) -> None:
    write_nuscenes(tmp_path)
    assert imported(tmp_path) == 0
    bag = tmp_path / "bags" / "scene-0061"
    contract = RobotContract.load("nuscenes")
    found: dict[str, list[Any]] = {}
    for message in bags.read(bag):
        found.setdefault(message.topic, []).append(message)
    streams = {s.topic: s for s in contract.observations.values() if s.topic != "odom"}
    assert len(found["lidar/points"]) == len(found["camera/front/image_raw/compressed"]) == 51

    points: Any = decode_stream(streams["lidar/points"], found["lidar/points"][0].data)
    np.testing.assert_array_equal(points, np.array([[0, 10, -1.8, 50, 3], [-4, 0, 0, 7, 31]], dtype=np.float32))
    velocities: Any = decode_stream(streams["radar/front/points"], found["radar/front/points"][7].data)
    # Along (30, 40) / 50 the velocity (3, -1) is 1 m/s away; of a target straight ahead only vx counts.
    np.testing.assert_allclose(velocities, [[30, 40, 0, 1.0, 12.5], [20, 0, 0, -5.0, -2.0]])
    calibration: Any = decode_stream(streams["camera/front/camera_info"], found["camera/front/camera_info"][0].data)
    np.testing.assert_array_equal(calibration.intrinsics, INTRINSICS)
    assert (calibration.height, calibration.width, calibration.frame_id) == (90, 160, "front")

    (action,) = contract.actions.values()
    plans = found[action.topic]
    assert len(plans) == 21, "3 s before the end of 5 s the last trajectory that is known begins"
    for message in plans[1:-1]:
        np.testing.assert_allclose(decode(action, message.data), ahead(np.arange(7) / 2), atol=0.02)
    assert [str(decode_stream(streams["instruction"], m.data)) for m in found["instruction"]] == ["turn left"]
    odometry = contract.stream("odom")
    pose = decode_pose(odometry, found["odom"][10].data)
    x, y, yaw = circle(1.0)
    np.testing.assert_allclose(pose, [400 + x, 1000 + y, 0, 0, 0, math.sin(yaw / 2), math.cos(yaw / 2)], atol=1e-9)

    static = bags_transforms(found["/tf_static"][0].data)
    in_base = static["lidar"] @ np.array([0.0, 10.0, -1.8, 1.0])  # what is ahead of this LiDAR is on its y axis
    np.testing.assert_allclose(in_base[:3], [10.9, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(static["front"] @ np.array([0.0, 0.0, 5.0, 1.0]), [6.7, 0, 1.5, 1], atol=1e-6)


def bags_transforms(data: bytes) -> dict[str, np.ndarray]:
    found = {}
    for entry in deserialize("tf2_msgs/msg/TFMessage", data).transforms:
        assert entry.header.frame_id == "base_link"
        t, q = entry.transform.translation, entry.transform.rotation
        found[entry.child_frame_id] = matrix(np.array([t.x, t.y, t.z, q.x, q.y, q.z, q.w]))
    return found


def test_the_observation_path_takes_the_bag_as_any_other(tmp_path: Path) -> None:
    """What the recording has is seen at every tick."""
    write_nuscenes(tmp_path)
    imported(tmp_path)
    spec = ObservationSpec(
        images={"front": ImageSize(height=45, width=80)}, calibrations={"front": "front_info"}, state=("motion",),
        clouds={"lidar": CloudSpec(max_points=8), "radar_front": CloudSpec(max_points=4)}, instruction="instruction",
    )  # fmt: skip
    with bags.opened(tmp_path / "bags" / "scene-0061") as opened:
        ticks = list(EpisodeReader(opened, RobotContract.load("nuscenes"), spec))
    seen = [tick for tick in ticks if tick.observation is not None and tick.action is not None]
    assert len(seen) >= 4
    for tick in seen[1:]:
        assert tick.observation is not None and tick.action is not None
        np.testing.assert_allclose(tick.observation.state, [SPEED, SPEED / RADIUS], atol=0.02)
        np.testing.assert_allclose(np.reshape(tick.action, (7, 4)), ahead(np.arange(7) / 2), atol=0.02)
        assert tick.observation.calibrations["front"].intrinsics[0, 0] == pytest.approx(633.0)
        assert tick.observation.instruction == "turn left"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda root: (root / "v1.0-mini" / "sample.json").unlink(), "sample.json is missing; expected the tables"),
        (lambda root: (root / "v1.0-mini" / "scene.json").write_text("{"), "scene.json: no JSON"),
        (lambda root: (root / "sweeps" / "LIDAR_TOP" / "0001.pcd.bin").unlink(), "take --keyframes"),
        (lambda root: (root / "samples" / "LIDAR_TOP" / "0000.pcd.bin").unlink(), "0000.pcd.bin is missing"),
        (lambda root: (root / "samples" / "LIDAR_TOP" / "0000.pcd.bin").write_bytes(b"1234"), "are no rows of x, y, z"),
        (lambda root: (root / "samples" / "RADAR_FRONT" / "0000.pcd").write_bytes(b"nothing"), "no binary PCD 0.7"),
        (lambda root: (root / "v1.0-mini").rename(root / "v2"), "no folder v1.0-"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_nuscenes_folder_is_named_and_leaves_no_bag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, text: str
) -> None:
    write_nuscenes(tmp_path, 4.0)
    damage(tmp_path)
    assert imported(tmp_path) == 1
    assert text in capsys.readouterr().err
    assert not list((tmp_path / "bags").glob("*")) if (tmp_path / "bags").exists() else True


def test_radar_files_that_are_cut_or_lack_a_field_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "a.pcd"
    write_sensor(file, "RADAR_FRONT", 0)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Exception, match=r"a.pcd: .* bytes for 2 points .* it is cut"):
        radar_points(file)
    file.write_bytes(RADAR_HEAD.replace(" rcs ", " what ").encode())
    with pytest.raises(Exception, match="no field rcs; the file has"):
        radar_points(file)


def test_key_frames_alone_are_enough(tmp_path: Path) -> None:
    write_nuscenes(tmp_path, 5.0)
    for file in (tmp_path / "sweeps").rglob("*.*"):
        file.unlink()
    (drive,) = NuScenes(tmp_path, sweeps=False).drives()
    assert len(drive.path.stamps_ns) == 11
    assert {name for name, _, _ in drive.sensors()} == {"front", "front_info", "lidar", "radar_front"}


# --- KITTI ----------------------------------------------------------------------------------------------------------

FIRST = datetime(2011, 9, 26, 13, 2, 25, 964389)
LATITUDE, LONGITUDE, EARTH = 49.0, 8.4, 6378137.0


def write_kitti(root: Path, count: int = 51) -> Path:
    day = root / "2011_09_26"
    drive = day / "2011_09_26_drive_0001_sync"
    for folder in ("image_02", "velodyne_points", "oxts"):
        (drive / folder / "data").mkdir(parents=True)
        lines = [f"{FIRST + timedelta(seconds=k / 10):%Y-%m-%d %H:%M:%S.%f}000\n" for k in range(count)]
        (drive / folder / "timestamps.txt").write_text("".join(lines))
    scale = math.cos(math.radians(LATITUDE))
    north0 = scale * EARTH * math.log(math.tan(math.radians(90 + LATITUDE) / 2))
    for k in range(count):
        x, y, yaw = circle(k / 10)
        longitude = LONGITUDE + math.degrees(x / (scale * EARTH))
        latitude = math.degrees(2 * math.atan(math.exp((north0 + y) / (scale * EARTH)))) - 90
        numbers = [latitude, longitude, 112.0, 0.0, 0.0, yaw, 0, 0, SPEED, 0, 0, 0.0, SPEED**2 / RADIUS, 9.81, 0, 0, 0,
                   0.0, 0.0, SPEED / RADIUS, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]  # fmt: skip
        (drive / "oxts" / "data" / f"{k:010d}.txt").write_text(" ".join(map(repr, numbers)))
        if k != 4:  # a sweep that is missing, as in drives of the dataset
            np.array([[10, 1, -1.7, 0.25]], dtype="<f4").tofile(drive / "velodyne_points" / "data" / f"{k:010d}.bin")
        cv2.imwrite(str(drive / "image_02" / "data" / f"{k:010d}.png"), np.full((37, 124, 3), k, dtype=np.uint8))
    # The LiDAR stands 0.81 m before and 0.8 m above the IMU, the camera 0.27 m before and 0.08 m below the LiDAR.
    (day / "calib_imu_to_velo.txt").write_text("calib_time: x\nR: 1 0 0 0 1 0 0 0 1\nT: -0.81 0.0 -0.8\n")
    (day / "calib_velo_to_cam.txt").write_text("calib_time: x\nR: 0 -1 0 0 0 -1 1 0 0\nT: 0.0 -0.08 -0.27\n")
    (day / "calib_cam_to_cam.txt").write_text(
        "calib_time: 09-Jan-2012 13:57:47\ncorner_dist: 9.950000e-02\nS_rect_02: 1.24e+02 3.7e+01\n"
        "R_rect_00: 1 0 0 0 1 0 0 0 1\nP_rect_02: 72 0 62 4.32 0 72 18 0 0 0 1 0\n"
    )
    return drive


def test_a_kitti_drive_becomes_a_bag(tmp_path: Path) -> None:
    write_kitti(tmp_path)
    out = tmp_path / "bags"
    mono = narrowed("kitti", "front_right")
    file = tmp_path / "mono.yaml"
    file.write_text(mono.to_yaml())
    assert main(["import", "kitti", str(tmp_path), "--out", str(out), "--contract", str(file)]) == 0
    found: dict[str, list[Any]] = {}
    for message in bags.read(out / "2011_09_26_drive_0001_sync"):
        found.setdefault(message.topic, []).append(message)
    assert (len(found["lidar/points"]), len(found["imu/data"])) == (50, 51)
    assert found["imu/data"][0].stamp_ns == stamp_of("2011-09-26 13:02:25.964389000")
    (action,) = mono.actions.values()
    np.testing.assert_allclose(decode(action, found[action.topic][3].data), ahead(np.arange(7) / 2), atol=0.02)
    turning: Any = decode_stream(mono.stream("imu"), found["imu/data"][9].data)
    np.testing.assert_allclose(turning, [0, 0, SPEED / RADIUS, 0, SPEED**2 / RADIUS, 9.81], rtol=1e-6)
    static = bags_transforms(found["/tf_static"][0].data)
    np.testing.assert_allclose(static["lidar"] @ [10, 1, -1.73, 1], [10.81, 1, 0, 1], atol=1e-9)
    # 5 m before the camera, which is moved to the left by 4.32 / 72 m.
    np.testing.assert_allclose(static["front"] @ [0, 0, 5, 1], [0.81 + 0.27 + 5, 0.06, 1.73 - 0.08, 1], atol=1e-9)
    picture = decode_stream(mono.stream("front"), found["camera/front/image_raw/compressed"][20].data)
    np.testing.assert_array_equal(picture, np.full((37, 124, 3), 20))


def test_what_kitti_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(text: str) -> None:
        assert main(["import", "kitti", str(tmp_path), "--out", str(tmp_path / "bags")]) == 1
        assert text in capsys.readouterr().err

    fails("expected KITTI's synced raw data")
    drive = write_kitti(tmp_path, 35)
    fails("cannot do without")  # the right camera
    (drive.parent / "calib_velo_to_cam.txt").unlink()
    fails("calib_velo_to_cam.txt is missing; the calibration is a download of its own")
    (drive / "oxts" / "data" / "0000000003.txt").write_text("1 2 3")
    fails("0000000003.txt: 3 numbers, expected 30")
    with pytest.raises(Exception, match="no time stamp: 'noon'"):
        stamp_of("noon")


def test_oxts_poses_are_rigid_and_start_in_the_origin() -> None:
    rng = np.random.default_rng(0)
    rows = np.zeros((5, 30))
    rows[:, :2] = np.array([LATITUDE, LONGITUDE]) + rng.normal(0, 1e-4, (5, 2))
    rows[:, 3:6] = rng.normal(0, 0.5, (5, 3))
    poses = oxts_poses(rows)
    np.testing.assert_allclose(poses[:, :3, :3] @ poses[:, :3, :3].transpose(0, 2, 1), np.tile(np.eye(3), (5, 1, 1)),
                               atol=1e-12)  # fmt: skip
    np.testing.assert_array_equal(poses[0, :3, 3], 0)
    # Roll, pitch and yaw by the elementary rotations.
    roll, pitch, yaw = rows[2, 3:6]
    by_hand = _turn("z", yaw) @ _turn("y", pitch) @ _turn("x", roll)
    np.testing.assert_allclose(poses[2, :3, :3], by_hand, atol=1e-12)


def _turn(axis: str, angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    rows = {"x": [[1, 0, 0], [0, c, -s], [0, s, c]], "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
            "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]]}  # fmt: skip
    return np.array(rows[axis])


# --- where it went --------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_quaternions_of_rotations_give_the_rotation_back(wxyz: list[float]) -> None:
    rotation = transform_of(np.zeros(3), np.array(wxyz))
    x, y, z, w = quaternion_of(rotation[:3, :3])
    assert w >= 0
    np.testing.assert_allclose(matrix(np.array([0, 0, 0, x, y, z, w])), rotation, atol=1e-9)


@given(st.floats(-3, 3), st.floats(-100, 100), st.floats(-100, 100))
def test_a_trajectory_does_not_depend_on_the_frame_that_poses_are_in(turn: float, x0: float, y0: float) -> None:
    stamps = np.arange(41, dtype=np.int64) * 100_000_000
    poses = []
    for stamp in stamps.tolist():
        x, y, yaw = circle(stamp / 1e9)
        cos, sin = math.cos(turn), math.sin(turn)
        half = (yaw + turn) / 2
        poses.append([x0 + cos * x - sin * y, y0 + sin * x + cos * y, 0, 0, 0, math.sin(half), math.cos(half)])
    path = DrivenPath(stamps, np.array(poses))
    rows = path.trajectory(500_000_000, 7, 500_000_000)
    assert rows is not None
    np.testing.assert_allclose(rows, ahead(np.arange(7) / 2), atol=0.01)
    assert path.twist(2_000_000_000) == pytest.approx((SPEED, SPEED / RADIUS), abs=0.01)
    assert path.trajectory(1_100_000_000, 7, 500_000_000) is None, "the recording ends before 4.1 s"


def test_words_follow_from_where_the_trajectory_ends() -> None:
    rows = np.zeros((7, 4))
    assert spoken(rows) == "go straight"
    rows[-1, 1] = 2.5
    assert spoken(rows) == "turn left"
    assert spoken(-rows) == "turn right"
