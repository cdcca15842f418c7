"""Which rows make the batch of a step: a pure function of the seed and the step, so that resuming needs no state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from vla_core.errors import VlaError

BLOCK = 2**16  # draws after which the weights of a mixture are kept exactly, to this resolution


class SamplerError(VlaError):
    """Weights or sizes that nothing can be drawn with."""


class Sampler:
    """Draws from D sources of ``lengths`` rows each; rows are numbered through all sources.

    Draws come in blocks. A block holds a fixed number of draws from each source in random order; each source is
    walked through in random order, every row once before any comes again. Without ``weights`` a block is an epoch:
    every row of all sources exactly once. With them a source has its share of every 65,536 draws.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        if not lengths or min(lengths) < 1:
            raise SamplerError(f"sources of {list(lengths)} rows; each needs at least one")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.seed = seed
        self._offsets = np.cumsum([0, *lengths])[:-1]
        self.counts = self.lengths if weights is None or len(lengths) == 1 else _shares(weights, len(lengths))
        self._block = int(self.counts.sum())
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def rows(self, step: int, batch_size: int) -> np.ndarray:
        """(batch_size,) int64: the rows of global step ``step``."""
        return self.at(np.arange(step * batch_size, (step + 1) * batch_size))

    def at(self, places: np.ndarray) -> np.ndarray:
        """The rows at these places of the endless sequence of draws; ``places`` ascend."""
        out = np.empty(len(places), dtype=np.int64)
        for block in range(int(places[0]) // self._block, int(places[-1]) // self._block + 1):
            inside = places // self._block == block
            out[inside] = self._in_block(block, places[inside] - block * self._block)
        return out

    def _in_block(self, block: int, places: np.ndarray) -> np.ndarray:
        if len(self.lengths) == 1:
            return self._walk(0, block * self._block + places)
        sources, numbers = (found[places].astype(np.int64) for found in self._pattern(block))
        numbers += block * self.counts[sources]
        out = np.empty(len(places), dtype=np.int64)
        for source in np.unique(sources):
            mine = sources == source
            out[mine] = self._offsets[source] + self._walk(int(source), numbers[mine])
        return out

    def _walk(self, source: int, numbers: np.ndarray) -> np.ndarray:
        """Rows of the draws ``numbers`` of one source, counted from its first."""
        epochs, places = np.divmod(numbers, self.lengths[source])
        out = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            out[mine] = self._permutation(source, int(epoch))[places[mine]]
        return out

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        """The order of a source's rows in one of its epochs."""
        return self._keep((source, epoch), lambda: self._shuffled(source, epoch, np.arange(self.lengths[source])))

    def _pattern(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each draw of a block, and its number among the source's draws in it."""
        sources = self._keep((-1, block), lambda: self._shuffled(-1, block, self._plain()))
        return sources, self._keep((-2, block), lambda: _numbered(sources))

    def _plain(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def _shuffled(self, source: int, number: int, values: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng((self.seed, source + 1, number))
        # Half the memory of int64, which adds up: these are as long as the data.
        return rng.permutation(values.astype(np.int32 if values.size < 2**31 else np.int64))

    def _keep(self, key: tuple[int, int], make: Callable[[], np.ndarray]) -> np.ndarray:
        if key not in self._kept:
            self._kept[key] = make()
            while len(self._kept) > 2 * (len(self.lengths) + 2):
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def _numbered(sources: np.ndarray) -> np.ndarray:
    """How many equal values stand before each one."""
    order = np.argsort(sources, kind="stable")
    counts = np.bincount(sources)
    numbers = np.empty(len(sources), dtype=np.int32 if len(sources) < 2**31 else np.int64)
    numbers[order] = np.arange(len(sources)) - np.repeat(np.cumsum(counts) - counts, counts)
    return numbers


def _shares(weights: Sequence[float], sources: int) -> np.ndarray:
    """Whole draws of each source in a block, at least one, by largest remainder."""
    if len(weights) != sources or not all(0 < weight < float("inf") for weight in weights):
        raise SamplerError(f"weights {list(weights)}: expected {sources} positive numbers")
    exact = BLOCK * np.asarray(weights, dtype=np.float64) / sum(weights)
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    for place in np.argsort(counts - exact, kind="stable")[: max(0, BLOCK - int(counts.sum()))]:
        counts[place] += 1
    return counts
