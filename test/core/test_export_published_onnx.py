"""Published policies, and the structures of the presets, as ONNX graphs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from vla_core.export.verify import observations

from .exported import check_alike, exported
from .test_export_published import MODELS, backbones, lerobot  # noqa: F401 - a fixture
from .whole_models import one_thread  # noqa: F401 - a fixture

FEW = {**MODELS, "smolvla": partial(lerobot, steps=1)}


@pytest.mark.parametrize("name", FEW)
def test_a_published_structure_is_a_graph(tmp_path: Path, name: str) -> None:
    made = FEW[name](tmp_path)
    check_alike(made, exported(tmp_path / "graph", made, "onnx"), observations(made, 6, seed=5))
