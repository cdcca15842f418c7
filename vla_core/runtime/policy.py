"""A checkpoint that answers observations with chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vla_core.checkpoint import Checkpoint
from vla_core.errors import VlaError
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.inputs import Remembers
from vla_core.observation.batch import collate
from vla_core.observation.builder import Observation
from vla_core.runtime.chunk import ActionChunk, Continuation


class PolicyError(VlaError):
    """A prediction that must not reach a robot."""


class Policy:
    """Observation in, chunk of actions in the contract's units out.

    Sampling noise is drawn from ``seed`` and the observation's stamp, so that a replayed observation gives the
    chunk that the robot got.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int = 0) -> None:
        if seed < 0:
            raise PolicyError(f"seed: expected at least 0, found {seed}")
        self.checkpoint = checkpoint
        self.contract = checkpoint.contract
        self.spec = checkpoint.config.observation
        self.seed = seed

    @classmethod
    def load(cls, path: Path | str, seed: int = 0, dataset: str | None = None) -> Policy:
        """Load a checkpoint folder, or a hub's repository; ``dataset`` as :meth:`Checkpoint.load` takes it."""
        return cls(Checkpoint.from_pretrained(path, dataset=dataset), seed)

    @torch.no_grad()  # not inference_mode, whose tensors guidance could not differentiate through
    def predict(self, observation: Observation, continues: Continuation | None = None) -> ActionChunk:
        """The chunk for one observation, continuing an older plan where one is given.

        Raises :class:`PolicyError` when it is not finite.
        """
        model, tokenizer = self.checkpoint.model, self.checkpoint.tokenizer
        remembers: Remembers = getattr(model, "remembers", "everything")
        inputs = collate([observation], self.checkpoint.normalizer, tokenizer, self.spec, remembers=remembers)
        generator = torch.Generator().manual_seed(_noise_seed(self.seed, observation.stamp_ns))
        normalized = model.predict(inputs, generator, self._prefix(continues))[0].numpy()  # (H, A)
        actions = self.checkpoint.normalizer.unnormalize("action", normalized)
        if not torch.isfinite(torch.from_numpy(actions)).all():
            raise PolicyError(f"the policy predicted a non-finite action at stamp {observation.stamp_ns}")
        return ActionChunk(observation.stamp_ns, self.contract.chunk_step_ns, actions, continues)

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
