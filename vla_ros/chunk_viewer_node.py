"""Shows what a policy plans: every chunk as ``visualization_msgs/MarkerArray`` and ``nav_msgs/Path``.

Which entries of the action are coordinates: those named x, y (and z) of a trajectory, or the axes of the contract's
workspace. Positions are shown as they are; velocities are integrated from where the workspace's stream saw the robot.
A contract with neither has nothing to show in space, and this node says so at start.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from geometry_msgs.msg import Point, PoseStamped
from nav_msgs.msg import Path
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.time import Time
from std_msgs.msg import ColorRGBA
from visualization_msgs.msg import Marker, MarkerArray

from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.errors import VlaError
from vla_core.observation.decode import decode
from vla_ros import process
from vla_ros.bridge import CHUNK_TOPIC, COMMAND_QOS, subscribe_stream
from vla_ros.msg import ActionChunk
from vla_ros.parameters import contract_of, declare, value

WIDTH_M = 0.01
AXES = ("x", "y", "z")


@dataclass(frozen=True)
class Track:
    """Where the coordinates of a chunk come from.

    ``columns``  per axis x, y, z the column of the action vector; None is 0
    ``velocity`` whether they are velocities, to be integrated
    ``stream``   the observation that holds the position, with the entry of each axis; None when there is none
    """

    columns: tuple[int | None, ...]
    velocity: bool
    stream: str | None
    entries: tuple[int | None, ...]
    frame_id: str


def find_track(contract: RobotContract) -> Track:
    """The coordinates in a contract's actions; raises :class:`VlaError` when it has none."""
    names = contract.action_names
    for action in contract.actions.values():
        if action.kind == "position" and {"x", "y"} <= set(action.names):
            columns = tuple(names.index(axis) if axis in action.names else None for axis in AXES)
            return Track(columns, False, None, (None,) * 3, action.frame_id)
    workspace = contract.safety.workspace
    if workspace is None or len(workspace.axes) not in (2, 3):
        raise VlaError(
            f"contract {contract.name!r} has no action named x and y, and no safety.workspace of two or three axes: "
            "its chunks cannot be drawn in space"
        )
    seen = contract.observations[workspace.stream]
    padding = (None,) * (3 - len(workspace.axes))
    first = workspace.axes[0].action
    action = next(action for action in contract.actions.values() if first in action.names)
    return Track(
        columns=(*(names.index(axis.action) for axis in workspace.axes), *padding),
        velocity=action.kind == "velocity",
        stream=workspace.stream,
        entries=(*(seen.names.index(axis.position) for axis in workspace.axes), *padding),
        frame_id=action.frame_id or seen.frame_id or "",
    )


def points(track: Track, actions: np.ndarray, step_s: float, origin: np.ndarray | None) -> np.ndarray:
    """Positions (H, 3) in m of the rows of ``actions`` (H, A).

    ``origin`` (3,) is where the robot was, for velocities: row k is where it is after k + 1 steps.
    """
    rows = np.stack([np.zeros(len(actions)) if c is None else actions[:, c] for c in track.columns], axis=1)
    if not track.velocity:
        return rows
    start = np.zeros(3) if origin is None else origin
    return start + step_s * np.cumsum(rows, axis=0)


class ChunkViewerNode(Node):
    """See the module; parameters are declared in ``__init__``."""

    def __init__(self, **options: Any) -> None:
        super().__init__("chunk_viewer", **options)
        declare(self, "contract", "", "the robot's contract: a name in config/robots, or a file")
        declare(self, "checkpoint", "", "folder of a trained policy, whose contract is taken when there is no other")
        declare(self, "keep", 3, "chunks shown at once; older ones are paler", low=1, high=50)
        declare(self, "lifetime_s", 2.0, "how long a chunk is shown, s", low=0.05, high=60.0)
        self.contract = contract_of(self)
        self.track = find_track(self.contract)
        self._origin: np.ndarray | None = None
        self._shown: list[Marker] = []
        self._markers = self.create_publisher(MarkerArray, f"{CHUNK_TOPIC}/markers", 5)
        self._path = self.create_publisher(Path, f"{CHUNK_TOPIC}/path", 5)
        if self.track.stream is not None:
            subscribe_stream(self, self.contract.observations[self.track.stream], self._on_position, depth=1)
        self.create_subscription(ActionChunk, CHUNK_TOPIC, self._on_chunk, COMMAND_QOS)

    def stop(self) -> None:
        """Nothing is open."""

    def _on_position(self, data: bytes) -> None:
        assert self.track.stream is not None
        try:
            values = np.asarray(decode(self.contract.observations[self.track.stream], data), dtype=np.float64)
        except VlaError as error:
            self.get_logger().warning(str(error), throttle_duration_sec=5.0)
            return
        self._origin = np.array([0.0 if entry is None else values[entry] for entry in self.track.entries])

    def _on_chunk(self, chunk: ActionChunk) -> None:
        if self.track.velocity and self._origin is None:
            return  # the robot has not been seen yet: nowhere to begin
        names = list(chunk.names)  # in the policy's order, which need not be that of the robot's own file
        absent = [name for name in self.contract.action_names if name not in names]
        if absent or len(chunk.actions) != chunk.horizon * len(names):
            self.get_logger().warning(
                f"{CHUNK_TOPIC}: {len(chunk.actions)} numbers in {chunk.horizon} rows of {names}, expected rows of "
                f"{list(self.contract.action_names)}; not drawn", throttle_duration_sec=5.0)  # fmt: skip
            return
        columns = [names.index(name) for name in self.contract.action_names]
        actions = np.reshape(chunk.actions, (chunk.horizon, len(names)))[:, columns]
        step_ns = chunk.step.sec * NANOSECONDS + chunk.step.nanosec
        shown = points(self.track, actions, step_ns / NANOSECONDS, self._origin)
        self._path.publish(self._as_path(chunk, shown, step_ns))
        self._markers.publish(self._as_markers(chunk, shown))

    def _as_path(self, chunk: ActionChunk, shown: np.ndarray, step_ns: int) -> Path:
        path = Path()
        path.header.stamp, path.header.frame_id = chunk.observation_stamp, self.track.frame_id
        start_ns = Time.from_msg(chunk.observation_stamp).nanoseconds
        for k, (x, y, z) in enumerate(shown):
            pose = PoseStamped()
            pose.header.stamp = Time(nanoseconds=start_ns + k * step_ns).to_msg()
            pose.header.frame_id = self.track.frame_id
            pose.pose.position = Point(x=float(x), y=float(y), z=float(z))
            path.poses.append(pose)
        return path

    def _as_markers(self, chunk: ActionChunk, shown: np.ndarray) -> MarkerArray:
        """The newest chunk and the paling ones before it, as line strips; numbers are reused, so that none piles up."""
        keep = value(self, "keep")
        marker = Marker(type=Marker.LINE_STRIP, action=Marker.ADD, ns=CHUNK_TOPIC)
        marker.header.stamp, marker.header.frame_id = chunk.observation_stamp, self.track.frame_id
        marker.scale.x = WIDTH_M
        marker.pose.orientation.w = 1.0
        marker.lifetime = Duration(seconds=value(self, "lifetime_s")).to_msg()
        marker.points = [Point(x=float(x), y=float(y), z=float(z)) for x, y, z in shown]
        self._shown = [marker, *self._shown][:keep]
        for age, one in enumerate(self._shown):
            one.id = age
            one.color = ColorRGBA(r=0.1, g=0.6, b=1.0, a=1.0 - age / keep)
        return MarkerArray(markers=self._shown)


def main() -> int:
    """Entry point of ``chunk_viewer_node``."""
    return process.main(ChunkViewerNode)


if __name__ == "__main__":
    sys.exit(main())
