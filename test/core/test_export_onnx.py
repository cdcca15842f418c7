"""Every head as an ONNX graph in onnxruntime; those of many nodes are in ``test_export_onnx_long``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from .exported import HEADS, asked, check_alike, exported, policy
from .whole_models import one_thread  # noqa: F401 - a fixture

LONG = ("diffusion transformer, guided", "flow transformer", "transformer", "transformer, bins",
        "transformer, bins, sampled", "ddpm, v")  # fmt: skip


@pytest.mark.parametrize("name", [name for name in HEADS if name not in LONG])
def test_a_head_is_a_graph(tmp_path: Path, name: str) -> None:
    made = policy(name)
    found = exported(tmp_path / "graph", made, "onnx")
    assert found.record.agreement.max_error < 1e-5, "float32 rounds near 1e-7"
    check_alike(made, found, asked())


def test_the_graph_says_what_it_takes(tmp_path: Path) -> None:
    """Names, types and free sizes of the file itself are those of the record, so that others can run it, too."""
    found = exported(tmp_path / "graph", policy("flow"), "onnx")
    session = ort.InferenceSession(str(tmp_path / "graph" / "policy.onnx"))
    kinds = {"tensor(uint8)": "uint8", "tensor(bool)": "bool", "tensor(float)": "float32", "tensor(int64)": "int64"}
    inputs = {port.name: (kinds[port.type], [s if isinstance(s, int) else "free" for s in port.shape])
              for port in session.get_inputs()}  # fmt: skip
    assert inputs == {
        port.name: (port.dtype, ["free" if isinstance(s, str) else s for s in port.shape])
        for port in found.record.inputs
    }
    (output,) = session.get_outputs()
    assert (output.name, output.type, output.shape) == ("actions", "tensor(double)", [4, 2])
    assert inputs["tokens"] == ("int64", [1, "free"]) and inputs["noise"] == ("float32", [8])
    assert np.isfinite(found.predict(asked()[0]).actions).all()
