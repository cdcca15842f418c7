"""Low-rank adapters (Hu et al. 2021, "LoRA") through peft, put into a module and merged back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.vlm.pretrained import library


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Rank ``r``, scale ``alpha / r``; ``targets`` are the last names of linear layers, ``all`` takes each of them."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | Literal["all"] = "all"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r: expected at least 1, found {self.r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: expected 0 to less than 1, found {self.dropout}")


def add_lora(module: nn.Module, config: LoRAConfig) -> None:
    """Put adapters that change nothing yet beside the targets in ``module``, and freeze all the rest of it."""
    linear = {name.split(".")[-1] for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    targets = linear if config.targets == "all" else set(config.targets)
    if not targets or not targets <= linear:
        raise VlaError(f"targets: found {choices(targets - linear)}, expected linear layers: {choices(linear)}")
    peft = library("peft")
    options = peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=sorted(targets)
    )
    peft.inject_adapter_in_model(options, module)


def merge_lora(module: nn.Module) -> None:
    """Add the adapters of ``module`` to the weights beside them, and leave plain linear layers."""
    tuners = library("peft.tuners.tuners_utils")
    for name, part in list(module.named_modules()):
        if isinstance(part, tuners.BaseTunerLayer):
            part.merge()
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, part.get_base_layer())
