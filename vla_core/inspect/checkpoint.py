"""What a checkpoint is made of, what its numbers mean to the robot, and how it came about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_core.card import read_json, success_rows
from vla_core.checkpoint import Checkpoint, fingerprint
from vla_core.data.plans import plan_names
from vla_core.inspect import figures
from vla_core.inspect.report import Picture, Report, Section, Table, listed, number, size
from vla_core.observation.normalizer import Statistics, entry_names

CURVES = {"loss": ("train/loss", "validation/loss"), "success": ("closed_loop/success",)}
POINTS = 500  # of a curve


def inspect_checkpoint(path: Path, pictures: bool = True) -> Report:
    """Load a checkpoint strictly and report."""
    checkpoint = Checkpoint.load(path)
    config, contract = checkpoint.config, checkpoint.contract
    parameters = sum(p.numel() for p in checkpoint.model.parameters())
    weights = fingerprint(path)
    report = Report(
        "checkpoint", str(path), f"{config.model.type}, {parameters:,} parameters, weights {weights}",
        figures={"parameters": f"{parameters:,}", "model": config.model.type, "contract": contract.name},
    )  # fmt: skip
    again = f"{config.execution.steps} executed"
    if config.execution.period_s is not None:
        again = f"a new one every {1000 * config.execution.period_s:g} ms"
    chunk = f"{config.model.horizon} steps of {contract.chunk_step_ns / 1e6:g} ms, {again}"
    facts = {
        "contract": f"{contract.name}, {contract.rate_hz:g} Hz",
        "sees": ", ".join(config.observation.names),
        "acts": ", ".join(f"{n} [{u}]" for n, u in zip(contract.action_names, contract.action_units, strict=True)),
        "chunk": chunk, "head": config.model.head.type,
        "parts": ", ".join(f"{name} {count:,}" + (f" ({trained:,} trained)" if trained != count else "")
                           for name, count, trained in _parts(checkpoint)),
        "normalization": _normalization(checkpoint), **config.provenance,
    }  # fmt: skip
    if checkpoint.dataset_statistics:
        facts["statistics of"] = ", ".join(checkpoint.dataset_statistics)
    report.lines = [f"{key}: {value}" for key, value in facts.items()]
    report.tiles = [
        (f"{parameters / 1e6:.2f} M", "parameters"), (config.model.type, "model"), (config.model.head.type, "head"),
        (str(config.model.horizon), f"steps a chunk, {again}"),
        (f"{contract.rate_hz:g} Hz", f"contract {contract.name}"),
        (size((path / "model.safetensors").stat().st_size), f"weights {weights}"),
    ]  # fmt: skip
    report.warnings = [*_weights(checkpoint), *checkpoint.normalizer.warnings(), *_limits(checkpoint)]
    evaluation = success_rows(read_json(path / "evaluation.json"))
    report.lines += [f"success {success} over {trials} episodes of {task}: {how}"
                     for task, how, success, trials in evaluation]  # fmt: skip
    if pictures:
        report.sections = _sections(checkpoint, path, facts, evaluation)
    return report


def _parts(checkpoint: Checkpoint) -> Iterator[tuple[str, int, int]]:
    """Each part of the model, its number of parameters, and how many of them are trained."""
    for name, part in checkpoint.model.named_children():
        total = sum(p.numel() for p in part.parameters())
        yield name, total, sum(p.numel() for p in part.parameters() if p.requires_grad)


def _normalization(checkpoint: Checkpoint) -> str:
    modes = checkpoint.config.normalization
    own = "".join(f", {key} {mode}" for key, mode in modes.entries.items())
    return f"state {modes.state}, action {modes.action}{own}"


def _weights(checkpoint: Checkpoint) -> list[str]:
    bad = [name for name, tensor in checkpoint.model.state_dict().items()
           if tensor.is_floating_point() and not tensor.isfinite().all()]  # fmt: skip
    return [f"weights that are not finite: {listed(bad)}"] if bad else []


def _limits(checkpoint: Checkpoint) -> list[str]:
    """Actions of the demonstrations that the contract would not let pass."""
    found = checkpoint.normalizer.statistics.get("action", {})
    if "min" not in found or "max" not in found:
        return []
    contract, found = checkpoint.contract, _whole(found)
    margin = 1e-3 * (contract.action_high - contract.action_low)
    rows = zip(contract.action_names, found["min"], found["max"], contract.action_low - margin,
               contract.action_high + margin, strict=True)  # fmt: skip
    beyond = [f"{name} ({number(least)} to {number(most)})" for name, least, most, low, high in rows
              if least < low or most > high]  # fmt: skip
    return [f"action: demonstrations beyond the contract's limits: {listed(beyond)}"] if beyond else []


def _sections(
    checkpoint: Checkpoint, path: Path, facts: dict[str, str], evaluation: list[tuple[str, str, str, str]]
) -> list[Section]:
    found = []
    if evaluation:
        found.append(Section("Evaluation", table=Table(("task", "execution", "success, 95 % interval", "episodes"),
                                                       evaluation)))  # fmt: skip
    curves = _curves(path)
    if curves:
        found.append(Section("Training", pictures=curves))
    ranges = [Picture("Demonstrated actions within the contract's limits.", _ranges(checkpoint))] if (
        _has(checkpoint, "action", "min", "max", "q01", "q99")) else []  # fmt: skip
    note = "What the model's 0, -1 and 1 mean to the robot, and what was demonstrated."
    found.append(Section("Actions", note, _actions(checkpoint), ranges))
    if checkpoint.config.observation.state:
        found.append(Section("State", table=_state(checkpoint)))
    parts = list(_parts(checkpoint))
    rows = [(name, f"{count:,}", f"{trained:,}") for name, count, trained in parts]
    bars = Picture("Parameters of each part.", figures.bars({name: count for name, count, _ in parts}, "parameters"))
    found.append(Section("Parts", table=Table(("part", "parameters", "trained"), rows), pictures=[bars]))
    for name, statistics in checkpoint.dataset_statistics.items():
        found.append(Section(f"Statistics of {name}", table=_mixture(checkpoint, statistics)))
    return [*found, Section("Facts", table=Table(("", ""), list(facts.items())))]


def _has(checkpoint: Checkpoint, feature: str, *keys: str) -> bool:
    return all(key in checkpoint.normalizer.statistics.get(feature, {}) for key in keys)


def _actions(checkpoint: Checkpoint) -> Table:
    """A row for each entry; of plans, for each entry of each of their rows."""
    contract, normalizer = checkpoint.contract, checkpoint.normalizer
    width, steps = len(contract.action_names), normalizer.plan_rows
    modes = normalizer.modes.modes_of("action", contract.action_names)
    shape = width if steps is None else (steps, width)
    zero, low, high = (normalizer.unnormalize("action", np.full(shape, float(x))).ravel() for x in (0, -1, 1))
    found = {key: np.ravel(values) for key, values in normalizer.statistics.get("action", {}).items()}
    names = contract.action_names if steps is None else plan_names(contract, steps)
    rows = []
    for i, name in enumerate(names):
        data = [number(found[key][i]) if key in found else "" for key in ("min", "max", "mean", "std")]
        k = i % width
        rows.append((name, contract.action_units[k], modes[k], f"{contract.action_low[k]:g}",
                     f"{contract.action_high[k]:g}", *(number(x[i]) for x in (low, zero, high)), *data))  # fmt: skip
    head = ("entry", "unit", "mode", "low", "high", "-1", "0", "1", "data min", "max", "mean", "std")
    return Table(head, rows)


def _state(checkpoint: Checkpoint) -> Table:
    names = entry_names(checkpoint.config.observation, checkpoint.contract)["state"]
    modes = checkpoint.normalizer.modes.modes_of("state", names)
    found = checkpoint.normalizer.statistics.get("state", {})
    keys = ("min", "q01", "mean", "q99", "max", "std")
    rows = [(name, modes[i], *(number(found[key][i]) if key in found else "" for key in keys))
            for i, name in enumerate(names)]  # fmt: skip
    return Table(("entry", "mode", "min", "1 %", "mean", "99 %", "max", "std"), rows)


def _ranges(checkpoint: Checkpoint) -> bytes:
    contract, found = checkpoint.contract, _whole(checkpoint.normalizer.statistics["action"])
    return figures.ranges([
        (name, float(contract.action_low[i]), float(contract.action_high[i]),
         *(float(found[key][i]) for key in ("min", "q01", "q99", "max")))  # type: ignore[misc]
        for i, name in enumerate(contract.action_names)
    ])  # fmt: skip


def _whole(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Statistics of each entry over all rows of a plan, the widest of each; those of single actions as they are."""
    rows = {key: np.asarray(values) for key, values in found.items() if key != "count"}
    widest = {"min": np.min, "q01": np.min, "max": np.max, "q99": np.max}
    return {key: values if values.ndim == 1 else widest.get(key, np.mean)(values, axis=0)
            for key, values in rows.items()}  # fmt: skip


def _mixture(checkpoint: Checkpoint, statistics: Statistics) -> Table:
    names = entry_names(checkpoint.config.observation, checkpoint.contract)
    keys = ("min", "q01", "mean", "q99", "max", "std")
    rows = []
    for feature in (name for name in statistics if name in names):
        found = {key: np.asarray(values) for key, values in statistics[feature].items() if key in keys}
        steps = next((len(values) for values in found.values() if values.ndim == 2), None)
        entries = names[feature] if steps is None else plan_names(checkpoint.contract, steps)
        rows += [(feature, name, *(number(found[key].ravel()[i]) if key in found else "" for key in keys))
                 for i, name in enumerate(entries)]  # fmt: skip
    return Table(("feature", "entry", "min", "1 %", "mean", "99 %", "max", "std"), rows)


def _curves(path: Path) -> list[Picture]:
    """The curves that the run behind a checkpoint left in TensorBoard's files, if they are still there."""
    folders = (path.with_name(f"{path.name}.training") / "tensorboard", path.parent / "tensorboard")
    folder = next((each for each in folders if each.is_dir()), None)
    if folder is None:
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": POINTS})
    events.Reload()
    there = events.Tags()["scalars"]
    found = []
    for title, tags in CURVES.items():
        series = {tag: _last_run(events.Scalars(tag)) for tag in there if tag.startswith(tags)}
        if series:
            found.append(Picture(f"{title}, from {folder}", figures.lines(series, "step", title, log=title == "loss")))
    return found


def _last_run(points: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Steps and values of the newest of several runs that wrote into one folder."""
    start = max((i for i in range(1, len(points)) if points[i].step < points[i - 1].step), default=0)
    return [point.step for point in points[start:]], [point.value for point in points[start:]]
