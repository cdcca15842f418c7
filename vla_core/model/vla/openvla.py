"""OpenVLA (Kim et al. 2024) and OpenVLA-OFT (2025) without their code: pictures and a question, answered with actions.

Parts and tensors have the published names. [start, pictures, own state, question, answer] goes through Llama-2; the
answer is one action in words, or a chunk through a regression head.

Shapes: B batch, K cameras, N patches a picture, D width of the language model, H rows, A entries of an action.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.action_head.guidance import ChunkPrefix
from vla_core.model.graph import in_graph
from vla_core.model.inputs import ModelInputs
from vla_core.model.tokens import Tokens, join, present
from vla_core.model.vla.base import MODEL_REGISTRY, PolicyModel
from vla_core.model.vla.openvla_decode import (
    ActionTokensConfig,
    HeadConfig,
    ProprioProjector,
    RegressionConfig,
    RegressionHead,
    check_horizon,
    from_ids,
    greedy,
    packed,
    run,
    to_ids,
)
from vla_core.model.vla.openvla_quantized import Quantization, cuda_device, plain_weights, quantized
from vla_core.model.vla.openvla_vision import BackboneConfig, FeatureTable, Projector, Resize, Vision
from vla_core.model.vlm import pretrained
from vla_core.model.vlm.lora import LoRAConfig, merge_lora

PARTS = ("vision_backbone", "projector", "language_model")
PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
EMPTY = 29871  # the word between "Out:" and the answer
PUBLISHED = "openvla/openvla-7b"


@dataclass(frozen=True, kw_only=True)
class OpenVLARecipe:
    """The free choices of :class:`OpenVLAConfig`.

    ``pretrained``        a hub name, or a local folder in the published layout; null: random weights of ``vision`` and
                          ``text``, which otherwise come with it
    ``dtype``             of the weights; ``stored``: as they are in the source
    ``head``              ``action_tokens``, or ``l1_regression`` (OFT), which alone gives chunks and reads a state
    ``center_crop``       the middle 90 % of a picture's area: for models that were trained with random crops
    ``resize``            how a picture is brought to the backbones' size; null: as the source says
    ``lora``              adapters in all linear layers that the answer passes, the published way of fine-tuning
    ``frozen``            parts that are neither trained nor adapted, of ``vision_backbone, projector, language_model``
    ``quantization``      the language model's frozen weights in 4 (``nf4``) or 8 bits while adapters are trained; CUDA
                          alone. A checkpoint has plain weights, and a run that goes on holds those
    ``feature_cache_mb``  patches that a frozen backbone has made are kept for so much memory; 0: none are
    ``open_close``        places of entries that it says from 0 (closed) to 1 (open) where the robot takes 1 (closed)
                          to -1 (open), as LIBERO's gripper does
    ``padding``           words that were added to the vocabulary so that its size is a round number
    """

    type: Literal["openvla"] = "openvla"
    pretrained: str | None = PUBLISHED
    revision: str | None = None
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    horizon: int = 1
    head: HeadConfig = field(default_factory=ActionTokensConfig)
    center_crop: bool = False
    resize: Resize | None = None
    lora: LoRAConfig | None = None
    frozen: tuple[str, ...] = ()
    quantization: Quantization | None = None
    feature_cache_mb: int = 0
    gradient_checkpointing: bool = False
    open_close: tuple[int, ...] = ()
    vision: tuple[BackboneConfig, ...] = ()
    text: dict[str, Any] = field(default_factory=dict)
    padding: int = 64

    def __post_init__(self) -> None:
        check_horizon(self.horizon, self.head)
        if (self.pretrained is None) != bool(self.vision and self.text):
            raise ConfigError("vision, text: come with the pretrained weights; give both exactly where pretrained is "
                              "null")  # fmt: skip
        if len(self.vision) > 2:
            raise ConfigError(f"vision: expected one or two backbones, found {len(self.vision)}")
        unknown = [part for part in self.frozen if part not in PARTS]
        if unknown:
            raise ConfigError(f"frozen: no part {unknown[0]!r}; choices: {choices(PARTS)}")
        if self.quantization is not None and self.lora is None and "language_model" not in self.frozen:
            raise ConfigError(f"quantization: weights in {self.quantization} cannot be trained; set lora, or add "
                              "language_model to frozen")  # fmt: skip
        if self.feature_cache_mb < 0 or (self.feature_cache_mb and "vision_backbone" not in self.frozen):
            raise ConfigError(f"feature_cache_mb: found {self.feature_cache_mb}; expected 0, or more with "
                              "vision_backbone among frozen: only then do features repeat")  # fmt: skip

    def config(self, **sizes: Any) -> OpenVLAConfig:
        """The whole model configuration for a dataset."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return OpenVLAConfig(**values, **sizes)


@dataclass(frozen=True, kw_only=True)
class OpenVLAConfig(OpenVLARecipe):
    """What :class:`OpenVLA` is built from; ``state_dim`` above 0 needs the head ``l1_regression``."""

    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int
    vocab_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise ConfigError(f"cameras: expected at least one, all distinct, found {list(self.cameras)}")
        if self.state_dim and self.head.type != "l1_regression":
            raise ConfigError(f"state_dim: found {self.state_dim}, but with the head {self.head.type!r} no state is "
                              "read; leave observation.state empty, or take the head l1_regression")  # fmt: skip
        beyond = [place for place in self.open_close if not 0 <= place < self.action_dim]
        if beyond:
            raise ConfigError(f"open_close: expected places from 0 to {self.action_dim - 1}, found {beyond[0]}")
        if self.action_dim < 1 or self.state_dim < 0 or self.vocab_size < 2:
            raise ConfigError(f"action_dim, state_dim, vocab_size: expected at least 1, 0 and 2, found "
                              f"{self.action_dim}, {self.state_dim} and {self.vocab_size}")  # fmt: skip


class OpenVLA(PolicyModel):
    """Pictures and an instruction to one action, or to a chunk of them; see the module.

    A camera that is missing is seen by no token, and so is a missing state. Of the past nothing is read.
    """

    Config = OpenVLAConfig
    Recipe = OpenVLARecipe
    remembers = "state"
    needs_instruction = True  # it answers a question, and has no mask for none
    language_model: Any

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        self.held: Quantization | None = None
        source = None
        if config.pretrained is not None:
            from vla_core.pretrained.openvla_folder import PublishedFolder

            source = PublishedFolder.open(config.pretrained, config.revision)
            config = source.resolved(config)
        self._config = config
        if source is None:
            self._build()
        else:
            with torch.device("meta"):
                self._build()
            self.load_state_dict(source.weights(self), strict=True, assign=True)
            self._computed()
            if config.quantization is not None:
                self.quantize(config.quantization)
        self._adapt()
        if config.gradient_checkpointing:
            self.enable_gradient_checkpointing()

    @classmethod
    def without_weights(cls, config: OpenVLAConfig) -> OpenVLA:
        """The model on the meta device, where a tensor takes no memory: what is loaded next is held only once."""
        if config.pretrained is not None:
            return cls(config)
        with torch.device("meta"):
            model = cls(config)
        model._computed()
        return model

    def quantize(self, kind: Quantization) -> None:
        """Hold the language model's weights in 4 or 8 bits, on CUDA; the other parts go there with ``to``."""
        self.language_model = quantized(self.language_model, kind, cuda_device())
        self.held = kind
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = kind == "nf4", kind == "int8"  # peft asks for these
        self.language_model.requires_grad_(False)

    def state_dict(self, *parts: Any, **options: Any) -> Any:
        """Plain weights, whichever way they are held."""
        found = super().state_dict(*parts, **options)
        return found if self.held is None else plain_weights(self, found, self.projector.fc1.weight.dtype)

    def _build(self) -> None:
        config = self._config
        transformers = pretrained.library("transformers")
        record = pretrained.record_of({"model_type": "llama", **config.text}, ("llama",))
        if record.tie_word_embeddings:
            raise VlaError("text.tie_word_embeddings: found true; OpenVLA's output layer has weights of its own")
        dtype = pretrained.DTYPES["float32" if config.dtype == "stored" else config.dtype]
        self.vision_backbone = Vision(config.vision, config.resize or "resize-naive", config.center_crop)
        self.projector = Projector(self.vision_backbone.width, record.hidden_size, len(config.vision) == 2)
        self.language_model = pretrained.random_model(transformers.LlamaForCausalLM, record, dtype)
        self.record = record
        self.words = record.vocab_size - config.padding  # before padding, which is what actions are counted from
        self.action_head: Any = None
        self.proprio_projector: Any = None
        if isinstance(config.head, RegressionConfig):
            self.action_head = RegressionHead(config.head, width=record.hidden_size, action_dim=config.action_dim)
            if config.state_dim:
                self.proprio_projector = ProprioProjector(config.state_dim, record.hidden_size)
        for part in (self.vision_backbone, self.projector, self.action_head, self.proprio_projector):
            if part is not None:
                part.to(dtype)
        self.features = FeatureTable(config.feature_cache_mb)

    def _computed(self) -> None:
        """Rotary frequencies are computed, not loaded."""
        rotary = pretrained.library("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding
        self.language_model.model.rotary_emb = rotary(config=self.record)

    def _adapt(self) -> None:
        for name in self._config.frozen:
            self.get_submodule(name).requires_grad_(False)
        if self.action_head is not None:
            self.language_model.lm_head.requires_grad_(False)  # no word is said
        if self._config.lora is not None:
            self._add_lora(self._config.lora)

    def _add_lora(self, lora: LoRAConfig) -> None:
        """Adapters in float32: steps of a usual learning rate would be lost in bfloat16."""
        unread = {id(part) for b in self.vision_backbone.backbones for top in b.unread for part in top.modules()}
        left_out = (*self._config.frozen, "action_head", "proprio_projector")
        if self.action_head is not None:
            left_out = (*left_out, "language_model.lm_head")
        names = [
            name for name, part in self.named_modules()
            if isinstance(part, nn.Linear) and id(part) not in unread and not f"{name}.".startswith(
                tuple(f"{part}." for part in left_out))
        ]  # fmt: skip
        if lora.targets != "all":
            names = [name for name in names if name.split(".")[-1] in lora.targets]
        if not names:
            raise VlaError("lora: no linear layer is left to adapt; take a part out of frozen")
        peft = pretrained.library("peft")
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names), self
        )  # fmt: skip
        for name, weight in self.named_parameters():
            if ".lora_" in name:
                weight.data = weight.data.float()
        for part in (self.action_head, self.proprio_projector):
            if part is not None:
                part.requires_grad_(True)

    def merge_lora(self) -> None:
        """Add the adapters to the weights; what is left is a plain model."""
        merge_lora(self)
        self._config = dataclasses.replace(self._config, lora=None)

    @property
    def config(self) -> OpenVLAConfig:
        """What rebuilds this model, where there is no hub too."""
        return dataclasses.replace(self._config, quantization=None)

    @staticmethod
    def tokenizer(recipe: OpenVLARecipe, texts: Iterable[str]) -> Any:
        """Return the source's own tokenizer; ``texts`` do not matter to it."""
        if recipe.pretrained is None:
            raise VlaError("tokenizer: a model without pretrained weights has none; take the one saved with the model")
        from vla_core.pretrained.openvla_folder import PublishedFolder

        return PublishedFolder.open(recipe.pretrained, recipe.revision).tokenizer()

    def loss(
        self, inputs: ModelInputs, actions: Tensor, mask: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The cross-entropy of the answer's words and of the end after them, or a chunk's mean absolute error."""
        known = self._said(torch.where(mask[..., None], actions, 0.0))
        if self.action_head is not None:
            error = (self._regress(inputs) - known).abs().mean(dim=-1)
            return (error * mask).sum() / mask.sum().clamp(min=1)
        ids = to_ids(known[:, 0], self._bins(), self.words)  # (B, A)
        sequence = join([self._prompt(inputs), present(self._embed(ids))])
        features = run(self.language_model, sequence)[:, -ids.shape[1] - 1 :]
        logits = self.language_model.lm_head(features).float()
        end = torch.full_like(ids[:, :1], self.record.eos_token_id)
        target = torch.cat([ids, end], dim=1).masked_fill(~mask[:, :1], -100)
        total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        return total / (target >= 0).sum().clamp(min=1)

    @torch.no_grad()
    def predict(
        self, inputs: ModelInputs, generator: torch.Generator | None = None, prefix: ChunkPrefix | None = None
    ) -> Tensor:
        """Return the chunk (B, H, A), float32 in normalized action units on the device of ``inputs``; nothing is drawn.

        The model may be on another device: it is asked there.
        """
        if prefix is not None:
            raise VlaError(f"the head {self._config.head.type!r} samples nothing that could be guided")
        asked = inputs.to(self.language_model.lm_head.weight.device)
        if self.action_head is not None:
            said = self._regress(asked)
        else:
            ids = greedy(self.language_model, self._prompt(asked), self._config.action_dim)
            said = from_ids(ids, self._bins(), self.words)[:, None]
        said = said.to(inputs.state.device)
        for place in self._config.open_close:
            said[..., place] = 1 - 2 * said[..., place]
        return said

    def figures(self) -> dict[str, float]:
        """Share of the pictures whose patches were known already."""
        return {"features/hit_rate": self.features.hit_rate} if self.features.asked else {}

    def forget(self) -> None:
        """Drop the patches that are kept."""
        if "vision_backbone" not in self._config.frozen:
            self.features.clear()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        self._config = dataclasses.replace(self._config, gradient_checkpointing=True)
        pretrained.checkpoint_activations(self.language_model)
        for backbone in self.vision_backbone.backbones:
            backbone.recompute = True

    def _said(self, actions: Tensor) -> Tensor:
        """What the model is to say for ``actions`` (B, H, A)."""
        said = actions.clone()
        for place in self._config.open_close:
            said[..., place] = (1 - said[..., place]) / 2
        return said

    def _bins(self) -> int:
        head = self._config.head
        assert isinstance(head, ActionTokensConfig), "only its head says words"
        return head.bins

    def _embed(self, ids: Tensor) -> Tensor:
        return self.language_model.get_input_embeddings()(ids)

    def _regress(self, inputs: ModelInputs) -> Tensor:
        """The chunk (B, H, A): features of the last word of the question and of all placeholders but the last."""
        prompt = self._prompt(inputs)
        batch, count = len(prompt.values), self._config.horizon * self._config.action_dim
        empty = prompt.values.new_zeros(batch, count, prompt.values.shape[2])
        end = self._embed(torch.full((batch, 1), self.record.eos_token_id, device=empty.device))
        features = run(self.language_model, join([prompt, present(empty), present(end)]), both_ways=True)
        return self.action_head(features[:, -count - 2 : -2])

    def _prompt(self, inputs: ModelInputs) -> Tokens:
        """[start, pictures, own state, question], packed."""
        words = self._question(inputs)
        start = Tokens(words.values[:, :1], words.mask[:, :1])
        rest = Tokens(words.values[:, 1:], words.mask[:, 1:])
        seen = self._see(inputs)
        if self.proprio_projector is not None:
            state = torch.where(inputs.state_mask[:, None], inputs.state, 0.0)
            seen = join([seen, Tokens(self.proprio_projector(state), inputs.state_mask[:, None])])
        return packed(join([start, Tokens(seen.values.to(start.values.dtype), seen.mask), rest]))

    def _question(self, inputs: ModelInputs) -> Tokens:
        mask = inputs.tokens != self.record.pad_token_id if inputs.token_mask is None else inputs.token_mask
        if not in_graph() and not bool(mask[:, 0].all()):  # who runs a graph refuses it
            raise VlaError("instruction: missing in a row of the batch; OpenVLA answers a question and has no mask for "
                           "none: set missing to refuse for it in the contract")  # fmt: skip
        return Tokens(self._embed(inputs.tokens.clamp(max=self.record.vocab_size - 1)), mask)

    def _see(self, inputs: ModelInputs) -> Tokens:
        """Projected patches (B, K N, D), camera after camera."""
        names = self._config.cameras
        missing = [name for name in names if name not in inputs.images or name not in inputs.image_mask]
        if missing:
            raise VlaError(
                f"model inputs lack the camera {missing[0]!r} or its mask; cameras given: {choices(inputs.images)}"
            )
        parts = []
        for name in names:
            there = inputs.image_mask[name]
            pictures = torch.where(there[:, None, None, None], inputs.images[name], 0.0)
            patches = self.projector(self._patches(pictures))
            parts.append(Tokens(patches, there[:, None].expand(-1, patches.shape[1])))
        return join(parts)

    def _patches(self, pictures: Tensor) -> Tensor:
        if "vision_backbone" not in self._config.frozen:
            return self.vision_backbone(pictures)
        with torch.no_grad():
            if self.training and self._config.feature_cache_mb:
                return self.features.get(pictures, self.vision_backbone)
            return self.vision_backbone(pictures)


MODEL_REGISTRY["openvla"] = OpenVLA
