"""Graphs side by side: each in its own domain with its share and its log, and one that fails stops the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla_ros import graph_runs
from vla_ros.graph import Graph, Node
from vla_ros.graph_runs import GraphError, GraphRun, run_graphs

DEADLINE_S = 30.0
GRAPH = Graph(nodes=(Node(executable="simulator_node", name="simulator"),))


def run(episodes: int, seed: int = 0) -> GraphRun:
    return GraphRun(graph=GRAPH, arguments={"seed": seed}, episodes=episodes)


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, Any]]]:
    """Let graphs do what a function says, which is given their seed, ``write`` and ``stop``; returns what was run."""

    def use(what: Callable[[int, Callable[[str], None], threading.Event], int]) -> list[tuple[Any, Any]]:
        ran: list[tuple[Any, Any]] = []

        def fake(graph: Graph, arguments: Any, *, write: Callable[[str], None], stop: threading.Event) -> int:
            environment = graph.nodes[0].environment
            ran.append((environment.get("ROS_DOMAIN_ID"), environment.get("OMP_NUM_THREADS"), arguments["seed"]))
            return what(arguments["seed"], write, stop)

        monkeypatch.setattr(graph_runs, "run_graph", fake)
        return ran

    return use


def episodes(count: int, write: Callable[[str], None]) -> None:
    for number in range(1, count + 1):
        write(f"[simulator] [INFO] episode {number} of {count}: seed 3, success after 9 steps ({number} of {number})")


def test_each_has_a_domain_and_a_log_of_its_own(
    tmp_path: Path, behave: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "100")
    monkeypatch.setattr(graph_runs, "cpu_count", lambda: 6)
    together = threading.Barrier(3)  # none may wait for the end of another

    def what(seed: int, write: Callable[[str], None], stop: threading.Event) -> int:
        together.wait(DEADLINE_S)
        episodes(seed, write)
        return 0

    ran = behave(what)
    run_graphs("drive live", [run(3, 3), run(2, 2), run(1, 1)], tmp_path)
    assert sorted(ran, key=lambda entry: -entry[2]) == [(None, 2, 3), (101, 2, 2), (0, 2, 1)]
    logs = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert logs == {"drive_live_0.log": 3, "drive_live_1.log": 2, "drive_live_2.log": 1}
    assert "6 of 6 succeeded" in capsys.readouterr().out


def test_one_alone_has_all_cores(tmp_path: Path, behave: Any) -> None:
    def what(seed: int, write: Callable[[str], None], stop: threading.Event) -> int:
        episodes(2, write)
        return 0

    ran = behave(what)
    run_graphs("live", [run(2)], tmp_path)
    assert ran == [(None, None, 0)]
    assert (tmp_path / "live.log").is_file()


def test_a_failure_is_named_with_its_log_and_stops_the_others(tmp_path: Path, behave: Any) -> None:
    def what(seed: int, write: Callable[[str], None], stop: threading.Event) -> int:
        if seed == 1:
            write("[policy] [ERROR] the model is gone")
            return 3
        assert stop.wait(DEADLINE_S), "nobody stopped this graph"
        return 0

    behave(what)
    with pytest.raises(GraphError, match=r"status 3: \[policy\] \[ERROR\] the model is gone \(log: .*live_1.log\)"):
        run_graphs("live", [run(1, 0), run(1, 1)], tmp_path)


def test_episodes_that_are_missing_are_a_failure(tmp_path: Path, behave: Any) -> None:
    def what(seed: int, write: Callable[[str], None], stop: threading.Event) -> int:
        episodes(1, write)
        return 0

    behave(what)
    with pytest.raises(GraphError, match="stopped before its 2 episodes were over"):
        run_graphs("live", [run(2)], tmp_path)


def test_what_a_graph_raises_is_raised(tmp_path: Path, behave: Any) -> None:
    def what(seed: int, write: Callable[[str], None], stop: threading.Event) -> int:
        if seed:
            raise OSError("no disk")
        return 0 if stop.wait(DEADLINE_S) else 1

    behave(what)
    with pytest.raises(OSError, match="no disk"):
        run_graphs("live", [run(1, 0), run(1, 1)], tmp_path)


def test_a_stop_by_hand_is_an_interruption(tmp_path: Path, behave: Any) -> None:
    def what(seed: int, write: Callable[[str], None], stop: threading.Event) -> int:
        stop.set()  # what SIGINT does
        return 0

    behave(what)
    with pytest.raises(KeyboardInterrupt):
        run_graphs("live", [run(2)], tmp_path)
