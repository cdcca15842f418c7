"""Who is in command: a policy, or who takes over from it (DAgger, Ross et al. 2011; HG-DAgger, Kelly et al. 2019).

``takeover_node`` stands between both and the robot. On ROS

- ``policy/<topic>``        the policy's commands
- ``teleop/<topic>``        those of a teleoperator or an expert
- ``takeover``              ``std_msgs/msg/Bool``, latched: true while the teleoperator is in command
- ``<topic>``               what the robot gets
- ``intervention/<topic>``  the teleoperator's commands among these once more: they mark their ticks in a bag

A teleoperator who is in command and silent leaves the robot without commands, which the safety stage or the robot
answers by the safe action; the policy never takes back by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from vla_core.contract import NANOSECONDS

POLICY_PREFIX, TELEOP_PREFIX = "policy/", "teleop/"
TAKEOVER_TOPIC = "takeover"
JUMP_NS = NANOSECONDS // 2  # stamps that go back by more are of a clock that was set back


@dataclass(frozen=True)
class Passed:
    """A command for the robot, and whether it is an intervention."""

    data: bytes
    intervention: bool


class Takeover:
    """The switch for one command topic. An instant is answered once, whoever answers it.

    A tick at which command changes hands is answered by whoever has it now, with the command that was there before the
    change was heard: in lockstep nothing else would come for it.
    """

    def __init__(self) -> None:
        self.taken = False
        self._passed_ns: int | None = None
        self._waiting: tuple[int, bytes] | None = None  # the newest command of who is not in command

    def command(self, from_teleop: bool, stamp_ns: int, data: bytes) -> Passed | None:
        """A command came; returns what the robot gets of it."""
        if self._passed_ns is not None and stamp_ns < self._passed_ns - JUMP_NS:
            self._passed_ns, self._waiting = None, None
        if from_teleop != self.taken:
            self._waiting = stamp_ns, data
            return None
        return self._pass(stamp_ns, data)

    def hand_over(self, taken: bool) -> Passed | None:
        """Command goes to the teleoperator, or back to the policy; returns what the robot gets at once."""
        if taken == self.taken:
            return None
        self.taken = taken
        waiting, self._waiting = self._waiting, None
        return None if waiting is None else self._pass(*waiting)

    def _pass(self, stamp_ns: int, data: bytes) -> Passed | None:
        if self._passed_ns is not None and stamp_ns <= self._passed_ns:
            return None
        self._passed_ns = stamp_ns
        return Passed(data, self.taken)
