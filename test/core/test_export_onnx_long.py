"""The heads whose ONNX graphs have many nodes: attention, and steps that are written one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from .exported import asked, check_alike, exported, policy
from .test_export_onnx import LONG
from .whole_models import one_thread  # noqa: F401 - a fixture


@pytest.mark.parametrize("name", LONG)
def test_a_head_is_a_graph(tmp_path: Path, name: str) -> None:
    made = policy(name)
    found = exported(tmp_path / "graph", made, "onnx")
    assert found.record.agreement.max_error < 1e-5, "float32 rounds near 1e-7"
    check_alike(made, found, asked())
