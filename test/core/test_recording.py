"""Bags behind a bounded queue: a slow or full disk costs counted messages, never memory or the others' time."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_core.data import bag as bags
from vla_core.data.bag import BagError, BagWriter
from vla_core.data.recording import (
    DROPPED_KEY,
    OVERHEAD_BYTES,
    Arrival,
    ByteBudget,
    EarlyArrivals,
    LossCounter,
    Recording,
    RecordingThread,
)
from vla_core.observation import messages

TOPICS = {"text": ("std_msgs/msg/String", False), "mark": ("std_msgs/msg/String", True)}
WAIT_S = 20.0


class Disk:
    """Stands between the thread and the disk: holds it up, or refuses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.refuse = False
        write = BagWriter.write

        def slow_write(writer: BagWriter, *arguments: Any) -> None:
            assert self.go_on.wait(WAIT_S)
            if self.refuse:
                raise BagError("no space left")
            write(writer, *arguments)

        monkeypatch.setattr(BagWriter, "write", slow_write)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def opened(thread: RecordingThread, path: Path) -> Recording:
    return thread.open(path, {"task": "t"}, TOPICS)


def texts(path: Path) -> list[str]:
    return [messages.deserialize(m.type, m.data).data for m in bags.read(path)]


def test_a_slow_disk_costs_counted_messages_and_neither_memory_nor_marks(disk: Disk, tmp_path: Path) -> None:
    size = len(messages.text("000"))
    budget = ByteBudget(10 * (size + OVERHEAD_BYTES))
    thread = RecordingThread(budget)
    recording = opened(thread, tmp_path / "bag")
    disk.go_on.clear()
    kept = [k for k in range(100) if recording.write("text", k, messages.text(f"{k:03d}"))]
    assert kept == list(range(10)), "what fits is kept in order, the rest is dropped"
    assert budget.used <= budget.limit
    assert recording.write("mark", 1000, messages.text("end"), always=True), "a mark is never dropped"
    recording.close({"outcome": "succeeded"})
    disk.go_on.set()
    recording.closed.result(WAIT_S)
    thread.finish()
    info = bags.info(tmp_path / "bag")
    assert info.whole and info.metadata["task"] == "t" and info.metadata["outcome"] == "succeeded"
    assert json.loads(info.metadata[DROPPED_KEY]) == {"text": 90}
    assert texts(tmp_path / "bag") == [f"{k:03d}" for k in kept] + ["end"]
    assert budget.used == 0


def test_the_next_bag_begins_while_the_last_one_is_being_written(disk: Disk, tmp_path: Path) -> None:
    thread = RecordingThread(ByteBudget(10**6))
    first, second = opened(thread, tmp_path / "first"), opened(thread, tmp_path / "second")
    disk.go_on.clear()
    first.write("text", 1, messages.text("one"))
    first.close({})
    second.write("text", 2, messages.text("two"))
    second.close({})
    assert not first.closed.done()
    disk.go_on.set()
    thread.finish()
    assert (texts(tmp_path / "first"), texts(tmp_path / "second")) == (["one"], ["two"])


def test_a_disk_that_refuses_breaks_one_bag_and_is_told_once(disk: Disk, tmp_path: Path) -> None:
    budget = ByteBudget(10**6)
    thread = RecordingThread(budget)
    broken = opened(thread, tmp_path / "broken")
    disk.refuse = True
    broken.write("text", 1, messages.text("one"))
    with pytest.raises(BagError, match="no space left"):
        broken.closed.result(WAIT_S)
    disk.refuse = False
    broken.write("text", 2, messages.text("two"))  # after a hole: must not be written
    broken.close({})
    whole = opened(thread, tmp_path / "whole")
    whole.write("text", 3, messages.text("three"))
    whole.close({})
    thread.finish()
    with pytest.raises(BagError, match="no space left"):
        thread.check()
    thread.check()
    assert not bags.info(tmp_path / "broken").whole and texts(tmp_path / "whole") == ["three"]
    assert budget.used == 0


def test_a_discarded_bag_is_gone(tmp_path: Path) -> None:
    thread = RecordingThread(ByteBudget(10**6))
    recording = opened(thread, tmp_path / "bag")
    recording.write("text", 1, messages.text("one"))
    recording.discard()
    recording.closed.result(WAIT_S)
    thread.finish()
    assert not (tmp_path / "bag").exists()


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 30), st.integers(0, 20), st.integers(1, 400)), max_size=60
    ),
    st.integers(0, 2000),
    st.integers(0, 100),
    st.integers(-5, 35),
)
def test_early_arrivals_tell_exactly_what_an_episode_lost(
    steps: list[tuple[str, int, int, int]], limit: int, horizon: int, start_ns: int
) -> None:
    """Whatever is stamped in the episode and came within the horizon is either there or counted as missing."""
    budget = ByteBudget(limit)
    early = EarlyArrivals(budget, horizon)
    sent, now = [], 0
    for topic, stamp_ns, pause, size in steps:
        now += pause
        arrival = Arrival(topic, stamp_ns, now, bytes(size))
        early.add(arrival, now)
        sent.append((now, arrival))
    held = sum(len(a.data) for _, a in early._kept)
    assert held <= limit
    arrivals, missing = early.take(start_ns)
    recent = [a for came, a in sent if came >= now - horizon and a.stamp_ns >= start_ns]
    assert arrivals == recent[len(recent) - len(arrivals) :], "the newest, in order"
    assert missing == Counter(a.topic for a in recent[: len(recent) - len(arrivals)])
    assert budget.used == 0


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from((b"p", b"q")), st.booleans()), max_size=80))
def test_losses_are_the_gaps_in_each_publishers_numbers(sent: list[tuple[str, bytes, bool]]) -> None:
    counter = LossCounter()
    numbers: Counter[tuple[str, bytes]] = Counter()
    found: Counter[tuple[str, bytes]] = Counter()
    arrived: dict[tuple[str, bytes], list[int]] = {}
    for topic, publisher, arrives in sent:
        key = (topic, publisher)
        numbers[key] += 1
        if arrives:
            found[key] += counter.lost_before(topic, publisher, numbers[key])
            arrived.setdefault(key, []).append(numbers[key])
    for key, got in arrived.items():
        assert found[key] == got[-1] - got[0] + 1 - len(got)


def test_without_numbers_nothing_is_said_to_be_lost() -> None:
    assert LossCounter().lost_before("a", b"", None) == 0
