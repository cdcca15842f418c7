"""Closed-loop figures of drives, in the terms of the CARLA leaderboard and of Bench2Drive, with confidence intervals.

A route is one drive: what the world says of it (:class:`vla_core.sim.driving.rules.Score`) as it stands in the results
of an evaluation or of a simulator node. Scores and completions are in percent here, as CARLA's leaderboard has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_core.evaluation.metrics import bootstrap_interval, wilson_interval

INFRACTIONS = {  # of a route's details; what ended it early is one as well
    "collisions_pedestrian": "collision with a pedestrian",
    "collisions_vehicle": "collision with a vehicle",
    "collisions_static": "collision with an obstacle",
    "red_lights": "red light",
    "deviated": "left the route",
    "blocked": "blocked",
    "timeout": "out of time",
}
COLLISIONS = ("collisions_pedestrian", "collisions_vehicle", "collisions_static")
OFF_ROAD_M = 1.0  # driven off the road before it is told as an infraction
COMFORT = ("comfort", "acceleration_p95", "braking_max", "lateral_p95", "jerk_p95", "speed_mean")


@dataclass(frozen=True, kw_only=True)
class Route:
    """One drive; ``details`` are the world's figures of it, ``kind`` what the route asks for."""

    seed: int
    kind: str
    success: bool
    details: Mapping[str, float]
    instruction: str = ""
    steps: int = 0

    @property
    def score(self) -> float:
        """Driving score, percent."""
        return 100 * self.details["driving_score"]

    @property
    def completion(self) -> float:
        """Route completion, percent."""
        return 100 * self.details["route_completion"]

    @property
    def infractions(self) -> dict[str, int]:
        """How often each happened, by its words; none where all went well."""
        found = {words: int(self.details[name]) for name, words in INFRACTIONS.items() if self.details[name]}
        if self.details["off_road_m"] > OFF_ROAD_M:
            found["off the road"] = 1
        return found

    def to_dict(self) -> dict[str, Any]:
        """The route as a report has it."""
        return {
            "seed": self.seed, "kind": self.kind, "instruction": self.instruction, "success": self.success,
            "score": self.score, "completion": self.completion, "infractions": self.infractions,
            "seconds": self.details["seconds"], "km": self.details["km"],
            "off_road_share": self.details["off_road_share"],
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Driven:
    """Drives of one policy under one condition."""

    name: str
    routes: tuple[Route, ...]
    latencies: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def of_kind(self, kind: str) -> Driven:
        """Those of one kind."""
        return Driven(name=kind, routes=tuple(route for route in self.routes if route.kind == kind))

    @property
    def kinds(self) -> list[str]:
        """Kinds of routes, sorted."""
        return sorted({route.kind for route in self.routes})


def figures(driven: Driven) -> dict[str, Any]:
    """All figures of at least one route; ``…_ci95`` are 95 % intervals: Wilson's of success, bootstrap of the others.

    ``driving_score`` and ``route_completion`` are means over routes, in percent; rates per km are sums over sums.
    """
    routes = driven.routes
    if not routes:
        raise ValueError(f"{driven.name}: no routes")
    successes = sum(route.success for route in routes)
    km = [route.details["km"] for route in routes]
    found: dict[str, Any] = {
        "episodes": len(routes), "successes": successes, "success_rate": successes / len(routes),
        "success_ci95": wilson_interval(successes, len(routes)),
    }  # fmt: skip
    for name, values in (
        ("driving_score", [route.score for route in routes]),
        ("route_completion", [route.completion for route in routes]),
    ):
        found |= {name: float(np.mean(values)), f"{name}_ci95": bootstrap_interval(values)}
    collisions = [sum(route.details[name] for name in COLLISIONS) for route in routes]
    found["collisions_per_km"] = sum(collisions) / sum(km) if sum(km) else None
    found["collisions_per_km_ci95"] = bootstrap_interval(collisions, km)
    happened = [words for route in routes for words, count in route.infractions.items() for _ in range(count)]
    found["infractions"] = {words: happened.count(words) for words in dict.fromkeys(happened)}
    found["off_road_share"] = _mean_of(routes, "off_road_share")
    found["km"], found["seconds"] = sum(km), sum(route.details["seconds"] for route in routes)
    found["comfort"] = {name: _mean_of(routes, name) for name in COMFORT}
    return found


def difference(driven: Driven, reference: Driven) -> tuple[float, tuple[float, float] | None] | None:
    """Mean difference of the driving score to ``reference`` over the same seeds, percent points, with its interval."""
    theirs = {route.seed: route.score for route in reference.routes}
    deltas = [route.score - theirs[route.seed] for route in driven.routes if route.seed in theirs]
    return (float(np.mean(deltas)), bootstrap_interval(deltas)) if deltas else None


def _mean_of(routes: Sequence[Route], name: str) -> float:
    return float(np.mean([route.details[name] for route in routes]))
