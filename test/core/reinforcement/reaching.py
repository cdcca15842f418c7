"""A world in which an arm is to come to rest position from anywhere, and an untrained policy with a Gaussian head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from test.core.helpers import CONTRACT
from vla_core.checkpoint import Checkpoint, PolicyConfig
from vla_core.contract import RobotContract
from vla_core.model.action_head.gaussian_action_head import GaussianHeadConfig
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig
from vla_core.model.vla.mini_vla import MiniVLA, MiniVLAConfig
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.model.vlm.vision_encoder import TinyCNNConfig
from vla_core.observation.builder import ObservationSpec
from vla_core.observation.messages import Message
from vla_core.observation.normalizer import Normalization, Normalizer
from vla_core.runtime.execution import Execution
from vla_core.sim.base import Simulator, Task, View, vector_message
from vla_core.sim.worlds import SIM_REGISTRY

SPEC = ObservationSpec(state=("arm",), instruction="task")
NEAR = 0.2  # rad, of each joint: there it has succeeded
STEPS = 24


class Reaching:
    """Joints (2,) that move by 0.2 of their command a step; the reward is how near they are to 0."""

    score = None
    steps_per_frame = 1

    def __init__(self, contract: RobotContract) -> None:
        self.contract = contract
        self.success, self.reward = False, 0.0

    def reset(self, seed: int) -> None:
        self.arm = np.random.default_rng(seed).choice([-1, 1], 2) * np.random.default_rng(seed).uniform(0.5, 1, 2)
        self.success, self.reward = False, 0.0

    def rest(self) -> np.ndarray:
        return np.zeros(2)

    def step(self, command: np.ndarray, pictures: bool = True) -> None:
        self.arm = np.clip(self.arm + 0.2 * np.asarray(command), -2, 2)
        self.reward = float(1 - np.abs(self.arm).mean() / 2)
        self.success = self.success or bool((np.abs(self.arm) < NEAR).all())

    def observe_state(self, stamp_ns: int) -> list[Message]:
        return [vector_message(self.contract.observations["arm"], stamp_ns, self.arm)]

    def observe_camera(self, stamp_ns: int) -> list[Message]:
        raise AssertionError("no camera is seen by this policy, so none must be asked")

    def render_for_people(self) -> np.ndarray:
        return np.zeros((32, 32, 3), np.uint8)

    def close(self) -> None:
        pass


def _task(name: str) -> Task:
    return Task(world=f"reaching:{name}", instruction="lift it", max_steps=STEPS)


def _make(name: str, contract: RobotContract, view: View) -> Reaching:
    return Reaching(contract)


@contextmanager
def reaching() -> Iterator[None]:
    """The world under the name ``reaching:it``."""
    SIM_REGISTRY["reaching"] = Simulator(contract="toy", task=_task, make=_make)
    try:
        yield
    finally:
        del SIM_REGISTRY["reaching"]


def gaussian_checkpoint(head: str = "gaussian", seed: int = 0) -> Checkpoint:
    """An untrained policy that sees the arm alone and executes two of four rows."""
    torch.manual_seed(seed)
    kind = GaussianHeadConfig(hidden_dim=32) if head == "gaussian" else MLPHeadConfig(hidden_dim=32)
    config = MiniVLAConfig(cameras=(), state_dim=2, action_dim=2, horizon=4, vocab_size=4, d_model=32,
                           vision=TinyCNNConfig(d_model=32, channels=(8, 16)), head=kind)  # fmt: skip
    numbers = {"mean": [0.0, 0.0], "std": [0.7, 0.7], "min": [-1.0, -2.0], "max": [1.0, 2.0]}
    tokenizer = WordTokenizer()
    tokenizer.fit(["lift it"])
    return Checkpoint(
        config=PolicyConfig(model=config, observation=SPEC, execution=Execution(steps=2)),
        model=MiniVLA(config).eval(),
        normalizer=Normalizer(Normalization(), {"state": numbers, "action": numbers}),
        tokenizer=tokenizer, contract=CONTRACT,
    )  # fmt: skip


def successes(checkpoint: Checkpoint, seeds: Sequence[int]) -> int:
    """How often the policy, as it is deployed, reaches it."""
    from vla_core.evaluation.closed_loop import closed_loop_success
    from vla_core.runtime.policy import CheckpointPolicy

    return int(closed_loop_success(CheckpointPolicy(checkpoint), "reaching:it", seeds)["successes"])
