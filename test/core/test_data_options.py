"""Filters and splits against plain loops; what leaves nothing is an error."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.data.dataset import Dataset, DatasetError
from vla_core.data.options import DataOptions, Filter, Validation, at_rest, keep, split

from .helpers import CONTRACT, SPEC, episodes, with_action

TASKS = ("push", "reach", "push", "push", "reach", "reach", "push", "open")


def labelled() -> Dataset:
    """Eight episodes of 3 to 10 frames: three tasks, every third one failed, bags of two days."""
    made = [
        dataclasses.replace(e, task=task, outcome="failed" if i % 3 == 2 else "succeeded", bag=f"day{i % 2}/bag_{i}",
                            instruction=f"{task} the puck")
        for i, (e, task) in enumerate(zip(episodes(tuple(range(3, 11))), TASKS, strict=True))
    ]  # fmt: skip
    return Dataset.from_episodes(CONTRACT, SPEC, made, "lab")


@pytest.mark.parametrize(("wanted", "left", "note"), [
    ({"tasks": ("push", "open")}, [0, 2, 3, 6, 7], r"lab: tasks \(push, open\) leaves out 3 of 8 episodes"),
    ({"outcomes": ("succeeded",)}, [0, 1, 3, 4, 6, 7], r"outcomes \(succeeded\) leaves out 2 of 8"),
    ({"episodes": (1, 5)}, [1, 5], r"episodes \(1, 5\) leaves out 6 of 8"),
    ({"instruction": "^push"}, [0, 2, 3, 6], r"instruction \(\^push\) leaves out 4 of 8"),
    ({"bag": "day1"}, [1, 3, 5, 7], r"bag \(day1\) leaves out 4 of 8"),
    ({"min_length": 6}, [3, 4, 5, 6, 7], r"min_length \(6\) leaves out 3 of 8"),
    ({"max_length": 4}, [0, 1], r"max_length \(4\) leaves out 6 of 8"),
])  # fmt: skip
def test_each_condition_keeps_what_it_says_and_tells(wanted: dict[str, object], left: list[int], note: str) -> None:
    data = labelled()
    kept, notes = keep(data, Filter(**wanted))  # type: ignore[arg-type]
    assert [entry.index for entry in kept.episodes] == left
    rows = np.concatenate([np.arange(data.starts[i], data.starts[i + 1]) for i in left])
    np.testing.assert_array_equal(kept.action, data.action[rows])
    assert len(notes) == 1
    assert re.search(note, notes[0])


def test_conditions_add_up_and_each_counts_what_it_found() -> None:
    kept, notes = keep(labelled(), Filter(tasks=("push",), outcomes=("succeeded",), min_length=4))
    assert [entry.index for entry in kept.episodes] == [3, 6]
    assert [note.rpartition("leaves out ")[2] for note in notes] == [
        "4 of 8 episodes", "1 of 4 episodes", "1 of 3 episodes"
    ]  # fmt: skip


def test_a_task_that_is_not_there_is_told_where_others_are() -> None:
    kept, notes = keep(labelled(), Filter(tasks=("open", "fly")))
    assert [entry.index for entry in kept.episodes] == [7]
    assert notes[0] == "lab: no task 'fly'; choices: open, push, reach"


def test_nothing_asked_for_leaves_everything() -> None:
    data = labelled()
    assert keep(data, Filter()) == (data, [])
    assert split(data, Validation()) == (data, None)


@pytest.mark.parametrize(("wanted", "message"), [
    ({"tasks": ("fly",)}, "lab: no task 'fly'; choices: open, push, reach"),
    ({"outcomes": ("won",)}, "no outcome 'won'; choices: failed, succeeded"),
    ({"episodes": (9,)}, "no episode 9; choices: 0 to 7"),
    ({"tasks": ("open",), "max_length": 4},
     r"the filter leaves nothing: lab: tasks \(open\) leaves out 7 of 8 episodes; lab: max_length \(4\) leaves out 1"),
    ({"motionless": 0.5, "by_change": ("wrist",)}, "by_change: no action 'wrist'; choices: elbow, shoulder"),
])  # fmt: skip
def test_a_filter_that_leaves_nothing_is_an_error(wanted: dict[str, object], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        keep(labelled(), Filter(**wanted))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 10**6), st.booleans())
def test_no_window_starts_at_rest(lengths: list[int], least: int, seed: int, position: bool) -> None:
    """Against a loop over the frames; half ranges are 1 and 2."""
    rng = np.random.default_rng(seed)
    made = [
        dataclasses.replace(e, action=rng.choice([0.0, 0.05, 0.3], size=e.action.shape).astype(np.float32))
        for e in episodes(tuple(lengths))
    ]
    contract = with_action(kind="position", safe=("hold", "hold")) if position else CONTRACT
    data = Dataset.from_episodes(contract, SPEC, made)
    allowed, row = [], 0
    for episode in made:
        still = []
        for k, action in enumerate(episode.action):
            change = np.abs(action - episode.action[k - 1]) if k else np.full(2, np.inf)
            sizes = change if position else np.array([abs(action[0]), change[1]])
            still.append(bool(sizes[0] < 0.1 and sizes[1] < 0.2))
        for k in range(len(still)):
            first = last = k
            while still[k] and first > 0 and still[first - 1]:
                first -= 1
            while still[k] and last + 1 < len(still) and still[last + 1]:
                last += 1
            if not (still[k] and last - first + 1 >= least):
                allowed.append(row)
            row += 1
    wanted = Filter(motionless=0.1, motionless_ticks=least, by_change=() if position else ("elbow",))
    if not allowed:
        with pytest.raises(DatasetError, match="every frame is at rest"):
            keep(data, wanted)
        return
    kept, notes = keep(data, wanted)
    assert kept.window_rows.tolist() == allowed
    np.testing.assert_array_equal(kept.action, data.action)
    left = data.frames - len(allowed)
    assert notes == ([f"memory: motionless (0.1) starts no window at {left} of {data.frames} frames"] if left else [])


def test_rest_is_by_value_for_velocities() -> None:
    (episode,) = episodes((4,))
    action = np.array([[0.0, 0.0], [0.0, 0.19], [0.0, 0.21], [0.11, 0.0]], np.float32)
    data = Dataset.from_episodes(CONTRACT, SPEC, [dataclasses.replace(episode, action=action)])
    assert at_rest(data, 0.1).tolist() == [True, True, False, False]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=40), st.floats(0.05, 0.6), st.integers(0, 99))
def test_a_split_takes_its_share_of_each_task_and_every_episode_once(tasks: list[str], share: float, seed: int) -> None:
    made = [dataclasses.replace(e, task=task) for e, task in zip(episodes((2,) * len(tasks)), tasks, strict=True)]
    data = Dataset.from_episodes(CONTRACT, SPEC, made)
    due = {task: round(share * tasks.count(task)) for task in set(tasks)}
    if sum(due.values()) == len(tasks):
        with pytest.raises(DatasetError, match="both need at least one"):
            split(data, Validation(fraction=share, seed=seed))
        return
    training, held_out = split(data, Validation(fraction=share, seed=seed))
    assert held_out is not None
    indices = [[e.index for e in part.episodes] for part in (training, held_out)]
    assert sorted(indices[0] + indices[1]) == list(range(len(tasks)))
    if any(due.values()):
        assert {task: [tasks[i] for i in indices[1]].count(task) for task in due} == due
    else:
        assert len(indices[1]) == 1, "at least one episode is held out"
    again = split(data, Validation(fraction=share, seed=seed))[1]
    assert again is not None and [e.index for e in again.episodes] == indices[1]


def test_splits_differ_by_seed_and_may_be_listed() -> None:
    data = labelled()
    found = {tuple(e.index for e in split(data, Validation(fraction=0.5, seed=s))[1].episodes) for s in range(9)}  # type: ignore[union-attr]
    assert len(found) > 3
    training, held_out = split(data, Validation(episodes=(7, 2)))
    assert held_out is not None and [e.index for e in held_out.episodes] == [2, 7]
    assert [e.index for e in training.episodes] == [0, 1, 3, 4, 5, 6]
    only = split(data, Validation(fraction=0.25, by_task=False))[1]
    assert only is not None and len(only.episodes) == 2
    filtered, _ = keep(data, Filter(tasks=("push",)))
    with pytest.raises(DatasetError, match=r"no episode 1 \(of those that the filter keeps\); choices: 0, 2, 3, 6"):
        split(filtered, Validation(episodes=(1,)))
    with pytest.raises(DatasetError, match="of 4 episodes, 4 would be held out and 0 remain"):
        split(filtered, Validation(episodes=(0, 2, 3, 6)))


def test_options_survive_their_file_and_slips_are_named() -> None:
    options = DataOptions(weights={"a": 2.0}, filter=Filter(tasks=("push",), motionless=0.02), cache="none",
                          validation=Validation(fraction=0.1))  # fmt: skip
    assert from_dict(DataOptions, to_dict(options), "data") == options
    for plain, message in (
        ({"filter": {"bag": "("}}, r"data\.filter\.bag: '\(' is no regular expression"),
        ({"filter": {"motionless": 1.5}}, r"data\.filter\.motionless: expected a share"),
        ({"filter": {"motionless_ticks": 0}}, r"motionless_ticks: expected at least 1"),
        ({"filter": {"min_length": 5, "max_length": 4}}, "max_length: 4 is below min_length 5"),
        ({"validation": {"fraction": 1.0}}, r"data\.validation\.fraction: expected 0 to below 1"),
        ({"validation": {"fraction": 0.1, "episodes": [3]}}, "take one of them"),
        ({"weights": {"a": 0}}, r"data\.weights\.a: expected a positive number"),
        ({"cache": "ram"}, "one of disk, memory, none"), ({"prefetch": -1}, "prefetch: expected at least 0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            from_dict(DataOptions, plain, "data")
