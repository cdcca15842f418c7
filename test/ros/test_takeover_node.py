"""A teleoperator takes over from a policy, on topics; a recorder's bag tells where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, String
from vla_ros.msg import Episode

from vla_core.commands import encode
from vla_core.contract import RobotContract
from vla_core.data.convert import convert
from vla_core.data.dataset import load
from vla_core.observation.builder import ObservationSpec
from vla_ros.bridge import COMMAND_QOS, EPISODE_QOS, LATCHED_QOS
from vla_ros.recorder_node import RecorderNode
from vla_ros.simulator_node import SimulatorNode
from vla_ros.takeover_node import TakeoverNode

from .conftest import Ros, parameters

STEP_NS = 12_500_000
MARK = "intervention/hand/command"


class Both:
    """A policy and a teleoperator, and what the robot gets."""

    def __init__(self, ros: Ros, contract: RobotContract, **values: Any) -> None:
        self.ros, self.contract = ros, contract
        overrides = parameters(contract="metaworld_sawyer", **values)
        self.node = ros.add(TakeoverNode(context=ros.context, parameter_overrides=overrides))
        tester = ros.node()
        self.policy = tester.create_publisher(JointState, "policy/hand/command", COMMAND_QOS)
        self.teleop = tester.create_publisher(JointState, "teleop/hand/command", COMMAND_QOS)
        self.takeover = tester.create_publisher(Bool, "takeover", LATCHED_QOS)
        self.got: list[tuple[int, float]] = []
        self.marks: list[tuple[int, float]] = []
        topic = "candidate/hand/command" if values.get("safety") else "hand/command"
        subscribers = [tester.create_subscription(JointState, name, lambda m, to=to: to.append(_plain(m)), COMMAND_QOS)
                       for name, to in ((topic, self.got), (MARK, self.marks))]  # fmt: skip
        ros.spin_until(
            lambda: (
                all(p.get_subscription_count() for p in (self.policy, self.teleop, self.takeover))
                and all(tester.count_publishers(s.topic_name) for s in subscribers)
            ),
            "the takeover node",
        )

    def take(self, taken: bool) -> None:
        self.takeover.publish(Bool(data=taken))
        self.ros.spin_until(lambda: self.node.taken == taken, "the change of command")

    def tick(self, k: int) -> None:
        """Both command; what the robot gets is waited for."""
        for publisher, value in ((self.policy, 0.1), (self.teleop, 0.5)):
            publisher.publish(self.command(k, value))
        self.ros.spin_until(lambda: bool(self.got) and self.got[-1][0] == k * STEP_NS, f"an answer to tick {k}")

    def command(self, k: int, value: float) -> bytes:
        return encode(self.contract.actions["hand"], k * STEP_NS, np.full((1, 4), value), STEP_NS)


def _plain(message: JointState) -> tuple[int, float]:
    stamp = message.header.stamp
    return stamp.sec * 10**9 + stamp.nanosec, message.velocity[0]


@pytest.mark.parametrize("safety", [False, True])
def test_the_robot_gets_the_commands_of_who_is_in_command(ros: Ros, contract: RobotContract, safety: bool) -> None:
    both = Both(ros, contract, safety=safety)
    for k in range(1, 4):
        both.tick(k)
    both.take(True)
    for k in range(4, 7):
        both.tick(k)
    both.take(False)
    both.tick(7)
    values = [0.1] * 3 + [0.5] * 3 + [0.1]
    assert both.got == [(k * STEP_NS, value) for k, value in enumerate(values, 1)]
    ros.spin_until(lambda: len(both.marks) == 3, "the marks")
    assert both.marks == both.got[3:6]
    assert both.node.counts == {"commands": 7, "intervened": 3, "interventions": 1}


def test_a_silent_teleoperator_leaves_the_robot_without_commands(ros: Ros, contract: RobotContract) -> None:
    both = Both(ros, contract)
    both.tick(1)
    both.take(True)
    both.policy.publish(both.command(2, 0.1))
    both.teleop.publish(both.command(3, 0.5))
    ros.spin_until(lambda: both.got[-1] == (3 * STEP_NS, 0.5), "the teleoperator")
    assert (2 * STEP_NS, 0.1) not in both.got


def test_an_expert_that_takes_over_in_the_simulator_is_in_the_bag(
    ros: Ros, contract: RobotContract, tmp_path: Path
) -> None:
    """Simulator, takeover and recorder in lockstep, with a policy of rest; the dataset knows whose ticks are whose."""
    ros.add(TakeoverNode(context=ros.context, parameter_overrides=parameters(contract="metaworld_sawyer")))
    recorder = ros.add(RecorderNode(context=ros.context, parameter_overrides=parameters(
        contract="metaworld_sawyer", output=str(tmp_path / "bags"), streams=["state", "instruction"], use_sim_time=True,
        also=[f"{MARK}=sensor_msgs/msg/JointState"])))  # fmt: skip
    policy = ros.node("policy")
    commands = policy.create_publisher(JointState, "policy/hand/command", COMMAND_QOS)
    action = contract.actions["hand"]

    def answer(message: JointState) -> None:
        stamp = message.header.stamp
        commands.publish(encode(action, stamp.sec * 10**9 + stamp.nanosec, np.zeros((1, 4)), STEP_NS))

    policy.create_subscription(JointState, contract.observations["state"].topic, answer, COMMAND_QOS)
    policy.create_subscription(String, "instruction", lambda m: None, LATCHED_QOS)
    policy.create_subscription(Episode, "episode", lambda m: None, EPISODE_QOS)
    simulator = ros.add(SimulatorNode(context=ros.context, parameter_overrides=parameters(
        contract="metaworld_sawyer", task="reach-v3", clock="lockstep", driver="teleoperator", beta=0.5,
        segment_steps=5, max_steps=40, episodes=1, seed=3, wait_for=["policy", "recorder"])))  # fmt: skip
    assert simulator.run(ros.executor, lambda: False) == 0
    ros.spin_until(lambda: len(recorder.bags) == 1, "the bag")
    spec = ObservationSpec(state=("state",), instruction="instruction")
    convert(list(recorder.bags), tmp_path / "dataset", spec, keep_failed=True, workers=1)
    data = load(tmp_path / "dataset", None, spec, "none")
    assert data.intervened is not None
    resting = (data.action == 0).all(axis=1)
    np.testing.assert_array_equal(data.intervened, ~resting)
    taken = np.random.default_rng([3, 2]).random(8) < 0.5
    np.testing.assert_array_equal(data.intervened, np.repeat(taken, 5)[: data.frames])
    simulator.world.close()
