"""What the cameras show, against projections by the calibration and the transforms that are sent with them."""

from __future__ import annotations

import itertools
import math
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from test.core.driving.road import TICK_NS, contract, decoded, scenario, spawn, ticks, town, user
from vla_core.observation.messages import deserialize
from vla_core.sim.driving.layout import Light, Pose, Scenario, Solid, Surface, Weather
from vla_core.sim.driving.look import LAMPS
from vla_core.sim.driving.mounts import CAMERAS, FRAMES, MOUNTS, rotation
from vla_core.sim.driving.simulation import DrivingSim

SEEING = contract(*CAMERAS, *(f"{name}_info" for name in CAMERAS))
SIZE = 168
RED, GREEN, BLUE = range(3)
HERE = Pose(x=3.0, y=-1.5, heading=0.35)


class Views:
    """Pictures of a scenario, and where points of the map are in them by calibration and transforms alone."""

    def __init__(self, told: Scenario, users: Sequence[object] = (), size: int = SIZE) -> None:
        self.sim = DrivingSim(told, SEEING, size)
        self.sim.set_users(users)  # type: ignore[arg-type]
        (message,) = self.sim.statics(0)
        self.transforms = {t.child_frame_id: t.transform for t in deserialize(message.type, message.data).transforms}
        self.look()

    def look(self) -> None:
        messages = self.sim.pictures(TICK_NS)
        self.pictures = {name: decoded(messages, SEEING, name)[0].astype(int) for name in CAMERAS}
        self.calibrations = {name: decoded(messages, SEEING, f"{name}_info")[0] for name in CAMERAS}

    def project(self, name: str, points: np.ndarray) -> np.ndarray:
        """Columns, rows and depths (N, 3) of map points (N, 3)."""
        calibration = self.calibrations[name]
        mount = self.transforms[calibration.frame_id]
        t, q = mount.translation, mount.rotation
        pose = self.sim.ego.pose
        cosine, sine = math.cos(pose.heading), math.sin(pose.heading)
        base = (points - [pose.x, pose.y, 0]) @ np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
        optical = (base - [t.x, t.y, t.z]) @ rotation((0, 0, 0, q.x, q.y, q.z, q.w))
        pixels = optical @ calibration.intrinsics.T
        return np.column_stack([pixels[:, :2] / optical[:, 2:], optical[:, 2]])


def square(x: float, y: float, half: float, z: float = 0.0) -> np.ndarray:
    """Corners (4, 3)."""
    return np.array([(x + a * half, y + b * half, z) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))])


def centroid(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()])


def test_paint_is_where_the_calibration_says() -> None:
    """White squares of the raster all around, in the pictures of all six cameras, to a fraction of a pixel."""
    without = Views(scenario(start=HERE)).pictures
    errors, seen = [], set()
    for angle in range(0, 360, 30):
        x = round(HERE.x + 9 * math.cos(math.radians(angle)))
        y = round(HERE.y + 9 * math.sin(math.radians(angle)))
        views = Views(scenario(town([(x - 1.0, x + 1.0, y - 1.0, y + 1.0, Surface.STOP_LINE)]), start=HERE))
        fine = np.stack(np.meshgrid(np.linspace(-1, 1, 60), np.linspace(-1, 1, 60)), axis=-1).reshape(-1, 2)
        for name in CAMERAS:
            corners = views.project(name, square(x, y, 1.0))
            if (corners[:, 2] < 1).any() or (corners[:, :2] < 2).any() or (corners[:, :2] > SIZE - 3).any():
                continue
            inside = views.project(name, np.column_stack([fine + np.array([x, y]), np.zeros(len(fine))]))
            # Area in the picture weighs a piece of ground by depth^-3.
            expected = np.average(inside[:, :2], axis=0, weights=inside[:, 2] ** -3.0)
            change = np.abs(views.pictures[name] - without[name]).sum(axis=2).astype(float)
            rows, columns = np.mgrid[:SIZE, :SIZE]
            found = np.array([(columns * change).sum(), (rows * change).sum()]) / change.sum()
            errors.append(found - expected)
            seen.add(name)
    assert seen == set(CAMERAS)
    assert np.abs(errors).max() < 0.6
    assert np.abs(np.mean(errors, axis=0)).max() < 0.25


def test_solids_and_road_users_are_where_they_should_be() -> None:
    """The pixels that something changes fill the box of its projected corners."""
    things = {
        "building": Solid(kind="building", position=(20.0, 9.0, 3.0), heading=0.4, size=(6.0, 4.0, 6.0),
                          colour=(1.0, 0.0, 1.0)),
        "barrier": Solid(kind="barrier", position=(-4.0, -9.0, 0.5), heading=1.0, size=(3.0, 0.5, 1.0),
                         colour=(1.0, 0.0, 1.0)),
    }  # fmt: skip
    without = Views(scenario(start=HERE)).pictures
    compared = 0
    for thing in things.values():
        views = Views(scenario(town(solids=[thing]), start=HERE))
        compared += _compare(views, without, thing.position[:2], thing.position[2], thing.heading, thing.size)
    views = Views(scenario(start=HERE, spawns=[spawn("bus", (1.0, 0.0, 1.0))]))
    without = views.pictures
    bus = user(0, "bus", 18.0, 1.0, 0.35)
    views.sim.set_users([bus])
    views.look()
    compared += _compare(views, without, (18.0, 1.0), 1.75, 0.35, (11.0, 2.5, 2.5), 2.5)  # wheels aside
    assert compared >= 3


def _compare(views: Views, without: dict[str, np.ndarray], place: tuple[float, float], z: float, heading: float,
             size: tuple[float, float, float], error: float = 1.6) -> int:  # fmt: skip
    cosine, sine = math.cos(heading), math.sin(heading)
    corners = np.array(list(itertools.product((-0.5, 0.5), repeat=3))) * size
    corners = corners @ np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]]) + (*place, z)
    found = 0
    for name, picture in views.pictures.items():
        pixels = views.project(name, corners)
        if (pixels[:, 2] < 1).any() or (pixels[:, :2] < 1).any() or (pixels[:, :2] > SIZE - 2).any():
            continue
        rows, columns = np.nonzero(np.abs(picture - without[name]).sum(axis=2) > 20)
        found += 1
        assert [columns.min(), columns.max()] == pytest.approx([pixels[:, 0].min(), pixels[:, 0].max()], abs=1.6)
        assert [rows.min(), rows.max()] == pytest.approx([pixels[:, 1].min(), pixels[:, 1].max()], abs=error)
    return found


@pytest.mark.parametrize("weather", ["day", "dusk"])
def test_lights_show_their_colour_to_the_traffic_alone(weather: str) -> None:
    def lamp(heading: float) -> Views:
        light = Light(position=(15.0, -4.0, 3.5), heading=heading, stop=(10.0, 0.0, 0.0), width_m=3.6, green_s=10.0,
                      yellow_s=2.0, red_s=10.0, offset_s=0.0)  # fmt: skip
        return Views(scenario(town(lights=[light]), weather=Weather(time=weather, brightness=0.8)))  # type: ignore[arg-type]

    facing, away, aside = lamp(math.pi), lamp(0.0), lamp(math.pi / 2 + 0.2)
    column, row, _ = np.rint(facing.project("front", np.array([[15.0, -4.0, 3.5]]))[0]).astype(int)
    for colour, expected in LAMPS.items():
        for views in (facing, away, aside):
            views.sim.set_lights({0: colour})  # type: ignore[dict-item]
            views.look()
        lit = np.array(expected) > 0.5
        assert ((facing.pictures["front"][row, column] > 150) == lit).all()
        assert facing.pictures["front"][row, column][~lit].max() < 110
        assert away.pictures["front"][row, column].max() < 60
        around = aside.pictures["front"][row - 8 : row + 9, column - 8 : column + 9]
        assert not ((around > 150) == lit).all(axis=2).any()  # the crossing traffic's


def test_no_camera_sees_its_own_vehicle_and_people_do() -> None:
    sim = DrivingSim(scenario(), SEEING)
    seen = np.concatenate([decoded(sim.pictures(0), SEEING, name)[0] for name in CAMERAS]).astype(int)
    assert not ((seen[..., RED] > 120) & (seen[..., GREEN] < 60)).any()
    for picture in (sim.render_for_people(480), sim.render_top_down(480)):
        assert picture.shape == (480, 480, 3) and picture.dtype == np.uint8
        red = (picture[..., RED].astype(int) > 120) & (picture[..., GREEN] < 60)
        assert 100 < red.sum() < 12_000


def test_the_cameras_see_all_round_and_are_mounted_as_the_model_thinks() -> None:
    config = yaml.safe_load(Path("config/models/driving.yaml").read_text(encoding="utf-8"))["mounts"]
    assert {name: list(MOUNTS[name]) for name in config} == config
    azimuths = np.linspace(-math.pi, math.pi, 721)
    covered = np.zeros(len(azimuths), bool)
    for name, view in CAMERAS.items():
        axis = rotation(MOUNTS[name])[:, 2]
        off = np.angle(np.exp(1j * (azimuths - math.atan2(axis[1], axis[0]))))
        covered |= np.abs(np.degrees(off)) <= view / 2
    assert covered.all()
    assert {SEEING.observations[name].frame_id for name in CAMERAS} == {FRAMES[name] for name in CAMERAS}


def test_view_from_above_says_where_things_are() -> None:
    patches = [(x - 1.0, x + 1.0, y - 1.0, y + 1.0, Surface.STOP_LINE) for x, y in ((12.0, 4.0), (20.0, -8.0))]
    sim = DrivingSim(scenario(town(patches), start=HERE), SEEING)
    view = sim.top_down_view(480)
    picture = sim.render_top_down(480, view).astype(int)
    for x, y in ((12.0, 4.0), (20.0, -8.0)):
        column, row = view.pixels(np.array([x, y]))
        r, c = round(float(row)), round(float(column))
        bright = picture[r - 15 : r + 16, c - 15 : c + 16].min(axis=2) > 150
        assert centroid(bright) + np.array([c - 15, r - 15]) == pytest.approx((column, row), abs=0.7)
    nose = view.pixels(np.array([HERE.x + 20 * math.cos(HERE.heading), HERE.y + 20 * math.sin(HERE.heading)]))
    tail = view.pixels(np.array([HERE.x, HERE.y]))
    assert nose[1] < tail[1] and nose[0] == pytest.approx(tail[0])  # it drives upwards


def test_weather_changes_what_is_seen() -> None:
    far = Solid(kind="building", position=(50.0, 0.0, 4.0), heading=0.0, size=(2.0, 30.0, 8.0), colour=(0.1, 0.1, 0.1))
    seen = {}
    for name, weather in {
        "day": Weather(), "dusk": Weather(time="dusk", brightness=0.6), "fog": Weather(time="fog", fog_m=40.0),
        "haze": Weather(time="fog", fog_m=120.0), "other": Weather(texture_seed=5),
    }.items():  # fmt: skip
        seen[name] = Views(scenario(town(solids=[far]), weather=weather)).pictures["front"]
    middle, sky = (SIZE // 2 - 3, SIZE // 2), (10, SIZE // 2)
    assert seen["dusk"].mean() < 0.75 * seen["day"].mean()
    contrast = {name: int(np.abs(picture[middle] - picture[sky]).sum()) for name, picture in seen.items()}
    assert contrast["fog"] < 30 < contrast["haze"] < contrast["day"]
    assert np.abs(seen["day"] - seen["other"]).max() > 10  # another grain
    road = seen["day"][SIZE - 20 :, SIZE // 2 - 20 : SIZE // 2 + 20]
    assert road.std(axis=(0, 1)).max() > 0.8  # not flat


def test_scenes_leave_nothing_behind() -> None:
    """Without freeing, 40 scenes of a million cells would keep over 100 MB."""
    told = scenario()
    for _ in range(3):
        _once(told)
    before = _resident_mb()
    for _ in range(40):
        _once(told)
    assert _resident_mb() - before < 40


def _once(told: Scenario) -> None:
    sim = DrivingSim(told, SEEING)
    ticks(sim, 1)
    sim.pictures(0)
    sim.close()
    sim.close()  # twice is as good as once


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6
