"""Observations of many sensors: history, windows, clouds, masks and ego-motion, live and from a bag."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.contract import RobotContract, Stream
from vla_core.data.episodes import replay_ticks
from vla_core.observation import decode as decode_module
from vla_core.observation import messages
from vla_core.observation.builder import (
    CloudSpec,
    ImageSize,
    Observation,
    ObservationBuilder,
    ObservationSpec,
    Unobserved,
)
from vla_core.observation.memory_buffer import MemoryBuffer
from vla_core.observation.messages import Message, serialize, typestore

from .helpers import CONTRACT, IMAGE, JOINTS, MS, START, STEP, arm, camera, mark, pixels, raw_image, task

IMU, ODOMETRY, CLOUD = "sensor_msgs/msg/Imu", "nav_msgs/msg/Odometry", "sensor_msgs/msg/PointCloud2"
INFO = "sensor_msgs/msg/CameraInfo"
POSE = (*(f"pose.pose.position.{a}" for a in "xyz"), *(f"pose.pose.orientation.{a}" for a in "xyzw"))
TYPES = typestore().types


def vector3(values: Any) -> Any:
    return TYPES["geometry_msgs/msg/Vector3"](**dict(zip("xyz", map(float, values), strict=True)))


def imu(stamp_ns: int, value: float) -> Message:
    zeros = np.zeros(9)
    message = TYPES[IMU](
        header=messages.header(stamp_ns), orientation=TYPES["geometry_msgs/msg/Quaternion"](x=0, y=0, z=0, w=1),
        orientation_covariance=zeros, angular_velocity=vector3((value, 0, 0)), angular_velocity_covariance=zeros,
        linear_acceleration=vector3((0, 0, -value)), linear_acceleration_covariance=zeros,
    )  # fmt: skip
    return Message("imu", IMU, stamp_ns, serialize(IMU, message))


def odometry(stamp_ns: int, x: float, y: float, yaw: float) -> Message:
    pose = TYPES["geometry_msgs/msg/Pose"](
        position=TYPES["geometry_msgs/msg/Point"](x=x, y=y, z=0.5),
        orientation=TYPES["geometry_msgs/msg/Quaternion"](x=0.0, y=0.0, z=np.sin(yaw / 2), w=np.cos(yaw / 2)),
    )  # fmt: skip
    twist = TYPES["geometry_msgs/msg/Twist"](linear=vector3((0, 0, 0)), angular=vector3((0, 0, 0)))
    covariance = np.zeros(36)
    message = TYPES[ODOMETRY](
        header=messages.header(stamp_ns), child_frame_id="base",
        pose=TYPES["geometry_msgs/msg/PoseWithCovariance"](pose=pose, covariance=covariance),
        twist=TYPES["geometry_msgs/msg/TwistWithCovariance"](twist=twist, covariance=covariance),
    )  # fmt: skip
    return Message("odom", ODOMETRY, stamp_ns, serialize(ODOMETRY, message))


def cloud(stamp_ns: int, points: np.ndarray) -> Message:
    """Points (N, 4): x, y, z, intensity."""
    entry = TYPES["sensor_msgs/msg/PointField"]
    fields = [entry(name=n, offset=4 * k, datatype=7, count=1) for k, n in enumerate(("x", "y", "z", "intensity"))]
    message = TYPES[CLOUD](
        header=messages.header(stamp_ns), height=1, width=len(points), fields=fields, is_bigendian=False, point_step=16,
        row_step=16 * len(points), data=points.astype("<f4").view(np.uint8).reshape(-1), is_dense=True,
    )  # fmt: skip
    return Message("lidar", CLOUD, stamp_ns, serialize(CLOUD, message))


def info(stamp_ns: int) -> Message:
    k = np.array([8.0, 0, 3.5, 0, 8, 2.5, 0, 0, 1])
    message = TYPES[INFO](
        header=messages.header(stamp_ns), height=6, width=8, distortion_model="plumb_bob", d=np.zeros(5), k=k,
        r=np.eye(3).reshape(-1), p=np.eye(3, 4).reshape(-1), binning_x=0, binning_y=0,
        roi=TYPES["sensor_msgs/msg/RegionOfInterest"](x_offset=0, y_offset=0, height=0, width=0, do_rectify=False),
    )  # fmt: skip
    return Message("cam/info", INFO, stamp_ns, serialize(INFO, message))


def doppler(stamp_ns: int, seed: int) -> Message:
    power = np.random.default_rng(seed).random((4, 5), dtype=np.float32)
    message = raw_image(power.tobytes(), height=4, width=5, step=20, encoding="32FC1",
                        header=messages.header(stamp_ns))  # fmt: skip
    return Message("radar/map", IMAGE, stamp_ns, serialize(IMAGE, message))


MANY = RobotContract(
    name="many",
    rate_hz=100.0,
    observations={
        **CONTRACT.observations,
        "info": Stream(topic="cam/info", type=INFO, rate_hz=25.0, max_age_s=0.2),
        "imu": Stream(topic="imu", type=IMU, rate_hz=200.0, max_age_s=0.05, sampling="window", window_s=0.05,
                      names=("angular_velocity.x", "linear_acceleration.z"), units=("rad/s", "m/s2")),
        "odom": Stream(topic="odom", type=ODOMETRY, rate_hz=50.0, max_age_s=0.1, sampling="interpolate",
                       names=POSE, units=("m",) * 3 + ("1",) * 4),
        "lidar": Stream(topic="lidar", type=CLOUD, rate_hz=10.0, max_age_s=0.2, sampling="nearest", tolerance_s=0.2,
                        names=("x", "y", "z", "intensity"), units=("m", "m", "m", "1")),
        "map": Stream(topic="radar/map", type=IMAGE, rate_hz=10.0, max_age_s=0.3),
    },
    actions=CONTRACT.actions,
)  # fmt: skip
SPEC = ObservationSpec(
    images={"camera": ImageSize(height=3, width=4)}, state=("arm", "odom"), instruction="task",
    clouds={"lidar": CloudSpec(max_points=6, ego_motion="odom")}, sequences=("imu",), maps=("map",),
    calibrations={"camera": "info"}, history=3,
)  # fmt: skip


def changed(name: str, **changes: Any) -> RobotContract:
    stream = dataclasses.replace(MANY.observations[name], **changes)
    return dataclasses.replace(MANY, observations={**MANY.observations, name: stream})


def recording(rng: np.random.Generator, duration: int = 400 * MS) -> list[Message]:
    """All sensors with jitter, in order of their stamps; stamps are unique."""
    found: list[Message] = [task(START, "drive")]

    def stamps(period: int, jitter: int) -> list[int]:
        ideal = START + np.arange(0, duration, period)
        return sorted({int(t) for t in ideal + rng.integers(0, jitter + 1, len(ideal))})

    found += [camera(t, k) for k, t in enumerate(stamps(40 * MS, 9 * MS))]
    found += [arm(t, k / 100, -k) for k, t in enumerate(stamps(10 * MS, 2 * MS))]
    found += [info(t) for t in stamps(40 * MS, 9 * MS)]
    found += [imu(t, k) for k, t in enumerate(stamps(5 * MS, 2 * MS))]
    found += [odometry(t, k / 10, k / 20, k / 30) for k, t in enumerate(stamps(20 * MS, 5 * MS))]
    found += [cloud(t, rng.random((9, 4)) + k) for k, t in enumerate(stamps(100 * MS, 30 * MS))]
    found += [doppler(t, k) for k, t in enumerate(stamps(100 * MS, 30 * MS))]
    return sorted(found, key=lambda m: m.stamp_ns)


def feed(builder: ObservationBuilder, recorded: list[Message], buffer: MemoryBuffer | None = None) -> MemoryBuffer:
    buffer = buffer or builder.make_buffer()
    for message in recorded:
        for name in builder.by_topic.get(message.topic, ()):
            buffer.add(name, message.stamp_ns, message.data)
    return buffer


def assert_equal(a: Any, b: Any, place: str = "observation") -> None:
    """Bit-equality of two observations, whatever is in them."""
    assert type(a) is type(b), place
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, place
        np.testing.assert_array_equal(a, b, err_msg=place)
    elif dataclasses.is_dataclass(a):
        for f in dataclasses.fields(a):
            assert_equal(getattr(a, f.name), getattr(b, f.name), f"{place}.{f.name}")
    elif isinstance(a, dict):
        assert set(a) == set(b), place
        for key in a:
            assert_equal(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, tuple):
        assert len(a) == len(b), place
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_equal(one, other, f"{place}[{i}]")
    else:
        assert a == b, place


# --- what an observation holds --------------------------------------------------------------------------------------


def test_every_sensor_is_seen_as_its_spec_says() -> None:
    builder = ObservationBuilder(MANY, dataclasses.replace(SPEC, history=1, clouds={"lidar": CloudSpec(max_points=6)}))
    points = np.arange(36.0).reshape(9, 4)
    recorded = [
        task(START, "go"), camera(START, 5), info(START), arm(START, 0.5, 2), cloud(START, points), doppler(START, 3),
        odometry(START, 1, 2, 0.4), odometry(START + 20 * MS, 3, 4, 0.8),
        *(imu(START - 30 * MS + k * 5 * MS, k) for k in range(8)),
    ]  # fmt: skip
    seen = builder.build(feed(builder, recorded), START + 6 * MS)
    assert seen.images["camera"].shape == (3, 4, 3) and seen.instruction == "go"
    np.testing.assert_allclose(seen.state, [0.5, 2, 1, 2, 0.5, 0, 0, np.sin(0.2), np.cos(0.2)], rtol=1e-6)
    np.testing.assert_array_equal(seen.clouds["lidar"], points[[0, 1, 3, 4, 6, 7]].astype(np.float32))
    window = seen.sequences["imu"]
    assert window.values.shape == (10, 2) and window.values.dtype == np.float32
    assert window.mask.tolist() == [False] * 2 + [True] * 8
    assert window.values[:, 0].tolist() == [0, 0, *range(8)] and window.values[:, 1].tolist() == [
        0,
        0,
        *(-np.arange(8)),
    ]
    np.testing.assert_array_equal(seen.maps["map"], np.random.default_rng(3).random((4, 5), dtype=np.float32))
    scaled = seen.calibrations["camera"]
    assert (scaled.width, scaled.height) == (4, 3)
    np.testing.assert_allclose(scaled.intrinsics, [[4, 0, 1.5], [0, 4, 1], [0, 0, 1]])
    assert seen.present == dict.fromkeys(["camera", "arm", "odom", "task", "lidar", "imu", "map", "info"], True)
    assert seen.ages_ns["imu"] == MS and seen.ages_ns["camera"] == 6 * MS and seen.history == ()


def test_a_blank_observation_has_the_form_of_a_real_one() -> None:
    builder = ObservationBuilder(MANY, SPEC)
    blank = builder.blank()
    recorded = recording(np.random.default_rng(0))
    real = builder.build(feed(builder, recorded), recorded[-1].stamp_ns)
    for a, b in zip((blank, *blank.history), (real, *real.history), strict=True):
        assert {n: p.shape for n, p in a.images.items()} == {n: p.shape for n, p in b.images.items()}
        assert a.state.shape == b.state.shape and a.state.dtype == b.state.dtype
        assert a.sequences["imu"].values.shape == b.sequences["imu"].values.shape
        assert a.clouds["lidar"].shape == b.clouds["lidar"].shape and a.clouds["lidar"].dtype == np.float32
        assert set(a.maps) == set(b.maps) and set(a.calibrations) == set(b.calibrations) and a.present == b.present


# --- history --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_past_ticks_hold_what_a_search_through_the_recording_finds(seed: int) -> None:
    """Each past tick by plain search; what came after it, until the newest tick, is seen by nearest and interpolate."""
    recorded = recording(np.random.default_rng(seed))
    spec = dataclasses.replace(SPEC, clouds={"lidar": CloudSpec(max_points=99)}, history=4)
    builder = ObservationBuilder(MANY, spec)
    at = START + 250 * MS + seed * MS
    seen = builder.build(feed(builder, recorded), at)
    assert [past.stamp_ns for past in seen.history] == [at - 3 * STEP, at - 2 * STEP, at - STEP]

    def of(topic: str) -> list[Message]:
        return [m for m in recorded if m.topic == topic and m.stamp_ns <= at]

    for tick in (*seen.history, seen):
        t = tick.stamp_ns
        held = max((m for m in of("arm/state") if m.stamp_ns <= t), key=lambda m: m.stamp_ns)
        np.testing.assert_array_equal(tick.state[:2], arm_values(held).astype(np.float32))
        clouds = min(of("lidar"), key=lambda m: (abs(m.stamp_ns - t), m.stamp_ns))
        assert tick.ages_ns["lidar"] == t - clouds.stamp_ns
        before = max((m for m in of("odom") if m.stamp_ns <= t), key=lambda m: m.stamp_ns)
        after = min((m for m in of("odom") if m.stamp_ns > t), key=lambda m: m.stamp_ns, default=before)
        x0, x1 = odometry_x(before), odometry_x(after)
        w = 0.0 if after is before else (t - before.stamp_ns) / (after.stamp_ns - before.stamp_ns)
        assert tick.state[2] == pytest.approx((1 - w) * x0 + w * x1, abs=1e-6)
        inside = [m for m in of("imu") if t - 50 * MS < m.stamp_ns <= t][-10:]
        assert tick.sequences["imu"].mask.sum() == len(inside)
    assert seen.history[0].ages_ns["odom"] == 0, "a past tick lies between two messages"


def arm_values(message: Message) -> np.ndarray:
    return np.asarray(messages.deserialize(JOINTS, message.data).position)


def odometry_x(message: Message) -> float:
    return float(messages.deserialize(ODOMETRY, message.data).pose.pose.position.x)


def test_a_frame_is_decoded_once_and_only_if_it_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 Hz camera, 100 Hz ticks, 4 ticks of history: each frame once; what no tick samples, never."""
    decoded: list[int] = []
    original = decode_module.DECODERS[IMAGE]

    def count(message: Any, stream: Stream) -> decode_module.Value:
        decoded.append(int(message.header.stamp.nanosec))
        return original(message, stream)

    monkeypatch.setitem(decode_module.DECODERS, IMAGE, count)
    spec = ObservationSpec(images={"camera": ImageSize(height=3, width=4)}, history=4)
    builder = ObservationBuilder(CONTRACT, spec)
    buffer = builder.make_buffer()
    for k in range(40):
        stamp = START + k * STEP
        if k % 4 == 0:
            feed(builder, [camera(stamp - d * MS, 10 * k + d) for d in (3, 2, 1, 0)], buffer)  # a burst: 3 unsampled
        seen = builder.build(buffer, stamp)
    expected = [(START + k * STEP) % 10**9 for k in range(0, 40, 4)]
    assert decoded == expected
    assert seen.history[-1].images["camera"] is seen.images["camera"], "ticks that hold a frame share it"


def test_before_the_start_of_an_episode_the_past_is_masked_whatever_the_contract_says() -> None:
    spec = ObservationSpec(
        images={"camera": ImageSize(height=6, width=8)}, state=("arm",), instruction="task", history=3
    )
    builder = ObservationBuilder(CONTRACT, spec)
    buffer = feed(builder, [task(START, "x"), *(arm(START + k * STEP, k) for k in range(-9, 3)),
                            *(camera(START + k * STEP, k + 9) for k in range(-9, 3))])  # fmt: skip
    buffer.start_episode(START)
    first = builder.build(buffer, START)
    assert first.present == {"camera": True, "arm": True, "task": True}
    for past in first.history:
        assert past.present == {"camera": False, "arm": False, "task": True}
        assert past.images == {} and np.isnan(past.state).all() and past.ages_ns.keys() == {"task"}
    second = builder.build(buffer, START + STEP)
    assert [past.present["arm"] for past in second.history] == [False, True]
    np.testing.assert_array_equal(second.history[1].images["camera"], pixels(9))


def test_a_gap_in_the_past_is_refused_as_the_contract_says() -> None:
    spec = ObservationSpec(state=("arm",), history=12)
    recorded = [arm(START + k * STEP, k) for k in (0, 1, 8, 9, 10)]
    builder = ObservationBuilder(CONTRACT, spec)
    buffer = feed(builder, recorded)
    with pytest.raises(Unobserved, match=r"^arm \(arm/state\): 0\.060 s old, limit 0\.05 s, 0\.030 s before the tick$"):
        builder.build(buffer, START + 10 * STEP)
    assert len(builder.absent(buffer, START + 10 * STEP)) == 1
    lenient = dataclasses.replace(
        CONTRACT, observations={"arm": dataclasses.replace(CONTRACT.observations["arm"], missing="mask")}
    )
    builder = ObservationBuilder(lenient, spec)
    seen = builder.build(feed(builder, recorded), START + 10 * STEP)
    there = [past.present["arm"] for past in seen.history]
    assert there == [False] + [k != 7 for k in range(10)], "before the start, then all but the one beyond the limit"


# --- missing --------------------------------------------------------------------------------------------------------


def test_a_masked_stream_is_left_out_and_a_refusing_one_refuses() -> None:
    contract = changed("camera", missing="mask")
    contract = dataclasses.replace(
        contract, observations={**contract.observations, "odom": dataclasses.replace(
            MANY.observations["odom"], missing="mask")},
    )  # fmt: skip
    spec = ObservationSpec(images={"camera": ImageSize(height=6, width=8)}, state=("arm", "odom"))
    builder = ObservationBuilder(contract, spec)
    buffer = feed(builder, [camera(START, 1), arm(START + 150 * MS, 0.5, 0.25)])
    assert builder.due(buffer, START + 150 * MS) == [], "nobody waits for what is missing and may be"
    seen = builder.build(buffer, START + 150 * MS)
    assert seen.images == {} and seen.present == {"camera": False, "arm": True, "odom": False}
    assert seen.state[:2].tolist() == [0.5, 0.25] and np.isnan(seen.state[2:]).all() and len(seen.state) == 9
    assert builder.absent(buffer, START + 150 * MS) == []
    camera_line, odom_line = builder.masked(buffer, START + 150 * MS)
    assert camera_line == "camera (cam/raw): 0.150 s old, limit 0.1 s" and odom_line == "odom (odom): nothing received"
    with pytest.raises(Unobserved) as caught:
        builder.build(buffer, START + 300 * MS)
    assert caught.value.reasons == ["arm (arm/state): 0.150 s old, limit 0.05 s"]


# --- ego-motion -----------------------------------------------------------------------------------------------------

MOUNT = (0.4, -0.2, 1.1, *(np.array([0.0, 0.0, np.sin(0.3), np.cos(0.3)]).tolist()))


def world_to_sensor(world: np.ndarray, x: float, y: float, yaw: float) -> np.ndarray:
    """Static points (N, 3) seen by the mounted sensor of a base at (x, y, 0.5) heading ``yaw``, by plane geometry."""

    def turned_back(points: np.ndarray, angle: float) -> np.ndarray:
        c, s = np.cos(angle), np.sin(angle)
        return np.stack([c * points[:, 0] + s * points[:, 1], c * points[:, 1] - s * points[:, 0], points[:, 2]], 1)

    in_base = turned_back(world - np.array([x, y, 0.5]), yaw)
    return turned_back(in_base - np.array(MOUNT[:3]), 0.6)


@pytest.mark.parametrize(("speed", "yaw_rate"), [(8.0, 0.0), (0.0, 1.5), (8.0, 0.7), (-3.0, -2.0)])
def test_a_static_world_stands_still_in_the_history(speed: float, yaw_rate: float) -> None:
    """Constant speed and yaw rate, in closed form: the points of all ticks coincide with those seen now."""

    def pose(t_ns: int) -> tuple[float, float, float]:
        t = (t_ns - START) / 1e9
        yaw = 0.3 + yaw_rate * t
        if yaw_rate == 0:
            return speed * t * np.cos(0.3), speed * t * np.sin(0.3), yaw
        radius = speed / yaw_rate
        return radius * (np.sin(yaw) - np.sin(0.3)), radius * (np.cos(0.3) - np.cos(yaw)), yaw

    rng = np.random.default_rng(1)
    world = rng.uniform(-20, 20, (6, 3))
    lidar = dataclasses.replace(MANY.observations["lidar"], sampling="hold", tolerance_s=None)
    contract = dataclasses.replace(MANY, rate_hz=10.0, observations={**MANY.observations, "lidar": lidar})
    spec = ObservationSpec(clouds={"lidar": CloudSpec(max_points=99, ego_motion="odom", mount=MOUNT)}, history=4)
    builder = ObservationBuilder(contract, spec)
    clouds = [
        cloud(t, np.hstack([world_to_sensor(world, *pose(t)), np.full((6, 1), k)]))
        for k, t in enumerate(START + 7 * MS + 100 * MS * np.arange(6))
    ]
    poses = [odometry(int(t), *pose(int(t))) for t in START + np.arange(0, 600 * MS, 20 * MS)]
    seen = builder.build(feed(builder, [*clouds, *poses]), START + 520 * MS)
    now = seen.clouds["lidar"]
    np.testing.assert_allclose(now[:, :3], world_to_sensor(world, *pose(START + 507 * MS)), atol=1e-4)
    assert [past.clouds["lidar"][0, 3] for past in seen.history] == [2, 3, 4], "other columns stay as they are"
    for past in seen.history:
        # Positions between two messages lie on the chord: its height over the arc bounds the error.
        chord = abs(speed * yaw_rate) * 0.02**2 / 8
        np.testing.assert_allclose(past.clouds["lidar"][:, :3], now[:, :3], atol=2e-5 + 2 * chord)
    plain = ObservationBuilder(contract, dataclasses.replace(spec, clouds={"lidar": CloudSpec(max_points=99)}))
    raw = plain.build(feed(plain, [*clouds, *poses]), START + 520 * MS)
    assert np.abs(raw.history[0].clouds["lidar"] - now)[:, :3].max() > 0.3, "without it the world would move"


def test_past_clouds_without_odometry_are_refused_or_masked() -> None:
    spec = ObservationSpec(clouds={"lidar": CloudSpec(max_points=99, ego_motion="odom")}, history=3)
    points = np.ones((2, 4))
    recorded = [*(cloud(START + k * STEP, points + k) for k in range(12)), odometry(START, 0, 0, 0)]
    at = START + 11 * STEP  # 110 ms after the only odometry, whose greatest age is 100 ms
    builder = ObservationBuilder(MANY, spec)
    with pytest.raises(Unobserved, match=r"^odom \(odom\): 0.110 s old, limit 0.1 s for the clouds of lidar"):
        builder.build(feed(builder, recorded), at)
    builder = ObservationBuilder(changed("odom", missing="mask"), spec)
    seen = builder.build(feed(builder, recorded), at)
    assert seen.present["lidar"] and [past.present["lidar"] for past in seen.history] == [False, False]
    assert seen.history[0].clouds == {}


def test_an_orientation_that_is_no_rotation_is_refused() -> None:
    bad = odometry(START, 0, 0, 0)
    message = messages.deserialize(ODOMETRY, bad.data)
    message.pose.pose.orientation.w = 0.0  # a driver that never filled it in
    bad = dataclasses.replace(bad, data=serialize(ODOMETRY, message))
    spec = ObservationSpec(clouds={"lidar": CloudSpec(max_points=99, ego_motion="odom")}, history=2)
    builder = ObservationBuilder(MANY, spec)
    recorded = [bad, *(cloud(START + k * STEP, np.ones((2, 4))) for k in range(2))]
    with pytest.raises(messages.MessageError, match="odom: the orientation has length 0, expected a unit quaternion"):
        builder.build(feed(builder, recorded), START + STEP)


# --- parity ---------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_live_and_bag_are_bit_equal(seed: int, offline: bool) -> None:
    """Messages that arrive late and out of order, against the same ones sorted, through the bag's own replay.

    What it guards against: nearest and interpolate taking what is stamped after the newest tick, a past tick that sees
    less than it may, odometry that is held at one tick and interpolated at the next.
    """
    rng = np.random.default_rng(seed)
    recorded = recording(rng, 250 * MS)
    contract = dataclasses.replace(MANY, offline=offline)
    offline_builder = ObservationBuilder(contract, SPEC)
    buffer = offline_builder.make_buffer()
    replayed: dict[int, Observation] = {}
    for tick in replay_ticks(recorded, offline_builder, buffer):
        try:
            replayed[tick] = offline_builder.build(buffer, tick)
        except Unobserved:
            continue
    assert len(replayed) > 10

    builder = ObservationBuilder(contract, SPEC)
    arrivals = sorted((m.stamp_ns + int(rng.integers(0, 40 * MS)), i) for i, m in enumerate(recorded))
    live = builder.make_buffer()
    last = recorded[-1].stamp_ns
    waiting = sorted(replayed)
    for place, (arrival, i) in enumerate(arrivals):
        feed(builder, [recorded[i]], live)
        done = place + 1 == len(arrivals)
        # A tick is built once all that it may see has arrived; by then much that it must not see is there as well.
        while waiting and (done or waiting[0] + builder.lookahead_ns + 40 * MS <= arrival):
            tick = waiting.pop(0)
            assert_equal(builder.build(live, tick), replayed[tick])
    assert not waiting and max(replayed) <= last + STEP


def test_an_offline_contract_sees_what_comes_after_the_tick_up_to_its_tolerance() -> None:
    lidar = dataclasses.replace(MANY.observations["lidar"], tolerance_s=0.03)
    contract = dataclasses.replace(MANY, observations={"arm": MANY.observations["arm"], "lidar": lidar})
    spec = ObservationSpec(state=("arm",), clouds={"lidar": CloudSpec(max_points=9)})
    recorded = [arm(START + k * STEP, k) for k in range(20)]
    recorded += [cloud(START + k * 100 * MS, np.full((1, 4), k)) for k in range(2)]
    ages = {}
    for offline in (False, True):
        builder = ObservationBuilder(dataclasses.replace(contract, offline=offline), spec)
        assert builder.lookahead_ns == (30 * MS if offline else 0)
        buffer = builder.make_buffer()
        found = {}
        for tick in replay_ticks(recorded, builder, buffer):
            try:
                found[tick - START] = builder.build(buffer, tick).ages_ns["lidar"]
            except Unobserved:
                continue
        ages[offline] = found
    past = {k * STEP: k * STEP for k in range(4)} | {k * STEP: (k - 10) * STEP for k in range(10, 14)}
    assert ages[False] == past
    assert ages[True] == past | {k * STEP: (k - 10) * STEP for k in range(7, 10)}


def test_an_offline_contract_does_not_see_into_the_next_episode() -> None:
    nearest = dataclasses.replace(CONTRACT.observations["arm"], sampling="nearest", tolerance_s=0.03)
    contract = dataclasses.replace(CONTRACT, observations={"arm": nearest}, offline=True)
    builder = ObservationBuilder(contract, ObservationSpec(state=("arm",)))
    buffer = builder.make_buffer()
    border = START + 30 * MS
    recorded = [arm(START, 1), arm(border, 2), mark(START, 0), mark(border, 0)]
    seen = {tick - START: builder.build(buffer, tick) for tick in replay_ticks(recorded, builder, buffer)}
    assert {t: o.state[0] for t, o in seen.items()} == {0: 1, 10 * MS: 1, 20 * MS: 1, 30 * MS: 2}


# --- what cannot work is refused before anything runs -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("contract", "spec", "says"),
    [
        (MANY, {"clouds": {"camera": CloudSpec(max_points=5)}},
         r"^observation.clouds.camera: sensor_msgs/msg/Image on cam/raw: is no cloud but image or map"),
        (MANY, {"images": {"lidar": ImageSize(height=1, width=1)}}, r"images.lidar: .*is no image but cloud"),
        (MANY, {"state": ("imu",)}, r"state.imu: .*sampling 'window': a sequence needs .*nothing else has it"),
        (MANY, {"sequences": ("arm",)}, r"sequences.arm: .*sampling 'hold': a sequence needs sampling 'window'"),
        (changed("camera", sampling="interpolate"), {"images": {"camera": ImageSize(height=1, width=1)}},
         r"images.camera: .*'interpolate' is for vectors, not for a image; choices: hold, nearest"),
        (changed("arm", names=(), units=()), {"state": ("arm",)}, r"state.arm: .*names: a vector needs the names"),
        (changed("lidar", names=(), units=()), {"clouds": {"lidar": CloudSpec(max_points=5)}}, r"names of its columns"),
        (changed("odom", names=("pose.pose.position.q",), units=("m",)), {"state": ("odom",)},
         r"state.odom: .*no number at 'pose.pose.position.q'; choices: pose.pose.position.x"),
        (changed("odom", names=POSE[:4], units=("",) * 4), {"state": ("odom",)}, r"rotation is interpolated whole"),
        (changed("lidar", names=("x", "time"), units=("m", "1")), {"clouds": {"lidar": CloudSpec(max_points=5)}},
         r"units: time is a time in '1'; choices: ms, ns, s, us"),
        (MANY, {"clouds": {"lidar": CloudSpec(max_points=5, ego_motion="arm")}, "history": 2},
         r"clouds.lidar.ego_motion: arm is a sensor_msgs/msg/JointState; expected .*nav_msgs/msg/Odometry"),
        (changed("lidar", names=("x", "y"), units=("m", "m")),
         {"clouds": {"lidar": CloudSpec(max_points=5, ego_motion="odom")}, "history": 2}, r"only a cloud whose names"),
        (MANY, {"maps": ("info",)}, r"maps.info: .*is no map but calibration"),
        (MANY, {"instruction": "arm"}, r"observation.instruction: .*is no text but vector"),
        (MANY, {"images": SPEC.images, "calibrations": {"camera": "map"}}, r"calibrations.camera: .*is no calibration"),
        (changed("arm", type="my_msgs/msg/Arm"), {"state": ("arm",)}, r"state.arm: .*install the package 'my_msgs'"),
    ],
)  # fmt: skip
def test_a_spec_that_its_contract_cannot_serve(contract: RobotContract, spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ObservationBuilder(contract, ObservationSpec(**spec))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"history": 0}, "history: expected at least 1 tick, found 0"),
        ({"calibrations": {"camera": "info"}}, r"calibrations: no image 'camera'; choices: \(none\)"),
        ({"state": ["arm"], "sequences": ["arm"]}, "arm: seen twice"),
        ({"clouds": {"lidar": {"max_points": 0}}}, "clouds.lidar.max_points: expected at least 1, found 0"),
        ({"clouds": {"lidar": {"max_points": 9, "ego_motion": "odom"}}}, "clouds.lidar.ego_motion: .*history is 1"),
        ({"clouds": {"lidar": {"max_points": 9, "mount": [0, 0, 0, 1]}}}, "clouds.lidar.mount: expected x, y, z and a"),
        ({"clouds": {"lidar": {"max_points": 9, "mount": [0, 0, 0, 0, 0, 0, 0]}}}, "quaternion x, y, z, w of unit"),
    ],
)
def test_a_spec_that_makes_no_sense_names_the_place(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_dict(ObservationSpec, spec)


def test_a_spec_survives_its_file_and_tells_what_goes_beyond_a_simple_model() -> None:
    assert from_dict(ObservationSpec, to_dict(SPEC)) == SPEC
    assert SPEC.extras == ("clouds.lidar", "sequences.imu", "maps.map", "calibrations.camera", "history")
    assert set(SPEC.names) == {"camera", "arm", "odom", "task", "lidar", "imu", "map", "info"}
    assert ObservationSpec(images=SPEC.images, state=("arm",), instruction="task").extras == ()


def test_a_message_that_is_not_what_its_place_needs_is_named_when_it_comes() -> None:
    """A depth image on a camera's topic: only the message tells."""
    depth = raw_image(np.zeros(48, np.uint16).tobytes(), height=6, width=8, step=16, encoding="16UC1")
    builder = ObservationBuilder(MANY, ObservationSpec(images=SPEC.images))
    recorded = [Message("cam/raw", IMAGE, START, serialize(IMAGE, depth))]
    with pytest.raises(
        ConfigError, match=r"observation.images.camera: cam/raw sends uint16 of shape \(6, 8\), not a im"
    ):
        builder.build(feed(builder, recorded), START)


@pytest.mark.parametrize("name", ["lidar", "imu", "odom", "info", "map", "camera"])
@given(data=st.data())
def test_corrupted_messages_are_decoded_or_refused_with_one_kind_of_error(name: str, data: st.DataObject) -> None:
    whole = {
        "lidar": cloud(START, np.ones((5, 4))), "imu": imu(START, 1.0), "odom": odometry(START, 1, 2, 3),
        "info": info(START), "map": doppler(START, 1), "camera": camera(START, 1),
    }[name].data  # fmt: skip
    corrupted = bytearray(whole)
    for place in data.draw(st.lists(st.integers(4, len(whole) - 1), min_size=1, max_size=6)):
        corrupted[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    stream = MANY.observations[name]
    try:
        value = decode_module.decode(stream, bytes(corrupted[: data.draw(st.integers(0, len(whole)))]))
    except messages.MessageError as error:
        assert str(error).startswith(stream.topic) and "\n" not in str(error)
    else:
        assert not isinstance(value, np.ndarray) or name in ("map", "camera") or np.isfinite(value).all()


def test_outsiders_add_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type of one's own: its decoder is asked, and the value is checked when the first message comes."""
    type_name = "geometry_msgs/msg/PointStamped"
    stream = Stream(topic="grip", type=type_name, rate_hz=100.0, max_age_s=0.1, names=("a", "b"), units=("N", "N"))
    contract = dataclasses.replace(CONTRACT, observations={**CONTRACT.observations, "grip": stream})
    monkeypatch.setitem(decode_module.DECODERS, type_name, lambda m, s: np.array([m.point.x, 2 * m.point.y]))
    point = TYPES["geometry_msgs/msg/Point"](x=1.0, y=2.0, z=3.0)
    data = serialize(type_name, TYPES[type_name](header=messages.header(START), point=point))
    builder = ObservationBuilder(contract, ObservationSpec(state=("grip",)))
    seen = builder.build(feed(builder, [Message("grip", type_name, START, data)]), START)
    assert seen.state.tolist() == [1, 4]
    monkeypatch.setitem(decode_module.DECODERS, type_name, lambda m, s: np.array([m.point.x]))
    builder = ObservationBuilder(contract, ObservationSpec(state=("grip",)))
    with pytest.raises(ConfigError, match=r"observation.state.grip: grip sends float64 of shape \(1,\), not a vector"):
        builder.build(feed(builder, [Message("grip", type_name, START, data)]), START)
