"""``vla ablate``: train and evaluate every variant and condition of a file, and write the table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vla_core.cli import positive
from vla_core.errors import VlaError

if TYPE_CHECKING:
    from vla_core.data.dataset import Dataset
    from vla_core.training.recipe import Recipe


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `ablate` to a parser."""
    parser = commands.add_parser("ablate", help="train a recipe's variants, take sensors away, and compare: one table")
    parser.add_argument("file", help="a name in config/ablations, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the file, such as episodes=60")
    parser.add_argument("--dataset", action="append", required=True, type=Path, metavar="PATH",
                        help="for all variants; several are mixed")  # fmt: skip
    parser.add_argument("--validation", action="append", type=Path, metavar="PATH",
                        help="what is held out, one for each dataset")  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=(), help="variants and conditions to do, beside the reference"
    )
    parser.add_argument("--workers", type=positive, default=1, help="processes of an evaluation")
    parser.add_argument("--out", type=Path, required=True, help="folder; what is done in it is not done again")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from vla_core.data.dataset import load
    from vla_core.evaluation.ablations import Study, load_ablations, markdown
    from vla_core.hub import local_folder

    if parsed.validation and len(parsed.validation) != len(parsed.dataset):
        raise VlaError(f"--validation: found {len(parsed.validation)} for {len(parsed.dataset)} datasets; give one for "
                       "each in their order, or hold episodes out with data.validation.fraction")  # fmt: skip

    def opened(recipe: Recipe) -> tuple[list[Dataset], list[Dataset] | None]:
        data, held_out = (
            [load(local_folder(path, "dataset"), None, recipe.observation, recipe.data.cache) for path in paths or ()]
            for paths in (parsed.dataset, parsed.validation)
        )
        return data, held_out or None

    study = Study(
        load_ablations(parsed.file, parsed.overrides), parsed.out, opened, [str(path) for path in parsed.dataset],
        workers=parsed.workers, only=parsed.only,
    )  # fmt: skip
    record = study.run()
    print(markdown(record))
    print(f"table.md and table.json in {parsed.out}")
    return 0
