"""One process or several, through accelerate: where a model lives, how gradients and figures are summed.

Started by ``torchrun`` or ``accelerate launch`` there are several: each has a copy of the model (DDP), or a shard of it
(FSDP). Every rank's part of a batch weighs what it holds, so that their number changes nothing but rounding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vla_core.errors import VlaError


class DeviceError(VlaError):
    """A device that cannot be used."""


class Processes:
    """This process among those of the run; ``close`` it at the end."""

    def __init__(self, device: str = "cpu", strategy: Literal["ddp", "fsdp"] = "ddp") -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        check_device(device)
        self.strategy = strategy
        # Parts that are frozen for some steps have no gradient then.
        handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
        wanted = torch.device(device)
        if wanted.index is not None:  # accelerate's own way to choose among several
            os.environ["ACCELERATE_TORCH_DEVICE"] = device
        try:
            self._accelerator = Accelerator(cpu=wanted.type == "cpu", mixed_precision="no", kwargs_handlers=handlers)
        finally:
            os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        self.rank, self.count = int(self._accelerator.process_index), int(self._accelerator.num_processes)
        self.device = self._accelerator.device
        if self.device.type != wanted.type:
            raise DeviceError(f"training.device: found {device!r}, but this process was started on {self.device}")

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def place(self, module: nn.Module) -> nn.Module:
        """``module`` on the device, which on several processes shares its gradients; its parameters may be others."""
        if self.strategy == "ddp" or self.count == 1:
            return self._accelerator.prepare_model(module)
        from torch.distributed.fsdp import fully_shard

        module = module.to(self.device)
        for block in _blocks(module):
            fully_shard(block)
        # Gathered again for the backward pass: what stays gathered would not see that weights were averaged.
        fully_shard(module, reshard_after_forward=True)
        return module

    def unsynchronized(self, placed: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """While the gradients of a step that is not complete are accumulated."""
        if self.count == 1 or last:
            return nullcontext()
        if self.strategy == "fsdp":
            return nullcontext()  # reducing each part keeps no whole gradient in memory
        return self._accelerator.no_sync(placed)

    def summed(self, values: Tensor) -> Tensor:
        """``values`` summed over all processes, on the device, without waiting for it."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def clip(self, parameters: Iterable[Tensor], limit: float | None) -> Tensor:
        """Scale all gradients so that their common norm is at most ``limit``; returns the norm before."""
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def total(self, *values: float | Tensor) -> list[float]:
        """Each value summed over all processes, in double precision; one synchronization for all of them."""
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device).detach() for v in values])
        if self.count > 1:
            torch.distributed.all_reduce(stacked)
        return [float(v) for v in stacked.tolist()]

    def wait(self) -> None:
        """Until every process is here."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """End the group; another run in this interpreter starts its own."""
        from accelerate.state import AcceleratorState

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def check_device(name: str) -> None:
    """Raise :class:`DeviceError` unless a tensor can be made on the device, or on this process's of several."""
    own = os.environ.get("LOCAL_RANK")  # without it each process would take some memory of the first device
    try:
        torch.zeros(1, device=f"cuda:{own}" if name == "cuda" and own is not None else name)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without CUDA
        raise DeviceError(f"training.device: {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def is_main() -> bool:
    """Whether this is the process that writes and speaks, before a run has begun too."""
    return int(os.environ.get("RANK", 0)) == 0


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all of it, or its shard, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, on the CPU; every process must ask, since the shards are gathered."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", copy=True)


def as_placed(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, placed or sharded as ``like`` is."""
    if isinstance(like, DTensor):
        return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)
    return full.to(like.device)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of published backbones, which name them; each is gathered by itself."""
    names = {name for part in module.modules() for name in (getattr(part, "_no_split_modules", None) or ())}
    return [part for part in module.modules() if type(part).__name__ in names]
