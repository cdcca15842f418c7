"""What runs a graph: TorchScript, onnxruntime, TensorRT. Arrays in, the chunk out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_core.export.feed import ExportError, Port
from vla_core.export.record import GRAPHS, Export


class Engine(ABC):
    """A loaded graph."""

    @abstractmethod
    def run(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The chunk (H, A) of the inputs, in the order of the graph's ports."""


class TorchScriptEngine(Engine):
    """A frozen trace, as libtorch runs it in C++ as well.

    Without torch's profiling executor, which compiles anew where the number of words changes: for a tenth of a second,
    in the middle of a run.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._graph = torch.jit.load(str(path), map_location="cpu")
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"{path}: no TorchScript graph that this torch reads: {_first(error)}") from None

    @torch.no_grad()
    def run(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            found: Any = self._graph(*(torch.from_numpy(array) for array in arrays))
        chunk: np.ndarray = found.numpy()
        return chunk


class OnnxEngine(Engine):
    """onnxruntime on the CPU, or on a GPU where its build has one; as many threads as torch has."""

    def __init__(self, path: Path, ports: Sequence[Port]) -> None:
        ort = library("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin while they wait slow the robot's other processes down.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=ort.get_available_providers())
        except Exception as error:  # its own errors share no base
            raise ExportError(f"{path}: no ONNX graph that this onnxruntime runs: {_first(error)}") from None
        found = [port.name for port in self._session.get_inputs()]
        self._names = [port.name for port in ports]
        if set(found) != set(self._names):
            raise ExportError(f"{path}: the graph takes {found}, its record says {self._names}")

    def run(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        chunk: np.ndarray = self._session.run(None, dict(zip(self._names, arrays, strict=True)))[0]
        return chunk


def load_engine(folder: Path, record: Export) -> Engine:
    """The engine of an exported policy's folder."""
    return open_graph(folder / GRAPHS[record.kind], record.kind, record.inputs)


def open_graph(path: Path, kind: str, ports: Sequence[Port]) -> Engine:
    """The engine of a graph of ``kind``."""
    if kind == "torchscript":
        return TorchScriptEngine(path)
    if kind == "onnx":
        return OnnxEngine(path, ports)
    from vla_core.export.tensorrt_engine import TensorRTEngine

    return TensorRTEngine(path, ports)


def library(name: str) -> Any:
    """An optional package; raises :class:`ExportError` saying what to install."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        what = "pip install tensorrt, on a machine with an NVIDIA GPU" if name == "tensorrt" else (
            "pip install 'vla_ros[export]'")  # fmt: skip
        raise ExportError(f"{name} is not installed ({error}): {what}") from None


def _first(error: Exception) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
