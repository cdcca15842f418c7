"""While a model is written down as a graph, no shape and no branch may depend on the values that flow through it.

A model skips what nobody asks for, and keeps what it has computed. A graph can do neither: it is the same for every
observation. The few places that differ ask :func:`in_graph`; their answers are the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_in_graph: ContextVar[bool] = ContextVar("in_graph", default=False)


def in_graph() -> bool:
    """Whether the model that runs is being written down."""
    return _in_graph.get()


@contextmanager
def as_graph() -> Iterator[None]:
    """Within it, models run as they are to be written down."""
    before = _in_graph.set(True)
    try:
        yield
    finally:
        _in_graph.reset(before)
