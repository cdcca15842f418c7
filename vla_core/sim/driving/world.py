"""Driving as a robot: a vehicle in a town, among others, with a route that is told in words.

A world is one kind of scenario (``driving:turn_left``) or all of them (``driving:mixed``); the seed makes the town, the
route, the others and the weather. It obeys ``following.command`` of its contract, a steering angle and a speed, and
simulates the sensors alone that the contract asks for. The instruction changes along the route.
"""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np

from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.data.happened import TRUTH_PREFIX, TRUTH_TYPE
from vla_core.errors import choices
from vla_core.observation import messages
from vla_core.observation.messages import Message
from vla_core.sim.base import SimulationError, Task, View, steps_per_frame
from vla_core.sim.driving.expert import ROWS, STEP_S, Expert
from vla_core.sim.driving.layout import EgoState, Pose, RoadUser, Scenario
from vla_core.sim.driving.routes import kind_of, other_instruction, scenario
from vla_core.sim.driving.rules import Rules, Score
from vla_core.sim.driving.scene import mujoco_module
from vla_core.sim.driving.sensors import wanted
from vla_core.sim.driving.simulation import DrivingSim
from vla_core.sim.driving.traffic import Traffic

INSTRUCTION = "follow the instructions on the way"
LONGEST_S = 120.0  # more than any route's limit
CAMERA_SIZE = 84
PEOPLE_SIZE = 480
DECISION_S = 0.1  # the longest time between two decisions of the others
SWEEP_S = 0.1  # of the LiDAR, the slowest sensor but the cameras
PERIOD_S = 0.01  # of which the control period is a multiple
COLUMNS = ("x", "y", "yaw", "speed")  # of the expert's rows
ROUTE_COLOUR, PLAN_COLOUR, TEXT_COLOUR = (90, 200, 255), (255, 90, 200), (255, 255, 255)
ROUTE_M = 60.0  # of the route ahead that people see


def driving_task(kind: str) -> Task:
    """A kind of scenario; its words come on the way, and each route has a time limit of its own."""
    kind_of(kind, 0)
    rate_hz = RobotContract.load("driving").rate_hz
    return Task(world=f"driving:{kind}", instruction=INSTRUCTION, max_steps=round(LONGEST_S * rate_hz))


class Driving:
    """One vehicle; see :class:`~vla_core.sim.base.World`, ``HasExpert`` and ``Journey``.

    Args:
        kind: one of ``KINDS``, or "mixed": the seed says which.
        contract: such as ``config/robots/driving.yaml``, or one with fewer sensors.
        view: size of the pictures, black ones, or the instruction of another route.
    """

    def __init__(self, kind: str, contract: RobotContract, view: View) -> None:
        kind_of(kind, 0)
        _check(contract)
        mujoco_module()
        self.kind, self.contract, self.view = kind, contract, view
        self.steps_per_frame = steps_per_frame(contract)
        self.success = False
        (self._action,) = contract.actions.values()
        self._period_s = contract.step_ns / NANOSECONDS
        moments, most = round(self._period_s / PERIOD_S), round(DECISION_S / PERIOD_S)
        self._decisions = next(n for n in range(1, moments + 1) if moments % n == 0 and moments <= n * most)
        self._sim: DrivingSim | None = None
        self._scenario: Scenario | None = None
        self._parts = 0  # of control periods, between two decisions
        self._plan: tuple[Pose, np.ndarray] | None = None

    def reset(self, seed: int) -> None:
        """Start an episode: a town, at a stand, after control periods that have filled the sensors."""
        self.close()
        told = self._scenario = scenario(self.kind, seed)
        self._sim = DrivingSim(told, self.contract, self.view.size or CAMERA_SIZE, self.view.black)
        self._traffic, self._rules, self._expert = Traffic(told), Rules(told), Expert(told)
        self._other = other_instruction(told) if self.view.swapped else None
        self._parts, self._plan, self.success = 0, None, False
        self._show_lights()
        self._sim.set_users(self._traffic.users)
        for _ in range(math.ceil(SWEEP_S / self._period_s - 1e-6)):
            self._sim.step(0.0, 0.0, self._period_s, self._traffic.users)
        self._rules.update(0.0, self._sim.ego, self._traffic.users)

    @property
    def scenario(self) -> Scenario:
        """The episode's town, route and road users."""
        if self._scenario is None:
            raise SimulationError("this world has no episode yet; reset it first")
        return self._scenario

    @property
    def ego(self) -> EgoState:
        """Where the vehicle really is."""
        return self._running.ego

    @property
    def users(self) -> tuple[RoadUser, ...]:
        """Where the others really are."""
        return self._traffic.users

    @property
    def time_s(self) -> float:
        """Since the episode's start."""
        return self._parts * self._period_s / self._decisions

    @property
    def station(self) -> float:
        """How far along the route the vehicle has come, m."""
        return self._rules.reached

    @property
    def instruction(self) -> str:
        """What is said now; "" before the first reset."""
        if self._scenario is None:
            return ""
        if self._other is not None:
            return self._other
        said = [i.text for i in self._scenario.route.instructions if i.from_s <= self._rules.reached]
        return said[-1] if said else self._scenario.route.instructions[0].text

    @property
    def over(self) -> bool:
        """Arrived, or given up: too far off the route, blocked, or out of time."""
        return self._scenario is not None and self._rules.over

    @property
    def score(self) -> float | None:
        """The driving score so far, in [0, 1]; None before the first reset."""
        return None if self._scenario is None else self._rules.score().driving_score

    def details(self) -> dict[str, float]:
        """All of :class:`~vla_core.sim.driving.rules.Score`."""
        score = Score() if self._scenario is None else self._rules.score()
        return {name: float(value) for name, value in dataclasses.asdict(score).items()}

    def rest(self) -> np.ndarray:
        """Straight on, at a stand (2,)."""
        return np.zeros(2)

    def expert_rows(self) -> np.ndarray:
        """The expert's trajectory (7, A) from now on, every 0.5 s, in ``base_link``, in the order of the contract."""
        rows = self._expert.plan(self._running.ego, self._traffic.users, self.time_s)
        return rows[:, [COLUMNS.index(name) for name in self._action.names]]

    def step(self, command: np.ndarray, pictures: bool = True) -> None:
        """Obey steering angle in rad and speed in m/s (2,) for one control period; pictures are drawn when asked for.

        The others decide every 0.1 s at least.
        """
        sim = self._running
        bounds = self.contract.following
        assert bounds is not None
        steering, speed = np.clip(np.asarray(command, np.float64), bounds.command.low, bounds.command.high).tolist()
        part_s = self._period_s / self._decisions
        for _ in range(self._decisions):
            users = self._traffic.step(self.time_s, part_s, sim.ego)
            sim.step(steering, speed, part_s, users)
            self._parts += 1
            self._show_lights()
            self._rules.update(self.time_s, sim.ego, users, sim.touched())
        self._expert.progress(sim.ego)
        self.success = self._rules.over and self._rules.score().success

    def observe_state(self, stamp_ns: int) -> list[Message]:
        """LiDAR, radars, IMU and odometry of the control period that ends at ``stamp_ns``."""
        return self._running.numbers(stamp_ns)

    def observe_camera(self, stamp_ns: int) -> list[Message]:
        """Pictures and their calibrations at ``stamp_ns``."""
        return self._running.pictures(stamp_ns)

    def statics(self, stamp_ns: int) -> list[Message]:
        """``/tf_static``: where the sensors are."""
        return self._running.statics(stamp_ns)

    def ground_truth(self, stamp_ns: int) -> list[Message]:
        """``ground_truth/odom``, ``ground_truth/objects`` and ``ground_truth/light``, the colour of the next light."""
        light = messages.text(self._expert.light(self._running.ego, self.time_s))
        return [*self._running.ground_truth(stamp_ns), Message(TRUTH_PREFIX + "light", TRUTH_TYPE, stamp_ns, light)]

    def watch_plan(self, rows: np.ndarray | None) -> None:
        """Draw a trajectory (H, A) in the contract's columns, from where the vehicle is now; None draws none."""
        if rows is None:
            self._plan = None
            return
        names = self._action.names
        self._plan = self._running.ego.pose, np.asarray(rows)[:, [names.index("x"), names.index("y")]]

    def render_for_people(self) -> np.ndarray:
        """From above, with the route ahead, the watched trajectory and what is said: (480, 480, 3) uint8 RGB."""
        sim = self._running
        view = sim.top_down_view(PEOPLE_SIZE)
        picture = np.ascontiguousarray(sim.render_top_down(PEOPLE_SIZE, view))
        path = self.scenario.route.path
        first = int(self._rules.reached / self._rules.length * (len(path) - 1))
        ahead = path[first : first + round(ROUTE_M / self._rules.length * (len(path) - 1))]
        _draw(picture, view.pixels(ahead[:, :2]), ROUTE_COLOUR, 1)
        if self._plan is not None:
            pose, points = self._plan
            cos, sin = np.cos(pose.heading), np.sin(pose.heading)
            placed = points @ np.array([[cos, sin], [-sin, cos]]) + (pose.x, pose.y)
            _draw(picture, view.pixels(placed), PLAN_COLOUR, 2)
            for x, y in view.pixels(placed):
                cv2.circle(picture, (round(x), round(y)), 3, PLAN_COLOUR, -1, cv2.LINE_AA)
        score = 100 * self._rules.score().driving_score
        lines = (self.instruction, f"{sim.ego.speed_mps:4.1f} m/s  {self.time_s:5.1f} s  score {score:3.0f}")
        picture[: 8 + 20 * len(lines)] //= 3  # dark enough to read white on it
        for row, text in enumerate(lines):
            place = (8, 20 + 20 * row)
            cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, TEXT_COLOUR, 1, cv2.LINE_AA)
        return picture

    def close(self) -> None:
        """Free what the simulator holds."""
        if self._sim is not None:
            self._sim.close()
            self._sim = None

    @property
    def _running(self) -> DrivingSim:
        if self._sim is None:
            raise SimulationError("this world has no episode; reset it first")
        return self._sim

    def _show_lights(self) -> None:
        lights = self.scenario.town.lights
        self._running.set_lights({i: light.colour(self.time_s) for i, light in enumerate(lights)})


def _check(contract: RobotContract) -> None:
    """Raise unless the vehicle can keep the contract."""
    if contract.following is None:
        raise SimulationError(f"contract {contract.name!r}: no following; the simulated vehicle obeys steering angle "
                              "and speed, which a follower makes of a trajectory")  # fmt: skip
    wanted(contract)
    (action,) = contract.actions.values()  # a contract with following has one
    unknown = [name for name in action.names if name not in COLUMNS]
    if unknown:
        raise SimulationError(f"contract {contract.name!r}: trajectories here have no {', '.join(unknown)}; "
                              f"choices: {choices(COLUMNS)}")  # fmt: skip
    if contract.chunk_step_ns != round(STEP_S * NANOSECONDS):
        raise SimulationError(
            f"contract {contract.name!r}: waypoints {contract.chunk_step_ns / NANOSECONDS} s apart; the {ROWS} of the "
            f"simulated vehicle's expert are {STEP_S} s apart"
        )
    period_s = contract.step_ns / NANOSECONDS
    if abs(period_s / PERIOD_S - round(period_s / PERIOD_S)) > 1e-6 or period_s > STEP_S:
        raise SimulationError(f"contract {contract.name!r}: a control period of {period_s} s; the simulated vehicle's "
                              f"is a multiple of {PERIOD_S} s, at most {STEP_S} s")  # fmt: skip


def _draw(picture: np.ndarray, pixels: np.ndarray, colour: tuple[int, int, int], width: int) -> None:
    cv2.polylines(picture, [np.round(pixels).astype(np.int32)], False, colour, width, cv2.LINE_AA)
