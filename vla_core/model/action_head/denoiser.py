"""What diffusion and flow have in common: a network that sees a noisy chunk, its time and the context.

Shapes: B batch, H steps, A entries of an action, N context tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.model import tokens
from vla_core.model.action_head.base import ActionHeadBase, mlp, uniform, widened
from vla_core.model.action_head.decoder import ChunkDecoder, ContextMemory
from vla_core.model.action_head.draws import normal
from vla_core.model.checks import at_least_one, divides
from vla_core.model.tokens import Tokens

TimeEmbedding = Callable[[Tensor, int], Tensor]  # times (B,) and a width to (B, width)


@dataclass(frozen=True, kw_only=True)
class DenoisingHeadConfig:
    """Sizes of the denoiser, and classifier-free guidance.

    ``denoiser``        ``mlp``: the flattened chunk and the mean context token; ``transformer``: steps that attend to
                        each other and to every context token, the time as adaptive layer norm
    ``hidden_dim``      width of the layers
    ``heads``           attention heads of the transformer
    ``context_drop``    probability in training that a sample's context is replaced by a learned token
    ``guidance_scale``  how far ``predict`` goes from the answer without context to the one with it, and beyond it from
                        1 on (Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", where it is w + 1)
    """

    denoiser: Literal["mlp", "transformer"] = "mlp"
    hidden_dim: int = 128
    layers: int = 2
    heads: int = 4
    time_dim: int = 32
    context_drop: float = 0.0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        at_least_one(self, "hidden_dim", "layers", "heads")
        if self.denoiser == "transformer":
            divides(self, "heads", "hidden_dim")
        if self.time_dim < 2 or self.time_dim % 2:
            raise ConfigError(f"time_dim: expected an even number, found {self.time_dim}")
        if not 0 <= self.context_drop < 1:
            raise ConfigError(f"context_drop: expected a probability from 0 to below 1, found {self.context_drop}")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ConfigError(f"guidance_scale: expected a number from 0 on, found {self.guidance_scale}")
        if self.guidance_scale != 1 and not self.context_drop:
            raise ConfigError(f"guidance_scale: found {self.guidance_scale}, which needs a model that was trained "
                              "without context, too; expected 1, or context_drop above 0")  # fmt: skip


class ChunkDenoiser(nn.Module):
    """An MLP over the flattened noisy chunk, the embedded time and the mean context token."""

    def __init__(self, *, chunk_dim: int, time_dim: int, context_dim: int, hidden_dim: int, layers: int,
                 embed: TimeEmbedding) -> None:  # fmt: skip
        super().__init__()
        self.time_dim = time_dim
        self.embed = embed
        self.net = mlp(chunk_dim + time_dim + context_dim, hidden_dim, layers, chunk_dim)

    def remember(self, context: Tokens) -> Tensor:
        """What a sampling needs of the context, computed once: its mean token (B, D)."""
        return tokens.masked_mean(context)

    def forward(self, x_t: Tensor, t: Tensor, memory: Tensor) -> Tensor:
        """``x_t`` (B, H, A), ``t`` (B,), ``memory`` (B, D) -> (B, H, A) in the type of the weights."""
        dtype = next(self.parameters()).dtype
        parts = [x_t.flatten(1), self.embed(t, self.time_dim), memory]
        out: Tensor = self.net(torch.cat([part.to(dtype) for part in parts], dim=-1))
        return out.view_as(x_t)


class TransformerDenoiser(nn.Module):
    """Noisy steps that attend to each other and to the context tokens, the time as adaptive layer norm."""

    def __init__(self, *, horizon: int, action_dim: int, time_dim: int, context_dim: int, hidden_dim: int, layers: int,
                 heads: int, embed: TimeEmbedding) -> None:  # fmt: skip
        super().__init__()
        self.time_dim = time_dim
        self.embed = embed
        self.time = nn.Sequential(
            nn.Linear(time_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU()
        )  # fmt: skip
        self.step = nn.Linear(action_dim, hidden_dim)
        self.decoder = ChunkDecoder(
            width=hidden_dim, layers=layers, heads=heads, context_dim=context_dim, horizon=horizon, causal=False,
            conditioned=True,
        )  # fmt: skip
        self.out = nn.Linear(hidden_dim, action_dim)

    def remember(self, context: Tokens) -> ContextMemory:
        """What a sampling needs of the context, computed once: keys and values of every layer."""
        return self.decoder.remember(context)

    def forward(self, x_t: Tensor, t: Tensor, memory: ContextMemory) -> Tensor:
        """``x_t`` (B, H, A), ``t`` (B,) -> (B, H, A) in the type of the weights."""
        dtype = self.step.weight.dtype
        time = self.time(self.embed(t, self.time_dim).to(dtype))
        steps, _ = self.decoder(self.step(x_t.to(dtype)), memory, time)
        out: Tensor = self.out(steps)
        return out


class DenoisingActionHead(ActionHeadBase):
    """Base of the heads that sample: their denoiser, and how it hears the context."""

    def __init__(self, config: Any, *, horizon: int, action_dim: int, context_dim: int, embed: TimeEmbedding) -> None:
        super().__init__(config, horizon=horizon, action_dim=action_dim, context_dim=context_dim)
        sizes = {
            "time_dim": config.time_dim, "context_dim": context_dim, "hidden_dim": config.hidden_dim,
            "layers": config.layers,
        }  # fmt: skip
        self.denoiser: ChunkDenoiser | TransformerDenoiser
        if config.denoiser == "transformer":
            self.denoiser = TransformerDenoiser(
                horizon=horizon, action_dim=action_dim, heads=config.heads, embed=embed, **sizes
            )  # fmt: skip
        else:
            self.denoiser = ChunkDenoiser(chunk_dim=horizon * action_dim, embed=embed, **sizes)
        if config.context_drop:
            self.nothing = nn.Parameter(0.02 * torch.randn(context_dim))

    def denoise(self, x_t: Tensor, t: Tensor, context: Tokens, generator: torch.Generator | None) -> Tensor:
        """The denoiser's answer in training: some rows have to do without their context."""
        if self.config.context_drop:
            chance = uniform(len(x_t), generator, x_t.device)
            context = self._without(context, chance < self.config.context_drop)
        return widened(self.denoiser(x_t, t, self.denoiser.remember(context)))

    def sampler(self, context: Tokens) -> Callable[[Tensor, Tensor], Tensor]:
        """The denoiser's answer to (``x_t``, ``t``) for a context, which it looks at once; guided by it, or not."""
        scale = self.config.guidance_scale
        if scale == 1:
            memory = self.denoiser.remember(context)
            return lambda x_t, t: widened(self.denoiser(x_t, t, memory))
        rows = len(context.mask)
        both = Tokens(torch.cat([context.values] * 2), torch.cat([context.mask] * 2))
        memory = self.denoiser.remember(self._without(both, torch.arange(2 * rows, device=both.mask.device) >= rows))

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            out = widened(self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), memory))
            with_context, without = out.chunk(2)
            return without + scale * (with_context - without)

        return guided

    def noise(self, context: Tokens, generator: torch.Generator | None) -> Tensor:
        """What a sampling starts from: (B, H, A), float32 whatever the type of the weights."""
        dtype = torch.promote_types(context.values.dtype, torch.float32)
        shape = (len(context.mask), self.horizon, self.action_dim)
        return normal(shape, generator, dtype, context.mask.device)

    def _without(self, context: Tokens, drop: Tensor) -> Tokens:
        """The context with the learned token in the place of all others in the rows of ``drop`` (B,)."""
        token = self.nothing.to(context.values.dtype).expand(len(drop), 1, -1)
        mask = torch.cat([context.mask & ~drop[:, None], drop[:, None]], dim=1)
        return Tokens(torch.cat([context.values, token], dim=1), mask)
