"""One episode on its way into a dataset, or out of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

Stats = dict[str, dict[str, np.ndarray]]  # feature -> min, max, mean, std, count, q01 … -> array


@dataclass
class EpisodeRows:
    """N frames in the order of time. The writer adds index, timestamp and task columns.

    Attributes:
        columns: feature -> (N, *shape) in the feature's dtype; no cameras.
        images: camera -> N encoded PNG; where frames show the same picture, the same bytes object.
        videos: camera -> an mp4 of exactly N frames at the dataset's rate. A camera is in one of both.
        tasks: the instruction of each frame.
        statistics: of every feature with numbers and of every camera (see :mod:`statistics`); the automatic columns'
            are the writer's.
        frames: side rows, one a frame. Its column ``history`` (list<int64>, no null lists) refers to rows of this
            episode (>= 0) or to rows of ``past`` (row k is -(k + 1)); the writer makes both global.
        past: side rows that are no frames.
        entry: what dataset.json says of the episode; plain JSON data.
    """

    columns: dict[str, np.ndarray]
    tasks: list[str]
    statistics: Stats
    images: dict[str, list[bytes]] = field(default_factory=dict)
    videos: dict[str, Path] = field(default_factory=dict)
    frames: pa.Table | None = None
    past: pa.Table | None = None
    entry: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tasks)
