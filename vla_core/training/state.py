"""The folder of a run: checkpoints that training can go on from, the best one, and what to say when it cannot.

    RUN/step_00000500/            a checkpoint that runs as it is
    RUN/step_00000500/training/   state.json, optimizer.safetensors; weights.safetensors where the checkpoint has the
                                  averaged ones
    RUN/best/                     a checkpoint

Each is written beside its place and renamed when it is whole and on the disk, so that what has its name is whole.
Nothing random is stored: batches, noise and dropout are functions of the seed and the step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla_core.checkpoint import FILES, Checkpoint
from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.errors import VlaError, choices
from vla_core.training.distributed import as_placed, whole
from vla_core.training.optimizer import Group

FORMAT = "vla_ros_training_v1"
PREFIX = "step_"
# What may change when a run goes on: it decides neither data nor mathematics, or nothing but rounding.
FREE = (
    "camera", "execution", "data.cache", "data.prefetch", "training.device", "training.distributed",
    "training.accumulate", "training.compile", "training.gradient_checkpointing", "training.validate_every",
    "training.validation_batch", "training.open_loop", "training.evaluate", "training.log_every", "training.wandb",
    "training.save_every", "training.keep", "training.explosion",
)  # fmt: skip


class StateError(VlaError):
    """A run that cannot be stored or continued."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """``state.json``. ``step`` updates were made; ``losses`` are the latest ones, ``loss`` their smoothed course."""

    format: str = FORMAT
    step: int
    loss: float
    losses: tuple[float, ...]
    seconds: float
    best: float | None
    validation_loss: float | None
    scaler: dict[str, Any]
    processes: int
    recipe: dict[str, Any]
    data: tuple[dict[str, Any], ...]
    files: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A state on the disk."""

    path: Path
    state: RunState

    def checkpoint(self) -> Checkpoint:
        """The checkpoint, whose model has the averaged weights where the run averages."""
        return Checkpoint.load(self.path)

    def weights(self) -> dict[str, Tensor]:
        """The trained weights where the checkpoint has the averaged ones; else none."""
        file = self.path / "training" / "weights.safetensors"
        return load_file(file) if file.name in self.state.files else {}

    def load_optimizer(self, optimizer: torch.optim.Optimizer, groups: Sequence[Group]) -> None:
        """Give every parameter the moments and the number of updates that it had."""
        found = load_file(self.path / "training" / "optimizer.safetensors")
        parameters = {name: parameter for group in groups for name, parameter in group.parameters.items()}
        for key, value in found.items():
            moment, name = key.split(":", 1)
            parameter = parameters[name]
            placed = value.to(parameter.device) if moment == "step" else as_placed(value, parameter)
            optimizer.state[parameter][moment] = placed


class RunFolder:
    """Writes and finds what a run keeps; ``keep`` of its states, whose checkpoints have these ``files``."""

    def __init__(self, path: Path, keep: int = 2, files: Sequence[str] = FILES) -> None:
        self.path, self.keep, self.files = path, keep, files

    def states(self) -> list[Path]:
        """Folders of states, the oldest first."""
        return sorted(p for p in self.path.glob(f"{PREFIX}*") if p.is_dir() and p.name[len(PREFIX) :].isdigit())

    def check_new(self) -> None:
        """Raise unless a new run may begin here."""
        found = self.states()
        if found:
            raise StateError(f"{self.path}: has {found[-1].name} of an earlier run; continue it with --resume, or "
                             "remove it with --restart")  # fmt: skip

    def clear(self) -> None:
        """Remove what an earlier run kept here; other folders stay."""
        for path in (*self.states(), self.path / "best", *self.path.glob(f".{PREFIX}*.partial")):
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> Saved | None:
        """The newest state that is whole; None where none was saved yet."""
        faults = []
        for path in reversed(self.states()):
            try:
                return Saved(path, _read(path, self.files))
            except (OSError, ValueError) as error:  # a damaged disk: what we write has its name only when whole
                faults.append(f"{path.name}: {error}")
        if faults:
            raise StateError(f"{self.path}: no state is whole: {'; '.join(faults)}; start anew with --restart")
        return None

    def save(self, checkpoint: Any, state: RunState, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write ``checkpoint`` with ``state``, and ``tensors`` by file; then remove the oldest states."""
        name = f"{PREFIX}{state.step:08d}"
        partial = self.path / f".{name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            checkpoint.save(partial)
            (partial / "training").mkdir()
            for file, content in tensors.items():
                save_file(dict(content), partial / "training" / file)
            sizes = {file: (partial / "training" / file).stat().st_size for file in tensors}
            record = to_dict(state) | {"files": sizes}
            (partial / "training" / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            _to_disk(partial)
            _move(partial, self.path / name)
        except (OSError, SafetensorError, VlaError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            there = self.states()
            last = f"{there[-1]} is whole" if there else "no state was saved before"
            raise StateError(f"{self.path / name}: cannot be saved: {error}; {last}; make room and continue with "
                             "--resume") from None  # fmt: skip
        for old in self.states()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        for left in self.path.glob(f".{PREFIX}*.partial"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)

    def save_best(self, checkpoint: Any) -> None:
        """Replace ``best``."""
        try:
            checkpoint.save(self.path / "best")
        except (OSError, VlaError) as error:
            raise StateError(f"{self.path / 'best'}: cannot be saved: {error}; the one before is whole") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer, groups: Sequence[Group], keep: bool) -> dict[str, Tensor]:
    """The optimizer's state by the parameters' names; gathered by all processes, kept where ``keep`` is set."""
    found: dict[str, Tensor] = {}
    for group in groups:
        for name, parameter in group.parameters.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                full = whole(value)
                if keep:
                    found[f"{key}:{name}"] = full.contiguous()
    return found


def check_same(saved: Saved, recipe: Any, data: Sequence[Mapping[str, Any]]) -> None:
    """Raise :class:`StateError` where the run that is to go on is another one than the saved, naming the keys."""
    free = {*FREE, "training.steps"} if recipe.training.schedule == "constant" else set(FREE)
    old, new = _flat(saved.state.recipe), _flat(_plain(recipe))
    changed = [
        f"{key} {new.get(key, 'not given')!r} instead of {old.get(key, 'not given')!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not any(key == f or key.startswith(f"{f}.") for f in free)
    ]
    if changed:
        raise StateError(f"{saved.path}: was trained otherwise: {'; '.join(changed)}; give the same values, or start "
                         "anew with --restart")  # fmt: skip
    if [dict(d) for d in _plain(data)] != [dict(d) for d in saved.state.data]:
        raise StateError(f"{saved.path}: was trained on other data: {_named(saved.state.data)}, not {_named(data)}; "
                         "give the same datasets in the same order, or start anew with --restart")  # fmt: skip
    if recipe.training.steps < saved.state.step:
        raise StateError(f"{saved.path}: has more steps than training.steps ({recipe.training.steps})")


def _named(data: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{d['name']} ({d['frames']} frames, {d['windows']} windows)" for d in data)


def _plain(config: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(to_dict(config)))


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {path: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{path}.{key}" if path else key).items()}


def _read(path: Path, files: Sequence[str]) -> RunState:
    data = json.loads((path / "training" / "state.json").read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise StateError(f"format {found!r}, expected {FORMAT!r}")
    try:
        state = from_dict(RunState, data)
    except ConfigError as error:
        raise StateError(f"state.json: {error}") from None
    absent = [name for name in files if not (path / name).is_file()]
    if absent:
        raise StateError(f"{choices(absent)} missing")
    for name, size in state.files.items():
        if (path / "training" / name).stat().st_size != size:
            raise StateError(f"{name} has not its {size} bytes")
    return state


def _to_disk(folder: Path) -> None:
    """Past every cache: a power cut after the renaming must not leave a name without content."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            with suppress(OSError):  # some file systems cannot for folders
                os.fsync(handle)
        finally:
            os.close(handle)


def _move(partial: Path, final: Path) -> None:
    if final.exists():  # the same step again, by a run that was resumed from before it
        shutil.rmtree(final)
    os.replace(partial, final)
