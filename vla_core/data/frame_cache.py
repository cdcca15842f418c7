"""The pictures of a dataset as uint8 arrays that are read by row: decoded once to a file, to memory, or at each use.

Legend: N frames of the dataset, P different pictures of a camera (fewer where it is slower than the control).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import cv2
import numpy as np

from vla_core.data.lerobot.video import decode
from vla_core.errors import VlaError
from vla_core.observation.image import resize
from vla_core.observation.spec import ImageSize
from vla_core.progress import bar

if TYPE_CHECKING:
    from vla_core.data.lerobot.reader import LeRobotFolder

Cache = Literal["disk", "memory", "none"]
VARIABLE = "VLA_CACHE_DIR"
DIGITS = 16  # of a fingerprint
VERSION = 1  # of the files; another one is another cache
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
KEPT_BYTES = 256 << 20  # of encoded episodes that are kept where pictures are decoded at each use
PIECE = 256  # frames that stand in memory while a camera is decoded

T = TypeVar("T")


class CacheError(VlaError):
    """Pictures that cannot be decoded or kept."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """One camera: different pictures ``pixels`` (P, H, W, 3) uint8, and for each of N frames its row in them (N,).

    Indexing by frames gives pixels: ``pictures[rows]`` is (B, H, W, 3), ``pictures[3]`` is (H, W, 3).
    """

    pixels: np.ndarray | DecodedAtUse
    rows: np.ndarray

    def __getitem__(self, frames: np.ndarray | slice | int) -> np.ndarray:
        picked: np.ndarray = self.pixels[self.rows[frames]]
        return picked

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)."""
        return len(self.rows), *self.pixels.shape[1:]

    def take(self, frames: np.ndarray) -> Pictures:
        """The camera of these frames only; no pixel is copied."""
        return Pictures(self.pixels, self.rows[frames])


def open_pictures(folder: LeRobotFolder, key: str, size: ImageSize, cache: Cache) -> Pictures:
    """The camera ``key`` of a dataset, of this size.

    ``disk`` decodes into ``.cache`` in the dataset's folder (where that cannot be written, into the user's cache; the
    environment's VLA_CACHE_DIR comes before both) unless it is there already from the same files. Several processes
    may ask at once: one decodes, the others wait. ``memory`` decodes into memory, ``none`` at each use.
    """
    if cache == "none":
        lazy = DecodedAtUse(folder, key, size)
        return Pictures(lazy, np.arange(len(lazy)))
    if cache == "memory":
        return _into_memory(folder, key, size)
    what = f"{key.removeprefix('observation.images.').replace('/', '_')}_{size.width}x{size.height}"
    return _open(cached(folder.path, what, lambda partial: _build(folder, key, size, partial)), size)


def cached(path: Path, what: str, build: Callable[[Path], None]) -> Path:
    """The folder of ``what`` in the cache of the dataset ``path``, of its present files; ``build`` fills a new one.

    It is built beside its place and moved there when it is whole; one process builds, others wait. What was made of
    the dataset's former files goes then; who has it open keeps it.
    """
    name = f"{what}_{fingerprint(path)}"
    places = [root / name for root in _roots(path)]
    for place in places:
        if place.is_dir():
            return place
    place = places[0]
    with _alone(place.parent):
        if place.is_dir():  # another process made it while this one waited
            return place
        for left in place.parent.glob(f".{name}.*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            partial = place.with_name(f".{name}.{os.getpid()}")
            partial.mkdir()
            try:
                build(partial)
                os.replace(partial, place)
                for other in place.parent.glob(f"{what}_{'?' * DIGITS}"):
                    if other != place:
                        shutil.rmtree(other, ignore_errors=True)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            why = "no room for it" if error.errno in FULL else str(error)
            raise CacheError(f"{place}: the decoded dataset cannot be kept there: {why}; make room, set {VARIABLE} to "
                             "a folder elsewhere, or data.cache to memory or none") from None  # fmt: skip
    return place


def _roots(path: Path) -> list[Path]:
    """Where decoded pictures of the dataset ``path`` may be, the place for new ones first."""
    own = f"{path.resolve().name}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    chosen = [Path(os.environ[VARIABLE]) / own] if os.environ.get(VARIABLE) else []
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla_ros" / own
    beside = path / ".cache"
    return [*chosen, *([beside, users] if os.access(path, os.W_OK) else [users, beside])]


def fingerprint(path: Path) -> str:
    """Changes when the files that hold the dataset's pictures do: their names, sizes and times."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    files = [path / "meta" / "info.json", *sorted((path / "data").rglob("*.parquet")),
             *sorted((path / "videos").rglob("*.mp4")), *sorted((path / "vla_ros").rglob("*.parquet"))]  # fmt: skip
    for file in files:
        if file.is_file():
            found = file.stat()
            digest.update(f"{file.relative_to(path)}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:DIGITS]


class DecodedAtUse:
    """Pictures (N, H, W, 3) that are decoded each time they are asked for, several at once.

    Encoded pictures that were read last, up to 256 MB, are kept.
    """

    def __init__(self, folder: LeRobotFolder, key: str, size: ImageSize) -> None:
        self._folder, self._key, self._size = folder, key, size
        self._video = folder.info.features[key].dtype == "video"
        self._ends = np.cumsum([entry.length for entry in folder.episodes])
        self._kept: OrderedDict[int, tuple[int, list[bytes]]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, 3)."""
        return len(self), self._size.height, self._size.width, 3

    def __getitem__(self, rows: np.ndarray | int) -> np.ndarray:
        if np.ndim(rows) == 0:
            return self._picture(int(rows))
        found = np.asarray(rows).reshape(-1).tolist()
        pixels = np.empty((len(found), *self.shape[1:]), dtype=np.uint8)
        for i, picture in enumerate(self._pool.map(self._picture, found)):
            pixels[i] = picture
        return pixels.reshape(*np.shape(rows), *self.shape[1:])

    def _picture(self, row: int) -> np.ndarray:
        episode = int(np.searchsorted(self._ends, row, side="right"))
        entry = self._folder.episodes[episode]
        place = row - int(self._ends[episode]) + entry.length
        if self._video:
            span = entry.videos[self._key]
            (pixels,) = decode(self._folder.path / span.file, self._folder.info.fps, span.start + place, 1)
        else:
            pixels = _decode(self._encoded(episode)[place], self._folder.path, self._key)
        return resize(pixels, self._size.height, self._size.width)

    def _encoded(self, episode: int) -> list[bytes]:
        with self._lock:
            if episode not in self._kept:
                blobs = self._folder.encoded(self._key, episode)
                self._kept[episode] = sum({id(blob): len(blob) for blob in blobs}.values()), blobs
            self._kept.move_to_end(episode)
            while len(self._kept) > 1 and sum(count for count, _ in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
            return self._kept[episode][1]


def _decoded(folder: LeRobotFolder, key: str, size: ImageSize) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """All frames in pieces: the pictures of this size that are new in it, and for each of its frames the place of its
    picture among them; -1 is the last one of the piece before."""
    video = folder.info.features[key].dtype == "video"
    last: bytes | None = None
    with (
        ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode") as pool,
        bar(f"decoding {key.removeprefix('observation.images.')}", len(folder.episodes)) as advance,
    ):

        def small(blob: bytes) -> np.ndarray:
            return resize(_decode(blob, folder.path, key), size.height, size.width)

        for episode, entry in enumerate(folder.episodes):
            if video:
                span = entry.videos[key]
                frames = decode(folder.path / span.file, folder.info.fps, span.start, entry.length)
                for some in _pieces(frames):
                    yield [resize(pixels, size.height, size.width) for pixels in some], np.arange(len(some))
            else:
                for blobs in _pieces(iter(folder.encoded(key, episode))):
                    before = [last, *blobs[:-1]]
                    new = [blob is not other and blob != other for blob, other in zip(blobs, before, strict=True)]
                    different = [blob for blob, first in zip(blobs, new, strict=True) if first]
                    yield list(pool.map(small, different)), np.cumsum(new) - 1
                    last = blobs[-1]
            advance(episode + 1)


def _pieces(items: Iterator[T]) -> Iterator[list[T]]:
    while some := list(islice(items, PIECE)):
        yield some


def _decode(blob: bytes, path: Path, key: str) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(blob, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise CacheError(f"{path}: a picture of {key}, {len(blob)} bytes, does not decode; the dataset is damaged")
    return pixels


def _into_memory(folder: LeRobotFolder, key: str, size: ImageSize) -> Pictures:
    frames = sum(entry.length for entry in folder.episodes)
    pixels = np.empty((frames, size.height, size.width, 3), dtype=np.uint8)  # what stays unused is never touched
    rows, count = [], 0
    for pictures, places in _decoded(folder, key, size):
        for i, picture in enumerate(pictures):
            pixels[count + i] = picture
        rows.append(count + places)
        count += len(pictures)
    return Pictures(pixels[:count], np.concatenate(rows))


def _build(folder: LeRobotFolder, key: str, size: ImageSize, partial: Path) -> None:
    rows, count = [], 0
    # Written, not mapped: a full disk is an error to a process that writes, and the end of one that maps.
    with (partial / "pixels.u8").open("wb") as file:
        for pictures, places in _decoded(folder, key, size):
            for picture in pictures:
                file.write(np.ascontiguousarray(picture).data)
            rows.append(count + places)
            count += len(pictures)
    np.save(partial / "rows.npy", np.concatenate(rows))


def _open(place: Path, size: ImageSize) -> Pictures:
    rows = np.load(place / "rows.npy")
    mapped = np.memmap(place / "pixels.u8", dtype=np.uint8, mode="r")
    if mapped.nbytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2:
        # More than the page cache will hold: do not read ahead of a random access.
        mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    # As a plain array: every slice of an np.memmap is an object of its own, at a price.
    return Pictures(np.asarray(mapped).reshape(-1, size.height, size.width, 3), rows)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the lock of a cache; another process that builds there is waited for."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as error:
        raise CacheError(f"{root}: the decoded dataset cannot be kept there: {error.strerror}; set {VARIABLE} to a "
                         "folder that can be written, or data.cache to memory or none") from None  # fmt: skip
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
