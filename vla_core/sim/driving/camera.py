"""Pictures of the driving world: the surround cameras in one go, and views for people.

All cameras are drawn side by side into one buffer, which is read once. Each sees the same list of shapes: only the
place of the eye differs, so the list is made once a tick.
"""

from __future__ import annotations

import atexit
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_core.sim.driving.mounts import CAMERAS, MOUNTS, rotation
from vla_core.sim.driving.scene import EGO_GROUP, PAINT_GROUP, PEOPLE_SIZE, SOLID_GROUP, Scene, mujoco_module

COLUMNS = 3
NEAR_M, FAR_M = 0.2, 250.0
CHASE = (-9.0, 0.0, 4.5)  # m from base_link


@dataclass(frozen=True, kw_only=True)
class TopDown:
    """A view straight down: the map's point (x, y) is its middle, its upper side is ``heading``, ``metres`` wide."""

    x: float
    y: float
    heading: float
    metres: float
    size: int

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Columns and rows (..., 2) float64 of map points (..., 2), in pixels whose centres have whole coordinates."""
        offset = np.asarray(points, dtype=np.float64)[..., :2] - (self.x, self.y)
        cosine, sine = math.cos(self.heading), math.sin(self.heading)
        ahead = offset[..., 0] * cosine + offset[..., 1] * sine
        left = offset[..., 1] * cosine - offset[..., 0] * sine
        scale = self.size / self.metres
        return np.stack([(self.size - 1) / 2 - left * scale, (self.size - 1) / 2 - ahead * scale], axis=-1)


class Cameras:
    """Draws a scene. ``size`` are pixels of the surround cameras' square pictures."""

    def __init__(self, scene: Scene, data: Any, size: int) -> None:
        mujoco = self._mujoco = mujoco_module()
        self._scene, self._data, self.size = scene, data, size
        visual = scene.model.vis.global_
        visual.offwidth = max(PEOPLE_SIZE, COLUMNS * size)
        visual.offheight = max(PEOPLE_SIZE, -(-len(CAMERAS) // COLUMNS) * size)
        _gl_context().make_current()
        self._context: Any = mujoco.MjrContext(scene.model, mujoco.mjtFontScale.mjFONTSCALE_50)
        self._picture = mujoco.MjvScene(scene.model, maxgeom=scene.model.ngeom + 10)
        # Shadow maps and mirrors cost ten times the rest of the picture.
        self._picture.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._picture.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._sensors = self._options(SOLID_GROUP, PAINT_GROUP)
        self._people = self._options(SOLID_GROUP, PAINT_GROUP, EGO_GROUP)
        self._free, self._nothing = mujoco.MjvCamera(), mujoco.MjvPerturb()

    def pictures(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """What these cameras see now: (size, size, 3) uint8 RGB each."""
        if not names:
            return {}
        self._begin(self._sensors, haze=True)
        size, rows = self.size, -(-len(names) // COLUMNS)
        for i, name in enumerate(names):
            row, column = divmod(i, COLUMNS)
            mount = MOUNTS[name]
            self._look(self._mount_point(mount), self._base_axes() @ rotation(mount), math.radians(CAMERAS[name]))
            self._draw(column * size, row * size, size)
        found = self._read(COLUMNS * size, rows * size).reshape(rows, size, COLUMNS, size, 3)
        return {
            name: np.ascontiguousarray(found[i // COLUMNS, ::-1, i % COLUMNS])  # the buffer's row 0 is the lowest
            for i, name in enumerate(names)
        }

    def chase(self, size: int) -> np.ndarray:
        """From behind and above the vehicle, (size, size, 3) uint8 RGB."""
        self._begin(self._people, haze=True)
        x, y = self._data.qpos[:2].tolist()
        ahead = self._base_axes()[:2, 0] / np.linalg.norm(self._base_axes()[:2, 0])
        eye = np.array([x + CHASE[0] * ahead[0], y + CHASE[0] * ahead[1], CHASE[2]])
        target = np.array([x + 6 * ahead[0], y + 6 * ahead[1], 0.5])
        forward = (target - eye) / np.linalg.norm(target - eye)
        right = np.array([ahead[1], -ahead[0], 0.0])
        self._look(eye, np.stack([right, np.cross(forward, right), forward], axis=1), math.radians(60))
        self._draw(0, 0, size)
        return np.ascontiguousarray(self._read(size, size)[::-1])

    def top_down(self, view: TopDown) -> np.ndarray:
        """From straight above, without perspective and haze: (view.size, view.size, 3) uint8 RGB."""
        self._begin(self._people, haze=False)
        up = np.array([math.cos(view.heading), math.sin(view.heading), 0.0])
        down = np.array([0.0, 0.0, -1.0])
        axes = np.stack([np.cross(-up, down), -up, down], axis=1)
        self._look(np.array([view.x, view.y, 100.0]), axes, None, view.metres / 2)
        self._draw(0, 0, view.size)
        return np.ascontiguousarray(self._read(view.size, view.size)[::-1])

    def close(self) -> None:
        """Free the scene's textures and buffers."""
        if self._context is not None:
            _gl_context().make_current()
            self._context.free()
            self._context = None

    def _options(self, *groups: int) -> Any:
        option = self._mujoco.MjvOption()
        option.geomgroup[:] = 0
        option.geomgroup[list(groups)] = 1
        return option

    def _begin(self, option: Any, haze: bool) -> None:
        mujoco, picture = self._mujoco, self._picture
        _gl_context().make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)  # not another scene's
        mujoco.mjv_updateScene(
            self._scene.model, self._data, option, self._nothing, self._free, mujoco.mjtCatBit.mjCAT_ALL, picture
        )
        picture.flags[mujoco.mjtRndFlag.mjRND_FOG] = int(haze and self._scene.look.haze_m is not None)

    def _base_axes(self) -> np.ndarray:
        axes = np.zeros(9)
        self._mujoco.mju_quat2Mat(axes, self._data.qpos[3:7])
        return axes.reshape(3, 3)

    def _mount_point(self, mount: Sequence[float]) -> np.ndarray:
        return self._data.qpos[:3] + self._base_axes() @ np.array(mount[:3])

    def _look(self, eye: np.ndarray, axes: np.ndarray, angle: float | None, half_m: float = 0.0) -> None:
        """Look from ``eye`` along the optical ``axes`` (3, 3); without an ``angle`` in parallel, ``half_m`` aside."""
        half = half_m if angle is None else NEAR_M * math.tan(angle / 2)
        for camera in self._picture.camera:  # both eyes of MuJoCo's stereo camera
            camera.pos[:], camera.forward[:], camera.up[:] = eye, axes[:, 2], -axes[:, 1]
            camera.frustum_near, camera.frustum_far = NEAR_M, FAR_M
            camera.frustum_top, camera.frustum_bottom = half, -half
            camera.frustum_center, camera.frustum_width = 0.0, half
            camera.orthographic = int(angle is None)

    def _draw(self, left: int, bottom: int, size: int) -> None:
        self._mujoco.mjr_render(self._mujoco.MjrRect(left, bottom, size, size), self._picture, self._context)

    def _read(self, width: int, height: int) -> np.ndarray:
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        self._mujoco.mjr_readPixels(pixels, None, self._mujoco.MjrRect(0, 0, width, height), self._context)
        return pixels


@functools.cache
def _gl_context() -> Any:
    """One context for all scenes of the process: making one anew costs more than an episode's scene."""
    atexit.register(_gl_context.cache_clear)  # freed while the library that it needs is still there
    return mujoco_module().GLContext(PEOPLE_SIZE, PEOPLE_SIZE)
