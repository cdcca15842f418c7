"""PushT as a robot: gym-pusht, the task of Chi et al. 2023 ("Diffusion Policy"), seen from above.

An episode succeeds when the T covers more than 95 % of its place; ``score`` is the largest share of that so far, whose
mean over episodes is the figure that Diffusion Policy reports.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from vla_core.contract import RobotContract
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

SQUARE = 512.0  # pixels, the range of positions
PICTURE_SIZE = 96
MAX_STEPS = 300
INSTRUCTION = "push the T onto its place"
VECTORS = {"agent": 2, "state": 5}


def pusht_task(task: str) -> Task:
    """The only task there is."""
    if task:
        raise SimulationError(f"pusht has one task, which needs no name; found {task!r}")
    return Task(world="pusht", instruction=INSTRUCTION, max_steps=MAX_STEPS)


def _environment(size: int) -> Any:
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        from gym_pusht.envs.pusht import PushTEnv
    except ImportError as error:
        raise SimulationError(f"PushT cannot be imported ({error}); install it: make simulators") from None
    return PushTEnv(
        obs_type="pixels_agent_pos", render_mode="rgb_array", observation_width=size, observation_height=size
    )


class PushT:
    """The contract may have the streams ``image``, ``agent``, ``state`` and latched ones, see
    ``config/robots/pusht.yaml``.
    """

    def __init__(self, contract: RobotContract, view: View) -> None:
        check_contract(contract, "PushT", VECTORS, ("image",), 2)
        self.contract, self.success = contract, False
        self.steps_per_frame = steps_per_frame(contract)
        self._streams = {name: s for name, s in contract.observations.items() if not s.latched}
        self._black = view.black
        self._env = _environment(view.size or PICTURE_SIZE)
        self._seen: dict[str, np.ndarray] = {}
        self._score = 0.0

    @property
    def score(self) -> float | None:
        """Largest covered share so far; 1 is what counts as success."""
        return self._score

    def reset(self, seed: int) -> None:
        """Start from the agent and the T where ``seed`` puts them."""
        self._seen, details = self._env.reset(seed=seed)
        self._pose = details["block_pose"]
        self.success, self._score = False, 0.0

    def rest(self) -> np.ndarray:
        """Where the agent is (2,)."""
        return np.array(self._seen["agent_pos"])

    def step(self, command: np.ndarray, pictures: bool = True) -> None:
        """Obey a command (2,) for one control step."""
        self._seen, reward, _, _, details = self._env.step(np.clip(np.asarray(command, np.float64), 0.0, SQUARE))
        self._pose = details["block_pose"]
        self._score = max(self._score, float(reward))
        self.success = self.success or bool(details["is_success"])

    def observe_state(self, stamp_ns: int) -> list[Message]:
        """The numeric streams of the contract."""
        agent, (x, y, angle) = self._seen["agent_pos"], self._pose
        values = {"agent": agent, "state": np.array([*agent, x, y, angle % (2 * np.pi)])}
        return [
            vector_message(stream, stamp_ns, values[name])
            for name, stream in self._streams.items() if stream.type == VECTOR
        ]  # fmt: skip

    def observe_camera(self, stamp_ns: int) -> list[Message]:
        """The picture from above."""
        pixels = np.zeros_like(self._seen["pixels"]) if self._black else self._seen["pixels"]
        return [
            picture_message(stream, stamp_ns, pixels, "camera")
            for stream in self._streams.values() if stream.type in IMAGES
        ]  # fmt: skip

    def render_for_people(self) -> np.ndarray:
        """The same larger, with a cross where the agent shall go, (680, 680, 3) uint8 RGB."""
        return np.asarray(self._env.render())

    def close(self) -> None:
        """Free what pygame holds."""
        self._env.close()
