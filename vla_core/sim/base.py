"""What a simulated robot is: a world that speaks a contract's serialized messages, and obeys its commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from vla_core.config import ConfigError
from vla_core.contract import RobotContract, Stream
from vla_core.errors import VlaError, choices
from vla_core.observation import messages
from vla_core.observation.image import encode_jpeg
from vla_core.observation.messages import Message

VECTOR = "sensor_msgs/msg/JointState"
RAW_IMAGE, COMPRESSED_IMAGE = IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")


class SimulationError(VlaError):
    """An unknown world, task or camera, a contract that a world cannot keep, or a missing simulator."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a simulated robot is asked to do.

    ``world`` names simulator and task, as in ``libero_spatial:3``; ``instruction`` is the task in its own words;
    ``max_steps`` are the control steps after which an episode has failed, by the benchmark's own rule where it has one.
    """

    world: str
    instruction: str
    max_steps: int


@dataclass(frozen=True, kw_only=True)
class View:
    """How a world is looked at.

    ``camera`` is for worlds that let one choose; ``size`` are pixels of the published pictures, None the world's own;
    ``black`` publishes black pictures: what is a policy's success without sight? ``swapped`` is for worlds that say
    their instruction themselves (:class:`Journey`): they say that of another task, and still score their own.
    """

    camera: str | None = None
    size: int | None = None
    black: bool = False
    swapped: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 16:
            raise ConfigError(f"size: expected at least 16 pixels, found {self.size}")


class World(Protocol):
    """One task of a simulator. Time passes only in :meth:`step`, one control period of the contract a call.

    ``steps_per_frame``  the cameras show a new picture every so many control steps
    ``success``          whether the episode has succeeded so far; stays true
    ``score``            so far in [0, 1], where the benchmark knows more than success; None elsewhere

    ``step`` takes a command of the contract's action, or of ``following.command`` where a trajectory is followed. What
    only some worlds have is asked for by :class:`HasExpert` and :class:`Journey`.
    """

    contract: RobotContract
    steps_per_frame: int
    success: bool

    @property
    def score(self) -> float | None: ...

    def reset(self, seed: int) -> None:
        """Start an episode; the same seed gives the same episode, whatever was run before."""

    def observe_state(self, stamp_ns: int) -> list[Message]:
        """The contract's numeric streams now, stamped ``stamp_ns``.

        A stream that is faster than the control rate has several messages, in order, of the control period that ends
        now; the last one is stamped ``stamp_ns``.
        """

    def observe_camera(self, stamp_ns: int) -> list[Message]:
        """The contract's pictures now, and their ``CameraInfo`` where it is asked for, stamped ``stamp_ns``."""

    def rest(self) -> np.ndarray:
        """The command (A,) that leaves the robot where it is, before it was told anything."""

    def step(self, command: np.ndarray, pictures: bool = True) -> None:
        """Obey a command (A,) in the contract's units; without ``pictures`` no camera is asked until the next step."""

    def render_for_people(self) -> np.ndarray:
        """An upright picture (H, W, 3) uint8 RGB in a size for people; H and W are even."""

    def close(self) -> None:
        """Free what the simulator holds."""


@runtime_checkable
class HasExpert(Protocol):
    """A world that knows what is right: demonstrations can be recorded in it."""

    def expert_rows(self) -> np.ndarray:
        """What the expert does now, (H, A) rows of the contract's action: H = 1 for a message a step.

        Ask once a tick, whoever drives: an expert may have a memory.
        """


@runtime_checkable
class HasReward(Protocol):
    """A world that says after each step how good it was: what reinforcement learning shapes its rewards by.

    ``reward``  of the newest step, 1 where the task is done; 0 before the first step of an episode
    """

    reward: float


@runtime_checkable
class Journey(Protocol):
    """A world on the way: what it says changes, it may end early, and there is more to tell than success.

    ``instruction``  what is said now, "" before the first reset
    ``over``         the episode has ended, succeeded or not: nothing that comes counts any more
    """

    @property
    def instruction(self) -> str: ...

    @property
    def over(self) -> bool: ...

    def details(self) -> dict[str, float]:
        """Figures of the episode so far, the same keys always; finite."""

    def statics(self, stamp_ns: int) -> list[Message]:
        """What is said once and latched beside the contract's streams, such as ``/tf_static``."""

    def ground_truth(self, stamp_ns: int) -> list[Message]:
        """What no sensor sees, on topics ``ground_truth/…``: for scores and people, never for a policy."""

    def watch_plan(self, rows: np.ndarray | None) -> None:
        """Draw a trajectory, rows (H, A) of the contract's action from now on, into the pictures for people."""


def instruction_now(world: World) -> str | None:
    """What the world says now; None where the task's instruction holds throughout."""
    return world.instruction if isinstance(world, Journey) else None


def is_over(world: World) -> bool:
    """Whether the episode has ended, succeeded or not."""
    return world.success or (isinstance(world, Journey) and world.over)


def details_of(world: World) -> dict[str, float]:
    """Figures of the episode so far; none where the world knows success alone."""
    return world.details() if isinstance(world, Journey) else {}


@dataclass(frozen=True, kw_only=True)
class Simulator:
    """What a prefix of a world's name stands for.

    ``contract``        name in ``config/robots`` of the robot as the benchmark has it
    ``task``            the task of the name after the colon; raises :class:`SimulationError` with the choices
    ``make``            a world of that task
    ``chooses_camera``  whether :class:`View` may name a camera
    ``journey``         whether its worlds say their instruction themselves, on the way (:class:`Journey`)
    """

    contract: str
    task: Callable[[str], Task]
    make: Callable[[str, RobotContract, View], World]
    chooses_camera: bool = False
    journey: bool = False


def check_contract(contract: RobotContract, who: str, vectors: Mapping[str, int], pictures: tuple[str, ...],
                   action_size: int) -> None:  # fmt: skip
    """Raise unless ``contract`` asks ``who`` for nothing beyond these vectors (name to length), pictures and action."""
    for name, stream in contract.observations.items():
        if stream.type == VECTOR:
            if name not in vectors:
                raise SimulationError(f"contract {contract.name!r}: {who} has no {name!r}; choices: {choices(vectors)}")
            if len(stream.names) != vectors[name]:
                raise SimulationError(f"contract {contract.name!r}: {name!r} has {len(stream.names)} names, "
                                      f"{who} has {vectors[name]} numbers")  # fmt: skip
        elif stream.type in IMAGES:
            if name not in pictures:
                raise SimulationError(
                    f"contract {contract.name!r}: {who} has no camera {name!r}; choices: {choices(pictures)}"
                )
        elif not stream.latched:
            raise SimulationError(f"contract {contract.name!r}: {who} has nothing of type {stream.type} for {name!r}; "
                                  f"choices: {choices((VECTOR, *IMAGES))}")  # fmt: skip
    sizes = [len(action.names) for action in contract.actions.values()]
    if sizes != [action_size] or next(iter(contract.actions.values())).publish != "step":
        raise SimulationError(f"contract {contract.name!r}: actions of {sizes} entries; {who} obeys one action of "
                              f"{action_size}, a message a step")  # fmt: skip


def steps_per_frame(contract: RobotContract) -> int:
    """Control steps from one picture to the next, by the first camera's rate; 1 without a camera."""
    rates = [s.rate_hz for s in contract.observations.values() if s.type in IMAGES and s.rate_hz is not None]
    return max(1, round(contract.rate_hz / rates[0])) if rates else 1


def vector_message(stream: Stream, stamp_ns: int, values: np.ndarray, frame_id: str = "") -> Message:
    """``values`` (len(stream.names),) as the stream's message."""
    data = messages.joint_state(stamp_ns, stream.names, stream.field or "position", values, frame_id)
    return Message(stream.topic, stream.type, stamp_ns, data)


def picture_message(stream: Stream, stamp_ns: int, pixels: np.ndarray, frame_id: str) -> Message:
    """``pixels`` (H, W, 3) uint8 RGB as the stream's message: raw, or as JPEG."""
    if stream.type == COMPRESSED_IMAGE:
        data = messages.compressed_image(stamp_ns, encode_jpeg(pixels), "rgb8; jpeg compressed", frame_id)
    else:
        data = messages.image(stamp_ns, pixels, frame_id)
    return Message(stream.topic, stream.type, stamp_ns, data)
