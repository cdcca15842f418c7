"""What every whole model is: observations to chunks of actions, built from one typed configuration."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vla_core.errors import VlaError, choices
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.inputs import ModelInputs, Remembers


class PolicyModel(nn.Module):
    """Observations to a chunk of normalized actions (B, horizon, action_dim).

    ``Recipe`` has the free choices, and its ``config(**sizes)`` returns a ``Config``: the choices and the sizes that
    follow from the robot and the data (``model.vla.sizes``). Both have ``horizon`` and ``head``. ``sees`` are the
    places of an observation spec that the model takes, ``remembers`` what it reads of past ticks.
    """

    Config: type[Any]
    Recipe: type[Any]
    sees: tuple[str, ...] = ("images", "state", "instruction")
    remembers: Remembers = "everything"
    config: Any

    @staticmethod
    @abstractmethod
    def tokenizer(recipe: Any, texts: Iterable[str]) -> Any:
        """Return the tokenizer for the instructions ``texts`` of a training set."""

    @abstractmethod
    def loss(self, inputs: ModelInputs, actions: Tensor, mask: Tensor,
             generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
        """Return the head's scalar loss for ``actions`` (B, H, A) where ``mask`` (B, H) is True."""

    @abstractmethod
    def predict(self, inputs: ModelInputs, generator: torch.Generator | None = None,
                prefix: ChunkPrefix | None = None) -> Tensor:  # fmt: skip
        """Return the chunk (B, H, A) in normalized action units, continuing ``prefix`` where one is given."""

    def forget(self) -> None:
        """Drop what is kept from one call to the next: the weights may have changed. Most models keep nothing."""

    def figures(self) -> dict[str, float]:
        """What the model has to tell of its own while it is trained, such as how often a cache had what was asked."""
        return {}

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass; raises :class:`VlaError` where nothing can be."""
        raise VlaError(f"a model of type {self.config.type!r} has nothing that could be recomputed")


MODEL_REGISTRY: dict[str, type[Any]] = {}


def build_model(config: Any, *, weights: bool = True, **parts: Any) -> Any:
    """Build the model that is registered under ``config.type``; ``parts`` are modules of the caller's own.

    ``weights`` False: they are loaded next, and a large model, whose class has a ``without_weights``, holds none yet.
    """
    if config.type not in MODEL_REGISTRY:
        raise VlaError(f"no model {config.type!r} registered; choices: {choices(MODEL_REGISTRY)}")
    build = MODEL_REGISTRY[config.type]
    return (build if weights else getattr(build, "without_weights", build))(config, **parts)
