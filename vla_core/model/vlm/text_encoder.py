"""Instructions to ids and to one feature vector: two tokenizers, and the small GRU of mini-VLA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_core.errors import VlaError, choices
from vla_core.model.checks import at_least_one
from vla_core.model.recurrence import gru
from vla_core.model.vlm.pretrained import library

PAD = 0
UNKNOWN = 1
RESERVED = ("<pad>", "<unk>")
KEPT = 1024  # texts whose ids a tokenizer keeps: a training set says the same few sentences again and again


class WordTokenizer:
    """Lower-cased words, split at white space, to ids; a word that was not fitted becomes 1."""

    def __init__(self, words: Sequence[str] = RESERVED) -> None:
        """Take ``words``, where the place of a word is its id; the first two are reserved."""
        if tuple(words[:2]) != RESERVED or len(set(words)) != len(words):
            raise VlaError(
                f"tokenizer words: expected distinct words that start with {list(RESERVED)}, "
                f"found {list(words)}; write them with to_dict"
            )
        self._ids = {word: i for i, word in enumerate(words)}

    @property
    def vocab_size(self) -> int:
        """Number of ids, the two reserved ones included."""
        return len(self._ids)

    def fit(self, texts: Iterable[str]) -> None:
        """Add the words of ``texts`` in the order of their first appearance."""
        for text in texts:
            for word in text.lower().split():
                self._ids.setdefault(word, len(self._ids))

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, at least one: an empty text is one unknown word."""
        return [self._ids.get(word, UNKNOWN) for word in text.lower().split()] or [UNKNOWN]

    def batch(self, texts: Sequence[str]) -> Tensor:
        """Return ids (B, L) int64, right-padded with 0 to the longest of ``texts``."""
        rows = [torch.tensor(self.encode(text), dtype=torch.int64) for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for :meth:`from_dict`."""
        return {"type": "word", "words": list(self._ids)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> WordTokenizer:
        """Read what :meth:`to_dict` wrote; raises :class:`VlaError` when it is something else."""
        if not isinstance(data, dict) or data.get("type") != "word" or not isinstance(data.get("words"), list):
            raise VlaError(f"tokenizer: expected type 'word' and a list of words, found {data}")
        return cls(data["words"])


class HubTokenizer:
    """The tokenizer of a published language model; it travels as plain data, so a robot needs no hub.

    ``prompt`` is what the model reads, with the instruction in its place, in small letters where ``lower`` is set.
    ``last`` is an id that every text ends in: it is appended where it is not there.
    """

    def __init__(self, data: str, *, pad_id: int, prompt: str = "{instruction}\n", lower: bool = False,
                 last: int | None = None) -> None:  # fmt: skip
        """``data`` is the JSON of the tokenizers library; ``pad_id`` must not occur in a text."""
        if prompt.count("{instruction}") != 1:
            raise VlaError(f"tokenizer prompt: expected one {{instruction}}, found {prompt!r}")
        self._data = data
        self._tokenizer = library("tokenizers").Tokenizer.from_str(data)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.pad_id = pad_id
        self.prompt, self.lower, self.last = prompt, lower, last
        self._known: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    def encode(self, text: str) -> list[int]:
        """Return the ids of the prompt with the instruction ``text``; raises :class:`VlaError` for a padding token."""
        if text not in self._known:
            if len(self._known) == KEPT:
                self._known.clear()
            self._known[text] = self._ids(text)
        return list(self._known[text])

    def _ids(self, text: str) -> list[int]:
        before, after = self.prompt.split("{instruction}")
        ids: list[int] = self._tokenizer.encode(before + (text.lower() if self.lower else text) + after).ids
        if self.last is not None and ids[-1:] != [self.last]:
            ids = [*ids, self.last]
        if self.pad_id in ids:
            raise VlaError(f"instruction {text!r}: holds the padding token {self.pad_id}, which no model sees")
        return ids

    def batch(self, texts: Sequence[str]) -> Tensor:
        """Return ids (B, L) int64, right-padded with ``pad_id`` to the longest of ``texts``."""
        rows = [torch.tensor(self.encode(text), dtype=torch.int64) for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for :meth:`from_dict`."""
        more = ({"lower": True} if self.lower else {}) | ({} if self.last is None else {"last": self.last})
        return {"type": "hub", "pad_id": self.pad_id, "prompt": self.prompt, **more, "tokenizer": self._data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HubTokenizer:
        """Read what :meth:`to_dict` wrote; raises :class:`VlaError` when it is something else."""
        kinds = {"tokenizer": str, "pad_id": int, "prompt": str}
        if data.get("type") != "hub" or any(not isinstance(data.get(key), kind) for key, kind in kinds.items()):
            raise VlaError(f"tokenizer: expected type 'hub' with {choices(kinds)}, found {choices(data)}")
        more = {key: data[key] for key, kind in {"lower": bool, "last": int}.items() if isinstance(data.get(key), kind)}
        return cls(data["tokenizer"], pad_id=data["pad_id"], prompt=data["prompt"], **more)


def tokenizer_from_dict(data: dict[str, Any]) -> WordTokenizer | HubTokenizer:
    """Read what ``to_dict`` of either tokenizer wrote."""
    if isinstance(data, dict) and data.get("type") == "hub":
        return HubTokenizer.from_dict(data)
    return WordTokenizer.from_dict(data)


TEXT_REGISTRY: dict[str, Any] = {}


def build_text_encoder(config: Any, *, vocab_size: int, d_model: int) -> Any:
    """Build the text encoder that is registered under ``config.type``: ids (B, L) to (B, d_model)."""
    return _text_class(config)(config, vocab_size=vocab_size, d_model=d_model)


def text_tokenizer(config: Any, texts: Iterable[str]) -> WordTokenizer | HubTokenizer:
    """Return the tokenizer of the text encoder that ``config`` describes; one of words is fitted to ``texts``."""
    return _text_class(config).tokenizer(config, texts)


def _text_class(config: Any) -> Any:
    if config.type not in TEXT_REGISTRY:
        raise VlaError(f"no text encoder {config.type!r} registered; choices: {choices(TEXT_REGISTRY)}")
    return TEXT_REGISTRY[config.type]


@dataclass(frozen=True, kw_only=True)
class TextTinyGRUConfig:
    """Sizes of :class:`TextEncoderTinyGRU`."""

    type: Literal["tiny_gru"] = "tiny_gru"
    d_word: int = 64

    def __post_init__(self) -> None:
        at_least_one(self, "d_word")


class TextEncoderTinyGRU(nn.Module):
    """Word embedding and one GRU layer: ids (B, L) int64 -> (B, d_model)."""

    Config = TextTinyGRUConfig

    @staticmethod
    def tokenizer(config: TextTinyGRUConfig, texts: Iterable[str]) -> WordTokenizer:
        """Return a tokenizer of the words of ``texts``."""
        tokenizer = WordTokenizer()
        tokenizer.fit(texts)
        return tokenizer

    def __init__(self, config: TextTinyGRUConfig | None = None, *, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.config = config or TextTinyGRUConfig()
        d_word = self.config.d_word
        self.embed = nn.Embedding(vocab_size, d_word)
        self.gru = nn.GRU(d_word, d_model, batch_first=True)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = gru(self.gru, self.embed(tokens))  # (B, L, d_model)
        # The last hidden state would be that of a padding token in all but the longest rows.
        last = (tokens != PAD).sum(dim=1) - 1  # (B,)
        index = last[:, None, None].expand(-1, 1, hidden.shape[-1])
        out: Tensor = self.norm(hidden.gather(1, index).squeeze(1))
        return out


TEXT_REGISTRY["tiny_gru"] = TextEncoderTinyGRU
