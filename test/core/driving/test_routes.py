"""Scenarios: what is asked for, in which words, and who else is there."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest

from vla_core.sim.base import SimulationError
from vla_core.sim.driving.geometry import Boxes, Line, ego_middle, overlaps, wrap
from vla_core.sim.driving.layout import (
    DRIVABLE,
    LENGTH_M,
    WIDTH_M,
    EgoState,
    Pose,
    Route,
    Scenario,
    Spawn,
    Surface,
)
from vla_core.sim.driving.routes import (
    BUS_GAP_M,
    FRONT_M,
    KINDS,
    RouteTracker,
    kind_of,
    other_instruction,
    path_of,
    scenario,
)
from vla_core.sim.driving.words import FREE_M, OTHERS, WORDS, meaning_of, navigated

SEEDS = range(8)


@pytest.fixture(scope="module")
def scenarios() -> dict[tuple[str, int], Scenario]:
    found = {(kind, seed): scenario(kind, seed) for kind in KINDS for seed in SEEDS}
    return {**found, ("roundabout", 14): scenario("roundabout", 14)}  # whose way is the second exit


def place(spawn: Spawn, told: Scenario) -> Pose:
    """The middle of a road user at the start."""
    if spawn.walk is not None:
        (x0, y0), (x1, y1) = spawn.walk
        return Pose(x=x0, y=y0, heading=math.atan2(y1 - y0, x1 - x0))
    line = Line(np.concatenate([told.town.lanes[lane].centre for lane in spawn.path]))
    return line.pose(spawn.s, spawn.offset_m)


def state(x: float, y: float, heading: float = 0.0) -> EgoState:
    return EgoState(pose=Pose(x=x, y=y, heading=heading), speed_mps=0.0, yaw_rate=0.0, steering=0.0)


def test_paths_run_along_their_lanes(scenarios: dict[tuple[str, int], Scenario]) -> None:
    for key, told in scenarios.items():
        path, lanes = told.route.path, [told.town.lanes[lane] for lane in told.route.lanes]
        for one, two in pairwise(lanes):
            assert two.id in one.successors, key
        centre = np.concatenate([lane.centre for lane in lanes])
        away = np.hypot(*(path[:, None, :2] - centre[None, :, :2]).transpose(2, 0, 1))
        assert away.min(axis=1).max() < 0.26, key  # a point of the lane every 0.4 m
        steps = np.hypot(*np.diff(path[:, :2], axis=0).T)
        assert steps == pytest.approx(0.5, abs=0.01), key
        direction = np.arctan2(*np.diff(path[:, :2], axis=0).T[::-1])
        middle = path[:-1, 2] + np.diff(path[:, 2]) / 2
        assert np.abs(np.angle(np.exp(1j * (direction - middle)))).max() < 0.03, key
        assert np.abs(np.diff(path[:, 2])).max() < 0.5 / 6.0 + 1e-3, key
        # It begins on the road, 3 m in, and ends with road to spare.
        assert path[0, :2] == pytest.approx(start_of(lanes[0].centre))
        assert np.hypot(*(path[-1, :2] - lanes[-1].centre[-1, :2])) > 12.0, key
        assert told.route.length_m == pytest.approx(0.5 * (len(path) - 1), rel=2e-3)


def start_of(centre: np.ndarray) -> np.ndarray:
    pose = Line(centre).pose(3.0)
    return np.array([pose.x, pose.y])


def test_routes_are_neither_short_nor_long(scenarios: dict[tuple[str, int], Scenario]) -> None:
    for (kind, seed), told in scenarios.items():
        least = 45 if kind == "stop_behind" else 85
        assert least < told.route.length_m < 190, (kind, seed)
        assert told.route.length_m / 8 < told.route.limit_s < 110, (kind, seed)


def test_speeds_fit_limits_and_curves_and_change_gently(scenarios: dict[tuple[str, int], Scenario]) -> None:
    for key, told in scenarios.items():
        path = told.route.path
        curvature = np.abs(np.diff(path[:, 2])) / 0.5
        calm = slice(2, -2)
        both = np.maximum(path[1:, 3], path[:-1, 3])
        assert (both**2 * curvature)[calm].max() < 2.6, key  # 2 m/s2, where a straight meets an arc a little more
        limits = {told.town.lanes[lane].speed_mps for lane in told.route.lanes}
        assert path[:, 3].max() <= max(limits) + 1e-9 and path[:, 3].min() > 2.5, key
        assert np.abs(np.diff(path[:, 3] ** 2)).max() <= 2 * 1.5 * 0.5 + 1e-6, key


def test_a_path_brakes_before_a_curve_in_closed_form() -> None:
    from vla_core.sim.driving.layout import Lane
    from vla_core.sim.driving.network import line

    straight = Lane(id=0, centre=line((0, 0, 0), (60.0, 0.0)), width_m=3.6, speed_mps=8.0)
    arc = Lane(id=1, centre=line((60, 0, 0), (20.0, 0.125)), width_m=3.6, speed_mps=8.0)
    path = path_of([straight, arc], 0.0, 80.0)
    assert path[-10, 3] == pytest.approx(4.0, rel=1e-3)  # sqrt(2 * 8)
    before = 60.0 - path[:, 0]
    braking = (before > 1.0) & (before < 15.0)
    assert path[braking, 3] == pytest.approx(np.sqrt(16.0 + 2 * 1.5 * before[braking]), abs=0.25)
    assert path[:60, 3] == pytest.approx(8.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_place_has_as_many_right_ways_as_instructions(
    scenarios: dict[tuple[str, int], Scenario], seed: int
) -> None:
    left, right, ahead = (scenarios[kind, seed] for kind in ("turn_left", "turn_right", "straight"))
    follow = scenarios["follow", seed]
    for one, two in combinations((left, right, ahead), 2):
        assert one.spawns == two.spawns and one.weather == two.weather
        assert one.town.ground.cells.tobytes() == two.town.ground.cells.tobytes()
        assert one.town.solids == two.town.solids and one.town.lights == two.town.lights
        assert one.route.path[:60].tobytes()[: 4 * 8] == two.route.path[:60].tobytes()[: 4 * 8]
        assert np.hypot(*(one.route.path[-1] - two.route.path[-1])[:2]) > 30.0
        said = [{meaning_of(i.text) for i in told.route.instructions} - {"follow"} for told in (one, two)]
        assert said[0] and said[1]
    assert left.town.solids == follow.town.solids
    stop, overtake = scenarios["stop_behind", seed], scenarios["overtake", seed]
    assert stop.spawns == overtake.spawns and stop.town.solids == overtake.town.solids
    assert stop.route.length_m + 20 < overtake.route.length_m


def test_what_is_said_is_what_is_driven(scenarios: dict[tuple[str, int], Scenario]) -> None:
    """The sense of each instruction, from the shape of the path alone."""
    checked: Counter[str] = Counter()
    for key, told in scenarios.items():
        instructions, path = told.route.instructions, told.route.path
        assert instructions[0].from_s == 0.0
        assert all(one.from_s < two.from_s for one, two in pairwise(instructions)), key
        ends = [*(i.from_s for i in instructions[1:]), told.route.length_m]
        for instruction, end in zip(instructions, ends, strict=True):
            meaning = meaning_of(instruction.text)
            piece = path[int(instruction.from_s / 0.5) : int(end / 0.5) + 1]
            sharp = np.diff(piece[:, 2])
            sharp = sharp[np.abs(sharp) > 0.5 / 22.0]  # roads bend less than junctions
            turned = float(sharp.sum())
            checked[meaning] += 1
            if meaning in ("left", "right", "straight", "follow"):
                expected = {"left": turned > 1.1, "right": turned < -1.1}.get(meaning, abs(turned) < 0.4)
                assert expected, (key, meaning, turned)
            if meaning.startswith("exit"):
                heading = wrap(path[-1, 2] - path[0, 2])
                ring = float(sharp[sharp > 0].sum())
                number = int(meaning[-1])
                assert number - 1 == round((ring - 0.95) / (math.pi / 2) + 0.02), (key, ring, heading)
    assert set(checked) == set(WORDS)


def test_turns_are_announced_in_time(scenarios: dict[tuple[str, int], Scenario]) -> None:
    for key, told in scenarios.items():
        bends = np.abs(np.diff(told.route.path[:, 2])) > 0.5 / 16.0
        if key[0] in ("stop_behind", "overtake") or not bends.any():
            continue
        first = 0.5 * int(np.argmax(bends))
        said = [i for i in told.route.instructions if i.from_s <= max(first - 25.0, 0.0)]
        assert meaning_of(said[-1].text) != "follow", key


def test_words_have_one_meaning_and_every_choice_another() -> None:
    everything = [text for words in WORDS.values() for text in words]
    assert len(everything) == len(set(everything))
    assert all(len(words) >= 2 for words in WORDS.values())
    for meaning, others in OTHERS.items():
        assert meaning not in others and set(others) <= set(WORDS)


def test_a_navigator_says_nothing_for_a_few_metres() -> None:
    rng = np.random.default_rng(0)
    said = navigated([("left", 60.0, 75.0), ("right", 110.0, 125.0)], rng)
    assert [meaning_of(i.text) for i in said[:2]] == ["follow", "left"]
    assert 14.0 <= said[1].from_s <= 26.0
    assert [meaning_of(i.text) for i in said[-2:]] == ["right", "follow"] and said[-1].from_s == 127.0
    close = navigated([("straight", 30.0, 45.0)], rng)
    assert [meaning_of(i.text) for i in close] == ["straight", "follow"] and close[0].from_s == 0.0
    assert all(
        two.from_s - one.from_s >= FREE_M for one, two in pairwise((*said, *close[1:])) if two.from_s > one.from_s
    )


def test_the_other_instruction_is_wrong_here(scenarios: dict[tuple[str, int], Scenario]) -> None:
    for key, told in scenarios.items():
        other = other_instruction(told)
        decisions = [meaning_of(i.text) for i in told.route.instructions if meaning_of(i.text) != "follow"]
        assert meaning_of(other) != decisions[0] and meaning_of(other) in OTHERS[decisions[0]], key


def test_mixed_has_every_kind_in_nine_seeds() -> None:
    for base in (0, 9, 10_008):
        base -= base % 9
        assert Counter(kind_of("mixed", seed) for seed in range(base, base + 9)) == Counter(KINDS)
    orders = {tuple(kind_of("mixed", 9 * block + i) for i in range(9)) for block in range(5)}
    assert len(orders) > 1
    assert scenario("mixed", 4).kind == kind_of("mixed", 4)


def test_a_green_light_stands_where_a_red_one_does(scenarios: dict[tuple[str, int], Scenario]) -> None:
    for seed in SEEDS:
        red, green = scenarios["red_light", seed], scenario("green_light", seed)
        assert red.route.path.tobytes() == green.route.path.tobytes() and red.weather == green.weather
        assert red.route.instructions == green.route.instructions and red.spawns == green.spawns
        ours, theirs = ([replace(light, offset_s=0.0) for light in s.town.lights] for s in (red, green))
        assert ours == theirs and red.town.lights != green.town.lights


def test_an_unknown_kind_names_the_choices() -> None:
    with pytest.raises(SimulationError, match=r"unknown kind of driving 'parking'; there are follow, green_light"):
        scenario("parking", 0)


def test_the_same_seed_tells_the_same_story(scenarios: dict[tuple[str, int], Scenario]) -> None:
    for kind in KINDS:
        one, again = scenarios[kind, 3], scenario(kind, 3)
        assert one.spawns == again.spawns and one.weather == again.weather
        assert one.route.path.tobytes() == again.route.path.tobytes()
        assert one.route.instructions == again.route.instructions
    texts = {scenarios["turn_left", seed].route.instructions[-2].text for seed in SEEDS}
    assert len(texts) > 2  # paraphrases


def test_nobody_starts_inside_another_or_on_the_way(scenarios: dict[tuple[str, int], Scenario]) -> None:
    for key, told in scenarios.items():
        x, y, heading, _ = told.route.path[0]
        ego = ego_middle(Pose(x=x, y=y, heading=heading))
        vehicles = [spawn for spawn in told.spawns if spawn.walk is None]
        poses = [place(spawn, told) for spawn in vehicles]
        boxes = Boxes.of([*poses, ego], [*(spawn.size for spawn in vehicles), (LENGTH_M, WIDTH_M)])
        low = [solid for solid in told.town.solids if solid.kind != "crown"]
        solids = Boxes.of(
            [Pose(x=s.position[0], y=s.position[1], heading=s.heading) for s in low], [s.size for s in low]
        )
        for i in range(len(boxes.centres)):
            one = Boxes(boxes.centres[i : i + 1], boxes.headings[i : i + 1], boxes.halves[i : i + 1])
            assert overlaps(one, boxes).sum() == 1, (key, i)
            assert not overlaps(one, solids).any(), (key, i)
        line = Line(told.route.path[:, :3])
        for spawn, pose in zip(vehicles, poses, strict=True):
            if spawn.speed_mps == 0 and spawn.kind == "car":  # parked: the lane stays wide enough
                _, offset, _ = line.project(np.array([[pose.x, pose.y]]))
                assert abs(offset[0]) - spawn.size[1] / 2 > WIDTH_M / 2 + 0.4, key


def test_each_kind_has_what_it_is_about(scenarios: dict[tuple[str, int], Scenario]) -> None:
    for seed in SEEDS:
        lead, route = scenarios["follow", seed].spawns[0], scenarios["follow", seed].route
        assert lead.path == route.lanes and lead.speed_mps < 5 and lead.kind in ("car", "truck", "cyclist")
        told = scenarios["red_light", seed]
        light = told.town.lights[told.town.lanes[told.route.lanes[0]].light]  # type: ignore[index]
        stop = Line(told.route.path[:, :3]).project(np.array([light.stop[:2]]))[0][0]
        fast, slow = ((stop - FRONT_M) / speed for speed in (told.route.path[0, 3], 0.6 * told.route.path[0, 3]))
        assert "red" in {light.colour(t) for t in np.arange(fast, slow + 2.0, 0.2)}
        for kind in ("stop_behind", "overtake"):
            told = scenarios[kind, seed]
            (bus,) = [spawn for spawn in told.spawns if spawn.kind == "bus"]
            pose = place(bus, told)
            s = (
                float(Line(told.town.lanes[told.route.lanes[0]].centre).project(np.array([[pose.x, pose.y]]))[0][0])
                - 3.0
            )
            rear = s - bus.size[0] / 2
            if kind == "stop_behind":
                assert told.route.stop_at_end
                assert rear - told.route.length_m - FRONT_M == pytest.approx(BUS_GAP_M, abs=0.6)
            else:
                assert told.route.length_m > s + bus.size[0] / 2 + 20.0
            lane = told.town.lanes[told.route.lanes[0]]  # one sees past it, and the other lane is there
            assert lane.opposite is not None
            assert abs(Line(lane.centre).pose(s - 20).heading - Line(lane.centre).pose(s + 10).heading) < 0.02


def test_a_pedestrian_crosses_the_way_on_the_crosswalk(scenarios: dict[tuple[str, int], Scenario]) -> None:
    for seed in SEEDS:
        told = scenarios["pedestrian", seed]
        walker, line = told.spawns[0], Line(told.route.path[:, :3])
        assert walker.kind == "pedestrian" and walker.walk is not None and walker.speed_mps > 1
        way = np.linspace(*np.array(walker.walk), 60)
        s, offset, _ = line.project(way)
        assert offset.min() < -2.5 and offset.max() > 2.5  # from one side to the other
        assert s.min() > FRONT_M + walker.trigger_m  # it waits at first
        on = told.town.ground.at(way)
        assert (on == Surface.CROSSWALK).mean() > 0.2 and on[0] == on[-1] == Surface.SIDEWALK


def test_strollers_stay_on_the_sidewalk(scenarios: dict[tuple[str, int], Scenario]) -> None:
    found = 0
    for key, told in scenarios.items():
        for spawn in told.spawns[1:]:
            if spawn.walk is not None:
                found += 1
                assert not np.isin(told.town.ground.at(np.linspace(*np.array(spawn.walk), 80)), DRIVABLE).any(), key
    assert found > 10


def test_crossing_traffic_is_held_by_lights(scenarios: dict[tuple[str, int], Scenario]) -> None:
    found = 0
    for key, told in scenarios.items():
        for spawn in told.spawns:
            if len(spawn.path) > 1 and spawn.path != told.route.lanes:
                found += 1
                assert told.town.lanes[spawn.path[0]].light is not None, key
    assert found > 2


def test_weather_comes_in_all_kinds() -> None:
    skies = [scenario("stop_behind", seed).weather for seed in range(40)]
    assert {sky.time for sky in skies} == {"day", "dusk", "fog"}
    for sky in skies:
        assert (sky.fog_m is None) == (sky.time != "fog") and 0.3 < sky.brightness < 1.3 and sky.sun[2] < 0
    assert len({sky.texture_seed for sky in skies}) == 40


def test_a_tracker_is_not_confused_by_a_loop() -> None:
    """A path that crosses itself: at the crossing it goes on where it was."""
    from vla_core.sim.driving.network import line

    centre = line((0, 0, 0), (30.0, 0.0), (2 * math.pi * 10 * 0.75, 0.1), (40.0, 0.0))
    path = np.column_stack((centre, np.full(len(centre), 5.0)))
    tracker = RouteTracker(Route(path=path, lanes=(), instructions=()))
    whole = tracker.line.stations
    last = -1.0
    for (x, y, heading), s in zip(centre, whole, strict=True):
        found, offset = tracker.locate(state(x - 0.3 * math.sin(heading), y + 0.3 * math.cos(heading)))
        assert found == pytest.approx(s, abs=0.25) and offset == pytest.approx(0.3, abs=0.05)
        assert tracker.reached >= last
        last = tracker.reached
    x, y, _ = centre[-20]
    back = tracker.progress(state(x, y))
    assert back == last == pytest.approx(whole[-1], abs=0.3)  # progress never falls
    new = RouteTracker(Route(path=path, lanes=(), instructions=()))  # finds its place at once
    assert new.locate(state(*centre[200, :2]))[0] == pytest.approx(whole[200], abs=0.3)
