"""The latency bench: its exact denoiser against numerical integration, and what it is there to show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_core.cli import main
from vla_core.evaluation.latency_bench import (
    GOAL,
    HORIZON,
    RADIUS,
    START,
    STEP_S,
    BenchOptions,
    HeadKind,
    Latency,
    MixtureDenoiser,
    bench,
    chunk_covariance,
    context_for,
    make_head,
    plan,
    run_trial,
)
from vla_core.evaluation.metrics import mean_interval, roughness
from vla_core.model.tokens import present
from vla_core.runtime.execution import Execution

RTC = Execution(strategy="rtc", steps=10)


def test_the_denoiser_is_the_expectation_of_the_clean_chunk() -> None:
    """One row of one entry: the posterior mean by integrating over a grid of clean actions."""
    means, logits, spread, signal, noise = (0.8, -0.5), (0.3, -0.3), 0.4, 0.6, 0.7
    denoiser = MixtureDenoiser(np.array([[spread**2]]), lambda t: (signal, noise), velocity=False)
    grid = np.linspace(-5, 5, 200_001)
    share = np.exp(logits) / np.exp(logits).sum()
    prior = sum(p * np.exp(-0.5 * ((grid - m) / spread) ** 2) for p, m in zip(share, means, strict=True))
    for x in (-1.0, 0.0, 0.1, 0.9):
        posterior = prior * np.exp(-0.5 * ((x - signal * grid) / noise) ** 2)
        context = torch.tensor([[*means, *logits]])
        found = denoiser(torch.tensor([[[x]]]), torch.ones(1), context)
        assert found.item() == pytest.approx((grid * posterior).sum() / posterior.sum(), abs=1e-4)


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_samples_have_the_mixture_s_means_and_spread(kind: HeadKind) -> None:
    covariance = chunk_covariance()
    head = make_head(kind, covariance, steps=50)
    position = np.array([-1.0, 0.05])
    context = context_for(position).expand(400, -1)
    with torch.no_grad():
        chunks = head.predict(present(context), torch.Generator().manual_seed(0)).numpy()
    ways = np.stack([plan(position, 1), plan(position, -1)])
    nearest = ((chunks[:, None] - ways) ** 2).mean((2, 3)).argmin(1)
    # exp(8 * 0.05) to 1 for the upper way
    assert (nearest == 0).mean() == pytest.approx(np.exp(0.4) / (1 + np.exp(0.4)), abs=0.08)
    for side in (0, 1):
        offset = chunks[nearest == side] - ways[side]
        assert np.abs(offset.mean(0)).max() < 0.06
        assert offset.std() == pytest.approx(np.sqrt(covariance[0, 0]), rel=0.1)


@pytest.mark.parametrize("side", [1, -1])
def test_both_ways_lead_round_the_disc_to_the_goal(side: int) -> None:
    place, passed = START.copy(), []
    for _ in range(4):
        for velocity in plan(place, side):
            place = place + STEP_S * velocity
            passed.append(place)
    assert np.linalg.norm(passed, axis=1).min() > RADIUS
    assert np.linalg.norm(place - GOAL) < 1e-6
    assert plan(START, side).shape == (HORIZON, 2)


def test_a_trial_repeats_exactly_and_latency_lies_within_its_jitter() -> None:
    head = make_head("flow", chunk_covariance())
    latency = Latency(ms=200, jitter=0.5)
    assert run_trial(head, RTC, latency, 3) == run_trial(head, RTC, latency, 3)
    rng = np.random.default_rng(0)
    drawn = np.array([latency.draw_ns(rng) for _ in range(2000)]) / 1e6
    assert 100 <= drawn.min() < 110 and 290 < drawn.max() <= 300


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_rtc_keeps_the_way_it_chose_where_others_do_not(kind: HeadKind) -> None:
    """At 300 ms: the newest chunk alone changes its mind in front of the obstacle, RTC does not."""
    rows = bench(BenchOptions(strategies=("receding", "rtc"), latencies_ms=(300.0,), trials=12, head=kind))
    receding, rtc = rows
    assert rtc["success_rate"] >= receding["success_rate"] + 0.25
    assert rtc["boundary_jump"] < 0.5 * receding["boundary_jump"]
    low, high = rtc["success_ci95"]
    assert low <= rtc["success_rate"] <= high


def test_roughness_and_intervals_by_hand() -> None:
    assert roughness(np.array([[0.0], [1.0], [0.0], [0.0]])) == 2.0
    assert roughness(np.zeros((2, 3))) == 0.0
    assert mean_interval([1.0]) is None
    low, high = mean_interval([1.0, 2.0, 3.0])  # type: ignore[misc]
    assert (low + high) / 2 == pytest.approx(2.0) and high - low == pytest.approx(2 * 1.959964 / 3**0.5)


def test_the_command_writes_figures_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench"
    arguments = [
        "latency",
        "--out",
        str(out),
        "--trials",
        "2",
        "--latency-ms",
        "0",
        "100",
        "--strategy",
        "blend",
        "rtc",
    ]
    assert main(arguments) == 0
    rows = json.loads((out / "latency.json").read_text())["rows"]
    assert [(row["strategy"], row["latency_ms"]) for row in rows] == [
        ("blend", 0),
        ("blend", 100),
        ("rtc", 0),
        ("rtc", 100),
    ]
    assert all(row["trials"] == 2 for row in rows)
    assert (out / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert main(["latency", "--out", str(out), "--strategy", "guess"]) == 1
    assert "strategy: expected one of" in capsys.readouterr().err
