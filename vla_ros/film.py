"""Pictures of a simulated world for people: one GIF or MP4 of several episodes, or an MP4 of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vla_core.errors import VlaError
from vla_core.evaluation.video import VideoWriter

SUFFIXES = (".gif", ".mp4")


class Film:
    """Collects the pictures of episodes.

    Args:
        path: a GIF or an MP4 file for all of them, or a folder (no suffix), which gets ``seed_<seed>.mp4`` of each.
        rate_hz: pictures a second of the world's time.
    """

    def __init__(self, path: Path, rate_hz: float) -> None:
        if path.suffix not in ("", *SUFFIXES):
            raise VlaError(f"video {str(path)!r}: expected a file that ends in {' or '.join(SUFFIXES)}, or a folder")
        path.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written must fail here, not after the run
        self._path, self._rate_hz = path, rate_hz
        self._pictures: list[np.ndarray] = []
        self._writer: VideoWriter | None = None

    def add(self, picture: np.ndarray) -> None:
        """Append a picture (H, W, 3) uint8 RGB."""
        if self._path.suffix == ".gif":
            self._pictures.append(picture)
            return
        if self._writer is None:
            self._writer = VideoWriter(self._path.parent if self._path.suffix else self._path, self._rate_hz)
        self._writer.add(picture)

    def end_episode(self, seed: int) -> None:
        """The episode of ``seed`` is over."""
        if self._writer is not None and not self._path.suffix:
            self._writer.save(f"seed_{seed}")
            self._writer = None

    def close(self) -> None:
        """Write what is for all episodes; an episode of its own that was cut short leaves no file."""
        if self._writer is not None and self._path.suffix:
            self._writer.save(self._path.stem)
        elif self._writer is not None:
            self._writer.discard()
        self._writer = None
        if self._pictures:
            from PIL import Image

            first, *rest = [Image.fromarray(picture) for picture in self._pictures]
            first.save(self._path, save_all=True, append_images=rest, duration=round(1000 / self._rate_hz), loop=0)
