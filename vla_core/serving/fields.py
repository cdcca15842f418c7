"""The fields of a message, and what each must be: an error names the key, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vla_core.errors import VlaError, choices
from vla_core.observation.spec import ObservationSpec

MAX_TEXT = 4096  # characters of an instruction: the longest of a batch sets the length of all
MAX_NAMES, MAX_NAME = 12, 80  # keys in an error, and characters of each
Shape = tuple[int | None, ...]


class MessageFormError(VlaError):
    """A message that does not say what it should: the key, what was found and what was expected."""


class Fields:
    """The fields of a message, taken one by one; :meth:`done` names those that nobody took."""

    def __init__(self, message: Any) -> None:
        if not isinstance(message, dict):
            raise MessageFormError(f"a message of type {type(message).__name__}; expected a mapping")
        self._fields: dict[str, Any] = {}
        for key, value in _flat(message):
            if key in self._fields:
                raise MessageFormError(f"{key}: given twice")
            self._fields[key] = value
        self.told = few(self._fields)  # which keys were given

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def take(self, key: str) -> Any:
        """The value of ``key``, whatever it is."""
        if key not in self._fields:
            raise MessageFormError(f"{key}: missing; keys given: {self.told}")
        return self._fields.pop(key)

    def array(self, key: str, dtypes: Sequence[str], shape: Shape) -> np.ndarray:
        """An array of one of ``dtypes`` (names, or kinds of one letter), with ``shape``; None is any length."""
        value = self.take(key)
        found = f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        fits = isinstance(value, np.ndarray) and len(value.shape) == len(shape)
        fits = fits and (value.dtype.name in dtypes or value.dtype.kind in dtypes)
        if not fits or any(b is not None and a != b for a, b in zip(value.shape, shape, strict=True)):
            sizes = ", ".join("any" if length is None else str(length) for length in shape)
            raise MessageFormError(f"{key}: found {found}, expected {_named(dtypes)} of shape ({sizes})")
        array: np.ndarray = value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))
        return array

    def text(self, key: str, longest: int = MAX_TEXT) -> str:
        """A text."""
        value = self.take(key)
        if not isinstance(value, str):
            raise MessageFormError(f"{key}: found {type(value).__name__}, expected a text")
        if len(value) > longest:
            raise MessageFormError(f"{key}: found {len(value)} characters, expected at most {longest}")
        return value

    def whole(self, key: str, low: int, high: int) -> int:
        """A whole number from ``low`` to below ``high``."""
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value < high:
            raise MessageFormError(f"{key}: found {str(value)[:40]}, expected a whole number from {low} to {high - 1}")
        return int(value)

    def number(self, key: str) -> float:
        """A finite number from 0 on."""
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise MessageFormError(f"{key}: found {type(value).__name__}, expected a number")
        if not 0 <= value < float("inf"):
            raise MessageFormError(f"{key}: found {value}, expected a finite number from 0 on")
        return float(value)

    def names(self, key: str, known: Sequence[str]) -> frozenset[str]:
        """A list of some of the ``known`` names."""
        value = self.take(key)
        if not isinstance(value, list) or not all(name in known for name in value if isinstance(name, str)):
            raise MessageFormError(f"{key}: found {str(value)[:80]}, expected a list of some of {choices(known)}")
        if not all(isinstance(name, str) for name in value):
            raise MessageFormError(f"{key}: found {str(value)[:80]}, expected a list of names")
        return frozenset(value)

    def done(self, hint: str = "") -> None:
        """Raise for what is left."""
        if self._fields:
            raise MessageFormError(f"{few(self._fields)}: unknown; {hint or 'leave it out'}")


def few(names: Iterable[str]) -> str:
    """The names for an error, the first ones of many."""
    listed = sorted(name[:MAX_NAME] for name in names)
    more = f" and {len(listed) - MAX_NAMES} more" if len(listed) > MAX_NAMES else ""
    return choices(listed[:MAX_NAMES]) + more


def picture(fields: Fields, key: str, spec: ObservationSpec, name: str) -> np.ndarray:
    """A picture (H, W, 3) uint8 of the size that the policy sees."""
    size = spec.images[name]
    return fields.array(key, ("uint8",), (size.height, size.width, 3))


def cloud(fields: Fields, key: str, columns: int, most: int) -> np.ndarray:
    """Points (N, ``columns``) float32, ``most`` of them or fewer."""
    points = fields.array(key, ("float32",), (None, columns))
    if len(points) > most:
        raise MessageFormError(f"{key}: found {len(points)} points, expected at most {most}")
    return points


def _flat(message: Mapping[Any, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of nested mappings, as ``images/cam_high``."""
    for key, value in message.items():
        name = f"{at}{key.decode('latin-1') if isinstance(key, bytes) else key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}/")
        else:
            yield name, value


def _named(dtypes: Sequence[str]) -> str:
    kinds = {"u": "whole numbers", "i": "signed numbers", "f": "floats"}
    return " or ".join(kinds.get(name, name) for name in dtypes)
