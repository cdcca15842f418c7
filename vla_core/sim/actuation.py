"""From what a policy or an expert wants to what a world obeys, through the bytes of the messages on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vla_core.commands import decode, encode, encode_frame
from vla_core.contract import RobotContract
from vla_core.observation.messages import Message
from vla_core.runtime.follower import TrajectoryFollower
from vla_core.sim.base import SimulationError, World

if TYPE_CHECKING:  # which imports torch; an expert does without
    from vla_core.runtime.chunk import ActionChunk
    from vla_core.runtime.core import Command


class Body(Protocol):
    """What stands between a policy and the world, for one episode."""

    def hear(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Take what it needs of the sensors' messages; returns all of them."""

    def obey(self, command: Command | None, stamp_ns: int, refused: bool) -> np.ndarray:
        """What the world is to do at ``stamp_ns``; without a command, or where the policy ``refused``, what is safe."""

    def plan(self, stamp_ns: int) -> np.ndarray | None:
        """The trajectory (H, A) that was made at ``stamp_ns``, for people to see; None without one."""

    def sent(self) -> np.ndarray:
        """All that was sent since the first command (N, A), as shares of the ranges."""


def body_of(world: World, contract: RobotContract, strict: bool = True) -> Body:
    """A follower for a vehicle's trajectories, nothing but the wire for others.

    ``strict`` raises where the follower refuses a message of the world; with faulty sensors that is as it should be.
    """
    return Wire(world, contract) if contract.following is None else Follower(contract, strict)


class Wire:
    """Commands as messages, a row a step."""

    def __init__(self, world: World, contract: RobotContract) -> None:
        self._world, self._contract = world, contract
        self._sent: list[np.ndarray] = []

    def hear(self, messages: Sequence[Message]) -> Sequence[Message]:
        return messages

    def obey(self, command: Command | None, stamp_ns: int, refused: bool) -> np.ndarray:
        safe = self._contract.safe_values(self._sent[-1] if self._sent else None)
        if safe is None:  # a robot that was sent nothing yet stays where it is
            safe = self._world.rest()
        values = safe if command is None else command.values
        if command is not None or self._sent:
            self._sent.append(values)
        frame = encode_frame(self._contract, stamp_ns, values)
        return np.concatenate([decode(action, frame[action.topic])[0] for action in self._contract.actions.values()])

    def plan(self, stamp_ns: int) -> np.ndarray | None:
        return None

    def sent(self) -> np.ndarray:
        scale = self._contract.action_high - self._contract.action_low
        return np.reshape(self._sent, (-1, len(scale))) / scale


class Follower:
    """Trajectories as messages to the follower, and its drive commands as messages to the vehicle."""

    def __init__(self, contract: RobotContract, strict: bool = True) -> None:
        assert contract.following is not None
        self._contract, self._strict = contract, strict
        (self._action,) = contract.actions.values()
        self._drive = contract.following.command
        self._odometry = contract.stream(contract.following.odometry).topic
        self._follower = TrajectoryFollower(contract)
        self._chunk: ActionChunk | None = None
        self._sent: list[np.ndarray] = []

    def hear(self, messages: Sequence[Message]) -> Sequence[Message]:
        for message in messages:
            if message.topic == self._odometry:
                self._check(self._follower.add_odometry(message.data))
        return messages

    def obey(self, command: Command | None, stamp_ns: int, refused: bool) -> np.ndarray:
        if refused:
            self.follow(np.zeros((1, len(self._action.names))), stamp_ns)
        elif command is not None and command.chunk is not self._chunk:
            self._chunk = command.chunk
            rows = np.clip(command.chunk.actions, self._contract.action_low, self._contract.action_high)
            self.follow(rows, command.chunk.observation_stamp_ns)
        return self.drive(stamp_ns)

    def follow(self, rows: np.ndarray, stamp_ns: int) -> None:
        """Hand a trajectory (H, A) from ``stamp_ns`` on to the follower; a single row brakes to a stand."""
        data = encode(self._action, stamp_ns, rows, self._contract.chunk_step_ns)
        self._check(self._follower.add_trajectory(data))

    def drive(self, stamp_ns: int) -> np.ndarray:
        """Steering angle in rad and speed in m/s (2,) at ``stamp_ns``, as the vehicle's message has them."""
        values = decode(self._drive, encode(self._drive, stamp_ns, self._follower.command(stamp_ns)[None], 1))[0]
        if self._follower.trajectory_ns is not None:
            self._sent.append(values)
        return values

    def plan(self, stamp_ns: int) -> np.ndarray | None:
        chunk = self._chunk
        return chunk.actions if chunk is not None and chunk.observation_stamp_ns == stamp_ns else None

    def sent(self) -> np.ndarray:
        scale = np.subtract(self._drive.high, self._drive.low)
        return np.reshape(self._sent, (-1, len(scale))) / scale

    def _check(self, problem: str) -> None:
        if problem and self._strict:
            raise SimulationError(f"the follower refuses what the world sends: {problem}")
