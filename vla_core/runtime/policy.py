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
from vla_core.errors import VlaError, choices
from vla_core.model.action_head.draws import EachRow
from vla_core.model.action_head.guidance import ChunkPrefix, ChunkPrefixes
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
    configuration with the sensors' mounts, where it is known; it ``remembers`` all of past ticks or their state alone.
    ``source`` is where it came from and ``fingerprint`` what names it in diagnostics; ``provenance`` is what else was
    written down when it was trained.
    """

    contract: RobotContract
    spec: ObservationSpec
    execution: Execution
    horizon: int
    head: Any
    model: Any = None
    remembers: Remembers = "everything"
    source: str = ""
    fingerprint: str = ""
    provenance: Mapping[str, str] = MappingProxyType({})

    def predict(self, observation: Observation, continues: Continuation | None = None) -> ActionChunk:
        """The chunk for one observation, continuing an older plan where one is given.

        Raises :class:`PolicyError` when it is not finite.
        """
        raise NotImplementedError

    def predict_batch(
        self, observations: Sequence[Observation], continues: Sequence[Continuation | None]
    ) -> list[ActionChunk]:  # fmt: skip
        """The chunks that :meth:`predict` gives of each by itself, computed together where that is possible."""
        return [self.predict(*pair) for pair in zip(observations, continues, strict=True)]

    def inputs(self, observations: Sequence[Observation]) -> ModelInputs | None:
        """The batch that the model sees of ``observations``; None where it is made elsewhere."""
        return None

    def forget(self) -> None:
        """Another episode begins: what was remembered of the last one is no longer so."""

    def executed(self, at_ns: int, values: np.ndarray) -> None:
        """What was commanded at ``at_ns``: (A,) in the contract's units. For policies that reckon with it."""

    def report(self) -> dict[str, float | int | str | None]:
        """Figures for diagnostics."""
        return {}

    def imagined(self) -> np.ndarray | None:
        """What is expected to be seen, (H, W, 3) uint8 RGB for people; None for policies that imagine nothing."""
        return None

    @property
    def fault(self) -> str:
        """What keeps it from answering at all, named; empty when nothing does."""
        return ""

    def close(self) -> None:
        """Give back what is held beside memory: a connection, a session."""


class CheckpointPolicy(Policy):
    """A checkpoint in this process.

    Sampling noise is drawn from ``seed`` and the observation's stamp, so that a replayed observation gives the
    chunk that the robot got. The model runs on ``device``, such as ``cuda``; what goes in and comes out stays on the
    CPU.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int = 0, device: str = "cpu") -> None:
        if seed < 0:
            raise PolicyError(f"seed: expected at least 0, found {seed}")
        config = checkpoint.config
        self.device = find_device(device)
        checkpoint.model.to(self.device)
        self.checkpoint = checkpoint
        self.contract = checkpoint.contract
        self.spec, self.execution = config.observation, config.execution
        self.model, self.horizon, self.head = config.model, config.model.horizon, config.model.head
        self.remembers = getattr(checkpoint.model, "remembers", "everything")
        self.provenance = config.provenance
        self.seed = seed

    @classmethod
    def load(
        cls, path: Path | str, seed: int = 0, dataset: str | None = None, source: str | None = None,
        device: str = "cpu",
    ) -> CheckpointPolicy:  # fmt: skip
        """Load a checkpoint folder, or a hub's repository; ``dataset`` as :meth:`Checkpoint.load` takes it."""
        folder = hub.local_folder(path)
        find_device(device)  # which fails before a large model is read
        policy = cls(Checkpoint.load(folder, dataset=dataset), seed, device)
        policy.source, policy.fingerprint = source or str(path), fingerprint(folder)
        return policy

    @torch.no_grad()  # not inference_mode, whose tensors guidance could not differentiate through
    def predict(self, observation: Observation, continues: Continuation | None = None) -> ActionChunk:
        generator = self._generator(observation)
        (normalized,) = self._run([observation], generator, self._prefix(continues))
        return self._chunk(observation, normalized, continues)

    @torch.no_grad()
    def predict_batch(
        self, observations: Sequence[Observation], continues: Sequence[Continuation | None]
    ) -> list[ActionChunk]:  # fmt: skip
        """One call of the model; each observation draws its own noise, as :meth:`predict` does."""
        prefixes = tuple(map(self._prefix, continues))
        generator = EachRow([self._generator(observation) for observation in observations])
        rows = self._run(observations, generator, ChunkPrefixes(prefixes) if any(prefixes) else None)
        return [self._chunk(*parts) for parts in zip(observations, rows, continues, strict=True)]

    def _run(
        self, observations: Sequence[Observation], generator: torch.Generator,
        prefix: ChunkPrefix | ChunkPrefixes | None,
    ) -> np.ndarray:  # fmt: skip
        """Normalized actions (B, H, A)."""
        model = self.checkpoint.model
        inputs = self.inputs(observations, self.remembers).to(self.device)
        actions: np.ndarray = model.predict(inputs, generator, prefix).cpu().numpy()
        return actions

    def _generator(self, observation: Observation) -> torch.Generator:
        return torch.Generator().manual_seed(noise_seed(self.seed, observation.stamp_ns))

    def _chunk(self, observation: Observation, normalized: np.ndarray, continues: Continuation | None) -> ActionChunk:
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
            actions=torch.from_numpy(self.checkpoint.normalizer.normalize("action", continues.actions)).to(self.device),
            weights=torch.from_numpy(continues.weights.astype(np.float32)).to(self.device),
            frozen=continues.frozen,
            max_guidance=continues.max_guidance,
            spread=continues.spread,
        )


def find_device(name: str) -> torch.device:
    """The device of that name; raises :class:`PolicyError` for one that is not there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, NotImplementedError, AssertionError):  # torch without CUDA asserts
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise PolicyError(
            f"device {name!r}: torch {torch.__version__} has none here; choices: {choices(there)}"
        ) from None
    return device


def noise_seed(seed: int, stamp_ns: int) -> int:
    """32 bits from both: torch's generator on the CPU ignores all higher ones."""
    return int(np.random.SeedSequence([seed, stamp_ns]).generate_state(1)[0])
