"""The token that a server asks for, from a file: a parameter or an argument would be seen by everybody."""

from __future__ import annotations

from pathlib import Path

from vla_core.errors import VlaError

TOKEN_VARIABLE = "VLA_TOKEN_FILE"


def read_token(path: Path | str | None) -> str:
    """The token in a file, empty without one; raises :class:`VlaError` for an empty file or none."""
    if path is None:
        return ""
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise VlaError(f"token file {path}: {error}") from None
    if not token or not token.isascii() or not token.isprintable():
        raise VlaError(f"token file {path}: expected one line of printable ASCII")
    return token
