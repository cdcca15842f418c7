"""The policy node asks its policy whether it sees and listens, where it is told to."""

from __future__ import annotations

from pathlib import Path

import torch
from rclpy.lifecycle import TransitionCallbackReturn

from vla_core.checkpoint import Checkpoint

from .conftest import Ros
from .robot import make_policy


def test_a_policy_that_ignores_its_camera_is_refused_when_asked(ros: Ros, checkpoint: Path, tmp_path: Path) -> None:
    made = Checkpoint.load(checkpoint)
    with torch.no_grad():
        for weight in made.model.image_encoders.parameters():
            weight.zero_()
    made.save(tmp_path / "blind")
    assert make_policy(ros, tmp_path / "blind").trigger_configure() == TransitionCallbackReturn.SUCCESS
    policy = make_policy(ros, tmp_path / "blind", self_check=True)
    assert policy.trigger_configure() == TransitionCallbackReturn.FAILURE
    assert "self-check: ignored: camera image" in policy.fault


def test_one_that_sees_passes(ros: Ros, checkpoint: Path) -> None:
    assert make_policy(ros, checkpoint, self_check=True).trigger_configure() == TransitionCallbackReturn.SUCCESS
