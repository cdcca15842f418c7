"""A dataset written again, in another version; nothing is decoded and nothing encoded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from vla_core.data.lerobot.layout import AUTOMATIC, NESTED, V30, LeRobotError
from vla_core.data.lerobot.reader import LeRobotFolder
from vla_core.data.lerobot.writer import LeRobotWriter


def rewrite(
    source: LeRobotFolder,
    out: Path,
    *,
    version: str = V30,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write ``source`` as the dataset ``out``, with its side rows and its description.

    Args:
        progress: called with the number of episodes done.
    """
    nested = [key for key, feature in source.info.features.items() if feature.dtype in NESTED]
    if nested:
        raise LeRobotError(
            f"{source.path}: {', '.join(nested)} cannot be written again; remove them with LeRobot first"
        )
    features = {key: feature for key, feature in source.info.features.items() if key not in AUTOMATIC}
    described = source.description
    description = None if described is None else {k: v for k, v in described.items() if k != "episodes"}
    with (
        LeRobotWriter(out, version=version, fps=source.info.fps, features=features, robot_type=source.info.robot_type,
                      description=description) as writer,
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch,
    ):  # fmt: skip
        for entry in source.episodes:
            writer.add(source.rows(entry.index, Path(scratch)))
            progress(entry.index + 1)
