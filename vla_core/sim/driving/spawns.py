"""Who else is on the road: cars at the kerb, oncoming, ahead and crossing ones, people; and the weather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vla_core.sim.driving.layout import RoadUserKind, Spawn, Surface, Weather
from vla_core.sim.driving.network import at_station, beside, stations
from vla_core.sim.driving.paint import SIDEWALK_M
from vla_core.sim.driving.town import District

BUS_SIZE, TRUCK_SIZE, CAR_SIZE = (10.5, 2.5, 3.0), (7.0, 2.3, 2.9), (4.4, 1.85, 1.5)
CYCLIST_SIZE, PERSON_SIZE = (1.8, 0.6, 1.75), (0.5, 0.5, 1.75)
PAINT = ((0.75, 0.1, 0.1), (0.1, 0.2, 0.6), (0.85, 0.85, 0.87), (0.1, 0.1, 0.11), (0.5, 0.52, 0.55), (0.1, 0.4, 0.2))
CLOTHES = ((0.8, 0.3, 0.1), (0.2, 0.2, 0.7), (0.7, 0.7, 0.2), (0.5, 0.1, 0.4))
KERB_M = 0.35  # between the road and a parked car
LIVERIES = ((0.85, 0.7, 0.1), (0.75, 0.12, 0.1), (0.15, 0.35, 0.7))


def colour(rng: np.random.Generator, colours: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """One of them."""
    return colours[int(rng.integers(len(colours)))]


def _car(rng: np.random.Generator, path: tuple[int, ...], s: float, speed: float, offset: float = 0.0) -> Spawn:
    return Spawn(kind="car", size=CAR_SIZE, colour=colour(rng, PAINT), path=path, s=s, speed_mps=speed, offset_m=offset)


def slow_one(lanes: tuple[int, ...], front_s: float, rng: np.random.Generator) -> Spawn:
    """A car, truck or cyclist ahead of the vehicle, whose front is at ``front_s``, on its lanes to the end."""
    draw = float(rng.random())
    kind: RoadUserKind = "car" if draw < 0.6 else "truck" if draw < 0.8 else "cyclist"
    size = {"car": CAR_SIZE, "truck": TRUCK_SIZE, "cyclist": CYCLIST_SIZE}[kind]
    ahead = front_s + size[0] / 2 + float(rng.uniform(8.0, 12.0))
    car = _car(rng, lanes, ahead, float(rng.uniform(3.0, 4.5)))
    return replace(car, kind=kind, size=size)


def strollers(district: District, rng: np.random.Generator) -> list[Spawn]:
    """People on the sidewalks of the first road, who stay there."""
    road, people = district.start, []
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.6 else 0):
        side = (road.width_m + SIDEWALK_M - PERSON_SIZE[1] / 2 - 0.1) * (1.0 if rng.random() < 0.5 else -1.0)
        start = float(rng.uniform(4.0, road.length_m - 30.0))
        where = start, start + float(rng.uniform(6.0, 25.0))
        ends = [beside(at_station(road.centre, s)[None], side)[0, :2] for s in where]
        if rng.random() < 0.5:
            ends.reverse()
        way = ends[0] + np.linspace(0.0, 1.0, 50)[:, None] * (ends[1] - ends[0])
        person = Spawn(
            kind="pedestrian",
            size=PERSON_SIZE,
            colour=colour(rng, CLOTHES),
            speed_mps=float(rng.uniform(1.0, 1.5)),
            walk=((float(way[0, 0]), float(way[0, 1])), (float(way[-1, 0]), float(way[-1, 1]))),
            trigger_m=30.0,
        )
        if (district.town.ground.at(way) == Surface.SIDEWALK).all():  # one walks straight, and roads bend
            people.append(person)
    return people


def walker(district: District, rng: np.random.Generator) -> Spawn:
    """Steps on the crosswalk of the first road, from either side, when the vehicle comes near."""
    walk = next(walk for walk in district.crosswalks if walk.road is district.start)
    ends = walk.ends if rng.random() < 0.5 else walk.ends[::-1]
    return Spawn(
        kind="pedestrian", size=PERSON_SIZE, colour=colour(rng, CLOTHES), speed_mps=float(rng.uniform(1.1, 1.6)),
        walk=(ends[0], ends[1]), trigger_m=float(rng.uniform(15.0, 20.0)),
    )  # fmt: skip


def crossing_users(district: District, rng: np.random.Generator) -> list[Spawn]:
    """Parked cars, oncoming ones on the first road, and crossing ones where lights protect."""
    others = parked(district, rng) + oncoming(district, rng, 0.5) + strollers(district, rng)
    first = district.junctions[0]
    if district.town.lights and rng.random() < 0.6:
        start, end = (1, 3) if rng.random() < 0.5 else (3, 1)
        path = (first.arms[start].incoming, *first.ways[start, end], first.arms[end].outgoing)
        others.append(_car(rng, path, float(rng.uniform(6.0, 24.0)), float(rng.uniform(5.0, 7.0))))
    return others


def parked(district: District, rng: np.random.Generator) -> list[Spawn]:
    """Cars at the kerb, off the lane, away from junctions and crosswalks."""
    roads = [district.start, *(arm.road for junction in district.junctions[:1] for arm in junction.arms[1:])]
    cars: list[Spawn] = []
    for road in roads:
        if rng.random() < 0.45:
            continue
        lane = road.forth if rng.random() < 0.7 else road.back
        length = float(stations(district.town.lanes[lane].centre)[-1])
        s = float(rng.uniform(16.0, max(length - 18.0, 17.0)))
        for _ in range(int(rng.integers(1, 4))):
            here = s if lane == road.forth else length - s
            clear = all(abs(here - walk.s - 1.5) > 8.0 for walk in district.crosswalks if walk.road is road)
            if s < length - 14.0 and clear:
                cars.append(_car(rng, (lane,), s, 0.0, -(road.width_m / 2 + CAR_SIZE[1] / 2 + KERB_M)))
            s += float(rng.uniform(6.0, 9.0))
    return cars


def oncoming(district: District, rng: np.random.Generator, chance: float, apart: bool = False) -> list[Spawn]:
    """Cars that come towards the vehicle on its first road."""
    road = district.start
    length = float(stations(district.town.lanes[road.back].centre)[-1])
    cars, s = [], float(rng.uniform(2.0, 0.6 * length if apart else 14.0))
    for _ in range(2):
        if rng.random() < chance and s < length - 30.0:
            cars.append(_car(rng, (road.back,), s, float(rng.uniform(5.0, 7.0))))
        s += float(rng.uniform(14.0, 30.0))
    return cars


def weather(rng: np.random.Generator) -> Weather:
    """Day mostly, dusk and fog sometimes."""
    draw = float(rng.random())
    tint = rng.uniform(0.93, 1.07, 3)
    angle, height = float(rng.uniform(-np.pi, np.pi)), float(rng.uniform(0.5, 1.4))
    texture = int(rng.integers(1 << 16))
    day = Weather(
        sun=(float(np.cos(angle)), float(np.sin(angle)), -height),
        brightness=float(rng.uniform(0.85, 1.15)),
        tint=(float(tint[0]), float(tint[1]), float(tint[2])),
        texture_seed=texture,
    )
    if draw < 0.7:
        return day
    if draw < 0.85:
        return replace(day, time="dusk", brightness=0.55 * day.brightness)
    return replace(day, time="fog", brightness=0.9 * day.brightness, fog_m=float(rng.uniform(45.0, 80.0)))
