"""Which messages of a stream stand for a tick: hold, nearest, interpolate and window.

A tick at ``at_ns`` sees messages up to ``until_ns``. For the newest tick both are the same: never the future. A past
tick of the history may look up to the newest one, since that is known by then, and an offline contract has no limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from vla_core.contract import NANOSECONDS, Stream
from vla_core.observation.memory_buffer import MemoryBuffer, Stamped


@dataclass(frozen=True)
class Picked:
    """Messages of a tick, oldest first: one, all of a window, or two with the ``weight`` of the second.

    ``stamp_ns`` is where the value stands in time: the tick between two messages, else the newest one's stamp.
    """

    messages: list[Stamped]
    stamp_ns: int
    weight: float = 0.0


def pick(buffer: MemoryBuffer, name: str, stream: Stream, at_ns: int, until_ns: int) -> Picked | str:
    """The messages that stand for the tick ``at_ns``, or why there are none."""
    if stream.sampling == "window":
        return _window(buffer, name, stream, at_ns)
    if stream.sampling == "nearest":
        return _nearest(buffer, name, stream, at_ns, until_ns)
    if stream.sampling == "interpolate":
        return bracket(buffer, name, stream, at_ns, until_ns)
    return newest(buffer, name, stream, at_ns)


def newest(buffer: MemoryBuffer, name: str, stream: Stream, at_ns: int) -> Picked | str:
    """The newest message not after ``at_ns``, or why there is none: nothing came, or it is older than ``max_age_s``."""
    return _held(buffer.sample(name, at_ns), at_ns, stream.max_age_ns, stream.max_age_s)


def reach_ns(stream: Stream) -> int:
    """How far from its tick a message may be, nanoseconds: the smaller of ``max_age_s`` and ``tolerance_s``."""
    bounds = [bound for bound in (stream.max_age_ns, _tolerance_ns(stream)) if bound is not None]
    return min(bounds) if bounds else 0


def behind_ns(stream: Stream) -> int:
    """How far behind a tick the messages reach that stand for it, nanoseconds."""
    return max(stream.max_age_ns or 0, round(NANOSECONDS * (stream.window_s or 0)))


def ahead_ns(stream: Stream) -> int:
    """How far ahead of a tick a message may be where the contract is offline, nanoseconds."""
    return reach_ns(stream) if stream.sampling in ("nearest", "interpolate") else 0


def _tolerance_ns(stream: Stream) -> int | None:
    return None if stream.tolerance_s is None else round(NANOSECONDS * stream.tolerance_s)


def _held(held: Stamped | None, at_ns: int, limit_ns: int | None, limit_s: float | None) -> Picked | str:
    if held is None:
        return "nothing received"
    age_ns = at_ns - held[0]
    if limit_ns is not None and age_ns > limit_ns:
        return f"{age_ns / NANOSECONDS:.3f} s old, limit {limit_s} s"
    return Picked([held], held[0])


def _window(buffer: MemoryBuffer, name: str, stream: Stream, at_ns: int) -> Picked | str:
    """The newest ``window_length`` messages in (tick - window, tick]; the newest of them must not be too old."""
    messages = buffer.window(name, at_ns - round(NANOSECONDS * (stream.window_s or 0)), at_ns)
    newest = messages[-1] if messages else buffer.sample(name, at_ns)
    held = _held(newest, at_ns, stream.max_age_ns, stream.max_age_s)
    if isinstance(held, str):
        return held
    if not messages:
        return f"nothing within the window of {stream.window_s} s"
    return Picked(messages[-stream.window_length :], held.stamp_ns)


def _nearest(buffer: MemoryBuffer, name: str, stream: Stream, at_ns: int, until_ns: int) -> Picked | str:
    """The closest message; of two at the same distance the earlier."""
    before, after = buffer.around(name, at_ns, until_ns)
    if after is not None and (before is None or after[0] - at_ns < at_ns - before[0]):
        if after[0] - at_ns <= reach_ns(stream):
            return Picked([after], after[0])
        return f"{(after[0] - at_ns) / NANOSECONDS:.3f} s ahead, limit {reach_ns(stream) / NANOSECONDS} s"
    return _held(before, at_ns, reach_ns(stream), reach_ns(stream) / NANOSECONDS)


def bracket(buffer: MemoryBuffer, name: str, stream: Stream, at_ns: int, until_ns: int) -> Picked | str:
    """Between the messages around the tick; without a second one in reach, the first one holds."""
    before, after = buffer.around(name, at_ns, until_ns)
    held = _held(before, at_ns, reach_ns(stream), reach_ns(stream) / NANOSECONDS)
    if isinstance(held, str) or before is None or before[0] == at_ns:
        return held
    if after is None or after[0] - at_ns > reach_ns(stream):
        return held
    return Picked([before, after], at_ns, (at_ns - before[0]) / (after[0] - before[0]))
