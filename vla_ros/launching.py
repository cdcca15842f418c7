"""A graph file as actions of ROS 2's launch tools; `vla up` reads the same file, so both start the same nodes."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch.events.process import ProcessExited
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node as RosNode

from vla_ros.graph import Graph, Node, load_graph, parameter_files, resolve
from vla_ros.middleware import settings


def launch_description(name: str) -> LaunchDescription:
    """The graph `config/graphs/<name>.yaml`; its arguments become launch arguments."""
    graph = load_graph(name)
    declared = [
        DeclareLaunchArgument(
            name,
            description=argument.description,
            default_value=None if argument.default is None else str(argument.default),
        )
        for name, argument in graph.arguments.items()
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start, args=[graph])])


def start(context: LaunchContext, graph: Graph) -> list[RosNode]:
    given = {name: LaunchConfiguration(name).perform(context) for name in graph.arguments}
    folder = Path(tempfile.mkdtemp(prefix="vla_launch_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return [action(node, folder) for node in resolve(graph, given)]


def action(node: Node, folder: Path) -> RosNode:
    unset = {name: value for name, value in settings().items() if name not in os.environ}
    return RosNode(
        package="vla_ros",
        executable=node.executable,
        name=node.name,
        namespace=node.namespace,
        # Files, not values: launch_ros would read a text such as "1" as the number again.
        parameters=parameter_files(node, folder),
        remappings=list(node.remappings.items()),
        additional_env={**unset, **node.environment, "PYTHONUNBUFFERED": "1"},
        output="screen",
        on_exit=ended(node),
    )


def ended(node: Node) -> Callable[[ProcessExited, LaunchContext], Shutdown | None]:
    """What the end of `node` means for the others, as in `vla up`."""

    def on_exit(event: ProcessExited, context: LaunchContext) -> Shutdown | None:
        if context.is_shutdown:
            return None
        if node.ends_graph and event.returncode == 0:
            return Shutdown(reason=f"{node.name} is done")
        if node.required or node.ends_graph:
            # An error in a handler stops everything and makes `ros2 launch` exit with 1.
            raise RuntimeError(f"{node.name} exited with {event.returncode}")
        return None

    return on_exit
