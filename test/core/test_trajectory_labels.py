"""Plans in the robot's own frame as labels: from the messages of a bag to the chunks that a policy predicts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.checkpoint import Checkpoint, CheckpointError
from vla_core.commands import encode
from vla_core.config import ConfigError, to_dict
from vla_core.contract import Action, ContractError, RobotContract, Stream
from vla_core.data.bag import BagError
from vla_core.data.convert import convert
from vla_core.data.dataset import Dataset, DatasetError
from vla_core.data.episodes import Commands
from vla_core.data.folder import load
from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.data.mixture import MixtureError
from vla_core.data.options import Filter, keep
from vla_core.data.reconvert import reconvert
from vla_core.data.windows import ChunkWindows
from vla_core.evaluation.open_loop import replay
from vla_core.evaluation.sensitivity import sensitivity
from vla_core.inspect.checkpoint import inspect_checkpoint
from vla_core.inspect.dataset import inspect_dataset
from vla_core.observation.messages import Message
from vla_core.observation.normalizer import Normalization, Normalizer, StatisticsError, compute_statistics
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.execution import Execution
from vla_core.runtime.policy import CheckpointPolicy
from vla_core.training.trainer import train

from .helpers import CONTRACT, MS, SPEC, START, arm, camera, dataset, mark, recipe, task, write_bag

TICK = 200 * MS
ROWS = 7
TRAJECTORY = Action(
    topic="planning/trajectory", type="vla_ros/msg/Trajectory", names=("x", "y", "yaw", "speed"),
    units=("m", "m", "rad", "m/s"), low=(-5.0, -40.0, -3.2, 0.0), high=(60.0, 40.0, 3.2, 15.0), safe=("zero",) * 4,
    publish="chunk", step_s=0.5, frame_id="base_link",
)  # fmt: skip
CART = dataclasses.replace(
    CONTRACT, name="cart", rate_hz=5.0, actions={"trajectory": TRAJECTORY},
    observations={
        "camera": Stream(topic="cam/raw", type="sensor_msgs/msg/Image", rate_hz=5.0, max_age_s=0.3),
        "arm": dataclasses.replace(CONTRACT.observations["arm"], rate_hz=5.0, max_age_s=0.3),
        "task": CONTRACT.observations["task"],
    },
)  # fmt: skip
RECIPE = dataclasses.replace(
    recipe(), model=dataclasses.replace(recipe().model, horizon=6), execution=Execution(period_s=0.2)
)


def plan(seed: int, rows: int = ROWS) -> np.ndarray:
    """(rows, 4): from standing here to somewhere ahead, faster and faster; another way for every seed."""
    rng = np.random.default_rng(seed)
    t = 0.5 * np.arange(rows)
    speed, bend = rng.uniform(0, 8), rng.uniform(-0.1, 0.1)
    yaw = bend * t * speed
    return np.stack([speed * t * np.cos(yaw / 2), speed * t * np.sin(yaw / 2), yaw, speed + 0 * t], axis=1)


def trajectory(stamp_ns: int, rows: np.ndarray) -> Message:
    return Message(TRAJECTORY.topic, TRAJECTORY.type, stamp_ns, encode(TRAJECTORY, stamp_ns, rows, 500 * MS))


def drive(ticks: int = 12, seed: int = 0, rows: int = ROWS, after_ns: int = 0) -> list[Message]:
    """An episode of plans stamped ``after_ns`` after their ticks."""
    out = [mark(START, 0, seed), task(START, ("left", "right")[seed % 2])]
    for k in range(ticks):
        stamp_ns = START + k * TICK
        out += [camera(stamp_ns, 100 * seed + k), arm(stamp_ns, k / 10, seed)]
        out.append(trajectory(stamp_ns + after_ns, plan(100 * seed + k, rows)))
    return [*out, mark(START + (ticks - 1) * TICK, 1, seed)]


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("drives")
    return [write_bag(folder / f"drive_{seed}", drive(12 + seed, seed), CART) for seed in range(4)]


@pytest.fixture(scope="module")
def converted(bags: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(bags, tmp_path_factory.mktemp("data") / "drives", SPEC, workers=1).path


@pytest.fixture(scope="module")
def trained(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("policy") / "checkpoint"
    train(RECIPE, load(converted)).checkpoint.save(out)
    return out


def test_a_ticks_label_is_its_whole_plan(bags: list[Path], converted: Path) -> None:
    data = load(converted)
    expected = np.stack([plan(100 * seed + k) for seed in range(4) for k in range(12 + seed)])
    assert data.plan_rows == ROWS and data.frames == len(expected)
    np.testing.assert_allclose(data.action, expected, rtol=0, atol=1e-5)
    assert data.action.dtype == np.float32
    # x of half a second and of three seconds are different things, told by their names.
    names = LeRobotFolder(converted).info.features["action"].names
    assert names is not None and len(names) == ROWS * 4
    assert names[:5] == ("x@0s", "y@0s", "yaw@0s", "speed@0s", "x@0.5s") and names[-1] == "speed@3s"
    part = data.select([2, 0])
    np.testing.assert_array_equal(part.action[:14], data.action[25:39])


@pytest.mark.parametrize("options", [{"workers": 2}, {"version": "v2.1"}])
def test_the_same_labels_in_every_form(bags: list[Path], converted: Path, tmp_path: Path, options: dict) -> None:
    other = load(convert(bags, tmp_path / "other", SPEC, **{"workers": 1, **options}).path)
    np.testing.assert_array_equal(other.action, load(converted).action)
    if "version" in options:
        reconvert(tmp_path / "other", tmp_path / "again", version="v3.0")
        np.testing.assert_array_equal(load(tmp_path / "again").action, load(converted).action)
        groups = json.loads((tmp_path / "other/meta/modality.json").read_text())["action"]
        assert groups == {"action": {"start": 0, "end": 4 * ROWS}}


def test_somebody_elses_plans(converted: Path, tmp_path: Path) -> None:
    """Without our description: bound by their names, or by their number where there are none."""
    (converted / "vla_ros").rename(tmp_path / "vla_ros")
    info = converted / "meta/info.json"
    text = info.read_text()
    try:
        ours = load(converted, CART, SPEC)
        assert ours.plan_rows == ROWS
        plain = json.loads(text)
        plain["features"]["action"]["names"] = None
        info.write_text(json.dumps(plain))
        np.testing.assert_array_equal(load(converted, CART, SPEC).action, ours.action)
        plain["features"]["action"]["names"] = [f"joint_{i}" for i in range(4 * ROWS)]
        info.write_text(json.dumps(plain))
        with pytest.raises(DatasetError, match=r"action has entries joint_0.*x@0s, y@0s, yaw@0s, speed@0s, x@0.5s"):
            load(converted, CART, SPEC)
    finally:
        info.write_text(text)
        (tmp_path / "vla_ros").rename(converted / "vla_ros")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8, unique=True), st.integers(0, 30))
def test_the_newest_plan_of_the_period_answers(stamps: list[int], tick: int) -> None:
    """Against every message looked at, with stamps of 50 ms: a plan from longer ago was made elsewhere."""
    recorded = [trajectory(START + 50 * MS * stamp, plan(stamp)) for stamp in stamps]
    at_ns = START + 50 * MS * tick
    due = [stamp for stamp in stamps if 0 <= at_ns - (START + 50 * MS * stamp) < TICK]
    found = Commands(recorded, CART).at(at_ns)
    if due:
        assert found is not None
        np.testing.assert_allclose(found, plan(max(due)), atol=1e-9)
    else:
        assert found is None


def test_ticks_without_a_plan_are_dropped_and_counted(tmp_path: Path) -> None:
    messages = [
        m for m in drive() if m.topic != TRAJECTORY.topic or m.stamp_ns not in (START + 3 * TICK, START + 4 * TICK)
    ]
    made = convert([write_bag(tmp_path / "bag", messages, CART)], tmp_path / "data", SPEC)
    data = load(made.path)
    assert data.frames == 10 and data.episodes[0].dropped_ticks == 2
    np.testing.assert_allclose(data.action[3], plan(5), atol=1e-5)


def test_plans_of_another_length_are_named(tmp_path: Path, bags: list[Path]) -> None:
    odd = write_bag(tmp_path / "odd", [*drive()[:-4], trajectory(START + 10 * TICK, plan(10, 5)), *drive()[-3:]], CART)
    expected = rf"odd: at {START + 10 * TICK} ns: the trajectory has 5 rows, expected 7 .*convert the others"
    with pytest.raises(BagError, match=expected):
        convert([bags[0], odd], tmp_path / "data", SPEC)
    made = convert([bags[0], odd], tmp_path / "data", SPEC, on_bad="skip")
    assert [bad["bag"] for bad in made.report.bad] == ["odd"] and "5 rows" in made.report.bad[0]["error"]
    short = write_bag(tmp_path / "short", drive(rows=1), CART)
    with pytest.raises(BagError, match="has 7 rows, expected 1 "):
        convert([short, bags[0]], tmp_path / "mixed", SPEC)


def test_one_instant_and_a_plan_are_not_one_label() -> None:
    both = dataclasses.replace(CART, actions={
        "trajectory": dataclasses.replace(TRAJECTORY, step_s=None), "arm": CONTRACT.actions["arm"],
    })  # fmt: skip
    with pytest.raises(ContractError, match="trajectory is a trajectory in the robot's own frame"):
        Commands((), both)
    # Joints are where they are: of their trajectories a tick has the row of its instant, as ever.
    joints = dataclasses.replace(CONTRACT.actions["arm"], type="trajectory_msgs/msg/JointTrajectory", publish="chunk")
    contract = dataclasses.replace(CONTRACT, actions={"arm": joints})
    assert not contract.plans and CART.plans
    message = Message(joints.topic, joints.type, START, encode(joints, START, np.arange(8.0).reshape(4, 2), 10 * MS))
    np.testing.assert_array_equal(Commands([message], contract).at(START + 20 * MS), [4.0, 5.0])


@given(st.integers(1, ROWS), st.lists(st.integers(0, 20), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_a_window_is_the_beginning_of_its_plan(horizon: int, rows: list[int]) -> None:
    data = plans_in_memory()
    chunks, mask = ChunkWindows(data, horizon).chunks(np.array(rows))
    np.testing.assert_array_equal(chunks, data.action[rows][:, :horizon])
    assert mask.shape == (len(rows), horizon) and mask.all()


def test_a_longer_horizon_than_the_plans_is_refused(converted: Path) -> None:
    longer = dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, horizon=8))
    with pytest.raises(DatasetError, match="its plans have 7 rows, the model's horizon is 8"):
        train(longer, load(converted))


def test_a_mixture_is_of_one_kind_of_label(converted: Path) -> None:
    ours = load(converted)
    rows = np.concatenate([ours.action[:, 1], ours.action[:, 1]], axis=1)[:, :4]
    single = dataclasses.replace(
        ours, name="single", action=rows,
        contract=dataclasses.replace(CART, actions={"t": dataclasses.replace(TRAJECTORY, publish="step", step_s=None)}),
    )  # fmt: skip
    with pytest.raises(MixtureError, match=r"plan: drives has True, single has False"):
        train(RECIPE, [ours, single])


def plans_in_memory(seed: int = 0) -> Dataset:
    """21 frames of plans."""
    base = dataset((12, 9))
    return dataclasses.replace(
        base, contract=CART, action=np.stack([plan(seed + k) for k in range(21)]).astype(np.float32)
    )


# Normalization: every row by its own range.

MODES = [
    Normalization(action="min_max"), Normalization(action="mean_std"), Normalization(action="quantile"),
    Normalization(action="none"), Normalization(action="quantile", entries={"action.speed": "mean_std"}),
    Normalization(action="min_max", entries={"action.yaw": "none"}, clip={"action": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize("modes", MODES, ids=lambda m: f"{m.action}{m.entries}")
def test_rows_are_normalized_by_their_own_statistics(modes: Normalization) -> None:
    data = plans_in_memory()
    found = data.statistics()
    flat = data.action.reshape(21, -1).astype(np.float64)
    for key, of in (("min", np.min), ("max", np.max), ("mean", np.mean), ("std", np.std)):
        np.testing.assert_allclose(np.array(found["action"][key]).ravel(), of(flat, axis=0), rtol=1e-9, atol=1e-12)
    assert json.loads(json.dumps(found)) == found
    normalizer = Normalizer(modes, found, names={"action": CART.action_names, "state": ("arm.a", "arm.b")})
    assert (normalizer.plan_rows == ROWS) == (modes.action != "none")
    normalized = normalizer.normalize("action", data.action)
    assert normalized.dtype == np.float32 and np.isfinite(normalized).all()
    back = normalizer.unnormalize("action", normalized)
    kept = (np.abs(normalized) < 1) | (not modes.clip)
    np.testing.assert_allclose(back[kept], data.action[kept], rtol=1e-5, atol=1e-5)
    if modes.action == "min_max":  # each entry of each row fills the range, but the place where the robot is
        x = normalized[:, 1:, 0]
        np.testing.assert_allclose(x.min(axis=0), -1, atol=1e-5)
        np.testing.assert_allclose(x.max(axis=0), 1, atol=1e-5)
    if modes.action != "none":
        assert not normalized[:, 0, :2].any()  # never moves: neither blown up nor divided by zero
    # Fewer rows, and one chunk without a batch, are their beginning.
    np.testing.assert_array_equal(normalizer.normalize("action", data.action[:, :4]), normalized[:, :4])
    np.testing.assert_array_equal(normalizer.normalize("action", data.action[5]), normalized[5])


def test_single_rows_normalize_as_before() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 2))
    statistics = {name: compute_statistics(rows) for name in ("state", "action")}
    normalizer = Normalizer(Normalization(), statistics)
    assert normalizer.plan_rows is None
    chunk = np.broadcast_to(rows[:, None], (50, 9, 2))
    np.testing.assert_array_equal(normalizer.normalize("action", chunk)[:, 3], normalizer.normalize("action", rows))


def test_a_chunk_longer_than_the_statistics_is_refused() -> None:
    normalizer = Normalizer(Normalization(), plans_in_memory().statistics())
    for values in (np.zeros((2, 8, 4)), np.zeros(4)):
        with pytest.raises(StatisticsError, match="plans of 7 rows"):
            normalizer.unnormalize("action", values)


def test_what_is_doubtful_is_named_by_row() -> None:
    data = plans_in_memory()
    data.action[:, 3, 1] = 0.25
    lines = Normalizer(Normalization(), data.statistics(), names={"action": CART.action_names}).warnings()
    assert [line for line in lines if "never moves" in line] == [
        "action: y of row 3 never moves in the data, so nothing can be learned of it"
    ]  # and not a word of row 0


# From training to the robot.


def test_a_policy_answers_in_the_units_of_each_row(trained: Path, converted: Path) -> None:
    policy = CheckpointPolicy.load(trained)
    checkpoint, data = policy.checkpoint, load(converted)
    assert np.array(checkpoint.normalizer.statistics["action"]["max"]).shape == (ROWS, 4)
    seen = []

    def predict(inputs: Any, generator: Any, prefix: Any = None) -> Any:
        import torch

        seen.append(inputs)
        return torch.ones(1, 6, 4)

    checkpoint.model.predict = predict  # a model that answers 1 everywhere
    core = PolicyCore(policy)
    for message in drive(2)[1:5]:
        for name in core.builder.by_topic.get(message.topic, ()):
            core.add(name, message.data, START)
    chunk = core.infer(START)
    assert seen and chunk.step_ns == 500 * MS
    high, low = data.action[:, :6].max(axis=0), data.action[:, :6].min(axis=0)
    np.testing.assert_allclose(chunk.actions, np.where(high > low, high, low + 0.01), atol=1e-5)


def test_a_checkpoint_with_too_few_rows_is_refused(trained: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in trained.iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    plain = json.loads((broken / "statistics.json").read_text())
    plain["action"]["min"] = plain["action"]["min"][:4]
    (broken / "statistics.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match=r"action.min are those of plans of 4 rows, the model's horizon is 6"):
        Checkpoint.load(broken)
    plain["action"]["min"] = [[0.0, 1.0]] * ROWS
    (broken / "statistics.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match=r"action.min have 2 entries, not 4"):
        Checkpoint.load(broken)


def test_a_replay_compares_with_each_ticks_own_plan(trained: Path, bags: list[Path]) -> None:
    found = replay(bags[1], PolicyCore(CheckpointPolicy.load(trained)))
    assert found.known.all() and found.recorded.shape == (13, 6, 4)
    np.testing.assert_allclose(found.recorded, [plan(100 + k)[:6] for k in range(13)], atol=1e-9)
    assert len(found.figures()["mae_per_step"]) == 6


def test_reports_read_plans(trained: Path, converted: Path) -> None:
    """No doubt about a column that stands still by its meaning, and every row in the table of actions."""
    report = inspect_dataset(converted)
    assert not [line for line in report.warnings if "never moves" in line or "limits" in line], report.warnings
    lines = "\n".join(inspect_checkpoint(trained).warnings)
    assert "limits" not in lines
    (actions,) = [s for s in inspect_checkpoint(trained).sections if s.title == "Actions"]
    assert actions.table is not None and [row[0] for row in actions.table.rows][4:6] == ["x@0.5s", "y@0.5s"]
    spread = sensitivity(Checkpoint.load(trained), converted, samples=16).spread
    assert list(spread) == list(CART.action_names) and all(np.isfinite(list(spread.values())))


def test_standing_still_can_be_left_out() -> None:
    data = plans_in_memory()
    data.action[5:9] = 0.0
    kept, notes = keep(data, Filter(motionless=0.02, motionless_ticks=2))
    assert sorted(set(range(21)) - set(kept.window_rows.tolist())) == [5, 6, 7, 8] and len(notes) == 1
    with pytest.raises(DatasetError, match="by_change"):
        keep(data, Filter(motionless=0.02, by_change=("speed",)))


@pytest.mark.parametrize("strategy", ["ensemble", "blend", "rtc"])
def test_plans_from_different_places_are_not_mixed(strategy: Any) -> None:
    with pytest.raises(ConfigError, match=r"robot's own frame, which has moved.*choices: receding"):
        Execution(strategy=strategy).check_contract(CART)
    Execution(strategy=strategy).check_contract(CONTRACT)


def test_a_follower_would_brake_between_rare_plans() -> None:
    driving = RobotContract.load("driving")
    with pytest.raises(
        ConfigError, match=r"a trajectory every 2 s, .*timeout_s \(0.6\); set execution.period_s, to 0.2"
    ):
        Execution().check_contract(driving)
    Execution(period_s=0.2).check_contract(driving)
    assert to_dict(Execution(period_s=0.2))["period_s"] == 0.2
