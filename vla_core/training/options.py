"""The options of a training run: a recipe's group ``training``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from vla_core.config import ConfigError
from vla_core.training.augment import Augmentation


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that are trained otherwise than the rest.

    ``pattern``        of their names, as ``vision.*`` (``*`` and ``?`` as in a shell); the first group that fits a
                       parameter has it
    ``learning_rate``  at its highest; null: the run's
    ``weight_decay``   null: the run's
    ``freeze_until``   the first step that trains them
    ``freeze_after``   the first step that does not any more; null: none
    """

    pattern: str
    learning_rate: float | None = None
    weight_decay: float | None = None
    freeze_until: int = 0
    freeze_after: int | None = None

    def __post_init__(self) -> None:
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"learning_rate: expected null or a positive number, found {self.learning_rate}")
        if self.weight_decay is not None and not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(f"weight_decay: expected null or a number from 0 on, found {self.weight_decay}")
        if self.freeze_until < 0:
            raise ConfigError(f"freeze_until: expected at least 0, found {self.freeze_until}")
        if self.freeze_after is not None and self.freeze_after <= self.freeze_until:
            raise ConfigError(f"freeze_after: expected null or more than freeze_until ({self.freeze_until}), found "
                              f"{self.freeze_after}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """Success in simulation, measured while training with the weights that a checkpoint would have.

    ``world``      as ``vla evaluate`` names a task
    ``every``      steps; the last step counts too
    ``episodes``   of the seeds ``seed``, ``seed`` + 1, ...: choose ones that neither training nor the final evaluation
                   has
    ``max_steps``  null: the task's own
    """

    world: str
    every: int = 1000
    episodes: int = 20
    seed: int = 20000
    max_steps: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "episodes")
        _at_least(self, 0, "seed")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps: expected null or at least 1, found {self.max_steps}")


@dataclass(frozen=True, kw_only=True)
class Training:
    """The optimization, and what is measured and kept on the way.

    Optimization
        ``optimizer``               muon: for the matrices of linear layers and convolutions, AdamW for all else. It
                                    learns more from a step, and takes longer for it where matrices are large
        ``batch_size``              samples of one update, over all processes and ``accumulate`` backward passes
        ``schedule``                of the learning rate after ``warmup_steps``: down to ``min_ratio`` of it
        ``decay_all``               weight decay on biases and norms too
        ``groups``                  parameters with a rate, a decay or a time of their own
        ``gradient_clip``           largest norm of the gradient; null: none
        ``precision``               fp16 scales the loss; weights and optimizer stay as they are
        ``ema_decay``               of the averaged weights, which are the ones that are handed out; null: no average
        ``gradient_checkpointing``  recompute activations in the backward pass, for models that can
        ``compile``                 ``torch.compile`` of the training step
        ``distributed``             how several processes (``torchrun``) share the model: a copy each, or its shards
    Augmentation
        ``augment``                       of the pictures and the state, and sensors that are lost (``dropout``)
        ``image_shift``, ``state_noise``  short for ``augment.images.shift`` (pixels) and ``augment.state_noise``
    Measurements
        ``validate_every``    steps from one held-out loss to the next
        ``validation_batch``  decides how much memory it takes
        ``open_loop``         with it, error of sampled chunks on that many held-out ticks, by action; 0: not measured
        ``evaluate``          success in simulation; null: not measured
        ``log_every``         steps
        ``wandb``             project for Weights & Biases, offline unless WANDB_MODE says otherwise; null: not used
    Keeping
        ``save_every``        steps from one resumable checkpoint to the next
        ``keep``              how many of them
        ``explosion``         a loss that is so many times its running median away from it ends the run; null: never
    """

    steps: int = 3000
    batch_size: int = 64
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    decay_all: bool = False
    groups: tuple[ParameterGroup, ...] = ()
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    min_ratio: float = 0.0
    gradient_clip: float | None = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema_decay: float | None = 0.999
    gradient_checkpointing: bool = False
    compile: bool = False
    distributed: Literal["ddp", "fsdp"] = "ddp"
    augment: Augmentation = field(default_factory=Augmentation)
    image_shift: int = 0
    state_noise: float = 0.0
    validate_every: int = 250
    validation_batch: int = 512
    open_loop: int = 256
    evaluate: ClosedLoop | None = None
    log_every: int = 10
    wandb: str | None = None
    save_every: int = 1000
    keep: int = 2
    explosion: float | None = 1000.0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch_size", "accumulate", "validate_every", "validation_batch", "log_every",
                  "save_every", "keep")  # fmt: skip
        _at_least(self, 0, "image_shift", "state_noise", "warmup_steps", "weight_decay", "open_loop", "seed")
        if not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"learning_rate: expected a positive number, found {self.learning_rate}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay: expected null or 0 to 1, found {self.ema_decay}")
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"min_ratio: expected 0 to 1, found {self.min_ratio}")
        for name in ("gradient_clip", "explosion"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name}: expected null or a positive number, found {value}")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"accumulate: expected a divisor of batch_size ({self.batch_size}), found "
                              f"{self.accumulate}")  # fmt: skip
        if self.precision == "fp16" and self.distributed == "fsdp":
            raise ConfigError("precision: fp16 cannot be scaled over shards; choices with fsdp: bf16, fp32")
        if self.optimizer == "muon" and self.distributed == "fsdp":
            raise ConfigError("optimizer: muon needs whole matrices; choices with fsdp: adamw")
        if self.image_shift and self.augment.images.shift:
            raise ConfigError("image_shift: is short for augment.images.shift; give one of them")
        if self.state_noise and self.augment.state_noise:
            raise ConfigError("state_noise: is short for augment.state_noise; give one of them")

    @property
    def augmentation(self) -> Augmentation:
        """``augment`` with what the short keys say."""
        images = dataclasses.replace(self.augment.images, shift=self.augment.images.shift or self.image_shift)
        return dataclasses.replace(
            self.augment, images=images, state_noise=self.augment.state_noise or self.state_noise
        )


def _at_least(options: Any, least: int, *names: str) -> None:
    for name in names:
        if not getattr(options, name) >= least:
            raise ConfigError(f"{name}: expected at least {least}, found {getattr(options, name)}")
