"""The suite ``data``: from bags to batches, and beside LeRobot on the same dataset.

Each module below has its own benchmarks; what LeRobot is measured in is built on first use (``lerobot_env.py``).
"""

from __future__ import annotations

from test.benchmarks import data_convert, data_format, data_loading, data_training
from test.benchmarks.framework import Suite

BENCHMARKS: Suite = {
    **data_convert.BENCHMARKS,
    **data_format.BENCHMARKS,
    **data_loading.BENCHMARKS,
    **data_training.BENCHMARKS,
}
