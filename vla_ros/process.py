"""How every node of this package runs as a process: environment, signals, spinning, exit status.

rclpy's own signal handlers end the context at once, and a node's last safe command with it. Here a signal only asks
the loop to end; the node then stops in order, and the context is shut down last.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from vla_core.errors import VlaError
from vla_ros import middleware

SPIN_SLICE_S = 0.1


class Stop(Protocol):
    """Asks whether the process was told to end."""

    def __call__(self) -> bool: ...


class Runnable(Protocol):
    """A node that this module can run: rclpy's interface, and an orderly end."""

    def stop(self) -> None:
        """Publish the last safe command, close files, end threads."""

    def destroy_node(self) -> None: ...


def spin(executor: object, stop: Stop) -> int:
    """Spin in slices until told to end; the exit status of a node without a loop of its own."""
    while not stop():
        executor.spin_once(timeout_sec=SPIN_SLICE_S)  # type: ignore[attr-defined]
    return 0


def main(make_node: Callable[[], Runnable], run: Callable[[Runnable, object, Stop], int] | None = None) -> int:
    """Run a node until SIGINT, SIGTERM or the end of ``run(node, executor, stop)``; returns the exit status."""
    middleware.configure()
    import rclpy
    from rclpy.exceptions import ParameterException
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.signals import SignalHandlerOptions

    told = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        told.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    node: Runnable | None = None
    executor = SingleThreadedExecutor()
    try:
        node = make_node()
        executor.add_node(node)  # type: ignore[arg-type]
        return run(node, executor, told.is_set) if run else spin(executor, told.is_set)
    except (VlaError, OSError, ParameterException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        try:
            if node is not None:
                node.stop()
        finally:
            executor.shutdown()
            if node is not None:
                node.destroy_node()
            rclpy.try_shutdown()
