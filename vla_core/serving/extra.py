"""What the extra `serve` installs."""

from __future__ import annotations

import importlib

from vla_core.errors import VlaError


def need(*names: str) -> None:
    """Raise :class:`VlaError` where a package cannot be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise VlaError(f"a policy server needs {name} ({error}): pip install 'vla_ros[serve]'") from None
