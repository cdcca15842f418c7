"""Training: repeatable, able to learn, averaged on request, and stopped by data or rates that lead nowhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_core.data.dataset import ChunkWindows, Dataset
from vla_core.errors import VlaError
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.observation.builder import ImageSize, ObservationSpec
from vla_core.observation.normalizer import Normalizer
from vla_core.training import trainer
from vla_core.training.recipe import Recipe
from vla_core.training.trainer import Progress, TrainingError, train

from .helpers import SPEC, dataset, recipe


def weights(result: trainer.Result) -> dict[str, torch.Tensor]:
    return result.checkpoint.model.state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def diffusion(**training: object) -> Recipe:
    plain = recipe(**training)
    head = DiffusionHeadConfig(hidden_dim=32, train_steps=10, inference_steps=5)
    return dataclasses.replace(plain, model=dataclasses.replace(plain.model, head=head))


@pytest.mark.parametrize("options", [{}, {"image_shift": 2, "state_noise": 0.1, "ema_decay": 0.9}])
def test_a_seed_decides_the_run(options: dict[str, object]) -> None:
    runs = [train(diffusion(steps=6, seed=seed, **options), dataset(), dataset((5,))) for seed in (3, 3, 4)]
    assert equal(weights(runs[0]), weights(runs[1]))
    assert not equal(weights(runs[0]), weights(runs[2]))
    assert runs[0].validation_loss == runs[1].validation_loss


def test_validation_does_not_disturb_the_run() -> None:
    plain = train(diffusion(steps=6), dataset())
    watched = train(diffusion(steps=6, validate_every=2), dataset(), dataset((5,)))
    assert equal(weights(plain), weights(watched))


@pytest.mark.parametrize("pooling", ["average", "spatial_softmax"])
def test_two_episodes_can_be_learned_by_heart(pooling: str) -> None:
    start = recipe(steps=600, learning_rate=5e-3, batch_size=35)
    vision = dataclasses.replace(start.model.vision, pooling=pooling)
    data, seen = dataset(), []
    result = train(dataclasses.replace(start, model=dataclasses.replace(start.model, vision=vision)), data,
                   data, report=lambda p: seen.append(p.loss))  # fmt: skip
    assert result.validation_loss is not None and result.validation_loss < seen[0] / 10
    policy_inputs = ChunkWindows(data, 4)
    assert result.checkpoint.tokenizer.vocab_size == 5, "two reserved words and lift, it, drop"
    assert len(policy_inputs) == data.frames


@pytest.mark.parametrize("limit", [0.4, 0.95])
def test_the_averaged_weights_are_those_of_the_plain_run_averaged(
    monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    """Recompute the average from the weights after every step of an equal run without one."""
    history: list[dict[str, torch.Tensor]] = []
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, closure: None = None) -> None:
        real(self, closure)
        parameters = [p for group in self.param_groups for p in group["params"]]
        history.append({str(i): p.detach().clone() for i, p in enumerate(parameters)})

    torch.manual_seed(0)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    plain = train(recipe(steps=12), dataset())
    monkeypatch.undo()
    averaged = train(recipe(steps=12, ema_decay=limit), dataset())
    assert not equal(weights(plain), weights(averaged))
    expected = None
    for k, values in enumerate(history):
        decay = min(limit, (1 + k) / (10 + k))
        # At the first step the average starts from the initial weights, which 0.9 of the first update replace.
        expected = values if expected is None else {n: decay * expected[n] + (1 - decay) * v for n, v in values.items()}
    assert expected is not None
    for found, wanted in zip(averaged.checkpoint.model.parameters(), expected.values(), strict=True):
        torch.testing.assert_close(found.detach(), wanted, atol=1e-6, rtol=1e-5)


def test_data_that_is_not_finite_stops_the_run() -> None:
    for field in ("state", "action"):
        data = dataset()
        array = getattr(data.episodes[1], field)
        array[3, 1] = np.nan
        with pytest.raises(VlaError, match="35 rows of which 1 are not finite"):
            train(recipe(), data)


def test_a_loss_that_explodes_stops_the_run() -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+; lower training\.learning_rate"):
        train(recipe(steps=50, learning_rate=1e30, gradient_clip=None), dataset())


def test_weights_that_are_not_finite_are_never_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a step is taken before its update, so what the last update does is seen by no later loss."""

    def overflow(parameters: Iterable[torch.nn.Parameter], limit: float) -> None:
        gradient = next(iter(parameters)).grad
        assert gradient is not None
        gradient.fill_(float("nan"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    with pytest.raises(TrainingError, match="not finite"):
        train(recipe(steps=1, gradient_clip=1.0), dataset())


def test_a_dataset_of_another_observation_is_refused() -> None:
    other = ObservationSpec(images={"camera": ImageSize(height=4, width=4)}, state=("arm",), instruction="task")
    with pytest.raises(TrainingError, match="another observation"):
        train(dataclasses.replace(recipe(), observation=other), dataset())
    blind = ObservationSpec(state=("arm",), instruction="task")
    held_out = dataset((5,))
    with pytest.raises(VlaError, match="validation"):
        train(recipe(), dataset(), Dataset(held_out.contract, blind, held_out.episodes))


def test_held_out_loss_counts_every_known_step_once() -> None:
    """Batches of different size and masks must not weigh more or less: compare with all windows at once."""
    data = dataset((6, 3, 9))
    result = train(recipe(steps=2), data)
    batches = trainer.Batches(data, 4, result.checkpoint.normalizer, result.checkpoint.tokenizer)
    model = result.checkpoint.model
    expected, count = 0.0, 0
    for i in range(len(batches)):
        inputs, actions, mask = batches.draw(np.array([i]))
        error = (model.predict(inputs) - actions).abs()[0]
        expected += error[mask[0]].sum().item()
        count += int(mask.sum()) * 2
    for size in (512, 5):
        assert trainer.evaluate_loss(model, batches, size=size) == pytest.approx(expected / count, rel=1e-5)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    seen: list[Progress] = []
    train(recipe(steps=20, warmup_steps=5, learning_rate=1e-2), dataset(), report=seen.append)
    rates = [p.learning_rate for p in seen]
    assert rates[0] == pytest.approx(2e-3) and max(rates) == rates[4] and rates[-1] < 1e-4
    assert rates[4:] == sorted(rates[4:], reverse=True)
    seen.clear()
    train(recipe(steps=5, schedule="constant"), dataset(), report=seen.append)
    assert {p.learning_rate for p in seen} == {3e-3}


def test_validation_is_measured_when_asked_and_at_the_end() -> None:
    seen: list[Progress] = []
    train(recipe(steps=7, validate_every=3), dataset(), dataset((5,)), report=seen.append)
    assert [p.step for p in seen if p.validation_loss is not None] == [3, 6, 7]


def test_curves_go_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(recipe(steps=12, validate_every=6), dataset(), dataset((5,)), tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/learning_rate", "validation/loss"}
    curve = events.Scalars("validation/loss")
    assert [e.step for e in curve] == [6, 12] and curve[-1].value == pytest.approx(result.validation_loss)


def test_a_shift_only_shifts() -> None:
    """Inside the border each image is a roll of the original; at the border its edge is repeated."""
    torch.manual_seed(1)
    limit = 2
    pictures = torch.rand(64, 3, 9, 12)
    shifted = trainer._shift(pictures, limit)
    assert shifted.shape == pictures.shape and shifted.is_contiguous()
    moves = set()
    for original, moved in zip(pictures.numpy(), shifted.numpy(), strict=True):
        inner = (slice(None), slice(limit, -limit), slice(limit, -limit))
        found = [
            (dy, dx) for dy in range(-limit, limit + 1) for dx in range(-limit, limit + 1)
            if np.array_equal(np.roll(original, (dy, dx), (1, 2))[inner], moved[inner])
        ]  # fmt: skip
        assert len(found) == 1
        dy, dx = found[0]
        padded = np.pad(original, ((0, 0), (limit, limit), (limit, limit)), mode="edge")
        np.testing.assert_array_equal(moved, padded[:, limit - dy :, limit - dx :][:, :9, :12])
        moves.add(found[0])
    assert len(moves) > 15, "rows and columns are drawn for themselves, for each image"


def test_augmentation_is_the_trainers_alone() -> None:
    data = dataset()
    options = recipe(image_shift=2, state_noise=0.5).training
    normalizer = Normalizer(recipe().normalization, data.statistics())
    tokenizer = train(recipe(steps=1), data).checkpoint.tokenizer
    inputs, _, _ = trainer.Batches(data, 4, normalizer, tokenizer).draw(np.arange(10))
    torch.manual_seed(0)
    changed = trainer._augment(inputs, options)
    assert not torch.equal(changed.state, inputs.state)
    assert not torch.equal(changed.images["camera"], inputs.images["camera"])
    assert torch.equal(changed.tokens, inputs.tokens)
    same = trainer._augment(inputs, recipe().training)
    assert torch.equal(same.state, inputs.state) and torch.equal(same.images["camera"], inputs.images["camera"])
    assert data.spec == SPEC
