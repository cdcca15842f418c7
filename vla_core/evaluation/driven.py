"""Recorded drives: where the vehicle and all around it were, by a bag's ground truth, and plans held against it.

Legend: N ticks, H waypoints, K instants, U road users, M sightings of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.data import bag as bags
from vla_core.data.bag import BagError
from vla_core.data.episodes import EPISODE_TOPIC, EPISODE_TYPE
from vla_core.evaluation.open_loop import Replay
from vla_core.evaluation.planning import Footprint, Plans, hits, into_frame, out_of_frame, steady
from vla_core.observation.messages import MessageError, deserialize
from vla_core.sim.driving.layout import HEIGHT_M, LENGTH_M, REAR_OVERHANG_M, WIDTH_M, Solid

ODOMETRY_TOPIC, ODOMETRY_TYPE = "ground_truth/odom", "nav_msgs/msg/Odometry"
OBJECTS_TOPIC, OBJECTS_TYPE = "ground_truth/objects", "visualization_msgs/msg/MarkerArray"
CUBE, ADD = 1, 0  # visualization_msgs/Marker: a road user is a box; other markers are for people
EGO = Footprint(length_m=LENGTH_M, width_m=WIDTH_M, rear_m=REAR_OVERHANG_M)
SEEN_NS = 3 * NANOSECONDS // 10  # how long before its first and after its last sighting a road user is believed to be


@dataclass(frozen=True, eq=False)
class Track:
    """A road user: ``kind``, ``size`` (length, width, height) in m, and its poses (M, 3) at ``stamps_ns`` (M,)."""

    kind: str
    size: tuple[float, float, float]
    stamps_ns: np.ndarray
    poses: np.ndarray

    def boxes(self, times_ns: np.ndarray) -> np.ndarray:
        """Its boxes (K, 5) at ``times_ns`` (K,), NaN where it was not seen."""
        there = (times_ns >= self.stamps_ns[0] - SEEN_NS) & (times_ns <= self.stamps_ns[-1] + SEEN_NS)
        found = np.empty((len(times_ns), 5))
        found[:, :3] = np.where(there[:, None], _interpolated(times_ns, self.stamps_ns, self.poses), np.nan)
        found[:, 3:] = self.size[:2]
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Drive:
    """One recorded drive.

    ``poses`` (N, 3) of the vehicle in the world and ``twists`` (N, 2), its speed in m/s and yaw rate in rad/s, at
    ``stamps_ns`` (N,); ``world`` and ``seed`` as the episode's mark has them.
    """

    path: Path
    world: str
    seed: int
    stamps_ns: np.ndarray
    poses: np.ndarray
    twists: np.ndarray
    users: tuple[Track, ...]

    def pose(self, times_ns: np.ndarray) -> np.ndarray:
        """The vehicle's poses (K, 3) at ``times_ns`` (K,), NaN outside the recording."""
        there = (times_ns >= self.stamps_ns[0]) & (times_ns <= self.stamps_ns[-1])
        return np.where(there[:, None], _interpolated(times_ns, self.stamps_ns, self.poses), np.nan)

    def boxes(self, times_ns: np.ndarray) -> np.ndarray:
        """Boxes (K, U, 5) of all road users at ``times_ns`` (K,), NaN where one was not seen."""
        if not self.users:
            return np.empty((len(times_ns), 0, 5))
        return np.stack([user.boxes(times_ns) for user in self.users], axis=1)


def read_drive(path: Path) -> Drive:
    """Read a bag's ground truth; raises :class:`BagError` where it has none."""
    with bags.opened(path) as bag:
        bags.require_topics(bag.info, {ODOMETRY_TOPIC: ODOMETRY_TYPE, OBJECTS_TOPIC: OBJECTS_TYPE})
        own: list[tuple[int, list[float]]] = []
        seen: dict[tuple[str, int], list[tuple[int, Any]]] = {}
        world, seed = "", -1
        try:
            with closing(bag.read({ODOMETRY_TOPIC, OBJECTS_TOPIC, EPISODE_TOPIC})) as messages:
                for message in messages:
                    if message.topic == ODOMETRY_TOPIC:
                        own.append((message.stamp_ns, _motion(deserialize(ODOMETRY_TYPE, message.data))))
                    elif message.topic == EPISODE_TOPIC:
                        mark = deserialize(EPISODE_TYPE, message.data)
                        world, seed = str(mark.task), int(mark.seed)
                    else:
                        for marker in deserialize(OBJECTS_TYPE, message.data).markers:
                            if marker.type == CUBE and marker.action == ADD:
                                seen.setdefault((marker.ns, marker.id), []).append((_stamp_ns(marker), marker))
        except MessageError as error:
            raise BagError(f"{path}: {error}") from None
    own.sort(key=lambda entry: entry[0])
    motion = np.array([values for _, values in own])
    motion[:, 2] = np.unwrap(motion[:, 2])
    return Drive(
        path=path, world=world, seed=seed, stamps_ns=np.array([stamp_ns for stamp_ns, _ in own]),
        poses=motion[:, :3], twists=motion[:, 3:], users=tuple(_track(kind, seen[kind, id]) for kind, id in seen),
    )  # fmt: skip


def plans(drive: Drive, replayed: Replay, contract: RobotContract, solids: np.ndarray | None = None) -> Plans:
    """Plans of a replay held against the drive; ``solids`` (S, 5) are boxes that always stand there."""
    planned = replayed.predicted[..., _columns(contract, drive.path)]
    return compared(drive, replayed.stamps_ns, planned, contract.chunk_step_ns, solids)


def labelled_plans(replayed: Replay, contract: RobotContract, path: Path) -> Plans:
    """Plans of a replay held against the recorded trajectories alone, where a bag has no ground truth.

    Those are what was driven in bags of recorded drives, and what was meant in bags of an expert. Nothing is hit, since
    nobody else is known.
    """
    columns, nothing = _columns(contract, path), np.zeros(replayed.known.shape, dtype=bool)
    return Plans(
        times_s=np.arange(replayed.predicted.shape[1]) * (contract.chunk_step_ns / NANOSECONDS),
        planned=replayed.predicted[..., columns], driven=replayed.recorded[..., columns], known=replayed.known,
        hit=nothing, driven_hit=nothing,
    )  # fmt: skip


def has_truth(path: Path) -> bool:
    """Whether a bag tells where the vehicle and all others really were."""
    return {ODOMETRY_TOPIC, OBJECTS_TOPIC} <= bags.info(path).topics.keys()


def _columns(contract: RobotContract, path: Path) -> list[int]:
    names = contract.action_names
    if not {"x", "y", "yaw"} <= set(names):
        raise BagError(f"{path}: contract {contract.name!r} has no trajectory to hold against the drive: expected x, y "
                       f"and yaw among its actions, found {', '.join(names)}")  # fmt: skip
    return [names.index(name) for name in ("x", "y", "yaw")]


def steady_plans(
    drive: Drive, stamps_ns: np.ndarray, rows: int, step_ns: int, solids: np.ndarray | None = None
) -> Plans:
    """What going on at the speed and yaw rate of each tick would give: the least that a plan must beat."""
    times_s = np.arange(rows) * (step_ns / NANOSECONDS)
    twists = _interpolated(stamps_ns, drive.stamps_ns, drive.twists)
    planned = np.stack([steady(speed, yaw_rate, times_s) for speed, yaw_rate in twists])
    return compared(drive, stamps_ns, planned, step_ns, solids)


def compared(
    drive: Drive, stamps_ns: np.ndarray, planned: np.ndarray, step_ns: int, solids: np.ndarray | None = None
) -> Plans:
    """Planned poses (N, H, 3), ``step_ns`` apart, in the vehicle's frame at ``stamps_ns`` (N,), against the drive."""
    count, rows = planned.shape[:2]
    times_ns = stamps_ns[:, None] + np.arange(rows) * step_ns  # (N, H)
    at = drive.pose(times_ns.ravel()).reshape(count, rows, 3)
    known = np.isfinite(at[..., 0]) & np.isfinite(at[:, :1, 0])
    start = drive.pose(stamps_ns)[:, None]
    users = drive.boxes(times_ns.ravel()).reshape(count, rows, -1, 5)
    if solids is not None and len(solids):
        users = np.concatenate([users, np.broadcast_to(solids, (count, rows, *solids.shape))], axis=2)
    return Plans(
        times_s=np.arange(rows) * (step_ns / NANOSECONDS), planned=planned,
        driven=np.where(known[..., None], into_frame(at, start), np.nan), known=known,
        hit=hits(EGO.boxes(out_of_frame(planned, start)), users), driven_hit=hits(EGO.boxes(at), users),
    )  # fmt: skip


def boxes_of(solids: Sequence[Solid]) -> np.ndarray:
    """Boxes (S, 5) of what stands in a vehicle's height; of a cylinder the box around it."""
    low = [solid for solid in solids if solid.position[2] - solid.size[2] / 2 < HEIGHT_M]
    return np.array([(*solid.position[:2], solid.heading, *solid.size[:2]) for solid in low]).reshape(-1, 5)


def _motion(message: Any) -> list[float]:
    pose, twist = message.pose.pose, message.twist.twist
    return [pose.position.x, pose.position.y, _heading(pose.orientation), twist.linear.x, twist.angular.z]


def _track(kind: str, seen: list[tuple[int, Any]]) -> Track:
    seen.sort(key=lambda entry: entry[0])
    poses = np.array([(m.pose.position.x, m.pose.position.y, _heading(m.pose.orientation)) for _, m in seen])
    poses[:, 2] = np.unwrap(poses[:, 2])
    scale = seen[0][1].scale
    return Track(kind, (scale.x, scale.y, scale.z), np.array([stamp_ns for stamp_ns, _ in seen]), poses)


def _heading(q: Any) -> float:
    """Yaw of a quaternion, rad."""
    return float(np.arctan2(2 * (q.w * q.z + q.x * q.y), 1 - 2 * (q.y * q.y + q.z * q.z)))


def _stamp_ns(marker: Any) -> int:
    return int(marker.header.stamp.sec) * NANOSECONDS + int(marker.header.stamp.nanosec)


def _interpolated(times_ns: np.ndarray, stamps_ns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``rows`` (N, C) at ``stamps_ns`` linearly between, (K, C); the ends hold."""
    first = stamps_ns[0]  # nanoseconds since 1970 do not fit into a float64
    times, stamps = (times_ns - first).astype(np.float64), (stamps_ns - first).astype(np.float64)
    return np.stack([np.interp(times, stamps, column) for column in rows.T], axis=-1)
