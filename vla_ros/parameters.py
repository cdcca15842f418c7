"""Node parameters: declared with a description and a range, read with a type, refused with the choices."""

from __future__ import annotations

from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node

from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.hub import local_folder


def declare(
    node: Node,
    name: str,
    default: Any,
    description: str,
    *,
    low: float | None = None,
    high: float | None = None,
) -> None:
    """Declare a parameter; its type is that of ``default``, and a number lies in [``low``, ``high``].

    Raises rclpy's ``InvalidParameterValueException`` for a value that was given outside; later ones are refused.
    """
    descriptor = ParameterDescriptor(description=description)
    if low is not None or high is not None:
        bounds = (low if low is not None else -1e9, high if high is not None else 1e9)
        if isinstance(default, float):
            descriptor.floating_point_range = [
                FloatingPointRange(from_value=float(bounds[0]), to_value=float(bounds[1]))
            ]
        else:
            descriptor.integer_range = [IntegerRange(from_value=int(bounds[0]), to_value=int(bounds[1]))]
    node.declare_parameter(name, default, descriptor)


def value(node: Node, name: str) -> Any:
    """The parameter's value."""
    return node.get_parameter(name).value


def choice(node: Node, name: str, options: tuple[str, ...]) -> str:
    """The value of a text parameter that must be one of ``options``; raises :class:`VlaError` otherwise."""
    found = str(value(node, name))
    if found not in options:
        raise VlaError(f"parameter {name} is {found!r}; choices: {', '.join(options)}")
    return found


def contract_of(node: Node) -> RobotContract:
    """The contract that the parameters ``contract`` and ``checkpoint`` name; the robot's own file goes first."""
    if value(node, "contract"):
        return RobotContract.load(value(node, "contract"))
    if value(node, "checkpoint"):
        return RobotContract.load(local_folder(value(node, "checkpoint")) / "contract.yaml")
    raise VlaError("parameters contract and checkpoint are empty; name the robot's contract (one in config/robots, or "
                   "a file), or the folder of a policy")  # fmt: skip
