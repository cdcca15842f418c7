"""A run that was killed, interrupted or out of disk goes on to the very weights of the run that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vla_core.checkpoint import Checkpoint
from vla_core.training import state
from vla_core.training.state import RunFolder, StateError
from vla_core.training.trainer import train

from ..helpers import dataset
from ..whole_models import one_thread as one_thread
from .toy_run import finish, start, toy_recipe

TRAINING: dict[str, Any] = {
    "steps": 18, "save_every": 4, "validate_every": 6, "ema_decay": 0.9, "image_shift": 1, "state_noise": 0.1,
    "warmup_steps": 3,
}  # fmt: skip


def options(**changes: Any) -> dict[str, Any]:
    return {**TRAINING, **changes}


def outcome(out: Path) -> tuple[dict[str, torch.Tensor], float]:
    figures = json.loads((out / "figures.json").read_text())
    return load_file(out / "weights.safetensors"), figures["validation"]


def same(a: Path, b: Path) -> bool:
    (weights, validation), (others, other_validation) = outcome(a), outcome(b)
    assert weights.keys() == others.keys()
    return validation == other_validation and all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here cuts the power, and a busy machine takes seconds to empty its caches."""
    monkeypatch.setattr(state, "_to_disk", lambda folder: None)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run gives that nothing disturbed, and that stored nothing."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert finish(start(out=out, head="flow", training=options())) == 0
    return out


@pytest.mark.parametrize("kill", [
    {"kill_at": 3}, {"kill_at": 4}, {"kill_at": 11}, {"kill_at": 18}, {"kill_at": 8, "kill_in": "optimizer"},
    {"kill_at": 8, "kill_in": "before"}, {"kill_at": 8, "kill_in": "after"},
])  # fmt: skip
def test_killed_at_a_step_or_while_writing(unbroken: Path, tmp_path: Path, kill: dict[str, Any]) -> None:
    common = {"out": tmp_path / "out", "folder": tmp_path / "run", "head": "flow", "training": options()}
    assert finish(start(**common, **kill)) == -signal.SIGKILL
    assert finish(start(**common, resume=True)) == 0
    assert same(tmp_path / "out", unbroken)
    assert not list((tmp_path / "run").glob(".*")), "what was half written is gone"


def test_killed_whenever(unbroken: Path, tmp_path: Path) -> None:
    """At moments that nobody chose, again and again, with a state written after every step."""
    common = {"out": tmp_path / "out", "folder": tmp_path / "run", "head": "flow"}
    chance, kills = random.Random(0), 0
    while True:
        process = start(**common, training=options(save_every=1), resume=True)
        begun = time.monotonic()
        while process.is_alive() and (kills >= 6 or time.monotonic() < begun + 0.1 + 0.4 * chance.random()):
            process.join(0.005)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            kills += 1
        if finish(process) == 0:
            break
    assert same(tmp_path / "out", unbroken)


def test_a_signal_ends_the_step_and_stores_the_state(unbroken: Path, tmp_path: Path) -> None:
    common = {"out": tmp_path / "out", "folder": tmp_path / "run", "head": "flow"}
    process = start(**common, training=options(steps=100000, schedule="constant", save_every=1))
    while not RunFolder(tmp_path / "run").states():
        process.join(0.01)
        assert process.is_alive()
    os.kill(process.pid or 0, signal.SIGTERM)
    assert finish(process) == 130
    newest = RunFolder(tmp_path / "run").newest()
    assert newest is not None and newest.state.step > 0
    Checkpoint.load(newest.path)


def test_a_full_disk_while_storing_leaves_the_state_before(unbroken: Path, tmp_path: Path) -> None:
    common = {"out": tmp_path / "out", "folder": tmp_path / "run", "head": "flow", "training": options()}
    assert finish(start(**common, kill_at=5)) < 0
    before = (tmp_path / "run" / "step_00000004" / "model.safetensors").read_bytes()
    assert finish(start(**common, resume=True, limit_bytes=10_000)) == 1
    said = (tmp_path / "out.error").read_text()
    assert "step_00000008: cannot be saved" in said or "best: cannot be saved" in said
    assert "whole" in said and "\n" not in said
    assert (tmp_path / "run" / "step_00000004" / "model.safetensors").read_bytes() == before
    assert [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith("step_")] == ["step_00000004"]
    assert finish(start(**common, resume=True)) == 0
    assert same(tmp_path / "out", unbroken)


def test_the_newest_states_and_the_best_are_kept_and_run(tmp_path: Path) -> None:
    measured: list[tuple[int, float]] = []
    short = options(steps=8, validate_every=1, learning_rate=0.05)
    recipe = toy_recipe(**{**short, "save_every": 2, "keep": 3})
    train(recipe, dataset(), dataset((5,)), folder=tmp_path,
          report=lambda p: measured.append((p.step, p.validation_loss or 0.0)))  # fmt: skip
    assert [p.name for p in RunFolder(tmp_path).states()] == ["step_00000004", "step_00000006", "step_00000008"]
    found = {path.name: Checkpoint.load(path).model.state_dict() for path in tmp_path.iterdir()}
    best_step = min(measured, key=lambda pair: pair[1])[0]
    train(toy_recipe(**{**short, "save_every": 1, "keep": 8}), dataset(), dataset((5,)), folder=tmp_path / "again")
    wanted = Checkpoint.load(tmp_path / "again" / f"step_{best_step:08d}").model.state_dict()
    assert all(torch.equal(found["best"][name], wanted[name]) for name in wanted)


def test_a_stored_checkpoint_has_the_averaged_weights(tmp_path: Path) -> None:
    result = train(toy_recipe(**options(steps=4)), dataset(), folder=tmp_path)
    stored = Checkpoint.load(tmp_path / "step_00000004").model.state_dict()
    raw = load_file(tmp_path / "step_00000004" / "training" / "weights.safetensors")
    handed = result.checkpoint.model.state_dict()
    assert all(torch.equal(stored[name], handed[name]) for name in handed)
    assert set(raw) == set(handed)
    assert not torch.equal(raw["head.net.0.weight"], handed["head.net.0.weight"])


def test_a_run_that_is_another_one_is_refused(tmp_path: Path) -> None:
    start = options(steps=4)
    train(toy_recipe(**start), dataset(), folder=tmp_path)

    def resume(data: Any = None, **changes: Any) -> None:
        train(toy_recipe(**{**start, **changes}), data or dataset(), folder=tmp_path, resume=True)

    resume(log_every=3, keep=5, save_every=1, validate_every=7)
    with pytest.raises(StateError, match=r"training\.learning_rate 0\.1 instead of 0\.003; training\.seed 5 instead"):
        resume(learning_rate=0.1, seed=5)
    with pytest.raises(StateError, match=r"training\.steps 9 instead of 4"):
        resume(steps=9)
    with pytest.raises(StateError, match=r"other data: memory \(35 frames, 35 windows\), not memory \(33 frames"):
        resume(dataset((20, 13)))
    with pytest.raises(StateError, match="an earlier run; continue it with --resume"):
        RunFolder(tmp_path).check_new()


def test_a_constant_rate_may_go_on_for_longer(tmp_path: Path) -> None:
    def weights(steps: int, folder: Path | None, resume: bool = False) -> dict[str, torch.Tensor]:
        recipe = toy_recipe(**options(schedule="constant", steps=steps))
        return train(recipe, dataset(), folder=folder, resume=resume).checkpoint.model.state_dict()

    weights(5, tmp_path)
    longer, unbroken = weights(9, tmp_path, resume=True), weights(9, None)
    assert all(torch.equal(longer[name], unbroken[name]) for name in unbroken)


@pytest.mark.parametrize("damage", ["state.json", "optimizer.safetensors", "weights.safetensors"])
def test_a_damaged_state_is_passed_over_and_never_read(tmp_path: Path, damage: str) -> None:
    recipe = toy_recipe(**options(steps=8))
    train(recipe, dataset(), folder=tmp_path)
    for step in (8, 4):
        file = tmp_path / f"step_{step:08d}" / "training" / damage
        file.write_bytes(file.read_bytes()[:-9])
        if step == 8:
            newest = RunFolder(tmp_path).newest()
            assert newest is not None and newest.state.step == 4
    with pytest.raises(StateError, match=r"no state is whole: step_00000008: .*; step_00000004: .*--restart"):
        train(recipe, dataset(), folder=tmp_path, resume=True)
