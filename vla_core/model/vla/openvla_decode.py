"""How OpenVLA's language model says actions: as 256 of its words, or all at once through a regression head.

Shapes: B batch, S tokens, D width, H rows of a chunk, A entries of an action.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.model.action_head.discrete_action_head import bin_of, centre_of, check_bins
from vla_core.model.checks import at_least_one
from vla_core.model.tokens import Tokens
from vla_core.model.vlm.language_model import causal
from vla_core.model.vlm.pretrained import library


@dataclass(frozen=True, kw_only=True)
class ActionTokensConfig:
    """Each entry of one action is a word: the last ``bins`` of the vocabulary before it was padded."""

    type: Literal["action_tokens"] = "action_tokens"
    bins: int = 256

    def __post_init__(self) -> None:
        check_bins(self.bins)


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """OpenVLA-OFT's: a chunk from one pass over empty placeholders, by an MLP of ``blocks`` residual blocks.

    Kim, Finn and Liang 2025, "Fine-Tuning Vision-Language-Action Models: Optimizing Speed and Success".
    """

    type: Literal["l1_regression"] = "l1_regression"
    blocks: int = 2

    def __post_init__(self) -> None:
        at_least_one(self, "blocks")


HeadConfig = ActionTokensConfig | RegressionConfig


def check_horizon(horizon: int, head: HeadConfig) -> None:
    """Raise :class:`ConfigError` where a head cannot give chunks of ``horizon`` rows."""
    if horizon < 1 or (head.type == "action_tokens" and horizon != 1):
        raise ConfigError(f"horizon: action_tokens say one row, found {horizon}; choices: 1, or the head l1_regression")


def to_ids(actions: Tensor, bins: int, words: int) -> Tensor:
    """The word ids of ``actions`` in [-1, 1] (what is beyond is cut off); ``words``: the unpadded vocabulary."""
    return words - 1 - bin_of(actions, bins)


def from_ids(ids: Tensor, bins: int, words: int) -> Tensor:
    """The centre of each id's bin, float32; other words are read as the bin nearest to them."""
    return centre_of((words - 1 - ids).clamp(min=0), bins)


def packed(tokens: Tokens) -> Tokens:
    """The same tokens with those that are absent moved to the front, and zeros in their places."""
    order = tokens.mask.int().argsort(dim=1, stable=True)
    values = torch.where(tokens.mask[..., None], tokens.values, 0.0)
    return Tokens(values.gather(1, order[..., None].expand_as(values)), tokens.mask.gather(1, order))


def run(llm: Any, sequence: Tokens, past: Any = None, *, both_ways: bool = False) -> Tensor:
    """Features (B, S, D) of ``sequence``, whose mask also covers what is in ``past``; absent tokens are seen by none.

    ``both_ways``: every token sees every other, as OpenVLA-OFT runs Llama.
    """
    length = sequence.values.shape[1]
    seen = causal(sequence.mask, length)
    if both_ways:
        seen = seen | sequence.mask[:, None, None, :]
    places = (sequence.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
    return llm.model(
        inputs_embeds=sequence.values, attention_mask=seen, position_ids=places, past_key_values=past,
        use_cache=past is not None,
    ).last_hidden_state  # fmt: skip


def greedy(llm: Any, prompt: Tokens, count: int) -> Tensor:
    """The likeliest ``count`` words (B, count) int64 after a packed ``prompt``, one by one; keys and values are kept.

    Where a word ends the text, the published code stops and reads actions out of the prompt; here the answer goes on.
    """
    past = library("transformers").DynamicCache()
    values, mask = prompt
    words: list[Tensor] = []
    for _ in range(count):
        features = run(llm, Tokens(values, mask), past)
        words.append(llm.lm_head(features[:, -1]).argmax(dim=-1))
        values = llm.get_input_embeddings()(words[-1][:, None])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return torch.stack(words, dim=1)


class RegressionHead(nn.Module):
    """Features (B, H A, D) of the action placeholders to a chunk (B, H, A) float32."""

    def __init__(self, config: RegressionConfig, *, width: int, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = _MLPResNet(config.blocks, action_dim * width, width, action_dim)

    def forward(self, features: Tensor) -> Tensor:
        rows = features.unflatten(1, (-1, self.action_dim)).flatten(2)  # (B, H, A D)
        return self.model(rows).float()


class _MLPResNet(nn.Module):
    def __init__(self, blocks: int, width_in: int, width: int, width_out: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width_in)
        self.fc1 = nn.Linear(width_in, width)
        self.mlp_resnet_blocks = nn.ModuleList(_Residual(width) for _ in range(blocks))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, width_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(self.layer_norm1(x)).relu()
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ProprioProjector(nn.Module):
    """The robot's own state (B, P) as one token (B, 1, D)."""

    def __init__(self, state_dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state_dim, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        hidden: Tensor = nn.functional.gelu(self.fc1(state.to(self.fc1.weight.dtype)))
        return self.fc2(hidden)[:, None]
