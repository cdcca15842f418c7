"""From a checkpoint to the folder of an exported policy, verified, or to nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vla_core.checkpoint import Checkpoint
from vla_core.config import ConfigError
from vla_core.export import quantize, verify, writers
from vla_core.export.engines import library
from vla_core.export.feed import ExportError
from vla_core.export.graph import PolicyGraph, check_exportable, draws_of, example, output_ports
from vla_core.export.policy import ExportedPolicy
from vla_core.export.record import (
    FORMATS,
    GRAPHS,
    Agreement,
    Export,
    Format,
    Precision,
    Success,
    check_replaceable,
    digests,
    new_folder,
    versions,
    write_record,
)
from vla_core.runtime.policy import CheckpointPolicy

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "numpy")
Succeed = Callable[[Path], Success]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is asked for.

    ``bound``  on the largest error, as a share of an action's half range; None takes the precision's own
    ``opset``  of ONNX
    """

    kind: Format
    precision: Precision = "fp32"
    bound: float | None = None
    opset: int = writers.OPSET
    observations: int = verify.OBSERVATIONS

    def __post_init__(self) -> None:
        if self.kind not in FORMATS:
            raise ConfigError(f"--format: found {self.kind!r}, expected one of {', '.join(FORMATS)}")
        quantize.check_possible(self.kind, self.precision)
        if self.bound is not None and not 0 < self.bound < float("inf"):
            raise ConfigError(f"--bound: expected a positive number, found {self.bound}")

    @property
    def largest(self) -> float:
        """The largest error that is taken."""
        return quantize.BOUNDS[self.precision] if self.bound is None else self.bound


def export(
    checkpoint: Checkpoint, out: Path, options: ExportOptions, *, fingerprint: str = "", succeed: Succeed | None = None
) -> Export:
    """Write ``checkpoint`` as an exported policy to the folder ``out`` and return its record.

    The written graph answers observations beside the checkpoint; where it differs by more than ``options.largest``,
    :class:`ExportError` is raised and nothing is left. ``succeed`` measures both in simulation, of the folder.
    """
    check_replaceable(out)
    check_exportable(checkpoint)
    _check_weights(checkpoint, options)
    if options.kind == "tensorrt":
        library("tensorrt")
    with new_folder(out) as folder:
        record = _write(checkpoint, folder, options, fingerprint)
        record = dataclasses.replace(record, agreement=measure(checkpoint, folder, options))
        _check(record.agreement, options)
        write_record(folder, record)
        if succeed is not None:
            record = dataclasses.replace(record, success=succeed(folder))
            write_record(folder, record)
    return record


def measure(checkpoint: Checkpoint, folder: Path, options: ExportOptions) -> Agreement:
    """How far the graph in ``folder`` is from ``checkpoint``."""
    eager, exported = CheckpointPolicy(checkpoint), ExportedPolicy.load(folder)
    seen = verify.observations(checkpoint, options.observations)
    return verify.agreement(
        lambda observation: eager.predict(observation).actions, exported.answer, seen,
        verify.half_range(checkpoint), options.largest,
    )  # fmt: skip


def _check_weights(checkpoint: Checkpoint, options: ExportOptions) -> None:
    """ONNX has no convolution of bfloat16, and no engine here runs one; as float32 it would be another policy."""
    narrow = any(weight.dtype == torch.bfloat16 for weight in checkpoint.model.parameters())
    if narrow and options.kind != "torchscript":
        raise ExportError(f"--format {options.kind}: the model {checkpoint.config.model.type!r} has bfloat16 weights, "
                          "of which ONNX has no convolutions; choices: --format torchscript, or a checkpoint whose "
                          "dtype is float32")  # fmt: skip


def _check(found: Agreement, options: ExportOptions) -> None:
    if not found.max_error <= options.largest:  # NaN is no agreement
        raise ExportError(
            f"the {options.kind} graph in {options.precision} differs from the checkpoint by up to "
            f"{found.max_error:.3g} of an action's half range (mean {found.mean_error:.3g}), over {found.observations} "
            f"observations; expected at most {options.largest:g}; nothing was written"
            + ("" if options.precision == "fp32" else "; --bound takes more")
        )


def _write(checkpoint: Checkpoint, folder: Path, options: ExportOptions, fingerprint: str) -> Export:
    """Graph and parts; the record is not verified yet."""
    graph_file = folder / GRAPHS[options.kind]
    write_graph(checkpoint, graph_file, options)
    _write_json(folder / "statistics.json", checkpoint.normalizer.statistics)
    _write_json(folder / "tokenizer.json", checkpoint.tokenizer.to_dict())
    (folder / "contract.yaml").write_text(checkpoint.contract.to_yaml(), encoding="utf-8")
    exact = options.kind != "tensorrt"
    graph = PolicyGraph(checkpoint, draws_of(checkpoint), exact)
    record = Export(
        kind=options.kind, precision=options.precision, checkpoint=fingerprint,
        policy=dataclasses.replace(checkpoint.config, model=checkpoint.model.config), inputs=graph.ports,
        outputs=output_ports(checkpoint, exact), draws=graph.draws,
        agreement=Agreement(observations=0, mean_error=0.0, max_error=0.0, bound=options.largest),
        versions=versions(*PACKAGES), files=digests(folder),
    )  # fmt: skip
    write_record(folder, record)
    return record


def write_graph(checkpoint: Checkpoint, path: Path, options: ExportOptions) -> None:
    """The graph alone, at ``path``."""
    made = prepared(checkpoint, options)
    graph = PolicyGraph(made, draws_of(made), exact=options.kind != "tensorrt").eval()
    seen = verify.observations(checkpoint, 2, seed=1)[1]
    given = example(checkpoint, graph, seen)
    if options.kind == "torchscript":
        writers.write_torchscript(graph, given, path)
        return
    onnx = path if options.kind == "onnx" else path.with_suffix(".onnx")
    writers.write_onnx(graph, given, onnx, options.opset)
    if options.kind == "onnx" and options.precision in ("int8", "int4"):
        quantize.quantize_onnx(path, options.precision)
    if options.kind == "tensorrt":
        from vla_core.export.tensorrt_engine import build

        build(onnx, path, graph.ports, options.precision)
        for left in path.parent.glob(f"{onnx.name}*"):
            left.unlink()


def prepared(checkpoint: Checkpoint, options: ExportOptions) -> Checkpoint:
    """A copy of the checkpoint that an exporter may read and change, in torch's own precision where it has one."""
    if options.precision in ("bf16", "int8") and options.kind == "torchscript":
        model: Any = quantize.quantized_model(checkpoint.model, options.precision)
    else:
        model = copy.deepcopy(checkpoint.model)
    for weight in model.parameters():
        weight.requires_grad_(False)
    return dataclasses.replace(checkpoint, model=model.eval())


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
