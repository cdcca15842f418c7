"""A policy on a server: the same chunks as here, and a named fault whenever the server is not what it was."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from openpi_server import WebsocketPolicyServer

from vla_core.cli import main
from vla_core.config import ConfigError, to_dict
from vla_core.contract import RobotContract
from vla_core.errors import VlaError
from vla_core.model.action_head.flow_action_head import FlowHeadConfig
from vla_core.observation.builder import Observation, ObservationBuilder, ObservationSpec
from vla_core.runtime.chunk import Continuation
from vla_core.runtime.loading import load_policy
from vla_core.runtime.policy import CheckpointPolicy, PolicyError
from vla_core.serving import wire
from vla_core.serving.client import PolicyServerLost
from vla_core.serving.fields import MessageFormError
from vla_core.serving.own_form import OwnForm
from vla_core.serving.remote_policy import Remote, RemotePolicy
from vla_core.training.recipe import load_recipe

from . import toy_world
from .helpers import CONTRACT, SPEC, checkpoint, pixels
from .served import DEADLINE_S, Echo, Served, until


def observe(number: float = 0.0, **changes: Any) -> Observation:
    values: dict[str, Any] = {
        "stamp_ns": 10**18 + int(number), "images": {"camera": pixels(4)}, "state": np.float32([number, -number]),
        "instruction": "lift it", "ages_ns": {}, "present": {"camera": True, "arm": True, "task": True},
    }  # fmt: skip
    return Observation(**{**values, **changes})


def plan(rows: int = 4) -> Continuation:
    rng = np.random.default_rng(1)
    return Continuation(rng.uniform(-0.5, 0.5, (rows, 2)), np.linspace(1, 0, rows), 1, 5.0, 0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def remote() -> Iterator[list[RemotePolicy]]:
    """Policies to close in the end."""
    made: list[RemotePolicy] = []
    yield made
    for policy in made:
        policy.close()


def connected(made: list[RemotePolicy], url: str, **options: Any) -> RemotePolicy:
    made.append(RemotePolicy(Remote(server=url, **options)))
    return made[-1]


# The same as here.


def test_a_policy_on_a_server_is_the_policy_itself(remote: list[RemotePolicy]) -> None:
    torch.manual_seed(0)
    local = CheckpointPolicy(checkpoint(FlowHeadConfig(hidden_dim=32)), seed=3)
    with Served(local) as served:
        policy = connected(remote, served.url)
        assert policy.contract == local.contract and policy.spec == local.spec
        assert policy.execution == local.execution and policy.horizon == local.horizon
        assert policy.head.guidable and policy.head.type == "flow" and policy.fault == ""
        policy.execution.changed({"strategy": "rtc"}).check(policy.horizon, policy.head)
        seen = [
            observe(1),
            observe(2, state=np.float32([np.nan] * 2), present={"camera": True, "arm": False, "task": True}),
            observe(3, images={}, instruction="", present={"camera": False, "arm": True, "task": False}),
        ]  # fmt: skip
        for observation in seen:
            for continues in (None, plan()):
                here, there = local.predict(observation, continues), policy.predict(observation, continues)
                assert np.array_equal(here.actions, there.actions) and there.continues is continues
                assert (there.observation_stamp_ns, there.step_ns) == (here.observation_stamp_ns, here.step_ns)
        told = policy.report()
        assert set(told) == {"server ms", "server queue_ms", "server model_ms"}


def crowded(spec: ObservationSpec, contract: RobotContract, seed: int, lost: frozenset[str]) -> Observation:
    """An observation of noise, of everything that ``spec`` sees, without the streams that are ``lost``."""
    rng = np.random.default_rng(seed)
    blank = ObservationBuilder(contract, spec).blank()

    def noisy(tick: Observation) -> Observation:
        def fill(value: Any) -> Any:
            if isinstance(value, np.ndarray) and value.dtype == np.uint8:
                return rng.integers(0, 256, value.shape, dtype=np.uint8)
            if isinstance(value, np.ndarray) and value.dtype == bool:
                return rng.random(value.shape) < 0.5
            if isinstance(value, np.ndarray):
                return rng.normal(size=(*(n or 1 for n in value.shape),)).astype(value.dtype)
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                return dataclasses.replace(
                    value, **{f.name: fill(getattr(value, f.name)) for f in dataclasses.fields(value)}
                )
            return value

        places = {place.split(".", 1)[1]: name for place, name, kind in spec.uses() if kind == "calibration"}
        groups = {g: {n: fill(v) for n, v in getattr(tick, g).items() if n not in lost}
                  for g in ("images", "clouds", "sequences", "maps")}  # fmt: skip
        calibrations = {n: fill(v) for n, v in tick.calibrations.items() if places[n] not in lost}
        text = "" if spec.instruction in lost else "turn left"
        return dataclasses.replace(
            tick, **groups, calibrations=calibrations, state=fill(tick.state), instruction=text,
            present={name: name not in lost for name in tick.present}, history=tuple(map(noisy, tick.history)),
        )  # fmt: skip

    return dataclasses.replace(noisy(blank), stamp_ns=10**18)


DRIVE = load_recipe("drive").observation
VEHICLE = RobotContract.load("driving")
STREAMS = sorted({name for _, name, _ in DRIVE.uses()})


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


@settings(max_examples=10)
@given(lost=st.frozensets(st.sampled_from(STREAMS)), seed=st.integers(0, 99))
def test_nothing_of_a_vehicles_observation_is_lost_on_the_way(lost: frozenset[str], seed: int) -> None:
    spec = dataclasses.replace(DRIVE, history=max(2, DRIVE.history))
    sent = crowded(spec, VEHICLE, seed, lost)
    form = OwnForm(VEHICLE, spec, horizon=6)
    read, continues = form.read(wire.unpack(wire.pack(form.write(sent))))
    assert continues is None and same(read, sent)
    # One that remembers the state alone is sent less, and all that it reads.
    less = OwnForm(VEHICLE, spec, 6, remembers="state")
    message = less.write(sent)
    assert not any(key.startswith("history/") and "images" in key for key in message)
    brief, _ = less.read(wire.unpack(wire.pack(message)))
    assert [tick.state.tobytes() for tick in brief.history] == [tick.state.tobytes() for tick in sent.history]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("images/camera", None, "images/camera: missing; keys given:"),
        ("stamp_ns", -1, "stamp_ns: found -1, expected a whole number from 0"),
        ("stamp_ns", 1.5, "stamp_ns: found 1.5"),
        ("missing", ["front"], r"missing: found \['front'\], expected a list of some of arm, camera, task"),
        ("missing", [["arm"]], "expected a list of names"),
        ("missing", ["camera"], "images/camera: unknown"),
        ("state", np.zeros(2), r"state: found float64 of shape \(2,\), expected float32 of shape \(2\)"),
        ("more", 1, "more: unknown"),
        ("continues/actions", np.zeros((3, 2)), r"expected float64 of shape \(4, 2\)"),
        ("continues/actions", np.full((4, 2), np.nan), "not finite"),
        ("continues/weights", np.full(4, 1.5), "expected numbers from 0 to 1"),
        ("continues/frozen", 5, "expected a whole number from 0 to 4"),
        ("continues/frozen", True, "found True"),
        ("continues/max_guidance", float("nan"), "expected a finite number"),
        ("continues/max_guidance", "x", "found str, expected a number"),
        ("continues/spread", 0.0, "expected a positive number"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_message_is_named(key: str, value: Any, words: str) -> None:
    form = OwnForm(CONTRACT, SPEC, horizon=4)
    message = form.write(observe(), plan())
    form.read(message)
    changed = {k: v for k, v in message.items() if k != key} | ({} if value is None else {key: value})
    with pytest.raises(MessageFormError, match=words):
        form.read(changed)


# Servers that come and go.


def test_a_lost_server_is_a_named_fault_until_it_is_back(remote: list[RemotePolicy]) -> None:
    port = free_port()
    with Served(Echo(), port=port) as served:
        policy = connected(remote, served.url)
        assert policy.predict(observe(2.0)).actions[0].tolist() == [2.0, -2.0]
    until(lambda: policy.fault, "the loss")
    with pytest.raises(PolicyServerLost, match=f"^policy_server_lost: ws://127.0.0.1:{port}: "):
        policy.predict(observe())
    with Served(Echo(), port=port):
        until(lambda: not policy.fault, "its return")
        assert policy.predict(observe(3.0)).actions[0].tolist() == [3.0, -3.0]


def test_a_server_that_says_nothing_is_lost_after_the_time_out(remote: list[RemotePolicy]) -> None:
    echo = Echo()
    with Served(echo) as served:
        policy = connected(remote, served.url, timeout_s=0.2)
        echo.go.clear()
        with pytest.raises(PolicyServerLost, match=r"no answer within 0\.2 s"):
            policy.predict(observe(1.0))
        assert policy.fault, "until there is a new connection, nobody is kept waiting"
        echo.go.set()
        until(lambda: not policy.fault, "another connection")
        answers = [policy.predict(observe(number)).actions[0, 0] for number in (2.0, 3.0)]
        assert answers == [2.0, 3.0], "what came too late is no answer to the next question"


def test_a_server_that_comes_back_with_another_policy_is_not_asked(remote: list[RemotePolicy]) -> None:
    port = free_port()
    with Served(Echo("one"), port=port) as served:
        policy = connected(remote, served.url)
    with Served(Echo("two"), port=port):
        until(lambda: policy.fault.startswith("policy_server_changed"), "the difference")
        with pytest.raises(PolicyServerLost, match="runs the policy two, expected one; configure again"):
            policy.predict(observe())
    with Served(Echo("one"), port=port):
        until(lambda: not policy.fault, "the first one")


def test_nobody_answers_at_the_first_attempt(remote: list[RemotePolicy]) -> None:
    port = free_port()
    with pytest.raises(
        PolicyServerLost, match=rf"^policy_server_lost: ws://127.0.0.1:{port}: .* \(waited at most 0.3 s\)"
    ):
        connected(remote, f"ws://127.0.0.1:{port}", connect_s=0.3)


def test_a_server_that_refuses_is_not_waited_for(
    remote: list[RemotePolicy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("sesame\n")
    with Served(Echo(), token="sesame") as served:
        with pytest.raises(PolicyServerLost, match="the server answers 401"):
            connected(remote, served.url, connect_s=10 * DEADLINE_S)
        connected(remote, served.url, token_file=str(tmp_path / "token"))
        monkeypatch.setenv("VLA_TOKEN_FILE", str(tmp_path / "token"))
        assert connected(remote, served.url).predict(observe(1.0)).actions.shape == (4, 2)
    (tmp_path / "token").write_text("\n")
    with pytest.raises(VlaError, match="expected one line of printable ASCII"):
        connected(remote, served.url)


@pytest.mark.parametrize(
    ("said", "words"), [("refuse", "refused"), ("break", "the model failed"), ("x" * 5000, "prompt:")]
)
def test_what_the_server_says_against_an_observation(remote: list[RemotePolicy], said: str, words: str) -> None:
    with Served(Echo()) as served:
        policy = connected(remote, served.url)
        with pytest.raises(PolicyError, match=f"{served.url}: {words}"):
            policy.predict(observe(instruction=said))
        assert policy.fault == "" and policy.predict(observe(1.0)).actions[0, 0] == 1.0


def test_it_ends_while_somebody_asks(remote: list[RemotePolicy]) -> None:
    echo = Echo()
    with Served(echo) as served:
        policy = connected(remote, served.url, timeout_s=DEADLINE_S)
        echo.go.clear()
        failed: list[Exception] = []

        def ask() -> None:
            try:
                policy.predict(observe())
            except PolicyServerLost as error:
                failed.append(error)

        asking = threading.Thread(target=ask)
        count = len(echo.batches)
        asking.start()
        until(lambda: len(echo.batches) > count, "the question")
        policy.close()
        asking.join(DEADLINE_S)
        assert len(failed) == 1 and not asking.is_alive()
        echo.go.set()


# Servers of others.


class Other:
    """openpi's own server around a policy that answers ``actions``."""

    def __init__(self, actions: Any) -> None:
        self.actions = actions
        self.seen: list[dict[str, Any]] = []
        self.port = free_port()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(WebsocketPolicyServer(self, "127.0.0.1", self.port, {"any": "thing"}).run())
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            self._loop.close()

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(observation)
        return {"actions": self.actions, "policy_timing": {"infer_ms": 1.0}}

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(DEADLINE_S)

    def describe(self, folder: Path, **changes: Any) -> Path:
        (folder / "robot.yaml").write_text(CONTRACT.to_yaml())
        described = {
            "server": f"ws://127.0.0.1:{self.port}", "contract": str(folder / "robot.yaml"), "horizon": 3,
            "observation": to_dict(SPEC), "execution": {"steps": 2},
            "keys": {"camera": "observation/image", "state": "observation/state"}, **changes,
        }  # fmt: skip
        (folder / "server.yaml").write_text(yaml.safe_dump(described))
        return folder / "server.yaml"


@pytest.fixture
def other() -> Iterator[Other]:
    other = Other(np.arange(6, dtype=np.float32).reshape(3, 2))
    yield other
    other.close()


def test_openpis_own_server(other: Other, remote: list[RemotePolicy], tmp_path: Path) -> None:
    policy = load_policy(other.describe(tmp_path))
    assert isinstance(policy, RemotePolicy)
    remote.append(policy)
    assert policy.contract == CONTRACT and policy.horizon == 3 and policy.execution.steps == 2
    chunk = policy.predict(observe(2.0))
    assert chunk.actions.tolist() == [[0, 1], [2, 3], [4, 5]] and chunk.actions.dtype == np.float64
    (seen,) = other.seen
    assert set(seen) == {"observation/image", "observation/state", "prompt"} and seen["prompt"] == "lift it"
    assert np.array_equal(seen["observation/image"], pixels(4)) and seen["observation/state"].tolist() == [2.0, -2.0]
    with pytest.raises(PolicyError, match="camera: missing, and openpi's messages cannot say so"):
        policy.predict(observe(images={}, present={"camera": False, "arm": True, "task": True}))
    with pytest.raises(PolicyError, match="no plan to continue"):
        policy.predict(observe(), plan(3))
    other.actions = np.zeros((3, 7))
    with pytest.raises(PolicyError, match=r"actions: found float64 of shape \(3, 7\), expected float32 or float64 of"):
        policy.predict(observe())
    other.actions = np.full((3, 2), np.nan)
    with pytest.raises(PolicyError, match="non-finite"):
        policy.predict(observe())
    other.actions = object()  # what breaks openpi's server: it sends the traceback and closes
    with pytest.raises(PolicyError, match="Traceback"):
        policy.predict(observe())
    other.actions = np.zeros((3, 2))

    def answers() -> bool:
        with contextlib.suppress(PolicyServerLost):
            return policy.predict(observe()).actions.shape == (3, 2)
        return False

    until(answers, "an answer by another connection")


def test_openpis_own_server_without_a_description(other: Other, remote: list[RemotePolicy]) -> None:
    with pytest.raises(
        PolicyServerLost, match="no vla_ros server, its metadata names no contract; describe it in a YAML"
    ):
        connected(remote, f"ws://127.0.0.1:{other.port}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"server": "http://x"}, "server: expected ws://HOST:PORT or wss://HOST:PORT, found 'http://x'"),
        ({"timeout_s": 0.0}, "timeout_s: expected a positive number"),
        ({"horizon": None}, "horizon: missing; a server that is not vla_ros's is described by contract"),
        ({"keys": {"front": "x"}}, "keys: the policy sees no 'front'"),
        ({"execution": {"strategy": "rtc", "steps": 2}}, "the head 'remote' cannot be guided"),
        ({"observation": {**to_dict(SPEC), "history": 2}}, "observation: the policy sees history"),
        ({"speed": 1}, "speed: unknown key"),
    ],
)
def test_a_description_that_cannot_work(other: Other, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, VlaError), match=words):
        load_policy(other.describe(tmp_path, **changes))


def test_where_policies_are_loaded_from(remote: list[RemotePolicy], tmp_path: Path) -> None:
    with Served(Echo()) as served:
        for place in (served.url, Path(served.url)):  # a Path makes one slash of two
            policy = load_policy(place)
            assert isinstance(policy, RemotePolicy) and policy.source == served.url and policy.fingerprint == "echo"
            remote.append(policy)
        (tmp_path / "slow.yml").write_text(f"server: {served.url}\ntimeout_s: 20")
        slow = load_policy(str(tmp_path / "slow.yml"))
        assert isinstance(slow, RemotePolicy) and slow._remote.timeout_s == 20
        remote.append(slow)
        with pytest.raises(VlaError, match="is a server; tell it which: vla serve --dataset"):
            load_policy(served.url, dataset="a")


def test_a_policy_elsewhere_is_evaluated_like_one_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    checkpoint(FlowHeadConfig(hidden_dim=32)).save(tmp_path / "policy")
    with toy_world.installed(tmp_path / "site", monkeypatch), Served(CheckpointPolicy.load("policy")) as served:
        common = ["--task", "toy:lift", "--episodes", "2", "--seed", "0"]
        for place in ("policy", served.url):
            assert main(["evaluate", place, *common, "--workers", "1", "--out", f"{place[:2]}.json"]) == 0
        here, there = (json.loads(Path(f"{name}.json").read_text()) for name in ("po", "ws"))
        ran = [[(e["seed"], e["success"], e["steps"]) for e in found["runs"][0]["episodes"]] for found in (here, there)]
        assert ran[0] == ran[1] and len(ran[0]) == 2
