"""Action chunks of every frame against plain loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vla_core.data.dataset import Dataset
from vla_core.data.windows import ChunkWindows

from .helpers import CONTRACT, SPEC, dataset, episodes


@pytest.mark.parametrize("horizon", [1, 4, 30])
def test_windows_against_a_loop(horizon: int) -> None:
    made = episodes((7, 1, 12))
    windows = ChunkWindows(dataset((7, 1, 12)), horizon)
    assert len(windows) == 20
    actions, mask = windows.chunks(np.arange(20))
    assert actions.shape == (20, horizon, 2) and mask.shape == (20, horizon)
    row = 0
    for episode in made:
        for k in range(len(episode)):
            for h in range(horizon):
                assert mask[row, h] == (k + h < len(episode))
                inside = min(k + h, len(episode) - 1)
                np.testing.assert_array_equal(actions[row, h], episode.action[inside])
            row += 1
    picked = np.array([19, 0, 7])
    np.testing.assert_array_equal(windows.chunks(picked)[0], actions[picked])


def test_a_window_does_not_reach_over_a_gap_in_time() -> None:
    """Ticks that were dropped (a stale camera) leave a hole: row k of a chunk must stay at tick + k steps.

    Trained across the hole, a policy would learn to act early by the length of every hole.
    """
    (episode,) = episodes((10,))
    keep = np.array([0, 1, 2, 3, 7, 8, 9])
    holed = dataclasses.replace(
        episode, images={"camera": episode.images["camera"][keep]}, state=episode.state[keep],
        action=episode.action[keep], stamps_ns=episode.stamps_ns[keep],
    )  # fmt: skip
    actions, mask = ChunkWindows(Dataset.from_episodes(CONTRACT, SPEC, [holed]), 4).chunks(np.arange(7))
    for row, tick in enumerate(keep):
        for h in range(4):
            if mask[row, h]:
                np.testing.assert_array_equal(actions[row, h], episode.action[tick + h])
    assert mask.tolist() == [[k + h in keep for h in range(4)] for k in keep]
