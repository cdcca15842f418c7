"""Statistics against numpy over all the values, and against the definition of LeRobot's aggregation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vla_core.data.lerobot.layout import LeRobotError
from vla_core.data.lerobot.statistics import (
    QUANTILES,
    STATISTICS,
    Aggregate,
    column_statistics,
    image_statistics,
    sample_indices,
)

NUMBERS = st.floats(-1e3, 1e3, width=32)


@st.composite
def episodes(draw: st.DrawFn) -> list[np.ndarray]:
    """Columns (N, *shape) float32 of a few episodes."""
    shape = draw(st.sampled_from([(1,), (3,), (2, 3)]))
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    return [draw(arrays(np.float32, (length, *shape), elements=NUMBERS)) for length in lengths]


@given(episodes())
@settings(max_examples=60, deadline=None)
def test_aggregate_is_numpy_over_all_frames(columns: list[np.ndarray]) -> None:
    aggregate = Aggregate()
    for column in columns:
        aggregate.add({"x": column_statistics(column)})
    found, frames = aggregate.result()["x"], np.concatenate(columns).astype(np.float64)
    assert found["count"].tolist() == [len(frames)]
    np.testing.assert_array_equal(found["min"], frames.min(axis=0))
    np.testing.assert_array_equal(found["max"], frames.max(axis=0))
    np.testing.assert_allclose(found["mean"], frames.mean(axis=0), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(found["std"], frames.std(axis=0), rtol=1e-6, atol=1e-4)
    for name, q in QUANTILES.items():  # as LeRobot aggregates them: weighted by the counts
        each = [np.quantile(column.astype(np.float64), q, axis=0) for column in columns]
        expected = np.average(each, axis=0, weights=[len(column) for column in columns])
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("column", [np.array([True, False, True]), np.array([3, -4, 5, 5], dtype=np.int64)])
def test_bool_and_integers_keep_their_kind(column: np.ndarray) -> None:
    found = column_statistics(column)
    assert found["min"].dtype == found["max"].dtype == column.dtype
    assert {name: value.shape for name, value in found.items()} == dict.fromkeys(STATISTICS, (1,))
    np.testing.assert_allclose(found["std"], column.astype(float).std())


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([(5, 4), (3, 7)]))
@settings(max_examples=40, deadline=None)
def test_images_are_numpy_over_all_pixels(seed: int, number: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, rng.integers(1, 257), (*size, 3), dtype=np.uint8) for _ in range(number)]
    images.append(images[-1])  # a picture that is seen twice counts twice
    found = image_statistics(images)
    pixels = np.stack(images).reshape(-1, 3) / 255.0
    assert found["count"].tolist() == [number + 1]
    for name, expected in {
        "min": pixels.min(axis=0), "max": pixels.max(axis=0), "mean": pixels.mean(axis=0), "std": pixels.std(axis=0),
        **{name: np.quantile(pixels, q, axis=0) for name, q in QUANTILES.items()},
    }.items():  # fmt: skip
        assert found[name].shape == (3, 1, 1)
        np.testing.assert_allclose(found[name][:, 0, 0], expected, rtol=1e-12, atol=1e-12, err_msg=name)


def test_large_pictures_are_thinned() -> None:
    image = np.zeros((480, 640, 3), dtype=np.uint8)
    image[::4, ::4] = 255  # 640 // 150 = 4: these are the pixels that count
    assert image_statistics([image])["mean"].ravel().tolist() == [1.0, 1.0, 1.0]
    assert image_statistics([image[:299, :299]])["mean"][0, 0, 0] == pytest.approx((75 / 299) ** 2)


@pytest.mark.parametrize(("length", "samples"), [(1, 1), (62, 62), (100, 100), (500, 105), (1000, 177), (10**6, 10**4)])
def test_sample_indices(length: int, samples: int) -> None:
    """The numbers of LeRobot's own docstring, and both ends are in."""
    indices = sample_indices(length)
    assert len(set(indices.tolist())) == len(indices) == samples
    assert (indices[0], indices[-1]) == (0, length - 1)


def test_nothing_has_no_statistics() -> None:
    with pytest.raises(LeRobotError, match="no frames"):
        column_statistics(np.zeros((0, 3)))
    with pytest.raises(LeRobotError, match="no pictures"):
        image_statistics([])
