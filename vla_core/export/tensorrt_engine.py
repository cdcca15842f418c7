"""TensorRT: an engine built from an ONNX graph, for the GPU of the machine that builds it, and what runs it.

Against TensorRT 10's Python API. Memory on the GPU is torch's; without a GPU, or without the package, nothing here runs
and the error says what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_core.export.engines import Engine, library
from vla_core.export.feed import MIN_WORDS, WORDS, ExportError, Port
from vla_core.export.record import Precision

WORKSPACE = 2 << 30  # bytes that TensorRT may try kernels in
USUAL_WORDS, MOST_WORDS, MOST_SIDE = 16, 128, 1024  # of free sizes: an engine is built for a range of them


def build(onnx: Path, path: Path, ports: Sequence[Port], precision: Precision) -> None:
    """Build the engine of the ONNX file at ``onnx`` into ``path``; raises :class:`ExportError` with TensorRT's reasons.

    The engine runs on this kind of GPU and this version of TensorRT alone.
    """
    trt = _tensorrt()
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ExportError(f"TensorRT {trt.__version__} does not take the graph: {reasons}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.clear_flag(trt.BuilderFlag.TF32)  # ten bits of mantissa do not agree to 1e-4
    if precision == "bf16":
        config.set_flag(trt.BuilderFlag.BF16)
    profile = builder.create_optimization_profile()
    for port in ports:
        if any(isinstance(size, str) for size in port.shape):
            profile.set_shape(port.name, *(_shape(port, k) for k in range(3)))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f"TensorRT {trt.__version__} built no engine; its log says why")
    path.write_bytes(bytes(engine))


class TensorRTEngine(Engine):
    """A built engine on the GPU; the arrays go there and the chunk comes back."""

    def __init__(self, path: Path, ports: Sequence[Port]) -> None:
        trt = _tensorrt()
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ExportError(f"{path}: no engine for this GPU and TensorRT {trt.__version__}; export it here")
        self._context = self._engine.create_execution_context()
        self._ports = tuple(ports)
        self._stream = torch.cuda.Stream()

    @torch.no_grad()
    def run(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        with torch.cuda.stream(self._stream):
            held = [torch.from_numpy(array).cuda(non_blocking=True) for array in arrays]  # until the stream is done
            for port, tensor in zip(self._ports, held, strict=True):
                self._context.set_input_shape(port.name, tuple(tensor.shape))
                self._context.set_tensor_address(port.name, tensor.data_ptr())
            out = torch.empty(tuple(self._context.get_tensor_shape("actions")), dtype=torch.float32, device="cuda")
            self._context.set_tensor_address("actions", out.data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise ExportError("TensorRT did not run the graph; its log says why")
            chunk: np.ndarray = out.cpu().numpy()
        return chunk


def _tensorrt() -> Any:
    trt = library("tensorrt")
    if not torch.cuda.is_available():
        raise ExportError("TensorRT needs an NVIDIA GPU that torch sees; found none")
    return trt


def _shape(port: Port, which: int) -> tuple[int, ...]:
    """The least (0), the usual (1) and the largest (2) shape of an input."""
    words, sides = (MIN_WORDS, USUAL_WORDS, MOST_WORDS), (1, MOST_SIDE // 4, MOST_SIDE)
    return tuple(size if isinstance(size, int) else (words if size == WORDS else sides)[which] for size in port.shape)
