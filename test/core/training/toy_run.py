"""A run of the toy robot as a process of its own.

Started by :func:`start`, which forks it from a process that has torch loaded, or, under ``torchrun``, as
``-m test.core.training.toy_run '{...}'``. The settings:

    out             folder for weights and figures of the finished run
    training, head  options of the recipe, kind of the head
    model           ``adapters``: a language model of random weights with LoRA in place of the toy recipe's model
    folder, resume  as :func:`vla_core.training.trainer.train` has them
    kill_at         a step after which the process kills itself
    kill_in         a place in the writing of the state after that step where it does so: ``optimizer``, half of whose
                    file is written, ``before`` or ``after`` the renaming
    limit_bytes     of every file that it writes
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vla_core.config import from_dict, to_dict
from vla_core.errors import VlaError
from vla_core.model.action_head import ACTION_HEAD_REGISTRY
from vla_core.model.vlm.language_model import LLMBackbone
from vla_core.training import state
from vla_core.training.distributed import local
from vla_core.training.options import ParameterGroup
from vla_core.training.recipe import Recipe
from vla_core.training.trainer import Interrupted, Progress, Result, _Run, train

from ..helpers import dataset, recipe

SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden_dim": 16},
    "gaussian": {"hidden_dim": 16},
    "chunker": {"hidden_dim": 16},
    "diffusion": {"hidden_dim": 16, "train_steps": 6, "inference_steps": 2},
    "flow": {"hidden_dim": 16, "inference_steps": 2, "context_drop": 0.2},
    "discrete": {"hidden_dim": 16, "bins": 8},
    "transformer": {"hidden_dim": 16, "heads": 2, "layers": 1},
}


def toy_recipe(head: str = "mlp", **training: Any) -> Recipe:
    """The toy recipe with a small head of a kind."""
    groups = tuple(from_dict(ParameterGroup, to_dict(group)) for group in training.pop("groups", ()))
    plain = recipe(**training, groups=groups)
    config = ACTION_HEAD_REGISTRY[head].Config(**SMALL[head])
    return dataclasses.replace(plain, model=dataclasses.replace(plain.model, head=config))


def start(**settings: Any) -> BaseProcess:
    """A process with a run; its standard output is the test's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=main, args=({name: _plain(value) for name, value in settings.items()},))
    process.start()
    return process


def finish(process: BaseProcess) -> int:
    """Its exit code."""
    process.join(600)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def main(settings: dict[str, Any]) -> None:
    """Run; an error of the user's making is one line on stderr and exit status 1, as in the command."""
    torch.set_num_threads(1)
    state._to_disk = lambda folder: None  # nothing here cuts the power
    kill_at = settings.get("kill_at")
    losses: list[float] = []
    held: list[float] = []
    real_finish = _Run._finish

    def note_share(run: _Run) -> Result:
        held.append(sum(local(p).numel() for p in run.trained.values()) / sum(p.numel() for p in run.trained.values()))
        return real_finish(run)

    _Run._finish = note_share  # type: ignore[method-assign]

    def report(progress: Progress) -> None:
        losses.append(progress.loss)
        if progress.step == kill_at:
            if "kill_in" not in settings:
                die()
            _kill_in(settings["kill_in"])

    if "limit_bytes" in settings:
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings["limit_bytes"],) * 2)
    recipe, data = toy_recipe(settings.get("head", "mlp"), **settings["training"]), dataset()
    if settings.get("model") == "adapters":
        from .test_models import LLM, made, tokenizer

        LLMBackbone.tokenizer = tokenizer  # type: ignore[method-assign]
        changes = {"language": {**LLM, "lora": {"r": 2}}}
        recipe, data = made("vla", settings["head"], changes, **settings["training"])
    try:
        result = train(
            recipe, data, dataset((5,)), report=report,
            folder=Path(settings["folder"]) if "folder" in settings else None, resume=settings.get("resume", False),
        )  # fmt: skip
    except VlaError as error:
        (Path(settings["out"]).with_suffix(".error")).write_text(str(error))
        sys.exit(1)
    except Interrupted:
        sys.exit(130)
    if int(os.environ.get("RANK", 0)) == 0:
        out = Path(settings["out"])
        out.mkdir(parents=True)
        weights = {name: value.contiguous() for name, value in result.checkpoint.model.state_dict().items()}
        save_file(weights, out / "weights.safetensors")
        figures = {"losses": losses, "validation": result.validation_loss, "measured": result.measured,
                   "held": held[0]}  # fmt: skip
        (out / "figures.json").write_text(json.dumps(figures))


def die() -> None:
    """As by a power cut."""
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in(place: str) -> None:
    """Die at a place of the next writing of a state."""
    if place == "optimizer":

        def half(tensors: dict[str, torch.Tensor], path: Path) -> None:
            save_file(tensors, path)
            os.truncate(path, path.stat().st_size // 2)
            die()

        state.save_file = half  # type: ignore[assignment]
        return
    real = state._move

    def move(partial: Path, final: Path) -> None:
        if place == "after":
            real(partial, final)
        die()

    state._move = move


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
