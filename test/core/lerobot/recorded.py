"""A small dataset as LeRobot itself records it; ``recorded/`` was made by this script in an environment of LeRobot's.

    python recorded.py 0.4.4 recorded/v3.0        # LeRobotDataset v3.0, with lerobot 0.4.4
    python recorded.py 0.3.3 recorded/v2.1        # LeRobotDataset v2.1, with lerobot 0.3.3 and datasets 3.6

All content follows from the numbers of episode and frame, so that a test knows it without the script's help.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

FPS = 10
LENGTHS = (4, 6, 3)
TASKS = ("stack the cups", "wave", "naïve")
HEIGHT, WIDTH = 24, 32

FEATURES: dict[str, dict[str, Any]] = {
    "observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
    "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    "matrix": {"dtype": "float32", "shape": (2, 3), "names": None},
    "observation.images.front": {"dtype": "image", "shape": (HEIGHT, WIDTH, 3),
                                 "names": ["height", "width", "channels"]},
    "observation.images.wrist": {"dtype": "video", "shape": (HEIGHT, WIDTH, 3),
                                 "names": ["height", "width", "channels"]},
}  # fmt: skip


def frame(episode: int, index: int) -> dict[str, np.ndarray]:
    """The content of a frame; the wrist camera's brightness tells which frame it is."""
    at = 100 * episode + index
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    bright = np.full((HEIGHT, WIDTH), 20 + 30 * index + 10 * episode)
    return {
        "observation.state": np.array([at, at / 7, -at], np.float32),
        "action": np.array([np.sin(at), np.cos(at)], np.float32),
        "next.done": np.array([index == LENGTHS[episode] - 1]),
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3) + at,
        "observation.images.front": np.stack([x * 7 + at, y * 9, x + y], -1).astype(np.uint8),
        "observation.images.wrist": np.stack([bright, bright + x // 4, bright], -1).astype(np.uint8),
    }


def task(episode: int, index: int) -> str:
    """The instruction of a frame; the second episode has two."""
    return TASKS[episode if episode != 1 else index // 3]


def main(version: str, root: str) -> None:
    """Record with the installed lerobot."""
    from importlib.metadata import version as installed

    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    assert installed("lerobot") == version, f"this is lerobot {installed('lerobot')}"
    new = version == "0.4.4"
    dataset = LeRobotDataset.create("made/recorded", fps=FPS, features=FEATURES, root=root, robot_type="toy")
    if new:  # small limits, so that there are several files of each kind
        dataset.meta.update_chunk_settings(data_files_size_in_mb=1e-6, video_files_size_in_mb=0.0019)
    for episode, length in enumerate(LENGTHS):
        for index in range(length):
            said = {"task": task(episode, index)}
            if new:
                dataset.add_frame({**frame(episode, index), **said})
            else:
                dataset.add_frame(frame(episode, index), **said)
        dataset.save_episode()
    if new:
        dataset.finalize()


if __name__ == "__main__":
    main(*sys.argv[1:])
