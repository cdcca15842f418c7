"""The policy node with everything but its model: a process that takes the node's arguments.

The checkpoint's model is loaded and never asked. The LiDAR, which that model could not take, joins what is observed.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np

from test.benchmarks.policies import SENSING_HORIZON
from test.benchmarks.robots import LIDARS, POINTS
from vla_core.checkpoint import Checkpoint
from vla_core.observation.builder import CloudSpec, Observation
from vla_core.runtime import loading
from vla_core.runtime.chunk_executor import ActionChunk
from vla_core.runtime.policy import CheckpointPolicy
from vla_ros import policy_node


class NoModel(CheckpointPolicy):
    """Answers every observation with zeros."""

    def __init__(self, checkpoint: Checkpoint, seed: int = 0) -> None:
        super().__init__(checkpoint, seed)
        clouds = {f"lidar_{i}": CloudSpec(max_points=POINTS) for i in range(LIDARS)}
        self.spec = dataclasses.replace(self.spec, clouds=clouds)

    def predict(self, observation: Observation, continues: Any = None) -> ActionChunk:
        """A chunk of zeros."""
        zeros = np.zeros((SENSING_HORIZON, len(self.contract.action_names)))
        return ActionChunk(observation.stamp_ns, self.contract.step_ns, zeros)


if __name__ == "__main__":
    loading.CheckpointPolicy = NoModel  # type: ignore[misc]
    sys.exit(policy_node.main())
