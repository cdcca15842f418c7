"""The layouts for RViz and Foxglove show topics that exist, and every panel is placed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from vla_core.contract import RobotContract
from vla_core.resources import share

OWN = {"action_chunk", "action_chunk/markers", "action_chunk/path", "episode", "diagnostics",
       "trajectory_follower/path", "ground_truth/odom", "ground_truth/objects"}  # fmt: skip
SERVICES = {"/policy/stop", "/safety/reset"}


def known_topics() -> set[str]:
    contracts = [RobotContract.load(path) for path in share("config/robots").glob("*.yaml")]
    drives = {contract.following.command.topic for contract in contracts if contract.following is not None}
    return OWN | drives | {stream.topic for contract in contracts for stream in contract.observations.values()}


@pytest.mark.parametrize("name", ["vla", "driving"])
def test_rviz_shows_topics_that_exist(name: str) -> None:
    layout = yaml.safe_load(share(f"config/rviz/{name}.rviz").read_text(encoding="utf-8"))
    displays = layout["Visualization Manager"]["Displays"]
    topics = {display["Topic"]["Value"] for display in displays if "Topic" in display}
    assert {"action_chunk/markers", "action_chunk/path"} <= topics
    assert topics <= known_topics()


@pytest.mark.parametrize("name", ["vla", "driving"])
def test_foxglove_shows_topics_that_exist_and_places_every_panel(name: str) -> None:
    layout = json.loads(share(f"config/foxglove/{name}.json").read_text(encoding="utf-8"))
    panels = layout["configById"]
    topics = {text for text in _texts(panels) if text.startswith("/")} - SERVICES
    plain = {re.split(r"[.\[:]", topic)[0].strip("/") for topic in topics}
    plain.discard("policy")  # a diagnostic status: "/policy: policy"
    assert plain <= known_topics()
    assert _leaves(layout["layout"]) == sorted(panels)
    assert {panel["serviceName"] for panel in panels.values() if "serviceName" in panel} == SERVICES


def test_the_layouts_for_driving_show_every_sensor() -> None:
    sensors = {stream.topic for stream in RobotContract.load("driving").observations.values()
               if stream.type.endswith(("/Image", "/PointCloud2"))}  # fmt: skip
    for path in ("rviz/driving.rviz", "foxglove/driving.json"):
        text = share(f"config/{path}").read_text(encoding="utf-8")
        assert {topic for topic in sensors if topic not in text} == set(), path


def _texts(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        return [*tree, *(text for value in tree.values() for text in _texts(value))]
    return [tree] if isinstance(tree, str) else []


def _leaves(tree: Any) -> list[str]:
    return sorted(_leaves(tree["first"]) + _leaves(tree["second"])) if isinstance(tree, dict) else [tree]
