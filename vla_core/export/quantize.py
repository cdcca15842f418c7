"""Fewer bits: bfloat16, dynamic int8 and int4 weights, where the engine has operators for them.

``bf16``  weights and activations in bfloat16; normalization and actions stay as they are. TorchScript and TensorRT
``int8``  weights in int8, activations quantized as they come (dynamic): TorchScript by torch, ONNX by onnxruntime
``int4``  weights of matrix products in int4 by blocks, activations in float32: ONNX's MatMulNBits (onnxruntime)
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_core.export.engines import library
from vla_core.export.feed import ExportError
from vla_core.export.record import PRECISIONS, Format, Precision

# Largest errors, as shares of an action's half range, that are taken without asking.
BOUNDS: dict[Precision, float] = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.1, "int4": 0.25}
POSSIBLE: dict[Format, tuple[Precision, ...]] = {
    "torchscript": ("fp32", "bf16", "int8"), "onnx": ("fp32", "int8", "int4"), "tensorrt": ("fp32", "bf16"),
}  # fmt: skip
BLOCK = 32  # weights that share a scale in int4
INT8_OPERATORS = ("MatMul", "Gemm")


def check_possible(kind: Format, precision: Precision) -> None:
    """Raise :class:`ExportError` where the engine of ``kind`` has no operators of ``precision``."""
    if precision not in PRECISIONS:
        raise ExportError(f"--precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if precision not in POSSIBLE[kind]:
        others = [name for name, has in POSSIBLE.items() if precision in has]
        raise ExportError(f"--precision {precision}: {kind} on this machine has no operators for it; it has "
                          f"{', '.join(POSSIBLE[kind])}; {precision} has: {', '.join(others)}")  # fmt: skip


def quantized_model(model: nn.Module, precision: Precision) -> nn.Module:
    """A copy of ``model`` with torch's operators of ``precision``: bf16 or int8."""
    copied = copy.deepcopy(model).eval()
    if precision == "bf16":
        return copied.to(torch.bfloat16)
    if torch.backends.quantized.engine == "none":
        raise ExportError("--precision int8: this build of torch has no int8 operators; choices: --format onnx")
    for name, part in [found for found in copied.named_modules() if type(found[1]) is nn.Linear]:
        owner, _, attribute = name.rpartition(".")
        setattr(copied.get_submodule(owner), attribute, Int8Linear(part))
    return copied


class Int8Linear(nn.Linear):
    """A linear layer that computes in int8, and shows its float32 weights to who asks for their type."""

    def __init__(self, part: nn.Linear) -> None:
        super().__init__(part.in_features, part.out_features, part.bias is not None)
        self.weight, self.bias = part.weight, part.bias
        dynamic = torch.ao.nn.quantized.dynamic.Linear
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            part.qconfig = torch.ao.quantization.per_channel_dynamic_qconfig  # type: ignore[assignment]
            self.int8 = dynamic.from_float(part)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.int8(x)
        return out


def quantize_onnx(path: Path, precision: Precision) -> None:
    """Replace the float32 graph at ``path`` by one of ``precision``: int8 or int4."""
    onnx = library("onnx")
    library("onnxruntime")
    model = onnx.load(str(path))
    # What the exporter knew of shapes is of no use any more, and confuses the quantizers where it was symbolic.
    del model.graph.value_info[:]
    done = _int8(model) if precision == "int8" else _int4(model)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    onnx.save(done, str(path), save_as_external_data=done.ByteSize() > 1_900_000_000, location=f"{path.name}.data")


def _int8(model: Any) -> Any:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnx = library("onnx")
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "int8.onnx"
        quantize_dynamic(
            model, str(out), op_types_to_quantize=list(INT8_OPERATORS), per_channel=True,
            weight_type=QuantType.QInt8, extra_options={"MatMulConstBOnly": True, "DefaultTensorType": 1},
        )  # fmt: skip
        return onnx.load(str(out))


def _int4(model: Any) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    _plain_products(model)
    quantizer = MatMulNBitsQuantizer(model, bits=4, block_size=BLOCK, is_symmetric=True)
    quantizer.process()
    done = quantizer.model.model
    if not any(node.op_type == "MatMulNBits" for node in done.graph.node):
        raise ExportError("--precision int4: the graph has no product with constant weights; choices: fp32, int8")
    return done


def _plain_products(model: Any) -> None:
    """Every Gemm with constant weights as a MatMul and an Add: the quantizer knows no other product."""
    onnx = library("onnx")
    constants = {each.name: each for each in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        settings = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        plain = settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0 and not settings.get("transA")
        if node.op_type != "Gemm" or not plain or node.input[1] not in constants:
            nodes.append(node)
            continue
        weights = onnx.numpy_helper.to_array(constants[node.input[1]])
        name = f"{node.output[0]}/weights"
        turned = np.ascontiguousarray(weights.T if settings.get("transB") else weights)
        model.graph.initializer.append(onnx.numpy_helper.from_array(turned, name))
        biased = len(node.input) > 2
        product = f"{node.output[0]}/product" if biased else node.output[0]
        nodes.append(onnx.helper.make_node("MatMul", [node.input[0], name], [product], name=f"{node.name}/product"))
        if biased:
            nodes.append(onnx.helper.make_node("Add", [product, node.input[2]], [node.output[0]], name=node.name))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input} | {port.name for port in model.graph.output}
    kept = [each for each in model.graph.initializer if each.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
