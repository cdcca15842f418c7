"""Worlds by name: ``simulator:task``, such as ``metaworld:push-v3``, ``libero_spatial:3``, ``pusht`` or
``driving:mixed``.

A name without a colon that is no simulator's is a Meta-World task. A package of your own adds a simulator by
``SIM_REGISTRY["mine"] = Simulator(…)`` in a module of the entry point ``vla_ros.plugins``.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from vla_core.config import load_plugins
from vla_core.contract import RobotContract
from vla_core.errors import choices
from vla_core.sim.base import Journey, SimulationError, Simulator, Task, View, World

DEFAULT = "metaworld"
LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")


def _metaworld_task(task: str) -> Task:
    from vla_core.sim.metaworld import check_task, instruction_for

    check_task(task)
    # Enough for every scripted expert of MT10. Meta-World's own limit is 500: the suite mt10 takes that.
    return Task(world=f"metaworld:{task}", instruction=instruction_for(task), max_steps=200)


def _make_metaworld(task: str, contract: RobotContract, view: View) -> World:
    from vla_core.sim.metaworld import MetaWorld

    return MetaWorld(task, view.camera or "corner2", contract, view.size or 128, view.black)


def _libero_task(suite: str, task: str) -> Task:
    from vla_core.sim.libero import libero_task

    return libero_task(suite, task)


def _make_libero(suite: str, task: str, contract: RobotContract, view: View) -> World:
    from vla_core.sim.libero import Libero

    return Libero(suite, task, contract, view)


def _pusht_task(task: str) -> Task:
    from vla_core.sim.pusht import pusht_task

    return pusht_task(task)


def _make_pusht(task: str, contract: RobotContract, view: View) -> World:
    from vla_core.sim.pusht import PushT

    return PushT(contract, view)


def _driving_task(task: str) -> Task:
    from vla_core.sim.driving.world import driving_task

    return driving_task(task)


def _make_driving(task: str, contract: RobotContract, view: View) -> World:
    from vla_core.sim.driving.world import Driving

    return Driving(task, contract, view)


SIM_REGISTRY: dict[str, Simulator] = {
    "metaworld": Simulator(
        contract="metaworld_sawyer", task=_metaworld_task, make=_make_metaworld, chooses_camera=True
    ),
    "pusht": Simulator(contract="pusht", task=_pusht_task, make=_make_pusht),
    "driving": Simulator(contract="driving", task=_driving_task, make=_make_driving, journey=True),
    **{
        suite: Simulator(contract="libero", task=partial(_libero_task, suite), make=partial(_make_libero, suite))
        for suite in LIBERO_SUITES
    },
}


def find(name: str) -> tuple[Simulator, str]:
    """The simulator of a world's name, and the task's name; installed plug-ins are looked at where need be."""
    prefix, colon, task = name.partition(":")
    if prefix not in SIM_REGISTRY:
        load_plugins()
    if prefix in SIM_REGISTRY:
        return SIM_REGISTRY[prefix], task
    if colon:
        raise SimulationError(f"unknown simulator {prefix!r} in {name!r}; choices: {choices(SIM_REGISTRY)}")
    return SIM_REGISTRY[DEFAULT], name


def task_of(name: str) -> Task:
    """The task of a world's name, without building the world; ``Task.world`` is ``name`` as it was given."""
    simulator, task = find(name)
    return dataclasses.replace(simulator.task(task), world=name)


def make_world(name: str, contract: RobotContract | None = None, view: View | None = None) -> World:
    """Build a world.

    Args:
        name: such as ``libero_spatial:3``.
        contract: names the topics that messages go to; None takes the simulator's own robot. It must ask for nothing
            that the simulator does not have.
        view: camera, size of the pictures, black ones, or another task's instruction.
    """
    simulator, task = find(name)
    view = view or View()
    if view.camera is not None and not simulator.chooses_camera:
        raise SimulationError(f"{name}: its cameras are fixed by the contract; found the camera {view.camera!r}")
    simulator.task(task)
    world = simulator.make(task, contract or RobotContract.load(simulator.contract), view)
    if view.swapped and not isinstance(world, Journey):
        world.close()
        raise SimulationError(f"{name}: it does not say its instruction itself, so none can be swapped")
    return world
