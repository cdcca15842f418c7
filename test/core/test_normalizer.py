"""Normalization, its inverse, and the statistics it refuses to do without."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vla_core.observation.normalizer import (
    Mode,
    Normalization,
    Normalizer,
    Statistics,
    StatisticsError,
    compute_statistics,
)

tables = arrays(np.float64, st.tuples(st.integers(1, 20), st.just(3)), elements=st.floats(-1e3, 1e3, width=32))
modes = st.sampled_from(["mean_std", "min_max", "none"])


def fitted(data: np.ndarray, state: Mode = "mean_std", action: Mode = "min_max", floor: float = 0.01) -> Normalizer:
    statistics = compute_statistics(data)
    modes = Normalization(state=state, action=action, floor=floor)
    return Normalizer(modes, {"state": statistics, "action": statistics})


@given(tables, modes, st.floats(1e-3, 10))
def test_unnormalize_undoes_normalize(data: np.ndarray, mode: Mode, floor: float) -> None:
    normalizer = fitted(data, state=mode, action=mode, floor=floor)
    for name in ("state", "action"):
        back = normalizer.unnormalize(name, normalizer.normalize(name, data))
        np.testing.assert_allclose(back, data, atol=1e-3, rtol=1e-6)


@given(tables)
def test_statistics_are_those_of_numpy(data: np.ndarray) -> None:
    found = compute_statistics(data)
    for i in range(3):
        column = sorted(data[:, i].tolist())
        mean = sum(column) / len(column)
        assert found["mean"][i] == pytest.approx(mean, abs=1e-9)
        assert found["std"][i] == pytest.approx((sum((x - mean) ** 2 for x in column) / len(column)) ** 0.5, abs=1e-9)
        assert (found["min"][i], found["max"][i]) == (column[0], column[-1])
        assert found["q01"][i] == pytest.approx(np.percentile(column, 1), abs=1e-9)
        assert found["q99"][i] == pytest.approx(np.percentile(column, 99), abs=1e-9)
    assert found["count"] == [len(data)]


def test_the_modes_mean_what_they_say() -> None:
    data = np.random.default_rng(0).normal([1, -20, 300], [2, 5, 40], (500, 3))
    normalizer = fitted(data)
    state, action = normalizer.normalize("state", data), normalizer.normalize("action", data)
    assert state.dtype == action.dtype == np.float32
    np.testing.assert_allclose(state.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(state.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(action.min(0), -1, atol=1e-6)
    np.testing.assert_allclose(action.max(0), 1, atol=1e-6)


def test_no_precision_is_lost_far_from_zero() -> None:
    """Positions in a map frame: float32 would round away millimetres before the mean is subtracted."""
    data = np.array([[1e6], [1e6 + 0.002]])
    statistics = compute_statistics(data)
    normalizer = Normalizer(Normalization(floor=1e-6), {"state": statistics, "action": statistics})
    np.testing.assert_allclose(normalizer.normalize("state", data)[:, 0], [-1, 1], atol=1e-3)


def test_the_floor_bounds_the_gain_of_an_entry_that_never_moved() -> None:
    data = np.array([[5.0, 0.0], [5.0, 1.0]])
    normalizer = fitted(data, floor=0.1)
    for name in ("state", "action"):
        still, moving = normalizer.normalize(name, np.array([5.1, 1.0]))
        assert still == pytest.approx(1.0, abs=1e-6), "0.1 from the only value seen is one floor away"
        assert moving == pytest.approx(1.0)


def test_leading_axes_are_free() -> None:
    data = np.random.default_rng(1).normal(size=(10, 3))
    normalizer = fitted(data)
    chunk = data[:8].reshape(2, 4, 3)
    np.testing.assert_array_equal(normalizer.normalize("action", chunk)[1, 2], normalizer.normalize("action", data[6]))


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"state": {"mean": [0.0], "std": [1.0]}}, r"'action'; .*has: state"),
        ({}, r"'state'; .*has: \(none\)"),
        (
            {"state": {"mean": [0.0], "std": [1.0]}, "action": {"mean": [0.0], "max": [1.0]}},
            r"'action' lack min for min_max; they have: max, mean",
        ),
        ({"state": {"min": [0.0]}, "action": {}}, r"'state' lack mean, std for mean_std; they have: min"),
    ],
)
def test_a_missing_statistic_lists_what_is_there(statistics: Statistics, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        Normalizer(Normalization(), statistics)


def test_a_mode_that_needs_no_statistics_asks_for_none() -> None:
    normalizer = Normalizer(Normalization(state="none", action="none"), {})
    assert normalizer.normalize("state", np.array([3.0, 4.0])).tolist() == [3, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(bad: float) -> None:
    good = {"mean": [0.0], "std": [1.0], "min": [0.0], "max": [1.0]}
    with pytest.raises(StatisticsError, match=r"'state'.*mean"):
        Normalizer(Normalization(), {"state": {**good, "mean": [bad]}, "action": good})


def test_statistics_of_bad_data_are_refused() -> None:
    with pytest.raises(StatisticsError, match="3 rows of which 1 "):
        compute_statistics(np.array([[1.0], [np.nan], [2.0]]))
    with pytest.raises(StatisticsError, match="0 rows"):
        compute_statistics(np.zeros((0, 2)))
