"""Bursts of disturbance: their share, size, length and entries, and which episodes have any."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vla_core.config import ConfigError
from vla_core.contract import Action
from vla_core.sim.noise import Disturbance, Noise

DRIVE = Action(
    topic="drive", type="ackermann_msgs/msg/AckermannDriveStamped", names=("steering_angle", "speed"),
    units=("rad", "m/s"), low=(-0.6, 0.0), high=(0.6, 15.0), safe=("hold", "zero"),
)  # fmt: skip
NOISE = Noise(scale=0.5, share=0.3, steps=(4, 12))


def moved(noise: Noise | None, ticks: int, seed: int = 0) -> np.ndarray:
    """What is added (ticks, 2) to a command in the middle of its range."""
    middle = np.array([0.0, 7.5])
    disturbance = Disturbance(noise, DRIVE, np.random.default_rng(seed))
    return np.stack([disturbance.on(middle) - middle for _ in range(ticks)])


def test_the_share_of_disturbed_ticks_is_that_asked_for() -> None:
    added = moved(NOISE, 20_000)
    disturbed = added.any(axis=1)
    assert disturbed.mean() == pytest.approx(0.3, abs=0.03)
    assert (np.abs(added) <= [0.3, 3.75]).all() and (np.abs(added).max(axis=0) > [0.27, 3.4]).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], disturbed.astype(int), [0]])))
    lengths = (edges[1::2] - edges[::2])[:-1]  # bursts that follow at once count as one
    assert lengths.min() == 4
    assert all(len(np.unique(added[a:b], axis=0)) <= 1 + (b - a - 1) // 4
               for a, b in zip(edges[::2], edges[1::2], strict=True)), "constant within a burst"  # fmt: skip


def test_only_the_entries_that_are_named_are_disturbed_and_bounds_hold() -> None:
    added = moved(dataclasses.replace(NOISE, entries=("steering_angle",)), 500)
    assert added[:, 0].any() and not added[:, 1].any()
    disturbance = Disturbance(dataclasses.replace(NOISE, scale=2.0), DRIVE, np.random.default_rng(1))
    sent = np.stack([disturbance.on(np.array([0.55, 0.2])) for _ in range(500)])
    assert (sent >= DRIVE.low).all() and (sent <= DRIVE.high).all() and sent[:, 1].max() > 10
    with pytest.raises(ConfigError, match=r"noise\.entries: no brake in drive; choices: speed, steering_angle"):
        Disturbance(dataclasses.replace(NOISE, entries=("brake",)), DRIVE, np.random.default_rng(0))


def test_what_may_only_be_lowered_is_never_raised() -> None:
    added = moved(dataclasses.replace(NOISE, lowered=("speed",)), 2_000)
    assert added[:, 1].max() == 0 and added[:, 1].min() < -3.4 and added[:, 0].max() > 0.27
    with pytest.raises(ConfigError, match=r"noise\.lowered: no speed in noise\.entries; choices: steering_angle"):
        moved(dataclasses.replace(NOISE, entries=("steering_angle",), lowered=("speed",)), 1)


def test_a_share_of_the_episodes_has_none() -> None:
    noise = dataclasses.replace(NOISE, episodes=0.25)
    quiet = [not moved(noise, 100, seed).any() for seed in range(200)]
    assert np.mean(quiet) == pytest.approx(0.75, abs=0.08)
    assert not moved(None, 100).any()
    with pytest.raises(ConfigError, match=r"noise\.episodes: expected above 0 and at most 1, found 0"):
        Noise(episodes=0)
