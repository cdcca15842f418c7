"""A vehicle without a simulator: a kinematic bicycle with odometry, a camera, words that change and an expert."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from vla_core.contract import NANOSECONDS, Action, Following, RobotContract, Stream
from vla_core.observation import messages, writing
from vla_core.observation.messages import Message
from vla_core.sim.base import Simulator, Task, View, steps_per_frame
from vla_core.sim.worlds import SIM_REGISTRY

WHEELBASE_M = 2.8
GOAL_M = 12.0
WORDS = ("go on", "stop at the end")
ODOMETRY = "nav_msgs/msg/Odometry"
DRIVE = Action(
    topic="drive", type="ackermann_msgs/msg/AckermannDriveStamped", names=("steering_angle", "speed"),
    units=("rad", "m/s"), low=(-0.6, 0.0), high=(0.6, 10.0), safe=("hold", "zero"), frame_id="base_link",
)  # fmt: skip
PLAN = Action(
    topic="planning/trajectory", type="vla_ros/msg/Trajectory", kind="position", publish="chunk", step_s=0.5,
    frame_id="base_link", names=("x", "y", "yaw", "speed"), units=("m", "m", "rad", "m/s"),
    low=(-5.0, -40.0, -3.2, 0.0), high=(60.0, 40.0, 3.2, 15.0), safe=("zero",) * 4,
)  # fmt: skip
CONTRACT = RobotContract(
    name="toy_vehicle", rate_hz=5,
    observations={
        "camera": Stream(topic="camera/image_raw", type="sensor_msgs/msg/Image", rate_hz=5, max_age_s=0.5,
                         missing="mask"),
        "odom": Stream(topic="odom", type=ODOMETRY, rate_hz=50, max_age_s=0.2, sampling="interpolate",
                       names=("twist.twist.linear.x",), units=("m/s",)),
        "instruction": Stream(topic="instruction", type="std_msgs/msg/String", latched=True),
    },
    actions={"trajectory": PLAN},
    following=Following(odometry="odom", wheelbase_m=WHEELBASE_M, command=DRIVE),
)  # fmt: skip


def saved(folder: Path) -> str:
    """The contract as a file."""
    path = folder / "toy_vehicle.yaml"
    path.write_text(CONTRACT.to_yaml(), encoding="utf-8")
    return str(path)


class ToyVehicle:
    """Drives along an arc that the seed chooses; the episode succeeds after 12 m, and is over when it turns back."""

    score = None
    success = over = False
    driven = 0.0

    def __init__(self, task: str, contract: RobotContract, view: View) -> None:
        self.contract, self.view = contract, view
        self.steps_per_frame = steps_per_frame(contract)
        self.obeyed: list[np.ndarray] = []  # of all episodes
        self.shown: list[np.ndarray | None] = []

    def reset(self, seed: int) -> None:
        self.curvature = float(np.random.default_rng(seed).uniform(-0.1, 0.1))
        self.pose, self.driven, self.success, self.over = np.zeros(3), 0.0, False, False
        self.speed = 0.0
        self.trail = [(0.0, self.pose.copy(), 0.0)]  # age at the end of the step, pose, speed

    @property
    def instruction(self) -> str:
        words = WORDS if not self.view.swapped else WORDS[::-1]
        return words[0] if self.driven < GOAL_M / 2 else words[1]

    def rest(self) -> np.ndarray:
        return np.zeros(2)

    def step(self, command: np.ndarray, pictures: bool = True) -> None:
        self.obeyed.append(np.asarray(command))
        steering, speed = command
        period_s = 1 / self.contract.rate_hz
        count = round(period_s * 50)
        self.trail = []
        for k in range(count):
            self.speed += float(np.clip(speed - self.speed, -0.1, 0.1))
            x, y, yaw = self.pose
            ds = self.speed / 50
            self.pose = np.array([x + ds * math.cos(yaw), y + ds * math.sin(yaw),
                                  yaw + ds * math.tan(steering) / WHEELBASE_M])  # fmt: skip
            self.driven += ds
            self.trail.append((period_s - (k + 1) / 50, self.pose.copy(), self.speed))
        self.success = self.success or self.driven >= GOAL_M
        self.over = self.over or abs(self.pose[2]) > math.pi

    def observe_state(self, stamp_ns: int) -> list[Message]:
        return [self._odometry("odom", stamp_ns - round(age_s * NANOSECONDS), pose, speed)
                for age_s, pose, speed in self.trail]  # fmt: skip

    def observe_camera(self, stamp_ns: int) -> list[Message]:
        pixels = np.full((4, 6, 3), 0 if self.view.black else int(10 * self.driven) % 256, np.uint8)
        data = messages.image(stamp_ns, pixels, "camera")
        return [Message("camera/image_raw", "sensor_msgs/msg/Image", stamp_ns, data)]

    def expert_rows(self) -> np.ndarray:
        times = 0.5 * np.arange(7)
        s = 4.0 * times
        yaw = self.curvature * s
        return np.stack([s * np.sinc(yaw / np.pi), s * (1 - np.cos(yaw)) / np.where(yaw == 0, 1, yaw), yaw,
                         np.full(7, 4.0)], axis=1)  # fmt: skip

    def details(self) -> dict[str, float]:
        return {"driven_m": self.driven}

    def statics(self, stamp_ns: int) -> list[Message]:
        data = writing.transforms(0, "base_link", {"camera": (1.0, 0.0, 1.2, 0.0, 0.0, 0.0, 1.0)})
        return [Message("/tf_static", "tf2_msgs/msg/TFMessage", stamp_ns, data)]

    def ground_truth(self, stamp_ns: int) -> list[Message]:
        return [self._odometry("ground_truth/odom", stamp_ns, self.pose, self.speed)]

    def watch_plan(self, rows: np.ndarray | None) -> None:
        self.shown.append(rows)

    def render_for_people(self) -> np.ndarray:
        return np.full((16, 32, 3), int(10 * self.driven) % 256, np.uint8)

    def close(self) -> None:
        pass

    def _odometry(self, topic: str, stamp_ns: int, pose: np.ndarray, speed: float) -> Message:
        half = pose[2] / 2
        places = (pose[0], pose[1], 0.0, 0.0, 0.0, math.sin(half), math.cos(half))
        frame = "odom" if topic == "odom" else "map"
        data = writing.odometry(stamp_ns, places, (speed, 0.0, 0.0), (0.0, 0.0, 0.0), frame)
        return Message(topic, ODOMETRY, stamp_ns, data)


def register() -> None:
    """Make the world ``toy_vehicle`` known; the caller restores the registry."""
    SIM_REGISTRY["toy_vehicle"] = Simulator(
        contract="driving", task=lambda name: Task(world="toy_vehicle", instruction=WORDS[0], max_steps=40),
        make=ToyVehicle,
    )  # fmt: skip
