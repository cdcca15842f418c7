"""The middleware settings reach Fast DDS from inside the process, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vla_ros import middleware

DEADLINE_S = 30.0
MESSAGES = 10

# Both import only what a node imports, and both set their middleware up themselves. Best effort:
# with Fast DDS's own settings a message of this size is lost without a word.
PUBLISHER = """
    import array, select, sys
    from vla_ros.middleware import configure
    configure()
    import rclpy
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image
    rclpy.init()
    node = rclpy.create_node("publisher")
    publisher = node.create_publisher(Image, "image", qos_profile_sensor_data)
    message = Image(height=1, width=4_000_000, step=4_000_000, encoding="mono8")
    message.data = array.array("B", bytes(4_000_000))
    # Best effort: what is sent before both sides have matched is lost, so send until the test has enough.
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        publisher.publish(message)
    print("published", flush=True)
    node.destroy_node()
    rclpy.shutdown()
"""
SUBSCRIBER = f"""
    import time
    from vla_ros.middleware import configure
    configure()
    import rclpy
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image
    rclpy.init()
    node = rclpy.create_node("subscriber")
    sizes = []
    node.create_subscription(Image, "image", lambda m: sizes.append(len(m.data)),
                             qos_profile_sensor_data)
    deadline = time.monotonic() + {DEADLINE_S}
    while len(sizes) < {MESSAGES} and time.monotonic() < deadline:
        rclpy.spin_once(node, timeout_sec=0.1)
    print(sizes)
    node.destroy_node()
    rclpy.shutdown()
"""


@pytest.fixture
def bare_environment() -> dict[str, str]:
    """This environment without what configure() sets, on a domain that other tests do not use."""
    dropped = {*middleware.settings(), "FASTDDS_BUILTIN_TRANSPORTS"} - {"AMENT_PREFIX_PATH"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "ROS_DOMAIN_ID": str(1 + os.getpid() % 100)}


def program(text: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_large_message_arrives_through_configure(bare_environment: dict[str, str]) -> None:
    subscriber = program(SUBSCRIBER, bare_environment)
    publisher = program(PUBLISHER, bare_environment)
    received, _ = subscriber.communicate(timeout=2 * DEADLINE_S)
    published, _ = publisher.communicate(timeout=2 * DEADLINE_S)
    assert published == "published\n"
    assert received.strip() == str([4_000_000] * MESSAGES)


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    monkeypatch.delenv("FASTDDS_DEFAULT_PROFILES_FILE", raising=False)
    middleware.configure()
    assert os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "SUBNET"
    assert Path(os.environ["FASTDDS_DEFAULT_PROFILES_FILE"]).name == "fastdds.xml"


@pytest.fixture
def participant(bare_environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with a node, and the lock of its large shared-memory segment."""
    before = set(middleware.SHARED_MEMORY.glob("fastdds_*_el"))
    text = """
        from vla_ros.middleware import configure
        configure()
        import rclpy
        rclpy.init()
        node = rclpy.create_node("participant")
        print("up", flush=True)
        input()
    """
    process = program(text, bare_environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    mine = [
        lock
        for lock in set(middleware.SHARED_MEMORY.glob("fastdds_*_el")) - before
        if f"/{lock.name}" in opened(process.pid)
    ]
    (large,) = [lock for lock in mine if "port" not in lock.name and segment(lock).stat().st_size > 60_000_000]
    yield process, large
    process.kill()
    process.communicate()
    for lock in mine:
        if "port" not in lock.name:
            lock.unlink(missing_ok=True)
            segment(lock).unlink(missing_ok=True)


def opened(process: int) -> str:
    return "\n".join(os.readlink(fd) for fd in Path(f"/proc/{process}/fd").iterdir() if fd.is_symlink())


def segment(lock: Path) -> Path:
    return lock.with_name(lock.name.removesuffix("_el"))


def test_only_the_segments_of_dead_processes_are_removed(
    participant: tuple[subprocess.Popen[str], Path],
) -> None:
    process, lock = participant
    long_ago = time.time() - 2 * middleware.SETTLED_S
    os.utime(lock, (long_ago, long_ago))
    middleware.remove_dead_segments()
    assert segment(lock).exists(), "the segment of a living process was removed"
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE_S)
    middleware.remove_dead_segments()
    assert not segment(lock).exists() and not lock.exists()


def test_a_segment_that_was_just_made_is_left_alone(tmp_path: Path) -> None:
    lock = tmp_path / "fastdds_0123456789abcdef_el"
    for path in (lock, segment(lock)):
        path.touch()
    assert middleware.remove_dead_segments(tmp_path) == 0
    assert segment(lock).exists()


def test_too_little_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(middleware, "SEGMENT_BYTES", 10**18)
    middleware.configure()
    assert "MB free and a node takes" in capsys.readouterr().err
