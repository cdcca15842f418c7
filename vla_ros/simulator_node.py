"""A simulator as a robot on ROS topics. It obeys only the commands that it receives.

Any world of ``vla_core.sim.worlds``: Meta-World (``push-v3``), the LIBERO suites (``libero_spatial:3``), PushT
(``pusht``), and those of plug-ins.

Two clocks. ``lockstep`` publishes ``/clock`` and the observation, and waits for the command of the same stamp: the same
seeds give the same run, as fast as the machine allows. ``realtime`` keeps the contract's rate on the system clock:
a late command is late, and without a fresh one the robot takes its safe action.

``driver: expert`` publishes the scripted expert's commands, of worlds that have one, on the command topic, from where
they come back like any other's; ``driver: policy`` waits for somebody else's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from rosgraph_msgs.msg import Clock

from vla_core.commands import decode, encode
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.data.episodes import EPISODE_TOPIC
from vla_core.errors import VlaError
from vla_core.observation import messages
from vla_core.observation.messages import Message, header_stamp_ns
from vla_core.sim.base import View
from vla_core.sim.metaworld import MetaWorld
from vla_core.sim.worlds import find, make_world, task_of
from vla_ros import process
from vla_ros.bridge import COMMAND_QOS, EPISODE_QOS, command_publishers, message_class, publish_streams
from vla_ros.msg import Episode
from vla_ros.parameters import choice, declare, value

QUEUE_DEPTH = 500  # a recorder may lag by some episodes' worth of messages
PAUSE_NS = NANOSECONDS  # between two episodes, on the episode's clock
NEWEST_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
STALE_STEPS = 8  # realtime: a command older than this many steps no longer counts
ACK_TIMEOUT = Duration(seconds=10)


class SimulatorError(VlaError):
    """The rest of the graph does not answer."""


class SimulatorNode(Node):
    """See the module; parameters are declared in ``__init__``."""

    def __init__(self, **options: Any) -> None:
        super().__init__("simulator", **options)
        declare(
            self, "contract", "", "the robot's contract: a name in config/robots, or a file; empty takes the task's"
        )
        declare(self, "task", "push-v3", "a world: a Meta-World task, libero_spatial:3, pusht, …")
        declare(self, "camera", "", "camera of worlds that let one choose; empty takes corner2")
        declare(self, "camera_size", 0, "height and width of the published images, pixels; 0 takes the world's own")
        declare(self, "black_camera", False, "publish black images")
        declare(self, "instruction", "", "instruction to publish; empty takes the task's own")
        declare(self, "clock", "realtime", "realtime or lockstep")
        declare(self, "driver", "policy", "who commands: policy (others) or expert (this node, over the same topic)")
        declare(self, "episodes", 1, "episodes to run")
        declare(self, "seed", 0, "seed of the first episode; each later one counts up")
        declare(self, "max_steps", 0, "control steps after which an episode has failed; 0 takes the task's own")
        declare(self, "wait_for", [""], "names of nodes that must listen before the first episode")
        declare(self, "wait_timeout_s", 60.0, "how long to wait for them")
        declare(self, "command_timeout_s", 10.0, "lockstep: how long to wait for a command")
        declare(self, "results", "", "JSON file for every episode's outcome")
        declare(self, "video", "", "GIF file of the first episodes")
        declare(self, "video_episodes", 3, "how many episodes the video shows")

        for name, least in (("seed", 0), ("episodes", 1), ("max_steps", 0), ("camera_size", 0)):
            if value(self, name) < least:
                raise VlaError(f"parameter {name} is {value(self, name)}; expected at least {least}")
        for name in ("results", "video"):
            if value(self, name):  # what cannot be written must fail here, not after the run
                Path(value(self, name)).parent.mkdir(parents=True, exist_ok=True)
        name = value(self, "task")
        simulator, _ = find(name)
        self.task = task_of(name)
        self.contract = RobotContract.load(value(self, "contract") or simulator.contract)
        self._lockstep = choice(self, "clock", ("realtime", "lockstep")) == "lockstep"
        self._expert_drives = choice(self, "driver", ("policy", "expert")) == "expert"
        view = View(
            camera=value(self, "camera") or None, size=value(self, "camera_size") or None,
            black=value(self, "black_camera"),
        )  # fmt: skip
        self.world = make_world(name, self.contract, view)
        self._expert = self.world if isinstance(self.world, MetaWorld) else None
        if self._expert_drives and self._expert is None:
            raise VlaError(f"parameter driver is 'expert': {name} has no scripted expert; choices: policy")
        self.instruction = value(self, "instruction") or self.task.instruction
        self._max_steps = value(self, "max_steps") or self.task.max_steps
        self.results: list[dict[str, Any]] = []
        self._frames: list[np.ndarray] = []
        self._late_ticks = 0
        self._command: tuple[int, np.ndarray] | None = None
        self._lockstep_ns = PAUSE_NS  # stamps of simulated time start after zero, which ROS reads as "no time yet"

        self._publishers_by_topic = publish_streams(self, self.contract, QUEUE_DEPTH)
        self._clock_publisher = self.create_publisher(Clock, "/clock", 10) if self._lockstep else None
        (self._action,) = self.contract.actions.values()  # the world has checked that it is one
        self._expert_publisher = (
            command_publishers(self, self.contract)[self._action.topic] if self._expert_drives else None
        )
        self._episode_publisher = self.create_publisher(Episode, EPISODE_TOPIC, EPISODE_QOS)
        action = self._action
        # Realtime obeys the newest command: a queue would hand a slow simulator ever older ones.
        qos = COMMAND_QOS if self._lockstep else NEWEST_QOS
        self.create_subscription(message_class(action.type), action.topic, self._on_command, qos, raw=True)

    def stop(self) -> None:
        """Write what was measured so far."""
        self._write_outputs()
        self.world.close()

    def run(self, executor: Any, stop: process.Stop) -> int:
        """All episodes; 0 when every one of them was run."""
        self._wait_for_listeners(executor, stop)
        for index in range(value(self, "episodes")):
            seed = value(self, "seed") + index
            done = self._run_episode(executor, stop, index, seed)
            if not done:
                return 0
        # Late messages of the last episode are on their way: only what was acknowledged has arrived.
        self._episode_publisher.wait_for_all_acked(ACK_TIMEOUT)
        return 0

    def _run_episode(self, executor: Any, stop: process.Stop, index: int, seed: int) -> bool:
        """One episode; False when told to stop in its middle."""
        self.world.reset(seed)
        self._command = None
        self._publish_latched()
        start_ns = self._lockstep_ns if self._lockstep else self._now_ns()
        self._mark(Episode.START, start_ns, index, seed, 0)
        period_ns = self.contract.step_ns
        start_wall_ns = time.monotonic_ns()
        state, steps, stamp_ns = Episode.FAILED, 0, start_ns
        while steps < self._max_steps:
            stamp_ns = start_ns + steps * period_ns if self._lockstep else self._now_ns()
            self._publish_observation(stamp_ns, steps, index)
            if self._expert_publisher is not None and self._expert is not None:
                data = encode(self._action, stamp_ns, self._expert.expert()[None, :], self.contract.step_ns)
                self._expert_publisher.publish(data)
            if self._lockstep:
                values = self._await_command(executor, stop, stamp_ns)
            else:
                values = self._await_tick(executor, stop, start_wall_ns + (steps + 1) * period_ns)
            if values is None:
                self._mark(Episode.ABORTED, stamp_ns, index, seed, steps)
                return False
            self.world.step(values)
            steps += 1
            if self.world.success:
                state = Episode.SUCCEEDED
                break
        for publisher in self._publishers_by_topic.values():
            publisher.wait_for_all_acked(ACK_TIMEOUT)
        if self._expert_publisher is not None:
            self._expert_publisher.wait_for_all_acked(ACK_TIMEOUT)
        self._mark(state, stamp_ns, index, seed, steps)
        self._lockstep_ns = stamp_ns + PAUSE_NS
        self.results.append({"seed": seed, "success": state == Episode.SUCCEEDED, "steps": steps})
        total = sum(result["success"] for result in self.results)
        self.get_logger().info(
            f"episode {index + 1} of {value(self, 'episodes')}: seed {seed}, "
            f"{'success' if self.world.success else 'failure'} after {steps} steps ({total} of {len(self.results)})"
        )
        return True

    def _publish_observation(self, stamp_ns: int, step: int, index: int) -> None:
        if self._clock_publisher is not None:
            self._clock_publisher.publish(Clock(clock=Time(nanoseconds=stamp_ns).to_msg()))
        self._publish(self.world.observe_state(stamp_ns))
        if step % self.world.steps_per_frame == 0:
            # After the numbers, with the same stamp: a picture takes longer, as a real camera's does.
            self._publish(self.world.observe_camera(stamp_ns))
            if value(self, "video") and index < value(self, "video_episodes"):
                self._frames.append(self.world.render_for_people())

    def _publish(self, observed: list[Message]) -> None:
        for message in observed:
            self._publishers_by_topic[message.topic].publish(message.data)

    def _publish_latched(self) -> None:
        """The instruction, before anything that it is about."""
        for stream in self.contract.observations.values():
            if stream.latched:
                publisher = self._publishers_by_topic[stream.topic]
                publisher.publish(messages.text(self.instruction))
                publisher.wait_for_all_acked(ACK_TIMEOUT)

    def _mark(self, state: int, stamp_ns: int, index: int, seed: int, steps: int) -> None:
        """Publish a border of the episode and wait until everybody has it: what follows comes after it."""
        mark = Episode(state=state, index=index, seed=seed, task=self.task.world, instruction=self.instruction,
                       steps=steps)  # fmt: skip
        mark.header.stamp = Time(nanoseconds=stamp_ns).to_msg()
        self._episode_publisher.publish(mark)
        self._episode_publisher.wait_for_all_acked(ACK_TIMEOUT)

    def _on_command(self, data: bytes) -> None:
        action = self._action
        stamp_ns = header_stamp_ns(action.type, data)
        assert stamp_ns is not None, "commands carry a header"
        try:
            self._command = (stamp_ns, decode(action, data)[0])
        except VlaError as error:
            self.get_logger().error(f"command ignored: {error}", throttle_duration_sec=1.0)

    def _await_command(self, executor: Any, stop: process.Stop, stamp_ns: int) -> np.ndarray | None:
        """Lockstep: the command that answers ``stamp_ns``; None when told to stop."""
        limit_s = value(self, "command_timeout_s")
        deadline = time.monotonic() + limit_s
        while self._command is None or self._command[0] != stamp_ns:
            if stop():
                return None
            if time.monotonic() > deadline:
                topic = self._action.topic
                raise SimulatorError(
                    f"no command answered the observation of stamp {stamp_ns} ns within {limit_s:.0f} s on {topic!r}; "
                    f"it has {self.count_publishers(topic)} publishers, the last command was for "
                    f"{self._command[0] if self._command else 'no'} stamp"
                )
            executor.spin_once(timeout_sec=0.1)
        return self._command[1]

    def _await_tick(self, executor: Any, stop: process.Stop, tick_wall_ns: int) -> np.ndarray | None:
        """Realtime: spin until the tick, then the newest fresh command, or the contract's safe action."""
        if time.monotonic_ns() > tick_wall_ns:
            self._late_ticks += 1
        while not stop():
            executor.spin_once(timeout_sec=max(0.0, (tick_wall_ns - time.monotonic_ns()) / NANOSECONDS))
            if time.monotonic_ns() >= tick_wall_ns:
                break
        else:
            return None
        last = self._command[1] if self._command else self.world.rest()
        age_ns = self._now_ns() - self._command[0] if self._command else None
        if age_ns is not None and age_ns <= STALE_STEPS * self.contract.step_ns:
            return last
        return self.contract.safe_values(last)

    def _wait_for_listeners(self, executor: Any, stop: process.Stop) -> None:
        """Until every node of ``wait_for`` listens and, without an expert, somebody commands."""
        wanted = {name for name in value(self, "wait_for") if name}
        deadline = time.monotonic() + value(self, "wait_timeout_s")
        topic = self._action.topic
        while not stop():
            # They subscribe to the episodes last, so whoever is there has its other subscriptions too.
            listening = {info.node_name for info in self.get_subscriptions_info_by_topic(EPISODE_TOPIC)}
            matched = self._episode_publisher.get_subscription_count() >= len(wanted)
            commanded = self._expert_drives or self.count_publishers(topic) > 0
            if wanted <= listening and matched and commanded:
                return
            if time.monotonic() > deadline:
                absent = sorted(wanted - listening) or [f"a publisher of {topic!r}"]
                raise SimulatorError(f"waited {value(self, 'wait_timeout_s'):.0f} s in vain for {', '.join(absent)}")
            executor.spin_once(timeout_sec=0.05)

    def _write_outputs(self) -> None:
        if value(self, "results"):
            path = Path(value(self, "results"))
            record = {"task": self.task.world, "camera": value(self, "camera"), "instruction": self.instruction,
                      "clock": value(self, "clock"), "max_steps": self._max_steps,
                      "late_ticks": self._late_ticks, "episodes": self.results}  # fmt: skip
            path.write_text(json.dumps(record, indent=1), encoding="utf-8")
        if self._frames:
            from PIL import Image

            path = Path(value(self, "video"))
            first, *rest = [Image.fromarray(frame) for frame in self._frames]
            period_ms = round(1000 * self.world.steps_per_frame / self.contract.rate_hz)
            first.save(path, save_all=True, append_images=rest, duration=period_ms, loop=0)

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def _run(node: Any, executor: Any, stop: process.Stop) -> int:
    return int(node.run(executor, stop))


def main() -> int:
    """Entry point of ``simulator_node``."""
    return process.main(SimulatorNode, _run)


if __name__ == "__main__":
    sys.exit(main())
