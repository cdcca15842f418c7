"""Bags that are damaged, cut or nonsense: an error in one line or a whole dataset, in time, and nothing left behind."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vla_core.data.convert import convert
from vla_core.data.episodes import EPISODE_TYPE
from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.errors import VlaError
from vla_core.observation.messages import Message

from .bags import KINDS, write_kind
from .helpers import CONTRACT, JOINTS, SPEC, START, STEP, stream_messages, with_stream, write_bag
from .replayed import read_episode

DEADLINE_S = 60  # a hundred times what such a bag takes


@contextmanager
def watchdog() -> Iterator[None]:
    """An error instead of a hang."""

    def bark(*_: object) -> None:
        raise TimeoutError(f"not done after {DEADLINE_S} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(DEADLINE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(bag: Path) -> str | int:
    """The error that a bag leads to, or how many frames the dataset has; everything in it has been read then."""
    out = bag.parent / "set"
    try:
        with watchdog():
            convert([bag], out, SPEC, workers=1, resume=False)
    except VlaError as error:
        assert str(error) and "\n" not in str(error)
        assert not out.exists() and not (out.parent / ".set.partial").exists()
        return str(error)
    folder = LeRobotFolder(out)
    frames = len(folder.column("action"))
    shown = sum(len(folder.images("observation.images.camera", e.index)) for e in folder.episodes)
    rows = folder.frames()
    assert rows is not None and frames == shown == rows.num_rows == folder.info.total_frames > 0
    assert np.isfinite(folder.column("action")).all() and np.isfinite(folder.column("observation.state")).all()
    shutil.rmtree(out)
    return frames


# --- bytes ----------------------------------------------------------------------------------------------------------


def flip(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 2, 8, 40))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def erase(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    content[start : start + 100] = bytes(len(content[start : start + 100]))


def lose(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    del content[start : start + rng.choice((1, 8, 1000))]


def repeat(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    content[start:start] = content[start : start + rng.choice((1, 8, 1000))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpus")
    return {kind: write_kind(folder / kind, stream_messages(12), kind) for kind in KINDS}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KINDS), st.sampled_from((flip, cut, erase, lose, repeat)), st.integers(0, 2**32), st.booleans())
def test_damaged_bytes(
    corpus: dict[str, Path], kind: str, damage: Callable[[bytearray, random.Random], None], seed: int, storage: bool
) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        bag = Path(shutil.copytree(corpus[kind], Path(folder) / "bag"))
        (metadata,), (data,) = bag.glob("*.yaml"), [f for f in bag.iterdir() if f.suffix != ".yaml"]
        file = data if storage else metadata
        content = bytearray(file.read_bytes())
        damage(content, rng)
        file.write_bytes(content)
        found = outcome(bag)
        assert isinstance(found, int) or str(bag) in found
        assert os.listdir(folder) == ["bag"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bag_that_is_cut_anywhere_is_refused(tmp_path: Path, corpus: dict[str, Path], kind: str) -> None:
    """Whatever is missing of its end, even a single byte: a cut bag never makes a dataset."""
    (whole,) = [f for f in corpus[kind].iterdir() if f.suffix != ".yaml"]
    size = whole.stat().st_size
    for left in (0, 1, size // 3, size - 100, size - 1):
        bag = Path(shutil.copytree(corpus[kind], tmp_path / f"bag{left}"))
        os.truncate(bag / whole.name, left)
        if kind.startswith("sqlite3") and "file" not in kind and left >= size - 100:
            continue  # the last page of a database may be one that nothing needs
        assert "truncated or damaged" in str(outcome(bag))


# --- messages -------------------------------------------------------------------------------------------------------


def stamped(message: Message, stamp_ns: int) -> Message:
    """The same message with another stamp in its header."""
    if message.topic == "task":
        return message
    seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
    data = bytearray(message.data)
    data[4:12] = struct.pack("<iI", max(-(2**31), min(seconds, 2**31 - 1)), nanoseconds)
    return dataclasses.replace(message, stamp_ns=stamp_ns, data=bytes(data))


def nonsense(messages: list[Message], kind: str, rng: random.Random) -> list[tuple[int, Message]]:
    """(time of receipt, message), with what sensors, clocks and recorders do at their worst."""
    found = [(m.stamp_ns, m) for m in messages]
    topics = sorted({m.topic for m in messages})
    topic = rng.choice(topics)
    some = [i for i, (_, m) in enumerate(found) if m.topic == topic]
    if kind == "shuffled stamps":
        stamps = [found[i][0] for i in some]
        rng.shuffle(stamps)
        for i, stamp in zip(some, stamps, strict=True):
            found[i] = found[i][0], stamped(found[i][1], stamp)
    elif kind == "one stamp":
        for i in some:
            found[i] = found[i][0], stamped(found[i][1], found[some[0]][0])
    elif kind == "wild stamps":
        for i in rng.sample(some, max(1, len(some) // 3)):
            wild = rng.choice((0, 1, -1, 2**31 * 10**9 - 1, -(2**31) * 10**9, START + 10**15, START - 10**15))
            found[i] = found[i][0], stamped(found[i][1], wild)
    elif kind == "wild receipts":
        for i in rng.sample(range(len(found)), 5):
            found[i] = rng.choice((0, 1, 2**62, START + 10**15)), found[i][1]
    elif kind == "no messages":
        found = [entry for i, entry in enumerate(found) if i not in some]
    elif kind == "a few":
        found = [entry for i, entry in enumerate(found) if i not in some or rng.random() < 0.1]
    elif kind == "cut messages":
        for i in rng.sample(some, max(1, len(some) // 3)):
            m = found[i][1]
            found[i] = found[i][0], dataclasses.replace(m, data=m.data[: rng.randrange(len(m.data))])
    elif kind == "flipped messages":
        for i in rng.sample(some, max(1, len(some) // 2)):
            data = bytearray(found[i][1].data)
            for _ in range(4):
                data[rng.randrange(4, len(data))] ^= 1 << rng.randrange(8)
            found[i] = found[i][0], dataclasses.replace(found[i][1], data=bytes(data))
    elif kind == "other bytes":
        for i in rng.sample(some, max(1, len(some) // 3)):
            found[i] = found[i][0], dataclasses.replace(found[i][1], data=rng.randbytes(rng.randrange(200)))
    elif kind == "another type":
        other = rng.choice((JOINTS, "std_msgs/msg/String", EPISODE_TYPE, "sensor_msgs/msg/Image"))
        for i in some:
            found[i] = found[i][0], dataclasses.replace(found[i][1], type=other)
    return found


NONSENSE = ("shuffled stamps", "one stamp", "wild stamps", "wild receipts", "no messages", "a few", "cut messages",
            "flipped messages", "other bytes", "another type")  # fmt: skip


@settings(max_examples=30, deadline=None)
@example("shuffled stamps", 226, "mcap", 2)  # all ticks are before the mark that starts the episode
@given(st.sampled_from(NONSENSE), st.integers(0, 2**32), st.sampled_from(("mcap", "sqlite3")), st.integers(2, 40))
def test_nonsense_in_messages(kind: str, seed: int, storage: str, ticks: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        entries = nonsense(stream_messages(ticks), kind, rng)
        if not entries:
            return
        receipts = [receipt for receipt, _ in entries]
        bag = write_kind(Path(folder) / "bag", [m for _, m in entries], storage, receipts)
        found = outcome(bag)
        left_out = "none of the 1 episodes succeeded (the first, bag"
        assert isinstance(found, int) or str(bag) in found or left_out in found


def test_a_hole_of_years_is_no_hang(tmp_path: Path) -> None:
    """Ticks are counted while sensors are there, not across the time in between."""
    first = stream_messages(20)
    years = 30 * 365 * 86400 * 10**9
    later = [stamped(dataclasses.replace(m, stamp_ns=m.stamp_ns + years), m.stamp_ns + years) for m in first]
    bag = write_bag(tmp_path / "bag", [m for m in [*first, *later] if m.topic != "episode"])
    assert outcome(bag) == 40


def test_a_few_late_messages_are_counted_and_named_and_many_are_refused(tmp_path: Path) -> None:
    """What comes seconds after newer ones is in the report; a clock that was set makes a bad bag."""
    recorded = stream_messages(1400)
    arms = [m for m in recorded if m.topic == "arm/state"]
    late = {id(arms[k]) for k in (50, 90)}
    receipts = [m.stamp_ns + (10_500 * 10**6 if id(m) in late else 0) for m in recorded]
    bag = write_kind(tmp_path / "bag", recorded, "mcap", receipts)
    done = convert([bag], tmp_path / "counted", SPEC)
    assert done.report.streams["arm"].late == 2 and done.report.streams["arm"].lost == 2 / 1400
    assert "     2" in next(line for line in done.report.table().splitlines() if line.startswith("arm "))
    back = [stamped(m, m.stamp_ns - 2 * 10**10) if m.stamp_ns >= START + 1300 * STEP else m for m in recorded]
    bag = write_kind(tmp_path / "back", back, "mcap", [m.stamp_ns for m in recorded])
    assert "of 350 messages 25 are stamped before what came long before them" in str(outcome(bag))


def test_damage_is_not_mistaken_for_silence(tmp_path: Path) -> None:
    """The same bag, whole, has the frames that a plain replay finds."""
    bag = write_bag(tmp_path / "bag", stream_messages(25), with_stream("camera", missing="mask"))
    contract = with_stream("camera", missing="mask")
    assert outcome(bag) == len(read_episode(bag, contract, SPEC).observations) == 25
    assert contract != CONTRACT
