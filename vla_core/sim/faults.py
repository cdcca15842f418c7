"""Sensors that fail: messages that are dropped, come late, or tell old news. For any world, and any contract.

A fault is written ``STREAM=KIND``, with the span in which the sensor has it, in s of the episode, behind an ``@``:

- ``lidar=dropped``            nothing comes
- ``imu=delayed:0.2``          what was measured comes 0.2 s later, with the stamp of its measurement, in order
- ``front=frozen``             the driver repeats its last data under new stamps
- ``front=stuck@5``            from 5 s on, the driver repeats its last message, stamp and all
- ``radar_*=dropped@3-6``      from 3 s until before 6 s, of every stream that the pattern fits

``STREAM`` is an observation of the contract, a topic, or a pattern of either (``*``, ``?``). A fault is the message's:
streams that share a topic share it. Whether a message lies in the span says its stamp. Nothing here is random: the
same messages give the same messages.
"""

from __future__ import annotations

import fnmatch
import re
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from vla_core.config import ConfigError
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.errors import choices
from vla_core.observation.messages import Message, has_header

Kind = Literal["dropped", "delayed", "frozen", "stuck"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FORMAT = re.compile(r"(?P<stream>[^=]+)=(?P<kind>[a-z]+)(:(?P<delay>[^@]*))?(@(?P<start>[^-]*)(-(?P<end>.*))?)?")
EXAMPLE = "lidar=dropped, imu=delayed:0.2, front=frozen@5 or radar_*=dropped@3-6"
_STAMP_AT = 4  # behind the 4 bytes of the encapsulation
_LITTLE, _BIG = struct.Struct("<iI"), struct.Struct(">iI")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What the messages of one topic suffer from ``start_s`` until before ``end_s`` of the episode (None: its end)."""

    topic: str
    kind: Kind
    delay_s: float = 0.0
    start_s: float = 0.0
    end_s: float | None = None

    def covers(self, since_start_ns: int) -> bool:
        """Whether a message that was stamped so long after the episode's start has the fault."""
        begun = since_start_ns >= round(self.start_s * NANOSECONDS)
        return begun and (self.end_s is None or since_start_ns < round(self.end_s * NANOSECONDS))


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What is wrong with a robot's sensors; :meth:`begin` makes an episode of it."""

    faults: tuple[Fault, ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str], contract: RobotContract) -> Faults:
        """Faults as the module's docstring writes them; empty texts say nothing.

        Raises:
            ConfigError: one cannot be read, or no sensor of the contract has the name; the choices are listed.
        """
        return cls(faults=tuple(fault for text in texts if text for fault in _parse(text, contract)))

    def begin(self, start_ns: int) -> FaultySensors:
        """The sensors of an episode that starts at ``start_ns``."""
        return FaultySensors(self, start_ns)


class FaultySensors:
    """The sensors of one episode, between the world and whoever listens. What is late at its end never comes."""

    def __init__(self, faults: Faults, start_ns: int) -> None:
        self._lines = [_Line(fault, start_ns) for fault in faults.faults]

    def apply(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        """What arrives by ``now_ns``: of ``messages``, sent since the last call, and of those that were held back."""
        arriving = list(messages)
        for line in self._lines:
            arriving = line.apply(arriving, now_ns)
        return arriving


class _Line:
    """One fault on the way of its topic's messages."""

    def __init__(self, fault: Fault, start_ns: int) -> None:
        self._fault, self._start_ns = fault, start_ns
        self._last: Message | None = None  # the newest one before the driver froze
        self._waiting: deque[tuple[int, Message]] = deque()  # when it is due, ns; a topic's messages keep their order

    def apply(self, messages: list[Message], now_ns: int) -> list[Message]:
        out: list[Message] = []
        self._release(out, now_ns)
        for message in messages:
            if message.topic != self._fault.topic:
                out.append(message)
            else:
                self._pass(message, out, now_ns)
                self._release(out, now_ns)
        return out

    def _pass(self, message: Message, out: list[Message], now_ns: int) -> None:
        """Hand ``message`` on to ``out``, or what comes in its place, or keep it."""
        fault = self._fault
        covered = fault.covers(message.stamp_ns - self._start_ns)
        if fault.kind == "delayed":
            due_ns = message.stamp_ns + round(fault.delay_s * NANOSECONDS) if covered else now_ns
            self._waiting.append((max(due_ns, self._waiting[-1][0]) if self._waiting else due_ns, message))
        elif not covered:
            self._last = message
            out.append(message)
        elif fault.kind != "dropped":
            self._last = self._last or message  # nothing came before: it freezes at its first one
            out.append(self._last if fault.kind == "stuck" else _restamped(self._last, message.stamp_ns))

    def _release(self, out: list[Message], now_ns: int) -> None:
        while self._waiting and self._waiting[0][0] <= now_ns:
            out.append(self._waiting.popleft()[1])


def _restamped(message: Message, stamp_ns: int) -> Message:
    """The message with another stamp, in its header too where it has one."""
    data = message.data
    if has_header(message.type):
        stamp = (_LITTLE if data[1] & 1 else _BIG).pack(*divmod(stamp_ns, NANOSECONDS))
        data = data[:_STAMP_AT] + stamp + data[_STAMP_AT + len(stamp) :]
    return Message(message.topic, message.type, stamp_ns, data)


def _parse(text: str, contract: RobotContract) -> list[Fault]:
    """The faults of one text: one for every topic that it means."""
    found = FORMAT.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"fault {text!r}: expected STREAM=KIND, such as {EXAMPLE}")
    kind = next((known for known in KINDS if known == found["kind"]), None)
    if kind is None:
        raise ConfigError(f"fault {text!r}: unknown kind {found['kind']!r}; choices: {choices(KINDS)}")
    if (kind == "delayed") != (found["delay"] is not None):
        raise ConfigError(f"fault {text!r}: delayed needs its seconds, as in imu=delayed:0.2, and no other kind does")
    delay_s = 0.0 if found["delay"] is None else _seconds(found["delay"], text)
    start_s = 0.0 if found["start"] is None else _seconds(found["start"], text)
    end_s = None if found["end"] is None else _seconds(found["end"], text)
    if end_s is not None and not start_s < end_s:
        raise ConfigError(f"fault {text!r}: the span ends at {end_s:g} s, which is not after its start, {start_s:g} s")
    return [
        Fault(topic=topic, kind=kind, delay_s=delay_s, start_s=start_s, end_s=end_s)
        for topic in _topics(found["stream"], text, contract)
    ]


def _topics(pattern: str, text: str, contract: RobotContract) -> list[str]:
    sensors = {name: stream.topic for name, stream in contract.observations.items() if not stream.latched}
    found = [topic for name, topic in sensors.items()
             if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(topic, pattern)]  # fmt: skip
    if not found:
        raise ConfigError(f"fault {text!r}: {contract.name!r} has no sensor {pattern!r}; choices: {choices(sensors)}, "
                          "or their topics")  # fmt: skip
    return list(dict.fromkeys(found))


def _seconds(number: str, text: str) -> float:
    try:
        seconds = float(number)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"fault {text!r}: expected seconds from 0 on, found {number!r}")
    return seconds
