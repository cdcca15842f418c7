"""Columns as Arrow tables and back, and parquet files that grow to a limit.

What LeRobot's reader (the library ``datasets``) needs is in each file's metadata under ``huggingface``: without it an
image of v2.1 would come back as a dictionary of bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_core.data.lerobot.layout import Feature, LeRobotError, numpy_dtype
from vla_core.errors import choices

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MB = 2**20
GATHERED_BYTES = 4 * MB  # small tables are gathered until they are worth a row group
DICTIONARY_BYTES = 2**30 - 1  # pictures that repeat are stored once a row group, whatever their size


def arrow_type(feature: Feature) -> pa.DataType:
    """The type of a column: a number, lists as deep as its shape, or an encoded picture."""
    import pyarrow as pa

    if feature.dtype == "image":
        return pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    kind: pa.DataType = pa.string() if feature.dtype == "string" else pa.from_numpy_dtype(np.dtype(feature.dtype))
    if feature.shape == (1,):
        return kind
    if len(feature.shape) == 1:
        return pa.list_(kind, feature.shape[0])
    for _ in feature.shape:
        kind = pa.list_(kind)
    return kind


def data_schema(features: Mapping[str, Feature]) -> pa.Schema:
    """The schema of the files in ``data/``: all features but videos."""
    import pyarrow as pa

    stored = {key: feature for key, feature in features.items() if feature.dtype != "video"}
    described = {key: _huggingface(feature) for key, feature in stored.items()}
    return pa.schema(
        [pa.field(key, arrow_type(feature)) for key, feature in stored.items()],
        metadata={b"huggingface": json.dumps({"info": {"features": described}}).encode()},
    )


def _huggingface(feature: Feature) -> dict[str, Any]:
    """A feature in the words of the library ``datasets``, of its version 2 as well as 4."""
    if feature.dtype == "image":
        return {"_type": "Image"}
    value = {"dtype": feature.dtype, "_type": "Value"}
    if feature.shape == (1,):
        return value
    if len(feature.shape) == 1:
        return {"feature": value, "length": feature.shape[0], "_type": "Sequence"}
    return {"shape": list(feature.shape), "dtype": feature.dtype, "_type": f"Array{len(feature.shape)}D"}


def to_arrow(column: np.ndarray, feature: Feature) -> pa.Array:
    """A column (N, *shape) as an array of :func:`arrow_type`; no Python object per row."""
    import pyarrow as pa

    if feature.dtype == "string":
        return pa.array(list(column.reshape(len(column))), pa.string())
    flat = pa.array(np.ascontiguousarray(column).reshape(-1))
    if feature.shape == (1,):
        return flat
    if len(feature.shape) == 1:
        return pa.FixedSizeListArray.from_arrays(flat, feature.shape[0])
    for size in reversed(feature.shape):
        offsets = pa.array(np.arange(0, len(flat) + 1, size, dtype=np.int32))
        flat = pa.ListArray.from_arrays(offsets, flat)
    return flat


def pictures(encoded: Sequence[bytes], first_frame: int) -> pa.Array:
    """Encoded pictures as LeRobot stores them; the path is only a name."""
    import pyarrow as pa

    names = [f"frame-{first_frame + index:06d}.png" for index in range(len(encoded))]
    return pa.StructArray.from_arrays([pa.array(encoded, pa.binary()), pa.array(names)], names=["bytes", "path"])


def to_numpy(column: pa.ChunkedArray, feature: Feature, where: str) -> np.ndarray:
    """A column as (N, *shape) in the feature's dtype; ``where`` names it in errors.

    Lists of any kind are taken, since others write them with or without their length.
    """
    import pyarrow as pa

    values = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    rows = len(values)
    while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type) or pa.types.is_large_list(
        values.type
    ):  # fmt: skip
        if values.null_count:
            raise LeRobotError(f"{where}: {values.null_count} frames have no value")
        values = values.flatten()
    if values.null_count:
        raise LeRobotError(f"{where}: {values.null_count} values are missing")
    size = rows * int(np.prod(feature.shape))
    if len(values) != size:
        raise LeRobotError(f"{where}: {len(values)} values in {rows} frames; expected shape {feature.shape} in each")
    array = values.to_numpy(zero_copy_only=False)
    if feature.dtype != "string" and array.dtype == object:
        raise LeRobotError(f"{where}: holds {values.type}; expected {feature.dtype}")
    array = array.astype(numpy_dtype(feature), copy=False)
    return (array if array.flags.writeable else array.copy()).reshape(rows, *feature.shape)


class GrowingParquet:
    """Parquet files ``pattern`` of one schema that are filled one after the other, each up to ``limit_mb``.

    Args:
        pattern: path in ``folder`` with {chunk_index} and {file_index}.
        dictionary: paths of the leaves whose values repeat.
        plain: paths of the leaves that are compressed already.
        gather: bytes that are worth a row group; 0 makes one of each table.
    """

    def __init__(
        self,
        folder: Path,
        pattern: str,
        schema: pa.Schema,
        *,
        limit_mb: float,
        chunks_size: int,
        dictionary: Sequence[str] = (),
        plain: Sequence[str] = (),
        gather: int = GATHERED_BYTES,
    ) -> None:
        self._folder, self._pattern, self.schema = folder, pattern, schema
        self._limit, self._chunks_size = limit_mb * MB, chunks_size
        self._dictionary, self._plain = list(dictionary), set(plain)
        self._gather = gather
        self._number = 0  # of the file that is being filled
        self._pending: list[pa.Table] = []
        self._pending_bytes = 0
        self._sink: Any = None
        self._writer: pq.ParquetWriter | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Chunk and index of the file that is being filled."""
        return divmod(self._number, self._chunks_size)

    def reserve(self, size: int) -> tuple[int, int]:
        """The place of what is written next, about ``size`` bytes, all in one file."""
        filled = self._pending_bytes + (0 if self._sink is None else self._sink.tell())
        if filled and filled + size >= self._limit:
            self.close()
            self._number += 1
        return self.place

    def write(self, table: pa.Table) -> None:
        """Append rows to the present file."""
        self._pending.append(table)
        self._pending_bytes += table.nbytes
        if self._pending_bytes >= self._gather:
            self._flush()

    def close(self) -> None:
        """Finish the present file."""
        if self._pending:
            self._flush()
        writer, sink, self._writer, self._sink = self._writer, self._sink, None, None
        if writer is not None:
            with writing(self._path()):
                writer.close()
                sink.close()

    def abort(self) -> None:
        """Let go of the present file, as it is."""
        writer, sink, self._writer, self._sink = self._writer, self._sink, None, None
        self._pending, self._pending_bytes = [], 0
        with suppress(Exception):  # a full disk; the file is removed anyway
            if writer is not None:
                writer.close()
        with suppress(Exception):
            if sink is not None:
                sink.close()

    def _path(self) -> Path:
        chunk, index = self.place
        return self._folder / self._pattern.format(chunk_index=chunk, file_index=index)

    def _flush(self) -> None:
        import pyarrow as pa

        table = pa.concat_tables(self._pending)
        self._pending, self._pending_bytes = [], 0
        with writing(self._path()):
            if self._writer is None:
                self._open()
            assert self._writer is not None
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))

    def _open(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self._path()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._sink = pa.OSFile(str(path), "wb")
        leaves = _leaves(self.schema)
        self._writer = pq.ParquetWriter(
            self._sink, self.schema, use_dictionary=self._dictionary, dictionary_pagesize_limit=DICTIONARY_BYTES,
            write_page_checksum=True,  # a flipped bit is an error of the reader then, and not another number
            compression={leaf: "none" if leaf in self._plain else "snappy" for leaf in leaves},
        )  # fmt: skip


def _leaves(schema: pa.Schema) -> list[str]:
    """Paths of a schema's columns in a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    stored = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [stored.column(index).path for index in range(len(stored))]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the disk and of Arrow, in one line with the file's name."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise LeRobotError(f"{path}: cannot be written: {' '.join(str(error).split())}") from None


def open_parquet(path: Path, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """A parquet file whose pages are checked, where their writer left checksums."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of a damaged parquet file, with the file's name and what they mostly mean."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise LeRobotError(f"{path} is missing: the dataset is not whole") from None
    except (OSError, pa.ArrowException) as error:
        text = " ".join(str(error).split())
        footer = any(part in text for part in ("magic bytes", "file size is", "footer"))
        hint = "it has no footer: its writer did not finalize, or it is cut off" if footer else "damaged"
        raise LeRobotError(f"{path}: {hint} ({text})") from None


def require(table: pa.Table | pa.Schema, names: Sequence[str], path: Path) -> None:
    """Raise when a file lacks columns."""
    there = table.column_names if hasattr(table, "column_names") else table.names
    missing = [name for name in names if name not in there]
    if missing:
        raise LeRobotError(f"{path}: no column {', '.join(missing)}; there are: {choices(there)}")


def rebased(history: pa.ChunkedArray, frames: int, past: int) -> pa.Array:
    """References of an episode to rows of its own, made references to rows of the dataset, or back.

    A reference r >= 0 is a frame and becomes r + ``frames``; r < 0 is row -(r + 1) of the past: r - ``past``.
    """
    import pyarrow as pa

    lists = history.combine_chunks()
    if lists.null_count:
        raise LeRobotError(f"history: {lists.null_count} frames have none; expected a list in each")
    values = lists.flatten()
    old = values.to_numpy(zero_copy_only=True)
    new = pa.array(np.where(old >= 0, old + frames, old - past))
    if pa.types.is_fixed_size_list(lists.type):
        return pa.FixedSizeListArray.from_arrays(new, lists.type.list_size)
    lengths = np.concatenate([[0], lists.value_lengths().to_numpy().cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(lengths), new)
