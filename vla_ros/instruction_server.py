"""The action ``~/run_instruction``: run the policy on an instruction until it ends, fails, or its time is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rclpy.action.server import ActionServer, CancelResponse, GoalResponse
from rclpy.node import Node
from rclpy.task import Future

from vla_core.contract import NANOSECONDS
from vla_core.errors import VlaError
from vla_ros.action import RunInstruction
from vla_ros.parameters import value

if TYPE_CHECKING:
    from vla_ros.policy_node import PolicyNode

PERIOD_S = 0.2  # of feedback, and of looking at the time

Result = RunInstruction.Result


class InstructionServer:
    """One goal at a time; a newer one takes over, and at its end the node stops acting."""

    def __init__(self, node: PolicyNode) -> None:
        self._node = node
        self._done: Future | None = None
        self._instruction = ""  # of the goal that runs; empty: it keeps what is there
        self._server = ActionServer(
            node, RunInstruction, "~/run_instruction", self._execute,
            goal_callback=self._accept, cancel_callback=lambda goal: CancelResponse.ACCEPT,
        )  # fmt: skip

    def destroy(self) -> None:
        """End the goal and the server."""
        self._end(Result.STOPPED, "the node was shut down")
        self._server.destroy()

    def episode_ended(self, succeeded: bool) -> None:
        """An Episode mark says how it went."""
        self._end(Result.SUCCEEDED if succeeded else Result.FAILED, "the episode was marked so")

    @property
    def instruction(self) -> str:
        """What the goal that runs was given, and is judged by; empty when it, or nobody, was given one."""
        return self._instruction

    def _accept(self, goal: Any) -> GoalResponse:
        if self._node.configured:
            return GoalResponse.ACCEPT
        self._node.get_logger().warning("goal refused: no policy is loaded; configure the node first")
        return GoalResponse.REJECT

    async def _execute(self, handle: Any) -> Any:
        self._end(Result.CANCELED, "a newer goal took over")
        done = self._done = Future()
        self._instruction = handle.request.instruction
        clock, node = node_clock(self._node), self._node
        start_ns, commands = clock(), node.counts.commands
        problem = self._begin(handle.request.instruction)
        if problem:
            self._end(Result.FAULT, problem)
        limit = handle.request.time_limit
        run = _Run(node, handle, start_ns, limit.sec * NANOSECONDS + limit.nanosec, commands, done)
        watch = node.create_timer(PERIOD_S, lambda: self._look(run), clock=node.steady)
        try:
            reason, message = await done  # type: ignore[misc]
        finally:
            node.destroy_timer(watch)
        if self._done is done:  # no newer goal goes on from here
            self._done, self._instruction = None, ""
            message = "; ".join(filter(None, [message, node.pause()]))
        _close(handle, reason)
        result = Result(reason=reason, message=message, commands=node.counts.commands - commands)
        _fill(result.elapsed, clock() - start_ns)
        return result

    def _begin(self, instruction: str) -> str:
        try:
            if instruction:
                self._node.instruct(instruction)
        except VlaError as error:
            return str(error)
        return str(self._node.start())

    def _look(self, run: _Run) -> None:
        """Feedback, and the ends that time brings."""
        if self._done is not run.done:
            return  # a newer goal took over, and this one's end is on its way
        if run.handle.is_cancel_requested:
            self._end(Result.CANCELED, "canceled by the client")
        elif not run.node.active:
            self._end(Result.STOPPED, "the node was deactivated")
        elif run.limit_ns and run.elapsed_ns() >= run.limit_ns:
            self._end(Result.TIME_LIMIT, "the time is over")
        elif run.silent_ns() > value(run.node, "goal_fault_s") * NANOSECONDS:
            self._end(Result.FAULT, run.fault() or "nothing could be commanded")
        else:
            run.feed_back()

    def _end(self, reason: int, message: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result((reason, message))


class _Run:
    """The times of one goal."""

    def __init__(
        self, node: PolicyNode, handle: Any, start_ns: int, limit_ns: int, commands: int, done: Future
    ) -> None:
        self.node, self.handle, self.limit_ns, self.done = node, handle, limit_ns, done
        self._start_ns, self._first = start_ns, commands
        self._seen, self._steady_ns = commands, node.steady.now().nanoseconds
        self._faults = node.faults.count  # those of earlier goals say nothing about this one

    def elapsed_ns(self) -> int:
        """ROS time since the start."""
        return node_clock(self.node)() - self._start_ns

    def silent_ns(self) -> int:
        """Real time without a new command."""
        now_ns, commands = self.node.steady.now().nanoseconds, self.node.counts.commands
        if commands != self._seen:
            self._seen, self._steady_ns = commands, now_ns
        return int(now_ns - self._steady_ns)

    def fault(self) -> str:
        """The node's last fault since the goal began; empty without one."""
        return self.node.fault if self.node.faults.count != self._faults else ""

    def feed_back(self) -> None:
        feedback = RunInstruction.Feedback(
            commands=self.node.counts.commands - self._first, observation_age=self.node.observation_age_s(),
            fault=self.fault() if self.silent_ns() else "",
        )  # fmt: skip
        _fill(feedback.elapsed, self.elapsed_ns())
        self.handle.publish_feedback(feedback)


def node_clock(node: Node) -> Any:
    """A function that gives the node's time, ns."""
    return lambda: int(node.get_clock().now().nanoseconds)


def _fill(duration: Any, nanoseconds: int) -> None:
    duration.sec, duration.nanosec = divmod(max(0, nanoseconds), NANOSECONDS)


def _close(handle: Any, reason: int) -> None:
    """The state that ROS 2's actions know: a time that is over and a fault are aborts, the result has the reason."""
    if not handle.is_active:
        return
    if reason == Result.SUCCEEDED:
        handle.succeed()
    elif handle.is_cancel_requested:
        handle.canceled()
    else:
        handle.abort()
