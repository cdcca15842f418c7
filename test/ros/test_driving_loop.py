"""A vehicle's closed loop on topics: trajectories, the follower, drive commands; faults, disturbances and clocks."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rclpy.qos import QoSProfile, ReliabilityPolicy

from vla_core.commands import decode
from vla_core.contract import NANOSECONDS
from vla_core.observation.ego_motion import matrix
from vla_core.observation.messages import deserialize, header_stamp_ns
from vla_core.sim.collect import EXECUTED
from vla_core.sim.worlds import SIM_REGISTRY
from vla_ros.bridge import EPISODE_QOS, message_class
from vla_ros.frames import correction
from vla_ros.simulator_node import SimulatorError, SimulatorNode
from vla_ros.trajectory_follower_node import TrajectoryFollowerNode

from . import toy_vehicle
from .conftest import Ros, parameters
from .toy_vehicle import CONTRACT, DRIVE, ODOMETRY, PLAN, WORDS

HEARD = {
    "odom": ODOMETRY, "camera/image_raw": "sensor_msgs/msg/Image", "instruction": "std_msgs/msg/String",
    "/tf_static": "tf2_msgs/msg/TFMessage", "ground_truth/odom": ODOMETRY, PLAN.topic: PLAN.type,
    DRIVE.topic: DRIVE.type, EXECUTED + DRIVE.topic: DRIVE.type, "episode": "vla_ros/msg/Episode",
    "tick": "vla_ros/msg/Tick", "/tf": "tf2_msgs/msg/TFMessage",
}  # fmt: skip
LATCHED = ("instruction", "/tf_static", "episode", "tick")


@dataclass
class Run:
    """What one run published, in the order in which a listener heard it, and how it ended."""

    heard: list[tuple[str, bytes]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    world: Any = None

    def of(self, topic: str) -> list[bytes]:
        return [data for name, data in self.heard if name == topic]

    def stamps(self, topic: str) -> list[int]:
        return [int(header_stamp_ns(HEARD[topic], data) or 0) for data in self.of(topic)]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    before = dict(SIM_REGISTRY)
    toy_vehicle.register()
    yield
    SIM_REGISTRY.clear()
    SIM_REGISTRY.update(before)


def drive(domain: int, folder: Path, **options: Any) -> Run:
    """The expert drives the toy through the follower, in one process; every message of the loop is kept."""
    folder.mkdir(exist_ok=True)
    contract = toy_vehicle.saved(folder)
    mode = "synchronous" if options.setdefault("clock", "lockstep") == "lockstep" else "realtime"
    ros, run = Ros(domain), Run()
    simulator = ros.add(SimulatorNode(context=ros.context, parameter_overrides=parameters(
        contract=contract, task="toy_vehicle", driver="expert", results=str(folder / "results.json"),
        wait_for=["trajectory_follower", "listener"], **options,
    )))  # fmt: skip
    run.world = simulator.world
    follower = ros.add(TrajectoryFollowerNode(context=ros.context, parameter_overrides=parameters(
        contract=contract, mode=mode)))  # fmt: skip
    listener = ros.node("listener")
    for topic, type_name in HEARD.items():
        qos = EPISODE_QOS if topic in LATCHED else QoSProfile(depth=500, reliability=ReliabilityPolicy.BEST_EFFORT)
        keep = functools.partial(lambda topic, data: run.heard.append((topic, data)), topic)
        listener.create_subscription(message_class(type_name), topic, keep, qos, raw=True)
    try:
        assert follower.autostart()
        assert simulator.run(ros.executor, lambda: False) == 0
        ros.spin_until(lambda: len(run.of("episode")) == 2 * options.get("episodes", 1), "the last mark")
        for _ in range(50):  # what was acknowledged lies in the queues
            ros.executor.spin_once(timeout_sec=0.0)
    finally:
        simulator.stop()
        follower.stop()
        ros.close()
    run.results = json.loads((folder / "results.json").read_text())
    return run


def test_the_expert_reaches_the_goal_through_the_follower(domain: int, tmp_path: Path) -> None:
    run = drive(domain, tmp_path, episodes=2, seed=3, video=str(tmp_path / "drive.mp4"))
    assert [episode["success"] for episode in run.results["episodes"]] == [True, True]
    first = run.results["episodes"][0]
    assert first["instructions"] == list(WORDS) and first["seconds"] == pytest.approx(first["steps"] / 5)
    assert first["details"] == {"driven_m": pytest.approx(12, abs=1)}
    drives, plans, ticks = run.stamps(DRIVE.topic), run.stamps(PLAN.topic), run.stamps("tick")
    assert drives == plans == ticks and len(ticks) == sum(episode["steps"] for episode in run.results["episodes"])
    assert run.stamps("ground_truth/odom") == ticks and set(ticks) <= set(run.stamps("odom"))
    assert np.diff(run.stamps("odom")).min() > 0
    np.testing.assert_array_equal(run.world.obeyed, [decode(DRIVE, data)[0] for data in run.of(DRIVE.topic)])
    assert len(run.of("/tf_static")) == 2 and not run.of(EXECUTED + DRIVE.topic)
    frames = [deserialize("tf2_msgs/msg/TFMessage", data).transforms[0] for data in run.of("/tf")]
    assert {(t.header.frame_id, t.child_frame_id) for t in frames} == {("odom", "base_link"), ("map", "odom")}
    assert len(frames) == 2 * len(ticks)
    assert (tmp_path / "drive.mp4").stat().st_size > 500 and len(run.world.shown) == len(plans)


def test_new_words_come_before_the_observation_they_are_about(domain: int, tmp_path: Path) -> None:
    run = drive(domain, tmp_path, seed=1)
    words = [deserialize("std_msgs/msg/String", data).data for data in run.of("instruction")]
    assert words == list(WORDS)
    truth = [deserialize(ODOMETRY, data) for data in run.of("ground_truth/odom")]
    travelled = [message.pose.pose.position.x for message in truth]
    places = [place for place, (topic, _) in enumerate(run.heard) if topic == "instruction"]
    ticks_before = sum(topic == "tick" for topic, _ in run.heard[: places[1]])
    assert travelled[ticks_before - 1] < 6.5 and travelled[ticks_before] > 5.5


def test_lockstep_repeats_exactly(domain: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"episodes": 2, "seed": 5, "disturbance": ["share=0.4 scale=0.3"],
                               "faults": ["camera=delayed:0.3@1", "odom=frozen@0.5-0.7"]}  # fmt: skip
    first, second = (drive(domain, tmp_path / name, **options) for name in ("a", "b"))
    for topic in HEARD:
        assert first.of(topic) == second.of(topic), topic
    assert first.results == second.results
    other = drive(domain, tmp_path / "c", **{**options, "seed": 6})
    assert other.of(DRIVE.topic) != first.of(DRIVE.topic)


def test_disturbances_are_executed_and_the_label_stays(domain: int, tmp_path: Path) -> None:
    run = drive(domain, tmp_path, seed=4, disturbance=["share=0.5", "scale=0.4 entries=[steering_angle]"])
    asked = np.array([decode(DRIVE, data)[0] for data in run.of(DRIVE.topic)])
    executed = np.array([decode(DRIVE, data)[0] for data in run.of(EXECUTED + DRIVE.topic)])
    np.testing.assert_allclose(run.world.obeyed, executed, atol=1e-6)  # the message holds float32
    moved = np.abs(executed - asked)
    assert moved[:, 0].max() > 0.02 and not moved[:, 1].any()
    run.world.reset(4)
    rows = run.world.expert_rows()
    assert all(np.allclose(decode(PLAN, data), rows) for data in run.of(PLAN.topic)), "the expert's, whatever happens"
    assert run.results["disturbance"]["share"] == 0.5


def test_without_odometry_the_vehicle_brakes_and_lockstep_goes_on(domain: int, tmp_path: Path) -> None:
    run = drive(domain, tmp_path, seed=2, faults=["odom=dropped@1.5", "camera=dropped"], max_steps=25)
    assert not run.of("camera/image_raw") and run.results["faults"] == ["odom=dropped@1.5", "camera=dropped"]
    assert max(run.stamps("odom")) < run.stamps("tick")[0] + 1.5 * NANOSECONDS
    (episode,) = run.results["episodes"]
    assert not episode["success"] and episode["steps"] == 25
    speeds = np.array(run.world.obeyed)[:, 1]
    assert speeds[6] > 3 and not speeds[15:].any(), "it stands, and did not wait for what never comes"


def test_realtime_sends_what_sensors_measured_at_the_end_of_short_steps(domain: int, tmp_path: Path) -> None:
    run = drive(domain, tmp_path, clock="realtime", realtime_rate_hz=25.0, seed=2, max_steps=8)
    stamps = np.array(run.stamps("odom"))
    assert np.diff(stamps).min() > 0
    (episode,) = run.results["episodes"]
    assert episode["steps"] == 8 and episode["seconds"] == pytest.approx(1.6)
    assert len(run.of("ground_truth/odom")) == 40 and len(run.world.obeyed) == 40
    assert len(run.of(PLAN.topic)) == 8 and len(run.of("camera/image_raw")) == 8
    assert max(command[1] for command in run.world.obeyed) > 2, "it drives"
    assert not run.of("tick")


def test_who_does_not_answer_is_named(ros: Ros, tmp_path: Path) -> None:
    contract = toy_vehicle.saved(tmp_path)
    simulator = ros.add(SimulatorNode(context=ros.context, parameter_overrides=parameters(
        contract=contract, task="toy_vehicle", driver="expert", clock="lockstep", wait_timeout_s=0.3)))  # fmt: skip
    with pytest.raises(SimulatorError, match="in vain for a publisher of 'drive', a subscriber of 'planning/traj"):
        simulator.run(ros.executor, lambda: False)
    with pytest.raises(Exception, match="fault 'lidar=dropped': 'toy_vehicle' has no sensor 'lidar'; choices: camera"):
        SimulatorNode(context=ros.context, parameter_overrides=parameters(
            contract=contract, task="toy_vehicle", faults=["lidar=dropped"]))  # fmt: skip
    with pytest.raises(Exception, match="expected 0 or a multiple of the contract's 5"):
        SimulatorNode(context=ros.context, parameter_overrides=parameters(
            contract=contract, task="toy_vehicle", realtime_rate_hz=12.0))  # fmt: skip


def test_the_map_is_where_the_odometrys_drift_is_taken_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        true, seen = rng.normal(size=(2, 7))
        true[3:], seen[3:] = true[3:] / np.linalg.norm(true[3:]), seen[3:] / np.linalg.norm(seen[3:])
        np.testing.assert_allclose(matrix(correction(true, seen)) @ matrix(seen), matrix(true), atol=1e-12)


def test_the_contract_of_the_toy_is_whole() -> None:
    assert CONTRACT.from_yaml(CONTRACT.to_yaml()) == CONTRACT
