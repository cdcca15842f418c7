"""Limits that hold whatever is asked for, compared with plain simulation and exhaustive search."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.runtime import motion
from vla_core.runtime.motion import INF, Bounds, State, reach, reach_velocity, rest, rest_periods


def sizes(low: float, high: float) -> st.SearchStrategy[float]:
    """Powers of ten, since limits differ by orders of magnitude; or no limit."""
    return st.floats(low, high).map(lambda power: 10.0**power) | st.just(INF)


bounds = st.builds(
    lambda v, a, j: Bounds(low=-1.0, high=1.0, v_low=-v, v_high=v, acceleration=a, jerk=j),
    sizes(-3, 0), sizes(-4, 0), sizes(-5, 0),
)  # fmt: skip
targets = st.lists(st.sampled_from([-9.0, -1.0, -0.3, 0.0, 0.3, 1.0, 9.0]) | st.floats(-2, 2), min_size=1, max_size=60)
ways = st.sampled_from([reach, reach_velocity])


def follow(limits: Bounds, asked: list[float], way: object, state: State = State()) -> list[State]:  # noqa: B008
    out = [state]
    for k, target in enumerate(asked):
        slope = target - asked[k - 1] if k else 0.0
        out.append(way(limits, out[-1], target, slope))  # type: ignore[operator]
    return out


def rest_of(limits: Bounds, state: State) -> list[State]:
    """The rest, a period at a time."""
    out = [state]
    while abs(out[-1].v) > 1e-13 or abs(out[-1].a) > 1e-13:
        out.append(rest(limits, out[-1]))
    return out


def assert_kept(limits: Bounds, states: list[State], slack: float = 1e-9) -> None:
    for before, after in itertools.pairwise(states):
        assert limits.low - slack <= after.x <= limits.high + slack
        assert limits.v_low * (1 + slack) <= after.x - before.x <= limits.v_high * (1 + slack) + slack * 1e-3
        assert abs(after.v - before.v) <= limits.acceleration * (1 + slack) + slack * 1e-3
        assert abs(after.a - before.a) <= limits.jerk * (1 + slack) + slack * 1e-3


@settings(max_examples=150, deadline=None)
@given(bounds, targets, ways, st.integers(1, 12))
def test_no_limit_is_ever_broken(limits: Bounds, asked: list[float], way: object, repeat: int) -> None:
    assert_kept(limits, follow(limits, [target for target in asked for _ in range(repeat)], way))


@settings(max_examples=60, deadline=None)
@given(bounds, targets, ways, st.integers(1, 12))
def test_from_everywhere_there_is_a_stop(limits: Bounds, asked: list[float], way: object, repeat: int) -> None:
    reached = follow(limits, [target for target in asked for _ in range(repeat)], way)[-1]
    if rest_periods(limits, reached) < 2000:
        way_out = rest_of(limits, reached)
        assert len(way_out) - 1 <= rest_periods(limits, reached)
        assert_kept(limits, way_out)


@settings(max_examples=150, deadline=None)
@given(st.floats(-1, 1), st.floats(-1, 1), sizes(-2, 0), sizes(-3, 0))
def test_the_way_of_a_rest_is_that_of_its_simulation(v: float, a: float, hard: float, jerk: float) -> None:
    limits = Bounds(acceleration=hard, jerk=jerk)
    state = State(0.3, v, a * min(hard, 1.0))
    simulated = [s.x for s in rest_of(limits, state)]
    assert motion._overshoot(limits, state) == pytest.approx((max(simulated), min(simulated)), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(("v", "a"), [(6, 0), (5, 2), (9, -1), (4, -2), (3, 1), (10, -3), (1, 0), (2, 2)])
def test_no_stop_is_shorter_that_does_not_reverse(v: int, a: int) -> None:
    """Against every sequence of jerks -1, 0, 1, with |a| at most 3 and v at most 12, all in whole numbers."""

    def shortest(v: int, a: int, depth: int) -> float:
        if v == 0 and a == 0:
            return 0.0
        if depth == 0 or not 0 <= v <= 12:
            return math.inf
        nexts = (max(-3, min(3, a + jerk)) for jerk in (-1, 0, 1))
        return min((v + b + shortest(v + b, b, depth - 1) for b in nexts if v + b >= 0), default=math.inf)

    limits = Bounds(v_low=-12, v_high=12, acceleration=3, jerk=1)
    stopped = rest_of(limits, State(0.0, v, a))
    assert min(after.v for after in stopped) >= -1e-12
    assert stopped[-1].x <= shortest(v, a, 10) + 1e-9


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 0.99), st.floats(0, 0.2), st.floats(0.001, 0.1), st.floats(0, 2))
def test_without_jerk_it_is_the_nearest_that_can_still_stop(x: float, v: float, hard: float, target: float) -> None:
    def furthest(v: float) -> float:
        """Way of braking at the limit from v."""
        return sum(max(v - k * hard, 0.0) for k in range(math.ceil(v / hard) + 1 if v > 0 else 0))

    limits = Bounds(low=-9.0, high=1.0, acceleration=hard)
    if x + furthest(v - hard) > 1.0:
        return  # nothing could have brought it here
    target = max(target, x + v)  # ahead, standing still, and not to be shot over
    steps = [v + hard * (k / 500 - 1) for k in range(1001)]
    able = [s for s in steps if x + s + furthest(s - hard) <= min(target, 1.0)]
    expected = max(able, default=v - hard)
    assert reach(limits, State(x, v, 0.0), target, 0.0).v == pytest.approx(expected, abs=hard / 400)


@settings(max_examples=100, deadline=None)
@given(bounds, targets, st.integers(1, 6), st.floats(-2, 2))
def test_nothing_nearer_would_keep_the_walls(limits: Bounds, asked: list[float], repeat: int, want: float) -> None:
    state = follow(limits, [target for target in asked for _ in range(repeat)], reach)[-1]
    taken = motion.move(limits, state, want).a
    least, most = motion._range(limits, state)
    best = min(max(want, least), most)
    if abs(taken - best) <= 1e-9 or rest_periods(limits, state) > 500:
        return
    for share in (0.001, 0.1, 0.5, 1.0):
        nearer = taken + share * (best - taken)
        beyond = [s.x for s in rest_of(Bounds(acceleration=limits.acceleration, jerk=limits.jerk),
                                       State(state.x + state.v + nearer, state.v + nearer, nearer))]  # fmt: skip
        assert max(beyond) > 1.0 or min(beyond) < -1.0


@pytest.mark.parametrize("jerk", [1e-4, 1e-3, INF])
@pytest.mark.parametrize("acceleration", [1e-3, 5e-3, INF])
def test_a_target_that_jumped_is_met_without_overshoot(acceleration: float, jerk: float) -> None:
    limits = Bounds(v_low=-0.02, v_high=0.02, acceleration=acceleration, jerk=jerk)
    states = follow(limits, [0.5] * 150, reach)
    assert max(state.x for state in states) <= 0.5 + 1e-9
    assert states[-1].x == pytest.approx(0.5, abs=1e-9) and states[-1].v == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("jerk", [1e-4, INF])
def test_a_moving_target_is_caught_up_with_and_then_followed_exactly(jerk: float) -> None:
    limits = Bounds(v_low=-0.02, v_high=0.02, acceleration=1e-3, jerk=jerk)
    asked = [0.3 + 0.01 * k for k in range(200)]
    assert follow(limits, asked, reach)[-1].x == pytest.approx(asked[-1], abs=1e-12)


def test_what_is_within_the_limits_is_not_touched() -> None:
    limits = Bounds(low=-1, high=1, v_low=-0.02, v_high=0.02, acceleration=1e-3, jerk=1e-4)
    asked = [0.4 * (1 - math.cos(0.02 * k)) / 2 for k in range(300)]
    smooth = follow(limits, asked, reach)[1:]
    assert [state.x for state in smooth] == pytest.approx(asked, abs=1e-13)


@settings(max_examples=25, deadline=None)
@given(st.floats(1.001, 3), st.floats(-1, 1))
def test_from_outside_the_walls_it_only_comes_back(x: float, target: float) -> None:
    limits = Bounds(low=-1.0, high=1.0, v_low=-0.02, v_high=0.02, acceleration=1e-3, jerk=1e-4)
    states = follow(limits, [target] * 500, reach, State(x))
    assert all(after.x <= before.x for before, after in itertools.pairwise(states) if before.x > 1.0)
    assert states[-1].x == pytest.approx(target, abs=1e-9)
