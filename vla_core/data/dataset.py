"""The training set: episodes on disk, and chunk windows over them.

A dataset is a folder with ``dataset.json`` and one safetensors file an episode. It is built beside its place and
moved there when it is whole, so a folder with ``dataset.json`` is a complete dataset.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vla_core.config import from_dict, to_dict
from vla_core.contract import RobotContract
from vla_core.data.bag import CONTRACT_KEY
from vla_core.data.bag import info as bag_info
from vla_core.data.episodes import Episode, read_episode
from vla_core.errors import VlaError
from vla_core.observation.builder import ObservationSpec
from vla_core.observation.normalizer import Statistics, compute_statistics

FORMAT = "vla_ros_dataset_v1"


class DatasetError(VlaError):
    """A dataset that cannot be written or read."""


@dataclass(frozen=True)
class EpisodeData:
    """Arrays of one episode of N ticks: images (N, H, W, 3) uint8, state (N, S) and action (N, A) float32."""

    images: dict[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray
    stamps_ns: np.ndarray
    instruction: str
    seed: int
    bag: str

    def __len__(self) -> int:
        return len(self.action)


@dataclass(frozen=True)
class Dataset:
    """Episodes of one contract and one observation spec, in memory."""

    contract: RobotContract
    spec: ObservationSpec
    episodes: list[EpisodeData]

    @property
    def frames(self) -> int:
        """Ticks of all episodes."""
        return sum(map(len, self.episodes))

    def statistics(self) -> Statistics:
        """Statistics of ``state`` and ``action`` over all ticks."""
        return {
            "state": compute_statistics(np.concatenate([e.state for e in self.episodes])),
            "action": compute_statistics(np.concatenate([e.action for e in self.episodes])),
        }


def convert(
    bags: Sequence[Path],
    out: Path,
    spec: ObservationSpec,
    contract: RobotContract | None = None,
    keep_failed: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Dataset:
    """Build the dataset ``out`` from ``bags``, one episode a bag; nothing is left behind when a bag is bad.

    Args:
        contract: the contract to read the bags by; None takes the one embedded in the first bag.
        keep_failed: keep episodes that are marked as failed or aborted; they are no demonstrations.
        progress: called with the number of bags done.
    """
    if out.exists():
        raise DatasetError(f"{out} exists already; remove it or choose another folder")
    if not bags:
        raise DatasetError("no bags to convert")
    if spec.extras:
        raise DatasetError(f"a dataset holds images, one state and an instruction, not {', '.join(spec.extras)}; take "
                           "them out of the observation")  # fmt: skip
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "episodes").mkdir(parents=True)
    try:
        entries: list[dict[str, Any]] = []
        left_out: list[str] = []
        contract = contract or bag_info(bags[0]).contract
        for index, path in enumerate(bags):
            recorded = bag_info(path)
            own = contract
            if CONTRACT_KEY in recorded.metadata:
                contract.check_same(recorded.contract, "the dataset", str(path))
                own = contract.with_topics_of(recorded.contract)
            progress(index + 1)
            episode = read_episode(path, own, spec)
            if episode.info.outcome in ("started", "failed", "aborted") and not keep_failed:
                left_out.append(path.name)
                continue
            _check_whole(episode)
            save_file(_arrays(episode), partial / "episodes" / f"episode_{len(entries):06d}.safetensors")
            entries.append({
                "bag": path.name, "length": len(episode.actions), "dropped_ticks": episode.dropped_ticks,
                "instruction": episode.observations[0].instruction or episode.info.instruction,
                "seed": episode.info.seed, "outcome": episode.info.outcome,
            })  # fmt: skip
        if not entries:
            raise DatasetError(f"none of the {len(bags)} episodes succeeded; keep failed ones with --keep-failed")
        description = {"format": FORMAT, "contract": to_dict(contract), "observation": to_dict(spec),
                       "episodes": entries, "left_out": left_out}  # fmt: skip
        (partial / "dataset.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
        os.replace(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # a full disk, in the words of safetensors
            raise DatasetError(f"{out}: cannot be written: {error}") from None
        raise
    return load(out)


def load(path: Path | str) -> Dataset:
    """Read a dataset folder into memory."""
    path = Path(path)
    description_file = path / "dataset.json"
    if not description_file.is_file():
        raise DatasetError(f"{path}: no dataset here (no dataset.json)")
    try:
        description = json.loads(description_file.read_text(encoding="utf-8"))
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            found = description.get("format") if isinstance(description, dict) else type(description).__name__
            raise DatasetError(f"{path}: format {found!r}, expected {FORMAT!r}")
        contract = from_dict(RobotContract, description["contract"], "contract")
        spec = from_dict(ObservationSpec, description["observation"], "observation")
        episodes = [
            _episode_data(load_file(path / "episodes" / f"episode_{i:06d}.safetensors"), entry)
            for i, entry in enumerate(description["episodes"])
        ]
    except (KeyError, OSError, json.JSONDecodeError, SafetensorError) as error:
        raise DatasetError(f"{path}: damaged dataset: {error!r}") from None
    return Dataset(contract, spec, episodes)


def _check_whole(episode: Episode) -> None:
    """Raise when a stream was masked: a dataset has no masks."""
    for name in episode.observations[0].present:
        masked = sum(not seen.present[name] for seen in episode.observations)
        if masked:
            raise DatasetError(f"{episode.bag}: {name} is masked at {masked} of {len(episode.observations)} ticks, and "
                               "a dataset has no masks; let its stream refuse, or leave this bag out")  # fmt: skip


def _arrays(episode: Episode) -> dict[str, np.ndarray]:
    arrays = {
        f"image.{name}": np.stack([o.images[name] for o in episode.observations])
        for name in episode.observations[0].images
    }
    arrays["state"] = np.stack([o.state for o in episode.observations])
    arrays["stamp_ns"] = np.array([o.stamp_ns for o in episode.observations], dtype=np.int64)
    arrays["action"] = episode.actions
    return arrays


def _episode_data(arrays: dict[str, np.ndarray], entry: dict[str, Any]) -> EpisodeData:
    images = {name.removeprefix("image."): array for name, array in arrays.items() if name.startswith("image.")}
    if len(arrays["action"]) != entry["length"]:
        raise DatasetError(f"episode of {entry['bag']}: {len(arrays['action'])} ticks, expected {entry['length']}")
    return EpisodeData(images, arrays["state"], arrays["action"], arrays["stamp_ns"],
                       entry["instruction"], entry["seed"], entry["bag"])  # fmt: skip


class ChunkWindows:
    """Every tick of a dataset with the chunk of H actions from it on; steps past the episode's end are masked.

    All ticks stand in one array per feature, so that a batch is one indexing operation.
    """

    def __init__(self, dataset: Dataset, horizon: int) -> None:
        episodes = dataset.episodes
        self.images = {
            name: torch.from_numpy(np.concatenate([e.images[name] for e in episodes])) for name in dataset.spec.images
        }
        self.state = np.concatenate([e.state for e in episodes])
        self.action = np.concatenate([e.action for e in episodes])
        lengths = [len(e) for e in episodes]
        self.instructions = [e.instruction for e in episodes for _ in range(len(e))]
        ends = np.repeat(np.cumsum(lengths), lengths)
        reach = np.arange(len(self.action))[:, None] + np.arange(horizon)[None, :]
        self.chunk_index = np.minimum(reach, ends[:, None] - 1)
        # Where ticks were dropped, the next row is not the next step: a chunk ends before the hole.
        stamps = np.concatenate([e.stamps_ns for e in episodes])
        due = stamps[:, None] + np.arange(horizon)[None, :] * dataset.contract.step_ns
        self.mask = (reach < ends[:, None]) & (stamps[self.chunk_index] == due)

    def __len__(self) -> int:
        return len(self.action)

    def chunks(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Actions (B, H, A) in physical units and their mask (B, H); masked steps repeat the last action."""
        return self.action[self.chunk_index[index]], self.mask[index]
