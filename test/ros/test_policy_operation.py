"""Running a policy: services, goals, overrides, and the faults that end a plan in the safe action."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rclpy.action import ActionClient
from rclpy.exceptions import InvalidParameterValueException
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from vla_ros.action import RunInstruction
from vla_ros.msg import Trajectory

from vla_core.contract import Action, RobotContract, Safety
from vla_ros.bridge import COMMAND_QOS, candidate_topic
from vla_ros.policy_node import WORKER_NICE, PolicyNode

from .conftest import Ros, parameters
from .robot import Robot, make_policy

OK = TransitionCallbackReturn.SUCCESS
Result = RunInstruction.Result


def acting(ros: Ros, checkpoint: Path, contract: RobotContract, **values: Any) -> tuple[PolicyNode, Robot]:
    """An active policy with a robot that has obeyed some commands."""
    policy = make_policy(ros, checkpoint, **values)
    robot = Robot(ros, contract)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    robot.drive_until(lambda: len(robot.commands) > 5, "commands")
    return policy, robot


def is_safe(robot: Robot) -> bool:
    return list(robot.commands[-1].velocity[:3]) == [0.0, 0.0, 0.0]


def call(robot: Robot, service: str, *, drive: bool = True) -> Any:
    client = robot.node.create_client(Trigger, service)
    robot.ros.spin_until(client.service_is_ready, service)
    answer = client.call_async(Trigger.Request())
    robot.drive_until(answer.done, f"an answer of {service}") if drive else robot.ros.spin_until(answer.done, service)
    return answer.result()


def test_services_stop_start_and_reset(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy, robot = acting(ros, checkpoint, contract)
    assert call(robot, "policy/stop").success
    count = len(robot.commands)
    robot.ros.spin_until(lambda: is_safe(robot), "the safe action")
    assert not policy.active
    assert call(robot, "policy/start").success and policy.active
    robot.drive_until(lambda: len(robot.commands) > count + 5, "commands again")
    assert call(robot, "policy/reset").success
    assert policy.core is not None
    assert policy.trigger_deactivate() == OK and policy.trigger_cleanup() == OK
    answer = call(robot, "policy/reset", drive=False)
    assert not answer.success and "configure" in answer.message


def test_start_configures_and_says_what_is_wrong(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint, execution=["strategy=guess"])
    robot = Robot(ros, contract)
    answer = call(robot, "policy/start", drive=False)
    assert not answer.success and "execution.strategy" in answer.message and "receding" in answer.message
    policy.set_parameters([Parameter("execution", value=["strategy=blend steps=3 blend_steps=2"])])
    assert call(robot, "policy/start", drive=False).success
    assert policy.core is not None and policy.core.executor.execution.strategy == "blend"
    assert policy.core.executor.execution.steps == 3


def test_a_lost_stream_ends_the_plan_at_once(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    """The state is older than its 0.1 s before the chunk of 8 x 12.5 ms is over, if one came at the very end."""
    policy, robot = acting(ros, checkpoint, contract)
    assert policy.core is not None
    core = policy.core
    ros.spin_until(lambda: policy.counts.safe_commands > 0, "a safe command")
    newest_ns = core.buffer.newest_ns("state")
    last = [c for c in robot.commands if list(c.velocity[:3]) != [0.0] * 3][-1]
    last_ns = last.header.stamp.sec * 10**9 + last.header.stamp.nanosec
    limit_ns = contract.observations["state"].max_age_ns
    assert newest_ns is not None and limit_ns is not None
    assert last_ns - newest_ns <= limit_ns, "no command may come from a state older than its limit"


def test_a_new_instruction_ends_the_plan_of_the_old_one(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy, robot = acting(ros, checkpoint, contract)
    robot.publishers["instruction"].publish(String(data="push the puck to the goal"))  # the same words: nothing changes
    robot.drive_until(lambda: len(robot.commands) > 20, "commands")
    assert policy.counts.instruction_changes == 0
    chunks = len(robot.chunks)
    before_ns = policy.core.buffer.newest_ns("state")  # type: ignore[union-attr]
    robot.publishers["instruction"].publish(String(data="open the drawer"))
    ros.spin_until(lambda: policy.counts.instruction_changes == 1, "the change")
    ros.spin_until(lambda: is_safe(robot), "the safe action without any new observation")
    robot.drive_until(lambda: len(robot.chunks) > chunks + 2, "a plan for the new instruction")
    first = robot.chunks[-1]
    assert first.observation_stamp.sec * 10**9 + first.observation_stamp.nanosec > before_ns
    assert policy.core.last_observation.instruction == "open the drawer"  # type: ignore[union-attr]


def test_a_clock_jump_ends_the_plan(
    ros: Ros, checkpoint: Path, contract: RobotContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, robot = acting(ros, checkpoint, contract)
    now = policy._now_ns
    monkeypatch.setattr(policy, "_now_ns", lambda: now() - 5 * 10**9)
    ros.spin_until(lambda: any("clock jumped" in fault for fault in [policy.fault, *policy.faults._first]), "the fault")
    assert policy.core is not None and policy.core.executor.action(policy._now_ns()) is None
    monkeypatch.setattr(policy, "_now_ns", now)
    ros.spin_until(lambda: policy.counts.faults >= 2, "the jump back")
    count = policy.counts.commands
    robot.drive_until(lambda: policy.counts.commands > count + 5, "commands on the clock as it is now")


def test_with_a_safety_node_commands_are_candidates(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint, safety=True)
    robot = Robot(ros, contract)
    candidates: list[JointState] = []
    topic = candidate_topic(contract.actions["hand"].topic)
    robot.node.create_subscription(JointState, topic, candidates.append, COMMAND_QOS)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    robot.drive_until(lambda: len(candidates) > 3, "candidates")
    assert not robot.commands, "nothing may pass by the safety node"


def test_qos_is_the_contracts_unless_it_is_overridden(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    topic = contract.observations["state"].topic
    name = f"qos_overrides./{topic}.subscription.reliability"
    policy = ros.add(
        PolicyNode(
            context=ros.context,
            parameter_overrides=[
                *parameters(checkpoint=str(checkpoint), autostart=False),
                Parameter(name, value="best_effort"),
            ],
        )
    )
    assert policy.trigger_configure() == OK
    found = {s.topic_name.strip("/"): s.qos_profile.reliability.name for s in policy.subscriptions}
    assert found[topic] == "BEST_EFFORT" and found[contract.observations["image"].topic] == "RELIABLE"


def test_a_number_out_of_range_is_refused(ros: Ros, checkpoint: Path) -> None:
    with pytest.raises(InvalidParameterValueException, match="seed"):
        make_policy(ros, checkpoint, seed=-1)


class Client:
    """Sends a goal, and keeps what comes back."""

    def __init__(self, robot: Robot) -> None:
        self.robot, self.feedback = robot, []  # type: ignore[var-annotated]
        self.client = ActionClient(robot.node, RunInstruction, "policy/run_instruction")
        robot.ros.spin_until(self.client.server_is_ready, "the action server")

    def send(self, instruction: str, limit_s: float = 0.0) -> Any:
        goal = RunInstruction.Goal(instruction=instruction)
        goal.time_limit.sec, goal.time_limit.nanosec = int(limit_s), int(limit_s % 1 * 1e9)
        sent = self.client.send_goal_async(goal, feedback_callback=lambda m: self.feedback.append(m.feedback))
        self.robot.drive_until(sent.done, "acceptance")
        return sent.result()

    def result(self, handle: Any, *, drive: bool = True) -> Any:
        done = handle.get_result_async()
        wait = self.robot.drive_until if drive else self.robot.ros.spin_until
        wait(done.done, "the result")
        return done.result().result


def test_a_goal_runs_its_instruction_for_its_time(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy = make_policy(ros, checkpoint)
    robot = Robot(ros, contract)
    client = Client(robot)
    assert not client.send("push").accepted, "no policy is loaded yet"
    assert policy.trigger_configure() == OK
    start = time.monotonic()
    result = client.result(client.send("open the drawer", 1.5))
    assert result.reason == Result.TIME_LIMIT and time.monotonic() - start >= 1.5
    assert result.elapsed.sec * 10**9 + result.elapsed.nanosec >= 1.5e9
    assert result.commands > 5 and not policy.active
    ros.spin_until(lambda: is_safe(robot), "the safe action")
    assert client.feedback and client.feedback[-1].commands > 0 and client.feedback[-1].observation_age >= 0.0
    assert policy.core.last_observation.instruction == "open the drawer"  # type: ignore[union-attr]


def test_a_goal_ends_by_cancel_by_a_newer_one_by_a_mark_and_by_a_fault(
    ros: Ros, checkpoint: Path, contract: RobotContract
) -> None:
    policy, robot = acting(ros, checkpoint, contract, goal_fault_s=0.5)
    client = Client(robot)
    first = client.send("push")
    second = client.send("open the drawer")
    assert client.result(first).reason == Result.CANCELED
    assert policy.active, "the newer goal goes on"
    canceled = second.cancel_goal_async()
    robot.drive_until(canceled.done, "the cancel")
    assert client.result(second).reason == Result.CANCELED and not policy.active
    third = client.send("push")
    robot.drive_until(lambda: policy.active, "activity")
    policy._goals.episode_ended(True)
    assert client.result(third).reason == Result.SUCCEEDED
    fourth = client.send("push")
    result = client.result(fourth, drive=False)  # the sensors fall silent
    assert result.reason == Result.FAULT
    assert any(why in result.message for why in ("old", "no chunk", "nothing could be commanded")), result.message
    assert is_safe(robot)


def test_the_last_of_a_goal_is_told_when_the_node_goes(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy, robot = acting(ros, checkpoint, contract)
    client = Client(robot)
    handle = client.send("push")
    robot.drive_until(lambda: len(robot.commands) > 10, "commands")
    assert policy.trigger_deactivate() == OK
    assert client.result(handle, drive=False).reason == Result.STOPPED
    ros.spin_until(lambda: is_safe(robot), "the safe action")


def test_trajectories_go_out_whole_once_a_chunk(
    ros: Ros, checkpoint: Path, contract: RobotContract, tmp_path: Path
) -> None:
    """Rows of 0.1 s; a control step is 12.5 ms, so that most ticks have no new trajectory to send."""
    action = Action(
        topic="planning/trajectory", type="vla_ros/msg/Trajectory", publish="chunk", step_s=0.1, frame_id="base_link",
        names=("x", "y", "yaw", "speed"), units=("m", "m", "rad", "m/s"),
        low=(-1.0,) * 4, high=(1.0,) * 4, safe=("zero",) * 4,
    )  # fmt: skip
    vehicle = dataclasses.replace(contract, actions={"trajectory": action}, safety=Safety())
    folder = shutil.copytree(checkpoint, tmp_path / "vehicle")
    (folder / "contract.yaml").write_text(vehicle.to_yaml())
    policy = make_policy(ros, folder, execution=["steps=1"])
    robot = Robot(ros, contract)
    sent: list[Any] = []
    robot.node.create_subscription(Trajectory, action.topic, sent.append, COMMAND_QOS)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    robot.drive_until(lambda: len(sent) > 3 and len(robot.chunks) > 3, "trajectories")
    assert policy.trigger_deactivate() == OK
    ros.spin_until(lambda: len(sent[-1].points) == 1, "the safe trajectory")
    plans = {
        (c.observation_stamp.sec, c.observation_stamp.nanosec): np.reshape(c.actions, (8, 4)) for c in robot.chunks
    }
    whole = [t for t in sent if len(t.points) > 1]
    stamps = [(t.header.stamp.sec, t.header.stamp.nanosec) for t in whole]
    assert len(set(stamps)) == len(stamps), "once a chunk"
    for stamp, trajectory in zip(stamps, whole, strict=True):
        rows = np.clip(plans[stamp], -1.0, 1.0)
        shown = [(p.pose.position.x, p.pose.position.y, p.speed) for p in trajectory.points]
        np.testing.assert_array_equal(shown, rows[:, [0, 1, 3]])
        assert [p.time_from_start.nanosec for p in trajectory.points] == [k * 100_000_000 for k in range(8)]
    stop = sent[-1].points[0]
    assert (stop.pose.position.x, stop.pose.position.y, stop.speed) == (0.0, 0.0, 0.0)


def test_what_the_middleware_lost_is_on_the_diagnostics(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    """The policy does not look for a while, and its queue of 80 Hz states holds half a second."""
    policy, robot = acting(ros, checkpoint, contract)
    ros.executor.remove_node(policy)
    for k in range(200):
        robot.observe(image=False, stamp_ns=robot.node.get_clock().now().nanoseconds + k)
    ros.executor.add_node(policy)
    robot.drive_until(lambda: policy.lost["state"] > 0, "the loss")
    assert 200 - 60 <= policy.lost["state"] <= 200

    def told() -> bool:
        values = {v.key: v.value for s in robot.diagnostics if s.name.endswith("sensor state") for v in s.values}
        return int(values.get("lost", 0)) == policy.lost["state"]

    robot.drive_until(told, "the diagnostics")


def test_the_model_yields_to_the_control_clock(ros: Ros, checkpoint: Path, contract: RobotContract) -> None:
    policy, _ = acting(ros, checkpoint, contract)
    assert policy._worker is not None and policy._worker.native_id is not None
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert os.getpriority(os.PRIO_PROCESS, policy._worker.native_id) == max(mine, WORKER_NICE)
