"""Train/deploy parity: what a live policy was given, against what its recorded bag gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from torch.nn.functional import pad

from vla_core.data import bag as bags
from vla_core.data.episodes import EPISODE_TOPIC, episode_starts
from vla_core.errors import VlaError
from vla_core.model.inputs import Masked, ModelInputs
from vla_core.observation.builder import Observation, ObservationBuilder, ObservationSpec, Unobserved
from vla_core.runtime.chunk import ActionChunk, Continuation
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.policy import Policy

MAX_ENTRIES = 500


class ParityError(VlaError):
    """Nothing to compare."""


class InputLog:
    """The first ``MAX_ENTRIES`` observations and chunks of a run, in memory until saved."""

    def __init__(self) -> None:
        self._entries: list[tuple[Observation, ActionChunk]] = []

    def add(self, observation: Observation, chunk: ActionChunk) -> None:
        """Keep one inference."""
        if len(self._entries) < MAX_ENTRIES:
            self._entries.append((observation, chunk))

    def save(self, path: Path, policy: Policy) -> None:
        """Write stamps, model inputs and chunks as one safetensors file; nothing when there was no inference."""
        if self._entries:
            save_file(_arrays(policy, self._entries), path)


@dataclass(frozen=True)
class Parity:
    """Largest absolute difference over all model inputs, and over all chunks, of ``compared`` inferences."""

    compared: int
    inputs_max_abs_diff: float
    chunks_max_abs_diff: float


def compare(log: Path, bag: Path, policy: Policy) -> Parity:
    """Rebuild from ``bag`` every logged model input whose stamp lies in it, and compare bit by bit."""
    if not log.is_file():
        raise ParityError(f"{log}: the live run wrote no model inputs")
    live = load_file(log)
    core = PolicyCore(policy)
    summary = bags.info(bag)
    builder = core.builder
    if bags.CONTRACT_KEY in summary.metadata:
        builder = ObservationBuilder(policy.contract.with_topics_of(summary.contract), policy.spec)
    bags.require_topics(summary, {s.topic: s.type for s in builder.streams.values()})
    everything = list(bags.read(bag, {*builder.by_topic, EPISODE_TOPIC}))
    starts = episode_starts(everything)
    messages = sorted((m for m in everything if m.topic in builder.by_topic), key=lambda m: m.stamp_ns)
    entries: list[tuple[Observation, ActionChunk]] = []
    rows, fed = [], 0
    for row, stamp_ns in enumerate(live["stamp_ns"].tolist()):
        while starts and starts[0] <= stamp_ns:
            core.buffer.start_episode(starts.pop(0))
        while fed < len(messages) and messages[fed].stamp_ns <= stamp_ns:
            for name in builder.by_topic[messages[fed].topic]:
                core.buffer.add(name, messages[fed].stamp_ns, messages[fed].data)
            fed += 1
        if fed == 0 or (fed == len(messages) and messages[-1].stamp_ns < stamp_ns):
            continue  # before or after this bag
        try:
            observation = builder.build(core.buffer, stamp_ns)
        except Unobserved:
            continue
        entries.append((observation, policy.predict(observation, _continuation(live, row))))
        rows.append(row)
    if not entries:
        raise ParityError(f"{bag}: none of the {len(live['stamp_ns'])} logged stamps lies in this bag")
    replayed = _arrays(policy, entries)
    differences = {name: _max_abs_diff(live[name][rows], replayed[name]) for name in replayed}
    chunks = differences.pop("chunk")
    return Parity(len(rows), max(differences.values()), chunks)


def _continuation(live: dict[str, np.ndarray], row: int) -> Continuation | None:
    """The plan that the logged chunk ``row`` was sampled to continue."""
    if "continues.frozen" not in live or live["continues.frozen"][row] < 0:
        return None
    return Continuation(
        live["continues.actions"][row], live["continues.weights"][row], int(live["continues.frozen"][row]),
        float(live["continues.max_guidance"][row]), float(live["continues.spread"][row]),
    )  # fmt: skip


def _max_abs_diff(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))


def _arrays(policy: Policy, entries: list[tuple[Observation, ActionChunk]]) -> dict[str, np.ndarray]:
    """Over N inferences: ``stamp_ns`` (N,), ``chunk`` (N, H, A), and every tensor that the model saw."""
    seen = [observation for observation, _ in entries]
    answered = {
        **_continued([chunk for _, chunk in entries]),
        "stamp_ns": np.array([observation.stamp_ns for observation in seen], dtype=np.int64),
        "chunk": np.stack([chunk.actions for _, chunk in entries]),
    }
    inputs = policy.inputs(seen)
    if inputs is None:
        return {**answered, "state": np.stack([observation.state for observation in seen])}
    return {
        **answered,
        "state": inputs.state.numpy(),
        "tokens": inputs.tokens.numpy(),
        "state_mask": inputs.state_mask.numpy(),
        **{f"image.{name}": pixels.numpy() for name, pixels in inputs.images.items()},
        **{f"image_mask.{name}": mask.numpy() for name, mask in inputs.image_mask.items()},
        **_sensors(inputs, policy.spec),
    }


def _sensors(inputs: ModelInputs, spec: ObservationSpec) -> dict[str, np.ndarray]:
    """Clouds, windows and maps, with their masks; clouds padded to the most points that they may have."""
    clouds = {}
    for name, (values, mask) in inputs.clouds.items():
        room = spec.clouds[name].max_points - mask.shape[1]
        clouds[name] = Masked(pad(values, (0, 0, 0, room)), pad(mask, (0, room)))
    found = {**clouds, **inputs.sequences, **inputs.maps}
    arrays = {f"sensor.{name}": sensor.values.numpy() for name, sensor in found.items()}
    return {**arrays, **{f"sensor_mask.{name}": sensor.mask.numpy() for name, sensor in found.items()}}


def _continued(chunks: list[ActionChunk]) -> dict[str, np.ndarray]:
    """What guided chunks were guided by, so that they can be replayed; ``continues.frozen`` is -1 without guidance."""
    if all(chunk.continues is None for chunk in chunks):
        return {}
    blank = Continuation(np.zeros_like(chunks[0].actions), np.zeros(len(chunks[0].actions)), -1, 0.0)
    found = [chunk.continues or blank for chunk in chunks]
    return {
        "continues.actions": np.stack([c.actions for c in found]),
        "continues.weights": np.stack([c.weights for c in found]),
        "continues.frozen": np.array([c.frozen for c in found], dtype=np.int64),
        "continues.max_guidance": np.array([c.max_guidance for c in found]),
        "continues.spread": np.array([c.spread for c in found]),
    }
