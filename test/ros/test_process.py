"""A node's process ends quietly whenever it is told to: before, while and after it imports what it needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vla_ros.graph import Graph, Node
from vla_ros.up import PROGRAM, run_graph

SLOW_NODE = """
    import pathlib, time
    pathlib.Path(__file__).with_suffix(".importing").touch()
    for _ in range(6000):  # what rclpy and torch take, only longer
        time.sleep(0.01)  # a signal that comes just before a sleep is taken after it
"""


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the package `vla_ros` whose import takes long; the file that appears when it has begun."""
    (tmp_path / "vla_ros").mkdir()
    (tmp_path / "vla_ros" / "slow_node.py").write_text(textwrap.dedent(SLOW_NODE), encoding="utf-8")
    root = Path(__file__).parents[2]
    # The package's path takes in every folder of its name on sys.path.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return tmp_path / "vla_ros" / "slow_node.importing"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_ends_quietly(slow: Path, number: signal.Signals) -> None:
    process = subprocess.Popen([*PROGRAM, "slow_node"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        while not slow.exists():
            assert process.poll() is None
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, output) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_python_runs_waits_until_it_is_taken(slow: Path, number: signal.Signals) -> None:
    """As `vla up` starts its nodes: with the signals held back, and here one is there from the start."""

    def told_already() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, (number,))
        os.kill(os.getpid(), number)

    result = subprocess.run(
        [*PROGRAM, "slow_node"], preexec_fn=told_already, timeout=20, capture_output=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert not slow.exists(), "it never got to the import"


def test_a_graph_that_is_stopped_while_its_nodes_import_ends_in_order(slow: Path) -> None:
    """The real command of a node, with all that `vla up` does before its start."""
    lines: list[str] = []
    graph = Graph(
        nodes=(Node(executable="slow_node", name="slow"), Node(executable="done", name="done", ends_graph=True))
    )

    def command(node: Node) -> list[str]:
        return [*PROGRAM, "slow_node"] if node.name == "slow" else [sys.executable, "-c", ""]

    assert run_graph(graph, {}, command=command, write=lines.append) == 0
    assert lines == ["[vla up] done is done"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_node_ends_with_status_0(domain: int, tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "recorder_node", "--ros-args", "-p", "contract:=metaworld_sawyer", "-p", f"output:={tmp_path}/bags"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        while not (tmp_path / "bags").exists():  # made by the node's constructor: it is beyond its imports
            assert process.poll() is None
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0 and b"Traceback" not in output
