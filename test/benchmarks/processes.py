"""Real processes for a benchmark: started together, watched through /proc, and never left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from test.benchmarks.framework import BenchmarkError

PR_SET_PDEATHSIG = 1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
STOP_S = 15.0
POLL_S = 0.05
DOMAINS = range(215, 232)  # beyond those of users and tests; their ports are below 65536 and above the ephemeral ones
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """Runs in the child: also a parent that is killed takes it along."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """A running Python module; what it prints lies in ``log``."""

    def __init__(self, process: subprocess.Popen[bytes], name: str, log: Path) -> None:
        self.process, self.name, self.log = process, name, log

    def output(self) -> str:
        """All that it printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def check(self) -> None:
        """Raise when it ended by itself, with its last lines."""
        if self.process.poll() is not None:
            raise BenchmarkError(f"{self.name} ended with status {self.process.returncode}: {self.last_words()}")

    def cpu_s(self) -> float:
        """CPU time used so far, of all its threads, user and system, seconds."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def rss_bytes(self) -> int:
        """Resident memory; shared memory of the middleware that it touched is part of it."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="utf-8").split()[1]) * PAGE_BYTES

    def kill(self) -> None:
        """End it at once; harmless when it has ended."""
        self.process.kill()
        self.process.wait()

    def last_words(self) -> str:
        """The last lines that it printed, as one."""
        return " | ".join(self.output().strip().splitlines()[-3:]) or "it printed nothing"


class Processes:
    """A group of processes in a ROS domain of its own; leaving the block ends all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: list[Child] = []
        self._environment = {
            **os.environ,
            "ROS_DOMAIN_ID": str(DOMAINS[os.getpid() % len(DOMAINS)]),
            "OMP_NUM_THREADS": "1",  # a busy core more would be a load that nobody asked for
            "OMP_WAIT_POLICY": "passive",
        }

    def start(self, name: str, module: str, *arguments: str) -> Child:
        """Run ``python -m module arguments``."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], env=self._environment, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent,
            )  # fmt: skip
        self.children.append(Child(process, name, log))
        return self.children[-1]

    def finish(self, child: Child, timeout_s: float) -> str:
        """Wait for the end of one while all others run; returns what it printed, raises when any of them fails."""
        deadline = time.monotonic() + timeout_s
        self.children.remove(child)
        try:
            while child.process.poll() is None:
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"{child.name} did not end within {timeout_s:.0f} s: {child.last_words()}")
                for other in self.children:
                    other.check()
                time.sleep(POLL_S)
        finally:
            child.kill()
        if child.process.returncode != 0:
            child.check()
        return child.output()

    def stop(self, child: Child) -> str:
        """Ask one to end (SIGINT) and wait; returns what it printed."""
        child.check()
        child.process.send_signal(signal.SIGINT)
        return self.finish(child, STOP_S)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        for child in self.children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + (STOP_S if kind is None else 2.0)
        while time.monotonic() < deadline and any(child.process.poll() is None for child in self.children):
            time.sleep(POLL_S)
        for child in self.children:
            child.kill()


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Poll until ``condition`` holds; raises at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(POLL_S)
