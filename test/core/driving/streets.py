"""Tiny towns made by hand: a straight road along x with two lanes, driven on the right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vla_core.sim.driving.geometry import ego_middle
from vla_core.sim.driving.layout import (
    EgoState,
    Instruction,
    Lane,
    Light,
    Pose,
    Raster,
    Route,
    Scenario,
    Solid,
    Spawn,
    Surface,
    Town,
)

WIDTH = 3.5
FORTH, BACK = 0, 1
CAR = (4.5, 1.8, 1.5)
PERSON = (0.5, 0.5, 1.7)


def straight(start: tuple[float, float], end: tuple[float, float], step: float = 0.4) -> np.ndarray:
    """A line (N, 3) from one point to another."""
    gap = np.subtract(end, start)
    count = max(int(np.ceil(np.hypot(*gap) / step)), 1) + 1
    points = np.linspace(start, end, count)
    return np.column_stack([points, np.full(count, math.atan2(gap[1], gap[0]))])


def street(
    length: float = 200.0,
    speed: float = 8.0,
    lights: Sequence[Light] = (),
    solids: Sequence[Solid] = (),
    more: Sequence[Lane] = (),
) -> Town:
    """The road from x = 0 to ``length``; the lane FORTH is at y = -1.75; its light, if any, is the first one's."""
    light = 0 if lights else None
    lanes = {
        FORTH: Lane(
            id=FORTH, centre=straight((0, -WIDTH / 2), (length, -WIDTH / 2)), width_m=WIDTH, speed_mps=speed,
            opposite=BACK, light=light,
        ),
        BACK: Lane(
            id=BACK, centre=straight((length, WIDTH / 2), (0, WIDTH / 2)), width_m=WIDTH, speed_mps=speed,
            opposite=FORTH,
        ),
    }  # fmt: skip
    cells = np.full((160, round(length / 0.25) + 160), Surface.GRASS, np.uint8)
    cells[80 - 14 : 80 + 14] = Surface.ROAD
    return Town(
        lanes=lanes | {lane.id: lane for lane in more},
        ground=Raster(cells=cells, origin=(-20.0, -20.0), resolution_m=0.25),
        lights=tuple(lights),
        solids=tuple(solids),
    )


def scenario(
    town: Town | None = None,
    spawns: Sequence[Spawn] = (),
    start: float = 10.0,
    end: float = 110.0,
    stop_at_end: bool = False,
    limit_s: float = 60.0,
) -> Scenario:
    """A route along FORTH."""
    line = straight((start, -WIDTH / 2), (end, -WIDTH / 2), 0.5)
    return Scenario(
        seed=0,
        kind="straight",
        town=town or street(),
        route=Route(
            path=np.column_stack([line, np.full(len(line), 8.0)]),
            lanes=(FORTH,),
            instructions=(Instruction(from_s=0.0, text="go"),),
            stop_at_end=stop_at_end,
            limit_s=limit_s,
        ),
        spawns=tuple(spawns),
    )


def light(x: float, green: float = 10.0, yellow: float = 2.0, red: float = 10.0, offset: float = 0.0) -> Light:
    """A light whose stop line is at ``x`` across the lane FORTH."""
    return Light(
        position=(x + 10, -5.0, 3.0), heading=math.pi, stop=(x, -WIDTH / 2, 0.0), width_m=WIDTH,
        green_s=green, yellow_s=yellow, red_s=red, offset_s=offset,
    )  # fmt: skip


def ego(x: float, y: float = -WIDTH / 2, heading: float = 0.0, speed: float = 0.0, yaw_rate: float = 0.0) -> EgoState:
    """The ego vehicle with its rear axle there."""
    return EgoState(pose=Pose(x=x, y=y, heading=heading), speed_mps=speed, yaw_rate=yaw_rate, steering=0.0)


FAR = ego(-500.0, 300.0)
EGO_BOX = (4.6, 1.9)


def ego_box(state: EgoState) -> tuple[Pose, tuple[float, float]]:
    """Pose and size of the ego vehicle's box."""
    return ego_middle(state.pose), EGO_BOX
