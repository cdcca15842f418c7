"""From a recorded bag to the ticks of an episode, by replaying its messages through the robot's own buffer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_core.commands import decode
from vla_core.contract import NANOSECONDS, Action, RobotContract
from vla_core.data import bag as bags
from vla_core.data.bag import BagError
from vla_core.observation.builder import (
    NO_LIMIT_NS,
    Observation,
    ObservationBuilder,
    ObservationSpec,
    Unobserved,
)
from vla_core.observation.memory_buffer import MemoryBuffer
from vla_core.observation.messages import Message, MessageError, deserialize

EPISODE_TOPIC = "episode"
EPISODE_TYPE = "vla_ros/msg/Episode"
MAX_GAP_NS = 2 * NANOSECONDS
EPISODE_STATES = {0: "started", 1: "succeeded", 2: "failed", 3: "aborted"}


@dataclass(frozen=True)
class EpisodeInfo:
    """What the episode's own marks say."""

    seed: int
    task: str
    instruction: str
    outcome: str


@dataclass(frozen=True)
class Episode:
    """Ticks of one bag: observations, and the command (N, A) float32 that answered each of them."""

    bag: Path
    info: EpisodeInfo
    observations: list[Observation]
    actions: np.ndarray
    dropped_ticks: int


def replay_ticks(messages: list[Message], builder: ObservationBuilder, buffer: MemoryBuffer) -> Iterator[int]:
    """Feed ``messages`` to ``buffer`` in the order of their stamps, and yield each control tick (ns) when it is due.

    At a tick the buffer holds what the robot's would: everything stamped until then, or a little more for an offline
    contract. Ticks start where every stream has just come, or where all have been there for two periods of the slowest
    (sensors whose phases never meet). They follow the contract's rate until the messages end, until all of them pause
    for two seconds, or until a mark starts an episode, which forgets what was before as the robot does.
    """
    feed = sorted((m for m in messages if m.topic in builder.by_topic), key=lambda m: m.stamp_ns)
    starts = deque(episode_starts(messages))
    step_ns = builder.contract.step_ns
    patience_ns = 2 * max((stream.period_ns or 0 for stream in builder.streams.values()), default=0)
    tick_ns: int | None = None
    whole_ns: int | None = None  # since when every stream is there
    fed = 0

    def feed_until(until_ns: int) -> None:
        nonlocal fed
        while fed < len(feed) and feed[fed].stamp_ns <= until_ns:
            for name in builder.by_topic[feed[fed].topic]:
                buffer.add(name, feed[fed].stamp_ns, feed[fed].data)
            fed += 1

    for place, message in enumerate(feed):
        while starts and starts[0] <= message.stamp_ns:
            buffer.start_episode(starts.popleft())
            tick_ns, whole_ns = None, None
        feed_until(message.stamp_ns)
        border_ns = starts[0] if starts else NO_LIMIT_NS
        next_ns = feed[place + 1].stamp_ns if place + 1 < len(feed) else message.stamp_ns + step_ns
        if tick_ns is None:
            absent = builder.absent(buffer, message.stamp_ns)
            whole_ns = None if absent else whole_ns or message.stamp_ns
            waited = whole_ns is not None and message.stamp_ns - whole_ns >= patience_ns
            if waited or not builder.due(buffer, message.stamp_ns):
                tick_ns, whole_ns = message.stamp_ns, None
        while tick_ns is not None and tick_ns < min(next_ns, border_ns):
            feed_until(min(tick_ns + builder.lookahead_ns, border_ns - 1))
            yield tick_ns
            tick_ns += step_ns
            if tick_ns - message.stamp_ns > MAX_GAP_NS:
                tick_ns = None  # all streams fell silent: ticks start anew where they are there again


def episode_starts(messages: list[Message]) -> list[int]:
    """Stamps of the marks that start an episode, in order."""
    marks = sorted((m for m in messages if m.topic == EPISODE_TOPIC), key=lambda m: m.stamp_ns)
    return [m.stamp_ns for m in marks if EPISODE_STATES.get(deserialize(EPISODE_TYPE, m.data).state) == "started"]


class Commands:
    """Recorded commands, looked up by the tick that they answered."""

    def __init__(self, messages: list[Message], contract: RobotContract) -> None:
        self._tracks = [_Track(messages, action, contract) for action in contract.actions.values()]

    def __len__(self) -> int:
        return max(len(track.messages) for track in self._tracks)

    def at(self, tick_ns: int) -> np.ndarray | None:
        """The command (A,) that answered ``tick_ns``, of all actions together; None when one of them gave none."""
        parts = [track.at(tick_ns) for track in self._tracks]
        return None if any(part is None for part in parts) else np.concatenate(parts)  # type: ignore[arg-type]


class _Track:
    """The messages of one action in order of their stamps."""

    def __init__(self, messages: list[Message], action: Action, contract: RobotContract) -> None:
        self._action, self._step_ns, self._row_ns = action, contract.step_ns, contract.chunk_step_ns
        self.messages = sorted((m for m in messages if m.topic == action.topic), key=lambda m: m.stamp_ns)
        self._stamps = np.array([m.stamp_ns for m in self.messages], dtype=np.int64)

    def at(self, tick_ns: int) -> np.ndarray | None:
        """A step's message is the first one within the control period; of a chunk, the row for this instant."""
        if self._action.publish == "chunk":
            place = int(np.searchsorted(self._stamps, tick_ns, side="right")) - 1
            if place < 0:
                return None
            rows = decode(self._action, self.messages[place].data)
            row = (tick_ns - int(self._stamps[place])) // self._row_ns
            return rows[row] if row < len(rows) else None
        place = int(np.searchsorted(self._stamps, tick_ns))
        if place == len(self._stamps) or self._stamps[place] >= tick_ns + self._step_ns:
            return None
        return decode(self._action, self.messages[place].data)[0]


def read_episode(path: Path, contract: RobotContract, spec: ObservationSpec) -> Episode:
    """One episode from one bag; raises :class:`BagError` naming what is absent."""
    summary = bags.info(path)
    if not summary.whole:
        raise BagError(f"{path}: {summary.note}")
    builder = ObservationBuilder(contract, spec)
    needed = {stream.topic: stream.type for stream in builder.streams.values()}
    needed |= {action.topic: action.type for action in contract.actions.values()}
    bags.require_topics(summary, needed)

    messages = list(bags.read(path, set(needed) | {EPISODE_TOPIC}))
    commands = Commands(messages, contract)
    buffer = builder.make_buffer()
    observations, actions, dropped = [], [], 0
    for tick_ns in replay_ticks(messages, builder, buffer):
        try:
            command = commands.at(tick_ns)
            seen = builder.build(buffer, tick_ns)
        except Unobserved:
            seen = None
        except MessageError as error:
            raise BagError(f"{path}: {error}") from None
        if seen is None or command is None:
            dropped += 1
            continue
        observations.append(seen)
        actions.append(command)
    if not observations:
        raise BagError(f"{path}: no tick has both an observation and a command: {len(commands)} commands, "
                       f"{dropped} ticks without")  # fmt: skip
    return Episode(path, _episode_info(messages), observations, np.asarray(actions, dtype=np.float32), dropped)


def _episode_info(messages: list[Message]) -> EpisodeInfo:
    marks = [deserialize(EPISODE_TYPE, m.data) for m in messages if m.topic == EPISODE_TOPIC]
    if not marks:  # a bag from elsewhere: its instruction stream still says what was done
        return EpisodeInfo(seed=-1, task="", instruction="", outcome="unknown")
    last = marks[-1]
    return EpisodeInfo(int(last.seed), str(last.task), str(last.instruction), EPISODE_STATES.get(last.state, "unknown"))
