"""The lane graph and the towns, by their geometry, on many seeds."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_core.sim.driving.geometry import Boxes, overlaps, wrap
from vla_core.sim.driving.layout import DRIVABLE, MAX_STEERING, WHEELBASE_M, Pose, Surface
from vla_core.sim.driving.network import at_station, backwards, beside, connector, line, stations
from vla_core.sim.driving.paint import CROSSWALK_M
from vla_core.sim.driving.town import District, Plan, build

PLANS: tuple[Plan, ...] = ("crossing", "roundabout", "street")
SEEDS = [(plan, seed) for plan in PLANS for seed in range(12 if plan == "street" else 25)]


@pytest.fixture(scope="module")
def districts() -> dict[tuple[Plan, int], District]:
    return {(plan, seed): build(plan, seed) for plan, seed in SEEDS}


curvatures = st.floats(-0.15, 0.15).map(lambda k: 0.0 if abs(k) < 1e-4 else k)
pieces = st.lists(st.tuples(st.floats(1.0, 30.0), curvatures), min_size=1, max_size=4)


@given(pieces=pieces, heading=st.floats(-3.0, 3.0))
def test_a_line_is_the_integral_of_its_curvature(pieces: list[tuple[float, float]], heading: float) -> None:
    x, y, angle = 2.0, -1.0, heading
    for length, curvature in pieces:  # midpoint rule in small steps
        steps = 2000
        for _ in range(steps):
            middle = angle + curvature * length / steps / 2
            x, y, angle = x + length / steps * math.cos(middle), y + length / steps * math.sin(middle), angle
            angle += curvature * length / steps
    found = line((2.0, -1.0, heading), *pieces)
    assert found[-1] == pytest.approx([x, y, angle], abs=1e-4)
    gaps = np.hypot(*np.diff(found[:, :2], axis=0).T)
    assert gaps.min() > 0 and gaps.max() <= 0.4 + 1e-9
    assert stations(found)[-1] == pytest.approx(sum(length for length, _ in pieces), rel=1e-3)


@given(pieces=pieces, offset=st.floats(-4.0, 4.0))
def test_a_line_beside_keeps_its_distance_and_direction(pieces: list[tuple[float, float]], offset: float) -> None:
    centre = line((0.0, 0.0, 0.3), *pieces)
    other = beside(centre, offset)
    assert np.hypot(*(other - centre)[:, :2].T) == pytest.approx(abs(offset))
    cross = np.cos(centre[:, 2]) * (other - centre)[:, 1] - np.sin(centre[:, 2]) * (other - centre)[:, 0]
    assert cross == pytest.approx(offset)  # to the left
    ahead = np.diff(other[:, :2], axis=0)
    along = ahead[:, 0] * np.cos(other[1:, 2]) + ahead[:, 1] * np.sin(other[1:, 2])
    assert (along > 0).all()  # |offset * curvature| < 1
    assert backwards(backwards(centre))[:, :2] == pytest.approx(centre[:, :2])


@given(turn=st.floats(0.1, 2.0), sign=st.sampled_from([-1, 1]), first=st.floats(3, 20), last=st.floats(3, 20))
def test_a_connector_ends_where_it_shall_and_never_bends_back(
    turn: float, sign: int, first: float, last: float
) -> None:
    angle = sign * turn
    corner = np.array([first, 0.0])
    end = np.array([*(corner + last * np.array([math.cos(angle), math.sin(angle)])), angle])
    found = connector(np.zeros(3), end)
    assert found[-1] == pytest.approx(end)
    bends = np.diff(found[:, 2]) * sign
    assert bends.min() > -1e-9
    radius = min(first, last) / math.tan(turn / 2)
    steps = np.hypot(*np.diff(found[:, :2], axis=0).T)
    # A chord of length c turns by 2 asin(c / 2R).
    assert (bends <= 2 * np.arcsin(steps / 2 / radius) + 1e-6).all()


def test_a_connector_needs_lines_that_meet_between_its_ends() -> None:
    with pytest.raises(ValueError, match="do not meet"):
        connector(np.zeros(3), np.array([-5.0, 5.0, math.pi / 2]))


def test_lanes_meet_their_successors_exactly_and_can_be_driven(districts: dict[tuple[Plan, int], District]) -> None:
    for key, district in districts.items():
        lanes = district.town.lanes
        for lane in lanes.values():
            gaps = np.hypot(*np.diff(lane.centre[:, :2], axis=0).T)
            assert gaps.min() > 0 and gaps.max() <= 0.5, key
            turned = np.diff(np.unwrap(lane.centre[:, 2]))
            steering = np.arctan(WHEELBASE_M * 2 * np.sin(np.abs(turned) / 2) / gaps)
            assert steering.max() <= min(MAX_STEERING, math.atan(WHEELBASE_M / 6.0)), (key, lane.id)
            direction = np.arctan2(*np.diff(lane.centre[:, :2], axis=0).T[::-1])
            middle = lane.centre[:-1, 2] + turned / 2
            assert np.abs(np.angle(np.exp(1j * (direction - middle)))).max() < 1e-6, (key, lane.id)
            for number in lane.successors:
                one, two = lane.centre[-1], lanes[number].centre[0]
                assert np.hypot(*(one - two)[:2]) < 1e-6, (key, lane.id, number)
                assert abs(wrap(one[2] - two[2])) < 1e-6, (key, lane.id, number)


def test_every_way_through_a_junction_is_a_chain_of_lanes(districts: dict[tuple[Plan, int], District]) -> None:
    for key, district in districts.items():
        lanes = district.town.lanes
        for junction in district.junctions:
            count = len(junction.arms)
            assert set(junction.ways) == {(i, j) for i in range(count) for j in range(count) if i != j}
            for (i, j), way in junction.ways.items():
                chain = (junction.arms[i].incoming, *way, junction.arms[j].outgoing)
                for one, two in pairwise(chain):
                    assert two in lanes[one].successors, (key, i, j)
                turn = wrap(lanes[chain[-1]].centre[0, 2] - lanes[chain[0]].centre[-1, 2])
                if junction.ring_m is None:
                    name = lanes[way[0]].turn
                    assert {"left": turn > 1.0, "right": turn < -1.0, "straight": abs(turn) < 0.7}[name], (key, turn)
                else:  # counterclockwise: the further around, the more to the left
                    turned = sum(np.ptp(np.unwrap(lanes[n].centre[:, 2])) for n in way if n not in (way[0], way[-1]))
                    apart = (junction.arms[j].angle - junction.arms[i].angle) % (2 * math.pi)
                    assert 0 < turned < apart, key


def test_traffic_keeps_to_the_right_and_roads_are_as_wide_as_two_lanes(
    districts: dict[tuple[Plan, int], District],
) -> None:
    for key, district in districts.items():
        ground, lanes = district.town.ground, district.town.lanes
        for lane in lanes.values():
            if lane.opposite is not None:
                other = lanes[lane.opposite]
                assert other.opposite == lane.id and 3.5 <= lane.width_m <= 3.8
                assert beside(lane.centre, lane.width_m)[:, :2] == pytest.approx(other.centre[::-1, :2], abs=1e-9)
            reach = lane.width_m / 2 - 0.15
            for offset in (-reach, 0.0, reach):  # all of it can be driven on
                surfaces = ground.at(beside(lane.centre[2:-2], offset)[:, :2])
                assert np.isin(surfaces, DRIVABLE).all(), (key, lane.id, offset)
            if lane.junction is None:
                outside = ground.at(beside(lane.centre[5:-5], -lane.width_m / 2 - 1.0)[:, :2])
                assert (outside == Surface.SIDEWALK).mean() > 0.7, (key, lane.id)


def test_markings_are_where_they_belong(districts: dict[tuple[Plan, int], District]) -> None:
    for key, district in districts.items():
        ground = district.town.ground
        walks = [(walk.road.forth, walk.s) for walk in district.crosswalks]
        for road in {id(r): r for j in district.junctions for r in (arm.road for arm in j.arms)}.values():
            along = stations(road.centre)
            clear = np.ones(len(along), dtype=bool)
            for lane, s in walks:
                clear &= (lane != road.forth) | (along < s - 5) | (along > s + CROSSWALK_M + 5)
            clear &= (along > 5) & (along < along[-1] - 8)
            middle = ground.at(road.centre[clear, :2]) == Surface.MARKING
            assert 0.3 < middle.mean() < 0.7, key  # as much dash as gap
            for side in (-1, 1):
                edge = ground.at(beside(road.centre[clear], side * (road.width_m - 0.18))[:, :2])
                assert (edge == Surface.MARKING).mean() > 0.95, key
        for walk in district.crosswalks:
            across = np.linspace(-walk.road.width_m + 0.5, walk.road.width_m - 0.5, 200)
            pose = at_station(walk.road.centre, walk.s + CROSSWALK_M / 2)
            stripes = np.array([ground.at(beside(pose[None], a)[0, :2]) for a in across]) == Surface.CROSSWALK
            assert 0.35 < stripes.mean() < 0.7, key
            assert all(ground.at(np.array(end)) == Surface.SIDEWALK for end in walk.ends), key
        for light in district.town.lights:
            x, y, heading = light.stop
            assert ground.at(np.array([x + 0.2 * math.cos(heading), y + 0.2 * math.sin(heading)])) == Surface.STOP_LINE


def test_solids_stand_beside_the_road_and_beside_each_other(districts: dict[tuple[Plan, int], District]) -> None:
    for key, district in districts.items():
        solids = district.town.solids
        assert sum(solid.kind == "building" for solid in solids) >= 4, key
        for solid in solids:
            length, width, height = solid.size
            assert solid.position[2] - height / 2 >= -1e-9
            x, y = np.meshgrid(np.linspace(-0.5, 0.5, 25) * length, np.linspace(-0.5, 0.5, 25) * width)
            cos, sin = math.cos(solid.heading), math.sin(solid.heading)
            under = np.stack((solid.position[0] + cos * x - sin * y, solid.position[1] + sin * x + cos * y), axis=-1)
            assert not np.isin(district.town.ground.at(under), DRIVABLE).any(), (key, solid)
        low = [solid for solid in solids if solid.kind != "crown"]
        boxes = Boxes.of(
            [Pose(x=s.position[0], y=s.position[1], heading=s.heading) for s in low], [s.size for s in low]
        )
        for i in range(len(low)):
            one = Boxes(boxes.centres[i : i + 1], boxes.headings[i : i + 1], boxes.halves[i : i + 1])
            assert overlaps(one, boxes).sum() == 1, (key, low[i])  # itself


def test_lights_let_no_two_crossing_directions_go(districts: dict[tuple[Plan, int], District]) -> None:
    lit = [district for district in districts.values() if district.town.lights]
    assert 5 <= len(lit) <= 20  # some crossings of 25
    for district in lit:
        lanes, lights = district.town.lanes, district.town.lights
        for junction in district.junctions:
            boards = {arm.incoming: lights[lanes[arm.incoming].light] for arm in junction.arms}  # type: ignore[index]
            times = np.arange(0.0, 120.0, 0.25)
            for one, two in combinations(boards, 2):
                across = abs(math.sin(lanes[one].centre[-1, 2] - lanes[two].centre[-1, 2])) > 0.7
                go = [np.array([boards[lane].colour(t) != "red" for t in times]) for lane in (one, two)]
                if across:
                    assert not (go[0] & go[1]).any()
                    assert go[0].any() and go[1].any()
                else:
                    assert (go[0] == go[1]).all()


def test_lights_are_seen_from_afar_and_from_the_stop_line(districts: dict[tuple[Plan, int], District]) -> None:
    for key, district in districts.items():
        for lane in district.town.lanes.values():
            if lane.light is None:
                continue
            light = district.town.lights[lane.light]
            stop = next(
                s for s in stations(lane.centre) if np.hypot(*(at_station(lane.centre, s)[:2] - light.stop[:2])) < 0.5
            )
            for before in (30.0, 15.0, 5.0):  # of the rear axle; the camera is 1.5 m before it, 1.5 m high
                pose = at_station(lane.centre, stop - before)
                eye = pose[:2] + 1.5 * np.array([math.cos(pose[2]), math.sin(pose[2])])
                to = np.array(light.position[:2]) - eye
                bearing = wrap(math.atan2(to[1], to[0]) - pose[2])
                assert abs(bearing) < math.radians(42), (key, before)  # within 90 degrees of view
                assert math.atan2(light.position[2] - 1.5, np.hypot(*to)) < math.radians(35), key
                faced = wrap(math.atan2(-to[1], -to[0]) - light.heading)
                assert abs(faced) < math.radians(50), (key, before)
            reach = np.hypot(light.position[0] - light.stop[0], light.position[1] - light.stop[1])
            assert reach < 30.0, key


def test_the_same_seed_builds_the_same_town(districts: dict[tuple[Plan, int], District]) -> None:
    for plan in PLANS:
        one, again, other = districts[plan, 3].town, build(plan, 3).town, districts[plan, 4].town
        assert one.ground.cells.tobytes() == again.ground.cells.tobytes() and one.ground.origin == again.ground.origin
        assert one.solids == again.solids and one.lights == again.lights
        assert one.ground.cells.shape != other.ground.cells.shape
        for lane in one.lanes.values():
            assert lane.centre.tobytes() == again.lanes[lane.id].centre.tobytes()


def test_towns_stay_small(districts: dict[tuple[Plan, int], District]) -> None:
    for key, district in districts.items():
        assert max(district.town.ground.cells.shape) <= 2000, key
        assert district.town.ground.resolution_m == 0.125
    assert any(len(district.junctions) == 2 for district in districts.values())
