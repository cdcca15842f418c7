"""How the driving world looks by its weather: colours and grain of the ground, light, sky and haze."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_core.sim.driving.layout import Raster, Surface, Weather

Colour = tuple[float, float, float]

GROUND: dict[Surface, Colour] = {
    Surface.GRASS: (0.33, 0.45, 0.22),
    Surface.ROAD: (0.27, 0.27, 0.28),
    Surface.MARKING: (0.86, 0.86, 0.83),
    Surface.SIDEWALK: (0.60, 0.57, 0.53),
    Surface.CROSSWALK: (0.84, 0.84, 0.82),
    Surface.STOP_LINE: (0.92, 0.92, 0.90),
}
LAMPS: dict[str, Colour] = {"red": (1.0, 0.08, 0.05), "yellow": (1.0, 0.75, 0.05), "green": (0.05, 0.95, 0.25)}
GRAINS = 8  # brightnesses of a surface; their order is random, so that no ground is flat
TILE = 256  # cells; the grain repeats
SKIES: dict[str, tuple[Colour, Colour]] = {  # zenith, horizon
    "day": ((0.30, 0.52, 0.85), (0.72, 0.82, 0.92)),
    "dusk": ((0.16, 0.17, 0.33), (0.75, 0.45, 0.30)),
    "fog": ((0.70, 0.72, 0.74), (0.72, 0.74, 0.75)),
}
LIGHTS: dict[str, tuple[float, float]] = {"day": (0.45, 0.60), "dusk": (0.60, 0.60), "fog": (0.62, 0.25)}


@dataclass(frozen=True, kw_only=True)
class Look:
    """Light and air: colours of the sky and the haze, ambient and sun light, from where the sun shines, m of sight."""

    zenith: Colour
    horizon: Colour
    ambient: Colour
    sun: Colour
    direction: tuple[float, float, float]
    haze_m: float | None


def look(weather: Weather) -> Look:
    """The light of a weather. Brightness and tint act on light and sky alike."""
    zenith, horizon = SKIES[weather.time]
    ambient, sun = LIGHTS[weather.time]
    light = np.array(weather.tint) * weather.brightness
    warm = np.array([1.1, 0.9, 0.75]) if weather.time == "dusk" else np.ones(3)
    return Look(
        zenith=_colour(np.array(zenith) * light), horizon=_colour(np.array(horizon) * light),
        ambient=_colour(ambient * light), sun=_colour(sun * light * warm), direction=weather.sun,
        haze_m=weather.fog_m,
    )  # fmt: skip


def ground_picture(ground: Raster, weather: Weather) -> np.ndarray:
    """The raster's colours (H, W, 3) uint8 RGB, row 0 at the smallest y, as the raster has it."""
    random = np.random.default_rng([weather.texture_seed, 11])
    table = palette(weather)
    height, width = ground.cells.shape
    fine = random.integers(0, GRAINS // 2, (TILE, TILE), dtype=np.uint8)
    coarse = random.integers(0, GRAINS // 2 + 1, (TILE // 16, TILE // 16), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    grain = (fine + coarse) * np.uint8(len(Surface))
    tiled = np.tile(grain, (-(-height // TILE), -(-width // TILE)))[:height, :width]
    return table[tiled + ground.cells]


def palette(weather: Weather) -> np.ndarray:
    """Colours (GRAINS * surfaces, 3) uint8: each surface in each brightness, shifted a little by the texture seed."""
    random = np.random.default_rng([weather.texture_seed, 12])
    base = np.array([GROUND[surface] for surface in Surface])
    base = base * random.uniform(0.88, 1.12, (len(base), 1)) * random.uniform(0.97, 1.03, base.shape)
    grains = np.linspace(0.85, 1.15, GRAINS)[:, None, None]
    return np.clip(base[None] * grains * 255, 0, 255).astype(np.uint8).reshape(-1, 3)


def grass_colour(weather: Weather) -> Colour:
    """The mean colour of the grass, for what lies outside the raster."""
    table = palette(weather).reshape(GRAINS, len(Surface), 3)
    return _colour(table[:, Surface.GRASS].mean(axis=0) / 255)


def _colour(values: np.ndarray) -> Colour:
    red, green, blue = np.clip(values, 0.0, 1.0).tolist()
    return red, green, blue
