"""The check of a live robot's sensors; what is checked is in ``vla_core/observation/setup_check.py``."""

from __future__ import annotations

import time
from typing import Any

from rclpy.node import Node

from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.observation.setup_check import (
    Mounts,
    Transforms,
    check,
    check_calibration,
    check_message,
    check_mount,
    connected,
    mounts_of,
)
from vla_core.observation.spec import ObservationSpec
from vla_ros.bridge import TF_STATIC_TOPIC, TF_TOPIC, subscribe_stream, subscribe_transforms, waiting

POLL_S = 0.02


class SensorSetup:
    """Checks the first message of every stream, and the transforms that come.

    ``faults`` holds what is wrong, a line for each; a policy does not act as long as there is one, and what is set up
    wrongly is not set up rightly by a later message.
    """

    def __init__(self, contract: RobotContract, spec: ObservationSpec, model: Any) -> None:
        self._contract, self._spec = contract, spec
        self.mounts: Mounts = mounts_of(spec, model)
        self._transforms = Transforms()
        self._firsts: dict[str, bytes] = {}
        self.faults: list[str] = []

    def message(self, name: str, data: bytes) -> list[str]:
        """Check a message if it is the first of its stream; returns what is wrong with it."""
        if name in self._firsts:
            return []
        self._firsts[name] = data
        found = check_message(self._contract, name, data)
        for image, info in self._spec.calibrations.items():
            if name in (image, info):
                found += check_calibration(self._contract, self._spec, image, self._firsts)
        if name in self.mounts:
            found += self._check_mount(name)
        return self._note(found)

    def transforms(self, data: bytes) -> list[str]:
        """Take a message of ``/tf_static``; returns which sensors it puts elsewhere than they were in training."""
        self._transforms.add(data)
        return self._note([line for name in self.mounts if name in self._firsts for line in self._check_mount(name)])

    def _check_mount(self, name: str) -> list[str]:
        """A transform may still be on its way: what is not connected is no fault here."""
        return check_mount(self._contract, self.mounts, name, self._firsts, self._transforms, required=False)

    def _note(self, lines: list[str]) -> list[str]:
        new = [line for line in lines if line not in self.faults]
        self.faults += new
        return new


def wait_for_sensors(node: Node, contract: RobotContract, spec: ObservationSpec, model: Any, timeout_s: float) -> None:
    """Wait until every stream has sent a message and every mount has its transform, at most ``timeout_s``; check them.

    Takes the messages without an executor, so that it may be called from a callback.

    Raises:
        VlaError: with a line for everything that is missing or wrong.
    """
    streams = {name: contract.stream(name) for name in spec.names if not contract.stream(name).latched}
    mounts, transforms, firsts = mounts_of(spec, model), Transforms(), dict[str, bytes]()
    held = {name: subscribe_stream(node, stream, _ignore) for name, stream in streams.items()}
    moved = [subscribe_transforms(node, topic, _ignore) for topic in (TF_STATIC_TOPIC, TF_TOPIC)] if mounts else []
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            for name, subscription in held.items():
                for data in waiting(subscription):
                    firsts.setdefault(name, data)
            for subscription in moved:
                for data in waiting(subscription):
                    transforms.add(data)
            whole = len(firsts) == len(streams) and connected(contract, mounts, firsts, transforms)
            if whole or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
    finally:
        for subscription in (*held.values(), *moved):
            node.destroy_subscription(subscription)
    lines = check(contract, spec, mounts, firsts, transforms)
    if lines:
        raise VlaError("the sensors are not as the policy needs them:\n" + "\n".join(lines))


def _ignore(data: bytes) -> None:
    raise AssertionError("messages are taken before an executor could")
