"""What is drawn: each row once an epoch, sources by weight, and nothing but the seed and the step decides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.data import sampler
from vla_core.data.sampler import Sampler, SamplerError

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 40), st.integers(0, 2**31))
def test_without_weights_every_epoch_has_each_row_once(sizes: list[int], batch: int, seed: int) -> None:
    whole, epochs = sum(sizes), 3
    drawn = Sampler(sizes, seed=seed)
    steps = -(-epochs * whole // batch)
    rows = np.concatenate([drawn.rows(step, batch) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(rows[epoch * whole : (epoch + 1) * whole]) == list(range(whole))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 40), st.integers(0, 2**31), st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_a_step_is_a_function_of_seed_and_step(sizes: list[int], batch: int, seed: int, steps: list[int]) -> None:
    weights = [i + 0.5 for i in range(len(sizes))]
    for given_weights in (None, weights):
        used = Sampler(sizes, given_weights, seed)
        found = [used.rows(step, batch) for step in steps]  # in any order, with whatever it keeps from before
        for step, rows in zip(steps, found, strict=True):
            fresh = Sampler(sizes, given_weights, seed)
            np.testing.assert_array_equal(rows, fresh.rows(step, batch))
            one_by_one = [int(fresh.at(np.array([step * batch + i]))[0]) for i in range(batch)]
            assert rows.tolist() == one_by_one


def test_seeds_differ_and_epochs_differ() -> None:
    one, other = Sampler([1000], seed=0), Sampler([1000], seed=1)
    assert not np.array_equal(one.rows(0, 1000), other.rows(0, 1000))
    assert not np.array_equal(one.rows(0, 1000), one.rows(1, 1000))


def test_frequencies_are_the_weights() -> None:
    """Chi-square of the sources in the first 20,000 draws, and of the rows of one source in many epochs."""
    sizes, weights = [50, 400, 7], np.array([0.2, 0.5, 0.3])
    drawn = Sampler(sizes, weights.tolist(), seed=3).at(np.arange(20_000))
    sources = np.searchsorted(np.cumsum(sizes), drawn, side="right")
    found = np.bincount(sources, minlength=3)
    expected = 20_000 * weights
    assert ((found - expected) ** 2 / expected).sum() < 13.8, "p = 0.001 of two degrees of freedom"
    for source, first in enumerate((0, 50, 450)):
        rows = np.bincount(drawn[sources == source] - first, minlength=sizes[source])
        assert rows.max() - rows.min() <= 1, "a source is walked through again only when it is through"


def test_neighbours_in_a_mixture_are_independent() -> None:
    """The source of a draw says nothing of the next one's: a table of pairs, by chi-square."""
    drawn = Sampler([10, 10], [0.3, 0.7], seed=0).at(np.arange(40_001)) >= 10
    pairs = np.array([[np.sum((drawn[:-1] == a) & (drawn[1:] == b)) for b in (0, 1)] for a in (0, 1)])
    expected = pairs.sum(1, keepdims=True) * pairs.sum(0, keepdims=True) / pairs.sum()
    assert ((pairs - expected) ** 2 / expected).sum() < 10.8, "p = 0.001 of one degree of freedom"


def test_order_within_an_epoch_is_shuffled_well() -> None:
    """Each row comes at each tenth of an epoch alike."""
    table = np.zeros((20, 10))
    one = Sampler([20], seed=9)
    for epoch in range(500):
        for place, row in enumerate(one.rows(epoch, 20)):
            table[row, place // 2] += 1
    assert ((table - 50) ** 2 / 50).sum() < 250, "p = 0.0002 of 171 degrees of freedom"


def test_a_block_keeps_the_weights_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "BLOCK", 100)
    drawn = Sampler([5, 5, 5], [1, 2, 4], seed=1)
    assert drawn.counts.tolist() == [14, 29, 57]
    for block in range(4):
        rows = drawn.at(np.arange(100 * block, 100 * (block + 1)))
        assert np.bincount(rows // 5).tolist() == [14, 29, 57]
    assert Sampler([1, 1], [1e-9, 1.0]).counts.tolist() == [1, 99], "a weight is never nothing"


@pytest.mark.parametrize(("sizes", "weights", "message"), [
    ([], None, r"sources of \[\] rows"), ([3, 0], None, r"sources of \[3, 0\] rows; each needs at least one"),
    ([3, 4], [1.0], "expected 2 positive numbers"), ([3, 4], [1.0, -1.0], "expected 2 positive numbers"),
    ([3, 4], [1.0, float("nan")], "expected 2 positive numbers"),
])  # fmt: skip
def test_what_cannot_be_drawn_from_is_refused(sizes: list[int], weights: list[float] | None, message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        Sampler(sizes, weights)
