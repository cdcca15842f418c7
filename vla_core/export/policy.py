"""An exported policy in the place of its checkpoint: one call of a graph for an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_core.contract import RobotContract
from vla_core.export.engines import Engine, load_engine
from vla_core.export.feed import ExportError, check, feed
from vla_core.export.record import Export, read_record
from vla_core.model.action_head.draws import draw
from vla_core.model.inputs import ModelInputs, Remembers
from vla_core.model.vla import MODEL_REGISTRY
from vla_core.model.vla.sizes import columns
from vla_core.model.vlm.text_encoder import tokenizer_from_dict
from vla_core.observation.batch import collate
from vla_core.observation.builder import Observation
from vla_core.observation.normalizer import Normalizer, entry_names
from vla_core.runtime.chunk import ActionChunk, Continuation
from vla_core.runtime.policy import Policy, PolicyError, noise_seed


class ExportedPolicy(Policy):
    """A graph in this process, of the folder that ``vla export`` wrote.

    It draws the noise that the checkpoint would draw from ``seed`` and the observation's stamp, and answers alike.
    It samples no continuations: a graph has no gradients to guide it by.
    """

    def __init__(self, record: Export, contract: RobotContract, tokenizer: Any, engine: Engine,
                 normalizer: Normalizer, seed: int = 0) -> None:  # fmt: skip
        if seed < 0:
            raise PolicyError(f"seed: expected at least 0, found {seed}")
        config = record.policy
        self.record, self.contract = record, contract
        self.spec, self.execution = config.observation, config.execution
        self.model, self.horizon = config.model, config.model.horizon
        self.head = Unguided(f"{config.model.head.type} in a graph")
        self.provenance, self.seed = config.provenance, seed
        self.fingerprint = record.fingerprint
        self._asked = getattr(MODEL_REGISTRY[config.model.type], "needs_instruction", False)
        self._tokenizer, self._engine, self._normalizer = tokenizer, engine, normalizer

    @classmethod
    def load(cls, path: Path | str, seed: int = 0, source: str | None = None) -> ExportedPolicy:
        """Load a folder; raises :class:`ExportError` for what is missing, damaged, foreign, or of another machine."""
        folder = Path(path)
        record = read_record(folder)
        contract = RobotContract.load(folder / "contract.yaml")
        spec = record.policy.observation
        normalizer = Normalizer(record.policy.normalization, _json(folder / "statistics.json"),
                                columns(spec, contract), entry_names(spec, contract))  # fmt: skip
        tokenizer = tokenizer_from_dict(_json(folder / "tokenizer.json"))
        policy = cls(record, contract, tokenizer, load_engine(folder, record), normalizer, seed)
        policy.source = source or str(path)
        return policy

    def predict(self, observation: Observation, continues: Continuation | None = None) -> ActionChunk:
        if continues is not None:
            raise PolicyError("an exported policy cannot continue an older plan; choose another strategy than rtc")
        actions = self.answer(observation)
        if not np.isfinite(actions).all():
            raise PolicyError(f"the policy predicted a non-finite action at stamp {observation.stamp_ns}")
        return ActionChunk(observation.stamp_ns, self.contract.chunk_step_ns, actions, None)

    def answer(self, observation: Observation) -> np.ndarray:
        """The graph's chunk (H, A) float64 for one observation."""
        asks = self.spec.instruction
        if asks is not None and self._asked and not observation.present.get(asks, True):
            raise PolicyError(f"instruction: missing; {self.model.type} answers a question and has no mask for none: "
                              "set missing to refuse for it in the contract")  # fmt: skip
        inputs = feed(observation, self.spec, self.contract, self._tokenizer)
        if self.record.draws:
            generator = torch.Generator().manual_seed(noise_seed(self.seed, observation.stamp_ns))
            inputs["noise"] = draw(self.record.draws, generator).numpy()
        chunk = self._engine.run(check(inputs, self.record.inputs)).astype(np.float64)
        if list(chunk.shape) != list(self.record.outputs[0].shape):
            raise ExportError(f"the graph answered {list(chunk.shape)}, its record says "
                              f"{list(self.record.outputs[0].shape)}")  # fmt: skip
        return chunk

    def inputs(self, observations: Sequence[Observation]) -> ModelInputs:
        """The batch that the checkpoint's model would see; the graph makes it inside, of the same numbers."""
        remembers: Remembers = getattr(MODEL_REGISTRY[self.model.type], "remembers", "everything")
        return collate(observations, self._normalizer, self._tokenizer, self.spec, remembers=remembers)


class Unguided:
    """What an execution asks of a head, and what is told of it: it cannot be guided."""

    guidable = False

    def __init__(self, kind: str) -> None:
        self.type = kind


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path}: not valid JSON: {error}") from None
