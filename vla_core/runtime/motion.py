"""The nearest motion within limits of velocity, acceleration and jerk that can still stop before a wall.

One number moves on a grid of control periods. In these units (one period = 1) velocity v is the difference of two
positions x, acceleration a of two velocities, jerk of two accelerations, and a command is a choice of the next a.

What is allowed next must leave a way out: the *rest* from here, which is the fastest stop that does not reverse, has
to keep every limit too. A step is taken only if the rest after it does, and the rest itself is always a next step,
so that limits that hold once hold for ever, whatever is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

ROUNDING = 1e-12  # relative to the numbers that are compared
HALVINGS = 32
INF = math.inf


class State(NamedTuple):
    """Position, velocity and acceleration in units of the control period."""

    x: float = 0.0
    v: float = 0.0
    a: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Walls of x, range of v, and largest size of acceleration and jerk, in units of the control period.

    With walls, the range of v has to hold 0: else there is no stop before them.
    """

    low: float = -INF
    high: float = INF
    v_low: float = -INF
    v_high: float = INF
    acceleration: float = INF
    jerk: float = INF


def move(bounds: Bounds, state: State, acceleration: float) -> State:
    """The state one period later that is nearest to what ``acceleration`` would give."""
    least, most = _range(bounds, state)
    return _stepped(state, _before_walls(bounds, state, min(max(acceleration, least), most)))


def reach(bounds: Bounds, state: State, target: float, slope: float) -> State:
    """The state one period later on the way to position ``target``, which moved by ``slope`` in this period.

    Who is on the target stays on it where the limits allow. Who is not comes as near as it can without shooting over
    it: the nearest command alone would pass it at full speed, and swing about it for ever.
    """
    want = target - state.x - state.v
    least, most = _range(bounds, state)
    a = min(max(want, least), most)
    near = ROUNDING * (1 + abs(target))
    slope = min(max(slope, bounds.v_low), bounds.v_high)
    relative = State(state.x - target + slope, state.v - slope, state.a)
    if abs(a - want) > near or abs(relative.x) > near:
        below = want > a or (want == a and relative.x < 0)

        def short_of_it(a: float) -> bool:
            highest, lowest = _overshoot(bounds, _stepped(relative, a))
            return highest <= near if below else lowest >= -near

        a = _towards(min(max(_brake(bounds, relative), least), most), a, short_of_it)
    return _stepped(state, _before_walls(bounds, state, a))


def reach_velocity(bounds: Bounds, state: State, target: float, slope: float) -> State:
    """As :func:`reach`, on the way to velocity ``target``, which changed by ``slope`` in this period."""
    want = target - state.v
    least, most = _range(bounds, state)
    a = min(max(want, least), most)
    near = ROUNDING * (1 + abs(target))
    slope = min(max(slope, -bounds.acceleration), bounds.acceleration)
    if abs(a - want) > near or abs(want - slope) > near:
        eased = slope + math.copysign(_largest(abs(want - slope), bounds.jerk), want - slope)
        a = max(min(a, eased), least) if want > slope else min(max(a, eased), most)
    return _stepped(state, _before_walls(bounds, state, a))


def rest(bounds: Bounds, state: State) -> State:
    """One period of the fastest stop that does not reverse."""
    return move(bounds, state, _brake(bounds, state))


def rest_periods(bounds: Bounds, state: State) -> float:
    """Bound on the periods until :func:`rest` has come to v = a = 0."""
    peak = abs(state.v) + _released(abs(state.a), bounds.jerk)
    return abs(state.a) / bounds.jerk + 2 * math.sqrt(peak / bounds.jerk) + peak / bounds.acceleration + 4


def _stepped(state: State, a: float) -> State:
    return State(state.x + state.v + a, state.v + a, a)


def _range(bounds: Bounds, state: State) -> tuple[float, float]:
    """Least and largest next acceleration: within its own limits, and released before v leaves its range."""
    least = max(state.a - bounds.jerk, -bounds.acceleration)
    most = min(state.a + bounds.jerk, bounds.acceleration)
    up, down = bounds.v_high - state.v, state.v - bounds.v_low
    top = _largest(up, bounds.jerk) if up >= 0 else up
    bottom = -_largest(down, bounds.jerk) if down >= 0 else -down
    return min(max(least, bottom), most), max(min(most, top), least)


def _largest(total: float, jerk: float) -> float:
    """The largest acceleration b whose release, b + (b - jerk) + (b - 2 jerk) + …, adds no more than ``total``."""
    if jerk == INF or total in (0.0, INF):
        return total
    n = math.floor((math.sqrt(1 + 8 * total / jerk) - 1) / 2)
    return (total + jerk * n * (n + 1) / 2) / (n + 1)


def _released(a: float, jerk: float) -> float:
    """What v still changes by while ``a`` is released: (a - jerk) + (a - 2 jerk) + …"""
    if jerk == INF or a == 0.0:
        return 0.0
    n = math.floor(a / jerk)
    return n * a - jerk * n * (n + 1) / 2


def _brake(bounds: Bounds, state: State) -> float:
    """Next acceleration of the rest: as hard as can be released again by the time that v is 0."""
    a = min(max(_release(state.v, bounds.jerk), state.a - bounds.jerk), state.a + bounds.jerk)
    return min(max(a, -bounds.acceleration), bounds.acceleration)


def _release(v: float, jerk: float) -> float:
    """The acceleration whose release takes exactly ``v`` away."""
    return -math.copysign(_largest(abs(v), jerk), v)


def _overshoot(bounds: Bounds, state: State) -> tuple[float, float]:
    """Highest and lowest x of the rest from ``state``, itself included."""
    x, v, a = state
    highest = lowest = x
    hard, jerk = bounds.acceleration, bounds.jerk
    release = hard + _released(hard, jerk) if hard != INF else INF
    while v or a:
        if abs(a) == hard and v * a < 0 and abs(v) >= release:
            n = math.floor((abs(v) - release) / hard) + 1  # periods of full braking, in one
            x += n * v + a * (n * (n + 1) / 2)
            v += n * a
        elif (brake := _brake(bounds, State(0.0, v, a))) == _release(v, jerk):
            x += math.copysign(_distance(abs(brake), jerk), v)  # from here on a only falls to 0, and v with it
            v = a = 0.0
        else:
            a = brake
            v += a
            x += v
        highest, lowest = max(highest, x), min(lowest, x)
    return highest, lowest


def _distance(a: float, jerk: float) -> float:
    """Way of a release from acceleration ``a`` to rest: 1 (a - jerk) + 2 (a - 2 jerk) + …"""
    if jerk == INF or a == 0.0:
        return 0.0
    n = math.floor(a / jerk)
    return n * (n + 1) / 2 * (a - jerk * (2 * n + 1) / 3)


def _before_walls(bounds: Bounds, state: State, a: float) -> float:
    """The acceleration nearest to ``a`` after which the rest keeps the walls, or gets no further past them.

    ``a`` must keep the other limits.
    """
    if bounds.low == -INF and bounds.high == INF:
        return a
    after = _stepped(state, a)
    # The usual case, far from the walls, costs no search: a bound on the rest's length is enough.
    length = (abs(after.v) + _released(abs(a), bounds.jerk)) * rest_periods(bounds, after)
    if after.x + length <= bounds.high and after.x - length >= bounds.low:
        return a
    least, most = _range(bounds, state)
    brake = min(max(_brake(bounds, state), least), most)
    highest, lowest = _overshoot(bounds, _stepped(state, brake))
    top, bottom = max(bounds.high, highest), min(bounds.low, lowest)

    def kept(a: float) -> bool:
        highest, lowest = _overshoot(bounds, _stepped(state, a))
        return highest <= top and lowest >= bottom

    return _towards(brake, a, kept)


def _towards(start: float, end: float, allowed: Callable[[float], bool]) -> float:
    """The last allowed number on the way from ``start``, which is allowed, to ``end``."""
    if allowed(end):
        return end
    for _ in range(HALVINGS):
        middle = (start + end) / 2
        if allowed(middle):
            start = middle
        else:
            end = middle
    return start
