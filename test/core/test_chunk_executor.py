"""Chunks in time: the row that belongs to an instant, whenever its chunk arrived."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.observation.builder import Unobserved
from vla_core.runtime.chunk import ActionChunk
from vla_core.runtime.chunk_executor import ChunkExecutor
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.execution import Execution
from vla_core.runtime.policy import CheckpointPolicy

from .helpers import START, STEP, arm, camera, checkpoint, task


def chunk(stamp: int, step: int = 10, rows: int = 4, name: float = 0) -> ActionChunk:
    """Row k of chunk ``name`` is [name, k]."""
    return ActionChunk(stamp, step, np.array([[name, k] for k in range(rows)], dtype=float))


arrivals = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 120), st.integers(1, 6)), min_size=1, max_size=8
)  # observation stamp, delay until it arrives, rows


@given(arrivals, st.integers(1, 25), st.integers(-20, 500))
def test_the_row_of_an_instant(arrived: list[tuple[int, int, int]], step: int, at: int) -> None:
    """Of the chunks that have arrived by ``at``, the newest observation's says what happens at ``at``."""
    order = sorted(range(len(arrived)), key=lambda i: arrived[i][0] + arrived[i][1])
    executor, best = ChunkExecutor(Execution(steps=2)), None
    for i in order:
        stamp, delay, rows = arrived[i]
        if stamp + delay > at:
            break
        executor.push(chunk(stamp, step, rows, i))
        if best is None or stamp >= arrived[best][0]:
            best = i
    expected = None
    if best is not None:
        stamp, _, rows = arrived[best]
        for k in range(rows):
            if stamp + k * step <= at < stamp + (k + 1) * step:
                expected = [best, k]
    found = executor.action(at)
    assert (None if found is None else found[0].tolist()) == expected
    if found is not None:
        assert found[1].observation_stamp_ns <= at < found[1].valid_until_ns


def test_a_late_chunk_skips_the_rows_that_passed() -> None:
    executor = ChunkExecutor(Execution(steps=2))
    executor.push(chunk(100, name=1))
    assert executor.action(125)[0].tolist() == [1, 2]  # type: ignore[index]
    executor.push(chunk(110, name=2))  # computed from 110, arrives at 135
    assert executor.action(135)[0].tolist() == [2, 2]  # type: ignore[index]


def test_nothing_is_done_before_the_observation_or_after_the_last_row() -> None:
    executor = ChunkExecutor(Execution(steps=2))
    executor.push(chunk(100))
    assert [executor.action(at) is None for at in (99, 100, 139, 140)] == [True, False, False, True]


def test_an_older_observation_never_replaces_a_newer_one() -> None:
    executor = ChunkExecutor(Execution(steps=2))
    executor.push(chunk(100, name=1))
    executor.push(chunk(90, name=2))
    assert executor.action(100)[0].tolist() == [1, 0]  # type: ignore[index]
    executor.clear()
    assert executor.action(100) is None
    executor.push(chunk(90, name=2))
    assert executor.action(100)[0].tolist() == [2, 1]  # type: ignore[index]


@pytest.mark.parametrize("execute", [1, 2, 4, 9])
def test_due_after_the_rows_that_are_meant_to_run(execute: int) -> None:
    executor = ChunkExecutor(Execution(steps=execute))
    assert executor.due(0)
    executor.push(chunk(100))
    for at in range(80, 220):
        assert executor.due(at) == (not 100 <= at < 100 + 10 * execute)
    assert executor.action(139) is not None and executor.action(140) is None


# --- the core that drives it ----------------------------------------------------------------------------------------


def core() -> PolicyCore:
    return PolicyCore(CheckpointPolicy(checkpoint()))


def feed(target: PolicyCore, stamp_ns: int, k: int) -> None:
    target.add("camera", camera(stamp_ns, k).data, stamp_ns + 5)
    target.add("arm", arm(stamp_ns, k / 10).data, stamp_ns + 5)


def test_stamps_are_the_headers_where_there_is_one() -> None:
    target = core()
    assert target.add("arm", arm(START, 1).data, START + 77) == START
    assert target.add("task", task(0, "lift it").data, START + 77) == START + 77


def test_one_inference_every_execution_steps_and_commands_within_limits() -> None:
    target = core()
    target.add("task", task(0, "lift it").data, START)
    with pytest.raises(Unobserved):
        target.step(START)
    commands = []
    for k in range(8):
        feed(target, START + k * STEP, k)
        commands.append(target.step(START + k * STEP))
    assert len(target.inference_ms) == 4  # of each chunk 2 rows run
    stamps = [c.chunk.observation_stamp_ns for c in commands]
    assert stamps == [START + (k - k % 2) * STEP for k in range(8)]
    for k, command in enumerate(commands):
        np.testing.assert_array_equal(command.values, np.clip(command.chunk.actions[k % 2], [-1, -2], [1, 2]))


def test_a_prediction_beyond_the_limits_is_held_to_them() -> None:
    target = core()
    target.executor.push(ActionChunk(START, STEP, np.array([[5.0, -9.0], [0.5, 1.5]])))
    assert target.command(START).values.tolist() == [1.0, -2.0]  # type: ignore[union-attr]
    assert target.command(START + STEP).values.tolist() == [0.5, 1.5]  # type: ignore[union-attr]
    assert target.command(START + 2 * STEP) is None


def test_a_new_episode_forgets_plan_and_past() -> None:
    target = core()
    target.add("task", task(0, "lift it").data, START)
    feed(target, START, 0)
    target.infer(START)
    target.start_episode(START + STEP)
    assert target.command(START + STEP) is None
    with pytest.raises(Unobserved) as caught:
        target.infer(START + STEP)
    assert len(caught.value.reasons) == 2, "the instruction still holds"


def test_the_noise_of_a_policy_comes_from_its_seed_and_the_stamp_alone() -> None:
    """A replayed observation gives the chunk that the robot got, whatever was predicted before it."""
    shared = checkpoint(head=DiffusionHeadConfig(hidden_dim=32, train_steps=10, inference_steps=5))

    def predicted(seed: int, *stamps: int) -> list[bytes]:
        target = PolicyCore(CheckpointPolicy(shared, seed))
        target.add("task", task(0, "lift it").data, START)
        target.add("arm", arm(START, 0.5).data, START)
        target.add("camera", camera(START, 1).data, START)
        return [target.infer(stamp).actions.tobytes() for stamp in stamps]

    first, second = predicted(0, START, START + STEP)
    assert first != second
    assert predicted(0, START + STEP) == [second]
    assert predicted(1, START) != [first]


def test_a_chunk_of_the_last_episode_that_comes_late_is_not_executed() -> None:
    """The model was still thinking when the world was reset."""
    target = core()
    late = ActionChunk(START - STEP, STEP, np.ones((8, 2)))
    target.start_episode(START)
    target.executor.push(late)
    assert target.command(START) is None and target.executor.due(START)


def test_warm_up_leaves_no_trace() -> None:
    target = core()
    target.warm_up()
    assert not target.inference_ms and target.last_observation is None and target.command(START) is None


def test_a_clock_that_was_set_back_is_followed_and_a_late_chunk_is_not() -> None:
    executor = ChunkExecutor(Execution(steps=2))
    hour = 3600 * 10**9
    executor.start_episode(hour)
    now = ActionChunk(hour, 10, np.ones((3, 1)))
    executor.push(now)
    executor.push(ActionChunk(hour - 10**9, 10, np.zeros((3, 1))))
    assert executor.action(hour) == (pytest.approx([1.0]), now)
    again = ActionChunk(5, 10, np.full((3, 1), 2.0))  # a bag that loops, a simulation that starts anew
    executor.push(again)
    assert executor.action(5) == (pytest.approx([2.0]), again)
    newer = ActionChunk(25, 10, np.full((3, 1), 3.0))
    executor.push(newer)
    assert executor.action(25) == (pytest.approx([3.0]), newer)
