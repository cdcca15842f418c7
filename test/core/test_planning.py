"""Displacement and collisions of plans against closed forms, and overlap against polygons that are clipped."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_core.evaluation.metrics import bootstrap_interval
from vla_core.evaluation.planning import (
    Footprint,
    Plans,
    figures,
    hits,
    into_frame,
    out_of_frame,
    overlap,
    steady,
    wrapped,
)

TIMES = np.arange(7) * 0.5
CAR = Footprint(length_m=4.6, width_m=1.9, rear_m=0.9)

place = st.floats(-6, 6)
boxes = st.tuples(place, place, st.floats(-7, 7), st.floats(0.3, 6), st.floats(0.3, 3)).map(np.array)
poses = st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(-10, 10)).map(np.array)


def plans(ticks: int = 1, **changes: np.ndarray) -> Plans:
    """Everything at the origin, everything known, nothing hit."""
    blank = np.zeros((ticks, 7), dtype=bool)
    given: dict[str, np.ndarray] = {
        "times_s": TIMES, "planned": np.zeros((ticks, 7, 3)), "driven": np.zeros((ticks, 7, 3)),
        "known": ~blank, "hit": blank, "driven_hit": blank,
    }  # fmt: skip
    return Plans(**{**given, **changes})


def forward(metres: np.ndarray, ticks: int = 1) -> np.ndarray:
    found = np.zeros((ticks, 7, 3))
    found[..., 0] = metres
    return found


def test_displacement_in_both_habits_of_averaging() -> None:
    # A plan at 2 m/s where 1 m/s was driven: t metres off at time t.
    found = figures([plans(planned=forward(2 * TIMES), driven=forward(TIMES))])
    assert [found[f"l2_{h}s"] for h in (1, 2, 3)] == pytest.approx([1, 2, 3])
    assert [found[f"l2_{h}s_up_to"] for h in (1, 2, 3)] == pytest.approx([0.75, 1.25, 1.75])
    assert (found["l2_mean"], found["l2_mean_up_to"]) == pytest.approx((2, 1.25))
    assert (found["ade"], found["fde"], found["miss_rate"]) == pytest.approx((1.75, 3, 1))


def test_a_miss_is_more_than_two_metres_at_the_end() -> None:
    found = figures([plans(planned=forward(np.full(7, 2.0))), plans(planned=forward(np.full(7, 2.01)))])
    assert found["miss_rate"] == 0.5


def test_what_is_not_known_does_not_count() -> None:
    known = np.ones((2, 7), dtype=bool)
    known[1, 3:] = False  # 1 s of the second plan is known
    off = np.concatenate([forward(np.full(7, 1.0)), forward(np.full(7, 3.0))])
    found = figures([plans(2, planned=off, known=known, hit=np.array([[False] * 7, [True] * 7]))])
    assert (found["l2_1s"], found["l2_2s"], found["fde"]) == pytest.approx((2, 1, 1))
    assert (found["collision_rate_1s"], found["collision_rate_2s"], found["collision_rate"]) == (0.5, 0, 0)


def test_collisions_at_up_to_and_anywhere() -> None:
    hit = np.zeros((4, 7), dtype=bool)
    hit[0, 2] = hit[1, 3] = True  # at 1 s, and at 1.5 s
    hit[:, 0] = True  # at the observation: no plan can help it
    found = figures([plans(4, hit=hit)])
    assert [found[f"collision_rate_{h}s"] for h in (1, 2, 3)] == [0.25, 0, 0]
    assert [found[f"collision_rate_{h}s_up_to"] for h in (1, 2, 3)] == pytest.approx([1 / 8, 2 / 16, 2 / 24])
    assert found["collision_rate"] == 0.5


def test_what_the_driven_vehicle_hits_too_is_not_the_plans_fault() -> None:
    hit = np.zeros((2, 7), dtype=bool)
    hit[0, 2] = True
    found = figures([plans(2, hit=hit, driven_hit=hit)])
    assert (found["collision_rate"], found["collision_rate_1s"], found["driven_collision_rate"]) == (0, 0, 0.5)


def test_routes_are_the_units_of_the_interval() -> None:
    # Of two routes that differ, resampling gives either one or both; the interval spans from one to the other.
    found = figures([plans(10, planned=forward(np.full(7, 1.0), 10)), plans(10)])
    assert found["l2_1s"] == pytest.approx(0.5)
    assert found["l2_1s_ci95"] == pytest.approx((0, 1))
    assert figures([plans(10)])["l2_1s_ci95"] is None


def test_a_ratio_weighs_its_units_by_their_counts() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(5, 50, 200)
    sums = np.array([rng.normal(3, 1, n).sum() for n in counts])
    low, high = bootstrap_interval(sums, counts) or (0, 0)
    rate = sums.sum() / counts.sum()
    # The delta method's standard error of a ratio (Cochran 1977, 2.39).
    error = np.sqrt(np.var(sums - rate * counts, ddof=1) / 200) / counts.mean()
    assert (low, high) == pytest.approx((rate - 1.96 * error, rate + 1.96 * error), abs=0.25 * error)


@given(poses, poses)
def test_frames_are_inverse(pose: np.ndarray, frame: np.ndarray) -> None:
    there = into_frame(pose, frame)
    back = out_of_frame(there, frame)
    assert back[:2] == pytest.approx(pose[:2], abs=1e-8)
    assert math.cos(back[2] - pose[2]) == pytest.approx(1)
    # Complex numbers turn the plane as well.
    z = (complex(*pose[:2]) - complex(*frame[:2])) * np.exp(-1j * frame[2])
    assert there[:2] == pytest.approx((z.real, z.imag), abs=1e-8)
    assert -math.pi < there[2] <= math.pi


def test_half_a_turn_is_positive() -> None:
    assert wrapped(np.array([math.pi, -math.pi, 3 * math.pi])) == pytest.approx([math.pi] * 3)


def corners(box: np.ndarray) -> list[complex]:
    x, y, heading, length, width = box
    turn = complex(math.cos(heading), math.sin(heading))
    half = [(1, 1), (-1, 1), (-1, -1), (1, -1)]
    return [complex(x, y) + complex(a * length / 2, b * width / 2) * turn for a, b in half]


def shared_area(a: np.ndarray, b: np.ndarray) -> float:
    """Area of the common polygon (Sutherland and Hodgman 1974), by the shoelace formula."""
    polygon, clip = corners(a), corners(b)
    for start, end in zip(clip, clip[1:] + clip[:1], strict=True):

        def side(point: complex, start: complex = start, end: complex = end) -> float:
            return ((end - start).conjugate() * (point - start)).imag

        kept: list[complex] = []
        for here, after in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            if side(here) >= 0:
                kept.append(here)
            if side(here) * side(after) < 0:
                kept.append(here + (after - here) * side(here) / (side(here) - side(after)))
        polygon = kept
    return sum((p.conjugate() * q).imag for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True)) / 2


@given(boxes, boxes)
def test_overlap_is_a_shared_area(a: np.ndarray, b: np.ndarray) -> None:
    area = shared_area(a, b)
    if area > 1e-9:
        assert overlap(a, b)
        assert overlap(b, a)
    elif not overlap(a, b * [1, 1, 1, 1 + 1e-6, 1 + 1e-6]):
        assert area == pytest.approx(0, abs=1e-9)
    else:  # they touch, or nearly
        assert shared_area(a, b * [1, 1, 1, 1.001, 1.001]) > 0


@given(boxes, st.sampled_from([(1, 0), (0, 1), (-1, 0), (0, -1)]))
def test_a_box_overlaps_itself_and_not_its_neighbour(box: np.ndarray, side: tuple[int, int]) -> None:
    x, y, heading, length, width = box
    beside = (complex(side[0] * length, side[1] * width)) * np.exp(1j * heading)

    def moved(share: float) -> np.ndarray:
        return np.array([x + share * beside.real, y + share * beside.imag, heading, length, width])

    assert overlap(box, moved(0.0))
    assert overlap(box, moved(0.999))
    assert not overlap(box, moved(1.001))


def test_hits_asks_every_other_and_absent_ones_are_nowhere() -> None:
    car = CAR.boxes(np.array([[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]]))
    # The front bumper is 3.7 m before the rear axle.
    others = np.array([[4.19, 0.0, 0.0, 1.0, 1.0], [np.nan, 0.0, 0.0, 1.0, 1.0]])
    assert hits(car, others[None].repeat(2, axis=0)).tolist() == [True, False]
    others[0, 0] += 0.02
    assert hits(car, others[None].repeat(2, axis=0)).tolist() == [False, False]
    assert hits(car, np.zeros((2, 0, 5))).tolist() == [False, False]


@given(st.floats(0, 15), st.floats(-0.6, 0.6))
def test_steady_motion_is_the_integral_of_its_speeds(speed: float, yaw_rate: float) -> None:
    found = steady(speed, yaw_rate, TIMES)
    fine = np.linspace(0, 3, 3001)
    middle = (fine[1:] + fine[:-1]) / 2
    x = np.concatenate([[0], np.cumsum(speed * np.cos(yaw_rate * middle)) * 1e-3])[::500]
    y = np.concatenate([[0], np.cumsum(speed * np.sin(yaw_rate * middle)) * 1e-3])[::500]
    assert found == pytest.approx(np.stack([x, y, yaw_rate * TIMES], axis=-1), abs=1e-4)
