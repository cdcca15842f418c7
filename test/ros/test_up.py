"""`vla up`: what nodes are told, when the graph ends, and with which status."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vla_core.config import ConfigError
from vla_ros import cli
from vla_ros.graph import Graph, Node
from vla_ros.up import Grace, add_command, node_command, pairs, ros_arguments, run_graph

DEADLINE_S = 30.0

# A node that notes when it is up and each SIGINT and SIGTERM it gets, and then ends.
PATIENT = """
    import pathlib, signal, sys, time
    notes = pathlib.Path(__file__).with_suffix(".notes")
    def note(text):
        with notes.open("a") as file:
            file.write(text + "\\n")
    def on_signal(number, frame):
        note(signal.Signals(number).name)
        time.sleep(0.2)  # long enough to get the same signal twice, if it were sent twice
        raise SystemExit(0)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    note("up")
    time.sleep(60)
"""
STUBBORN = """
    import pathlib, signal, time
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path(__file__).with_suffix(".notes").write_text("up\\n")
    while True:
        time.sleep(1)
"""


class Programs:
    """Small programs in a folder that stand in for nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, text: str) -> str:
        (self.folder / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    def after(self, others: list[str], text: str) -> str:
        """`text`, run once every one of `others` is up."""
        wait = f"""\
            import pathlib, sys, time
            folder = pathlib.Path(__file__).parent
            while not all((folder / f"{{n}}.notes").exists() for n in {others!r}):
                time.sleep(0.01)
        """
        return textwrap.dedent(wait) + textwrap.dedent(text)

    def command(self, node: Node) -> list[str]:
        return [sys.executable, str(self.folder / f"{node.executable}.py")]

    def notes(self, name: str) -> list[str]:
        path = self.folder / f"{name}.notes"
        return path.read_text(encoding="utf-8").split() if path.exists() else []


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)


def node(name: str, *, required: bool = True, ends_graph: bool = False) -> Node:
    return Node(executable=name, name=name, required=required, ends_graph=ends_graph)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def test_the_end_of_the_node_that_ends_the_graph_stops_the_others(programs: Programs) -> None:
    programs.add("policy", PATIENT)
    programs.add("simulator", programs.after(["policy"], "print('all episodes done')"))
    lines: list[str] = []
    graph = Graph(nodes=(node("policy"), node("simulator", ends_graph=True)))
    assert run_graph(graph, {}, command=programs.command, write=lines.append) == 0
    assert programs.notes("policy") == ["up", "SIGINT"]
    assert "[simulator] all episodes done" in lines


@pytest.mark.parametrize(("ends_graph", "code", "status"), [(False, 3, 3), (False, 0, 1), (True, 4, 4)])
def test_a_node_that_dies_ends_the_graph_in_failure(
    programs: Programs, ends_graph: bool, code: int, status: int
) -> None:
    programs.add("simulator", PATIENT)
    programs.add("policy", programs.after(["simulator"], f"sys.exit({code})"))
    lines: list[str] = []
    graph = Graph(nodes=(node("simulator"), node("policy", ends_graph=ends_graph)))
    assert run_graph(graph, {}, command=programs.command, write=lines.append) == status
    assert programs.notes("simulator") == ["up", "SIGINT"]
    assert f"[vla up] policy exited with {code}, stopping" in lines


def test_a_node_ended_by_a_signal_gives_the_status_that_a_shell_gives(programs: Programs) -> None:
    programs.add("policy", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    lines: list[str] = []
    status = run_graph(Graph(nodes=(node("policy"),)), {}, command=programs.command, write=lines.append)
    assert status == 128 + signal.SIGKILL
    assert "[vla up] policy was ended by SIGKILL, stopping" in lines


def test_the_graph_goes_on_without_a_node_that_is_not_required(programs: Programs) -> None:
    programs.add("viewer", "import sys; sys.exit(5)")
    programs.add("simulator", "import time; time.sleep(0.5)")
    lines: list[str] = []
    graph = Graph(nodes=(node("viewer", required=False), node("simulator", ends_graph=True)))
    assert run_graph(graph, {}, command=programs.command, write=lines.append) == 0
    assert "[vla up] viewer exited with 5" in lines


def test_a_node_that_will_not_stop_is_killed_and_that_is_a_failure(programs: Programs) -> None:
    programs.add("policy", STUBBORN)
    programs.add("simulator", programs.after(["policy"], ""))
    lines: list[str] = []
    graph = Graph(nodes=(node("policy"), node("simulator", ends_graph=True)))
    grace = Grace(first_s=0.2, terminate_s=0.2)
    status = run_graph(graph, {}, command=programs.command, write=lines.append, grace=grace)
    assert status == 1
    assert lines[-3:-1] == [
        "[vla up] policy did not stop, sending SIGTERM",
        "[vla up] policy did not stop, sending SIGKILL",
    ]


def test_a_node_that_fails_while_stopping_is_a_failure(programs: Programs) -> None:
    programs.add("policy", PATIENT.replace("SystemExit(0)", "SystemExit(6)"))
    programs.add("simulator", programs.after(["policy"], ""))
    graph = Graph(nodes=(node("policy"), node("simulator", ends_graph=True)))
    assert run_graph(graph, {}, command=programs.command, write=lambda _: None) == 6


def test_another_thread_can_stop_the_graph(programs: Programs) -> None:
    programs.add("policy", PATIENT)
    stop, status = threading.Event(), []
    graph = Graph(nodes=(node("policy"),))

    def run() -> None:
        status.append(run_graph(graph, {}, command=programs.command, write=lambda _: None, stop=stop))

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: programs.notes("policy") == ["up"])
    stop.set()
    thread.join(DEADLINE_S)
    assert status == [0]
    assert programs.notes("policy") == ["up", "SIGINT"]


def test_nodes_are_stopped_when_nobody_reads_the_output(programs: Programs) -> None:
    programs.add("policy", PATIENT)
    programs.add("simulator", programs.after(["policy"], "print('hello'); time.sleep(60)"))

    def closed(_line: str) -> None:
        raise BrokenPipeError

    graph = Graph(nodes=(node("policy"), node("simulator")))
    run_graph(graph, {}, command=programs.command, write=closed)
    assert programs.notes("policy") == ["up", "SIGINT"]


@pytest.fixture
def supervisor(programs: Programs) -> Callable[[], subprocess.Popen[bytes]]:
    """Runs a graph of two patient nodes in a process of its own, as a terminal would."""

    def start() -> subprocess.Popen[bytes]:
        for name in ("policy", "simulator"):
            programs.add(name, PATIENT)
        main = f"""
            import sys
            from vla_ros.graph import Graph, Node
            from vla_ros.up import run_graph
            names = ("policy", "simulator")
            graph = Graph(nodes=tuple(Node(executable=name, name=name) for name in names))
            def command(node):
                return [sys.executable, {str(programs.folder)!r} + f"/{{node.name}}.py"]
            sys.exit(run_graph(graph, {{}}, command=command))
        """
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(main)],
            env={**os.environ, "TMPDIR": str(programs.folder)},  # a killed process leaves its files
            start_new_session=True,
        )
        until(lambda: all(programs.notes(n) == ["up"] for n in ("policy", "simulator")))
        return process

    return start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_reach_every_node_once(
    programs: Programs, supervisor: Callable[[], subprocess.Popen[bytes]], number: signal.Signals
) -> None:
    process = supervisor()
    os.killpg(process.pid, number)  # a terminal's Ctrl-C goes to the whole foreground group
    assert process.wait(DEADLINE_S) == 0
    for name in ("policy", "simulator"):
        assert programs.notes(name) == ["up", number.name]


def test_the_first_ctrl_c_does_not_hurry_a_graph_that_is_stopping_already(programs: Programs) -> None:
    """It is the second one that a caller's patience ends with."""
    programs.add("policy", PATIENT.replace("time.sleep(0.2)", "time.sleep(2)"))
    programs.add("simulator", programs.after(["policy"], ""))
    lines: list[str] = []

    def interrupt(line: str) -> None:
        lines.append(line)
        if line == "[vla up] simulator is done":  # the graph's own end; the policy still needs its two seconds
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

    graph = Graph(nodes=(node("policy"), node("simulator", ends_graph=True)))
    assert run_graph(graph, {}, command=programs.command, write=interrupt) == 0
    assert programs.notes("policy") == ["up", "SIGINT"]
    assert not any("did not stop" in line for line in lines)


def test_nodes_are_told_to_stop_when_vla_up_itself_is_killed(
    programs: Programs, supervisor: Callable[[], subprocess.Popen[bytes]]
) -> None:
    process = supervisor()
    process.kill()
    process.wait(DEADLINE_S)
    for name in ("policy", "simulator"):
        until(lambda name=name: programs.notes(name) == ["up", "SIGTERM"])


def test_nodes_get_their_name_parameters_remappings_and_environment(programs: Programs) -> None:
    programs.add(
        "policy",
        """
        import json, os, sys
        print(json.dumps([sys.argv[1:], os.environ["LIVE"], os.environ["RMW_IMPLEMENTATION"]]))
        """,
    )
    policy = Node(
        executable="policy",
        name="pi",
        namespace="left",
        parameters=({"seed": 3},),
        remappings={"image": "/camera"},
        environment={"LIVE": "true"},
        ends_graph=True,
    )
    lines: list[str] = []
    assert run_graph(Graph(nodes=(policy,)), {}, command=programs.command, write=lines.append) == 0
    arguments, live, rmw = json.loads(lines[0].removeprefix("[pi] "))
    assert arguments[:-1] == [
        *("--ros-args", "-r", "__node:=pi", "-r", "__ns:=/left", "-r", "image:=/camera"),
        "--params-file",
    ]
    assert (live, rmw) == ("true", os.environ.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp"))


def test_rcl_understands_the_arguments(tmp_path: Path) -> None:
    import rclpy
    from rclpy.node import Node as RosNode

    node = Node(
        executable="policy_node",
        name="pi",
        namespace="left",
        parameters=({"seed": 3, "title": "7"}, {"seed": 4, "gains": [1.0, 2.0]}),
        remappings={"image": "/camera"},
    )
    context = rclpy.Context()
    rclpy.init(args=ros_arguments(node, tmp_path), context=context)
    ros_node = RosNode("unnamed", context=context, automatically_declare_parameters_from_overrides=True)
    try:
        assert ros_node.get_fully_qualified_name() == "/left/pi"
        assert ros_node.resolve_topic_name("image") == "/camera"
        found = {name: ros_node.get_parameter(name).value for name in ("seed", "title")}
        assert found == {"seed": 4, "title": "7"}
        assert list(ros_node.get_parameter("gains").value) == [1.0, 2.0]
    finally:
        ros_node.destroy_node()
        rclpy.shutdown(context=context)


def test_nothing_is_started_when_a_node_is_unknown(programs: Programs) -> None:
    lines: list[str] = []
    with pytest.raises(ConfigError, match="node x: no executable 'nothing_node'; choices: "):
        run_graph(Graph(nodes=(Node(executable="nothing_node", name="x"),)), {}, write=lines.append)
    assert lines == []


def test_a_node_is_a_module_of_this_package() -> None:
    # Any module will do here: the command is only put together.
    assert node_command(node("middleware")) == [sys.executable, "-m", "vla_ros.program", "middleware"]


def test_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "graph.yaml"
    path.write_text(
        "arguments: {seed: {default: 1, description: seed}}\nnodes: [{executable: nothing_node, name: x}]\n",
        encoding="utf-8",
    )
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    parsed = parser.parse_args(["up", str(path), "seed=two"])
    with pytest.raises(ConfigError, match=r"argument seed: found 'two', expected .* type int"):
        parsed.run(parsed)


@pytest.mark.parametrize("assignment", ["seed", "=3", ""])
def test_an_assignment_needs_a_name_and_a_value(assignment: str) -> None:
    with pytest.raises(ConfigError, match=f"argument '{assignment}': expected name=value"):
        pairs([assignment])


def test_without_ros_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vla_ros.middleware.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["vla", "up", "push_demo"])
    assert cli.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: rclpy is not installed") and len(error.splitlines()) == 1
