"""Whole models as ONNX graphs: memory, and maps of any size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vla_core.export.verify import observations

from .exported import check_alike, exported
from .test_export_models import MODELS
from .whole_models import one_thread  # noqa: F401 - a fixture


@pytest.mark.parametrize("name", ["memory", "range-Doppler map"])
def test_a_model_is_a_graph(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    made = MODELS[name]()
    check_alike(made, exported(tmp_path / "graph", made, "onnx"), observations(made, 6, seed=5))
