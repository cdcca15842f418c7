"""``vla export``: its arguments and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vla_core.cli import not_negative, positive
from vla_core.errors import VlaError

if TYPE_CHECKING:
    from vla_core.checkpoint import Checkpoint
    from vla_core.export.record import Export, Success

GRAPHS = ("torchscript", "onnx", "tensorrt")
PUBLISHED = ("openvla", "lerobot")  # layouts that other projects read
PRECISIONS = ("fp32", "bf16", "int8", "int4")
EPISODES, FIRST_SEED = 20, 10_000


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``export`` to a parser."""
    parser = commands.add_parser("export", help="a checkpoint as a graph, or in the layout of other projects")
    parser.add_argument("checkpoint", help="a folder, or a hub's user/name")
    parser.add_argument(
        "--format", choices=(*GRAPHS, *PUBLISHED), required=True,
        help="a graph that runs in the checkpoint's place, or the files that OpenVLA or LeRobot read",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder to create; an older export there is replaced")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32",
        help="of weights: bf16 (torchscript, tensorrt), int8 (torchscript, onnx), int4 (onnx)",
    )  # fmt: skip
    parser.add_argument("--bound", type=float, metavar="SHARE",
                        help="largest difference from the checkpoint, of an action's half range; default: fp32 1e-4, "
                        "bf16 0.05, int8 0.1, int4 0.25")  # fmt: skip
    parser.add_argument("--opset", type=positive, help="of ONNX, default 20")
    parser.add_argument("--execution", nargs="+", default=[], metavar="key=value",
                        help="changes to how chunks are executed, such as strategy=blend instead of rtc")  # fmt: skip
    parser.add_argument("--dataset", help="whose statistics a policy takes that was trained on a mixture")
    parser.add_argument("--task", help="a simulated world, such as push-v3: success of checkpoint and graph")
    parser.add_argument("--episodes", type=positive, default=EPISODES, help=f"of --task, default {EPISODES}")
    parser.add_argument(
        "--seed", type=not_negative, default=FIRST_SEED, help=f"of the first episode of --task, default {FIRST_SEED}"
    )
    parser.set_defaults(run=_export)


def _export(parsed: argparse.Namespace) -> int:
    from vla_core import hub

    folder = hub.local_folder(parsed.checkpoint)
    if parsed.format in PUBLISHED:
        return _publish(parsed, folder)
    from vla_core.checkpoint import fingerprint
    from vla_core.export.exporter import ExportOptions, export
    from vla_core.export.writers import OPSET

    if parsed.opset is not None and parsed.format == "torchscript":
        raise VlaError("--opset: belongs to onnx and tensorrt")
    options = ExportOptions(
        kind=parsed.format, precision=parsed.precision, bound=parsed.bound, opset=parsed.opset or OPSET
    )
    checkpoint = _changed(parsed, folder)

    def succeed(exported: Path) -> Success:
        from vla_core.export.record import Success
        from vla_core.export.success import success

        places = {"checkpoint": parsed.checkpoint, "graph": exported}
        return Success(
            task=parsed.task, episodes=parsed.episodes, **success(places, parsed.task, parsed.episodes, parsed.seed)
        )

    record = export(checkpoint, parsed.out, options, fingerprint=fingerprint(folder),
                    succeed=succeed if parsed.task else None)  # fmt: skip
    print("\n".join([f"{parsed.out}: {record.kind} in {record.precision}, {_size(parsed.out)}", *_figures(record)]))
    return 0


def _changed(parsed: argparse.Namespace, folder: Path) -> Checkpoint:
    """The checkpoint with the execution that is asked for."""
    import dataclasses

    from vla_core.checkpoint import Checkpoint
    from vla_core.config import override

    checkpoint = Checkpoint.load(folder, dataset=parsed.dataset)
    execution = checkpoint.config.execution.changed(override({}, parsed.execution))
    return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, execution=execution))


def _publish(parsed: argparse.Namespace, folder: Path) -> int:
    """Files that another project reads, by whom knows its layout."""
    from vla_core.checkpoint import Checkpoint

    given = [name for name in ("bound", "opset", "task") if getattr(parsed, name) is not None]
    given += [name for name, default in (("precision", "fp32"), ("execution", [])) if getattr(parsed, name) != default]
    if given:
        raise VlaError(f"--{given[0]}: belongs to graphs ({', '.join(GRAPHS)}), not to {parsed.format}")
    checkpoint = Checkpoint.load(folder, dataset=parsed.dataset)
    if parsed.format == "openvla":
        from vla_core.pretrained import openvla

        openvla.save(checkpoint, parsed.out)
    else:
        from vla_core.pretrained import smolvla

        smolvla.save(checkpoint, parsed.out)
    print(f"{parsed.out}: written in the layout of {parsed.format}, {_size(parsed.out)}")
    return 0


def _size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.1f} MB"


def _figures(record: Export) -> list[str]:
    found = record.agreement
    lines = [
        f"differs from the checkpoint by {found.mean_error:.2g} of an action's half range in the mean, "
        f"{found.max_error:.2g} at most, over {found.observations} observations (bound {found.bound:g})"
    ]
    if record.success is not None:
        did = record.success
        lines.append(f"success on {did.task}, {did.episodes} episodes: checkpoint {did.checkpoint:.2f}, "
                     f"graph {did.graph:.2f}")  # fmt: skip
    return lines
