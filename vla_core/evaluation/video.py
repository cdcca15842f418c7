"""Episodes as MP4 files (H.264), for people."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.errors import VlaError


class VideoWriter:
    """Encodes pictures as they come; the file appears under its name only once it is whole.

    Args:
        folder: created where it is missing.
        rate_hz: pictures a second.
    """

    def __init__(self, folder: Path, rate_hz: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._rate = folder, Fraction(rate_hz).limit_denominator(1000)
        self._partial = folder / f".partial-{os.getpid()}.mp4"
        self._container: Any = None
        self._stream: Any = None

    def add(self, picture: np.ndarray) -> None:
        """Append a picture (H, W, 3) uint8 RGB; H and W are even and those of the first."""
        import av

        if self._container is None:
            height, width = picture.shape[:2]
            if height % 2 or width % 2:
                raise VlaError(f"video: expected pictures of even height and width, found {height} x {width}")
            self._container = av.open(str(self._partial), "w")
            self._stream = self._container.add_stream("libx264", rate=self._rate)
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            self._stream.thread_count = 1
        for packet in self._stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
            self._container.mux(packet)

    def save(self, name: str) -> Path:
        """Finish the file as ``name``.mp4 of the folder."""
        for packet in self._stream.encode():
            self._container.mux(packet)
        self._close()
        path = self._folder / f"{name}.mp4"
        os.replace(self._partial, path)
        return path

    def discard(self) -> None:
        """Leave no file."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None
