"""A vehicle's loop in one process: trajectories through the follower, lost sensors, words on the way, bags of it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vla_core.checkpoint import Checkpoint, PolicyConfig
from vla_core.cli import main
from vla_core.commands import decode
from vla_core.config import ConfigError
from vla_core.contract import RobotContract
from vla_core.data import bag as bags
from vla_core.data.convert import convert
from vla_core.data.episodes import EpisodeReader
from vla_core.data.folder import load
from vla_core.evaluation.closed_loop import EpisodeResult, closed_loop_success, run_episode, seen_by, start_of
from vla_core.evaluation.metrics import bootstrap_interval
from vla_core.evaluation.parity import InputLog, compare
from vla_core.evaluation.plan import Wanted, make_plan
from vla_core.evaluation.suites import Assignment, assignments
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig
from vla_core.model.vla.mini_vla import MiniVLA, MiniVLAConfig
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.model.vlm.vision_encoder import TinyCNNConfig
from vla_core.observation.builder import ImageSize, Observation, ObservationSpec, Unobserved
from vla_core.observation.messages import deserialize, header_stamp_ns
from vla_core.observation.normalizer import Normalization, Normalizer
from vla_core.runtime.chunk import ActionChunk
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.execution import Execution
from vla_core.runtime.policy import CheckpointPolicy
from vla_core.sim.base import View
from vla_core.sim.collect import EXECUTED, START_NS, Collected, Collection, Driver, collect
from vla_core.sim.faults import Faults
from vla_core.sim.noise import Noise
from vla_core.sim.worlds import SIM_REGISTRY, make_world

from ..ros import toy_vehicle
from ..ros.toy_vehicle import CONTRACT, DRIVE, ODOMETRY, PLAN, WORDS

SPEC = ObservationSpec(images={"camera": ImageSize(height=4, width=6)}, state=("odom",), instruction="instruction")
STEPS = 40


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    before = dict(SIM_REGISTRY)
    toy_vehicle.register()
    SIM_REGISTRY["toy_vehicle"] = dataclasses.replace(SIM_REGISTRY["toy_vehicle"], journey=True)
    yield
    SIM_REGISTRY.clear()
    SIM_REGISTRY.update(before)


def untrained(spec: ObservationSpec = SPEC, contract: RobotContract = CONTRACT, **execution: Any) -> Checkpoint:
    config = MiniVLAConfig(
        cameras=tuple(spec.images), state_dim=len(spec.state), action_dim=4, horizon=7, vocab_size=8, d_model=32,
        vision=TinyCNNConfig(d_model=32, channels=(8,)), head=MLPHeadConfig(hidden_dim=16),
    )  # fmt: skip
    tokenizer = WordTokenizer()
    tokenizer.fit(list(WORDS))
    execution = {"period_s": 0.2, "steps": 1, **execution}
    return Checkpoint(
        config=PolicyConfig(
            model=dataclasses.replace(config, vocab_size=tokenizer.vocab_size), observation=spec,
            execution=Execution(**execution), normalization=Normalization(state="none", action="none"),
        ),
        model=MiniVLA(dataclasses.replace(config, vocab_size=tokenizer.vocab_size)).eval(),
        normalizer=Normalizer(Normalization(state="none", action="none"), {}), tokenizer=tokenizer, contract=contract,
    )  # fmt: skip


class Arc(CheckpointPolicy):
    """Drives along the arc of the toy's ``seed``, which it was told, and notes what it sees."""

    def __init__(self, seed: int = 3, checkpoint: Checkpoint | None = None) -> None:
        super().__init__(checkpoint or untrained())
        world = toy_vehicle.ToyVehicle("", CONTRACT, View())
        world.reset(seed)
        self.rows = world.expert_rows()
        self.seen: list[Observation] = []

    def predict(self, observation: Observation, continues: Any = None) -> ActionChunk:
        self.seen.append(observation)
        return ActionChunk(observation.stamp_ns, self.contract.chunk_step_ns, self.rows)


def drive(
    policy: CheckpointPolicy, seed: int = 3, view: View | None = None, **options: Any
) -> tuple[EpisodeResult, Any]:
    world = make_world("toy_vehicle", seen_by(policy), view)
    return run_episode(world, PolicyCore(policy), None, seed, STEPS, **options), world


def test_trajectories_reach_the_goal_through_the_follower() -> None:
    policy = Arc()
    result, world = drive(policy)
    assert result.success and result.steps < STEPS and result.refused == 0
    assert result.details == {"driven_m": pytest.approx(12, abs=1)} and result.said == WORDS
    assert len(policy.seen) == len(result.inference_ms) == result.steps, "a new trajectory at every tick"
    assert result.boundary_jumps == () and result.roughness > 0
    # It steers as the arc is bent (tan(steering) = wheelbase * curvature), and stays on it.
    steering = np.arctan(toy_vehicle.WHEELBASE_M * world.curvature)
    np.testing.assert_allclose(np.array(world.obeyed)[10:, 0], steering, atol=0.02)
    x, y, yaw = world.pose
    assert np.hypot(x, y - 1 / world.curvature) == pytest.approx(abs(1 / world.curvature), abs=0.1)
    assert yaw == pytest.approx(world.driven * world.curvature, abs=0.05)


def test_what_is_said_on_the_way_is_what_the_policy_hears() -> None:
    policy = Arc()
    result, _ = drive(policy)
    heard = [observation.instruction for observation in policy.seen]
    turn = heard.index(WORDS[1])
    assert heard == [WORDS[0]] * turn + [WORDS[1]] * (result.steps - turn) and 5 < turn < result.steps
    swapped, _ = drive(Arc(), view=View(swapped=True))
    assert swapped.said == WORDS[::-1]
    # Words that were asked for are not the world's.
    world, other = make_world("toy_vehicle", CONTRACT), Arc()
    assert run_episode(world, PolicyCore(other), "fly", 3, 10).said == ()
    assert {observation.instruction for observation in other.seen} == {"fly"}


def test_between_two_trajectories_the_last_one_is_followed() -> None:
    policy = Arc(checkpoint=untrained(period_s=0.4))
    result, _ = drive(policy)
    turn = next(i for i, seen in enumerate(policy.seen) if seen.instruction == WORDS[1])
    gaps = np.diff([seen.stamp_ns for seen in policy.seen]) // CONTRACT.step_ns
    assert result.success and set(np.delete(gaps, turn - 1).tolist()) == {2}, "but new words want a new trajectory"


@pytest.mark.parametrize("delay", [1, 2])
def test_trajectories_that_come_late_are_followed_from_where_they_were_made(delay: int) -> None:
    result, world = drive(Arc(), delay_steps=delay)
    assert result.success
    assert not np.any(world.obeyed[:delay]), "nothing to follow yet: it stands"
    x, y, _ = world.pose
    assert np.hypot(x, y - 1 / world.curvature) == pytest.approx(abs(1 / world.curvature), abs=0.2)


def faults(*texts: str, contract: RobotContract = CONTRACT) -> Faults:
    return Faults.parse(texts, contract)


def test_a_lost_sensor_is_masked_or_stops_the_vehicle_and_it_goes_on() -> None:
    masked = Arc()
    result, _ = drive(masked, faults=faults("camera=dropped"))
    assert result.success and result.refused == 0
    assert not any(seen.present["camera"] for seen in masked.seen)
    # Odometry may not be missing: when it is older than 0.2 s the policy refuses, and the vehicle brakes to a stand.
    result, world = drive(Arc(), faults=faults("odom=dropped@1-3"))
    assert result.success and result.refused == 9, "the ticks of 1.2 to 2.8 s"
    speeds = np.array(world.obeyed)[:, 1]
    assert speeds[4] == speeds[-1] == 4 and (np.diff(speeds[5:11]) < 0).all() and not speeds[11:15].any()
    lost, world = drive(Arc(), faults=faults("odom=dropped@1"))
    assert not lost.success and lost.steps == STEPS and world.speed == 0


def test_blind_in_all_eyes_it_stops() -> None:
    """Each of them may be masked, but not all: any_of."""
    blind = dataclasses.replace(CONTRACT, any_of=("camera",))
    result, world = drive(Arc(checkpoint=untrained(contract=blind)), faults=faults("camera=dropped@1"))
    assert not result.success and world.speed == 0 and result.refused > 20


def test_a_world_that_lacks_what_the_policy_needs_is_no_failed_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_vehicle.ToyVehicle, "observe_state", lambda self, stamp_ns: [])
    with pytest.raises(Unobserved, match=r"odom \(odom\): nothing received"):
        drive(Arc())


def test_only_what_is_seen_or_followed_is_asked_of_the_world() -> None:
    whole = dataclasses.replace(CONTRACT, any_of=("camera", "odom"))
    for spec, expected in (
        (ObservationSpec(images=SPEC.images), ("camera", "odom")),
        (ObservationSpec(instruction="instruction"), ("odom",)),
    ):
        policy: Any = SimpleNamespace(contract=whole, spec=spec)
        seen = seen_by(policy)
        assert seen.any_of == expected and set(seen.observations) - {"instruction"} == set(expected)
        assert seen.following == CONTRACT.following


def test_people_see_the_trajectory_that_was_just_made() -> None:
    pictures: list[np.ndarray] = []
    result, world = drive(Arc(), watch=pictures.append)
    assert len(pictures) == result.steps + 1 and len(world.shown) == result.steps
    assert all(rows is not None and rows.shape == (7, 4) for rows in world.shown)


# --- bags -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def driven(tmp_path: Path) -> Collected:
    (episode,) = collect(tmp_path / "bags", Collection(tasks=("toy_vehicle",), episodes=1, seed=5), CONTRACT)
    return episode


def test_a_bag_has_every_message_of_every_tick(driven: Collected) -> None:
    found = bags.info(driven.bag)
    assert driven.success and found.contract == CONTRACT and found.metadata["outcome"] == "succeeded"
    assert found.counts == {
        "camera/image_raw": driven.steps, "odom": 1 + 10 * (driven.steps - 1), "instruction": 2,
        PLAN.topic: driven.steps, "drive": driven.steps, "ground_truth/odom": driven.steps, "/tf_static": 1,
        "episode": 2,
    }  # fmt: skip
    world = make_world("toy_vehicle", CONTRACT)
    world.reset(5)
    words = []
    for plan, command in zip(bags.read(driven.bag, {PLAN.topic}), bags.read(driven.bag, {"drive"}), strict=True):
        assert plan.stamp_ns == command.stamp_ns == START_NS + CONTRACT.step_ns * len(words)
        np.testing.assert_allclose(decode(PLAN, plan.data), world.expert_rows(), atol=1e-6)  # type: ignore[attr-defined]
        words.append(world.instruction)  # type: ignore[attr-defined]
        world.step(decode(DRIVE, command.data)[0])
    assert world.success, "the commands of the bag alone reach the goal"
    said = [(m.stamp_ns, deserialize(m.type, m.data).data) for m in bags.read(driven.bag, {"instruction"})]
    turn = words.index(WORDS[1])
    assert said == [(START_NS, WORDS[0]), (START_NS + turn * CONTRACT.step_ns, WORDS[1])]


def test_a_dataset_has_plan_and_words_of_each_tick(driven: Collected, tmp_path: Path) -> None:
    data = load(convert([driven.bag], tmp_path / "data", SPEC).path)
    assert data.frames == driven.steps and data.plan_rows == 7
    assert data.episodes[0].dropped_ticks == 0 and data.episodes[0].instruction == WORDS[0]
    plans = [decode(PLAN, m.data) for m in bags.read(driven.bag, {PLAN.topic})]
    np.testing.assert_array_equal(data.action, np.array(plans, dtype=np.float32))
    assert Counter(data.instruction(k) for k in range(data.frames)).keys() == set(WORDS)


def test_noise_is_on_the_drive_command_and_the_label_is_the_experts(tmp_path: Path) -> None:
    noise = Noise(scale=0.2, share=0.4, steps=(2, 3), entries=("steering_angle",))
    (episode,) = collect(
        tmp_path / "bags", Collection(tasks=("toy_vehicle",), episodes=1, seed=5, noise=noise), CONTRACT
    )
    made, obeyed = (np.array([decode(DRIVE, m.data)[0] for m in bags.read(episode.bag, {topic})])
                    for topic in ("drive", EXECUTED + "drive"))  # fmt: skip
    changed = made != obeyed
    assert changed[:, 0].any() and not changed[:, 1].any()
    # The label of every tick is what the expert says there, whatever was done.
    world = make_world("toy_vehicle", CONTRACT)
    world.reset(5)
    for plan, command in zip(bags.read(episode.bag, {PLAN.topic}), obeyed, strict=True):
        np.testing.assert_allclose(decode(PLAN, plan.data), world.expert_rows(), atol=1e-6)  # type: ignore[attr-defined]
        world.step(command)
    with pytest.raises(ConfigError, match=r"noise.entries: no brake in drive"):
        collect(tmp_path / "other", Collection(tasks=("toy_vehicle",), noise=Noise(entries=("brake",))), CONTRACT)


def test_a_policy_drives_the_expert_labels_and_the_bag_has_what_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DAgger; and bit for bit the model's inputs, live and from the bag."""
    made = untrained()
    made.save(tmp_path / "policy")
    policies: list[Arc] = []

    def loaded(path: str, *_: Any, **__: Any) -> Arc:
        policies.append(Arc(9, made))  # another arc than the expert's
        return policies[-1]

    monkeypatch.setattr(CheckpointPolicy, "load", loaded)
    options = Collection(tasks=("toy_vehicle",), episodes=1, seed=5,
                         driver=Driver(checkpoint=str(tmp_path / "policy"), beta=0.5, segment_steps=4))  # fmt: skip
    (episode,) = collect(tmp_path / "bags", options, CONTRACT)
    (policy,) = policies
    with bags.opened(episode.bag) as bag:
        ticks = [tick for tick in EpisodeReader(bag, CONTRACT, SPEC) if tick.episode == 1]
    assert len(ticks) == episode.steps > len(policy.seen) > 4
    world = make_world("toy_vehicle", CONTRACT)
    world.reset(5)
    arcs = set()
    for tick, drive in zip(ticks, bags.read(episode.bag, {EXECUTED + "drive"}), strict=True):
        assert tick.action is not None
        np.testing.assert_allclose(tick.action, world.expert_rows(), atol=1e-5)  # type: ignore[attr-defined]
        command = decode(DRIVE, drive.data)[0]
        arcs.add(round(float(command[0]), 2))
        world.step(command)
    assert len(arcs) > 1, "now the one drives, now the other"
    # What the policy was given live is what the bag gives.
    log, core = InputLog(), PolicyCore(policy)
    for seen in policy.seen:
        log.add(seen, ActionChunk(seen.stamp_ns, CONTRACT.chunk_step_ns, policy.rows))
    log.save(tmp_path / "log.safetensors", policy)
    assert core.contract == CONTRACT
    found = compare(tmp_path / "log.safetensors", episode.bag, policy)
    assert found.compared == len(log._entries) and found.inputs_max_abs_diff == found.chunks_max_abs_diff == 0


def test_stamps_run_through_an_episode_of_the_evaluator() -> None:
    """Ten odometry messages a tick, but for those of before the first one, which belong to no episode."""
    policy = Arc()
    result, world = drive(policy)
    first = policy.seen[0].stamp_ns
    assert first == start_of(3) and [s.stamp_ns for s in policy.seen] == [
        first + k * CONTRACT.step_ns for k in range(result.steps)
    ]
    stamps = [header_stamp_ns(ODOMETRY, m.data) for m in world.observe_state(first)]
    assert stamps == [first - CONTRACT.step_ns + (k + 1) * 20_000_000 for k in range(10)]


# --- evaluations ----------------------------------------------------------------------------------------------------


def test_what_a_world_tells_is_in_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = untrained()
    made.save(tmp_path / "policy")
    monkeypatch.setattr(CheckpointPolicy, "load", lambda path, *_, **__: Arc(10_001, made))
    arguments = ["evaluate", "policy", "--task", "toy_vehicle", "--episodes", "3", "--out", "out.json"]
    assert main([*arguments, "--fault", "camera=dropped", "odom=dropped@1-2"]) == 0
    told = capsys.readouterr().out
    assert "with camera=dropped, odom=dropped@1-2" in told and "  driven_m: 12." in told
    record = json.loads(Path("out.json").read_text())
    (run,) = record["runs"]
    assert run["faults"] == ["camera=dropped", "odom=dropped@1-2"] == record["groups"][0]["faults"]
    driven = [episode["details"]["driven_m"] for episode in run["episodes"]]
    assert run["details"]["driven_m"]["mean"] == pytest.approx(np.mean(driven))
    assert tuple(run["details"]["driven_m"]["ci95"]) == pytest.approx(bootstrap_interval(driven))
    assert all(episode["refused"] == 4 for episode in run["episodes"]), "from 1.2 s on, until 2 s"
    assert run["episodes"][0]["instruction"] == " / ".join(WORDS)
    assert main(["evaluate", "--repeat", "out.json"]) == 0
    assert main([*arguments, "--instructions", "swapped"]) == 0
    swapped = json.loads(Path("out.json").read_text())["runs"][0]["episodes"][0]
    assert swapped["instruction"] == " / ".join(WORDS[::-1]) and swapped["refused"] == 0
    capsys.readouterr()
    assert main([*arguments, "--fault", "lidar=dropped"]) == 1
    assert "toy_vehicle' has no sensor 'lidar'; choices: camera, odom" in capsys.readouterr().err
    assert main([*arguments, "--instructions", "train"]) == 1
    assert "toy_vehicle has no paraphrases: expected the instructions canonical or swapped" in capsys.readouterr().err


def test_an_assignment_says_who_speaks() -> None:
    assert assignments(("toy_vehicle",)) == (Assignment(world="toy_vehicle", max_steps=40, said_by="world"),)
    (given,) = assignments(("toy_vehicle",), instruction="go on")
    assert given.said_by == "task" and given.instruction(7) == "go on"
    with pytest.raises(ConfigError, match="instructions: expected none, found 1"):
        Assignment(world="x", instructions=("a",), max_steps=1, said_by="world")
    kinds = [task.world for task in assignments((), "driving")]
    assert {"driving:turn_left", "driving:follow", "driving:red_light"} <= set(kinds)


def test_a_strategy_that_mixes_trajectories_is_left_out(tmp_path: Path) -> None:
    untrained().save(tmp_path / "policy")
    wanted = [Wanted(label="x", trainings=((str(tmp_path / "policy"),),))]
    tasks = assignments(("toy_vehicle",))
    plan, notes = make_plan(wanted, tasks, [0], strategies=("receding", "blend"), leave_out=True)
    assert len(plan.runs) == 1 and "robot's own frame" in notes[0]


def test_success_while_training() -> None:
    found = closed_loop_success(Arc(10_000), "toy_vehicle", range(10_000, 10_002))
    assert found["trials"] == 2 and found["successes"] >= 1


def test_the_simulated_vehicle_is_recorded_in_any_number_of_processes(tmp_path: Path) -> None:
    """The real world, a second of it: all streams of the contract, and the same bytes."""
    contract = RobotContract.load("driving")
    options = Collection(tasks=("driving:straight",), episodes=2, max_steps=5, camera_size=16)
    done = collect(tmp_path / "bags", options, contract, workers=2)
    for episode in done:
        counts = bags.info(episode.bag).counts
        assert {counts[s.topic] for s in contract.observations.values() if s.rate_hz == 5} == {5}
        assert (counts["lidar/points"], counts["imu/data"], counts["odom"]) == (10, 100, 50)
        assert counts[PLAN.topic] == counts["drive"] == counts["ground_truth/odom"] == 5
    alone = collect(tmp_path / "alone", options, contract)
    for a, b in zip(done, alone, strict=True):
        assert list(bags.read(a.bag)) == list(bags.read(b.bag))
