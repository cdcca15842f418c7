"""The safety stage before a vehicle: what a sane driver plans passes byte for byte, nonsense does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vla_core.commands import decode, encode
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.observation import writing
from vla_core.runtime.follower import TrajectoryFollower
from vla_core.runtime.safety import SafetyStage
from vla_core.sim.base import View
from vla_core.sim.worlds import make_world

CONTRACT = RobotContract.load("driving")
ACTION = CONTRACT.actions["trajectory"]
START_NS = 10 * NANOSECONDS


@pytest.mark.parametrize("kind", ["turn_left", "roundabout", "overtake", "stop_behind"])
def test_the_experts_trajectories_pass_unchanged(kind: str) -> None:
    needed = {name: CONTRACT.observations[name] for name in ("odom", "instruction")}
    blind = dataclasses.replace(CONTRACT, observations=needed, any_of=())
    world, follower = make_world(f"driving:{kind}", blind, View()), TrajectoryFollower(blind)
    world.reset(10_001)
    safety: SafetyStage | None = None
    for tick in range(150):
        now_ns = START_NS + tick * CONTRACT.step_ns
        for message in world.observe_state(now_ns):
            follower.add_odometry(message.data)
            safety = safety or SafetyStage(CONTRACT)
            safety.sensor("odom", message.data, now_ns, now_ns)
        assert safety is not None
        plan = encode(ACTION, now_ns, world.expert_rows(), CONTRACT.chunk_step_ns)  # type: ignore[attr-defined]
        passed = safety.candidate("trajectory", plan, now_ns, now_ns)
        assert passed == {ACTION.topic: plan}, f"tick {tick}: {safety.reasons}"
        assert not safety.tick(now_ns, now_ns)
        follower.add_trajectory(plan)
        world.step(follower.command(now_ns))
        if world.success:
            break
    assert safety is not None and safety.counts["passed"] > 50
    world.close()


def plan(speed: float, rows: int = 7) -> np.ndarray:
    """Straight on (rows, 4)."""
    x = 0.5 * speed * np.arange(rows)
    return np.stack([x, 0 * x, 0 * x, np.full(rows, speed)], axis=1)


def odometry(stamp_ns: int, x: float, speed: float) -> bytes:
    return writing.odometry(stamp_ns, (x, 0, 0, 0, 0, 0, 1.0), (speed, 0.0, 0.0), (0.0, 0.0, 0.0))


def test_a_leap_is_held_back() -> None:
    rows = plan(8.0)
    rows[3:, 1] += 12.0  # 12 m sideways within half a second
    safety = SafetyStage(CONTRACT)
    safety.sensor("odom", odometry(START_NS, 0.0, 8.0), START_NS, START_NS)
    sent = encode(ACTION, START_NS, rows, CONTRACT.chunk_step_ns)
    passed = decode(ACTION, safety.candidate("trajectory", sent, START_NS, START_NS)[ACTION.topic])
    assert np.abs(np.diff(passed[:, 1])).max() <= 7.5 + 1e-9 and passed[-1, 1] == pytest.approx(12.0)
    np.testing.assert_array_equal(passed[:, [0, 2, 3]], rows[:, [0, 2, 3]])


def test_a_lost_sensor_brings_the_vehicle_to_a_stand() -> None:
    safety, follower = SafetyStage(CONTRACT), TrajectoryFollower(CONTRACT)
    now_ns, x, speed, speeds = START_NS, 0.0, 8.0, []
    for tick in range(40):
        now_ns += CONTRACT.step_ns
        follower.add_odometry(odometry(now_ns, x, speed))
        if tick < 5:  # then nothing more reaches the safety stage
            safety.sensor("odom", odometry(now_ns, x, speed), now_ns, now_ns)
        sent = encode(ACTION, now_ns, plan(8.0), CONTRACT.chunk_step_ns)
        frame = safety.candidate("trajectory", sent, now_ns, now_ns) | safety.tick(now_ns, now_ns)
        if frame:
            assert not follower.add_trajectory(frame[ACTION.topic])
        wanted = follower.command(now_ns)[1]
        speed += float(np.clip(wanted - speed, -1.2, 0.6))  # what brakes and motor can do in a tick
        x += 0.2 * speed
        speeds.append(speed)
    assert min(speeds[:5]) > 7.5 and safety.state == "stopping"
    assert speeds[-15:] == [0.0] * 15
