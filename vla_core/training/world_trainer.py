"""Training of a world model on sequences: datasets and a recipe to a folder, interrupted or not.

Batches and noise of a step are functions of the seed and the step, as of a policy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vla_core.config import to_dict
from vla_core.data.dataset import Dataset
from vla_core.data.options import keep, split
from vla_core.data.sampler import Sampler
from vla_core.data.sequences import Sequences, arrival_rewards, ends, sequence_statistics
from vla_core.evaluation.world import surprise_limits
from vla_core.model.world_model import WorldModel, build_world_model
from vla_core.training.callbacks import TensorBoardLog
from vla_core.training.distributed import check_device
from vla_core.training.faults import LossWatch, TrainingError
from vla_core.training.optimizer import build_optimizer, parameter_groups, set_learning_rates
from vla_core.training.running import Clock, interruptible, peak_mb, seed_everything, step_seed
from vla_core.training.state import RunFolder, RunState, Saved, check_same, optimizer_tensors
from vla_core.training.success import classified, train_classifier
from vla_core.training.trainer import Interrupted, Progress
from vla_core.training.world_recipe import WorldRecipe
from vla_core.world_checkpoint import FILES, WorldCheckpoint, WorldConfig, world_normalizer


@dataclasses.dataclass(frozen=True)
class WorldResult:
    """A finished run; ``held_out`` has the held-out sequences, which a report is made of."""

    checkpoint: WorldCheckpoint
    seconds: float
    loss: float
    validation_loss: float | None
    held_out: Sequences | None


def train_world(
    recipe: WorldRecipe,
    data: Dataset,
    validation: Dataset | None = None,
    log_dir: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    provenance: dict[str, str] | None = None,
    *,
    folder: Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> WorldResult:
    """Train ``recipe`` on ``data``; arguments as of :func:`vla_core.training.trainer.train`."""
    run = _Run(recipe, data, validation, folder, resume, provenance or {}, say)
    if resume:
        say(f"going on after step {run.done}" if run.done else f"no state in {folder} yet: starting at step 0")
    return run.go(log_dir, report)


class _Run:
    """All that changes while a run lasts."""

    def __init__(self, recipe: WorldRecipe, data: Dataset, validation: Dataset | None, folder: Path | None,
                 resume: bool, provenance: dict[str, str], say: Callable[[str], None]) -> None:  # fmt: skip
        options = self.options = recipe.training
        self.recipe = recipe
        self.device = torch.device(options.device)
        check_device(options.device)
        if data.spec != recipe.observation:
            raise TrainingError(f"the dataset {data.name} was loaded for another observation than the recipe's")
        data, notes = keep(data, recipe.data.filter)
        for line in notes:
            say(line)
        training, held_out = (data, validation) if validation is not None else split(data, recipe.data.validation)
        self.config = WorldConfig(
            model=recipe.model_config(data.contract), observation=recipe.observation,
            normalization=recipe.normalization, rewards=recipe.rewards, surprise_window=recipe.surprise_window,
            provenance=provenance,
        )  # fmt: skip
        self.contract = data.contract
        statistics = sequence_statistics(training)
        self.normalizer = world_normalizer(self.config, statistics, self.contract)
        for line in self.normalizer.warnings():
            say(f"{data.name}: {line}")
        self.training, self.held_out = self._sequences(training, held_out)
        self.record = [{"name": data.name, "frames": data.frames, "windows": self.training.lengths[0],
                        "statistics": statistics}]  # fmt: skip
        self.folder = None if folder is None else RunFolder(folder, options.keep, FILES)
        saved = self.folder.newest() if self.folder is not None and resume else None
        if saved is not None:
            check_same(saved, recipe, self.record)
        torch.manual_seed(options.seed)
        self.model: WorldModel = (
            build_world_model(self.config.model) if saved is None else WorldCheckpoint.load(saved.path).model
        ).to(self.device).train()  # fmt: skip
        self.groups = parameter_groups(self.model, options.optimizer)
        self.optimizer = build_optimizer(self.model, self.groups, options.optimizer)
        self.watch = LossWatch(options.explosion)
        self.done, self.loss, self.seconds = 0, math.nan, 0.0
        self.validation_loss: float | None = None
        if saved is not None:
            self._restore(saved)

    def _sequences(self, training: Dataset, held_out: Dataset | None) -> tuple[Sequences, Sequences | None]:
        recipe = self.recipe
        if recipe.rewards == "classifier":
            model = train_classifier(training, self.normalizer, self.config.model, seed=recipe.training.seed)

        def sequences(data: Dataset) -> Sequences:
            if recipe.rewards == "classifier":
                rewards = classified(model, data, self.normalizer)
            else:
                rewards = arrival_rewards(data, recipe.rewards)
            return Sequences(data, recipe.training.ticks, self.normalizer, rewards, ends(data, recipe.ends))

        return sequences(training), None if held_out is None else sequences(held_out)

    def go(self, log_dir: Path | None, report: Callable[[Progress], None]) -> WorldResult:
        """All steps that are left."""
        options = self.options
        sampler = Sampler(self.training.lengths, None, options.seed)
        clock = Clock(self.done, self.seconds)
        log = None if log_dir is None else TensorBoardLog(log_dir, self.done)
        try:
            with interruptible(self.folder is not None) as asked:
                for step in range(self.done, options.steps):
                    figures = self._update(step, sampler)
                    self.done, self.seconds = step + 1, clock.seconds()
                    last = step + 1 == options.steps
                    if self.held_out is not None and ((step + 1) % options.validate_every == 0 or last):
                        with clock.aside():
                            figures |= self._validate()
                    if log is not None and (step % options.log_every == 0 or last or "validation/loss" in figures):
                        log.write(step, {**figures, "memory/peak_mb": peak_mb(self.device)})
                    rate = options.batch_size * options.ticks * clock.steps_per_s(self.done)
                    report(Progress(step + 1, self.loss, figures["train/learning_rate"], figures.get("validation/loss"),
                                    rate, clock.seconds_left(self.done, options.steps)))  # fmt: skip
                    stop = asked()
                    if self.folder is not None and ((step + 1) % options.save_every == 0 or last or stop):
                        with clock.aside():
                            self._save()
                    if stop:
                        raise Interrupted(f"stopped after step {self.done} of {options.steps}")
        finally:
            if log is not None:
                log.close()
        return self._finish()

    def _update(self, step: int, sampler: Sampler) -> dict[str, float]:
        options = self.options
        seed = step_seed(options.seed, step)
        seed_everything(seed, self.device)
        rates = set_learning_rates(self.optimizer, options.optimizer, step)
        batch = self.training.draw(sampler.rows(step, options.batch_size)).to(self.device)
        loss, parts = self.model.loss(batch, torch.Generator(self.device).manual_seed(seed))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = math.inf if options.gradient_clip is None else options.gradient_clip
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        value = float(loss.detach())
        fault = self.watch.fault(value, norm)
        if fault is not None:
            raise TrainingError(f"step {step}: {fault}; lower training.learning_rate ({options.learning_rate:g})")
        self.optimizer.step()
        self.loss = value if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * value
        return {"train/loss": value, "train/gradient_norm": norm, "train/learning_rate": next(iter(rates.values())),
                **{f"train/{name}": float(part) for name, part in parts.items()}}  # fmt: skip

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Held-out loss of windows that are spread evenly, always the same ones."""
        assert self.held_out is not None
        count = self.held_out.lengths[0]
        numbers = np.unique(np.linspace(0, count - 1, self.options.validation_batch).round().astype(np.int64))
        batch = self.held_out.draw(numbers).to(self.device)
        loss, parts = self.model.eval().loss(batch, torch.Generator(self.device).manual_seed(0))
        self.model.train()
        self.validation_loss = float(loss)
        return {"validation/loss": float(loss), **{f"validation/{name}": float(part) for name, part in parts.items()}}

    def _checkpoint(self, surprise: tuple[float, ...] = ()) -> WorldCheckpoint:
        config = dataclasses.replace(self.config, surprise=surprise)
        return WorldCheckpoint(config=config, model=self.model, normalizer=self.normalizer, contract=self.contract)

    def _save(self) -> None:
        assert self.folder is not None
        state = RunState(
            step=self.done, loss=self.loss, losses=tuple(self.watch.losses), seconds=self.seconds, best=None,
            validation_loss=self.validation_loss, processes=1, scaler={}, recipe=to_dict(self.recipe),
            data=tuple(self.record),
        )  # fmt: skip
        moments: dict[str, Tensor] = optimizer_tensors(self.optimizer, self.groups, True)
        self.folder.save(self._checkpoint(), state, {"optimizer.safetensors": moments})

    def _restore(self, saved: Saved) -> None:
        saved.load_optimizer(self.optimizer, self.groups)
        state = saved.state
        self.watch.losses.extend(state.losses)
        self.done, self.loss, self.seconds = state.step, state.loss, state.seconds
        self.validation_loss = state.validation_loss

    def _finish(self) -> WorldResult:
        self.model = self.model.cpu().eval()
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise TrainingError(f"the weights are not finite after step {self.options.steps}; lower "
                                f"training.learning_rate ({self.options.learning_rate:g})")  # fmt: skip
        surprise: tuple[float, ...] = ()
        if self.held_out is not None:
            surprise = surprise_limits(self.model, self.held_out, self.recipe.surprise_quantile,
                                       self.recipe.surprise_window)  # fmt: skip
        return WorldResult(self._checkpoint(surprise), self.seconds, self.loss, self.validation_loss, self.held_out)
