"""One pass over a bag: per topic its times and sizes, a sample of its numbers and pictures, and what was repeated.

Of each message stay its two times and its size, 24 bytes, and nothing else; so a bag may be far larger than the memory.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from vla_core import commands
from vla_core.contract import Action, RobotContract, Stream
from vla_core.data.bag import BagInfo
from vla_core.data.episodes import EPISODE_STATES, EPISODE_TYPE
from vla_core.observation.decode import decode
from vla_core.observation.image import compressed_to_array, raw_to_array
from vla_core.observation.messages import Message, MessageError, deserialize, has_header

IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
NO_NUMBERS = ("sensor_msgs/msg/CameraInfo", "sensor_msgs/msg/PointCloud2", *IMAGES)
PICTURES = 32  # looked at of each camera
SHOWN = 8  # of these on the contact sheet
ROWS = 20_000  # of numbers that are looked at of each topic
STAMP_END = 12  # bytes of a message's beginning that hold its header's stamp
HEAD_BYTES = 4096  # by which repetition of large messages is ruled out at little cost
ENTRIES = 16  # of a message of no contract that are drawn


@dataclass
class Numbers:
    """Decoded rows of one stream or command: stamps (N,) and values (N, D)."""

    names: tuple[str, ...]
    stamps_ns: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)


@dataclass
class Shot:
    """A picture of the sample; ``pixels`` are kept of those that are shown."""

    stamp_ns: int
    mean: float
    spread: float
    pixels: np.ndarray | None


@dataclass
class Track:
    """What is known of a topic. ``repeated`` is the longest run of equal messages: its length, first and last stamp."""

    topic: str
    type: str
    count: int
    stamped: bool = False
    stamps_ns: array = field(default_factory=lambda: array("q"))
    received_ns: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("L"))
    repeated: tuple[int, int, int] = (0, 0, 0)
    bad: int = 0
    bad_cause: str = ""
    shots: list[Shot] = field(default_factory=list)
    numbers: dict[str, Numbers] = field(default_factory=dict)
    marks: Counter[str] = field(default_factory=Counter)
    _last: bytes = b""
    _run: tuple[int, int] = (0, 0)

    def add(self, message: Message) -> None:
        """Take in the next message of the topic."""
        received = message.stamp_ns if message.receive_ns is None else message.receive_ns
        self.stamps_ns.append(message.stamp_ns)
        self.received_ns.append(received)
        self.sizes.append(len(message.data))
        same = self._same(message.data)
        self._run = (self._run[0] + 1, self._run[1]) if same else (1, message.stamp_ns)
        if self._run[0] > self.repeated[0]:
            self.repeated = (*self._run, message.stamp_ns)
        self._last = message.data

    def _same(self, data: bytes) -> bool:
        """Whether only the stamp differs from the message before."""
        start, last = STAMP_END if self.stamped else 0, self._last
        if len(last) != len(data) or data[start:HEAD_BYTES] != last[start:HEAD_BYTES]:
            return False
        return memoryview(data)[HEAD_BYTES:] == memoryview(last)[HEAD_BYTES:]

    def spoiled(self, error: MessageError) -> None:
        """Count a message that does not decode."""
        self.bad += 1
        self.bad_cause = self.bad_cause or str(error)


def collect(bag: BagInfo, messages: Iterable[Message], contract: RobotContract | None) -> dict[str, Track]:
    """The tracks of a bag, by topic; topics of the contract are decoded by it, others by their type."""
    tracks = {topic: Track(topic, kind, bag.counts[topic]) for topic, kind in bag.topics.items()}
    readers = {topic: _readers(track, contract) for topic, track in tracks.items()}
    places: dict[str, int] = dict.fromkeys(tracks, 0)
    for track in tracks.values():
        try:
            track.stamped = has_header(track.type)
        except MessageError:
            track.stamped = False
    for message in messages:
        track = tracks[message.topic]
        track.add(message)
        place = places[message.topic]
        places[message.topic] += 1
        for every, look in readers[message.topic]:
            if place % every == 0:
                try:
                    look(message)
                except MessageError as error:
                    track.spoiled(error)
    for track in tracks.values():
        shown = set(np.linspace(0, len(track.shots) - 1, SHOWN).astype(int).tolist()) if track.shots else set()
        for i, shot in enumerate(track.shots):
            shot.pixels = shot.pixels if i in shown else None
    return tracks


def _readers(track: Track, contract: RobotContract | None) -> list[tuple[int, Any]]:
    """(every how many messages, what to do with it) of a topic."""
    if track.type in IMAGES:
        return [(max(1, -(-track.count // PICTURES)), partial(_picture, track))]
    if track.type == EPISODE_TYPE:
        return [(1, partial(_mark, track))]
    every = max(1, -(-track.count // ROWS))
    observations = (contract.observations if contract else {}).items()
    streams = {name: stream for name, stream in observations if stream.topic == track.topic}
    actions = {name: action for name, action in (contract.actions if contract else {}).items()
               if action.topic == track.topic}  # fmt: skip
    looks: list[tuple[int, Any]] = [
        (every, partial(_stream, track, name, stream))
        for name, stream in streams.items()
        if stream.names and stream.type not in NO_NUMBERS
    ]
    looks += [(every, partial(_command, track, name, action)) for name, action in actions.items()]
    if not streams and not actions and track.type not in NO_NUMBERS:
        looks.append((every, partial(_any, track)))
    return looks


def _picture(track: Track, message: Message) -> None:
    decoder = raw_to_array if track.type == IMAGES[0] else compressed_to_array
    pixels = np.asarray(decoder(deserialize(track.type, message.data)))
    if pixels.ndim != 3:
        return  # a map of numbers
    track.shots.append(Shot(message.stamp_ns, float(pixels.mean()), float(pixels.std()), _small(pixels)))


def _mark(track: Track, message: Message) -> None:
    state = deserialize(track.type, message.data).state
    track.marks[EPISODE_STATES.get(state, f"state {state}")] += 1


def _small(pixels: np.ndarray) -> np.ndarray:
    """A copy, thinned out where it is larger than a contact sheet shows."""
    step = max(1, pixels.shape[0] // 360)
    return pixels[::step, ::step].copy()


def _stream(track: Track, name: str, stream: Stream, message: Message) -> None:
    value = decode(stream, message.data)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        _keep(track, name, stream.names, message.stamp_ns, value)


def _command(track: Track, name: str, action: Action, message: Message) -> None:
    row = commands.decode(action, message.data)[0]
    _keep(track, f"action.{name}", action.names, message.stamp_ns, row)
    if not np.isfinite(row).all():
        raise MessageError(f"{track.topic}: a command that is not finite")


def _any(track: Track, message: Message) -> None:
    """The numbers of a message of no contract, as far as there are few."""
    try:
        found = dict(_flat(deserialize(track.type, message.data), ""))
    except (MessageError, KeyError):  # of a type that is not installed
        return
    if 0 < len(found) <= ENTRIES:
        known = track.numbers.get(track.topic)
        if known is None or known.names == tuple(found):
            _keep(track, track.topic, tuple(found), message.stamp_ns, np.array(list(found.values())))


def _flat(value: Any, path: str) -> Iterable[tuple[str, float]]:
    """Dotted paths and values of the numbers in a message, without its header and longer arrays."""
    for key in (each.name for each in dataclasses.fields(value)):
        inner = getattr(value, key)
        place = f"{path}.{key}" if path else key
        if key in ("header", "stamp"):
            continue
        if isinstance(inner, bool | int | float | np.number):
            yield place, float(inner)
        elif isinstance(inner, np.ndarray) and inner.ndim == 1 and 0 < len(inner) <= ENTRIES:
            if inner.dtype.kind in "fiu":
                yield from ((f"{place}[{i}]", float(number)) for i, number in enumerate(inner))
        elif dataclasses.is_dataclass(inner):
            yield from _flat(inner, place)


def _keep(track: Track, name: str, names: tuple[str, ...], stamp_ns: int, row: np.ndarray) -> None:
    numbers = track.numbers.setdefault(name, Numbers(names))
    numbers.stamps_ns.append(stamp_ns)
    numbers.rows.append(np.asarray(row, dtype=np.float64))


def streams_of(contract: RobotContract, topic: str) -> Mapping[str, Stream | Action]:
    """Observations and actions of a contract that are on a topic, by name."""
    everything: dict[str, Stream | Action] = {**contract.observations}
    everything.update({f"action.{name}": action for name, action in contract.actions.items()})
    return {name: one for name, one in everything.items() if one.topic == topic}
