"""Auxiliary heads: what a picture shows, in a word, learned beside the trajectory and told to the head.

Imitation alone need not look at a small thing that decides much. A driver's stops at red lights can be copied from
where they happen in the recorded drives; a loss that asks for the light's colour makes the picture encoder see it. So
InterFuser (Shao et al. 2022) tells the traffic light's state beside the trajectory, and CILRS (Codevilla et al. 2019)
the speed, against the copying of what the vehicle does already.

Shapes: B batch, Q tokens of a camera, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_core.config import ConfigError
from vla_core.model.checks import at_least_one
from vla_core.model.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class AuxiliaryConfig:
    """What the picture of ``camera`` shows is one of ``classes``; its loss has ``weight`` beside the action's."""

    camera: str
    classes: tuple[str, ...]
    weight: float = 0.3
    hidden_dim: int = 64

    def __post_init__(self) -> None:
        at_least_one(self, "hidden_dim")
        if len(set(self.classes)) < 2 or len(set(self.classes)) < len(self.classes):
            raise ConfigError(f"classes: expected at least two, all different, found {list(self.classes)}")
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"weight: expected a positive number, found {self.weight}")


class AuxiliaryHead(nn.Module):
    """A camera's tokens (B, Q, D) to what they show: logits (B, C), and its probabilities as a token (B, 1, D)."""

    def __init__(self, config: AuxiliaryConfig, *, width: int) -> None:
        super().__init__()
        self.classify = nn.Sequential(
            nn.Linear(width, config.hidden_dim), nn.GELU(), nn.Linear(config.hidden_dim, len(config.classes))
        )
        self.tell = nn.Linear(len(config.classes), width)

    def forward(self, tokens: Tensor, there: Tensor) -> tuple[Tensor, Tokens]:
        """``there`` (B,) bool: whether the camera's picture is."""
        logits: Tensor = self.classify(tokens.mean(dim=1))
        told = self.tell(logits.softmax(dim=-1))
        return logits, Tokens(torch.where(there[:, None], told, 0.0)[:, None], there[:, None])


def auxiliary_loss(heads: Mapping[str, AuxiliaryConfig], logits: Mapping[str, Tensor], there: Mapping[str, Tensor],
                   truths: Mapping[str, Tensor]) -> Tensor:  # fmt: skip
    """The weighted sum of the cross entropies, each over the samples whose picture and class (-1: not) are known."""
    losses = []
    for name, head in heads.items():
        truth = torch.where(there[name], truths[name], -1)
        total = F.cross_entropy(logits[name].float(), truth, ignore_index=-1, reduction="sum")
        losses.append(head.weight * total / (truth >= 0).sum().clamp(min=1))
    return torch.stack(losses).sum()
