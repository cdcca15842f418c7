"""The loader: the same batches however they are made ahead, resumed or shared among processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.data.batches import Batch, Batches
from vla_core.data.loader import Loader, LoaderError
from vla_core.data.mixture import Mixture

from .helpers import dataset
from .test_batches import assert_same, batches


def first(loader: Loader, count: int) -> list[Batch]:
    stream = iter(loader)
    found = list(islice(stream, count))
    stream.close()  # type: ignore[attr-defined]
    return found


def assert_equal(a: Batch, b: Batch) -> None:
    assert_same(a.inputs, b.inputs)
    assert torch.equal(a.actions, b.actions) and torch.equal(a.mask, b.mask)
    assert np.array_equal(a.rows, b.rows) and a[4:] == b[4:]


@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_batches_made_ahead_come_in_the_same_order(prefetch: int) -> None:
    source = batches(dataset((20, 15)))
    plain = first(Loader(source, batch_size=8, seed=1, prefetch=0), 12)
    for ahead, here in zip(first(Loader(source, batch_size=8, seed=1, prefetch=prefetch), 12), plain, strict=True):
        assert_equal(ahead, here)
    assert [batch.step for batch in plain] == list(range(12))
    rows = np.concatenate([batch.rows[:, 1] for batch in plain])[:70]
    assert sorted(rows.tolist()) == sorted([*range(35), *range(35)]), "two epochs"


def test_a_run_goes_on_where_it_stopped() -> None:
    source = batches(dataset((20, 15)))
    whole = first(Loader(source, batch_size=10, seed=4), 9)
    for start in (1, 5):
        for resumed, known in zip(first(Loader(source, batch_size=10, seed=4, start_step=start), 4),
                                  whole[start:], strict=False):  # fmt: skip
            assert_equal(resumed, known)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 50))
def test_processes_and_micro_batches_share_the_global_batch(world: int, parts: int, each: int, step: int) -> None:
    source = batches(dataset((20, 15)))
    size = world * parts * each
    whole = Loader(source, batch_size=size, seed=2, prefetch=0).batch(step)
    places: list[int] = []
    for rank in range(world):
        share = Loader(source, batch_size=size, seed=2, rank=rank, world_size=world, accumulate=parts, prefetch=0)
        for part in range(parts):
            batch = share.batch(step, part)
            assert (batch.step, batch.total, len(batch.actions)) == (step, size, each)
            mine = slice(batch.first, batch.first + each)
            assert torch.equal(batch.actions, whole.actions[mine])
            assert np.array_equal(batch.rows, whole.rows[mine])
            assert_same(batch.inputs, whole.inputs.map(lambda tensor, mine=mine: tensor[mine]))  # type: ignore[misc]
            places += range(mine.start, mine.stop)
    assert sorted(places) == list(range(size))


def test_iteration_goes_through_the_micro_batches_of_a_step() -> None:
    loader = Loader(batches(dataset((20,))), batch_size=12, seed=0, rank=1, world_size=2, accumulate=3)
    found = [(batch.step, batch.first) for batch in first(loader, 7)]
    assert found == [(0, 2), (0, 6), (0, 10), (1, 2), (1, 6), (1, 10), (2, 2)]


def test_a_mixture_is_drawn_by_its_weights() -> None:
    one = batches(dataset((20, 15)))
    other = Batches(dataset((5,)), 4, one.normalizer, one.tokenizer)
    rows = np.concatenate([b.rows for b in first(Loader(Mixture([one, other], [1, 3]), batch_size=50, seed=0), 40)])
    share = float(np.mean(rows[:, 0] == 1))
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 2000)
    assert set(rows[rows[:, 0] == 1, 1]) == set(range(5)) and set(rows[rows[:, 0] == 0, 1]) == set(range(35))


def test_an_error_in_the_thread_comes_to_the_loop_and_ends_the_thread() -> None:
    class Broken(Batches):
        def draw(self, index: np.ndarray, floats: bool = True) -> Batch:
            if self.calls == 3:
                raise OSError("the disk is gone")
            self.calls += 1
            return super().draw(index, floats)

        calls = 0

    good = batches(dataset((20,)))
    broken = Broken(good.dataset, 4, good.normalizer, good.tokenizer)
    stream = iter(Loader(broken, batch_size=4, seed=0, prefetch=2))
    for _ in range(3):
        next(stream)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_a_stream_that_is_closed_leaves_no_thread() -> None:
    first(Loader(batches(dataset((20,))), batch_size=4, seed=0), 3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_making_batches_leaves_the_other_cores_to_the_model() -> None:
    """Measured as what torch would split an operation into, there and here."""
    seen: list[int] = []

    class Watched(Batches):
        def draw(self, index: np.ndarray, floats: bool = True) -> Batch:
            seen.append(torch.get_num_threads())
            return super().draw(index, floats)

    good = batches(dataset((20,)))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        first(Loader(Watched(good.dataset, 4, good.normalizer, good.tokenizer), batch_size=4, seed=0), 3)
        assert set(seen) == {1} and torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as others:
            assert others.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("options", "message"), [
    ({"batch_size": 10, "world_size": 4},
     "10 samples cannot be shared by 4 processes with 1 micro-batches each; take a multiple of 4"),
    ({"batch_size": 8, "world_size": 2, "accumulate": 3}, "multiple of 6"),
    ({"batch_size": 8, "world_size": 2, "rank": 2}, "rank 2 of 2"),
])  # fmt: skip
def test_batches_that_cannot_be_shared_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(LoaderError, match=message):
        Loader(batches(dataset((20,))), seed=0, **options)
