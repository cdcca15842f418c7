"""Checks that the configs of several parts of a model share."""

from __future__ import annotations

from typing import Any

from vla_core.config import ConfigError


def at_least_one(config: Any, *names: str) -> None:
    """Raise :class:`ConfigError` where a field of ``names``, a number or a tuple of numbers, is below 1 or empty."""
    for name in names:
        value = getattr(config, name)
        if not value or min(value if isinstance(value, tuple) else (value,)) < 1:
            found = list(value) if isinstance(value, tuple) else value
            raise ConfigError(f"{name}: expected at least 1, found {found}")


def divides(config: Any, part: str, whole: str) -> None:
    """Raise :class:`ConfigError` unless field ``part`` divides field ``whole``."""
    if getattr(config, whole) % getattr(config, part):
        raise ConfigError(f"{part}: expected a divisor of {whole} ({getattr(config, whole)}), "
                          f"found {getattr(config, part)}")  # fmt: skip
