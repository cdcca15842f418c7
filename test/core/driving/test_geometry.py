"""Lines and boxes against closed forms and brute force."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_core.sim.driving.geometry import Boxes, Line, ego_front, ego_middle, overlaps
from vla_core.sim.driving.layout import Pose

angles = st.floats(-4.0, 4.0)
near = st.floats(-4.0, 4.0)
halves = st.floats(0.2, 3.0)


def circle(radius: float, sweep: float) -> Line:
    """An arc to the left from the origin, along x."""
    turned = np.linspace(0.0, sweep, 1 + math.ceil(radius * sweep / 0.3))
    return Line(np.column_stack([radius * np.sin(turned), radius * (1 - np.cos(turned)), turned]))


@given(radius=st.floats(5.0, 40.0), share=st.floats(0.05, 0.95), offset=st.floats(-3.0, 3.0))
def test_an_arc_is_found_again(radius: float, share: float, offset: float) -> None:
    line = circle(radius, 3.0)
    turned = 3.0 * share
    x, y = (radius - offset) * math.sin(turned), radius - (radius - offset) * math.cos(turned)
    s, left, heading = line.project(np.array([[x, y]]))
    assert abs(s[0] - radius * turned) < 0.3
    assert abs(left[0] - offset) < 0.02
    assert abs(heading[0] - turned) < 0.2 / radius
    pose = line.pose(radius * turned, offset)
    assert math.hypot(pose.x - x, pose.y - y) < 0.02
    assert abs(pose.heading - turned) < 0.01


def test_a_straight_line_is_exact_and_goes_on() -> None:
    line = Line(np.array([[1.0, 2.0, math.pi / 2], [1.0, 12.0, math.pi / 2]]))
    s, left, _ = line.project(np.array([[0.0, 4.5], [3.0, -1.0], [1.0, 20.0]]))
    np.testing.assert_allclose(s, [2.5, -3.0, 18.0])
    np.testing.assert_allclose(left, [1.0, -2.0, 0.0], atol=1e-12)
    pose = line.pose(18.0, 1.0)
    np.testing.assert_allclose([pose.x, pose.y], [0.0, 20.0], atol=1e-12)


def test_a_loop_is_searched_where_one_is() -> None:
    line = circle(10.0, 4 * math.pi)  # twice round
    start = np.array([[0.0, 0.0]])
    once = 20 * math.pi
    for around in (0.0, once, 2 * once):
        s, _, _ = line.project(start, around - 5, around + 5)
        assert abs(s[0] - around) < 0.1


@settings(max_examples=300)
@given(near, near, angles, angles, halves, halves, halves, halves)
def test_overlap_is_what_a_grid_of_points_says(
    x: float, y: float, turn: float, other: float, a: float, b: float, c: float, d: float
) -> None:
    one = Boxes(np.zeros((1, 2)), np.array([turn]), np.array([[a, b]]))
    two = Boxes(np.array([[x, y]]), np.array([other]), np.array([[c, d]]))
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 81), np.linspace(-1, 1, 81)), axis=-1).reshape(-1, 2)
    points = (grid * (a, b)) @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    own = (points - (x, y)) @ np.array([[math.cos(other), -math.sin(other)], [math.sin(other), math.cos(other)]])
    slack = 0.12  # finer than the grid
    if (np.abs(own) < np.array([c, d]) - 1e-9).all(axis=1).any():
        assert overlaps(one, two)[0]
    elif not (np.abs(own) < np.array([c, d]) + slack).all(axis=1).any():
        assert not overlaps(one, two)[0]
    assert overlaps(one, two)[0] == overlaps(two, one)[0]


def test_corners_and_the_ego_vehicles_box() -> None:
    box = Boxes.of([Pose(x=1.0, y=2.0, heading=math.pi / 2)], [(4.0, 2.0, 1.5)])
    np.testing.assert_allclose(box.corners[0], [[0, 4], [0, 0], [2, 0], [2, 4]], atol=1e-12)
    pose = Pose(x=1.0, y=2.0, heading=math.pi / 2)
    middle = ego_middle(pose)
    np.testing.assert_allclose([middle.x, middle.y], [1.0, 2.0 + 1.4])  # 2.3 m from either end, the rear one 0.9 m back
    np.testing.assert_allclose(ego_front(pose), [1.0, 2.0 + 3.7])
