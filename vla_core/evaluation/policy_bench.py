"""How fast a policy answers: eager, compiled, as a graph and quantized, side by side.

Each way has a process of its own, so that its memory can be told, and all take turns: a machine that slows down slows
all of them.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_core import hub
from vla_core.checkpoint import Checkpoint, PolicyConfig
from vla_core.config import ConfigError
from vla_core.contract import RobotContract
from vla_core.errors import VlaError, choices
from vla_core.evaluation.plan import EvaluationError
from vla_core.export import verify
from vla_core.export.exporter import ExportOptions, export, prepared
from vla_core.export.feed import check, feed
from vla_core.export.graph import PolicyGraph, draws_of, example, free_sizes
from vla_core.export.policy import ExportedPolicy
from vla_core.export.success import success
from vla_core.model.action_head.draws import draw
from vla_core.model.vla import build_model
from vla_core.model.vla.sizes import columns
from vla_core.model.vlm.text_encoder import WordTokenizer
from vla_core.observation.builder import ImageSize, Observation
from vla_core.observation.normalizer import Normalizer, entry_names
from vla_core.progress import bar
from vla_core.resources import share
from vla_core.runtime.policy import CheckpointPolicy, noise_seed
from vla_core.training.recipe import Recipe, load_preset, load_recipe

# What is measured: name to format and precision; None is no graph.
WAYS: dict[str, tuple[str, str] | None] = {
    "eager": None,
    "compiled": None,
    "torchscript": ("torchscript", "fp32"),
    "onnx": ("onnx", "fp32"),
    "torchscript bf16": ("torchscript", "bf16"),
    "torchscript int8": ("torchscript", "int8"),
    "onnx int8": ("onnx", "int8"),
    "onnx int4": ("onnx", "int4"),
}
WARM_UP = 5  # calls
BOUND = 10.0  # of errors: they are reported, and refused by nobody
INSTRUCTIONS = ("push the puck to the goal", "turn left at the light")
Answer = Callable[[Observation], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """``rounds`` in which every way makes ``calls`` predictions on ``threads`` threads."""

    ways: tuple[str, ...] = tuple(WAYS)
    rounds: int = 10
    calls: int = 20
    threads: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.ways if name not in WAYS]
        if unknown:
            raise ConfigError(f"--way: no way {unknown[0]!r}; choices: {choices(WAYS)}")
        if "eager" not in self.ways:
            raise ConfigError("--way: expected eager among them, which the others are compared with")


def bench(
    checkpoint: Checkpoint, options: BenchOptions, name: str = "policy", task: str | None = None, episodes: int = 20
) -> dict[str, Any]:
    """A record of what each way takes and how far it is from the eager one; what cannot run says why.

    With ``task``, a simulated world, also how many of ``episodes`` succeed.
    """
    with tempfile.TemporaryDirectory(prefix="vla_bench_") as place:
        folder = Path(place)
        checkpoint.save(folder / "checkpoint")
        workers: dict[str, _Worker] = {}
        refused: dict[str, str] = {}
        try:
            with bar("prepare", len(options.ways)) as advance:
                for done, way in enumerate(options.ways):
                    advance(done, way)
                    try:
                        workers[way] = _Worker(way, _made(checkpoint, way, folder), options)
                    except VlaError as error:
                        refused[way] = " ".join(str(error).split())
            times = _take_turns(workers, options)
            if "eager" not in workers:
                raise EvaluationError(refused["eager"])
            rows = [
                _row(way, times, worker, workers["eager"].chunks, verify.half_range(checkpoint),
                     checkpoint.config.execution.steps, options.rounds)
                for way, worker in workers.items()
            ]  # fmt: skip
        finally:
            for worker in workers.values():
                worker.close()
        if task is not None:
            places = {way: folder / way.replace(" ", "_") for way in workers if WAYS[way] is not None}
            reached = success({"eager": folder / "checkpoint", **places}, task, episodes)
            for row in rows:
                row["success"] = reached.get(row["way"])
    return {
        "policy": name, "model": checkpoint.config.model.type, "head": checkpoint.config.model.head.type,
        "parameters": sum(weight.numel() for weight in checkpoint.model.parameters()),
        "options": dataclasses.asdict(options), "torch": torch.__version__, "cores": os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 2), "rows": rows, "refused": refused,
    }  # fmt: skip


def table(record: dict[str, Any]) -> list[str]:
    """The record as a table in Markdown."""
    lines = [
        "| way | p50 ms | p99 ms | least ms | times eager | control rate Hz | memory MB | mean error | largest error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        times = f"{row['p50_ms']:.2f} | {row['p99_ms']:.2f} | {row['min_ms']:.2f} | {row['speedup']:.2f}"
        errors = f"{row['mean_error']:.1e} | {row['max_error']:.1e}"
        lines.append(f"| {row['way']} | {times} | {row['control_hz']:.0f} | {row['memory_mb']:.0f} | {errors} |")
    if any(row.get("success") is not None for row in record["rows"]):
        lines[0] += " success |"
        lines[1] += "---:|"
        found = [row.get("success") for row in record["rows"]]
        lines[2:] = [f"{line} {'' if share is None else f'{share:.2f}'} |"
                     for line, share in zip(lines[2:], found, strict=True)]  # fmt: skip
    return [*lines, *(f"not measured: {way}: {why}" for way, why in record["refused"].items())]


def find_policy(name: str) -> Checkpoint:
    """A checkpoint folder, a hub's ``user/name``, or a preset of config/models with random weights."""
    presets = {path.stem for path in share("config/models").glob("*.yaml")}
    return preset(name) if name in presets and not Path(name).exists() else Checkpoint.load(hub.local_folder(name))


def preset(name: str) -> Checkpoint:
    """An untrained policy of a preset: for Meta-World's robot, or for the car that its sensors are those of."""
    model = load_preset(name)
    drives = hasattr(model, "mounts")
    base = load_recipe({"driving_tiny": "drive", "driving": "driving"}.get(name, "vla_tiny"))
    size = getattr(model.vision, "size", None)
    spec = base.observation
    if not drives and size is not None:
        images = {camera: ImageSize(height=size[0], width=size[1]) for camera in spec.images}
        spec = dataclasses.replace(spec, images=images)
    robot = {"driving_tiny": "driving", "driving": "vehicle"}.get(name, "metaworld_sawyer")
    contract = RobotContract.load(robot)
    recipe = dataclasses.replace(base, model=model, observation=spec)
    return fresh(recipe, contract)


def fresh(recipe: Recipe, contract: RobotContract) -> Checkpoint:
    """An untrained policy of a recipe, with statistics of numbers near 1."""
    maker = getattr(type(recipe.model), "tokenizer", None)
    tokenizer: Any = WordTokenizer()
    tokenizer.fit(INSTRUCTIONS)
    language = getattr(recipe.model, "language", None)
    if maker is None and getattr(language, "type", "") == "llm":
        from vla_core.model.vlm import build_tokenizer

        tokenizer = build_tokenizer(language, INSTRUCTIONS)
    torch.manual_seed(0)
    model = build_model(recipe.model_config(contract, tokenizer.vocab_size)).eval()
    spec = recipe.observation
    seen = columns(spec, contract)
    names = entry_names(spec, contract)
    statistics = {
        feature: {key: [value] * len(entries) for key, value in
                  (("mean", 0.0), ("std", 1.0), ("min", -1.0), ("max", 1.0), ("q01", -1.0), ("q99", 1.0))}
        for feature, entries in {**names, **seen}.items()
    }  # fmt: skip
    return Checkpoint(
        config=PolicyConfig(model=model.config, observation=spec, normalization=recipe.normalization,
                            execution=recipe.execution),
        model=model, normalizer=Normalizer(recipe.normalization, statistics, seen, names), tokenizer=tokenizer,
        contract=contract,
    )  # fmt: skip


def compiled(checkpoint: Checkpoint) -> Answer:
    """The policy's graph by torch.compile, for one instruction's number of words after another."""
    made = prepared(checkpoint, ExportOptions(kind="onnx"))
    graph = PolicyGraph(made, draws_of(made)).eval()
    seen = verify.observations(checkpoint, 2, seed=1)[1]
    with torch.no_grad():
        whole = torch.export.export(
            graph, example(made, graph, seen), dynamic_shapes=(free_sizes(graph.ports),), strict=False
        )  # fmt: skip
        run: Any = torch.compile(whole.module())

    @torch.no_grad()
    def answer(observation: Observation) -> np.ndarray:
        given = feed(observation, graph.spec, made.contract, made.tokenizer)
        if graph.draws:
            generator = torch.Generator().manual_seed(noise_seed(0, observation.stamp_ns))
            given["noise"] = draw(graph.draws, generator).numpy()
        chunk: np.ndarray = run(*map(torch.from_numpy, check(given, graph.ports))).numpy()
        return chunk

    return answer


def _made(checkpoint: Checkpoint, way: str, folder: Path) -> Path:
    """The folder that a way runs."""
    wanted = WAYS[way]
    if wanted is None:
        return folder / "checkpoint"
    kind, precision = wanted
    out = folder / way.replace(" ", "_")
    execution = checkpoint.config.execution
    if execution.strategy == "rtc":  # a graph cannot be guided; how it is executed does not matter here
        execution = dataclasses.replace(execution, strategy="receding")
        checkpoint = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, execution=execution))
    bound = None if precision == "fp32" else BOUND
    export(checkpoint, out, ExportOptions(kind=kind, precision=precision, bound=bound))  # type: ignore[arg-type]
    return out


def _take_turns(workers: dict[str, _Worker], options: BenchOptions) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {way: [] for way in workers}
    order = list(workers)
    with bar("measure", options.rounds) as advance:
        for number in range(options.rounds):
            for way in order if number % 2 == 0 else reversed(order):
                times[way] += workers[way].measure(options.calls)
            advance(number + 1)
    return times


def _row(
    way: str, times: dict[str, list[float]], worker: _Worker, eager_chunks: np.ndarray, half_range: np.ndarray,
    steps: int, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    errors = np.abs(worker.chunks - eager_chunks) / half_range
    mine = times[way]
    p50, p99 = np.percentile(mine, [50, 99])
    eager = float(np.median(times["eager"]))
    return {
        "way": way, "calls": len(mine), "p50_ms": float(p50), "p99_ms": float(p99), "min_ms": float(min(mine)),
        "round_ms": [float(np.median(part)) for part in np.array_split(mine, rounds)],
        "speedup": float(eager / p50), "control_hz": float(1e3 * steps / p99),
        "memory_mb": worker.memory_mb, "load_s": worker.load_s,
        "mean_error": float(errors.mean()), "max_error": float(errors.max()),
    }  # fmt: skip


class _Worker:
    """A process that holds one way and answers when it is asked."""

    def __init__(self, way: str, folder: Path, options: BenchOptions) -> None:
        context = multiprocessing.get_context("spawn")
        self._mine, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, way, folder, options.threads), daemon=True)
        self._process.start()
        theirs.close()
        self.chunks, self.load_s = self._answer(way)
        self.memory_mb = 0.0

    def measure(self, calls: int) -> list[float]:
        """Milliseconds of so many predictions."""
        self._mine.send(calls)
        times, self.memory_mb = self._answer("measurement")
        return list(times)

    def close(self) -> None:
        """End the process."""
        self._mine.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _answer(self, what: str) -> Any:
        try:
            answer = self._mine.recv()
        except EOFError:
            self._process.join()
            raise EvaluationError(f"{what}: its process ended with status {self._process.exitcode}") from None
        if isinstance(answer, str):
            self.close()
            raise EvaluationError(answer)
        return answer


def _serve(connection: Connection, way: str, folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    try:
        answer, seen = _loaded(way, folder)
        chunks = np.stack([answer(observation) for observation in seen])
    except Exception as error:
        connection.send(f"{way}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    for _ in range(WARM_UP):
        answer(seen[1])
    connection.send((chunks, time.perf_counter() - begin))
    try:
        while True:
            times = []
            for number in range(connection.recv()):
                observation = seen[1 + number % (len(seen) - 1)]
                start = time.perf_counter()
                answer(observation)
                times.append(1e3 * (time.perf_counter() - start))
            connection.send((times, _memory_mb()))
    except (EOFError, OSError):
        return


def _loaded(way: str, folder: Path) -> tuple[Answer, list[Observation]]:
    """What answers, and what it is asked: one instruction, as on a robot, and everything there."""
    beside = folder if WAYS[way] is None else folder.parent / "checkpoint"
    checkpoint = Checkpoint.load(beside)
    seen = verify.observations(checkpoint, verify.OBSERVATIONS)
    seen = [dataclasses.replace(each, instruction=seen[1].instruction) for each in seen]
    if way == "compiled":
        return compiled(checkpoint), seen
    if WAYS[way] is None:
        policy = CheckpointPolicy(checkpoint)
        return lambda observation: policy.predict(observation).actions, seen
    del checkpoint
    return ExportedPolicy.load(folder).answer, seen


def _memory_mb() -> float:
    """What the process holds now; where the system does not tell, the most that it held."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
