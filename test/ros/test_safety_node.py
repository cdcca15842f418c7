"""The safety node: commands pass at once, and every fault ends in the declared safe action."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import TwistStamped
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.time import Time
from rosgraph_msgs.msg import Clock
from std_srvs.srv import Trigger

from vla_core.contract import Action, Limits, Reactions, RobotContract, Safety, Stream
from vla_core.observation import messages
from vla_ros.bridge import COMMAND_QOS, message_class, stream_qos
from vla_ros.safety_node import SafetyNode

from .conftest import Ros, parameters

OK = TransitionCallbackReturn.SUCCESS
PERIOD_NS = 20_000_000
SAFE = (0.0, 0.0)
ASKED = (0.4, 0.2)


def robot_contract(**reactions: Any) -> RobotContract:
    """A base with two sensors. Tests run beside others: times are long, and 1 m/s takes 0.2 s to stop."""
    stream = {"type": "sensor_msgs/msg/JointState", "rate_hz": 50.0, "max_age_s": 0.5, "field": "position"}
    return RobotContract(
        name="base", rate_hz=50.0,
        observations={
            "wheels": Stream(topic="wheels", names=("left", "right"), units=("rad", "rad"), **stream),
            "mast": Stream(topic="mast", names=("pan",), units=("rad",), **stream),
        },
        actions={"base": Action(
            topic="cmd_vel", type="geometry_msgs/msg/TwistStamped", kind="velocity", names=("linear.x", "angular.z"),
            units=("m/s", "rad/s"), low=(-1.0, -1.0), high=(1.0, 1.0), safe=("zero", "zero"),
            limits=Limits(acceleration=(5.0, 5.0)),
        )},
        safety=Safety(command_age_s=1.0, heartbeat_s=0.5, clock_jump_s=2.0, reactions=Reactions(**reactions)),
    )  # fmt: skip


class Robot:
    """Sensors, a policy and a base around the node; ``events`` are commands and diagnostics as they arrived."""

    def __init__(self, ros: Ros, contract: RobotContract) -> None:
        self.ros, self.contract = ros, contract
        self.node = ros.node("robot")
        self.sensors = {
            name: self.node.create_publisher(message_class(s.type), s.topic, stream_qos(s))
            for name, s in contract.observations.items()
        }
        self.candidates = self.node.create_publisher(TwistStamped, "candidate/cmd_vel", COMMAND_QOS)
        self.commands: list[tuple[float, float]] = []
        self.stamps: list[int] = []
        self.events: list[Any] = []
        self.diagnostics: list[Any] = []
        self.node.create_subscription(TwistStamped, "cmd_vel", self._on_command, COMMAND_QOS)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 100)
        self.stamp_of: dict[str, Callable[[int], int]] = {}  # how a sensor's stamp follows from the time
        self.silent: set[str] = set()
        self.thinks = True

    def _on_command(self, message: TwistStamped) -> None:
        values = (message.twist.linear.x, message.twist.angular.z)
        self.commands.append(values)
        self.stamps.append(Time.from_msg(message.header.stamp).nanoseconds)
        self.events.append(values)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        self.diagnostics += message.status
        self.events += message.status

    def now(self) -> int:
        return int(self.node.get_clock().now().nanoseconds)

    def sense(self) -> None:
        for name, publisher in self.sensors.items():
            if name not in self.silent:
                names = self.contract.observations[name].names
                stamp = self.stamp_of.get(name, lambda now: now)(self.now())
                publisher.publish(messages.joint_state(stamp, names, "position", np.zeros(len(names))))

    def ask(self, values: tuple[float, float] = ASKED, stamp_ns: int | None = None) -> int:
        stamp = self.now() if stamp_ns is None else stamp_ns
        message = TwistStamped()
        message.header.stamp = Time(nanoseconds=stamp).to_msg()
        message.twist.linear.x, message.twist.angular.z = values
        self.candidates.publish(message)
        return stamp

    def drive_until(self, condition: Callable[[], bool], what: str) -> None:
        """Sense and ask at about the contract's rate until ``condition`` holds."""
        last = 0.0

        def done() -> bool:
            nonlocal last
            if time.monotonic() - last > PERIOD_NS / 1e9:
                last = time.monotonic()
                self.sense()
                if self.thinks:
                    self.ask()
            return condition()

        self.ros.spin_until(done, what)

    def drive(self) -> None:
        """Until the base moves as it is asked to."""
        self.drive_until(lambda: self.commands[-1:] == [ASKED], "motion")

    def saw(self, *words: str) -> bool:
        return any(all(word in status.message for word in words) for status in self.diagnostics)

    def expect_stop(self, *words: str) -> None:
        """The declared safe action, in the period in which the node names the fault, and from then on."""
        self.drive_until(lambda: self.commands[-1] == SAFE and self.saw(*words), f"a stop for {words}")
        found = next(i for i, e in enumerate(self.events)
                     if not isinstance(e, tuple) and all(word in e.message for word in words))  # fmt: skip
        after = [e for e in self.events[found:] if isinstance(e, tuple)]
        before = [e for e in self.events[:found] if isinstance(e, tuple)]
        # Topics may overtake each other by a message: the command that slows down is next to what explains it.
        around = [*before[-2:], *after]
        speeds = [abs(e[0]) for e in around[1:]]
        assert speeds == sorted(speeds, reverse=True) and around[-1] == SAFE, around
        assert len([speed for speed in speeds if speed >= ASKED[0]]) <= 1, around


def make_node(ros: Ros, tmp_path: Path, contract: RobotContract, **values: Any) -> SafetyNode:
    path = tmp_path / "base.yaml"
    path.write_text(contract.to_yaml())
    overrides = parameters(contract=str(path), autostart=False, **values)
    node: SafetyNode = ros.add(SafetyNode(context=ros.context, parameter_overrides=overrides))
    return node


def start(ros: Ros, tmp_path: Path, **reactions: Any) -> tuple[SafetyNode, Robot]:
    contract = robot_contract(**reactions)
    node = make_node(ros, tmp_path, contract)
    assert node.trigger_configure() == OK and node.trigger_activate() == OK
    robot = Robot(ros, contract)
    robot.drive()
    return node, robot


def call(ros: Ros, robot: Robot, service: str) -> Trigger.Response:
    client = robot.node.create_client(Trigger, service)
    ros.spin_until(client.service_is_ready, service)
    future = client.call_async(Trigger.Request())
    robot.drive_until(future.done, f"{service}'s answer")
    response: Trigger.Response = future.result()
    return response


def test_each_candidate_is_answered_once_with_its_stamp(ros: Ros, tmp_path: Path) -> None:
    node, robot = start(ros, tmp_path)
    robot.ros.spin_until(lambda: robot.now() > robot.stamps[-1] + 3 * PERIOD_NS, "its answers")
    robot.commands.clear()
    robot.stamps.clear()
    stamps: list[int] = []
    for _ in range(20):
        ros.spin_until(lambda: not stamps or robot.now() > stamps[-1] + PERIOD_NS, "the next period")
        robot.sense()
        stamps.append(robot.ask())
        ros.spin_until(lambda: len(robot.stamps) == len(stamps), "an answer")
    assert robot.stamps == stamps and set(robot.commands) == {ASKED}
    assert robot.saw("passing") and node.stage is not None and node.stage.counts["passed"] >= 20


@pytest.mark.parametrize("sensor", ["wheels", "mast"])
@pytest.mark.parametrize("fault", ["lost", "frozen", "behind", "ahead"])
def test_a_sensor_that_fails_stops_the_robot(ros: Ros, tmp_path: Path, sensor: str, fault: str) -> None:
    _, robot = start(ros, tmp_path)
    stopped_at = robot.now()
    if fault == "lost":
        robot.silent.add(sensor)
    else:
        shifts = {"frozen": lambda now: stopped_at, "behind": lambda now: now - 5 * 10**9,
                  "ahead": lambda now: now + 5 * 10**9}  # fmt: skip
        robot.stamp_of[sensor] = shifts[fault]
    robot.expect_stop("stopping", f"{sensor} ({sensor})", fault)
    robot.silent.clear()
    robot.stamp_of.clear()
    robot.drive()


POLICY = """
import rclpy
from geometry_msgs.msg import TwistStamped
rclpy.init()
node = rclpy.create_node("policy")
publisher = node.create_publisher(TwistStamped, "candidate/cmd_vel", 10)
def act():
    message = TwistStamped()
    message.header.stamp = node.get_clock().now().to_msg()
    message.twist.linear.x, message.twist.angular.z = 0.4, 0.2
    publisher.publish(message)
node.create_timer(0.02, act)
rclpy.spin(node)
"""


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *command], env=os.environ.copy(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_policy_that_is_killed_or_hangs_is_replaced(ros: Ros, tmp_path: Path, how: signal.Signals) -> None:
    contract = robot_contract()
    node = make_node(ros, tmp_path, contract)
    assert node.trigger_configure() == OK and node.trigger_activate() == OK
    robot = Robot(ros, contract)
    robot.thinks = False
    with running("-c", POLICY) as policy:
        robot.drive()
        policy.send_signal(how)
        robot.expect_stop("stopping", "heartbeat: candidates of cmd_vel lost")
        if how == signal.SIGSTOP:
            policy.send_signal(signal.SIGCONT)
            robot.drive()


@pytest.mark.parametrize("reaction", ["stop", "latch"])
def test_a_candidate_that_is_not_finite_stops(ros: Ros, tmp_path: Path, reaction: str) -> None:
    _, robot = start(ros, tmp_path, not_finite=reaction)
    robot.ask((0.4, float("nan")), robot.now() + PERIOD_NS)
    state = "latched" if reaction == "latch" else "stopping"
    robot.drive_until(lambda: robot.saw(state, "angular.z of cmd_vel not finite"), "a diagnostic")
    assert any(abs(c[0]) < 0.4 for c in robot.commands[-20:]) and np.isfinite(robot.commands).all()
    if reaction == "stop":
        robot.drive()
    else:
        robot.drive_until(lambda: robot.commands[-1] == SAFE, "the safe action")
        assert call(ros, robot, "safety/reset").success
        robot.drive()


@pytest.mark.parametrize("jump_s", [-100.0, 50.0])
def test_a_clock_that_jumps_stops(ros: Ros, tmp_path: Path, jump_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    node, robot = start(ros, tmp_path)
    offset_ns = round(jump_s * 1e9)
    monkeypatch.setattr(node, "_now_ns", lambda: time.time_ns() + offset_ns)
    side = "back" if jump_s < 0 else "ahead"
    robot.drive_until(lambda: robot.commands[-1] == SAFE and robot.saw("stopping"), "a stop")
    assert node.stage is not None and f"jumped {side}" in node.stage.reasons["clock"]
    monkeypatch.setattr(robot, "now", lambda: time.time_ns() + offset_ns)  # all are on the new clock
    robot.drive()


def test_the_services_stop_and_reset(ros: Ros, tmp_path: Path) -> None:
    _, robot = start(ros, tmp_path)
    refused = call(ros, robot, "safety/reset")
    assert not refused.success and refused.message == "nothing is latched"
    assert call(ros, robot, "safety/stop").success
    robot.expect_stop("latched", "stopped by the service")
    robot.silent.add("mast")
    robot.drive_until(lambda: robot.saw("latched", "mast (mast) lost"), "a fault beside the latch")
    refused = call(ros, robot, "safety/reset")
    assert not refused.success and "the cause persists: sensor: mast" in refused.message
    robot.silent.clear()
    robot.drive_until(lambda: not any("lost" in s.message for s in robot.diagnostics[-1:]), "its end")
    assert call(ros, robot, "safety/reset").success
    robot.drive()


def test_deactivate_brings_it_to_rest_and_activate_back(ros: Ros, tmp_path: Path) -> None:
    node, robot = start(ros, tmp_path)
    for _ in range(2):
        robot.commands.clear()
        assert node.trigger_deactivate() == OK
        ros.spin_until(lambda: robot.commands[-2:] == [SAFE, SAFE], "the safe action")
        speeds = [command[0] for command in robot.commands if command != ASKED]
        assert speeds == sorted(speeds, reverse=True) and len(speeds) >= 4, "it slows down at 5 m/s2"
        count = len(robot.commands)
        robot.diagnostics.clear()
        robot.sense()
        robot.ask()
        ros.spin_until(lambda: bool(robot.diagnostics), "a diagnostic")
        assert len(robot.commands) == count, "an inactive stage passes nothing"
        assert node.trigger_activate() == OK
        robot.drive()
    assert node.trigger_deactivate() == OK and node.trigger_cleanup() == OK and node.stage is None
    assert node.trigger_configure() == OK and node.trigger_shutdown() == OK


def test_a_latch_survives_deactivation(ros: Ros, tmp_path: Path) -> None:
    node, robot = start(ros, tmp_path)
    assert call(ros, robot, "safety/stop").success
    assert node.trigger_deactivate() == OK and node.trigger_activate() == OK
    robot.drive_until(lambda: robot.commands[-1:] == [SAFE], "the safe action")
    robot.commands.clear()
    robot.drive_until(lambda: len(robot.commands) > 5, "commands")
    assert set(robot.commands) == {SAFE}


def test_an_error_of_its_own_stops_the_robot(ros: Ros, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node, robot = start(ros, tmp_path)

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("never seen before")

    monkeypatch.setattr(node.stage, "candidate", fail)
    robot.expect_stop("latched", "internal error at a candidate of base")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_told_to_end_stops_the_robot_first(ros: Ros, tmp_path: Path, how: signal.Signals) -> None:
    contract = robot_contract()
    path = tmp_path / "base.yaml"
    path.write_text(contract.to_yaml())
    robot = Robot(ros, contract)
    with running("-m", "vla_ros.program", "safety_node", "--ros-args", "-p", f"contract:={path}") as process:
        robot.drive()
        process.send_signal(how)
        robot.drive_until(lambda: process.poll() is not None, "the process's end")
        ros.spin_until(lambda: robot.commands[-1] == SAFE, "the safe action", 5.0)
        assert process.returncode == 0, process.communicate()[0]
    speeds = [command[0] for command in robot.commands[robot.commands.index(ASKED) :] if command != ASKED]
    assert len(speeds) >= 4 and speeds == sorted(speeds, reverse=True), "it slows down at 5 m/s2"


def test_in_lockstep_it_waits_for_ever_and_answers_at_once(ros: Ros, tmp_path: Path) -> None:
    contract = robot_contract()
    node = make_node(ros, tmp_path, contract, use_sim_time=True)
    assert node.trigger_configure() == OK and node.trigger_activate() == OK
    robot = Robot(ros, contract)
    clock = robot.node.create_publisher(Clock, "/clock", 10)
    ros.spin_until(lambda: clock.get_subscription_count() >= 1 and robot.candidates.get_subscription_count() == 1
                   and all(p.get_subscription_count() for p in robot.sensors.values())
                   and node.count_publishers("/cmd_vel") == 1 and node.count_subscribers("/cmd_vel") == 1,
                   "the graph")  # fmt: skip
    stamps: list[int] = []
    stamp = 10**9
    for k in range(30):
        stamp += 10**9 if k % 10 == 0 else PERIOD_NS  # episodes begin a second after the last one
        clock.publish(Clock(clock=Time(nanoseconds=stamp).to_msg()))
        robot.now = lambda s=stamp: s  # type: ignore[method-assign]
        robot.sense()
        if k == 15:  # a model that thinks for longer than every limit
            until = time.monotonic() + 0.8
            ros.spin_until(lambda until=until: time.monotonic() > until, "the model")
        stamps.append(robot.ask((0.05, 0.0)))
        ros.spin_until(lambda: len(robot.stamps) >= len(stamps), f"the answer to {k}")
    assert robot.stamps == stamps and set(robot.commands) == {(0.05, 0.0)}


def test_it_starts_without_torch(domain: int) -> None:
    program = "import sys, vla_ros.safety_node; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "contract and checkpoint are empty"), (["-p", "contract:=nobody"], "no contract 'nobody'"),
     (["-p", "contract:=diff_drive", "-p", "stop_timeout_s:=99.0"], "stop_timeout_s")],
)  # fmt: skip
def test_what_cannot_start_says_why(domain: int, arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vla_ros.safety_node", "--ros-args", *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
