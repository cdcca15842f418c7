"""The folder of an exported policy, and its ``export.json``: what is in the graph and what was measured of it.

Beside it lie the graph, ``tokenizer.json``, ``contract.yaml`` and ``statistics.json``. A folder is written beside its
place and moved there whole; one whose files are not those that were written does not load.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vla_core.checkpoint import PolicyConfig
from vla_core.config import ConfigError, from_dict, to_dict
from vla_core.export.feed import ExportError, Port
from vla_core.model.action_head.draws import Draw

Format = Literal["torchscript", "onnx", "tensorrt"]
Precision = Literal["fp32", "bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("torchscript", "onnx", "tensorrt")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8", "int4")
GRAPHS: dict[Format, str] = {"torchscript": "policy.pt", "onnx": "policy.onnx", "tensorrt": "policy.engine"}
FILE = "export.json"
PARTS = ("tokenizer.json", "contract.yaml", "statistics.json")
EXPORT_FORMAT = "vla_ros_export_v1"
DIGITS = 12  # of a fingerprint


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the graph's actions are from those of the checkpoint in float32, as shares of each action's half range.

    Over ``observations``; ``bound`` is what the largest error was held to.
    """

    observations: int
    mean_error: float
    max_error: float
    bound: float


@dataclass(frozen=True, kw_only=True)
class Success:
    """Share of ``episodes`` of ``task`` that succeed in simulation, with the checkpoint and with the graph."""

    task: str
    episodes: int
    checkpoint: float
    graph: float


@dataclass(frozen=True, kw_only=True)
class Export:
    """``export.json``: ``files`` are the SHA-256 of all others, ``checkpoint`` the fingerprint of the weights."""

    format: str = EXPORT_FORMAT
    kind: Format
    precision: Precision
    checkpoint: str
    policy: PolicyConfig
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    draws: tuple[Draw, ...]
    agreement: Agreement
    success: Success | None = None
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """First digits of the graph's hash."""
        return self.files[GRAPHS[self.kind]][:DIGITS]


def is_export(path: Path) -> bool:
    """Whether ``path`` is the folder of an exported policy, whole or not."""
    return (path / FILE).is_file()


def read_record(path: Path) -> Export:
    """``export.json`` of the folder ``path``, whose files are there as they were written.

    Raises :class:`ExportError` naming what is missing, damaged or foreign.
    """
    file = path / FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{path}: not an exported policy: {FILE} missing; `vla export` writes one") from None
    except ValueError as error:  # not UTF-8, not JSON
        raise ExportError(f"{file}: not valid JSON: {error}") from None
    found = data.get("format") if isinstance(data, dict) else type(data).__name__
    if found != EXPORT_FORMAT:
        raise ExportError(f"{file}: has format {found!r}, expected {EXPORT_FORMAT!r}")
    try:
        record = from_dict(Export, data)
    except ConfigError as error:
        raise ExportError(f"{file}: {error}") from None
    _check_files(path, record)
    return record


def write_record(path: Path, record: Export) -> None:
    """Write ``export.json``."""
    (path / FILE).write_text(json.dumps(to_dict(record), indent=1), encoding="utf-8")


def digests(path: Path) -> dict[str, str]:
    """The SHA-256 of all files of a folder but ``export.json``, by name."""
    return {file.name: _digest(file) for file in sorted(path.iterdir()) if file.name != FILE}


def check_replaceable(path: Path) -> None:
    """Raise :class:`ExportError` unless an exported policy can be written at ``path``."""
    if not path.name or (path.exists() and not is_export(path)):
        raise ExportError(f"{path}: exists and is no exported policy; name a new folder, or one with such a policy")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``path`` at the end; an error leaves what was there before."""
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_files(path: Path, record: Export) -> None:
    needed = {*PARTS, GRAPHS[record.kind]}
    unnamed = sorted(needed - set(record.files))
    if unnamed:
        raise ExportError(f"{path}/{FILE}: files lack {', '.join(unnamed)}")
    odd = [name for name in record.files if Path(name).name != name]
    if odd:
        raise ExportError(f"{path}/{FILE}: {odd[0]!r} is no name of a file in the folder")
    absent = [name for name in record.files if not (path / name).is_file()]
    if absent:
        raise ExportError(f"{path}: not a whole exported policy: {', '.join(absent)} missing")
    changed = [name for name, digest in record.files.items() if _digest(path / name) != digest]
    if changed:
        raise ExportError(f"{path}: damaged or changed since it was exported and verified: {', '.join(changed)}; "
                          "export it again")  # fmt: skip


def _digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages, by name."""
    from importlib import metadata

    found: dict[str, Any] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
