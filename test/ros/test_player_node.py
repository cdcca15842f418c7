"""The player: the same bytes in the same order, to those who come late as well, and an end that others can wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rclpy.exceptions import ParameterException
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosbags.interfaces import QosReliability
from rosbags.rosbag2 import StoragePlugin
from rosgraph_msgs.msg import Clock
from std_msgs.msg import String
from std_srvs.srv import Trigger
from vla_ros.msg import Episode

from vla_core.contract import NANOSECONDS, RobotContract
from vla_core.data import bag as bags
from vla_core.errors import VlaError
from vla_ros.player_node import PlayerNode
from vla_ros.up import PROGRAM

from ..core.test_playback import write_bag
from .conftest import Ros, parameters
from .test_recorder_node import Source, make_recorder

LATCHED_QOS = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)  # fmt: skip
STEP_NS = 50_000_000
COUNTS = 21  # one second


@pytest.fixture
def play(domain: int) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts players as processes; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start(bag: Path, *remaps: str, **values: Any) -> subprocess.Popen[str]:
        arguments = [part for remap in remaps for part in ("-r", remap)]
        for name, given in {"bag": str(bag), **values}.items():
            text = str(given).lower() if isinstance(given, bool) else str(given)
            arguments += ["-p", f"{name}:={text}"]
        process = subprocess.Popen(
            [*PROGRAM, "player_node", "--ros-args", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ.copy(),
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """Somebody else's SQLite bag: a latched text at its start, then 0 to 20 within a second."""
    sent = [("/text", 10**12, "hello")]
    sent += [("/count", 10**12 + k * STEP_NS, str(k)) for k in range(COUNTS)]
    return write_bag(tmp_path / "counting", sent, {"/text": 1}, StoragePlugin.SQLITE3)


def hear(ros: Ros, topic: str, qos: Any = 100, kind: Any = String) -> list[Any]:
    """What is published on ``topic`` from now on: texts, or times in nanoseconds."""
    found: list[Any] = []

    def on_message(message: Any) -> None:
        if isinstance(message, Clock):
            found.append(message.clock.sec * NANOSECONDS + message.clock.nanosec)
        else:
            found.append(message.data)

    ros.node(f"listener_{len(ros.nodes)}").create_subscription(kind, topic, on_message, qos)
    return found


def call(ros: Ros, name: str) -> Any:
    client = ros.node(f"caller_{len(ros.nodes)}").create_client(Trigger, f"/player/{name}")
    ros.spin_until(client.service_is_ready, f"the service {name}")
    future = client.call_async(Trigger.Request())
    ros.spin_until(future.done, f"an answer of {name}")
    return future.result()


def ended(ros: Ros, process: subprocess.Popen[str]) -> tuple[int, str]:
    ros.spin_until(lambda: process.poll() is not None, "the player's end")
    assert process.stdout is not None
    return process.returncode, process.stdout.read()


def test_a_recording_of_what_is_played_is_the_recording(
    ros: Ros, contract: RobotContract, tmp_path: Path, play: Callable[..., subprocess.Popen[str]]
) -> None:
    first = make_recorder(ros, tmp_path / "first", streams=["hand", "instruction"])
    source = Source(ros, contract)
    source.mark(Episode.START, time.time_ns(), 0)
    for _ in range(60):
        stamp = time.time_ns()
        source.send(stamp)
        ros.spin_until(lambda stamp=stamp: time.time_ns() - stamp > 5_000_000, "the next step")
    for publisher in (source.hand, source.commands):
        publisher.wait_for_all_acked()
    source.mark(Episode.SUCCEEDED, time.time_ns(), 0)
    ros.spin_until(lambda: len(first.bags) == 1, "the first bag")
    for node in (first, source.node):
        ros.executor.remove_node(node)
        ros.nodes.remove(node)
        node.destroy_node()

    second = make_recorder(ros, tmp_path / "second", streams=["hand", "instruction"])
    process = play(first.bags[0], wait_for="[recorder]")
    status, output = ended(ros, process)
    assert status == 0, output
    ros.spin_until(lambda: len(second.bags) == 1, "the second bag")

    a, b = bags.info(first.bags[0]), bags.info(second.bags[0])
    assert a.counts == b.counts and a.counts["hand/state"] == 60
    assert b.metadata["outcome"] == "succeeded" and b.metadata["instruction"] == "do it"
    for topic in a.topics:
        before, after = (list(bags.read(path, {topic})) for path in (first.bags[0], second.bags[0]))
        assert len(before) == len(after)
        for a_message, b_message in zip(before, after, strict=True):
            # The middleware pads to four bytes at the end; what is read from the bytes is the same.
            assert b_message.data.startswith(a_message.data), topic
            assert not any(b_message.data[len(a_message.data) :]) and len(b_message.data) - len(a_message.data) < 4


def test_a_late_joiner_gets_the_latched_value(
    ros: Ros, counting: Path, play: Callable[..., subprocess.Popen[str]]
) -> None:
    counts = hear(ros, "/other")
    process = play(counting, "/count:=/other", start_offset_s=0.3, wait_for=f"[{ros.nodes[0].get_name()}]", rate=0.5)
    ros.spin_until(lambda: bool(counts), "the first count")
    texts = hear(ros, "/text", LATCHED_QOS)
    status, output = ended(ros, process)
    assert status == 0, output
    assert texts == ["hello"], "published before the offset, given to who came after"
    assert counts == [str(k) for k in range(6, COUNTS)], "in order, from the offset on, on the remapped topic"


def test_a_loop_begins_again_with_its_latched_value_and_its_clock(
    ros: Ros, counting: Path, play: Callable[..., subprocess.Popen[str]]
) -> None:
    counts, texts, clock = hear(ros, "/count"), hear(ros, "/text"), hear(ros, "/clock", kind=Clock)
    listeners = ",".join(node.get_name() for node in ros.nodes[:2])
    process = play(counting, start_offset_s=0.5, wait_for=f"[{listeners}]", loop=True, clock=True, rate=4.0)
    once = [str(k) for k in range(10, COUNTS)]
    ros.spin_until(lambda: counts.count(once[0]) == 3, "the third pass")
    assert counts[: 2 * len(once)] == 2 * once
    assert len(texts) == 3, "once a pass"
    back = [k for k in range(1, len(clock)) if clock[k] < clock[k - 1]]
    assert len(back) == 2 and all(clock[k] == 10**12 + 10 * STEP_NS for k in back), "time goes back with each pass"
    assert max(clock) == 10**12 + (COUNTS - 1) * STEP_NS
    process.send_signal(signal.SIGINT)
    status, output = ended(ros, process)
    assert status == 0 and "Traceback" not in output


def test_pause_stands_still_and_stop_ends(ros: Ros, counting: Path, play: Callable[..., subprocess.Popen[str]]) -> None:
    counts, clock = hear(ros, "/count"), hear(ros, "/clock", kind=Clock)
    process = play(counting, start_paused=True, clock=True, rate=0.2)
    ros.spin_until(lambda: len(clock) > 20, "a clock")
    assert set(clock) == {10**12} and not counts, "paused: the clock is there and stands still"
    assert call(ros, "is_paused").success
    assert call(ros, "resume").success
    ros.spin_until(lambda: len(counts) > 2, "some counts")
    assert "paused" in call(ros, "toggle_paused").message
    before = len(clock)  # what was sent before the pause may still come
    ros.spin_until(lambda: len(clock) > before + 20 and len(set(clock[-20:])) == 1, "a clock that stands still")
    assert not call(ros, "toggle_paused").message.startswith("paused")
    assert not call(ros, "is_paused").success
    assert call(ros, "stop").success
    assert ended(ros, process)[0] == 0
    assert counts == [str(k) for k in range(len(counts))] and len(counts) < COUNTS


def test_publishers_offer_what_was_recorded(ros: Ros, tmp_path: Path) -> None:
    bag = write_bag(
        tmp_path / "bag", [("/a", 1, "x"), ("/b", 2, "y")], {"/b": 3}, reliability=QosReliability.BEST_EFFORT
    )
    ros.add(PlayerNode(context=ros.context, parameter_overrides=parameters(bag=str(bag))))
    tester = ros.node()
    ros.spin_until(lambda: all(tester.get_publishers_info_by_topic(t) for t in ("/a", "/b")), "the publishers")
    a, b = (tester.get_publishers_info_by_topic(topic)[0].qos_profile for topic in ("/a", "/b"))
    assert (a.reliability, a.durability) == (ReliabilityPolicy.BEST_EFFORT, DurabilityPolicy.VOLATILE)
    assert (b.reliability, b.durability) == (ReliabilityPolicy.BEST_EFFORT, DurabilityPolicy.TRANSIENT_LOCAL)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bag": ""}, "parameter bag is empty"),
        ({"bag": "/nowhere"}, "no bag"),
        ({"topics": ["/none"]}, r"no topic '/none'; choices: /count, /text"),
        ({"start_offset_s": 2.0}, r"start_offset_s is 2\.0, the bag has 1\.00 s"),
    ],
)
def test_what_cannot_be_played_is_named(ros: Ros, counting: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(VlaError, match=message):
        PlayerNode(context=ros.context, parameter_overrides=parameters(**{"bag": str(counting), **values}))


@pytest.mark.parametrize("rate", [0.0, 101.0])
def test_a_rate_out_of_range_is_refused(ros: Ros, counting: Path, rate: float) -> None:
    with pytest.raises(ParameterException):
        PlayerNode(context=ros.context, parameter_overrides=parameters(bag=str(counting), rate=rate))


def test_damage_ends_in_one_line_after_what_is_readable(
    ros: Ros, tmp_path: Path, play: Callable[..., subprocess.Popen[str]]
) -> None:
    bag = write_bag(tmp_path / "bag", [("/count", k * 10**6, str(k) * 1000) for k in range(1500)], {})
    file = next(bag.glob("*.mcap"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50_000] = bytes(50_000)
    file.write_bytes(data)
    counts = hear(ros, "/count", 2000)
    process = play(bag, wait_for=f"[{ros.nodes[0].get_name()}]", rate=3.0)
    status, output = ended(ros, process)
    assert status == 1
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "truncated or damaged" in errors[0] and "Traceback" not in output
    assert len(counts) > 100


def test_a_bag_that_was_never_closed_is_refused(ros: Ros, counting: Path) -> None:
    (counting / "metadata.yaml").unlink()
    with pytest.raises(VlaError, match="never closed"):
        PlayerNode(context=ros.context, parameter_overrides=parameters(bag=str(counting)))
