"""How a node's program begins: `python -m vla_ros.program recorder_node …` runs `vla_ros.recorder_node`'s `main()`.

Importing a node takes seconds (rclpy, torch, MuJoCo), and a signal in the middle of it would end in a traceback. Here
signals are taken before anything else is imported: until the node has its own handlers, one ends the process at once,
quietly and with status 0, as it does afterwards. There is nothing to stop in order yet.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(module: str) -> int:
    """Import ``module`` and run its ``main()``; returns its exit status. Arguments stay in ``sys.argv``."""
    for number in STOP_SIGNALS:
        signal.signal(number, _leave)
    # Whoever starts this program may hold its signals back until here; see `vla_ros.up`.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return int(importlib.import_module(module).main())


def _leave(number: int, frame: FrameType | None) -> None:
    # Not SystemExit: raised in the middle of an import, some module would take it for a failed import and go on.
    os._exit(0)


if __name__ == "__main__":
    name = sys.argv.pop(1)
    sys.exit(run(f"vla_ros.{name}"))
