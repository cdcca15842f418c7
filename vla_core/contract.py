"""RobotContract: one YAML binds topics to named observations and actions, with units, rates, ages and limits.

The contract is written into every bag, dataset and checkpoint. A robot's own file may only remap topics: whatever
else differs from the contract that a policy was trained with is refused (:meth:`RobotContract.check_same`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vla_core.config import ConfigError, from_dict, load_yaml, to_dict
from vla_core.errors import VlaError, choices
from vla_core.resources import share

NANOSECONDS = 1_000_000_000


class ContractError(VlaError):
    """Two contracts that disagree, or a stream that a contract does not have."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One observation of the robot: where it comes from and how old it may be.

    ``type`` is a ROS type name such as ``sensor_msgs/msg/JointState``; ``names`` are the entries taken from the
    message, in this order, from its array ``field``. ``rate_hz`` is the rate that the sensor is expected to keep.
    A ``latched`` stream (an instruction) has no rate: its newest value holds until replaced. ``best_effort`` also
    receives from reliable publishers; ``reliable`` asks for every message and refuses best-effort publishers.
    """

    topic: str
    type: str
    rate_hz: float | None = None
    max_age_s: float | None = None
    latched: bool = False
    reliability: Literal["best_effort", "reliable"] = "best_effort"
    frame_id: str | None = None
    field: str | None = None
    names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.latched and (self.rate_hz is None or self.max_age_s is None):
            raise ConfigError("rate_hz: a stream that is not latched needs rate_hz and max_age_s")
        if self.rate_hz is not None and not 0 < self.rate_hz < float("inf"):
            raise ConfigError(f"rate_hz: expected a positive rate, found {self.rate_hz}")
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


@dataclass(frozen=True, kw_only=True)
class Action:
    """The robot's command: one message per control step, entries ``names`` in its array ``field``.

    ``safe`` says per entry what a fault leads to: ``zero`` sends 0 (the stop of a velocity), ``hold`` repeats the
    last command (a grip that must not open).
    """

    topic: str
    type: str
    field: str
    names: tuple[str, ...]
    units: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    safe: tuple[Literal["zero", "hold"], ...]
    frame_id: str = ""

    def __post_init__(self) -> None:
        for key in ("units", "low", "high", "safe"):
            if len(getattr(self, key)) != len(self.names):
                raise ConfigError(
                    f"{key}: expected {len(self.names)} values, one per name, found {len(getattr(self, key))}"
                )
        for name, low, high in zip(self.names, self.low, self.high, strict=True):
            if not low < high:
                raise ConfigError(f"low: {name} has low {low} and high {high}; low must be below high")


@dataclass(frozen=True, kw_only=True)
class RobotContract:
    """What a robot offers and obeys. All times derived from it are integer nanoseconds."""

    name: str
    rate_hz: float
    observations: dict[str, Stream]
    action: Action
    description: str = field(default="")

    def __post_init__(self) -> None:
        if not 0 < self.rate_hz < float("inf"):
            raise ConfigError(f"rate_hz: expected a positive rate, found {self.rate_hz}")

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
        """Raise unless ``other`` differs in nothing but topics; ``here`` and ``there`` name the two sides."""
        mine, theirs = _without_topics(self), _without_topics(other)
        difference = _first_difference(mine, theirs, "")
        if difference:
            path, a, b = difference
            raise ContractError(
                f"the contracts disagree at {path}: {here} has {a!r}, {there} has {b!r}; "
                "a robot's file may only change topics, so retrain or use the matching contract"
            )

    def with_topics_of(self, other: RobotContract) -> RobotContract:
        """This contract with the topics of ``other``, which must be the same otherwise."""
        observations = {
            name: dataclasses.replace(stream, topic=other.stream(name).topic)
            for name, stream in self.observations.items()
        }
        action = dataclasses.replace(self.action, topic=other.action.topic)
        return dataclasses.replace(self, observations=observations, action=action)

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
        path = Path(name)
        if not path.is_file():
            folder = share("config/robots")
            path = folder / f"{name}.yaml"
            if not path.is_file():
                known = choices(p.stem for p in folder.glob("*.yaml"))
                raise ContractError(f"no contract {str(name)!r}; choices: {known}, or the path of a YAML file")
        try:
            return from_dict(cls, load_yaml(path))
        except ConfigError as error:
            message = str(error)
            raise ContractError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def _without_topics(contract: RobotContract) -> dict[str, Any]:
    data: dict[str, Any] = to_dict(contract)
    data.pop("description")
    data["action"].pop("topic")
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
