"""What answers observations with chunks; the plainest is a checkpoint in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from vla_core import hub
from vla_core.checkpoint import Checkpoint, fingerprint
from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.inputs import ModelInputs, Remembers
from vla_core.observation.batch import collate
from vla_core.observation.builder import Observation, ObservationSpec
from vla_core.runtime.chunk import ActionChunk, Continuation
from vla_core.runtime.execution import Execution


class PolicyError(VlaError):
    """A prediction that must not reach a robot."""


class Policy:
    """Observation in, chunk of actions in the contract's units out: what the robot loop knows of a model.

    ``contract`` is the robot it is for, ``spec`` what it sees of it. ``execution`` says how its chunks are executed,
    ``horizon`` how many rows they have, and ``head`` what made them (whether they can be guided). ``model`` is the
    configuration with the sensors' mounts, where it is known. ``source`` is where it came from and ``fingerprint``
    what names it in diagnostics; ``provenance`` is what else was written down when it was trained.
    """

    contract: RobotContract
    spec: ObservationSpec
    execution: Execution
    horizon: int
    head: Any
    model: Any = None
    source: str = ""
    fingerprint: str = ""
    provenance: Mapping[str, str] = MappingProxyType({})

    def predict(self, observation: Observation, continues: Continuation | None = None) -> ActionChunk:
        """The chunk for one observation, continuing an older plan where one is given.

        Raises :class:`PolicyError` when it is not finite.
        """
        raise NotImplementedError

    def inputs(self, observations: Sequence[Observation]) -> ModelInputs | None:
        """The batch that the model sees of ``observations``; None where it is made elsewhere."""
        return None

    def close(self) -> None:
        """Give back what is held beside memory: a connection, a session."""


class CheckpointPolicy(Policy):
    """A checkpoint in this process.

    Sampling noise is drawn from ``seed`` and the observation's stamp, so that a replayed observation gives the
    chunk that the robot got.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int = 0) -> None:
        if seed < 0:
            raise PolicyError(f"seed: expected at least 0, found {seed}")
        config = checkpoint.config
        self.checkpoint = checkpoint
        self.contract = checkpoint.contract
        self.spec, self.execution = config.observation, config.execution
        self.model, self.horizon, self.head = config.model, config.model.horizon, config.model.head
        self.provenance = config.provenance
        self.seed = seed

    @classmethod
    def load(
        cls, path: Path | str, seed: int = 0, dataset: str | None = None, source: str | None = None
    ) -> CheckpointPolicy:
        """Load a checkpoint folder, or a hub's repository; ``dataset`` as :meth:`Checkpoint.load` takes it."""
        folder = hub.local_folder(path)
        policy = cls(Checkpoint.load(folder, dataset=dataset), seed)
        policy.source, policy.fingerprint = source or str(path), fingerprint(folder)
        return policy

    @torch.no_grad()  # not inference_mode, whose tensors guidance could not differentiate through
    def predict(self, observation: Observation, continues: Continuation | None = None) -> ActionChunk:
        model = self.checkpoint.model
        remembers: Remembers = getattr(model, "remembers", "everything")
        inputs = self.inputs([observation], remembers)
        generator = torch.Generator().manual_seed(_noise_seed(self.seed, observation.stamp_ns))
        normalized = model.predict(inputs, generator, self._prefix(continues))[0].numpy()  # (H, A)
        actions = self.checkpoint.normalizer.unnormalize("action", normalized)
        if not torch.isfinite(torch.from_numpy(actions)).all():
            raise PolicyError(f"the policy predicted a non-finite action at stamp {observation.stamp_ns}")
        return ActionChunk(observation.stamp_ns, self.contract.chunk_step_ns, actions, continues)

    def inputs(self, observations: Sequence[Observation], remembers: Remembers = "everything") -> ModelInputs:
        """The batch that the model sees of ``observations``; ``remembers`` as :func:`collate` takes it."""
        return collate(observations, self.checkpoint.normalizer, self.checkpoint.tokenizer, self.spec,
                       remembers=remembers)  # fmt: skip

    def _prefix(self, continues: Continuation | None) -> ChunkPrefix | None:
        if continues is None:
            return None
        return ChunkPrefix(
            actions=torch.from_numpy(self.checkpoint.normalizer.normalize("action", continues.actions)),
            weights=torch.from_numpy(continues.weights.astype(np.float32)),
            frozen=continues.frozen,
            max_guidance=continues.max_guidance,
            spread=continues.spread,
        )


def _noise_seed(seed: int, stamp_ns: int) -> int:
    """32 bits from both: torch's generator on the CPU ignores all higher ones."""
    return int(np.random.SeedSequence([seed, stamp_ns]).generate_state(1)[0])
