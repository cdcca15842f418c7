"""All ticks of a bag at once: what a dataset made of it must hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_core.contract import RobotContract
from vla_core.data import bag as bags
from vla_core.data.episodes import EpisodeInfo, EpisodeReader
from vla_core.observation.builder import Observation, ObservationSpec


@dataclass(frozen=True)
class Episode:
    """Observations, and the command (N, A) float32 that answered each of them."""

    infos: list[EpisodeInfo]
    observations: list[Observation]
    actions: np.ndarray
    dropped_ticks: int


def read_episode(path: Path, contract: RobotContract, spec: ObservationSpec) -> Episode:
    with bags.opened(path) as bag:
        reader = EpisodeReader(bag, contract, spec)
        ticks = list(reader)
    rows = [(t.observation, t.action) for t in ticks if t.observation is not None and t.action is not None]
    return Episode(reader.infos, [seen for seen, _ in rows], np.array([action for _, action in rows]),
                   len(ticks) - len(rows))  # fmt: skip
