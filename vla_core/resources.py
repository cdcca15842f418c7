"""Where the shipped files (config/, launch/) lie, however the package was installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "vla_ros"


def share(relative: str) -> Path:
    """The path of a shipped file or folder, such as `share("config/train/mini_vla.yaml")`.

    Looks in the source checkout that holds this file, then in `share/vla_ros` of the prefix that
    it is installed in (pip and colcon alike), then in the prefixes of AMENT_PREFIX_PATH.

    Raises:
        FileNotFoundError: naming every place that was looked at.
    """
    candidates = [root / relative for root in _roots()]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    places = ", ".join(str(candidate) for candidate in candidates)
    raise FileNotFoundError(f"{relative} is not among the files shipped with {PACKAGE}; looked at {places}")


def _roots() -> Iterator[Path]:
    checkout = Path(__file__).parent.parent
    if (checkout / "package.xml").is_file():
        yield checkout
    # <prefix>/lib/python3.x/site-packages/vla_core/resources.py, and <folder>/vla_core/resources.py
    # after `pip install --target`: the first share/vla_ros on the way up belongs to this install.
    for parent in Path(__file__).parents[1:]:
        if (parent / "share" / PACKAGE).is_dir():
            yield parent / "share" / PACKAGE
            break
    for prefix in filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)):
        yield Path(prefix) / "share" / PACKAGE
