"""Sampling at a tick, against a search through a plain list of everything that came in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.config import ConfigError
from vla_core.contract import Stream
from vla_core.observation.memory_buffer import SET_BACK_NS, MemoryBuffer
from vla_core.observation.sampling import Picked, pick

from .helpers import MS

TYPE = "sensor_msgs/msg/Imu"
NAMES = {"names": ("angular_velocity.x",), "units": ("rad/s",)}
SPAN = 10_000 * MS


@dataclass
class Reference:
    """The rules of the memory in their simplest form: keep all, first of a stamp wins, a jump back starts anew."""

    messages: dict[int, bytes] = field(default_factory=dict)

    def add(self, stamp_ns: int, data: bytes) -> None:
        if self.messages and stamp_ns < max(self.messages) - SET_BACK_NS:
            self.messages.clear()
        self.messages.setdefault(stamp_ns, data)


def fill(stamps: list[int]) -> tuple[MemoryBuffer, dict[int, bytes]]:
    buffer, reference = MemoryBuffer(["s"], span_ns=SPAN), Reference()
    for k, stamp in enumerate(stamps):
        data = b"%d" % k
        buffer.add("s", stamp * MS, data)
        reference.add(stamp * MS, data)
    return buffer, reference.messages


def stream(**changes: Any) -> Stream:
    options = {"topic": "s", "type": TYPE, "rate_hz": 100.0, "max_age_s": 0.03, **NAMES, **changes}
    return Stream(**options)


# Milliseconds: mostly near one another, some far enough to be another clock.
arrivals = st.lists(st.one_of(st.integers(0, 120), st.integers(300, 700)), max_size=40)
instants = st.integers(-10, 800)


@settings(max_examples=300)
@given(arrivals, instants, st.integers(1, 60))
def test_hold(stamps: list[int], at: int, age: int) -> None:
    buffer, messages = fill(stamps)
    found = pick(buffer, "s", stream(max_age_s=age / 1000), at * MS, at * MS)
    past = [t for t in messages if t <= at * MS]
    if past and at * MS - max(past) <= age * MS:
        assert found == Picked([(max(past), messages[max(past)])], max(past))
    else:
        assert isinstance(found, str) and ("limit" in found) == bool(past)


@settings(max_examples=300)
@given(arrivals, instants, st.integers(1, 60), st.integers(1, 60), st.integers(0, 60))
def test_nearest(stamps: list[int], at: int, age: int, tolerance: int, ahead: int) -> None:
    buffer, messages = fill(stamps)
    how = stream(sampling="nearest", max_age_s=age / 1000, tolerance_s=tolerance / 1000)
    found = pick(buffer, "s", how, at * MS, (at + ahead) * MS)
    visible = [t for t in messages if t <= (at + ahead) * MS]
    best = min(visible, key=lambda t: (abs(t - at * MS), t), default=None)  # of two equally close the earlier
    if best is not None and abs(best - at * MS) <= min(age, tolerance) * MS:
        assert found == Picked([(best, messages[best])], best)
    else:
        assert isinstance(found, str) and ("limit" in found) == bool(visible)


@settings(max_examples=300)
@given(arrivals, instants, st.integers(1, 60), st.one_of(st.none(), st.integers(1, 60)), st.integers(0, 60))
def test_interpolate(stamps: list[int], at: int, age: int, tolerance: int | None, ahead: int) -> None:
    buffer, messages = fill(stamps)
    how = stream(
        sampling="interpolate", max_age_s=age / 1000, tolerance_s=None if tolerance is None else tolerance / 1000
    )
    found = pick(buffer, "s", how, at * MS, (at + ahead) * MS)
    reach = min(age, age if tolerance is None else tolerance) * MS
    before = [t for t in messages if at * MS - reach <= t <= at * MS]
    after = [t for t in messages if at * MS < t <= min(at * MS + reach, (at + ahead) * MS)]
    if not before:
        assert isinstance(found, str)
    elif max(before) == at * MS or not after:
        assert found == Picked([(max(before), messages[max(before)])], max(before))
    else:
        a, b = max(before), min(after)
        assert isinstance(found, Picked) and found.messages == [(a, messages[a]), (b, messages[b])]
        assert found.stamp_ns == at * MS
        assert abs((1 - found.weight) * a + found.weight * b - at * MS) < 1, "the weight is where the tick lies"


@settings(max_examples=300)
@given(arrivals, instants, st.integers(1, 40), st.integers(1, 60), st.sampled_from([20.0, 50.0, 100.0]))
def test_window(stamps: list[int], at: int, age: int, length: int, rate: float) -> None:
    buffer, messages = fill(stamps)
    how = stream(sampling="window", rate_hz=rate, max_age_s=age / 1000, window_s=length / 1000)
    found = pick(buffer, "s", how, at * MS, (at + 100) * MS)  # what is visible beyond the tick is not in its window
    past = [t for t in messages if t <= at * MS]
    inside = sorted(t for t in past if t > (at - length) * MS)
    if inside and at * MS - max(inside) <= age * MS:
        newest = inside[-how.window_length :]
        assert found == Picked([(t, messages[t]) for t in newest], newest[-1])
    else:
        assert isinstance(found, str) and ("nothing received" in found) == (not past)


@pytest.mark.parametrize("sampling", ["hold", "window"])
def test_a_tolerance_that_nothing_would_use_is_refused(sampling: str) -> None:
    with pytest.raises(ConfigError, match=f"tolerance_s: belongs to nearest and interpolate, found it with {sampling}"):
        stream(sampling=sampling, tolerance_s=0.1, window_s=0.1 if sampling == "window" else None)
