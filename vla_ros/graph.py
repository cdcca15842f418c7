"""One description of which nodes run together, read by `vla up` and by the launch files alike.

A graph is a YAML file:

    arguments:                        # what the caller may set; every one is documented
      checkpoint: {description: folder of a trained policy}          # no default: must be given
      seed: {default: 0, description: first seed}                    # values must fit its type
    nodes:
      - executable: policy_node       # a program of this package: vla_ros/policy_node.py
        name: policy                  # the node's name
        namespace: ""                 # default: none
        parameters:                   # in order, later ones win
          - ../robots/metaworld.yaml  # a ROS 2 parameter file, relative to the graph's own folder
          - {checkpoint: "${checkpoint}", seed: "${seed}"}           # or parameters themselves
        remappings: {image: camera/image}
        remap: "${remap}"             # more of them as one text, "image:=camera/image state:=arm/state"
        environment: {MUJOCO_GL: osmesa}
        when: "${safety}"             # default: true; false leaves the node out
        required: true                # default: the graph ends in failure when this node ends
        ends_graph: false             # true: the graph ends in success when this node exits with 0

`${name}` stands for an argument, in every value but never in a key. Alone in a value it keeps the
argument's type (`"${seed}"` is the number); inside other text it becomes text. Nothing here imports
ROS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from vla_core.config import ConfigError, config_file, from_dict, load_yaml
from vla_core.errors import choices

Scalar = str | bool | int | float

REFERENCE = re.compile(r"\$\{([^}]*)\}")
# Names that ROS 2 accepts for a node, and for a namespace.
NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NAMESPACE = re.compile(r"/?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*")


@dataclass(frozen=True, kw_only=True)
class Argument:
    """Something the caller may set; without a default it must be given, as text."""

    description: str
    default: Scalar | None = None


@dataclass(frozen=True, kw_only=True)
class Node:
    """One process of a graph; the module's docstring explains the fields."""

    executable: str
    name: str
    namespace: str = ""
    parameters: tuple[str | dict[str, Any], ...] = ()
    remappings: dict[str, str] = field(default_factory=dict)
    remap: str = ""
    environment: dict[str, Scalar] = field(default_factory=dict)
    when: bool | str = True
    required: bool = True
    ends_graph: bool = False


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Nodes that run together. `resolve` turns what was loaded into what can be started."""

    nodes: tuple[Node, ...]
    arguments: dict[str, Argument] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ConfigError("nodes: expected at least one node, found none")
        _check_references([_values(node) for node in self.nodes], "nodes", set(self.arguments))


def load_graph(path: Path | str) -> Graph:
    """Read and check the graph at `path`, or the one of that name in `config/graphs`.

    Parameter files come out as absolute paths.

    Raises:
        ConfigError: naming the file and the dotted path of what is wrong, with the choices.
    """
    path = config_file(path, "config/graphs", "graph")
    data = load_yaml(path)
    try:
        graph = from_dict(Graph, data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    folder = path.resolve().parent
    return replace(graph, nodes=tuple(_with_absolute_files(node, folder) for node in graph.nodes))


def resolve(graph: Graph, given: Mapping[str, Scalar]) -> tuple[Node, ...]:
    """The graph's nodes with every `${argument}` replaced; `given` may hold text for any type.

    Raises:
        ConfigError: an argument that is unknown, missing or of the wrong type; a parameter file
            that does not exist; a name that ROS 2 refuses; two nodes of one name.
    """
    values = _argument_values(graph.arguments, given)
    nodes = tuple(
        _resolve_node(node, values, f"nodes[{i}]")
        for i, node in enumerate(graph.nodes)
        if _wanted(node, values, f"nodes[{i}].when")
    )
    names = [f"{node.namespace}/{node.name}" for node in nodes]
    for i, (node, name) in enumerate(zip(nodes, names, strict=True)):
        _check_names(node, f"nodes[{i}]")
        if name in names[:i]:
            raise ConfigError(f"nodes[{i}].name: {name!r} is also nodes[{names.index(name)}]; expected one node a name")
        for j, entry in enumerate(node.parameters):
            if isinstance(entry, str) and not Path(entry).is_file():
                raise ConfigError(f"nodes[{i}].parameters[{j}]: no such parameter file: {entry}")
    return nodes


def parameter_files(node: Node, folder: Path) -> list[str]:
    """The ROS 2 parameter files of a resolved node, in order; inline ones are written to `folder`.

    ROS 2 lets the later file win, so each inline mapping gets a file of its own.
    """
    files = []
    for i, entry in enumerate(node.parameters):
        if isinstance(entry, dict):
            name = f"{node.namespace}/{node.name}".strip("/").replace("/", "_")
            path = folder / f"{name}_{i}.yaml"
            inline = {"/**": {"ros__parameters": entry}}
            path.write_text(yaml.safe_dump(inline, sort_keys=False), encoding="utf-8")
            entry = str(path)
        files.append(entry)
    return files


def _argument_values(arguments: Mapping[str, Argument], given: Mapping[str, Scalar]) -> dict[str, Scalar]:
    for name in given:
        if name not in arguments:
            raise ConfigError(f"argument {name}: unknown; choices: {choices(arguments)}")
    values: dict[str, Scalar] = {}
    for name, argument in arguments.items():
        if name in given:
            values[name] = _typed(name, given[name], argument.default)
        elif argument.default is not None:
            values[name] = argument.default
        else:
            raise ConfigError(f"argument {name}: missing ({argument.description}); give it as {name}=VALUE")
    return values


def _typed(name: str, value: Scalar, default: Scalar | None) -> Scalar:
    """`value` in the type of `default`; text (from a command line) is read as YAML reads it."""
    kind = str if default is None else type(default)
    if kind is str:
        return str(value)
    try:
        read = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        read = None
    if kind is float and isinstance(read, int) and not isinstance(read, bool):
        return float(read)
    if type(read) is not kind:
        raise ConfigError(
            f"argument {name}: found {value!r}, expected a value of type {kind.__name__} such as {default!r}"
        )
    return kind(read)


def _wanted(node: Node, values: Mapping[str, Scalar], path: str) -> bool:
    wanted = _substitute(node.when, values)
    if not isinstance(wanted, bool):
        raise ConfigError(f"{path}: found {wanted!r}, expected true, false or an argument that is one of them")
    return wanted


def remap_rules(text: str, path: str) -> dict[str, str]:
    """Topic to other topic, from rules as ROS 2 writes them: ``from:=to``, separated by spaces."""
    rules = {}
    for rule in text.split():
        topic, arrow, other = rule.partition(":=")
        if not (topic and arrow and other):
            raise ConfigError(f"{path}: found {rule!r}, expected from:=to, several separated by spaces")
        rules[topic] = other
    return rules


def _resolve_node(node: Node, values: Mapping[str, Scalar], path: str) -> Node:
    value = {name: _substitute(item, values) for name, item in _values(node).items()}
    remappings = {topic: _text(other) for topic, other in value["remappings"].items()}
    return replace(
        node,
        name=_text(value["name"]),
        namespace=_text(value["namespace"]),
        parameters=tuple(e if isinstance(e, dict) else _text(e) for e in value["parameters"]),
        remappings=remappings | remap_rules(_text(value["remap"]), f"{path}.remap"),
        remap="",
        environment={name: _text(text) for name, text in value["environment"].items()},
        when=True,
    )


def _values(node: Node) -> dict[str, Any]:
    """The fields of `node` in which an argument may stand."""
    return {
        "name": node.name,
        "namespace": node.namespace,
        "parameters": node.parameters,
        "remappings": node.remappings,
        "remap": node.remap,
        "environment": node.environment,
        "when": node.when,
    }


def _substitute(value: Any, values: Mapping[str, Scalar]) -> Any:
    if isinstance(value, Mapping):
        return {key: _substitute(item, values) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_substitute(item, values) for item in value)
    if not isinstance(value, str):
        return value
    whole = REFERENCE.fullmatch(value)
    if whole is not None:
        return values[whole[1]]
    return REFERENCE.sub(lambda reference: _text(values[reference[1]]), value)


def _text(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_references(value: Any, path: str, arguments: set[str]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_references(item, f"{path}.{key}", arguments)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_references(item, f"{path}[{i}]", arguments)
    elif isinstance(value, str):
        for reference in REFERENCE.finditer(value):
            if reference[1] not in arguments:
                raise ConfigError(f"{path}: {reference[0]} is no argument of this graph; choices: {choices(arguments)}")


def _with_absolute_files(node: Node, folder: Path) -> Node:
    def absolute(entry: str | dict[str, Any]) -> str | dict[str, Any]:
        # A path that starts with an argument belongs to the caller, not to the graph's folder.
        if isinstance(entry, dict) or entry.startswith("${"):
            return entry
        return str(folder / entry)

    return replace(node, parameters=tuple(absolute(entry) for entry in node.parameters))


def _check_names(node: Node, path: str) -> None:
    for key, value, pattern in (
        ("executable", node.executable, NODE_NAME),
        ("name", node.name, NODE_NAME),
        ("namespace", node.namespace or "/root", NAMESPACE),
    ):
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ConfigError(
                f"{path}.{key}: found {value!r}, expected letters, digits and _ that do not start with a digit"
            )
