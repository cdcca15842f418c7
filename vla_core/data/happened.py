"""What really happened at a tick, beside its label: the command that was executed, the reward for it, and whether a
human (or an expert) had taken over from a policy.

Bags have them where somebody recorded them: ``executed/<topic>`` (:mod:`vla_core.sim.collect`) and ``reward``, a
``std_msgs/msg/Float64`` stamped as the tick whose command earned it. ``intervention/<topic>`` repeats the commands of
whoever took over (:mod:`vla_core.runtime.takeover`): they mark their ticks. A dataset has all this as the columns
``executed``, ``next.reward`` and ``complementary_info.is_intervention``, as LeRobot calls the last two.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_core.contract import RobotContract
from vla_core.data import bag as bags
from vla_core.data.bag import CONTRACT_KEY, BagError
from vla_core.data.episodes import Commands
from vla_core.observation.messages import Message, deserialize

REWARD_TOPIC, REWARD_TYPE = "reward", "std_msgs/msg/Float64"
EXECUTED_PREFIX = "executed/"
INTERVENTION_PREFIX = "intervention/"
REWARD, EXECUTED, INTERVENED = "next.reward", "executed", "complementary_info.is_intervention"


@dataclass(frozen=True, kw_only=True)
class Happened:
    """What a conversion takes over: rewards where every bag has them, the rest where any bag has it."""

    reward: bool = False
    executed: bool = False
    intervened: bool = False


def recorded(paths: Sequence[Path], contract: RobotContract) -> Happened:
    """What there is in the bags at ``paths``. Of plans nobody records what was executed of them."""
    rewards, executed, intervened = [], False, False
    for path in paths:
        try:
            info = bags.info(path)
        except BagError:  # told where the bag is converted
            continue
        own = info.contract if CONTRACT_KEY in info.metadata else contract
        rewards.append(info.topics.get(REWARD_TOPIC) == REWARD_TYPE)
        executed |= all(EXECUTED_PREFIX + action.topic in info.topics for action in own.actions.values())
        intervened |= _marked(own, info.topics)
    return Happened(reward=bool(rewards) and all(rewards), executed=executed and not contract.plans,
                    intervened=intervened)  # fmt: skip


def _marked(contract: RobotContract, topics: Iterable[str]) -> bool:
    """Whether somebody noted in these topics of a bag who was in command."""
    return all(INTERVENTION_PREFIX + action.topic in topics for action in contract.actions.values())


class CommandsAndMore(Commands):
    """Recorded commands, with what was executed and earned, and who gave them.

    ``topics`` are those of the bag: in one where nobody could take over, every command is a demonstrator's.
    """

    def __init__(self, contract: RobotContract, wanted: Happened, topics: Iterable[str] = ()) -> None:
        super().__init__((), contract)
        self._wanted = wanted
        self._executed = _prefixed(contract, EXECUTED_PREFIX) if wanted.executed else None
        marked = wanted.intervened and _marked(contract, topics)
        self._interventions = _prefixed(contract, INTERVENTION_PREFIX) if marked else None
        self._rewards: deque[tuple[int, bytes]] = deque()

    @property
    def topics(self) -> tuple[str, ...]:
        own = [topic for track in self._beside for topic in track.topics]
        return (*super().topics, *own, *((REWARD_TOPIC,) if self._wanted.reward else ()))

    @property
    def _beside(self) -> list[Commands]:
        return [track for track in (self._executed, self._interventions) if track is not None]

    def add(self, message: Message) -> None:
        if self._wanted.reward and message.topic == REWARD_TOPIC:
            self._rewards.append((message.stamp_ns, message.data))
            return
        for track in self._beside:
            if message.topic in track.topics:
                track.add(message)
                return
        super().add(message)

    def forget_before(self, tick_ns: int) -> None:
        super().forget_before(tick_ns)
        for track in self._beside:
            track.forget_before(tick_ns)
        while self._rewards and self._rewards[0][0] < tick_ns:
            self._rewards.popleft()

    def executed_at(self, tick_ns: int) -> np.ndarray | None:
        """(A,); None where neither it nor a label is there, or it was not asked for."""
        if self._executed is None:
            return None
        found = self._executed.at(tick_ns)
        return self.at(tick_ns) if found is None else found

    def intervened_at(self, tick_ns: int) -> bool | None:
        """Whether somebody had taken over, or drove all the time; None where it was not asked for."""
        if not self._wanted.intervened:
            return None
        return self._interventions is None or self._interventions.at(tick_ns) is not None

    def reward_at(self, tick_ns: int) -> float | None:
        """None where there is none at this tick, or it was not asked for."""
        for stamp_ns, data in self._rewards:
            if tick_ns <= stamp_ns < tick_ns + self.ahead_ns:
                return float(deserialize(REWARD_TYPE, data).data)
        return None


def _prefixed(contract: RobotContract, prefix: str) -> Commands:
    """Commands on the topics of ``contract`` behind ``prefix``."""
    actions = {name: dataclasses.replace(a, topic=prefix + a.topic) for name, a in contract.actions.items()}
    return Commands((), dataclasses.replace(contract, actions=actions))
