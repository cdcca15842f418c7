"""A policy behind openpi's websocket protocol, for several robots at once.

On connect the client gets the metadata; then each observation (binary, msgpack) is answered with actions, or with a
text that says in one line why not. A message that is none closes its connection with a reason. ``GET /healthz`` is 200
from the end of the warm-up until the shutdown begins, ``GET /metrics`` is for Prometheus.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import logging
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_core.config import ConfigError
from vla_core.errors import VlaError
from vla_core.runtime.chunk import Continuation
from vla_core.runtime.core import PolicyCore
from vla_core.runtime.policy import Policy
from vla_core.serving import metadata, wire
from vla_core.serving.batcher import Batcher, ClientGone
from vla_core.serving.extra import need
from vla_core.serving.metrics import Metrics
from vla_core.serving.openpi_form import OpenpiForm
from vla_core.serving.own_form import OWN, OwnForm

if TYPE_CHECKING:
    from websockets.asyncio.server import Server, ServerConnection
    from websockets.http11 import Request, Response

log = logging.getLogger(__name__)
UNSUPPORTED, INVALID, GOING_AWAY, FAILED, TOO_LARGE, BUSY = 1003, 1007, 1001, 1011, 1009, 1013  # RFC 6455, 7.4.1
MAX_REASON = 120  # bytes of a close frame's reason
CLOSE_S = 5.0  # for a client's part of the closing handshake


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a policy is served; times in seconds.

    ``port`` 0 takes a free one. ``token`` must then be sent as ``Authorization: Bearer TOKEN`` or ``Api-Key TOKEN``.
    A handshake may take ``handshake_s``; a connection that answers no ping for ``ping_s`` is closed; at the end, what
    is in flight has ``drain_s``.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: str | None = None
    tls_key: str | None = None
    token: str = ""
    max_message_bytes: int = 32 * 2**20
    max_clients: int = 64
    batch: int = 8
    batch_wait_s: float = 0.0
    handshake_s: float = 10.0
    ping_s: float = 20.0
    drain_s: float = 10.0

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert, tls_key: expected both or none")
        for name in ("max_message_bytes", "max_clients", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")

    def tls(self) -> ssl.SSLContext | None:
        """What encrypts, if anything does; raises :class:`VlaError` for files that are no certificate and key."""
        if self.tls_cert is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise VlaError(f"{self.tls_cert}, {self.tls_key}: no certificate and its key: {error}") from None
        return context


class _Client:
    """A connection, and whether an observation of it is in work."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket
        self.busy = False

    @property
    def gone(self) -> bool:
        return self.socket.state.name in ("CLOSING", "CLOSED")


class PolicyServer:
    """Serves ``policy``; ``openpi`` reads what clients send that are not vla_ros's own."""

    def __init__(self, policy: Policy, options: ServerOptions, openpi: OpenpiForm | None = None) -> None:
        need("websockets", "msgpack", "prometheus_client")
        if type(policy).forget is not Policy.forget or type(policy).executed is not Policy.executed:
            raise VlaError(f"{policy.source}: remembers the episode that it is in, and cannot answer several robots; "
                           "run it in the robot's own process")  # fmt: skip
        self._policy, self._options = policy, options
        self._own = OwnForm(policy.contract, policy.spec, policy.horizon, policy.remembers)
        self._openpi = openpi or OpenpiForm(policy.contract, policy.spec)
        self._metadata = wire.pack(metadata.describe(policy))
        self._limits = wire.Limits(bytes=options.max_message_bytes)
        self.metrics = Metrics()
        self._clients: set[_Client] = set()
        self._ready = asyncio.Event()
        self._draining = False
        self._batcher = Batcher(
            policy, self.metrics, size=options.batch, wait_s=options.batch_wait_s, clients=lambda: len(self._clients)
        )
        self._server: Server | None = None
        self._answering: asyncio.Task[None] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens on."""
        assert self._server is not None, "started"
        host, port = next(iter(self._server.sockets)).getsockname()[:2]
        return host, port

    async def start(self) -> None:
        """Listen, and only then warm up, so that those who ask are told to wait. Raises :class:`VlaError`."""
        from websockets.asyncio.server import serve

        options = self._options
        quiet = logging.getLogger("vla_core.serving.websockets")
        quiet.setLevel(logging.CRITICAL)  # it would write a traceback for each port scan
        try:
            self._server = await serve(
                self._on_client, options.host, options.port, ssl=options.tls(), compression=None,
                max_size=options.max_message_bytes, max_queue=1, open_timeout=options.handshake_s,
                ping_interval=options.ping_s, ping_timeout=options.ping_s, close_timeout=min(options.ping_s, CLOSE_S),
                origins=[None],  # a browser tells where its page is from; no page has business here
                process_request=self._on_request, server_header=None, logger=quiet,
            )  # fmt: skip
        except OSError as error:
            raise VlaError(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}") from None
        core = PolicyCore(self._policy)
        try:
            await self._batcher.run_in_worker(lambda: warm_up(core, options.batch))
        except BaseException:
            await self.stop()
            raise
        self._answering = asyncio.create_task(self._batcher.run())
        self._ready.set()
        self.metrics.ready.set(1)

    async def stop(self, reason: str = "the server shuts down") -> None:
        """Take no more, finish what is in flight, and close every connection with ``reason``."""
        assert self._server is not None, "started"
        self._draining = True
        self._ready.set()  # who waits for the warm-up need not wait any longer
        self.metrics.ready.set(0)
        self._server.close(close_connections=False)
        idle = [self._close(client, GOING_AWAY, reason) for client in self._clients if not client.busy]
        await asyncio.gather(*idle)
        deadline_s = time.monotonic() + self._options.drain_s
        while self._clients and time.monotonic() < deadline_s:  # each closes itself after its answer
            await asyncio.sleep(0.01)
        await asyncio.gather(*(self._close(client, GOING_AWAY, reason) for client in self._clients))
        if self._answering is not None:
            self._answering.cancel()
            await asyncio.gather(self._answering, return_exceptions=True)
        self._server.close()
        await self._server.wait_closed()
        self._batcher.close()

    # Requests that are no websocket.

    def _on_request(self, connection: ServerConnection, request: Request) -> Response | None:
        ready = self._ready.is_set() and not self._draining
        path = request.path.partition("?")[0]
        if path == "/healthz":
            if ready:
                return connection.respond(http.HTTPStatus.OK, "OK\n")
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "warming up\n")
        if not self._is_allowed(request):
            self._count("unauthorized")
            answer = connection.respond(http.HTTPStatus.UNAUTHORIZED, "a token is needed: Authorization: Bearer …\n")
            answer.headers["WWW-Authenticate"] = "Bearer"
            return answer
        if path == "/metrics":
            page, content = self.metrics.text()
            answer = connection.respond(http.HTTPStatus.OK, page.decode())
            del answer.headers["Content-Type"]
            answer.headers["Content-Type"] = content
            return answer
        if len(self._clients) >= self._options.max_clients:
            self._count("too_many_clients")
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
        return None

    def _is_allowed(self, request: Request) -> bool:
        if not self._options.token:
            return True
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(token.strip().encode(), self._options.token.encode())
        return same and kind.lower() in ("bearer", "api-key")

    # Connections.

    async def _on_client(self, socket: ServerConnection) -> None:
        from websockets.exceptions import ConnectionClosed

        client = _Client(socket)
        if len(self._clients) >= self._options.max_clients or self._draining:  # many may have shaken hands at once
            self._count("too_many_clients")
            await self._close(client, BUSY, "too many clients")
            return
        self._clients.add(client)
        self.metrics.clients.set(len(self._clients))
        try:
            await self._ready.wait()
            await socket.send(self._metadata)
            await self._converse(client)
        except ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code == TOO_LARGE and not closed.rcvd_then_sent:
                self._count("too_large")
        except ClientGone:
            self._count("client_gone")
        except Exception:
            log.exception("a connection failed")
            self._count("internal")
            await self._close(client, FAILED, "internal error")
        finally:
            self._clients.discard(client)
            self.metrics.clients.set(len(self._clients))

    async def _converse(self, client: _Client) -> None:
        """Answer one observation after the other, until the connection or the server ends."""
        previous_s: float | None = None
        while not self._draining:
            message = await client.socket.recv()
            client.busy = True
            start_s = time.perf_counter()
            if isinstance(message, str):
                await self._refuse(client, "text", UNSUPPORTED, "found a text; expected a binary msgpack message")
                return
            try:
                content = wire.unpack(message, self._limits)
            except wire.WireError as error:
                await self._refuse(client, "malformed", INVALID, str(error))
                return
            await client.socket.send(await self._answer(client, content, previous_s))
            previous_s = time.perf_counter() - start_s
            client.busy = False
        await self._close(client, GOING_AWAY, "the server shuts down")

    async def _answer(self, client: _Client, content: Any, previous_s: float | None) -> bytes | str:
        """The actions, or in one line why there are none."""
        begin_s = time.perf_counter()
        own = isinstance(content, dict) and OWN in content
        try:
            if own:
                observation, continues = self._own.read(content)
            else:
                observation, continues = self._openpi.read(content, time.time_ns()), None
        except VlaError as error:
            self._count("observation")
            return _line(error)
        try:
            found = await self._batcher.ask(observation, continues, lambda: client.gone)
        except VlaError as error:
            self._count("policy")
            return _line(error)
        self.metrics.requests.inc()
        timing = {
            "infer_ms": 1e3 * (time.perf_counter() - begin_s), "queue_ms": 1e3 * found.queue_s, "batch": found.batch,
        }  # fmt: skip
        if previous_s is not None:
            timing["prev_total_ms"] = 1e3 * previous_s
        answer: dict[str, Any] = {
            "actions": found.chunk.actions, "server_timing": timing, "policy_timing": {"infer_ms": 1e3 * found.infer_s},
        }  # fmt: skip
        if own:
            answer["stamp_ns"] = observation.stamp_ns
        return wire.pack(answer)

    async def _refuse(self, client: _Client, reason: str, code: int, text: str) -> None:
        self._count(reason)
        await client.socket.send(text)
        await self._close(client, code, text)

    async def _close(self, client: _Client, code: int, reason: str) -> None:
        await client.socket.close(code, reason.encode()[:MAX_REASON].decode(errors="ignore"))

    def _count(self, reason: str) -> None:
        self.metrics.errors.labels(reason).inc()


def warm_up(core: PolicyCore, batch: int) -> None:
    """Run the model on empty observations, alone and in the largest batch, and guided where it can be."""
    core.warm_up()
    policy, blank = core.policy, core.builder.blank()
    plan = policy.predict(blank)
    guided = Continuation(plan.actions, np.ones(len(plan.actions)), 1, 1.0)
    for continues in [None, guided] if getattr(policy.head, "guidable", False) else [None]:
        for size in (1, batch):
            policy.predict_batch([blank] * size, [continues] * size)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
