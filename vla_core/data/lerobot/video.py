"""Videos of a camera: encoded, decoded, joined and cut without encoding again (PyAV).

Frame i of a file is shown at i / fps seconds, as LeRobot looks it up. Everything is checked against that: a file with
holes, or with another rate, is an error and never a shifted picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.data.lerobot.layout import LeRobotError
from vla_core.errors import choices

ENCODERS = {"h264": "libx264", "av1": "libsvtav1"}
OFF_BY = 0.1  # of a frame: a picture further from its time belongs to another rate


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """How frames are encoded: ``codec`` h264 or av1, ``crf`` (lower is better and larger), ``gop`` frames a key frame.

    A small ``gop`` makes random access cheap: to show a frame, all frames since its key frame are decoded.
    """

    codec: str = "h264"
    crf: int = 23
    gop: int = 2

    def __post_init__(self) -> None:
        if self.codec not in ENCODERS:
            raise LeRobotError(f"unknown video codec {self.codec!r}; choices: {choices(ENCODERS)}")
        if not 0 <= self.crf <= 63 or self.gop < 1:
            raise LeRobotError(f"crf {self.crf} and gop {self.gop}; expected 0 to 63, and at least 1")


def encode(path: Path, frames: Iterable[np.ndarray], fps: float, options: VideoOptions | None = None) -> int:
    """Write frames (H, W, 3) uint8 RGB as an mp4; returns their number.

    The same frames give the same bytes on any number of cores, and no frame refers to a later one.
    """
    import av

    options = options or VideoOptions()
    number = 0
    with _named(path, "cannot be written"), av.open(str(path), "w") as container:
        stream: Any = None
        for frame in frames:
            if stream is None:
                stream = _video_stream(container, frame, fps, options)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            number += 1
        if stream is None:
            raise LeRobotError(f"{path}: a video of no frames")
        container.mux(stream.encode())
    return number


def _video_stream(container: Any, frame: np.ndarray, fps: float, options: VideoOptions) -> Any:
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        raise LeRobotError(f"pictures of {width} x {height} pixels; video needs even sizes, so keep them as images")
    settings = {"crf": str(options.crf), "g": str(options.gop)}
    settings |= {"bf": "0", "threads": "1"} if options.codec == "h264" else {"preset": "12", "svtav1-params": "lp=1"}
    stream = container.add_stream(ENCODERS[options.codec], rate=_fraction(fps), options=settings)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    return stream


def decode(path: Path, fps: float, start: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) uint8 RGB from frame ``start`` on; all, or ``count`` of them, or an error."""
    import av

    due = start
    with _named(path, "cannot be decoded"), av.open(str(path)) as container:
        stream = _only_video(container, path)
        stream.thread_type = "AUTO"
        if start:
            container.seek(int(start / fps / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if count is not None and due == start + count:
                return
            index = _index(frame.pts, stream.time_base, fps, path)
            if index < due and due == start:  # since the key frame before the first one
                continue
            if index != due:
                raise LeRobotError(f"{path}: frame {index} follows frame {due - 1}; expected one every 1/{fps:g} s")
            yield frame.to_ndarray(format="rgb24")
            due += 1
    if due < start + (count or 0):
        raise LeRobotError(f"{path}: ends after {due} frames; expected {start + (count or 0)}: cut off, or from "
                           "another dataset")  # fmt: skip


def describe(path: Path, fps: float) -> dict[str, Any]:
    """What LeRobot's info.json says of a video feature."""
    import av

    with _named(path, "cannot be read"), av.open(str(path)) as container:
        stream = _only_video(container, path)
        return {
            "video.height": stream.height, "video.width": stream.width,
            "video.codec": stream.codec_context.codec.canonical_name, "video.pix_fmt": stream.pix_fmt,
            "video.is_depth_map": False, "video.fps": int(fps) if float(fps).is_integer() else fps,
            "video.channels": 1 if str(stream.pix_fmt).startswith("gray") else 3, "has_audio": False,
        }  # fmt: skip


class Joined:
    """An mp4 that grows by the packets of others; whole when it is closed."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self._fps = path, fps
        self.frames = 0
        self.bytes = 0
        self._container: Any = None
        self._stream: Any = None
        self._kind: tuple[Any, ...] = ()

    def fits(self, source: Path) -> bool:
        """Whether the pictures of ``source`` can follow: same codec, size and parameters."""
        import av

        with _named(source, "cannot be read"), av.open(str(source)) as container:
            return not self._kind or _kind(_only_video(container, source)) == self._kind

    def append(self, source: Path, frames: int, start: int = 0) -> None:
        """Copy ``frames`` frames of ``source`` from its frame ``start`` on, which has to be a key frame."""
        import av

        with _named(source, "cannot be read"), av.open(str(source)) as container:
            stream = _only_video(container, source)
            if self._container is None:
                with _named(self.path, "cannot be written"):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._container = av.open(str(self.path), "w", format="mp4")
                    self._stream = self._container.add_stream_from_template(stream, opaque=True)
                    self._stream.time_base = stream.time_base
                    self._kind = _kind(stream)
            self._copy(container, stream, source, frames, start)

    def _copy(self, container: Any, stream: Any, source: Path, frames: int, start: int) -> None:
        time_base: Fraction = stream.time_base
        shift = round((self.frames - start) / (_fraction(self._fps) * time_base))
        if start:
            container.seek(int(start / self._fps / time_base), stream=stream)
        seen: set[int] = set()
        for packet in container.demux(stream):
            if packet.pts is None:  # the end
                break
            index = _index(packet.pts, time_base, self._fps, source) - start
            if not 0 <= index < frames:
                if index >= frames and packet.is_keyframe:
                    break
                continue
            if not seen and (index or not packet.is_keyframe):
                raise LeRobotError(f"{source}: frame {start} is no key frame; the episode cannot be cut out of it")
            seen.add(index)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            packet.time_base, packet.stream = time_base, self._stream
            self.bytes += packet.size
            with _named(self.path, "cannot be written"):
                self._container.mux(packet)
        if len(seen) != frames:
            raise LeRobotError(f"{source}: {len(seen)} frames from frame {start} on; expected {frames}, one every "
                               f"1/{self._fps:g} s")  # fmt: skip
        self.frames += frames

    def close(self) -> None:
        """Write what makes the file readable."""
        if self._container is not None:
            container, self._container = self._container, None
            with _named(self.path, "cannot be written"):
                container.close()


def cut(source: Path, fps: float, start: int, count: int, out: Path) -> None:
    """Copy frames of ``source`` into a file of their own, as they are encoded."""
    joined = Joined(out, fps)
    try:
        joined.append(source, count, start)
    finally:
        joined.close()


def _fraction(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def _index(pts: int | None, time_base: Fraction, fps: float, path: Path) -> int:
    """The number of the frame that is shown at ``pts``."""
    if pts is None:
        raise LeRobotError(f"{path}: a frame without a time")
    at = float(pts * time_base * _fraction(fps))
    if abs(at - round(at)) > OFF_BY:
        raise LeRobotError(f"{path}: a frame at {float(pts * time_base):.6f} s; expected multiples of 1/{fps:g} s")
    return round(at)


def _only_video(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise LeRobotError(f"{path}: no video in this file")
    return container.streams.video[0]


def _kind(stream: Any) -> tuple[Any, ...]:
    """What must be equal for packets to stand in one file: later ones are decoded with the first one's parameters."""
    context = stream.codec_context
    extradata = bytes(context.extradata or b"")
    return context.codec.canonical_name, context.width, context.height, context.pix_fmt, extradata, stream.time_base


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """Errors of FFmpeg and of the system, in one line with the file's name."""
    import av

    try:
        yield
    except LeRobotError:
        raise
    except (av.FFmpegError, OSError, ValueError, EOFError) as error:
        raise LeRobotError(f"{path}: {what}: {' '.join(str(error).split())}") from None
