"""Processes that convert and simulate: how they are set up."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICTURES = """
import resource, sys
import numpy as np
from vla_core.data.executor import _keep_memory

if sys.argv[1] == "kept":
    _keep_memory()
for i in range(25):
    if i == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pictures = [np.ones((512, 512, 4), dtype=np.uint8) for _ in range(4)]
    del pictures
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_pictures_are_put_into_the_memory_of_those_before() -> None:
    def faults(how: str) -> int:
        run = subprocess.run(
            [sys.executable, "-c", PICTURES, how], cwd=ROOT, text=True, capture_output=True, check=True
        )
        return int(run.stdout)

    without, kept = faults("not"), faults("kept")
    if without < 20 * 4 * 200:  # each picture has 256 pages of 4 KB
        pytest.skip(f"{without} page faults: this system has larger pages, and nothing to spare")
    assert kept < without / 10
