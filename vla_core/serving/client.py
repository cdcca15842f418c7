"""A connection to a policy server that is always being kept up, from a thread of its own.

The robot's threads only ask: they never wait longer than their time-out, and not at all while there is no connection.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vla_core.errors import VlaError
from vla_core.serving import wire

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 5.0  # between attempts to connect; each is twice the one before, and jittered
OPEN_S = 10.0  # for a handshake
METADATA_S = 600.0  # a server that warms up answers when it is ready
PING_S = 5.0
REFUSALS = (401, 403, 404)  # that time does not heal
LOST, CHANGED = "policy_server_lost", "policy_server_changed"


class PolicyServerLost(VlaError):
    """There is no connection to the server, or it does not answer in time; what was planned before still holds."""


class ServerClient:
    """Asks ``url``, one question at a time.

    ``accept`` is called with the metadata of each connection, and raises :class:`VlaError` for a server that is not to
    be asked. ``fault`` tells why there is no connection, empty while there is one.
    """

    def __init__(self, url: str, *, token: str, accept: Callable[[Any], None], max_bytes: int) -> None:
        self._url, self._accept, self._max_bytes = url, accept, max_bytes
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._socket: ClientConnection | None = None
        self._settled = threading.Event()  # connected, or refused
        self._asking = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._ending, self._dropped = asyncio.Event(), asyncio.Event()
        self.fault = f"{LOST}: {url}: not connected yet"
        self._thread = threading.Thread(target=self._run, name="policy-server", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether there is a connection; waits for the first one, unless the server refuses it."""
        self._settled.wait(timeout_s)
        return self._socket is not None

    def ask(self, question: bytes, timeout_s: float) -> bytes | str:
        """The answer; raises :class:`PolicyServerLost`. After a time-out the connection is made anew."""
        with self._asking:
            if self._socket is None:
                raise PolicyServerLost(self.fault)
            future = asyncio.run_coroutine_threadsafe(self._ask(self._socket, question, timeout_s), self._loop)
            try:
                return future.result()
            except concurrent.futures.CancelledError:
                raise PolicyServerLost(f"{LOST}: {self._url}: the connection was closed here") from None

    def close(self) -> None:
        """End the connection and its thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join()

    # In the thread.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._keep_connected())
        finally:
            self._lose("closed here")
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
                self._loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            self._loop.close()

    async def _keep_connected(self) -> None:
        ended = asyncio.ensure_future(self._ending.wait())
        delay_s = FIRST_DELAY_S
        while not ended.done():
            attempt = asyncio.ensure_future(self._connect())
            await asyncio.wait({attempt, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not attempt.done():
                attempt.cancel()
                return
            socket = attempt.result()
            if socket is not None:
                delay_s = FIRST_DELAY_S
                over = {asyncio.ensure_future(wait()) for wait in (socket.wait_closed, self._dropped.wait)}
                await asyncio.wait({*over, ended}, return_when=asyncio.FIRST_COMPLETED)
                self._dropped.clear()
                if self._socket is socket:
                    self._lose(f"closed by the server: {_reason(socket)}")
                await socket.close()
            # Robots that lost one server at the same moment must not come back at the same moment.
            await asyncio.wait({ended}, timeout=delay_s * random.uniform(0.5, 1.5))
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)

    async def _connect(self) -> ClientConnection | None:
        from websockets.asyncio.client import connect
        from websockets.exceptions import InvalidStatus, WebSocketException

        try:
            socket = await connect(
                self._url, additional_headers=self._headers, compression=None, max_size=self._max_bytes,
                open_timeout=OPEN_S, ping_interval=PING_S, ping_timeout=PING_S, close_timeout=1.0,
                logger=logging.getLogger("vla_core.serving.websockets"),
            )  # fmt: skip
        except InvalidStatus as error:
            body = (error.response.body or b"")[:200].decode(errors="replace")
            self._lose(f"the server answers {error.response.status_code}: {body}")
            if error.response.status_code in REFUSALS:
                self._settled.set()
            return None
        except (OSError, WebSocketException, asyncio.TimeoutError) as error:
            self._lose(str(error) or type(error).__name__)
            return None
        try:
            metadata = await asyncio.wait_for(socket.recv(), METADATA_S)
            if isinstance(metadata, str):
                raise VlaError(f"a text in the place of metadata: {metadata[:200]}")
            self._accept(wire.unpack(metadata, wire.Limits(bytes=self._max_bytes)))
        except (VlaError, WebSocketException, asyncio.TimeoutError) as error:
            self._lose(str(error) or type(error).__name__)
            try:
                await socket.close()
            finally:
                socket.transport.abort()  # also where this is cancelled meanwhile
                if isinstance(error, VlaError):
                    self._settled.set()
            return None
        except asyncio.CancelledError:
            socket.transport.abort()
            raise
        self._socket, self.fault = socket, ""
        self._settled.set()
        return socket

    async def _ask(self, socket: ClientConnection, question: bytes, timeout_s: float) -> bytes | str:
        from websockets.exceptions import ConnectionClosed

        try:
            return await asyncio.wait_for(self._exchange(socket, question), timeout_s)
        except asyncio.TimeoutError:
            # An answer that comes later would be taken for that of the next question.
            self._lose(f"no answer within {timeout_s:g} s")
            self._dropped.set()
        except ConnectionClosed:
            self._lose(f"closed by the server: {_reason(socket)}")
        raise PolicyServerLost(self.fault)

    @staticmethod
    async def _exchange(socket: ClientConnection, question: bytes) -> bytes | str:
        await socket.send(question)
        return await socket.recv()

    def _lose(self, why: str) -> None:
        why = " ".join(why.split())
        self._socket = None
        self.fault = why if why.startswith(CHANGED) else f"{LOST}: {self._url}: {why}"


def _reason(socket: ClientConnection) -> str:
    return f"{socket.close_code} {socket.close_reason or ''}".strip()
