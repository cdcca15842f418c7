"""A recorded drive, and how it becomes a bag of a contract."""

from __future__ import annotations

import heapq
import os
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from vla_core.commands import encode
from vla_core.contract import Action, RobotContract
from vla_core.data.bag import CONTRACT_KEY, BagWriter
from vla_core.data.drives.driven import DrivenPath, spoken
from vla_core.data.recording import DROPPED_KEY
from vla_core.errors import VlaError, choices
from vla_core.observation import messages, writing

BASE, ODOM = "base_link", "odom"
INSTRUCTION, ODOMETRY = "instruction", "odom"
STATIC, TRANSFORMS = "/tf_static", "tf2_msgs/msg/TFMessage"
ROWS = 7  # of a trajectory: now, and 0.5 to 3 s ahead


class DriveError(VlaError):
    """A recording that is not in the layout that it should have, or does not fit a contract."""


class Drive(ABC):
    """One recorded drive. Streams have the names that the contract of its dataset gives them."""

    name: str

    @property
    @abstractmethod
    def path(self) -> DrivenPath:
        """Where ``base_link`` was."""

    @abstractmethod
    def frames(self) -> dict[str, np.ndarray]:
        """Poses (7,) of the sensors in ``base_link``, by stream: x, y, z and the quaternion x, y, z, w."""

    @abstractmethod
    def sensors(self) -> Iterator[tuple[str, int, bytes]]:
        """Stream, stamp (ns) and serialized message of all sensors, in the order of stamps."""


def cloud(stamp_ns: int, points: np.ndarray, names: tuple[str, ...], frame_id: str) -> bytes:
    """``sensor_msgs/PointCloud2`` of the columns ``names`` of ``points`` (N, C), float32."""
    columns = {name: points[:, k].astype(np.float32) for k, name in enumerate(names)}
    return writing.point_cloud(stamp_ns, columns, frame_id)


def write_bag(drive: Drive, contract: RobotContract, out: Path) -> Counter[str]:
    """The drive as a bag at ``out``; returns the messages by topic.

    Sensors that the contract does not name are left out. Beside them stand the odometry of the recorded poses, the
    trajectory that was driven from each of them on, what was to be said before it, and ``/tf_static``.
    """
    writer = _Writer(drive, contract)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        counts = writer.write(partial)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


class _Writer:
    def __init__(self, drive: Drive, contract: RobotContract) -> None:
        self._drive, self._contract = drive, contract
        actions = list(contract.actions.values())
        if len(actions) != 1 or actions[0].publish != "chunk" or set(actions[0].names) != {"x", "y", "yaw", "speed"}:
            raise DriveError(f"contract {contract.name!r}: expected one action, a trajectory of x, y, yaw and speed")
        self._action: Action = actions[0]

    @cached_property
    def _order(self) -> list[int]:
        return [("x", "y", "yaw", "speed").index(name) for name in self._action.names]

    def write(self, folder: Path) -> Counter[str]:
        contract, counts = self._contract, Counter[str]()
        first_ns = int(self._drive.path.stamps_ns[0])
        metadata = {CONTRACT_KEY: contract.to_yaml(), "task": self._drive.name, DROPPED_KEY: "{}"}
        with BagWriter(folder, metadata) as bag:
            bag.add_topic(STATIC, TRANSFORMS, latched=True)
            for stream in {s.topic: s for s in contract.observations.values()}.values():
                bag.add_topic(stream.topic, stream.type, stream.latched)
            bag.add_topic(self._action.topic, self._action.type)
            frames = {contract.stream(name).frame_id or name: place for name, place in self._drive.frames().items()
                      if name in contract.observations}  # fmt: skip
            bag.write(STATIC, first_ns, writing.transforms(first_ns, BASE, frames))
            for topic, stamp_ns, data in heapq.merge(self._seen(), self._driven(), key=lambda entry: entry[1]):
                bag.write(topic, stamp_ns, data)
                counts[topic] += 1
        absent = [name for name, s in contract.observations.items() if not counts[s.topic] and s.missing == "refuse"]
        if absent:
            raise DriveError(f"{self._drive.name}: the recording has no {choices(absent)}, which contract "
                             f"{contract.name!r} cannot do without")  # fmt: skip
        return counts

    def _seen(self) -> Iterator[tuple[str, int, bytes]]:
        for name, stamp_ns, data in self._drive.sensors():
            if name in self._contract.observations:
                yield self._contract.observations[name].topic, stamp_ns, data

    def _driven(self) -> Iterator[tuple[str, int, bytes]]:
        """Odometry, trajectory and instruction at each recorded pose."""
        path, contract, said = self._drive.path, self._contract, ""
        for stamp_ns, pose in zip(path.stamps_ns.tolist(), path.poses, strict=True):
            rows = path.trajectory(stamp_ns, ROWS, contract.chunk_step_ns)
            if rows is not None and INSTRUCTION in contract.observations and spoken(rows) != said:
                said = spoken(rows)
                yield contract.stream(INSTRUCTION).topic, stamp_ns, messages.text(said)
            if ODOMETRY in contract.observations:
                speed, turning = path.twist(stamp_ns)
                odometry = writing.odometry(stamp_ns, pose, (speed, 0.0, 0.0), (0.0, 0.0, turning), ODOM, BASE)
                yield contract.stream(ODOMETRY).topic, stamp_ns, odometry
            if rows is not None:
                yield self._action.topic, stamp_ns, encode(self._action, stamp_ns, rows[:, self._order],
                                                           contract.chunk_step_ns)  # fmt: skip


def write_bags(
    drives: list[Drive],
    contract: RobotContract,
    out: Path,
    progress: Callable[[int, str], None] = lambda done, name: None,
) -> list[Path]:
    """A bag per drive below ``out``; those that are there already are kept, so that it can be called again."""
    if not drives:
        raise DriveError("no drives found")
    bags = []
    for done, drive in enumerate(drives, 1):
        bag = out / drive.name
        if not (bag / "metadata.yaml").is_file():
            write_bag(drive, contract, bag)
        bags.append(bag)
        progress(done, drive.name)
    return bags
