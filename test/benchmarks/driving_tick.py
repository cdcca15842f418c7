"""A drive of the simulated vehicle as messages, and an untrained policy of the recipe ``drive`` for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from vla_core.checkpoint import Checkpoint, PolicyConfig
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.model.vla import MODEL_REGISTRY, build_model
from vla_core.model.vla.sizes import columns
from vla_core.observation.builder import Observation, ObservationBuilder
from vla_core.observation.messages import text
from vla_core.observation.normalizer import Normalizer, compute_statistics, entry_names
from vla_core.runtime.policy import CheckpointPolicy, Policy
from vla_core.sim.actuation import Follower
from vla_core.sim.base import HasExpert, View
from vla_core.sim.worlds import make_world
from vla_core.training.recipe import load_recipe

WORLD, SEED = "driving:mixed", 3
START_NS = 10 * NANOSECONDS


@dataclass(frozen=True)
class Tick:
    """The messages of a control period: (stream, data), and those of the odometry that the follower reads."""

    stamp_ns: int
    messages: list[tuple[str, bytes]]
    odometry: list[bytes]


@dataclass(frozen=True)
class Drive:
    """What a vehicle heard while the expert drove it; ``plans`` (N, 7, 4) are the expert's."""

    contract: RobotContract
    ticks: list[Tick]
    plans: np.ndarray
    words: str

    def observations(self, policy: Policy) -> list[Observation]:
        """What a policy sees at every tick."""
        builder = ObservationBuilder(policy.contract, policy.spec)
        return _observe(builder, self.ticks)


@functools.lru_cache(maxsize=2)
def record(ticks: int) -> Drive:
    """Drive, and keep every message."""
    contract = RobotContract.load("driving")
    world = make_world(WORLD, contract, View())
    assert isinstance(world, HasExpert), "this one has an expert"
    assert contract.following is not None, "it is a vehicle's"
    streams = {stream.topic: [] for stream in contract.observations.values()}  # type: dict[str, list[str]]
    for name, stream in contract.observations.items():
        streams[stream.topic].append(name)
    odometry = contract.stream(contract.following.odometry).topic
    world.reset(SEED)
    body, found, plans = Follower(contract), [], []
    words = world.instruction  # type: ignore[attr-defined]
    for step in range(ticks):
        stamp_ns = START_NS + step * contract.step_ns
        heard = world.observe_state(stamp_ns) + world.observe_camera(stamp_ns)
        heard.sort(key=lambda message: message.stamp_ns)
        told = [(name, m.data) for m in heard for name in streams.get(m.topic, ())]
        if step == 0:
            told.insert(0, ("instruction", text(words)))
        found.append(Tick(stamp_ns, told, [m.data for m in heard if m.topic == odometry]))
        plans.append(world.expert_rows())
        body.hear(heard)
        body.follow(plans[-1], stamp_ns)
        world.step(body.drive(stamp_ns))
    world.close()
    return Drive(contract, found, np.stack(plans).astype(np.float32), words)


def untrained(drive: Drive) -> Policy:
    """The recipe's policy with random weights, and the statistics of the drive."""
    recipe, contract = load_recipe("drive"), drive.contract
    builder = ObservationBuilder(contract, recipe.observation)
    seen = _observe(builder, drive.ticks)
    shown = columns(recipe.observation, contract)
    statistics = {"state": compute_statistics(np.stack([o.state for o in seen])),
                  "action": compute_statistics(drive.plans)}  # fmt: skip
    for name in shown:
        rows = [o.clouds[name] if name in o.clouds else o.sequences[name].values for o in seen
                if name in o.clouds or name in o.sequences]  # fmt: skip
        if sum(map(len, rows)):
            statistics[name] = compute_statistics(np.concatenate(rows))
    normalizer = Normalizer(recipe.normalization, statistics, shown, entry_names(recipe.observation, contract))
    tokenizer = MODEL_REGISTRY[recipe.model.type].tokenizer(recipe.model, [drive.words])
    torch.manual_seed(0)
    config = recipe.model_config(contract, tokenizer.vocab_size)
    return CheckpointPolicy(Checkpoint(
        config=PolicyConfig(model=config, observation=recipe.observation, normalization=recipe.normalization,
                            execution=recipe.execution),
        model=build_model(config).eval(), normalizer=normalizer, tokenizer=tokenizer, contract=contract,
    ))  # fmt: skip


def _observe(builder: ObservationBuilder, ticks: list[Tick]) -> list[Observation]:
    buffer, seen = builder.make_buffer(), []
    for tick in ticks:
        for name, data in tick.messages:
            if name in builder.streams:
                buffer.add(name, _stamp(builder, name, data, tick.stamp_ns), data, None)
        seen.append(builder.build(buffer, tick.stamp_ns))
    return seen


def _stamp(builder: ObservationBuilder, name: str, data: bytes, receive_ns: int) -> int:
    from vla_core.observation.messages import header_stamp_ns

    stamp = header_stamp_ns(builder.streams[name].type, data)
    return receive_ns if stamp is None else stamp
