"""Where a run's figures go: TensorBoard always, Weights & Biases on request."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vla_core.errors import VlaError


class Log(Protocol):
    """Takes scalars by name, such as ``train/loss``."""

    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardLog:
    """Event files in a folder; what an interrupted run wrote after ``first_step`` is hidden."""

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Add every figure at ``step``."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandbLog:
    """A run of Weights & Biases: in files under ``folder`` unless WANDB_MODE asks for the service."""

    def __init__(self, project: str, folder: Path, recipe: Mapping[str, Any], run_id: str | None = None) -> None:
        try:
            import wandb
        except ImportError:
            raise VlaError("training.wandb: the package wandb is not installed; pip install 'vla_ros[wandb]', or set "
                           "it to null") from None  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(project=project, dir=str(folder), config=dict(recipe), mode=mode, id=run_id,
                               resume="allow" if run_id else None)  # fmt: skip

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Log every figure at ``step``."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()
