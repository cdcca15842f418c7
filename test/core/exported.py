"""Small policies to export, and what they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_core.checkpoint import Checkpoint
from vla_core.export.exporter import ExportOptions, export
from vla_core.export.policy import ExportedPolicy
from vla_core.model.action_head.base import ACTION_HEAD_REGISTRY
from vla_core.observation.builder import Observation
from vla_core.runtime.policy import CheckpointPolicy

from .helpers import START, checkpoint, pixels


def head(kind: str, **settings: Any) -> Any:
    """The settings of a small head."""
    return ACTION_HEAD_REGISTRY[kind].Config(hidden_dim=16, **settings)


HEADS = {
    "mlp": head("mlp"),
    "gaussian": head("gaussian"),
    "gaussian, sampled": head("gaussian", answer="sample"),
    "ddim": head("diffusion", train_steps=6, inference_steps=3),
    "ddpm, v": head("diffusion", train_steps=6, inference_steps=3, sampler="ddpm", prediction="v"),
    "mini_vla_seed": head("diffusion", train_steps=3, inference_steps=3, sampler="mini_vla_seed"),
    "diffusion transformer, guided": head("diffusion", train_steps=6, inference_steps=2, denoiser="transformer",
                                          context_drop=0.1, guidance_scale=2.0, prediction="sample"),
    "flow": head("flow", inference_steps=3),
    "flow transformer": head("flow", inference_steps=2, denoiser="transformer", layers=1),
    "transformer": head("transformer", layers=1, heads=2),
    "transformer, bins": head("transformer", layers=1, heads=2, bins=16),
    "transformer, bins, sampled": head("transformer", layers=1, heads=2, bins=16, answer="sample"),
    "discrete": head("discrete"),
    "discrete, sampled": head("discrete", bins=16, answer="sample"),
    "chunker": head("chunker"),
}  # fmt: skip


def policy(name: str = "flow") -> Checkpoint:
    """An untrained policy of the toy robot with one of ``HEADS``."""
    torch.manual_seed(len(name))
    made = checkpoint(HEADS[name])
    if "bins" in name or "discrete" in name:  # a head that knows nothing yet has a favourite bin
        for weight in made.model.head.parameters():
            weight.data.mul_(3.0)
    return made


def exported(place: Path, made: Checkpoint, kind: str, **options: Any) -> ExportedPolicy:
    """The exported policy, loaded."""
    export(made, place, ExportOptions(kind=kind, **options), fingerprint="0123456789ab")  # type: ignore[arg-type]
    return ExportedPolicy.load(place)


def asked() -> list[Observation]:
    """What no exporter has seen: other pictures, states and stamps, and instructions of other lengths."""
    rng = np.random.default_rng(8)
    return [
        Observation(START + k, {"camera": pixels(k)}, rng.normal(0, 2, 2).astype(np.float32), text, {})
        for k, text in enumerate(["lift it", "", "it", "lift it and drop it and lift it again and " * 4])
    ]


def check_alike(made: Checkpoint, found: ExportedPolicy, seen: list[Observation], tolerance: float = 1e-4) -> None:
    """Graph and checkpoint give the same chunks, which differ from observation to observation."""
    eager = CheckpointPolicy(made)
    span = (made.contract.action_high - made.contract.action_low) / 2
    chunks = []
    for observation in seen:
        expected = eager.predict(observation).actions
        actual = found.predict(observation)
        assert actual.actions.dtype == np.float64 and actual.observation_stamp_ns == observation.stamp_ns
        assert np.abs((actual.actions - expected) / span).max() < tolerance
        chunks.append(expected)
    others = [chunk for chunk in chunks if not np.allclose(chunk, chunks[0], atol=1e-6)]
    assert others, "a policy that always says the same proves nothing"
