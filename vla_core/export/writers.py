"""A policy's graph as a file: TorchScript by tracing, ONNX by torch's exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_core.export.engines import library
from vla_core.export.feed import ExportError
from vla_core.export.graph import PolicyGraph, free_sizes

OPSET, LEAST_OPSET = 20, 18
MAX_PROTOBUF = 1_900_000_000  # bytes of weights from which on they go into a file of their own


def write_torchscript(graph: PolicyGraph, example: tuple[Tensor, ...], path: Path) -> None:
    """Trace and freeze: the weights become constants."""
    with torch.no_grad(), _quiet():
        traced = torch.jit.trace(graph, example, check_trace=False)
        torch.jit.freeze(traced.eval()).save(str(path))


def write_onnx(graph: PolicyGraph, example: tuple[Tensor, ...], path: Path, opset: int = OPSET) -> None:
    """Export with a free number of words, and of rows and columns of maps; the weights are in the file, or beside it.

    Raises :class:`ExportError` for what ONNX cannot say.
    """
    if opset < LEAST_OPSET:
        raise ExportError(f"--opset: found {opset}, expected at least {LEAST_OPSET}")
    library("onnx")
    from vla_core.export.onnx_operators import translations

    try:
        with torch.no_grad(), _quiet():
            names = [port.name for port in graph.ports]
            program: Any = torch.onnx.export(
                graph, example, dynamo=True, opset_version=opset, verbose=False, input_names=names,
                output_names=["actions"], dynamic_shapes=(free_sizes(graph.ports),),
                custom_translation_table=translations(opset),
            )  # fmt: skip
            size = sum(each.numel() * each.element_size() for each in graph.parameters())
            program.save(str(path), external_data=size > MAX_PROTOBUF)
    except Exception as error:  # torch's own, whose kinds change from version to version
        raise ExportError(f"the model cannot be said in ONNX of opset {opset}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The innermost cause, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own future, and on shapes that are meant to be fixed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
