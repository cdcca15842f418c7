"""What ``meta/info.json`` says, and where the files of a LeRobotDataset are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.errors import VlaError, choices

V30, V21 = "v3.0", "v2.1"
VERSIONS = (V30, V21)
CHUNKS_SIZE = 1000  # files of a chunk folder (v3.0), episodes of one (v2.1)
DATA_FILE_MB, VIDEO_FILE_MB = 100, 200

INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS_V30 = "meta/tasks.parquet"
TASKS_V21 = "meta/tasks.jsonl"
EPISODES_V21 = "meta/episodes.jsonl"
EPISODES_STATS_V21 = "meta/episodes_stats.jsonl"
MODALITY = "meta/modality.json"  # GR00T's addition to v2.1

EPISODES_V30 = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_V30 = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_V30 = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
DATA_V21 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_V21 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"

# This project's own files.
DESCRIPTION = "vla_ros/dataset.json"
FRAMES = "vla_ros/frames/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
PAST = "vla_ros/past/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"

VISUAL = ("image", "video")
NUMBERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
           "float16", "float32", "float64")  # fmt: skip
NESTED = ("language",)  # LeRobot's annotations in time; they are named, and not read
DTYPES = (*NUMBERS, *VISUAL, *NESTED, "string")


class LeRobotError(VlaError):
    """A folder that is no whole LeRobotDataset, or rows that cannot be written to one."""


@dataclass(frozen=True)
class Feature:
    """A column: ``dtype`` of numpy, ``image`` (PNG in the parquet file), ``video`` (mp4) or ``string``.

    ``shape`` is that of one frame: a number is ``(1,)``, a picture ``(height, width, 3)``. ``names`` are those of the
    entries of a vector, or None. ``info`` is what LeRobot says of a video's codec, size and rate.
    """

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None = None
    info: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise LeRobotError(f"unknown dtype {self.dtype!r}; choices: {choices(DTYPES)}")
        if not self.shape or any(size < 1 for size in self.shape):
            raise LeRobotError(f"shape {self.shape}; expected positive sizes, (1,) for a single number")

    @property
    def visual(self) -> bool:
        """Whether it is a camera."""
        return self.dtype in VISUAL

    def to_dict(self) -> dict[str, Any]:
        """As in info.json."""
        plain: dict[str, Any] = {
            "dtype": self.dtype, "shape": list(self.shape), "names": None if self.names is None else list(self.names),
        }  # fmt: skip
        return plain if self.info is None else plain | {"info": dict(self.info)}


# The columns that LeRobot adds to every dataset.
AUTOMATIC = {
    "timestamp": Feature("float32", (1,)),
    "frame_index": Feature("int64", (1,)),
    "episode_index": Feature("int64", (1,)),
    "index": Feature("int64", (1,)),
    "task_index": Feature("int64", (1,)),
}


def image(height: int, width: int, *, video: bool = False) -> Feature:
    """The feature of a camera."""
    return Feature("video" if video else "image", (height, width, 3), ("height", "width", "channels"))


def vector(names: tuple[str, ...], dtype: str = "float32") -> Feature:
    """The feature of a vector with a name for each entry."""
    return Feature(dtype, (len(names),), names)


@dataclass(frozen=True, kw_only=True)
class Info:
    """``meta/info.json``; ``features`` has the automatic columns too."""

    version: str
    fps: float
    features: dict[str, Feature]
    robot_type: str | None = None
    total_episodes: int = 0
    total_frames: int = 0
    total_tasks: int = 0
    chunks_size: int = CHUNKS_SIZE
    data_path: str = DATA_V30
    video_path: str | None = None
    data_file_mb: float = DATA_FILE_MB
    video_file_mb: float = VIDEO_FILE_MB
    splits: Mapping[str, str] = field(default_factory=dict)

    @property
    def v30(self) -> bool:
        """Whether many episodes share a file (v3.x) or each has its own (v2.x)."""
        return self.version.startswith("v3")

    @property
    def cameras(self) -> tuple[str, ...]:
        """Keys of images and videos, in the order of the features."""
        return tuple(key for key, feature in self.features.items() if feature.visual)

    @property
    def video_keys(self) -> tuple[str, ...]:
        """Keys of videos."""
        return tuple(key for key, feature in self.features.items() if feature.dtype == "video")

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys of what stands in the parquet files as numbers or text."""
        return tuple(key for key, feature in self.features.items() if feature.dtype not in (*VISUAL, *NESTED))

    def to_dict(self) -> dict[str, Any]:
        """The content of info.json, with the keys that LeRobot writes for this version."""
        fps = int(self.fps) if float(self.fps).is_integer() else self.fps
        plain: dict[str, Any] = {
            "codebase_version": self.version, "robot_type": self.robot_type, "total_episodes": self.total_episodes,
            "total_frames": self.total_frames, "total_tasks": self.total_tasks,
        }  # fmt: skip
        if self.v30:
            plain |= {"chunks_size": self.chunks_size, "data_files_size_in_mb": self.data_file_mb,
                      "video_files_size_in_mb": self.video_file_mb}  # fmt: skip
        else:
            plain |= {"total_videos": self.total_episodes * len(self.video_keys),
                      "total_chunks": -(-self.total_episodes // self.chunks_size),
                      "chunks_size": self.chunks_size}  # fmt: skip
        return plain | {
            "fps": fps, "splits": dict(self.splits), "data_path": self.data_path, "video_path": self.video_path,
            "features": {key: feature.to_dict() for key, feature in self.features.items()},
        }  # fmt: skip

    @classmethod
    def read(cls, folder: Path) -> Info:
        """Read ``meta/info.json`` of v3.x or v2.x."""
        path = folder / INFO
        plain = read_json(path, "no LeRobotDataset here, or one that was never finished")
        try:
            version = str(plain["codebase_version"])
            if not version.startswith(("v3.", "v2.")):
                raise LeRobotError(
                    f"codebase_version {version!r}; expected v3.x or v2.x: convert it with LeRobot first"
                )
            return cls(
                version=version, fps=float(plain["fps"]), robot_type=plain.get("robot_type"),
                features={key: _feature(key, value) for key, value in plain["features"].items()},
                total_episodes=int(plain["total_episodes"]), total_frames=int(plain["total_frames"]),
                total_tasks=int(plain.get("total_tasks", 0)), chunks_size=int(plain.get("chunks_size", CHUNKS_SIZE)),
                data_path=plain["data_path"], video_path=plain.get("video_path"),
                data_file_mb=plain.get("data_files_size_in_mb", DATA_FILE_MB),
                video_file_mb=plain.get("video_files_size_in_mb", VIDEO_FILE_MB), splits=plain.get("splits") or {},
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise LeRobotError(f"{path}: not what LeRobot writes: {error!r}") from None
        except ValueError as error:
            raise LeRobotError(f"{path}: {error}") from None


def _feature(key: str, plain: Mapping[str, Any]) -> Feature:
    """A feature of info.json; names are lists, or dictionaries of lists in older datasets."""
    dtype, shape = str(plain["dtype"]), tuple(int(size) for size in plain["shape"])
    names: Any = plain.get("names")
    if isinstance(names, Mapping):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    if dtype in VISUAL and names and names[0] in ("channel", "channels"):  # some datasets state (3, H, W)
        shape, names = (*shape[1:], shape[0]), ["height", "width", "channels"]
    try:
        return Feature(dtype, shape, None if names is None else tuple(map(str, names)), plain.get("info"))
    except LeRobotError as error:
        raise LeRobotError(f"feature {key}: {error}") from None


def read_json(path: Path, missing: str) -> Any:
    """The content of a JSON file, or an error that names it; ``missing`` says what its absence means."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LeRobotError(f"{path} is missing: {missing}") from None
    except (OSError, ValueError) as error:
        raise LeRobotError(f"{path}: damaged: {error}") from None


def read_lines(path: Path, missing: str) -> list[Any]:
    """The objects of a JSON-lines file."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise LeRobotError(f"{path} is missing: {missing}") from None
    except (OSError, ValueError) as error:
        raise LeRobotError(f"{path}: damaged: {error}") from None


def numpy_dtype(feature: Feature) -> np.dtype:
    """The dtype of a column in memory; text is ``object``."""
    return np.dtype(object if feature.dtype == "string" else feature.dtype)
