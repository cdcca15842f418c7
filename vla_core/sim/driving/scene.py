"""A scenario as a MuJoCo model: ground, solids, traffic lights, road users and the ego vehicle.

Geom groups say who meets a shape:

- ``SOLID_GROUP`` cameras and rays
- ``PAINT_GROUP`` cameras alone: the painted ground, lamps
- ``RAY_GROUP`` rays alone: the ground as a plane, which the wheels roll on
- ``EGO_GROUP`` pictures for people alone: no sensor sees its own vehicle
- ``HULL_GROUP`` nobody: the boxes that touch
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vla_core.sim.base import SimulationError
from vla_core.sim.driving.layout import (
    HEIGHT_M,
    LENGTH_M,
    REAR_OVERHANG_M,
    WHEELBASE_M,
    WIDTH_M,
    Light,
    RoadUserKind,
    Scenario,
    Solid,
    Spawn,
)
from vla_core.sim.driving.look import Colour, Look, grass_colour, ground_picture, look
from vla_core.sim.driving.mounts import BASE, MOUNTS

SOLID_GROUP, PAINT_GROUP, RAY_GROUP, EGO_GROUP, HULL_GROUP = range(5)
TIMESTEP_S = 0.0025
WHEEL_RADIUS_M, TRACK_M = 0.33, 1.6
WHEELS = ("rear_left", "rear_right", "front_left", "front_right")
PEOPLE_SIZE = 640  # pixels, the largest picture
FAR_AWAY = (0.0, 0.0, -100.0)  # where road users are before they are somewhere
CLEARANCE_M = 0.25
MASS_KG = 1500.0
DARK: Colour = (0.06, 0.06, 0.07)
GLASS: Colour = (0.12, 0.16, 0.22)
SKIN: Colour = (0.80, 0.60, 0.48)
TAIL: Colour = (0.75, 0.05, 0.05)
REFLECTIVITY = {  # share of a LiDAR's light that comes back at right angles
    "building": 0.45, "trunk": 0.35, "crown": 0.30, "pole": 0.50, "barrier": 0.55, "kerb": 0.35, "light": 0.40,
    "car": 0.60, "bus": 0.70, "truck": 0.65, "pedestrian": 0.30, "cyclist": 0.35,
}  # fmt: skip


class Touched(NamedTuple):
    """What the ego vehicle touches: a kind of solid or road user, or "light" for a light's pole; its place there."""

    kind: str
    number: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Scene:
    """A compiled model and where things are in it.

    ``owner`` says for each geom whose it is, None for the ground and the ego vehicle; ``reflectivity`` (ngeom,)
    float64. ``users`` are the mocap indices of the road users, ``lamps`` the materials of the lights.
    """

    model: Any
    look: Look
    owner: tuple[Touched | None, ...]
    reflectivity: np.ndarray
    users: tuple[int, ...]
    lamps: tuple[int, ...]


def mujoco_module() -> Any:
    """MuJoCo, which renders in software where nothing else is asked for."""
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    # One rasterizer thread: with a policy on the other core, more of them only wait for one another.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    try:
        import mujoco
    except ImportError as error:
        message = f"MuJoCo cannot be imported ({error}); install the extra: pip install '.[sim]'"
        raise SimulationError(message) from None
    return mujoco


def build_scene(scenario: Scenario) -> Scene:
    """Compile a scenario; the ego vehicle stands at the route's start."""
    mujoco = mujoco_module()
    sight = look(scenario.weather)
    model = mujoco.MjModel.from_xml_string(_document(scenario, sight))
    _paint(mujoco, model, scenario)
    x, y, heading = scenario.route.path[0, :3]
    model.qpos0[:7] = (x, y, 0.0, math.cos(heading / 2), 0.0, 0.0, math.sin(heading / 2))
    names = [model.geom(i).name for i in range(model.ngeom)]
    owner = tuple(_owner(name, scenario) for name in names)
    return Scene(
        model=model, look=sight, owner=owner,
        reflectivity=np.array([REFLECTIVITY[o.kind] if o else 0.0 for o in owner]),
        users=tuple(int(model.body(f"user/{i}").mocapid[0]) for i in range(len(scenario.spawns))),
        lamps=tuple(int(model.material(f"lamp/{i}").id) for i in range(len(scenario.town.lights))),
    )  # fmt: skip


def _owner(name: str, scenario: Scenario) -> Touched | None:
    what, _, rest = name.partition("/")
    index = int(rest.split("/")[0]) if rest else 0
    if what == "solid":
        return Touched(scenario.town.solids[index].kind, index)
    if what == "user":
        return Touched(scenario.spawns[index].kind, index)
    return Touched("light", index) if what == "light" else None


def _paint(mujoco: Any, model: Any, scenario: Scenario) -> None:
    """The ground's texture. A texture's row 0 is at the plane's largest y."""
    texture = model.tex("ground")
    picture = ground_picture(scenario.town.ground, scenario.weather)[::-1]
    start = int(texture.adr[0])
    model.tex_data[start : start + picture.size] = picture.reshape(-1)


def _document(scenario: Scenario, sight: Look) -> str:
    town = scenario.town
    bodies = [
        _ground(scenario),
        *(_solid(i, solid) for i, solid in enumerate(town.solids)),
        *(_light(i, light) for i, light in enumerate(town.lights)),
        *(_user(i, spawn) for i, spawn in enumerate(scenario.spawns)),
        _ego(),
    ]
    lamps = (f'<material name="lamp/{i}" emission="1" specular="0" rgba="1 1 1 1"/>' for i in range(len(town.lights)))
    height, width = town.ground.cells.shape
    haze = 1000.0 if sight.haze_m is None else sight.haze_m
    return f"""
<mujoco>
  <compiler angle="radian"/>
  <option timestep="{TIMESTEP_S}" integrator="implicitfast" cone="elliptic" impratio="20"/>
  <statistic extent="1" meansize="1" center="0 0 0"/>
  <visual>
    <global offwidth="{PEOPLE_SIZE}" offheight="{PEOPLE_SIZE}"/>
    <quality shadowsize="0" offsamples="0" numslices="12" numstacks="6" numquads="1"/>
    <headlight ambient="{_row(sight.ambient)}" diffuse="0 0 0" specular="0 0 0"/>
    <map znear="0.2" zfar="1000" fogstart="{0.1 * haze}" fogend="{haze}"/>
    <rgba fog="{_row(sight.horizon)} 1"/>
  </visual>
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1="{_row(sight.zenith)}" rgb2="{_row(sight.horizon)}"
      width="32" height="192"/>
    <texture name="ground" type="2d" builtin="flat" width="{width}" height="{height}"/>
    <material name="ground" texture="ground" texuniform="false" texrepeat="1 1" specular="0" shininess="0"/>
    {"".join(lamps)}
  </asset>
  <worldbody>
    <light directional="true" castshadow="false" pos="0 0 50" dir="{_row(sight.direction)}"
      diffuse="{_row(sight.sun)}" ambient="0 0 0" specular="0 0 0"/>
    {"".join(bodies)}
  </worldbody>
  <actuator>
    <position joint="steer/front_left" kp="6000" dampratio="1" ctrlrange="-1 1"/>
    <position joint="steer/front_right" kp="6000" dampratio="1" ctrlrange="-1 1"/>
    {"".join(f'<motor joint="spin/{wheel}"/>' for wheel in WHEELS)}
  </actuator>
  <sensor>
    <accelerometer site="imu"/>
    <gyro site="imu"/>
  </sensor>
</mujoco>"""


def _ground(scenario: Scenario) -> str:
    raster = scenario.town.ground
    height, width = (n * raster.resolution_m / 2 for n in raster.cells.shape)
    x, y = raster.origin[0] + width, raster.origin[1] + height
    return f"""
    <geom name="plane" type="plane" size="0 0 100" group="{RAY_GROUP}" contype="0" conaffinity="2" friction="0.9"/>
    <geom name="grass" type="plane" pos="{x} {y} -0.05" size="{width + 150} {height + 150} 1000" group="{PAINT_GROUP}"
      contype="0" conaffinity="0" rgba="{_row(grass_colour(scenario.weather))} 1"/>
    <geom name="ground" type="plane" pos="{x} {y} 0" size="{width} {height} 1000" material="ground"
      group="{PAINT_GROUP}" contype="0" conaffinity="0"/>"""


def _solid(index: int, solid: Solid) -> str:
    length, width, height = solid.size
    size = f"{length / 2} {width / 2} {height / 2}" if solid.shape == "box" else f"{length / 2} {height / 2}"
    return (f'<geom name="solid/{index}" type="{solid.shape}" size="{size}" pos="{_row(solid.position)}" '
            f'euler="0 0 {solid.heading}" rgba="{_row(solid.colour)} 1" contype="0" conaffinity="4"/>')  # fmt: skip


def _light(index: int, light: Light) -> str:
    """A pole, a dark board, and its face, which shines in the light's colour.

    The board is large enough for small pictures, and its visors hide the face from the crossing traffic.
    """
    x, y, z = light.position
    plain = f'contype="0" conaffinity="0" group="{SOLID_GROUP}" rgba="{_row(DARK)} 1"'
    return f"""
    <body pos="{x} {y} 0" euler="0 0 {light.heading}">
      <geom name="light/{index}/pole" type="cylinder" size="0.08 {z / 2}" pos="-0.15 0 {z / 2}"
        rgba="0.35 0.35 0.36 1" contype="0" conaffinity="4"/>
      <geom name="light/{index}/board" type="box" size="0.05 1 1.1" pos="0 0 {z}" {plain}/>
      <geom name="light/{index}/left" type="box" size="0.7 0.02 1.1" pos="0.7 0.95 {z}" {plain}/>
      <geom name="light/{index}/right" type="box" size="0.7 0.02 1.1" pos="0.7 -0.95 {z}" {plain}/>
      <geom name="lamp/{index}" type="box" size="0.01 0.85 0.95" pos="0.06 0 {z}" material="lamp/{index}"
        group="{PAINT_GROUP}" contype="0" conaffinity="0"/>
    </body>"""


def _user(index: int, spawn: Spawn) -> str:
    """A road user: what is seen of it, and its box, which touches. A person gives way, where a vehicle does not."""
    length, width, height = spawn.size
    soft = spawn.kind in ("pedestrian", "cyclist")
    touch = 'priority="1" solref="-0.05 -0.5" solimp="0.05 0.05 0.01"' if soft else ""
    shapes = "".join(
        f'<geom name="user/{index}/{k}" type="{kind}" pos="{_row(place)}" size="{_row(size)}" {turn} '
        f'rgba="{_row(colour)} 1" contype="0" conaffinity="0" group="{SOLID_GROUP}"/>'
        for k, (kind, place, size, turn, colour) in enumerate(_shapes(spawn.kind, spawn.size, spawn.colour))
    )
    return f"""
    <body name="user/{index}" mocap="true" pos="{_row(FAR_AWAY)}">{shapes}
      <geom name="user/{index}/hull" type="box" size="{length / 2} {width / 2} {height / 2}" pos="0 0 {height / 2}"
        contype="0" conaffinity="4" group="{HULL_GROUP}" {touch}/>
    </body>"""


_Shape = tuple[str, tuple[float, ...], tuple[float, ...], str, Colour]
_ACROSS = f'euler="{math.pi / 2} 0 0"'


def _shapes(kind: RoadUserKind, size: tuple[float, float, float], colour: Colour) -> list[_Shape]:
    """What is seen of a road user, around the middle of its box on the ground: type, place, half size, turn, colour."""
    length, width, height = size
    a, b = length / 2, width / 2
    if kind == "pedestrian":
        return [
            ("cylinder", (0, 0, 0.22 * height), (0.4 * b, 0.22 * height), "", DARK),
            ("cylinder", (0, 0, 0.64 * height), (0.7 * b, 0.21 * height), "", colour),
            ("sphere", (0, 0, 0.92 * height), (0.08 * height,), "", SKIN),
        ]
    if kind == "cyclist":
        wheel = 0.19 * height
        return [
            ("cylinder", (0.6 * a, 0, wheel), (wheel, 0.04), _ACROSS, DARK),
            ("cylinder", (-0.6 * a, 0, wheel), (wheel, 0.04), _ACROSS, DARK),
            ("box", (0, 0, 0.36 * height), (0.6 * a, 0.05, 0.1 * height), "", DARK),
            ("box", (-0.1 * a, 0, 0.66 * height), (0.2 * a, 0.8 * b, 0.2 * height), "", colour),
            ("sphere", (0.1 * a, 0, 0.93 * height), (0.07 * height,), "", SKIN),
        ]
    wheel = min(0.45, 0.22 * height)
    axles: list[_Shape] = [
        ("cylinder", (sign * 0.6 * a, 0, wheel), (wheel, 0.98 * b), _ACROSS, DARK) for sign in (1, -1)
    ]
    low, high = 0.17 * height, (0.58 if kind == "car" else 1.0) * height
    tail: _Shape = ("box", (-a, 0, low + 0.3 * (high - low)), (0.02, 0.85 * b, 0.06 * (high - low)), "", TAIL)
    if kind == "car":
        return [
            *axles, tail,
            ("box", (0, 0, (low + high) / 2), (a, b, (high - low) / 2), "", colour),
            ("box", (-0.08 * a, 0, (high + height) / 2), (0.55 * a, 0.9 * b, (height - high) / 2), "", GLASS),
        ]  # fmt: skip
    if kind == "bus":
        return [
            *axles, tail,
            ("box", (0, 0, (low + high) / 2), (a, b, (high - low) / 2), "", colour),
            ("box", (0, 0, 0.68 * height), (1.004 * a, 1.01 * b, 0.14 * height), "", GLASS),
        ]  # fmt: skip
    return [
        *axles, tail,
        ("box", (0.76 * a, 0, 0.48 * height), (0.24 * a, 0.95 * b, 0.31 * height), "", colour),
        ("box", (-0.25 * a, 0, (low + height) / 2), (0.73 * a, b, (height - low) / 2), "", (0.75, 0.75, 0.72)),
        ("box", (0.995 * a, 0, 0.62 * height), (0.01 * a, 0.9 * b, 0.1 * height), "", GLASS),
    ]  # fmt: skip


def _ego() -> str:
    """The vehicle around base_link: a chassis whose box touches, and four wheels that roll on the ground alone.

    Wheels are spheres: they touch the ground in one point, as a thin tyre does, and turn without scrubbing.
    """
    middle = LENGTH_M / 2 - REAR_OVERHANG_M
    wheels = []
    for wheel in WHEELS:
        x = WHEELBASE_M if wheel.startswith("front") else 0.0
        y = TRACK_M / 2 if wheel.endswith("left") else -TRACK_M / 2
        steer = f'<joint name="steer/{wheel}" axis="0 0 1" armature="1"/>' if x else ""
        wheels.append(f"""
      <body pos="{x} {y} {WHEEL_RADIUS_M}">{steer}
        <joint name="spin/{wheel}" axis="0 1 0"/>
        <geom type="sphere" size="{WHEEL_RADIUS_M}" mass="20" contype="2" conaffinity="0" friction="0.9"
          condim="3" group="{HULL_GROUP}"/>
        <geom type="cylinder" size="{WHEEL_RADIUS_M} 0.11" euler="{math.pi / 2} 0 0" mass="0" contype="0"
          conaffinity="0" group="{EGO_GROUP}" rgba="{_row(DARK)} 1"/>
      </body>""")
    body = "".join(
        f'<geom type="{kind}" pos="{place[0] + middle} {place[1]} {place[2]}" size="{_row(size)}" {turn} mass="0" '
        f'rgba="{_row(colour)} 1" contype="0" conaffinity="0" group="{EGO_GROUP}"/>'
        for kind, place, size, turn, colour in _shapes("car", (LENGTH_M, WIDTH_M, HEIGHT_M), (0.85, 0.12, 0.12))[2:]
    )
    tall = HEIGHT_M - CLEARANCE_M
    return f"""
    <body name="{BASE}">
      <freejoint/>
      <inertial pos="{WHEELBASE_M / 2} 0 0.5" mass="{MASS_KG - 80}" diaginertia="450 2000 2200"/>
      <geom name="hull" type="box" pos="{middle} 0 {CLEARANCE_M + tall / 2}"
        size="{LENGTH_M / 2} {WIDTH_M / 2} {tall / 2}" contype="4" conaffinity="0" friction="0.3"
        group="{HULL_GROUP}"/>
      <site name="imu" pos="{_row(MOUNTS["imu"][:3])}"/>{body}{"".join(wheels)}
    </body>"""


def _row(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.6g}" for value in values)
