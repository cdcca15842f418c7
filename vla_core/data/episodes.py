"""From a recorded bag to the ticks of its episodes, by replaying its messages through the robot's own buffer.

All of it streams: memory does not grow with the length of a bag.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.commands import decode
from vla_core.contract import NANOSECONDS, Action, ContractError, RobotContract
from vla_core.data import bag as bags
from vla_core.data.bag import BagError, OpenBag
from vla_core.observation.builder import (
    NO_LIMIT_NS,
    Observation,
    ObservationBuilder,
    ObservationSpec,
    Unobserved,
)
from vla_core.observation.memory_buffer import FUTURE_NS, MemoryBuffer
from vla_core.observation.messages import Message, MessageError, deserialize

EPISODE_TOPIC = "episode"
EPISODE_TYPE = "vla_ros/msg/Episode"
MAX_GAP_NS = 2 * NANOSECONDS
EPISODE_STATES = {0: "started", 1: "succeeded", 2: "failed", 3: "aborted"}
# How long after its receipt a message may be overtaken by one with an older stamp. A recorder that has to share its
# core falls behind by little of its own time, which may be seconds of a simulation that is faster than real time.
REORDER_NS = 10 * NANOSECONDS
AHEAD_NS = 2 * NANOSECONDS  # that a stamp of a topic which is no sensor's may lie in the future of its receipt
REORDER_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class EpisodeInfo:
    """What the episode's own marks say."""

    seed: int
    task: str
    instruction: str
    outcome: str


class StampOrder:
    """Messages in the order of their stamps, from messages in the order of their receipt, with bounded memory.

    A message waits until ``window_ns`` of receipt have passed after it, or until ``max_bytes`` wait. What comes later
    than that after messages with newer stamps is ``late``: it is given out as it comes, and counted by topic. What is
    stamped further ahead of its receipt than a robot would believe is left out and counted as ``future``: 250 ms for
    ``observed`` topics, 2 s for others, whose stamps may say when something is to happen.
    """

    def __init__(
        self,
        messages: Iterable[Message],
        observed: Iterable[str] = (),
        window_ns: int = REORDER_NS,
        max_bytes: int = REORDER_BYTES,
    ) -> None:
        self.late: Counter[str] = Counter()
        self.future: Counter[str] = Counter()
        self._messages = messages
        self._observed = frozenset(observed)
        self._window_ns = window_ns
        self._max_bytes = max_bytes

    def __iter__(self) -> Iterator[Message]:
        kept: deque[tuple[int, int, Message]] = deque()  # stamp, place in the order of receipt; in this order
        waiting: deque[tuple[int, int]] = deque()  # receipt, place
        overtook: set[int] = set()  # places that were given out before older receipts
        size = newest_ns = 0
        last_ns = -NO_LIMIT_NS
        for place, message in enumerate(self._messages):
            stamp_ns = message.stamp_ns
            receive_ns = stamp_ns if message.receive_ns is None else message.receive_ns
            limit_ns = FUTURE_NS if message.topic in self._observed else AHEAD_NS
            if receive_ns and stamp_ns > receive_ns + limit_ns:
                self.future[message.topic] += 1
                continue
            entry = stamp_ns, place, message
            if not kept or stamp_ns >= kept[-1][0]:
                kept.append(entry)
            else:
                insort(kept, entry)
            waiting.append((receive_ns, place))
            size += len(message.data)
            if receive_ns > newest_ns:
                newest_ns = receive_ns
            while waiting and (waiting[0][0] < newest_ns - self._window_ns or size > self._max_bytes):
                _, oldest = waiting.popleft()
                if oldest in overtook:
                    overtook.remove(oldest)
                    continue
                left = -1
                while left != oldest:
                    stamp_ns, left, found = kept.popleft()
                    if left != oldest:
                        overtook.add(left)
                    size -= len(found.data)
                    if stamp_ns < last_ns:
                        self.late[found.topic] += 1
                    else:
                        last_ns = stamp_ns
                    yield found
        for stamp_ns, _, found in kept:
            if stamp_ns < last_ns:
                self.late[found.topic] += 1
            yield found


class Replay:
    """Feeds messages to a buffer in the order of their stamps, and gives the control ticks (ns) as they are due.

    At a tick the buffer holds what the robot's would: everything stamped until then, or a little more for an offline
    contract; ``commands`` knows those until ``commands.ahead_ns`` after it. Ticks start where every stream has just
    come, or where all have been there for two periods of the slowest (sensors whose phases never meet). They follow
    the contract's rate until the messages end, until all of them pause for two seconds, or until a mark starts an
    episode, which forgets what was before as the robot does.

    Args:
        messages: in the order of their stamps (:class:`StampOrder`), but for late ones, which go to the buffer as they
            come. A list may have any order; it is sorted here.

    ``episode`` is the number of starts until the current tick, and ``marks`` the decoded marks since each start, as far
    as they have been read; those before the first start are at 0.
    """

    def __init__(
        self,
        messages: Iterable[Message],
        builder: ObservationBuilder,
        buffer: MemoryBuffer,
        commands: Commands | None = None,
    ) -> None:
        ordered = sorted(messages, key=attrgetter("stamp_ns")) if isinstance(messages, Sequence) else messages
        self.episode = 0
        self.marks: list[list[Any]] = [[]]
        self._messages = iter(ordered)
        self._builder, self._buffer, self._commands = builder, buffer, commands
        self._topics = {EPISODE_TOPIC, *builder.by_topic, *(() if commands is None else commands.topics)}
        self._read_ns = -NO_LIMIT_NS  # everything stamped until then has been read
        self._fed_ns = -NO_LIMIT_NS  # … and fed
        self._unfed: deque[Message] = deque()
        self._coming: deque[int] = deque()  # stamps of messages that may start or delay ticks
        self._starts: deque[int] = deque()

    def __iter__(self) -> Iterator[int]:
        builder, step_ns = self._builder, self._builder.contract.step_ns
        patience_ns = 2 * max((stream.period_ns or 0 for stream in builder.streams.values()), default=0)
        tick_ns: int | None = None
        whole_ns: int | None = None  # since when every stream is there
        while self._read_some():
            now_ns = self._coming.popleft()
            self._read_until(now_ns)
            while self._starts and self._starts[0] <= now_ns:
                self._buffer.start_episode(self._starts.popleft())
                self.episode += 1
                tick_ns, whole_ns = None, None
            self._feed_until(now_ns)
            next_ns = self._coming[0] if self._read_some() else now_ns + step_ns
            if tick_ns is None:
                absent = builder.absent(self._buffer, now_ns)
                whole_ns = None if absent else whole_ns or now_ns
                waited = whole_ns is not None and now_ns - whole_ns >= patience_ns
                if waited or not builder.due(self._buffer, now_ns):
                    tick_ns, whole_ns = now_ns, None
            while tick_ns is not None and tick_ns < min(next_ns, self._border_ns):
                self._read_until(tick_ns + builder.lookahead_ns)
                self._feed_until(min(tick_ns + builder.lookahead_ns, self._border_ns - 1))
                if self._commands is not None:
                    self._read_until(tick_ns + self._commands.ahead_ns)
                    self._commands.forget_before(tick_ns)
                yield tick_ns
                tick_ns += step_ns
                if tick_ns - now_ns > MAX_GAP_NS:
                    tick_ns = None  # all streams fell silent: ticks start anew where they are there again

    @property
    def _border_ns(self) -> int:
        return self._starts[0] if self._starts else NO_LIMIT_NS

    def _read_some(self) -> bool:
        """Read on until a message is coming; False at the end."""
        while not self._coming:
            if not self._read_one():
                return False
        return True

    def _read_until(self, until_ns: int) -> None:
        while self._read_ns <= until_ns and self._read_one():
            pass

    def _read_one(self) -> bool:
        message = next(self._messages, None)
        if message is None:
            self._read_ns = NO_LIMIT_NS
            return False
        if message.topic not in self._topics:
            return True
        late = message.stamp_ns < self._read_ns
        self._read_ns = max(self._read_ns, message.stamp_ns)
        if self._commands is not None:
            self._commands.add(message)
        if message.topic in self._builder.by_topic:
            if message.stamp_ns <= self._fed_ns:
                self._feed(message)
            elif late:
                insort(self._unfed, message, key=attrgetter("stamp_ns"))
            else:
                self._unfed.append(message)
                self._coming.append(message.stamp_ns)
        elif message.topic == EPISODE_TOPIC:
            self._add_mark(message)
        return True

    def _add_mark(self, message: Message) -> None:
        mark = deserialize(EPISODE_TYPE, message.data)
        if EPISODE_STATES.get(mark.state) == "started":
            insort(self._starts, message.stamp_ns)
            self.marks.append([])
        self.marks[-1].append((message.stamp_ns, mark))

    def _feed_until(self, until_ns: int) -> None:
        self._fed_ns = max(self._fed_ns, until_ns)
        while self._unfed and self._unfed[0].stamp_ns <= until_ns:
            self._feed(self._unfed.popleft())

    def _feed(self, message: Message) -> None:
        for name in self._builder.by_topic[message.topic]:
            self._buffer.add(name, message.stamp_ns, message.data)


def replay_ticks(
    messages: Iterable[Message], builder: ObservationBuilder, buffer: MemoryBuffer, commands: Commands | None = None
) -> Iterator[int]:
    """The ticks of a :class:`Replay`."""
    return iter(Replay(messages, builder, buffer, commands))


def replayed(path: Path, builder: ObservationBuilder, commands: Commands | None = None) -> Iterator[Message]:
    """Messages of a bag for :class:`Replay`, in the order of their stamps."""
    wanted = {*builder.by_topic, EPISODE_TOPIC, *(() if commands is None else commands.topics)}
    with closing(bags.read(path, wanted)) as messages:
        yield from StampOrder(messages, builder.by_topic)


def episode_starts(messages: Iterable[Message]) -> list[int]:
    """Stamps of the marks that start an episode, in order."""
    marks = sorted((m for m in messages if m.topic == EPISODE_TOPIC), key=lambda m: m.stamp_ns)
    return [m.stamp_ns for m in marks if EPISODE_STATES.get(deserialize(EPISODE_TYPE, m.data).state) == "started"]


class Commands:
    """Recorded commands, looked up by the tick that they answered.

    Of joints a tick was answered by one row (A,), of a trajectory in the robot's own frame (``RobotContract.plans``) by
    all its rows (H, A): those of another tick's are places seen from elsewhere.

    Args:
        messages: commands that are known from the beginning; others are added as they are read.
        ahead_ns: how far after the current tick commands are asked for; one control step without it.
    """

    def __init__(self, messages: Iterable[Message], contract: RobotContract, ahead_ns: int | None = None) -> None:
        self.ahead_ns = contract.step_ns if ahead_ns is None else ahead_ns
        relative = [name for name, action in contract.actions.items() if action.relative]
        if relative and not contract.plans:
            raise ContractError(
                f"actions: {', '.join(relative)} is a trajectory in the robot's own frame, the others are commands of "
                "one instant; a dataset cannot hold both, so give each a contract of its own"
            )
        self._tracks = {action.topic: _Track(action, contract) for action in contract.actions.values()}
        self._counts = Counter[str]()
        for message in messages:
            self.add(message)

    @property
    def topics(self) -> tuple[str, ...]:
        """Topics of the contract's actions."""
        return tuple(self._tracks)

    def __len__(self) -> int:
        """Commands that were added, of the action that has most."""
        return max(self._counts.values(), default=0)

    def add(self, message: Message) -> None:
        """Keep a command; other messages are passed over."""
        track = self._tracks.get(message.topic)
        if track is not None:
            self._counts[message.topic] += 1
            track.add(message)

    def forget_before(self, tick_ns: int) -> None:
        """Drop what no tick from ``tick_ns`` on can be answered by."""
        for track in self._tracks.values():
            track.forget_before(tick_ns)

    def at(self, tick_ns: int) -> np.ndarray | None:
        """The command (A,), or plan (H, A), that answered ``tick_ns``, of all actions; None where one is missing."""
        parts = [track.at(tick_ns) for track in self._tracks.values()]
        # A contract has one plan at most: two would both have an x.
        return None if any(part is None for part in parts) else np.concatenate(parts)  # type: ignore[arg-type]

    def executed_at(self, tick_ns: int) -> np.ndarray | None:
        """What was executed instead (A,), where that is known."""
        return None

    def reward_at(self, tick_ns: int) -> float | None:
        """What it earned, where that is known."""
        return None

    def intervened_at(self, tick_ns: int) -> bool | None:
        """Whether somebody had taken over from a policy, where that is known."""
        return None

    def truths_at(self, tick_ns: int) -> tuple[str, ...]:
        """What was true, in words, where that is known."""
        return ()


class _Track:
    """The messages of one action in order of their stamps, decoded when they are first asked for."""

    def __init__(self, action: Action, contract: RobotContract) -> None:
        self._action, self._step_ns, self._row_ns = action, contract.step_ns, contract.chunk_step_ns
        self._stamps: deque[int] = deque()
        self._messages: deque[bytes | np.ndarray] = deque()

    def add(self, message: Message) -> None:
        if not self._stamps or message.stamp_ns >= self._stamps[-1]:
            self._stamps.append(message.stamp_ns)
            self._messages.append(message.data)
        else:
            place = self._first(message.stamp_ns + 1)
            self._stamps.insert(place, message.stamp_ns)
            self._messages.insert(place, message.data)

    def forget_before(self, tick_ns: int) -> None:
        kept = 0 if self._action.publish == "step" else 1  # a chunk holds rows for later
        while len(self._stamps) > kept and self._stamps[kept] < tick_ns + kept:
            self._stamps.popleft()
            self._messages.popleft()

    def at(self, tick_ns: int) -> np.ndarray | None:
        """A step's message is the first one within the control period; of a chunk, the row for this instant.

        In the robot's own frame it is the whole chunk, the newest one of the control period that ends with the tick.
        """
        if self._action.publish == "chunk":
            place = self._first(tick_ns + 1) - 1
            if place < 0:
                return None
            if self._action.relative:
                return self._rows(place) if tick_ns - self._stamps[place] < self._step_ns else None
            rows = self._rows(place)
            row = (tick_ns - self._stamps[place]) // self._row_ns
            return rows[row] if row < len(rows) else None
        place = self._first(tick_ns)
        if place == len(self._stamps) or self._stamps[place] >= tick_ns + self._step_ns:
            return None
        return self._rows(place)[0]

    def _first(self, stamp_ns: int) -> int:
        """Place of the first message stamped at ``stamp_ns`` or later."""
        for place, found in enumerate(self._stamps):  # a handful: those before the current tick are forgotten
            if found >= stamp_ns:
                return place
        return len(self._stamps)

    def _rows(self, place: int) -> np.ndarray:
        found = self._messages[place]
        if not isinstance(found, np.ndarray):
            found = self._messages[place] = decode(self._action, found)
        return found


@dataclass(frozen=True, eq=False)
class Tick:
    """One control tick of a bag: what was seen, and the command (A,), or plan (H, A), float32 that answered it.

    ``episode`` counts the starts marked until then, so 0 is what was before the first. A tick that gives no row has no
    observation, or no command. ``executed`` (A,), ``reward``, ``intervened`` and ``truths`` are there where they were
    recorded and asked for.
    """

    stamp_ns: int
    episode: int
    observation: Observation | None
    action: np.ndarray | None
    executed: np.ndarray | None = None
    reward: float | None = None
    intervened: bool | None = None
    truths: tuple[str, ...] = ()


class EpisodeReader:
    """The ticks of one bag in the order of time; raises :class:`BagError` naming what is absent or bad.

    After all ticks have been read, ``infos`` has what the marks say of each episode and ``late`` and ``future`` the
    messages of each topic that came too late to be sorted, or are stamped in the future. ``refused`` says why the last
    tick without an observation has none.
    """

    def __init__(
        self, bag: OpenBag, contract: RobotContract, spec: ObservationSpec, commands: Commands | None = None
    ) -> None:
        """``commands`` may know more than the labels: :class:`vla_core.data.happened.CommandsAndMore`."""
        self.bag = bag
        self.builder = ObservationBuilder(contract, spec)
        needed = {stream.topic: stream.type for stream in self.builder.streams.values()}
        needed |= {action.topic: action.type for action in contract.actions.values()}
        bags.require_topics(bag.info, needed)
        self.commands = Commands((), contract) if commands is None else commands
        self.topics = {*needed, *self.commands.topics, EPISODE_TOPIC}
        self.buffer = self.builder.make_buffer()
        self.late: Counter[str] = Counter()
        self.future: Counter[str] = Counter()
        self.refused: list[str] = []
        self._marks: list[list[Any]] = [[]]

    def __iter__(self) -> Iterator[Tick]:
        with closing(self.bag.read(self.topics)) as messages:
            order = StampOrder(messages, self.builder.by_topic)
            self.late, self.future = order.late, order.future
            replay = Replay(iter(order), self.builder, self.buffer, self.commands)
            self._marks = replay.marks
            try:
                for tick_ns in replay:
                    action = self.commands.at(tick_ns)
                    try:
                        seen = self.builder.build(self.buffer, tick_ns)
                    except Unobserved as refusal:
                        seen, self.refused = None, refusal.reasons
                    row = None if action is None else action.astype(np.float32)
                    done = self.commands.executed_at(tick_ns)
                    yield Tick(tick_ns, replay.episode, seen, row, None if done is None else done.astype(np.float32),
                               self.commands.reward_at(tick_ns), self.commands.intervened_at(tick_ns),
                               self.commands.truths_at(tick_ns))  # fmt: skip
            except MessageError as error:
                raise BagError(f"{self.bag.path}: {error}") from None

    @property
    def infos(self) -> list[EpisodeInfo]:
        """What is marked of each episode, by its number; the first is what comes before the first start."""
        return [_episode_info([mark for _, mark in marks]) for marks in self._marks]

    def end_ns(self, episode: int) -> int:
        """When an episode was marked as over; far away while it was not."""
        states = ((stamp_ns, EPISODE_STATES.get(mark.state)) for stamp_ns, mark in self._marks[episode])
        return min((stamp_ns for stamp_ns, state in states if state != "started"), default=NO_LIMIT_NS)


def _episode_info(marks: list[Any]) -> EpisodeInfo:
    if not marks:  # a bag from elsewhere: its instruction stream still says what was done
        return EpisodeInfo(seed=-1, task="", instruction="", outcome="unknown")
    last = marks[-1]
    return EpisodeInfo(int(last.seed), str(last.task), str(last.instruction), EPISODE_STATES.get(last.state, "unknown"))
