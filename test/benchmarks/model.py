"""The suite ``model``: what the models cost beside plain transformers and torch modules of the same arithmetic.

Weights are random, inputs are made up; nothing is downloaded. One thread where a row's name says nothing else.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from test.benchmarks import model_peers as peers
from test.benchmarks.framework import Benchmark, BenchmarkError, Row, Settings, Suite, compared, measured
from test.benchmarks.model_presets import CASES, Case, chunk_of, encode, inputs_of, make, make_plain, on, predict, train
from vla_core.model.action_head import build_action_head
from vla_core.model.action_head.flow_action_head import FlowHeadConfig
from vla_core.model.action_head.transformer_action_head import TransformerHeadConfig
from vla_core.model.sensor.bev import BEVConfig, Cameras, LiftSplat
from vla_core.model.sensor.lidar_encoder import PointCloudConfig, PointCloudEncoder, canonical_order, gather_rows
from vla_core.model.tokens import present
from vla_core.model.vla.multi_sensor_vla import pose_matrix
from vla_core.model.vlm import LLMConfig, build_language, build_vision_encoder
from vla_core.model.vlm.vision_encoder import VisionEncoderConfig
from vla_core.training.recipe import load_preset, load_recipe

GOAL = "<= 1.1"
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
LEAST, MOST, SECONDS = 3, 25, 4.0  # pairs, and the time after which no more are begun
SAMPLE_MS = 40.0  # one sample of what is shorter is of many calls
SLOW_MS = 1500.0  # a call so long needs no first one that does not count
PLAIN = "plain transformers and torch modules in a row, without masks"
STEPS = 20
CHILD_LIMIT_S = 120
Run = Callable[[], object]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def milliseconds(run: Run, times: int = 1) -> float:
    """Of one call, the mean of ``times``, to its end on a GPU too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / times


def in_turns(ours: Run, plain: Run, settings: Settings, count: int = 1) -> list[tuple[float, float]]:
    """Pairs of milliseconds, the order changing each time. What is short is called many times, after a first call."""
    pairs: list[tuple[float, float]] = []
    with threads(count):
        start, limit = time.monotonic(), SECONDS * (5 if settings.long else 1)
        first = (milliseconds(ours), milliseconds(plain))
        if max(first) > SLOW_MS:
            pairs.append(first)
        times = max(1, round(SAMPLE_MS / min(milliseconds(ours), milliseconds(plain)))) if not pairs else 1
        while len(pairs) < LEAST or (len(pairs) < MOST and time.monotonic() - start < limit):
            if len(pairs) % 2:
                pairs.append((milliseconds(ours, times), milliseconds(plain, times)))
            else:
                second = milliseconds(plain, times)
                pairs.append((milliseconds(ours, times), second))
    return pairs


def row(name: str, ours: Run, plain: Run, settings: Settings, *, count: int = 1, peer: str = PLAIN,
        goal: str = GOAL) -> Row:  # fmt: skip
    """One comparison in milliseconds."""
    return compared(name, "ms", in_turns(ours, plain, settings, count), peer, goal)


def agree(name: str, ours: Tensor, plain: Tensor) -> None:
    """Raise :class:`BenchmarkError` where the two sides, given the same weights, do not compute the same."""
    if ours.shape != plain.shape or not torch.allclose(ours, plain, rtol=1e-3, atol=1e-3):
        found = (ours - plain).abs().max().item() if ours.shape == plain.shape else tuple(plain.shape)
        raise BenchmarkError(f"{name}: the peer computes something else: {found} against {tuple(ours.shape)}")


def same_weights(ours: nn.Module, plain: nn.Module) -> None:
    """Copy ``ours`` to ``plain`` by the order of their parameters."""
    with torch.no_grad():
        for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            theirs.copy_(mine)


def backward(model: nn.Module, run: Callable[[], Tensor]) -> None:
    """Forward, a sum of squares, gradients."""
    model.zero_grad(set_to_none=True)
    run().float().square().mean().backward()


def both(name: str, ours: nn.Module, plain: nn.Module, run: Callable[[], Tensor], run_plain: Callable[[], Tensor],
         settings: Settings, peer: str, *, backwards: bool = True) -> Iterator[Row]:  # fmt: skip
    """Forward, then forward and backward, of modules that must agree."""
    ours.eval(), plain.eval()
    with torch.no_grad():
        agree(name, run(), run_plain())
        yield row(f"{name}, forward", run, run_plain, settings, peer=peer)
    if backwards:
        yield row(f"{name}, forward and backward", partial(backward, ours, run), partial(backward, plain, run_plain),
                  settings, peer=peer)  # fmt: skip


# --- whole presets ---


def preset(case: Case) -> Benchmark:
    """Forward, training step, predict, the cached instruction and memory of a preset."""

    def run(settings: Settings) -> Iterator[Row]:
        for device in DEVICES:
            where = "" if device == "cpu" else f", {device}"
            ours, plain = on(device, make, case).train(), on(device, make_plain, case).train()
            inputs, name = inputs_of(case).to(device), case.title
            yield row(
                f"{name}, forward{where}", partial(encode, ours, inputs), partial(encode, plain, inputs), settings
            )
            ours.eval(), plain.eval()
            yield row(f"{name}, predict{where}", partial(predict, ours, inputs), partial(predict, plain, inputs),
                      settings)  # fmt: skip
            if case.preset in ("tiny", "small", "edge"):
                first = partial(predict, ours, inputs, anew=True)
                yield row(f"{name}, predict, first step of an instruction{where}", first,
                          partial(predict, plain, inputs), settings)  # fmt: skip
            if device == "cpu" and case.preset == "edge" and (os.cpu_count() or 1) > 1:
                yield row(f"{name}, predict, 2 threads", partial(predict, ours, inputs),
                          partial(predict, plain, inputs), settings, count=2)  # fmt: skip
            if case.preset in ("small", "edge"):
                yield from instruction(case, ours, settings, device)
            ours.train(), plain.train()
            batch = case.train_batch
            actions, mask = (part.to(device) for part in chunk_of(case, batch))
            given = (inputs_of(case, batch).to(device), actions, mask)
            yield row(f"{name}, training step of {batch}{where}", partial(train, ours, *given),
                      partial(train, plain, *given), settings)  # fmt: skip
            del ours, plain
            gc.collect()
        if case.memory:
            found = memory(case)
            for what in ("predict", "train"):
                pair = (found["ours"][what], found["plain"][what])
                yield compared(f"{case.title}, peak memory, {what}", "MB", [pair], PLAIN, GOAL)

    return run


def instruction(case: Case, model: Any, settings: Settings, device: str) -> Iterator[Row]:
    """Control steps whose instruction stays: what is saved, and how often it was computed."""
    inputs, other = (inputs_of(case, words=words).to(device) for words in (64, 8))
    where = "" if device == "cpu" else f", {device}"
    model.predict(inputs)
    cached, anew = partial(model.predict, inputs), partial(predict, model, inputs, anew=True)
    pairs: list[tuple[float, float]] = []
    with threads(1):
        start = time.monotonic()
        while len(pairs) < LEAST or (len(pairs) < MOST and time.monotonic() - start < SECONDS):
            second = milliseconds(anew)  # leaves the instruction in the cache
            pairs.append((milliseconds(cached), second))
    yield compared(f"{case.title}, predict with a known instruction of 64 ids{where}", "ms", pairs,
                   "the same model's first control step with the instruction", "<= 1")  # fmt: skip
    if case.preset == "small":
        before = model.prefix_cache.computed
        for step in range(STEPS):
            model.predict(other if step < STEPS // 2 else inputs)
        yield measured(f"{case.title}, instructions computed in {STEPS} control steps with 2 of them{where}", "",
                       [model.prefix_cache.computed - before], "== 2")  # fmt: skip


def memory(case: Case) -> dict[str, dict[str, float]]:
    """Peak memory of both sides, each in a process of its own, at the same time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    children = {
        side: subprocess.Popen([sys.executable, "-m", "test.benchmarks.model_memory", case.preset, side],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for side in ("ours", "plain")
    }  # fmt: skip
    try:
        said = {side: child.communicate(timeout=CHILD_LIMIT_S) for side, child in children.items()}
    finally:
        for child in children.values():
            child.kill()
    for side, child in children.items():
        if child.returncode:
            raise BenchmarkError(f"{case.title}, memory of {side}: {said[side][1].strip().splitlines()[-1:]}")
    return {side: json.loads(out.splitlines()[-1]) for side, (out, _) in said.items()}


# --- parts ---


def vision(settings: Settings) -> Iterator[Row]:
    """Every published encoder, the large ones with 6 of their 24 layers."""
    for name in ("siglip-base", "clip-vit-b", "dinov2-base", "siglip-large", "clip-vit-l", "dinov2-large"):
        small = name.endswith(("base", "-b"))
        size = 256 if name == "siglip-large" else 224
        config = VisionEncoderConfig(
            model_name=name, pretrained=None, freeze=False, projection=False, image_size=size,
            architecture={} if small else {"num_hidden_layers": 6},
        )  # fmt: skip
        ours, plain = build_vision_encoder(config), peers.Vision(config)
        source = ours.model.state_dict()  # type: ignore[union-attr]
        getattr(plain.model, "vision_model", plain.model).load_state_dict(source, strict=False)
        images = config.fake(1)
        title = f"{name}{'' if small else ' (6 layers)'}, one picture"
        yield from both(title, ours, plain, lambda m=ours, x=images: m(x).values,  # type: ignore[misc]
                        lambda m=plain, x=images[:, 0]: m(x), settings,  # type: ignore[misc]
                        "the transformers model, given normalized pixels", backwards=small)  # fmt: skip


def language(settings: Settings) -> Iterator[Row]:
    """12 ids and 84 injected tokens through a decoder."""
    for name, layers in (("smollm2-135m", 30), ("qwen2-0.5b", 12)):
        config = LLMConfig(model_name=name, pretrained=None, layers=layers)  # type: ignore[arg-type]
        ours, plain = build_language(config, vocab_size=1000), peers.Language(config)
        plain.model.load_state_dict(ours.model.state_dict())
        ids, injected = torch.randint(3, 1000, (1, 12)), torch.randn(1, 84, plain.width)
        yield from both(
            f"{name} ({layers} layers), 96 tokens", ours, plain,
            lambda m=ours, a=ids, b=injected: m(a, present(b)).values,  # type: ignore[misc]
            lambda m=plain, a=ids, b=injected: m(torch.cat([m.embed(a), b], dim=1)),  # type: ignore[misc]
            settings, "the transformers model, given inputs_embeds",
        )  # fmt: skip


class Writer(nn.Module):
    """A chunk step by step through ``nn.TransformerDecoder``, which keeps nothing: every step runs all before it."""

    def __init__(self, config: TransformerHeadConfig, horizon: int, action_dim: int, context_dim: int) -> None:
        super().__init__()
        self.horizon, self.action_dim = horizon, action_dim
        width = config.hidden_dim
        self.context = nn.Sequential(nn.LayerNorm(context_dim), nn.Linear(context_dim, width))
        self.position = nn.Parameter(0.02 * torch.randn(horizon, width))
        self.step, self.out = nn.Linear(action_dim, width), nn.Linear(width, action_dim)
        layer = nn.TransformerDecoderLayer(
            width, config.heads, 4 * width, 0.0, nn.GELU(), batch_first=True, norm_first=True
        )  # fmt: skip
        self.decoder = nn.TransformerDecoder(layer, config.layers, nn.LayerNorm(width))

    def forward(self, actions: Tensor, memory: Tensor) -> Tensor:
        length = actions.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        steps = self.step(actions) + self.position[:length]
        return self.out(self.decoder(steps, memory, tgt_mask=causal, tgt_is_causal=True))

    def loss(self, context: Tensor, actions: Tensor) -> Tensor:
        shifted = torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], dim=1)
        return (self(shifted, self.context(context)) - actions).abs().mean()

    def predict(self, context: Tensor) -> Tensor:
        memory = self.context(context)
        written = context.new_zeros(len(context), 1, self.action_dim)
        for _ in range(self.horizon):
            written = torch.cat([written, self(written, memory)[:, -1:]], dim=1)
            if written.shape[1] > self.horizon:
                break
        return written[:, 1:]


def heads(settings: Settings) -> Iterator[Row]:
    """The preset edge's flow head, an autoregressive one of the same size, and an MLP denoiser."""
    sizes = {"horizon": 16, "action_dim": 7, "context_dim": 896}
    wide: dict[str, Any] = {"hidden_dim": 512, "layers": 6, "heads": 8}
    cases: list[tuple[str, Any, Any]] = [
        (name, config, peers.Flow(config, *sizes.values()))
        for name, config in (("flow, transformer of 6 layers", FlowHeadConfig(denoiser="transformer", **wide)),
                             ("flow, MLP", FlowHeadConfig(hidden_dim=512, layers=3)))
    ]  # fmt: skip
    writer = TransformerHeadConfig(**wide)
    cases.append(("autoregressive, 6 layers", writer, Writer(writer, *sizes.values())))
    actions = torch.rand(8, 16, 7) * 2 - 1
    mask, many, one = torch.ones(8, 16, dtype=torch.bool), torch.randn(8, 80, 896), torch.randn(1, 80, 896)
    for name, config, plain in cases:
        ours = build_action_head(config, **sizes)
        peer = "nn.TransformerDecoder" if isinstance(plain, Writer) or "MLP" not in name else "nn.Sequential"

        def step(head: nn.Module, loss: Callable[[], Tensor]) -> None:
            head.zero_grad(set_to_none=True)
            loss().backward()

        yield row(
            f"head: {name}, training step of 8",
            partial(step, ours, partial(ours.loss, present(many), actions, mask)),
            partial(step, plain, partial(plain.loss, many, actions)),
            settings,
            peer=peer,
        )
        with torch.no_grad():
            yield row(f"head: {name}, predict", partial(ours.predict, present(one)), partial(plain.predict, one),
                      settings, peer=peer)  # fmt: skip


def point_cloud(settings: Settings) -> Iterator[Row]:
    """PointNet++ over a LiDAR's sweep."""
    config = PointCloudConfig(output="both")
    ours, plain = PointCloudEncoder(config, input_dim=6), peers.PointNet(config, 6)
    same_weights(ours, plain)
    torch.manual_seed(0)
    cloud = torch.randn(1, 16384, 6) * torch.tensor([20.0, 20, 1, 1, 1, 1])
    cloud = gather_rows(cloud, canonical_order(cloud, torch.ones(cloud.shape[:2], dtype=torch.bool)))
    yield from both("PointNet++, 16,384 points", ours, plain, lambda: ours(cloud).values, lambda: plain(cloud),
                    settings, "PointNet++ in plain PyTorch")  # fmt: skip


def bev(settings: Settings) -> Iterator[Row]:
    """Six cameras onto the driving preset's grid."""
    config = dataclasses.replace(BEVConfig(), patch=16)
    ours = LiftSplat(camera_dim=768, width=config.width, depth_m=config.depth_m, depth_bins=config.depth_bins)
    plain = peers.LiftSplat(config, 768)
    same_weights(ours, plain)
    mounts = load_preset("driving").mounts
    poses = torch.stack([pose_matrix(mounts[name]) for name in load_recipe("driving").observation.images])[None]
    camera = torch.tensor([[300.0, 0.0, 196.0], [0.0, 300.0, 112.0], [0.0, 0.0, 1.0]]).expand(1, 6, 3, 3)
    features = torch.randn(1, 6, 768, 16, 28)
    cameras = Cameras(features, camera, poses, torch.ones(1, 6, dtype=torch.bool), (224, 392))
    yield from both("lift and splat, 6 cameras of 16x28 cells", ours, plain, lambda: ours(cameras, config.grid),
                    lambda: plain(features, camera, poses, (224, 392)), settings,
                    "lift and splat in plain PyTorch")  # fmt: skip


BENCHMARKS: Suite = {
    **{f"preset {case.preset}": preset(case) for case in CASES.values()},
    "vision encoders": vision,
    "language models": language,
    "action heads": heads,
    "point cloud": point_cloud,
    "bird's eye view": bev,
}
