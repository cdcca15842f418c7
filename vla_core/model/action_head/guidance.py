"""Sampling a chunk that continues an older one: guidance of the estimated clean chunk, for flow and diffusion alike.

Legend: a noisy chunk is x = signal * a + noise * epsilon. Flow matching has signal = 1 - t and noise = t; a diffusion
has signal = sqrt(abar) and noise = sqrt(1 - abar). Dividing x by signal + noise turns the second into the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ChunkPrefix:
    """What a sampled chunk must continue, in normalized action units.

    ``actions``       (H, A) the older plan on the new chunk's rows; any finite number where the weight is 0
    ``weights``       (H,) in [0, 1], how much each row is to be kept
    ``frozen``        the first rows, which are given: the sample has exactly these
    ``max_guidance``  bound on the guidance weight, beta of Black et al. 2025
    ``spread``        standard deviation that the actions of one context are taken to have; 1 is Black et al.'s choice
    """

    actions: Tensor
    weights: Tensor
    frozen: int
    max_guidance: float
    spread: float = 1.0


@dataclass(frozen=True)
class ChunkPrefixes:
    """What each row of a batch must continue; None where it continues nothing.

    It stands wherever a prefix for all rows does.
    """

    rows: tuple[ChunkPrefix | None, ...]


def guidance_scale(signal: float, noise: float, max_guidance: float, spread: float = 1.0) -> float:
    """How far the clean estimate moves along the vector-Jacobian product.

    The velocity of a flow gets min(beta, (1 - tau) / (tau r^2)) with r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2)
    (Black et al. 2025, eq. 2 to 4; tau = 1 - t), which is (signal^2 + noise^2) / (signal noise); the clean estimate
    moves by 1 - tau = noise times that. For a diffusion it is the same in its scaled coordinates, and unbounded it is
    the guidance of PiGDM with r^2 = 1 - abar (Song et al. 2023, "Pseudoinverse-Guided Diffusion Models for Inverse
    Problems"). r^2 is the variance of the clean action behind x where actions have unit variance: for such, the
    estimate arrives at the older plan where the weight is 1. A policy knows better what to do than that, and is hardly
    moved; with the variance spread^2 in r^2 it is moved as far (Soare 2025, "Smooth-As-Butter Robot Policies").
    """
    product = signal * noise * spread**2
    weight = (signal**2 * spread**2 + noise**2) / product if product > 0 else math.inf
    return noise * min(max_guidance, weight)


def guide(
    estimate: Callable[[Tensor], Tensor],
    x: Tensor,
    signal: float,
    noise: float,
    prefix: ChunkPrefix | ChunkPrefixes | None,
) -> Tensor:
    """Return ``estimate(x)``, the clean chunk (B, H, A) behind the noisy ``x``, moved towards ``prefix``.

    The rows that are frozen are the prefix's own: on the way down they are thus the known actions with the noise they
    started with, and the denoiser sees them so.
    """
    if prefix is None:
        return estimate(x)
    rows = prefix.rows if isinstance(prefix, ChunkPrefixes) else (prefix,) * len(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        clean = estimate(x)
        guided = clean.detach().clone()
        error = torch.stack([_error(row, chunk) for row, chunk in zip(rows, guided, strict=True)])
        (pull,) = torch.autograd.grad(clean, x, error)
    for row, chunk, moved in zip(rows, guided, pull, strict=True):
        if row is not None:
            chunk += guidance_scale(signal, noise, row.max_guidance, row.spread) * moved
            chunk[: row.frozen] = row.actions[: row.frozen]
    return guided


def _error(prefix: ChunkPrefix | None, chunk: Tensor) -> Tensor:
    return torch.zeros_like(chunk) if prefix is None else prefix.weights[:, None] * (prefix.actions - chunk)
