"""A world without a simulator, as an installed plug-in: the toy robot of ``helpers``, and seeds that go wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vla_core.sim.worlds import SIM_REGISTRY

# The arm starts where the seed says and moves by its command; it succeeds when the elbow has moved far enough.
MODULE = """
import os
import signal
import time
from pathlib import Path

import numpy as np

from vla_core.sim.base import (
    SimulationError, Simulator, Task, check_contract, picture_message, steps_per_frame, vector_message,
)
from vla_core.sim.worlds import SIM_REGISTRY

TASKS = ("lift", "drop")


def task(name):
    if name not in TASKS:
        raise SimulationError(f"the toy has no task {name!r}")
    return Task(world=f"toy:{name}", instruction=f"{name} it", max_steps=12)


class Toy:
    score = None

    def __init__(self, name, contract, view):
        check_contract(contract, "the toy", {"arm": 2}, ("camera",), 2)
        self.name, self.contract, self.view = name, contract, view
        self.steps_per_frame = steps_per_frame(contract)
        self.success, self.pictures = False, 0

    def reset(self, seed):
        if seed == 13:
            raise RuntimeError("the table\\nbroke")
        if seed == 14:
            os._exit(7)
        if seed == 15:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed >= 1000:  # for ever: until it is ended from outside
            Path(f"pid_{os.getpid()}").touch()
            time.sleep(3600)
        self.arm = np.random.default_rng([seed, TASKS.index(self.name)]).uniform(-1, 1, 2)
        self.start, self.success = self.arm.copy(), False

    def rest(self):
        return np.zeros(2)

    def step(self, command, pictures=True):
        self.arm = self.arm + 0.05 * np.asarray(command)
        self.success = self.success or bool(abs(self.arm - self.start)[1] > 0.35)

    def observe_state(self, stamp_ns):
        return [vector_message(self.contract.observations["arm"], stamp_ns, self.arm)]

    def observe_camera(self, stamp_ns):
        self.pictures += 1
        return [picture_message(self.contract.observations["camera"], stamp_ns, self.picture(6, 8), "camera")]

    def picture(self, height, width):
        return np.full((height, width, 3), 0 if self.view.black else int(100 + 100 * np.tanh(self.arm[0])), np.uint8)

    def render_for_people(self):
        return self.picture(32, 48)

    def close(self):
        pass


SIM_REGISTRY["toy"] = Simulator(contract="toy", task=task, make=Toy)
"""


@contextmanager
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plug-in in ``site``, as pip leaves one; new processes find it as well."""
    metadata = site / "toy_world-0.1.dist-info"
    metadata.mkdir(parents=True)
    (site / "toy_world_plugin.py").write_text(MODULE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-world\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[vla_ros.plugins]\ntoy = toy_world_plugin\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")
    before = dict(SIM_REGISTRY)
    try:
        yield
    finally:
        sys.modules.pop("toy_world_plugin", None)
        SIM_REGISTRY.clear()
        SIM_REGISTRY.update(before)
