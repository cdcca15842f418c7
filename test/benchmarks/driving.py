"""The suite ``driving``: the whole sensor set of the simulated vehicle to a trajectory, stage by stage, and its parts.

Messages are those of the simulator, weights are random: no time depends on what they are. One thread where a row's
name says nothing else. Stages are timed in one process; what the middleware adds is measured by the suite ``robot``.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from test.benchmarks import driving_peers as peers
from test.benchmarks import model_peers
from test.benchmarks.driving_tick import Drive, record, untrained
from test.benchmarks.framework import BenchmarkError, Row, Settings, Suite, compared, measured
from test.benchmarks.model import CHILD_LIMIT_S, both, in_turns, same_weights, threads
from vla_core.commands import encode
from vla_core.model.sensor.bev import BEVConfig, Cameras, CloudColumns, LiftSplat, Pillars, PointSet
from vla_core.model.sensor.ground_view import GroundView
from vla_core.model.sensor.lidar_encoder import (
    PointCloudConfig,
    PointCloudEncoder,
    SetAbstractionConfig,
    canonical_order,
    gather_rows,
)
from vla_core.model.vla.multi_sensor_vla import pose_matrix
from vla_core.observation.batch import collate
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.follower import TrajectoryFollower
from vla_core.training.recipe import load_preset, load_recipe

TICKS, PASSES = 100, 3
BATCH = 32
PARTS = ("vision", "projector", "sensors", "bev", "fusion", "language", "head")
STAGES = ("buffer", "decode", "build", "tensors", *(f"model: {part}" for part in PARTS), "model: rest", "publish",
          "follow")  # fmt: skip
Spent = np.ndarray  # seconds (2,): on the wall, of the processor
TICK_GOAL_MS, MODEL_GOAL_MS, STEP_GOAL_MS = 100, 30, 500


class Watch:
    """Seconds by stage, on the wall and of the processor; a stage within another one counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, Spent] = defaultdict(lambda: np.zeros(2))
        self._inner = [np.zeros(2)]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block."""
        start = _now()
        self._inner.append(np.zeros(2))
        try:
            yield
        finally:
            spent = _now() - start
            self.seconds[name] += spent - self._inner.pop()
            self._inner[-1] += spent

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return timed


def _now() -> Spent:
    return np.array([time.perf_counter(), time.thread_time()])


def watched(core: PolicyCore, watch: Watch) -> None:
    """Time the decoding of messages and the parts of the model."""
    core.builder._decode = watch.around("decode", core.builder._decode)  # type: ignore[method-assign]
    model = core.policy.checkpoint.model
    for part in PARTS:
        modules = model.sensors.values() if part == "sensors" else [getattr(model, part)]
        for module in modules:
            module.forward = watch.around(f"model: {part}", module.forward)
    model.head.predict = watch.around("model: head", model.head.predict)


def drive(core: PolicyCore, recorded: Drive, watch: Watch, each: Callable[[dict[str, Spent]], None]) -> None:
    """Replay a drive: every tick from its messages to the command of the follower; ``each`` gets a tick's stages."""
    contract, checkpoint = core.contract, core.policy.checkpoint
    follower = TrajectoryFollower(contract)
    (action,) = contract.actions.values()
    core.forget()
    core.start_episode(recorded.ticks[0].stamp_ns)
    for tick in recorded.ticks:
        watch.seconds.clear()
        with watch.stage("buffer"):
            for name, data in tick.messages:
                if name in core.builder.streams:  # the follower's odometry is not the policy's
                    core.add(name, data, tick.stamp_ns)
        with watch.stage("build"):
            observation = core.builder.build(core.buffer, tick.stamp_ns)
        with watch.stage("tensors"):
            model = checkpoint.model
            inputs = collate([observation], checkpoint.normalizer, checkpoint.tokenizer, core.policy.spec,
                             remembers=model.remembers)  # fmt: skip
        with watch.stage("model: rest"):
            chunk = model.predict(inputs)[0].numpy()
        with watch.stage("publish"):
            rows = checkpoint.normalizer.unnormalize("action", chunk)
            message = encode(action, tick.stamp_ns, rows, contract.chunk_step_ns)
        with watch.stage("follow"):
            for data in tick.odometry:
                follower.add_odometry(data)
            fault = follower.add_trajectory(message)
            follower.command(tick.stamp_ns)
        if fault:
            raise BenchmarkError(f"the follower refuses the trajectory: {fault}")
        each(dict(watch.seconds))


def stages(settings: Settings) -> Iterator[Row]:
    """p50 and p99 of every stage and of the whole in passes over a recorded drive, and their time of the processor,
    which says what they cost where other programs run too."""
    recorded = record(TICKS)
    core, watch = PolicyCore(untrained(recorded)), Watch()
    watched(core, watch)
    passes: list[list[dict[str, Spent]]] = []
    with threads(1):
        core.warm_up()
        drive(core, recorded, watch, lambda stage: None)
        for _ in range(PASSES * (5 if settings.long else 1)):
            passes.append([])
            drive(core, recorded, watch, passes[-1].append)
    if any(set(tick) != set(STAGES) for ticks in passes for tick in ticks):
        raise BenchmarkError(f"stages measured: {sorted(passes[0][0])}; expected {sorted(STAGES)}")
    for stage in STAGES:
        yield from _percentiles(stage, [[tick[stage] for tick in ticks] for ticks in passes])
    inside = [[sum(tick[s] for s in STAGES if s.startswith("model")) for tick in ticks] for ticks in passes]
    yield from _percentiles("the model", inside, f"<= {MODEL_GOAL_MS}")
    yield from _percentiles("a tick, messages to command", [[sum(t.values()) for t in p] for p in passes],
                            f"<= {TICK_GOAL_MS}")  # fmt: skip
    found = memory()
    yield measured("resident at most, the simulator that made the messages included", "MB", [found])


def _percentiles(name: str, passes: list[list[Any]], goal: str = "") -> Iterator[Row]:
    spent = 1e3 * np.array(passes)  # (passes, ticks, 2)
    for share in (50, 99):
        yield measured(f"{name}, p{share}", "ms", np.percentile(spent[..., 0], share, axis=1).tolist(), goal)
    yield measured(f"{name}, processor, p50", "ms", np.percentile(spent[..., 1], 50, axis=1).tolist())


def memory() -> float:
    """MB of a process of its own that drives; see :mod:`test.benchmarks.driving_memory`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, "-m", "test.benchmarks.driving_memory"], capture_output=True, text=True,
                          env=environment, timeout=CHILD_LIMIT_S, check=False)  # fmt: skip
    if done.returncode:
        raise BenchmarkError(f"memory: {done.stderr.strip().splitlines()[-1:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def training(settings: Settings) -> Iterator[Row]:
    """A training step of the recipe ``drive`` on the ticks of a drive."""
    recorded = record(BATCH + 4)
    policy = untrained(recorded)
    checkpoint, model = policy.checkpoint, policy.checkpoint.model.train()
    seen = recorded.observations(policy)[-BATCH:]
    inputs = collate(seen, checkpoint.normalizer, checkpoint.tokenizer, policy.spec, remembers=model.remembers)
    actions, mask = torch.randn(BATCH, model.config.horizon, 4), torch.ones(BATCH, model.config.horizon) > 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for count in (1, 2) if (os.cpu_count() or 1) > 1 else (1,):
        with threads(count):
            times = []
            for _ in range(12 if settings.long else 5):
                start = time.perf_counter()
                optimizer.zero_grad(set_to_none=True)
                model.loss(inputs, actions, mask).backward()
                optimizer.step()
                times.append(1e3 * (time.perf_counter() - start))
        yield measured(f"training step of {BATCH}, {count} thread{'s' * (count > 1)}", "ms", times[1:],
                       f"<= {STEP_GOAL_MS}" if count == 2 else "")  # fmt: skip


def clouds(settings: Settings) -> Iterator[Row]:
    """A LiDAR sweep to a map, and to tokens by PointNet++, of one sample and of a training batch."""
    config: BEVConfig = load_preset("driving_tiny").bev
    width = config.source_width or config.width
    lidar = _sweep(10_000)
    pose = pose_matrix(load_preset("driving_tiny").mounts["lidar"])
    ours, plain = Pillars(CloudColumns(columns=6), width=width, reduce=config.reduce), peers.Pillars(6, width)
    same_weights(ours, plain)
    for batch in (1, BATCH):
        points, there = lidar.expand(batch, -1, -1), torch.ones(batch, lidar.shape[1], dtype=torch.bool)
        cloud = PointSet(points, there, pose.expand(batch, 4, 4))
        yield from both(
            f"pillars, 10,000 points, batch {batch}", ours, plain,
            partial(ours, cloud, config.grid), partial(plain, points, pose, config.grid), settings,
            "pillars of all points in plain PyTorch",
        )  # fmt: skip
    level = SetAbstractionConfig
    small = PointCloudConfig(
        levels=(level(points=256, radius_m=1.5, neighbors=16, widths=(32, 32)),
                level(points=64, radius_m=6.0, neighbors=16, widths=(64, 64))),
        global_widths=(128,), output="both", output_dim=64,
    )  # fmt: skip
    encoder, net = PointCloudEncoder(small, input_dim=6), model_peers.PointNet(small, 6)
    same_weights(encoder, net)
    ordered = gather_rows(lidar, canonical_order(lidar, torch.ones(lidar.shape[:2], dtype=torch.bool)))
    yield from both("PointNet++ at laptop size, 10,000 points", encoder, net, lambda: encoder(ordered).values,
                    lambda: net(ordered), settings, "PointNet++ in plain PyTorch")  # fmt: skip


def cameras(settings: Settings) -> Iterator[Row]:
    """Six cameras onto the grid of ``driving_tiny`` in both ways, of one sample and of a training batch."""
    preset = load_preset("driving_tiny")
    config: BEVConfig = preset.bev
    width, channels = config.source_width or config.width, preset.vision.output_dim
    ours = LiftSplat(camera_dim=channels, width=width, depth_m=config.depth_m, depth_bins=config.depth_bins)
    plain = model_peers.LiftSplat(peers.narrowed(config), channels)
    same_weights(ours, plain)
    ground, plain_ground = GroundView(camera_dim=3, width=width), peers.GroundView(width)
    same_weights(ground, plain_ground)
    names = list(load_recipe("drive").observation.images)
    for batch in (1, BATCH):
        poses = torch.stack([pose_matrix(preset.mounts[name]) for name in names]).expand(batch, -1, 4, 4)
        camera = torch.tensor([[45.0, 0.0, 41.5], [0.0, 45.0, 41.5], [0.0, 0.0, 1.0]]).expand(batch, 6, 3, 3)
        features = torch.randn(batch, 6, channels, 11, 11)
        given = Cameras(features, camera, poses, torch.ones(batch, 6, dtype=torch.bool), (84, 84))
        yield from both(
            f"lift and splat, 6 cameras of 11x11 cells, batch {batch}", ours, plain,
            partial(ours, given, config.grid), partial(plain, features, camera, poses, (84, 84)), settings,
            "lift and splat in plain PyTorch",
        )  # fmt: skip
        pictures = torch.rand(batch, 6, 3, 84, 84)
        yield from both(
            f"view of the ground, 6 cameras of 84x84 pixels, batch {batch}", ground, plain_ground,
            partial(ground, given._replace(features=pictures), config.grid),
            partial(plain_ground, pictures, camera, poses, config.grid), settings,
            "every cell looked up in every picture",
        )  # fmt: skip


def radars(settings: Settings) -> Iterator[Row]:
    """Four radars as one map, beside a map for each of them."""
    preset = load_preset("driving_tiny")
    config: BEVConfig = preset.bev
    width = config.source_width or config.width
    names = preset.bev_merged["radar"]
    one = Pillars(CloudColumns(columns=5), width=width, reduce=config.reduce)
    torch.manual_seed(0)
    sets = [
        PointSet(torch.randn(BATCH, 64, 5) * 10, torch.rand(BATCH, 64) < 0.4,
                 pose_matrix(preset.mounts[name]).expand(BATCH, 4, 4))
        for name in names
    ]  # fmt: skip
    mix_one, mix_all = (nn.Conv2d(count * width, config.width, 3, padding=1) for count in (1, len(names)))

    def merged() -> Tensor:
        return mix_one(one(sets, config.grid))

    def apart() -> Tensor:
        return mix_all(torch.cat([one(each, config.grid) for each in sets], dim=1))

    with torch.no_grad():
        yield compared(f"4 radars as one map, batch {BATCH}", "ms", in_turns(merged, apart, settings),
                       "a map for each radar", "<= 1")  # fmt: skip


def _sweep(points: int) -> Tensor:
    """Points (1, N, 6) of a 32-beam LiDAR on a plane, 1.8 m below it, in its own frame."""
    torch.manual_seed(0)
    elevation = torch.deg2rad(torch.linspace(-30, 10, 32))
    ring = torch.randint(0, 32, (points,))
    azimuth = torch.rand(points) * 2 * np.pi
    reach = torch.where(elevation[ring] < -0.03, 1.8 / torch.tan(-elevation[ring]).clamp(min=1e-3), 30.0)
    reach = reach.clamp(max=60) * (1 + 0.01 * torch.randn(points))
    flat = reach[:, None] * torch.stack([azimuth.cos(), azimuth.sin()], dim=1)
    height = reach * torch.tan(elevation[ring])
    return torch.cat([flat, height[:, None], torch.rand(points, 2), ring[:, None] / 16 - 1], dim=1)[None]


BENCHMARKS: Suite = {
    "stages": stages, "training step": training, "clouds": clouds, "cameras": cameras, "radars": radars,
}  # fmt: skip
