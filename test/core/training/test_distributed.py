"""Two processes at the same global batch are one process: DDP and FSDP over gloo, started by torchrun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vla_core.model.action_head.base import RowGenerator, draw_rows, normal_like
from vla_core.training.state import RunFolder

from .toy_run import finish, start

ROOT = Path(__file__).parents[3]
TRAINING: dict[str, Any] = {
    "steps": 10, "ema_decay": 0.9, "image_shift": 1, "state_noise": 0.1, "save_every": 4, "validate_every": 5,
    "validation_batch": 2,
}  # fmt: skip


def torchrun(**settings: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port),
               "-m", "test.core.training.toy_run",
               json.dumps(settings, default=str)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]


def outcome(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(out / "weights.safetensors"), json.loads((out / "figures.json").read_text())


def check_equal(a: Path, b: Path, tolerance: float = 1e-5) -> None:
    """The same losses at every step, the same measurements, and the same weights, but for rounding."""
    (weights, figures), (others, other_figures) = outcome(a), outcome(b)
    assert len(figures["losses"]) == TRAINING["steps"]
    torch.testing.assert_close(figures["losses"], other_figures["losses"], rtol=tolerance, atol=0)
    for measured in (figures["measured"], other_figures["measured"]):
        assert measured.pop("memory/peak_mb") > 0
        assert {"validation/loss", "open_loop/share", "open_loop/shoulder", "open_loop/elbow"} == set(measured)
    torch.testing.assert_close(figures["measured"], other_figures["measured"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "head", "options"), [
    ("toy", "mlp", {}),
    ("toy", "flow", {"accumulate": 2, "groups": [{"pattern": "text_encoder.*", "freeze_until": 4}]}),
    ("adapters", "diffusion", {"distributed": "fsdp"}),
])  # fmt: skip
def test_two_processes_train_as_one(tmp_path: Path, model: str, head: str, options: dict[str, Any]) -> None:
    one = {**TRAINING, **options, "accumulate": 1}
    assert finish(start(out=tmp_path / "one", model=model, head=head, training=one)) == 0
    folder = tmp_path / "run"
    torchrun(out=tmp_path / "two", model=model, head=head, training={**TRAINING, **options}, folder=folder)
    check_equal(tmp_path / "one", tmp_path / "two")
    held = outcome(tmp_path / "two")[1]["held"]
    assert held == 1 if "distributed" not in options else 0.4 < held < 0.6, "share of the weights that a process has"

    # One process goes on from what two have stored, whole: from step 8 it takes the same last two steps.
    newest = RunFolder(folder).newest()
    assert newest is not None and newest.state.step == 10 and newest.state.processes == 2
    for file in newest.path.glob("**/*"):
        if file.is_file():
            file.unlink()
    for place in (newest.path / "training", newest.path):
        place.rmdir()
    assert finish(start(out=tmp_path / "on", model=model, head=head, training=one, folder=folder, resume=True)) == 0
    weights, figures = outcome(tmp_path / "on")
    assert len(figures["losses"]) == 2
    torch.testing.assert_close(weights, outcome(tmp_path / "one")[0], rtol=1e-4, atol=1e-5)


def test_a_row_has_the_same_noise_however_the_batch_is_divided() -> None:
    def generator(first: int, total: int) -> RowGenerator:
        found = RowGenerator()
        found.manual_seed(7)
        found.first, found.total = first, total
        return found

    whole = normal_like(torch.zeros(6, 3, 2), generator(0, 6))
    plain = torch.Generator().manual_seed(7)
    assert torch.equal(whole, torch.randn(6, 3, 2, generator=plain)), "a batch that is not divided has the usual noise"
    for first, rows in ((0, 2), (2, 3), (5, 1)):
        assert torch.equal(normal_like(torch.zeros(rows, 3, 2), generator(first, 6)), whole[first : first + rows])
    counted = draw_rows(2, generator(4, 6), lambda count: torch.arange(count))
    assert counted.tolist() == [4, 5]
