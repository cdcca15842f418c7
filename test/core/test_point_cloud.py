"""Point clouds and radar returns of any layout, against struct, one number at a time."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_core.contract import Stream
from vla_core.observation import messages
from vla_core.observation.decode import decode
from vla_core.observation.messages import MessageError, serialize, typestore
from vla_core.observation.point_cloud import point_cloud, subsample

from .helpers import START

CLOUD = "sensor_msgs/msg/PointCloud2"
CODES = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 8: "d"}
XYZI = ("x", "y", "z", "intensity")


def stream(*names: str, unit: str = "1", type_name: str = CLOUD) -> Stream:
    return Stream(topic="points", type=type_name, rate_hz=10.0, max_age_s=0.3, names=names, units=(unit,) * len(names))


def cloud(fields: list[tuple[Any, ...]], data: bytes, width: int, point_step: int, height: int = 1,
          row_step: int | None = None, big: bool = False, stamp_ns: int = 0) -> Any:  # fmt: skip
    """A ``PointCloud2`` of fields (name, offset, datatype[, count])."""
    types = typestore().types
    entry = types["sensor_msgs/msg/PointField"]
    listed = [entry(name=n, offset=o, datatype=d, count=c[0] if c else 1) for n, o, d, *c in fields]
    return types[CLOUD](
        header=messages.header(stamp_ns), height=height, width=width, fields=listed, is_bigendian=big,
        point_step=point_step, row_step=width * point_step if row_step is None else row_step,
        data=np.frombuffer(data, np.uint8), is_dense=False,
    )  # fmt: skip


def packed(points: np.ndarray, names: tuple[str, ...] = XYZI) -> Any:
    """The usual layout: float32 columns one after the other."""
    fields = [(name, 4 * k, 7) for k, name in enumerate(names)]
    return cloud(fields, points.astype("<f4").tobytes(), len(points), 4 * len(names))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Any, list[str], list[list[float]]]:
    """A message of random layout, the names asked of it, and its numbers read by hand."""
    names = draw(st.permutations(["x", "y", "z", "intensity", "ring", "extra"]))
    kinds = [draw(st.sampled_from(sorted(CODES))) for _ in names]
    fields, offset = [], 0
    for name, kind in zip(names, kinds, strict=True):
        offset += draw(st.integers(0, 3))
        fields.append((name, offset, kind))
        offset += struct.calcsize("<" + CODES[kind])
    point_step = offset + draw(st.integers(0, 5))
    height, width, big = draw(st.integers(1, 3)), draw(st.integers(0, 4)), draw(st.booleans())
    row_step = width * point_step + draw(st.integers(0, 6))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    # Bytes below 64 make finite floats of every kind, doubles beyond the range of float32 among them.
    data = rng.integers(0, 64, height * row_step + draw(st.integers(0, 4)), dtype=np.uint8).tobytes()
    asked = draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True))
    where = {name: (o, struct.Struct((">" if big else "<") + CODES[k])) for name, o, k in fields}
    rows = [
        [where[n][1].unpack_from(data, y * row_step + x * point_step + where[n][0])[0] for n in asked]
        for y in range(height) for x in range(width)
    ]  # fmt: skip
    return cloud(fields, data, width, point_step, height, row_step, big), asked, rows


@given(layouts())
def test_any_layout(case: tuple[Any, list[str], list[list[float]]]) -> None:
    message, asked, rows = case
    found = decode(stream(*asked), serialize(CLOUD, message))
    with np.errstate(over="ignore"):
        expected = np.array(rows, dtype=np.float64).reshape(-1, len(asked)).astype(np.float32)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_array_equal(found, expected[np.isfinite(expected).all(axis=1)])


@pytest.mark.parametrize(
    ("fields", "point_step", "asked", "shared"),
    [
        ([(n, 4 * k, 7) for k, n in enumerate(XYZI)], 16, XYZI, True),
        ([(n, 4 * k, 7) for k, n in enumerate(XYZI)], 48, XYZI[:3], True),
        ([(n, 4 * k + 3, 7) for k, n in enumerate(XYZI)], 21, XYZI, True),
        ([(n, 8 * k, 7) for k, n in enumerate(XYZI)], 32, XYZI, True),
        ([(n, 4 * k, 7) for k, n in enumerate(XYZI)], 16, XYZI[::-1], True),
        ([("x", 0, 7), ("y", 4, 7), ("z", 8, 7), ("intensity", 16, 7)], 20, XYZI, False),
        ([("x", 0, 7), ("y", 4, 7), ("z", 8, 7), ("intensity", 12, 6)], 16, XYZI, False),
        ([(n, 8 * k, 8) for k, n in enumerate(XYZI)], 32, XYZI, False),
    ],
)
def test_native_columns_at_equal_distances_are_not_copied(
    fields: list[tuple[Any, ...]], point_step: int, asked: tuple[str, ...], shared: bool
) -> None:
    data = np.random.default_rng(0).integers(0, 64, 50 * point_step, dtype=np.uint8).tobytes()
    message = cloud(fields, data, 50, point_step)
    found = point_cloud(message, stream(*asked))
    assert found.shape == (50, len(asked)) and np.shares_memory(found, message.data) == shared
    message = cloud(fields, data, 10, point_step, height=5)
    assert np.shares_memory(point_cloud(message, stream(*asked)), message.data) == shared
    message = cloud(fields, data, 9, point_step, height=5, row_step=10 * point_step)
    padded = point_cloud(message, stream(*asked))
    assert not np.shares_memory(padded, message.data)
    np.testing.assert_array_equal(padded, found.reshape(5, 10, -1)[:, :9].reshape(45, -1))


def test_a_view_reaches_down_to_the_serialized_bytes() -> None:
    data = serialize(CLOUD, packed(np.ones((1000, 4))))
    found = decode(stream(*XYZI), data)
    assert isinstance(found, np.ndarray) and np.shares_memory(found, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_points_that_are_not_finite_are_left_out(bad: float) -> None:
    points = np.arange(40.0).reshape(10, 4)
    points[3, 1] = points[7, 3] = bad
    found = point_cloud(packed(points), stream(*XYZI))
    np.testing.assert_array_equal(found, np.delete(points, [3, 7], axis=0))
    kept = point_cloud(packed(points), stream("x", "y", "z"))
    np.testing.assert_array_equal(kept, np.delete(points, 3, axis=0)[:, :3])
    both = packed(np.array([[np.inf, -np.inf, 0, 0], [1, 2, 3, 4]]))
    assert point_cloud(both, stream(*XYZI)).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("asked", "sent"),
    [("intensity", "i"), ("intensity", "reflectivity"), ("time", "t"), ("time", "offset_time"), ("ring", "channel"),
     ("ring", "line"), ("velocity", "v_r"), ("velocity", "doppler"), ("velocity", "radial_speed"), ("rcs", "RCS"),
     ("t", "time")],
)  # fmt: skip
def test_drivers_names_for_the_same_thing(asked: str, sent: str) -> None:
    points = np.arange(8.0).reshape(2, 4)
    found = point_cloud(packed(points, ("x", "y", "z", sent)), stream("x", asked, unit="s"))
    np.testing.assert_array_equal(found, points[:, [0, 3]])


def test_a_name_that_is_there_comes_first_and_two_candidates_are_refused() -> None:
    points = np.arange(8.0).reshape(2, 4)
    ouster = packed(points, ("x", "intensity", "reflectivity", "i"))
    np.testing.assert_array_equal(point_cloud(ouster, stream("intensity")), points[:, [1]])
    np.testing.assert_array_equal(point_cloud(ouster, stream("reflectivity")), points[:, [2]])
    unclear = packed(points, ("x", "y", "i", "reflectivity"))
    with pytest.raises(MessageError, match=r"^points: several fields may be 'intensity': i, reflectivity"):
        point_cloud(unclear, stream("intensity"))
    with pytest.raises(MessageError, match=r"^points: no field 'ring'; the message has: i, reflectivity, x, y"):
        point_cloud(unclear, stream("x", "ring"))


@pytest.mark.parametrize(("unit", "per_s"), [("s", 1.0), ("ns", 1e9), ("us", 1e6)])
def test_absolute_times_become_relative_before_they_are_rounded(unit: str, per_s: float) -> None:
    """Hesai and RoboSense in s, Livox in ns: a float32 holds seconds since 1970 to two minutes."""
    offsets = np.array([0.0, 0.0125, 0.0999])
    absolute = (START / 1e9 + offsets) * per_s
    message = cloud([("timestamp", 0, 8)], absolute.astype("<f8").tobytes(), 3, 8, stamp_ns=START)
    found = point_cloud(message, stream("time", unit=unit))
    np.testing.assert_allclose(found[:, 0] / per_s, offsets, atol=1e-6)
    with pytest.raises(MessageError, match=r"'timestamp' is an absolute time in 'min'; .*ms, ns, s, us"):
        point_cloud(message, stream("time", unit="min"))
    short = cloud([("time_stamp", 0, 6)], struct.pack("<3I", 0, 5, 99), 3, 4, stamp_ns=START)
    assert point_cloud(short, stream("time", unit="ns"))[:, 0].tolist() == [0, 5, 99], "32 bits are relative already"


def test_fields_of_several_elements_are_named_by_their_index() -> None:
    message = cloud([("normal", 0, 7, 3)], np.arange(6, dtype="<f4").tobytes(), 2, 12)
    assert point_cloud(message, stream("normal.2", "normal.0")).tolist() == [[2, 0], [5, 3]]
    with pytest.raises(MessageError, match=r"no field 'normal'; the message has: normal\.0, normal\.1, normal\.2"):
        point_cloud(message, stream("normal"))
    message = cloud([("x", 0, 7, 0)], np.arange(2, dtype="<f4").tobytes(), 2, 4)
    assert point_cloud(message, stream("x"))[:, 0].tolist() == [0, 1], "some drivers leave the count at 0"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": b"\0" * 31}, "needs 32 bytes and rows of at least 32, found 31 bytes"),
        ({"height": 2, "row_step": 31}, "rows of at least 32"),
        ({"point_step": 12}, "field 'intensity' at 12 does not fit into a point of 12 bytes"),
        ({"fields": [("x", 0, 9)]}, "field 'x' has datatype 9; choices: 1, 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    options = {"fields": [(n, 4 * k, 7) for k, n in enumerate(XYZI)], "data": b"\0" * 32, "width": 2, "point_step": 16}
    data = serialize(CLOUD, cloud(**{**options, **changes}))
    with pytest.raises(MessageError, match=rf"^points: .*{says}"):
        decode(stream("x"), data)


def test_an_empty_cloud_is_a_cloud_and_names_are_still_checked() -> None:
    empty = packed(np.zeros((0, 4)))
    assert point_cloud(empty, stream(*XYZI)).shape == (0, 4)
    with pytest.raises(MessageError, match="no field 'rcs'"):
        point_cloud(empty, stream("rcs"))


@given(st.integers(0, 300), st.integers(1, 120))
def test_subsampling_is_even_and_in_order(count: int, most: int) -> None:
    points = np.arange(count, dtype=np.float32).reshape(-1, 1)
    found = subsample(points, most)[:, 0].tolist()
    assert found == (
        [float(i) for i in range(count)] if count <= most else [float(i * count // most) for i in range(most)]
    )
    gaps = set(np.diff(found).tolist())
    assert len(found) == min(count, most) and gaps <= {count // most, count // most + 1, 1}


# --- radar_msgs -----------------------------------------------------------------------------------------------------

RETURN = """
float32 range                            # m
float32 azimuth                          # rad, anticlockwise
float32 elevation                        # rad
float32 doppler_velocity                 # m/s
float32 amplitude                        # dB
"""
SCAN = "radar_msgs/msg/RadarScan"


@pytest.fixture(scope="module")
def radar(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that makes scans, with ``radar_msgs`` installed in a prefix of its own."""
    prefix: Path = tmp_path_factory.mktemp("radar")
    folder = prefix / "share" / "radar_msgs" / "msg"
    folder.mkdir(parents=True)
    (folder / "RadarReturn.msg").write_text(RETURN)
    (folder / "RadarScan.msg").write_text("std_msgs/Header header\n\nradar_msgs/RadarReturn[] returns\n")
    before = os.environ.get("AMENT_PREFIX_PATH")
    os.environ["AMENT_PREFIX_PATH"] = f"{prefix}{os.pathsep}{before or ''}"
    messages.known_type(SCAN)
    types = typestore().types

    def scan(rows: list[tuple[float, ...]]) -> bytes:
        names = ("range", "azimuth", "elevation", "doppler_velocity", "amplitude")
        listed = [types["radar_msgs/msg/RadarReturn"](**dict(zip(names, row, strict=True))) for row in rows]
        return serialize(SCAN, types[SCAN](header=messages.header(START), returns=listed))

    yield scan
    if before is None:
        del os.environ["AMENT_PREFIX_PATH"]
    else:
        os.environ["AMENT_PREFIX_PATH"] = before


def test_radar_returns_are_points_with_a_velocity(radar: Any) -> None:
    """x forward, y left, z up: straight ahead, to the left, and up."""
    rows = [(10.0, 0.0, 0.0, -3.0, 20.0), (5.0, np.pi / 2, 0.0, 1.0, 10.0), (2.0, 0.0, np.pi / 2, 0.0, 5.0)]
    wanted = stream("x", "y", "z", "velocity", "amplitude", "azimuth", type_name=SCAN)
    found = decode(wanted, radar(rows))
    expected = [[10, 0, 0, -3, 20, 0], [0, 5, 0, 1, 10, np.pi / 2], [0, 0, 2, 0, 5, 0]]
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


@given(st.lists(st.tuples(st.floats(0, 200), st.floats(-3, 3), st.floats(-1.5, 1.5)), min_size=1, max_size=20))
def test_radar_points_have_the_range_and_angles_of_their_returns(radar: Any, rows: list[tuple[float, ...]]) -> None:
    points = np.asarray(decode(stream("x", "y", "z", type_name=SCAN), radar([(*row, 0.0, 0.0) for row in rows])))
    for (x, y, z), (distance, azimuth, elevation) in zip(points.astype(float), rows, strict=True):
        assert np.hypot(np.hypot(x, y), z) == pytest.approx(distance, rel=1e-5, abs=1e-6)
        if distance > 1e-3 and abs(elevation) < 1.4:
            assert np.arctan2(y, x) == pytest.approx(azimuth, abs=1e-4)
            assert np.arctan2(z, np.hypot(x, y)) == pytest.approx(elevation, abs=1e-4)


def test_radar_scans_without_returns_bad_returns_and_unknown_columns(radar: Any) -> None:
    assert np.asarray(decode(stream("x", "velocity", type_name=SCAN), radar([]))).shape == (0, 2)
    bad = radar([(np.nan, 0, 0, 0, 0), (1.0, 0, 0, 2, 0)])
    assert np.asarray(decode(stream("velocity", "x", type_name=SCAN), bad)).tolist() == [[2, 1]]
    with pytest.raises(
        MessageError, match=r"^points: a radar scan has no column 'rcs'; choices: amplitude, .*velocity"
    ):
        decode(stream("rcs", type_name=SCAN), bad)
