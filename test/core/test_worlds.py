"""Worlds by name, and PushT against its own library."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_core.config import ConfigError
from vla_core.contract import RobotContract, Safety
from vla_core.observation.decode import decode
from vla_core.observation.messages import Message
from vla_core.sim.base import SimulationError, View, World
from vla_core.sim.libero import axis_angle
from vla_core.sim.pusht import PushT
from vla_core.sim.worlds import find, make_world, task_of

from . import toy_world
from .helpers import CONTRACT

PUSHT = RobotContract.load("pusht")


def values(contract: RobotContract, messages: list[Message]) -> dict[str, np.ndarray]:
    """What the robot's own decoder makes of a world's messages, by stream."""
    names = {stream.topic: (name, stream) for name, stream in contract.observations.items()}
    return {names[m.topic][0]: np.asarray(decode(names[m.topic][1], m.data)) for m in messages}


def observe(world: World, contract: RobotContract, stamp_ns: int = 5) -> dict[str, np.ndarray]:
    messages = world.observe_state(stamp_ns) + world.observe_camera(stamp_ns)
    assert all(message.stamp_ns == stamp_ns for message in messages)
    return values(contract, messages)


def test_names() -> None:
    assert task_of("metaworld:push-v3").instruction == task_of("push-v3").instruction == "push the puck to the goal"
    assert task_of("push-v3").world == "push-v3" and find("pusht")[0].contract == "pusht"
    for name, message in {
        "metaworld:fly-v3": "unknown task 'fly-v3'; choices: .*push-v3",
        "fly-v3": "unknown task 'fly-v3'; choices: .*push-v3",
        "moon:1": "unknown simulator 'moon' in 'moon:1'; choices: driving, libero_10, .*metaworld, pusht",
        "pusht:2": "pusht has one task, which needs no name; found '2'",
    }.items():
        with pytest.raises(SimulationError, match=message):
            task_of(name)
        with pytest.raises(SimulationError, match=message):
            make_world(name)
    with pytest.raises(SimulationError, match="pusht: its cameras are fixed by the contract; found the camera 'top'"):
        make_world("pusht", view=View(camera="top"))
    with pytest.raises(ConfigError, match="size: expected at least 16 pixels, found 8"):
        View(size=8)
    with pytest.raises(SimulationError, match="pusht: it does not say its instruction itself, so none can be swapped"):
        make_world("pusht", view=View(swapped=True))


def test_a_plug_in_brings_a_simulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SimulationError, match="unknown simulator 'toy'"):
        find("toy:lift")
    with toy_world.installed(tmp_path / "site", monkeypatch):
        assert task_of("toy:drop").instruction == "drop it"
        world = make_world("toy:lift", CONTRACT)
        world.reset(0)
        assert observe(world, CONTRACT)["arm"].shape == (2,)


@pytest.mark.parametrize(
    ("stream", "changes", "message"),
    [
        ("agent", {"names": ("x",), "units": ("px",)}, "'agent' has 1 names, PushT has 2 numbers"),
        ("depth", {"type": "sensor_msgs/msg/Image"}, "PushT has no camera 'depth'; choices: image"),
        ("block", {}, "PushT has no 'block'; choices: agent, state"),
        ("lidar", {"type": "sensor_msgs/msg/PointCloud2", "names": (), "units": ()},
         "PushT has nothing of type sensor_msgs/msg/PointCloud2 for 'lidar'"),
    ],
)  # fmt: skip
def test_a_contract_that_asks_for_what_is_not_there(stream: str, changes: dict[str, object], message: str) -> None:
    changed = dataclasses.replace(PUSHT.observations["agent"], topic="other", **changes)  # type: ignore[arg-type]
    contract = dataclasses.replace(PUSHT, observations={**PUSHT.observations, stream: changed}, safety=Safety())
    with pytest.raises(SimulationError, match=message):
        make_world("pusht", contract)
    with pytest.raises(SimulationError, match=r"actions of \[2\] entries; LIBERO obeys one action of 7"):
        make_world("libero_goal:0", dataclasses.replace(PUSHT, observations={}, safety=Safety()))


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_rotation_vectors_are_robosuites(parts: list[float]) -> None:
    """Also where they are longer than half a turn, which published policies have seen in training."""
    from robosuite.utils.transform_utils import quat2axisangle

    quaternion = np.array(parts) / np.linalg.norm(parts)
    np.testing.assert_array_equal(axis_angle(quaternion.copy()), quat2axisangle(quaternion.copy()))


def test_rotation_vectors_of_known_turns() -> None:
    half = np.sqrt(0.5)
    np.testing.assert_allclose(axis_angle(np.array([0, 0, half, half])), [0, 0, np.pi / 2])
    np.testing.assert_array_equal(axis_angle(np.array([0, 0, 0, 1.0])), np.zeros(3))
    np.testing.assert_array_equal(axis_angle(np.array([0, 0, 0, 1.0 + 1e-12])), np.zeros(3))


# --- PushT ----------------------------------------------------------------------------------------------------------


def test_pusht_is_the_librarys() -> None:
    """Bit for bit: pictures, positions, success and coverage, over an episode of random targets."""
    from gym_pusht.envs.pusht import PushTEnv

    theirs = PushTEnv(obs_type="pixels_agent_pos", render_mode="rgb_array")
    state = PushTEnv(obs_type="state", render_mode="rgb_array")
    world = PushT(PUSHT, View())
    rng = np.random.default_rng(0)
    for seed in (7, 3, 7):
        seen, _ = theirs.reset(seed=seed)
        numbers, _ = state.reset(seed=seed)
        world.reset(seed)
        best, moved = 0.0, False
        for _ in range(15):
            found = observe(world, PUSHT)
            np.testing.assert_array_equal(found["image"], seen["pixels"])
            np.testing.assert_array_equal(found["agent"], seen["agent_pos"])
            np.testing.assert_array_equal(found["state"], numbers)
            np.testing.assert_array_equal(world.rest(), seen["agent_pos"])
            assert world.score == best and not world.success
            target = np.clip(found["state"][2:4] + rng.uniform(-60, 60, 2), 0, 512)  # towards the T
            world.step(target)
            seen, reward, _, _, _ = theirs.step(target)
            numbers, *_ = state.step(target)
            best, moved = max(best, reward), moved or numbers[2] != found["state"][2]
        assert moved, "the T was pushed"
    assert world.render_for_people().shape == (680, 680, 3)


def test_pusht_succeeds_when_the_t_lies_in_its_place() -> None:
    world = PushT(PUSHT, View())
    world.reset(0)
    block = world._env.block
    block.angle, block.position = np.pi / 4, (256.0, 256.0)
    world.step(world.rest())
    assert world.success and world.score == 1.0
    block.position = (100.0, 100.0)
    world.step(world.rest())
    assert world.success and world.score == 1.0, "it has been there"
    world.reset(0)
    assert not world.success and world.score == 0.0


def test_pusht_black() -> None:
    world = PushT(PUSHT, View(black=True, size=32))
    world.reset(0)
    assert observe(world, PUSHT)["image"].shape == (32, 32, 3) and not observe(world, PUSHT)["image"].any()
    assert world.render_for_people().any()
