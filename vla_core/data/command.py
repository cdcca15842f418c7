"""``vla convert``: its arguments and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path

from vla_core.cli import positive

RECIPE = "mini_vla"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``convert`` to a parser."""
    convert = commands.add_parser("convert", help="bags, or a LeRobot dataset, to a dataset")
    convert.add_argument("inputs", type=Path, nargs="+", metavar="bags", help="bags, folders of bags, or one dataset")
    convert.add_argument("--out", type=Path, required=True, help="dataset folder to create")
    convert.add_argument("--recipe", help="its observation decides what the dataset holds; default for bags: mini_vla")
    convert.add_argument(
        "--contract", help="a name in config/robots, or a file; default: the one in the bags. It makes a dataset of "
        "others one of ours",
    )  # fmt: skip
    convert.add_argument("--keep-failed", action="store_true", help="keep episodes that are marked as failed")
    convert.add_argument("--version", default="v3.0", help="of LeRobotDataset: v3.0 or v2.1")
    convert.add_argument(
        "--video", nargs="?", const="h264", metavar="CODEC",
        help="pictures as videos, smaller and with loss: h264 or av1; default: PNGs, bit for bit what the robot sees",
    )  # fmt: skip
    convert.add_argument("--crf", type=int, help="quality of the videos, lower is better and larger; default 23")
    convert.add_argument("--workers", type=positive, help="processes; default: the cores of this machine")
    convert.add_argument("--ray", action="store_true", help="run them on Ray, on the cluster that it is configured for")
    convert.add_argument(
        "--on-bad", choices=("stop", "skip"), default="stop", help="what a damaged or incomplete bag leads to"
    )
    convert.add_argument(
        "--min-match", type=float, metavar="SHARE", help="least share of ticks at which every stream must be there"
    )
    convert.add_argument(
        "--max-error-ms", type=float, metavar="MS", help="largest distance in time between a tick and its sample"
    )
    convert.add_argument(
        "--max-lost", type=float, default=0.05, metavar="SHARE",
        help="largest share of a topic's messages that may be too late to be sorted, or from the future; default 0.05",
    )  # fmt: skip
    convert.add_argument(
        "--restart", action="store_true", help="do not go on from what an interrupted conversion has done"
    )
    convert.set_defaults(run=_convert)


def _convert(parsed: argparse.Namespace) -> int:
    from vla_core.contract import RobotContract
    from vla_core.data.bag import find_bags
    from vla_core.data.convert import ConvertError, convert
    from vla_core.data.lerobot.video import VideoOptions
    from vla_core.data.reconvert import is_dataset
    from vla_core.data.report import Thresholds
    from vla_core.progress import bar
    from vla_core.training.recipe import load_recipe

    if any(map(is_dataset, parsed.inputs)):
        return _reconvert(parsed)
    if parsed.crf is not None and parsed.video is None:
        raise ConvertError("--crf: belongs to --video")
    video = None
    if parsed.video is not None:
        video = VideoOptions(codec=parsed.video, **({} if parsed.crf is None else {"crf": parsed.crf}))
    spec = load_recipe(parsed.recipe or RECIPE).observation
    contract = RobotContract.load(parsed.contract) if parsed.contract else None
    bags = find_bags(parsed.inputs)
    with bar("convert", len(bags)) as advance:
        done = convert(
            bags, parsed.out, spec, contract, keep_failed=parsed.keep_failed, version=parsed.version, video=video,
            workers=parsed.workers, ray=parsed.ray, on_bad=parsed.on_bad, resume=not parsed.restart,
            thresholds=Thresholds(min_match=parsed.min_match, max_error_ms=parsed.max_error_ms,
                                  max_lost=parsed.max_lost),
            progress=lambda done: advance(done, "bags"),
        )  # fmt: skip
    print(done.report.table())
    print(f"{parsed.out}: {done.report.episodes} episodes, {done.report.frames} ticks")
    return 0


def _reconvert(parsed: argparse.Namespace) -> int:
    from vla_core.contract import RobotContract
    from vla_core.data.convert import ConvertError
    from vla_core.data.reconvert import reconvert
    from vla_core.progress import bar
    from vla_core.training.recipe import load_recipe

    if len(parsed.inputs) > 1:
        raise ConvertError(f"{len(parsed.inputs)} inputs with a dataset among them; a dataset is converted by itself")
    if parsed.video is not None:
        raise ConvertError("--video: belongs to bags; a dataset keeps its pictures as they are")
    contract = RobotContract.load(parsed.contract) if parsed.contract else None
    spec = load_recipe(parsed.recipe).observation if parsed.recipe else None
    with bar("convert", 100) as advance:
        told = reconvert(
            parsed.inputs[0], parsed.out, version=parsed.version, contract=contract, spec=spec,
            progress=lambda done, total: advance(100 * done // total, f"{done} of {total} episodes"),
        )  # fmt: skip
    print(f"{parsed.out}: {told}")
    return 0
