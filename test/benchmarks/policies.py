"""Checkpoints for benchmarks: mini-VLAs with random weights for the robots of :mod:`test.benchmarks.robots`.

What a policy predicts does not matter here, what it costs does: the small one is nearly nothing, the large one a
denoiser of many steps, each of several operations, as real policies are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from test.benchmarks.robots import NAMES, SIDE
from vla_core.checkpoint import Checkpoint, PolicyConfig
from vla_core.contract import RobotContract
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig
from vla_core.model.vla.mini_vla import MiniVLA, MiniVLAConfig
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.model.vlm.vision_encoder import TinyCNNConfig
from vla_core.observation.builder import ImageSize, Observation, ObservationSpec
from vla_core.observation.normalizer import Normalization, Normalizer
from vla_core.runtime.execution import Execution
from vla_core.runtime.policy import CheckpointPolicy, Policy

TRAIN_STEPS = 1000
SENSING_HORIZON = 100  # two seconds: half of a chunk runs before the next is due


def save_small(path: Path, contract: RobotContract) -> None:
    """A policy that infers from every observation, at the least cost."""
    _checkpoint(contract, _seeing(SIDE), horizon=8, steps=1, head=MLPHeadConfig(hidden_dim=16)).save(path)


def save_large(path: Path, contract: RobotContract, milliseconds: float) -> float:
    """A policy that needs about ``milliseconds`` of one core; returns what it was measured to need.

    Its chunks are half a second long, so that one covers the time until the next is there.
    """
    torch.set_num_threads(1)
    horizon = round(contract.rate_hz / 2)
    steps, needed = 50, 0.0
    for _ in range(4):
        head = DiffusionHeadConfig(hidden_dim=768, layers=4, train_steps=TRAIN_STEPS, inference_steps=steps)
        checkpoint = _checkpoint(contract, _seeing(64), horizon, 1, head)
        policy = CheckpointPolicy(checkpoint)
        needed = min(predict_ms(policy, time.process_time) for _ in range(8))  # whatever else the machine does
        if abs(needed / milliseconds - 1) < 0.05:
            break
        steps = min(TRAIN_STEPS, max(1, round(steps * milliseconds / needed)))
    checkpoint.save(path)
    return needed


def save_sensing(path: Path, contract: RobotContract) -> None:
    """A policy of all cameras and IMUs that is asked once a second."""
    spec = ObservationSpec(
        images={name: ImageSize(height=SIDE, width=SIDE) for name in contract.observations if "camera" in name},
        state=tuple(name for name in contract.observations if "imu" in name),
    )
    steps = round(contract.rate_hz)
    _checkpoint(contract, spec, SENSING_HORIZON, steps, MLPHeadConfig(hidden_dim=16)).save(path)


def predict_ms(policy: Policy, clock: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds of one prediction from an empty observation, by a clock of seconds."""
    size = policy.spec.images["camera"]
    image = np.zeros((size.height, size.width, 3), dtype=np.uint8)
    start = clock()
    policy.predict(Observation(0, {"camera": image}, np.zeros(len(NAMES), dtype=np.float32), "", {}))
    return 1e3 * (clock() - start)


def _checkpoint(contract: RobotContract, spec: ObservationSpec, horizon: int, steps: int,
                head: MLPHeadConfig | DiffusionHeadConfig) -> Checkpoint:  # fmt: skip
    """Random weights; every number of the robot keeps its size on its way through the normalizer."""
    torch.manual_seed(0)
    tokenizer = WordTokenizer()
    sizes = {
        "state": sum(len(contract.stream(name).names) for name in spec.state),
        "action": len(contract.action_names),
    }
    config = MiniVLAConfig(
        cameras=tuple(spec.images), state_dim=sizes["state"], action_dim=sizes["action"], horizon=horizon,
        vocab_size=tokenizer.vocab_size, d_model=32, vision=TinyCNNConfig(d_model=32, channels=(4, 8)), head=head,
    )  # fmt: skip
    neutral = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0}
    statistics = {part: {key: [value] * size for key, value in neutral.items()} for part, size in sizes.items()}
    return Checkpoint(
        config=PolicyConfig(model=config, observation=spec, execution=Execution(steps=steps)),
        model=MiniVLA(config).eval(), normalizer=Normalizer(Normalization(), statistics), tokenizer=tokenizer,
        contract=contract,
    )  # fmt: skip


def _seeing(side: int) -> ObservationSpec:
    return ObservationSpec(images={"camera": ImageSize(height=side, width=side)}, state=("joints",))
