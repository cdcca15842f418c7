"""The layouts for RViz and Foxglove show topics that exist, and every panel is placed."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from vla_core.contract import RobotContract
from vla_core.resources import share

OWN = {"action_chunk", "action_chunk/markers", "action_chunk/path", "episode", "diagnostics"}
SERVICES = {"/policy/stop", "/safety/reset"}


def known_topics() -> set[str]:
    contracts = [RobotContract.load(path) for path in share("config/robots").glob("*.yaml")]
    return OWN | {stream.topic for contract in contracts for stream in contract.observations.values()}


def test_rviz_shows_topics_that_exist() -> None:
    layout = yaml.safe_load(share("config/rviz/vla.rviz").read_text(encoding="utf-8"))
    displays = layout["Visualization Manager"]["Displays"]
    topics = {display["Topic"]["Value"] for display in displays if "Topic" in display}
    assert {"action_chunk/markers", "action_chunk/path"} <= topics
    assert topics <= known_topics()


def test_foxglove_shows_topics_that_exist_and_places_every_panel() -> None:
    layout = json.loads(share("config/foxglove/vla.json").read_text(encoding="utf-8"))
    panels = layout["configById"]
    topics = {text for text in _texts(panels) if text.startswith("/")} - SERVICES
    plain = {re.split(r"[.\[:]", topic)[0].strip("/") for topic in topics}
    plain.discard("policy")  # a diagnostic status: "/policy: policy"
    assert plain <= known_topics()
    assert _leaves(layout["layout"]) == sorted(panels)
    assert {panel["serviceName"] for panel in panels.values() if "serviceName" in panel} == SERVICES


def _texts(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        return [*tree, *(text for value in tree.values() for text in _texts(value))]
    return [tree] if isinstance(tree, str) else []


def _leaves(tree: Any) -> list[str]:
    return sorted(_leaves(tree["first"]) + _leaves(tree["second"])) if isinstance(tree, dict) else [tree]
