"""What a run asks of its process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from vla_core.training.running import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        held = [torch.ones(1 << 21) for _ in range(20)]  # as a forward pass does, for the backward pass to free
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
keep_memory(torch.device("cpu"))
faults()
print(before, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc, nothing to ask for")
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    """20 times 8 MB are 40,960 pages, or 80 large ones; the system hands over each by a fault, which it counts.

    Whether glibc keeps them by itself depends on what lies above them; told to give back early, it never does.
    """
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment)
    before, after = map(int, done.stdout.split())
    assert after < before / 5
