"""SmolVLA (Shukor et al. 2025): a small vision-language model and an action expert that reads its keys and values.

The numbers are LeRobot's, and so are the tensors' names, less its prefix ``model.``. What is seen (pictures, words,
state) is computed once for a chunk, whatever the number of Euler steps; what is masked, as an empty camera, is not
computed at all.

Legend: B batch, K cameras, N tokens of a picture, L words, P = K N + L + 1 tokens of the prefix, H rows of a chunk,
W and E widths of language model and expert, A entries of an action, padded to ``max_action_dim``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_core.errors import VlaError, choices
from vla_core.model.action_head.base import blanked, draw_rows, masked_mean, normal_like, uniform, widened
from vla_core.model.action_head.draws import normal
from vla_core.model.action_head.flow_action_head import BETA_SHAPE, MIN_TIME, TIME_SCALE
from vla_core.model.action_head.guidance import ChunkPrefix, ChunkPrefixes, guide
from vla_core.model.fast import linear
from vla_core.model.graph import in_graph
from vla_core.model.inputs import ModelInputs
from vla_core.model.vla import smolvla_source as source
from vla_core.model.vla.base import MODEL_REGISTRY, PolicyModel
from vla_core.model.vla.smolvla_config import SmolVLAConfig as SmolVLAConfig
from vla_core.model.vla.smolvla_config import SmolVLARecipe as SmolVLARecipe
from vla_core.model.vla.smolvla_expert import Expert, Prefix, Remembered, bias, expert_model, norm
from vla_core.model.vla.smolvla_vision import PictureTokens
from vla_core.model.vlm.lora import add_lora, merge_lora
from vla_core.model.vlm.text_encoder import HubTokenizer

PROJECTIONS = ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")


class SmolVLA(PolicyModel):
    """Pictures, an instruction and a state to a chunk, by flow matching from t = 1, noise, to t = 0."""

    Config = SmolVLAConfig
    Recipe = SmolVLARecipe
    remembers = "state"

    @staticmethod
    def tokenizer(recipe: SmolVLARecipe, texts: Iterable[str] = ()) -> HubTokenizer:
        """Return the vision-language model's own tokenizer; ``texts`` do not matter to it."""
        return source.read_tokenizer(source.backbone(recipe))

    def __init__(self, config: SmolVLAConfig, repository: source.Repository | None = None) -> None:
        """``repository`` is what ``config.pretrained`` names, where it has been opened already."""
        super().__init__()
        config, found = source.resolve(config, repository)
        record = source.record(config)
        if config.vocab_size > record.text_config.vocab_size:
            raise VlaError(f"tokenizer: has {config.vocab_size} ids, the model {record.text_config.vocab_size}; take "
                           "the model's own")  # fmt: skip
        self.vlm_with_expert = _Pair(config, record)
        width, inner = record.text_config.hidden_size, self.vlm_with_expert.lm_expert.config.hidden_size
        self.state_proj = nn.Linear(config.max_state_dim, width)
        self.action_in_proj = nn.Linear(config.max_action_dim, inner)
        self.action_out_proj = nn.Linear(inner, config.max_action_dim)
        self.action_time_mlp_in = nn.Linear(2 * inner, inner)
        self.action_time_mlp_out = nn.Linear(inner, inner)
        self._config = dataclasses.replace(config, pretrained=None, architecture=source.architecture(record))
        self._recompute = False
        self.pictures = PictureTokens(config.image_size)
        if found is not None:
            found.load_into(self)
        self._select_trained()

    @property
    def config(self) -> SmolVLAConfig:
        """What rebuilds this model, where there is no hub too."""
        return self._config

    def loss(self, inputs: ModelInputs, actions: Tensor, mask: Tensor,
             generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
        """Return the mean squared error of the velocity over all ``max_action_dim`` entries of the known rows."""
        actions = self._padded(widened(blanked(actions, mask)), self._config.max_action_dim)
        t = TIME_SCALE * uniform(len(actions), generator, actions.device) ** (1 / BETA_SHAPE) + MIN_TIME
        return self.velocity_loss(inputs, actions, mask, normal_like(actions, generator), t)

    def velocity_loss(self, inputs: ModelInputs, actions: Tensor, mask: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """:meth:`loss` at given ``noise`` (B, H, ``max_action_dim``) and times ``t`` (B,), of padded ``actions``."""
        share = t[:, None, None]
        x = share * noise + (1 - share) * actions
        velocity = self._velocity(self._expert(self.remember(inputs), x.shape[1]), x, self._time(t)[:, None])
        return masked_mean((velocity - (noise - actions)).square(), mask)

    @torch.no_grad()
    def predict(
        self, inputs: ModelInputs, generator: torch.Generator | None = None,
        prefix: ChunkPrefix | ChunkPrefixes | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the chunk (B, H, A) in normalized action units, continuing ``prefix`` where one is given."""
        size = (self._config.horizon, self._config.max_action_dim)
        noise = draw_rows(
            len(inputs.tokens), generator,
            lambda rows: normal((rows, *size), generator, torch.float32, inputs.tokens.device),
        )  # fmt: skip
        return self.sample(inputs, noise, prefix)[..., : self._config.action_dim]

    @torch.no_grad()
    def sample(self, inputs: ModelInputs, noise: Tensor, prefix: ChunkPrefix | ChunkPrefixes | None = None) -> Tensor:
        """Return where ``noise`` (B, H, ``max_action_dim``) is carried to: the padded chunk."""
        prefix = _padded_prefix(prefix, self._config.max_action_dim)
        expert = self._expert(self.remember(inputs), noise.shape[1])
        steps, x = self._config.head.inference_steps, noise
        times = self._time(torch.linspace(1, 1 / steps, steps, device=noise.device))  # (steps, E)
        for k, time in zip(range(steps, 0, -1), times, strict=True):
            t, after = k / steps, (k - 1) / steps
            velocity = partial(self._velocity, expert, time=time)
            if prefix is None:
                x = x - velocity(x) / steps
            else:
                clean = guide(partial(_clean, t=t, velocity=velocity), x, 1 - t, t, prefix)
                x = clean + after / t * (x - clean)
        return x

    def remember(self, inputs: ModelInputs) -> Remembered:
        """What the expert needs of an observation."""
        pair = self.vlm_with_expert
        images, there = self._images(inputs)
        alone = len(inputs.tokens) == 1 and not in_graph()
        seen, seen_mask = self.pictures(pair.vlm.model, images, there, skip=alone)
        words, word_mask = self._words(inputs)
        state = self.state_proj(self._padded(inputs.state, self._config.max_state_dim))[:, None]
        valid = torch.cat([seen_mask, word_mask, inputs.state_mask[:, None]], dim=1)
        if alone:  # what is absent has no part in anything
            words, valid = words[:, word_mask[0]], valid[:, torch.cat([valid[0, :-1], valid.new_ones(1)])]
        valid = torch.cat([valid[:, :-1], valid[:, -1:] | ~valid.any(dim=1, keepdim=True)], dim=1)
        return self._read(torch.cat([seen, words], dim=1), state, valid, whole=alone and bool(valid.all()))

    def _read(self, seen: Tensor, state: Tensor, valid: Tensor, whole: bool) -> Remembered:
        """The prefix through the language model: pictures and words see each other, the state sees all."""
        text = self.vlm_with_expert.vlm.model.text_model
        layers = Prefix(text.layers, text.config.num_key_value_heads, self._recompute)
        positions = (valid.cumsum(dim=1) - 1).clamp(min=0)
        # Where there is nothing to see, the state is seen, so that no softmax is over nothing; nobody looks at it.
        nothing = ~valid[:, :-1].any(dim=1)[:, None, None, None]
        last = torch.cat([torch.zeros_like(valid[:, :-1]), torch.ones_like(valid[:, :1])], dim=1)
        state_key, others = last[:, None, None, :], ~last[:, None, None, :]
        allowed = (state_key & (last[:, None, :, None] | nothing)) | (others & valid[:, None, None, :])
        mask = bias(allowed, seen.dtype)
        if not torch.is_grad_enabled() or any(p.requires_grad for p in text.parameters()):
            found = layers(torch.cat([seen, state], dim=1), positions, mask)
            return Remembered(found, valid, whole)
        # Of a frozen language model only what comes after the state needs a gradient, the state's projection's.
        with torch.no_grad():
            past = layers(seen, positions[:, :-1], mask[:, :, :-1, :-1].clamp(min=-1e30))
        return Remembered(layers(state, positions[:, -1:], mask[:, :, -1:], past), valid, whole)

    def _images(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """The pictures (B, K, 3, h, w) in the policy's order, or a list where their sizes differ, and (B, K)."""
        names = self._config.cameras
        missing = [name for name in names if name not in inputs.images or name not in inputs.image_mask]
        if missing:
            raise VlaError(
                f"model inputs lack the camera {missing[0]!r} or its mask; cameras given: {choices(inputs.images)}"
            )
        images = torch.stack([self.pictures.fit(inputs.images[name]) for name in names], dim=1)
        return images, torch.stack([inputs.image_mask[name] for name in names], dim=1)

    def _words(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """The embedded instruction (B, L, W) and which of its tokens are there."""
        tokens = inputs.tokens
        mask = torch.ones_like(tokens, dtype=torch.bool) if inputs.token_mask is None else inputs.token_mask
        if not in_graph() and tokens.shape[1] > self._config.max_tokens:
            raise VlaError(f"instruction: found {tokens.shape[1]} tokens, the policy reads at most "
                           f"{self._config.max_tokens}; say it shorter, or raise model.max_tokens")  # fmt: skip
        embed = self.vlm_with_expert.vlm.model.text_model.embed_tokens
        return embed(tokens) * math.sqrt(embed.embedding_dim), mask

    def _expert(self, seen: Remembered, rows: int) -> Callable[[Tensor], Tensor]:
        expert = self.vlm_with_expert.lm_expert
        crosses = [self.vlm_with_expert.crosses(i) for i in range(len(expert.layers))]
        layers = Expert(expert.layers, crosses, self._config.layers // len(expert.layers),
                        expert.config.num_key_value_heads, seen, rows, self._recompute)  # fmt: skip
        return lambda x: norm(expert.norm, layers(x))

    def _velocity(self, expert: Callable[[Tensor], Tensor], x: Tensor, time: Tensor) -> Tensor:
        """Of noisy actions ``x`` (B, H, ``max_action_dim``), with what :meth:`_time` gives."""
        width = self.action_in_proj.out_features
        actions = F.linear(linear(self.action_in_proj, x), self.action_time_mlp_in.weight[:, :width])
        mixed = linear(self.action_time_mlp_out, F.silu(actions + time))
        return widened(linear(self.action_out_proj, expert(mixed)))

    def _time(self, t: Tensor) -> Tensor:
        """The part of times ``t`` (T,) in the layer that mixes them with the actions: (T, E)."""
        width, head = self.action_in_proj.out_features, self._config.head
        share = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=t.device)
        periods = head.min_period * (head.max_period / head.min_period) ** share
        angles = 2 * math.pi * t[:, None].to(torch.float64) / periods
        embedded = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.action_in_proj.weight.dtype)
        return F.linear(embedded, self.action_time_mlp_in.weight[:, width:], self.action_time_mlp_in.bias)

    @staticmethod
    def _padded(x: Tensor, width: int) -> Tensor:
        return F.pad(x, (0, width - x.shape[-1]))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations of the language model and the expert in the backward pass."""
        self._recompute = True

    def merge_lora(self) -> None:
        """Add the adapters to the weights; what is left is a plain model, for inference, export or further training."""
        merge_lora(self.vlm_with_expert)
        self._config = dataclasses.replace(self._config, trained="all")

    def train(self, mode: bool = True) -> SmolVLA:
        super().train(mode)
        if not any(p.requires_grad for p in self.vlm_with_expert.vlm.parameters()):
            self.vlm_with_expert.vlm.eval()
        return self

    def _select_trained(self) -> None:
        """Turn off the gradients of what is not trained, and of what nothing is computed with."""
        trained, pair = self._config.trained, self.vlm_with_expert
        text = pair.vlm.model.text_model
        if trained == "expert":
            pair.vlm.requires_grad_(False)
        elif trained == "all" and self._config.freeze_vision:
            pair.vlm.model.vision_model.requires_grad_(False)
        elif trained == "lora":
            pair.vlm.requires_grad_(False)
            add_lora(nn.ModuleList([*text.layers, *pair.lm_expert.layers]), self._config.lora)
            pair.lm_expert.norm.requires_grad_(False)
        unused = [text.norm, text.layers[-1].mlp, text.layers[-1].post_attention_layernorm,
                  text.layers[-1].self_attn.q_proj, text.layers[-1].self_attn.o_proj]  # fmt: skip
        for part in unused:
            part.requires_grad_(False)


class _Pair(nn.Module):
    """The vision-language model and the expert, under LeRobot's names."""

    def __init__(self, config: SmolVLAConfig, record: Any) -> None:
        super().__init__()
        self._config = config
        self.vlm = _VisionLanguage(config, record)
        self.lm_expert: Any = expert_model(
            record.text_config, layers=config.expert_layers or config.layers, width=config.expert_width,
            crosses=self.crosses,
        )  # fmt: skip

    def crosses(self, layer: int) -> bool:
        """Whether the expert's ``layer`` attends to the prefix alone."""
        every = self._config.self_attention_every
        return self._config.attention == "cross" and not (every > 0 and layer % every == 0)


class _VisionLanguage(nn.Module):
    """Vision, connector and the first layers of the language model; its output layer is kept, and not used."""

    def __init__(self, config: SmolVLAConfig, record: Any) -> None:
        super().__init__()
        self.model: Any = source.vision_language_model(config, record)
        if config.language_head:
            self.lm_head = _Kept(record.text_config.vocab_size, record.text_config.hidden_size)


class _Kept(nn.Module):
    """A weight that nothing is computed with: a policy that is saved again has it."""

    weight: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(*shape))


def _padded_prefix(
    prefix: ChunkPrefix | ChunkPrefixes | None, width: int
) -> ChunkPrefix | ChunkPrefixes | None:  # fmt: skip
    """The same with actions of ``width`` entries: the policy was trained to answer 0 in those that pad."""
    if isinstance(prefix, ChunkPrefixes):
        rows = [_padded_prefix(row, width) for row in prefix.rows]
        return ChunkPrefixes(tuple(row for row in rows if not isinstance(row, ChunkPrefixes)))
    if prefix is None:
        return None
    return dataclasses.replace(prefix, actions=F.pad(prefix.actions, (0, width - prefix.actions.shape[-1])))


def _clean(x: Tensor, t: float, velocity: Callable[[Tensor], Tensor]) -> Tensor:
    return x - t * velocity(x)


MODEL_REGISTRY["smolvla"] = SmolVLA
