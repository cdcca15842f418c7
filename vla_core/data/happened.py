"""What really happened at a tick, beside its label: the command that was executed, the reward for it, whether a human
(or an expert) had taken over from a policy, and what was true of the world in a word.

Bags have them where somebody recorded them: ``executed/<topic>`` (:mod:`vla_core.sim.collect`) and ``reward``, a
``std_msgs/msg/Float64`` stamped as the tick whose command earned it. ``intervention/<topic>`` repeats the commands of
whoever took over (:mod:`vla_core.runtime.takeover`): they mark their ticks. A dataset has all this as the columns
``executed``, ``next.reward`` and ``complementary_info.is_intervention``, as LeRobot calls the last two.

A simulator, or whoever labels a recording, may say in a word what a policy should see: on ``ground_truth/<name>``, a
``std_msgs/msg/String``, such as red on ``ground_truth/light``. That is the column ``ground_truth.<name>``, "" where
nothing was said: what an auxiliary head is trained on, and no policy is given.
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
TRUTH_PREFIX, TRUTH_TYPE = "ground_truth/", "std_msgs/msg/String"
TRUTH_COLUMN = "ground_truth."
REWARD, EXECUTED, INTERVENED = "next.reward", "executed", "complementary_info.is_intervention"


@dataclass(frozen=True, kw_only=True)
class Happened:
    """What a conversion takes over: rewards where every bag has them, the rest where any bag has it."""

    reward: bool = False
    executed: bool = False
    intervened: bool = False
    truths: tuple[str, ...] = ()

    @property
    def truth_columns(self) -> tuple[str, ...]:
        """The columns of what was true, in words."""
        return tuple(TRUTH_COLUMN + name for name in self.truths)


def recorded(paths: Sequence[Path], contract: RobotContract) -> Happened:
    """What there is in the bags at ``paths``. Of plans nobody records what was executed of them."""
    rewards, executed, intervened = [], False, False
    truths: set[str] = set()
    for path in paths:
        try:
            info = bags.info(path)
        except BagError:  # told where the bag is converted
            continue
        own = info.contract if CONTRACT_KEY in info.metadata else contract
        rewards.append(info.topics.get(REWARD_TOPIC) == REWARD_TYPE)
        executed |= all(EXECUTED_PREFIX + action.topic in info.topics for action in own.actions.values())
        intervened |= _marked(own, info.topics)
        truths |= {
            topic.removeprefix(TRUTH_PREFIX)
            for topic, kind in info.topics.items() if topic.startswith(TRUTH_PREFIX) and kind == TRUTH_TYPE
        }  # fmt: skip
    return Happened(reward=bool(rewards) and all(rewards), executed=executed and not contract.plans,
                    intervened=intervened, truths=tuple(sorted(truths)))  # fmt: skip


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
        self._truths: dict[str, deque[tuple[int, bytes]]] = {TRUTH_PREFIX + name: deque() for name in wanted.truths}

    @property
    def topics(self) -> tuple[str, ...]:
        own = [topic for track in self._beside for topic in track.topics]
        return (*super().topics, *own, *((REWARD_TOPIC,) if self._wanted.reward else ()), *self._truths)

    @property
    def _beside(self) -> list[Commands]:
        return [track for track in (self._executed, self._interventions) if track is not None]

    def add(self, message: Message) -> None:
        if self._wanted.reward and message.topic == REWARD_TOPIC:
            self._rewards.append((message.stamp_ns, message.data))
            return
        if message.topic in self._truths:
            self._truths[message.topic].append((message.stamp_ns, message.data))
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
        for waiting in (self._rewards, *self._truths.values()):
            while waiting and waiting[0][0] < tick_ns:
                waiting.popleft()

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
        data = self._of_tick(self._rewards, tick_ns)
        return None if data is None else float(deserialize(REWARD_TYPE, data).data)

    def truths_at(self, tick_ns: int) -> tuple[str, ...]:
        """A word for each of the truths that were asked for, "" where none was said at this tick."""
        found = (self._of_tick(waiting, tick_ns) for waiting in self._truths.values())
        return tuple("" if data is None else str(deserialize(TRUTH_TYPE, data).data) for data in found)

    def _of_tick(self, waiting: Iterable[tuple[int, bytes]], tick_ns: int) -> bytes | None:
        """The first message of a tick."""
        return next((data for stamp_ns, data in waiting if tick_ns <= stamp_ns < tick_ns + self.ahead_ns), None)


def _prefixed(contract: RobotContract, prefix: str) -> Commands:
    """Commands on the topics of ``contract`` behind ``prefix``."""
    actions = {name: dataclasses.replace(a, topic=prefix + a.topic) for name, a in contract.actions.items()}
    return Commands((), dataclasses.replace(contract, actions=actions))
