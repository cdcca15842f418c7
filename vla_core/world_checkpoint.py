"""A world model as a folder that is enough to run: as a policy's checkpoint, with no instruction in it.

``config.json`` (model, observation, normalization, how far it may be from what is seen), ``model.safetensors``,
``statistics.json`` and ``contract.yaml``. It is written beside its place and moved there whole; nothing is pickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from safetensors.torch import save_file

from vla_core import hub
from vla_core.checkpoint import (
    CheckpointError,
    fingerprint,
    load_weights,
    read_config,
    read_json,
    whole_folder,
    write_json,
)
from vla_core.config import ConfigError, to_dict
from vla_core.contract import RobotContract
from vla_core.model.inputs import ModelInputs
from vla_core.model.vla.sizes import columns, model_sizes
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.model.world_model import WORLD_MODEL_REGISTRY, WorldModel, build_world_model
from vla_core.observation.batch import collate
from vla_core.observation.builder import Observation, ObservationSpec
from vla_core.observation.normalizer import Normalization, Normalizer, entry_names

FORMAT = "vla_ros_world_v1"
FILES = ("config.json", "model.safetensors", "statistics.json", "contract.yaml")


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """``config.json``: all that is needed beside weights, statistics and contract.

    ``surprise`` is the divergence of posterior and prior, in nats and as the mean over ``surprise_window``
    observations, that held-out episodes hardly ever exceed: above it the model does not know what it sees. Entry k is
    that of observations k + 1 ticks apart; there is none where it was not measured.
    """

    format: str = FORMAT
    model: Annotated[Any, WORLD_MODEL_REGISTRY]
    observation: ObservationSpec
    normalization: Normalization = field(default_factory=Normalization)
    rewards: str = "simulator"
    surprise: tuple[float, ...] = ()
    surprise_window: int = 8
    provenance: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WorldCheckpoint:
    """A world model in memory."""

    config: WorldConfig
    model: WorldModel
    normalizer: Normalizer
    contract: RobotContract

    def inputs(self, observations: Sequence[Observation]) -> ModelInputs:
        """The batch (B, ...) that the model sees of ``observations``."""
        return collate(observations, self.normalizer, WordTokenizer(), self.config.observation)

    def save(self, path: Path | str) -> None:
        """Write the folder; an older world model at ``path`` is replaced once the new one is whole."""
        path = Path(path)
        check_replaceable(path)
        with whole_folder(path) as partial:
            write_json(partial / "config.json", to_dict(dataclasses.replace(self.config, model=self.model.config)))
            write_json(partial / "statistics.json", self.normalizer.statistics)
            (partial / "contract.yaml").write_text(self.contract.to_yaml(), encoding="utf-8")
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
            save_file(weights, partial / "model.safetensors")

    @classmethod
    def load(cls, path: Path | str) -> WorldCheckpoint:
        """Read a folder strictly; raises :class:`CheckpointError` naming what is missing or does not fit."""
        path = hub.local_folder(path)
        config = read_config(path, WorldConfig, FORMAT, FILES, "world model")
        contract = RobotContract.load(path / "contract.yaml")
        fitting = world_sizes(config.observation, contract)
        for key, expected in fitting.items():
            if getattr(config.model, key) != expected:
                raise CheckpointError(f"{path}: model.{key} is {getattr(config.model, key)!r}, but {expected!r} by the "
                                      "observation and the contract")  # fmt: skip
        model = build_world_model(config.model)
        load_weights(model, path / "model.safetensors")
        normalizer = world_normalizer(config, read_json(path / "statistics.json"), contract)
        return cls(config=config, model=model.eval(), normalizer=normalizer, contract=contract)


def is_world(path: Path) -> bool:
    """Whether ``path`` is the folder of a world model."""
    if not (path / "config.json").is_file():
        return False
    data = read_json(path / "config.json")
    return isinstance(data, dict) and data.get("format") == FORMAT


def check_replaceable(path: Path) -> None:
    """Raise unless a world model can be written at ``path``: nothing is there, or an older one."""
    if not path.name or (path.exists() and not is_world(path)):
        raise CheckpointError(f"{path}: exists and is no world model; name a new folder, or one with a world model")


def world_sizes(spec: ObservationSpec, contract: RobotContract) -> dict[str, Any]:
    """Arguments of a world model's ``config``, which follow from what is seen and from the robot."""
    if spec.instruction or spec.history > 1 or spec.calibrations:
        raise ConfigError("observation: a world model sees images, state, clouds, sequences and maps of one tick; "
                          "leave instruction, history and calibrations out")  # fmt: skip
    if contract.plans:
        raise ConfigError(f"contract {contract.name!r}: its action is a whole trajectory; a world model is of actions "
                          "that are executed a tick each")  # fmt: skip
    sizes = model_sizes(spec, contract, 2)
    return {key: value for key, value in sizes.items() if key not in ("vocab_size", "history", "calibrated")}


def world_normalizer(config: WorldConfig, statistics: Any, contract: RobotContract) -> Normalizer:
    """What normalizes state, action and streams."""
    return Normalizer(config.normalization, statistics, columns(config.observation, contract),
                      entry_names(config.observation, contract))  # fmt: skip


def world_fingerprint(path: Path | str) -> str:
    """As :func:`vla_core.checkpoint.fingerprint`."""
    return fingerprint(hub.local_folder(path))
