"""Routes through the towns: what is to be driven, how it is said, and who else is there.

``scenario(kind, seed)`` is a pure function. Kinds that differ only in what is asked for share town, start and road
users: turn_left, turn_right, straight and follow's town; stop_behind and overtake. :func:`other_instruction` asks for
the other thing in the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vla_core.errors import choices
from vla_core.sim.base import SimulationError
from vla_core.sim.driving.geometry import Line
from vla_core.sim.driving.layout import (
    LENGTH_M,
    REAR_OVERHANG_M,
    EgoState,
    Instruction,
    Lane,
    Light,
    Route,
    Scenario,
    Spawn,
    Weather,
)
from vla_core.sim.driving.network import stations
from vla_core.sim.driving.spawns import (
    BUS_SIZE,
    LIVERIES,
    colour,
    crossing_users,
    oncoming,
    parked,
    slow_one,
    strollers,
    walker,
    weather,
)
from vla_core.sim.driving.town import District, build
from vla_core.sim.driving.words import navigated, opposed, say

KINDS = (
    "turn_left",
    "turn_right",
    "straight",
    "roundabout",
    "stop_behind",
    "overtake",
    "follow",
    "pedestrian",
    "red_light",
)
MIXED = "mixed"
GREEN_LIGHT = "green_light"  # the place of red_light with the same seed, for practice: in no mixture
CHOICES = (*KINDS, GREEN_LIGHT, MIXED)

START_S = 3.0  # of the rear axle on the first lane
BEYOND_M = 15.0  # of road behind the goal
SPACING_M = 0.5
LATERAL_MPS2, EASY_MPS2 = 2.0, 1.5  # that the speeds along a path ask for, sideways and along it
FRONT_M = LENGTH_M - REAR_OVERHANG_M
BUS_GAP_M = 4.0
TURNS = {"turn_left": 3, "straight": 2, "turn_right": 1}  # the arm of the first crossing


def kind_of(kind: str, seed: int) -> str:
    """The kind itself, or the one that a seed has in "mixed": nine seeds in a row have all nine."""
    if kind == MIXED:
        turn = np.random.default_rng((seed // len(KINDS), 77)).permutation(len(KINDS))
        return KINDS[int(turn[seed % len(KINDS)])]
    if kind not in CHOICES:
        raise SimulationError(f"unknown kind of driving {kind!r}; there are {choices(CHOICES)}")
    return kind


def scenario(kind: str, seed: int) -> Scenario:
    """The episode of a kind and a seed, at least 0.

    Raises:
        SimulationError: no such kind.
    """
    kind = kind_of(kind, seed)
    told = "red_light" if kind == GREEN_LIGHT else kind
    words = np.random.default_rng((seed, KINDS.index(told), 1))
    sky = weather(np.random.default_rng((seed, 2)))
    users = np.random.default_rng((seed, 3))  # the same for kinds that share a town
    if kind in ("stop_behind", "overtake"):
        return _bus(kind, seed, words, users, sky)
    if kind == "roundabout":
        return _roundabout(seed, words, users, sky)
    return _crossing(kind, seed, words, users, sky)


def other_instruction(scenario: Scenario) -> str:
    """What asks for something else in the same place: the other turn or exit, overtaking for stopping.

    A wrong answer to the route's own instructions, to be said through the whole episode.
    """
    for said in scenario.route.instructions:
        other = opposed(said.text, scenario.seed)
        if other is not None:
            return other
    raise AssertionError(f"a route without a choice: {scenario.kind}, seed {scenario.seed}")


class RouteTracker:
    """Where a vehicle is along a route: anywhere at first, then near where it last was, as loops ask for.

    ``line`` is the path, ``reached`` the furthest station so far in m.
    """

    BEHIND_M, AHEAD_M = 8.0, 16.0

    def __init__(self, route: Route) -> None:
        self.line = Line(route.path[:, :3])
        self.reached = 0.0
        self._last: float | None = None

    def locate(self, ego: EgoState) -> tuple[float, float]:
        """Station and offset to the left of the rear axle now, in m; before the start and behind the goal too."""
        here = np.array([[ego.pose.x, ego.pose.y]])
        near = () if self._last is None else (self._last - self.BEHIND_M, self._last + self.AHEAD_M)
        s, offset, _ = self.line.project(here, *near)
        self._last = float(np.clip(s[0], 0.0, self.line.length))
        self.reached = max(self.reached, self._last)
        return float(s[0]), float(offset[0])

    def progress(self, ego: EgoState) -> float:
        """The furthest station reached, this place included; it never falls."""
        self.locate(ego)
        return self.reached


def path_of(lanes: Sequence[Lane], start_s: float, end_s: float) -> np.ndarray:
    """The path (N, 4) x, y, heading, speed limit along lanes, from ``start_s`` of the first to ``end_s`` m behind that.

    The limit is the lanes', or what a curve allows at 2 m/s2 sideways, and falls and rises by at most 1.5 m/s2.
    """
    centre = np.concatenate([lane.centre[int(i > 0) :] for i, lane in enumerate(lanes)])
    limits = np.concatenate([np.full(len(lane.centre) - int(i > 0), lane.speed_mps) for i, lane in enumerate(lanes)])
    along = stations(centre)
    heading = np.unwrap(centre[:, 2])
    s = start_s + np.arange(0.0, end_s - start_s + 1e-9, SPACING_M)
    curvature = np.abs(np.gradient(np.interp(s, along, heading), SPACING_M))
    speed = np.minimum(limits[np.searchsorted(along, s).clip(0, len(limits) - 1)],
                       np.sqrt(LATERAL_MPS2 / np.maximum(curvature, 1e-6)))  # fmt: skip
    for order in (range(len(s) - 2, -1, -1), range(1, len(s))):
        step = 1 if order.step < 0 else -1
        for i in order:
            speed[i] = min(speed[i], np.sqrt(speed[i + step] ** 2 + 2 * EASY_MPS2 * SPACING_M))
    columns = [np.interp(s, along, column) for column in (centre[:, 0], centre[:, 1], heading)]
    return np.stack((*columns, speed), axis=1)


@dataclass(frozen=True, kw_only=True)
class _Way:
    """Lanes of a route with the station at which each begins, from the route's start."""

    lanes: tuple[int, ...]
    starts: tuple[float, ...]
    length: float

    @classmethod
    def of(cls, district: District, lanes: Sequence[int]) -> _Way:
        lengths = [float(stations(district.town.lanes[lane].centre)[-1]) for lane in lanes]
        starts = np.cumsum([0.0, *lengths]) - START_S
        return cls(lanes=tuple(lanes), starts=tuple(starts[:-1].tolist()), length=float(starts[-1]))

    def start(self, lane: int) -> float:
        """Station at which a lane begins."""
        return self.starts[self.lanes.index(lane)]


def _route(
    district: District, way: _Way, instructions: Sequence[Instruction], *, end_s: float | None = None,
    stop: bool = False, patience_s: float = 0.0,
) -> Route:  # fmt: skip
    end = way.length - BEYOND_M if end_s is None else end_s
    lanes = [district.town.lanes[lane] for lane in way.lanes]
    path = path_of(lanes, START_S, START_S + end)
    alone = float((SPACING_M / path[:, 3]).sum())
    return Route(
        path=path,
        lanes=way.lanes,
        instructions=tuple(instructions),
        stop_at_end=stop,
        limit_s=round(1.6 * alone + 15.0 + patience_s, 1),
    )


def _crossing(kind: str, seed: int, words: np.random.Generator, users: np.random.Generator, sky: Weather) -> Scenario:
    at_light = kind in ("red_light", GREEN_LIGHT)
    lights, walk = (False, True) if kind == "pedestrian" else (True if at_light else None, None)
    district = build("crossing", seed, lights=lights, crosswalk=walk)
    arm = TURNS.get(kind) or int(words.integers(1, 4))
    first = district.junctions[0]
    turns = [first.ways[0, arm]]
    lanes = [district.start.forth, *turns[0], first.arms[arm].outgoing]
    for second in district.junctions[1:]:
        if second.arms[0].road is first.arms[arm].road:
            other = int(words.integers(1, len(second.arms)))
            turns.append(second.ways[0, other])
            lanes += [*turns[-1], second.arms[other].outgoing]
    way = _Way.of(district, lanes)
    decisions = [
        (district.town.lanes[turn].turn, way.start(turn), way.start(lanes[lanes.index(turn) + 1])) for (turn,) in turns
    ]
    if at_light:
        district = _turned(district, way, users, kind == "red_light")
    others = crossing_users(district, users)
    if kind == "follow":
        others = [slow_one(way.lanes, START_S + FRONT_M, users), *others]
    if kind == "pedestrian":
        others = [walker(district, users), *others]
    route = _route(
        district, way, navigated(decisions, words),
        end_s=way.length - BEYOND_M - 5.0 * (kind == "follow"),
        patience_s=30.0 * (len(district.town.lights) > 0) + 15.0 * (kind in ("follow", "pedestrian")),
    )  # fmt: skip
    return Scenario(seed=seed, kind=kind, town=district.town, route=route, spawns=tuple(others), weather=sky)


def _roundabout(seed: int, words: np.random.Generator, users: np.random.Generator, sky: Weather) -> Scenario:
    district = build("roundabout", seed)
    ring = district.junctions[0]
    exit_number = int(words.integers(1, len(ring.arms)))
    inside = ring.ways[0, exit_number]
    lanes = (district.start.forth, *inside, ring.arms[exit_number].outgoing)
    way = _Way.of(district, lanes)
    decision = (f"exit {exit_number}", way.start(inside[0]), way.start(lanes[-1]))
    others = parked(district, users) + oncoming(district, users, 0.5) + strollers(district, users)
    route = _route(district, way, navigated([decision], words))
    return Scenario(seed=seed, kind="roundabout", town=district.town, route=route, spawns=tuple(others), weather=sky)


def _bus(kind: str, seed: int, words: np.random.Generator, users: np.random.Generator, sky: Weather) -> Scenario:
    """A bus stands at a straight piece in the middle of the street."""
    district = build("street", seed, crosswalk=False)
    lane = district.start.forth
    way = _Way.of(district, [lane])
    straight = _straight(district, lane)
    middle = float(straight + users.uniform(0.0, 6.0))
    aside = float(users.uniform(-0.5, -0.2))
    bus = Spawn(kind="bus", size=BUS_SIZE, colour=colour(users, LIVERIES), path=(lane,), s=middle, offset_m=aside)
    others = [bus, *oncoming(district, users, 0.6, apart=True), *strollers(district, users)]
    rear = middle - BUS_SIZE[0] / 2 - START_S
    if kind == "stop_behind":
        end = rear - BUS_GAP_M - FRONT_M
        said = [Instruction(from_s=0.0, text=say("stop behind", words))]
        route = _route(district, way, said, end_s=end, stop=True)
    else:
        passed = rear + BUS_SIZE[0] + 10.0
        said = [
            Instruction(from_s=0.0, text=say("overtake", words)),
            Instruction(from_s=passed, text=say("follow", words)),
        ]
        route = _route(district, way, said, end_s=min(passed + 25.0, way.length - BEYOND_M), patience_s=20.0)
    return Scenario(seed=seed, kind=kind, town=district.town, route=route, spawns=tuple(others), weather=sky)


def _straight(district: District, lane: int) -> float:
    """Where a bus may stand: 22 m into the middle straight of a street, so that one sees past it."""
    centre = district.town.lanes[lane].centre
    turning = np.abs(np.gradient(np.unwrap(centre[:, 2]), stations(centre)))
    calm = turning < 1e-6
    changes = np.flatnonzero(np.diff(calm.astype(int)))
    return float(stations(centre)[changes[1] + 1]) + 22.0 if len(changes) > 2 else 0.5 * float(stations(centre)[-1])


def _turned(district: District, way: _Way, rng: np.random.Generator, red: bool) -> District:
    """The lights turned so that the route's first one has been red for a while when the vehicle gets there; or is
    green, or has just been.
    """
    lane = district.town.lanes[way.lanes[0]]
    assert lane.light is not None
    light = district.town.lights[lane.light]
    arrival = (way.starts[1] - FRONT_M) / (0.8 * lane.speed_mps) + 2.0
    if red:
        wanted = light.green_s + light.yellow_s + float(rng.uniform(3.5, light.red_s - 3.0))
    else:
        wanted = float(rng.uniform(0.0, light.green_s + light.yellow_s))
    shift = wanted - arrival - light.offset_s

    def turned(board: Light) -> Light:
        cycle = board.green_s + board.yellow_s + board.red_s
        return replace(board, offset_s=(board.offset_s + shift) % cycle)

    return replace(district, town=replace(district.town, lights=tuple(turned(board) for board in district.town.lights)))
