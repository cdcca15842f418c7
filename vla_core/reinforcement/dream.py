"""Actor and critic that were learned in a world model, as a folder: ``vla dream``, for a planner to use.

``config.json`` (the algorithm's numbers, sizes, and which world model it is of) and ``model.safetensors``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from vla_core import hub
from vla_core.checkpoint import CheckpointError, load_weights, read_config, read_json, whole_folder, write_json
from vla_core.config import to_dict
from vla_core.data.sampler import Sampler
from vla_core.data.sequences import Sequences
from vla_core.model.checks import at_least_one
from vla_core.model.world_model import State, WorldModel
from vla_core.reinforcement.imagination import Dreamer, Dreaming, Figures

FORMAT = "vla_ros_dreamer_v1"
FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class Dreams:
    """How long, and from where: ``starts`` states of ``batch_size`` sequences of ``ticks`` begin a step's dreams."""

    steps: int = 3000
    batch_size: int = 16
    ticks: int = 32
    starts: int = 256
    seed: int = 0
    dreaming: Dreaming = field(default_factory=Dreaming)

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "batch_size", "ticks", "starts")


@dataclass(frozen=True, kw_only=True)
class DreamerConfig:
    """``config.json``; ``world`` is the fingerprint of the world model, in no other one its numbers mean anything."""

    format: str = FORMAT
    world: str
    feature_dim: int
    action_dim: int
    dreaming: Dreaming


def dream(model: WorldModel, sequences: Sequences, options: Dreams,
          report: Callable[[int, Figures], None] = lambda step, figures: None) -> Dreamer:  # fmt: skip
    """Learn in the imagination of ``model``, which stays as it is, from states that it infers of ``sequences``."""
    model = model.eval()
    dreamer = Dreamer(model, model.feature_dim, model.config.action_dim, options.dreaming, options.seed)
    sampler = Sampler(sequences.lengths, None, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        batch = sequences.draw(sampler.rows(step, options.batch_size))
        with torch.no_grad():
            seen = model.observe(batch.inputs, batch.previous, batch.first, generator=generator).states
        places = batch.mask.nonzero()  # (M, 2), ticks that are there
        picked = places[torch.randperm(len(places), generator=generator)[: options.starts]]
        report(step + 1, dreamer.update(_at(seen, picked)))
    return dreamer


def _at(states: State, places: torch.Tensor) -> State:
    """The states (N, ...) at rows and ticks (N, 2) of (B, T, ...)."""
    return states.map(lambda x: x[places[:, 0], places[:, 1]])


def proposal(dreamer: Dreamer, model: WorldModel, state: State, horizon: int) -> torch.Tensor:
    """What the actor would do from ``state`` (1, ...) on, as far as the world model knows: (1, H, A), normalized."""
    rows = []
    for _ in range(horizon):
        action = dreamer.act(state)
        state = model.imagine(state, action[:, None], sample=False).map(lambda x: x[:, 0])
        rows.append(action)
    return torch.stack(rows, dim=1)


def save(dreamer: Dreamer, world: str, path: Path) -> None:
    """Write the folder; an older one at ``path`` is replaced once the new one is whole."""
    check_replaceable(path)
    config = DreamerConfig(world=world, feature_dim=dreamer.feature_dim, action_dim=dreamer.action_dim,
                           dreaming=dreamer.options)  # fmt: skip
    with whole_folder(path) as partial:
        write_json(partial / "config.json", to_dict(config))
        save_file({name: tensor.contiguous() for name, tensor in dreamer.parts.state_dict().items()},
                  partial / "model.safetensors")  # fmt: skip


def load(path: Path | str, model: WorldModel, world: str) -> Dreamer:
    """Read a folder strictly, for the world model of the fingerprint ``world``; raises :class:`CheckpointError`."""
    path = hub.local_folder(path)
    config = read_config(path, DreamerConfig, FORMAT, FILES, "dreamer")
    if config.world != world:
        raise CheckpointError(f"{path}: learned in the world model {config.world}, but the planner's is {world}; run "
                              "`vla dream` with this world model")  # fmt: skip
    dreamer = Dreamer(model, config.feature_dim, config.action_dim, config.dreaming)
    load_weights(dreamer.parts, path / "model.safetensors")
    dreamer.parts.eval()
    return dreamer


def check_replaceable(path: Path) -> None:
    """Raise unless a dreamer can be written at ``path``: nothing is there, or an older one."""
    if not path.name or (path.exists() and not _is_dreamer(path)):
        raise CheckpointError(f"{path}: exists and is no dreamer; name a new folder, or one with a dreamer")


def _is_dreamer(path: Path) -> bool:
    if not (path / "config.json").is_file():
        return False
    data = read_json(path / "config.json")
    return isinstance(data, dict) and data.get("format") == FORMAT
