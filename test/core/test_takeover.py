"""Who is in command, and what becomes of what they did: the switch, the converter's marks and the recipe's choices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.core.helpers import CONTRACT, SPEC, START, STEP, episodes, recipe, stream_messages
from vla_core.config import ConfigError
from vla_core.data.bag import CONTRACT_KEY, BagWriter
from vla_core.data.convert import convert
from vla_core.data.dataset import Dataset, DatasetError, load
from vla_core.data.happened import INTERVENED
from vla_core.data.options import DataOptions, Filter, keep, weighted
from vla_core.data.windows import ChunkWindows
from vla_core.observation.messages import Message
from vla_core.runtime.takeover import Passed, Takeover
from vla_core.training.sources import build_sources

EVENTS = st.lists(st.tuples(st.sampled_from(["policy", "teleop", "take", "give"]), st.integers(0, 3)), max_size=60)


@given(EVENTS)
def test_each_instant_is_answered_once_in_order_and_only_by_who_is_in_command(events: list[tuple[str, int]]) -> None:
    switch, stamp = Takeover(), dict.fromkeys(("policy", "teleop"), 0)
    passed: list[int] = []
    for kind, ahead in events:
        if kind in ("take", "give"):
            found = switch.hand_over(kind == "take")
        else:
            stamp[kind] += ahead * STEP
            found = switch.command(kind == "teleop", stamp[kind], f"{kind} {stamp[kind]}".encode())
        if found is not None:
            who, when = found.data.decode().split()
            assert found.intervention == switch.taken == (who == "teleop")
            passed.append(int(when))
    assert passed == sorted(set(passed))


def test_a_tick_during_the_change_is_answered_by_what_was_there_already() -> None:
    """In lockstep nothing else comes for it: an unanswered tick stops the world."""
    switch = Takeover()
    assert switch.command(False, 1, b"p1") == Passed(b"p1", False)
    assert switch.command(True, 1, b"t1") is None
    assert switch.command(True, 2, b"t2") is None
    assert switch.hand_over(True) == Passed(b"t2", True)
    assert switch.command(False, 2, b"p2") is None
    assert switch.hand_over(False) is None  # 2 was answered
    assert switch.hand_over(True) is None  # nobody changed the answer
    assert switch.command(True, 3, b"t3") == Passed(b"t3", True)


def test_a_clock_that_was_set_back_begins_anew() -> None:
    switch = Takeover()
    switch.command(False, 10**12, b"later")
    assert switch.command(False, 5, b"sooner") == Passed(b"sooner", False)


# --- from bags to training ------------------------------------------------------------------------------------------

TAKEN = range(10, 20)  # ticks


def bag(path: Path, marked: bool, seed: int = 0) -> Path:
    """An episode of 30 ticks, of which a teleoperator had ``TAKEN``."""
    found = stream_messages(seed=seed)
    if marked:
        commands = [m for m in found if m.topic == "arm/command"]
        found += [Message(f"intervention/{m.topic}", m.type, m.stamp_ns, m.data)
                  for m in commands if (m.stamp_ns - START) // STEP in TAKEN]  # fmt: skip
    with BagWriter(path, {CONTRACT_KEY: CONTRACT.to_yaml()}) as writer:
        for topic, kind in {m.topic: m.type for m in found}.items():
            writer.add_topic(topic, kind, latched=topic in ("task", "episode"))
        for message in sorted(found, key=lambda m: m.stamp_ns):
            writer.write(message.topic, message.stamp_ns, message.data)
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Of one episode with interventions and one that nobody but the demonstrator drove."""
    bags = [bag(tmp_path / "taken", True), bag(tmp_path / "demonstration", False, seed=1)]
    convert(bags, tmp_path / "dataset", SPEC, workers=1)
    return load(tmp_path / "dataset", None, SPEC, "none")


def test_the_converter_takes_the_marks_over(dataset: Dataset) -> None:
    assert dataset.intervened is not None
    first, second = np.split(dataset.intervened, dataset.starts[1:-1])
    assert np.flatnonzero(first).tolist() == list(TAKEN)
    assert second.all(), "where no policy drove, all is the demonstrator's"


def test_bags_without_interventions_have_no_marks(tmp_path: Path) -> None:
    convert([bag(tmp_path / "demonstration", False)], tmp_path / "dataset", SPEC, workers=1)
    found = load(tmp_path / "dataset", None, SPEC, "none")
    assert found.intervened is None
    assert INTERVENED not in (tmp_path / "dataset" / "meta" / "info.json").read_text()
    assert keep(found, Filter(interventions="only"))[0] is found


def test_of_interventions_alone_nothing_of_the_policys_own_is_shown(dataset: Dataset) -> None:
    kept, notes = keep(dataset, Filter(interventions="only"))
    assert kept.window_rows.tolist() == [*TAKEN, *range(30, 60)]
    assert any("interventions (only) starts no window at 20 of 60 frames" in line for line in notes)
    _, mask = ChunkWindows(kept, 4).chunks(np.array([10, 17, 18, 19, 30]))
    assert mask.sum(axis=1).tolist() == [4, 3, 2, 1, 4]
    _, whole = ChunkWindows(dataset, 4).chunks(np.array([17]))
    assert whole.all()


def test_interventions_weigh_more_where_they_are_to(dataset: Dataset) -> None:
    rows = weighted(dataset, 3).window_rows
    assert np.bincount(rows).tolist() == [3 if flag else 1 for flag in dataset.intervened]  # type: ignore[union-attr]
    options = DataOptions(intervention_weight=3)
    sources = build_sources(dataclasses.replace(recipe(), data=options), [dataset], [None])
    assert sources.training.lengths == (len(rows),)
    assert weighted(Dataset.from_episodes(CONTRACT, SPEC, episodes()), 3).frames == 35


def test_a_dataset_without_any_is_refused_and_so_is_no_weight(dataset: Dataset) -> None:
    nobody = dataclasses.replace(dataset, intervened=np.zeros(dataset.frames, dtype=bool))
    with pytest.raises(DatasetError, match="nobody intervened in its 2 episodes"):
        keep(nobody, Filter(interventions="only"))
    with pytest.raises(ConfigError, match="intervention_weight: expected at least 1, found 0"):
        DataOptions(intervention_weight=0)
