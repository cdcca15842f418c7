"""The environment that every node of this package needs, set before rclpy is initialized.

A variable that is already set is the user's choice and stays. The variables are read when rcl and
Fast DDS start, so setting them inside the process is as good as setting them in the shell.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path

from vla_core.errors import VlaError
from vla_core.resources import share

PROFILE = "config/middleware/fastdds.xml"
SHARED_MEMORY = Path("/dev/shm")
# What one process takes from SHARED_MEMORY: the profile's 64 MB and Fast DDS's own book-keeping.
SEGMENT_BYTES = 72_000_000
# A segment exists for a moment before its owner locks it; older ones without a lock are dead.
SETTLED_S = 60.0


def configure() -> None:
    """Choose the middleware, its shared-memory profile and discovery on this machine alone.

    Call it in main(), before rclpy.init() and before torch is imported.
    """
    for name, value in settings().items():
        os.environ.setdefault(name, value)
    remove_dead_segments()
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    if free < SEGMENT_BYTES:
        print(
            f"warning: {SHARED_MEMORY} has {free / 1e6:.0f} MB free and a node takes "
            f"{SEGMENT_BYTES / 1e6:.0f} MB: images will go by UDP and large ones may be lost "
            "(in a container: --shm-size=1g)",
            file=sys.stderr,
        )


def require_ros() -> None:
    """Raise a one-line error when this Python has no ROS 2, or the package's messages are not built."""
    for module, remedy in (
        ("rclpy", "source a ROS 2 installation, or let `make setup` bring the wheels"),
        ("vla_ros.msg", "build the messages: `make setup`, or colcon build and source install/setup.bash"),
    ):
        if importlib.util.find_spec(module) is None:
            raise VlaError(f"{module} is not installed for {sys.executable}; {remedy}")


def settings() -> dict[str, str]:
    """The variables and values that `configure` falls back on."""
    variables = {
        "RMW_IMPLEMENTATION": "rmw_fastrtps_cpp",
        "FASTDDS_DEFAULT_PROFILES_FILE": str(share(PROFILE)),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        # Simulator, policy and recorder share few cores; threads that spin while they wait
        # (OpenMP's default) slow each other down by a factor of ten and more.
        "OMP_WAIT_POLICY": "passive",
    }
    # A sourced installation sets AMENT_PREFIX_PATH; a Python environment of wheels does not.
    if (Path(sys.prefix) / "share" / "ament_index").is_dir():
        variables["AMENT_PREFIX_PATH"] = sys.prefix
    return variables


def remove_dead_segments(folder: Path = SHARED_MEMORY) -> int:
    """Free the shared memory of killed processes; returns how many segments there were.

    Fast DDS frees a segment when its process ends in order. One that is killed would keep its
    64 MB until the next boot. Beside each segment lies `<name>_el`, which its owner keeps locked
    (flock) while it lives.
    """
    removed = 0
    for lock in folder.glob("fastdds_" + "[0-9a-f]" * 16 + "_el"):
        try:
            if time.time() - lock.stat().st_mtime < SETTLED_S:
                continue
            with lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.with_name(lock.name.removesuffix("_el")).unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
        except OSError:  # alive (locked), another user's, or just removed by another node
            continue
        removed += 1
    return removed
