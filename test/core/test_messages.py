"""Serialized messages: the stamp read without decoding, and commands that are whole or not sent."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rosbags.typesys import Stores, get_typestore

from vla_core.observation import messages
from vla_core.observation.decode import decode
from vla_core.observation.messages import MessageError, header_stamp_ns

from .helpers import CONTRACT, IMAGE, JOINTS, START, STRING, arm, pixels, with_stream

STORE = get_typestore(Stores.ROS2_KILTED)  # the library's own, not the one under test
seconds = st.integers(-(2**31), 2**31 - 1)
nanoseconds = st.integers(0, 10**9 - 1)


def header_of(sec: int, nanosec: int, frame: str) -> object:
    stamp = STORE.types["builtin_interfaces/msg/Time"](sec=sec, nanosec=nanosec)
    return STORE.types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame)


@given(seconds, nanoseconds, st.text(max_size=9), st.booleans())
def test_the_stamp_is_that_of_the_whole_message(sec: int, nanosec: int, frame: str, little: bool) -> None:
    header = header_of(sec, nanosec, frame)
    joints = STORE.types[JOINTS](header=header, name=["a"], position=np.ones(1), velocity=np.zeros(0),
                                 effort=np.zeros(0))  # fmt: skip
    image = STORE.types[IMAGE](header=header, height=1, width=1, encoding="rgb8", is_bigendian=0, step=3,
                               data=np.arange(3, dtype=np.uint8))  # fmt: skip
    for type_name, message in ((JOINTS, joints), (IMAGE, image)):
        data = bytes(STORE.serialize_cdr(message, type_name, little_endian=little))
        stamp = STORE.deserialize_cdr(data, type_name).header.stamp
        assert (stamp.sec, stamp.nanosec) == (sec, nanosec)
        assert header_stamp_ns(type_name, data) == stamp.sec * 10**9 + stamp.nanosec
        assert header_stamp_ns(type_name, memoryview(data)) == stamp.sec * 10**9 + stamp.nanosec


def test_a_big_endian_message_decodes() -> None:
    message = STORE.types[JOINTS](header=header_of(1, 2, "base"), name=["elbow", "shoulder"],
                                  position=np.array([0.25, -0.5]), velocity=np.zeros(0),
                                  effort=np.zeros(0))  # fmt: skip
    data = bytes(STORE.serialize_cdr(message, JOINTS, little_endian=False))
    assert np.asarray(decode(CONTRACT.stream("arm"), data)).tolist() == [-0.5, 0.25]


def test_a_stamp_by_hand() -> None:
    """XCDR1 little-endian: 4 bytes of encapsulation, int32 seconds, uint32 nanoseconds."""
    data = struct.pack("<BBBBiI", 0, 1, 0, 0, 1_700_000_000, 5) + b"\0" * 20
    assert header_stamp_ns(JOINTS, data) == 1_700_000_000_000_000_005


def test_types_without_header_have_no_stamp_and_short_bytes_are_refused() -> None:
    assert header_stamp_ns(STRING, messages.text("x")) is None
    with pytest.raises(MessageError, match="11 bytes"):
        header_stamp_ns(JOINTS, b"\0" * 11)
    with pytest.raises(MessageError, match=r"unknown message type 'sensor_msgs/msg/JointStat'.*JointState"):
        header_stamp_ns("sensor_msgs/msg/JointStat", b"\0" * 20)


@given(st.integers(-(2**31) * 10**9, 2**31 * 10**9 - 1))
def test_a_stamp_written_is_the_stamp_read(stamp_ns: int) -> None:
    data = messages.joint_state(stamp_ns, ("a",), "position", np.ones(1))
    assert header_stamp_ns(JOINTS, data) == stamp_ns


def test_entries_are_taken_by_name() -> None:
    data = messages.joint_state(0, ("finger", "elbow", "shoulder"), "position", np.array([9.0, 2.0, 1.0]))
    assert np.asarray(decode(CONTRACT.stream("arm"), data)).tolist() == [1.0, 2.0]


def test_bad_joint_states_name_topic_and_entry() -> None:
    lacking = messages.joint_state(0, ("shoulder", "finger"), "position", np.zeros(2))
    with pytest.raises(MessageError, match=r"^arm/state: no entry elbow; the message has: finger, shoulder"):
        decode(CONTRACT.stream("arm"), lacking)
    other_field = messages.joint_state(0, ("shoulder", "elbow"), "velocity", np.zeros(2))
    with pytest.raises(MessageError, match=r"^arm/state: 2 names but 0 values in 'position'"):
        decode(CONTRACT.stream("arm"), other_field)


def test_a_message_of_another_type_names_topic_and_type() -> None:
    with pytest.raises(MessageError, match=r"^arm/state: .*sensor_msgs/msg/JointState"):
        decode(CONTRACT.stream("arm"), messages.image(0, pixels(0))[:30])
    odd = with_stream("arm", type="geometry_msgs/msg/Pose", names=(), units=()).stream("arm")
    with pytest.raises(MessageError, match=r"no decoder for 'geometry_msgs/msg/Pose'.*sensor_msgs/msg/Image"):
        decode(odd, b"\0" * 60)


@given(st.data())
def test_cut_messages_raise_one_kind_of_error(data: st.DataObject) -> None:
    whole = arm(START, 1.0, 2.0).data
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(MessageError, match=r"^arm/state: "):
        decode(CONTRACT.stream("arm"), cut)


NAMES = st.lists(st.text("abé", max_size=2), max_size=3)  # few, so that two robots often send as many bytes
COUNTS = st.sampled_from([0, 1, 4])


@given(st.lists(st.tuples(NAMES, st.text(max_size=4), COUNTS, COUNTS, COUNTS), min_size=1, max_size=3), st.data())
def test_joint_states_decode_as_the_library_decodes_them(
    robots: list[tuple[list[str], str, int, int, int]], data: st.DataObject
) -> None:
    """Messages of several robots by turns, whole and with bytes that are flipped, cut off or added.

    What is remembered of one message must neither show in another nor hide that it is damaged.
    """
    rng = np.random.default_rng(0)
    for turn in range(12):
        names, frame, *counts = robots[turn % len(robots)]
        arrays = dict(zip(("position", "velocity", "effort"), map(rng.random, counts), strict=True))
        message = STORE.types[JOINTS](header=header_of(turn, 7, frame), name=names, **arrays)
        encoded = bytearray(STORE.serialize_cdr(message, JOINTS))
        if turn % 3 == 2:
            place = data.draw(st.integers(0, len(encoded) - 1))
            damage = data.draw(st.sampled_from(["flip", "cut", "add"]))
            if damage == "flip":
                encoded[place] ^= 1 << data.draw(st.integers(0, 7))
            else:
                encoded = encoded[:place] if damage == "cut" else encoded + bytes(1 + place % 9)
        try:
            expected = STORE.deserialize_cdr(memoryview(bytes(encoded)), JOINTS)
        except Exception:  # the library raises several types
            with pytest.raises(MessageError, match=f"^{len(encoded)} bytes do not decode as {JOINTS}"):
                messages.deserialize(JOINTS, bytes(encoded))
            continue
        found = messages.deserialize(JOINTS, bytes(encoded))
        assert (found.header.stamp.sec, found.header.stamp.nanosec) == (
            expected.header.stamp.sec, expected.header.stamp.nanosec
        )  # fmt: skip
        assert (found.header.frame_id, found.name) == (expected.header.frame_id, expected.name)
        for key in arrays:
            mine, theirs = getattr(found, key), getattr(expected, key)
            assert (mine.dtype, mine.tobytes()) == (theirs.dtype, theirs.tobytes())
        found.name.append("of the caller's")  # belongs to the caller, as other messages' lists do
