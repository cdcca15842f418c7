"""The vehicle's graphs as processes, on the real world: what is recorded is what was seen, and a policy drives."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.commands import decode, encode
from vla_core.contract import RobotContract
from vla_core.data import bag as bags
from vla_core.data.bag import find_bags
from vla_core.observation.messages import deserialize
from vla_core.runtime.follower import TrajectoryFollower
from vla_core.sim.base import View
from vla_core.sim.collect import EXECUTED
from vla_core.sim.faults import Faults
from vla_core.sim.noise import Disturbance, Noise
from vla_core.sim.worlds import make_world
from vla_ros.graph import load_graph
from vla_ros.up import run_graph

from .test_policy_vehicle import save

CONTRACT = RobotContract.load("driving")
PLAN = CONTRACT.actions["trajectory"]
assert CONTRACT.following is not None
DRIVE = CONTRACT.following.command
Recorded = dict[str, list[tuple[int, bytes]]]


def run(name: str, **arguments: Any) -> None:
    lines: list[str] = []
    status = run_graph(load_graph(name), arguments, write=lines.append)
    assert status == 0, "\n".join(lines)


def in_one_process(seed: int, steps: int, start_ns: int, faults: list[str], noise: Noise) -> Recorded:
    """The same drive without ROS."""
    world, follower = make_world("driving:mixed", CONTRACT, View(size=32)), TrajectoryFollower(CONTRACT)
    world.reset(seed)
    sensors = Faults.parse(faults, CONTRACT).begin(start_ns)
    disturbance = Disturbance(noise, DRIVE, np.random.default_rng([seed, 1]))
    seen: Recorded = defaultdict(list)
    for tick in range(steps):
        now_ns = start_ns + tick * CONTRACT.step_ns
        arrived = sensors.apply(world.observe_state(now_ns) + world.observe_camera(now_ns), now_ns)
        for message in [*arrived, *world.ground_truth(now_ns)]:  # type: ignore[attr-defined]
            if message.stamp_ns >= start_ns:
                seen[message.topic].append((message.stamp_ns, message.data))
            if message.topic == "odom":
                follower.add_odometry(message.data)
        plan = encode(PLAN, now_ns, world.expert_rows(), CONTRACT.chunk_step_ns)  # type: ignore[attr-defined]
        follower.add_trajectory(plan)
        drive = encode(DRIVE, now_ns, follower.command(now_ns)[None], CONTRACT.step_ns)
        values = disturbance.on(decode(DRIVE, drive)[0])
        executed = encode(DRIVE, now_ns, values[None], CONTRACT.step_ns)
        for topic, data in ((PLAN.topic, plan), (DRIVE.topic, drive), (EXECUTED + DRIVE.topic, executed)):
            seen[topic].append((now_ns, data))
        world.step(values)
    world.close()
    return seen


def test_a_recorded_drive_is_that_of_one_process_bit_by_bit(domain: int, tmp_path: Path) -> None:
    faults, noise = ["lidar=dropped@0.5-1", "imu=delayed:0.2", "back=frozen@1"], Noise(share=0.5, scale=0.2)
    run("record_drive", output=str(tmp_path / "bags"), episodes=1, seed=2, max_steps=12, camera_size=32,
        disturbance="share=0.5 scale=0.2", faults=" ".join(faults), results=str(tmp_path / "results.json"),
        also="/tf_static=tf2_msgs/msg/TFMessage ground_truth/odom=nav_msgs/msg/Odometry "
             "ground_truth/light=std_msgs/msg/String "
             f"{EXECUTED}drive=ackermann_msgs/msg/AckermannDriveStamped")  # fmt: skip
    (path,) = find_bags([tmp_path / "bags"])
    heard: Recorded = defaultdict(list)
    for message in bags.read(path):
        heard[message.topic].append((message.stamp_ns, message.data))
    start_ns = heard[PLAN.topic][0][0]
    seen = in_one_process(2, 12, start_ns, faults, noise)
    del seen["ground_truth/objects"]  # was not asked for
    assert set(heard) == {*seen, "episode", "instruction", "/tf_static"}
    for topic, sent in seen.items():
        assert [stamp for stamp, _ in heard[topic]] == [stamp for stamp, _ in sorted(sent)], topic
        for (_, came), (_, went) in zip(heard[topic], sorted(sent), strict=True):
            assert came[: len(went)] == went and not any(came[len(went) :]), f"{topic}: but for the wire's padding"
    transforms = deserialize("tf2_msgs/msg/TFMessage", heard["/tf_static"][0][1]).transforms
    frames = {stream.frame_id for stream in CONTRACT.observations.values() if stream.frame_id}
    assert frames - {"odom", "imu_link"} <= {transform.child_frame_id for transform in transforms}
    assert json.loads((tmp_path / "results.json").read_text())["episodes"][0]["steps"] == 12


def test_behind_the_safety_node_lockstep_goes_on_when_odometry_is_lost(domain: int, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "checkpoint", CONTRACT)
    run("drive_demo", checkpoint=str(checkpoint), clock="lockstep", inference="synchronous", following="synchronous",
        use_sim_time=True, episodes=2, max_steps=10, camera_size=32, safety=True, markers=True,
        faults="lidar=frozen odom=dropped@1", task="driving:straight",
        results=str(tmp_path / "results.json"))  # fmt: skip
    episodes = json.loads((tmp_path / "results.json").read_text())["episodes"]
    assert [episode["steps"] for episode in episodes] == [10, 10]
    assert all(0 <= episode["details"]["route_completion"] < 1 for episode in episodes)


def test_one_process_drives_as_the_graph_does(domain: int, tmp_path: Path) -> None:
    """The evaluation without ROS is the same drive, figure by figure, with a sensor that fails on the way."""
    checkpoint, faults = save(tmp_path / "checkpoint", CONTRACT), "front=dropped@0.6-1.6 lidar=frozen radar_*=stuck"
    run("drive_demo", checkpoint=str(checkpoint), clock="lockstep", inference="synchronous", following="synchronous",
        use_sim_time=True, episodes=1, seed=10_003, max_steps=12, camera_size=32, faults=faults,
        task="driving:turn_left", results=str(tmp_path / "results.json"))  # fmt: skip
    (over_ros,) = json.loads((tmp_path / "results.json").read_text())["episodes"]
    from vla_core.evaluation.closed_loop import run_episode
    from vla_core.runtime.core import PolicyCore
    from vla_core.runtime.policy import CheckpointPolicy

    world = make_world("driving:turn_left", CONTRACT, View(size=32))
    # Sampling noise follows the stamps: a run over ROS starts at one second.
    result = run_episode(world, PolicyCore(CheckpointPolicy.load(checkpoint)), None, 10_003, 12, start_ns=10**9,
                         faults=Faults.parse(faults.split(), CONTRACT))  # fmt: skip
    world.close()
    assert result.details == over_ros["details"] and result.details["km"] > 0
    assert list(result.said) == over_ros["instructions"] and result.steps == over_ros["steps"] == 12


def test_a_policy_drives_in_real_time(domain: int, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "checkpoint", CONTRACT)
    run("drive_demo", checkpoint=str(checkpoint), episodes=1, max_steps=15, camera_size=32, safety=True,
        realtime_rate_hz=10.0, task="driving:straight", results=str(tmp_path / "results.json"))  # fmt: skip
    (episode,) = json.loads((tmp_path / "results.json").read_text())["episodes"]
    assert episode["steps"] == 15 and episode["details"]["km"] > 0, "the untrained policy moves, somewhere"
