"""Strategies, delays and figures of chunk execution, against brute force and hand-made runs."""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_core.checkpoint import Checkpoint, CheckpointError, PolicyConfig
from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.model.action_head.flow_action_head import FlowHeadConfig
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig
from vla_core.runtime.chunk import ActionChunk, continuation, soft_mask
from vla_core.runtime.chunk_executor import MAX_CHUNKS, ChunkExecutor
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.execution import STRATEGIES, Execution
from vla_core.runtime.execution_metrics import KEPT, ExecutionMetrics
from vla_core.runtime.policy import CheckpointPolicy

from .helpers import START, STEP, arm, camera, checkpoint, task

STEP_NS = 10
SEED_SAMPLER = DiffusionHeadConfig(
    schedule="mini_vla_seed", sampler="mini_vla_seed", train_steps=4, inference_steps=4, clip_sample=None
)


def chunk(stamp: int, rows: int = 6, name: float = 0.0) -> ActionChunk:
    """Row k of chunk ``name`` is [name, k]."""
    return ActionChunk(stamp, STEP_NS, np.array([[name, k] for k in range(rows)], dtype=float))


def executor(strategy: str, metrics: ExecutionMetrics | None = None, **changes: Any) -> ChunkExecutor:
    return ChunkExecutor(Execution().changed({"strategy": strategy, **changes}), metrics)


def figures(width: int = 2, limit: float = 1000.0) -> ExecutionMetrics:
    return ExecutionMetrics(np.full(width, -limit), np.full(width, limit))


# --- the configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"strategy": "guess"}, "strategy: expected one of blend, ensemble, receding, rtc, found 'guess'"),
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"blend_steps": 0}, "blend_steps: expected at least 1"),
        ({"delay_window": 0}, "delay_window: expected at least 1"),
        ({"initial_delay_steps": -1}, "initial_delay_steps: expected at least 0"),
        ({"max_guidance": -1.0}, "max_guidance: expected a number from 0 on"),
        ({"spread": 0}, "spread: expected a positive number, found 0"),
        ({"ensemble_decay": math.nan}, "ensemble_decay: expected a number from 0 on"),
        ({"beta": 5.0}, "beta: unknown key"),
        ({"period_s": 0}, "period_s: expected null or a positive time, found 0"),
        ({"period_s": math.inf}, "period_s: expected null or a positive time, found inf"),
    ],
)
def test_impossible_executions(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Execution, data)
    with pytest.raises(ConfigError, match="execution"):
        Execution().changed(data)


def test_plain_data_and_back() -> None:
    assert from_dict(Execution, {"strategy": "receding", "steps": 4}) == Execution()
    changed = Execution(steps=3).changed({"strategy": "rtc", "max_guidance": 2})
    assert changed == Execution(strategy="rtc", steps=3, max_guidance=2.0)
    assert from_dict(Execution, to_dict(changed)) == changed


@given(
    period=st.integers(1, 100), rows=st.integers(1, 6),
    arrivals=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=6), at=st.integers(-20, 120),
)  # fmt: skip
def test_a_period_says_when_the_next_inference_is_due(
    period: int, rows: int, arrivals: list[tuple[int, int]], at: int
) -> None:
    """Whatever the rows' distance: that long after the newest observation, or when its rows end before that."""
    target = ChunkExecutor(Execution(period_s=period / 1e9, steps=3))
    stamp, newest = 0, None
    for gap, delay in arrivals:
        stamp += gap
        target.push(chunk(stamp, rows), stamp + delay)
        newest = stamp, stamp + delay
    if newest is None:
        assert target.due(at)
        return
    taken, from_ns = newest
    on_its_way = taken <= at < from_ns
    runs = taken <= at < taken + min(period, rows * STEP_NS)
    assert target.due(at) == (not on_its_way and not runs)


def test_vehicles_plan_at_every_tick_though_their_rows_are_further_apart() -> None:
    """5 Hz and rows of 0.5 s: with a period every tick infers, without one every second row of steps."""
    row_ns, tick_ns = 500_000_000, 200_000_000
    for execution, expected in ((Execution(period_s=0.2), 10), (Execution(period_s=0.4), 5), (Execution(steps=2), 2)):
        target, inferred = ChunkExecutor(execution), 0
        for tick in range(10):
            if target.due(tick * tick_ns):
                inferred += 1
                target.push(ActionChunk(tick * tick_ns, row_ns, np.zeros((7, 4))))
        assert inferred == expected
        assert execution.interval_ns(row_ns) == (execution.period_ns or 2 * row_ns)


@pytest.mark.parametrize("head", [MLPHeadConfig(), SEED_SAMPLER], ids=lambda head: head.type)
def test_a_head_that_cannot_be_guided_is_refused_at_load(tmp_path: Any, head: Any) -> None:
    made = checkpoint(head=head)
    made.save(tmp_path / "policy")
    assert Execution(strategy="blend", steps=2).check(4, head) is None
    message = "'rtc', which guides .*choices for it: blend, ensemble, receding; .*flow"
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(made.config, execution=Execution(strategy="rtc", steps=2))
    with pytest.raises(ConfigError, match=message):
        PolicyCore(CheckpointPolicy(made), Execution(strategy="rtc", steps=2))
    file = tmp_path / "policy" / "config.json"
    file.write_text(file.read_text().replace('"receding"', '"rtc"'))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.load(tmp_path / "policy")


def test_chunks_that_do_not_overlap_cannot_be_mixed() -> None:
    config = checkpoint(head=FlowHeadConfig(hidden_dim=16)).config
    for strategy in ("ensemble", "blend", "rtc"):
        with pytest.raises(
            ConfigError, match=rf"{strategy} needs chunks that overlap, expected at most .*\(3\), found 4"
        ):
            dataclasses.replace(config, execution=Execution().changed({"strategy": strategy, "steps": 4}))
    assert isinstance(dataclasses.replace(config, execution=Execution(steps=4)), PolicyConfig)


# --- the strategies -------------------------------------------------------------------------------------------------

arrivals = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 12), st.integers(1, 8)), min_size=1, max_size=8
)  # observation stamp and delay in ticks, rows


@given(arrivals, st.sampled_from(STRATEGIES), st.integers(1, 5), st.floats(0, 2))
def test_every_tick_against_brute_force(
    arrived: list[tuple[int, int, int]], strategy: str, blend_steps: int, decay: float
) -> None:
    """What covers a tick, and came of a newer observation than what was there, mixed as the strategy's formula says."""
    target = executor(strategy, blend_steps=blend_steps, ensemble_decay=decay)
    order = sorted(range(len(arrived)), key=lambda i: (arrived[i][0] + arrived[i][1], i))
    accepted: list[tuple[int, int, int, int]] = []  # stamp, from, rows, name
    taken: dict[int, int] = {}
    for tick in range(45):
        for name in order:
            stamp, delay, rows = arrived[name]
            if stamp + delay == tick:
                target.push(chunk(stamp * STEP_NS, rows, name), tick * STEP_NS)
                if not accepted or stamp >= accepted[-1][0]:
                    accepted = [a for a in accepted if a[0] != stamp] + [(stamp, tick, rows, name)]
        found = target.action(tick * STEP_NS)
        if not accepted or not accepted[-1][0] <= tick < accepted[-1][0] + accepted[-1][2]:
            assert found is None
            continue
        newest = accepted[-1]
        taken.setdefault(newest[3], tick)
        covering = [a for a in accepted if a[0] <= tick < a[0] + a[2]]
        rows_there = [np.array([a[3], tick - a[0]], dtype=float) for a in covering]
        if strategy == "ensemble":
            weights = [math.exp(-decay * i) for i in range(len(covering))]
            expected = sum(w * r for w, r in zip(weights, rows_there, strict=True)) / sum(weights)
        elif strategy == "blend":
            shown = [(a, r) for a, r in zip(covering, rows_there, strict=True) if a[3] in taken]
            expected = shown[0][1]
            for a, row in shown[1:]:
                share = min(1.0, (tick - taken[a[3]] + 1) / (blend_steps + 1))
                expected = (1 - share) * expected + share * row
        else:
            expected = rows_there[-1]
        assert found is not None and found[1].actions[0, 0] == newest[3]
        np.testing.assert_allclose(found[0], expected, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_blend_ends_as_the_new_chunk(steps: int) -> None:
    target = executor("blend", blend_steps=steps)
    target.push(ActionChunk(0, STEP_NS, np.zeros((20, 1))))
    assert target.action(0)[0] == 0  # type: ignore[index]
    target.push(ActionChunk(20, STEP_NS, np.ones((20, 1))), 40)
    shares = [float(target.action(at)[0][0]) for at in range(40, 120, STEP_NS)]  # type: ignore[index]
    expected = [min(1.0, (k + 1) / (steps + 1)) for k in range(8)]
    assert shares == pytest.approx(expected) and shares[steps:] == [1.0] * (8 - steps)


@given(st.sampled_from(STRATEGIES), st.lists(st.integers(0, 20), max_size=6), st.integers(0, 20), st.integers(0, 6))
def test_nothing_of_another_episode_is_executed(strategy: str, stamps: list[int], start: int, late: int) -> None:
    """Chunks of the past are named -100, which no mixture with the others hides."""
    target = executor(strategy)
    for stamp in sorted(stamps):
        target.push(chunk(stamp * STEP_NS, 30, -100.0), stamp * STEP_NS)
        target.action(stamp * STEP_NS)
    episode_ns = (max(stamps, default=0) + 1 + start) * STEP_NS
    target.start_episode(episode_ns)
    for k in range(3):
        target.push(chunk(episode_ns - (k + 1) * STEP_NS, 30, -100.0), episode_ns + late * STEP_NS)
        assert target.action(episode_ns + (late + k) * STEP_NS) is None
    assert target.continuation(episode_ns + 7 * STEP_NS) is None
    target.push(chunk(episode_ns, 30, 1.0), episode_ns + 8 * STEP_NS)
    assert target.action(episode_ns + 8 * STEP_NS)[0][0] == pytest.approx(1.0)  # type: ignore[index]


def test_a_chunk_on_its_way_is_not_executed_and_not_asked_for_again() -> None:
    target = executor("receding", steps=2)
    target.push(chunk(0, name=1), 0)
    assert target.due(20)
    target.push(chunk(20, name=2), 50)
    assert [target.due(at) for at in (20, 30, 40)] == [False, False, False]
    assert [target.action(at)[0].tolist() for at in (20, 40, 50)] == [[1, 2], [1, 4], [2, 3]]  # type: ignore[index]
    assert target.due(50), "row 3 of the new chunk is beyond its 2 steps"


def test_what_is_kept_is_bounded() -> None:
    target = executor("ensemble", steps=1)
    for k in range(3 * MAX_CHUNKS):
        target.push(ActionChunk(k, 10**6, np.full((5, 1), float(k))), k)
    assert len(target._held) == MAX_CHUNKS
    mean = target.action(3 * MAX_CHUNKS)[0][0]  # type: ignore[index]
    weights = np.exp(-0.01 * np.arange(MAX_CHUNKS))
    assert mean == pytest.approx(weights @ np.arange(2 * MAX_CHUNKS, 3 * MAX_CHUNKS) / weights.sum())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pushes_of_one_thread_and_reads_of_another(strategy: str) -> None:
    """All entries of a row are equal, so that a torn or foreign row would show."""
    target, failures = executor(strategy, figures(3)), []
    done = threading.Event()

    def read() -> None:
        tick = 0
        while not done.is_set():
            found = target.action(tick % 4000)
            if found is not None and np.ptp(found[0]) > 1e-9:
                failures.append(found)
            tick += STEP_NS

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for k in range(400):
            target.push(ActionChunk(k * STEP_NS, STEP_NS, np.full((12, 3), float(k))), k * STEP_NS)
            target.continuation((k + 1) * STEP_NS)
            if k % 100 == 99:
                target.start_episode(k * STEP_NS)
    finally:
        done.set()
        reader.join()
    assert not failures


# --- delay and figures ----------------------------------------------------------------------------------------------


def test_the_expected_delay_is_the_longest_of_the_last_ones() -> None:
    target = executor("rtc", steps=1, delay_window=3, initial_delay_steps=2)
    expected = []
    for k, delay in enumerate([9, 4, 3, 1, 2, 0]):  # the first chunk's is start-up
        stamp = 100 * k
        target.push(chunk(stamp, 20), stamp + delay * STEP_NS)
        assert target.action(stamp + delay * STEP_NS) is not None
        expected.append(target.expected_delay_steps)
    assert expected == [2, 4, 4, 4, 3, 2]
    target.start_episode(1000)
    assert target.expected_delay_steps == 2, "a machine is as fast as before"
    target.push(chunk(1000, 20), 1150)
    target.action(1150)
    assert target.expected_delay_steps == 2


def test_lockstep_has_no_delay() -> None:
    target = executor("rtc", figures(), steps=2)
    for at in range(0, 200, STEP_NS):
        if target.due(at):
            target.push(chunk(at))
        target.action(at)
    assert target.expected_delay_steps == 0 and target.metrics is not None
    assert target.metrics.values("delay_steps") == [0.0] * 10


def test_a_delay_is_counted_where_the_chunk_is_consumed() -> None:
    """It arrives between two ticks, and the control loop misses one."""
    target = executor("rtc")
    target.push(chunk(0), 0)
    target.action(0)
    target.push(chunk(20), 33)
    target.action(30)
    target.action(50)
    assert target.expected_delay_steps == 3


def test_figures_by_hand() -> None:
    metrics = ExecutionMetrics(np.array([-2.0, 0.0]), np.array([2.0, 10.0]))
    target = executor("receding", metrics, steps=2)
    target.push(ActionChunk(0, 1_000_000, np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [9.0, 1.0]])), 0)
    for at in (0, 1_000_000, 2_000_000):
        target.action(at)
    target.push(ActionChunk(1_000_000, 1_000_000, np.array([[0.0, 0.0], [0.0, 0.0], [-2.0, 4.0]])), 2_500_000)
    target.action(3_000_000)
    assert metrics.values("delay_ms") == [0.0, 2.0] and metrics.values("delay_steps") == [0.0, 2.0]
    # The old plan said 9, which the robot would have got as 2: (-4 / 4, 3 / 10). Before, it was sent 2 as well.
    assert metrics.values("boundary_jump") == pytest.approx([math.hypot(1.0, 0.3)])
    assert metrics.values("command_jump") == pytest.approx([math.hypot(1.0, 0.3)])
    assert metrics.values("observation_age_ms") == [0.0, 1.0, 2.0, 2.0]
    summary = metrics.summary()
    assert summary["observation_age_ms_p50"] == 1.5 and summary["delay_steps_p99"] == pytest.approx(1.98)
    target.start_episode(10_000_000)
    target.push(ActionChunk(10_000_000, 1_000_000, np.ones((2, 2))))
    target.action(10_000_000)
    assert len(metrics.values("command_jump")) == 1 and len(metrics.values("boundary_jump")) == 1
    metrics.clear()
    assert set(metrics.summary().values()) == {None}


def test_figures_are_bounded() -> None:
    metrics = figures()
    for k in range(KEPT + 5):
        metrics.command(np.zeros(2), k * 1_000_000)
    assert metrics.values("observation_age_ms")[0] == 5.0 and len(metrics.values("observation_age_ms")) == KEPT


def test_a_blend_jumps_less_than_receding_by_its_first_share() -> None:
    jumps = {}
    for strategy in ("receding", "blend"):
        metrics = figures(1, 0.5)
        target = executor(strategy, metrics, blend_steps=4)
        target.push(ActionChunk(0, STEP_NS, np.zeros((9, 1))))
        target.action(0)
        target.push(ActionChunk(20, STEP_NS, np.full((9, 1), 0.5)))
        target.action(20)
        (jumps[strategy],) = metrics.values("boundary_jump")
    assert jumps["receding"] == pytest.approx(0.5) and jumps["blend"] == pytest.approx(0.1)


# --- real-time chunking ---------------------------------------------------------------------------------------------


@given(st.integers(1, 40).flatmap(lambda h: st.tuples(st.just(h), st.integers(0, h))), st.data())
def test_soft_mask_against_the_formula(case: tuple[int, int], data: Any) -> None:
    rows, overlap = case
    frozen = data.draw(st.integers(0, overlap))
    mask = soft_mask(rows, overlap, frozen)
    for i in range(rows):
        c = (overlap - i) / (overlap - frozen + 1)
        expected = 1.0 if i < frozen else 0.0 if i >= overlap else c * (math.exp(c) - 1) / (math.e - 1)
        assert mask[i] == pytest.approx(expected)
        straight = 1.0 if i < frozen else 0.0 if i >= overlap else c
        assert soft_mask(rows, overlap, frozen, "linear")[i] == pytest.approx(straight)
        assert soft_mask(rows, overlap, frozen, "ones")[i] == (i < max(overlap, frozen))
    assert (np.diff(mask) <= 0).all() and mask.min() >= 0 and mask.max() <= 1


@given(st.integers(1, 12), st.integers(1, 200), st.integers(0, 15))
def test_a_plan_is_continued_by_time(rows: int, later: int, frozen: int) -> None:
    """Row i of the new chunk meets the row that the old one would command at that instant, wherever stamps lie."""
    old = chunk(1000, rows)
    found = continuation(old, 1000 + later, frozen, 5.0)
    covered = [1000 + later + i * STEP_NS < old.valid_until_ns for i in range(rows)]
    if not any(covered):
        assert found is None
        return
    assert found is not None and found.frozen == min(frozen, sum(covered)) and found.actions.shape == (rows, 2)
    for i in range(rows):
        assert (found.weights[i] > 0) == covered[i]
        if covered[i]:
            assert found.actions[i, 1] == old.row(1000 + later + i * STEP_NS)


@given(st.integers(2, 12), st.integers(1, 100), st.integers(0, 15), st.integers(1, 15))
def test_a_short_soft_mask_leaves_the_later_rows_free(rows: int, later: int, frozen: int, guided: int) -> None:
    old = chunk(1000, rows)
    whole, short = (continuation(old, 1000 + later, frozen, 5.0, 1.0, steps) for steps in (None, guided))
    if whole is None:
        assert short is None
        return
    assert short is not None and short.frozen == whole.frozen
    reach = min(int((whole.weights > 0).sum()), whole.frozen + guided)
    assert ((short.weights > 0) == (np.arange(rows) < reach)).all()
    assert (short.weights <= whole.weights + 1e-12).all()
    np.testing.assert_array_equal(short.actions, whole.actions)


def test_an_observation_that_is_not_newer_continues_nothing() -> None:
    assert continuation(chunk(100), 100, 0, 5.0) is None and continuation(chunk(100), 90, 0, 5.0) is None


GUIDED = [
    FlowHeadConfig(hidden_dim=32, inference_steps=4),
    DiffusionHeadConfig(hidden_dim=32, train_steps=10, inference_steps=5),
]


def fed(head: Any, execution: Execution) -> PolicyCore:
    target = PolicyCore(CheckpointPolicy(checkpoint(head=head)), execution)
    target.add("task", task(0, "lift it").data, START)
    return target


def observe(target: PolicyCore, k: int) -> int:
    stamp = START + k * STEP
    target.add("camera", camera(stamp, k).data, stamp)
    target.add("arm", arm(stamp, k / 10).data, stamp)
    return stamp


@pytest.mark.parametrize("head", GUIDED, ids=lambda head: head.type)
def test_a_delayed_chunk_starts_with_what_was_executed_meanwhile(head: Any) -> None:
    """Chunks of 4 rows that come 1 step late: their row 0 is the old row that ran, to 1e-6 of the action's range."""
    target = fed(head, Execution(strategy="rtc", steps=2, initial_delay_steps=1))
    target.warm_up()
    commanded: dict[int, np.ndarray] = {}
    chunks = []
    for k in range(12):
        stamp = observe(target, k)
        if target.executor.due(stamp):
            chunks.append(target.infer(stamp, lambda stamp=stamp: stamp + STEP))  # type: ignore[misc]
        found = target.executor.action(stamp)
        if found is not None:
            commanded[stamp] = found[0]
    assert len(chunks) >= 5 and chunks[0].continues is None
    for one in chunks[1:-1]:
        assert one.continues is not None and one.continues.frozen == 1
        np.testing.assert_allclose(one.actions[0], commanded[one.observation_stamp_ns], atol=4e-6)
    assert target.executor.expected_delay_steps == 1


@pytest.mark.parametrize("head", GUIDED, ids=lambda head: head.type)
def test_a_guided_chunk_can_be_replayed_from_what_it_carries(head: Any) -> None:
    target = fed(head, Execution(strategy="rtc", steps=1))
    target.infer(observe(target, 0))
    guided = target.infer(observe(target, 1))
    assert guided.continues is not None and target.last_observation is not None
    again = target.policy.predict(target.last_observation, guided.continues)
    assert again.actions.tobytes() == guided.actions.tobytes()
    free = target.policy.predict(target.last_observation)
    assert free.actions.tobytes() != guided.actions.tobytes()
    weightless = dataclasses.replace(guided.continues, weights=np.zeros(4), frozen=0)
    assert target.policy.predict(target.last_observation, weightless).actions.tobytes() == free.actions.tobytes()


def test_other_strategies_sample_freely() -> None:
    for strategy in ("receding", "ensemble", "blend"):
        target = fed(GUIDED[0], Execution().changed({"strategy": strategy, "steps": 1}))
        assert all(target.infer(observe(target, k)).continues is None for k in range(3))


@pytest.mark.parametrize("commanded", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_chunk_that_is_replaced_before_its_first_command_breaks_nothing(strategy: str, commanded: bool) -> None:
    """Two chunks between two control ticks: the first of them was never commanded."""
    metrics = figures(1, 0.5)
    target = executor(strategy, metrics)
    for stamp, value in ((0, 0.0), (10, 0.25), (20, 0.5)):
        target.push(ActionChunk(stamp, STEP_NS, np.full((9, 1), value)))
        if stamp == 0 and commanded:
            assert target.action(0) is not None
    found = target.action(20)
    assert found is not None and 0.0 <= float(found[0][0]) <= 0.5 and found[1].observation_stamp_ns == 20
    assert len(metrics.values("boundary_jump")) == 1
