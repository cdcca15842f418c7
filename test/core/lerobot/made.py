"""Datasets of random episodes, with what they have to come back as."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from vla_core.data.lerobot.episode import EpisodeRows
from vla_core.data.lerobot.layout import Feature, image, vector
from vla_core.data.lerobot.statistics import column_statistics, image_statistics, sample_indices
from vla_core.data.lerobot.video import VideoOptions, encode
from vla_core.data.lerobot.writer import LeRobotWriter

FPS = 20
SIZE = 16, 24  # height, width
FEATURES = {
    "observation.state": vector(("arm.a", "arm.b", "gripper.c")),
    "observation.images.front": image(*SIZE),
    "action": vector(("x", "y")),
}


@dataclass
class Made:
    """An episode, and the pictures that its encoded ones show."""

    rows: EpisodeRows
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


def column(rng: np.random.Generator, feature: Feature, length: int) -> np.ndarray:
    """Random values of a feature (N, *shape)."""
    shape = (length, *feature.shape)
    if feature.dtype == "bool":
        return rng.random(shape) < 0.5
    if feature.dtype == "string":
        return rng.choice(np.array(["", "naïve", "two words"], dtype=object), shape)
    if feature.dtype.startswith("int"):
        return rng.integers(-100, 100, shape, dtype=feature.dtype)
    return rng.normal(size=shape).astype(feature.dtype)


def pictures(rng: np.random.Generator, length: int, every: int = 1, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Smooth random pictures (N, H, W, 3), a new one every few frames."""
    new = -(-length // every)
    coarse = rng.integers(0, 256, (new, 3, 4, 3), dtype=np.uint8)
    large = np.stack([cv2.resize(each, size[::-1], interpolation=cv2.INTER_LINEAR) for each in coarse])
    return np.repeat(large, every, axis=0)[:length]


def encoded(images: np.ndarray, every: int = 1) -> list[bytes]:
    """PNG of pictures, one object where a picture stays."""
    found: list[bytes] = []
    for index, picture in enumerate(images):
        found.append(cv2.imencode(".png", picture[..., ::-1])[1].tobytes() if index % every == 0 else found[-1])
    return found


def episode(
    rng: np.random.Generator,
    features: dict[str, Feature],
    length: int,
    *,
    every: int = 1,
    scratch: Path | None = None,
    history: int = 0,
    tasks: list[str] | None = None,
    fps: float = FPS,
    codec: str = "h264",
) -> Made:
    """A random episode; with ``history`` it has side rows and up to three rows of the past."""
    columns = {key: column(rng, feature, length) for key, feature in features.items() if not feature.visual}
    statistics = {key: column_statistics(values) for key, values in columns.items() if values.dtype != object}
    made = Made(EpisodeRows(columns=columns, tasks=tasks or ["push"] * length, statistics=statistics))
    for key, feature in features.items():
        if not feature.visual:
            continue
        seen = made.pictures[key] = pictures(rng, length, every, feature.shape[:2])
        if feature.dtype == "image":
            made.rows.images[key] = encoded(seen, every)
        else:
            assert scratch is not None
            made.rows.videos[key] = scratch / f"{key}_{rng.integers(2**60)}.mp4"
            encode(made.rows.videos[key], seen, fps, VideoOptions(codec=codec))
        statistics[key] = image_statistics([seen[index] for index in sample_indices(length)])
    if history:
        made.rows.frames, made.rows.past = side(rng, length, history)
    return made


def side(rng: np.random.Generator, length: int, history: int) -> tuple[pa.Table, pa.Table]:
    """Side rows that refer to earlier frames of the episode and to rows of its past."""
    past = int(rng.integers(0, 4))
    references = [[int(rng.integers(-past, row + 1)) for _ in range(history)] for row in range(length)]
    stamps = pa.array(rng.integers(0, 2**60, length))
    frames = pa.table({"stamp_ns": stamps, "history": pa.array(references, pa.list_(pa.int64(), history))})
    return frames, pa.table({"value": pa.array(rng.normal(size=past))})


def write(path: Path, features: dict[str, Feature], episodes: list[Made], **options: Any) -> None:
    """Write a dataset of the episodes."""
    options = {"fps": FPS, "robot_type": "made", "description": {"format": "made"}} | options
    with LeRobotWriter(path, features=features, **options) as writer:
        for index, made in enumerate(episodes):
            assert writer.add(made.rows) == index


@st.composite
def feature_sets(draw: st.DrawFn) -> dict[str, Feature]:
    """One to four columns of any kind, and up to two cameras."""
    shapes = st.one_of(st.just((1,)), st.tuples(st.integers(1, 4)), st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dtypes = st.sampled_from(["float32", "float64", "int64", "int32", "bool"])
    kinds = draw(st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=4))
    features = {f"column.{index}": Feature(dtype, shape) for index, (dtype, shape) in enumerate(kinds)}
    if draw(st.booleans()):
        features["note"] = Feature("string", (1,))
    for index in range(draw(st.integers(0, 2))):
        features[f"observation.images.cam{index}"] = image(8 + index, 10)
    return features
