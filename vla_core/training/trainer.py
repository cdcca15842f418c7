"""Behaviour cloning: datasets and a recipe to a checkpoint, on one process or several, interrupted or not.

Batches, noise and dropout of a step are functions of the seed and the step, so that a run which goes on from a state
is the run that was not interrupted.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_core.checkpoint import Checkpoint, PolicyConfig
from vla_core.config import to_dict
from vla_core.data.batches import Batch
from vla_core.data.dataset import Dataset
from vla_core.data.loader import Loader
from vla_core.errors import VlaError
from vla_core.model.action_head import base
from vla_core.model.vla import build_model
from vla_core.runtime.policy import CheckpointPolicy
from vla_core.training.augment import augment
from vla_core.training.callbacks import Log, TensorBoardLog, WandbLog
from vla_core.training.distributed import Processes, as_placed, whole
from vla_core.training.ema import Average
from vla_core.training.faults import LossWatch, save_batch
from vla_core.training.faults import TrainingError as TrainingError
from vla_core.training.freeze import FreezeSchedule
from vla_core.training.measure import (
    TrainingStep,
    check_world,
    closed_loop,
    held_out_loss,
    noise,
    open_loop_error,
)
from vla_core.training.optimizer import build_optimizer, parameter_groups, set_learning_rates
from vla_core.training.recipe import Recipe
from vla_core.training.running import Clock, Figures, interruptible, keep_memory, peak_mb, seed_everything, step_seed
from vla_core.training.sources import build_sources
from vla_core.training.state import RunFolder, RunState, Saved, check_same, optimizer_tensors


@dataclass(frozen=True)
class Progress:
    """One step's figures, for progress bars and logs; ``validation_loss`` and ``measured`` only where it was."""

    step: int
    loss: float
    learning_rate: float
    validation_loss: float | None = None
    samples_per_s: float = 0.0
    seconds_left: float = 0.0
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """The figures in a few words."""
        held_out = "" if self.validation_loss is None else f"  held out {self.validation_loss:.4f}"
        success = self.measured.get("closed_loop/success")
        succeeded = "" if success is None else f"  success {success:.2f}"
        speed = f"  {self.samples_per_s:.0f} samples/s" if self.samples_per_s else ""
        return f"loss {self.loss:.4f}  lr {self.learning_rate:.1e}{speed}{held_out}{succeeded}"


@dataclass(frozen=True)
class Result:
    """A finished run; ``measured`` are the figures of its last measurement."""

    checkpoint: Checkpoint
    seconds: float
    loss: float
    validation_loss: float | None
    measured: dict[str, float] = field(default_factory=dict)


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop, and has stored its state."""


def train(
    recipe: Recipe,
    dataset: Dataset | Sequence[Dataset],
    validation: Dataset | Sequence[Dataset | None] | None = None,
    log_dir: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    provenance: dict[str, str] | None = None,
    *,
    folder: Path | None = None,
    resume: bool = False,
    start: Checkpoint | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """Train ``recipe`` on ``dataset``; TensorBoard event files go to ``log_dir``.

    The returned policy has the averaged weights when the recipe asks for an EMA.

    Args:
        dataset: one, or several that are mixed by ``recipe.data.weights``; the policy is for the first one's robot.
        validation: what is held out of each; where there is none, what ``recipe.data.validation`` says.
        folder: of the run's states (:mod:`vla_core.training.state`); None stores none.
        resume: go on from the newest state in ``folder``, where there is one.
        start: a policy of the same recipe, whose weights, tokenizer and statistics are begun with.
        say: called with what the user should know, such as what filters left out.
    """
    processes = Processes(recipe.training.device, recipe.training.distributed)
    try:
        datasets = [dataset] if isinstance(dataset, Dataset) else list(dataset)
        held_out = list(validation) if isinstance(validation, Sequence) else [validation] + [None] * (len(datasets) - 1)
        run = _Run(recipe, datasets, held_out, processes, folder, resume, provenance or {}, start)
        for line in run.sources.notes:
            say(line)
        if resume:
            say(f"going on after step {run.done}" if run.done else f"no state in {folder} yet: starting at step 0")
        return run.go(log_dir, report)
    finally:
        processes.close()


class _Run:
    """All that changes while a run lasts."""

    def __init__(
        self, recipe: Recipe, datasets: Sequence[Dataset], held_out: Sequence[Dataset | None], processes: Processes,
        folder: Path | None, resume: bool, provenance: dict[str, str], start: Checkpoint | None,
    ) -> None:  # fmt: skip
        options = self.options = recipe.training
        self.recipe, self.processes = recipe, processes
        self.sources = build_sources(recipe, datasets, held_out, start)
        if options.evaluate is not None:
            check_world(options.evaluate)
        self.folder = None if folder is None else RunFolder(folder, options.keep)
        saved = self._saved(resume)
        torch.manual_seed(options.seed)
        tokenizer = self.sources.tokenizer
        self.model = (
            build_model(recipe.model_config(self.sources.contract, tokenizer.vocab_size)).train()
            if saved is None else saved.checkpoint().model.train()
        )  # fmt: skip
        if saved is None and start is not None:
            _begin_with(self.model, start)
        if options.gradient_checkpointing:
            self._recompute()
        self.config = PolicyConfig(model=self.model.config, observation=recipe.observation,
                                   normalization=recipe.normalization, execution=recipe.execution,
                                   provenance=provenance)  # fmt: skip

        step = TrainingStep(self.model, options.precision).train()
        self.placed = processes.place(step)
        if options.compile:
            # It looks into the generator, which the compiler cannot.
            base.draw_rows = torch.compiler.disable(base.draw_rows)
            self.placed.compile()
        self.groups = parameter_groups(self.model, options)
        self.trained = {name: p for group in self.groups for name, p in group.parameters.items()}
        self.frozen = FreezeSchedule(self.groups)
        self.optimizer = build_optimizer(self.model, self.groups, options)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=options.precision == "fp16")
        self.average = None if options.ema_decay is None else Average(self.trained, options.ema_decay)
        self.watch = LossWatch(options.explosion)
        self.done, self.loss, self.seconds = 0, math.nan, 0.0
        self.best: float | None = None
        self.measured: dict[str, float] = {}
        self.saved_step = -1
        if saved is not None:
            self._restore(saved)

    # -- the loop --------------------------------------------------------------------------------------------------

    def go(self, log_dir: Path | None, report: Callable[[Progress], None]) -> Result:
        """All steps that are left."""
        options, processes = self.options, self.processes
        loader = Loader(
            self.sources.training, batch_size=options.batch_size, seed=options.seed, start_step=self.done,
            rank=processes.rank, world_size=processes.count, accumulate=options.accumulate,
            prefetch=self.recipe.data.prefetch, device=processes.device,
        )  # fmt: skip
        delay = 0 if processes.device.type == "cpu" else 1  # an accelerator works on while its figures are on their way
        waiting: deque[_Update] = deque()
        self.clock = Clock(self.done, self.seconds)
        keep_memory(processes.device)
        with self._logging(log_dir), interruptible(self.folder is not None) as asked, _stream(loader) as batches:
            for step in range(self.done, options.steps):
                waiting.append(self._update(step, batches, asked))
                measures, saves = self._validates(step) or self._evaluates(step), self._saves(step)
                settled, stop = [], False
                while len(waiting) > (0 if measures or saves or stop else delay):
                    settled.append(waiting.popleft())
                    stop = self._settle(settled[-1]) or stop
                self.seconds = self.clock.seconds()
                with self.clock.aside():
                    figures = self._measure(step) if measures else {}
                for update in settled:
                    self._tell(update, figures if update is settled[-1] else {}, report)
                with self.clock.aside():
                    if saves or stop:
                        self._save()
                if stop:
                    raise Interrupted(f"stopped after step {self.done} of {options.steps}")
        return self._finish()

    def _update(self, step: int, batches: Iterator[Batch], asked: Callable[[], bool]) -> _Update:
        """Launch one update; on an accelerator it returns before the figures are there."""
        options, processes = self.options, self.processes
        seed = step_seed(options.seed, step)
        seed_everything(seed + processes.rank, processes.device)
        rates = set_learning_rates(self.optimizer, options, step)
        self.frozen.apply(step)
        began = time.perf_counter()
        parts = [next(batches) for _ in range(options.accumulate)]
        waited = time.perf_counter() - began
        known = torch.stack([part.mask.sum() for part in parts]).to(torch.float32)
        all_known = processes.summed(known.sum())
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=processes.device)
        for number, part in enumerate(parts):
            part = augment(part, options.augmentation, options.seed, self.sources.contract.any_of)
            with processes.unsynchronized(self.placed, number + 1 == len(parts)):
                loss = self.placed(part.inputs, part.actions, part.mask, noise(seed, part, processes.device),
                                   part.truths)  # fmt: skip
                # Gradients are averaged over processes: so weighted, the average is that of all known steps.
                share = known[number] / all_known
                self.scaler.scale(loss * (share * processes.count)).backward()
            total += loss.detach().float() * share
        self.frozen.drop()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = processes.clip(self.trained.values(), options.gradient_clip)
        figures = processes.summed(torch.stack([total, torch.tensor(float(asked()), device=processes.device)]))
        update = _Update(step, rates, parts, waited, Figures(torch.cat([figures, norm.reshape(1)])))
        if processes.device.type == "cpu":
            self._check(update)  # here it costs nothing to look before the weights are touched
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(step)
        return update

    def _settle(self, update: _Update) -> bool:
        """Take in a launched update's figures; whether some process was asked to stop."""
        if self.processes.device.type != "cpu":
            self._check(update)
        loss, stop, _ = update.figures.read()
        self.loss = loss if update.step == 0 else 0.98 * self.loss + 0.02 * loss
        self.done = update.step + 1
        return stop > 0

    def _check(self, update: _Update) -> None:
        loss, _, norm = update.figures.read()
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1  # fp16: the update is skipped
        fault = self.watch.fault(loss, norm, overflow)
        if fault is None:
            return
        where = ""
        if self.folder is not None:
            facts = {"step": update.step, "fault": fault, "loss": str(loss), "gradient_norm": str(norm),
                     "learning_rates": update.rates, "losses": list(self.watch.losses)}  # fmt: skip
            place = save_batch(self.folder.path / "faults", update.step, update.parts, self.sources.datasets,
                               self.processes.rank, facts)  # fmt: skip
            where = f"; its batch, and where it comes from, is in {place}"
        raise TrainingError(f"{fault} at step {update.step}; lower training.learning_rate "
                            f"({self.options.learning_rate}) or look at the data with `vla inspect`"
                            f"{where}")  # fmt: skip

    def _tell(self, update: _Update, figures: dict[str, float], report: Callable[[Progress], None]) -> None:
        """To the caller and the logs."""
        speed = self.clock.steps_per_s(update.step + 1) * self.options.batch_size
        rate, left = next(iter(update.rates.values())), self.clock.seconds_left(update.step + 1, self.options.steps)
        report(Progress(update.step + 1, self.loss, rate, figures.get("validation/loss"), speed, left, figures))
        if figures or update.step % self.options.log_every == 0:
            scalars = update.scalars() | {"train/samples_per_s": speed} | figures
            for log in self.logs:
                log.write(update.step + 1, scalars)

    @contextmanager
    def _logging(self, log_dir: Path | None) -> Iterator[None]:
        self.logs: list[Log] = []
        if self.processes.main and log_dir is not None:
            self.logs.append(TensorBoardLog(log_dir, self.done))
        if self.processes.main and self.options.wandb is not None:
            place = self.folder.path if self.folder else (log_dir or Path("."))
            self.logs.append(WandbLog(self.options.wandb, place, to_dict(self.recipe)))
        try:
            yield
        finally:
            for log in self.logs:
                log.close()

    # -- measurements ----------------------------------------------------------------------------------------------

    def _validates(self, step: int) -> bool:
        return self.sources.held_out is not None and self._due(step, self.options.validate_every)

    def _evaluates(self, step: int) -> bool:
        return self.options.evaluate is not None and self._due(step, self.options.evaluate.every)

    def _saves(self, step: int) -> bool:
        return self.folder is not None and self._due(step, self.options.save_every)

    def _recompute(self) -> None:
        try:
            self.model.enable_gradient_checkpointing()
        except VlaError as error:
            raise TrainingError(f"training.gradient_checkpointing: {error}; set it to false") from None

    def _due(self, step: int, every: int) -> bool:
        return (step + 1) % every == 0 or step + 1 == self.options.steps

    def _measure(self, step: int) -> dict[str, float]:
        """Figures of the weights that a checkpoint would have now; the best ones are kept."""
        options, processes, held_out = self.options, self.processes, self.sources.held_out
        figures = {"memory/peak_mb": peak_mb(processes.device)} | self.model.figures()
        self.model.forget()  # gathering shards changes weights without torch's counting it
        with self._handed_out():
            if held_out is not None and self._validates(step):
                figures["validation/loss"] = held_out_loss(self.placed, held_out, processes, options.validation_batch)
                if options.open_loop:
                    figures |= open_loop_error(self.placed, held_out, processes, self.sources.contract,
                                               self.sources.normalizers, options)  # fmt: skip
            if options.evaluate is not None and self._evaluates(step):
                figures |= closed_loop(
                    CheckpointPolicy(self._checkpoint(self._whole_model())), options.evaluate, processes
                )
            self._keep_best(figures)
        self.placed.train()
        self.measured |= figures
        return figures

    def _keep_best(self, figures: dict[str, float]) -> None:
        """By success where it is measured, else by held-out loss."""
        name = "validation/loss" if self.options.evaluate is None else "closed_loop/success"
        if name not in figures:
            return
        value = figures[name] if name == "closed_loop/success" else -figures[name]
        if self.best is not None and value <= self.best:
            return
        self.best = value
        if self.folder is not None:
            checkpoint = self._checkpoint(_Weights(self.model.config, self._weights()))
            if self.processes.main:
                self.folder.save_best(checkpoint)

    # -- weights ---------------------------------------------------------------------------------------------------

    def _handed_out(self) -> Any:
        return nullcontext() if self.average is None else self.average.in_place()

    def _weights(self) -> dict[str, Tensor]:
        """All weights as they stand in the model, on the CPU."""
        return {name: whole(tensor) for name, tensor in self.model.state_dict().items()}

    def _whole_model(self) -> Any:
        """A model of its own with these weights, on the CPU."""
        model = build_model(self.model.config)
        model.load_state_dict(self._weights(), strict=True)
        return model.eval()

    def _checkpoint(self, model: Any) -> Checkpoint:
        return Checkpoint(config=self.config, model=model, normalizer=self.sources.normalizers[0],
                          tokenizer=self.sources.tokenizer, contract=self.sources.contract,
                          dataset_statistics=self.sources.statistics)  # fmt: skip

    def _save(self) -> None:
        """Store the state after ``done`` steps."""
        assert self.folder is not None
        if self.saved_step == self.done:
            return
        main = self.processes.main
        own = {} if self.average is None else {n: whole(p) for n, p in self.trained.items()}
        moments = optimizer_tensors(self.optimizer, self.groups, main)
        with self._handed_out():
            weights = self._weights()
        if main:
            state = RunState(
                step=self.done, loss=self.loss, losses=tuple(self.watch.losses), seconds=self.seconds, best=self.best,
                validation_loss=self.measured.get("validation/loss"), processes=self.processes.count,
                scaler=self.scaler.state_dict(),
                recipe=to_dict(self.recipe), data=tuple(self.sources.record()),
            )  # fmt: skip
            files = {"optimizer.safetensors": moments} | ({"weights.safetensors": own} if own else {})
            self.folder.save(self._checkpoint(_Weights(self.model.config, weights)), state, files)
        self.processes.wait()
        self.saved_step = self.done

    def _saved(self, resume: bool) -> Saved | None:
        if self.folder is None or not resume:
            return None
        saved = self.folder.newest()
        if saved is not None:
            check_same(saved, self.recipe, self.sources.record())
        return saved

    @torch.no_grad()
    def _restore(self, saved: Saved) -> None:
        """The averaged weights are in the model already; the others, and all that is beside the weights, follow."""
        state = saved.state
        for name, value in saved.weights().items():
            self.trained[name].copy_(as_placed(value, self.trained[name]))
        saved.load_optimizer(self.optimizer, self.groups)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state.scaler))
        self.watch.losses.extend(state.losses)
        self.done, self.loss, self.seconds, self.best = state.step, state.loss, state.seconds, state.best
        self.measured = {} if state.validation_loss is None else {"validation/loss": state.validation_loss}
        self.saved_step = self.done

    def _finish(self) -> Result:
        with self._handed_out():
            model = self._whole_model()
        if not all(p.isfinite().all() for p in model.parameters()):
            raise TrainingError(f"the weights are not finite after step {self.options.steps}; lower "
                                f"training.learning_rate ({self.options.learning_rate})")  # fmt: skip
        return Result(self._checkpoint(model), self.seconds, self.loss, self.measured.get("validation/loss"),
                      self.measured)  # fmt: skip


class _Weights:
    """What a checkpoint writes of a model."""

    def __init__(self, config: Any, weights: dict[str, Tensor]) -> None:
        self.config, self._weights = config, weights

    def state_dict(self) -> dict[str, Tensor]:
        return self._weights


@dataclass(frozen=True)
class _Update:
    """One update: ``figures`` are its loss, how many processes were asked to stop, and the gradient's norm."""

    step: int
    rates: dict[str, float]
    parts: list[Batch]
    waited: float
    figures: Figures

    def scalars(self) -> dict[str, float]:
        loss, _, norm = self.figures.read()
        rates = (
            {"train/learning_rate": next(iter(self.rates.values()))} if len(self.rates) == 1
            else {f"train/learning_rate/{name}": rate for name, rate in self.rates.items()}
        )  # fmt: skip
        return {"train/loss": loss, "train/gradient_norm": norm, "train/data_wait_s": self.waited, **rates}


@contextmanager
def _stream(loader: Loader) -> Iterator[Iterator[Batch]]:
    """The loader's batches; its threads end with the block."""
    batches: Any = iter(loader)
    try:
        yield batches
    finally:
        batches.close()


def _begin_with(model: torch.nn.Module, start: Checkpoint) -> None:
    """Give ``model`` the weights of ``start``, which must be those of the same model."""
    found, expected = start.model.state_dict(), model.state_dict()
    differ = sorted(
        name for name in found.keys() | expected.keys()
        if name not in found or name not in expected or found[name].shape != expected[name].shape
    )  # fmt: skip
    if differ:
        raise TrainingError(f"the checkpoint to start from is of another model than the recipe's: {len(differ)} "
                            f"tensors differ, such as {', '.join(differ[:3])}")  # fmt: skip
    model.load_state_dict(found)
