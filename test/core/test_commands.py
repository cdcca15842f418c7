"""Commands: what is written is what is read, bit for bit, and a bad number drops the whole frame."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from vla_core.commands import CODECS, check_action, decode, encode, encode_frame
from vla_core.contract import Action, RobotContract
from vla_core.observation import messages
from vla_core.observation.messages import MessageError, header_stamp_ns

from .helpers import CONTRACT, JOINTS, START, with_action

STORE = get_typestore(Stores.ROS2_KILTED)  # the library's own, not the one under test
ARM = CONTRACT.actions["arm"]
STEP_NS = CONTRACT.step_ns


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
def test_a_command_arrives_bit_for_bit(values: list[float]) -> None:
    data = encode_frame(CONTRACT, START, np.array(values))["arm/command"]
    raw = STORE.deserialize_cdr(data, JOINTS)
    assert raw.name == ["shoulder", "elbow"] and raw.velocity.tolist() == values and not len(raw.position)
    assert decode(ARM, data).tolist() == [values]


@pytest.mark.parametrize(
    ("values", "named", "unnamed"),
    [([math.nan, 0], "shoulder", "elbow"), ([0, math.inf], "elbow", "shoulder"), ([0, -math.inf], "elbow", "shoulder")],
)
def test_a_command_that_is_not_finite_is_dropped_whole(values: list[float], named: str, unnamed: str) -> None:
    with pytest.raises(MessageError, match=f"{named} not finite") as caught:
        encode(ARM, START, np.array([values]), STEP_NS)
    assert unnamed not in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2,), (1, 1, 2), (0, 2), ()])
def test_a_command_of_the_wrong_shape_is_dropped(shape: tuple[int, ...]) -> None:
    with pytest.raises(MessageError, match=r"expected \(rows, 2\).*shoulder"):
        encode(ARM, START, np.zeros(shape), STEP_NS)


def action(type_name: str, names: tuple[str, ...], **fields: Any) -> Action:
    count = len(names)
    return Action(
        topic="command", type=type_name, names=names, units=("1",) * count, low=(-1.0,) * count, high=(1.0,) * count,
        safe=("zero",) * count, **fields,
    )  # fmt: skip


STEPS = [
    action(JOINTS, ("a", "b"), field="effort"),
    action("std_msgs/msg/Float64MultiArray", ("a", "b")),
    action("geometry_msgs/msg/Twist", ("linear.x", "angular.z")),
    action("geometry_msgs/msg/TwistStamped", ("angular.y", "linear.z")),
]
CHUNKS = [
    action("trajectory_msgs/msg/JointTrajectory", ("a", "b"), field="position", publish="chunk"),
    action("trajectory_msgs/msg/JointTrajectory", ("a", "b"), field="velocity", publish="chunk"),
    action("nav_msgs/msg/Path", ("y", "x"), publish="chunk"),
    action("vla_ros/msg/Trajectory", ("x", "y", "speed", "acceleration"), publish="chunk"),
]
numbers = st.floats(allow_nan=False, allow_infinity=False)


def rows_of(count: int, most: int = 5) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(numbers, min_size=count, max_size=count), min_size=1, max_size=most)


@pytest.mark.parametrize("one", STEPS, ids=lambda a: a.type)
@given(rows=rows_of(2, most=1), stamp_ns=st.integers(0, 2**31 * 10**9 - 1))
def test_a_step_is_read_as_it_was_written(one: Action, rows: list[list[float]], stamp_ns: int) -> None:
    data = encode(one, stamp_ns, np.array(rows), STEP_NS)
    assert decode(one, data).tolist() == rows
    assert header_stamp_ns(one.type, data) in (stamp_ns, None)


@pytest.mark.parametrize("one", CHUNKS, ids=lambda a: f"{a.type} {a.field}")
@given(data=st.data())
def test_a_chunk_is_read_as_it_was_written(one: Action, data: st.DataObject) -> None:
    rows = data.draw(rows_of(len(one.names)))
    assert decode(one, encode(one, START, np.array(rows), STEP_NS)).tolist() == rows


@given(st.lists(st.floats(-math.pi + 1e-6, math.pi), min_size=1, max_size=5), st.booleans())
def test_a_heading_is_read_from_either_sign_of_its_quaternion(yaws: list[float], negate: bool) -> None:
    one = action("nav_msgs/msg/Path", ("x", "y", "yaw"), publish="chunk")
    rows = np.array([[k, 0.0, yaw] for k, yaw in enumerate(yaws)])
    message = messages.deserialize(one.type, encode(one, START, rows, STEP_NS))
    if negate:
        for pose in message.poses:
            pose.pose.orientation.z *= -1
            pose.pose.orientation.w *= -1
    turned = decode(one, messages.serialize(one.type, message))[:, 2]
    assert np.exp(1j * turned) == pytest.approx(np.exp(1j * rows[:, 2]), abs=1e-12)
    assert (np.abs(turned) <= math.pi).all()


def test_a_path_without_headings_looks_where_it_goes() -> None:
    one = action("nav_msgs/msg/Path", ("x", "y"), publish="chunk")
    data = encode(one, START, np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 3.0]]), STEP_NS)
    yaws = decode(dataclasses.replace(one, names=("x", "y", "yaw"), units=("m", "m", "rad"), low=(-9.0,) * 3,
                                      high=(9.0,) * 3, safe=("zero",) * 3), data)[:, 2]  # fmt: skip
    assert yaws == pytest.approx([math.pi / 4, math.pi / 2, math.pi / 2])


def test_joints_come_in_any_order_and_with_others() -> None:
    other = action(JOINTS, ("b", "x", "a"), field="position")
    data = encode(other, START, np.array([[2.0, 9.0, 1.0]]), STEP_NS)
    assert decode(action(JOINTS, ("a", "b"), field="position"), data).tolist() == [[1.0, 2.0]]
    with pytest.raises(MessageError, match="command: no entry c; the message has: a, b, x"):
        decode(action(JOINTS, ("a", "c"), field="position"), data)


@pytest.mark.parametrize("one", [*STEPS, *CHUNKS], ids=lambda a: f"{a.type} {a.field}")
def test_bytes_that_are_no_message_are_named(one: Action) -> None:
    good = encode(one, START, np.ones((1, len(one.names))), STEP_NS)
    for bad in (b"", good[:3], good[: len(good) // 2]):
        with pytest.raises(MessageError, match="command: "):
            decode(one, bad)


@pytest.mark.parametrize(
    ("bad", "words"),
    [(action("geometry_msgs/msg/Twist", ("linear.q",)), r"no number 'linear.q'.*linear.x"),
     (action("geometry_msgs/msg/Twist", ("linear",)), "no number 'linear'"),
     (action(JOINTS, ("a",), field="torque"), "field 'torque'; choices: effort, position, velocity"),
     (action("nav_msgs/msg/Path", ("x",), publish="chunk"), "needs x and y"),
     (action("nav_msgs/msg/Path", ("x", "y", "speed"), publish="chunk"), "takes .*yaw"),
     (action(JOINTS, ("a",), field="position", publish="chunk"), "holds one step, not a chunk; choices: .*Path"),
     (action("sensor_msgs/msg/Imu", ("a",)), "no codec.*choices: .*TwistStamped")],
)  # fmt: skip
def test_an_action_that_cannot_be_written_is_refused_with_the_choices(bad: Action, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        check_action(bad)


def test_one_bad_number_drops_the_frame_of_all_actions() -> None:
    base = action("geometry_msgs/msg/Twist", ("linear.x",))
    grip = dataclasses.replace(action("std_msgs/msg/Float64MultiArray", ("grip",)), topic="grip")
    contract = RobotContract(name="two", rate_hz=10.0, observations={}, actions={"base": base, "grip": grip})
    assert set(encode_frame(contract, START, np.array([0.5, 0.25]))) == {"command", "grip"}
    with pytest.raises(MessageError, match="grip: command dropped: grip not finite"):
        encode_frame(contract, START, np.array([0.5, math.nan]))


def test_a_trajectory_takes_the_plan_and_a_step_its_row() -> None:
    rows = np.arange(6.0).reshape(3, 2)
    chunk = with_action(type="trajectory_msgs/msg/JointTrajectory", publish="chunk", step_s=0.1)
    (data,) = encode_frame(chunk, START + 7, rows[1], plan=(START, rows)).values()
    message = STORE.deserialize_cdr(data, "trajectory_msgs/msg/JointTrajectory")
    assert [p.velocities.tolist() for p in message.points] == rows.tolist()
    assert [p.time_from_start.nanosec for p in message.points] == [100_000_000, 200_000_000, 300_000_000]
    assert header_stamp_ns("trajectory_msgs/msg/JointTrajectory", data) == START
    (data,) = encode_frame(CONTRACT, START + 7, rows[1], plan=(START, rows)).values()
    assert decode(ARM, data).tolist() == [rows[1].tolist()] and header_stamp_ns(JOINTS, data) == START + 7


ACKERMANN = {
    "AckermannDrive": "float32 steering_angle\nfloat32 steering_angle_velocity\nfloat32 speed\nfloat32 acceleration\n"
    "float32 jerk\n",
    "AckermannDriveStamped": "std_msgs/Header header\nackermann_msgs/AckermannDrive drive\n",
}


@pytest.mark.parametrize("kind", ACKERMANN)
def test_ackermann_is_spoken_without_being_installed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition of its package, repeated here."""
    monkeypatch.delenv("AMENT_PREFIX_PATH", raising=False)
    one = action(f"ackermann_msgs/msg/{kind}", ("speed", "steering_angle"), frame_id="base")
    check_action(one)
    store = get_typestore(Stores.ROS2_KILTED)
    for name, text in ACKERMANN.items():
        store.register(get_types_from_msg(text, f"ackermann_msgs/msg/{name}"))
        ours = messages.typestore().generate_msgdef(f"ackermann_msgs/msg/{name}", ros_version=2)
        assert ours == store.generate_msgdef(f"ackermann_msgs/msg/{name}", ros_version=2)
    data = encode(one, START, np.array([[0.5, -0.25]]), STEP_NS)
    read: Any = store.deserialize_cdr(data, one.type)
    drive = getattr(read, "drive", read)
    assert (drive.speed, drive.steering_angle, drive.jerk) == (0.5, -0.25, 0.0)
    assert decode(one, data).tolist() == [[0.5, -0.25]]
    if drive is not read:
        assert (read.header.frame_id, header_stamp_ns(one.type, data)) == ("base", START)
    with pytest.raises(MessageError, match=r"command: command dropped: .*too large"):
        encode(one, START, np.array([[1e300, 0.0]]), STEP_NS)


def test_a_type_is_spoken_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "share/wheel_msgs/msg").mkdir(parents=True)
    for name, text in (("Wheel", "float64 torque\n"), ("Wheels", "std_msgs/Header header\nWheel left\n")):
        (tmp_path / f"share/wheel_msgs/msg/{name}.msg").write_text(text)
    fresh = messages.typestore.__wrapped__()  # what is learned here must not reach other tests
    monkeypatch.setattr(messages, "typestore", lambda: fresh)
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path / "nothing"))
    with pytest.raises(MessageError, match="install the package 'wheel_msgs'"):
        messages.known_type("wheel_msgs/msg/Wheels")
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))
    messages.known_type("wheel_msgs/msg/Wheels")
    assert messages.has_header.__wrapped__("wheel_msgs/msg/Wheels")
    assert [name for name, _ in fresh.fielddefs["wheel_msgs/msg/Wheels"][1]] == ["header", "left"]


def test_every_codec_is_tested_here() -> None:
    tested = {one.type for one in (*STEPS, *CHUNKS)} | {f"ackermann_msgs/msg/{kind}" for kind in ACKERMANN}
    assert set(CODECS) == tested
