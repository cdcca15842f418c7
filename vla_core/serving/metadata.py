"""What a policy server tells of its policy on connect, and how a robot reads it."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from typing import Any

from vla_core.config import from_dict, to_dict
from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.model.inputs import Remembers
from vla_core.observation.setup_check import mounts_of
from vla_core.observation.spec import ObservationSpec
from vla_core.runtime.execution import Execution
from vla_core.runtime.policy import Policy
from vla_core.serving.own_form import OWN, PROTOCOL


@dataclass(frozen=True, kw_only=True)
class RemoteHead:
    """What is known of the head that makes the chunks: its type, and whether it can be guided."""

    type: str = "remote"
    guidable: bool = False


@dataclass(frozen=True, kw_only=True)
class RemoteModel:
    """What is known of the model: the mounts by which it places what it sees."""

    mounts: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Description:
    """All that a robot must know of a policy to run it; ``contract`` is its YAML."""

    contract: str
    observation: ObservationSpec
    execution: Execution
    horizon: int
    head: RemoteHead = field(default_factory=RemoteHead)
    model: RemoteModel = field(default_factory=RemoteModel)
    remembers: Remembers = "everything"
    action_names: tuple[str, ...] = ()
    action_units: tuple[str, ...] = ()
    fingerprint: str = ""
    version: str = ""


def describe(policy: Policy) -> dict[str, Any]:
    """The metadata of a policy, plain data."""
    head, contract = policy.head, policy.contract
    mounts = {name: tuple(map(float, pose)) for name, pose in mounts_of(policy.spec, policy.model).items()}
    description = Description(
        contract=contract.to_yaml(), observation=policy.spec, execution=policy.execution, horizon=policy.horizon,
        head=RemoteHead(type=str(getattr(head, "type", "remote")), guidable=bool(getattr(head, "guidable", False))),
        model=RemoteModel(mounts=mounts), remembers=policy.remembers, action_names=contract.action_names,
        action_units=contract.action_units, fingerprint=policy.fingerprint, version=_version(),
    )  # fmt: skip
    return {OWN: PROTOCOL, **to_dict(description)}


def read(content: Any, server: str) -> tuple[Description, RobotContract]:
    """The description that ``server`` sent; raises :class:`VlaError` for what is none."""
    if not isinstance(content, dict) or OWN not in content:
        raise VlaError(f"{server}: no vla_ros server, its metadata names no contract; describe it in a YAML file with "
                       "contract, observation, horizon and keys, and name that file instead")  # fmt: skip
    if content[OWN] != PROTOCOL:
        raise VlaError(f"{server}: speaks version {content[OWN]} of the protocol, expected {PROTOCOL}; use the same "
                       "version of vla_ros here and there")  # fmt: skip
    plain = {key: value for key, value in content.items() if key != OWN}
    description = from_dict(Description, plain, server)
    return description, RobotContract.from_yaml(description.contract, server)


def _version() -> str:
    try:
        return importlib.metadata.version("vla_ros")
    except importlib.metadata.PackageNotFoundError:
        return ""
