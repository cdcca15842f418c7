"""msgpack with numpy arrays, in the form of openpi-client's ``msgpack_numpy``.

An array is the mapping ``{b"__ndarray__": True, b"data": bytes, b"dtype": str, b"shape": [int]}`` (row-major), a
numpy scalar ``{b"__npgeneric__": True, b"data": value, b"dtype": str}``; all else is plain msgpack. Nothing is pickled
and no arrays of objects exist. What comes from outside is not believed: :func:`unpack` raises nothing but
:class:`WireError`, and holds no more than a small multiple of the message in memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from vla_core.errors import VlaError

ARRAY, SCALAR = "__ndarray__", "__npgeneric__"
ARRAY_KEYS, SCALAR_KEYS = {ARRAY, "data", "dtype", "shape"}, {SCALAR, "data", "dtype"}
# Booleans, integers, floats and texts of a fixed width, in any byte order.
DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|[US](0|[1-9][0-9]{0,8}))")
PACKED_KINDS = "biufUS"
MAX_DIMENSIONS = 16
MAX_LENGTH = 2**31  # of one dimension
MAX_CODE_POINT = 0x10FFFF


class WireError(VlaError):
    """Bytes that are no message of this protocol, or a value that cannot be sent in it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on a message: its ``bytes``, the ``items`` of all its lists and mappings, and how ``deep`` these nest."""

    bytes: int = 64 * 2**20
    items: int = 10_000
    deep: int = 16


LIMITS = Limits()


def pack(value: Any) -> bytes:
    """The message of ``value``: texts, bytes, numbers, None, lists, mappings and numpy arrays; raises WireError."""
    import msgpack

    try:
        packed: bytes = msgpack.packb(value, default=_plain)
    except WireError:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"a value that cannot be sent: {_line(error)}") from None
    return packed


def unpack(data: bytes, limits: Limits = LIMITS) -> Any:
    """The value of a message; its arrays are read-only views of ``data``. Raises :class:`WireError`."""
    import msgpack

    if len(data) > limits.bytes:
        raise WireError(f"a message of {len(data)} bytes; expected at most {limits.bytes}")
    reading = _Reading(limits)
    try:
        value = msgpack.unpackb(
            data, object_pairs_hook=reading.mapping, list_hook=reading.list, ext_hook=reading.extension,
            max_array_len=limits.items, max_map_len=limits.items, strict_map_key=True,
        )  # fmt: skip
    except WireError:
        raise
    except Exception as error:  # the library's own classes, Unicode, recursion, memory: all say that it is damaged
        raise WireError(f"no valid msgpack: {_line(error) or type(error).__name__}") from None
    _check(value, limits.deep)
    return value


def _plain(value: Any) -> Any:
    """What msgpack does not know itself."""
    if not isinstance(value, np.ndarray | np.generic):
        raise WireError(f"a value of type {type(value).__name__} cannot be sent; choices: texts, bytes, numbers, None, "
                        "lists, mappings, numpy arrays")  # fmt: skip
    if not _is_sent(value.dtype):
        raise WireError(f"an array of dtype {value.dtype} cannot be sent; expected booleans, integers, floats of at "
                        "most 64 bits, or texts")  # fmt: skip
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _is_sent(dtype: np.dtype) -> bool:
    return dtype.kind in PACKED_KINDS and DTYPE.fullmatch(dtype.str) is not None


class _Reading:
    """Counts what is read, and makes arrays of their mappings."""

    def __init__(self, limits: Limits) -> None:
        self._left = limits.items
        self._limit = limits.items

    def mapping(self, pairs: list[tuple[Any, Any]]) -> Any:
        self._count(len(pairs))
        found = dict(pairs)
        if len(found) != len(pairs):
            raise WireError("a mapping that has a key twice")
        fields = {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in pairs}
        if ARRAY in fields:
            return _array(fields)
        return _scalar(fields) if SCALAR in fields else found

    def list(self, items: list[Any]) -> list[Any]:
        self._count(len(items))
        return items

    def extension(self, code: int, data: bytes) -> Any:
        raise WireError(f"an extension of type {code}; expected none")

    def _count(self, items: int) -> None:
        self._left -= items
        if self._left < 0:
            raise WireError(f"more than {self._limit} items in lists and mappings")


def _array(fields: dict[str, Any]) -> np.ndarray:
    dtype = _dtype(fields, ARRAY_KEYS)
    data, shape = fields["data"], fields["shape"]
    if not isinstance(data, bytes):
        raise WireError(f"an array whose data is of type {type(data).__name__}; expected bytes")
    if not _is_shape(shape):
        raise WireError(f"an array of shape {str(shape)[:80]}; expected at most {MAX_DIMENSIONS} lengths from 0 on")
    if prod(shape) * dtype.itemsize != len(data):
        raise WireError(f"an array of {dtype.str} and shape {shape} with {len(data)} bytes; expected "
                        f"{prod(shape) * dtype.itemsize}")  # fmt: skip
    try:
        values = np.ndarray(tuple(shape), dtype, data)
        if dtype.kind == "U" and values.size:
            _check_text(np.frombuffer(data, np.dtype(f"{dtype.byteorder}u4")))
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise WireError(f"an array of {dtype.str} and shape {shape}: {_line(error)}") from None
    return values


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, Sequence)
        and not isinstance(shape, str | bytes)
        and len(shape) <= MAX_DIMENSIONS
        and all(type(length) is int and 0 <= length < MAX_LENGTH for length in shape)
    )


def _check_text(points: np.ndarray) -> None:
    """A text array of what is no text would fail where it is used."""
    if (points > MAX_CODE_POINT).any() or ((points >= 0xD800) & (points < 0xE000)).any():
        raise WireError("an array of texts with numbers that are no characters")


def _scalar(fields: dict[str, Any]) -> np.generic:
    dtype, value = _dtype(fields, SCALAR_KEYS), fields["data"]
    kinds = {"b": bool, "i": int, "u": int, "f": (float, int), "U": str, "S": bytes}
    if not isinstance(value, kinds[dtype.kind]) or (dtype.kind in "iuf" and isinstance(value, bool)):  # type: ignore[arg-type]
        raise WireError(f"a scalar of {dtype.str} whose data is of type {type(value).__name__}")
    try:
        found: np.generic = dtype.type(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise WireError(f"a scalar of {dtype.str}: {_line(error)}") from None
    return found


def _dtype(fields: dict[str, Any], keys: set[str]) -> np.dtype:
    if set(fields) != keys:
        raise WireError(f"an array or scalar with the keys {sorted(map(str, fields))[:8]}; expected {sorted(keys)}")
    name = fields["dtype"]
    if not isinstance(name, str) or not DTYPE.fullmatch(name):
        raise WireError(f"an array or scalar of dtype {str(name)[:40]!r}; expected booleans, integers, floats of at "
                        "most 64 bits, or texts, such as <f4")  # fmt: skip
    return np.dtype(name)


def _check(value: Any, deep: int) -> None:
    """Raise for what nests too deeply, or is of no type that is sent."""
    level = [value]
    for _ in range(deep + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif not (item is None or isinstance(item, bool | int | float | str | bytes | np.ndarray | np.generic)):
                raise WireError(f"a value of type {type(item).__name__}; expected texts, bytes, numbers, None, lists, "
                                "mappings and arrays")  # fmt: skip
        if not inner:
            return
        level = inner
    raise WireError(f"lists and mappings nest deeper than {deep}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
