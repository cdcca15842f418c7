"""rosbag2 bags as folders of MCAP and ``metadata.yaml``: written as they come, read with named errors.

Writing and indexed reading are rosbags' (https://gitlab.com/ternaris/rosbags); salvage of a bag whose recorder was
killed is the mcap library's. A bag without ``metadata.yaml`` was never closed and is refused as training data.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from mcap.reader import NonSeekingReader
from rosbags.interfaces import Connection, Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import Reader, StoragePlugin, Writer

from vla_core.contract import NANOSECONDS, ContractError, RobotContract
from vla_core.errors import VlaError, choices
from vla_core.observation.messages import Message, MessageError, has_header, header_stamp_ns, known_type, typestore

FLUSH_BYTES = 64 * 1024
FLUSH_NS = NANOSECONDS // 2
CONTRACT_KEY = "vla_contract"


class BagError(VlaError):
    """A bag that cannot be used, and why."""


class DamagedBag(BagError):
    """A closed bag whose bytes do not read; ``cause`` says why in a few words."""

    def __init__(self, path: Path, error: Exception) -> None:
        self.cause = f"truncated or damaged: {' '.join(str(error).split()) or type(error).__name__}"
        super().__init__(f"{path}: {self.cause}; `vla inspect` tells what is readable")


# On bytes that are cut or overwritten rosbags, mcap, SQLite, zstd and lz4 raise what they raise, from errors of their
# own to KeyError, struct.error, MemoryError and AssertionError. Nothing else is done where this is caught.
DAMAGE = Exception


class BagWriter:
    """One bag being recorded; what was flushed survives a SIGKILL.

    Args:
        path: folder to create; an existing one is refused.
        metadata: strings for ``custom_data`` of ``metadata.yaml``, such as the contract.
    """

    def __init__(self, path: Path | str, metadata: dict[str, str] | None = None) -> None:
        self.path = Path(path)
        if self.path.exists():
            raise BagError(f"{self.path} exists already; a recording never overwrites one")
        self._writer = Writer(self.path, version=9, storage_plugin=StoragePlugin.MCAP)
        for key, value in (metadata or {}).items():
            self.set_metadata(key, value)
        self._writer.open()
        self._connections: dict[str, Connection] = {}
        self._pending_bytes = 0
        self._flushed_ns = 0
        self._broken = False
        self.messages = 0

    def set_metadata(self, key: str, value: str) -> None:
        """Set an entry of ``custom_data``, written when the bag is closed."""
        self._writer.set_custom_data(key, value)

    def add_topic(self, topic: str, type_name: str, latched: bool = False) -> None:
        """Declare a topic; ``latched`` offers transient-local durability to whoever plays the bag."""
        known_type(type_name)
        self._connections[topic] = self._writer.add_connection(
            topic, type_name, typestore=typestore(), offered_qos_profiles=[_reliable_qos(latched)]
        )

    def write(self, topic: str, receive_ns: int, data: bytes | memoryview) -> None:
        """Append serialized bytes received at ``receive_ns``; raises :class:`BagError` when the disk refuses."""
        with self._named_errors():
            self._writer.write(self._connections[topic], receive_ns, data)
            self.messages += 1
            self._pending_bytes += len(data)
            if self._pending_bytes > FLUSH_BYTES or abs(receive_ns - self._flushed_ns) > FLUSH_NS:
                self.flush()
                self._flushed_ns = receive_ns

    def flush(self) -> None:
        """Close the open MCAP chunk and hand it to the operating system."""
        storage = self._writer.storage
        if storage is not None and self._pending_bytes:
            storage.close_chunk()  # type: ignore[attr-defined]  # rosbags types the base of its storages only
            storage.bio.flush()  # type: ignore[attr-defined]
            self._pending_bytes = 0

    def close(self) -> None:
        """Write the index and ``metadata.yaml``: from here on the bag is whole."""
        if self._broken:
            raise BagError(f"{self.path}: not closed, since it could not be written")
        if self._writer.storage is not None:
            with self._named_errors():
                self._writer.close()

    def abort(self) -> None:
        """Leave the bag as a killed recorder would: readable, without ``metadata.yaml``. Never raises."""
        with suppress(OSError):
            self.flush()
        with suppress(OSError):
            self._writer.abort()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # what comes after a hole must never make the bag look whole
            self._broken = True
            (self.path / "metadata.yaml").unlink(missing_ok=True)
            cause = error.strerror or error
            raise BagError(f"{self.path}: cannot be written: {cause}; what was flushed before stays readable") from None

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if kind is None:
            self.close()
        else:
            self.abort()


@dataclass(frozen=True)
class BagInfo:
    """What a bag holds. ``whole`` is False when it was never closed; ``note`` then says what is readable."""

    path: Path
    whole: bool
    topics: dict[str, str]
    counts: dict[str, int]
    start_ns: int
    end_ns: int
    bytes: int
    metadata: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def contract(self) -> RobotContract:
        """The contract embedded at recording."""
        if not self.whole:
            raise BagError(f"{self.path}: {self.note}")
        if CONTRACT_KEY not in self.metadata:
            raise BagError(f"{self.path}: no contract inside (custom_data {CONTRACT_KEY!r}); it has: "
                           f"{choices(self.metadata)}. Name one with --contract")  # fmt: skip
        try:
            return _contract(self.metadata[CONTRACT_KEY])
        except ContractError:  # once more, for an error that names this bag
            return RobotContract.from_yaml(self.metadata[CONTRACT_KEY], f"contract of {self.path}")


@dataclass(frozen=True)
class RecordedTopic:
    """A topic of a bag, with the QoS that its publishers offered; several publishers, several profiles."""

    name: str
    type: str
    count: int
    offered: tuple[Qos, ...]

    @property
    def latched(self) -> bool:
        """Whether late joiners got its value (transient-local durability)."""
        return any(qos.durability == QosDurability.TRANSIENT_LOCAL for qos in self.offered)

    @property
    def depth(self) -> int:
        """How many messages a late joiner of a latched topic got, at least 1."""
        return max([1, *(qos.depth for qos in self.offered)])


class Serialized(NamedTuple):
    """A message as the bag holds it; ``receive_ns`` is when it was recorded."""

    topic: str
    receive_ns: int
    data: bytes


def find_bags(paths: list[Path]) -> list[Path]:
    """Bags at or anywhere below ``paths``, in the order of their names; hidden folders hold what is not done."""
    bags: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise BagError(f"{path}: no such folder; a bag is a folder with metadata.yaml and .mcap or .db3 files")
        below = list(_bags_below(path))
        if not below:
            raise BagError(f"{path}: no bag here or in the folders below it")
        bags += below
    return bags


def _bags_below(path: Path) -> Iterator[Path]:
    if _is_bag(path):
        yield path
        return
    for child in sorted(path.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            yield from _bags_below(child)


class OpenBag:
    """A whole bag that is open: its ``info``, and its messages as often as they are asked for."""

    def __init__(self, path: Path, reader: Reader) -> None:
        self.path = path
        self.info = BagInfo(
            path=path, whole=True, bytes=sum(file.stat().st_size for file in _storage_files(path)),
            topics={c.topic: c.msgtype for c in reader.connections},
            counts=_counts(reader), start_ns=reader.start_time, end_ns=reader.end_time,
            metadata=dict(reader.storage.metadata.custom or {}),
        )  # fmt: skip
        self._reader = reader

    def read(self, topics: set[str] | None = None) -> Generator[Message, None, None]:
        """Messages in the order of their receipt; the stamp is the header's, else the time of receipt."""
        wanted = [c for c in self._reader.connections if topics is None or c.topic in topics]
        if not wanted:
            return
        headed = {c.msgtype: c.msgtype in typestore().fielddefs and has_header(c.msgtype) for c in wanted}
        for connection, receive_ns, data in _messages(self._reader, self.path, wanted):
            stamp_ns: int | None = None
            if headed[connection.msgtype]:
                try:
                    stamp_ns = header_stamp_ns(connection.msgtype, data)
                except MessageError as error:
                    raise DamagedBag(self.path, error) from None
            stamp_ns = receive_ns if stamp_ns is None else stamp_ns
            yield Message(connection.topic, connection.msgtype, stamp_ns, bytes(data), receive_ns)


@contextmanager
def opened(path: Path | str) -> Iterator[OpenBag]:
    """Open a whole bag once for everything that is wanted of it; raises :class:`BagError` for one that is not whole."""
    with _open(Path(path)) as reader:
        yield OpenBag(Path(path), reader)


def info(path: Path | str) -> BagInfo:
    """Summary of a bag; salvages what is readable when the bag was never closed."""
    path = Path(path)
    files = _storage_files(path)
    if not files:
        raise BagError(f"{path}: no bag: neither .mcap nor .db3 files inside")
    size = sum(file.stat().st_size for file in files)
    if not (path / "metadata.yaml").is_file():
        cause = "never closed (no metadata.yaml): its recorder was killed or is still running"
        return _salvaged_info(path, files, size, cause)
    try:
        with opened(path) as bag:
            return bag.info
    except DamagedBag as error:
        return _salvaged_info(path, files, size, error.cause)


def read(path: Path | str, topics: set[str] | None = None) -> Generator[Message, None, None]:
    """Messages of a whole bag as :meth:`OpenBag.read` gives them."""
    with opened(path) as bag:
        yield from bag.read(topics)


def recorded_topics(path: Path | str) -> dict[str, RecordedTopic]:
    """Topics of a whole bag by name."""
    found: dict[str, RecordedTopic] = {}
    with _open(Path(path)) as reader:
        for c in reader.connections:
            before = found.get(c.topic, RecordedTopic(c.topic, c.msgtype, 0, ()))
            if before.type != c.msgtype:
                raise BagError(f"{path}: topic {c.topic!r} holds both {before.type} and {c.msgtype}")
            offered = (*before.offered, *c.ext.offered_qos_profiles)  # type: ignore[union-attr]  # never a ROS 1 bag
            found[c.topic] = RecordedTopic(c.topic, c.msgtype, before.count + c.msgcount, offered)
    return found


def read_serialized(
    path: Path | str, topics: set[str], start_ns: int | None = None, stop_ns: int | None = None
) -> Generator[Serialized, None, None]:
    """Messages of a whole bag in the order of their receipt, from ``start_ns`` until before ``stop_ns``.

    Unlike :func:`read` it knows nothing of types: bags of any package can be read.
    """
    with _open(Path(path)) as reader:
        wanted = [c for c in reader.connections if c.topic in topics]
        if not wanted:
            return
        for connection, receive_ns, data in _messages(reader, Path(path), wanted, start_ns, stop_ns):
            yield Serialized(connection.topic, receive_ns, bytes(data))


def require_topics(bag: BagInfo, needed: dict[str, str]) -> None:
    """Raise when a topic of ``needed`` (topic to type) is absent, empty or of another type."""
    for topic, type_name in needed.items():
        if topic not in bag.topics:
            raise BagError(f"{bag.path}: no topic {topic!r} of the contract; the bag has: {choices(bag.topics)}")
        if bag.topics[topic] != type_name:
            raise BagError(f"{bag.path}: topic {topic!r} holds {bag.topics[topic]}, the contract says {type_name}")
        if not bag.counts[topic]:
            raise BagError(f"{bag.path}: topic {topic!r} has no messages")


def _messages(
    reader: Reader, path: Path, wanted: list[Connection], start_ns: int | None = None, stop_ns: int | None = None
) -> Generator[tuple[Connection, int, bytes], None, None]:
    """The reader's messages, with damage named; overwritten bytes that merely hide messages are damage, too."""
    count = 0
    try:
        for entry in reader.messages(connections=wanted, start=start_ns, stop=stop_ns):
            yield entry
            count += 1
    except DAMAGE as error:
        raise DamagedBag(path, error) from None
    expected = sum(connection.msgcount for connection in wanted)
    if stop_ns is None and (start_ns is None or start_ns <= reader.start_time) and count != expected:
        raise DamagedBag(path, ValueError(f"{count} of {expected} messages are left"))


@contextmanager
def _open(path: Path) -> Iterator[Reader]:
    """Open a closed bag, with one-line errors for what is not one."""
    if not _storage_files(path):
        raise BagError(f"{path}: no bag: neither .mcap nor .db3 files inside")
    if not (path / "metadata.yaml").is_file():
        raise BagError(f"{path}: never closed (no metadata.yaml): its recorder was killed or is still running; "
                       "`vla inspect` tells what is readable")  # fmt: skip
    reader = Reader(path)
    try:
        reader.open()
        _check_metadata(reader)
    except DAMAGE as error:
        raise DamagedBag(path, error) from None
    try:
        if not reader.message_count:
            raise BagError(f"{path}: empty: no messages")
        yield reader
    finally:
        reader.close()


def _check_metadata(reader: Reader) -> None:
    """What rosbags takes from ``metadata.yaml`` as it is: a flipped bit may have made a text of a number."""
    numbers = [reader.start_time, reader.end_time, reader.message_count, *(c.msgcount for c in reader.connections)]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("a count or time in metadata.yaml is no number from 0 on")
    texts = [text for c in reader.connections for text in (c.topic, c.msgtype)]
    custom = reader.storage.metadata.custom or {}
    if not all(isinstance(text, str) for text in [*texts, *custom, *custom.values()]):
        raise ValueError("a name or an entry of custom_data in metadata.yaml is no text")


@functools.lru_cache(maxsize=64)
def _contract(text: str) -> RobotContract:
    """The bags of a day hold the same text, and parsing it takes longer than reading a small bag."""
    return RobotContract.from_yaml(text)


def _counts(reader: Reader) -> dict[str, int]:
    """Messages by topic; a topic that was declared twice counts both."""
    counts: dict[str, int] = {}
    for connection in reader.connections:
        counts[connection.topic] = counts.get(connection.topic, 0) + connection.msgcount
    return counts


def _is_bag(path: Path) -> bool:
    """Also one that lost its storage: it must be complained of, not passed over."""
    return bool(_storage_files(path)) or (path / "metadata.yaml").is_file()


def _storage_files(path: Path) -> list[Path]:
    kinds = ("*.mcap", "*.db3", "*.mcap.zstd", "*.db3.zstd")  # the last two are compressed as files
    return sorted(file for kind in kinds for file in path.glob(kind)) if path.is_dir() else []


def _salvaged_info(path: Path, files: list[Path], size: int, cause: str) -> BagInfo:
    """Count what can still be read of a bag that is not whole because of ``cause``."""
    topics: dict[str, str] = {}
    counts: dict[str, int] = {}
    stamps: list[int] = []
    for file in files:
        if file.suffix != ".mcap":
            continue
        with file.open("rb") as stream:
            try:
                for schema, channel, message in NonSeekingReader(stream).iter_messages(log_time_order=False):
                    topics[channel.topic] = schema.name if schema else "?"
                    counts[channel.topic] = counts.get(channel.topic, 0) + 1
                    stamps = [min([*stamps, message.log_time]), max([*stamps, message.log_time])]
            except DAMAGE:
                pass  # the cut: what came before it has been counted
    start_ns, end_ns = (stamps[0], stamps[-1]) if stamps else (0, 0)
    note = (
        f"{cause}; readable up to the last flushed chunk: {sum(counts.values())} messages, "
        f"{(end_ns - start_ns) / NANOSECONDS:.2f} s"
    )
    return BagInfo(path=path, whole=False, topics=topics, counts=counts, start_ns=start_ns, end_ns=end_ns,
                   bytes=size, note=note)  # fmt: skip


def _reliable_qos(latched: bool) -> Qos:
    """QoS stored with a topic, so that ``ros2 bag play`` offers what the recorded publishers offered."""
    return Qos(
        QosHistory.KEEP_LAST, 1 if latched else 10, QosReliability.RELIABLE,
        QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        QosTime(0, 0), QosTime(0, 0), QosLiveliness.SYSTEM_DEFAULT, QosTime(0, 0), False,
    )  # fmt: skip
