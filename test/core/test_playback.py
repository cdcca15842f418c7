"""The schedule of a bag that is played, and reading ahead of it."""

from __future__ import annotations

import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer

from vla_core.data import bag as bags
from vla_core.data.bag import DamagedBag, Serialized
from vla_core.data.playback import Playhead, ReadAhead, latched_before
from vla_core.data.recording import OVERHEAD_BYTES
from vla_core.observation import messages

RATES = st.sampled_from([0.01, 0.3, 0.5, 1.0, 1.7, 3.0, 100.0])
WAIT_S = 20.0


def write_bag(
    path: Path,
    sent: list[tuple[str, int, str]],
    latched: dict[str, int],
    storage: StoragePlugin = StoragePlugin.MCAP,
    reliability: QosReliability = QosReliability.RELIABLE,
) -> Path:
    """A bag of another recorder: (topic, receive ns, text) as String; ``latched`` gives the depth of such topics."""
    with Writer(path, version=9, storage_plugin=storage) as writer:
        connections = {}
        for topic in dict.fromkeys([*latched, *(topic for topic, _, _ in sent)]):
            durability = QosDurability.TRANSIENT_LOCAL if topic in latched else QosDurability.VOLATILE
            qos = Qos(QosHistory.KEEP_LAST, latched.get(topic, 10), reliability, durability, QosTime(0, 0),
                      QosTime(0, 0), QosLiveliness.AUTOMATIC, QosTime(0, 0), False)  # fmt: skip
            connections[topic] = writer.add_connection(
                topic, "std_msgs/msg/String", typestore=messages.typestore(), offered_qos_profiles=[qos]
            )
        for topic, receive_ns, text in sent:
            writer.write(connections[topic], receive_ns, messages.text(text))
    return path


@given(
    RATES, st.integers(0, 50), st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=6), st.integers(0, 60)
)
def test_due_is_the_first_moment_at_which_bag_time_has_come(
    rate: float, start_ns: int, changes: list[tuple[int, bool]], ahead_ns: int
) -> None:
    now, head = 1000, Playhead(start_ns, rate, 1000)
    for passed, paused in changes:
        now += passed
        (head.pause if paused else head.resume)(now)
    bag_ns = head.bag_ns(now) + ahead_ns
    due = head.due_ns(bag_ns)
    if head.paused:
        assert due is None and head.bag_ns(now + 10**6) == head.bag_ns(now)
        return
    assert due is not None
    moments = range(now, now + 100 * (ahead_ns + 2))
    assert due == next(t for t in moments if head.bag_ns(t) >= bag_ns)


@given(RATES, st.lists(st.tuples(st.integers(0, 10**10), st.integers(0, 10**10)), max_size=20))
def test_bag_time_is_the_time_spent_playing(rate: float, spans: list[tuple[int, int]]) -> None:
    """Beside a sum of exact fractions: each resume may round by one nanosecond, and nothing else adds up."""
    now, played, head = 5, Fraction(0), Playhead(7, rate, 5)
    for play_ns, pause_ns in spans:
        now += play_ns
        played += play_ns
        head.pause(now)
        now += pause_ns
        head.resume(now)
    exact = 7 + played * Fraction(str(rate))
    assert exact - len(spans) - 1 < head.bag_ns(now) <= exact


def test_a_long_bag_is_on_time_to_the_nanosecond_at_its_end() -> None:
    day_ns = 86_400 * 10**9
    head = Playhead(0, 1.0, 0)
    assert [head.due_ns(day_ns + k) for k in range(3)] == [day_ns + k for k in range(3)]
    assert Playhead(0, 0.1, 0).due_ns(day_ns) == 10 * day_ns, "0.1 is a tenth, not its binary neighbour"


@given(RATES, st.lists(st.integers(0, 10**9), min_size=1, max_size=40), st.integers(0, 40), st.integers(0, 10**10))
def test_catching_up_is_no_burst_and_comes_to_an_end(
    rate: float, gaps: list[int], stall_at: int, stall_ns: int
) -> None:
    """A player that is held up once, on a clock of the test: never early, at most twice the rate, then on time."""
    head, now, last = Playhead(0, rate, 0), 0, (0, 0)
    bag_ns, left = 0, []
    for k, gap in enumerate(gaps):
        bag_ns += gap
        at = head.next_ns(bag_ns, *last)
        assert at is not None
        now = max(now, at) + (stall_ns if k == stall_at else 0)
        left.append((bag_ns, now))
        last = (bag_ns, now)
    late = [now - (head.due_ns(bag_ns) or 0) for bag_ns, now in left]
    assert min(late) >= 0
    for (bag_before, before), (bag_after, after) in pairwise(left):
        assert (after - before) * 2 * Fraction(str(rate)) >= bag_after - bag_before - 2 * Fraction(str(rate)) - 1
    for k, (at, _) in enumerate(left):
        behind = max(0, stall_ns - int((at - left[stall_at][0]) / Fraction(str(rate)) / 2)) if k >= stall_at else 0
        assert late[k] <= behind + len(gaps), "each message that plays at twice the rate wins half its gap back"


def taken(ahead: ReadAhead, wait_s: float = WAIT_S) -> list[Serialized]:
    found, deadline = [], time.monotonic() + wait_s
    while not ahead.finished:
        assert time.monotonic() < deadline
        message = ahead.peek()
        if message is not None:
            found.append(message)
            ahead.pop()
    return found


@pytest.mark.parametrize("storage", list(StoragePlugin))
def test_reading_ahead_is_bounded_and_loses_nothing(tmp_path: Path, storage: StoragePlugin) -> None:
    sent = [("ab"[k % 3 // 2], 10 * k, f"{k:04d}" * 50) for k in range(300)]
    bag = write_bag(tmp_path / "bag", sent, {}, storage)
    size = len(messages.text(sent[0][2])) + OVERHEAD_BYTES
    ahead = ReadAhead(bag, {"a", "b"}, 100, 5 * size)
    deadline = time.monotonic() + WAIT_S
    while len(ahead._waiting) < 5:
        assert time.monotonic() < deadline
    found = []
    while not ahead.finished:
        assert ahead._bytes <= 5 * size
        message = ahead.peek()
        if message is not None:
            found.append(message)
            ahead.pop()
    ahead.close()
    expected = [Serialized(topic, at, messages.text(text)) for topic, at, text in sent if at >= 100]
    assert found == expected
    some = ReadAhead(bag, {"b"}, 0, 1)  # too little for one message: one at a time all the same
    assert taken(some) == [m for m in read_all(sent) if m.topic == "b"]


def read_all(sent: list[tuple[str, int, str]]) -> list[Serialized]:
    return [Serialized(topic, at, messages.text(text)) for topic, at, text in sent]


def test_a_reader_that_waits_for_room_can_be_closed(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", [("a", k, "text") for k in range(100)], {})
    ahead = ReadAhead(bag, {"a"}, 0, 1)
    ahead.close()
    assert not ahead._thread.is_alive()


def test_damage_is_raised_where_messages_are_taken(tmp_path: Path) -> None:
    sent = [("a", k, str(k) * 1000) for k in range(2000)]
    bag = write_bag(tmp_path / "bag", sent, {})
    file = next(bag.glob("*.mcap"))
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 100_000] = bytes(100_000)
    file.write_bytes(data)
    with pytest.raises(DamagedBag, match="truncated or damaged"):
        taken(ReadAhead(bag, {"a"}, 0, 10**9))


def test_topics_come_with_what_was_offered(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", [("a", 1, "x"), ("b", 2, "y"), ("b", 3, "z")], {"b": 4})
    found = bags.recorded_topics(bag)
    assert {n: (t.type, t.count, t.latched) for n, t in found.items()} == {
        "a": ("std_msgs/msg/String", 1, False),
        "b": ("std_msgs/msg/String", 2, True),
    }
    assert found["b"].depth == 4


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(("a", "b", "c")), st.integers(0, 20)), min_size=1, max_size=30),
    st.integers(0, 22),
    st.integers(1, 3),
)
def test_a_late_start_finds_the_latched_values_of_before(
    tmp_path_factory: pytest.TempPathFactory, sent: list[tuple[str, int]], start_ns: int, depth: int
) -> None:
    sent = sorted(sent, key=lambda entry: entry[1])
    texts = [(topic, at, str(k)) for k, (topic, at) in enumerate(sent)]
    bag = write_bag(tmp_path_factory.mktemp("late") / "bag", texts, {"a": depth, "b": 1})
    found = list(latched_before(bag, list(bags.recorded_topics(bag).values()), start_ns))
    for topic, kept in (("a", depth), ("b", 1), ("c", 0)):
        before = [m for m in read_all(texts) if m.topic == topic and m.receive_ns < start_ns]
        assert [m for m in found if m.topic == topic] == before[len(before) - min(kept, len(before)) :]
    assert [m.receive_ns for m in found] == sorted(m.receive_ns for m in found)
