"""Meta-World in MuJoCo as a robot: it emits the messages of a contract and obeys its commands.

One control step is one environment step, 12.5 ms (80 Hz). The action is the velocity of the hand (Meta-World moves
its mocap body by 1 cm a step at full action: 0.8 m/s) and the effort of the gripper in [-1, 1].
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import numpy as np

from vla_core.contract import RobotContract
from vla_core.errors import choices
from vla_core.observation import messages
from vla_core.observation.image import encode_jpeg
from vla_core.observation.messages import Message
from vla_core.sim.base import COMPRESSED_IMAGE, IMAGES, VECTOR, SimulationError

FULL_SPEED = 0.8  # m/s, 1 cm (action_scale) in 12.5 ms
FRAME = "base"
VIDEO_SIZE = 320
STATE_SIZE = 39
HAND_SIZE = 4
FULL_REWARD = 10.0  # what Meta-World gives for a step in which the task is done
LONGEST_EPISODE = 500  # steps, after which Meta-World wants a reset

# Meta-World defines these upside down.
ROTATED_CAMERAS = ("corner", "corner2", "corner3", "corner4")

INSTRUCTIONS = {
    "button-press-topdown-v3": "press the button from the top",
    "door-open-v3": "open the door",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "peg-insert-side-v3": "insert the peg into the hole",
    "pick-place-v3": "pick up the puck and place it at the goal",
    "push-v3": "push the puck to the goal",
    "reach-v3": "reach the goal",
    "window-close-v3": "close the window",
    "window-open-v3": "open the window",
}


def instruction_for(task: str) -> str:
    """The task in words; for tasks without a sentence of their own, the words of their name."""
    return INSTRUCTIONS.get(task, task.removesuffix("-v3").replace("-", " "))


@functools.cache
def _libraries() -> tuple[Any, Any, Any]:
    """mujoco, and Meta-World's environments and experts; imported where they are needed."""
    os.environ.setdefault("MUJOCO_GL", "osmesa")  # software rendering: no display and no GPU needed
    # One rasterizer thread: with a policy on the other core, more of them only wait for one another.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    try:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        message = f"Meta-World cannot be imported ({error}); install the extra: pip install '.[sim]'"
        raise SimulationError(message) from None
    return mujoco, ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE, ENV_POLICY_MAP


def check_task(task: str) -> None:
    """Raise unless Meta-World has ``task``."""
    _, _, experts = _libraries()
    if task not in experts:
        raise SimulationError(f"unknown task {task!r}; choices: {choices(experts)}")


class MetaWorld:
    """One task with its cameras.

    An image stream that is named after a camera of the task, such as ``gripperPOV``, shows that one; every other image
    stream shows ``camera``.

    Args:
        task: such as ``push-v3``.
        camera: one of the task's cameras, such as ``corner2``.
        contract: names the topics that messages go to; must ask for nothing that Meta-World does not have.
        camera_size: rendered height and width, pixels.
        black_camera: publish black images: what is a policy's success without sight?
    """

    def __init__(self, task: str, camera: str, contract: RobotContract, camera_size: int = 128,
                 black_camera: bool = False) -> None:  # fmt: skip
        _, environments, experts = _libraries()
        check_task(task)
        self.task, self.camera, self.contract = task, camera, contract
        self._env = environments[f"{task}-goal-observable"](seed=0)
        # Meta-World draws object positions from the seeded generator only with both of these.
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._new_expert = experts[task]
        model = self._env.model
        cameras = [model.camera(i).name for i in range(model.ncam)]
        if camera not in cameras:
            raise SimulationError(f"unknown camera {camera!r}; choices: {choices(cameras)}")
        self._views = {
            name: name if name in cameras else camera
            for name, stream in contract.observations.items() if stream.type in IMAGES
        }  # fmt: skip
        model.vis.quality.offsamples = 0
        self._camera_size = camera_size
        self._renderer: Any = None
        self._video_renderer: Any = None
        self._black = black_camera
        self._joint_names = contract.observations["joints"].names if "joints" in contract.observations else ()
        camera_hz = next((contract.observations[name].rate_hz for name in self._views), contract.rate_hz)
        self.steps_per_frame = max(1, round(contract.rate_hz / (camera_hz or contract.rate_hz)))
        self._state = np.zeros(STATE_SIZE)
        self.success, self.reward = False, 0.0
        self._check_vectors()

    def reset(self, seed: int) -> None:
        """Start an episode; the same seed gives the same episode."""
        self._env.seed(seed)
        self._expert = self._new_expert()
        self._state, _ = self._env.reset()
        self.success, self.reward = False, 0.0

    def expert(self) -> np.ndarray:
        """The scripted expert's command (4,), in the contract's units and limits."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that its gains are clipped, which is what they are made for
            action = self._expert.get_action(self._state)
        return np.clip(action, -1.0, 1.0) * _scale()

    def expert_rows(self) -> np.ndarray:
        """The same as the one row (1, 4) of a chunk."""
        return self.expert()[None]

    @property
    def score(self) -> float | None:
        """Meta-World knows nothing finer than success."""
        return None

    def rest(self) -> np.ndarray:
        """The command (4,) of no motion."""
        return np.zeros(len(_scale()))

    def step(self, command: np.ndarray, pictures: bool = True) -> None:
        """Obey a command (4,) for one control step; pictures are rendered when they are asked for anyway."""
        action = np.clip(np.asarray(command, dtype=np.float64) / _scale(), -1.0, 1.0)
        self._state, reward, _, _, details = self._env.step(action.astype(np.float32))
        self.reward = float(reward) / FULL_REWARD
        self.success = self.success or bool(details["success"])

    def render(self, camera: str | None = None) -> np.ndarray:
        """What a camera of the robot sees, by default ``self.camera``: (camera_size, camera_size, 3) uint8 RGB."""
        if self._renderer is None:  # a robot without cameras needs no renderer
            self._renderer = self._make_renderer(self._camera_size)
        return self._render(self._renderer, camera or self.camera)

    def render_for_people(self) -> np.ndarray:
        """The same view in a size for people, (VIDEO_SIZE, VIDEO_SIZE, 3) uint8 RGB."""
        if self._video_renderer is None:
            self._video_renderer = self._make_renderer(VIDEO_SIZE)
        return self._render(self._video_renderer, self.camera)

    def _make_renderer(self, size: int) -> Any:
        mujoco, _, _ = _libraries()
        renderer = mujoco.Renderer(self._env.model, size, size)
        # Shadow maps of 4096 pixels cost ten times the rest of the picture.
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return renderer

    def _render(self, renderer: Any, camera: str) -> np.ndarray:
        renderer.update_scene(self._env.data, camera=camera)
        pixels = renderer.render()
        return np.ascontiguousarray(pixels[::-1, ::-1] if camera in ROTATED_CAMERAS else pixels)

    def observe_state(self, stamp_ns: int) -> list[Message]:
        """The numeric streams of the contract at ``stamp_ns``."""
        vectors = self._vectors()
        return [
            Message(stream.topic, stream.type, stamp_ns,
                    messages.joint_state(stamp_ns, stream.names, "position", vectors[name], FRAME))
            for name, stream in self.contract.observations.items() if stream.type == VECTOR
        ]  # fmt: skip

    def observe_camera(self, stamp_ns: int) -> list[Message]:
        """The camera streams of the contract at ``stamp_ns``."""
        pictures = {camera: self.render(camera) for camera in set(self._views.values())}
        out = []
        for name, camera in self._views.items():
            stream = self.contract.observations[name]
            pixels = np.zeros_like(pictures[camera]) if self._black else pictures[camera]
            if stream.type == COMPRESSED_IMAGE:
                data = messages.compressed_image(stamp_ns, encode_jpeg(pixels), "rgb8; jpeg compressed", camera)
            else:
                data = messages.image(stamp_ns, pixels, camera)
            out.append(Message(stream.topic, stream.type, stamp_ns, data))
        return out

    def close(self) -> None:
        """Free the renderers."""
        for renderer in (self._renderer, self._video_renderer):
            if renderer is not None:
                renderer.close()

    def _vectors(self) -> dict[str, np.ndarray]:
        """What Meta-World can tell: its 39 numbers, hand position and gripper opening alone, and the arm's joints."""
        data = self._env.data
        known = [data.model.joint(i).name for i in range(data.model.njnt)]
        absent = [name for name in self._joint_names if name not in known]
        if absent:
            raise SimulationError(f"contract {self.contract.name!r}: Meta-World's robot has no joint "
                                  f"{', '.join(absent)}; choices: {choices(known)}")  # fmt: skip
        joints = np.array([float(data.joint(name).qpos[0]) for name in self._joint_names])
        return {"state": self._state, "hand": self._state[:HAND_SIZE], "joints": joints}

    def _check_vectors(self) -> None:
        """The contract must ask for one command of four entries, and for numeric streams that Meta-World has."""
        vectors = self._vectors()
        for name, stream in self.contract.observations.items():
            if stream.type != VECTOR:
                continue
            if name not in vectors:
                raise SimulationError(f"contract {self.contract.name!r}: Meta-World has no {name!r}; "
                                      f"choices: {choices(vectors)}")  # fmt: skip
            if len(stream.names) != len(vectors[name]):
                raise SimulationError(f"contract {self.contract.name!r}: {name!r} has {len(stream.names)} names, "
                                      f"Meta-World has {len(vectors[name])} numbers")  # fmt: skip
        sizes = [len(action.names) for action in self.contract.actions.values()]
        if sizes != [len(_scale())] or next(iter(self.contract.actions.values())).publish != "step":
            raise SimulationError(f"contract {self.contract.name!r}: actions of {sizes} entries; Meta-World obeys one "
                                  f"action of {len(_scale())}, a message a step")  # fmt: skip


def _scale() -> np.ndarray:
    """Full action (4,) in the contract's units: m/s, m/s, m/s and gripper effort."""
    return np.array([FULL_SPEED, FULL_SPEED, FULL_SPEED, 1.0])
