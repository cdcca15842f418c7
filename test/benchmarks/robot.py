"""The suite ``robot``: what the robot side costs, in real processes on the package's own middleware profile."""

from __future__ import annotations

from test.benchmarks.framework import Suite
from test.benchmarks.latency import latency
from test.benchmarks.period import period
from test.benchmarks.robots import COMPRESSED, IMAGE
from test.benchmarks.sensing import sensing

BENCHMARKS: Suite = {
    f"latency {width}x{height} {kind}": latency(
        f"observation to command, {width}x{height} {kind}", type_, width, height
    )
    for width, height in ((224, 224), (640, 480), (1920, 1080))
    for kind, type_ in (("raw", IMAGE), ("JPEG", COMPRESSED))
}
BENCHMARKS |= {"period of commands": period, "sensing": sensing}
