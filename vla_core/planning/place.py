"""Where a planner is: what tells it from a checkpoint and from a server, without loading anything."""

from __future__ import annotations

from pathlib import Path

import yaml

FILE = "planner.yaml"


def find_setup(place: Path | str) -> Path | None:
    """The file of a planner at ``place``, itself or in a folder; None where there is none."""
    path = Path(place)
    if path.is_dir():
        return path / FILE if (path / FILE).is_file() else None
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return None
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None  # whoever reads it says what is wrong with it
    return path if isinstance(data, dict) and data.get("type") == "planner" else None
