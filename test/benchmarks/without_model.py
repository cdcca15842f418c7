"""The policy node with everything but its model: a process that takes the node's arguments.

The checkpoint's model is loaded and never asked. The LiDAR, which that model could not take, joins what is observed.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from test.benchmarks.policies import SENSING_HORIZON
from test.benchmarks.robots import LIDARS, POINTS
from vla_core.observation.builder import CloudSpec, Observation
from vla_core.runtime.chunk_executor import ActionChunk
from vla_core.runtime.policy import Policy
from vla_ros import policy_node


class NoModel(Policy):
    """Answers every observation with zeros."""

    @classmethod
    def load(cls, path: Path | str, seed: int = 0) -> Policy:
        """Load a checkpoint and add the LiDARs to what it observes."""
        policy = super().load(path, seed)
        clouds = {f"lidar_{i}": CloudSpec(max_points=POINTS) for i in range(LIDARS)}
        policy.spec = dataclasses.replace(policy.spec, clouds=clouds)
        return policy

    def predict(self, observation: Observation, continues: Any = None) -> ActionChunk:
        """A chunk of zeros."""
        zeros = np.zeros((SENSING_HORIZON, len(self.contract.action_names)))
        return ActionChunk(observation.stamp_ns, self.contract.step_ns, zeros)


if __name__ == "__main__":
    policy_node.Policy = NoModel  # type: ignore[attr-defined]
    sys.exit(policy_node.main())
