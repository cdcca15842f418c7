"""The memory buffer against a plain list of everything that was ever added."""

from __future__ import annotations

import threading
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vla_core.observation.memory_buffer import FUTURE_NS, OVERHEAD_BYTES, MemoryBuffer

SPAN = 20
MAX_BYTES = 30


class AgainstAList(RuleBasedStateMachine):
    """The model keeps (stamp, message) pairs and computes by its rules, in the simplest way, what must be there.

    Stamps stay within one span of the newest, so that nothing counts as a clock that jumped (tested apart).
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffer = MemoryBuffer(["s"], span_ns=SPAN, max_bytes=MAX_BYTES)
        self.model: list[tuple[int, bytes]] = []
        self.count = 0

    @rule(offset=st.integers(-SPAN, SPAN), size=st.integers(1, 12))
    def add(self, offset: int, size: int) -> None:
        newest = max((stamp for stamp, _ in self.model), default=100)
        stamp = newest + offset
        self.count += 1
        data = bytes([self.count % 256]) * size
        kept = self.buffer.add("s", stamp, data)
        if any(stamp == other for other, _ in self.model):
            assert not kept, "the first message of a stamp stays"
            return
        self.model.append((stamp, data))
        newest = max(s for s, _ in self.model)
        self.model = sorted(pair for pair in self.model if pair[0] >= newest - SPAN)
        while len(self.model) > 1 and sum(len(d) for _, d in self.model) > MAX_BYTES:
            self.model.pop(0)

    @rule(offset=st.integers(-SPAN - 5, SPAN + 5))
    def sample(self, offset: int) -> None:
        at = max((stamp for stamp, _ in self.model), default=100) + offset
        past = [pair for pair in self.model if pair[0] <= at]
        assert self.buffer.sample("s", at) == (max(past) if past else None)

    @rule(offset=st.integers(-SPAN - 5, SPAN + 5), length=st.integers(0, SPAN), ahead=st.integers(0, SPAN))
    def look_around(self, offset: int, length: int, ahead: int) -> None:
        at = max((stamp for stamp, _ in self.model), default=100) + offset
        inside = sorted(pair for pair in self.model if at - length < pair[0] <= at)
        assert self.buffer.window("s", at - length, at) == inside
        past = [pair for pair in self.model if pair[0] <= at]
        future = [pair for pair in self.model if at < pair[0] <= at + ahead]
        expected = max(past) if past else None, min(future) if future else None
        assert self.buffer.around("s", at, at + ahead) == expected

    @invariant()
    def bounded(self) -> None:
        assert self.buffer.size_bytes() == sum(len(d) for _, d in self.model)
        assert self.buffer.size_bytes() <= MAX_BYTES
        assert self.buffer.newest_ns("s") == max((s for s, _ in self.model), default=None)


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 15)), max_size=60), st.integers(-10, 260))
def test_a_sample_is_never_from_the_future_and_memory_is_bounded(messages: list[tuple[int, int]], at: int) -> None:
    """Any order, any jumps: the two promises that hold whatever comes in."""
    buffer = MemoryBuffer(["s"], span_ns=SPAN, max_bytes=MAX_BYTES)
    for stamp, size in messages:
        buffer.add("s", stamp, bytes(size))
        assert buffer.size_bytes() <= MAX_BYTES
        found = buffer.sample("s", at)
        assert found is None or found[0] <= at
        if stamp <= at and buffer.newest_ns("s") == stamp:
            assert found is not None and found[0] == stamp


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3)), max_size=80), st.integers(1, 6))
def test_every_message_is_counted_once(messages: list[tuple[int, int]], most: int) -> None:
    """received = held + dropped for age or reset + what the counters say, whatever comes in."""
    buffer = MemoryBuffer(["s"], span_ns=SPAN, max_bytes=MAX_BYTES, max_messages=most)
    kept = 0
    for stamp, size in messages:
        kept += buffer.add("s", stamp, bytes(size))
        found = buffer.statistics("s")
        assert found.messages <= most and found.size_bytes <= MAX_BYTES
    found = buffer.statistics("s")
    assert found.received == len(messages) == kept + found.duplicates + found.late + found.future
    assert found.messages + found.evicted <= kept + found.late
    assert found.newest_ns == buffer.newest_ns("s")


def test_tiny_messages_at_any_rate_stay_within_the_bound() -> None:
    """A megahertz of one byte each for a twentieth of a second: bookkeeping would outgrow the data by far."""
    buffer = MemoryBuffer(["s", "t"], span_ns=1_000_000_000, max_bytes=1_000_000, max_messages=1000)
    tracemalloc.start()
    try:
        for k in range(50_000):
            buffer.add("s", 10**18 + 1000 * k, bytes([k % 251]))
        current, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert current < 1000 * (OVERHEAD_BYTES + 1) < buffer.bound_bytes
    found = buffer.statistics("s")
    assert found.messages == 1000 and found.evicted == 49_000 and found.size_bytes == 1000
    assert found.rate_hz == pytest.approx(1e6)
    assert buffer.newest_ns("s") == 10**18 + 49_999_000


def test_memory_of_many_messages_is_within_the_stated_overhead() -> None:
    """The overhead of a message is measured, not believed."""
    buffer = MemoryBuffer(["s"], span_ns=10**12, max_messages=20_000)
    tracemalloc.start()
    try:
        for k in range(20_000):
            buffer.add("s", 10**18 + k, (10**6 + k).to_bytes(16, "big"))
        current, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 16 * 20_000 < current < 20_000 * (16 + OVERHEAD_BYTES)


def test_a_frozen_sensor_shows_as_repeated_stamps() -> None:
    buffer = MemoryBuffer(["s"], span_ns=SPAN)
    for stamp in (1, 2, 2, 3, 3, 3):
        buffer.add("s", stamp, b"x", receive_ns=stamp + 4)
    found = buffer.statistics("s")
    assert (found.received, found.duplicates, found.repeated, found.messages) == (6, 3, 2, 3)
    assert found.received_ns == 7 and found.newest_ns == 3
    buffer.add("s", 4, b"x")
    assert buffer.statistics("s").repeated == 0


def test_a_stamp_from_the_future_is_refused_and_counted_and_poisons_nothing() -> None:
    second = 1_000_000_000
    buffer = MemoryBuffer(["s", "text"], latched=["text"], span_ns=second)
    for k in range(5):
        assert buffer.add("s", 10 * second + k, b"now", receive_ns=10 * second + k)
    assert not buffer.add("s", 14 * second, b"shifted", receive_ns=10 * second + 9)
    assert buffer.add("s", 10 * second + FUTURE_NS, b"jitter", receive_ns=10 * second)
    assert not buffer.add("s", 10 * second + FUTURE_NS + 1, b"shifted", receive_ns=10 * second)
    assert not buffer.add("text", 14 * second, b"shifted", receive_ns=10 * second)
    assert buffer.statistics("s").future == 2 and buffer.statistics("s").messages == 6
    assert buffer.sample("s", 10 * second + 4) == (10 * second + 4, b"now")
    assert buffer.add("s", 11 * second, b"x") and buffer.add("s", 12 * second, b"x", receive_ns=0), (
        "no clock, no future"
    )


def test_a_clock_that_jumped_empties_all_streams_but_the_latched() -> None:
    buffer = MemoryBuffer(["a", "b", "text"], latched=["text"], span_ns=SPAN)
    buffer.start_episode(1000)
    for name in ("a", "b", "text"):
        buffer.add(name, 1005, b"x")
    buffer.clear()
    assert buffer.newest_ns("a") is None and buffer.newest_ns("b") is None and buffer.first_ns("a") is None
    assert buffer.sample("text", 5) == (1005, b"x")
    assert buffer.add("a", 990, b"y"), "the episode of the old clock is over, too"
    assert buffer.statistics("a").received == 2, "counts go on"


def test_the_first_stamp_outlives_its_message_until_the_start_of_an_episode() -> None:
    buffer = MemoryBuffer(["s"], span_ns=SPAN)
    assert buffer.first_ns("s") is None
    for stamp in (12, 10, 15, 100):
        buffer.add("s", stamp, b"x")
    assert buffer.first_ns("s") == 10 and buffer.sample("s", 99) is None
    buffer.add("s", 105, b"x")
    buffer.start_episode(101)
    assert buffer.first_ns("s") == 105
    buffer.start_episode(110)
    assert buffer.first_ns("s") is None


def test_one_huge_message_is_kept_alone() -> None:
    buffer = MemoryBuffer(["s"], span_ns=SPAN, max_bytes=4)
    buffer.add("s", 1, b"abc")
    assert buffer.add("s", 2, b"0123456789")
    assert buffer.sample("s", 2) == (2, b"0123456789") and buffer.sample("s", 1) is None


def test_a_message_that_does_not_fit_is_reported_as_not_kept() -> None:
    buffer = MemoryBuffer(["s"], span_ns=SPAN, max_bytes=4)
    assert buffer.add("s", 10, b"1234")
    assert not buffer.add("s", 5, b"12")
    assert buffer.sample("s", 9) is None


def test_streams_do_not_mix_and_unknown_ones_are_refused() -> None:
    buffer = MemoryBuffer(["a", "b"])
    buffer.add("a", 1, b"a")
    assert buffer.sample("b", 5) is None
    with pytest.raises(KeyError):
        buffer.add("c", 1, b"c")


def test_a_latched_stream_holds_its_newest_for_ever() -> None:
    buffer = MemoryBuffer(["text"], latched=["text"], span_ns=SPAN)
    buffer.add("text", 5, b"old")
    buffer.add("text", 7, b"new")
    assert buffer.sample("text", 7 + 1000 * SPAN) == (7, b"new")
    buffer.start_episode(500)
    assert buffer.sample("text", 600) == (7, b"new")
    buffer.add("text", 400, b"newer")
    assert buffer.sample("text", 600) == (400, b"newer"), "an instruction from before the episode still holds"
    assert buffer.size_bytes() == len(b"newer")


def test_start_episode_forgets_and_refuses_the_past() -> None:
    buffer = MemoryBuffer(["s"], span_ns=SPAN)
    for stamp in (95, 100, 105):
        buffer.add("s", stamp, b"x")
    buffer.start_episode(100)
    assert buffer.sample("s", 99) is None
    assert buffer.sample("s", 102) == (100, b"x"), "the first tick of the episode belongs to it"
    assert buffer.sample("s", 110) == (105, b"x")
    assert not buffer.add("s", 99, b"late")
    assert buffer.sample("s", 99) is None
    assert buffer.size_bytes() == 2


def test_an_episode_on_a_clock_that_was_set_back_starts_empty() -> None:
    buffer = MemoryBuffer(["s"], span_ns=SPAN)
    buffer.add("s", 10_000, b"future")
    buffer.start_episode(0)
    assert buffer.sample("s", 20_000) is None
    assert buffer.add("s", 1, b"now") and buffer.sample("s", 5) == (1, b"now")


def test_a_clock_that_jumps_back_starts_anew() -> None:
    buffer = MemoryBuffer(["s"], span_ns=SPAN)
    buffer.add("s", 10_000, b"before")
    assert buffer.add("s", 1, b"after")
    assert buffer.sample("s", 20_000) == (1, b"after"), "the future that never comes is gone"


def test_a_clock_that_jumps_back_within_an_episode_starts_anew() -> None:
    """A bag that loops, a simulator that restarts: nobody announces an episode for it."""
    buffer = MemoryBuffer(["s"], span_ns=SPAN)
    buffer.start_episode(10_000)
    buffer.add("s", 10_005, b"before")
    buffer.add("s", 1, b"after")
    assert buffer.sample("s", 5) == (1, b"after")


def test_threads_that_add_and_sample_see_whole_messages() -> None:
    buffer = MemoryBuffer(["s"], span_ns=50, max_bytes=4000)
    wrong: list[object] = []

    def fill() -> None:
        for stamp in range(3000):
            buffer.add("s", stamp, stamp.to_bytes(4, "big") * 10)

    def look() -> None:
        for at in range(0, 3000, 3):
            found = buffer.sample("s", at)
            if found and (found[0] > at or found[1] != found[0].to_bytes(4, "big") * 10):
                wrong.append(found)

    threads = [threading.Thread(target=fill), *(threading.Thread(target=look) for _ in range(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong and buffer.newest_ns("s") == 2999


def test_a_simulator_that_was_started_again_starts_empty() -> None:
    """Both runs begin at 1 s; the first was shorter than the buffer's span."""
    run = [1_000_000_000 + k * 12_500_000 for k in range(60)]
    for mark_first in (True, False):  # the first observation may overtake the mark
        buffer = MemoryBuffer(["state", "image"], span_ns=1_000_000_000)
        for stamp in run:
            buffer.add("state", stamp, b"old")
            buffer.add("image", stamp, b"old")
        if mark_first:
            buffer.start_episode(run[0])
        assert buffer.add("state", run[0], b"new")
        if not mark_first:
            buffer.start_episode(run[0])
        assert buffer.newest_ns("state") == run[0] and buffer.sample("state", run[0]) == (run[0], b"new")
        assert buffer.sample("image", run[-1]) is None
