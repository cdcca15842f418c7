"""Whole trajectories held to the contract's limits, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vla_core.commands import COORDINATES
from vla_core.contract import NANOSECONDS, RELATIVE_TYPES, Action, Axis
from vla_core.runtime.guard import Proposal, States, entries_of, values_of
from vla_core.runtime.motion import State

MAX_ROWS = 1000  # of a stop


class TrajectoryGuard:
    """Checks the rows of one action's trajectories, ``step_ns`` apart; each replaces the one before.

    Joint trajectories go on from where the last one is at the new one's stamp. Those in a vehicle's own frame
    (``RELATIVE``) have no number in common with the last one, as the frame has moved: each is checked by itself, and a
    stop keeps the frame, stamp and past of the last one.
    """

    RELATIVE = RELATIVE_TYPES

    def __init__(self, action: Action, step_ns: int, axes: Sequence[Axis] = ()) -> None:
        self.action = action
        self._relative = action.type in self.RELATIVE
        # Where the frame moves along, 0 is no place to go back to: the way stops where it is.
        self.entries = tuple(
            dataclasses.replace(entry, safe_zero=entry.safe_zero and not (self._relative and entry.name in COORDINATES))
            for entry in entries_of(action, step_ns / NANOSECONDS, {axis.action: axis for axis in axes})
        )
        self._step_ns = step_ns
        self._plan: tuple[int, list[States]] | None = None  # stamp, and the states at it, a step later, …
        self._stopping = False
        self.states: States | None = None  # where joints start
        if action.kind != "position":
            self.states = tuple(State() for _ in self.entries)

    def start(self, values: np.ndarray) -> None:
        """Be at rest at the positions ``values`` (A,)."""
        self.states = tuple(State(float(value)) for value in values)

    def propose(self, rows: np.ndarray, stamp_ns: int) -> Proposal:
        """What comes nearest to the candidate ``rows`` (H, A), whose message is stamped ``stamp_ns``."""
        if self._relative and "yaw" in self.action.names:
            rows = rows.copy()
            column = self.action.names.index("yaw")
            rows[:, column] = np.unwrap(rows[:, column])
        asked = self._start_of(rows, stamp_ns)
        states = asked
        out, plan = [], []
        altered = False
        causes: dict[str, str] = {}
        before = values_of(self.entries, states)
        for k, row in enumerate(rows):
            target = np.clip(row, self.action.low, self.action.high)
            if k or not self._relative:
                for entry, one, value in zip(self.entries, asked, row.tolist(), strict=True):
                    causes |= dict(entry.broken(one, entry.asked(one, value, 1), 1))
                asked = tuple(e.asked(s, v, 1) for e, s, v in zip(self.entries, asked, row.tolist(), strict=True))
                slopes = (target - before).tolist()
                ways = zip(self.entries, states, target.tolist(), slopes, strict=True)
                states = tuple(entry.reach(state, value, slope) for entry, state, value, slope in ways)
            values = values_of(self.entries, states)
            near = np.abs(values - row) <= 1e-9 * (1 + np.abs(row))
            altered |= not near.all()
            out.append(np.where(near, row, values))
            plan.append(states)
            before = target
        if altered and not causes:
            causes["bounds"] = f"{self.action.topic} cannot stop before a bound"
        return Proposal(np.stack(out), tuple(plan), altered, causes, causes, stamp_ns)

    def stop(self, at_ns: int) -> Proposal | None:
        """The way from where the last trajectory is at ``at_ns`` to the safe action; None before the first one."""
        if self._plan is None:
            return None
        stamp_ns, plan = self._plan
        passed = min(max(0, (at_ns - stamp_ns) // self._step_ns), len(plan) - 1)
        states = plan[: passed + 1]
        while len(states) < MAX_ROWS:
            states.append(tuple(entry.stop(s) for entry, s in zip(self.entries, states[-1], strict=True)))
            if all(entry.at_rest(s) for entry, s in zip(self.entries, states[-1], strict=True)):
                break
        if not self._relative:
            states, stamp_ns = states[passed + 1 :], at_ns
        rows = np.stack([values_of(self.entries, s) for s in states])
        return Proposal(rows, tuple(states), altered=True, stamp_ns=stamp_ns, stops=True)

    def commit(self, proposal: Proposal) -> None:
        """``proposal`` was sent."""
        first = [] if self._relative else [self._now(proposal.stamp_ns) or proposal.states[0]]
        self._plan = (proposal.stamp_ns, [*first, *proposal.states])
        self._stopping = proposal.stops

    @property
    def rests(self) -> bool:
        """Whether the last trajectory leads to the declared safe action, or none was sent."""
        return self._plan is None or self._stopping

    def _now(self, at_ns: int) -> States | None:
        if self._plan is None:
            return self.states
        stamp_ns, plan = self._plan
        return plan[min(max(0, (at_ns - stamp_ns) // self._step_ns), len(plan) - 1)]

    def _start_of(self, rows: np.ndarray, stamp_ns: int) -> States:
        """The states before the first row; of a relative trajectory, those of the row itself."""
        first = np.clip(rows[0], self.action.low, self.action.high).tolist()
        if not self._relative:
            return self._now(stamp_ns) or tuple(State(value) for value in first)
        speeds = (rows[1] - rows[0] if len(rows) > 1 else np.zeros(len(first))).tolist()
        return tuple(
            State(x, min(max(v, entry.bounds.v_low), entry.bounds.v_high))
            for entry, x, v in zip(self.entries, first, speeds, strict=True)
        )
