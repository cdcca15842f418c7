"""Actions as classes: each entry of the chunk is one of 256 bins, as a language model's tokens would be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vla_core.config import ConfigError
from vla_core.model.action_head.base import ActionHeadBase, mlp, register_action_head, widened
from vla_core.model.action_head.draws import category
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.checks import at_least_one
from vla_core.model.tokens import Tokens


def bin_of(actions: Tensor, bins: int) -> Tensor:
    """The bin, int64 from 0 on, of each entry of ``actions`` in [-1, 1]; what is beyond belongs to the outermost.

    OpenVLA's convention (Kim et al. 2024): ``bins`` edges linspace(-1, 1, bins), of which bin k begins at edge k. The
    last bin, ``bins`` - 1, thus holds nothing but 1.
    """
    edges = torch.linspace(-1.0, 1.0, bins, dtype=torch.float64, device=actions.device)
    return torch.bucketize(actions.double().clamp(-1.0, 1.0), edges, right=True) - 1


def centre_of(index: Tensor, bins: int) -> Tensor:
    """The centre, float32, of each bin of ``index``: bins - 1 of them, since the last bin is read as the one before."""
    edges = torch.linspace(-1.0, 1.0, bins, dtype=torch.float64, device=index.device)
    centres = (edges[:-1] + edges[1:]) / 2
    return centres[index.clamp(max=bins - 2)].float()


def masked_cross_entropy(logits: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of ``logits`` (B, H, A, bins) over the steps of ``actions`` where ``mask`` is True."""
    target = bin_of(actions, logits.shape[-1]).masked_fill(~mask[..., None], -1)  # (B, H, A)
    total = F.cross_entropy(logits.flatten(0, 2), target.flatten(), ignore_index=-1, reduction="sum")
    return total / (mask.sum() * actions.shape[-1]).clamp(min=1)


def pick(logits: Tensor, answer: str, generator: torch.Generator | None) -> Tensor:
    """Of ``logits`` (..., bins) the likeliest bin, or with ``answer`` "sample" one by its probability."""
    if answer == "likeliest":
        return logits.argmax(dim=-1)
    return category(logits.softmax(dim=-1).flatten(0, -2), generator).view(logits.shape[:-1])


def check_bins(bins: int) -> None:
    """Raise :class:`ConfigError` unless there are edges for one bin at least."""
    if bins < 2:
        raise ConfigError(f"bins: expected at least 2, found {bins}")


@dataclass(frozen=True, kw_only=True)
class DiscreteHeadConfig:
    """Sizes of :class:`DiscreteActionHead`; ``answer`` is the ``likeliest`` bin or a ``sample`` of them."""

    type: Literal["discrete"] = "discrete"
    hidden_dim: int = 128
    layers: int = 2
    bins: int = 256
    answer: Literal["likeliest", "sample"] = "likeliest"

    def __post_init__(self) -> None:
        at_least_one(self, "hidden_dim", "layers")
        check_bins(self.bins)


@register_action_head("discrete")
class DiscreteActionHead(ActionHeadBase):
    """A probability for each bin of each entry, trained with the cross-entropy; answers are centres of bins.

    It can act in two ways at once, as far as the entries are independent given the context. Actions beyond [-1, 1]
    are those at its ends: let the normalization be one that fills this range.
    """

    Config = DiscreteHeadConfig

    def __init__(self, config: DiscreteHeadConfig, *, horizon: int, action_dim: int, context_dim: int) -> None:
        super().__init__(config, horizon=horizon, action_dim=action_dim, context_dim=context_dim)
        self.net = mlp(context_dim, config.hidden_dim, config.layers, horizon * action_dim * config.bins)

    def forward(self, context: Tokens) -> Tensor:
        """Logits (B, H, A, bins) float32."""
        flat = widened(self.net(self.pooled(context)))
        return flat.view(-1, self.horizon, self.action_dim, self.config.bins)

    def loss(
        self,
        context: Tokens,
        actions: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return masked_cross_entropy(self(context), actions, mask)

    def predict(
        self, context: Tokens, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        self.refuse(prefix)
        return centre_of(pick(self(context), self.config.answer, generator), self.config.bins)
