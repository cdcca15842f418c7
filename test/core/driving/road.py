"""A road by hand for tests of the simulator: 7.2 m of asphalt along x, with what a test puts on and beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vla_core.contract import RobotContract
from vla_core.observation.decode import decode
from vla_core.observation.messages import Message
from vla_core.sim.driving.layout import (
    Instruction,
    Lane,
    Light,
    Pose,
    Raster,
    RoadUser,
    RoadUserKind,
    Route,
    Scenario,
    Solid,
    Spawn,
    Surface,
    Town,
    Weather,
)
from vla_core.sim.driving.simulation import DrivingSim

ORIGIN = (-60.0, -50.0)
SIZE = (240.0, 100.0)
CELL = 0.25
TICK_S, TICK_NS = 0.2, 200_000_000
GREY = (0.5, 0.5, 0.5)
Patch = tuple[float, float, float, float, Surface]  # x from, to, y from, to


def contract(*names: str) -> RobotContract:
    """The simulated vehicle's contract with these observations alone, and the odometry that it is followed by."""
    whole = RobotContract.load("driving")
    kept = {name: stream for name, stream in whole.observations.items() if name in (*names, "odom")}
    return dataclasses.replace(whole, observations=kept, any_of=())


def town(patches: Sequence[Patch] = (), solids: Sequence[Solid] = (), lights: Sequence[Light] = ()) -> Town:
    """The road, repainted with ``patches``."""
    cells = np.full((round(SIZE[1] / CELL), round(SIZE[0] / CELL)), Surface.GRASS, np.uint8)
    for left, right, low, high, surface in ((ORIGIN[0], ORIGIN[0] + SIZE[0], -3.6, 3.6, Surface.ROAD), *patches):
        columns = slice(round((left - ORIGIN[0]) / CELL), round((right - ORIGIN[0]) / CELL))
        cells[round((low - ORIGIN[1]) / CELL) : round((high - ORIGIN[1]) / CELL), columns] = surface
    centre = np.column_stack([np.arange(-60.0, 180.0, 0.5), np.full(480, -1.8), np.zeros(480)])
    lane = Lane(id=0, centre=centre, width_m=3.6, speed_mps=8.0)
    return Town(lanes={0: lane}, ground=Raster(cells=cells, origin=ORIGIN, resolution_m=CELL), lights=tuple(lights),
                solids=tuple(solids))  # fmt: skip


def scenario(place: Town | None = None, spawns: Sequence[Spawn] = (), start: Pose | None = None, seed: int = 3,
             weather: Weather | None = None) -> Scenario:  # fmt: skip
    """The vehicle stands at ``start``; the route leads straight on."""
    pose = start or Pose(x=0.0, y=0.0, heading=0.0)
    way = np.arange(0.0, 100.0, 0.5)
    path = np.column_stack([
        pose.x + way * np.cos(pose.heading), pose.y + way * np.sin(pose.heading),
        np.full(len(way), pose.heading), np.full(len(way), 8.0),
    ])  # fmt: skip
    route = Route(path=path, lanes=(0,), instructions=(Instruction(from_s=0.0, text="go"),))
    return Scenario(seed=seed, kind="straight", town=place or town(), route=route, spawns=tuple(spawns),
                    weather=weather or Weather())  # fmt: skip


SIZES: dict[str, tuple[float, float, float]] = {
    "car": (4.4, 1.8, 1.5), "bus": (11.0, 2.5, 3.0), "truck": (8.0, 2.4, 3.1), "pedestrian": (0.6, 0.6, 1.75),
    "cyclist": (1.8, 0.6, 1.75),
}  # fmt: skip


def spawn(kind: RoadUserKind, colour: tuple[float, float, float] = GREY) -> Spawn:
    """A road user that the test moves."""
    return Spawn(kind=kind, size=SIZES[kind], colour=colour)


def user(index: int, kind: RoadUserKind, x: float, y: float, heading: float = 0.0, speed: float = 0.0) -> RoadUser:
    """Where it is now."""
    return RoadUser(id=index, kind=kind, pose=Pose(x=x, y=y, heading=heading), size=SIZES[kind], speed_mps=speed)


def ticks(sim: DrivingSim, count: int, steering: float = 0.0, speed: float = 0.0) -> None:
    """Drive on, with the road users where they are."""
    for _ in range(count):
        sim.step(steering, speed, TICK_S, sim.users)


def decoded(found: Sequence[Message], asked: RobotContract, name: str) -> list[Any]:
    """What the package's own decoders make of the messages of an observation."""
    stream = asked.observations[name]
    return [decode(stream, message.data) for message in found if message.topic == stream.topic]
