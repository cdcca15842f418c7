"""The rows of several parquet files as one range."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vla_core.data.lerobot import tables
from vla_core.data.lerobot.layout import LeRobotError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


class Parts:
    """Parquet files whose rows follow each other; rows are read by their range, from the row groups that have them."""

    def __init__(self, folder: Path, files: tuple[str, ...]) -> None:
        self._folder, self._files = folder, files

    @cached_property
    def _metadata(self) -> list[pq.FileMetaData]:
        import pyarrow.parquet as pq

        found = []
        for file in self._files:
            with tables.reading(self._folder / file):
                found.append(pq.read_metadata(self._folder / file))
        return found

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return int(self._ends[-1])

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([metadata.num_rows for metadata in self._metadata])

    def read(self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None) -> pa.Table:
        """Rows ``start`` to ``stop``."""
        import pyarrow as pa

        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise LeRobotError(
                f"{self._folder}: rows {start} to {stop} of the {self.rows} in {len(self._files)} files from "
                f"{self._files[0]} on; the dataset is not whole"
            )
        first = int(np.searchsorted(self._ends, start, side="right"))
        pieces: list[pa.Table] = []
        for number in range(min(first, len(self._files) - 1), len(self._files)):
            begin = int(self._ends[number]) - self._metadata[number].num_rows
            if pieces and begin >= stop:
                break
            pieces.append(self._read_file(number, columns, max(0, start - begin), stop - begin))
        return pieces[0] if len(pieces) == 1 else pa.concat_tables(pieces)

    def _read_file(self, number: int, columns: Sequence[str] | None, start: int, stop: int) -> pa.Table:
        path, metadata = self._folder / self._files[number], self._metadata[number]
        ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
        stop = min(stop, metadata.num_rows)
        groups = [int(group) for group in range(len(ends))
                  if ends[group] > start and ends[group] - metadata.row_group(group).num_rows < stop]  # fmt: skip
        with tables.reading(path), tables.open_parquet(path, metadata) as file:
            if columns is not None:
                tables.require(file.schema_arrow, columns, path)
            wanted = None if columns is None else list(columns)
            table = file.read_row_groups(groups, columns=wanted)
        offset = int(ends[groups[0]] - metadata.row_group(groups[0]).num_rows) if groups else 0
        return table.slice(start - offset, stop - start)
