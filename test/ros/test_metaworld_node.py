"""The simulator in realtime: a slow one obeys the newest command, and without fresh commands the arm stops."""

from __future__ import annotations

import threading
import time

import numpy as np
from sensor_msgs.msg import JointState

from vla_core.commands import encode
from vla_core.contract import RobotContract
from vla_ros.bridge import COMMAND_QOS
from vla_ros.metaworld_node import MetaWorldNode

from .conftest import Ros, parameters

COMMAND = np.array([0.1, 0.0, 0.0, 0.5])


def test_a_slow_simulator_obeys_the_newest_command(ros: Ros, domain: int, contract: RobotContract) -> None:
    overrides = parameters(clock="realtime", episodes=1, max_steps=80, camera_size=16)
    simulator = ros.add(MetaWorldNode(context=ros.context, parameter_overrides=overrides))
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
