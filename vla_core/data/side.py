"""What an observation holds beside a picture, a state and a text, as rows of Arrow tables, and back, bit for bit.

``vla_ros/frames`` has one row a frame of the dataset: its true stamp, the age of every stream (null: missing), point
clouds, windows, maps and calibrations. With history each row also says where the past ticks are: ``history`` has, from
the oldest to the newest, the row of the frame that is bit-equal to what was seen, or -(k + 1) for row k of
``vla_ros/past``, whose rows are whole observations: a past tick may have seen what came after it or clouds that were
moved, or be no frame at all.

Columns (C entries of a stream's names, L samples of a window):

    stamp_ns                    int64, the tick on the recording's clock
    age_ns.<stream>             int64, tick minus sample; null where the stream was missing
    cloud.<stream>              bytes of float32 (N, C)
    sequence.<stream>           float32 (L x C), sequence.<stream>.mask bool (L)
    map.<stream>                bytes, with .dtype and .shape (height, width)
    calibration.<image>         float64: K (9), R (9), P (12), then D; with .size (height, width), .model and .frame_id
    history                     int64 (history - 1); in frames alone
    state, instruction          in past alone, float32 (S) and text
    image.<stream>              in past alone, a PNG; null where it was missing

Where a stream is missing, LeRobot's own columns hold 0 and a black picture, since they must hold something; the null
age tells, and observations made here have NaN and no picture again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from vla_core.contract import RobotContract
from vla_core.errors import VlaError, choices
from vla_core.observation.builder import Observation, ObservationSpec, Window
from vla_core.observation.calibration import Calibration

if TYPE_CHECKING:
    import pyarrow as pa


class SideError(VlaError):
    """Side tables that do not belong to the contract and the observation spec."""


class Seen(NamedTuple):
    """The standard features of a frame: pictures (H, W, 3) uint8 by stream, the state (S,) float32 and the text."""

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    instruction: str


def encode_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB to a PNG file, without loss."""
    # OpenCV's own choice of filter and strategy: of all its levels the fastest by half, and within 8 % of the smallest.
    ok, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    assert ok, "any picture can be a PNG"
    return encoded.tobytes()


def decode_png(data: bytes | memoryview) -> np.ndarray:
    """A PNG file to (H, W, 3) uint8 RGB."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if pixels is None:
        raise SideError(f"a picture of {len(data)} bytes does not decode")
    return pixels


def frames_schema(contract: RobotContract, spec: ObservationSpec) -> pa.Schema:
    """Columns of ``vla_ros/frames`` for observations of ``spec``."""
    import pyarrow as pa

    fields = _common_fields(contract, spec)
    if spec.history > 1:
        fields.append(pa.field("history", pa.list_(pa.int64(), spec.history - 1)))
    return pa.schema(fields)


def past_schema(contract: RobotContract, spec: ObservationSpec) -> pa.Schema:
    """Columns of ``vla_ros/past``."""
    import pyarrow as pa

    fields = _common_fields(contract, spec)
    fields += [pa.field("state", pa.list_(pa.float32(), state_size(contract, spec))),
               pa.field("instruction", pa.string())]  # fmt: skip
    return pa.schema([*fields, *(pa.field(f"image.{name}", pa.large_binary()) for name in spec.images)])


def side_table(
    observations: Sequence[Observation],
    contract: RobotContract,
    spec: ObservationSpec,
    history: Sequence[Sequence[int]] | None = None,
) -> pa.Table:
    """Rows of ``vla_ros/frames`` of ``observations``; ``history`` as :class:`PastTicks` gives it, for each of them."""
    import pyarrow as pa

    columns = _common_columns(observations, contract, spec)
    schema = frames_schema(contract, spec)
    if spec.history > 1:
        assert history is not None and len(history) == len(observations), "a history for each observation"
        columns["history"] = pa.array(list(map(list, history)), schema.field("history").type)
    return pa.table(columns, schema=schema)


def past_table(observations: Sequence[Observation], contract: RobotContract, spec: ObservationSpec) -> pa.Table:
    """Rows of ``vla_ros/past`` of past ticks."""
    import pyarrow as pa

    schema = past_schema(contract, spec)
    columns = _common_columns(observations, contract, spec)
    columns["state"] = _fixed([o.state for o in observations], schema.field("state").type)
    columns["instruction"] = pa.array([o.instruction for o in observations], pa.string())
    for name in spec.images:
        encoder = OncePng()
        blobs = [encoder(o.images[name]) if name in o.images else None for o in observations]
        columns[f"image.{name}"] = pa.array(blobs, pa.large_binary())
    return pa.table(columns, schema=schema)


class OncePng:
    """Encodes a picture once, however many ticks in a row hold the same array."""

    def __init__(self) -> None:
        self._last: tuple[np.ndarray, bytes] | None = None

    def __call__(self, pixels: np.ndarray) -> bytes:
        if self._last is None or self._last[0] is not pixels:
            self._last = pixels, encode_png(pixels)
        return self._last[1]


class PastTicks:
    """Finds where the past ticks of an episode's observations stand: in an earlier frame, or in a row of their own.

    ``fresh`` holds the past ticks that need rows of their own since it was last emptied; the caller writes them.
    """

    def __init__(self, spec: ObservationSpec) -> None:
        self._frames: deque[tuple[int, Observation]] = deque(maxlen=2 * spec.history)
        self._rows: deque[tuple[int, Observation]] = deque(maxlen=2 * spec.history**2)
        self._frame_count = self._row_count = 0
        self.fresh: list[Observation] = []

    def add(self, observation: Observation) -> list[int]:
        """The entries of ``history`` of the episode's next frame, relative to the episode."""
        places = [self._place(past) for past in observation.history]
        self._frames.append((self._frame_count, observation))
        self._frame_count += 1
        return places

    def _place(self, past: Observation) -> int:
        for row, frame in self._frames:
            if same_tick(frame, past):
                return row
        for row, other in self._rows:
            if same_tick(other, past):
                return -(row + 1)
        self._rows.append((self._row_count, past))
        self.fresh.append(past)
        self._row_count += 1
        return -self._row_count


def same_tick(a: Observation, b: Observation) -> bool:
    """Whether two observations are bit-equal, their histories aside."""
    if a.stamp_ns != b.stamp_ns or a.instruction != b.instruction or a.ages_ns != b.ages_ns or a.present != b.present:
        return False
    if not _same(a.state, b.state):
        return False
    pairs = ((a.images, b.images), (a.clouds, b.clouds), (a.maps, b.maps))
    if not all(mine.keys() == theirs.keys() and all(_same(mine[n], theirs[n]) for n in mine) for mine, theirs in pairs):
        return False
    return (
        a.sequences.keys() == b.sequences.keys()
        and all(_same(w.values, b.sequences[n].values) and _same(w.mask, b.sequences[n].mask)
                for n, w in a.sequences.items())
        and a.calibrations.keys() == b.calibrations.keys()
        and all(_same_calibration(c, b.calibrations[n]) for n, c in a.calibrations.items())
    )  # fmt: skip


class SideRows:
    """Observations from the side tables of a dataset.

    Args:
        frames: rows of ``vla_ros/frames``, whose ``history`` (if any) counts rows of ``frames`` and ``past``.
        past: rows of ``vla_ros/past``; None without history, or where every past tick is a frame.
    """

    def __init__(self, frames: pa.Table, past: pa.Table | None, contract: RobotContract, spec: ObservationSpec) -> None:
        expected = set(frames_schema(contract, spec).names)
        absent = sorted(expected - set(frames.column_names))
        if absent:
            raise SideError(f"vla_ros/frames has no {choices(absent)}; it has: {choices(frames.column_names)}; convert "
                            "the bags again")  # fmt: skip
        self._contract, self._spec = contract, spec
        self._frames = _Rows(frames, contract, spec)
        self._past = None if past is None else _Rows(past, contract, spec)

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def stamps_ns(self) -> np.ndarray:
        """Stamps (N,) int64 of the frames."""
        return self._frames.stamps_ns

    def history(self, row: int) -> list[int]:
        """Where the past ticks of a frame are, oldest first: a row of frames, or -(k + 1) for row k of past."""
        return [] if self._spec.history == 1 else self._frames.value("history", row)

    def observation(self, row: int, seen: Callable[[int], Seen]) -> Observation:
        """The observation of frame ``row`` as the builder gave it; ``seen`` tells the standard features of any row."""
        past = tuple(self._at(place, seen) for place in self.history(row))
        return self._frames.observation(row, seen(row), past)

    def _at(self, place: int, seen: Callable[[int], Seen]) -> Observation:
        if place >= 0:
            return self._frames.observation(place, seen(place))
        if self._past is None or -place > len(self._past):
            raise SideError(f"history points to row {-place - 1} of vla_ros/past, which is not there; convert again")
        return self._past.observation(-place - 1, self._past.seen(-place - 1))


class _Rows:
    """Values of a table by column and row; chunks are looked up, never joined: clouds may be larger than memory."""

    def __init__(self, table: pa.Table, contract: RobotContract, spec: ObservationSpec) -> None:
        self._contract, self._spec = contract, spec
        self._names = [name for _, name, _ in spec.uses()]
        self._chunks = {name: table.column(name).chunks for name in table.column_names}
        self._ends = {
            name: np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64) for name, chunks in self._chunks.items()
        }
        self.stamps_ns = table.column("stamp_ns").to_numpy()

    def __len__(self) -> int:
        return len(self.stamps_ns)

    def value(self, column: str, row: int) -> Any:
        """A row's value as plain Python; None where it is null."""
        return self._scalar(column, row).as_py()

    def _scalar(self, column: str, row: int) -> Any:
        ends = self._ends[column]
        chunk = int(np.searchsorted(ends, row, side="right"))
        return self._chunks[column][chunk][row - (int(ends[chunk - 1]) if chunk else 0)]

    def seen(self, row: int) -> Seen:
        """The standard features of a row of past."""
        blobs = {name: self._scalar(f"image.{name}", row) for name in self._spec.images}
        images = {name: decode_png(memoryview(blob.as_buffer())) for name, blob in blobs.items() if blob.is_valid}
        state = np.array(self.value("state", row), dtype=np.float32)
        return Seen(images, state, self.value("instruction", row))

    def observation(self, row: int, seen: Seen, past: tuple[Observation, ...] = ()) -> Observation:
        """The observation of a row, without what is missing."""
        spec, contract = self._spec, self._contract
        ages = {name: self.value(f"age_ns.{name}", row) for name in dict.fromkeys(self._names)}
        there = {name: age for name, age in ages.items() if age is not None}
        state = with_gaps(seen.state[None], {n: np.array([n not in there]) for n in spec.state}, contract, spec)[0]
        return Observation(
            stamp_ns=int(self.stamps_ns[row]),
            images={name: seen.images[name] for name in spec.images if name in there},
            state=state,
            instruction=seen.instruction if spec.instruction in there else "",
            ages_ns=there,
            clouds={name: self._cloud(name, row, len(contract.stream(name).names))
                    for name in spec.clouds if name in there},
            sequences={name: self._window(name, row) for name in spec.sequences if name in there},
            maps={name: self._map(name, row) for name in spec.maps if name in there},
            calibrations={image: self._calibration(image, row)
                          for image, name in spec.calibrations.items() if name in there},
            present={name: name in there for name in self._names},
            history=past,
        )  # fmt: skip

    def _cloud(self, name: str, row: int, columns: int) -> np.ndarray:
        return np.frombuffer(self._scalar(f"cloud.{name}", row).as_buffer(), np.float32).reshape(-1, columns)

    def _window(self, name: str, row: int) -> Window:
        stream = self._contract.stream(name)
        values = self._scalar(f"sequence.{name}", row).values.to_numpy(zero_copy_only=False)
        mask = self._scalar(f"sequence.{name}.mask", row).values.to_numpy(zero_copy_only=False)
        return Window(values.reshape(stream.window_length, len(stream.names)), mask)

    def _map(self, name: str, row: int) -> np.ndarray:
        cells = np.frombuffer(self._scalar(f"map.{name}", row).as_buffer(), self.value(f"map.{name}.dtype", row))
        return cells.reshape(self.value(f"map.{name}.shape", row))

    def _calibration(self, image: str, row: int) -> Calibration:
        column = f"calibration.{image}"
        k, r, p, d = np.split(np.array(self.value(column, row), dtype=np.float64), (9, 18, 30))
        height, width = self.value(f"{column}.size", row)
        return Calibration(
            intrinsics=k.reshape(3, 3), distortion=d, rectification=r.reshape(3, 3), projection=p.reshape(3, 4),
            width=width, height=height, model=self.value(f"{column}.model", row),
            frame_id=self.value(f"{column}.frame_id", row),
        )  # fmt: skip


def state_size(contract: RobotContract, spec: ObservationSpec) -> int:
    """Entries S of the state."""
    return sum(len(contract.stream(name).names) for name in spec.state)


def with_gaps(
    state: np.ndarray, missing: Mapping[str, np.ndarray], contract: RobotContract, spec: ObservationSpec
) -> np.ndarray:
    """``state`` (N, S) with NaN in the entries of each stream where it is ``missing`` (stream to (N,) bool)."""
    if not any(missing[name].any() for name in spec.state):
        return state
    state, start = state.copy(), 0
    for name in spec.state:
        end = start + len(contract.stream(name).names)
        state[missing[name], start:end] = np.nan
        start = end
    return state


def _common_fields(contract: RobotContract, spec: ObservationSpec) -> list[pa.Field]:
    import pyarrow as pa

    pair = pa.list_(pa.int32(), 2)
    fields = [("stamp_ns", pa.int64())]
    fields += [(f"age_ns.{name}", pa.int64()) for name in dict.fromkeys(name for _, name, _ in spec.uses())]
    fields += [(f"cloud.{name}", pa.large_binary()) for name in spec.clouds]
    for name in spec.sequences:
        stream = contract.stream(name)
        fields.append((f"sequence.{name}", pa.list_(pa.float32(), stream.window_length * len(stream.names))))
        fields.append((f"sequence.{name}.mask", pa.list_(pa.bool_(), stream.window_length)))
    for name in spec.maps:
        fields += [(f"map.{name}", pa.large_binary()), (f"map.{name}.dtype", pa.string()), (f"map.{name}.shape", pair)]
    for image in spec.calibrations:
        column = f"calibration.{image}"
        fields += [(column, pa.list_(pa.float64())), (f"{column}.size", pair), (f"{column}.model", pa.string()),
                   (f"{column}.frame_id", pa.string())]  # fmt: skip
    return [pa.field(name, kind) for name, kind in fields]


def _common_columns(
    observations: Sequence[Observation], contract: RobotContract, spec: ObservationSpec
) -> dict[str, pa.Array]:
    import pyarrow as pa

    types = {field.name: field.type for field in _common_fields(contract, spec)}
    rows: dict[str, Iterable[Any]] = {"stamp_ns": [o.stamp_ns for o in observations]}
    for _, name, _ in spec.uses():
        rows[f"age_ns.{name}"] = [o.ages_ns.get(name) for o in observations]
    for name in spec.clouds:
        rows[f"cloud.{name}"] = [_bytes(o.clouds.get(name)) for o in observations]
    for name in spec.maps:
        maps = [o.maps.get(name) for o in observations]
        rows[f"map.{name}"] = [_bytes(cells) for cells in maps]
        rows[f"map.{name}.dtype"] = [None if cells is None else cells.dtype.str for cells in maps]
        rows[f"map.{name}.shape"] = [None if cells is None else list(cells.shape) for cells in maps]
    for image in spec.calibrations:
        rows |= _calibration_rows(image, [o.calibrations.get(image) for o in observations])
    columns = {name: pa.array(values, types[name]) for name, values in rows.items()}
    for name in spec.sequences:
        windows = [o.sequences.get(name) for o in observations]
        values = [None if w is None else w.values for w in windows]
        columns[f"sequence.{name}"] = _fixed(values, types[f"sequence.{name}"])
        masks = [None if w is None else w.mask for w in windows]
        columns[f"sequence.{name}.mask"] = _fixed(masks, types[f"sequence.{name}.mask"])
    return columns


def _calibration_rows(image: str, found: Sequence[Calibration | None]) -> dict[str, list[Any]]:
    column = f"calibration.{image}"
    numbers = [
        None if c is None
        else np.concatenate([c.intrinsics.ravel(), c.rectification.ravel(), c.projection.ravel(), c.distortion])
        for c in found
    ]  # fmt: skip
    return {
        column: numbers,
        f"{column}.size": [None if c is None else [c.height, c.width] for c in found],
        f"{column}.model": [None if c is None else c.model for c in found],
        f"{column}.frame_id": [None if c is None else c.frame_id for c in found],
    }


def fixed_lists(rows: np.ndarray) -> pa.Array:
    """Rows (N, size) as a column of lists of one size."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1)), rows.shape[1])


def _fixed(values: Sequence[np.ndarray | None], kind: pa.DataType) -> pa.Array:
    """Arrays of one size as a column of lists of that size, null where there is none."""
    import pyarrow as pa

    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    flat = np.zeros((len(values), kind.list_size), dtype=dtype)
    for row, value in enumerate(values):
        if value is not None:
            flat[row] = value.reshape(-1)
    absent = pa.array([value is None for value in values], pa.bool_())
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), type=kind, mask=absent)


def _bytes(array: np.ndarray | None) -> bytes | None:
    return None if array is None else array.tobytes()


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


def _same_calibration(a: Calibration, b: Calibration) -> bool:
    arrays = ("intrinsics", "distortion", "rectification", "projection")
    return (a.width, a.height, a.model, a.frame_id) == (b.width, b.height, b.model, b.frame_id) and all(
        _same(getattr(a, name), getattr(b, name)) for name in arrays
    )
