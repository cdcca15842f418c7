"""Which instant the policy acts on, and whether its clock may be trusted."""

from __future__ import annotations

from collections.abc import Mapping

from vla_core.contract import NANOSECONDS
from vla_core.errors import VlaError
from vla_core.runtime.core import PolicyCore
from vla_ros.lockstep import Ticks
from vla_ros.policy_report import Counts

JUMP_NS = NANOSECONDS // 2  # a clock that differs by more from the steady one, between two ticks, has jumped


class Pace:
    """Ticks follow the fastest stream; one that may be masked and has fallen silent leaves them to the next.

    ``streams`` are those whose stamps may be ticks.
    """

    def __init__(self, core: PolicyCore, place: str) -> None:
        rates = {name: s.rate_hz for name, s in core.builder.streams.items() if s.rate_hz}
        if not rates:
            raise VlaError(f"checkpoint {place}: it sees no stream with a rate, so nothing sets its pace")
        fastest = sorted(rates, key=lambda name: -rates[name])
        certain = [k for k, name in enumerate(fastest) if core.builder.streams[name].missing == "refuse"]
        self.streams = fastest[: certain[0] + 1] if certain else fastest

    def newest_ns(self, core: PolicyCore) -> int | None:
        """The newest tick; None before the first."""
        newest = {name: core.buffer.newest_ns(name) for name in self.streams}
        latest_ns = max((stamp for stamp in newest.values() if stamp is not None), default=0)
        for name in self.streams:
            stream, stamp_ns = core.builder.streams[name], newest[name]
            fresh = stamp_ns is not None and latest_ns - stamp_ns <= (stream.max_age_ns or 0)
            if fresh or stream.missing == "refuse":
                return stamp_ns
        return None

    def whole_ns(self, core: PolicyCore, ticks: Ticks, received_ns: Mapping[str, int], episode_ns: int) -> int | None:
        """In lockstep: the newest tick of which everything is here that is to be expected; None while something is not.

        ``received_ns`` has per stream the stamp of what came last, ``episode_ns`` is the start of the episode.
        """
        if not ticks.used:
            tick_ns = self.newest_ns(core)
            return None if tick_ns is None or core.builder.due(core.buffer, tick_ns) else tick_ns
        if ticks.stamp_ns is None or ticks.stamp_ns < episode_ns:
            return None
        for topic in ticks.topics():
            for name in core.builder.by_topic.get(topic, []):
                if core.builder.streams[name].latched:
                    continue  # it was sent, and acknowledged, before
                sent_ns, here_ns = ticks.newest_ns(topic), received_ns.get(name)
                if here_ns is None or (sent_ns is not None and here_ns < sent_ns):
                    return None
        return ticks.stamp_ns


class ClockWatch:
    """Looks at the ROS clock once per control period, beside the steady one."""

    def __init__(self, period_ns: int, counts: Counts) -> None:
        self._period_ns, self._counts = period_ns, counts
        self._last: tuple[int, int] | None = None  # ROS and steady time of the last control tick

    def jumped(self, now_ns: int, steady_ns: int, simulated: bool) -> bool:
        """Whether the ROS clock went back, or differs from the steady one, since the last control tick."""
        before, self._last = self._last, (now_ns, steady_ns)
        if before is None:
            return False
        passed_ns, steady_passed_ns = now_ns - before[0], steady_ns - before[1]
        # The steps of simulated time are not this node's.
        if not simulated and steady_passed_ns > 1.5 * self._period_ns:
            self._counts.late_ticks += 1
        if passed_ns < 0:
            return True
        # Simulated time may run at any speed, but never skips many control periods at once.
        return passed_ns > 2 * JUMP_NS if simulated else abs(passed_ns - steady_passed_ns) > JUMP_NS
