"""The sentences of MT10: every task has some of each kind, and none that is kept unseen is trained with."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from metaworld.env_dict import MT10_V3

from vla_core import cli
from vla_core.config import ConfigError
from vla_core.contract import RobotContract
from vla_core.data import bag
from vla_core.observation.spec import ObservationSpec
from vla_core.sim.collect import Collection, collect
from vla_core.sim.instructions import MT10, instructions
from vla_core.sim.metaworld import instruction_for

from .replayed import read_episode


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_the_tasks_are_meta_worlds_own_ten_in_its_order() -> None:
    assert list(MT10) == list(MT10_V3)


@pytest.mark.parametrize("task", MT10)
def test_every_task_has_enough_of_each(task: str) -> None:
    assert instructions(task) == (instruction_for(task),)
    assert instructions(task, "train")[0] == instruction_for(task)
    assert len(instructions(task, "train")) >= 5
    assert len(instructions(task, "unseen")) >= 5


def test_no_sentence_belongs_to_two_tasks_or_two_kinds() -> None:
    every = [
        " ".join(words(text)) for task, kind in itertools.product(MT10, ("train", "unseen"))
        for text in instructions(task, kind)  # type: ignore[arg-type]
    ]  # fmt: skip
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("task", MT10)
def test_unseen_sentences_are_other_sentences(task: str) -> None:
    """None of them has the words of a sentence of the task in another order, and most have words of their own."""
    known = [frozenset(words(text)) for text in instructions(task, "train")]
    vocabulary = frozenset().union(*known)
    unseen = [frozenset(words(text)) for text in instructions(task, "unseen")]
    assert not set(unseen) & set(known)
    assert sum(bool(text - vocabulary) for text in unseen) >= len(unseen) // 2


@pytest.mark.parametrize("task", MT10)
def test_swapped_sentences_are_the_other_tasks_own(task: str) -> None:
    found = instructions(task, "swapped")
    assert len(found) == 9 and instruction_for(task) not in found
    assert set(found) <= {instruction_for(other) for other in MT10}


def test_errors_name_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"split 'all', expected one of canonical, .*train, unseen"):
        instructions("push-v3", "all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no train sentences for 'hammer-v3'; there are some for: .*push-v3"):
        instructions("hammer-v3", "train")
    assert instructions("hammer-v3") == ("hammer",)


def test_collected_episodes_say_the_sentences_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("collect", "--task", "reach-v3", "drawer-close-v3", "--episodes", "3", "--max-steps", "3")
    assert cli.main([*words, "--no-images", "--instructions", "train", "--out", str(tmp_path / "bags")]) == 0
    capsys.readouterr()
    spec = ObservationSpec(state=("state",), instruction="instruction")
    for task in ("reach-v3", "drawer-close-v3"):
        bags = sorted((tmp_path / "bags" / task).iterdir())
        said = [bag.info(path).metadata["instruction"] for path in bags]
        assert said == list(instructions(task, "train")[:3])
        seen = [read_episode(path, bag.info(path).contract, spec) for path in bags]
        assert [episode.observations[0].instruction for episode in seen] == said
    with pytest.raises(ConfigError, match=r"no train sentences for 'hammer-v3'"):
        collect(tmp_path / "other", Collection(tasks=("hammer-v3",), instructions="train", images=False),
                RobotContract.load("metaworld_sawyer"))  # fmt: skip
    assert not (tmp_path / "other").exists()
