"""Figures against hand-made truths: intervals from the textbook, a policy whose errors are known, parity."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from vla_core.data.bag import BagError
from vla_core.evaluation.metrics import percentile, student_interval, wilson_interval
from vla_core.evaluation.open_loop import Replay, replay
from vla_core.evaluation.parity import InputLog, ParityError, compare
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.observation.builder import Observation
from vla_core.runtime.chunk_executor import ActionChunk
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.execution import Execution
from vla_core.runtime.policy import CheckpointPolicy, Policy

from .helpers import MS, START, STEP, checkpoint, command, stream_messages, write_bag


@pytest.mark.parametrize(
    ("successes", "trials", "interval"),
    [
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (50, 50, (0.9287, 1.0)),
        (5, 10, (0.2366, 0.7634)),
        (1, 1, (0.2065, 1.0)),
        (15, 148, (0.0624, 0.1605)),  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, (0.2553, 0.3662)),  # the same
        (0, 0, (0.0, 1.0)),
    ],
)
def test_wilson_against_published_values(successes: int, trials: int, interval: tuple[float, float]) -> None:
    assert wilson_interval(successes, trials) == pytest.approx(interval, abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_symmetric_holds_the_rate_and_solves_its_equation(case: tuple[int, int]) -> None:
    successes, trials = case
    low, high = wilson_interval(successes, trials)
    mirrored = wilson_interval(trials - successes, trials)
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-12)
    rate = successes / trials
    assert 0 <= low <= rate <= high <= 1
    for end in (low, high):  # the score test's boundary: |rate - p| = z sqrt(p (1 - p) / n)
        if 0 < end < 1:
            assert abs(rate - end) == pytest.approx(1.959964 * (end * (1 - end) / trials) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 5), (6, 5), (1, 0)])
def test_impossible_counts_are_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes in {trials} trials"):
        wilson_interval(successes, trials)


@pytest.mark.parametrize("count", [2, 3, 4, 11, 31, 40])
def test_the_interval_over_a_few_trainings_is_students(count: int) -> None:
    from scipy import stats

    rates = np.random.default_rng(count).uniform(0.4, 0.6, count)
    expected = stats.t.interval(0.95, count - 1, rates.mean(), stats.sem(rates))
    found = student_interval(rates.tolist())
    assert found == pytest.approx(np.clip(expected, 0, 1), abs=1e-4)
    assert student_interval(rates[:1].tolist()) is None


def test_percentile() -> None:
    assert percentile([3, 1, 2], 50) == 2 and percentile(list(range(101)), 99) == 99 and percentile([], 50) is None


# --- open loop ------------------------------------------------------------------------------------------------------


class Knowing(CheckpointPolicy):
    """Knows the commands of ``stream_messages`` (k/200, -k/100 at tick k) and adds offsets (H, A) to them."""

    def __init__(self, offsets: np.ndarray) -> None:
        super().__init__(checkpoint())
        self.offsets = offsets

    def predict(self, observation: Observation) -> ActionChunk:
        ticks = (observation.stamp_ns - START) // STEP + np.arange(4)
        actions = np.stack([ticks / 200, -ticks / 100], -1) + self.offsets
        return ActionChunk(observation.stamp_ns, STEP, actions)


@pytest.fixture
def bag(tmp_path: Path) -> Path:
    return write_bag(tmp_path / "bag", stream_messages(20))


def test_a_policy_that_knows_the_recording_has_no_error(bag: Path) -> None:
    result = replay(bag, PolicyCore(Knowing(np.zeros((4, 2)))))
    figures = result.figures()
    assert figures["ticks"] == 20 and figures["mae"] == pytest.approx(0, abs=1e-12)
    assert result.known.tolist() == [[k + h < 20 for h in range(4)] for k in range(20)]
    np.testing.assert_array_equal(result.stamps_ns, START + STEP * np.arange(20))


def test_known_offsets_give_exact_figures(bag: Path) -> None:
    offsets = np.array([[0.1, 0.0], [-0.2, 0.0], [0.3, 0.4], [0.0, -0.8]])
    figures = replay(bag, PolicyCore(Knowing(offsets))).figures()
    # Rows known over 20 ticks: 20, 19, 18, 17 of them at horizon step 0 to 3. Half ranges are 1 and 2.
    known = np.array([20, 19, 18, 17])
    error = np.abs(offsets)
    share = error / np.array([1.0, 2.0])
    assert figures["mae"] == pytest.approx((share * known[:, None]).sum() / (2 * known.sum()))
    per_action = (error * known[:, None]).sum(0) / known.sum()
    assert figures["mae_per_action"] == {
        "shoulder": {"mae": pytest.approx(per_action[0]), "unit": "rad/s"},
        "elbow": {"mae": pytest.approx(per_action[1]), "unit": "rad/s"},
    }
    assert figures["mae_per_step"] == pytest.approx(share.mean(1).tolist())


def test_a_recording_shorter_than_the_horizon_still_gives_valid_json(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", stream_messages(2))
    figures = replay(path, PolicyCore(Knowing(np.zeros((4, 2))))).figures()
    text = json.dumps(figures)

    def no_constant(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(text, parse_constant=no_constant)["mae_per_step"][:2] == pytest.approx([0, 0])


def test_unknown_commands_do_not_count(tmp_path: Path) -> None:
    recorded = [m for m in stream_messages(20) if not (m.topic == "arm/command" and m.stamp_ns >= START + 10 * STEP)]
    result: Replay = replay(write_bag(tmp_path / "bag", recorded), PolicyCore(Knowing(np.full((4, 2), 0.5))))
    assert result.known.sum() == 10 + 9 + 8 + 7
    assert np.isnan(result.error()[~result.known]).all()
    assert result.figures()["mae"] == pytest.approx((0.5 + 0.25) / 2)


def test_two_bags_through_one_core_are_as_good_as_through_two(tmp_path: Path) -> None:
    """What an earlier bag left in the buffer must not be what a later one starts from."""
    first = write_bag(tmp_path / "first", stream_messages(20))
    # The second bag starts 60 ms after the first's last tick and its camera 30 ms after its arm: it has no right to
    # the first one's image.
    second = [m for m in stream_messages(20, start_ns=START + 25 * STEP)
              if not (m.topic == "cam/raw" and m.stamp_ns < START + 28 * STEP)]  # fmt: skip
    path = write_bag(tmp_path / "second", second)
    shared = PolicyCore(Knowing(np.zeros((4, 2))))
    replay(first, shared)
    alone = replay(path, PolicyCore(Knowing(np.zeros((4, 2)))))
    np.testing.assert_array_equal(replay(path, shared).stamps_ns, alone.stamps_ns)


def test_a_bag_that_cannot_be_compared_is_named(tmp_path: Path) -> None:
    core = PolicyCore(Knowing(np.zeros((4, 2))))
    silent = [m for m in stream_messages(9) if m.topic != "arm/command"]
    with pytest.raises(BagError, match="'arm/command'"):
        replay(write_bag(tmp_path / "silent", silent), core)
    early = [*silent, command(START - 100 * MS, 1.0)]
    with pytest.raises(BagError, match="no tick"):
        replay(write_bag(tmp_path / "early", early), core)


# --- parity ---------------------------------------------------------------------------------------------------------


def live_run(policy: Policy, log: Path, messages: list[Any]) -> None:
    """Feed a core message by message as a node would, inferring at every arm message once all is there."""
    core = PolicyCore(policy)
    names = {stream.topic: name for name, stream in core.builder.streams.items()}
    inputs = InputLog()
    for message in messages:
        if message.topic in names:
            core.add(names[message.topic], message.data, message.stamp_ns)
        if message.topic == "arm/state" and not core.builder.due(core.buffer, message.stamp_ns):
            chunk = core.infer(message.stamp_ns)
            assert core.last_observation is not None
            inputs.add(core.last_observation, chunk)
    inputs.save(log, policy)


@pytest.fixture
def policy() -> Policy:
    return CheckpointPolicy(checkpoint(head=DiffusionHeadConfig(hidden_dim=32, train_steps=10, inference_steps=5)))


def test_a_recorded_run_gives_bit_equal_inputs_and_chunks(tmp_path: Path, policy: Policy) -> None:
    recorded = stream_messages(30)
    live_run(policy, tmp_path / "log", recorded)
    found = compare(tmp_path / "log", write_bag(tmp_path / "bag", recorded), policy)
    assert (found.compared, found.inputs_max_abs_diff, found.chunks_max_abs_diff) == (30, 0, 0)


def test_guided_chunks_are_replayed_from_what_they_continued(tmp_path: Path) -> None:
    """Real-time chunking makes a chunk depend on the one before: the log holds what is needed to get it again."""
    head = DiffusionHeadConfig(hidden_dim=32, train_steps=10, inference_steps=5)
    guided = checkpoint(head=head)
    config = dataclasses.replace(guided.config, execution=Execution(strategy="rtc", steps=1, initial_delay_steps=1))
    policy = CheckpointPolicy(dataclasses.replace(guided, config=config))
    recorded = stream_messages(30)
    live_run(policy, tmp_path / "log", recorded)
    frozen = load_file(tmp_path / "log")["continues.frozen"]
    assert frozen[0] == -1 and set(frozen[1:].tolist()) == {1}
    found = compare(tmp_path / "log", write_bag(tmp_path / "bag", recorded), policy)
    assert (found.compared, found.inputs_max_abs_diff, found.chunks_max_abs_diff) == (30, 0, 0)


def test_a_difference_is_found(tmp_path: Path, policy: Policy) -> None:
    """Parity of zero means something only if one changed pixel in one message shows."""
    recorded = stream_messages(30)
    live_run(policy, tmp_path / "log", recorded)
    place = next(i for i, m in enumerate(recorded) if m.topic == "cam/raw" and m.stamp_ns == START + 8 * STEP)
    data = bytearray(recorded[place].data)
    data[-1] ^= 1
    changed = list(recorded)
    changed[place] = dataclasses.replace(recorded[place], data=bytes(data))
    found = compare(tmp_path / "log", write_bag(tmp_path / "bag", changed), policy)
    assert found.inputs_max_abs_diff == pytest.approx(1 / 255, rel=1e-3)


def test_messages_that_the_recorder_missed_are_found(tmp_path: Path, policy: Policy) -> None:
    recorded = stream_messages(30)
    live_run(policy, tmp_path / "log", recorded)
    holed = [m for m in recorded
             if not (m.topic == "arm/state" and START + 10 * STEP <= m.stamp_ns < START + 20 * STEP)]  # fmt: skip
    found = compare(tmp_path / "log", write_bag(tmp_path / "bag", holed), policy)
    assert found.inputs_max_abs_diff > 0


def test_parity_of_nothing_is_refused(tmp_path: Path, policy: Policy) -> None:
    bag = write_bag(tmp_path / "bag", stream_messages(10))
    with pytest.raises(ParityError, match="wrote no model inputs"):
        compare(tmp_path / "log", bag, policy)
    live_run(policy, tmp_path / "log", stream_messages(10, start_ns=START + 1000 * STEP))
    with pytest.raises(ParityError, match="none of the 10 logged stamps"):
        compare(tmp_path / "log", bag, policy)
