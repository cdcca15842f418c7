"""A planner in the policy node: chunks, figures on /diagnostics, imagined pictures, and a model that disagrees."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rclpy.lifecycle import TransitionCallbackReturn
from sensor_msgs.msg import Image
from std_msgs.msg import String

from vla_core.contract import RobotContract
from vla_core.model.vlm import TinyCNNEncoderConfig
from vla_core.model.world_model import RSSMConfig, WorldModel, WorldModelRecipe
from vla_core.observation.builder import ImageSize, ObservationSpec
from vla_core.observation.normalizer import Normalization, compute_statistics
from vla_core.world_checkpoint import WorldCheckpoint, WorldConfig, world_normalizer, world_sizes
from vla_ros.bridge import FAULT_TOPIC, LATCHED_QOS

from .conftest import Ros
from .robot import Robot, make_policy

OK = TransitionCallbackReturn.SUCCESS
SMALL = "planner.candidates=16 planner.elites=4 planner.iterations=1 planner.horizon=8"


@pytest.fixture(scope="module")
def world(contract: RobotContract) -> WorldCheckpoint:
    """Random weights that see the camera and the 39 numbers."""
    torch.manual_seed(0)
    spec = ObservationSpec(images={"image": ImageSize(height=64, width=64)}, state=("state",))
    recipe = WorldModelRecipe(
        rssm=RSSMConfig(deter=16, hidden=16), embed=16, hidden=16, channels=(8, 8, 8),
        vision=TinyCNNEncoderConfig(image_size=64, output_dim=8, channels=(8, 8, 8)),
    )  # fmt: skip
    config = WorldConfig(model=recipe.config(**world_sizes(spec, contract)), observation=spec,
                         normalization=Normalization(action="min_max"))  # fmt: skip
    statistics = {
        "state": compute_statistics(np.random.default_rng(0).normal(size=(100, 39))),
        "action": compute_statistics(np.stack([contract.action_low, contract.action_high])),
    }
    return WorldCheckpoint(config=config, model=WorldModel(config.model).eval(), contract=contract,
                           normalizer=world_normalizer(config, statistics, contract))  # fmt: skip


def figure(robot: Robot, key: str) -> str:
    """The newest value of the policy's status on /diagnostics."""
    found = [v.value for status in robot.diagnostics for v in status.values if v.key == key]
    return found[-1] if found else ""


def test_a_planner_acts_tells_what_it_did_and_shows_what_it_imagines(
    ros: Ros, checkpoint: Path, contract: RobotContract, world: WorldCheckpoint, tmp_path: Path
) -> None:
    world.save(tmp_path / "world")
    policy = make_policy(ros, checkpoint, policy="planner", world=str(tmp_path / "world"), planner=[SMALL],
                         imagined_s=0.1)  # fmt: skip
    robot = Robot(ros, contract)
    pictures: list[Any] = []
    robot.node.create_subscription(Image, "policy/imagined", pictures.append, 5)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    robot.drive_until(lambda: len(robot.commands) > 5 and len(robot.chunks) > 2, "commands and chunks")
    assert robot.chunks[-1].horizon == 8 and np.isfinite(robot.chunks[-1].actions).all()
    robot.drive_until(lambda: pictures, "an imagined picture")
    assert (pictures[0].height, pictures[0].width, pictures[0].encoding) == (64, 6 * 64, "rgb8")
    robot.drive_until(lambda: figure(robot, "candidates_evaluated") == "17", "the number of candidates")
    assert figure(robot, "planner") == "cem" and float(figure(robot, "predicted_return")) == pytest.approx(0, abs=1e-3)
    assert figure(robot, "overruns") == "0"
    assert policy.trigger_deactivate() == OK


def test_a_model_that_disagrees_stops_the_robot_and_the_safety_stage_is_told(
    ros: Ros, checkpoint: Path, contract: RobotContract, world: WorldCheckpoint, tmp_path: Path
) -> None:
    strict = dataclasses.replace(world.config, surprise=(1e-12,), surprise_window=2)
    dataclasses.replace(world, config=strict).save(tmp_path / "world")
    policy = make_policy(ros, checkpoint, policy="planner", world=str(tmp_path / "world"), planner=[SMALL], safety=True)
    robot = Robot(ros, contract)
    told: list[str] = []
    robot.node.create_subscription(String, FAULT_TOPIC, lambda m: told.append(m.data), LATCHED_QOS)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    robot.drive_until(lambda: any(t.startswith("model_disagrees") for t in told), "the fault by its name")
    robot.drive_until(lambda: robot.fault("model_disagrees"), "a diagnostic that names it")
    assert int(figure(robot, "disagreements")) > 0
    assert policy.trigger_deactivate() == OK


def test_a_planner_without_a_world_is_refused(ros: Ros, checkpoint: Path) -> None:
    policy = make_policy(ros, checkpoint, policy="planner")
    assert policy.trigger_configure() != OK
    assert "parameter world is empty; with policy: planner name the folder of a world model" in policy.fault
