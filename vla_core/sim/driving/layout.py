"""What a driving world is made of, as data: lanes, lights, surfaces, solids, road users and routes.

The map frame is REP 103's: x east, y north, z up, in m; headings in rad, counterclockwise from x. Stations ``s`` are m
along a lane or a route. Times are s since the episode's start.

Legend: N points of a line, (H, W) cells of a raster.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import numpy as np

Turn = Literal["none", "straight", "left", "right", "roundabout"]
RoadUserKind = Literal["car", "bus", "truck", "pedestrian", "cyclist"]
LightColour = Literal["green", "yellow", "red"]


class Surface(IntEnum):
    """What the ground is; a raster's cells."""

    GRASS = 0
    ROAD = 1
    MARKING = 2
    SIDEWALK = 3
    CROSSWALK = 4
    STOP_LINE = 5


DRIVABLE = (Surface.ROAD, Surface.MARKING, Surface.CROSSWALK, Surface.STOP_LINE)


@dataclass(frozen=True, eq=False, kw_only=True)
class Lane:
    """One lane, in its direction of travel.

    ``centre`` (N, 3) float64: x, y, heading, at most 0.5 m apart; ``turn`` is "none" outside junctions. ``left`` and
    ``right`` are neighbours of the same direction, ``opposite`` the oncoming lane beside it, which overtaking uses.
    ``light`` is the index of the traffic light that governs the lane's end, where its stop line is.
    """

    id: int
    centre: np.ndarray
    width_m: float
    speed_mps: float
    successors: tuple[int, ...] = ()
    turn: Turn = "none"
    left: int | None = None
    right: int | None = None
    opposite: int | None = None
    light: int | None = None
    junction: int | None = None


@dataclass(frozen=True, kw_only=True)
class Light:
    """A traffic light: a board at ``position`` (x, y, z) whose face points along ``heading``, against the traffic.

    The stop line is at ``stop`` (x, y, heading of travel), ``width_m`` wide. The cycle starts ``offset_s`` in: green,
    yellow, then red.
    """

    position: tuple[float, float, float]
    heading: float
    stop: tuple[float, float, float]
    width_m: float
    green_s: float
    yellow_s: float
    red_s: float
    offset_s: float

    def colour(self, time_s: float) -> LightColour:
        """What it shows at a time of the episode."""
        phase = (time_s + self.offset_s) % (self.green_s + self.yellow_s + self.red_s)
        if phase < self.green_s:
            return "green"
        return "yellow" if phase < self.green_s + self.yellow_s else "red"


@dataclass(frozen=True, kw_only=True)
class Solid:
    """A box or an upright cylinder that stands still.

    ``position`` is its middle, ``size`` length, width and height in m (a cylinder's length is its diameter).
    """

    kind: Literal["building", "trunk", "crown", "pole", "barrier", "kerb"]
    position: tuple[float, float, float]
    heading: float
    size: tuple[float, float, float]
    colour: tuple[float, float, float]
    shape: Literal["box", "cylinder"] = "box"


@dataclass(frozen=True, eq=False, kw_only=True)
class Raster:
    """The ground seen from above: ``cells`` (H, W) uint8 of :class:`Surface`.

    Row r, column c covers y from ``origin[1]`` + r * ``resolution_m`` and x from ``origin[0]`` + c * ``resolution_m``.
    Outside is grass.
    """

    cells: np.ndarray
    origin: tuple[float, float]
    resolution_m: float

    def at(self, xy: np.ndarray) -> np.ndarray:
        """The surfaces (...) uint8 at points (..., 2)."""
        index = np.floor((np.asarray(xy, dtype=np.float64) - self.origin) / self.resolution_m).astype(np.int64)
        column, row = index[..., 0], index[..., 1]
        height, width = self.cells.shape
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        found = self.cells[np.where(inside, row, 0), np.where(inside, column, 0)]
        return np.where(inside, found, np.uint8(Surface.GRASS))


@dataclass(frozen=True, eq=False, kw_only=True)
class Town:
    """A map."""

    lanes: dict[int, Lane]
    ground: Raster
    lights: tuple[Light, ...]
    solids: tuple[Solid, ...]


@dataclass(frozen=True, kw_only=True)
class Spawn:
    """A road user at the start, and what it will do.

    A vehicle follows ``path`` (lane ids) from station ``s`` of the first one, at up to ``speed_mps``; 0 stands still,
    ``offset_m`` to the left of the centre. From ``stop_at_s`` on the path it stands (a bus at its stop). A pedestrian
    walks from ``walk[0]`` to ``walk[1]`` (x, y), when the ego vehicle is ``trigger_m`` away from the line.
    """

    kind: RoadUserKind
    size: tuple[float, float, float]
    colour: tuple[float, float, float]
    path: tuple[int, ...] = ()
    s: float = 0.0
    speed_mps: float = 0.0
    offset_m: float = 0.0
    stop_at_s: float | None = None
    walk: tuple[tuple[float, float], tuple[float, float]] | None = None
    trigger_m: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """What is said from station ``from_s`` of the route on."""

    from_s: float
    text: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Route:
    """Where the vehicle shall go.

    ``path`` (N, 4) float64: x, y, heading, speed limit in m/s, 0.5 m apart, from the start to the goal; it stays in the
    lane (what stands in the way is passed by the driver). ``instructions`` say it in words, in order. The episode
    succeeds where ``path`` ends, at a stand where ``stop_at_end`` says so (behind the bus).
    """

    path: np.ndarray
    lanes: tuple[int, ...]
    instructions: tuple[Instruction, ...]
    stop_at_end: bool = False
    limit_s: float = 60.0

    @property
    def length_m(self) -> float:
        """Length of the path."""
        return float(np.hypot(*np.diff(self.path[:, :2], axis=0).T).sum())


@dataclass(frozen=True, kw_only=True)
class Weather:
    """How it looks: domain randomization of light, fog and textures, drawn from the seed."""

    time: Literal["day", "dusk", "fog"] = "day"
    sun: tuple[float, float, float] = (0.4, 0.3, -1.0)
    brightness: float = 1.0
    fog_m: float | None = None
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    texture_seed: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Scenario:
    """All of an episode that follows from its seed. The ego vehicle starts at the route's first point, at a stand."""

    seed: int
    kind: str
    town: Town
    route: Route
    spawns: tuple[Spawn, ...] = ()
    weather: Weather = field(default_factory=Weather)


@dataclass(frozen=True, kw_only=True)
class Pose:
    """A place on the ground: x, y in m and heading in rad."""

    x: float
    y: float
    heading: float


@dataclass(frozen=True, kw_only=True)
class RoadUser:
    """A road user now. ``pose`` is the middle of its box on the ground; ``id`` is its place among the spawns."""

    id: int
    kind: RoadUserKind
    pose: Pose
    size: tuple[float, float, float]
    speed_mps: float


@dataclass(frozen=True, kw_only=True)
class EgoState:
    """The ego vehicle now. ``pose`` is that of ``base_link``: the middle of the rear axle, on the ground.

    ``speed_mps`` along its heading, ``yaw_rate`` rad/s, ``steering`` of the front wheels in rad, ``acceleration`` m/s2.
    """

    pose: Pose
    speed_mps: float
    yaw_rate: float
    steering: float
    acceleration: float = 0.0


# The ego vehicle, from the rear axle: 4.6 m long, 1.9 m wide, 2.8 m between the axles.
WHEELBASE_M = 2.8
LENGTH_M, WIDTH_M, HEIGHT_M = 4.6, 1.9, 1.5
REAR_OVERHANG_M = 0.9
MAX_STEERING = 0.6
