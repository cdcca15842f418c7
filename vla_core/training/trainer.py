"""Behaviour cloning: a dataset and a recipe to a checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_core.checkpoint import Checkpoint, PolicyConfig
from vla_core.contract import ContractError, RobotContract
from vla_core.data.dataset import ChunkWindows, Dataset
from vla_core.errors import VlaError
from vla_core.model.inputs import ModelInputs
from vla_core.model.vla import MODEL_REGISTRY, PolicyModel, build_model
from vla_core.model.vla.sizes import check_sees
from vla_core.observation.batch import Tokenizer, make_inputs
from vla_core.observation.normalizer import Normalizer
from vla_core.training.recipe import Recipe, Training


class TrainingError(VlaError):
    """A run that cannot go on."""


@dataclass(frozen=True)
class Progress:
    """One step's figures, for progress bars and logs; ``validation_loss`` only where it was measured."""

    step: int
    loss: float
    learning_rate: float
    validation_loss: float | None = None

    @property
    def note(self) -> str:
        """The figures in a few words."""
        held_out = "" if self.validation_loss is None else f"  held out {self.validation_loss:.4f}"
        return f"loss {self.loss:.4f}  lr {self.learning_rate:.1e}{held_out}"


@dataclass(frozen=True)
class Result:
    """A finished run."""

    checkpoint: Checkpoint
    seconds: float
    loss: float
    validation_loss: float | None


class Batches:
    """Model inputs and normalized chunks of a dataset, drawn by index."""

    def __init__(self, dataset: Dataset, horizon: int, normalizer: Normalizer, tokenizer: Tokenizer) -> None:
        self.windows = ChunkWindows(dataset, horizon)
        self._normalizer, self._tokenizer = normalizer, tokenizer

    def __len__(self) -> int:
        return len(self.windows)

    def draw(self, index: np.ndarray) -> tuple[ModelInputs, Tensor, Tensor]:
        """Inputs, actions (B, H, A) normalized float32 and mask (B, H) of the ticks ``index``."""
        windows = self.windows
        rows = torch.from_numpy(index)
        inputs = make_inputs(
            {name: images[rows] for name, images in windows.images.items()},
            windows.state[index],
            [windows.instructions[i] for i in index],
            self._normalizer,
            self._tokenizer,
        )
        actions, mask = windows.chunks(index)
        return inputs, torch.from_numpy(self._normalizer.normalize("action", actions)), torch.from_numpy(mask)


def train(
    recipe: Recipe,
    dataset: Dataset,
    validation: Dataset | None = None,
    log_dir: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    provenance: dict[str, str] | None = None,
) -> Result:
    """Train ``recipe`` on ``dataset``; TensorBoard event files go to ``log_dir``.

    The returned policy has the averaged weights when the recipe asks for an EMA.
    """
    if dataset.spec != recipe.observation:
        raise TrainingError("the dataset was built for another observation than the recipe's: "
                            f"{dataset.spec} against {recipe.observation}; convert the bags again")  # fmt: skip
    if validation and (validation.spec != dataset.spec or _differ(validation.contract, dataset.contract)):
        raise TrainingError("the validation dataset was built for another observation or contract than the dataset")
    kind = MODEL_REGISTRY[recipe.model.type]
    check_sees(recipe.model.type, kind.sees, recipe.observation)
    options = recipe.training
    _check_device(options.device)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    tokenizer = kind.tokenizer(recipe.model, [episode.instruction for episode in dataset.episodes])
    normalizer = Normalizer(recipe.normalization, dataset.statistics())
    batches = Batches(dataset, recipe.model.horizon, normalizer, tokenizer)
    held_out = Batches(validation, recipe.model.horizon, normalizer, tokenizer) if validation else None
    model = build_model(recipe.model_config(dataset.contract, tokenizer.vocab_size)).to(options.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    averaged = copy.deepcopy(model).eval() if options.ema_decay is not None else model
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=options.weight_decay)
    writer = _summary_writer(log_dir)

    start = time.perf_counter()
    smoothed, validation_loss = math.nan, None
    for step in range(options.steps):
        rate = _set_learning_rate(optimizer, options, step)
        inputs, actions, mask = batches.draw(rng.integers(len(batches), size=options.batch_size))
        inputs = _augment(inputs, options).to(options.device)
        loss = model.loss(inputs, actions.to(options.device), mask.to(options.device))
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} at step {step}; lower training.learning_rate "
                                f"({options.learning_rate}) or look at the data with `vla inspect`")  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if options.gradient_clip is not None:
            nn.utils.clip_grad_norm_(trained, options.gradient_clip)
        optimizer.step()
        if options.ema_decay is not None:
            _average(averaged, model, options.ema_decay, step)
        smoothed = value if step == 0 else 0.98 * smoothed + 0.02 * value

        last = step + 1 == options.steps
        measured = held_out is not None and ((step + 1) % options.validate_every == 0 or last)
        if measured:
            assert held_out is not None
            validation_loss = evaluate_loss(averaged, held_out, options.device, options.validation_batch)
        report(Progress(step + 1, smoothed, rate, validation_loss if measured else None))
        if writer is not None and (step % 10 == 0 or measured):
            writer.add_scalar("train/loss", value, step + 1)
            writer.add_scalar("train/learning_rate", rate, step + 1)
            if measured:
                writer.add_scalar("validation/loss", validation_loss, step + 1)
    if not all(p.isfinite().all() for p in averaged.parameters()):
        raise TrainingError(f"the weights are not finite after step {options.steps}; lower training.learning_rate "
                            f"({options.learning_rate})")  # fmt: skip
    seconds = time.perf_counter() - start
    if writer is not None:
        writer.close()
    checkpoint = Checkpoint(
        config=PolicyConfig(model=model.config, observation=recipe.observation, normalization=recipe.normalization,
                            execution=recipe.execution, provenance=provenance or {}),
        model=averaged.to("cpu").eval(), normalizer=normalizer, tokenizer=tokenizer, contract=dataset.contract,
    )  # fmt: skip
    return Result(checkpoint, seconds, smoothed, validation_loss)


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without CUDA
        raise TrainingError(f"training.device: {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def _differ(a: RobotContract, b: RobotContract) -> bool:
    try:
        a.check_same(b, "", "")
    except ContractError:
        return True
    return False


@torch.no_grad()
def evaluate_loss(model: PolicyModel, batches: Batches, device: str = "cpu", size: int = 512) -> float:
    """Mean loss over all windows; the noise is the same at every call, so that values compare."""
    model.eval()
    generator = torch.Generator(device=device).manual_seed(0)
    total, steps = 0.0, 0
    for first in range(0, len(batches), size):
        index = np.arange(first, min(first + size, len(batches)))
        inputs, actions, mask = batches.draw(index)
        loss = model.loss(inputs.to(device), actions.to(device), mask.to(device), generator)
        total += loss.item() * int(mask.sum())
        steps += int(mask.sum())
    model.train()
    return total / steps


def _set_learning_rate(optimizer: torch.optim.Optimizer, options: Training, step: int) -> float:
    """Linear warm-up, then cosine to zero or constant."""
    factor = min(1.0, (step + 1) / max(1, options.warmup_steps))
    if options.schedule == "cosine":
        factor *= 0.5 * (1.0 + math.cos(math.pi * step / options.steps))
    rate = options.learning_rate * factor
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


@torch.no_grad()
def _average(averaged: PolicyModel, model: PolicyModel, decay: float, step: int) -> None:
    """Exponential moving average whose window grows with the run, so that the start does not linger."""
    weight = 1.0 - min(decay, (1.0 + step) / (10.0 + step))
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), weight)


def _augment(inputs: ModelInputs, options: Training) -> ModelInputs:
    """Random shifts of the images and noise on the state: the trainer's alone, never the robot's."""
    images = inputs.images
    if options.image_shift:
        images = {name: _shift(pixels, options.image_shift) for name, pixels in images.items()}
    state = inputs.state
    if options.state_noise:
        state = state + options.state_noise * torch.randn_like(state)
    return dataclasses.replace(inputs, images=images, state=state)


def _shift(pixels: Tensor, limit: int) -> Tensor:
    """Move each image of (B, 3, H, W) by up to ``limit`` pixels, repeating its edge (DrQ, Kostrikov et al. 2021)."""
    batch, _, height, width = pixels.shape
    padded = F.pad(pixels, (limit,) * 4, mode="replicate")
    rows = torch.randint(2 * limit + 1, (batch, 1)) + torch.arange(height)  # (B, H)
    columns = torch.randint(2 * limit + 1, (batch, 1)) + torch.arange(width)  # (B, W)
    picked = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return picked.permute(0, 3, 1, 2).contiguous()


def _summary_writer(log_dir: Path | None):  # type: ignore[no-untyped-def]  # TensorBoard is untyped and slow to import
    if log_dir is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(log_dir))
