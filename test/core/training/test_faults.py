"""A run that leads nowhere stops before it spoils what is stored, and hands over the batch that did it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vla_core.data.batches import Batches
from vla_core.data.loader import Loader
from vla_core.model.vla.mini_vla import MiniVLA
from vla_core.observation.normalizer import Normalizer
from vla_core.training.faults import EARLIEST, LossWatch, origins
from vla_core.training.state import RunFolder
from vla_core.training.trainer import TrainingError, train

from ..helpers import dataset, recipe
from ..whole_models import one_thread as one_thread
from .toy_run import toy_recipe


def spoil(monkeypatch: pytest.MonkeyPatch, at: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the loss of the training step that is called as number ``at``."""
    real, calls = MiniVLA.loss, []

    def loss(self: MiniVLA, *arguments: object) -> torch.Tensor:
        found = real(self, *arguments)  # type: ignore[arg-type]
        if torch.is_grad_enabled():
            calls.append(found)
        return change(found) if torch.is_grad_enabled() and len(calls) == at + 1 else found

    monkeypatch.setattr(MiniVLA, "loss", loss)


class NaNGradient(torch.autograd.Function):
    """The identity, whose gradient is no number."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan


@pytest.mark.parametrize(("change", "said"), [
    (lambda loss: loss * math.nan, "the loss is nan at step 5; lower training.learning_rate"),
    (lambda loss: loss + math.inf, "the loss is inf at step 5"),
    (NaNGradient.apply, "the gradient's norm is nan at a loss of "),
])  # fmt: skip
def test_the_offending_batch_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    data = dataset((6, 3, 9))
    plain = recipe(steps=20, save_every=4, state_noise=0.1)
    spoil(monkeypatch, 5, change)
    with pytest.raises(TrainingError, match=said) as caught:
        train(plain, data, folder=tmp_path)
    place = tmp_path / "faults" / "step_00000005"
    assert str(place) in str(caught.value)

    report = json.loads((place / "report_0.json").read_text())
    assert report["step"] == 5 and len(report["losses"]) == 5 and all(map(math.isfinite, report["losses"]))
    saved = load_file(place / "batch_0_0.safetensors")
    batches = Batches(data, 4, Normalizer(plain.normalization, data.statistics()), train_tokenizer(data))
    expected = Loader(batches, batch_size=16, seed=0).batch(5)
    assert torch.equal(saved["actions"], expected.actions) and torch.equal(saved["mask"], expected.mask)
    assert torch.equal(saved["inputs.images.camera"], expected.inputs.images["camera"])
    assert torch.equal(saved["inputs.tokens"], expected.inputs.tokens)
    assert len(report["samples"]) == 16
    for sample, (_, row) in zip(report["samples"], expected.rows, strict=True):
        episode = data.episodes[sample["episode"]]
        assert sample["dataset"] == "memory" and sample["bag"] == episode.bag
        assert int(data.starts[sample["episode"]]) + sample["frame"] == row and sample["frame"] < episode.length

    newest = RunFolder(tmp_path).newest()
    assert newest is not None and newest.state.step == 4
    assert all(value.isfinite().all() for value in newest.checkpoint().model.state_dict().values())


def train_tokenizer(data: object) -> object:
    return train(recipe(steps=1), data).checkpoint.tokenizer  # type: ignore[arg-type]


def test_rows_of_several_datasets_are_told_apart() -> None:
    data = [dataset((6, 3)), dataset((4, 4, 4))]
    batches = Batches(data[1], 4, Normalizer(recipe().normalization, data[1].statistics()), train_tokenizer(data[1]))
    batch = batches.draw(np.array([0, 5, 11]))
    batch.rows[:, 0] = 1
    found = [(sample["episode"], sample["bag"], sample["frame"]) for sample in origins(batch, data)]
    assert found == [(0, "bag_0", 0), (1, "bag_1", 1), (2, "bag_2", 3)]


def test_an_exploding_loss_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 60, lambda loss: loss * 50)
    with pytest.raises(TrainingError, match=r"more than 20 times its running median 0\.\d+ at step 60"):
        train(recipe(steps=70, explosion=20.0), dataset(), folder=tmp_path)
    spoil(monkeypatch, 60, lambda loss: loss * 50)
    train(recipe(steps=70, explosion=None), dataset())


def test_what_is_usual_is_no_explosion() -> None:
    """Losses that fall by orders of magnitude, jump as small batches do, or are negative as log-likelihoods are."""
    rng = np.random.default_rng(0)
    falling = np.geomspace(1e3, 1e-4, 500) * rng.lognormal(0, 1, 500)
    negative = np.linspace(3, -3, 500) + rng.normal(0, 0.3, 500)
    for losses in (falling, negative):
        watch = LossWatch(100.0)
        assert [watch.fault(float(loss), 1.0) for loss in losses] == [None] * 500
        assert len(watch.losses) == 100
    early = LossWatch(10.0)
    assert all(early.fault(loss, 1.0) is None for loss in [1e-3] * (EARLIEST - 1) + [1e6])
    assert early.fault(1e6, 1.0) is not None


def test_a_gradient_that_overflows_in_half_precision_is_skipped_not_fatal() -> None:
    watch = LossWatch(None)
    assert watch.fault(1.0, math.inf, norm_may_overflow=True) is None
    assert watch.fault(math.nan, 1.0, norm_may_overflow=True) == "the loss is nan"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_what_full_precision_learns(precision: str) -> None:
    losses: dict[str, float] = {}
    for kind in ("fp32", precision):
        result = train(toy_recipe(steps=150, precision=kind, learning_rate=5e-3, batch_size=35), dataset())
        losses[kind] = result.loss
        assert all(value.dtype == torch.float32 for value in result.checkpoint.model.parameters())
    assert losses["fp32"] != losses[precision] and losses[precision] == pytest.approx(losses["fp32"], rel=0.15)
