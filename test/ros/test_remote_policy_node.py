"""A policy node whose model runs on a server: it drives, and stops by name when the server is lost."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rclpy.lifecycle import TransitionCallbackReturn

from vla_core.contract import Reactions, RobotContract, Safety
from vla_core.runtime.policy import CheckpointPolicy
from vla_core.serving.remote_policy import RemotePolicy
from vla_ros.policy_node import PolicyNode
from vla_ros.safety_node import SafetyNode

from ..core.served import Served
from ..core.test_remote_policy import free_port
from .conftest import Ros, parameters
from .robot import Robot, make_policy
from .test_policy_operation import call, is_safe

OK = TransitionCallbackReturn.SUCCESS
FAILURE = TransitionCallbackReturn.FAILURE


def loaded(checkpoint: Path) -> CheckpointPolicy:
    return CheckpointPolicy.load(checkpoint)


def started(ros: Ros, served: Served, contract: RobotContract, **values: Any) -> tuple[PolicyNode, Robot]:
    """An active policy of a server, with a robot that has obeyed some commands."""
    policy = make_policy(ros, Path("unused"), policy=served.url, **values)
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK, policy.fault
    assert policy.trigger_activate() == OK
    return policy, robot


def while_observing(robot: Robot, act: Callable[[], None]) -> None:
    """Do something slow in another process's stead: the robot's sensors go on before and after it."""
    robot.observe()
    act()
    robot.observe()


def test_it_drives_loses_its_server_and_drives_again(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    port = free_port()
    with Served(loaded(checkpoint), port=port) as served:
        policy, robot = started(ros, served, contract)
        assert isinstance(policy._policy, RemotePolicy) and policy._fingerprint == policy._policy.fingerprint
        robot.drive_until(lambda: len(robot.commands) > 20 and robot.chunks, "commands")
        robot.drive_until(lambda: not is_safe(robot), "a command of the policy elsewhere")
        while_observing(robot, served.stop)
    robot.drive_until(lambda: is_safe(robot), "the safe action")
    robot.drive_until(lambda: robot.fault(f"policy_server_lost: ws://127.0.0.1:{port}"), "the fault by name")
    assert policy.active, "it goes on asking"
    chunks = len(robot.chunks)
    with Served(loaded(checkpoint), port=port):
        robot.drive_until(lambda: len(robot.chunks) > chunks + 3 and not is_safe(robot), "commands again")
        robot.diagnostics.clear()
        robot.drive_until(
            lambda: any(
                s.name.endswith(": policy") and "policy_server_lost" not in s.message for s in robot.diagnostics
            ),
            "a report without the fault",
        )
        assert policy.trigger_deactivate() == OK and policy.trigger_cleanup() == OK
        assert policy._policy is None


def test_the_safety_stage_names_a_lost_server_and_reacts_as_to_silence(
    ros: Ros, checkpoint: Path, contract: RobotContract, tmp_path: Path
) -> None:
    """Declared to latch, it stays stopped until somebody resets it; and the name outlives the policy's own report."""
    safety = Safety(
        command_age_s=5.0, heartbeat_s=5.0, clock_jump_s=5.0, sensors=(), reactions=Reactions(heartbeat="latch")
    )
    careful = dataclasses.replace(contract, safety=safety)
    (tmp_path / "robot.yaml").write_text(careful.to_yaml())
    port = free_port()
    with Served(loaded(checkpoint), port=port) as served:
        node: SafetyNode = ros.add(
            SafetyNode(context=ros.context,
                       parameter_overrides=parameters(contract=str(tmp_path / "robot.yaml"), autostart=False))
        )  # fmt: skip
        assert node.trigger_configure() == OK and node.trigger_activate() == OK
        policy, robot = started(ros, served, contract, safety=True)
        robot.drive_until(lambda: len(robot.commands) > 20, "commands by way of the safety stage")
        while_observing(robot, served.stop)
    named = f"policy: policy_server_lost: ws://127.0.0.1:{port}"
    robot.drive_until(lambda: node.stage is not None and named in node.stage.faults().get("policy", ""), "the fault")
    robot.drive_until(lambda: is_safe(robot) and robot.fault(f"latched: {named}"), "the latch that names it")
    assert "the cause persists" in call(robot, "safety/reset").message
    with Served(loaded(checkpoint), port=port):
        robot.drive_until(lambda: node.stage is not None and not node.stage.policy_fault, "the server's return")
        assert node.stage is not None and node.stage.state == "latched" and is_safe(robot)
        robot.drive_until(lambda: call(robot, "safety/reset").success, "a release")
        robot.drive_until(lambda: not is_safe(robot), "commands again")
        assert policy.trigger_deactivate() == OK


def test_lockstep_gets_the_safe_action_for_an_answer(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    with Served(loaded(checkpoint)) as served:
        policy, robot = started(ros, served, contract, inference="synchronous")
        robot.drive_until(lambda: len(robot.commands) > 5, "answers")
        while_observing(robot, served.stop)
        robot.drive_until(lambda: is_safe(robot) and policy.fault.startswith("policy_server_lost"), "the safe answer")


def test_a_server_that_is_not_there_fails_configure_by_name(
    ros: Ros, checkpoint: Path, contract: RobotContract, tmp_path: Path
) -> None:
    port = free_port()
    (tmp_path / "server.yaml").write_text(f"server: ws://127.0.0.1:{port}\nconnect_s: 0.2\n")
    policy = make_policy(ros, checkpoint, policy=str(tmp_path / "server.yaml"))
    assert policy.trigger_configure() == FAILURE
    assert policy.fault.startswith(f"policy_server_lost: ws://127.0.0.1:{port}")
    with Served(loaded(checkpoint), port=port):
        assert policy.trigger_configure() == OK, policy.fault


def test_a_server_for_another_robot_is_refused_and_left(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    with Served(loaded(checkpoint)) as served:
        policy = make_policy(ros, checkpoint, policy=served.url, contract="diff_drive")
        assert policy.trigger_configure() == FAILURE
        assert "name" in policy.fault and policy._policy is None


def test_the_graph_runs_a_policy_of_a_server(
    domain: int, checkpoint: Path, contract: RobotContract, tmp_path: Path
) -> None:
    """The demo's graph in lockstep, with `policy=ws://…` in the place of a checkpoint."""
    with Served(loaded(checkpoint)) as served:
        command = [
            sys.executable, "-m", "vla_ros.cli", "up", "config/graphs/push_demo.yaml", f"policy={served.url}",
            "checkpoint=", "clock=lockstep", "inference=synchronous", "use_sim_time=true", "episodes=1", "max_steps=6",
            f"results={tmp_path / 'results.json'}",
        ]  # fmt: skip
        run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        assert (tmp_path / "results.json").is_file() and served.metric("vla_requests_total") >= 1


@pytest.fixture(autouse=True)
def _own_domain(domain: int) -> int:
    return domain
