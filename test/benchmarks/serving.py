"""A policy server under the load of several robots: `vla serve` in a process, robots in another.

The policy is the preset `tiny` of the recipe `vla_tiny` with random weights: a camera of 64 pixels, a state of three
numbers, an instruction. Robots speak the bare protocol (openpi's keys), each over a connection of its own, and ask at
5 Hz: all at the same instant, or spread evenly over the period. A robot whose answer is late asks the next time when
it has it; what it could not ask by then is missing in its share.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from test.benchmarks.framework import BenchmarkError, Row, Settings, compared, measured
from test.benchmarks.processes import Child, Processes
from vla_core.checkpoint import Checkpoint, PolicyConfig
from vla_core.contract import RobotContract
from vla_core.model.vla import build_model
from vla_core.model.vla.sizes import model_sizes
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.observation.builder import ObservationBuilder
from vla_core.observation.normalizer import Normalizer
from vla_core.runtime.loading import load_policy
from vla_core.runtime.policy import Policy
from vla_core.serving import wire
from vla_core.training.recipe import load_recipe

ROBOTS, RATE_HZ = 16, 5.0
RUNS = 5
ALONE_S, LOAD_S, BUSY_S = 6.0, 8.0, 3.0  # of a run
START_S = 180.0
GOAL_P99, GOAL_SHARE = "<= 3", ">= 0.95"


def save_tiny(path: Path) -> None:
    """The preset `tiny` for the simulated arm, with random weights and plausible statistics."""
    torch.manual_seed(0)
    recipe, contract = load_recipe("vla_tiny"), RobotContract.load("metaworld_sawyer")
    tokenizer = WordTokenizer()
    tokenizer.fit(["push the puck to the goal"])
    sizes = model_sizes(recipe.observation, contract, tokenizer.vocab_size)
    config = recipe.model.config(**sizes)
    neutral = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0}
    widths = {"state": sizes["state_dim"], "action": sizes["action_dim"]}
    statistics = {part: {key: [value] * size for key, value in neutral.items()} for part, size in widths.items()}
    settings = PolicyConfig(model=config, observation=recipe.observation, normalization=recipe.normalization,
                            execution=recipe.execution)  # fmt: skip
    Checkpoint(
        config=settings, model=build_model(config).eval(), normalizer=Normalizer(recipe.normalization, statistics),
        tokenizer=tokenizer, contract=contract,
    ).save(path)  # fmt: skip


def question(policy: Policy) -> bytes:
    """What a robot asks."""
    blank = ObservationBuilder(policy.contract, policy.spec).blank()
    pictures = {f"observation/{name}": pixels for name, pixels in blank.images.items()}
    return wire.pack({**pictures, "observation/state": blank.state, "prompt": "push the puck to the goal"})


def serve(group: Processes, folder: Path, name: str, *options: str) -> tuple[Child, str]:
    """A server that is warm, and its address."""
    child = group.start(name, "vla_core.cli", "serve", str(folder / "policy"), "--port", "0", *options)
    deadline = time.monotonic() + START_S
    while "ready on " not in child.output():
        child.check()
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{name}: not ready after {START_S:.0f} s: {child.last_words()}")
        time.sleep(0.05)
    return child, child.output().split("ready on ")[1].split()[0]


async def _robot(url: str, asked: bytes, first_s: float, until_s: float, period_s: float) -> list[float]:
    """Latencies in ms of one robot from ``first_s`` on; period 0 asks without pause."""
    from websockets.asyncio.client import connect

    found = []
    async with connect(url, compression=None, max_size=None, ping_interval=None) as socket:
        await socket.recv()
        next_s = first_s
        while next_s < until_s:
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
            start_s = time.perf_counter()
            await socket.send(asked)
            answer = await socket.recv()
            if isinstance(answer, str):
                raise BenchmarkError(f"the server says {answer}")
            end_s = time.perf_counter()
            found.append(1e3 * (end_s - start_s))
            next_s = max(next_s + period_s, end_s)
    return found


def ask(
    url: str, asked: bytes, robots: int, seconds: float, period_s: float, spread: bool = False
) -> list[list[float]]:
    """The latencies in ms of each of ``robots`` that ask for ``seconds``."""

    async def run() -> list[list[float]]:
        start_s = time.perf_counter() + 0.5  # all are connected by then
        firsts = [start_s + (period_s * number / robots if spread else 0.0) for number in range(robots)]
        return await asyncio.gather(*(_robot(url, asked, first, start_s + seconds, period_s) for first in firsts))

    return asyncio.run(run())


def load(settings: Settings) -> Iterator[Row]:
    """Sixteen robots at 5 Hz against one of them, which has the server to itself."""
    runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as scratch, Processes(Path(scratch)) as group:
        folder = Path(scratch)
        save_tiny(folder / "policy")
        asked = question(load_policy(folder / "policy"))
        _, url = serve(group, folder, "server")
        times = 3 if settings.long else 1
        for _ in range(RUNS):
            for spread, found in runs.items():
                (alone,) = ask(url, asked, 1, times * ALONE_S, 1 / RATE_HZ)
                together = ask(url, asked, ROBOTS, times * LOAD_S, 1 / RATE_HZ, spread)
                due = times * LOAD_S * RATE_HZ
                found.append({
                    "p50 alone": float(np.percentile(alone, 50)),
                    "p50": float(np.percentile(np.concatenate(together), 50)),
                    "p99": float(np.percentile(np.concatenate(together), 99)),
                    "worst": max(float(np.percentile(each, 99)) for each in together),
                    "best": min(float(np.percentile(each, 99)) for each in together),
                    "share": min(len(each) for each in together) / due,
                })  # fmt: skip
    peer = f"{ROBOTS} times the p50 of one robot alone"
    for spread, found in runs.items():
        title = f"{ROBOTS} robots at {RATE_HZ:g} Hz, {'spread' if spread else 'all at once'}"
        bound = [ROBOTS * run["p50 alone"] for run in found]
        yield measured(f"{title}, one alone, p50", "ms", [run["p50 alone"] for run in found])
        yield measured(f"{title}, p50", "ms", [run["p50"] for run in found])
        yield compared(
            f"{title}, p99", "ms", [(run["p99"], b) for run, b in zip(found, bound, strict=True)], peer, GOAL_P99
        )  # fmt: skip
        pairs = [(run["worst"], run["best"]) for run in found]
        yield compared(
            f"{title}, p99 of the robot that waits longest", "ms", pairs, "that of the robot that waits least"
        )
        shares = [run["share"] for run in found]
        yield measured(f"{title}, answers of the robot that got fewest", "of those due", shares, GOAL_SHARE)


def batching(settings: Settings) -> Iterator[Row]:
    """Sixteen robots that ask without pause: what batches are good for."""
    pairs: list[tuple[float, float]] = []
    seconds = BUSY_S * (3 if settings.long else 1)
    with tempfile.TemporaryDirectory() as scratch, Processes(Path(scratch)) as group:
        folder = Path(scratch)
        save_tiny(folder / "policy")
        asked = question(load_policy(folder / "policy"))
        urls = [serve(group, folder, f"batch_{size}", "--batch", str(size))[1] for size in (16, 1)]
        for _ in range(RUNS):
            own, single = (
                sum(len(each) for each in ask(url, asked, ROBOTS, seconds, 0.0)) / seconds for url in urls
            )  # fmt: skip
            pairs.append((own, single))
    yield compared(
        f"{ROBOTS} robots without pause, batches of 16", "answers/s", pairs, "the same server with --batch 1"
    )


def remote(settings: Settings) -> Iterator[Row]:
    """One robot: the policy node's own way to a server on this machine, against the policy in its process."""
    count = 100 if settings.long else 30
    pairs: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as scratch, Processes(Path(scratch)) as group:
        folder = Path(scratch)
        save_tiny(folder / "policy")
        local = load_policy(folder / "policy")
        blank = ObservationBuilder(local.contract, local.spec).blank()
        there = load_policy(serve(group, folder, "server")[1])
        torch.set_num_threads(1)
        try:
            for _ in range(RUNS):
                pairs.append((_median_ms(there, blank, count), _median_ms(local, blank, count)))
        finally:
            there.close()
    yield compared("one robot, predict by way of a server here", "ms", pairs, "the policy in the robot's own process")


def _median_ms(policy: Policy, observation: Any, count: int) -> float:
    found = []
    for _ in range(count):
        start_s = time.perf_counter()
        policy.predict(observation)
        found.append(1e3 * (time.perf_counter() - start_s))
    return float(np.median(found))


BENCHMARKS = {"load": load, "batching": batching, "remote": remote}
