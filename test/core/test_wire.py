"""The wire form of openpi: its own packer is the judge, and no bytes from outside do harm."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from openpi_client import msgpack_numpy

from vla_core.serving.wire import Limits, WireError, pack, unpack

DTYPES = st.one_of(
    hnp.boolean_dtypes(), hnp.integer_dtypes(endianness="?"), hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    hnp.unicode_string_dtypes(endianness="?", max_len=5), hnp.byte_string_dtypes(max_len=5),
)  # fmt: skip
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3))
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=9), st.binary(max_size=9)
)
KEYS = st.text(max_size=9).filter(lambda key: not key.startswith("__"))
VALUES = st.recursive(
    st.one_of(PLAIN, ARRAYS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, in type and shape."""
    if isinstance(a, np.ndarray | np.generic):
        return type(a) is type(b) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and bool(a == b)


def array(**changes: Any) -> bytes:
    """A packed array of two float32, with other fields."""
    fields = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb({**fields, **{key.encode(): value for key, value in changes.items()}})


def scalar(data: Any, dtype: str) -> bytes:
    return msgpack.packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype})


@given(VALUES)
def test_what_is_packed_is_what_openpi_packs_and_comes_back(value: Any) -> None:
    packed = pack(value)
    assert packed == msgpack_numpy.packb(value)
    assert same(unpack(packed), value) and same(msgpack_numpy.unpackb(packed), value)


@pytest.mark.parametrize(
    "value", [np.float32(1.5), np.int8(-3), np.uint64(2**64 - 1), np.bool_(True), np.float64("nan")]
)
def test_scalars_keep_their_type(value: np.generic) -> None:
    assert pack(value) == msgpack_numpy.packb(value)
    assert same(unpack(pack(value)), value) or np.isnan(value)  # type: ignore[call-overload]


def test_a_view_of_an_array_is_sent_row_by_row() -> None:
    grid = np.arange(24, dtype=np.int32).reshape(4, 6)
    assert np.array_equal(unpack(pack(grid.T[::2])), grid.T[::2])


def test_keys_of_texts_mark_an_array_too() -> None:
    """Clients in other languages have no keys of bytes."""
    fields = {"__ndarray__": True, "data": np.float32([1, 2]).tobytes(), "dtype": "<f4", "shape": [2]}
    assert unpack(msgpack.packb(fields)).tolist() == [1.0, 2.0]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_wire_error(data: bytes) -> None:
    try:
        unpack(data)
    except WireError as error:
        assert str(error) and "\n" not in str(error)


@given(VALUES, st.data())
def test_damage_to_a_message_is_a_value_or_a_wire_error(value: Any, draw: st.DataObject) -> None:
    data = bytearray(pack(value))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        unpack(bytes(data[: draw.draw(st.integers(0, len(data)))]))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no valid msgpack"),
        (b"\xc1", "no valid msgpack"),
        (b"\x93\x01", "incomplete"),
        (b"\x01\x01", "extra data"),
        (b"\xa1\xff", "utf-8"),
        (b"\xdd\xff\xff\xff\xff", "max_array_len"),
        (b"\x91" * 5000, "no valid msgpack"),
        (b"\x91" * 40 + b"\xc0", "nest deeper than 16"),
        (msgpack.packb({1: 2}), "int is not allowed for map key"),
        (b"\x82\xa1a\x01\xa1a\x02", "a key twice"),
        (msgpack.packb(msgpack.ExtType(3, b"x")), "an extension of type 3"),
        (msgpack.packb(msgpack.Timestamp(1, 2)), "type Timestamp"),
        (msgpack.packb([[0] * 100] * 101), "more than 10000 items"),
        (array(dtype="|O"), r"dtype '\|O'; expected booleans"),
        (array(dtype="O"), "dtype 'O'"),
        (array(dtype="i4,i4"), "dtype 'i4,i4'"),
        (array(dtype="<c8"), "dtype '<c8'"),
        (array(dtype=7), "dtype '7'"),
        (array(data="x" * 8), "data is of type str; expected bytes"),
        (array(shape=[3]), r"shape \[3\] with 8 bytes; expected 12"),
        (array(shape=[-2, -1]), "expected at most 16 lengths from 0 on"),
        (array(shape=[True, 2]), "expected at most 16 lengths"),
        (array(shape=2), "expected at most 16 lengths"),
        (array(shape=[1] * 17), "expected at most 16 lengths"),
        (array(shape=[0, 2**31 - 1, 2**31 - 1, 2**31 - 1], data=b""), "too big"),
        (array(dtype="<U2", data=b"\xff" * 8, shape=[1]), "no characters"),
        (array(more=1), r"with the keys \['__ndarray__', 'data', 'dtype', 'more', 'shape'\]; expected"),
        (scalar(300, "|u1"), "out of bounds for uint8"),
        (scalar("x", "<f4"), "data is of type str"),
        (scalar(True, "<i4"), "data is of type bool"),
    ],
)  # fmt: skip
def test_what_is_no_message_is_named(data: bytes, words: str) -> None:
    with pytest.raises(WireError, match=words):
        unpack(data)


def test_limits_are_those_that_are_asked_for() -> None:
    packed = pack({"a": [1, 2, 3]})
    assert unpack(packed, Limits(bytes=len(packed), items=4, deep=2)) == {"a": [1, 2, 3]}
    with pytest.raises(WireError, match=f"a message of {len(packed)} bytes; expected at most {len(packed) - 1}"):
        unpack(packed, Limits(bytes=len(packed) - 1))
    with pytest.raises(WireError, match="more than 3 items"):
        unpack(packed, Limits(items=3))
    with pytest.raises(WireError, match="deeper than 1"):
        unpack(packed, Limits(deep=1))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1, 2}, "type set cannot be sent; choices: texts"),
        (np.array([object()]), "dtype object cannot be sent"),
        (np.complex64(1), "dtype complex64"),
        (np.zeros(2, "M8[s]"), "datetime64"),
        (np.zeros(2, "i4,i4"), "cannot be sent"),
        (2**70, "cannot be sent"),
        ("\ud800", "utf-8"),
    ],
)
def test_what_cannot_be_sent_is_named(value: Any, words: str) -> None:
    with pytest.raises(WireError, match=words):
        pack({"key": value})
