"""The policy node with an exported policy in the place of its checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rclpy.lifecycle import TransitionCallbackReturn

from vla_core.checkpoint import Checkpoint
from vla_core.contract import RobotContract
from vla_core.export.exporter import ExportOptions, export
from vla_core.runtime.loading import load_policy

from .conftest import Ros
from .robot import Robot, make_policy

OK = TransitionCallbackReturn.SUCCESS


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The checkpoint as an ONNX graph."""
    place = tmp_path_factory.mktemp("export") / "graph"
    export(Checkpoint.load(checkpoint), place, ExportOptions(kind="onnx"))
    return place


def chunks_of(ros: Ros, contract: RobotContract, place: Path) -> tuple[np.ndarray, str]:
    """The chunks (3, H, A) that the node answers to the same observations in lockstep, and its diagnostics' name."""
    policy = make_policy(ros, place, inference="synchronous")
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    for name in ("state", "image"):
        ros.spin_until(lambda n=name: robot.publishers[n].get_subscription_count() == 1, "a match")  # type: ignore[misc]
    ros.spin_until(lambda: policy.core.buffer.newest_ns("instruction") is not None, "the instruction")  # type: ignore[union-attr]
    for step in range(12):
        robot.observe(stamp_ns=10**9 + step * 12_500_000, image=step % 4 == 0)
        ros.spin_until(lambda n=step: len(robot.commands) == n + 1, f"the answer to step {step}")  # type: ignore[misc]
    ros.spin_until(lambda: len(robot.chunks) == 3, "the chunks")
    chunks = np.array([chunk.actions for chunk in robot.chunks]).reshape(3, 8, 4)
    assert policy.core is not None
    fingerprint = policy.core.policy.fingerprint
    assert policy.trigger_deactivate() == OK and policy.trigger_cleanup() == OK
    return chunks, fingerprint


def test_a_graph_drives_the_robot_as_its_checkpoint_does(
    ros: Ros, checkpoint: Path, graph: Path, contract: RobotContract
) -> None:
    expected, weights = chunks_of(ros, contract, checkpoint)
    found, name = chunks_of(ros, contract, graph)
    half = (contract.action_high - contract.action_low) / 2
    assert np.abs((found - expected) / half).max() < 1e-4 and np.ptp(expected) > 0.1
    assert name == load_policy(graph).fingerprint != weights


def test_a_damaged_graph_fails_configure(ros: Ros, graph: Path, contract: RobotContract, tmp_path: Path) -> None:
    import shutil

    place = tmp_path / "graph"
    shutil.copytree(graph, place)
    (place / "policy.onnx").write_bytes(b"")
    policy = make_policy(ros, place)
    assert policy.trigger_configure() != OK
    assert "damaged or changed since it was exported" in policy.fault
