"""What is in a bag, a dataset or a checkpoint, and what of it is doubtful: as text or as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vla_core import hub
from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.inspect.report import Report, aligned, overview, text

STORAGE = ("*.mcap", "*.db3", "metadata.yaml")
MANY = 8  # reports, of which a terminal shows the overview and the warnings alone


def describe(path: Path) -> str:
    """Describe whatever ``path`` is; raises when it is none of the three."""
    return "\n\n".join(map(text, inspect([path], pictures=False)))


def inspect(paths: Sequence[Path], contract: RobotContract | None = None, pictures: bool = True) -> list[Report]:
    """A report for each dataset, checkpoint and bag that ``paths`` name or hold.

    Of several, one that cannot be read is a report that says so; a single one raises.

    Args:
        contract: for bags that have none inside.
        pictures: also make plots and contact sheets.
    """
    found = [each for path in paths for each in _inside(path)]
    reports = []
    for path in found:
        try:
            reports.append(_one(path, contract, pictures))
        except VlaError as error:
            if len(found) == 1:
                raise
            reports.append(Report(_kind(path) or "bag", str(path), "cannot be read", warnings=[str(error)]))
    return reports


def summary(reports: Sequence[Report]) -> str:
    """All reports for a terminal: of several an overview comes first, of many nothing but their warnings follows."""
    if len(reports) == 1:
        return text(reports[0])
    head = "\n".join(aligned(overview(reports)))
    if len(reports) <= MANY:
        return "\n\n".join([head, *map(text, reports)])
    warned = [f"{report.path}: {line}" for report in reports for line in report.warnings]
    return "\n".join([head, "", "warnings:", *(f"  {line}" for line in warned or ["none"])])


def _inside(path: Path) -> list[Path]:
    """The folders to look at: ``path`` itself, what is in the local cache of a hub, or all that lie below it."""
    folder = path if path.exists() else hub.any_folder(str(path))
    if not folder.exists():
        raise VlaError(f"{path}: no such file or folder")
    if not folder.is_dir():
        raise VlaError(f"{path}: neither a bag, a dataset nor a checkpoint (all of these are folders)")
    if _kind(folder):
        return [folder]
    below = sorted(each for each in folder.iterdir() if each.is_dir() and _kind(each))
    if not below:
        raise VlaError(f"{path}: no bag, dataset or checkpoint here or in the folders below it")
    return below


def _kind(folder: Path) -> Literal["checkpoint", "dataset", "bag", ""]:
    if (folder / "config.json").is_file() or (folder / "model.safetensors").is_file():
        return "checkpoint"
    if (folder / "meta" / "info.json").is_file() or (folder / "dataset.json").is_file():
        return "dataset"
    return "bag" if any(next(folder.glob(pattern), None) for pattern in STORAGE) else ""


def _one(path: Path, contract: RobotContract | None, pictures: bool) -> Report:
    kind = _kind(path)
    if kind == "checkpoint":
        from vla_core.inspect.checkpoint import inspect_checkpoint

        return inspect_checkpoint(path, pictures)
    if kind == "dataset":
        from vla_core.inspect.dataset import inspect_dataset

        return inspect_dataset(path, pictures)
    from vla_core.inspect.bag import inspect_bag

    return inspect_bag(path, contract, pictures)
