"""Datasets of one robot mean the same by the same number; those of another robot have their own."""

from __future__ import annotations

import dataclasses

import numpy as np

from vla_core.training.sources import build_sources

from ..helpers import CONTRACT, SPEC, dataset
from .toy_run import recipe


def test_datasets_of_one_robot_share_their_statistics() -> None:
    slow = dataset((30,))
    fast = dataclasses.replace(slow, name="fast", action=3 * slow.action + 1, state=slow.state - 2)
    reach = CONTRACT.actions["arm"]
    other = dataclasses.replace(CONTRACT, actions={"arm": dataclasses.replace(reach, high=(1.0, 5.0))})
    stranger = dataclasses.replace(fast, name="stranger", contract=other)
    more = {**CONTRACT.observations, "wrist": CONTRACT.observations["camera"]}  # a sensor that nobody asks for
    fast = dataclasses.replace(fast, contract=dataclasses.replace(CONTRACT, observations=more))
    sources = build_sources(recipe(), [slow, stranger, fast], [None] * 3)
    mine, its, again = sources.normalizers
    assert mine is again and mine is not its
    for name in ("state", "action"):
        rows = np.concatenate([getattr(data, name) for data in (slow, fast)])
        np.testing.assert_allclose(mine.statistics[name]["mean"], rows.mean(0), rtol=1e-5)
        np.testing.assert_allclose(mine.statistics[name]["std"], rows.std(0), rtol=1e-4)
        assert mine.statistics[name]["count"] == [60]
        np.testing.assert_allclose(its.statistics[name]["mean"], getattr(fast, name).mean(0), rtol=1e-5)
    assert sources.datasets[0].spec == SPEC
