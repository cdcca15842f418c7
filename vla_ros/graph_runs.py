"""Graphs that run episodes, for the demos: one alone or several side by side, with a bar and a log of each."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import cpu_count, environ
from pathlib import Path
from typing import TextIO

from vla_core.errors import VlaError
from vla_core.progress import Advance, bar
from vla_ros.graph import Graph, Scalar
from vla_ros.up import run_graph

EPISODE_LINE = re.compile(r"episode (\d+) of \d+: .*\((\d+) of (\d+)\)")
DOMAINS = 102  # that every operating system's ports suffice for
POLL_S = 0.2


class GraphError(VlaError):
    """A graph that did not run its episodes."""


@dataclass(frozen=True, kw_only=True)
class GraphRun:
    """A graph with its arguments, which is to run ``episodes``."""

    graph: Graph
    arguments: Mapping[str, Scalar]
    episodes: int


def run_graphs(title: str, runs: Sequence[GraphRun], logs: Path) -> None:
    """Run graphs side by side to their ends, each in a ROS domain of its own; the first is in the environment's.

    Several share the cores: a node of theirs computes with no more threads than its graph has cores.

    Their outputs go to files in ``logs``. Raises :class:`GraphError` naming the log where one did not run all its
    episodes; the others are then stopped.
    """
    logs.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    with bar(title, sum(run.episodes for run in runs)) as advance:
        shown = _Shown(advance)
        lanes = [_Lane(title, place, run, logs, len(runs), stop, shown) for place, run in enumerate(runs)]
        if len(lanes) == 1:
            lanes[0].run()  # in this thread, which alone can have signals
        else:
            _side_by_side(lanes, stop)
    for lane in lanes:
        lane.check()
    if stop.is_set():
        raise KeyboardInterrupt


def _side_by_side(lanes: Sequence[_Lane], stop: threading.Event) -> None:
    threads = [threading.Thread(target=lane.run, name=lane.log.stem) for lane in lanes]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            time.sleep(POLL_S)
    finally:
        if any(thread.is_alive() for thread in threads):
            stop.set()
        for thread in threads:
            thread.join()


class _Shown:
    """Adds the lanes' episodes up for one bar."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._lock = advance, threading.Lock()
        self._lanes: dict[int, tuple[int, int]] = {}

    def set(self, lane: int, done: int, succeeded: int) -> None:
        with self._lock:
            self._lanes[lane] = done, succeeded
            total, good = map(sum, zip(*self._lanes.values(), strict=True))
            self._advance(total, f"{good} of {total} succeeded")


class _Lane:
    """One graph, its log and its episodes."""

    def __init__(self, title: str, place: int, run: GraphRun, logs: Path, lanes: int, stop: threading.Event,
                 shown: _Shown) -> None:  # fmt: skip
        name = re.sub(r"[^a-z0-9]+", "_", title)
        self.log = logs / (f"{name}_{place}.log" if lanes > 1 else f"{name}.log")
        self._title, self._place, self._lanes, self._run = title, place, lanes, run
        self._stop, self._shown = stop, shown
        self._lines: list[str] = []
        self._status: int | None = None
        self._error: Exception | None = None
        self._short = False  # it ended by itself before its episodes were over

    def run(self) -> None:
        """Run the graph to its end; what goes wrong is told by :meth:`check`, and stops the others."""
        run = self._run
        try:
            with self.log.open("w", encoding="utf-8") as file:
                graph = _placed(run.graph, self._place, self._lanes)
                self._status = run_graph(
                    graph, run.arguments, write=lambda line: self._write(file, line), stop=self._stop
                )
        except Exception as error:
            self._error = error
        self._short = self._episodes() != run.episodes and not self._stop.is_set()
        if self._status != 0 or self._short:
            self._stop.set()

    def check(self) -> None:
        """Raise what went wrong here; a graph that was told to stop did no wrong."""
        if self._error is not None:
            raise self._error
        if self._status != 0:
            errors = [line for line in self._lines if "error" in line.lower()] or self._lines[-1:]
            raise GraphError(f"{self._title}: the graph ended with status {self._status}: {' | '.join(errors[-2:])} "
                             f"(log: {self.log})")  # fmt: skip
        if self._short:
            raise GraphError(f"{self._title}: stopped before its {self._run.episodes} episodes were over (log: "
                             f"{self.log})")  # fmt: skip

    def _write(self, file: TextIO, line: str) -> None:
        self._lines.append(line)
        print(line, file=file, flush=True)
        match = EPISODE_LINE.search(line)
        if match:
            self._shown.set(self._place, int(match[1]), int(match[2]))

    def _episodes(self) -> int:
        return sum(1 for line in self._lines if EPISODE_LINE.search(line))


def _placed(graph: Graph, place: int, lanes: int) -> Graph:
    """The graph in the ROS domain that is ``place`` after the environment's, with its share of the cores."""
    changes: dict[str, Scalar] = {}
    if place:
        changes["ROS_DOMAIN_ID"] = (int(environ.get("ROS_DOMAIN_ID") or 0) + place) % DOMAINS
    if lanes > 1:
        changes["OMP_NUM_THREADS"] = max(1, (cpu_count() or 1) // lanes)
    nodes = tuple(replace(node, environment={**node.environment, **changes}) for node in graph.nodes)
    return replace(graph, nodes=nodes)
