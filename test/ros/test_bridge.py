"""QoS of a contract's streams, as rclpy is given it."""

from __future__ import annotations

from typing import Any

import pytest
from rclpy.qos import DurabilityPolicy, HistoryPolicy, ReliabilityPolicy

from vla_core.contract import Stream
from vla_ros.bridge import stream_qos


def stream(**changes: Any) -> Stream:
    return Stream(**{"topic": "s", "type": "sensor_msgs/msg/Imu", "rate_hz": 30.0, "max_age_s": 0.1, **changes})


@pytest.mark.parametrize(("rate", "depth"), [(1.0, 10), (20.0, 10), (30.0, 15), (200.0, 100), (333.0, 167)])
def test_half_a_second_of_messages_waits_in_the_middleware(rate: float, depth: int) -> None:
    found = stream_qos(stream(rate_hz=rate))
    assert (found.depth, found.history) == (depth, HistoryPolicy.KEEP_LAST)
    assert stream_qos(stream(rate_hz=rate), depth=3).depth == 3


def test_reliability_is_the_contracts_and_latched_is_transient_local() -> None:
    assert stream_qos(stream()).reliability == ReliabilityPolicy.BEST_EFFORT
    assert stream_qos(stream(reliability="reliable")).reliability == ReliabilityPolicy.RELIABLE
    latched = stream_qos(Stream(topic="t", type="std_msgs/msg/String", latched=True))
    assert (latched.depth, latched.durability) == (1, DurabilityPolicy.TRANSIENT_LOCAL)
    assert latched.reliability == ReliabilityPolicy.RELIABLE
