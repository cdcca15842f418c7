"""A scenario in MuJoCo: the vehicle obeys, road users move as they are told, sensors sample on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from vla_core.contract import RobotContract
from vla_core.observation.messages import Message
from vla_core.sim.base import SimulationError
from vla_core.sim.driving.camera import Cameras, TopDown
from vla_core.sim.driving.layout import EgoState, LightColour, Pose, RoadUser, Scenario
from vla_core.sim.driving.look import LAMPS
from vla_core.sim.driving.scene import FAR_AWAY, TIMESTEP_S, Touched, build_scene, mujoco_module
from vla_core.sim.driving.sensors import IMU_STEPS, Sensors, ground_truth, static_transforms
from vla_core.sim.driving.vehicle import Actuators, Vehicle

SETTLE_S = 0.5
CHUNK_STEPS = IMU_STEPS  # road users move, and sensors look, every 10 ms
WATCHED_M = 70.0  # width of a view from above


class DrivingSim:
    """One episode of a scenario.

    The vehicle starts at a stand, road users are nowhere until :meth:`set_users`. Time passes in :meth:`step` alone;
    a step at rest before the episode begins fills the sensors.

    Args:
        scenario: what is built; its seed is that of all noise.
        contract: whose streams are sensed; nothing else costs time.
        camera_size: pixels of the square pictures.
        black: pictures are black.
        actuators: how commands become motion.

    Raises:
        SimulationError: for a stream that the vehicle has no sensor for.
    """

    def __init__(self, scenario: Scenario, contract: RobotContract, camera_size: int = 84, black: bool = False,
                 actuators: Actuators | None = None) -> None:  # fmt: skip
        mujoco = self._mujoco = mujoco_module()
        self._scene = build_scene(scenario)
        self._data = mujoco.MjData(self._scene.model)
        self._vehicle = Vehicle(self._scene.model, self._data, actuators)
        self._sensors = Sensors(contract, self._scene, self._data, self._vehicle, scenario.town.ground, scenario.seed)
        self._camera_size, self._black = camera_size, black
        self._cameras: Cameras | None = None
        self._users: dict[int, RoadUser] = {}
        self._touched: set[Touched] = set()
        self._acceleration = 0.0
        self._ego_hull = int(self._scene.model.geom("hull").id)
        for _ in range(round(SETTLE_S / TIMESTEP_S)):  # onto its wheels
            self._vehicle.control()
            mujoco.mj_step(self._scene.model, self._data)
        self._steps = 0
        self.set_lights({i: "green" for i in range(len(self._scene.lamps))})
        mujoco.mj_forward(self._scene.model, self._data)

    @property
    def ego(self) -> EgoState:
        """The vehicle now; its acceleration is the mean of the last :meth:`step`."""
        state = self._vehicle.state()
        return EgoState(
            pose=state.pose, speed_mps=state.speed_mps, yaw_rate=state.yaw_rate, steering=state.steering,
            acceleration=self._acceleration,
        )  # fmt: skip

    @property
    def time_s(self) -> float:
        """Simulated since the start."""
        return self._steps * TIMESTEP_S

    @property
    def users(self) -> tuple[RoadUser, ...]:
        """The road users, where they are now."""
        return tuple(self._users.values())

    def set_users(self, users: Sequence[RoadUser]) -> None:
        """Put road users at their places at once; those that are not named are away."""
        self._users = {user.id: user for user in users}
        self._place_users(self._users, self._users, 1.0)
        self._mujoco.mj_kinematics(self._scene.model, self._data)

    def set_lights(self, colours: Mapping[int, LightColour]) -> None:
        """Switch traffic lights, by their places in the town."""
        for index, colour in colours.items():
            self._scene.model.mat_rgba[self._scene.lamps[index]] = (*LAMPS[colour], 1.0)

    def step(self, steering_angle: float, speed: float, duration_s: float, users: Sequence[RoadUser] = ()) -> None:
        """Obey a command (rad, m/s) for ``duration_s``, a multiple of 10 ms.

        ``users`` are the road users where they are at its end; they go there at constant velocities, and those that
        are new appear there at once.
        """
        chunks = round(duration_s / (CHUNK_STEPS * TIMESTEP_S))
        if chunks < 1 or not math.isclose(chunks * CHUNK_STEPS * TIMESTEP_S, duration_s, abs_tol=1e-9):
            raise SimulationError(f"duration_s: expected a multiple of {CHUNK_STEPS * TIMESTEP_S} s, "
                                  f"found {duration_s}")  # fmt: skip
        if not (math.isfinite(steering_angle) and math.isfinite(speed)):
            raise SimulationError(f"the command has numbers that are not finite: {steering_angle}, {speed}")
        after = {user.id: user for user in users}
        before = {index: self._users.get(index, user) for index, user in after.items()}
        velocities, rates = self._velocities(before, after, duration_s)
        self._vehicle.command(steering_angle, speed)
        was = self._vehicle.speed
        for chunk in range(1, chunks + 1):
            self._place_users(before, after, chunk / chunks)
            self._advance()
            self._sensors.sample(self._steps, velocities, rates)
        self._acceleration = (self._vehicle.speed - was) / duration_s
        self._users = after

    def touched(self) -> set[Touched]:
        """What the vehicle's body has touched since the last call."""
        found, self._touched = self._touched, set()
        return found

    def numbers(self, stamp_ns: int) -> list[Message]:
        """Messages of LiDAR, radars, IMU and odometry since the last call, the newest stamped ``stamp_ns``."""
        return self._sensors.messages(self._steps, stamp_ns)

    def pictures(self, stamp_ns: int) -> list[Message]:
        """Pictures and calibrations now, stamped ``stamp_ns``."""
        wanted = self._sensors.wanted
        if wanted.cameras and not self._black:
            return self._sensors.pictures(self._drawing(), stamp_ns)
        return self._sensors.black_pictures(self._camera_size, stamp_ns)

    def statics(self, stamp_ns: int) -> list[Message]:
        """Messages that are sent once: the mounts."""
        return [static_transforms(stamp_ns)]

    def ground_truth(self, stamp_ns: int) -> list[Message]:
        """Where everything really is."""
        return ground_truth(stamp_ns, self.ego, self.users)

    def render_for_people(self, size: int = 480) -> np.ndarray:
        """From behind and above, (size, size, 3) uint8 RGB."""
        return self._drawing().chase(size)

    def top_down_view(self, size: int = 480, metres: float = WATCHED_M) -> TopDown:
        """The view from above that follows the vehicle, which drives upwards in its lower half."""
        pose = self._vehicle.state().pose
        ahead = metres / 5
        return TopDown(x=pose.x + ahead * math.cos(pose.heading), y=pose.y + ahead * math.sin(pose.heading),
                       heading=pose.heading, metres=metres, size=size)  # fmt: skip

    def render_top_down(self, size: int = 480, view: TopDown | None = None) -> np.ndarray:
        """From straight above, (size, size, 3) uint8 RGB; ``view.pixels`` says where points of the map are in it."""
        return self._drawing().top_down(view or self.top_down_view(size))

    def close(self) -> None:
        """Free what the pictures take."""
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None

    def _drawing(self) -> Cameras:
        if self._cameras is None:  # a vehicle without cameras needs no renderer
            self._cameras = Cameras(self._scene, self._data, self._camera_size)
        return self._cameras

    def _advance(self) -> None:
        model, data, mujoco = self._scene.model, self._data, self._mujoco
        for _ in range(CHUNK_STEPS):
            self._vehicle.control()
            mujoco.mj_step(model, data)
            if data.ncon > 4:  # more than the wheels on the ground
                self._note_contacts()
        self._steps += CHUNK_STEPS
        # A step ends with new positions and the old places of the shapes.
        mujoco.mj_kinematics(model, data)

    def _note_contacts(self) -> None:
        for pair in self._data.contact.geom.tolist():
            if self._ego_hull in pair:
                other = self._scene.owner[pair[0] if pair[1] == self._ego_hull else pair[1]]
                if other is not None:
                    self._touched.add(other)

    def _place_users(self, before: Mapping[int, RoadUser], after: Mapping[int, RoadUser], share: float) -> None:
        position, quaternion = self._data.mocap_pos, self._data.mocap_quat
        for index, mocap in enumerate(self._scene.users):
            if index not in after:
                position[mocap] = FAR_AWAY
                continue
            a, b = before[index].pose, after[index].pose
            turned = a.heading + share * _turn(a, b)
            position[mocap] = (a.x + share * (b.x - a.x), a.y + share * (b.y - a.y), 0.0)
            quaternion[mocap] = (math.cos(turned / 2), 0.0, 0.0, math.sin(turned / 2))

    def _velocities(self, before: Mapping[int, RoadUser], after: Mapping[int, RoadUser],
                    duration_s: float) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Of the road users in the map: (U, 3) m/s and (U,) rad/s."""
        velocities, rates = np.zeros((len(self._scene.users), 3)), np.zeros(len(self._scene.users))
        for index, user in after.items():
            a, b = before[index].pose, user.pose
            velocities[index, :2] = (b.x - a.x) / duration_s, (b.y - a.y) / duration_s
            rates[index] = _turn(a, b) / duration_s
        return velocities, rates


def _turn(a: Pose, b: Pose) -> float:
    """The shorter way from one heading to the other, rad."""
    return math.remainder(b.heading - a.heading, 2 * math.pi)
