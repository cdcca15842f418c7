"""Real rclpy, in a context and a domain of each test's own; deadlines instead of sleeps."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_core.checkpoint import Checkpoint, PolicyConfig
from vla_core.contract import RobotContract
from vla_core.model.vla.mini_vla import MiniVLA
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.observation.normalizer import Normalizer, compute_statistics
from vla_core.training.recipe import load_recipe
from vla_ros import middleware

DEADLINE_S = 30.0
# Domains 1 to 100 are free for users; tests that run side by side start at different ones.
_domains = itertools.cycle(range(1, 101))
for _ in range(os.getpid() % 100):
    next(_domains)


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> int:
    """A ROS domain for this test and the processes that it starts."""
    middleware.configure()
    number = next(_domains)
    monkeypatch.setenv("ROS_DOMAIN_ID", str(number))
    return number


class Ros:
    """A private context with an executor; nodes made here are destroyed with it."""

    def __init__(self, domain: int) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.nodes: list[Any] = []

    def add(self, node: Any) -> Any:
        self.nodes.append(node)
        self.executor.add_node(node)
        return node

    def node(self, name: str = "tester") -> Any:
        from rclpy.node import Node

        return self.add(Node(name, context=self.context))

    def spin_until(self, condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
        """Spin until ``condition`` holds; fails the test at the deadline."""
        deadline = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"waited {deadline_s:.0f} s in vain for {what}")
            self.executor.spin_once(timeout_sec=0.02)

    def close(self) -> None:
        self.executor.shutdown()
        for node in self.nodes:
            node.destroy_node()
        self.context.try_shutdown()


@pytest.fixture
def ros(domain: int) -> Iterator[Ros]:
    """A private ROS context."""
    ros = Ros(domain)
    yield ros
    ros.close()


def parameters(**values: Any) -> list[Any]:
    """Parameter overrides for a node made in a test."""
    from rclpy.parameter import Parameter

    return [Parameter(name, value=value) for name, value in values.items()]


@pytest.fixture(scope="session")
def contract() -> RobotContract:
    return RobotContract.load("metaworld_sawyer")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, contract: RobotContract) -> Path:
    """A mini-VLA with random weights and plausible statistics: enough to run, not to succeed."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    recipe = load_recipe("mini_vla")
    tokenizer = WordTokenizer()
    tokenizer.fit(["push the puck to the goal"])
    low, high = contract.action_low, contract.action_high
    statistics = {
        "state": compute_statistics(rng.normal(size=(100, 39))),
        "action": compute_statistics(np.stack([low, high])),
    }
    config = recipe.model.config(cameras=("image",), state_dim=39, action_dim=4, vocab_size=tokenizer.vocab_size)
    path = tmp_path_factory.mktemp("checkpoint") / "random"
    Checkpoint(
        config=PolicyConfig(model=config, observation=recipe.observation, normalization=recipe.normalization,
                            execution=recipe.execution),
        model=MiniVLA(config), normalizer=Normalizer(recipe.normalization, statistics), tokenizer=tokenizer,
        contract=contract,
    ).save(path)  # fmt: skip
    return path
