"""What an evaluation runs, as data: with the checkpoints it is all that is needed to run it again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_core import hub
from vla_core.checkpoint import FILES, MIXTURE_FILE, Checkpoint, PolicyConfig, fingerprint
from vla_core.config import ConfigError, override
from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.evaluation.suites import Assignment
from vla_core.export.record import is_export, read_record
from vla_core.planning.place import find_setup
from vla_core.runtime.execution import Execution
from vla_core.runtime.loading import is_server, load_policy
from vla_core.sim.base import View
from vla_core.sim.faults import Faults
from vla_core.sim.worlds import find


class EvaluationError(VlaError):
    """An evaluation that cannot be run as it was asked for, or whose results cannot be trusted."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A checkpoint: a folder or a hub's name, the hash of its weights, and those of its other files."""

    path: str
    fingerprint: str
    files: dict[str, str]

    def folder(self) -> Path:
        """Where the checkpoint lies; raises :class:`EvaluationError` unless it is the one that was planned."""
        found = member(self.path)
        if found != self:
            changed = [name for name, digest in self.files.items() if found.files.get(name) != digest]
            raise EvaluationError(
                f"{self.path}: not the checkpoint of this evaluation, whose fingerprint is {self.fingerprint}; here it "
                f"is {found.fingerprint}, and these files differ: {', '.join(changed) or 'none'}"
            )
        here = is_server(self.path) or find_setup(self.path) is not None
        return Path(self.path) if here else hub.local_folder(self.path)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One policy: a checkpoint, or an ensemble of several, the mean of whose chunks is executed.

    Entries of one ``group`` are trainings of one recipe from different seeds; they are reported together as well.
    """

    label: str
    group: str
    members: tuple[Member, ...]
    view: View


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row of the table: an entry, how its chunks are executed, and how many control steps late they come.

    ``faults`` are those of the robot's sensors (:mod:`vla_core.sim.faults`), such as ``lidar=dropped``.
    """

    entry: int
    execution: Execution
    delay_steps: int = 0
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One episode: indices of its run and task, and its seed."""

    run: int
    task: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every run does every task from every seed. ``policy_seed`` is that of the policies' sampling noise."""

    entries: tuple[Entry, ...]
    runs: tuple[Run, ...]
    tasks: tuple[Assignment, ...]
    seeds: tuple[int, ...]
    policy_seed: int = 0
    dataset: str | None = None

    def __post_init__(self) -> None:
        for name in ("entries", "runs", "tasks", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: expected at least one")
        if len(set(self.seeds)) != len(self.seeds):
            raise ConfigError("seeds: expected distinct ones: a seed's episode is always the same")
        labels = [entry.label for entry in self.entries]
        if len(set(labels)) != len(labels):
            raise ConfigError(f"entries: expected distinct labels, found {labels}")

    def jobs(self) -> list[Job]:
        """All episodes; those of one world and policy stand together, since both take time to load."""
        return [
            Job(run=run, task=task, seed=seed)
            for task in range(len(self.tasks)) for run in range(len(self.runs)) for seed in self.seeds
        ]  # fmt: skip


def member(path: str) -> Member:
    """The checkpoint at ``path``, a folder or a hub's ``user/name``, with its hashes; of a server its fingerprint."""
    if is_server(path):
        with closing(load_policy(path)) as policy:
            return Member(path=path, fingerprint=policy.fingerprint, files={})
    planner = find_setup(path)
    if planner is not None:  # whose fingerprint is that of the weights of all its models
        with closing(load_policy(path)) as policy:
            digest = hashlib.sha256(planner.read_bytes()).hexdigest()[:12]
            return Member(path=path, fingerprint=policy.fingerprint, files={planner.name: digest})
    folder = hub.local_folder(path)
    if is_export(folder):
        record = read_record(folder)
        return Member(path=path, fingerprint=record.fingerprint,
                      files={name: digest[:12] for name, digest in record.files.items()})  # fmt: skip
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        raise EvaluationError(f"{path}: not a checkpoint: {', '.join(absent)} missing")
    digests = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:12]
        for name in (*FILES, MIXTURE_FILE) if name != "model.safetensors" and (folder / name).is_file()
    }  # fmt: skip
    return Member(path=path, fingerprint=fingerprint(folder), files=digests)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A policy as the command line names it: label, checkpoints of the trainings, each one or an ensemble."""

    label: str
    trainings: tuple[tuple[str, ...], ...]


def make_plan(
    wanted: Sequence[Wanted],
    tasks: Sequence[Assignment],
    seeds: Sequence[int],
    *,
    strategies: Sequence[str] = (),
    changes: Sequence[str] = (),
    delays: Sequence[int] = (0,),
    camera: str | None = None,
    camera_size: int | None = None,
    black: bool = False,
    faults: Sequence[str] = (),
    dataset: str | None = None,
    leave_out: bool = False,
) -> tuple[Plan, list[str]]:
    """Plan every policy with every strategy and delay on every task.

    Args:
        strategies: how chunks are executed; empty takes each checkpoint's own.
        changes: further ``key=value`` changes to it.
        camera: for worlds that let one choose; None takes the one that each policy was trained for.
        camera_size: pixels of rendered pictures; None takes each world's own.
        faults: what is wrong with the sensors in all runs.
        leave_out: leave out strategies that a policy cannot follow, instead of raising.

    Returns the plan, and a line for each strategy that was left out.
    """
    if camera is not None:
        fixed = [task.world for task in tasks if not find(task.world)[0].chooses_camera]
        if fixed:
            raise EvaluationError(f"camera {camera!r}: {', '.join(fixed)} has the cameras that its contract names")
    entries: list[Entry] = []
    runs: list[Run] = []
    notes: list[str] = []
    for policy in wanted:
        first: _Read | None = None
        for number, paths in enumerate(policy.trainings):
            loaded = [_read(path, dataset) for path in paths]
            _check_alike(paths, loaded)
            Faults.parse(faults, loaded[0].contract)
            if first is not None:
                _check_same_recipe(policy, first, loaded[0], paths[0])
            first = first or loaded[0]
            label = policy.label if len(policy.trainings) == 1 else f"{policy.label} {number}"
            trained = loaded[0].config.provenance.get("camera")
            view = View(camera=camera or trained if _chooses(tasks) else None, size=camera_size, black=black)
            entries.append(
                Entry(label=label, group=policy.label, members=tuple(map(member, paths)), view=view)
            )  # fmt: skip
            for execution in _executions(loaded[0], label, strategies, changes, notes if leave_out else None):
                runs += [Run(entry=len(entries) - 1, execution=execution, delay_steps=delay, faults=tuple(faults))
                         for delay in delays]  # fmt: skip
    if not runs:
        raise EvaluationError(f"nothing is left to run: {'; '.join(notes)}")
    plan = Plan(entries=tuple(entries), runs=tuple(runs), tasks=tuple(tasks), seeds=tuple(seeds), dataset=dataset)
    return plan, notes


@dataclass(frozen=True)
class _Read:
    """What is asked of a policy before it runs; ``head`` tells whether it can be guided."""

    config: PolicyConfig
    contract: RobotContract
    head: Any


@dataclass(frozen=True)
class _Remote:
    """What is known of a model on a server, or of a planner."""

    horizon: int
    head: Any


def _read(path: str, dataset: str | None) -> _Read:
    if is_server(path) or find_setup(path) is not None:
        with closing(load_policy(path, dataset=dataset)) as policy:
            seen = PolicyConfig(model=_Remote(policy.horizon, policy.head), observation=policy.spec,
                                execution=policy.execution)  # fmt: skip
            return _Read(seen, policy.contract, policy.head)
    folder = hub.local_folder(path)
    if is_export(folder):
        policy = load_policy(path, dataset=dataset)
        return _Read(read_record(folder).policy, policy.contract, policy.head)
    checkpoint = Checkpoint.load(folder, dataset=dataset)
    return _Read(checkpoint.config, checkpoint.contract, checkpoint.config.model.head)


def _chooses(tasks: Sequence[Assignment]) -> bool:
    return any(find(task.world)[0].chooses_camera for task in tasks)


def _executions(checkpoint: _Read, label: str, strategies: Sequence[str], changes: Sequence[str],
                notes: list[str] | None) -> list[Execution]:  # fmt: skip
    """The executions that the checkpoint can follow; those that it cannot are noted, or raise without ``notes``."""
    own, model = checkpoint.config.execution, checkpoint.config.model
    values: dict[str, Any] = override({}, changes)
    found = []
    for name in strategies or [own.strategy]:
        execution = own.changed({**values, "strategy": name})
        try:
            execution.check(model.horizon, checkpoint.head)
            execution.check_contract(checkpoint.contract)
        except ConfigError as error:
            if notes is None:
                raise
            notes.append(f"{label} without {name}: {error}")
            continue
        found.append(execution)
    return found


def _check_alike(paths: Sequence[str], members: Sequence[_Read]) -> None:
    """Chunks can be averaged when they speak of the same actions at the same times, from the same observation."""
    first = members[0]
    for path, other in zip(paths[1:], members[1:], strict=True):
        first.contract.check_same(other.contract, paths[0], path)
        for what, mine, theirs in (
            ("observation", first.config.observation, other.config.observation),
            ("model.horizon", first.config.model.horizon, other.config.model.horizon),
        ):
            if mine != theirs:
                raise EvaluationError(f"no ensemble of {paths[0]} and {path}: their {what} differ: {mine} and {theirs}")


def _check_same_recipe(policy: Wanted, first: _Read, other: _Read, path: str) -> None:
    """Figures of different models must not be averaged as if they were seeds of one."""
    mine, theirs = first.config, other.config
    for what in ("model", "observation", "normalization"):
        if getattr(mine, what) != getattr(theirs, what):
            raise EvaluationError(
                f"{path}: its {what} differs from that of {'+'.join(policy.trainings[0])}; checkpoints that are "
                "reported together are trainings of one recipe from different seeds; for others: vla compare"
            )
