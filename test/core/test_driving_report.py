"""Figures of drives against hand-made truths, and the report: what is in the file is on the page, and nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_core.contract import RobotContract
from vla_core.evaluation.drive_figures import Glimpse, corners, mosaic
from vla_core.evaluation.driving import Driven, Route, difference, figures
from vla_core.evaluation.driving_report import Ablation, DriveResult, Film, report, write_report
from vla_core.evaluation.metrics import wilson_interval
from vla_core.evaluation.planning import Plans
from vla_core.evaluation.video import VideoWriter
from vla_core.observation.builder import Observation
from vla_core.sim.driving.rules import Score
from vla_core.training.trainer import Result

from .helpers import checkpoint

CONTRACT = RobotContract.load("driving")


def route(seed: int, kind: str = "follow", success: bool = True, **details: float) -> Route:
    """A clean route of 100 m in 20 s unless told otherwise."""
    score = Score(success=success, driving_score=1.0, route_completion=1.0, km=0.1, seconds=20.0, comfort=0.9)
    given = {name: float(value) for name, value in vars(score).items()}
    return Route(seed=seed, kind=kind, success=success, details={**given, **details}, instruction="go on")


ROUTES = (
    route(0),
    route(1, "overtake", False, collisions_vehicle=2.0, driving_score=0.36, km=0.3),
    route(2, "overtake", False, route_completion=0.5, driving_score=0.35, red_lights=1.0, timeout=1.0, km=0.1),
    route(3, off_road_m=3.0, success=False, driving_score=0.9, route_completion=0.9, off_road_share=0.1),
)


def test_figures_of_four_routes() -> None:
    found = figures(Driven(name="policy", routes=ROUTES))
    assert found["driving_score"] == pytest.approx((100 + 36 + 35 + 90) / 4)
    assert found["route_completion"] == pytest.approx((100 + 100 + 50 + 90) / 4)
    assert (found["successes"], found["success_rate"]) == (1, 0.25)
    assert found["success_ci95"] == wilson_interval(1, 4)
    assert found["collisions_per_km"] == pytest.approx(2 / 0.6)
    assert found["off_road_share"] == pytest.approx(0.025)
    assert found["infractions"] == {
        "collision with a vehicle": 2, "red light": 1, "out of time": 1, "off the road": 1,
    }  # fmt: skip
    low, high = found["driving_score_ci95"]
    assert 35 <= low < found["driving_score"] < high <= 100
    # Only one route has collisions: those drawn without it have none.
    assert found["collisions_per_km_ci95"][0] == 0


def test_the_difference_is_of_the_same_seeds() -> None:
    live = Driven(name="policy", routes=ROUTES)
    worse = Driven(name="blind", routes=tuple(route(seed, driving_score=0.3) for seed in (0, 1, 99)))
    mean, interval = difference(worse, live) or (0.0, None)
    assert mean == pytest.approx(((30 - 100) + (30 - 36)) / 2)
    assert interval == pytest.approx((-70, -6))
    assert difference(Driven(name="elsewhere", routes=(route(99),)), live) is None


def test_a_mosaic_turns_its_head_from_left_to_right() -> None:
    shades = {"back": 10, "front": 20, "front_left": 30, "roof": 40}
    whole = mosaic({name: np.full((4, 6, 3), shade, np.uint8) for name, shade in shades.items()}, gap=2)
    assert whole.shape == (12, 24, 3)
    assert [int(whole[0, x, 0]) for x in (0, 8, 16)] == [30, 20, 10]
    assert (int(whole[6, 0, 0]), int(whole[6, 8, 0])) == (40, 255)


def test_corners_of_a_turned_box() -> None:
    found = corners(np.array([1.0, 2.0, np.pi / 2, 4.0, 2.0]))
    assert {(round(x, 6), round(y, 6)) for x, y in found} == {(0, 4), (2, 4), (0, 0), (2, 0)}


def plans(offset: float) -> Plans:
    times = np.arange(7) * 0.5
    planned = np.zeros((20, 7, 3))
    planned[..., 0] = offset * times
    nothing = np.zeros((20, 7), dtype=bool)
    return Plans(times_s=times, planned=planned, driven=np.zeros((20, 7, 3)), known=~nothing, hit=nothing,
                 driven_hit=nothing)  # fmt: skip


def glimpse() -> Glimpse:
    rng = np.random.default_rng(0)
    names = ("front_left", "front", "front_right", "back_left", "back", "back_right")
    pictures = {name: rng.integers(0, 255, (84, 84, 3), dtype=np.uint8) for name in names}
    seen = Observation(stamp_ns=0, images=pictures, state=np.zeros(2, np.float32), instruction="turn <left>",
                       ages_ns={})  # fmt: skip
    path = np.stack([np.linspace(0, 20, 7), np.linspace(0, 4, 7), np.zeros(7)], axis=-1)
    return Glimpse(
        seconds=4.2, observation=seen, planned=path + 0.3, driven=path, others=np.array([[15.0, 3.5, 0.1, 4.4, 1.8]]),
        points=rng.uniform(-20, 40, (500, 3)), above=rng.random((64, 64)), extent=((-8.0, 40.0), (-24.0, 24.0)),
    )  # fmt: skip


def result(folder: Path) -> DriveResult:
    writer = VideoWriter(folder, 5.0)
    for shade in range(0, 250, 10):
        writer.add(np.full((64, 64, 3), shade, np.uint8))
    film = Film(path=writer.save("seed_0"), title="follow, seed 0: success")
    live = Driven(name="drive", routes=ROUTES, latencies={"inference_ms": list(np.linspace(5, 30, 50))})
    blind = Driven(name="cameras_black", routes=tuple(route(s, driving_score=0.2, success=False) for s in range(2)))
    return DriveResult(
        recipe="drive", contract=CONTRACT, drives=64, frames=7000, bag_bytes=123_000_000,
        training=Result(checkpoint=checkpoint(), seconds=300.0, loss=0.1, validation_loss=0.12),
        history=[(step, 1 / (step + 1), 0.2 if step % 50 == 0 else None) for step in range(0, 200, 10)],
        live=live, plans=[plans(1.0), plans(0.0)], steady=[plans(2.0)],
        ablations=[Ablation(driven=blind, what="black pictures")], films=[film], glimpses=[glimpse()],
        seconds={"record": 200.0, "all": 900.0},
    )  # fmt: skip


def test_the_file_has_what_it_promises(tmp_path: Path) -> None:
    found = report(result(tmp_path))
    promised = ("driving_score", "driving_score_ci95", "success_rate", "success_ci95", "route_completion",
                "collisions_per_km", "l2_1s", "l2_2s", "l2_3s", "open_loop_collision_rate", "miss_rate", "ade", "fde",
                "ablations", "routes", "comfort", "versions", "latency")  # fmt: skip
    assert [name for name in promised if name not in found] == []
    assert found["l2_2s"] == pytest.approx(1.0)
    assert found["open_loop"]["l2_2s_up_to"] == pytest.approx(0.625)
    assert found["kinds"]["overtake"]["driving_score"] == pytest.approx(35.5)
    assert found["routes"][1]["infractions"] == {"collision with a vehicle": 2}
    assert found["ablations"]["cameras_black"]["difference"] == pytest.approx((20 - 100 + 20 - 36) / 2)
    assert found["latency"]["inference_ms"]["p50"] == pytest.approx(17.5)
    json.dumps(found, allow_nan=False)


class Page(HTMLParser):
    """What a page loads, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_no_other_file_and_tells_both_loops(tmp_path: Path) -> None:
    path = write_report(result(tmp_path), tmp_path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    kinds = [source.split(";")[0] for source in page.sources]
    assert kinds.count("data:video/mp4") == 1
    assert kinds.count("data:image/png") == len(kinds) - 1 >= 5
    assert not re.search(r"https?://|url\(", text)
    told = " ".join(page.text)
    assert "Open-loop error alone does not predict driving" in told
    numbers: dict[str, Any] = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert f"{numbers['driving_score']:.1f}" in told and f"{numbers['l2_3s']:.2f}" in told
    assert "prefers-color-scheme:dark" in text
