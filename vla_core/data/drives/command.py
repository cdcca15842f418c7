"""``vla import nuscenes`` and ``vla import kitti``: their arguments and what they print."""

from __future__ import annotations

import argparse
from pathlib import Path

KINDS = ("nuscenes", "kitti")


def add_kinds(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the layouts of recorded drives to ``vla import``."""
    for kind in KINDS:
        parser = kinds.add_parser(kind, help=f"recorded drives of {kind} to bags")
        parser.add_argument("root", type=Path, help="its folder, as it is downloaded")
        parser.add_argument("--out", type=Path, required=True, help="folder for a bag per drive; what is there is kept")
        parser.add_argument(
            "--contract", help="a name in config/robots, or a file; default: the one named like the layout"
        )
        if kind == "nuscenes":
            parser.add_argument("--version", help="v1.0-mini, v1.0-trainval, …; default: the one that is there")
            parser.add_argument("--keyframes", action="store_true", help="leave the sweeps out")
        parser.set_defaults(run=_import, kind=kind)


def _import(parsed: argparse.Namespace) -> int:
    from vla_core.contract import RobotContract
    from vla_core.data.drives.drive import write_bags
    from vla_core.data.drives.kitti import find_drives
    from vla_core.data.drives.nuscenes import NuScenes
    from vla_core.progress import bar

    if parsed.kind == "nuscenes":
        drives = NuScenes(parsed.root, parsed.version, sweeps=not parsed.keyframes).drives()
    else:
        drives = find_drives(parsed.root)
    contract = RobotContract.load(parsed.contract or parsed.kind)
    with bar(f"import {parsed.kind}", len(drives)) as advance:
        bags = write_bags(drives, contract, parsed.out, advance)
    print(f"{parsed.out}: {len(bags)} bags; next: vla inspect, vla convert")
    return 0
