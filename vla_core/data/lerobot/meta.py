"""The files in ``meta/`` that belong to the whole dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_core.data.lerobot import tables
from vla_core.data.lerobot.episode import Stats
from vla_core.data.lerobot.layout import Info

if TYPE_CHECKING:
    import pyarrow as pa


def modality(info: Info) -> dict[str, Any]:
    """GR00T's ``modality.json``: neighbours in state and action are a group by the first part of their names.

    A group that is interrupted goes on under its name and a number.
    """
    found: dict[str, Any] = {}
    for key, kind in (("observation.state", "state"), ("action", "action")):
        feature = info.features.get(key)
        if feature is None:
            continue
        groups: dict[str, dict[str, int]] = {}
        names = feature.names or [kind] * feature.shape[0]
        for group, run in groupby(range(len(names)), key=lambda index: _group(names[index], kind)):
            indices, name, number = list(run), group, 2
            while name in groups:
                name, number = f"{group}_{number}", number + 1
            groups[name] = {"start": indices[0], "end": indices[-1] + 1}
        found[kind] = groups
    found["video"] = {key.removeprefix("observation.images."): {"original_key": key} for key in info.cameras}
    return found | {"annotation": {"human.task_description": {"original_key": "task_index"}}}


def _group(name: str, otherwise: str) -> str:
    """What is before a name's dot; the dot of a time (``x@0.5s``) parts nothing."""
    return name.split(".")[0] if "." in name.partition("@")[0] else otherwise


def plain(statistics: Stats) -> dict[str, dict[str, Any]]:
    """Statistics as JSON keeps them."""
    return {key: {name: value.tolist() for name, value in found.items()} for key, found in statistics.items()}


def episodes_schema(info: Info, statistics: Stats) -> pa.Schema:
    """Columns of ``meta/episodes`` in LeRobot's order; statistics are lists as deep as they have dimensions."""
    import pyarrow as pa

    fields = [("episode_index", pa.int64()), ("tasks", pa.list_(pa.string())), ("length", pa.int64())]
    fields += [(name, pa.int64()) for name in
               ("data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index")]  # fmt: skip
    for key in info.video_keys:
        fields += [(f"videos/{key}/{name}", pa.int64()) for name in ("chunk_index", "file_index")]
        fields += [(f"videos/{key}/{name}", pa.float64()) for name in ("from_timestamp", "to_timestamp")]
    for key, found in statistics.items():
        for name, value in found.items():
            kind = {"f": pa.float64(), "b": pa.bool_()}.get(value.dtype.kind, pa.int64())
            for _ in range(value.ndim):
                kind = pa.list_(kind)
            fields.append((f"stats/{key}/{name}", kind))
    fields += [(f"meta/episodes/{name}", pa.int64()) for name in ("chunk_index", "file_index")]
    return pa.schema([pa.field(name, kind) for name, kind in fields])


def write_tasks(path: Path, tasks: Mapping[str, int]) -> None:
    """``meta/tasks.parquet``: LeRobot reads it with pandas, whose index the texts are, and takes row i for task i."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    described = {
        "index_columns": ["task"],
        "column_indexes": [{"name": None, "field_name": None, **text, "metadata": {"encoding": "UTF-8"}}],
        "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64",
             "metadata": None},
            {"name": "task", "field_name": "task", **text},
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }  # fmt: skip
    schema = pa.schema([("task_index", pa.int64()), ("task", pa.string())],
                       metadata={b"pandas": json.dumps(described).encode()})  # fmt: skip
    with tables.writing(path):
        pq.write_table(pa.table([list(tasks.values()), list(tasks)], schema=schema), path, write_page_checksum=True)
