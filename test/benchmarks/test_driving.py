"""What the suite ``driving`` times with, and that its references compute what the package computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from test.benchmarks import driving
from test.benchmarks.driving_peers import GroundView as PlainGroundView
from test.benchmarks.driving_peers import Pillars as PlainPillars
from test.benchmarks.framework import BenchmarkError
from test.benchmarks.model import agree, same_weights
from vla_core.model.sensor.bev import Cameras, CloudColumns, GridConfig, Pillars, PointSet
from vla_core.model.sensor.ground_view import GroundView

GRID = GridConfig(x_m=(-8.0, 8.0), y_m=(-8.0, 8.0), z_m=(-1.0, 4.0), resolution_m=1.0)
AHEAD = torch.tensor([[0.0, 0, 1, 0.3], [-1, 0, 0, 0.1], [0, -1, 0, 1.6], [0, 0, 0, 1]])


def test_a_stage_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(0.0, 20.0)[:, None] * (1.0, 0.5))  # each look at the clock is a second later
    monkeypatch.setattr(driving, "_now", lambda: next(clock))
    watch = driving.Watch()
    decode = watch.around("decode", lambda: 7)
    with watch.stage("build"):
        assert decode() == decode() == 7
    # 0 begin, 1 to 2 and 3 to 4 within, 5 end
    assert watch.seconds["decode"].tolist() == [2.0, 1.0] and watch.seconds["build"].tolist() == [3.0, 1.5]


def test_the_references_are_the_same_arithmetic() -> None:
    torch.manual_seed(0)
    ours, plain = Pillars(CloudColumns(columns=6), width=8, reduce="max").eval(), PlainPillars(6, 8).eval()
    same_weights(ours, plain)
    cloud = torch.randn(2, 300, 6) * torch.tensor([6.0, 6, 1, 1, 1, 1])
    pose = torch.eye(4)
    pose[:3, 3] = torch.tensor([1.0, 0.0, 1.8])
    points = PointSet(cloud, torch.ones(2, 300, dtype=torch.bool), pose.expand(2, 4, 4))
    agree("pillars", ours(points, GRID), plain(cloud, pose, GRID))
    view, other = GroundView(camera_dim=3, width=4), PlainGroundView(4)
    same_weights(view, other)
    pictures = torch.rand(2, 1, 3, 20, 30)
    camera = torch.tensor([[15.0, 0, 14.5], [0, 15, 9.5], [0, 0, 1]]).expand(2, 1, 3, 3)
    given = Cameras(pictures, camera, AHEAD.expand(2, 1, 4, 4), torch.ones(2, 1, dtype=torch.bool), (20, 30))
    agree("ground", view(given, GRID), other(pictures, camera, AHEAD.expand(2, 1, 4, 4), GRID))
    with pytest.raises(BenchmarkError, match="computes something else"):
        agree("ground", view(given, GRID), other(1 - pictures, camera, AHEAD.expand(2, 1, 4, 4), GRID))
