"""Commands: what is written is what is read, bit for bit, and a bad number drops the whole frame."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rosbags.typesys import Stores, get_typestore

from vla_core.commands import decode, encode, encode_frame
from vla_core.observation.messages import MessageError

from .helpers import CONTRACT, JOINTS, START

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
