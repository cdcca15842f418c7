"""The README's tree names every module and folder that there is, and nothing that there is not."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tree() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.split("## The tree")[1].split("```")[1]


def test_every_module_is_in_the_tree() -> None:
    words = set(re.findall(r"\w+", tree()))
    # "mlp_, gaussian_, … discrete_action_head" names six heads of one ending
    words |= {f"{word}action_head" for word in words if word.endswith("_")}
    modules = [path for package in ("vla_core", "vla_ros") for path in (ROOT / package).rglob("*.py")]
    absent = sorted({path.stem for path in modules if path.stem != "__init__"} - words)
    assert not absent, f"not in the README's tree: {absent}"


def test_every_file_and_folder_of_the_tree_exists() -> None:
    named = re.findall(r"(?<![\w/])((?:config|model|test|docs|msg|action|launch)/[\w/]*(?:\.py)?|\w+\.py)", tree())
    found = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for name in named:
        if name.endswith(".py") and "/" not in name:
            assert name in found, name
        else:
            assert (ROOT / name).exists() or (ROOT / "vla_core" / name).exists(), name
