"""Graphs: what is refused and in which words, and what `${argument}` becomes."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import yaml

from vla_core.config import ConfigError
from vla_core.resources import share
from vla_ros.graph import Graph, load_graph, parameter_files, resolve

GRAPH = """
    arguments:
      checkpoint: {description: folder of a policy}
      seed: {default: 0, description: first seed}
      rate: {default: 20.0, description: images a second}
      live: {default: false, description: real time}
      robot: {default: left, description: name of the robot}
    nodes:
      - executable: policy_node
        name: policy
        namespace: ${robot}
        parameters:
          - limits.yaml
          - {checkpoint: "${checkpoint}", seed: "${seed}", title: "seed ${seed} live ${live}",
             topics: [a, "${robot}/b"], nested: {rate: "${rate}"}}
        remappings: {image: "/${robot}/image"}
        environment: {LIVE: "${live}", THREADS: 1}
"""


def written(folder: Path, text: str = GRAPH) -> Path:
    (folder / "limits.yaml").write_text("/**: {ros__parameters: {limit: 1.0}}\n", encoding="utf-8")
    path = folder / "graph.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def test_an_argument_alone_keeps_its_type_and_inside_text_becomes_text(tmp_path: Path) -> None:
    (node,) = resolve(load_graph(written(tmp_path)), {"checkpoint": "7", "live": "true"})
    assert node.namespace == "left"
    assert node.parameters == (
        str(tmp_path / "limits.yaml"),
        {
            "checkpoint": "7",  # without a default it is text, whatever it looks like
            "seed": 0,
            "title": "seed 0 live true",
            "topics": ["a", "left/b"],
            "nested": {"rate": 20.0},
        },
    )
    assert node.remappings == {"image": "/left/image"}
    assert node.environment == {"LIVE": "true", "THREADS": "1"}


def test_given_text_takes_the_type_of_the_default(tmp_path: Path) -> None:
    graph = load_graph(written(tmp_path))
    (node,) = resolve(graph, {"checkpoint": "c", "seed": "12", "rate": "5"})
    inline = node.parameters[1]
    assert isinstance(inline, dict)
    assert (inline["seed"], inline["nested"]) == (12, {"rate": 5.0})


def test_inline_parameters_become_a_ros_parameter_file(tmp_path: Path) -> None:
    (node,) = resolve(load_graph(written(tmp_path)), {"checkpoint": "7"})
    first, second = parameter_files(node, tmp_path)
    assert first == str(tmp_path / "limits.yaml")
    read = yaml.safe_load(Path(second).read_text(encoding="utf-8"))
    assert read["/**"]["ros__parameters"]["checkpoint"] == "7"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"argument checkpoint: missing \(folder of a policy\); give it as checkpoint=VALUE"),
        (
            {"speed": 1},
            "argument speed: unknown; choices: checkpoint, live, rate, robot, seed",
        ),
        (
            {"checkpoint": "c", "seed": "1.5"},
            "argument seed: found '1.5', expected a value of type int such as 0",
        ),
        (
            {"checkpoint": "c", "seed": "true"},
            "argument seed: found 'true', expected a value of type int",
        ),
        ({"checkpoint": "c", "live": "["}, "argument live: found '\\[', expected .* type bool"),
        ({"checkpoint": "c", "robot": "le ft"}, r"nodes\[0\].namespace: found 'le ft', expected"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(load_graph(written(tmp_path)), given)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "name: policy",
            "nmae: policy",
            r"graph.yaml: nodes\[0\].nmae: unknown key; choices: .*",
        ),
        ("executable: policy_node", "required: true", r"nodes\[0\].executable: missing"),
        ("- limits.yaml", "- 3", r"nodes\[0\].parameters\[0\]: expected str or dict"),
        ("{LIVE: ", "{LIVE: [1], X: ", r"nodes\[0\].environment.LIVE: expected str or bool or int"),
        (
            "${seed}",
            "${sed}",
            r"nodes\[0\].parameters\[1\].seed: \$\{sed\} is no argument of this graph; "
            "choices: checkpoint, live, rate, robot, seed",
        ),
        ("first seed", "first seed, extra: 1", r"arguments.seed.extra: unknown key"),
    ],
)
def test_descriptions_that_are_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_graph(written(tmp_path, GRAPH.replace(old, new, 1)))


def test_a_graph_needs_nodes() -> None:
    with pytest.raises(ConfigError, match="nodes: expected at least one node"):
        Graph(nodes=())


def test_two_nodes_of_one_name(tmp_path: Path) -> None:
    text = "nodes:\n  - {executable: a_node, name: x}\n  - {executable: b_node, name: x}\n"
    with pytest.raises(ConfigError, match=r"nodes\[1\].name: '/x' is also nodes\[0\]"):
        resolve(load_graph(written(tmp_path, text)), {})


def test_a_parameter_file_that_is_not_there(tmp_path: Path) -> None:
    graph = load_graph(written(tmp_path))
    (tmp_path / "limits.yaml").unlink()
    with pytest.raises(ConfigError, match=r"nodes\[0\].parameters\[0\]: no such parameter file"):
        resolve(graph, {"checkpoint": "c"})


def test_the_graphs_that_are_shipped_resolve() -> None:
    for path in sorted(share("config/graphs").glob("*.yaml")):
        graph = load_graph(path)
        required = [name for name, a in graph.arguments.items() if a.default is None]
        assert resolve(graph, dict.fromkeys(required, "x"))


def test_when_leaves_nodes_out_and_remap_is_text(tmp_path: Path) -> None:
    text = """
        arguments:
          safety: {default: true, description: with a safety node}
          remap: {default: "", description: remaps}
        nodes:
          - {executable: policy_node, name: policy, remap: "${remap}", remappings: {a: b}}
          - {executable: safety_node, name: safety, when: "${safety}"}
    """
    graph = load_graph(written(tmp_path, text))
    assert [node.name for node in resolve(graph, {})] == ["policy", "safety"]
    (policy,) = resolve(graph, {"safety": "false", "remap": "image:=/left/image  a:=c"})
    assert policy.remappings == {"a": "c", "image": "/left/image"}
    with pytest.raises(ConfigError, match=r"nodes\[0\].remap: found 'image=x', expected from:=to"):
        resolve(graph, {"remap": "image=x"})


def test_when_must_be_true_or_false(tmp_path: Path) -> None:
    text = """
        arguments: {who: {default: me, description: somebody}}
        nodes: [{executable: policy_node, name: policy, when: "${who}"}]
    """
    with pytest.raises(ConfigError, match=r"nodes\[0\].when: found 'me', expected true, false"):
        resolve(load_graph(written(tmp_path, text)), {})


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("policy", {"checkpoint": "c"}),
        ("record", {"contract": "arm"}),
        ("replay", {"bag": "b", "checkpoint": "c"}),
    ],
)
def test_the_shipped_graphs_put_every_node_where_the_caller_says(name: str, given: dict[str, str]) -> None:
    nodes = resolve(load_graph(name), {**given, "namespace": "left", "remap": "a:=b"})
    assert nodes and all(node.namespace == "left" and node.remappings["a"] == "b" for node in nodes)
