"""A lifecycle node whose transitions are plain methods.

rclpy swallows exceptions in lifecycle callbacks: here each is caught, logged and remembered. A configure that fails
leaves nothing half-made behind, and a node that is shut down comes to its safe state first.
"""

from __future__ import annotations

import traceback
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from vla_core.errors import VlaError
from vla_ros import process
from vla_ros.parameters import value


class GuardedNode(LifecycleNode):
    """Declares nothing; its parameters are ``autostart`` and, where the subclass has it, ``activate``."""

    _finished = False

    @abstractmethod
    def configure(self) -> None:
        """Load, check, subscribe; whatever it made before it raised is undone by :meth:`clean_up`."""

    @abstractmethod
    def activate(self) -> None:
        """Start to act."""

    @abstractmethod
    def deactivate(self) -> None:
        """Reach the safe state and stop acting; harmless when the node does not act."""

    @abstractmethod
    def clean_up(self) -> None:
        """Undo :meth:`configure`; harmless when there is nothing to undo."""

    @abstractmethod
    def remember(self, fault: str) -> None:
        """Keep the line that says why a transition failed."""

    @property
    def finished(self) -> bool:
        """Whether the node was shut down for good."""
        return self._finished

    def autostart(self) -> bool:
        """Configure and activate as the parameters ask for it; False when a transition failed (it was logged)."""
        if not value(self, "autostart"):
            return True
        both = not self.has_parameter("activate") or value(self, "activate")
        transitions = (self.trigger_configure, self.trigger_activate)[: 2 if both else 1]
        return all(trigger() == TransitionCallbackReturn.SUCCESS for trigger in transitions)

    def stop(self) -> None:
        """End in order: the safe state, then all that was configured. Harmless when there is nothing to end."""
        self.deactivate()
        self.clean_up()

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """ROS 2's configure."""
        result = self._guarded(self.configure)
        if result != TransitionCallbackReturn.SUCCESS:
            self.clean_up()  # nothing half-made stays behind for the next try
        return result

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """ROS 2's activate."""
        return self._guarded(self.activate)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """ROS 2's deactivate."""
        return self._guarded(self.deactivate)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """ROS 2's cleanup."""
        return self._guarded(self.clean_up)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """ROS 2's shutdown."""
        self._finished = True
        return self._guarded(self.stop)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """A transition broke in its middle: nothing half-made may go on commanding; configure starts anew."""
        self._guarded(self.stop)
        result: TransitionCallbackReturn = super().on_error(state)
        return result

    def _guarded(self, action: Callable[[], None]) -> TransitionCallbackReturn:
        try:
            action()
        except VlaError as error:
            self.remember(str(error))
            self.get_logger().error(str(error))
            return TransitionCallbackReturn.FAILURE
        except Exception as error:
            self.remember(f"{type(error).__name__}: {' '.join(str(error).split())}; see the log")
            self.get_logger().error(traceback.format_exc())
            return TransitionCallbackReturn.ERROR
        return TransitionCallbackReturn.SUCCESS


def run(node: Any, executor: Any, stop: process.Stop) -> int:
    """The loop of a guarded node's process."""
    return process.spin(executor, stop) if node.autostart() else 1
