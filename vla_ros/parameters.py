"""Node parameters: declared with a description, read with a type, refused with the choices."""

from __future__ import annotations

from typing import Any

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.node import Node

from vla_core.errors import VlaError


def declare(node: Node, name: str, default: Any, description: str) -> None:
    """Declare a parameter; its type is that of ``default``."""
    node.declare_parameter(name, default, ParameterDescriptor(description=description))


def value(node: Node, name: str) -> Any:
    """The parameter's value."""
    return node.get_parameter(name).value


def choice(node: Node, name: str, options: tuple[str, ...]) -> str:
    """The value of a text parameter that must be one of ``options``; raises :class:`VlaError` otherwise."""
    found = str(value(node, name))
    if found not in options:
        raise VlaError(f"parameter {name} is {found!r}; choices: {', '.join(options)}")
    return found
