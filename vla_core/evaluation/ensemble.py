"""Several policies as one: the mean of their chunks is executed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla_core.observation.builder import Observation
from vla_core.runtime.chunk import ActionChunk, Continuation
from vla_core.runtime.policy import Policy


class Ensemble(Policy):
    """Policies of one observation, one contract and one horizon; the first one's execution is taken.

    With RTC each member continues the common plan by itself.
    """

    def __init__(self, members: Sequence[Policy]) -> None:
        first = members[0]
        self.contract, self.spec, self.execution = first.contract, first.spec, first.execution
        self.horizon, self.head, self.model = first.horizon, first.head, first.model
        self.provenance = first.provenance
        self.members = tuple(members)

    def forget(self) -> None:
        for member in self.members:
            member.forget()

    def executed(self, at_ns: int, values: np.ndarray) -> None:
        for member in self.members:
            member.executed(at_ns, values)

    def predict(self, observation: Observation, continues: Continuation | None = None) -> ActionChunk:
        """The mean (H, A) of the members' chunks for one observation."""
        chunks = [member.predict(observation, continues) for member in self.members]
        mean = np.mean([chunk.actions for chunk in chunks], axis=0)
        return ActionChunk(chunks[0].observation_stamp_ns, chunks[0].step_ns, mean, continues)
