"""RobotContract: one YAML binds topics to named observations and actions, with units, rates, ages and limits.

The contract is written into every bag, dataset and checkpoint. A robot's own file may only remap topics: whatever
else differs from the contract that a policy was trained with is refused (:meth:`RobotContract.check_same`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from vla_core.config import ConfigError, config_file, from_dict, load_yaml, to_dict
from vla_core.errors import VlaError, choices

NANOSECONDS = 1_000_000_000


class ContractError(VlaError):
    """Two contracts that disagree, or a stream that a contract does not have."""


# Messages whose rows are places in the robot's own frame, as it was at the message's stamp.
RELATIVE_TYPES = ("nav_msgs/msg/Path", "vla_ros/msg/Trajectory")

Sampling = Literal["hold", "nearest", "interpolate", "window"]
Reaction = Literal["clamp", "hold", "stop", "latch"]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One observation of the robot: where it comes from, how it is sampled at a tick and how old it may be.

    ``type`` is a ROS type name such as ``sensor_msgs/msg/JointState``; ``names`` are the entries taken from the
    message, in this order: joints of a ``JointState`` (from its array ``field``), columns of a ``PointCloud2``, or
    dotted paths such as ``angular_velocity.x`` of any other message. ``rate_hz`` is the rate that the sensor is
    expected to keep. A ``latched`` stream (an instruction) has no rate: its newest value holds until replaced.
    ``best_effort`` also receives from reliable publishers; ``reliable`` asks for every message and refuses
    best-effort publishers.

    ``sampling`` at a tick: ``hold`` takes the newest message not after it; ``nearest`` the closest one, at most
    ``tolerance_s`` away; ``interpolate`` blends the two around it linearly, rotations along the arc, and holds the
    first where the second is not there within ``tolerance_s``; ``window`` takes all of the last ``window_s``. None of
    them sees what is stamped after the newest tick, unless the contract is ``offline``.
    ``missing``: a stream that is missing or older than ``max_age_s`` makes the policy refuse (``refuse``) or is given
    to it as masked (``mask``), for models that were trained with the mask.
    """

    topic: str
    type: str
    rate_hz: float | None = None
    max_age_s: float | None = None
    latched: bool = False
    reliability: Literal["best_effort", "reliable"] = "best_effort"
    sampling: Sampling = "hold"
    tolerance_s: float | None = None
    window_s: float | None = None
    missing: Literal["refuse", "mask"] = "refuse"
    frame_id: str | None = None
    field: str | None = None
    names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.latched and (self.rate_hz is None or self.max_age_s is None):
            raise ConfigError("rate_hz: a stream that is not latched needs rate_hz and max_age_s")
        for key in ("rate_hz", "max_age_s", "tolerance_s", "window_s"):
            number = getattr(self, key)
            if number is not None and not 0 < number < float("inf"):
                raise ConfigError(f"{key}: expected a positive number, found {number}")
        if self.latched and self.sampling != "hold":
            raise ConfigError(f"sampling: a latched stream can only hold, found {self.sampling!r}")
        if self.sampling == "nearest" and self.tolerance_s is None:
            raise ConfigError("tolerance_s: sampling nearest needs it")
        if self.sampling in ("hold", "window") and self.tolerance_s is not None:
            raise ConfigError(f"tolerance_s: belongs to nearest and interpolate, found it with {self.sampling}")
        if (self.sampling == "window") != (self.window_s is not None):
            raise ConfigError(f"window_s: belongs to sampling window alone, found {self.window_s} with {self.sampling}")
        if len(self.units) != len(self.names):
            raise ConfigError(f"units: expected one unit per name ({len(self.names)}), found {len(self.units)}")

    @property
    def period_ns(self) -> int | None:
        """Time between two messages at the expected rate, nanoseconds."""
        return None if self.rate_hz is None else round(NANOSECONDS / self.rate_hz)

    @property
    def max_age_ns(self) -> int | None:
        """Age beyond which a sample counts as missing, nanoseconds."""
        return None if self.max_age_s is None else round(NANOSECONDS * self.max_age_s)

    @property
    def window_length(self) -> int:
        """Samples of a full window: ``window_s`` at ``rate_hz``; 1 without a window."""
        return 1 if self.window_s is None or self.rate_hz is None else max(1, round(self.window_s * self.rate_hz))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How fast the commanded motion may change, one positive number per name; an empty tuple sets no bound.

    In the action's unit per s, s2 and s3, of the motion itself: with ``kind: position`` velocity is the first
    derivative of the values, with ``kind: velocity`` it is their size. ``rate`` bounds the values' change per second
    whatever they are, for efforts and openings. The ``speed`` of a trajectory is a value like its coordinates: what
    ``velocity`` bounds of it is an acceleration.
    """

    velocity: tuple[float, ...] = ()
    acceleration: tuple[float, ...] = ()
    jerk: tuple[float, ...] = ()
    rate: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Action:
    """One command topic of the robot, entries ``names`` of its messages.

    ``names`` are joints (``JointState``, ``JointTrajectory``), positions in the array (``Float64MultiArray``), dotted
    paths (``Twist``: ``linear.x``) or coordinates (``Path``, ``vla_ros/msg/Trajectory``: x, y, z, yaw, speed,
    acceleration). ``field`` is the array of a joint message: position, velocity or effort.

    ``publish``: one message per control step, or the rest of a chunk (``chunk``) for trajectories; ``step_s`` is then
    the time between two points, the control period without it. ``safe`` says per entry what a fault leads to:
    ``zero`` sends 0 (the stop of a velocity), ``hold`` repeats the last command (a joint, a grip that must not open).
    ``limits`` are enforced by the safety stage.
    """

    topic: str
    type: str
    field: str = ""
    names: tuple[str, ...]
    units: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    safe: tuple[Literal["zero", "hold"], ...]
    kind: Literal["position", "velocity", "effort"] = "position"
    publish: Literal["step", "chunk"] = "step"
    step_s: float | None = None
    frame_id: str = ""
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("names: expected at least one")
        for key in ("units", "low", "high", "safe"):
            if len(getattr(self, key)) != len(self.names):
                raise ConfigError(
                    f"{key}: expected {len(self.names)} values, one per name, found {len(getattr(self, key))}"
                )
        for name, low, high in zip(self.names, self.low, self.high, strict=True):
            if not low < high:
                raise ConfigError(f"low: {name} has low {low} and high {high}; low must be below high")
        for name, low, high, safe in zip(self.names, self.low, self.high, self.safe, strict=True):
            if safe == "zero" and not low <= 0 <= high:
                raise ConfigError(f"safe: {name} has zero, which is not between its bounds {low} and {high}")
        for key in ("velocity", "acceleration", "jerk", "rate"):
            bounds = getattr(self.limits, key)
            if len(bounds) not in (0, len(self.names)) or not all(bound > 0 for bound in bounds):
                raise ConfigError(f"limits.{key}: expected {len(self.names)} positive numbers or none, found {bounds}")
            if bounds and self.kind == "effort" and key != "rate":
                raise ConfigError(f"limits.{key}: an effort has no motion of its own to limit; choices: rate")
        if self.step_s is not None and (self.publish == "step" or not 0 < self.step_s < float("inf")):
            raise ConfigError(f"step_s: expected a positive time, with publish chunk alone, found {self.step_s}")

    @property
    def relative(self) -> bool:
        """Whether it is a trajectory in the robot's own moving frame: its rows mean nothing but together."""
        return self.publish == "chunk" and self.type in RELATIVE_TYPES


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One side of the workspace: ``position`` is an entry of the workspace's stream, and must stay in [low, high].

    ``action`` is the entry of the commands that moves it, as a position or as a velocity.
    """

    action: str
    position: str
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigError(f"low: {self.position} has low {self.low} and high {self.high}; low must be below high")


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The box in which the robot may be, seen in the observation ``stream``."""

    stream: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True, kw_only=True)
class Reactions:
    """What the safety stage does about each kind of violation.

    ``clamp`` passes the nearest command within the limits; ``hold`` repeats the last one that was passed; ``stop``
    slows down at the limit of acceleration to the declared safe action; ``latch`` does so and stays there until it is
    reset. Where there is nothing to clamp (age, silence, a lost sensor), ``stop`` is the mildest that is allowed.
    """

    limits: Reaction = "clamp"
    workspace: Reaction = "clamp"
    not_finite: Literal["hold", "stop", "latch"] = "stop"
    command_age: Literal["stop", "latch"] = "stop"
    heartbeat: Literal["stop", "latch"] = "stop"
    sensor: Literal["stop", "latch"] = "stop"
    clock: Literal["stop", "latch"] = "stop"


@dataclass(frozen=True, kw_only=True)
class Safety:
    """What the safety stage watches beside the actions' own limits; times in seconds.

    ``command_age_s`` bounds how old a candidate's stamp may be when it arrives, ``heartbeat_s`` how long candidates
    may be silent (trajectories come once a chunk: longer than that), ``sensors`` names the observations without which
    the robot must not move (None: all that have a rate), ``clock_jump_s`` how far the clock, or a sensor's stamps
    against it, may jump.
    """

    command_age_s: float = 0.25
    heartbeat_s: float = 0.25
    clock_jump_s: float = 0.5
    sensors: tuple[str, ...] | None = None
    workspace: Workspace | None = None
    reactions: Reactions = field(default_factory=Reactions)

    def __post_init__(self) -> None:
        for key in ("command_age_s", "heartbeat_s", "clock_jump_s"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ConfigError(f"{key}: expected a positive time, found {getattr(self, key)}")


@dataclass(frozen=True, kw_only=True)
class Following:
    """How a vehicle turns its trajectory action into steering and speed.

    ``odometry`` names the observation with pose and twist in the plane that the trajectory is followed by, ``command``
    is what the vehicle obeys: entries ``steering_angle`` (rad) and ``speed`` (m/s). Pure pursuit aims at the point that
    is ``lookahead_s`` ahead at the present speed, at least ``lookahead_m``; a trajectory older than ``timeout_s`` is
    braked along, at ``braking_mps2``. ``wheelbase_m`` is the distance of the axles, from ``base_link`` at the rear one.
    ``lead_s`` is how long the vehicle takes to obey a speed: that of the trajectory so much later is sent.
    """

    odometry: str
    command: Action
    wheelbase_m: float
    lookahead_s: float = 0.8
    lookahead_m: float = 3.0
    braking_mps2: float = 4.0
    timeout_s: float = 0.6
    lead_s: float = 0.3

    def __post_init__(self) -> None:
        for key in ("wheelbase_m", "lookahead_s", "lookahead_m", "braking_mps2", "timeout_s", "lead_s"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ConfigError(f"{key}: expected a positive number, found {getattr(self, key)}")
        if self.command.names != ("steering_angle", "speed"):
            raise ConfigError(f"command.names: expected [steering_angle, speed], found {list(self.command.names)}")
        if self.command.publish != "step":
            raise ConfigError(f"command.publish: expected step, found {self.command.publish}")


@dataclass(frozen=True, kw_only=True)
class RobotContract:
    """What a robot offers and obeys. All times derived from it are integer nanoseconds.

    A policy's action vector is that of all ``actions``, joined in their order. ``offline`` lets a tick see messages
    that are stamped after it, for labels and offline studies; a live node refuses such a contract. ``following`` is for
    vehicles whose one action is a trajectory. ``any_of`` names observations of which at least one must be there: with
    all of them lost a policy refuses, though each of them alone may be masked.
    """

    name: str
    rate_hz: float
    observations: dict[str, Stream]
    actions: dict[str, Action]
    safety: Safety = field(default_factory=Safety)
    following: Following | None = None
    any_of: tuple[str, ...] = ()
    offline: bool = False
    description: str = field(default="")

    def __post_init__(self) -> None:
        if not 0 < self.rate_hz < float("inf"):
            raise ConfigError(f"rate_hz: expected a positive rate, found {self.rate_hz}")
        if not self.actions:
            raise ConfigError("actions: expected at least one")
        names = self.action_names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"actions: {', '.join(twice)} named by two actions; a name is one entry of the vector")
        topics = [action.topic for action in self.actions.values()]
        if len(set(topics)) != len(topics):
            raise ConfigError(f"actions: expected a topic each, found {', '.join(topics)}")
        if len({action.step_s for action in self.actions.values()}) != 1:
            raise ConfigError("actions: one chunk has one step; all actions need the same step_s")
        by_topic: dict[str, tuple[str, Stream]] = {}
        for name, stream in self.observations.items():
            other, first = by_topic.setdefault(stream.topic, (name, stream))
            for key in ("type", "reliability", "latched"):
                if getattr(first, key) != getattr(stream, key):
                    raise ConfigError(f"observations.{name}.{key}: shares {stream.topic} with {other}, which has "
                                      f"{getattr(first, key)!r}, found {getattr(stream, key)!r}")  # fmt: skip
        self._check_safety()
        self._check_following()

    def _check_following(self) -> None:
        for name in self.any_of:
            if name not in self.observations:
                raise ConfigError(f"any_of: no observation {name!r}; choices: {choices(self.observations)}")
        if self.following is None:
            return
        if self.following.odometry not in self.observations:
            raise ConfigError(
                f"following.odometry: no observation {self.following.odometry!r}; choices: {choices(self.observations)}"
            )
        actions = list(self.actions.values())
        if len(actions) != 1 or actions[0].publish != "chunk" or not {"x", "y", "speed"} <= set(actions[0].names):
            raise ConfigError(f"following: expected one action that is a trajectory with x, y and speed, found "
                              f"{choices(self.actions)}")  # fmt: skip

    def _check_safety(self) -> None:
        for name in self.safety.sensors or ():
            if name not in self.observations:
                raise ConfigError(f"safety.sensors: no observation {name!r}; choices: {choices(self.observations)}")
            if self.observations[name].max_age_s is None:
                raise ConfigError(f"safety.sensors: {name} has no max_age_s, so nothing tells when it is lost")
        workspace = self.safety.workspace
        if workspace is None:
            return
        if workspace.stream not in self.observations:
            raise ConfigError(
                f"safety.workspace.stream: no observation {workspace.stream!r}; choices: {choices(self.observations)}"
            )
        if self.observations[workspace.stream].max_age_s is None:
            raise ConfigError(f"safety.workspace.stream: {workspace.stream} has no max_age_s")
        moved = [axis.action for axis in workspace.axes]
        if len(set(moved)) != len(moved):
            raise ConfigError(f"safety.workspace.axes: expected one axis per action, found {', '.join(moved)}")
        still = [name for a in self.actions.values() for name, safe in zip(a.names, a.safe, strict=True)
                 if a.kind == "velocity" and safe != "zero"]  # fmt: skip
        seen = self.observations[workspace.stream].names
        for axis in workspace.axes:
            if axis.action in still:
                raise ConfigError(f"safety.workspace.axes: velocity {axis.action} holds when it should stop; its safe "
                                  "must be zero")  # fmt: skip
            if axis.position not in seen:
                raise ConfigError(f"safety.workspace.axes: no {axis.position!r} in {workspace.stream}; "
                                  f"choices: {choices(seen)}")  # fmt: skip
            if axis.action not in self.action_names:
                raise ConfigError(f"safety.workspace.axes: no action {axis.action!r}; "
                                  f"choices: {choices(self.action_names)}")  # fmt: skip

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of the whole action vector."""
        return tuple(name for action in self.actions.values() for name in action.names)

    @property
    def action_units(self) -> tuple[str, ...]:
        """Units of the whole action vector."""
        return tuple(unit for action in self.actions.values() for unit in action.units)

    @property
    def plans(self) -> bool:
        """Whether a tick is answered by a whole trajectory (H, A) in the robot's own frame as it was at the tick."""
        return all(action.relative for action in self.actions.values())

    @property
    def action_low(self) -> np.ndarray:
        """Lower bounds (A,) float64 of the whole action vector."""
        return np.array([bound for action in self.actions.values() for bound in action.low])

    @property
    def action_high(self) -> np.ndarray:
        """Upper bounds (A,) float64 of the whole action vector."""
        return np.array([bound for action in self.actions.values() for bound in action.high])

    def safe_values(self, last: np.ndarray | None) -> np.ndarray | None:
        """The declared safe action (A,): 0, or the value of ``last`` (A,) where the contract says hold.

        None when something must be held and nothing was commanded yet: a made-up position is not safe.
        """
        held = np.array([safe == "hold" for action in self.actions.values() for safe in action.safe])
        if last is None:
            return None if held.any() else np.zeros(len(held))
        return np.where(held, last, 0.0)

    def split(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """The parts (..., A_i) of a vector (..., A), one per action."""
        ends = np.cumsum([len(action.names) for action in self.actions.values()])[:-1]
        return dict(zip(self.actions, np.split(values, ends, axis=-1), strict=True))

    @property
    def chunk_step_ns(self) -> int:
        """Time between two rows of a chunk, nanoseconds."""
        step_s = next(iter(self.actions.values())).step_s
        return self.step_ns if step_s is None else round(NANOSECONDS * step_s)

    @property
    def step_ns(self) -> int:
        """Control period, nanoseconds."""
        return round(NANOSECONDS / self.rate_hz)

    def stream(self, name: str) -> Stream:
        """The observation ``name``; the error lists those that exist."""
        if name not in self.observations:
            raise ContractError(
                f"contract {self.name!r} has no observation {name!r}; choices: {choices(self.observations)}"
            )
        return self.observations[name]

    def check_same(self, other: RobotContract, here: str, there: str) -> None:
        """Raise unless ``other`` differs in nothing but topics, further sensors and what the safety stage enforces.

        ``here`` and ``there`` name the two sides. A robot may have sensors that a policy has never seen: nobody reads
        them. Limits may be tightened without training anew: they do not change what a number means.
        """
        mine, theirs = _without_topics(self), _without_topics(other)
        theirs["observations"] = {k: v for k, v in theirs["observations"].items() if k in mine["observations"]}
        difference = _first_difference(mine, theirs, "")
        if difference:
            path, a, b = difference
            raise ContractError(
                f"the contracts disagree at {path}: {here} has {a!r}, {there} has {b!r}; "
                "a robot's file may only change topics, safety and limits, so retrain or use the matching contract"
            )

    def with_topics_of(self, other: RobotContract) -> RobotContract:
        """This contract with the topics, safety and limits of ``other``, of which :meth:`check_same` says nothing.

        What a further sensor of ``other`` is to its safety stage is that stage's own affair, which reads ``other``.
        """
        observations = {
            name: dataclasses.replace(stream, topic=other.stream(name).topic)
            for name, stream in self.observations.items()
        }
        actions = {
            name: dataclasses.replace(action, topic=other.actions[name].topic, limits=other.actions[name].limits)
            for name, action in self.actions.items()
        }
        safety = other.safety
        if safety.sensors is not None:
            ours = tuple(name for name in safety.sensors if name in observations)
            safety = dataclasses.replace(safety, sensors=ours)
        return dataclasses.replace(
            self, observations=observations, actions=actions, safety=safety, following=other.following
        )

    def to_yaml(self) -> str:
        """YAML text that :meth:`from_yaml` reads back equal."""
        return yaml.safe_dump(to_dict(self), sort_keys=False, width=120)

    @classmethod
    def from_yaml(cls, text: str, source: str = "contract") -> RobotContract:
        """Parse YAML text; ``source`` names it in errors."""
        try:
            return from_dict(cls, yaml.safe_load(text))
        except (ConfigError, yaml.YAMLError) as error:
            raise ContractError(f"{source}: {' '.join(str(error).split())}") from None

    @classmethod
    def load(cls, name: Path | str) -> RobotContract:
        """Read a contract by file name, or by the name of one in ``config/robots``."""
        path: Path | None = None
        try:
            path = config_file(name, "config/robots", "contract")
            return from_dict(cls, load_yaml(path))
        except ConfigError as error:
            message = str(error)
            if path is None:
                raise ContractError(message) from None
            raise ContractError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def _without_topics(contract: RobotContract) -> dict[str, Any]:
    data: dict[str, Any] = to_dict(contract)
    data.pop("description")
    data.pop("safety")
    data.pop("following")  # how a trajectory is followed does not change what it means
    for action in data["actions"].values():
        action.pop("topic")
        action.pop("limits")
    for stream in data["observations"].values():
        stream.pop("topic")
    return data


def _first_difference(a: Any, b: Any, path: str) -> tuple[str, Any, Any] | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            place = f"{path}.{key}" if path else str(key)
            if key not in a or key not in b:
                return place, a.get(key, "nothing"), b.get(key, "nothing")
            difference = _first_difference(a[key], b[key], place)
            if difference:
                return difference
        return None
    return None if a == b else (path, a, b)
