"""`vla up GRAPH.yaml name=value …`: run a graph's nodes as processes, without ROS 2's launch tools.

What it keeps true, whatever happens: nodes get the caller's stop signal exactly once and in time to
send a last safe command; no node outlives this process; the exit status tells whether a node died.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import vla_ros
from vla_core.config import ConfigError
from vla_core.errors import choices
from vla_ros.graph import Graph, Node, Scalar, load_graph, parameter_files, resolve
from vla_ros.middleware import require_ros, settings
from vla_ros.program import STOP_SIGNALS

POLL_S = 0.02
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PROGRAM = [sys.executable, "-m", "vla_ros.program"]


@dataclass(frozen=True, kw_only=True)
class Grace:
    """How long nodes may take to stop: seconds after the first signal, and after SIGTERM."""

    first_s: float = 10.0
    terminate_s: float = 5.0


def node_command(node: Node) -> list[str]:
    """The command that starts `node`, less its ROS arguments.

    Raises:
        ConfigError: this package has no such program.
    """
    module = f"vla_ros.{node.executable}"
    if importlib.util.find_spec(module) is None:
        folders = [Path(folder) for folder in vla_ros.__path__]
        programs = {path.stem for folder in folders for path in folder.glob("*_node.py")}
        raise ConfigError(f"node {node.name}: no executable {node.executable!r}; choices: {choices(programs)}")
    return [*PROGRAM, node.executable]


def run_graph(
    graph: Graph,
    arguments: Mapping[str, Scalar],
    *,
    command: Callable[[Node], list[str]] = node_command,
    write: Callable[[str], None] = print,
    stop: threading.Event | None = None,
    grace: Grace | None = None,
) -> int:
    """Start every node, pass its output on, wait for the end; returns the exit status.

    0: a node with `ends_graph` exited with 0, or a stop was asked for (SIGINT, SIGTERM, `stop`),
    and every node then ended in order. Otherwise the status of the node that died first, or 1.

    `write` gets one line at a time, which starts with the node's name in brackets. Setting `stop`
    is the same as Ctrl-C, for callers that have no terminal or run this outside the main thread.
    The calling thread must live until this returns: nodes are told to stop when it ends.

    Raises:
        ConfigError: before anything is started, when the graph and the arguments do not fit.
    """
    nodes = resolve(graph, arguments)
    commands = [command(node) for node in nodes]
    with tempfile.TemporaryDirectory(prefix="vla_up_") as folder:
        supervisor = _Supervisor(write, stop or threading.Event(), grace or Grace())
        with supervisor.signals():
            try:
                for node, program in zip(nodes, commands, strict=True):
                    supervisor.start(node, [*program, *ros_arguments(node, Path(folder))])
                supervisor.watch()
            finally:
                supervisor.stop_all()
        return supervisor.status


def ros_arguments(node: Node, folder: Path) -> list[str]:
    """`--ros-args …` of a resolved node, with its inline parameters in files in `folder`."""
    arguments = ["--ros-args", "-r", f"__node:={node.name}"]
    if node.namespace:
        arguments += ["-r", f"__ns:=/{node.namespace.lstrip('/')}"]
    for topic, other in node.remappings.items():
        arguments += ["-r", f"{topic}:={other}"]
    for path in parameter_files(node, folder):
        arguments += ["--params-file", path]
    return arguments


@dataclass(eq=False)
class _Running:
    node: Node
    process: subprocess.Popen[bytes]
    unfinished: bytes = b""  # the start of a line whose end has not come yet


class _Supervisor:
    """The processes of one graph, from the first start to the last exit.

    All of it in one thread: the kernel signals a child at the end of every thread of its parent
    (see `_before_start`), and a node is to be told once.
    """

    def __init__(self, write: Callable[[str], None], stop: threading.Event, grace: Grace) -> None:
        self.status = 0
        self._write = write
        self._stop = stop
        self._grace = grace
        self._signal = signal.SIGINT
        self._signals_seen = 0
        self._running: list[_Running] = []
        self._ended: set[int] = set()
        self._output = selectors.DefaultSelector()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM of this process into a stop; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals_seen += 1
        self._signal = signal.Signals(number)
        self._stop.set()

    def start(self, node: Node, command: Sequence[str]) -> None:
        environment = {**settings(), **os.environ, "PYTHONUNBUFFERED": "1"}
        environment.update({name: str(value) for name, value in node.environment.items()})
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A terminal sends Ctrl-C to its whole foreground group; in a session of its own a node
            # gets it from here alone, once.
            start_new_session=True,
            preexec_fn=_before_start(hold_signals=command[: len(PROGRAM)] == PROGRAM),
        )
        assert process.stdout is not None
        running = _Running(node, process)
        self._running.append(running)
        self._output.register(process.stdout, selectors.EVENT_READ, running)

    def _pass_on(self, patience_s: float) -> bool:
        """Pass on what the nodes have written within `patience_s`; false when it was nothing."""
        ready = self._output.select(patience_s)
        if not self._output.get_map():
            time.sleep(patience_s)  # every pipe is closed already, so nothing has been waited for
        for key, _ in ready:
            running: _Running = key.data
            chunk = os.read(key.fd, 65536)
            *lines, running.unfinished = (running.unfinished + chunk).split(b"\n")
            if not chunk:
                self._output.unregister(key.fileobj)
                lines += [running.unfinished] if running.unfinished else []
            for line in lines:
                self._say(running.node.name, line.decode(errors="replace").rstrip("\r"))
        return bool(ready)

    def _say(self, name: str, text: str) -> None:
        try:
            self._write(f"[{name}] {text}")
        except BrokenPipeError:
            # Nobody reads any more. The nodes' pipes must still be drained while they stop.
            self._stop.set()

    def watch(self) -> None:
        """Wait until a node's end or a stop ends the graph."""
        while not self._stop.is_set():
            ended = self._newly_ended()
            if ended:
                self._pass_on(0.0)  # their last words come before the news of their end
            # Of those that ended together a crash counts first, then a success.
            ended.sort(key=lambda e: (e.process.returncode == 0, not e.node.ends_graph))
            for running in ended:
                node, code = running.node, running.process.returncode
                if node.ends_graph and code == 0:
                    self._say("vla up", f"{node.name} is done")
                    return
                failed = node.required or node.ends_graph
                self._say("vla up", f"{node.name} {_exit_text(code)}" + (", stopping" * failed))
                if failed:
                    self._fail(code)
                    return
            if len(self._ended) == len(self._running):
                return
            self._pass_on(POLL_S)

    def stop_all(self) -> None:
        """Signal the nodes, wait, signal harder; afterwards none is alive."""
        steps = (
            (self._signal, self._grace.first_s),
            (signal.SIGTERM, self._grace.terminate_s),
            (signal.SIGKILL, None),
        )
        for number, patience_s in steps:
            left = self._alive()
            if not left:
                break
            if number != self._signal:
                names = ", ".join(running.node.name for running in left)
                self._say("vla up", f"{names} did not stop, sending {number.name}")
                self._fail(1)
            for running in left:
                # To the node's whole session, as a terminal does it: a node may have children.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(running.process.pid, number)
            self._wait(patience_s)
        # What is still in the pipes; a grandchild that holds one open must not hold this process.
        deadline = time.monotonic() + 1.0
        while self._pass_on(0.0) and time.monotonic() < deadline:
            pass
        self._output.close()
        for running in self._running:
            assert running.process.stdout is not None
            running.process.stdout.close()
        for running in self._newly_ended():
            if running.process.returncode not in (0, -signal.SIGINT, -signal.SIGTERM):
                code = running.process.returncode
                self._say("vla up", f"{running.node.name} {_exit_text(code)} while stopping")
                self._fail(code)

    def _wait(self, patience_s: float | None) -> None:
        deadline = None if patience_s is None else time.monotonic() + patience_s
        # The first Ctrl-C only asks for what is done already when the graph has ended on its own.
        seen = max(self._signals_seen, 1)
        while self._alive() and (deadline is None or time.monotonic() < deadline):
            if deadline is not None and self._signals_seen > seen:
                return  # a second Ctrl-C: the caller will not wait any longer
            self._pass_on(POLL_S)

    def _alive(self) -> list[_Running]:
        return [running for running in self._running if running.process.poll() is None]

    def _newly_ended(self) -> list[_Running]:
        ended = [
            running
            for running in self._running
            if running.process.poll() is not None and running.process.pid not in self._ended
        ]
        self._ended.update(running.process.pid for running in ended)
        return ended

    def _fail(self, code: int) -> None:
        if self.status == 0:
            # As a shell reports it: 128 + the signal; a required node's 0 is still an early end.
            self.status = 128 - code if code < 0 else code or 1


def _before_start(hold_signals: bool) -> Callable[[], None]:
    """What a child runs before its program, so that it stops even if this process is killed.

    Nobody can forward a signal after SIGKILL; the kernel does it instead (prctl(2),
    PR_SET_PDEATHSIG). SIGTERM, since a node must still be able to send its safe command and to
    close its bag.

    `hold_signals`: a stop signal waits until the program takes it, also while Python itself still
    starts; only for programs that do (`vla_ros.program`).
    """
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: the child may only call what is ready
    parent = os.getpid()

    def prepare() -> None:
        if hold_signals:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent was killed before the line above
            os._exit(1)

    return prepare


def _exit_text(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `up` to the `vla` command line; its `run` takes the parsed arguments."""
    parser = commands.add_parser("up", help="start the nodes of a graph", description="Start the nodes of a graph.")
    parser.add_argument("graph", help="a name in config/graphs, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="the graph's arguments; see the file")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    require_ros()
    return run_graph(load_graph(parsed.graph), pairs(parsed.overrides))


def pairs(assignments: Sequence[str]) -> dict[str, Scalar]:
    """`["seed=3"]` as `{"seed": "3"}`.

    Raises:
        ConfigError: an assignment without a name or without `=`.
    """
    values: dict[str, Scalar] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not name or not equals:
            raise ConfigError(f"argument {assignment!r}: expected name=value")
        values[name] = value
    return values
