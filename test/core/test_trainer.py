"""Training: repeatable, able to learn, averaged on request, and stopped by data or rates that lead nowhere."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_core.checkpoint import Checkpoint
from vla_core.data.batches import Batches
from vla_core.data.dataset import Dataset
from vla_core.data.options import DataOptions, Validation
from vla_core.errors import VlaError
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig
from vla_core.observation.builder import ImageSize, ObservationSpec
from vla_core.observation.normalizer import Normalization
from vla_core.runtime.policy import Policy
from vla_core.training import trainer
from vla_core.training.distributed import Processes
from vla_core.training.measure import TrainingStep, held_out_loss
from vla_core.training.options import ClosedLoop
from vla_core.training.recipe import Recipe
from vla_core.training.trainer import Progress, TrainingError, train

from .helpers import CONTRACT, SPEC, dataset, recipe
from .whole_models import one_thread as one_thread


def weights(result: trainer.Result) -> dict[str, torch.Tensor]:
    return result.checkpoint.model.state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def held_out(result: trainer.Result, data: Dataset, size: int = 512) -> float:
    """The loss of a finished policy over all windows of a dataset."""
    batches = Batches(data, 4, result.checkpoint.normalizer, result.checkpoint.tokenizer)
    processes = Processes()
    try:
        return held_out_loss(TrainingStep(result.checkpoint.model), batches, processes, size)
    finally:
        processes.close()


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
    assert result.checkpoint.tokenizer.vocab_size == 5, "two reserved words and lift, it, drop"


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
    # Matrices stand before biases and norms, which are not decayed.
    ordered = sorted(averaged.checkpoint.model.parameters(), key=lambda p: p.ndim < 2)
    for found, wanted in zip(ordered, expected.values(), strict=True):
        torch.testing.assert_close(found.detach(), wanted, atol=1e-6, rtol=1e-5)


def test_data_that_is_not_finite_stops_the_run() -> None:
    for field in ("state", "action"):
        data = dataset()
        getattr(data, field)[23, 1] = np.nan
        with pytest.raises(VlaError, match="35 rows of which 1 are not finite"):
            train(recipe(), data)


def test_a_loss_that_explodes_stops_the_run() -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+; lower training\.learning_rate"):
        train(recipe(steps=50, learning_rate=1e30, gradient_clip=None), dataset())


def test_weights_that_are_not_finite_are_never_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a step is taken before its update, so what the last update does is seen by no later loss."""

    def overflow(parameters: Iterable[torch.nn.Parameter], limit: float) -> torch.Tensor:
        gradient = next(iter(parameters)).grad
        assert gradient is not None
        gradient.fill_(float("nan"))
        return torch.ones(())

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
        train(recipe(), dataset(), dataclasses.replace(held_out, spec=blind))


def test_held_out_loss_counts_every_known_step_once() -> None:
    """Batches of different size and masks must not weigh more or less: compare with all windows at once."""
    data = dataset((6, 3, 9))
    result = train(recipe(steps=2), data)
    batches = Batches(data, 4, result.checkpoint.normalizer, result.checkpoint.tokenizer)
    model = result.checkpoint.model
    expected, count = 0.0, 0
    for i in range(len(batches)):
        inputs, actions, mask = batches.draw(np.array([i]))[:3]
        error = (model.predict(inputs) - actions).abs()[0]
        expected += error[mask[0]].sum().item()
        count += int(mask.sum()) * 2
    for size in (512, 5):
        assert held_out(result, data, size) == pytest.approx(expected / count, rel=1e-5)


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
    assert set(events.Tags()["scalars"]) == {
        "train/loss", "train/learning_rate", "train/gradient_norm", "train/samples_per_s", "train/data_wait_s",
        "validation/loss", "open_loop/share", "open_loop/shoulder", "open_loop/elbow", "memory/peak_mb",
    }  # fmt: skip
    curve = events.Scalars("validation/loss")
    assert [e.step for e in curve] == [6, 12] and curve[-1].value == pytest.approx(result.validation_loss)


def test_augmentation_is_the_trainers_alone() -> None:
    """What is measured while training is what the finished policy gives on pictures that nobody has changed."""
    data, rest = dataset(), dataset((5, 7))
    options = {"image_shift": 2, "state_noise": 0.5, "ema_decay": 0.5, "batch_size": 35}
    result = train(recipe(steps=4, **options), data, rest)
    plain = train(recipe(steps=4, ema_decay=0.5, batch_size=35), data, rest)
    assert not equal(weights(result), weights(plain))
    assert result.validation_loss == pytest.approx(held_out(result, rest), rel=1e-6)
    assert data.spec == SPEC


def test_open_loop_error_is_that_of_the_chunks_that_the_policy_would_send() -> None:
    data, rest = dataset(), dataset((5, 7))
    result = train(recipe(steps=5, open_loop=7, validation_batch=3, ema_decay=0.5), data, rest)
    normalizer, model = result.checkpoint.normalizer, result.checkpoint.model
    batches = Batches(rest, 4, normalizer, result.checkpoint.tokenizer)
    chosen = np.unique(np.linspace(0, 11, 7).round().astype(int))
    errors = []
    for row in chosen:
        inputs, _, mask = batches.draw(np.array([row]))[:3]
        predicted = normalizer.unnormalize("action", model.predict(inputs).numpy())[0]
        end = 5 if row < 5 else 12
        for k in range(4):
            assert bool(mask[0, k]) == (row + k < end)
            if row + k < end:
                errors.append(np.abs(predicted[k] - rest.action[row + k]))
    mean = np.mean(errors, axis=0)
    assert result.measured["open_loop/shoulder"] == pytest.approx(mean[0], rel=1e-4)
    assert result.measured["open_loop/elbow"] == pytest.approx(mean[1], rel=1e-4)
    assert result.measured["open_loop/share"] == pytest.approx(np.mean(mean / [1.0, 2.0]), rel=1e-4)
    assert "open_loop/share" not in train(recipe(steps=1, open_loop=0), data, rest).measured


def test_closed_loop_runs_the_averaged_policy_on_its_own_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, list[int], int | None]] = []
    given: list[dict[str, torch.Tensor]] = []

    def simulate(policy: Policy, world: str, seeds: range, max_steps: int | None) -> dict[str, int]:
        asked.append((world, list(seeds), max_steps))
        given.append({name: value.clone() for name, value in policy.checkpoint.model.state_dict().items()})
        return {"successes": 3 if len(asked) == 2 else 1}

    monkeypatch.setattr("vla_core.evaluation.closed_loop.closed_loop_success", simulate)
    wanted = ClosedLoop(world="push-v3", every=4, episodes=5, seed=700)
    seen: list[Progress] = []
    plan = recipe(steps=10, evaluate=wanted, ema_decay=0.5)
    result = train(plan, dataset(), report=seen.append, folder=tmp_path)
    assert asked == [("push-v3", [700, 701, 702, 703, 704], None)] * 3
    assert {p.step: p.measured["closed_loop/success"] for p in seen if p.measured} == {4: 0.2, 8: 0.6, 10: 0.2}
    assert equal(given[2], weights(result))
    assert equal(given[1], Checkpoint.load(tmp_path / "best").model.state_dict()), (
        "the best by success, the first of it"
    )
    monkeypatch.undo()
    assert equal(weights(train(recipe(steps=10, ema_decay=0.5), dataset())), weights(result)), "it disturbs nothing"
    with pytest.raises(VlaError, match="psuh-v3"):
        train(recipe(evaluate=ClosedLoop(world="psuh-v3")), dataset())


def test_episodes_of_the_same_dataset_are_held_out() -> None:
    data = dataset((6, 3, 9, 4))
    split = dataclasses.replace(recipe(steps=3), data=DataOptions(validation=Validation(episodes=(1, 3))))
    kept = Dataset.select(data, [0, 2])
    by_hand = train(recipe(steps=3), kept, data.select([1, 3]))
    result = train(split, data)
    assert equal(weights(result), weights(by_hand)) and result.validation_loss == by_hand.validation_loss
    assert result.checkpoint.normalizer.statistics == kept.statistics(), "the held-out ones are not looked at"


def test_every_robot_of_a_mixture_has_its_own_statistics(tmp_path: Path) -> None:
    """A robot whose numbers are ten times as large is the same one to the model."""
    small = dataclasses.replace(dataset((20, 15)), name="small")
    arm = dataclasses.replace(CONTRACT.actions["arm"], low=(-10.0, -20.0), high=(10.0, 20.0))
    other = dataclasses.replace(CONTRACT, actions={"arm": arm})
    large = dataclasses.replace(dataset((20, 15), other), name="large", state=10 * small.state,
                                action=10 * small.action)  # fmt: skip
    recipe_ = recipe(steps=40, batch_size=32, learning_rate=1e-2)
    mixed = train(dataclasses.replace(recipe_, data=DataOptions(weights={"small": 1, "large": 3})), [small, large])
    mixed.checkpoint.save(tmp_path / "mixed")
    assert set(mixed.checkpoint.dataset_statistics) == {"small", "large"}
    errors = {}
    for data in (small, large):
        found = Checkpoint.load(tmp_path / "mixed", dataset=data.name)
        inputs = Batches(data, 4, found.normalizer, found.tokenizer).draw(np.arange(35)).inputs
        predicted = found.normalizer.unnormalize("action", found.model.predict(inputs).numpy())
        errors[data.name] = np.abs(predicted[:, 0] - data.action).mean()
    assert errors["large"] == pytest.approx(10 * errors["small"], rel=1e-3)
    with pytest.raises(VlaError, match=r"data\.weights\.tiny: no such dataset; choices: large, small"):
        train(dataclasses.replace(recipe_, data=DataOptions(weights={"tiny": 1})), [small, large])
    with pytest.raises(VlaError, match="datasets of the same name: small, small"):
        train(recipe_, [small, small])


def test_a_run_begins_with_the_weights_words_and_statistics_of_another() -> None:
    first = train(diffusion(steps=6), dataset())
    other = dataset((7, 8))
    begun = train(diffusion(steps=1, learning_rate=1e-12), other, start=first.checkpoint)
    for name, tensor in weights(first).items():
        torch.testing.assert_close(weights(begun)[name], tensor, atol=1e-9, rtol=0)
    assert begun.checkpoint.normalizer.statistics == first.checkpoint.normalizer.statistics != other.statistics()
    assert begun.checkpoint.tokenizer.to_dict() == first.checkpoint.tokenizer.to_dict()
    again = train(diffusion(steps=6), dataset(), start=train(diffusion(steps=6), dataset()).checkpoint)
    assert not equal(weights(again), weights(first)), "it went on"


def test_a_run_begins_only_with_a_policy_of_its_own_recipe() -> None:
    first = train(diffusion(steps=1), dataset()).checkpoint
    with pytest.raises(TrainingError, match=r"is of another model than the recipe's: \d+ tensors differ, such as head"):
        train(recipe(steps=1), dataset(), start=first)
    changed = dataclasses.replace(diffusion(steps=1), normalization=Normalization(action="quantile"))
    with pytest.raises(TrainingError, match=r"to start from has another normalization than the recipe: .*quantile"):
        train(changed, dataset(), start=first)


def test_wandb_is_told_what_tensorboard_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package is a stub here: that the run is offline unless the environment says otherwise is what counts."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, figures: dict[str, float], step: int) -> None:
            calls.append(("log", (step, sorted(figures))))

        def finish(self) -> None:
            calls.append(("finish", None))

    stub = types.ModuleType("wandb")
    stub.init = lambda **given: calls.append(("init", given)) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train(recipe(steps=2, log_every=1, wandb="arm"), dataset(), folder=tmp_path)
    kind, given = calls[0]
    assert kind == "init" and given["mode"] == "offline" and given["project"] == "arm"
    assert given["config"]["training"]["steps"] == 2 and calls[-1] == ("finish", None)
    names = ["train/data_wait_s", "train/gradient_norm", "train/learning_rate", "train/loss", "train/samples_per_s"]
    assert calls[1:3] == [("log", (1, names)), ("log", (2, names))]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(VlaError, match="wandb is not installed; pip install"):
        train(recipe(steps=1, wandb="arm"), dataset(), folder=tmp_path)
