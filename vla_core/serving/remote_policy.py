"""A policy that runs on a server: the robot's side of it."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.config import ConfigError, from_dict, load_yaml
from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.observation.builder import Observation, ObservationSpec
from vla_core.runtime.chunk import ActionChunk, Continuation
from vla_core.runtime.execution import Execution
from vla_core.runtime.policy import Policy, PolicyError
from vla_core.serving import metadata, wire
from vla_core.serving.client import CHANGED, PolicyServerLost, ServerClient
from vla_core.serving.extra import need
from vla_core.serving.fields import Fields, MessageFormError
from vla_core.serving.openpi_form import OpenpiForm
from vla_core.serving.own_form import OwnForm
from vla_core.serving.secret import TOKEN_VARIABLE, read_token

SCHEMES = ("ws://", "wss://")
TIMING = {"ms": "server_timing/infer_ms", "queue_ms": "server_timing/queue_ms", "model_ms": "policy_timing/infer_ms"}


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A server, and what it does not say itself; times in seconds.

    An answer may take ``timeout_s``; the first connection, with the server's warm-up, ``connect_s``. ``token_file``
    holds the server's token; without one, the file that the variable VLA_TOKEN_FILE names.

    A server of vla_ros tells everything else. Of any other one that speaks openpi's protocol it is said here:
    ``contract`` (a name in config/robots, or a file), ``observation``, ``execution``, ``horizon``, and ``keys``, the
    server's key for each picture, for the ``state`` or its streams, and for the ``prompt``.
    """

    server: str
    timeout_s: float = 2.0
    connect_s: float = 30.0
    token_file: str | None = None
    max_message_mb: int = 32
    contract: str | None = None
    observation: ObservationSpec | None = None
    execution: Execution = field(default_factory=Execution)
    horizon: int | None = None
    keys: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.server.startswith(SCHEMES):
            raise ConfigError(f"server: expected ws://HOST:PORT or wss://HOST:PORT, found {self.server!r}")
        for name in ("timeout_s", "connect_s", "max_message_mb"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: expected a positive number, found {getattr(self, name)}")
        told = {"contract": self.contract, "observation": self.observation, "horizon": self.horizon}
        missing = [name for name, value in told.items() if value is None]
        if missing and (len(missing) < len(told) or self.keys):
            raise ConfigError(f"{', '.join(missing)}: missing; a server that is not vla_ros's is described by "
                              "contract, observation, horizon and keys, vla_ros's own by none of them")  # fmt: skip

    @classmethod
    def load(cls, path: Path | str) -> Remote:
        """Read a YAML file."""
        try:
            return from_dict(cls, load_yaml(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


class RemotePolicy(Policy):
    """Asks a server for each chunk.

    ``predict`` raises :class:`PolicyServerLost` after ``timeout_s`` at the latest, and at once while there is no
    connection, which is made anew in the background. A server that comes back with another policy is not asked again.
    """

    def __init__(self, remote: Remote) -> None:
        need("websockets", "msgpack")
        self._remote = remote
        self._description: metadata.Description | None = None
        self._own: OwnForm | None = None
        self._openpi: OpenpiForm | None = None
        self._timing: dict[str, float | int | str | None] = {}
        self.source = remote.server
        if remote.contract is not None:
            self._describe_other(remote, remote.contract)
        token = read_token(remote.token_file or os.environ.get(TOKEN_VARIABLE) or None)
        self._client = ServerClient(
            remote.server, token=token, accept=self._accept, max_bytes=remote.max_message_mb * 2**20
        )
        try:
            if not self._client.wait(remote.connect_s):
                raise PolicyServerLost(f"{self._client.fault} (waited at most {remote.connect_s:g} s)")
        except BaseException:
            self._client.close()
            raise

    @property
    def fault(self) -> str:
        """Why the server cannot be asked; empty while it can."""
        return self._client.fault

    def predict(self, observation: Observation, continues: Continuation | None = None) -> ActionChunk:
        try:
            answer = self._client.ask(self._question(observation, continues), self._remote.timeout_s)
            if isinstance(answer, str):
                raise PolicyError(f"{self.source}: {' '.join(answer.split())}")
            actions = self._read(wire.unpack(answer, wire.Limits(bytes=len(answer))), observation)
        except (MessageFormError, wire.WireError) as error:
            raise PolicyError(f"{self.source}: {error}") from None
        return ActionChunk(observation.stamp_ns, self.contract.chunk_step_ns, actions, continues)

    def report(self) -> dict[str, float | int | str | None]:
        """Of the newest answer: how long the server had it, and the model; where the server says so."""
        return self._timing

    def close(self) -> None:
        self._client.close()

    def _question(self, observation: Observation, continues: Continuation | None) -> bytes:
        if self._own is not None:
            return wire.pack(self._own.write(observation, continues))
        assert self._openpi is not None, "one of the two forms is there"
        if continues is not None:
            raise PolicyError(f"{self.source}: openpi's protocol has no plan to continue; expected another strategy")
        return wire.pack(self._openpi.write(observation))

    def _read(self, content: Any, observation: Observation) -> np.ndarray:
        """The actions (H, A) float64 of an answer."""
        fields = Fields(content)
        width = len(self.contract.action_names)
        actions = fields.array("actions", ("float32", "float64"), (self.horizon, width)).astype(np.float64)
        if self._own is not None and fields.take("stamp_ns") != observation.stamp_ns:
            raise PolicyError(f"{self.source}: answered another observation than the one of {observation.stamp_ns}")
        found = {f"server {name}": fields.take(key) for name, key in TIMING.items() if key in fields}
        self._timing = {name: value for name, value in found.items() if isinstance(value, float | int)}
        if not np.isfinite(actions).all():
            raise PolicyError(f"{self.source}: the policy predicted a non-finite action")
        return actions

    def _accept(self, content: Any) -> None:
        """Take the metadata of a connection; what was told first must stay as it is."""
        if self._openpi is not None:
            return
        description, contract = metadata.read(content, self.source)
        known, description = self._description, dataclasses.replace(description, version="")
        if known is None:
            self._description = description
            self.contract, self.spec, self.execution = contract, description.observation, description.execution
            self.horizon, self.head, self.model = description.horizon, description.head, description.model
            self.remembers, self.fingerprint = description.remembers, description.fingerprint
            self._own = OwnForm(contract, self.spec, self.horizon, self.remembers)
        elif known != description:
            raise VlaError(f"{CHANGED}: {self.source}: runs the policy {description.fingerprint}, expected "
                           f"{known.fingerprint}; configure again to take it")  # fmt: skip

    def _describe_other(self, remote: Remote, contract: str) -> None:
        assert remote.observation is not None and remote.horizon is not None, "checked with the contract"
        self.contract, self.spec = RobotContract.load(contract), remote.observation
        self.execution, self.horizon = remote.execution, remote.horizon
        self.head, self.model = metadata.RemoteHead(), metadata.RemoteModel()
        self.execution.check(self.horizon, self.head)
        self._openpi = OpenpiForm(self.contract, self.spec, remote.keys)
        if self._openpi.refusal:
            raise ConfigError(f"observation: {self._openpi.refusal}")
