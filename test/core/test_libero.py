"""LIBERO against its own environment, bit for bit: what a published policy sees here is what it saw there."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from vla_core.contract import RobotContract, Safety
from vla_core.evaluation.suites import worlds_of
from vla_core.sim.base import SimulationError, View
from vla_core.sim.libero import CAMERAS, Libero, axis_angle
from vla_core.sim.worlds import task_of

from .test_worlds import observe, values

CONTRACT = RobotContract.load("libero")
SUITE, TASK = "libero_goal", 0
SIZE = 32  # software rendering takes most of the time
NO_MOTION = [0.0, 0, 0, 0, 0, 0, -1]


@pytest.fixture(scope="module")
def world() -> Iterator[Libero]:
    made = Libero(SUITE, str(TASK), CONTRACT, View(size=SIZE))
    yield made
    made.close()


def published(seed: int, commands: np.ndarray) -> list[dict[str, np.ndarray]]:
    """What OpenVLA's and openpi's evaluations observe: the library alone, in their order of calls."""
    with contextlib.redirect_stdout(io.StringIO()):
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        suite = benchmark.get_benchmark_dict()[SUITE]()
    task = suite.get_task(TASK)
    file = os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
    env = OffScreenRenderEnv(bddl_file_name=file, camera_heights=SIZE, camera_widths=SIZE)
    env.seed(0)
    env.reset()
    env.set_init_state(suite.get_task_init_states(TASK)[seed])
    for _ in range(10):
        seen, *_ = env.step(NO_MOTION)
    found = [seen]
    for command in commands:
        seen, *_ = env.step(command.tolist())
        found.append(seen)
    env.close()
    return found


def test_an_episode_is_the_librarys(world: Libero) -> None:
    """Also after another episode in the same simulator, and where pictures were left out in between."""
    commands = np.random.default_rng(1).uniform(-1, 1, (6, 7))
    expected = published(4, commands)
    world.reset(9)
    for command in commands:  # closes the gripper, moves the arm
        world.step(-command, pictures=False)
    world.reset(4)
    for k, theirs in enumerate(expected):
        looked_at = k % 2 == 0
        found = observe(world, CONTRACT) if looked_at else values(CONTRACT, world.observe_state(5))
        proprio = [theirs["robot0_eef_pos"], axis_angle(theirs["robot0_eef_quat"]), theirs["robot0_gripper_qpos"]]
        np.testing.assert_array_equal(found["proprio"], np.concatenate(proprio))
        np.testing.assert_array_equal(found["joints"], theirs["robot0_joint_pos"])
        for stream, camera in CAMERAS.items():
            if looked_at:
                np.testing.assert_array_equal(found[stream], theirs[f"{camera}_image"][::-1, ::-1])
        if k < len(commands):
            world.step(commands[k], pictures=(k + 1) % 2 == 0)
        if k == 2:
            world.render_for_people()
    assert np.abs(expected[0]["robot0_eef_pos"] - expected[-1]["robot0_eef_pos"]).max() > 0.01, "the arm moved"


def test_seeds_are_the_initial_states_in_their_order(world: Libero) -> None:
    def state(seed: int) -> np.ndarray:
        world.reset(seed)
        return np.array(world._env.get_sim_state()[1:])  # after the time

    assert len(world._initial_states) == 50
    np.testing.assert_array_equal(state(1), state(51))
    assert np.abs(state(1) - state(2)).max() > 1e-3
    start, settled = world._initial_states[2][1:], state(2)
    assert np.abs(start - settled).max() < 0.2, "ten steps of no motion later everything is about there"


def test_numpys_global_generator_is_left_alone(world: Libero) -> None:
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    world.reset(0)
    np.testing.assert_array_equal(np.random.random(3), expected)


def test_a_full_command_is_five_centimetres(world: Libero) -> None:
    """The controller's target moves so far each step; the arm follows it, and no command does more than a full one."""
    ends = []
    for speed in (1.0, 50.0):
        world.reset(0)
        start = values(CONTRACT, world.observe_state(0))["proprio"][:3]
        for _ in range(8):
            world.step(np.array([0, 0, speed, 0, 0, 0, -1]), pictures=False)
        ends.append(values(CONTRACT, world.observe_state(0))["proprio"][:3] - start)
    np.testing.assert_array_equal(ends[0], ends[1])
    assert 0.05 < ends[0][2] < 8 * 0.05 and np.abs(ends[0][:2]).max() < 0.05


def test_the_gripper_closes_at_one(world: Libero) -> None:
    widths = {}
    for gripper in (-1, 1):
        world.reset(0)
        for _ in range(8):
            world.step(np.array([0, 0, 0, 0, 0, 0, gripper]), pictures=False)
        left, right = values(CONTRACT, world.observe_state(0))["proprio"][6:]
        widths[gripper] = left - right
    assert widths[-1] > 0.07 > 0.03 > widths[1]


def test_tasks_and_limits() -> None:
    by_number, by_name = task_of("libero_goal:0"), task_of("libero_goal:put_the_bowl_on_the_stove")
    assert task_of("libero_spatial:0").instruction.startswith(
        "pick up the black bowl between the plate and the ramekin"
    )
    assert by_name.instruction == "put the bowl on the stove" and by_number.instruction != by_name.instruction
    limits = {suite: task_of(worlds_of(suite)[-1]).max_steps for suite in
              ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")}  # fmt: skip
    assert limits == {
        "libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400,
    }  # fmt: skip
    for suite in limits:
        with pytest.raises(SimulationError, match=f"{suite} has no task '{len(worlds_of(suite))}'; choices: 0 to "):
            task_of(f"{suite}:{len(worlds_of(suite))}")


def test_success_is_the_goal_of_the_task(world: Libero) -> None:
    """The drawer that this task wants open is opened by hand."""
    world.reset(0)
    world.step(world.rest(), pictures=False)
    assert not world.success
    sim: Any = world._env.sim
    (drawer,) = (name for name in sim.model.joint_names if "middle" in name)
    for reach in (-0.2, 0.2):
        sim.data.set_joint_qpos(drawer, reach)
        sim.forward()
        world.step(world.rest(), pictures=False)
    assert world.success
    world.reset(0)
    assert not world.success


def test_black_pictures(world: Libero) -> None:
    observations = {"wrist": CONTRACT.observations["wrist"]}
    blind = dataclasses.replace(CONTRACT, observations=observations, safety=Safety())
    black = Libero("libero_object", "2", blind, View(size=SIZE, black=True))
    black.reset(0)
    found = observe(black, blind)
    assert list(found) == ["wrist"] and found["wrist"].shape == (SIZE, SIZE, 3) and not found["wrist"].any()
    black.close()
