"""ONNX graphs of fewer bits, and the one of a car with every sensor."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch

from vla_core.export.verify import observations

from .exported import asked, check_alike, exported, policy
from .test_export_models import car
from .whole_models import one_thread  # noqa: F401 - a fixture


def test_fewer_bits_and_the_operators_that_have_them(tmp_path: Path) -> None:
    made = policy("mlp")
    for precision, operator, most in (("int8", "MatMulInteger", 0.1), ("int4", "MatMulNBits", 0.25)):
        found = exported(tmp_path / precision, made, "onnx", precision=precision)
        graph = onnx.load(str(tmp_path / precision / "policy.onnx")).graph
        assert operator in {node.op_type for node in graph.node}
        assert 1e-5 < found.record.agreement.max_error < most
        check_alike(made, found, asked(), tolerance=most)


def test_a_car_is_a_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = car()
    check_alike(made, exported(tmp_path / "graph", made, "onnx"), observations(made, 6, seed=5))
