"""``vla train`` as it is typed: a run's folder, going on, several datasets, Ctrl-C and torchrun."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from vla_core.checkpoint import Checkpoint
from vla_core.cli import main
from vla_core.config import to_dict
from vla_core.data.convert import convert
from vla_core.training import state
from vla_core.training.state import RunFolder

from ..helpers import SPEC, recipe, stream_messages, write_bag
from ..whole_models import one_thread as one_thread

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of the toy robot and a recipe."""
    place = tmp_path_factory.mktemp("made")
    for name, seed in (("a", 0), ("b", 5)):
        bags = [write_bag(place / "bags" / f"{name}{i}", stream_messages(12, seed=seed + i)) for i in range(3)]
        convert(bags, place / name, SPEC)
    plain = recipe(steps=6, save_every=2, validate_every=3)
    (place / "toy.yaml").write_text(yaml.safe_dump(to_dict(dataclasses.replace(plain))))
    return place


@pytest.fixture
def place(tmp_path: Path, datasets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with both."""
    for name in ("a", "b", "toy.yaml"):
        (tmp_path / name).symlink_to(datasets / name)
    monkeypatch.setattr(state, "_to_disk", lambda folder: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


Runs = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def runs(place: Path, capsys: pytest.CaptureFixture[str]) -> Runs:
    """Run ``vla`` with these words; returns the status and what it wrote."""

    def run(words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(shlex.split(words))
        written = capsys.readouterr()
        return status, written.out, written.err

    return run


def weights(path: Path) -> dict[str, torch.Tensor]:
    return Checkpoint.load(path).model.state_dict()


def same(a: Path, b: Path) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def test_a_run_has_its_folder_beside_the_checkpoint_and_goes_on_only_when_told(runs: Runs, place: Path) -> None:
    line = "train toy.yaml --dataset a data.validation.fraction=0.34 --out out/arm"
    status, said, _ = runs(line)
    assert status == 0 and "out/arm: " in said and "held-out loss" in said
    run = place / "out" / "arm.training"
    assert {p.name for p in run.iterdir()} == {"step_00000004", "step_00000006", "best", "tensorboard"}
    assert same(place / "out" / "arm", run / "step_00000006")
    status, _, said = runs(line)
    assert status == 1 and "arm.training: has step_00000006 of an earlier run" in said and "--restart" in said
    before = weights(place / "out" / "arm")
    assert runs(line + " --resume training.log_every=3")[0] == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(place / "out" / "arm").items())
    status, _, said = runs(line + " --resume training.seed=3")
    assert status == 1 and "training.seed 3 instead of 0" in said
    assert runs(line + " --restart training.seed=3 training.steps=2")[0] == 0
    assert [p.name for p in RunFolder(run).states()] == ["step_00000002"]
    status, said, _ = runs("train toy.yaml --dataset a --out fresh --resume")
    assert status == 0 and "no state in fresh.training yet: starting at step 0" in said


def test_several_datasets_are_mixed_by_their_weights(runs: Runs, place: Path) -> None:
    assert runs("train toy.yaml --dataset a=3 --dataset ./b=1 --out mixed")[0] == 0
    assert set(Checkpoint.load(place / "mixed").dataset_statistics) == {"a", "b"}
    newest = RunFolder(place / "mixed.training").newest()
    assert newest is not None and newest.state.recipe["data"]["weights"] == {"a": 3.0, "b": 1.0}
    assert runs("train toy.yaml data.weights={a: 3, b: 1} --dataset a --dataset b --out other".replace(
        "data.weights={a: 3, b: 1}", "'data.weights={a: 3, b: 1}'"))[0] == 0  # fmt: skip
    assert same(place / "mixed", place / "other")
    assert runs("train toy.yaml --dataset a --validation b --out held")[0] == 0

    for words, expected in {
        "--dataset a=3 --dataset b": "1 of 2 have a weight",
        "--dataset a=three": "expected PATH, or PATH=WEIGHT with a number",
        "--dataset a=0": "weights.a: expected a positive number",
        "--dataset a --dataset b --validation b": "found 1 for 2 datasets",
        "--dataset a data.weights.c=1": "data.weights.c: no such dataset; choices: a",
        "--dataset a --dataset a": "datasets of the same name",
    }.items():
        status, _, said = runs(f"train toy.yaml {words} --out new")
        assert status == 1 and expected in said and said.count("\n") == 1, said
    assert not (place / "new").exists() and not (place / "new.training").exists()


def test_ctrl_c_stores_the_state_and_says_how_to_go_on(runs: Runs, place: Path) -> None:
    assert runs("train toy.yaml --dataset a --out unbroken training.steps=40 training.save_every=100")[0] == 0
    words = [
        sys.executable,
        "-c",
        PROGRAM,
        "train",
        "toy.yaml",
        "--dataset",
        "a",
        "--out",
        "arm",
        "training.steps=40",
        "training.save_every=100",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 130 and "Traceback" not in run.stderr, run.stderr
    told = run.stderr.splitlines()[0]
    assert told.startswith("stopped after step 7 of 40; the state is in arm.training; continue with: vla train ")
    assert runs(told.partition("continue with: vla ")[2])[0] == 0
    assert same(place / "arm", place / "unbroken")


# Ctrl-C, pressed in the midst of step 7.
PROGRAM = """
import os, signal, sys
from vla_core.cli import main
from vla_core.model.vla.mini_vla import MiniVLA
real, steps = MiniVLA.loss, []

def loss(*arguments):
    steps.append(0)
    if len(steps) == 7:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments)

MiniVLA.loss = loss
sys.exit(main(sys.argv[1:]))
"""


def test_torchrun_trains_with_every_process_and_speaks_with_one(runs: Runs, place: Path) -> None:
    assert runs("train toy.yaml --dataset a --out one")[0] == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m",
             "vla_core.cli", "train", "toy.yaml", "--dataset", "a", "--out", "two"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("two: ") == 1
    newest = RunFolder(place / "two.training").newest()
    assert newest is not None and newest.state.processes == 2
    torch.testing.assert_close(weights(place / "two"), weights(place / "one"), rtol=1e-4, atol=1e-5)


def test_the_signal_handlers_are_those_of_before(runs: Runs) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert runs("train toy.yaml --dataset a --out out")[0] == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
