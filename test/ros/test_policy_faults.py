"""Faults of the policy node at awkward moments: while a model thinks, between two messages, at a change of state."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from vla_core.contract import RobotContract
from vla_core.observation import messages
from vla_core.observation.image import encode_jpeg
from vla_ros.bridge import COMMAND_QOS
from vla_ros.policy_node import PolicyNode

from .conftest import Ros, parameters
from .robot import Robot, make_policy
from .test_policy_operation import Client, acting, call, is_safe

OK = TransitionCallbackReturn.SUCCESS
STEP_NS = 12_500_000
PICTURE = encode_jpeg(np.full((64, 64, 3), 100, dtype=np.uint8))


def altered(checkpoint: Path, folder: Path, contract: RobotContract, part: str, name: str, **changes: Any) -> Path:
    """The checkpoint with another contract: ``changes`` of the stream or action ``name``."""
    parts = getattr(contract, part)
    changed = dataclasses.replace(contract, **{part: {**parts, name: dataclasses.replace(parts[name], **changes)}})
    shutil.copytree(checkpoint, folder)
    (folder / "contract.yaml").write_text(changed.to_yaml())
    return folder


class Slow:
    """Holds up the policy's inference until told to go on."""

    def __init__(self, policy: PolicyNode, monkeypatch: pytest.MonkeyPatch) -> None:
        assert policy.core is not None
        self.seen: list[str] = []
        self.go = threading.Event()
        predict = policy.core.policy.predict

        def held_up(observation: Any, *rest: Any) -> Any:
            self.seen.append(observation.instruction)
            assert self.go.wait(20.0)
            return predict(observation, *rest)

        monkeypatch.setattr(policy.core.policy, "predict", held_up)


def lockstep(ros: Ros, checkpoint: Path, contract: RobotContract) -> tuple[PolicyNode, Robot, Callable[..., None]]:
    """An active synchronous policy, and a function that observes and waits for the answer."""
    policy = make_policy(ros, checkpoint, inference="synchronous")
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    ros.spin_until(lambda: robot.publishers["image"].get_subscription_count() == 1, "a match")
    ros.spin_until(lambda: policy.core.buffer.newest_ns("instruction") is not None, "the instruction")  # type: ignore[union-attr]

    def step(stamp_ns: int, *, image: bool) -> None:
        count = len(robot.commands)
        robot.observe(stamp_ns=stamp_ns, image=image)
        ros.spin_until(lambda: len(robot.commands) > count, f"the answer to {stamp_ns}")

    return policy, robot, step


def test_the_safe_action_does_not_wait_for_the_model(
    ros: Ros, checkpoint: Path, contract: RobotContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, robot = acting(ros, checkpoint, contract)
    slow = Slow(policy, monkeypatch)
    robot.drive_until(lambda: slow.seen, "an inference that does not end")
    sent = threading.Event()
    publish_safe = policy._publish_safe

    def publish(stamp_ns: int, reason: str) -> None:
        publish_safe(stamp_ns, reason)
        if reason == "deactivated":
            sent.set()

    monkeypatch.setattr(policy, "_publish_safe", publish)
    stopping = threading.Thread(target=policy.trigger_deactivate)
    stopping.start()
    try:
        assert sent.wait(10.0) and stopping.is_alive(), "safe first, then wait for the model"
    finally:
        slow.go.set()
        stopping.join()
    ros.spin_until(lambda: is_safe(robot), "the safe action")


def test_a_position_of_before_is_not_held_at_the_next_activation(
    ros: Ros, checkpoint: Path, contract: RobotContract, tmp_path: Path
) -> None:
    """Between the two, somebody else may have moved the robot."""
    folder = altered(checkpoint, tmp_path / "arm", contract, "actions", "hand", kind="position", safe=("hold",) * 4)
    policy, robot = acting(ros, folder, contract)
    assert policy.trigger_deactivate() == OK
    safe = policy.counts.safe_commands
    stopped = time.monotonic()
    ros.spin_until(lambda: time.monotonic() - stopped > 0.3, "the age at which what was seen counts as lost")
    assert policy.trigger_activate() == OK
    started = time.monotonic()
    ros.spin_until(lambda: time.monotonic() - started > 0.3, "two dozen control periods without an observation")
    assert policy.counts.safe_commands == safe
    count = policy.counts.commands
    robot.drive_until(lambda: policy.counts.commands > count + 5, "commands from new observations")


def test_an_instruction_that_changes_during_the_first_inference(
    ros: Ros, checkpoint: Path, contract: RobotContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(ros, checkpoint)
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK
    slow = Slow(policy, monkeypatch)
    robot.drive_until(lambda: policy.core.buffer.newest_ns("instruction"), "the instruction")  # type: ignore[union-attr]
    assert policy.trigger_activate() == OK
    robot.drive_until(lambda: slow.seen == ["push the puck to the goal"], "the first inference")
    robot.publishers["instruction"].publish(String(data="open the drawer"))
    robot.drive_until(lambda: policy.counts.instruction_changes == 1, "the change")
    slow.go.set()
    robot.drive_until(lambda: robot.chunks, "the chunk of the old instruction")
    assert policy.counts.commands == 0 or slow.seen[-1] == "open the drawer", "nothing of it may be executed"
    robot.drive_until(lambda: policy.counts.commands > 5, "commands for the new instruction")


def test_a_chunk_that_was_begun_before_the_clock_jumped_back(
    ros: Ros, checkpoint: Path, contract: RobotContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies in the future of the new clock, and must not keep newer chunks out until then."""
    policy, robot = acting(ros, checkpoint, contract)
    slow = Slow(policy, monkeypatch)
    robot.drive_until(lambda: slow.seen, "an inference")
    now = policy._now_ns
    monkeypatch.setattr(policy, "_now_ns", lambda: now() - 8 * 10**9)
    ros.spin_until(lambda: policy.fault.startswith("the clock jumped") or policy.counts.faults > 0, "the jump")
    slow.go.set()
    count, start = policy.counts.commands, time.monotonic()
    last = 0.0

    def again() -> bool:
        nonlocal last
        if time.monotonic() - last > 0.0125:
            last = time.monotonic()
            robot.observe(stamp_ns=policy._now_ns())
        return policy.counts.commands > count + 5

    ros.spin_until(again, "commands on the new clock")
    assert time.monotonic() - start < 6.0


def test_lockstep_follows_a_clock_that_went_back_by_little(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    _, _, step = lockstep(ros, checkpoint, contract)
    for first_ns in (6 * 10**9, 10**9):  # a bag of five seconds that loops
        for k in range(6):
            step(first_ns + k * STEP_NS, image=k % 4 == 0)


def test_lockstep_answers_an_observation_that_a_new_instruction_cut_in_two(
    ros: Ros, checkpoint: Path, contract: RobotContract
) -> None:
    policy, robot, step = lockstep(ros, checkpoint, contract)
    for k in range(8):
        step(10**9 + k * STEP_NS, image=k % 4 == 0)
    stamp_ns = robot.observe(stamp_ns=10**9 + 8 * STEP_NS, image=False)  # its picture is still to come
    assert policy.core is not None
    core = policy.core
    ros.spin_until(lambda: core.buffer.newest_ns("state") == stamp_ns, "the state")
    robot.publishers["instruction"].publish(String(data="open the drawer"))
    ros.spin_until(lambda: policy.counts.instruction_changes == 1, "the change")
    robot.publishers["image"].publish(messages.compressed_image(stamp_ns, PICTURE, "jpeg"))
    ros.spin_until(lambda: len(robot.commands) == 9, "the answer")
    assert core.last_observation is not None and core.last_observation.instruction == "open the drawer"


def test_lockstep_gets_the_safe_action_from_a_model_that_breaks(
    ros: Ros, checkpoint: Path, contract: RobotContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, robot, step = lockstep(ros, checkpoint, contract)
    step(10**9, image=True)

    def out_of_memory(*given: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(policy.core.policy, "predict", out_of_memory)  # type: ignore[union-attr]
    for k in range(1, 5):
        step(10**9 + k * STEP_NS, image=k % 4 == 0)
    assert is_safe(robot) and policy.fault == "out of memory"


def test_lockstep_names_a_command_topic_that_nobody_hears(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint, inference="synchronous", safety=True)  # but there is no safety node
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    robot.drive_until(lambda: robot.fault("waiting for a subscriber of /candidate/hand/command"), "a diagnostic")
    heard: list[Any] = []
    robot.node.create_subscription(JointState, "candidate/hand/command", heard.append, COMMAND_QOS)
    robot.drive_until(lambda: heard, "an answer")


def test_numbers_that_are_not_finite_end_the_plan(
    ros: Ros, checkpoint: Path, contract: RobotContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, robot = acting(ros, checkpoint, contract)
    assert policy.core is not None
    core, predict = policy.core, policy.core.policy.checkpoint.model.predict
    planned: list[bool] = []
    drop_plan = core.drop_plan

    def broken(*given: Any) -> Any:
        chunk = predict(*given)
        chunk[0, 3] = float("nan")
        return chunk

    def dropped(*given: Any) -> None:
        planned.append(core.executor.action(policy._now_ns()) is not None)
        drop_plan(*given)

    monkeypatch.setattr(core, "drop_plan", dropped)
    monkeypatch.setattr(core.policy.checkpoint.model, "predict", broken)
    robot.drive_until(lambda: planned, "the fault")
    ros.spin_until(lambda: is_safe(robot), "the safe action")
    assert planned[0], "the old plan had rows left, which were not executed"


def test_between_two_ticks_only_age_ends_a_plan(
    ros: Ros, checkpoint: Path, contract: RobotContract, tmp_path: Path
) -> None:
    """A picture every 50 ms that must lie within 30 ms of a tick is further away from most other instants."""
    nearest = {"sampling": "nearest", "tolerance_s": 0.03}
    policy = make_policy(ros, altered(checkpoint, tmp_path / "nearest", contract, "observations", "image", **nearest))
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    last, count = 0.0, 0

    def enough() -> bool:
        nonlocal last, count
        if time.monotonic() - last > 0.0125:
            last, count = time.monotonic(), count + 1
            robot.observe(image=count % 4 == 0)
        return policy.counts.commands > 100

    ros.spin_until(enough, "commands")
    assert policy.counts.safe_commands < 50


def test_a_masked_stream_does_not_take_the_ticks_with_it(
    ros: Ros, checkpoint: Path, contract: RobotContract, tmp_path: Path
) -> None:
    folder = altered(checkpoint, tmp_path / "masked", contract, "observations", "state", missing="mask")
    policy, robot = acting(ros, folder, contract)
    assert policy.core is not None
    last = 0.0

    def blind() -> bool:
        nonlocal last
        if time.monotonic() - last > 0.05:
            last = time.monotonic()
            stamp_ns = robot.node.get_clock().now().nanoseconds
            robot.publishers["image"].publish(messages.compressed_image(stamp_ns, PICTURE, "jpeg"))
        seen = policy.core.last_observation  # type: ignore[union-attr]
        return seen is not None and not seen.present["state"] and seen.present["image"]

    ros.spin_until(blind, "an observation without the state, the fastest stream")
    count = policy.counts.commands
    ros.spin_until(lambda: blind() and policy.counts.commands > count + 10, "commands from it")


def test_nobody_slips_another_instruction_under_a_goal(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy, robot = acting(ros, checkpoint, contract)
    client = Client(robot)
    client.send("open the drawer")
    robot.publishers["instruction"].publish(String(data="push the puck to the goal"))
    robot.drive_until(lambda: robot.fault("'push the puck to the goal' is not followed"), "a diagnostic")
    count = policy.counts.commands
    robot.drive_until(lambda: policy.counts.commands > count + 10, "commands")
    assert policy.core is not None and policy.core.last_observation is not None
    assert policy.core.last_observation.instruction == "open the drawer"
    client.send("")  # such a goal has no instruction of its own
    changes = policy.counts.instruction_changes
    robot.publishers["instruction"].publish(String(data="push the puck to the goal"))
    robot.drive_until(lambda: policy.counts.instruction_changes > changes, "the change")


def test_a_wrong_override_is_one_line_and_leaves_nothing_behind(ros: Ros, checkpoint: Path) -> None:
    override = Parameter("qos_overrides./task/state.subscription.reliability", value="perfect")
    values = [*parameters(checkpoint=str(checkpoint), autostart=False), override]
    policy = ros.add(PolicyNode(context=ros.context, parameter_overrides=values))
    assert policy.trigger_configure() == TransitionCallbackReturn.FAILURE
    assert "/task/state" in policy.fault and "perfect" in policy.fault and "\n" not in policy.fault
    assert not list(policy.subscriptions)


def test_a_transition_that_breaks_leaves_nothing_active(
    ros: Ros, checkpoint: Path, contract: RobotContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(ros, checkpoint)
    assert policy.trigger_configure() == OK

    def refuse(*given: Any, **more: Any) -> Any:
        raise RuntimeError("no timer")

    with monkeypatch.context() as patch:
        patch.setattr(policy, "create_timer", refuse)
        assert policy.trigger_activate() == TransitionCallbackReturn.ERROR
    assert not policy.active and not policy.configured and policy.fault == "RuntimeError: no timer; see the log"
    robot = Robot(ros, contract)
    assert policy.start() == ""
    robot.drive_until(lambda: robot.commands, "commands")


def test_a_node_that_was_shut_down_refuses_to_start(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint)
    assert policy.trigger_shutdown() == OK
    answer = call(Robot(ros, contract), "policy/start", drive=False)
    assert not answer.success and "shut down" in answer.message
