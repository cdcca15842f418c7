"""LIBERO's suites as a robot (Liu et al. 2023, "LIBERO: Benchmarking Knowledge Transfer for Lifelong Robot Learning").

Policies are scored here as OpenVLA and openpi score theirs: pictures of 256 pixels turned by 180 degrees, 8 numbers of
proprioception, 10 steps of no motion before the first observation, and the suite's step limits. The seed picks the
initial state, in the suite's order. One thing is stricter: what LIBERO draws at random beside the initial state (where
furniture without joints stands) is drawn anew from the same seed for every episode, so that an episode does not depend
on those that ran before it.

Numbers and pictures are bit for bit what ``OffScreenRenderEnv`` gives.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
from typing import Any

import numpy as np

from vla_core.contract import RobotContract
from vla_core.errors import choices
from vla_core.observation.messages import Message
from vla_core.sim.base import (
    IMAGES,
    VECTOR,
    SimulationError,
    Task,
    View,
    check_contract,
    picture_message,
    steps_per_frame,
    vector_message,
)

# OpenVLA's and openpi's: a little more than the longest demonstration of the suite.
MAX_STEPS = {
    "libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400,
}  # fmt: skip
PICTURE_SIZE = 256
WAITING_STEPS = 10  # objects fall into place
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}  # by stream of the contract
VECTORS = {"proprio": 8, "joints": 7}
ACTION_SIZE = 7
SCENE_SEED = 0
FRAME = "world"


@functools.cache
def _libraries() -> tuple[Any, Any, Any]:
    """LIBERO's benchmark module, its paths and its environment class; imported where they are needed."""
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    os.environ.setdefault("LP_NUM_THREADS", "1")
    # robosuite asks everybody for a file of private settings.
    logging.getLogger("robosuite_logs").addFilter(lambda record: "macro" not in record.getMessage())
    try:
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv
    except ImportError as error:
        raise SimulationError(f"LIBERO cannot be imported ({error}); install it: make simulators") from None
    return benchmark, get_libero_path, OffScreenRenderEnv


@functools.cache
def _suite(name: str) -> Any:
    benchmark, _, _ = _libraries()
    with contextlib.redirect_stdout(io.StringIO()):  # it tells about the order of its tasks
        return benchmark.get_benchmark(name)()


def libero_task(suite: str, task: str) -> Task:
    """A task of a suite by its number or name; raises :class:`SimulationError` with the choices."""
    found = _suite(suite).get_task(_index(suite, task))
    return Task(world=f"{suite}:{task}", instruction=found.language, max_steps=MAX_STEPS[suite])


def _index(suite: str, task: str) -> int:
    names = _suite(suite).get_task_names()
    if task in names:
        return int(names.index(task))
    if not task.isdecimal() or int(task) >= len(names):
        raise SimulationError(f"{suite} has no task {task!r}; choices: 0 to {len(names) - 1}, or {choices(names)}")
    return int(task)


class Libero:
    """One task of a suite; ``task`` is its number or name.

    The contract may have the streams ``agentview``, ``wrist``, ``proprio``, ``joints`` and latched ones, see
    ``config/robots/libero.yaml``.
    """

    def __init__(self, suite: str, task: str, contract: RobotContract, view: View) -> None:
        check_contract(contract, "LIBERO", VECTORS, tuple(CAMERAS), ACTION_SIZE)
        _, path_of, environment = _libraries()
        index = _index(suite, task)
        details = _suite(suite).get_task(index)
        self.contract, self.success = contract, False
        self.steps_per_frame = steps_per_frame(contract)
        self._initial_states = _suite(suite).get_task_init_states(index)
        self._streams = {name: s for name, s in contract.observations.items() if not s.latched}
        self._black = view.black
        self._size = view.size or PICTURE_SIZE
        self._env = environment(
            bddl_file_name=os.path.join(path_of("bddl_files"), details.problem_folder, details.bddl_file),
            camera_heights=self._size, camera_widths=self._size, control_freq=contract.rate_hz,
            hard_reset=False,  # parsing the scene anew takes 10 s and gives the same one
            ignore_done=True,  # robosuite's own limit of 1,000 steps
        )  # fmt: skip
        self._seen: dict[str, np.ndarray] = {}

    @property
    def score(self) -> float | None:
        """LIBERO knows nothing finer than success."""
        return None

    def reset(self, seed: int) -> None:
        """Start from initial state ``seed`` of the suite, counted around, and wait until objects lie still."""
        before = np.random.get_state()  # LIBERO draws from numpy's global generator
        try:
            self._pictures(False)
            self._env.seed(SCENE_SEED)
            self._env.reset()
        finally:
            np.random.set_state(before)
        for robot in self._env.robots:  # kept over a reset, unlike with a scene that is parsed anew
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._env.set_init_state(self._initial_states[seed % len(self._initial_states)])
        self.success = False
        for left in reversed(range(WAITING_STEPS)):
            self._step(self.rest(), pictures=left == 0)

    def rest(self) -> np.ndarray:
        """No motion, gripper open (7,)."""
        return np.array([0.0, 0, 0, 0, 0, 0, -1])

    def step(self, command: np.ndarray, pictures: bool = True) -> None:
        """Obey a command (7,) for one control step."""
        self._step(np.clip(np.asarray(command, dtype=np.float64), -1.0, 1.0), pictures)
        self.success = self.success or bool(self._env.check_success())

    def _step(self, action: np.ndarray, pictures: bool) -> None:
        self._pictures(pictures)
        self._seen, _, _, _ = self._env.step(action)

    def _pictures(self, on: bool) -> None:
        """Whether the next step renders, which is most of its time.

        robosuite samples while it steps, each quantity by a clock of its own, which stands still while it is off: it
        is set to that of one which never is.
        """
        if on:
            self._make_current()
        observables = self._env.env._observables
        running = observables["robot0_eef_pos"]
        wanted = {CAMERAS[name] for name, stream in self._streams.items() if stream.type in IMAGES}
        for camera in CAMERAS.values():
            picture = observables[f"{camera}_image"]
            picture.set_enabled(on and not self._black and camera in wanted)
            picture._time_since_last_sample, picture._sampled = running._time_since_last_sample, running._sampled

    def observe_state(self, stamp_ns: int) -> list[Message]:
        """The numeric streams of the contract."""
        seen = self._seen
        values = {
            "proprio": np.concatenate([
                seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"],
            ]),
            "joints": seen["robot0_joint_pos"],
        }  # fmt: skip
        return [
            vector_message(stream, stamp_ns, values[name], FRAME)
            for name, stream in self._streams.items() if stream.type == VECTOR
        ]  # fmt: skip

    def observe_camera(self, stamp_ns: int) -> list[Message]:
        """The pictures of the contract, turned by 180 degrees as published policies are trained with."""
        return [
            picture_message(stream, stamp_ns, self._picture(name), CAMERAS[name])
            for name, stream in self._streams.items() if stream.type in IMAGES
        ]  # fmt: skip

    def _picture(self, name: str) -> np.ndarray:
        if self._black:
            return np.zeros((self._size, self._size, 3), np.uint8)
        key = f"{CAMERAS[name]}_image"
        assert key in self._seen, "the last step was taken with pictures"
        return np.ascontiguousarray(self._seen[key][::-1, ::-1])

    def render_for_people(self) -> np.ndarray:
        """The camera in front, upright and not mirrored, (size, size, 3) uint8 RGB."""
        self._make_current()
        pixels = self._env.sim.render(camera_name="agentview", width=self._size, height=self._size)
        return np.ascontiguousarray(pixels[::-1])  # OpenGL's first row is the lowest

    def _make_current(self) -> None:
        """robosuite draws into whatever graphics context is the current one, such as another simulator's."""
        self._env.sim._render_context_offscreen.gl_ctx.make_current()

    def close(self) -> None:
        """Free the simulator and its renderer."""
        self._env.close()


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Rotation vector (3,) rad of a unit quaternion (x, y, z, w), its angle in [0, 2 pi].

    Not the shortest: robosuite's, which the published policies were trained with, does not flip the quaternion's sign.
    """
    w = min(1.0, max(-1.0, float(quaternion[3])))
    sine = math.sqrt(1.0 - w * w)
    return np.zeros(3) if sine == 0.0 else quaternion[:3] * 2.0 * math.acos(w) / sine
