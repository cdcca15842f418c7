"""A small decoder that is trained from scratch: the language model where nothing pretrained fits the machine.

Shapes: B batch, L ids, P tokens of the prefix, n tokens after it, S = P + n, D width, H heads, d = D / H.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.model.attention import AttentionBlock
from vla_core.model.checks import at_least_one, divides
from vla_core.model.tokens import Tokens
from vla_core.model.vlm.language_model import LANGUAGE_REGISTRY, LanguageModel, Prefix, causal
from vla_core.model.vlm.text_encoder import PAD, WordTokenizer

PERIOD = 1000.0  # words of the slowest sine


@dataclass(frozen=True, kw_only=True)
class TinyTransformerConfig:
    """Sizes of :class:`TinyTransformer`."""

    type: Literal["tiny_transformer"] = "tiny_transformer"
    d_model: int = 128
    layers: int = 2
    heads: int = 4
    injected: Literal["after_text", "before_text"] = "after_text"

    def __post_init__(self) -> None:
        at_least_one(self, "d_model", "layers", "heads")
        divides(self, "heads", "d_model")
        if self.d_model % 2:
            raise ConfigError(f"d_model: expected an even number, found {self.d_model}")


class TinyTransformer(LanguageModel):
    """Words and injected tokens through causal blocks, normed before each part (B, S, D).

    Words know their places by sines (Vaswani et al. 2017, section 3.5). Injected tokens bring what tells them apart:
    they are a set, whose order the causal mask alone betrays.
    """

    Config = TinyTransformerConfig

    def __init__(self, config: TinyTransformerConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.input_dim = self.output_dim = config.d_model
        self.pad_id = PAD
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.blocks = nn.ModuleList(
            AttentionBlock(width=config.d_model, heads=config.heads) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.d_model)

    @staticmethod
    def tokenizer(config: TinyTransformerConfig, texts: Iterable[str]) -> WordTokenizer:
        """Return a tokenizer of the words of ``texts``."""
        tokenizer = WordTokenizer()
        tokenizer.fit(texts)
        return tokenizer

    def embed(self, ids: Tensor) -> Tensor:
        place = ((ids != PAD).cumsum(dim=1) - 1).clamp(min=0)  # padding may be on either side
        embedded: Tensor = self.embedding(ids)
        return embedded + word_places(place, self.input_dim).to(embedded.dtype)

    def run(self, sequence: Tokens, prefix: Prefix | None = None) -> Tensor:
        return self._decode(sequence, prefix)[0]

    def prefix(self, sequence: Tokens) -> Prefix:
        features, state = self._decode(sequence, None)
        return Prefix(features=Tokens(features, sequence.mask), state=state)

    def _decode(self, sequence: Tokens, prefix: Prefix | None) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
        """The features (B, n, D), and of each layer the keys and values (B, H, S, d)."""
        mask = sequence.mask if prefix is None else torch.cat([prefix.features.mask, sequence.mask], dim=1)
        allowed = causal(mask, sequence.mask.shape[1])
        x, state = sequence.values, []
        for number, block in enumerate(cast("list[AttentionBlock]", self.blocks)):
            key, value = block.remember(x)
            if prefix is not None:
                before = prefix.state[number]
                key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
            state.append((key, value))
            x = block(x, key, value, allowed)
        return self.norm(x), tuple(state)


def word_places(place: Tensor, dim: int) -> Tensor:
    """Sines and cosines (B, L, dim) of ``place`` (B, L)."""
    exponent = torch.arange(dim // 2, device=place.device) / max(dim // 2 - 1, 1)
    angle = place[..., None] * PERIOD**-exponent
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


LANGUAGE_REGISTRY["tiny_transformer"] = TinyTransformer
