"""The ``vla`` command: what ``vla_core`` offers, and what starts nodes."""

from __future__ import annotations

import argparse
import sys

from vla_core import cli
from vla_ros import demo_command, drive_demo_command, up


def _node_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    up.add_command(commands)
    demo_command.add_command(commands)
    drive_demo_command.add_command(commands)


def main() -> int:
    """Entry point of ``vla``."""
    return cli.main(more=_node_commands)


if __name__ == "__main__":
    sys.exit(main())
