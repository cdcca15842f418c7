"""The policy node of a vehicle: in lockstep every observation is answered by a trajectory, and a refusal by a stop."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.serialization import deserialize_message
from rclpy.time import Time
from std_msgs.msg import String
from tf2_msgs.msg import TFMessage
from vla_ros.msg import Episode, Tick, Trajectory

from vla_core.checkpoint import Checkpoint, Execution, PolicyConfig
from vla_core.commands import decode
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.errors import VlaError
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig
from vla_core.model.vla.mini_vla import MiniVLA, MiniVLAConfig
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.model.vlm.vision_encoder import TinyCNNConfig
from vla_core.observation import messages, writing
from vla_core.observation.builder import CloudSpec, ImageSize, ObservationSpec
from vla_core.observation.normalizer import Normalization, Normalizer
from vla_ros.bridge import COMMAND_QOS, EPISODE_QOS, every_message, message_class, stream_qos
from vla_ros.lockstep import TICK_QOS
from vla_ros.sensor_setup import SensorSetup, wait_for_sensors

from .conftest import Ros, parameters
from .robot import make_policy

OK = TransitionCallbackReturn.SUCCESS
CONTRACT = RobotContract.load("driving")
ACTION = CONTRACT.actions["trajectory"]
TICK = NANOSECONDS // 5
START = 10 * NANOSECONDS
SPEC = ObservationSpec(
    images={"front": ImageSize(height=6, width=8)}, state=("motion", "odom"), instruction="instruction"
)


def save(path: Path, contract: RobotContract = CONTRACT, execution: Execution | None = None) -> Path:
    """An untrained policy that sees a camera, the odometry and the words."""
    torch.manual_seed(0)
    state = sum(len(contract.observations[name].names) for name in SPEC.state)
    config = MiniVLAConfig(
        cameras=("front",), state_dim=state, action_dim=4, horizon=7, vocab_size=4, d_model=32,
        vision=TinyCNNConfig(d_model=32, channels=(8, 16)), head=MLPHeadConfig(hidden_dim=64),
    )  # fmt: skip
    tokenizer = WordTokenizer()
    tokenizer.fit(["turn left"])
    ones = {"mean": [0.0] * state, "std": [1.0] * state, "min": [-1.0] * state, "max": [1.0] * state}
    action = {
        "mean": [5.0, 0.0, 0.0, 5.0],
        "std": [1.0] * 4,
        "min": [0.0, -5.0, -1.0, 0.0],
        "max": [30.0, 5.0, 1.0, 9.0],
    }
    Checkpoint(
        config=PolicyConfig(model=config, observation=SPEC, execution=execution or Execution(steps=1, period_s=0.2)),
        model=MiniVLA(config), normalizer=Normalizer(Normalization(), {"state": ones, "action": action}),
        tokenizer=tokenizer, contract=contract,
    ).save(path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def vehicle_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("vehicle") / "random")


class Vehicle:
    """A simulator's sensors and ticks; keeps the trajectories as (stamp, rows)."""

    def __init__(self, ros: Ros) -> None:
        self.ros, self.node = ros, ros.node("vehicle")
        self.sensors = {
            name: self.node.create_publisher(message_class(s.type), s.topic, stream_qos(every_message(s), 100))
            for name, s in CONTRACT.observations.items() if name in ("front", "odom", "instruction")
        }  # fmt: skip
        self.ticks = self.node.create_publisher(Tick, "tick", TICK_QOS)
        self.episodes = self.node.create_publisher(Episode, "episode", EPISODE_QOS)
        self.plans: list[tuple[int, np.ndarray]] = []
        self.diagnostics: list[Any] = []
        self.node.create_subscription(DiagnosticArray, "/diagnostics", lambda m: self.diagnostics.extend(m.status), 10)
        self.node.create_subscription(Trajectory, ACTION.topic, self._on_plan, COMMAND_QOS, raw=True)
        self.sensors["instruction"].publish(String(data="turn left"))

    def _on_plan(self, data: bytes) -> None:
        stamp_ns = messages.header_stamp_ns(ACTION.type, data)
        assert stamp_ns is not None
        self.plans.append((stamp_ns, decode(ACTION, data)))

    def connect(self, policy: Any, lockstep: bool = True) -> None:
        publishers = (*self.sensors.values(), self.episodes, *([self.ticks] if lockstep else []))
        self.ros.spin_until(lambda: all(p.get_subscription_count() for p in publishers)
                            and policy.count_publishers("tick") > 0, "the policy")  # fmt: skip
        # No tick lists what was said: it must be there before the first one.
        self.ros.spin_until(lambda: policy.core.buffer.newest_ns("instruction") is not None, "the instruction")

    def see(self, at_ns: int, *, front: bool = True, odometry: tuple[int, ...] = (40, 20, 0)) -> dict[str, int]:
        """Sensor messages of a tick; odometry that many ms before it. Returns the newest stamp per topic."""
        newest = {}
        if front:
            pixels = np.full((6, 8, 3), 100, dtype=np.uint8)
            frame = CONTRACT.observations["front"].frame_id
            self.sensors["front"].publish(messages.image(at_ns, pixels, str(frame)))
            newest[CONTRACT.observations["front"].topic] = at_ns
        for before_ms in odometry:
            message = Odometry(child_frame_id="base_link")
            message.header.stamp = Time(nanoseconds=at_ns - before_ms * 1_000_000).to_msg()
            message.header.frame_id = "odom"
            self.sensors["odom"].publish(message)
            newest["odom"] = at_ns - before_ms * 1_000_000
        return newest

    def tick(self, at_ns: int, newest: dict[str, int]) -> None:
        message = Tick(topics=list(newest), newest=[Time(nanoseconds=ns).to_msg() for ns in newest.values()])
        message.header.stamp = Time(nanoseconds=at_ns).to_msg()
        self.ticks.publish(message)

    def answer(self, at_ns: int) -> np.ndarray:
        """The trajectory of a stamp, once it is there."""
        self.ros.spin_until(lambda: any(stamp == at_ns for stamp, _ in self.plans), f"the answer to {at_ns}")
        (rows,) = [rows for stamp, rows in self.plans if stamp == at_ns]
        return rows


def acting(ros: Ros, checkpoint: Path) -> tuple[Any, Vehicle]:
    vehicle = Vehicle(ros)
    policy = make_policy(ros, checkpoint, inference="synchronous")
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK, policy.fault
    vehicle.connect(policy)
    return policy, vehicle


def test_every_tick_is_answered_by_one_trajectory(ros: Ros, vehicle_checkpoint: Path) -> None:
    """Though the rows are half a second apart, and several messages of a stream come between two ticks."""
    policy, vehicle = acting(ros, vehicle_checkpoint)
    for k in range(5):
        at = START + k * TICK
        vehicle.tick(at, vehicle.see(at, odometry=tuple(range(180, -1, -20))))
        rows = vehicle.answer(at)
        assert rows.shape == (7, 4)
        assert (rows >= ACTION.low).all() and (rows <= ACTION.high).all()
    assert [stamp for stamp, _ in vehicle.plans] == [START + k * TICK for k in range(5)]
    assert policy.counts.chunks == 5 and policy.counts.safe_commands == 0


def test_an_answer_waits_for_what_the_tick_lists(ros: Ros, vehicle_checkpoint: Path) -> None:
    _, vehicle = acting(ros, vehicle_checkpoint)
    vehicle.tick(START, {"odom": START, "camera/front/image_raw": START})
    vehicle.see(START, front=False)
    for _ in range(20):
        ros.executor.spin_once(timeout_sec=0.01)
    assert vehicle.plans == []
    vehicle.see(START, odometry=())
    assert len(vehicle.answer(START)) == 7


def test_a_camera_that_is_lost_is_masked_and_all_of_any_of_stops(ros: Ros, tmp_path: Path) -> None:
    """Of ``any_of``, this policy sees the camera alone."""
    checkpoint = save(tmp_path / "policy", dataclasses.replace(CONTRACT, any_of=("front",)))
    policy, vehicle = acting(ros, checkpoint)
    vehicle.tick(START, vehicle.see(START))
    assert len(vehicle.answer(START)) == 7
    for k in (1, 2):  # its last picture still counts for 0.5 s
        vehicle.tick(START + k * TICK, vehicle.see(START + k * TICK, front=False))
        assert len(vehicle.answer(START + k * TICK)) == 7
    blind = START + 3 * TICK
    vehicle.tick(blind, vehicle.see(blind, front=False))
    assert vehicle.answer(blind).tolist() == [[0.0, 0.0, 0.0, 0.0]], "one row: brake to a stand"
    assert "any_of" in policy.fault
    back = START + 4 * TICK
    vehicle.tick(back, vehicle.see(back))
    assert len(vehicle.answer(back)) == 7


def test_an_old_tick_is_not_answered_again_in_the_next_episode(ros: Ros, vehicle_checkpoint: Path) -> None:
    policy, vehicle = acting(ros, vehicle_checkpoint)
    vehicle.tick(START, vehicle.see(START))
    vehicle.answer(START)
    second = START + NANOSECONDS
    mark = Episode(state=Episode.START)
    mark.header.stamp = Time(nanoseconds=second).to_msg()
    vehicle.episodes.publish(mark)
    ros.spin_until(lambda: policy._episode_ns == second, "the mark")
    for _ in range(10):
        ros.executor.spin_once(timeout_sec=0.02)
    vehicle.tick(second, vehicle.see(second))
    assert len(vehicle.answer(second)) == 7
    assert [stamp for stamp, _ in vehicle.plans] == [START, second]


def test_a_policy_that_plans_too_seldom_for_lockstep_is_refused(ros: Ros, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "policy", execution=Execution(steps=1, period_s=0.4))
    policy = make_policy(ros, checkpoint, inference="synchronous")
    assert policy.trigger_configure() != OK
    assert "a new trajectory every 0.4 s" in policy.fault and "['period_s=0.2']" in policy.fault
    policy.set_parameters(parameters(execution=["period_s=0.2"]))
    assert policy.trigger_configure() == OK


def test_in_realtime_plans_leave_once_an_observation_and_a_loss_stops(ros: Ros, vehicle_checkpoint: Path) -> None:
    vehicle = Vehicle(ros)
    policy = make_policy(ros, vehicle_checkpoint)
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK, policy.fault
    vehicle.connect(policy, lockstep=False)
    last = 0.0

    def planned() -> bool:
        nonlocal last
        if time.monotonic() - last > 0.05:
            last = time.monotonic()
            vehicle.see(vehicle.node.get_clock().now().nanoseconds, odometry=(0,))
        return len([rows for _, rows in vehicle.plans if len(rows) == 7]) >= 4

    ros.spin_until(planned, "plans")
    stamps = [stamp for stamp, rows in vehicle.plans if len(rows) == 7]
    assert min(np.diff(stamps)) >= TICK, "period_s"
    ros.spin_until(lambda: len(vehicle.plans[-1][1]) == 1, "the stop")
    assert vehicle.plans[-1][1].tolist() == [[0.0, 0.0, 0.0, 0.0]]
    assert vehicle.plans[-1][0] > stamps[-1]


# The setup of the sensors.


FRAME = str(CONTRACT.observations["front"].frame_id)


def sees_wrongly(ros: Ros, checkpoint: Path, frame_id: str = FRAME) -> tuple[Any, Vehicle]:
    """A policy that has acted, and whose camera then turns out to be set up wrongly from its first message."""
    policy, vehicle = acting(ros, checkpoint)
    pixels = np.full((6, 8, 3), 100, dtype=np.uint8)
    vehicle.sensors["front"].publish(messages.image(START, pixels, frame_id))
    vehicle.tick(START, {"camera/front/image_raw": START, **vehicle.see(START, front=False)})
    return policy, vehicle


def test_a_stream_that_is_set_up_wrongly_is_never_acted_on(ros: Ros, vehicle_checkpoint: Path) -> None:
    policy, vehicle = sees_wrongly(ros, vehicle_checkpoint, "camera_front")
    assert vehicle.answer(START).tolist() == [[0.0, 0.0, 0.0, 0.0]]
    assert "header.frame_id: found 'camera_front', expected the contract's" in policy.fault
    ros.spin_until(lambda: any("found 'camera_front'" in d.message for d in vehicle.diagnostics), "the diagnostic")
    later = START + TICK
    vehicle.tick(later, vehicle.see(later))
    assert vehicle.answer(later).tolist() == [[0.0, 0.0, 0.0, 0.0]], "a good message does not set up the driver"
    assert policy.trigger_deactivate() == OK and policy.trigger_cleanup() == OK
    assert policy.trigger_configure() == OK and policy.trigger_activate() == OK
    vehicle.connect(policy)
    again = later + TICK
    vehicle.tick(again, vehicle.see(again))
    assert len(vehicle.answer(again)) == 7


@contextmanager
def speaking(send: Callable[[], None]) -> Iterator[None]:
    """Call ``send`` from a thread all along, as drivers do while a node configures."""
    done = threading.Event()

    def speak() -> None:
        while not done.wait(0.05):
            send()

    thread = threading.Thread(target=speak)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_configure_waits_for_the_sensors_and_names_all_that_is_missing(ros: Ros, vehicle_checkpoint: Path) -> None:
    vehicle = Vehicle(ros)
    policy = make_policy(ros, vehicle_checkpoint, check_sensors_s=0.2)
    assert policy.trigger_configure() != OK
    first, *rest = policy.fault.splitlines()
    assert first == "the sensors are not as the policy needs them:"
    assert [line.split(":")[0] for line in rest] == [
        f"front (camera/front/image_raw, frame '{FRAME}')", "motion (odom, frame 'odom')", "odom (odom, frame 'odom')"
    ]  # fmt: skip
    assert all("found nothing, expected" in line for line in rest)
    assert vehicle.sensors["front"].get_subscription_count() == 0, "nothing half-made stays behind"


def test_configure_goes_on_as_soon_as_all_sensors_have_spoken(ros: Ros, vehicle_checkpoint: Path) -> None:
    vehicle = Vehicle(ros)
    policy = make_policy(ros, vehicle_checkpoint, check_sensors_s=60.0)
    with speaking(lambda: vehicle.see(vehicle.node.get_clock().now().nanoseconds)):
        begun = time.monotonic()
        assert policy.trigger_configure() == OK, policy.fault
        assert time.monotonic() - begun < 50


@pytest.mark.parametrize(("shift", "well"), [(0.0, True), (0.3, False)])
def test_transforms_are_held_against_the_checkpoints_mounts(ros: Ros, tmp_path: Path, shift: float, well: bool) -> None:
    """Odometry's child frame is where clouds of past ticks are moved by: they have a mount of their own."""
    mount = (1.0, 0.0, 1.8, 0.0, 0.0, 0.0, 1.0)
    spec = dataclasses.replace(
        SPEC, clouds={"lidar": CloudSpec(max_points=8, ego_motion="odom", mount=mount)}, history=2
    )
    node = ros.node("robot")
    publisher = node.create_publisher(TFMessage, "/tf_static", TICK_QOS)
    told = writing.transforms(0, "base_link", {"lidar": (1.0 + shift, *mount[1:])})
    publisher.publish(deserialize_message(told, TFMessage))
    sensors = {
        name: node.create_publisher(message_class(s.type), s.topic, stream_qos(every_message(s), 100))
        for name, s in CONTRACT.observations.items() if name in ("front", "odom", "lidar")
    }  # fmt: skip
    columns = dict.fromkeys(CONTRACT.observations["lidar"].names, np.ones(4, dtype=np.float32))

    def send() -> None:
        stamp = node.get_clock().now().nanoseconds
        sensors["front"].publish(messages.image(stamp, np.zeros((6, 8, 3), dtype=np.uint8), FRAME))
        sensors["lidar"].publish(writing.point_cloud(stamp, columns, "lidar"))
        sensors["odom"].publish(writing.odometry(stamp, (0, 0, 0, 0, 0, 0, 1), (0, 0, 0), (0, 0, 0)))

    checker = ros.node("checker")
    with speaking(send):
        if well:
            wait_for_sensors(checker, CONTRACT, spec, SimpleNamespace(), 30.0)
        else:
            with pytest.raises(VlaError, match=r"lidar/points.*/tf_static: found it at \(1.30.*mounts.lidar, \(1.00"):
                wait_for_sensors(checker, CONTRACT, spec, SimpleNamespace(), 30.0)
    assert list(checker.subscriptions) == []


def test_a_transform_that_comes_later_stops_the_policy_too() -> None:
    mounts = {"front": (1.7, 0.0, 1.5, -0.5, 0.5, -0.5, 0.5)}
    setup = SensorSetup(CONTRACT, SPEC, SimpleNamespace(mounts=mounts))
    assert setup.message("front", messages.image(0, np.zeros((6, 8, 3), dtype=np.uint8), FRAME)) == []
    assert setup.transforms(writing.transforms(0, "base_link", {FRAME: mounts["front"]})) == []
    turned = writing.transforms(0, "base_link", {FRAME: (1.7, 0.0, 1.5, 0.0, 0.0, 0.0, 1.0)})
    (line,) = setup.transforms(turned)
    assert "120 deg apart" in line and setup.faults == [line]
    assert setup.transforms(turned) == [] and setup.faults == [line], "it is told once"
