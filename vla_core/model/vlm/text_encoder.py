"""Instructions to one feature vector: a word tokenizer and the small GRU of mini-VLA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vla_core.errors import VlaError

PAD = 0
UNKNOWN = 1
RESERVED = ("<pad>", "<unk>")


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


class TextEncoderTinyGRU(nn.Module):
    """Word embedding and one GRU layer: ids (B, L) int64 -> (B, d_model)."""

    def __init__(self, *, vocab_size: int, d_model: int, d_word: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_word)
        self.gru = nn.GRU(d_word, d_model, batch_first=True)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.gru(self.embed(tokens))  # (B, L, d_model)
        # The last hidden state would be that of a padding token in all but the longest rows.
        last = (tokens != PAD).sum(dim=1) - 1  # (B,)
        index = last[:, None, None].expand(-1, 1, hidden.shape[-1])
        out: Tensor = self.norm(hidden.gather(1, index).squeeze(1))
        return out
