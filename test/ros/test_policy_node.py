"""The policy node: lifecycle, refusals, and what it does when its inputs fail."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.lifecycle import TransitionCallbackReturn
from std_msgs.msg import String

from vla_core.config import to_dict
from vla_core.contract import RobotContract
from vla_core.observation import messages

from .conftest import DEADLINE_S, Ros
from .robot import Robot, make_policy

OK = TransitionCallbackReturn.SUCCESS


def test_lifecycle_there_and_back(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint)
    robot = Robot(ros, contract)
    for _ in range(2):  # whatever configure makes, cleanup must undo
        assert policy.trigger_configure() == OK
        robot.drive_until(lambda: policy.core.buffer.newest_ns("image"), "a stored image")  # type: ignore[union-attr]
        assert not robot.commands, "an inactive policy must not command"
        assert policy.trigger_activate() == OK
        robot.drive_until(lambda: len(robot.commands) > 5, "commands")
        count = len(robot.commands)
        assert policy.trigger_deactivate() == OK
        ros.spin_until(lambda n=count: len(robot.commands) > n and robot.commands[-1].velocity[0] == 0.0, "a stop")
        assert list(robot.commands[-1].velocity[:3]) == [0.0, 0.0, 0.0]
        assert robot.commands[-1].velocity[3] == robot.commands[-2].velocity[3], "the grip is held"
        assert policy.trigger_cleanup() == OK
        assert policy.core is None
        robot.commands.clear()
    assert policy.trigger_configure() == OK
    assert policy.trigger_shutdown() == OK


def test_chunks_carry_their_place_in_time(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint)
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    robot.drive_until(lambda: len(robot.chunks) > 2, "chunks")
    chunk = robot.chunks[-1]
    step_ns = chunk.step.sec * 10**9 + chunk.step.nanosec
    observed_ns = chunk.observation_stamp.sec * 10**9 + chunk.observation_stamp.nanosec
    until_ns = chunk.valid_until.sec * 10**9 + chunk.valid_until.nanosec
    assert step_ns == 12_500_000 and chunk.horizon == 8
    assert until_ns == observed_ns + 8 * step_ns
    assert list(chunk.names) == list(contract.action_names) and list(chunk.units) == list(contract.action_units)
    assert len(chunk.actions) == 8 * 4
    assert policy.trigger_deactivate() == OK


def test_synchronous_answers_each_observation_once(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint, inference="synchronous")
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    ros.spin_until(lambda: robot.publishers["state"].get_subscription_count() == 1, "a match")
    ros.spin_until(lambda: robot.publishers["image"].get_subscription_count() == 1, "a match")
    ros.spin_until(lambda: policy.core.buffer.newest_ns("instruction") is not None, "the instruction")  # type: ignore[union-attr]
    stamps = []
    for step in range(12):
        stamps.append(robot.observe(stamp_ns=10**9 + step * 12_500_000, image=step % 4 == 0))
        ros.spin_until(lambda: len(robot.commands) == len(stamps), f"the answer to step {step}")
    answered = [c.header.stamp.sec * 10**9 + c.header.stamp.nanosec for c in robot.commands]
    assert answered == stamps
    assert len(robot.chunks) == 3, "one inference for every four steps"


def test_a_clock_that_was_set_back_is_followed(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint, inference="synchronous")
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    ros.spin_until(lambda: robot.publishers["image"].get_subscription_count() == 1, "a match")
    ros.spin_until(lambda: policy.core.buffer.newest_ns("instruction") is not None, "the instruction")  # type: ignore[union-attr]
    stamps = []
    for first_ns in (3600 * 10**9, 10**9):  # a bag that loops marks no episode
        for step in range(6):
            stamps.append(robot.observe(stamp_ns=first_ns + step * 12_500_000, image=step % 4 == 0))
            ros.spin_until(lambda: len(robot.commands) == len(stamps), f"the answer to {stamps[-1]}")
    assert [c.header.stamp.sec * 10**9 + c.header.stamp.nanosec for c in robot.commands] == stamps
    assert len(robot.chunks) == 4


def test_stale_camera_leads_to_the_safe_action_and_is_named(
    ros: Ros, checkpoint: Path, contract: RobotContract
) -> None:
    policy = make_policy(ros, checkpoint)
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    robot.drive_until(lambda: len(robot.commands) > 3, "commands")
    robot.drive_until(
        lambda: robot.fault("image (camera/image_raw/compressed)"), "a diagnostic that names the camera", image=False
    )
    ros.spin_until(lambda: list(robot.commands[-1].velocity[:3]) == [0.0, 0.0, 0.0], "zero velocity")
    assert policy.trigger_deactivate() == OK


def test_what_never_came_is_named(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint)
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    robot.drive_until(
        lambda: robot.fault("image (camera/image_raw/compressed): nothing received"), "a diagnostic", image=False
    )
    assert not robot.commands
    assert policy.trigger_deactivate() == OK


def test_when_all_fall_silent_each_is_named(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint)
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    robot.drive_until(lambda: len(robot.commands) > 3, "commands")
    ros.spin_until(lambda: robot.fault("state (task/state): ") and robot.fault("old, limit 0.1 s"), "a diagnostic")
    assert policy.trigger_deactivate() == OK


def test_it_goes_on_after_the_clock_was_set_back(
    ros: Ros, checkpoint: Path, contract: RobotContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(ros, checkpoint)
    robot = Robot(ros, contract)
    offset_ns = 0
    monkeypatch.setattr(policy, "_now_ns", lambda: time.time_ns() + offset_ns)

    def chunks(count: int) -> bool:
        robot.observe(stamp_ns=time.time_ns() + offset_ns)
        return len(robot.chunks) > count

    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    ros.spin_until(lambda: chunks(5), "chunks")
    offset_ns = -100 * 10**9
    robot.chunks.clear()
    ros.spin_until(lambda: chunks(5), "chunks on the clock that was set back")
    ros.spin_until(lambda: chunks(0) and robot.commands and any(robot.commands[-1].velocity[:3]), "motion")
    assert policy.trigger_deactivate() == OK


def test_bad_messages_are_named_and_harm_nothing(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint)
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    robot.drive_until(lambda: len(robot.commands) > 3, "commands")

    def broken() -> bool:
        robot.publishers["image"].publish(
            messages.compressed_image(robot.node.get_clock().now().nanoseconds, np.arange(9, dtype=np.uint8), "jpeg")
        )
        robot.observe(image=False)
        return robot.fault("does not decode")

    ros.spin_until(broken, "a diagnostic that names the broken image")
    robot.commands.clear()
    robot.drive_until(lambda: any(c.velocity[0] != 0.0 for c in robot.commands), "recovery")
    assert policy.trigger_deactivate() == OK


def test_wrong_names_in_a_state_are_listed(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint)
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK

    def wrong() -> bool:
        now = robot.node.get_clock().now().nanoseconds
        robot.publishers["state"].publish(messages.joint_state(now, ("elbow",), "position", np.zeros(1)))
        return robot.fault("the message has: elbow")

    robot.drive_until(lambda: len(robot.commands) > 3, "commands")
    robot.drive_until(wrong, "a diagnostic that lists the names")
    assert policy.trigger_deactivate() == OK


def test_a_topic_of_another_type_is_named(ros: Ros, domain: int, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint)
    diagnostics: list[Any] = []
    listener = ros.node("listener")
    listener.create_subscription(DiagnosticArray, "/diagnostics", lambda m: diagnostics.extend(m.status), 10)
    elsewhere = Ros(domain)  # one context refuses two types for a topic by itself
    elsewhere.node("stranger").create_publisher(String, contract.observations["image"].topic, 10)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    words = "node stranger publishes std_msgs/msg/String, the contract says sensor_msgs/msg/CompressedImage"
    ros.spin_until(lambda: any(words in status.message for status in diagnostics), "the conflict")
    assert policy.trigger_deactivate() == OK
    elsewhere.close()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "statistics.json").unlink(), ["statistics.json missing"]),
        (lambda folder: (folder / "statistics.json").write_text('{"state": {"mean": [0.0]}}'), ["state", "39"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), ["model.safetensors", "damaged"]),
        (lambda folder: shutil.rmtree(folder), ["not a checkpoint", "no such folder"]),
    ],
)  # fmt: skip
def test_a_bad_checkpoint_fails_configure(
    ros: Ros, checkpoint: Path, tmp_path: Path, damage: Any, words: list[str]
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    policy = make_policy(ros, folder)
    assert policy.trigger_configure() == TransitionCallbackReturn.FAILURE
    assert all(word in policy.fault for word in words), policy.fault
    assert "Traceback" not in policy.fault and "\n" not in policy.fault


def test_the_dataset_of_a_mixture_is_chosen_by_name(ros: Ros, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    statistics = json.loads((folder / "statistics.json").read_text())
    wide = {key: [2 * x for x in values] for key, values in statistics["action"].items()}
    mixture = {"narrow": statistics, "wide": {**statistics, "action": wide}}
    (folder / "dataset_statistics.json").write_text(json.dumps(mixture))
    policy = make_policy(ros, folder, dataset="wide")
    assert policy.trigger_configure() == OK
    found = policy.core.policy.checkpoint.normalizer
    np.testing.assert_allclose(found.unnormalize("action", np.ones(4)), wide["max"])
    policy = make_policy(ros, folder, dataset="attic")
    assert policy.trigger_configure() == TransitionCallbackReturn.FAILURE
    assert "no statistics of a dataset 'attic'; choices: narrow, wide" in policy.fault


def test_another_contract_fails_configure_and_names_both_sides(
    ros: Ros, checkpoint: Path, contract: RobotContract, tmp_path: Path
) -> None:
    robot = tmp_path / "robot.yaml"
    robot.write_text(dataclasses.replace(contract, rate_hz=50.0).to_yaml())
    policy = make_policy(ros, checkpoint, contract=str(robot))
    assert policy.trigger_configure() == TransitionCallbackReturn.FAILURE
    for words in ("rate_hz", "80.0", "50.0", str(robot), str(checkpoint)):
        assert words in policy.fault


def test_a_robot_may_remap_topics(ros: Ros, checkpoint: Path, contract: RobotContract, tmp_path: Path) -> None:
    data = to_dict(contract)
    data["observations"]["image"]["topic"] = "front/compressed"
    robot = tmp_path / "robot.yaml"
    import yaml

    robot.write_text(yaml.safe_dump(data))
    policy = make_policy(ros, checkpoint, contract=str(robot))
    assert policy.trigger_configure() == OK
    topics = {info.node_name for info in policy.get_subscriptions_info_by_topic("/front/compressed")}
    ros.spin_until(lambda: policy.count_subscribers("/front/compressed") == 1, f"the remapped topic {topics}")


def test_ctrl_c_sends_the_safe_action_and_exits_with_0(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    robot = Robot(ros, contract)
    process = subprocess.Popen(
        [sys.executable, "-m", "vla_ros.policy_node", "--ros-args", "-p", f"checkpoint:={checkpoint}"],
        env=os.environ.copy(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        robot.drive_until(lambda: any(c.velocity[0] != 0.0 for c in robot.commands), "commands")
        process.send_signal(signal.SIGINT)
        ros.spin_until(lambda: process.poll() is not None, "the process's end", DEADLINE_S)
        ros.spin_until(lambda: list(robot.commands[-1].velocity[:3]) == [0.0, 0.0, 0.0], "the safe action", 5.0)
    finally:
        process.kill()
        output = process.communicate()[0]
    assert process.returncode == 0, output


def test_a_checkpoint_that_is_missing_ends_the_process_with_one_line(domain: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vla_ros.policy_node", "--ros-args", "-p", f"checkpoint:={tmp_path / 'none'}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert len(lines) == 1 and "not a checkpoint" in lines[0], lines
