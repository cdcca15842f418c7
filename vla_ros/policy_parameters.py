"""The parameters of the policy node, and the policy that they name."""

from __future__ import annotations

from rclpy.node import Node

from vla_core.commands import check_action
from vla_core.config import override
from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.errors import VlaError
from vla_core.pretrained.self_check import self_check
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.loading import load_policy
from vla_core.runtime.policy import Policy
from vla_ros.parameters import declare, value

PLANNER = "planner"  # the value of the parameter ``policy`` that is no place


def declare_parameters(node: Node) -> None:
    """Declare all of them."""
    declare(node, "checkpoint", "", "folder of a trained policy, or the name of one on the hub")
    declare(node, "policy", "", "a policy elsewhere, in place of the checkpoint: the address of a policy server, "
                                "such as ws://192.168.1.5:8000, or a YAML file that describes one")  # fmt: skip
    declare(node, "dataset", "", "of a policy that was trained on several datasets: the one by whose statistics it "
                                 "runs; empty takes the one that it was deployed for")  # fmt: skip
    declare(node, "contract", "", "the robot's contract, a name in config/robots or a file; may differ from "
                                  "the checkpoint's in topics only; empty takes the checkpoint's")  # fmt: skip
    declare(node, "inference", "asynchronous", "asynchronous (robots) or synchronous (lockstep simulation)")
    declare(node, "device", "cpu", "where a checkpoint's model runs, such as cuda")
    declare(node, "seed", 0, "seed of the policy's sampling noise", low=0)
    declare(node, "execution", [""], "key=value changes to how chunks are executed, such as strategy=rtc, steps=6; "
                                     "[''] takes the checkpoint's")  # fmt: skip
    declare(node, "world", "", "with policy: planner, the folder of the world model that it plans in; checkpoint "
                               "is the policy that proposes, if any")  # fmt: skip
    declare(node, "planner", [""], "with policy: planner, key=value of its file, such as planner.type=mppi, "
                                   "planner.horizon=12, budget_s=0.04; [''] takes the defaults")  # fmt: skip
    declare(node, "imagined_s", 1.0, "least time between two pictures of the imagined rollout on ~/imagined, s",
            low=0.05, high=60.0)  # fmt: skip
    declare(node, "self_check", False, "at configure ask the policy whether other pictures and another instruction "
            "change its actions, and refuse one that ignores them")  # fmt: skip
    declare(node, "safety", False, "a safety node stands between: send commands to candidate/<topic>")
    declare(node, "check_sensors_s", 0.0, "how long configure waits for all sensors and their transforms, to fail "
                                          "where one is missing or set up wrongly, s; 0 checks them as they come",
            low=0.0, high=600.0)  # fmt: skip
    declare(node, "autostart", True, "configure at start")
    declare(node, "activate", True, "with autostart: act at once; false waits for ~/start or a goal")
    declare(node, "goal_fault_s", 5.0, "end a run_instruction goal when it could command nothing for so long, s",
            low=0.1, high=3600.0)  # fmt: skip
    declare(node, "log_dir", "", "folder for latencies and model inputs at the end; empty writes none")
    declare(node, "log_inputs", True, "log model inputs, which stay in memory until the end: not for long runs")


def place_of(node: Node) -> str:
    """Where the policy is: a folder, a name on the hub, an address, a file; or :data:`PLANNER`."""
    place = str(value(node, "policy") or value(node, "checkpoint"))
    if not place:
        raise VlaError("parameters checkpoint and policy are empty; name the folder of a trained policy, one on "
                       "the hub, or the address of a server")  # fmt: skip
    return place


def policy_of(node: Node, place: str) -> Policy:
    """The policy at ``place``, or the planner that the parameters describe."""
    seed, dataset = int(value(node, "seed")), value(node, "dataset") or None
    if place != PLANNER:
        return load_policy(place, seed, dataset, str(value(node, "device")))
    from vla_core.planning.policy import PlannerPolicy, setup_from

    if not value(node, "world"):
        raise VlaError("parameter world is empty; with policy: planner name the folder of a world model")
    changes = [change for entry in value(node, "planner") for change in entry.split()]
    setup = setup_from(value(node, "world"), value(node, "checkpoint") or None, changes)
    return PlannerPolicy.load(setup, seed, dataset)


def core_of(node: Node, policy: Policy, place: str, lockstep: bool) -> PolicyCore:
    """The policy as it runs on this robot: held against its contract, and executed as the parameters say.

    Raises:
        VlaError: when the policy and the robot, or the execution and lockstep, do not go together.
    """
    if value(node, "contract"):
        robot = RobotContract.load(value(node, "contract"))
        policy.contract.check_same(robot, f"checkpoint {place}", value(node, "contract"))
        policy.contract = policy.contract.with_topics_of(robot)
    if value(node, "self_check"):
        node.get_logger().info(f"self-check: {'; '.join(self_check(policy).lines())}")
    if policy.contract.offline:
        raise VlaError(f"checkpoint {place}: its contract is offline, it sees the future; no robot has that")
    changes = [change for entry in value(node, "execution") for change in entry.split()]
    execution = policy.execution.changed(override({}, changes))
    core = PolicyCore(policy, execution, wall_clock=not (lockstep or value(node, "use_sim_time")))
    interval_ns = execution.interval_ns(core.contract.chunk_step_ns)
    if lockstep and core.contract.plans and interval_ns > core.contract.step_ns:
        raise VlaError(f"execution: a new trajectory every {interval_ns / NANOSECONDS:g} s, but in lockstep each "
                       "observation waits for one; set parameter execution to "
                       f"['period_s={core.contract.step_ns / NANOSECONDS:g}']")  # fmt: skip
    for action in core.contract.actions.values():
        check_action(action)
    return core
