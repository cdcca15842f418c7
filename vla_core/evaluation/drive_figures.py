"""What a driving policy sees and means to do at some instants of a recorded drive, as pictures for a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import PolyCollection

from vla_core.contract import NANOSECONDS
from vla_core.data.episodes import replay_ticks, replayed
from vla_core.evaluation.driven import EGO, Drive
from vla_core.evaluation.driving import Route
from vla_core.evaluation.planning import Plans, into_frame
from vla_core.evaluation.plots import BLUE, GREEN, GREY, ORANGE, png
from vla_core.observation.builder import Observation, Unobserved
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.policy import CheckpointPolicy

# Left to right as one would turn the head; what is called otherwise comes behind.
AROUND = ("front_left", "front", "front_right", "back_left", "back", "back_right")
REACH_M = ((-8.0, 40.0), (-24.0, 24.0))  # x and y of what is shown where the policy has no map


@dataclass(frozen=True, eq=False, kw_only=True)
class Glimpse:
    """One instant of a drive, in the vehicle's frame.

    ``planned`` and ``driven`` (H, 3) poses, ``others`` (U, 5) boxes of road users, ``points`` (N, 3) x, y and
    intensity of the LiDAR; ``above`` (X, Y) the mean size of the features of the policy's map over ``extent`` (its
    ends along x, and along y), None where it has no map.
    """

    seconds: float
    observation: Observation
    planned: np.ndarray
    driven: np.ndarray
    others: np.ndarray
    points: np.ndarray
    above: np.ndarray | None
    extent: tuple[tuple[float, float], tuple[float, float]]


def glimpses(drive: Drive, core: PolicyCore, count: int) -> list[Glimpse]:
    """``count`` instants of a drive, spread over it, as the policy sees them when its bag is replayed."""
    wanted = list(np.linspace(drive.stamps_ns[0], drive.stamps_ns[-1], count + 2)[1:-1])
    found: list[Glimpse] = []
    core.buffer.clear()
    ticks = replay_ticks(replayed(drive.path, core.builder), core.builder, core.buffer)
    with _map_of(core) as above:
        for tick_ns in ticks:
            if not wanted or tick_ns < wanted[0]:
                continue
            try:
                chunk = core.predict(tick_ns)
            except Unobserved:
                continue
            wanted.pop(0)
            seen = core.last_observation
            assert seen is not None
            found.append(_glimpse(drive, core, seen, chunk.actions, above[-1] if above else None))
    return found


def _glimpse(
    drive: Drive, core: PolicyCore, seen: Observation, actions: np.ndarray, above: np.ndarray | None
) -> Glimpse:
    contract, model = core.contract, core.policy.model
    columns = [contract.action_names.index(name) for name in ("x", "y", "yaw")]
    times = seen.stamp_ns + np.arange(len(actions)) * contract.chunk_step_ns
    now = drive.pose(times[:1])
    others = drive.boxes(times[:1])[0]
    others = others[np.isfinite(others[:, 0])]
    others[:, :3] = into_frame(others[:, :3], now)
    grid = None if above is None else model.bev.grid
    return Glimpse(
        seconds=(seen.stamp_ns - drive.stamps_ns[0]) / NANOSECONDS, observation=seen, planned=actions[:, columns],
        driven=into_frame(drive.pose(times), now), others=others,
        points=_points(seen, core, getattr(model, "mounts", {})), above=above,
        extent=REACH_M if grid is None else (grid.x_m, grid.y_m),
    )  # fmt: skip


def _points(seen: Observation, core: PolicyCore, mounts: Mapping[str, Sequence[float]]) -> np.ndarray:
    """LiDAR points (N, 3) of x, y and intensity in the vehicle's frame; a LiDAR is a cloud with intensity."""
    for name, cloud in seen.clouds.items():
        names = core.contract.stream(name).names
        if "intensity" in names:
            x, y, intensity = (cloud[:, names.index(column)] for column in ("x", "y", "intensity"))
            ahead, left, *_ = mounts.get(name, (0.0, 0.0))
            return np.stack((x + ahead, y + left, intensity), axis=-1)
    return np.zeros((0, 3))


@contextmanager
def _map_of(core: PolicyCore) -> Iterator[list[np.ndarray]]:
    """Is filled with the mean absolute activation (X, Y) of the model's map at each prediction, the newest last."""
    seen: list[np.ndarray] = []
    policy = core.policy
    bev = getattr(policy.checkpoint.model, "bev", None) if isinstance(policy, CheckpointPolicy) else None
    if bev is None:
        yield seen
        return

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        seen[:] = [output[-1].detach().abs().mean(0).float().numpy()]

    handle = bev.mix.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def glimpse(shown: Glimpse) -> bytes:
    """Cameras, the policy's map and the scene from above, side by side, as PNG."""
    figure, (cameras, features, scene) = plt.subplots(1, 3, figsize=(13, 3.9), width_ratios=(1.55, 1, 1))
    cameras.imshow(mosaic(shown.observation.images))
    cameras.set_title(f"“{shown.observation.instruction}”", fontsize=9)
    cameras.axis("off")
    (x_low, x_high), (y_low, y_high) = shown.extent
    if shown.above is None:
        features.text(0.5, 0.5, "no map", ha="center", transform=features.transAxes)
    else:
        features.imshow(shown.above[::-1, ::-1], extent=(y_high, y_low, x_low, x_high), cmap="magma", aspect="equal")
    features.set_title("features of the map, mean size", fontsize=9)
    if len(shown.points):
        scene.scatter(shown.points[:, 1], shown.points[:, 0], c=shown.points[:, 2], s=1.2, cmap="gray_r", vmin=-0.4,
                      vmax=0.8, linewidths=0)  # fmt: skip
    scene.set_title("LiDAR, road users, plan and drive", fontsize=9)
    for axis in (features, scene):
        own = corners(EGO.boxes(np.zeros((1, 3))))
        axis.add_collection(PolyCollection(list(own[..., ::-1]), facecolor="none", edgecolor=BLUE, lw=1.2))
        axis.add_collection(
            PolyCollection(list(corners(shown.others)[..., ::-1]), facecolor="none", edgecolor=GREY, lw=1.0)
        )
        axis.plot(shown.driven[:, 1], shown.driven[:, 0], color=GREEN, lw=2, label="driven")
        axis.plot(shown.planned[:, 1], shown.planned[:, 0], color=ORANGE, lw=1.4, marker="o", ms=3, label="planned")
        axis.set_xlim(y_high, y_low)
        axis.set_ylim(x_low, x_high)
        axis.set_aspect("equal")
        axis.set_xlabel("left [m]", fontsize=8)
        axis.tick_params(labelsize=7)
    features.set_ylabel("ahead [m]", fontsize=8)
    scene.legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    return png(figure)


def mosaic(pictures: Mapping[str, np.ndarray], gap: int = 2) -> np.ndarray:
    """Pictures (H, W, 3) uint8 in rows of three, as one; of different sizes each is put into a cell of the largest."""
    names = [name for name in AROUND if name in pictures]
    names += [name for name in pictures if name not in names]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / max(columns, 1))
    height = max((pictures[name].shape[0] for name in names), default=1)
    width = max((pictures[name].shape[1] for name in names), default=1)
    whole = np.full((rows * (height + gap) or 1, columns * (width + gap) or 1, 3), 255, np.uint8)
    for place, name in enumerate(names):
        top, left = (place // columns) * (height + gap), (place % columns) * (width + gap)
        picture = pictures[name]
        whole[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return whole


def corners(boxes: np.ndarray) -> np.ndarray:
    """The corners (..., 4, 2) of boxes (..., 5)."""
    cos, sin = np.cos(boxes[..., 2, None]), np.sin(boxes[..., 2, None])
    along = np.array([1, -1, -1, 1]) * boxes[..., 3, None] / 2
    aside = np.array([1, 1, -1, -1]) * boxes[..., 4, None] / 2
    x = boxes[..., 0, None] + cos * along - sin * aside
    y = boxes[..., 1, None] + sin * along + cos * aside
    return np.stack((x, y), axis=-1)


def route_scores(routes: Sequence[Route]) -> bytes:
    """Driving score of each route, by kind; a point a route, filled where it succeeded."""
    kinds = sorted({route.kind for route in routes})
    figure, axis = plt.subplots(figsize=(7, 0.7 + 0.35 * len(kinds)))
    for place, kind in enumerate(kinds):
        mine = [route for route in routes if route.kind == kind]
        spread = np.linspace(-0.22, 0.22, len(mine)) if len(mine) > 1 else np.zeros(1)
        for route, aside in zip(mine, spread, strict=True):
            axis.plot(route.score, place + aside, "o", ms=5, color=BLUE, mfc=BLUE if route.success else "white")
        axis.plot([np.mean([route.score for route in mine])] * 2, [place - 0.33, place + 0.33], color=ORANGE, lw=2)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_ylim(len(kinds) - 0.5, -0.5)
    axis.set_xlim(-3, 103)
    axis.set_xlabel("driving score of each route (filled: success), and the mean")
    axis.grid(axis="x", alpha=0.3)
    return png(figure)


def score_bars(rows: Sequence[tuple[str, float, tuple[float, float] | None]]) -> bytes:
    """Driving scores with 95 % intervals; the first is the reference."""
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.36 * len(rows)))
    for place, (_, score, interval) in enumerate(rows):
        low, high = interval or (score, score)
        axis.barh(place, score, color=BLUE if place == 0 else GREY, height=0.62)
        axis.errorbar(score, place, xerr=[[max(0.0, score - low)], [max(0.0, high - score)]], color="black", capsize=3,
                      lw=1)  # fmt: skip
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, 103)
    axis.set_xlabel("driving score, 95 % interval (bootstrap over routes)")
    return png(figure)


def displacement(named: Mapping[str, Sequence[Plans]]) -> bytes:
    """Mean displacement over the time ahead, a line for each set of plans."""
    figure, axis = plt.subplots(figsize=(5, 3))
    for (name, plans), colour in zip(named.items(), (ORANGE, GREY, GREEN, BLUE), strict=False):
        distance = np.concatenate([np.where(p.known, p.displacement(), np.nan) for p in plans])
        times = plans[0].times_s
        axis.plot(times, np.nanmean(distance, axis=0), marker="o", ms=3, color=colour, label=name)
    axis.set_xlabel("time ahead [s]")
    axis.set_ylabel("displacement [m]")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return png(figure)
