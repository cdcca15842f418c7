"""A simulator as a robot on ROS topics. It obeys only the commands that it receives.

Any world of ``vla_core.sim.worlds``: Meta-World (``push-v3``), the LIBERO suites (``libero_spatial:3``), PushT
(``pusht``), the vehicle (``driving:turn_left``), and those of plug-ins. A robot whose contract has ``following`` obeys
that command, which a trajectory follower makes of the planned trajectories.

Two clocks. ``lockstep`` publishes ``/clock``, the observation and its ``tick``, and waits for the command of the same
stamp: the same seeds give the same run, as fast as the machine allows. ``realtime`` keeps the contract's rate on the
system clock: a late command is late, and without a fresh one the robot takes its safe action. The world moves by one
control step at a time (``realtime_rate_hz`` makes the steps shorter); sensors that are faster than that send what they
measured during a step at its end, each message with the stamp of its measurement. A vehicle's world that cannot keep up
falls behind the clock, and says how often (``late_ticks`` of the results); it never runs fast to catch up.

``driver: expert`` publishes what the world's expert does, of worlds that have one, on the contract's action topic: from
there it comes back like any other's command. ``driver: policy`` waits for somebody else's. As a ``teleoperator`` the
expert stands by: on ``teleop/<topic>`` it says at every tick what it would do, and on ``takeover`` it asks for the
command in a share ``beta`` of the segments, as a human does who watches a policy (``takeover_node``). ``faults`` and
``disturbance`` make it harder: see ``vla_core.sim.faults`` and ``vla_core.sim.noise``; both are the same for a seed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from std_msgs.msg import Bool

from vla_core.commands import decode, encode
from vla_core.config import from_dict, override
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.data.episodes import EPISODE_TOPIC
from vla_core.errors import VlaError
from vla_core.observation.messages import header_stamp_ns
from vla_core.runtime.takeover import TAKEOVER_TOPIC, TELEOP_PREFIX
from vla_core.sim.base import HasExpert, Journey, View, details_of, instruction_now, is_over
from vla_core.sim.collect import EXECUTED
from vla_core.sim.faults import Faults
from vla_core.sim.noise import Disturbance, Noise
from vla_core.sim.worlds import find, make_world, task_of
from vla_ros import process
from vla_ros.bridge import COMMAND_QOS, EPISODE_QOS, LATCHED_QOS, message_class
from vla_ros.film import Film
from vla_ros.msg import Episode
from vla_ros.parameters import choice, declare, value
from vla_ros.world_feed import ACK_TIMEOUT, WorldFeed

PAUSE_NS = NANOSECONDS  # between two episodes, on the episode's clock
NEWEST_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
STALE_STEPS = 8  # realtime: a command older than this many steps no longer counts


class SimulatorError(VlaError):
    """The rest of the graph does not answer."""


class SimulatorNode(Node):
    """See the module; parameters are declared in ``__init__``."""

    def __init__(self, **options: Any) -> None:
        super().__init__("simulator", **options)
        self._declare()
        for name, least in (("seed", 0), ("episodes", 1), ("max_steps", 0), ("camera_size", 0)):
            if value(self, name) < least:
                raise VlaError(f"parameter {name} is {value(self, name)}; expected at least {least}")
        if value(self, "results"):  # what cannot be written must fail here, not after the run
            Path(value(self, "results")).parent.mkdir(parents=True, exist_ok=True)
        name = value(self, "task")
        simulator, _ = find(name)
        self.task = task_of(name)
        self.contract = RobotContract.load(value(self, "contract") or simulator.contract)
        self._lockstep = choice(self, "clock", ("realtime", "lockstep")) == "lockstep"
        driver = choice(self, "driver", ("policy", "expert", "teleoperator"))
        self._expert_drives, self._stands_by = driver != "policy", driver == "teleoperator"
        view = View(
            camera=value(self, "camera") or None, size=value(self, "camera_size") or None,
            black=value(self, "black_camera"), swapped=value(self, "swapped"),
        )  # fmt: skip
        self.world = make_world(name, self._stepped(self.contract), view)
        self._period_ns = self.world.contract.step_ns
        self._expert = self.world if isinstance(self.world, HasExpert) else None
        if self._expert_drives and self._expert is None:
            raise VlaError(f"parameter driver is {driver!r}: {name} has no scripted expert; choices: policy")
        if view.swapped and not isinstance(self.world, Journey):
            raise VlaError(f"parameter swapped: {name} says nothing by itself; give it another task's instruction")
        # The simulated part of a control step: 1, or more where a realtime world moves by shorter ones.
        self._substeps = round(self.contract.step_ns / self._period_ns)
        self._max_steps = (value(self, "max_steps") or self.task.max_steps) * self._substeps
        faults = [text for entry in value(self, "faults") for text in entry.split()]
        self.feed = WorldFeed(self, self.world, Faults.parse(faults, self.contract), self._lockstep)
        (self._action,) = self.contract.actions.values()  # the world has checked that it is one
        following = self.contract.following
        self._obeyed = self._action if following is None else following.command
        self._stale_ns = (
            STALE_STEPS * self._period_ns if following is None else round(following.timeout_s * NANOSECONDS)
        )
        changes = [change for entry in value(self, "disturbance") for change in entry.split()]
        self._noise = from_dict(Noise, override({}, changes)) if changes else None
        Disturbance(self._noise, self._obeyed, np.random.default_rng(0))  # bad names fail here
        self._film = None
        if value(self, "video"):
            self._film = Film(Path(value(self, "video")), self.contract.rate_hz / self.world.steps_per_frame
                              * self._substeps)  # fmt: skip
        self.results: list[dict[str, Any]] = []
        self._said: list[str] = []
        self._late_ticks = 0
        self._command: tuple[int, np.ndarray] | None = None
        self._reset_seed: int | None = None
        self._lockstep_ns = PAUSE_NS  # stamps of simulated time start after zero, which ROS reads as "no time yet"
        self._episode_publisher = self.create_publisher(Episode, EPISODE_TOPIC, EPISODE_QOS)
        plan_class = message_class(self._action.type)
        plan_topic = TELEOP_PREFIX + self._action.topic if self._stands_by else self._action.topic
        self._plan_publisher = (
            self.create_publisher(plan_class, plan_topic, COMMAND_QOS) if self._expert_drives else None
        )
        self._takeover_publisher = self.create_publisher(Bool, TAKEOVER_TOPIC, LATCHED_QOS) if self._stands_by else None
        command_class = message_class(self._obeyed.type)
        self._executed_publisher = (
            self.create_publisher(command_class, EXECUTED + self._obeyed.topic, COMMAND_QOS) if self._noise else None
        )
        if self._film is not None and following is not None:
            self.create_subscription(plan_class, self._action.topic, self._on_plan, COMMAND_QOS, raw=True)
        # Realtime obeys the newest command: a queue would hand a slow simulator ever older ones.
        qos = COMMAND_QOS if self._lockstep else NEWEST_QOS
        self.create_subscription(command_class, self._obeyed.topic, self._on_command, qos, raw=True)

    def _declare(self) -> None:
        declare(
            self, "contract", "", "the robot's contract: a name in config/robots, or a file; empty takes the task's"
        )
        declare(self, "task", "push-v3", "a world: a Meta-World task, libero_spatial:3, pusht, driving:turn_left, …")
        declare(self, "camera", "", "camera of worlds that let one choose; empty takes corner2")
        declare(self, "camera_size", 0, "height and width of the published images, pixels; 0 takes the world's own")
        declare(self, "black_camera", False, "publish black images")
        declare(self, "instruction", "", "instruction to publish; empty takes what the task or the world says")
        declare(self, "swapped", False, "worlds that say their instruction themselves say that of another task")
        declare(self, "faults", [""], "sensor faults such as lidar=dropped, imu=delayed:0.2, front=frozen@5 or "
                                      "radar_*=dropped@3-6, several separated by spaces")  # fmt: skip
        declare(self, "disturbance", [""], "key=value of disturbance bursts on what is executed, such as share=0.2 "
                                           "scale=0.15 episodes=0.5; empty is none")  # fmt: skip
        declare(self, "clock", "realtime", "realtime or lockstep")
        declare(self, "realtime_rate_hz", 0.0, "realtime: steps of the world a second, a multiple of the contract's "
                                               "rate; 0 is the contract's", low=0.0, high=1000.0)  # fmt: skip
        declare(self, "driver", "policy", "who commands: policy (others), expert (this node, over the same topic) or "
                                          "teleoperator (others, and this node takes over now and then)")  # fmt: skip
        declare(self, "beta", 0.5, "driver teleoperator: share of the segments in which it takes over", low=0.0,
                high=1.0)  # fmt: skip
        declare(self, "segment_steps", 20, "driver teleoperator: control steps of a segment", low=1, high=10**6)
        declare(self, "episodes", 1, "episodes to run")
        declare(self, "seed", 0, "seed of the first episode; each later one counts up")
        declare(self, "max_steps", 0, "control steps after which an episode has failed; 0 takes the task's own")
        declare(self, "wait_for", [""], "names of nodes that must listen before the first episode")
        declare(self, "wait_timeout_s", 60.0, "how long to wait for them")
        declare(self, "command_timeout_s", 10.0, "lockstep: how long to wait for a command")
        declare(self, "results", "", "JSON file for every episode's outcome")
        declare(self, "video", "", "GIF or MP4 file of the first episodes, or a folder for an MP4 of each")
        declare(self, "video_episodes", 3, "how many episodes the video shows")

    def _stepped(self, contract: RobotContract) -> RobotContract:
        """The contract at the rate of the world's steps."""
        rate_hz = value(self, "realtime_rate_hz")
        if self._lockstep or not rate_hz:
            return contract
        if round(rate_hz / contract.rate_hz) < 1 or rate_hz % contract.rate_hz:
            raise VlaError(f"parameter realtime_rate_hz is {rate_hz:g}; expected 0 or a multiple of the contract's "
                           f"{contract.rate_hz:g}")  # fmt: skip
        return dataclasses.replace(contract, rate_hz=rate_hz)

    def stop(self) -> None:
        """Write what was measured so far."""
        if value(self, "results"):
            self._write_results(Path(value(self, "results")))
        if self._film is not None:
            self._film.close()
        self.world.close()

    def run(self, executor: Any, stop: process.Stop) -> int:
        """All episodes; 0 when every one of them was run."""
        self._reset(value(self, "seed"))
        self.feed.announce()
        self._wait_for_listeners(executor, stop)
        for index in range(value(self, "episodes")):
            done = self._run_episode(executor, stop, index, value(self, "seed") + index)
            if not done:
                return 0
        # Late messages of the last episode are on their way: only what was acknowledged has arrived.
        self._episode_publisher.wait_for_all_acked(ACK_TIMEOUT)
        return 0

    def _reset(self, seed: int) -> None:
        """Reset the world, unless nothing has happened since it was."""
        if self._reset_seed != seed:
            self.world.reset(seed)
        self._reset_seed = seed

    def _run_episode(self, executor: Any, stop: process.Stop, index: int, seed: int) -> bool:
        """One episode; False when told to stop in its middle."""
        self._reset(seed)
        self._reset_seed = None
        self._command, self._said = None, []
        start_ns = self._lockstep_ns if self._lockstep else self._now_ns()
        self._say(start_ns)
        self._mark(Episode.START, start_ns, index, seed, 0)
        # Of its own generator: the world must give the same episode with and without noise.
        disturbance = Disturbance(self._noise, self._obeyed, np.random.default_rng([seed, 1]))
        takeovers = np.random.default_rng([seed, 2])
        tick_wall_ns = start_wall_ns = time.monotonic_ns()
        steps, stamp_ns = 0, start_ns
        while steps < self._max_steps:
            stamp_ns = self._stamp_ns(start_ns, steps, tick_wall_ns - start_wall_ns)
            if steps:
                self._say()
            pictures = steps % self.world.steps_per_frame == 0
            if self._takeover_publisher is not None and steps % (value(self, "segment_steps") * self._substeps) == 0:
                # Heard before the observation, so that the tick is the teleoperator's from its beginning.
                self._takeover_publisher.publish(Bool(data=bool(takeovers.random() < value(self, "beta"))))
                self._takeover_publisher.wait_for_all_acked(ACK_TIMEOUT)
            self.feed.observe(stamp_ns, pictures)
            if self._plan_publisher is not None and steps % self._substeps == 0:
                self._publish_expert(stamp_ns)
            if self._lockstep:
                values = self._await_command(executor, stop, stamp_ns)
            else:
                tick_wall_ns += self._period_ns
                values = self._await_tick(executor, stop, tick_wall_ns)
                if self.contract.following is not None:  # a vehicle that is late does not race to catch up
                    tick_wall_ns = max(tick_wall_ns, time.monotonic_ns() - self._period_ns)
            if values is None:
                self._mark(Episode.ABORTED, stamp_ns, index, seed, steps // self._substeps)
                return False
            if self._film is not None and pictures and index < value(self, "video_episodes"):
                self._film.add(self.world.render_for_people())
            values = disturbance.on(values)
            if self._executed_publisher is not None:
                self._executed_publisher.publish(encode(self._obeyed, stamp_ns, values[None], self.contract.step_ns))
            self.world.step(values)
            steps += 1
            if is_over(self.world):
                break
        self.feed.wait_until_heard()
        if self._plan_publisher is not None:
            self._plan_publisher.wait_for_all_acked(ACK_TIMEOUT)
        self._mark(
            Episode.SUCCEEDED if self.world.success else Episode.FAILED, stamp_ns, index, seed, steps // self._substeps
        )
        self._lockstep_ns = stamp_ns + PAUSE_NS
        self._note_result(index, seed, steps)
        return True

    def _stamp_ns(self, start_ns: int, steps: int, passed_ns: int) -> int:
        """The stamp of the step that begins now, ``passed_ns`` after the first one by the steady clock."""
        if self._lockstep:
            return start_ns + steps * self._period_ns
        # Sensors that send several messages a step stamp them backwards from here: it must move on by whole steps.
        return self._now_ns() if self.contract.following is None else start_ns + passed_ns

    def _note_result(self, index: int, seed: int, steps: int) -> None:
        success, seconds = bool(self.world.success), steps * self._period_ns / NANOSECONDS
        result = {"seed": seed, "success": success, "steps": steps // self._substeps, "seconds": seconds,
                  "score": self.world.score, "instructions": self._said, "details": details_of(self.world)}  # fmt: skip
        self.results.append(result)
        if self._film is not None and index < value(self, "video_episodes"):
            self._film.end_episode(seed)
        total = sum(result["success"] for result in self.results)
        self.get_logger().info(
            f"episode {index + 1} of {value(self, 'episodes')}: seed {seed}, {'success' if success else 'failure'} "
            f"after {steps // self._substeps} steps ({total} of {len(self.results)})"
        )

    def _say(self, start_ns: int | None = None) -> None:
        """Publish the instruction that holds now, before the observation that it is about."""
        text = value(self, "instruction") or instruction_now(self.world) or self.task.instruction
        if start_ns is not None:
            self.feed.begin(start_ns, text)
        else:
            self.feed.say(text)
        if not self._said or self._said[-1] != text:
            self._said.append(text)

    def _publish_expert(self, stamp_ns: int) -> None:
        assert self._expert is not None and self._plan_publisher is not None
        rows = self._expert.expert_rows()
        self._plan_publisher.publish(encode(self._action, stamp_ns, rows, self.contract.chunk_step_ns))

    def _mark(self, state: int, stamp_ns: int, index: int, seed: int, steps: int) -> None:
        """Publish a border of the episode and wait until everybody has it: what follows comes after it."""
        mark = Episode(state=state, index=index, seed=seed, task=self.task.world, instruction=self._said[0],
                       steps=steps)  # fmt: skip
        mark.header.stamp = Time(nanoseconds=stamp_ns).to_msg()
        self._episode_publisher.publish(mark)
        self._episode_publisher.wait_for_all_acked(ACK_TIMEOUT)

    def _on_command(self, data: bytes) -> None:
        action = self._obeyed
        stamp_ns = header_stamp_ns(action.type, data)
        assert stamp_ns is not None, "commands carry a header"
        try:
            values = decode(action, data)[0]
            if not np.isfinite(values).all():
                raise VlaError(f"{action.topic}: {values.tolist()} is not finite")
            self._command = (stamp_ns, values)
        except VlaError as error:
            self.get_logger().error(f"command ignored: {error}", throttle_duration_sec=1.0)

    def _on_plan(self, data: bytes) -> None:
        """Show a trajectory in the pictures for people."""
        try:
            rows = decode(self._action, data)
        except VlaError:
            rows = None  # whoever follows it says what is wrong with it
        if isinstance(self.world, Journey):
            self.world.watch_plan(rows)

    def _await_command(self, executor: Any, stop: process.Stop, stamp_ns: int) -> np.ndarray | None:
        """Lockstep: the command that answers ``stamp_ns``; None when told to stop."""
        limit_s = value(self, "command_timeout_s")
        deadline = time.monotonic() + limit_s
        while self._command is None or self._command[0] != stamp_ns:
            if stop():
                return None
            if time.monotonic() > deadline:
                topic = self._obeyed.topic
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
        if age_ns is not None and age_ns <= self._stale_ns:
            return last
        held = np.array([safe == "hold" for safe in self._obeyed.safe])
        return np.where(held, last, 0.0)

    def _wait_for_listeners(self, executor: Any, stop: process.Stop) -> None:
        """Until every node of ``wait_for`` listens and somebody commands; a follower must hear the expert."""
        wanted = {name for name in value(self, "wait_for") if name}
        deadline = time.monotonic() + value(self, "wait_timeout_s")
        topic = self._obeyed.topic
        own = self._expert_drives and not self._stands_by and self._obeyed is self._action
        while not stop():
            # They subscribe to the episodes last, so whoever is there has its other subscriptions too.
            listening = {info.node_name for info in self.get_subscriptions_info_by_topic(EPISODE_TOPIC)}
            matched = self._episode_publisher.get_subscription_count() >= len(wanted)
            commanded = own or self.count_publishers(topic) > 0
            followed = self._plan_publisher is None or own or self._plan_publisher.get_subscription_count() > 0
            if wanted <= listening and matched and commanded and followed:
                return
            if time.monotonic() > deadline:
                absent = sorted(wanted - listening)
                if not absent:
                    absent = [f"a publisher of {topic!r}"] * (not commanded)
                    absent += [f"a subscriber of {self._action.topic!r}"] * (not followed)
                what = ", ".join(absent) or "subscribers of the episodes"
                raise SimulatorError(f"waited {value(self, 'wait_timeout_s'):.0f} s in vain for {what}")
            executor.spin_once(timeout_sec=0.05)

    def _write_results(self, path: Path) -> None:
        record = {
            "task": self.task.world, "camera": value(self, "camera"),
            "instruction": value(self, "instruction") or self.task.instruction, "swapped": value(self, "swapped"),
            "black_camera": value(self, "black_camera"), "faults": [text for text in value(self, "faults") if text],
            "disturbance": None if self._noise is None else dataclasses.asdict(self._noise),
            "clock": value(self, "clock"), "max_steps": self._max_steps // self._substeps,
            "late_ticks": self._late_ticks, "episodes": self.results,
        }  # fmt: skip
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def _run(node: Any, executor: Any, stop: process.Stop) -> int:
    return int(node.run(executor, stop))


def main() -> int:
    """Entry point of ``simulator_node``."""
    return process.main(SimulatorNode, _run)


if __name__ == "__main__":
    sys.exit(main())
