"""The policy server, with openpi's own client and with hostile ones."""

from __future__ import annotations

import concurrent.futures
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from vla_core.config import ConfigError
from vla_core.errors import VlaError
from vla_core.runtime.policy import CheckpointPolicy
from vla_core.serving import wire
from vla_core.serving.openpi_form import OpenpiForm
from vla_core.serving.server import ServerOptions

from .helpers import CONTRACT, SPEC, checkpoint, pixels
from .served import DEADLINE_S, Echo, Served, until

PATIENCE: dict[str, Any] = {"open_timeout": DEADLINE_S, "close_timeout": 1.0, "max_size": None}


def asked(number: float = 0.0, **changes: Any) -> dict[str, Any]:
    """What an openpi client sends."""
    message = {
        "observation/image": pixels(3),
        "observation/state": np.array([number, -number], dtype=np.float64),
        "prompt": "lift it",
    }
    return {**message, **changes}


def actions(number: float = 0.0) -> np.ndarray:
    """What Echo answers."""
    return np.array([number, -number]) + np.arange(4.0)[:, None]


class Client:
    """openpi's protocol, written from its description alone: msgpack and a websocket."""

    def __init__(self, served: Served, **options: Any) -> None:
        self.socket: ClientConnection = connect(served.url, **{**PATIENCE, **options}).__enter__()
        self.metadata = msgpack.unpackb(self.receive())

    def receive(self) -> bytes:
        found = self.socket.recv(DEADLINE_S)
        assert isinstance(found, bytes), found
        return found

    def send(self, **message: Any) -> None:
        self.socket.send(msgpack.packb(message, default=self._array))

    def ask(self, number: float = 0.0, **changes: Any) -> dict[Any, Any]:
        self.send(**asked(number, **changes))
        return dict(msgpack.unpackb(self.receive()))

    def text(self) -> str:
        found = self.socket.recv(DEADLINE_S)
        assert isinstance(found, str), "expected an error"
        return found

    @property
    def closed(self) -> tuple[int | None, str | None]:
        with pytest.raises(ConnectionClosed):
            while True:
                self.socket.recv(DEADLINE_S)
        return self.socket.close_code, self.socket.close_reason

    @staticmethod
    def _array(array: np.ndarray) -> dict[bytes, Any]:
        return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def numbers(answer: dict[Any, Any]) -> np.ndarray:
    found = answer["actions"]
    return np.frombuffer(found[b"data"], found[b"dtype"]).reshape(found[b"shape"])


@pytest.fixture
def served() -> Iterator[Served]:
    with Served(Echo()) as served:
        yield served


def test_openpis_own_client() -> None:
    policy = CheckpointPolicy(checkpoint())
    with Served(policy) as served:
        client = WebsocketClientPolicy(served.host, served.port)
        metadata = client.get_server_metadata()
        assert metadata["action_names"] == ["shoulder", "elbow"] and metadata["horizon"] == 4
        first, second = client.infer(asked(0.1)), client.infer(asked(0.1))
        assert first["actions"].shape == (4, 2) and first["actions"].dtype == np.float64
        assert set(first["server_timing"]) == {"infer_ms", "queue_ms", "batch"}, "as openpi: nothing was before it"
        assert second["server_timing"]["prev_total_ms"] > 0 and first["policy_timing"]["infer_ms"] > 0
        # What comes back is what the policy says of this observation: a head without noise says it twice.
        observation = OpenpiForm(CONTRACT, SPEC).read(asked(0.1), stamp_ns=7)
        assert np.array_equal(first["actions"], policy.predict(observation).actions)
        with pytest.raises(RuntimeError, match=r"observation/state: found float64 of shape \(3,\), expected"):
            client.infer({**asked(), "observation/state": np.zeros(3)})
        assert np.array_equal(client.infer(asked(0.1))["actions"], first["actions"]), "the connection goes on"


def test_a_client_from_the_protocol_alone(served: Served) -> None:
    client = Client(served)
    assert numbers(client.ask(2.5)).tolist() == actions(2.5).tolist()
    assert client.ask()["server_timing"]["batch"] == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"observation/image": pixels(0)[:5]}, "image: found uint8 of shape (5, 8, 3), expected uint8 of shape (6, 8,"),
        ({"observation/image": np.zeros((6, 8, 3))}, "observation/image: found float64"),
        ({"observation/image": b"jpeg"}, "observation/image: found bytes"),
        ({"observation/state": np.zeros(2, np.int64)}, "found int64 of shape (2,), expected float32 or float64"),
        ({"prompt": 3}, "prompt: found int, expected a text"),
        ({"prompt": "x" * 5000}, "prompt: found 5000 characters, expected at most 4096"),
        ({"observation/depth": np.zeros(3)}, "observation/depth: unknown; the policy does not see it"),
        ({"vla_ros": 2}, "vla_ros: found 2, expected 1"),
        ({"prompt": "refuse"}, "refused"),
        ({"prompt": "break"}, "the model failed: RuntimeError: the model broke"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_told_in_a_line_and_the_connection_goes_on(
    served: Served, changes: dict[str, Any], words: str
) -> None:
    client = Client(served)
    client.send(**asked(**changes))
    text = client.text()
    assert words in text and "\n" not in text
    assert numbers(client.ask(1.0)).tolist() == actions(1.0).tolist()


def test_what_is_missing_is_named_with_what_was_given(served: Served) -> None:
    client = Client(served)
    client.send(**{key: value for key, value in asked().items() if key != "observation/image"})
    text = client.text()
    assert "missing, for camera; expected observation/camera or camera or" in text
    assert "keys given: observation/state, prompt" in text


def test_keys_are_named_ignored_and_nested() -> None:
    form = OpenpiForm(
        CONTRACT, SPEC, {"camera": "images/high", "arm": "joints", "task": "words"}, ["extra"], resized=True
    )
    large = np.repeat(np.repeat(pixels(1), 4, 0), 4, 1)
    message = {"images": {"high": large}, "joints": np.float32([1, 2]), "words": "go", "extra": 1}
    found = form.read(message, 9)
    assert (found.stamp_ns, found.instruction, found.state.tolist()) == (9, "go", [1.0, 2.0])
    assert np.array_equal(found.images["camera"], pixels(1)), "the mean over 4 x 4 equal pixels"
    with pytest.raises(VlaError, match="keys: the policy sees no 'front'; choices: arm, camera, prompt, state"):
        OpenpiForm(CONTRACT, SPEC, {"front": "x"})


@pytest.mark.parametrize(
    ("frame", "code", "words"),
    [
        ("hello", 1003, "found a text; expected a binary msgpack message"),
        (b"\xc1garbage", 1007, "no valid msgpack"),
        (msgpack.packb(asked(), default=Client._array)[:-9], 1007, "incomplete"),
        (msgpack.packb({b"__ndarray__": True, b"data": b"x" * 8, b"dtype": "|O", b"shape": [1]}), 1007, "dtype '|O'"),
        (b"\x91" * 5000, 1007, "no valid msgpack"),
        (b"\xdd\xff\xff\xff\xff", 1007, "max_array_len"),
    ],
)
def test_hostile_messages_end_their_connection_with_a_reason(
    served: Served, frame: bytes | str, code: int, words: str
) -> None:
    honest, hostile = Client(served), Client(served)
    hostile.socket.send(frame)
    assert words in hostile.text()
    found, reason = hostile.closed
    assert found == code and reason and words[:30] in reason
    assert numbers(honest.ask(1.0)).tolist() == actions(1.0).tolist()


def test_a_message_beyond_the_limit_is_not_read() -> None:
    with Served(Echo(), max_message_bytes=10_000) as served:
        honest, hostile = Client(served), Client(served)
        hostile.socket.send(b"x" * 10_001)
        assert hostile.closed[0] == 1009
        assert numbers(honest.ask()).tolist() == actions().tolist()
        until(lambda: served.metric('vla_errors_total{reason="too_large"}') == 1, "its count")


def test_slow_silent_and_vanished_clients_harm_nobody(served: Served) -> None:
    honest = Client(served)
    raw = [socket.create_connection((served.host, served.port)) for _ in range(3)]
    raw[0].sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")  # a handshake that never ends
    raw[1].sendall(b"\x00\xff\x13 no http at all\r\n\r\n")
    half_open = Client(served, ping_interval=None)
    # A frame that announces 100 bytes of which one comes; no ping is answered in its middle.
    half_open.socket.socket.sendall(bytes([0x82, 0x80 | 100, 0, 0, 0, 0, 1]))
    dead = Client(served, ping_interval=None)
    dead.send(**asked(1.0))
    dead.socket.socket.shutdown(socket.SHUT_RDWR)  # without a word
    for number in range(20):
        assert numbers(honest.ask(number)).tolist() == actions(number).tolist()
    until(lambda: served.metric("vla_clients") == 1.0, "the others to be dropped")
    for each in raw:
        each.settimeout(DEADLINE_S)
        while each.recv(1000):
            pass
        each.close()
    assert numbers(honest.ask(5.0)).tolist() == actions(5.0).tolist()


def test_one_robots_bad_observation_does_not_spoil_the_batch_of_others() -> None:
    policy = Echo()
    with Served(policy) as served:
        clients = [Client(served) for _ in range(4)]
        policy.go.clear()
        clients[0].send(**asked(0.0))
        until(
            lambda: len(policy.batches[-1]) == 1 and policy.batches[-1][0].state[0] == 0 and not policy.go.is_set(),
            "it",
        )
        clients[1].send(**asked(1.0))
        clients[2].send(**asked(2.0, prompt="refuse"))
        clients[3].send(**asked(3.0))
        until(lambda: len(served.server._batcher._asks) == 3, "three that wait")
        policy.go.set()
        assert numbers(msgpack.unpackb(clients[1].receive())).tolist() == actions(1.0).tolist()
        assert clients[2].text() == "refused"
        assert numbers(msgpack.unpackb(clients[3].receive())).tolist() == actions(3.0).tolist()
        assert [len(batch) for batch in policy.batches[-4:]] == [3, 1, 1, 1]


def test_robots_are_batched_in_the_order_of_their_arrival() -> None:
    policy = Echo()
    with Served(policy, batch=3) as served:
        clients = [Client(served) for _ in range(6)]
        policy.go.clear()
        for number, client in enumerate(clients):
            waiting = len(served.server._batcher._asks)
            before = len(policy.batches)
            client.send(**asked(float(number)))
            until(lambda n=waiting, b=before: len(served.server._batcher._asks) > n or len(policy.batches) > b, "it")  # type: ignore[misc]
        policy.go.set()
        answers = [msgpack.unpackb(client.receive()) for client in clients]
        assert [numbers(answer)[0, 0] for answer in answers] == list(range(6))
        assert [answer["server_timing"]["batch"] for answer in answers] == [1, 3, 3, 3, 2, 2]
        assert [[o.state[0] for o in batch] for batch in policy.batches[-3:]] == [[0], [1, 2, 3], [4, 5]]


def test_one_who_asks_without_pause_starves_nobody() -> None:
    """With batches of one and eight clients, each is served once in eight calls, however fast the others ask."""
    policy = Echo()
    with Served(policy, batch=1) as served:
        clients = [Client(served) for _ in range(8)]
        calls = 12
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            for done in [
                threads.submit(lambda c=c, n=n: [c.ask(float(n)) for _ in range(calls)]) for n, c in enumerate(clients)
            ]:  # type: ignore[misc]
                done.result(DEADLINE_S)
        order = [batch[0].state[0] for batch in policy.batches if batch[0].instruction]
        for number in range(8):
            places = [place for place, who in enumerate(order) if who == number]
            together = places[: places.index(places[-1]) + 1]
            assert len(places) == calls
            assert max(np.diff(together), default=0) <= 2 * 8


def test_what_waits_goes_together_where_waiting_is_asked_for() -> None:
    policy = Echo()
    with Served(policy, batch_wait_s=DEADLINE_S) as served:
        clients = [Client(served) for _ in range(3)]
        until(lambda: served.metric("vla_clients") == 3, "three clients")
        for number, client in enumerate(clients):  # when all have asked, nobody waits any longer
            client.send(**asked(float(number)))
        answers = [msgpack.unpackb(client.receive()) for client in clients]
        assert [answer["server_timing"]["batch"] for answer in answers] == [3, 3, 3]


def test_who_gave_up_is_not_computed_for() -> None:
    policy = Echo()
    with Served(policy) as served:
        first, second, third = (Client(served) for _ in range(3))
        policy.go.clear()
        count = len(policy.batches)
        first.send(**asked(1.0))
        until(lambda: len(policy.batches) == count + 1, "a call")
        second.send(**asked(2.0))
        third.send(**asked(3.0))
        until(lambda: len(served.server._batcher._asks) == 2, "two that wait")
        second.socket.close()
        until(lambda: any(client.gone for client in served.server._clients), "its end")
        policy.go.set()
        assert numbers(msgpack.unpackb(third.receive())).tolist() == actions(3.0).tolist()
        assert [o.state[0] for o in policy.batches[-1]] == [3.0]
        until(lambda: served.metric('vla_errors_total{reason="client_gone"}') == 1, "its count")


def test_health_and_metadata_wait_for_the_warm_up() -> None:
    policy = Echo()
    policy.go.clear()
    with Served(policy) as served:
        assert served.get("/healthz") == (503, "warming up\n")
        early = threading.Thread(target=lambda: clients.append(Client(served)))
        clients: list[Client] = []
        early.start()
        until(lambda: served.metric("vla_clients") == 1, "a client that came early")
        assert not clients and served.metric("vla_ready") == 0
        policy.go.set()
        served.starting.result(DEADLINE_S)
        assert served.get("/healthz") == (200, "OK\n") and served.metric("vla_ready") == 1
        early.join(DEADLINE_S)
        assert numbers(clients[0].ask()).tolist() == actions().tolist()


def test_metrics_are_prometheus_and_count_right(served: Served) -> None:
    client = Client(served)
    for number in range(3):
        client.ask(number)
    client.send(**asked(more=1))
    client.text()
    Client(served).socket.send("text")
    until(lambda: served.metric('vla_errors_total{reason="text"}') == 1, "a count")
    status, page = served.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(page)}
    values = {
        sample.name: sample.value for family in families.values() for sample in family.samples if not sample.labels
    }
    assert status == 200 and values["vla_requests_total"] == 3
    assert values["vla_batch_size_count"] == values["vla_inference_seconds_count"] == 3
    assert values["vla_queue_seconds_count"] == 3 and values["vla_batch_size_sum"] == 3
    assert served.metric('vla_errors_total{reason="observation"}') == 1
    assert families["vla_batch_size"].type == "histogram" and families["vla_errors"].type == "counter"


def test_a_shutdown_finishes_what_is_in_flight_and_tells_the_rest() -> None:
    policy = Echo()
    with Served(policy) as served:
        busy, idle = Client(served), Client(served)
        policy.go.clear()
        count = len(policy.batches)
        busy.send(**asked(4.0))
        until(lambda: len(policy.batches) > count, "a call")
        stopping = threading.Thread(target=served.stop)
        stopping.start()
        assert idle.closed == (1001, "the server shuts down")
        with pytest.raises(OSError):
            Client(served)
        policy.go.set()
        assert numbers(msgpack.unpackb(busy.receive())).tolist() == actions(4.0).tolist()
        assert busy.closed == (1001, "the server shuts down")
        stopping.join(DEADLINE_S)
        assert not stopping.is_alive()


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer sesame", 200), ("Api-Key sesame", 200), ("bearer sesame", 200), ("Basic sesame", 401),
        ("Bearer sesam", 401), ("Bearer sesamé", 401), ("sesame", 401), ("", 401),
    ],
)  # fmt: skip
def test_a_token_is_needed_where_there_is_one(header: str, status: int) -> None:
    with Served(Echo(), token="sesame") as served:
        headers = {"Authorization": header.encode().decode("latin-1")} if header else {}
        assert served.get("/healthz")[0] == 200, "health is no secret"
        assert served.get("/metrics", **headers)[0] == status
        if status == 200:
            assert numbers(Client(served, additional_headers=headers).ask()).tolist() == actions().tolist()
        else:
            with pytest.raises(InvalidStatus, match="401"):
                Client(served, additional_headers=headers)


def test_openpis_api_key() -> None:
    with Served(Echo(), token="sesame") as served:
        assert WebsocketClientPolicy(served.host, served.port, api_key="sesame").infer(asked())["actions"].shape == (
            4,
            2,
        )


def test_no_more_clients_than_allowed_and_no_web_pages() -> None:
    with Served(Echo(), max_clients=1) as served:
        first = Client(served)
        with pytest.raises(InvalidStatus, match="503"):
            Client(served)
        assert numbers(first.ask()).tolist() == actions().tolist()
        first.socket.close()
        until(lambda: served.metric("vla_clients") == 0, "its end")
        with pytest.raises(InvalidStatus, match="403"):
            Client(served, origin="http://a.page")
        Client(served)


def test_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True,
    )  # fmt: skip
    with Served(Echo(), tls_cert=str(certificate), tls_key=str(key)) as served:
        context = ssl.create_default_context(cafile=str(certificate))
        with connect(f"wss://{served.host}:{served.port}", ssl=context, **PATIENCE) as secure:
            assert msgpack.unpackb(secure.recv(DEADLINE_S))["horizon"] == 4
        page = f"https://{served.host}:{served.port}/healthz"
        assert urllib.request.urlopen(page, context=context, timeout=DEADLINE_S).status == 200
        with pytest.raises(ssl.SSLError), connect(f"wss://{served.host}:{served.port}", **PATIENCE):
            pass
    with pytest.raises(ConfigError, match="tls_cert, tls_key: expected both or none"):
        ServerOptions(tls_cert=str(certificate))
    with pytest.raises(VlaError, match="no certificate and its key"):
        ServerOptions(tls_cert=str(key), tls_key=str(tmp_path / "none")).tls()


def test_a_port_that_is_taken(served: Served) -> None:
    other = Served(Echo(), port=served.port)
    with pytest.raises(VlaError, match=f"cannot listen on 127.0.0.1:{served.port}"):
        try:
            other.__enter__()
        finally:
            other._over = True
            other.__exit__(None, None, None)


def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "policy")
    (tmp_path / "token").write_text("sesame\n")
    command = [sys.executable, "-m", "vla_core.cli", "serve", str(tmp_path / "policy"), "--port", "0", "--token-file",
               str(tmp_path / "token"), "--keys", "camera=eye", "--ignore", "extra"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert process.stdout.readline().startswith("policy ")
            ready = process.stdout.readline()
            assert ready.startswith("ready on ws://127.0.0.1:"), ready
            client = WebsocketClientPolicy(ready.split()[-1], api_key="sesame")
            message = {"eye": pixels(0), "state": np.zeros(2), "prompt": "lift it", "extra": 1}
            assert client.infer(message)["actions"].shape == (4, 2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(2 * DEADLINE_S) == 0
            assert "finishing what is in flight" in process.stdout.read() and not process.stderr.read()
        finally:
            process.kill()


def test_the_wire_is_the_servers_own(served: Served) -> None:
    """Metadata is read by anybody's msgpack, and by ours."""
    found = wire.unpack(wire.pack(Client(served).metadata))
    assert found["contract"] == CONTRACT.to_yaml() and time.time() > 0
