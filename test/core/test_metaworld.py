"""Meta-World as a robot: deterministic, solvable, and blind when it is told to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from vla_core.checkpoint import Execution
from vla_core.contract import RobotContract
from vla_core.evaluation.closed_loop import evaluate
from vla_core.observation.builder import Observation, ObservationSpec
from vla_core.observation.decode import decode
from vla_core.runtime.chunk_executor import ActionChunk
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.policy import Policy
from vla_core.sim.metaworld import ROTATED_CAMERAS, MetaWorld, SimulationError, instruction_for

from .helpers import CONTRACT, with_stream

SAWYER = RobotContract.load("metaworld_sawyer")


@pytest.fixture(scope="module")
def world() -> Iterator[MetaWorld]:
    made = MetaWorld("push-v3", "corner2", SAWYER, camera_size=48)
    yield made
    made.close()


def vectors(world: MetaWorld, stamp_ns: int) -> dict[str, np.ndarray]:
    names = {stream.topic: (name, stream) for name, stream in SAWYER.observations.items()}
    return {names[m.topic][0]: np.asarray(decode(names[m.topic][1], m.data)) for m in world.observe_state(stamp_ns)}


def run(world: MetaWorld, seed: int, steps: int = 20) -> list[bytes]:
    """Every byte that the robot would publish in ``steps`` steps of its expert."""
    world.reset(seed)
    published = []
    for k in range(steps):
        messages = world.observe_state(k)
        if k % world.steps_per_frame == 0:
            messages += world.observe_camera(k)
        published += [m.data for m in messages]
        world.step(world.expert())
    return published


def test_a_seed_decides_states_and_camera_bytes(world: MetaWorld) -> None:
    first = run(world, 5)
    fresh = MetaWorld("push-v3", "corner2", SAWYER, camera_size=48)
    assert run(fresh, 5) == first, "in a new simulator"
    fresh.close()
    assert run(world, 6)[2] != first[2], "the first 39 numbers: the puck lies elsewhere"
    assert run(world, 5) == first, "after another episode in the same one"


def test_the_expert_solves_the_task_within_the_contract(world: MetaWorld) -> None:
    world.reset(0)
    start = vectors(world, 0)["state"][4:7]
    low, high = SAWYER.action_low, SAWYER.action_high
    for _ in range(200):
        command = world.expert()
        assert ((low <= command) & (command <= high)).all()
        world.step(command)
        if world.success:
            break
    assert world.success
    state = vectors(world, 1)["state"]
    assert np.linalg.norm(state[4:7] - start) > 0.05, "the puck has moved"
    assert np.linalg.norm(state[4:6] - state[36:38]) < 0.08, "to the goal"
    world.reset(1)
    assert not world.success


def test_a_full_command_moves_the_hand_at_the_contracts_speed(world: MetaWorld) -> None:
    """0.8 m/s for 10 steps of 12.5 ms are 0.1 m; the mocap weld lags by a step or two."""
    world.reset(3)
    for _ in range(5):
        world.step(np.zeros(4))
    before = vectors(world, 0)["hand"]
    for _ in range(10):
        world.step(np.array([0, 0.8, 0, 0.0]))
    moved = vectors(world, 0)["hand"] - before
    assert 0.06 < moved[1] < 0.12 and abs(moved[0]) < 0.02
    assert SAWYER.step_ns == 12_500_000


def test_commands_beyond_full_speed_do_no_more(world: MetaWorld) -> None:
    ends = []
    for speed in (0.8, 80.0):
        world.reset(3)
        for _ in range(5):
            world.step(np.array([0, speed, 0, 0.0]))
        ends.append(vectors(world, 0)["hand"])
    np.testing.assert_array_equal(ends[0], ends[1])


def test_streams_say_the_same_thing(world: MetaWorld) -> None:
    world.reset(2)
    found = vectors(world, 7)
    np.testing.assert_array_equal(found["hand"], found["state"][:4])
    data = world._env.data
    expected = [data.joint(name).qpos[0] for name in SAWYER.observations["joints"].names]
    np.testing.assert_array_equal(found["joints"], expected)
    raw, compressed = (
        np.asarray(decode(next(s for s in SAWYER.observations.values() if s.topic == m.topic), m.data)).astype(int)
        for m in sorted(world.observe_camera(7), key=lambda m: m.type, reverse=True)
    )
    np.testing.assert_array_equal(raw, world.render())
    assert np.abs(raw - compressed).mean() < 4, "the same picture, as JPEG"
    assert all(m.stamp_ns == 7 for m in world.observe_camera(7))
    assert world.steps_per_frame == 4, "20 Hz of 80"


def test_an_image_stream_shows_the_camera_that_it_is_named_after() -> None:
    image = dataclasses.replace(SAWYER.observations["image_raw"], topic="side")
    views = {**SAWYER.observations, "behindGripper": image, "gripperPOV": dataclasses.replace(image, topic="hand")}
    world = MetaWorld("push-v3", "corner2", dataclasses.replace(SAWYER, observations=views), camera_size=32)
    world.reset(0)
    found = {
        m.topic: np.asarray(decode(image, m.data)) for m in world.observe_camera(0) if m.type == image.type
    }  # fmt: skip
    cameras = {SAWYER.observations["image_raw"].topic: "corner2", "side": "behindGripper", "hand": "gripperPOV"}
    assert set(found) == set(cameras)
    for topic, camera in cameras.items():
        np.testing.assert_array_equal(found[topic], world.render(camera), camera)
    assert len({pixels.tobytes() for pixels in found.values()}) == 3
    world.close()


def test_a_black_camera_is_black_and_people_still_see() -> None:
    world = MetaWorld("push-v3", "corner2", SAWYER, camera_size=32, black_camera=True)
    world.reset(0)
    for message in world.observe_camera(0):
        stream = next(s for s in SAWYER.observations.values() if s.topic == message.topic)
        assert not np.asarray(decode(stream, message.data)).any()
    assert world.render().std() > 10
    world.close()


def test_the_picture_stands_upright(world: MetaWorld) -> None:
    """A camera whose own upward axis points down is rotated, and no other; the axes are MuJoCo's word."""
    model, data = world._env.model, world._env.data
    world.reset(0)
    up = {model.camera(i).name: data.cam_xmat[i].reshape(3, 3)[2, 1] for i in range(model.ncam)}
    tilted = {name: z for name, z in up.items() if abs(z) > 0.3}  # the others look straight down
    assert {name for name, z in tilted.items() if z < 0} == set(ROTATED_CAMERAS) & set(tilted)
    assert "corner2" in tilted
    seen = world.render()
    np.testing.assert_array_equal(seen, world._renderer.render()[::-1, ::-1])


def test_mistakes_are_named() -> None:
    with pytest.raises(SimulationError, match=r"unknown task 'push-v9'; choices: .*push-v3"):
        MetaWorld("push-v9", "corner2", SAWYER)
    with pytest.raises(SimulationError, match=r"unknown camera 'nose'; choices: .*corner2.*topview"):
        MetaWorld("push-v3", "nose", SAWYER)
    with pytest.raises(SimulationError, match="Meta-World has no 'arm'; choices: hand, joints, state"):
        MetaWorld("push-v3", "corner2", CONTRACT)
    hand = with_stream("arm").observations["arm"]
    two = RobotContract(name="two", rate_hz=80, observations={"hand": hand}, actions=SAWYER.actions)
    with pytest.raises(SimulationError, match="'hand' has 2 names, Meta-World has 4 numbers"):
        MetaWorld("push-v3", "corner2", two)


def test_joints_that_the_robot_does_not_have_are_named() -> None:
    joints = SAWYER.observations["joints"]
    changed = RobotContract(
        name="odd", rate_hz=80, actions=SAWYER.actions,
        observations={"joints": with_stream("arm", names=("left_j0",), units=("rad",)).observations["arm"]},
    )  # fmt: skip
    assert "left_j0" not in joints.names
    with pytest.raises(SimulationError, match="left_j0"):
        MetaWorld("push-v3", "corner2", changed)


def test_tasks_without_a_sentence_get_their_name() -> None:
    assert instruction_for("push-v3") == "push the puck to the goal"
    assert instruction_for("coffee-pull-v3") == "coffee pull"


class ExpertCore(PolicyCore):
    """A core whose policy is the scripted expert: the loop around it is what is tested."""

    def __init__(self, world: MetaWorld) -> None:
        def predict(seen: Observation) -> ActionChunk:
            np.testing.assert_array_equal(seen.state, world._state.astype(np.float32))
            assert seen.instruction == "go"
            return ActionChunk(seen.stamp_ns, SAWYER.step_ns, world.expert()[None])

        expert: Any = Policy()
        expert.contract, expert.spec = SAWYER, ObservationSpec(state=("state",), instruction="instruction")
        expert.execution, expert.predict = Execution(steps=1), predict
        super().__init__(expert)


def test_the_closed_loop_gives_the_policy_the_current_state_and_the_robot_its_command(world: MetaWorld) -> None:
    results = evaluate(world, ExpertCore(world), "go", range(3), 150)
    assert [r.seed for r in results] == [0, 1, 2]
    assert all(r.success and 20 < r.steps < 150 for r in results)
    assert evaluate(world, ExpertCore(world), "go", [0], 5)[0].success is False
    assert evaluate(world, ExpertCore(world), "go", [0], 5)[0].steps == 5
