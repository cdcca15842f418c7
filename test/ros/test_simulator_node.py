"""The simulator on topics: realtime obeys the newest command, lockstep runs any world and publishes its bytes."""

from __future__ import annotations

import functools
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rclpy.qos import QoSProfile
from sensor_msgs.msg import JointState

from vla_core.commands import encode
from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.observation.messages import header_stamp_ns
from vla_core.sim.base import View
from vla_core.sim.worlds import make_world
from vla_ros.bridge import COMMAND_QOS, EPISODE_QOS, message_class
from vla_ros.simulator_node import SimulatorNode

from .conftest import DEADLINE_S, Ros, parameters

COMMAND = np.array([0.1, 0.0, 0.0, 0.5])


def test_a_slow_simulator_obeys_the_newest_command(ros: Ros, domain: int, contract: RobotContract) -> None:
    overrides = parameters(clock="realtime", episodes=1, max_steps=80, camera_size=16)
    simulator = ros.add(SimulatorNode(context=ros.context, parameter_overrides=overrides))
    obeyed: list[np.ndarray] = []
    step = simulator.world.step

    def slow_step(values: np.ndarray) -> None:
        obeyed.append(values)
        step(values)
        time.sleep(0.02)  # slower than real time on any machine: commands come faster than they are obeyed

    simulator.world.step = slow_step
    elsewhere = Ros(domain)
    publisher = elsewhere.node("commander").create_publisher(JointState, contract.actions["hand"].topic, COMMAND_QOS)
    done = threading.Event()

    def command() -> None:
        while not done.wait(0.0125):
            publisher.publish(encode(contract.actions["hand"], time.time_ns(), COMMAND[None, :], contract.step_ns))

    commander = threading.Thread(target=command)
    commander.start()
    try:
        assert simulator.run(ros.executor, lambda: False) == 0
    finally:
        done.set()
        commander.join()
        elsewhere.close()
        simulator.stop()
    fresh = [np.array_equal(values, COMMAND) for values in obeyed]
    assert len(obeyed) == 80 and sum(fresh[40:]) > 30, f"{sum(fresh)} of {len(fresh)} steps obeyed a fresh command"
    assert not obeyed[0][:3].any() or fresh[0], "before the first command the arm stands still"


@pytest.mark.parametrize("task", ["pusht", "libero_goal:0"])
def test_any_world_runs_in_lockstep(ros: Ros, domain: int, tmp_path: Path, task: str) -> None:
    """Every observation is answered with the command of no motion; the contract is the simulator's own."""
    overrides = parameters(
        task=task, clock="lockstep", max_steps=4, seed=3, camera_size=32, results=str(tmp_path / "results.json"),
        wait_timeout_s=60.0, command_timeout_s=60.0,
    )  # fmt: skip
    simulator = ros.add(SimulatorNode(context=ros.context, parameter_overrides=overrides))
    contract = simulator.contract
    (action,) = contract.actions.values()
    elsewhere = Ros(domain)
    node = elsewhere.node("commander")
    publisher = node.create_publisher(JointState, action.topic, COMMAND_QOS)
    heard: dict[str, list[bytes]] = {}
    numbers = [stream.topic for stream in contract.observations.values() if not stream.latched]

    def listen(topic: str, data: bytes) -> None:
        heard.setdefault(topic, []).append(data)
        first = next(stream for stream in contract.observations.values() if stream.type.endswith("JointState"))
        if topic == first.topic:
            stamp_ns = header_stamp_ns(first.type, data)
            assert stamp_ns is not None
            deadline = time.monotonic() + DEADLINE_S
            while not publisher.get_subscription_count() and time.monotonic() < deadline:
                time.sleep(0.01)  # a command that is sent before its reader is known is lost
            publisher.publish(encode(action, stamp_ns, simulator.world.rest()[None, :], contract.step_ns))

    for stream in contract.observations.values():
        qos = EPISODE_QOS if stream.latched else QoSProfile(depth=100)
        node.create_subscription(message_class(stream.type), stream.topic,
                                 functools.partial(listen, stream.topic), qos, raw=True)  # fmt: skip
    done = threading.Event()

    def answer() -> None:
        while not done.is_set():
            elsewhere.executor.spin_once(timeout_sec=0.05)

    answering = threading.Thread(target=answer)
    answering.start()
    try:
        assert simulator.run(ros.executor, lambda: False) == 0
        deadline = time.monotonic() + DEADLINE_S  # the last messages are on their way
        while any(len(heard.get(topic, ())) < 4 for topic in numbers) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        done.set()
        answering.join()
        elsewhere.close()
        simulator.stop()
    assert set(heard) == {*numbers, "instruction"}
    assert all(len(heard[topic]) == 4 for topic in numbers), {topic: len(data) for topic, data in heard.items()}
    assert json.loads((tmp_path / "results.json").read_text())["task"] == task
    world = make_world(task, contract, View(size=32))
    world.reset(3)
    first = {message.topic: message.data for message in world.observe_state(10**9) + world.observe_camera(10**9)}
    assert {topic: heard[topic][0] for topic in numbers} == first, "the bytes of the same world without ROS"
    world.close()


def test_a_world_without_an_expert_says_so(ros: Ros) -> None:
    with pytest.raises(VlaError, match="parameter driver is 'expert': pusht has no scripted expert; choices: policy"):
        SimulatorNode(context=ros.context, parameter_overrides=parameters(task="pusht", driver="expert"))
