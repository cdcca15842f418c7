"""``vla serve``: its arguments, and the process that runs until it is told to end."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from vla_core.cli import not_negative, positive
from vla_core.errors import VlaError
from vla_core.serving.secret import TOKEN_VARIABLE, read_token

LOCAL = ("127.0.0.1", "::1", "localhost")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``serve`` to a parser."""
    serve = commands.add_parser("serve", help="a policy for robots elsewhere, by openpi's websocket protocol")
    serve.add_argument("checkpoint", help="folder, or a name on the hub")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 listens on every network; default: this machine")
    serve.add_argument("--port", type=not_negative, default=8000, help="0 takes a free one")
    serve.add_argument("--dataset", help="of a policy that was trained on several: the one by whose statistics it runs")
    serve.add_argument("--seed", type=not_negative, default=0, help="of the policy's sampling noise")
    serve.add_argument("--device", default="cpu", help="where the model runs, such as cuda; default: cpu")
    serve.add_argument("--tls-cert", metavar="FILE", help="certificate chain (PEM); clients then use wss://")
    serve.add_argument("--tls-key", metavar="FILE", help="its key")
    serve.add_argument(
        "--token-file", type=Path, default=os.environ.get(TOKEN_VARIABLE) or None, metavar="FILE",
        help=f"the token that clients must send; default: the file that {TOKEN_VARIABLE} names, if any",
    )  # fmt: skip
    serve.add_argument("--max-message-mb", type=positive, default=32, metavar="MB", help="default 32")
    serve.add_argument("--max-clients", type=positive, default=64, help="default 64")
    serve.add_argument("--batch", type=positive, default=8, help="most observations in a model call; default 8")
    serve.add_argument(
        "--batch-wait-ms", type=not_negative, default=0, metavar="MS",
        help="how long an observation waits for others; default 0: those that came while the model ran go together",
    )  # fmt: skip
    serve.add_argument(
        "--keys", nargs="+", default=[], metavar="NAME=KEY",
        help="of openpi's clients: the key of a stream, of the whole state or of the prompt, such as "
        "front=observation/image state=observation/state; default: their usual ones",
    )  # fmt: skip
    serve.add_argument("--ignore", nargs="+", default=[], metavar="KEY", help="keys that the policy does not see")
    serve.add_argument("--resize", action="store_true", help="resize openpi clients' pictures as the robot's own are")
    serve.set_defaults(run=_serve)


def read_keys(assignments: Sequence[str]) -> dict[str, str]:
    """``name=key`` texts as a mapping."""
    keys: dict[str, str] = {}
    for assignment in assignments:
        name, equals, key = assignment.partition("=")
        if not (name and equals and key):
            raise VlaError(f"--keys {assignment!r}: expected NAME=KEY, as in front=observation/image")
        keys[name] = key
    return keys


def _serve(parsed: argparse.Namespace) -> int:
    from vla_core.runtime.loading import load_policy
    from vla_core.serving.openpi_form import OpenpiForm
    from vla_core.serving.server import PolicyServer, ServerOptions

    options = ServerOptions(
        host=parsed.host, port=parsed.port, tls_cert=parsed.tls_cert, tls_key=parsed.tls_key,
        token=read_token(parsed.token_file), max_message_bytes=parsed.max_message_mb * 2**20,
        max_clients=parsed.max_clients, batch=parsed.batch, batch_wait_s=parsed.batch_wait_ms / 1e3,
    )  # fmt: skip
    policy = load_policy(parsed.checkpoint, parsed.seed, parsed.dataset, parsed.device)
    openpi = OpenpiForm(policy.contract, policy.spec, read_keys(parsed.keys), parsed.ignore, parsed.resize)
    try:
        asyncio.run(_run(PolicyServer(policy, options, openpi), options, policy.fingerprint))
    finally:
        policy.close()
    return 0


async def _run(server: object, options: object, fingerprint: str) -> None:
    from vla_core.serving.server import PolicyServer, ServerOptions

    assert isinstance(server, PolicyServer) and isinstance(options, ServerOptions)
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def on_signal() -> None:
        told.set()
        for number in signals:  # a second one ends at once
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, on_signal)
    print(f"policy {fingerprint} warms up", flush=True)
    starting = asyncio.ensure_future(server.start())
    await asyncio.wait({starting, asyncio.ensure_future(told.wait())}, return_when=asyncio.FIRST_COMPLETED)
    await starting
    host, port = server.address
    scheme = "ws" if options.tls_cert is None else "wss"
    print(f"ready on {scheme}://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    if host not in LOCAL and not options.token:
        print("warning: whoever reaches this port can use the policy; --token-file asks for a token", flush=True)
    await told.wait()
    print("finishing what is in flight", flush=True)
    await server.stop()
