"""One action's commands held to the contract's limits: what was sent last, and what may be sent next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vla_core.contract import Action, Axis
from vla_core.runtime.motion import INF, ROUNDING, Bounds, State, reach, reach_velocity, rest, rest_periods

States = tuple[State, ...]  # one per entry of an action


@dataclass(frozen=True)
class Limit:
    """A bound on the size of a chain's ``order``-th derivative (1: velocity), in units of the period."""

    name: str
    order: int
    size: float
    contract_size: float


@dataclass(frozen=True)
class Entry:
    """One number of an action as a chain of position, velocity and acceleration in units of the period.

    A position command is the chain's x. A velocity command is its v times the period, and x where the robot was
    measured. Of an effort only the change is limited: it is taken for v.
    """

    name: str
    unit: str
    is_position: bool
    scale: float  # chain's number per contract's number
    low: float
    high: float
    safe_zero: bool
    axis: Axis | None
    bounds: Bounds
    limits: tuple[Limit, ...]

    def value(self, state: State) -> float:
        """The command that a state stands for, in the contract's unit."""
        return state.x if self.is_position else state.v / self.scale

    def reach(self, state: State, value: float, slope: float) -> State:
        """One period on the way to command ``value``, which changes by ``slope`` per period."""
        if self.is_position:
            return reach(self.bounds, state, value, slope)
        return reach_velocity(self.bounds, state, value * self.scale, slope * self.scale)

    def within(self, state: State, before: State) -> float:
        """The command of ``state`` without what rounding adds beyond the bounds, if it was within them ``before``."""
        slack = ROUNDING * (1 + abs(before.x))
        value = self.value(state)
        if self.low - slack <= self.value(before) <= self.high + slack:
            return min(max(value, self.low), self.high)
        return value

    def leaves_workspace(self, state: State, value: float) -> bool:
        """Whether command ``value`` would lead out of the workspace, whatever the other limits make of it."""
        if self.axis is None:
            return False
        if self.is_position:
            return not self.axis.low <= value <= self.axis.high
        free = dataclasses.replace(self.bounds, low=-INF, high=INF)
        return reach_velocity(free, state, value * self.scale, 0.0) != self.reach(state, value, 0.0)

    def stop(self, state: State) -> State:
        """One period on the way to the declared safe action."""
        if self.safe_zero:
            return self.reach(state, 0.0, 0.0)
        return rest(self.bounds, state) if self.is_position else self.reach(state, self.value(state), 0.0)

    def at_rest(self, state: State) -> bool:
        """Whether :meth:`stop` has come to its end."""
        goal = 0.0 if self.safe_zero else self.value(state)
        return abs(state.a) <= ROUNDING and abs(self.value(state) - goal) <= ROUNDING and (
            not self.is_position or abs(state.v) <= ROUNDING
        )  # fmt: skip

    def asked(self, before: State, value: float, periods: int) -> State:
        """The chain if ``value`` came ``periods`` after ``before``."""
        v = (value - before.x) / periods if self.is_position else value * self.scale
        return State(value if self.is_position else before.x, v, (v - before.v) / periods)

    def broken(self, before: State, after: State, periods: int) -> list[tuple[str, str]]:
        """Name and description of every limit that a step from ``before`` to ``after`` breaks."""
        found = []
        value = self.value(after)
        slack = ROUNDING * (1 + abs(after.x))
        if not self.low - slack <= value <= self.high + slack:
            found.append(("bounds", f"{self.name} {value:.4g} {self.unit}, bounds {self.low:.4g} to {self.high:.4g}"))
        sizes = (0.0, abs(after.v), abs(after.a), abs(after.a - before.a) / periods)
        for limit in self.limits:
            size = sizes[limit.order]
            if size > limit.size + slack:
                found.append((limit.name, f"{self.name} {size / limit.size * limit.contract_size:.4g}, "
                                          f"limit {limit.contract_size:.4g}"))  # fmt: skip
        return found


@dataclass(frozen=True)
class Proposal:
    """Commands (H, A) that keep the limits, the states behind the last one, and what had to be changed and why.

    ``causes`` maps the names of broken limits to a description; ``own`` holds those that the candidates break among
    themselves, wherever the output is.
    """

    rows: np.ndarray
    states: tuple[States, ...]  # per row
    altered: bool = False
    causes: dict[str, str] = dataclasses.field(default_factory=dict)
    own: dict[str, str] = dataclasses.field(default_factory=dict)
    stamp_ns: int = 0  # of a trajectory's message
    stops: bool = False  # the rows lead to the declared safe action


class Guard:
    """The chains of one action: ``propose``, ``hold`` and ``stop`` are what may be sent, ``commit`` what was.

    Position commands start at rest: where the robot was measured, else at the first candidate.
    """

    def __init__(self, action: Action, period_s: float, axes: Sequence[Axis] = ()) -> None:
        self.action = action
        self.entries = entries_of(action, period_s, {axis.action: axis for axis in axes})
        self.states: States | None = None
        self._asked: States | None = None  # the last candidate
        if action.kind != "position":
            self.states = self._asked = tuple(State() for _ in self.entries)

    def start(self, values: np.ndarray) -> None:
        """Be at rest at the positions ``values`` (A,)."""
        self.states = self._asked = tuple(State(float(value)) for value in values)

    def place(self, position: dict[str, float], periods: float) -> None:
        """Correct the chains of velocity commands by what was measured ``periods`` ago."""
        assert self.states is not None, "only velocities are placed, and they start at 0"
        self.states = tuple(
            state._replace(x=position[entry.axis.position] + periods * state.v)
            if entry.axis is not None and not entry.is_position else state
            for entry, state in zip(self.entries, self.states, strict=True)
        )  # fmt: skip

    def propose(self, values: np.ndarray, periods: int) -> Proposal:
        """What comes nearest to the candidate ``values`` (A,), ``periods`` after the last commit; remembers it."""
        if self.states is None or self._asked is None:
            self.start(np.clip(values, self.action.low, self.action.high))
        assert self.states is not None and self._asked is not None
        asked, states, out = [], [], []
        causes: dict[str, str] = {}
        own: dict[str, str] = {}
        altered = False
        for entry, state, before, value in zip(self.entries, self.states, self._asked, values.tolist(), strict=True):
            after = entry.asked(before, value, periods)
            own |= dict(entry.broken(before, after, periods))
            asked.append(after)
            first, last = (min(max(v, entry.low), entry.high) for v in (entry.value(before), value))
            moved = state
            for k in range(1, periods + 1):
                moved = entry.reach(moved, first + (last - first) * k / periods, (last - first) / periods)
            if abs(entry.value(moved) - value) <= ROUNDING * (1 + abs(value)):
                out.append(value)
            else:
                altered = True
                out.append(entry.within(moved, state))
                needed = entry.asked(state, value, periods)
                found = dict(entry.broken(state, needed, periods))
                if entry.leaves_workspace(state, value):
                    found["workspace"] = f"{entry.name} {value:.4g} {entry.unit} leads out of the workspace"
                causes |= found or {"bounds": f"{entry.name} could not stop before its bound"}
            states.append(moved)
        self._asked = tuple(asked)
        return Proposal(np.array([out]), (tuple(states),), altered, causes, own)

    def ask(self, values: np.ndarray, periods: int) -> None:
        """Remember the candidate ``values`` (A,), which is not followed."""
        if self._asked is not None:
            chains = zip(self.entries, self._asked, values.tolist(), strict=True)
            self._asked = tuple(entry.asked(before, value, periods) for entry, before, value in chains)

    def hold(self, periods: int) -> Proposal | None:
        """On the way to repeating the last command for ever."""
        return self._repeat(lambda entry, state: entry.reach(state, entry.value(state), 0.0), periods)

    def stop(self, periods: int) -> Proposal | None:
        """On the way to the declared safe action; None when something must be held and nothing was commanded yet."""
        return self._repeat(lambda entry, state: entry.stop(state), periods)

    def commit(self, proposal: Proposal) -> None:
        """``proposal`` was sent."""
        self.states = proposal.states[-1]

    @property
    def rests(self) -> bool:
        """Whether the last command was the declared safe action, or none was sent."""
        return self.states is None or self._rests(self.states)

    def stop_periods(self) -> int:
        """Bound on the periods that a stop from here takes, where positions are held and not sent to zero."""
        if self.states is None:
            return 0
        chains = zip(self.entries, self.states, strict=True)
        return math.ceil(max(rest_periods(entry.bounds, state) for entry, state in chains))

    def _repeat(self, step: Callable[[Entry, State], State], periods: int) -> Proposal | None:
        if self.states is None:
            return None
        states = self.states
        for _ in range(periods):
            states = tuple(step(entry, state) for entry, state in zip(self.entries, states, strict=True))
        return Proposal(values_of(self.entries, states)[None, :], (states,), altered=True)

    def _rests(self, states: States) -> bool:
        return all(entry.at_rest(state) for entry, state in zip(self.entries, states, strict=True))


def values_of(entries: Sequence[Entry], states: States) -> np.ndarray:
    """Commands (A,) that ``states`` stand for."""
    return np.array([entry.value(state) for entry, state in zip(entries, states, strict=True)])


def entries_of(action: Action, period_s: float, axes: dict[str, Axis]) -> tuple[Entry, ...]:
    """The chains of an action; ``axes`` by the entry's name."""
    out = []
    limits = action.limits
    for i, name in enumerate(action.names):
        low, high = action.low[i], action.high[i]
        axis = axes.get(name)
        is_position = action.kind == "position"
        scale = period_s if action.kind == "velocity" else 1.0
        # A rate is the change of the values themselves, whatever derivative they are.
        orders = {"velocity": 1, "acceleration": 2, "jerk": 3, "rate": 1 if is_position else 2}
        found = [
            Limit(key, order, getattr(limits, key)[i] * period_s ** (order if key != "rate" else 1)
                  * (scale if key == "rate" else 1.0), getattr(limits, key)[i])
            for key, order in orders.items() if getattr(limits, key)
        ]  # fmt: skip
        sizes = {
            order: min([limit.size for limit in found if limit.order == order], default=INF) for order in (1, 2, 3)
        }
        if is_position:
            if axis is not None:
                low, high = max(low, axis.low), min(high, axis.high)
            bounds = Bounds(low=low, high=high, v_low=-sizes[1], v_high=sizes[1], acceleration=sizes[2], jerk=sizes[3])
        else:
            walls = {} if axis is None else {"low": axis.low, "high": axis.high}
            bounds = Bounds(**walls, v_low=max(low * scale, -sizes[1]), v_high=min(high * scale, sizes[1]),
                            acceleration=sizes[2], jerk=sizes[3])  # fmt: skip
        out.append(Entry(name, action.units[i], is_position, scale, low, high, action.safe[i] == "zero", axis, bounds,
                         tuple(found)))  # fmt: skip
    return tuple(out)
